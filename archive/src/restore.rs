//! Makes the entries of a stream on the disk, in the order create, content, owner, mode, xattrs, times: each step would
//! undo part of a later one (writing and a change of owner clear capabilities, a change of owner clears setuid). What
//! directories get last stands in deferred.rs.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid, chmodat, chownat, fchmod, fstat, ftruncate, futimens,
    linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat, utimensat,
};
use rustix::io::{Errno, pread};

use crate::attributes::Attributes;
use crate::deferred::{Deferred, Record};
use crate::entry::{Entry, Kind};
use crate::flusher::{Flusher, sync};
use crate::input::Input;
use crate::place::{Metadata, Place, first_mode, times, write_all, write_at};
use crate::target::{Directory, Feature, FsKind, Target, clean, split};
use crate::unpack::{UnpackError, UnpackSummary};
use crate::writers::{File, SMALL, Shared, Writers};
use crate::xattr::{self, ACCESS_ACL, DEFAULT_ACL, Object, Xattrs};
use crate::{Observer, shown, sparse};

/// How much of one file is written between two words to the observer.
const REPORT_EVERY: u64 = 4 << 20;

pub(crate) struct Restorer<'a, 'scope> {
    target: Target,
    deferred: Deferred,
    summary: UnpackSummary,
    shared: &'a Shared,
    writers: Writers<'a>,
    /// None: what is written need not be on the disk at the end.
    flusher: Option<Flusher<'scope>>,
    /// Of the entry, from 1.
    number: u64,
    /// Given at the very end: it would forbid work still to be done, or new entries would inherit it.
    last: BTreeMap<Vec<u8>, Last>,
}

/// What a file or directory gets when all else stands.
struct Last {
    /// Of its entry.
    number: u64,
    directory: bool,
    attributes: Attributes,
    /// Properties of a directory.
    properties: Xattrs,
}

impl<'a, 'scope> Restorer<'a, 'scope> {
    pub(crate) fn new(
        root: &Path,
        shared: &'a Shared,
        writers: Writers<'a>,
        flusher: Option<Flusher<'scope>>,
    ) -> Result<Self, UnpackError> {
        Ok(Self {
            target: Target::open(root)?,
            deferred: Deferred::default(),
            summary: UnpackSummary::default(),
            shared,
            writers,
            flusher,
            number: 0,
            last: BTreeMap::new(),
        })
    }

