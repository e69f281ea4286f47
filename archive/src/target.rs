//! The directory that is unpacked into, and the only way to reach anything in it: every path is checked, and its parent
//! is opened with the kernel's promise that no symlink was followed and the root was not left. The last directories used
//! stay open. It also knows which file system each is on, because FAT can hold only part of what Linux files are.

use std::collections::HashSet;
use std::collections::hash_map::RandomState;
use std::ffi::CString;
use std::hash::BuildHasher;
use std::path::Path;
use std::sync::Arc;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, Stat, fstat, fstatfs, mkdirat, openat, openat2};
use rustix::io::Errno;

use crate::shown;
use crate::unpack::UnpackError;
use crate::writers::remove;

/// Directories that stay open.
const CACHED: usize = 32;
/// Longest piece of a path that is opened in one call; the kernel's limit is 4096 with the NUL.
const PIECE: usize = 4000;

/// What a file system can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FsKind {
    /// Everything; what it refuses is an error.
    Full,
    /// Everything, and btrfs properties too.
    Btrfs,
    /// FAT and exFAT: neither owners nor modes nor xattrs nor links nor devices.
    Fat,
}

/// The kinds of things that a file system may be unable to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Feature<'a> {
    Owner,
    Mode,
    Xattr(&'a [u8]),
    Symlink,
    Special,
    HardLink,
    /// Flags and project ids.
    Attributes,
}

impl FsKind {
    pub(crate) fn from_magic(magic: u64) -> Self {
        match magic {
            0x4d44 | 0x2011_bab0 => Self::Fat,
            0x9123_683e => Self::Btrfs,
            _ => Self::Full,
        }
    }

    /// Whether `errno` means that this kind of file system cannot hold `feature`, rather than that something went wrong.
    pub(crate) fn cannot_hold(self, feature: Feature<'_>, errno: Errno) -> bool {
        match (self, feature) {
            // Each kind has some of them, and some only when it was made with them.
            (_, Feature::Attributes) => {
                [Errno::NOTTY, Errno::OPNOTSUPP, Errno::INVAL, Errno::NOSYS].contains(&errno)
            }
            (Self::Fat, Feature::Xattr(_)) => errno == Errno::OPNOTSUPP,
            (Self::Fat, _) => errno == Errno::PERM,
            (Self::Full, Feature::Xattr(name)) => errno == Errno::OPNOTSUPP && name.starts_with(b"btrfs."),
            _ => false,
        }
    }
}

/// An open directory.
pub(crate) struct Directory {
    fd: OwnedFd,
    pub(crate) kind: FsKind,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(crate) struct Target {
    root: Arc<Directory>,
    cache: Vec<(Vec<u8>, Arc<Directory>)>,
    file_systems: Vec<(u64, Arc<Directory>)>,
    /// Digests of the paths of all directories so far.
    seen: HashSet<u64>,
    hash: RandomState,
    /// The kernel has openat2 (Linux 5.6); without it each component is opened by itself.
    has_openat2: bool,
}

impl Target {
    pub(crate) fn open(root: &Path) -> Result<Self, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fail = |e: Errno| UnpackError::Root { root: root.to_owned(), source: e.into() };
        let fd = openat(CWD, root, flags, Mode::empty()).map_err(fail)?;
        let probe = openat2(&fd, c".", flags, Mode::empty(), resolve());
        let has_openat2 = match probe {
            Ok(_) => true,
            Err(Errno::NOSYS | Errno::PERM) => false,
            Err(e) => return Err(fail(e)),
        };
        let device = fstat(&fd).map_err(fail)?.st_dev;
        let kind = kind(&fd).map_err(fail)?;
        let root = Arc::new(Directory { fd, kind });
        Ok(Self {
            file_systems: vec![(device, root.clone())],
            root,
            cache: Vec::new(),
            seen: HashSet::new(),
            hash: RandomState::new(),
            has_openat2,
        })
    }

