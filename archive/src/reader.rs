//! Reads one thing of the tree and makes its entry, headers and content, in a buffer. Files change under our eyes on a live
//! root: a header is a promise that is kept (never more bytes, zeros for missing ones), and what changed is told. Several
//! readers work at once; none knows anything of the stream.

use std::borrow::Cow;
use std::ffi::CStr;

use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    Advice, AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, fadvise, openat, readlinkat, statx,
};
use rustix::io::{Errno, pread};
use tar::EntryType;

use crate::attributes::Attributes;
use crate::batch::{Batch, Found, LARGE, LinkKey, Thing, link_key};
use crate::digest::Digester;
use crate::encode::{self, Encoder, Head};
use crate::manifest::{self, Kind};
use crate::pack::PackError;
use crate::walk::file_type;
use crate::xattr::{self, Object, Xattrs};
use crate::{shown, sparse};

/// Bytes of a large file that the kernel is asked to read ahead.
pub(crate) const AHEAD: u64 = 4 << 20;

/// How a thing counts in the summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counts {
    File,
    Directory,
    Symlink,
    Device,
    Fifo,
    /// Something that another file system's root hides.
    Nothing,
}

/// What became of a thing.
pub(crate) enum Outcome {
    /// Its entry is whole.
    Done {
        counts: Counts,
        link: Option<(LinkKey, u32)>,
        content: u64,
        changed: bool,
        /// What an observer is to be told.
        told: Told,
    },
    /// The headers of a large file; the content is still to be read.
    Large(Box<Large>),
    /// Very likely another name of a file that was sent; nothing is made of it yet.
    Again,
    /// It is gone.
    Vanished,
    Socket,
    LeftOut,
    /// It could not be opened; this fails the run unless the options say to leave such things out.
    Unreadable(PackError),
    Failed(PackError),
}

/// An entry for an observer that wants entries.
pub(crate) type Told = Option<Box<manifest::Entry<'static>>>;

/// A large file that is open, with its headers made.
pub(crate) struct Large {
    pub fd: OwnedFd,
    pub stat: Statx,
    /// The regions to be sent.
    pub map: sparse::Map,
    /// Their sum.
    pub content: u64,
    /// What an observer is to be told, but for the content.
    pub told: Told,
    /// Whether there are holes.
    pub sparse: bool,
}

impl Large {
    /// Whether the file is another one now than when its headers were made.
    pub(crate) fn changed(&self, path: &[u8]) -> Result<bool, PackError> {
        Ok(differs(&self.stat, &stat_file(self.fd.as_fd(), path)?))
    }

    /// Has the kernel read what comes at and after `position`.
    pub(crate) fn read_ahead(&self, position: u64) {
        // A hint only: where it is not understood, nothing is lost.
        let _ = fadvise(&self.fd, position, std::num::NonZeroU64::new(AHEAD), Advice::WillNeed);
    }
}

/// What became of a file that was read.
enum Read {
    Done(Outcome),
    /// It changed meanwhile, and looks like this now.
    Changed(OwnedFd, Statx),
}

/// A batch with what was made of it.
#[derive(Default)]
pub(crate) struct Packed {
    pub bytes: Vec<u8>,
    /// For each thing of the batch, what became of it and where its bytes end.
    pub outcomes: Vec<(usize, Outcome)>,
}

/// Makes entries.
pub(crate) struct Reader {
    scratch: Vec<u8>,
    name: Name,
    encoder: Encoder,
    /// Whether an observer wants entries, and so digests.
    tells: bool,
}

impl Reader {
    pub(crate) fn new(tells: bool) -> Self {
        Self { scratch: Vec::new(), name: Name::default(), encoder: Encoder::default(), tells }
    }

