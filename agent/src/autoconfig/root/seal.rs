//! Files and directories that `chattr` has made immutable or append-only are so on a clone before it is configured. What must
//! change has these flags taken off for that moment; what takes its place gets the same flags and project id.

use anyhow::{Context, Result};
use ka_archive::manifest::Attributes;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{self, AtFlags, FileType, IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// The file or directory `name`, open; none when it is nothing that has flags.
fn open(parent: &OwnedFd, name: &OsStr) -> Result<Option<OwnedFd>> {
    let kind = match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => FileType::from_raw_mode(stat.st_mode),
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if !matches!(kind, FileType::RegularFile | FileType::Directory) {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(Some(fs::openat(parent, name, flags, Mode::empty())?))
}

/// Takes off what forbids changes; the flags as they were, where there was anything.
fn take_off(fd: &OwnedFd) -> Result<Option<IFlags>> {
    let seals = IFlags::APPEND | IFlags::IMMUTABLE;
    match ioctl_getflags(fd) {
        Ok(flags) if flags.intersects(seals) => {
            ioctl_setflags(fd, flags - seals).context("taking off the flags that forbid it (chattr)")?;
            Ok(Some(flags))
        }
        // A file system without flags cannot forbid anything by them.
        _ => Ok(None),
    }
}

/// Does `change` while no flag of the directory `parent`, nor of what is called `name` there, forbids it. Afterwards both have
/// the flags that they had, also if it failed.
pub(super) fn around(parent: &OwnedFd, name: &OsStr, change: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = fs::openat(parent, ".", flags, Mode::empty())?;
    let mut off = Vec::new();
    let mut result = Ok(());
    for fd in [Some(directory), open(parent, name)?].into_iter().flatten() {
        match take_off(&fd) {
            Ok(flags) => off.extend(flags.map(|flags| (fd, flags))),
            Err(e) => result = Err(e),
        }
    }
    result = result.and_then(|()| change());
    for (fd, flags) in off {
        // Removed for good, and with no other name.
        if fs::fstat(&fd)?.st_nlink == 0 {
            continue;
        }
        let again = ioctl_setflags(fd, flags).context("setting the flags again that were there (chattr)");
        result = result.and(again);
    }
    result
}

/// Takes off what forbids to remove the directory `name` and all that is in it.
pub(super) fn take_off_all(parent: &OwnedFd, name: &OsStr) -> Result<()> {
    let Some(fd) = open(parent, name)? else { return Ok(()) };
    take_off(&fd)?;
    if FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) == FileType::Directory {
        for entry in fs::Dir::read_from(&fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                take_off_all(&fd, OsStr::from_bytes(name))?;
            }
        }
    }
    Ok(())
}

/// Gives a new file these flags and this project id, and takes from it what it has inherited beside them.
pub(super) fn give(file: impl AsFd, wanted: Attributes) -> Result<()> {
    let file = file.as_fd();
    let now = Attributes::read(file)?;
    if now.project != wanted.project {
        ka_sys::fileattr::set_project(file, wanted.project).context("setting its project id")?;
    }
    if now != wanted {
        wanted.set(file).context("setting its flags (chattr)")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Root;
    use super::*;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    fn chattr(words: &[&str], path: &Path) -> bool {
        Command::new("chattr").args(words).arg(path).status().unwrap().success()
    }

    /// What `lsattr` shows of it, but for how the file system keeps it.
    fn flags(path: &Path) -> String {
        let output = Command::new("lsattr").arg("-d").arg(path).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split(' ').next().unwrap().replace(['-', 'e', 'I'], "")
    }

    /// A directory whose flags are taken off at the end, so that it can be removed.
    struct Tree(tempfile::TempDir);

    impl Drop for Tree {
        fn drop(&mut self) {
            chattr(&["-R", "-f", "-i", "-a"], self.0.path());
        }
    }

    /// An immutable directory with immutable and append-only things in it; none where there are no such flags.
    fn sealed() -> Option<(Tree, Root, PathBuf)> {
        let tree = Tree(tempfile::tempdir().unwrap());
        let etc = tree.0.path().join("etc");
        std::fs::create_dir_all(etc.join("dir/below")).unwrap();
        for name in ["resolv.conf", "log", "gone", "old", "dir/file", "dir/below/file"] {
            std::fs::write(etc.join(name), "golden").unwrap();
        }
        std::fs::hard_link(etc.join("gone"), etc.join("other")).unwrap();
        chattr(&["+d"], &etc.join("resolv.conf"));
        for (word, name) in
            [("+a", "log"), ("+i", "resolv.conf"), ("+i", "gone"), ("+i", "old"), ("+i", "dir/below/file")]
                .into_iter()
                .chain([("+a", "dir/below"), ("+i", "dir/file"), ("+i", "dir"), ("+i", "")])
        {
            if !chattr(&[word], &etc.join(name)) {
                eprintln!("SKIPPED: flags: not root, or this file system has none");
                return None;
            }
        }
        let root = Root::open(tree.0.path()).unwrap();
        Some((tree, root, etc))
    }

    #[test]
    fn what_is_sealed_is_changed_and_sealed_again() {
        let Some((_tree, root, etc)) = sealed() else { return };
        assert!(root.write("/etc/resolv.conf", b"new", 0o644).unwrap());
        assert_eq!(std::fs::read(etc.join("resolv.conf")).unwrap(), b"new");
        assert_eq!(flags(&etc.join("resolv.conf")), "id");
        assert!(root.write("/etc/made", b"new", 0o644).unwrap());
        assert_eq!(flags(&etc.join("made")), "");
        assert!(root.truncate("/etc/log").unwrap());
        assert_eq!((std::fs::read(etc.join("log")).unwrap(), flags(&etc.join("log"))), (vec![], "a".into()));
        assert!(root.remove("/etc/gone").unwrap() && !etc.join("gone").exists());
        assert_eq!(flags(&etc.join("other")), "i", "its other name is what it was");
        assert!(root.rename("/etc/old", "new").unwrap());
        assert_eq!(flags(&etc.join("new")), "i");
        root.make_dir("/etc/more").unwrap();
        assert_eq!(flags(&etc), "i");
        assert!(root.remove_tree("/etc/dir").unwrap() && !etc.join("dir").exists());
        assert_eq!(flags(&etc), "i");
    }

    #[test]
    fn what_could_not_be_changed_is_sealed_again() {
        let Some((_tree, root, etc)) = sealed() else { return };
        let (parent, name) = root.parent_of(Path::new("/etc/log")).unwrap();
        let error = around(&parent, &name, &mut || {
            assert_eq!((flags(&etc), flags(&etc.join("log"))), (String::new(), String::new()));
            anyhow::bail!("not today")
        });
        assert_eq!(error.unwrap_err().to_string(), "not today");
        assert_eq!((flags(&etc), flags(&etc.join("log"))), ("i".into(), "a".into()));
    }
}
