//! Walks a live tree through directory descriptors: each directory's names sorted, nothing followed, nothing opened that
//! is not a directory. Depth is not limited by path length nor by the number of descriptors. Which file system a thing
//! belongs to is told by its mount, not its device number, so that btrfs subvolumes are no borders and bind mounts are.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::sync::Arc;

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, Statx, StatxFlags, openat, statx};
use rustix::io::Errno;

use crate::exclude::{Excludes, Verdict};
use crate::pack::{PackError, PackOptions};
use crate::reader::ours;
use crate::shown;

/// Directories above the current one that stay open; those further up are opened again on the way back.
const KEPT_OPEN: usize = 64;
/// How often something that changes its type between two looks is looked at again.
const TRIES: usize = 3;

/// One thing found. Nearly all are entries, and one lives at a time, so their size does not matter.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Event<'w> {
    Entry(Item<'w>),
    /// It was listed in its directory and is gone now.
    Vanished(&'w [u8]),
    /// An exclude pattern says to leave it out.
    LeftOut,
    /// It cannot be read: the path, what was tried, and the cause.
    Unreadable(&'w [u8], &'static str, Errno),
}

/// An entry that is to be sent.
pub(crate) struct Item<'w> {
    /// Relative to the root, without slashes at its ends; empty for the root.
    pub path: &'w [u8],
    /// The open directory it is in.
    pub parent: &'w Arc<OwnedFd>,
    pub stat: Statx,
    /// The open directory when it is one (but for other file systems' mount points).
    pub directory: Option<&'w Arc<OwnedFd>>,
    /// It is where another file system is mounted that is not sent.
    pub other_mount: bool,
    /// It is a directory whose content is left out.
    pub emptied: bool,
    /// Index of the mount in the options' list that it belongs to.
    pub mount: usize,
}

struct Level {
    fd: Option<Arc<OwnedFd>>,
    /// Names still to come, the next one last.
    names: Vec<CString>,
    /// Length of the path of this directory.
    path_length: usize,
    inode: (u32, u32, u64),
    mount_id: u64,
    mount: usize,
}

pub(crate) struct Walker {
    excludes: Excludes,
    /// Mount paths without slashes at their ends; the first is the root.
    mounts: Vec<Vec<u8>>,
    unseen: BTreeSet<Vec<u8>>,
    /// Those of them that lie in directories whose content is left out.
    pub(crate) hidden: Vec<Vec<u8>>,
    stack: Vec<Level>,
    started: bool,
    path: Vec<u8>,
    name: CString,
    /// A directory that was opened and is not descended into.
    shallow: Option<Arc<OwnedFd>>,
    listing: Vec<u8>,
}