    /// Makes the entries of a whole batch in `bytes`, an empty buffer. What follows something that fails the run is left
    /// alone.
    pub(crate) fn batch(&mut self, batch: &Batch, mut bytes: Vec<u8>, skip_unreadable: bool) -> Packed {
        let mut outcomes = Vec::with_capacity(batch.len());
        for (path, thing) in batch.things() {
            let start = bytes.len();
            let outcome = match thing {
                Thing::Entry(found) if found.again => Outcome::Again,
                Thing::Entry(found) => self.entry(path, found, &mut bytes).unwrap_or_else(|e| {
                    bytes.truncate(start);
                    Outcome::Failed(e)
                }),
                Thing::Vanished => Outcome::Vanished,
                Thing::LeftOut => Outcome::LeftOut,
                Thing::Unreadable(operation, errno) => Outcome::Unreadable(fail(operation, path, *errno)),
            };
            let over = match outcome {
                Outcome::Failed(_) => true,
                Outcome::Unreadable(_) => !skip_unreadable,
                _ => false,
            };
            outcomes.push((bytes.len(), outcome));
            if over {
                break;
            }
        }
        Packed { bytes, outcomes }
    }

    /// Appends the entry of `found` to `out`, which holds whole blocks.
    pub(crate) fn entry(
        &mut self,
        path: &[u8],
        found: &Found,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, PackError> {
        let kind = file_type(&found.stat);
        if found.other_mount {
            return match kind {
                FileType::Directory => self.directory(path, found, out),
                // A file that something is mounted over: what is seen is not of this file system.
                _ => self.plain(path, found, EntryType::Regular, &[], &Xattrs::new(), Counts::Nothing, out),
            };
        }
        match kind {
            FileType::Directory => self.directory(path, found, out),
            FileType::RegularFile => self.file(path, found, out),
            FileType::Symlink => self.symlink(path, found, out),
            FileType::CharacterDevice => self.special(path, found, EntryType::Char, out),
            FileType::BlockDevice => self.special(path, found, EntryType::Block, out),
            FileType::Fifo => self.special(path, found, EntryType::Fifo, out),
            FileType::Socket => Ok(Outcome::Socket),
            _ => Err(fail("sending a thing of unknown type at", path, Errno::INVAL)),
        }
    }

    fn directory(&mut self, path: &[u8], found: &Found, out: &mut Vec<u8>) -> Result<Outcome, PackError> {
        let (mut xattrs, mut attributes) = (Xattrs::new(), Attributes::default());
        let mut stat = found.stat;
        // Twice if it changed meanwhile.
        for _ in 0..2 {
            if !found.open {
                break;
            }
            xattrs = self.xattrs(Object::Open(found.parent.as_fd()), path)?;
            attributes = read_attributes(found.parent.as_fd(), path)?;
            let now = stat_file(found.parent.as_fd(), path)?;
            let same = !differs(&stat, &now);
            stat = now;
            if same {
                break;
            }
        }
        let (kind, stat) = (EntryType::Directory, &stat);
        let head = Head { path, stat, kind, link: &[], xattrs: &xattrs, attributes, size: 0, map: None };
        self.encoder.put(out, &head)?;
        let told = self.tells.then(|| Box::new(entry(path, stat, Kind::Directory, &[], &xattrs, attributes)));
        Ok(Outcome::Done { counts: Counts::Directory, link: None, content: 0, changed: false, told })
    }

    fn symlink(&mut self, path: &[u8], found: &Found, out: &mut Vec<u8>) -> Result<Outcome, PackError> {
        let target = match readlinkat(&*found.parent, self.name.of(path), Vec::new()) {
            Ok(target) => target,
            // Gone, or something else now.
            Err(Errno::NOENT | Errno::INVAL) => return Ok(Outcome::Vanished),
            Err(e) => return Err(fail("reading the link", path, e)),
        };
        let Some(xattrs) = self.named_xattrs(found, path)? else { return Ok(Outcome::Vanished) };
        self.plain(path, found, EntryType::Symlink, target.to_bytes(), &xattrs, Counts::Symlink, out)
    }

    fn special(
        &mut self,
        path: &[u8],
        found: &Found,
        kind: EntryType,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, PackError> {
        let Some(xattrs) = self.named_xattrs(found, path)? else { return Ok(Outcome::Vanished) };
        let counts = if kind == EntryType::Fifo { Counts::Fifo } else { Counts::Device };
        self.plain(path, found, kind, &[], &xattrs, counts, out)
    }

    fn named_xattrs(&mut self, found: &Found, path: &[u8]) -> Result<Option<Xattrs>, PackError> {
        let object = Object::Named(found.parent.as_fd(), self.name.of(path));
        match xattr::read_all(object, &mut self.scratch) {
            Ok(xattrs) => Ok(Some(xattrs)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(fail("reading the extended attributes of", path, e)),
        }
    }

    fn xattrs(&mut self, object: Object<'_>, path: &[u8]) -> Result<Xattrs, PackError> {
        xattr::read_all(object, &mut self.scratch)
            .map_err(|e| fail("reading the extended attributes of", path, e))
    }

    fn file(&mut self, path: &[u8], found: &Found, out: &mut Vec<u8>) -> Result<Outcome, PackError> {
        let fd = match open_file(found.parent.as_fd(), self.name.of(path)) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(Outcome::Vanished),
            Err(e) if ours(e) => return Err(fail("opening", path, e)),
            Err(e) => return Ok(Outcome::Unreadable(fail("opening", path, e))),
        };
        let stat = stat_file(fd.as_fd(), path)?;
        if file_type(&stat) != FileType::RegularFile {
            // Replaced between the look and the opening; what it was is gone.
            return Ok(Outcome::Vanished);
        }
        let start = out.len();
        match self.read_file(path, fd, stat, true, out)? {
            Read::Done(outcome) => Ok(outcome),
            Read::Changed(fd, stat) => {
                out.truncate(start);
                match self.read_file(path, fd, stat, false, out)? {
                    Read::Done(outcome) => Ok(outcome),
                    Read::Changed(..) => Err(fail("reading", path, Errno::AGAIN)),
                }
            }
        }
    }

    /// Appends the entry of a regular file that looked like `stat` a moment ago. With `first`, what changed meanwhile is
    /// handed back for another try: its owner may be the old one and its extended attributes the new ones.
    fn read_file(
        &mut self,
        path: &[u8],
        fd: OwnedFd,
        stat: Statx,
        first: bool,
        out: &mut Vec<u8>,
    ) -> Result<Read, PackError> {
        let xattrs = self.xattrs(Object::Open(fd.as_fd()), path)?;
        let attributes = read_attributes(fd.as_fd(), path)?;
        let size = stat.stx_size;
        let mut map = None;
        if stat.stx_blocks.saturating_mul(512) < size {
            let regions =
                sparse::data_regions(fd.as_fd(), size).map_err(|e| fail("finding the holes of", path, e))?;
            if regions != [(0, size)] {
                map = Some(regions);
            }
        }
        let kind = EntryType::Regular;
        let head =
            Head { path, stat: &stat, kind, link: &[], xattrs: &xattrs, attributes, size, map: map.as_ref() };
        let content = self.encoder.put(out, &head)?;
        let sparse = map.is_some();
        let mut told = self.tells.then(|| Box::new(entry(path, &stat, Kind::File, &[], &xattrs, attributes)));
        let map = map.unwrap_or_else(|| vec![(0, size)]);
        if content > LARGE {
            if first {
                let now = stat_file(fd.as_fd(), path)?;
                if differs(&stat, &now) {
                    return Ok(Read::Changed(fd, now));
                }
            }
            let large = Large { fd, stat, map, content, told, sparse };
            // A hint only, as in `read_ahead`.
            let _ = fadvise(&large.fd, 0, None, Advice::Sequential);
            large.read_ahead(large.map.first().map_or(0, |region| region.0));
            return Ok(Read::Done(Outcome::Large(Box::new(large))));
        }
        let mut short = false;
        let mut digester = self.tells.then(|| Digester::new(sparse));
        for (offset, length) in map {
            let start = out.len();
            short |= read_into(fd.as_fd(), path, offset, length, out)?;
            if let Some(digester) = &mut digester {
                digester.data(offset, &out[start..]);
            }
        }
        encode::pad(out);
        let now = stat_file(fd.as_fd(), path)?;
        let changed = short || differs(&stat, &now);
        if changed && first {
            return Ok(Read::Changed(fd, now));
        }
        if let (Some(told), Some(digester)) = (&mut told, digester) {
            told.content = Some(manifest::Content { size, sparse, digest: digester.finish(size) });
            told.changed = changed;
        }
        let done = Outcome::Done { counts: Counts::File, link: names(&stat), content, changed, told };
        Ok(Read::Done(done))
    }

    /// Appends an entry without content.
    #[allow(clippy::too_many_arguments)]
    fn plain(
        &mut self,
        path: &[u8],
        found: &Found,
        kind: EntryType,
        link: &[u8],
        xattrs: &Xattrs,
        counts: Counts,
        out: &mut Vec<u8>,
    ) -> Result<Outcome, PackError> {
        let head = Head {
            path,
            stat: &found.stat,
            kind,
            link,
            xattrs,
            attributes: Attributes::default(),
            size: 0,
            map: None,
        };
        self.encoder.put(out, &head)?;
        let told = self.tells.then(|| {
            let (kind, content) = match kind {
                EntryType::Symlink => (Kind::Symlink, None),
                EntryType::Char => (Kind::Char, None),
                EntryType::Block => (Kind::Block, None),
                EntryType::Fifo => (Kind::Fifo, None),
                // Sent empty.
                _ => {
                    let digest = Digester::new(false).finish(0);
                    (Kind::File, Some(manifest::Content { size: 0, sparse: false, digest }))
                }
            };
            let mut told = Box::new(entry(path, &found.stat, kind, link, xattrs, Attributes::default()));
            told.content = content;
            told
        });
        Ok(Outcome::Done { counts, link: names(&found.stat), content: 0, changed: false, told })
    }
}

/// What an observer is told of an entry, without its content.
pub(crate) fn entry(
    path: &[u8],
    stat: &Statx,
    kind: Kind,
    link: &[u8],
    xattrs: &Xattrs,
    attributes: Attributes,
) -> manifest::Entry<'static> {
    manifest::Entry {
        path: Cow::Owned(path.to_vec()),
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
        link: Cow::Owned(link.to_vec()),
        xattrs: Cow::Owned(xattrs.clone()),
        attributes,
        content: None,
        changed: false,
    }
}

/// Appends exactly `length` bytes (at most [`LARGE`]) from `offset` on; tells whether the file had less and zeros stand in
/// for the rest.
fn read_into(
    fd: BorrowedFd<'_>,
    path: &[u8],
    offset: u64,
    length: u64,
    out: &mut Vec<u8>,
) -> Result<bool, PackError> {
    let start = out.len();
    let wanted = usize::try_from(length).map_err(|_| fail("reading", path, Errno::FBIG))?;
    out.reserve(wanted);
    let mut short = false;
    while out.len() - start < wanted {
        // What is read beyond the promised size, because there was room, is cut off below.
        let position = offset + (out.len() - start) as u64;
        match pread(fd, spare_capacity(out), position) {
            Ok(0) => {
                short = true;
                break;
            }
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(fail("reading", path, e)),
        }
    }
    out.resize(start + wanted, 0);
    Ok(short)
}

fn read_attributes(fd: BorrowedFd<'_>, path: &[u8]) -> Result<Attributes, PackError> {
    Attributes::read(fd).map_err(|e| fail("reading the flags of", path, e))
}

/// Of a file with several names: what it is known by, and how many names it has.
pub(crate) fn names(stat: &Statx) -> Option<(LinkKey, u32)> {
    (stat.stx_nlink > 1).then(|| (link_key(stat), stat.stx_nlink))
}

/// Room for a name as the kernel wants it.
#[derive(Default)]
pub(crate) struct Name(Vec<u8>);

impl Name {
    /// The name in the directory; the root's own is `.`.
    pub(crate) fn of(&mut self, path: &[u8]) -> &CStr {
        let name = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
        self.0.clear();
        self.0.extend_from_slice(if name.is_empty() { b"." } else { name });
        self.0.push(0);
        // A name from a directory has no NUL inside, so this is always one.
        CStr::from_bytes_with_nul(&self.0).unwrap_or(c".")
    }
}

pub(crate) fn open_file(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    // Without NONBLOCK a fifo that took the file's place would hold us for ever.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let open = |flags| openat(parent, name, flags, Mode::empty());
    match open(flags | OFlags::NOATIME) {
        // Only the owner may leave access times alone.
        Err(Errno::PERM) => open(flags),
        // Somebody holds a lease on it and is now told to give it up.
        Err(Errno::AGAIN) => open(flags - OFlags::NONBLOCK),
        other => other,
    }
}

fn stat_file(fd: BorrowedFd<'_>, path: &[u8]) -> Result<Statx, PackError> {
    statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
        .map_err(|e| fail("looking at", path, e))
}

/// Whether something was done to a file between two looks. A name more or less is nothing that concerns it, but for the time
/// of its change.
fn differs(before: &Statx, after: &Statx) -> bool {
    let facts = |stat: &Statx| {
        let mtime = (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec);
        (stat.stx_size, mtime, stat.stx_mode, stat.stx_uid, stat.stx_gid)
    };
    let change = |stat: &Statx| (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec);
    facts(before) != facts(after) || (change(before) != change(after) && before.stx_nlink == after.stx_nlink)
}

/// Whether this process or machine is at its limits, which says nothing of the thing that was to be opened.
pub(crate) fn ours(errno: Errno) -> bool {
    [Errno::MFILE, Errno::NFILE, Errno::NOMEM].contains(&errno)
}

pub(crate) fn fail(operation: &'static str, path: &[u8], errno: Errno) -> PackError {
    PackError::File { operation, path: shown(path), source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown};

    #[test]
    fn whatever_is_done_to_a_file_is_seen_but_for_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, b"content").unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let look = || {
            // The clock by which the kernel tells changes may stand still for some milliseconds.
            std::thread::sleep(std::time::Duration::from_millis(20));
            stat_file(file.as_fd(), b"file").unwrap()
        };
        let before = look();
        assert!(!differs(&before, &look()));
        std::fs::hard_link(&path, directory.path().join("link")).unwrap();
        assert!(!differs(&before, &look()));
        let deeds: [&dyn Fn(); 3] = [
            &|| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap(),
            &|| chown(&path, None, Some(0)).unwrap(),
            &|| rustix::fs::setxattr(&path, c"user.a", b"b", rustix::fs::XattrFlags::empty()).unwrap(),
        ];
        for deed in deeds {
            let before = look();
            deed();
            assert!(differs(&before, &look()));
        }
    }

    /// As a script does that gives a file to somebody and then an attribute: nobody may have what was meant for another.
    #[test]
    fn an_old_owner_is_not_sent_with_a_new_attribute() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let open = || OwnedFd::from(std::fs::File::open(&path).unwrap());
        // Small, and large.
        for size in [100, 300_000] {
            std::fs::write(&path, vec![7; size]).unwrap();
            chown(&path, Some(1), None).unwrap();
            let old = stat_file(open().as_fd(), b"file").unwrap();
            chown(&path, Some(2), None).unwrap();
            rustix::fs::setxattr(&path, c"user.owner", b"2", rustix::fs::XattrFlags::empty()).unwrap();
            let (mut reader, mut out) = (Reader::new(true), Vec::new());
            let Read::Changed(fd, now) = reader.read_file(b"file", open(), old, true, &mut out).unwrap()
            else {
                panic!("{size}: the old owner was taken");
            };
            let told = |outcome| match outcome {
                Read::Done(Outcome::Done { told, changed, .. }) => (told.unwrap(), changed),
                Read::Done(Outcome::Large(large)) => {
                    let changed = large.changed(b"file").unwrap();
                    (large.told.unwrap(), changed)
                }
                _ => panic!("{size}"),
            };
            let (entry, changed) = told(reader.read_file(b"file", fd, now, true, &mut out).unwrap());
            assert_eq!((entry.uid, entry.xattrs.len(), changed), (2, 1, false), "{size}");
            // What changes again and again is told.
            let (_, changed) = told(reader.read_file(b"file", open(), old, false, &mut out).unwrap());
            assert!(changed, "{size}");
            rustix::fs::removexattr(&path, c"user.owner").unwrap();
        }
    }
}
