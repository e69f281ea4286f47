//! What is done to one entry's inode, by whoever makes it: the step that failed and the path stand in the error, and what
//! only FAT cannot hold is noted instead.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Gid, Mode, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, fchmod, fchown, fstat, futimens};
use rustix::io::{Errno, pwrite, write};

use crate::attributes::Attributes;
use crate::entry::Entry;
use crate::target::{Feature, FsKind};
use crate::unpack::UnpackError;
use crate::xattr::{self, Object, Xattrs};
use crate::{PathList, shown};

/// What file systems could not hold, from several threads: all are counted, the first of the stream are kept.
#[derive(Default)]
pub(crate) struct Notes(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    total: u64,
    /// By the entry's number and the total then: of one entry, one thread adds all, in their order.
    first: BTreeMap<(u64, u64), String>,
}

impl Notes {
    fn add(&self, number: u64, what: String) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        notes.total += 1;
        let key = (number, notes.total);
        notes.first.insert(key, what);
        if notes.first.len() > PathList::KEPT {
            notes.first.pop_last();
        }
    }

    pub(crate) fn list(&self) -> PathList {
        let notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        PathList { total: notes.total, first: notes.first.values().cloned().collect() }
    }
}

/// What an inode gets beside its content.
pub(crate) struct Metadata<'a> {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub mtime: (i64, u32),
    pub xattrs: &'a Xattrs,
}

impl<'a> Metadata<'a> {
    pub(crate) fn of(entry: &'a Entry) -> Self {
        Self { uid: entry.uid, gid: entry.gid, mode: entry.mode, mtime: entry.mtime, xattrs: &entry.xattrs }
    }
}

/// Where an entry is made.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub notes: &'a Notes,
    /// Of the entry, in the order of the stream.
    pub number: u64,
    pub kind: FsKind,
    /// Relative to the root.
    pub path: &'a [u8],
}

impl Place<'_> {
    pub(crate) fn fail(&self, operation: &str, errno: Errno) -> UnpackError {
        UnpackError::file(operation, self.path, errno)
    }

    /// An error, unless `result` is one that only says that the file system cannot hold the feature: that is noted.
    pub(crate) fn allow(
        &self,
        result: Result<(), Errno>,
        feature: Feature<'_>,
        operation: &str,
    ) -> Result<bool, UnpackError> {
        match result {
            Ok(()) => Ok(true),
            Err(e) if self.kind.cannot_hold(feature, e) => {
                self.notes.add(self.number, format!("{operation} {}", shown(self.path)));
                Ok(false)
            }
            Err(e) => Err(self.fail(operation, e)),
        }
    }

    pub(crate) fn set_xattr(&self, object: Object<'_>, name: &CStr, value: &[u8]) -> Result<(), UnpackError> {
        match xattr::set(object, name, value) {
            Ok(()) => Ok(()),
            other => {
                let operation =
                    format!("setting the extended attribute {} of", name.to_bytes().escape_ascii());
                self.allow(other, Feature::Xattr(name.to_bytes()), &operation).map(|_| ())
            }
        }
    }

    /// Gives what is open, and looks like `stat`, its owner and mode. Each call would be a transaction of the file system,
    /// even where nothing changes.
    pub(crate) fn owner_and_mode(
        &self,
        fd: BorrowedFd<'_>,
        stat: &Stat,
        owner: (u32, u32),
        mode: u32,
    ) -> Result<(), UnpackError> {
        if (stat.st_uid, stat.st_gid) != owner {
            let changed = fchown(fd, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)));
            self.allow(changed, Feature::Owner, "setting the owner of")?;
        }
        // A change of owner takes from the mode only bits that nothing here is made with.
        if stat.st_mode & 0o7777 != mode {
            let changed = fchmod(fd, Mode::from_raw_mode(mode));
            self.allow(changed, Feature::Mode, "setting the mode of")?;
        }
        Ok(())
    }

    /// Gives flags and project id, where there are any.
    pub(crate) fn attributes(&self, fd: BorrowedFd<'_>, attributes: Attributes) -> Result<(), UnpackError> {
        if attributes.is_empty() {
            return Ok(());
        }
        self.allow(attributes.set(fd), Feature::Attributes, "setting the flags or the project id of")
            .map(|_| ())
    }

    /// Gives those of `xattrs` that say how content is kept, and so count for what is written after them.
    pub(crate) fn properties(&self, fd: BorrowedFd<'_>, xattrs: &Xattrs) -> Result<(), UnpackError> {
        for (name, value) in xattrs.iter().filter(|(name, _)| xattr::is_property(name)) {
            self.set_xattr(Object::Open(fd), name, value)?;
        }
        Ok(())
    }

    /// Gives a file whose content stands all else, but for its flags and properties.
    pub(crate) fn file_metadata(&self, fd: &OwnedFd, meta: &Metadata<'_>) -> Result<(), UnpackError> {
        let stat = fstat(fd).map_err(|e| self.fail("looking at", e))?;
        self.owner_and_mode(fd.as_fd(), &stat, (meta.uid, meta.gid), meta.mode)?;
        for (name, value) in meta.xattrs.iter().filter(|(name, _)| !xattr::is_property(name)) {
            self.set_xattr(Object::Open(fd.as_fd()), name, value)?;
        }
        futimens(fd, &times(meta.mtime)).map_err(|e| self.fail("setting the time of", e))
    }
}

/// The mode that something is made with: the final one, without the bits that a change of owner would take away again.
pub(crate) fn first_mode(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o777)
}

pub(crate) fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match write(fd, bytes) {
            // A disk that takes nothing and gives no reason.
            Ok(0) => return Err(Errno::IO),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

pub(crate) fn write_at(fd: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match pwrite(fd, bytes, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                bytes = &bytes[count..];
                offset += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The modification time alone: when a file was last read is not carried over.
pub(crate) fn times(mtime: (i64, u32)) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.0, tv_nsec: mtime.1.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_notes_of_the_stream_are_kept_whoever_comes_first() {
        let notes = Notes::default();
        for number in (0..1000).rev() {
            notes.add(number, format!("owner {number}"));
            notes.add(number, format!("mode {number}"));
        }
        let list = notes.list();
        assert_eq!((list.total, list.first.len()), (2000, 100));
        assert_eq!(list.first[..3], ["owner 0", "mode 0", "owner 1"]);
        assert_eq!(list.first[99], "mode 49");
    }
}