    /// The directory `path` (checked by [`clean`]), open, which is kept; missing parts are made when `create` says so.
    pub(crate) fn directory(&mut self, path: &[u8], create: bool) -> Result<Arc<Directory>, UnpackError> {
        if let Some(found) = self.find(path)? {
            return Ok(found);
        }
        if !create {
            return Err(refusal(path, Errno::NOENT));
        }
        let fd = self.create_all(path).map_err(|e| refusal(path, e))?;
        self.keep(path, fd).map(|(directory, _)| directory)
    }

    /// As [`Target::directory`]; none when a part of the path is missing.
    pub(crate) fn find(&mut self, path: &[u8]) -> Result<Option<Arc<Directory>>, UnpackError> {
        if path.is_empty() {
            return Ok(Some(self.root.clone()));
        }
        if let Some(at) = self.cache.iter().rposition(|(cached, _)| cached == path) {
            let found = self.cache.remove(at);
            let directory = found.1.clone();
            self.cache.push(found);
            return Ok(Some(directory));
        }
        match self.reach(path) {
            Ok(fd) => self.keep(path, fd).map(|(directory, _)| Some(directory)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(refusal(path, e)),
        }
    }

    /// Takes an open directory into the cache; returns what it looks like, too.
    pub(crate) fn keep(&mut self, path: &[u8], fd: OwnedFd) -> Result<(Arc<Directory>, Stat), UnpackError> {
        let fail = |e| UnpackError::file("looking at the file system of", path, e);
        let stat = fstat(&fd).map_err(fail)?;
        let device = stat.st_dev;
        let known = self.file_systems.iter().find(|(known, _)| *known == device).map(|(_, d)| d.kind);
        let kind = match known {
            Some(kind) => kind,
            None => kind(&fd).map_err(fail)?,
        };
        let directory = Arc::new(Directory { fd, kind });
        if known.is_none() {
            self.file_systems.push((device, directory.clone()));
        }
        if self.cache.len() >= CACHED {
            self.cache.remove(0);
        }
        self.cache.push((path.to_vec(), directory.clone()));
        self.seen.insert(self.hash.hash_one(path));
        Ok((directory, stat))
    }

    /// Whether `path` was used as a directory before, or, rarely, another path of the same digest.
    pub(crate) fn was_directory(&self, path: &[u8]) -> bool {
        self.seen.contains(&self.hash.hash_one(path))
    }

    fn reach(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let mut current: Option<OwnedFd> = None;
        let mut rest = path;
        while !rest.is_empty() {
            let piece = if !self.has_openat2 {
                rest.iter().position(|&b| b == b'/').unwrap_or(rest.len())
            } else if rest.len() <= PIECE {
                rest.len()
            } else {
                rest[..PIECE].iter().rposition(|&b| b == b'/').ok_or(Errno::NAMETOOLONG)?
            };
            let from = current.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
            let next = if self.has_openat2 {
                openat2(from, &rest[..piece], flags(), Mode::empty(), resolve())?
            } else {
                openat(from, &rest[..piece], flags(), Mode::empty())?
            };
            current = Some(next);
            rest = rest.get(piece + 1..).unwrap_or_default();
        }
        current.ok_or(Errno::NOENT)
    }

    fn create_all(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let mut current: Option<OwnedFd> = None;
        for name in path.split(|&b| b == b'/') {
            let from = current.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
            let next = match openat(from, name, flags(), Mode::empty()) {
                Err(Errno::NOENT) => {
                    mkdirat(from, name, Mode::from_raw_mode(0o755))?;
                    openat(from, name, flags(), Mode::empty())?
                }
                other => other?,
            };
            current = Some(next);
        }
        current.ok_or(Errno::NOENT)
    }

    /// Removes what stands at `name`, but no directory with content; true when it was a directory.
    pub(crate) fn clear(
        &mut self,
        parent: &Directory,
        name: &CString,
        path: &[u8],
    ) -> Result<bool, UnpackError> {
        let directory = remove(parent, name, path)?;
        if directory {
            // Nothing that was open inside it may be used any more.
            self.cache.clear();
        }
        Ok(directory)
    }

    /// A directory on each file system that was written to.
    pub(crate) fn file_systems(&self) -> impl Iterator<Item = &Arc<Directory>> {
        self.file_systems.iter().map(|(_, directory)| directory)
    }
}

fn refusal(path: &[u8], errno: Errno) -> UnpackError {
    match errno {
        Errno::LOOP | Errno::NOTDIR | Errno::XDEV => UnpackError::Refused {
            path: shown(path),
            why: "the way there leads through something that is no directory, such as a symbolic link"
                .to_owned(),
        },
        e => UnpackError::file("opening the directory", path, e),
    }
}

fn flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn resolve() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// What the file system that `fd` is on can hold.
pub(crate) fn kind<F: AsFd>(fd: F) -> Result<FsKind, Errno> {
    magic(fd.as_fd()).map(|magic| FsKind::from_magic(magic.into()))
}

/// The number that the file system that `fd` is on goes by.
pub(crate) fn magic(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    // The field is signed on some machines and 32 bits wide on others.
    #[allow(clippy::cast_sign_loss, clippy::cast_possible_truncation, clippy::unnecessary_cast)]
    fstatfs(fd).map(|stat| stat.f_type as u32)
}

/// `path` from a stream as a path below the root: without empty components and `.`; empty means the root itself.
pub(crate) fn clean(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    if path.is_empty() {
        return Err("it has no name");
    }
    if path[0] == b'/' {
        return Err("its name is absolute");
    }
    let mut out = Vec::with_capacity(path.len());
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err("its name has .. in it"),
            name if name.contains(&0) => return Err("its name has a NUL in it"),
            name => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(name);
            }
        }
    }
    Ok(out)
}

