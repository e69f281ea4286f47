//! Mounting and unmounting, with option strings as fstab has them.

use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::path::Path;

/// Splits an fstab-like option string into the kernel's flags and the rest, which the file system reads itself.
/// Words that only `mount(8)` and `systemd` know (`defaults`, `noauto`, `x-...`, `nofail`, `user`) are dropped.
#[must_use]
pub fn split_options(options: &str) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for word in options.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        match word {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" => flags &= !MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "lazytime" => flags |= MountFlags::LAZYTIME,
            "defaults" | "auto" | "noauto" | "nofail" | "user" | "users" | "nouser" | "_netdev" | "owner"
            | "group" | "suid" | "dev" | "exec" | "async" | "atime" | "diratime" => {}
            word if word.starts_with("x-") || word.starts_with("comment=") => {}
            word => data.push(word),
        }
    }
    (flags, data.join(","))
}

/// Mounts `device` at `target` with options as in fstab.
///
/// # Errors
/// What the kernel says; ENODEV when it does not know the file system (its module is missing).
pub fn mount(device: &Path, target: &Path, file_system: &str, options: &str) -> io::Result<()> {
    let (flags, data) = split_options(options);
    let data = CString::new(data).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(rustix::mount::mount(device, target, file_system, flags, Some(data.as_c_str()))?)
}

/// Unmounts what is mounted at `target`.
///
/// # Errors
/// EBUSY while something below it is in use.
pub fn unmount(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW)?)
}

/// Takes what is mounted at `target` out of the tree at once; it ends when its last user does.
///
/// # Errors
/// What the kernel says.
pub fn unmount_lazy(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?)
}

/// Writes everything of the file system that `path` lies on to its device, and reports write errors since the last time.
///
/// # Errors
/// What the kernel says, EIO for data that could not be written among it.
pub fn sync_file_system(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(File::open(path)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split() {
        assert_eq!(
            split_options("defaults,noatime,umask=0077, ro,x-systemd.automount,nofail,compress=zstd:1"),
            (MountFlags::NOATIME | MountFlags::RDONLY, "umask=0077,compress=zstd:1".to_owned())
        );
        assert_eq!(split_options("ro,rw"), (MountFlags::empty(), String::new()));
    }

    #[test]
    fn a_tmpfs_comes_and_goes() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: mounting needs root");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        mount(Path::new("none"), place.path(), "tmpfs", "size=64k,nosuid").unwrap();
        std::fs::write(place.path().join("file"), "x").unwrap();
        sync_file_system(place.path()).unwrap();
        unmount(place.path()).unwrap();
        assert!(!place.path().join("file").exists());
        let error = mount(Path::new("none"), place.path(), "no-such-fs", "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(19));
    }
}