impl Walker {
    pub(crate) fn new(options: &PackOptions) -> Result<Self, PackError> {
        let excludes = Excludes::new(&options.excludes)?;
        let mut mounts: Vec<Vec<u8>> = vec![Vec::new()];
        for mount in options.mounts.iter().flatten() {
            let mount = mount.trim_matches('/').as_bytes().to_vec();
            if !mounts.contains(&mount) {
                mounts.push(mount);
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, &options.root, flags, Mode::empty())
            .map_err(|e| PackError::Root { root: options.root.clone(), source: e.into() })?;
        let mut walker = Self {
            excludes,
            unseen: mounts[1..].iter().cloned().collect(),
            mounts,
            hidden: Vec::new(),
            stack: Vec::new(),
            started: false,
            path: Vec::new(),
            name: c".".to_owned(),
            shallow: None,
            listing: Vec::with_capacity(64 << 10),
        };
        let stat = walker.stat_open(&root)?;
        walker.push(Arc::new(root), &stat, 0).map_err(|e| walker.error("listing", e))?;
        Ok(walker)
    }

    fn error(&self, operation: &'static str, errno: Errno) -> PackError {
        PackError::File { operation, path: shown(&self.path), source: errno.into() }
    }

    fn stat_open(&self, fd: &OwnedFd) -> Result<Statx, PackError> {
        statx(fd, c"", AtFlags::EMPTY_PATH, wanted()).map_err(|e| self.error("looking at", e))
    }

    /// The content of the directory at hand is left out, and so are the mounts in it.
    fn hide(&mut self) {
        let start = if self.path.is_empty() { Vec::new() } else { [&self.path[..], b"/"].concat() };
        let below = |mount: &Vec<u8>| mount.starts_with(&start);
        self.hidden.extend(self.unseen.iter().filter(|mount| below(mount)).cloned());
        self.unseen.retain(|mount| !below(mount));
    }

    /// Makes `fd` the current directory, unless the excludes keep its content out.
    fn push(&mut self, fd: Arc<OwnedFd>, stat: &Statx, mount: usize) -> Result<(), Errno> {
        if self.excludes.verdict(&self.path, true) == Verdict::Empty {
            self.hide();
            self.shallow = Some(fd);
            return Ok(());
        }
        let mut names = Vec::new();
        let mut directory = RawDir::new(fd.as_fd(), self.listing.spare_capacity_mut());
        while let Some(entry) = directory.next() {
            match entry {
                Ok(entry) => {
                    let name = entry.file_name();
                    if name != c"." && name != c".." {
                        names.push(name.to_owned());
                    }
                }
                // The directory was removed while it was open.
                Err(Errno::NOENT) => break,
                Err(e) => return Err(e),
            }
        }
        in_order(&mut names);
        self.stack.push(Level {
            fd: Some(fd),
            names,
            path_length: self.path.len(),
            inode: inode(stat),
            mount_id: mount_id(stat),
            mount,
        });
        if let Some(above) = self.stack.len().checked_sub(KEPT_OPEN + 1) {
            self.stack[above].fd = None;
        }
        Ok(())
    }

    /// Leaves the current directory for the one above, which is opened again where that is needed.
    fn pop(&mut self) -> Result<(), PackError> {
        let Some(left) = self.stack.pop() else { return Ok(()) };
        let Some(above) = self.stack.last() else { return Ok(()) };
        self.path.truncate(above.path_length);
        if above.fd.is_some() {
            return Ok(());
        }
        let Some(below) = left.fd else { return Ok(()) };
        let fd = openat(&below, c"..", directory_flags(), Mode::empty())
            .map_err(|e| self.error("opening again", e))?;
        let stat = self.stat_open(&fd)?;
        match self.stack.last_mut() {
            Some(above) if above.inode == inode(&stat) => above.fd = Some(Arc::new(fd)),
            _ => return Err(PackError::Moved { path: shown(&self.path) }),
        }
        Ok(())
    }

    /// The next thing, depth first, in the order of the names' bytes; none when all has been seen.
    pub(crate) fn next(&mut self) -> Result<Option<Event<'_>>, PackError> {
        self.shallow = if self.started { None } else { self.shallow.take() };
        if !self.started {
            self.started = true;
            return self.root_event().map(Some);
        }
        let name = loop {
            let Some(level) = self.stack.last_mut() else {
                return match self.unseen.pop_first() {
                    Some(mount) => Err(PackError::MountNotFound { path: shown(&mount) }),
                    None => Ok(None),
                };
            };
            match level.names.pop() {
                Some(name) => break name,
                None => self.pop()?,
            }
        };
        self.name = name;
        let level = self.stack.len() - 1;
        self.path.truncate(self.stack[level].path_length);
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(self.name.to_bytes());
        self.look(level)
    }