/// A cleaned path as its parent and its last name.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_or_refused() {
        for (path, cleaned) in [
            ("a/b", "a/b"),
            ("./a//b/", "a/b"),
            ("./", ""),
            (".", ""),
            ("a/./b", "a/b"),
            ("..a/b..", "..a/b.."),
        ] {
            assert_eq!(clean(path.as_bytes()).unwrap(), cleaned.as_bytes(), "{path}");
        }
        for path in ["", "/a", "//", "..", "a/../b", "a/..", "./../a", "a\0b"] {
            assert!(clean(path.as_bytes()).is_err(), "{path}");
        }
    }

    #[test]
    fn without_openat2_the_same_things_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("root/real/deep")).unwrap();
        std::fs::create_dir(directory.path().join("outside")).unwrap();
        std::os::unix::fs::symlink("../outside", directory.path().join("root/out")).unwrap();
        std::os::unix::fs::symlink("real", directory.path().join("root/in")).unwrap();
        for has_openat2 in [true, false] {
            let mut target = Target::open(&directory.path().join("root")).unwrap();
            target.has_openat2 &= has_openat2;
            assert!(target.directory(b"real/deep", false).is_ok());
            assert!(target.directory(b"new/er", true).is_ok());
            for path in [&b"out"[..], b"in/deep", b"out/x", b"in/x"] {
                let error = target.directory(path, true).err().unwrap();
                assert!(matches!(error, UnpackError::Refused { .. }), "{error}");
            }
        }
        assert!(!directory.path().join("outside/x").exists());
    }

    #[test]
    fn only_fat_is_excused_and_only_for_what_it_lacks() {
        use Feature::{HardLink, Mode, Owner, Special, Symlink, Xattr};
        let fat = FsKind::from_magic(0x4d44);
        for feature in [Owner, Mode, Symlink, Special, HardLink] {
            assert!(fat.cannot_hold(feature, Errno::PERM));
            assert!(!fat.cannot_hold(feature, Errno::NOSPC));
            assert!(!FsKind::from_magic(0xef53).cannot_hold(feature, Errno::PERM));
        }
        assert!(fat.cannot_hold(Xattr(b"user.a"), Errno::OPNOTSUPP));
        assert!(!fat.cannot_hold(Xattr(b"user.a"), Errno::NOSPC));
        let (ext4, btrfs) = (FsKind::from_magic(0xef53), FsKind::from_magic(0x9123_683e));
        assert!(ext4.cannot_hold(Xattr(b"btrfs.compression"), Errno::OPNOTSUPP));
        assert!(!ext4.cannot_hold(Xattr(b"user.a"), Errno::OPNOTSUPP));
        assert!(!btrfs.cannot_hold(Xattr(b"btrfs.compression"), Errno::OPNOTSUPP));
    }
}
