//! Reads a tar stream entry by entry: ustar, PAX (records by length, global headers), GNU long names, and all four GNU
//! sparse formats. Every number and name is taken as hostile: bounded, checked, and an error where it does not make
//! sense. What an entry does to the disk is decided elsewhere (restore.rs).

use std::ffi::{CStr, CString};
use std::io::Read;

use tar::EntryType;

use crate::attributes::Attributes;
use crate::header::{self, BLOCK};
use crate::input::Input;
use crate::sparse::{self, MAX_REGIONS};
use crate::unpack::UnpackError;
use crate::xattr::{ACCESS_ACL, DEFAULT_ACL, Xattrs};
use crate::{acl, pax};

/// Longest path or link target, in bytes.
pub(crate) const MAX_PATH: usize = 64 << 10;
/// Longest value of an extended attribute, and the most that all names of one entry take with a NUL each: the kernel's limits.
const MAX_XATTR: usize = 64 << 10;
/// Most that global headers may have every entry begin with, in bytes.
const MAX_GLOBAL: usize = 64 << 10;

/// What kind of thing an entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A further name of a file that came before.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
    /// A directory.
    Directory,
}

/// One entry; the content of a file (`stored` bytes, then padding) is still to be read.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: Kind,
    /// As in the stream: not checked for where it leads.
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub xattrs: Xattrs,
    pub attributes: Attributes,
    /// Bytes of content in the stream.
    pub stored: u64,
    /// The size of the file and its data regions, when it has holes.
    pub sparse: Option<(u64, sparse::Map)>,
}

/// What PAX records say; they stand above the plain header.
#[derive(Debug, Clone, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    /// In the order of the records until they are settled.
    xattrs: Vec<(CString, Vec<u8>)>,
    /// Bytes of their names.
    names: usize,
    /// ACLs as text, with the xattr that each stands for; the xattr itself counts for more.
    acls: Vec<(&'static CStr, Vec<u8>)>,
    attributes: Attributes,
    sparse: PaxSparse,
}

#[derive(Debug, Clone, Default)]
struct PaxSparse {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    numbers: Vec<u64>,
    seen: bool,
}

impl Entry {
    /// Bytes of its content and its extended attributes.
    pub(crate) fn weight(&self) -> u64 {
        self.xattrs.iter().fold(self.stored, |sum, (_, value)| sum.saturating_add(value.len() as u64))
    }
}

pub(crate) struct Decoder<R> {
    pub(crate) input: Input<R>,
    global: Extended,
    /// Records with keys that mean nothing to us.
    pub(crate) ignored: u64,
}