    fn place<'p>(&self, kind: FsKind, path: &'p [u8]) -> Place<'p>
    where
        'a: 'p,
    {
        Place { notes: &self.shared.notes, number: self.number, kind, path }
    }

    /// Restores one entry and takes its content from `input`.
    pub(crate) fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        input: &mut Input<R>,
        reported: &mut u64,
        observer: &mut dyn Observer,
    ) -> Result<(), UnpackError> {
        let refuse = |why: &str| UnpackError::Refused {
            path: entry.path.escape_ascii().to_string(),
            why: why.to_owned(),
        };
        let path = clean(&entry.path).map_err(refuse)?;
        observer.entry(&path);
        self.number += 1;
        self.remember_attributes(entry, &path);
        if entry.kind == Kind::Directory {
            self.writers.settle_path(&path)?;
            self.directory(&path, entry)?;
        } else if path.is_empty() {
            return Err(refuse("the root can only be a directory"));
        } else {
            let (folder, name) = split(&path);
            let parent = self.parent(folder)?;
            let small = entry.kind == Kind::File && entry.sparse.is_none() && entry.weight() <= SMALL;
            // What has to give way to it is known here only.
            if small && !self.writers.is_empty() && !self.target.was_directory(&path) {
                self.hand_out(entry, parent, &path, folder, input)?;
            } else {
                let name = c_string(name, &path)?;
                if self.target.was_directory(&path) {
                    // Its content may be under way.
                    self.writers.settle()?;
                } else {
                    self.writers.settle_path(&path)?;
                }
                match entry.kind {
                    Kind::File => {
                        let fd = self.create(&parent, &name, &path, entry.mode)?;
                        let place = self.place(parent.kind, &path);
                        place.attributes(fd.as_fd(), entry.attributes.open())?;
                        place.properties(fd.as_fd(), &entry.xattrs)?;
                        fill(&fd, entry, &path, input, reported, observer)?;
                        self.place(parent.kind, &path).file_metadata(&fd, &Metadata::of(entry))?;
                    }
                    Kind::HardLink => self.hard_link(entry, &parent, &name, &path)?,
                    _ => self.special(entry, &parent, &name, &path)?,
                }
            }
            if entry.kind == Kind::File {
                self.summary.files += 1;
                self.summary.content_bytes += entry.stored;
                if let Some(flusher) = &mut self.flusher {
                    flusher.written(entry.stored, self.target.file_systems());
                }
            }
        }
        input.skip_padding(entry.stored)?;
        observer.bytes(input.position() - *reported);
        *reported = input.position();
        Ok(())
    }

    /// Keeps what `entry` gets at the end; what stood at its path before gets nothing any more.
    fn remember_attributes(&mut self, entry: &Entry, path: &[u8]) {
        let directory = entry.kind == Kind::Directory;
        let attributes = match entry.kind {
            Kind::Directory => Some(entry.attributes),
            Kind::File => entry.attributes.seal(),
            _ => None,
        };
        let properties: Xattrs = if directory {
            entry.xattrs.iter().filter(|(name, _)| xattr::is_property(name)).cloned().collect()
        } else {
            Xattrs::new()
        };
        match attributes {
            Some(attributes) if !attributes.is_empty() || !properties.is_empty() => {
                self.last
                    .insert(path.to_vec(), Last { number: self.number, directory, attributes, properties });
            }
            _ if self.last.is_empty() => {}
            _ => {
                self.last.remove(path);
            }
        }
    }

    fn last_attributes(&mut self) -> Result<(), UnpackError> {
        for (path, last) in std::mem::take(&mut self.last) {
            self.number = last.number;
            if last.directory {
                let directory = self.target.directory(&path, false)?;
                let place = self.place(directory.kind, &path);
                // Flags say whether there is compression, and properties how. Setting any flag sets the first anew, and with it
                // the second to what is usual; a seal forbids both.
                place.attributes(directory.as_fd(), last.attributes.open())?;
                place.properties(directory.as_fd(), &last.properties)?;
                if let Some(sealed) = last.attributes.seal() {
                    place.attributes(directory.as_fd(), sealed)?;
                }
                continue;
            }
            let (folder, name) = split(&path);
            let parent = self.target.directory(folder, false)?;
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let place = self.place(parent.kind, &path);
            let fd = openat(&*parent, name, flags, Mode::empty())
                .map_err(|e| place.fail("opening, to set the flags of,", e))?;
            place.attributes(fd.as_fd(), last.attributes)?;
        }
        Ok(())
    }

    /// The directory that an entry is in. Where it is not there, something that is to stand in its way may be under way.
    fn parent(&mut self, path: &[u8]) -> Result<Arc<Directory>, UnpackError> {
        self.writers.settle_path(path)?;
        match self.target.find(path)? {
            Some(directory) => Ok(directory),
            None => {
                self.writers.settle()?;
                self.target.directory(path, true)
            }
        }
    }

    /// Has a small file made by another thread.
    fn hand_out<R: Read>(
        &mut self,
        entry: &Entry,
        parent: Arc<Directory>,
        path: &[u8],
        folder: &[u8],
        input: &mut Input<R>,
    ) -> Result<(), UnpackError> {
        let Entry { uid, gid, mode, mtime, .. } = *entry;
        let xattrs = entry.xattrs.clone();
        let attributes = entry.attributes.open();
        let file = File { number: self.number, parent, uid, gid, mode, mtime, xattrs, attributes };
        self.writers.make(file, path, folder, |content| {
            input.pieces(entry.stored, |piece| {
                content.extend_from_slice(piece);
                Ok(())
            })
        })
    }

    /// Removes what is in an entry's way.
    fn clear(&mut self, parent: &Directory, name: &CString, path: &[u8]) -> Result<(), UnpackError> {
        if self.target.clear(parent, name, path)? {
            self.deferred.forget(path);
        }
        Ok(())
    }

    /// A new, empty file that is open for writing.
    fn create(
        &mut self,
        parent: &Directory,
        name: &CString,
        path: &[u8],
        mode: u32,
    ) -> Result<OwnedFd, UnpackError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || openat(parent, name, flags, first_mode(mode));
        let opened = match open() {
            Err(Errno::EXIST) => {
                self.clear(parent, name, path)?;
                open()
            }
            other => other,
        };
        opened.map_err(|e| UnpackError::file("creating", path, e))
    }

    fn directory(&mut self, path: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        let (directory, stat, merged) = self.open_new_directory(path, entry.mode)?;
        if merged {
            self.strip(directory.as_fd(), &entry.xattrs, path)?;
        }
        let place = self.place(directory.kind, path);
        // Until its content stands, the owner can get into it.
        place.owner_and_mode(directory.as_fd(), &stat, (entry.uid, entry.gid), entry.mode | 0o700)?;
        let mut default_acl = None;
        for (name, value) in &entry.xattrs {
            if name.as_c_str() == DEFAULT_ACL {
                default_acl = Some(&value[..]);
            } else if !xattr::is_property(name) {
                place.set_xattr(Object::Open(directory.as_fd()), name, value)?;
            }
        }
        // Modes have 12 bits here, so that the conversion cannot fail.
        let mode = (entry.mode & 0o700 != 0o700).then(|| u16::try_from(entry.mode).unwrap_or(0));
        self.deferred.push(&Record { path, mode, mtime: entry.mtime, default_acl }, merged);
        self.summary.directories += 1;
        Ok(())
    }

    /// The directory at `path`, open, what it looks like, and whether it was there before.
    fn open_new_directory(
        &mut self,
        path: &[u8],
        mode: u32,
    ) -> Result<(Arc<Directory>, Stat, bool), UnpackError> {
        let merged_one = |directory: Arc<Directory>| {
            let stat = fstat(&*directory).map_err(|e| UnpackError::file("looking at", path, e))?;
            Ok((directory, stat, true))
        };
        if path.is_empty() {
            return merged_one(self.target.directory(path, false)?);
        }
        let (parent, name) = split(path);
        let name = c_string(name, path)?;
        let parent = self.parent(parent)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let make = || mkdirat(&*parent, &name, first_mode(mode | 0o700));
        let open = || openat(&*parent, &name, flags, Mode::empty());
        let failed = |e| UnpackError::file("making the directory", path, e);
        let mut merged = false;
        let fd = match make() {
            Ok(()) => open(),
            Err(Errno::EXIST) => match open() {
                Ok(fd) => {
                    merged = true;
                    Ok(fd)
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    self.clear(&parent, &name, path)?;
                    make().map_err(failed)?;
                    open()
                }
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
        };
        if merged {
            // It may be open already; a second descriptor would only push another out.
            return merged_one(self.target.directory(path, false)?);
        }
        let (directory, stat) = self.target.keep(path, fd.map_err(failed)?)?;
        Ok((directory, stat, false))
    }

    /// Takes from a directory that was there before the attributes that its entry does not have.
    fn strip(&mut self, fd: BorrowedFd<'_>, wanted: &Xattrs, path: &[u8]) -> Result<(), UnpackError> {
        let fail = |e| UnpackError::file("removing old extended attributes of", path, e);
        for (name, _) in xattr::read_all(Object::Open(fd), &mut Vec::new()).map_err(fail)? {
            let bytes = name.to_bytes();
            // Labels of a security module are not ours to remove.
            let ours = bytes.starts_with(b"user.")
                || bytes.starts_with(b"trusted.")
                || name.as_c_str() == ACCESS_ACL;
            // These come back at the end: what is made in the directory would inherit them.
            let inherited = name.as_c_str() == DEFAULT_ACL || xattr::is_property(&name);
            if ours && !wanted.iter().any(|(w, _)| *w == name) || inherited {
                xattr::remove(fd, &name).map_err(fail)?;
            }
        }
        Ok(())
    }

    /// Symlinks, devices and fifos: what must not be opened is handled by name.
    fn special(
        &mut self,
        entry: &Entry,
        parent: &Directory,
        name: &CString,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        let link =
            if entry.kind == Kind::Symlink { c_string(&entry.link, path)? } else { CString::default() };
        if entry.kind == Kind::Symlink && link.is_empty() {
            return Err(UnpackError::Refused {
                path: shown(path),
                why: "a symbolic link to nothing".to_owned(),
            });
        }
        let node = |file_type, device: (u32, u32)| {
            mknodat(parent, name, file_type, Mode::from_raw_mode(0o600), makedev(device.0, device.1))
        };
        let make = || match entry.kind {
            Kind::Symlink => symlinkat(&link, parent, name),
            Kind::Char => node(FileType::CharacterDevice, entry.device),
            Kind::Block => node(FileType::BlockDevice, entry.device),
            _ => node(FileType::Fifo, (0, 0)),
        };
        let mut made = make();
        if made == Err(Errno::EXIST) {
            self.clear(parent, name, path)?;
            made = make();
        }
        let (feature, operation) = match entry.kind {
            Kind::Symlink => (Feature::Symlink, "making the symbolic link"),
            Kind::Fifo => (Feature::Special, "making the fifo"),
            _ => (Feature::Special, "making the device"),
        };
        let place = self.place(parent.kind, path);
        if !place.allow(made, feature, operation)? {
            return Ok(());
        }
        let fail = |operation, e| place.fail(operation, e);
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| fail("setting the owner of", e))?;
        if entry.kind != Kind::Symlink {
            // Not a symlink: it was made just now, and making it fails where something stands.
            chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())
                .map_err(|e| fail("setting the mode of", e))?;
        }
        for (attribute, value) in &entry.xattrs {
            place.set_xattr(Object::Named(parent.as_fd(), name), attribute, value)?;
        }
        utimensat(parent, name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| fail("setting the time of", e))?;
        match entry.kind {
            Kind::Symlink => self.summary.symlinks += 1,
            Kind::Fifo => self.summary.fifos += 1,
            _ => self.summary.devices += 1,
        }
        Ok(())
    }

    fn hard_link(
        &mut self,
        entry: &Entry,
        parent: &Directory,
        name: &CString,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        let refuse = |why: String| UnpackError::Refused { path: shown(path), why };
        let link = clean(&entry.link)
            .map_err(|why| refuse(format!("a hard link to {}: {why}", entry.link.escape_ascii())))?;
        if link == path || link.is_empty() {
            return Err(refuse("a hard link to itself or to the root".to_owned()));
        }
        self.writers.settle_path(&link)?;
        let (from, from_name) = split(&link);
        let from_name = c_string(from_name, &link)?;
        // A file may be under way where a directory was before.
        self.writers.settle_path(from)?;
        let from = match self.target.find(from)? {
            Some(directory) => directory,
            None => {
                // What stands in the way there may be under way.
                self.writers.settle()?;
                self.target.directory(from, false)?
            }
        };
        let make = || linkat(&*from, &from_name, parent, name, AtFlags::empty());
        let mut made = make();
        if made == Err(Errno::EXIST) {
            let stat = |directory: &Directory, name: &CString| {
                statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map(|stat| (stat.st_dev, stat.st_ino))
                    .map_err(|e| UnpackError::file("looking at the two names of the hard link", path, e))
            };
            made = if stat(&from, &from_name)? == stat(parent, name)? {
                Ok(())
            } else {
                self.clear(parent, name, path)?;
                make()
            };
        }
        match made {
            Ok(()) => self.summary.hard_links += 1,
            Err(e) if e == Errno::XDEV || parent.kind.cannot_hold(Feature::HardLink, e) => {
                self.copy(&from, &from_name, parent, name, path)?;
                if let Some(last) = self.last.get(&link) {
                    let last = Last { number: self.number, properties: Xattrs::new(), ..*last };
                    self.last.insert(path.to_vec(), last);
                }
                self.summary.copied_links.add(|| shown(path));
                self.summary.files += 1;
            }
            Err(e) => {
                let operation = format!("making a hard link to {} at", shown(&link));
                return Err(UnpackError::file(operation, path, e));
            }
        }
        Ok(())
    }

    /// A copy of a regular file with all that belongs to it, where a hard link cannot be.
    fn copy(
        &mut self,
        from: &Directory,
        from_name: &CString,
        parent: &Directory,
        name: &CString,
        path: &[u8],
    ) -> Result<(), UnpackError> {
        let fail = |operation: &str, e| UnpackError::file(operation, path, e);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let source = openat(from, from_name, flags, Mode::empty())
            .map_err(|e| fail("opening the file to copy in place of a hard link to", e))?;
        let stat = fstat(&source).map_err(|e| fail("looking at the file to copy to", e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(UnpackError::Refused {
                path: shown(path),
                why: "a hard link across file systems to something that is no regular file".to_owned(),
            });
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let regions =
            sparse::data_regions(source.as_fd(), size).map_err(|e| fail("finding the holes of", e))?;
        let copy = self.create(parent, name, path, stat.st_mode & 0o7777)?;
        let xattrs = xattr::read_all(Object::Open(source.as_fd()), &mut Vec::new())
            .map_err(|e| fail("reading the extended attributes of", e))?;
        // Without what seals the file, which it gets at the end.
        let attributes =
            Attributes::read(source.as_fd()).map_err(|e| fail("reading the flags to copy to", e))?;
        let place = self.place(parent.kind, path);
        place.attributes(copy.as_fd(), attributes)?;
        place.properties(copy.as_fd(), &xattrs)?;
        ftruncate(&copy, size).map_err(|e| fail("setting the size of", e))?;
        let mut buffer = vec![0; 256 << 10];
        for (offset, length) in regions {
            let (mut position, end) = (offset, offset + length);
            while position < end {
                let want = buffer.len().min(usize::try_from(end - position).unwrap_or(usize::MAX));
                let count = match pread(&source, &mut buffer[..want], position) {
                    Ok(0) => return Err(fail("reading a file that gets shorter, to copy to", Errno::IO)),
                    Err(Errno::INTR) => continue,
                    other => other.map_err(|e| fail("reading the file to copy to", e))?,
                };
                write_at(&copy, &buffer[..count], position).map_err(|e| fail("writing", e))?;
                position += count as u64;
            }
        }
        let meta = Metadata {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode & 0o7777,
            // Nanoseconds are below 2^30 by definition.
            mtime: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            xattrs: &xattrs,
        };
        place.file_metadata(&copy, &meta)
    }

    /// Has all that other threads were given done; to be called before any error is told, which one of theirs may precede.
    pub(crate) fn settle(&mut self) -> Result<(), UnpackError> {
        self.writers.settle()
    }

    /// Gives the directories what they get last and, if it was asked for, has everything put on the disk.
    pub(crate) fn finish(mut self) -> Result<UnpackSummary, UnpackError> {
        self.settle()?;
        let deferred = std::mem::take(&mut self.deferred);
        deferred.finish(|record| {
            let directory = self.target.directory(record.path, false)?;
            let place = self.place(directory.kind, record.path);
            if let Some(acl) = record.default_acl {
                place.set_xattr(Object::Open(directory.as_fd()), DEFAULT_ACL, acl)?;
            }
            if let Some(mode) = record.mode {
                let result = fchmod(&*directory, Mode::from_raw_mode(mode.into()));
                place.allow(result, Feature::Mode, "setting the mode of")?;
            }
            futimens(&*directory, &times(record.mtime)).map_err(|e| place.fail("setting the time of", e))
        })?;
        self.last_attributes()?;
        if let Some(flusher) = self.flusher.take() {
            flusher.finish()?;
            sync(self.target.file_systems())?;
        }
        self.summary.not_representable = self.shared.notes.list();
        Ok(self.summary)
    }
}

/// Writes an entry's content into its new file, holes as holes.
fn fill<R: Read>(
    fd: &OwnedFd,
    entry: &Entry,
    path: &[u8],
    input: &mut Input<R>,
    reported: &mut u64,
    observer: &mut dyn Observer,
) -> Result<(), UnpackError> {
    let whole = [(0, entry.stored)];
    let regions = match &entry.sparse {
        Some((size, map)) => {
            ftruncate(fd, *size).map_err(|e| UnpackError::file("setting the size of", path, e))?;
            &map[..]
        }
        None => &whole,
    };
    for &(offset, length) in regions {
        let (mut position, end) = (offset, offset + length);
        while position < end {
            let part = (end - position).min(REPORT_EVERY);
            let mut at = position;
            input.pieces(part, |piece| {
                let written =
                    if entry.sparse.is_some() { write_at(fd, piece, at) } else { write_all(fd, piece) };
                at += piece.len() as u64;
                written.map_err(|e| UnpackError::file("writing", path, e))
            })?;
            position += part;
            if position < end {
                observer.bytes(input.position() - *reported);
                *reported = input.position();
            }
        }
    }
    Ok(())
}

fn c_string(bytes: &[u8], path: &[u8]) -> Result<CString, UnpackError> {
    CString::new(bytes)
        .map_err(|_| UnpackError::Refused { path: shown(path), why: "a name with a NUL in it".to_owned() })
}
