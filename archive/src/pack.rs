//! Writes a tree as a tar stream. Each file is read once, straight into the stream's buffer. On a live root files change
//! under our eyes: a file's header is a promise that is kept (never more bytes, zeros for missing ones), and what
//! changed, vanished or cannot be sent stands in the summary. What cannot be read fails the whole run.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    Advice, AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, fadvise, openat, readlinkat, statx,
};
use rustix::io::{Errno, pread};
use tar::EntryType;

use crate::digest::Digester;
use crate::header::{self, Meta, NAME_ROOM};
use crate::manifest::{self, Kind};
use crate::output::Output;
use crate::walk::{Event, Item, Walker, file_type, inode};
use crate::xattr::{self, Object, Xattrs};
use crate::{Observer, PathList, acl, pax, shown, sparse};

/// What is packed.
#[derive(Debug, Clone, Default)]
pub struct PackOptions {
    /// The directory whose content is sent.
    pub root: PathBuf,
    /// Mount points, as paths inside the root (`/`, `/boot`, ...), whose file systems are sent. Where any other file
    /// system is mounted, only an empty directory is sent, with the mode and owner that are seen. None: the root's alone.
    pub mounts: Option<Vec<String>>,
    /// Globs on the absolute path inside the root; see [`crate::default_excludes`]. A directory that matches is sent
    /// empty; a pattern ending in `/*` means a directory's content alone; other matches are left out.
    pub excludes: Vec<String>,
    /// Leave out what cannot be opened, and list it, instead of failing. A file that breaks off while it is read fails
    /// the run all the same.
    pub skip_unreadable: bool,
}

/// What was sent, and what was not.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PackSummary {
    /// Regular files, each inode once.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Further names of files that were sent before.
    pub hard_links: u64,
    /// Block and character devices.
    pub devices: u64,
    /// Named pipes.
    pub fifos: u64,
    /// Bytes of file content in the stream, without holes.
    pub content_bytes: u64,
    /// Bytes of the stream.
    pub archive_bytes: u64,
    /// Things that exclude patterns left out; directories that were sent empty are not counted.
    pub left_out: u64,
    /// Files that changed while they were read: their copy is of the promised size, but may mix old and new content.
    pub changed: PathList,
    /// What was listed in a directory and gone a moment later.
    pub vanished: PathList,
    /// Sockets, which no archive can hold; the programs that own them make them anew.
    pub sockets: PathList,
    /// Where other file systems are mounted that are not sent.
    pub other_mounts: PathList,
    /// What could not be opened, with the cause; only with [`PackOptions::skip_unreadable`].
    pub unreadable: PathList,
}

/// Why the tree was not sent.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The root is not there or no directory.
    #[error("opening the root {}: {source}", root.display())]
    Root {
        /// As in the options.
        root: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An exclude pattern is no glob.
    #[error("exclude pattern: {0}")]
    Pattern(#[from] globset::Error),
    /// `/proc` is needed for the xattrs of what cannot be opened.
    #[error("/proc is not mounted: {0}")]
    NoProc(io::Error),
    /// Something in the tree could not be read.
    #[error("{operation} {path}: {source}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Absolute, inside the root.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory was moved while its content was walked, and the way back is lost.
    #[error("the directory {path} was moved while it was read")]
    Moved {
        /// Absolute, inside the root.
        path: String,
    },
    /// A mount that was to be sent was never come upon.
    #[error(
        "the file system at {path} was to be sent, but is not reached (is a mount above it not in the list?)"
    )]
    MountNotFound {
        /// Absolute, inside the root.
        path: String,
    },
    /// More extended attributes than a header may hold.
    #[error("{path} has {bytes} bytes of extended attributes, more than can be sent")]
    TooManyXattrs {
        /// Absolute, inside the root.
        path: String,
        /// Size of the extended header.
        bytes: usize,
    },
    /// The stream could not be written.
    #[error("writing the stream: {0}")]
    Write(#[source] io::Error),
}