impl<R: Read> Decoder<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { input: Input::new(source), global: Extended::default(), ignored: 0 }
    }

    fn wrong(&self, what: impl Into<String>) -> UnpackError {
        UnpackError::Format { at: self.input.position(), what: what.into() }
    }

    /// The next entry; none when the stream has come to its proper end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, UnpackError> {
        let mut extended: Option<Extended> = None;
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let Some(block) = self.input.block()? else {
                return Err(UnpackError::Truncated { at: self.input.position() });
            };
            if block == [0; BLOCK] {
                if extended.is_some() || long_name.is_some() || long_link.is_some() {
                    return Err(self.wrong("an extended header with no entry after it"));
                }
                return self.end().map(|()| None);
            }
            let parsed =
                header::parse(&block).map_err(|e| self.wrong(format!("a header that is wrong: {e}")))?;
            match parsed.kind {
                EntryType::XHeader => {
                    if extended.is_some() {
                        return Err(self.wrong("two extended headers for one entry"));
                    }
                    let data = self.extra(parsed.size, pax::MAX_EXTENDED, "extended header")?;
                    let mut records = self.global.clone();
                    self.records(&data, &mut records)?;
                    extended = Some(records);
                }
                EntryType::XGlobalHeader => {
                    let data = self.extra(parsed.size, pax::MAX_EXTENDED, "global header")?;
                    let mut global = std::mem::take(&mut self.global);
                    self.records(&data, &mut global)?;
                    global.settle();
                    if global.bytes() > MAX_GLOBAL {
                        return Err(self.wrong("global headers that give all entries too much"));
                    }
                    if global.path.is_some()
                        || global.link.is_some()
                        || global.size.is_some()
                        || global.sparse.seen
                    {
                        return Err(self.wrong("a global header that gives all entries one name or size"));
                    }
                    self.global = global;
                }
                EntryType::GNULongName if long_name.is_none() => {
                    long_name = Some(self.long(parsed.size)?);
                }
                EntryType::GNULongLink if long_link.is_none() => {
                    long_link = Some(self.long(parsed.size)?);
                }
                EntryType::GNULongName | EntryType::GNULongLink => {
                    return Err(self.wrong("two long names for one entry"));
                }
                _ => {
                    let mut extended = extended.unwrap_or_else(|| self.global.clone());
                    extended.path = extended.path.or(long_name);
                    extended.link = extended.link.or(long_link);
                    return self.entry(&block, parsed, extended).map(Some);
                }
            }
        }
    }

    /// After the first zero block: another, and nothing but zeros up to the end of the input.
    fn end(&mut self) -> Result<(), UnpackError> {
        match self.input.block()? {
            None => return Err(UnpackError::Truncated { at: self.input.position() }),
            Some(block) if block != [0; BLOCK] => {
                return Err(self.wrong("one zero block alone, where two would end the stream"));
            }
            Some(_) => {}
        }
        loop {
            let rest = self.input.available()?;
            if rest.is_empty() {
                return Ok(());
            }
            if rest.iter().any(|&b| b != 0) {
                return Err(self.wrong("more data after the end of the stream (two archives joined?)"));
            }
            let count = rest.len();
            self.input.take(count);
        }
    }

    fn extra(&mut self, size: u64, limit: usize, what: &str) -> Result<Vec<u8>, UnpackError> {
        match usize::try_from(size) {
            Ok(size) if size <= limit => self.input.padded(size),
            _ => Err(self.wrong(format!("a {what} of {size} bytes, more than the {limit} allowed"))),
        }
    }

    fn long(&mut self, size: u64) -> Result<Vec<u8>, UnpackError> {
        let data = self.extra(size, MAX_PATH, "long name")?;
        Ok(header::text(&data).to_vec())
    }

    fn records(&mut self, mut data: &[u8], out: &mut Extended) -> Result<(), UnpackError> {
        while !data.is_empty() {
            let (key, value, rest) =
                pax::next(data).map_err(|e| self.wrong(format!("an extended header that is wrong: {e}")))?;
            data = rest;
            if !out.record(key, value).map_err(|e| {
                self.wrong(format!("an extended header that is wrong: {}: {e}", key.escape_ascii()))
            })? {
                self.ignored += 1;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        parsed: header::Parsed,
        mut extended: Extended,
    ) -> Result<Entry, UnpackError> {
        extended.settle();
        for (name, text) in std::mem::take(&mut extended.acls) {
            if !text.is_empty() && !extended.xattrs.iter().any(|(known, _)| known.as_c_str() == name) {
                let value = acl::from_text(&text).map_err(|e| self.wrong(e))?;
                extended.xattr(name.into(), value).map_err(|e| self.wrong(e))?;
            }
        }
        let mut sparse = extended.sparse;
        let path = sparse.name.take().or(extended.path).unwrap_or(parsed.name);
        let link = extended.link.unwrap_or(parsed.link);
        let kind = match parsed.kind {
            // Before there was a type for directories, a slash at the end said so.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Char => Kind::Char,
            EntryType::Block => Kind::Block,
            EntryType::Fifo => Kind::Fifo,
            EntryType::Directory => Kind::Directory,
            other => {
                return Err(UnpackError::UnknownType {
                    path: crate::shown(&path),
                    code: char::from(other.as_byte()).escape_default().to_string(),
                });
            }
        };
        if path.len() > MAX_PATH || link.len() > MAX_PATH {
            return Err(self.wrong(format!("a path of {} bytes", path.len().max(link.len()))));
        }
        let mut stored = extended.size.unwrap_or(parsed.size);
        if i64::try_from(stored).is_err() {
            return Err(self.wrong(format!("a file of {stored} bytes")));
        }
        if kind != Kind::File && stored != 0 {
            return Err(
                self.wrong(format!("an entry with content that can have none: {}", crate::shown(&path)))
            );
        }
        let map = if parsed.kind == EntryType::GNUSparse {
            Some(self.old_gnu_map(block)?)
        } else if kind == Kind::File {
            self.pax_map(&sparse, &mut stored)?
        } else {
            None
        };
        if let Some((size, map)) = &map {
            if i64::try_from(*size).is_err() {
                return Err(self.wrong(format!("a file of {size} bytes")));
            }
            sparse::check(map, *size, stored).map_err(|e| self.wrong(e))?;
        }
        let owner = |id: u64, what: &str| match u32::try_from(id) {
            // All ones means "leave it" to the kernel.
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(self.wrong(format!("a {what} of {id}, which no file can have"))),
        };
        let device = |number: u64| {
            u32::try_from(number).map_err(|_| self.wrong(format!("a device number of {number}")))
        };
        Ok(Entry {
            kind,
            mode: parsed.mode,
            uid: owner(extended.uid.unwrap_or(parsed.uid), "uid")?,
            gid: owner(extended.gid.unwrap_or(parsed.gid), "gid")?,
            mtime: extended.mtime.unwrap_or((parsed.seconds, 0)),
            device: (device(parsed.device.0)?, device(parsed.device.1)?),
            xattrs: extended.xattrs,
            attributes: extended.attributes,
            sparse: map,
            path,
            link,
            stored,
        })
    }

    /// The map of the oldest format: four regions in the header, 21 more in each block that follows it.
    fn old_gnu_map(&mut self, block: &[u8; BLOCK]) -> Result<(u64, sparse::Map), UnpackError> {
        let positive = |field: &[u8]| header::number(field).and_then(|n| u64::try_from(n).ok());
        let wrong_number = "a sparse map with a wrong number";
        let size = positive(&block[483..495]).ok_or_else(|| self.wrong(wrong_number))?;
        let mut map = sparse::Map::new();
        let (mut regions, mut more) = (block[386..482].to_vec(), block[482] != 0);
        loop {
            for region in regions.chunks_exact(24) {
                if region[0] == 0 && region[12] == 0 {
                    break;
                }
                let both = positive(&region[..12]).zip(positive(&region[12..]));
                map.push(both.ok_or_else(|| self.wrong(wrong_number))?);
            }
            if map.len() > MAX_REGIONS {
                return Err(self.wrong("a sparse map with too many regions"));
            }
            if !more {
                return Ok((size, map));
            }
            let mut next = [0; BLOCK];
            self.input.exact(&mut next)?;
            (regions, more) = (next[..504].to_vec(), next[504] != 0);
        }
    }

    /// The map of the PAX formats 0.0, 0.1 (in the records) and 1.0 (in front of the data).
    fn pax_map(
        &mut self,
        sparse: &PaxSparse,
        stored: &mut u64,
    ) -> Result<Option<(u64, sparse::Map)>, UnpackError> {
        if !sparse.seen {
            return Ok(None);
        }
        let size = sparse.size.ok_or_else(|| self.wrong("a sparse file without its real size"))?;
        match (sparse.major.unwrap_or(0), sparse.minor.unwrap_or(0)) {
            (0, _) => {
                if !sparse.numbers.len().is_multiple_of(2) {
                    return Err(self.wrong("a sparse map with half a region"));
                }
                let map = sparse.numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                Ok(Some((size, map)))
            }
            (1, 0) => {
                let input = &mut self.input;
                let (map, taken) = sparse::decode(|| {
                    let mut block = [0; BLOCK];
                    input.exact(&mut block).map(|()| block)
                })?
                .map_err(|e| self.wrong(e))?;
                *stored = stored
                    .checked_sub(taken)
                    .ok_or_else(|| self.wrong("a sparse map longer than its entry"))?;
                Ok(Some((size, map)))
            }
            (major, minor) => Err(self.wrong(format!("the unknown sparse format {major}.{minor}"))),
        }
    }
}

impl Extended {
    /// Takes one record; false when its key means nothing to us.
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<bool, String> {
        let number = || pax::decimal(value).ok_or_else(|| "not a number".to_owned());
        // An empty value takes an earlier one back.
        let unless_empty = |number: Result<u64, String>| {
            if value.is_empty() { Ok(None) } else { number.map(Some) }
        };
        match key {
            b"path" => self.path = name(value)?,
            b"linkpath" => self.link = name(value)?,
            b"size" => self.size = unless_empty(number())?,
            b"uid" => self.uid = unless_empty(number())?,
            b"gid" => self.gid = unless_empty(number())?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(pax::parse_time(value).ok_or("not a time")?),
            b"SCHILY.acl.access" => self.acl(ACCESS_ACL, value),
            b"SCHILY.acl.default" => self.acl(DEFAULT_ACL, value),
            b"SCHILY.fflags" => return Ok(self.attributes.take_words(value)),
            b"KA.projid" => {
                let number = unless_empty(number())?.unwrap_or(0);
                self.attributes.project = u32::try_from(number).map_err(|_| "no project id")?;
            }
            b"RHT.security.selinux" => {
                let value = [value.strip_suffix(b"\0").unwrap_or(value), b"\0"].concat();
                self.xattr(c"security.selinux".into(), value)?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    let name =
                        CString::new(pax::unescape_name(name)).map_err(|_| "a NUL in an xattr's name")?;
                    if name.is_empty() || name.as_bytes().len() > 255 {
                        return Err("an xattr's name of a wrong length".to_owned());
                    }
                    self.xattr(name, value.to_vec())?;
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    return self.sparse.record(key, value);
                } else {
                    return Ok(matches!(
                        key,
                        b"atime" | b"ctime" | b"uname" | b"gname" | b"comment" | b"charset" | b"hdrcharset"
                    ));
                }
            }
        }
        Ok(true)
    }

    fn xattr(&mut self, name: CString, value: Vec<u8>) -> Result<(), String> {
        self.names += name.as_bytes_with_nul().len();
        if value.len() > MAX_XATTR || self.names > MAX_XATTR {
            return Err("extended attributes larger than the kernel's".to_owned());
        }
        self.xattrs.push((name, value));
        Ok(())
    }

    fn acl(&mut self, name: &'static CStr, text: &[u8]) {
        self.acls.retain(|(known, _)| *known != name);
        self.acls.push((name, text.to_vec()));
    }

    /// Puts the attributes in order; of several with one name the last counts.
    fn settle(&mut self) {
        if self.xattrs.len() > 1 {
            self.xattrs.reverse();
            self.xattrs.sort_by(|a, b| a.0.cmp(&b.0));
            self.xattrs.dedup_by(|a, b| a.0 == b.0);
            self.names = self.xattrs.iter().map(|(name, _)| name.as_bytes_with_nul().len()).sum();
        }
    }

    /// Bytes that it holds, but for names and numbers.
    fn bytes(&self) -> usize {
        let xattrs: usize = self.xattrs.iter().map(|(_, value)| value.len()).sum();
        let acls: usize = self.acls.iter().map(|(_, text)| text.len()).sum();
        self.names + xattrs + acls
    }
}

