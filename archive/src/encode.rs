//! The headers of one entry: whatever a plain header cannot say stands in PAX records before it.

use rustix::fs::Statx;
use tar::EntryType;

use crate::attributes::Attributes;
use crate::header::{self, BLOCK, Meta, NAME_ROOM};
use crate::pack::PackError;
use crate::xattr::{self, Xattrs};
use crate::{acl, pax, shown, sparse};

/// What an entry is, beside its content.
pub(crate) struct Head<'a> {
    pub path: &'a [u8],
    pub stat: &'a Statx,
    pub kind: EntryType,
    pub link: &'a [u8],
    pub xattrs: &'a Xattrs,
    pub attributes: Attributes,
    /// The size of a file's content, and its data regions when there are holes.
    pub size: u64,
    pub map: Option<&'a sparse::Map>,
}

/// Fills up to whole blocks.
pub(crate) fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

/// Makes headers, in memory that is used again and again: memory taken for each file would have readers wait for each other.
#[derive(Default)]
pub(crate) struct Encoder {
    name: Vec<u8>,
    extended: Vec<u8>,
    short: Vec<u8>,
}

impl Encoder {
    /// Appends the headers of an entry to `out`, which holds whole blocks; returns how many bytes of content must follow.
    pub(crate) fn put(&mut self, out: &mut Vec<u8>, head: &Head<'_>) -> Result<u64, PackError> {
        let Head { path, stat, kind, link, map, .. } = *head;
        self.name.clear();
        self.name.extend_from_slice(if path.is_empty() { b"." } else { path });
        if kind == EntryType::Directory {
            self.name.push(b'/');
        }
        self.extended.clear();
        extended(&mut self.extended, &self.name, head);
        if self.extended.len() > pax::MAX_EXTENDED {
            return Err(PackError::TooManyXattrs { path: shown(path), bytes: self.extended.len() });
        }
        let base = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
        if !self.extended.is_empty() {
            let meta = Meta { mode: 0o644, ..Meta::default() };
            let size = self.extended.len() as u64;
            let name = self.short(b"PaxHeaders/", base);
            out.extend_from_slice(&header::build(EntryType::XHeader, name, &[], &meta, size));
            out.extend_from_slice(&self.extended);
            pad(out);
        }
        let meta = Meta {
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            seconds: stat.stx_mtime.tv_sec,
            device: match kind {
                EntryType::Char | EntryType::Block => (stat.stx_rdev_major, stat.stx_rdev_minor),
                _ => (0, 0),
            },
        };
        let Some(map) = map else {
            out.extend_from_slice(&header::build(kind, &self.name, link, &meta, head.size));
            return Ok(head.size);
        };
        let map_bytes = sparse::encode(map, head.size);
        let data = map.iter().map(|region| region.1).sum();
        let name = self.short(b"GNUSparseFile.0/", base);
        out.extend_from_slice(&header::build(kind, name, link, &meta, map_bytes.len() as u64 + data));
        out.extend_from_slice(&map_bytes);
        Ok(data)
    }

    /// A name for readers that do not understand the records.
    fn short(&mut self, folder: &[u8], base: &[u8]) -> &[u8] {
        self.short.clear();
        self.short.extend_from_slice(folder);
        self.short.extend_from_slice(base);
        &self.short
    }
}

/// The PAX records of an entry.
fn extended(out: &mut Vec<u8>, name: &[u8], head: &Head<'_>) {
    let link = head.link;
    let long_name = head.map.is_some() || name.len() > NAME_ROOM;
    let long_link = link.len() > NAME_ROOM;
    let odd = |bytes: &[u8]| std::str::from_utf8(bytes).is_err();
    if (long_name && odd(name)) || (long_link && odd(link)) {
        // Says that names are bytes as they are; otherwise they ought to be UTF-8.
        pax::put(out, b"hdrcharset", b"BINARY");
    }
    if head.map.is_some() {
        pax::put(out, b"GNU.sparse.major", b"1");
        pax::put(out, b"GNU.sparse.minor", b"0");
        pax::put(out, b"GNU.sparse.name", name);
        pax::put(out, b"GNU.sparse.realsize", head.size.to_string().as_bytes());
    } else if long_name {
        pax::put(out, b"path", name);
    }
    if long_link {
        pax::put(out, b"linkpath", link);
    }
    let mtime = head.stat.stx_mtime;
    // A further name of a file has no time of its own.
    if head.kind != EntryType::Link && (mtime.tv_nsec != 0 || mtime.tv_sec < 0) {
        pax::put_time(out, b"mtime", mtime.tv_sec, mtime.tv_nsec);
    }
    let Attributes { project, .. } = head.attributes;
    if project != 0 {
        pax::put(out, b"KA.projid", project.to_string().as_bytes());
    }
    let flags = head.attributes.words();
    if !flags.is_empty() {
        pax::put(out, b"SCHILY.fflags", flags.as_bytes());
    }
    for (name, value) in head.xattrs {
        // GNU tar and bsdtar take ACLs as text only. It stands in front: for us the attribute that follows counts.
        let text_key = match name.as_c_str() {
            name if name == xattr::ACCESS_ACL => Some(&b"SCHILY.acl.access"[..]),
            name if name == xattr::DEFAULT_ACL => Some(&b"SCHILY.acl.default"[..]),
            _ => None,
        };
        if let Some((key, text)) = text_key.zip(acl::to_text(value)) {
            pax::put(out, key, text.as_bytes());
        }
        let key = [b"SCHILY.xattr.", &pax::escape_name(name.to_bytes())[..]].concat();
        pax::put(out, &key, value);
    }
}