/// Sends the tree that `options` name to `out` as a tar stream.
///
/// # Errors
/// See [`PackError`]. After an error the stream is incomplete and has no end mark.
pub fn pack<W: Write>(
    options: &PackOptions,
    out: W,
    observer: &mut dyn Observer,
) -> Result<PackSummary, PackError> {
    std::fs::metadata("/proc/self/fd").map_err(PackError::NoProc)?;
    let mut walker = Walker::new(options)?;
    let mut packer = Packer {
        output: Output::new(out),
        tells_entries: observer.wants_entries(),
        observer,
        summary: PackSummary::default(),
        links: HashMap::new(),
        scratch: Vec::new(),
        reported: 0,
        digester: None,
    };
    while let Some(event) = walker.next()? {
        match event {
            Event::Entry(item) => match packer.entry(&item) {
                Err(PackError::File { operation, path, source })
                    if options.skip_unreadable && operation == OPENING =>
                {
                    log::warn!("leaving out {path}: {operation}: {source}");
                    packer.summary.unreadable.add(|| format!("{operation} {path}: {source}"));
                }
                other => other?,
            },
            Event::Vanished(path) => packer.summary.vanished.add(|| shown(path)),
            Event::LeftOut => packer.summary.left_out += 1,
            Event::Unreadable(path, operation, errno) => {
                let error = PackError::File { operation, path: shown(path), source: errno.into() };
                if !options.skip_unreadable {
                    return Err(error);
                }
                log::warn!("leaving out {error}");
                packer.summary.unreadable.add(|| error.to_string());
            }
        }
    }
    packer.finish()
}

const OPENING: &str = "opening";

struct Packer<'o, W> {
    output: Output<W>,
    observer: &'o mut dyn Observer,
    tells_entries: bool,
    summary: PackSummary,
    links: HashMap<LinkKey, Link>,
    scratch: Vec<u8>,
    reported: u64,
    /// Takes what is read of the current file, when the observer wants entries.
    digester: Option<Digester>,
}

/// An inode; its birth time tells it from a later one with the same number.
type LinkKey = ((u32, u32, u64), (i64, u32));

/// Where a file with several names was sent, and how many of them are still to come.
struct Link {
    path: Box<[u8]>,
    left: u32,
}

/// A file's content: its size, and its data regions when there are holes.
struct Content<'a> {
    fd: BorrowedFd<'a>,
    size: u64,
    map: Option<sparse::Map>,
}