fn name(value: &[u8]) -> Result<Option<Vec<u8>>, String> {
    if value.contains(&0) {
        return Err("a name with a NUL in it".to_owned());
    }
    Ok(if value.is_empty() { None } else { Some(value.to_vec()) })
}

impl PaxSparse {
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<bool, String> {
        self.seen = true;
        let number = || pax::decimal(value).ok_or_else(|| "not a number".to_owned());
        match key {
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"name" => self.name = name(value)?,
            b"size" | b"realsize" => self.size = Some(number()?),
            // Only says what can be counted.
            b"numblocks" => {
                number()?;
            }
            b"offset" | b"numbytes" => {
                let expected = if key == b"offset" { 0 } else { 1 };
                if self.numbers.len() % 2 != expected {
                    return Err("out of turn".to_owned());
                }
                self.add(number()?)?;
            }
            b"map" => {
                self.numbers.clear();
                for part in value.split(|&b| b == b',').filter(|part| !part.is_empty()) {
                    self.add(pax::decimal(part).ok_or("not a list of numbers")?)?;
                }
            }
            _ => return Err("an unknown sparse record".to_owned()),
        }
        Ok(true)
    }

    fn add(&mut self, number: u64) -> Result<(), String> {
        if self.numbers.len() >= 2 * MAX_REGIONS {
            return Err("too many regions".to_owned());
        }
        self.numbers.push(number);
        Ok(())
    }
}