    fn root_event(&mut self) -> Result<Event<'_>, PackError> {
        let fd = match (&self.shallow, self.stack.last()) {
            (Some(fd), _) => fd,
            (None, Some(Level { fd: Some(fd), .. })) => fd,
            _ => return Err(self.error("opening", Errno::BADF)),
        };
        let stat = self.stat_open(fd)?;
        Ok(Event::Entry(Item {
            path: b"",
            parent: fd,
            stat,
            directory: Some(fd),
            other_mount: false,
            emptied: self.shallow.is_some(),
            mount: 0,
        }))
    }

    /// The open descriptor of a level that is current or was just left; the top of the stack always has one.
    fn fd(&self, level: usize) -> Result<&Arc<OwnedFd>, PackError> {
        self.stack[level].fd.as_ref().ok_or_else(|| self.error("opening", Errno::BADF))
    }

    fn look(&mut self, level: usize) -> Result<Option<Event<'_>>, PackError> {
        let (parent_mount, parent_index) = (self.stack[level].mount_id, self.stack[level].mount);
        for _ in 0..TRIES {
            let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
            let stat = match statx(&**self.fd(level)?, &self.name, flags, wanted()) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => return Ok(Some(Event::Vanished(&self.path))),
                Err(e) => return self.hidden_mount(level, e).map(Some),
            };
            let directory = file_type(&stat) == FileType::Directory;
            if self.excludes.verdict(&self.path, directory) == Verdict::LeaveOut {
                return Ok(Some(Event::LeftOut));
            }
            let listed = self.mounts.iter().position(|m| *m == self.path);
            let other = mount_id(&stat) != parent_mount;
            if !directory || (other && listed.is_none()) {
                if directory && self.excludes.verdict(&self.path, true) == Verdict::Empty {
                    self.hide();
                }
                return Ok(Some(Event::Entry(Item {
                    path: &self.path,
                    parent: self.fd(level)?,
                    stat,
                    directory: None,
                    other_mount: other,
                    emptied: false,
                    mount: parent_index,
                })));
            }
            let (fd, stat) = match self.open_directory(level)? {
                Ok(Some((fd, stat))) => (fd, stat),
                Ok(None) => continue,
                Err(Errno::NOENT) => return Ok(Some(Event::Vanished(&self.path))),
                Err(e) if ours(e) => return Err(self.error("opening", e)),
                Err(e) => return Ok(Some(Event::Unreadable(&self.path, "opening", e))),
            };
            if listed.is_some() {
                self.unseen.remove(&self.path);
            }
            let mount = listed.unwrap_or(parent_index);
            if let Err(e) = self.push(Arc::new(fd), &stat, mount) {
                if ours(e) {
                    return Err(self.error("listing", e));
                }
                return Ok(Some(Event::Unreadable(&self.path, "listing", e)));
            }
            let fd = match &self.shallow {
                Some(fd) => fd,
                None => self.fd(self.stack.len() - 1)?,
            };
            return Ok(Some(Event::Entry(Item {
                path: &self.path,
                // With a descriptor of its own, a directory is not reached through its parent.
                parent: fd,
                stat,
                directory: Some(fd),
                other_mount: false,
                emptied: self.shallow.is_some(),
                mount,
            })));
        }
        Ok(Some(Event::Unreadable(&self.path, "opening what changes its type all the time:", Errno::AGAIN)))
    }

    /// The directory, open; none when it is no directory any more.
    fn open_directory(&self, level: usize) -> Result<Result<Option<(OwnedFd, Statx)>, Errno>, PackError> {
        let parent = self.fd(level)?;
        let opened = match openat(&**parent, &self.name, directory_flags() | OFlags::NOATIME, Mode::empty()) {
            // Only the owner may leave access times alone.
            Err(Errno::PERM) => openat(&**parent, &self.name, directory_flags(), Mode::empty()),
            other => other,
        };
        Ok(match opened {
            Ok(fd) => {
                let stat = self.stat_open(&fd)?;
                Ok(Some((fd, stat)))
            }
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(e) => Err(e),
        })
    }

    /// Root may not even look at another user's FUSE mount, and a dead one answers nothing. When it is a mount of its
    /// own, it is one of the other file systems, and how it looks is not known; else the error stands.
    fn hidden_mount(&mut self, level: usize, errno: Errno) -> Result<Event<'_>, PackError> {
        let parent = self.fd(level)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let id = openat(&**parent, &self.name, flags, Mode::empty()).ok().and_then(|fd| mount_id_of(&fd));
        if id.is_none_or(|id| id == self.stack[level].mount_id) || self.mounts.contains(&self.path) {
            return Ok(Event::Unreadable(&self.path, "looking at", errno));
        }
        let mut stat = self.stat_open(
            &parent
                .try_clone()
                .map_err(|e| self.error("opening", Errno::from_io_error(&e).unwrap_or(Errno::BADF)))?,
        )?;
        stat.stx_mode = 0o040_755;
        (stat.stx_uid, stat.stx_gid) = (0, 0);
        Ok(Event::Entry(Item {
            path: &self.path,
            parent: self.fd(level)?,
            stat,
            directory: None,
            other_mount: true,
            emptied: false,
            mount: self.stack[level].mount,
        }))
    }
}

/// Puts names in order, the last one first. A name that was replaced while they were read may be among them twice.
fn in_order(names: &mut Vec<CString>) {
    names.sort_unstable_by(|a, b| b.cmp(a));
    names.dedup();
}

fn wanted() -> StatxFlags {
    StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID
}

fn directory_flags() -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

/// The type of what was looked at.
pub(crate) fn file_type(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// The device and number of an inode.
pub(crate) fn inode(stat: &Statx) -> (u32, u32, u64) {
    (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino)
}

/// Names the mount; before Linux 5.8 the device does so, nearly as well.
fn mount_id(stat: &Statx) -> u64 {
    if StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::MNT_ID) {
        stat.stx_mnt_id
    } else {
        // Set apart from mount numbers, which are small.
        1 << 63 | u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor)
    }
}

fn mount_id_of(fd: &OwnedFd) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn a_name_that_is_listed_twice_is_walked_once() {
        let mut names = [c"b", c"a", c"ab", c"a", c"b", c"a"].map(CStr::to_owned).to_vec();
        in_order(&mut names);
        assert_eq!(names, [c"b", c"ab", c"a"].map(CStr::to_owned));
    }
}