impl<W: Write> Packer<'_, W> {
    fn entry(&mut self, item: &Item<'_>) -> Result<(), PackError> {
        self.observer.entry(item.path);
        let kind = file_type(&item.stat);
        if item.other_mount {
            self.summary.other_mounts.add(|| shown(item.path));
            return match kind {
                FileType::Directory => self.directory(item),
                // A file that something is mounted over: what is seen is not of this file system.
                _ => self.plain(item, EntryType::Regular, &[], &Xattrs::new()),
            };
        }
        if kind == FileType::Socket {
            self.summary.sockets.add(|| shown(item.path));
            return Ok(());
        }
        if kind != FileType::Directory && item.stat.stx_nlink > 1 && self.known_link(item)? {
            return Ok(());
        }
        match kind {
            FileType::Directory => self.directory(item),
            FileType::RegularFile => self.file(item),
            FileType::Symlink => self.symlink(item),
            FileType::CharacterDevice => self.special(item, EntryType::Char),
            FileType::BlockDevice => self.special(item, EntryType::Block),
            FileType::Fifo => self.special(item, EntryType::Fifo),
            _ => Err(fail("sending a thing of unknown type at", item.path, Errno::INVAL)),
        }
    }

    /// Sends a second name of a file that was sent before; false when it was not.
    fn known_link(&mut self, item: &Item<'_>) -> Result<bool, PackError> {
        let key = link_key(&item.stat);
        let Some(link) = self.links.get_mut(&key) else { return Ok(false) };
        link.left = link.left.saturating_sub(1);
        let target = if link.left == 0 {
            self.links.remove(&key).map(|link| link.path).unwrap_or_default()
        } else {
            link.path.clone()
        };
        self.plain(item, EntryType::Link, &target, &Xattrs::new())?;
        self.summary.hard_links += 1;
        Ok(true)
    }

    /// To be called once a file with several names has been sent in full.
    fn remember_link(&mut self, stat: &Statx, path: &[u8]) {
        if stat.stx_nlink > 1 {
            self.links.insert(link_key(stat), Link { path: path.into(), left: stat.stx_nlink - 1 });
        }
    }

    fn directory(&mut self, item: &Item<'_>) -> Result<(), PackError> {
        let xattrs = match item.directory {
            Some(fd) => self.xattrs(Object::Open(fd), item.path)?,
            None => Xattrs::new(),
        };
        self.plain(item, EntryType::Directory, &[], &xattrs)?;
        self.summary.directories += 1;
        Ok(())
    }

    fn symlink(&mut self, item: &Item<'_>) -> Result<(), PackError> {
        let target = match readlinkat(item.parent, item.name, Vec::new()) {
            Ok(target) => target,
            // Gone, or something else now.
            Err(Errno::NOENT | Errno::INVAL) => return self.vanished(item.path),
            Err(e) => return Err(fail("reading the link", item.path, e)),
        };
        let Some(xattrs) = self.named_xattrs(item)? else { return self.vanished(item.path) };
        self.plain(item, EntryType::Symlink, target.to_bytes(), &xattrs)?;
        self.summary.symlinks += 1;
        self.remember_link(&item.stat, item.path);
        Ok(())
    }

    fn special(&mut self, item: &Item<'_>, kind: EntryType) -> Result<(), PackError> {
        let Some(xattrs) = self.named_xattrs(item)? else { return self.vanished(item.path) };
        self.plain(item, kind, &[], &xattrs)?;
        if kind == EntryType::Fifo {
            self.summary.fifos += 1;
        } else {
            self.summary.devices += 1;
        }
        self.remember_link(&item.stat, item.path);
        Ok(())
    }

    fn vanished(&mut self, path: &[u8]) -> Result<(), PackError> {
        self.summary.vanished.add(|| shown(path));
        Ok(())
    }

    fn named_xattrs(&mut self, item: &Item<'_>) -> Result<Option<Xattrs>, PackError> {
        match xattr::read_all(Object::Named(item.parent, item.name), &mut self.scratch) {
            Ok(xattrs) => Ok(Some(xattrs)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(fail("reading the extended attributes of", item.path, e)),
        }
    }

    fn xattrs(&mut self, object: Object<'_>, path: &[u8]) -> Result<Xattrs, PackError> {
        xattr::read_all(object, &mut self.scratch)
            .map_err(|e| fail("reading the extended attributes of", path, e))
    }

    fn file(&mut self, item: &Item<'_>) -> Result<(), PackError> {
        let fd = match open_file(item) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return self.vanished(item.path),
            Err(e) => return Err(fail(OPENING, item.path, e)),
        };
        let stat = stat_file(&fd, item.path)?;
        if file_type(&stat) != FileType::RegularFile {
            // Replaced between the look and the opening; what it was is gone.
            return self.vanished(item.path);
        }
        let xattrs = self.xattrs(Object::Open(fd.as_fd()), item.path)?;
        let size = stat.stx_size;
        let mut map = None;
        if stat.stx_blocks.saturating_mul(512) < size {
            let regions = sparse::data_regions(fd.as_fd(), size)
                .map_err(|e| fail("finding the holes of", item.path, e))?;
            if regions != [(0, size)] {
                map = Some(regions);
            }
        }
        if size >= 1 << 20 {
            // A hint only: where it is not understood, nothing is lost.
            let _ = fadvise(&fd, 0, None, Advice::Sequential);
        }
        let content = Content { fd: fd.as_fd(), size, map };
        self.digester = self.tells_entries.then(|| Digester::new(content.map.is_some()));
        let short = self.write(item.path, &stat, EntryType::Regular, &[], &xattrs, Some(&content))?;
        let after = stat_file(&fd, item.path)?;
        let time = |stat: &Statx| (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec);
        let changed = short || after.stx_size != size || time(&after) != time(&stat);
        if changed {
            self.summary.changed.add(|| shown(item.path));
        }
        let sent = self.digester.take().map(|digester| manifest::Content {
            size,
            sparse: content.map.is_some(),
            digest: digester.finish(size),
        });
        self.tell(item.path, &stat, Kind::File, &[], &xattrs, sent, changed);
        self.summary.files += 1;
        self.remember_link(&stat, item.path);
        Ok(())
    }

    fn plain(
        &mut self,
        item: &Item<'_>,
        kind: EntryType,
        link: &[u8],
        xattrs: &Xattrs,
    ) -> Result<(), PackError> {
        self.write(item.path, &item.stat, kind, link, xattrs, None)?;
        let (kind, content) = match kind {
            EntryType::Link => (Kind::HardLink, None),
            EntryType::Symlink => (Kind::Symlink, None),
            EntryType::Char => (Kind::Char, None),
            EntryType::Block => (Kind::Block, None),
            EntryType::Fifo => (Kind::Fifo, None),
            EntryType::Directory => (Kind::Directory, None),
            // Sent empty.
            _ => {
                let digest = Digester::new(false).finish(0);
                (Kind::File, Some(manifest::Content { size: 0, sparse: false, digest }))
            }
        };
        self.tell(item.path, &item.stat, kind, link, xattrs, content, false);
        Ok(())
    }

    /// Tells the observer of an entry that was sent.
    #[allow(clippy::too_many_arguments)] // as many as there are things to tell
    fn tell(
        &mut self,
        path: &[u8],
        stat: &Statx,
        kind: Kind,
        link: &[u8],
        xattrs: &Xattrs,
        content: Option<manifest::Content>,
        changed: bool,
    ) {
        if !self.tells_entries {
            return;
        }
        self.observer.packed(&manifest::Entry {
            path: Cow::Borrowed(path),
            kind,
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            device: match kind {
                Kind::Char | Kind::Block => (stat.stx_rdev_major, stat.stx_rdev_minor),
                _ => (0, 0),
            },
            links: stat.stx_nlink,
            link: Cow::Borrowed(link),
            xattrs: Cow::Borrowed(xattrs),
            content,
            changed,
        });
    }

    /// Writes one whole entry; tells whether the content came out shorter than promised.
    fn write(
        &mut self,
        path: &[u8],
        stat: &Statx,
        kind: EntryType,
        link: &[u8],
        xattrs: &Xattrs,
        content: Option<&Content<'_>>,
    ) -> Result<bool, PackError> {
        let mut name = if path.is_empty() { b".".to_vec() } else { path.to_vec() };
        if kind == EntryType::Directory {
            name.push(b'/');
        }
        let map = content.and_then(|content| content.map.as_ref());
        let extended = extended(&name, stat, kind, link, xattrs, content);
        if extended.len() > pax::MAX_EXTENDED {
            return Err(PackError::TooManyXattrs { path: shown(path), bytes: extended.len() });
        }
        let (map_bytes, data) = match (content, map) {
            (None, _) => (Vec::new(), 0),
            (Some(content), None) => (Vec::new(), content.size),
            (Some(content), Some(map)) => {
                (sparse::encode(map, content.size), map.iter().map(|region| region.1).sum())
            }
        };
        let base = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
        if !extended.is_empty() {
            let meta = Meta { mode: 0o644, ..Meta::default() };
            let name = [b"PaxHeaders/", base].concat();
            let header = header::build(EntryType::XHeader, &name, &[], &meta, extended.len() as u64);
            self.put(header.as_bytes())?;
            self.put(&extended)?;
            self.output.pad().map_err(PackError::Write)?;
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
        let short_name = if map.is_some() { [b"GNUSparseFile.0/", base].concat() } else { name };
        let header = header::build(kind, &short_name, link, &meta, map_bytes.len() as u64 + data);
        self.put(header.as_bytes())?;
        self.put(&map_bytes)?;
        let mut short = false;
        if let Some(content) = content {
            match map {
                None => short = self.copy(content.fd, path, 0, content.size)?,
                Some(map) => {
                    for &(offset, length) in map {
                        short |= self.copy(content.fd, path, offset, length)?;
                    }
                }
            }
            self.summary.content_bytes += data;
        }
        self.output.pad().map_err(PackError::Write)?;
        self.report();
        Ok(short)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), PackError> {
        self.output.put(bytes).map_err(PackError::Write)
    }

    /// Tells the observer of what was written since the last time.
    fn report(&mut self) {
        let position = self.output.position();
        self.observer.bytes(position - self.reported);
        self.reported = position;
    }

    /// Sends exactly `length` bytes from `offset` on; tells whether the file had less and zeros stand in for the rest.
    fn copy(&mut self, fd: BorrowedFd<'_>, path: &[u8], offset: u64, length: u64) -> Result<bool, PackError> {
        let (mut position, mut left) = (offset, length);
        while left > 0 {
            let room = self.output.room().map_err(PackError::Write)?;
            let count = room.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match pread(fd, &mut room[..count], position) {
                Ok(0) => {
                    self.output.zeros(left).map_err(PackError::Write)?;
                    return Ok(true);
                }
                Ok(count) => {
                    if let Some(digester) = &mut self.digester {
                        digester.data(position, &room[..count]);
                    }
                    self.output.advance(count);
                    position += count as u64;
                    left -= count as u64;
                    self.report();
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(fail("reading", path, e)),
            }
        }
        Ok(false)
    }

    fn finish(mut self) -> Result<PackSummary, PackError> {
        let reported = self.reported;
        self.summary.archive_bytes = self.output.finish().map_err(PackError::Write)?;
        self.observer.bytes(self.summary.archive_bytes - reported);
        Ok(self.summary)
    }
}

/// The PAX records of an entry: whatever its plain header cannot say.
fn extended(
    name: &[u8],
    stat: &Statx,
    kind: EntryType,
    link: &[u8],
    xattrs: &Xattrs,
    content: Option<&Content<'_>>,
) -> Vec<u8> {
    let mut out = Vec::new();
    let map = content.filter(|content| content.map.is_some());
    let long_name = map.is_some() || name.len() > NAME_ROOM;
    let long_link = link.len() > NAME_ROOM;
    let odd = |bytes: &[u8]| std::str::from_utf8(bytes).is_err();
    if (long_name && odd(name)) || (long_link && odd(link)) {
        // Says that names are bytes as they are; otherwise they ought to be UTF-8.
        pax::put(&mut out, b"hdrcharset", b"BINARY");
    }
    if let Some(content) = map {
        pax::put(&mut out, b"GNU.sparse.major", b"1");
        pax::put(&mut out, b"GNU.sparse.minor", b"0");
        pax::put(&mut out, b"GNU.sparse.name", name);
        pax::put(&mut out, b"GNU.sparse.realsize", content.size.to_string().as_bytes());
    } else if long_name {
        pax::put(&mut out, b"path", name);
    }
    if long_link {
        pax::put(&mut out, b"linkpath", link);
    }
    let mtime = stat.stx_mtime;
    // A further name of a file has no time of its own.
    if kind != EntryType::Link && (mtime.tv_nsec != 0 || mtime.tv_sec < 0) {
        pax::put(&mut out, b"mtime", pax::format_time(mtime.tv_sec, mtime.tv_nsec).as_bytes());
    }
    for (name, value) in xattrs {
        // GNU tar and bsdtar take ACLs as text only. It stands in front: for us the attribute that follows counts.
        let text_key = match name.as_c_str() {
            name if name == xattr::ACCESS_ACL => Some(&b"SCHILY.acl.access"[..]),
            name if name == xattr::DEFAULT_ACL => Some(&b"SCHILY.acl.default"[..]),
            _ => None,
        };
        if let Some((key, text)) = text_key.zip(acl::to_text(value)) {
            pax::put(&mut out, key, text.as_bytes());
        }
        let key = [b"SCHILY.xattr.", &pax::escape_name(name.to_bytes())[..]].concat();
        pax::put(&mut out, &key, value);
    }
    out
}

/// The file, open for reading; nothing that took its place is waited for.
pub(crate) fn open_file(item: &Item<'_>) -> Result<OwnedFd, Errno> {
    // Without NONBLOCK a fifo that took the file's place would hold us for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let open = |flags| openat(item.parent, item.name, flags, Mode::empty());
    match open(flags | OFlags::NOATIME) {
        // Only the owner may leave access times alone.
        Err(Errno::PERM) => open(flags),
        // Somebody holds a lease on it and is now told to give it up.
        Err(Errno::AGAIN) => open(flags - OFlags::NONBLOCK),
        other => other,
    }
}

fn stat_file(fd: &OwnedFd, path: &[u8]) -> Result<Statx, PackError> {
    statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
        .map_err(|e| fail("looking at", path, e))
}

fn link_key(stat: &Statx) -> LinkKey {
    let born = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
    let birth = if born { (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec) } else { (0, 0) };
    (inode(stat), birth)
}

fn fail(operation: &'static str, path: &[u8], errno: Errno) -> PackError {
    PackError::File { operation, path: shown(path), source: errno.into() }
}
