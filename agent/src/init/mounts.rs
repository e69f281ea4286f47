//! The kernel's file systems: a list of what is mounted where before anything else happens.

use anyhow::{Context, Result};
use rustix::fs::{Mode, makedev};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::path::Path;

/// One mount of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mount {
    /// Type of the file system, which is also its source.
    pub fs: &'static str,
    /// Where it is mounted.
    pub path: &'static str,
    /// Options of the file system.
    pub options: &'static str,
    /// Mounted only if this path is there.
    pub only_if: Option<&'static str>,
}

const fn mount(fs: &'static str, path: &'static str, options: &'static str) -> Mount {
    Mount { fs, path, options, only_if: None }
}

/// Everything that is mounted at the start, in order.
pub const TABLE: &[Mount] = &[
    mount("devtmpfs", "/dev", "mode=0755"),
    mount("proc", "/proc", ""),
    mount("sysfs", "/sys", ""),
    mount("tmpfs", "/run", "mode=0755,size=25%"),
    mount("tmpfs", "/tmp", "mode=1777,size=25%"),
    mount("devpts", "/dev/pts", "mode=0620,gid=5,ptmxmode=0666"),
];

/// The UEFI variables; on most kernels a module that must be loaded first.
pub const EFIVARS: Mount = Mount {
    fs: "efivarfs",
    path: "/sys/firmware/efi/efivars",
    options: "",
    only_if: Some("/sys/firmware/efi"),
};

/// Mounts the whole table; every mount is tried, and what went wrong is returned.
pub fn mount_all() -> Vec<anyhow::Error> {
    let mut errors: Vec<_> = TABLE.iter().filter_map(|m| apply(m).err()).collect();
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/etc/mtab", "/proc/self/mounts"),
    ] {
        if let Err(e) = link_if_missing(target, link) {
            errors.push(e);
        }
    }
    errors
}

/// Mounts one entry; where a file system of its type is mounted already, that is kept.
///
/// # Errors
/// When the directory cannot be made or the kernel refuses.
pub fn apply(mount: &Mount) -> Result<()> {
    if mount.only_if.is_some_and(|path| !Path::new(path).exists()) || is_mounted(mount) {
        return Ok(());
    }
    // sysfs makes its mount points itself and lets nobody else.
    if !Path::new(mount.path).is_dir() {
        std::fs::create_dir_all(mount.path).with_context(|| format!("creating {}", mount.path))?;
    }
    let options = CString::new(mount.options).context("mount options")?;
    let mut flags = MountFlags::NOSUID;
    if mount.fs != "devtmpfs" && mount.fs != "devpts" {
        flags |= MountFlags::NODEV;
    }
    match rustix::mount::mount(mount.fs, mount.path, mount.fs, flags, options.as_c_str()) {
        // Busy: the kernel mounted it itself (devtmpfs.mount=1) while /proc was not there to tell.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("mounting {} on {}", mount.fs, mount.path)),
    }
}

fn is_mounted(mount: &Mount) -> bool {
    // Without /proc nothing is known; mounting twice does no harm.
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounted_type(&mounts, mount.path) == Some(mount.fs)
}

/// The type of the file system that is mounted last on `path`.
fn mounted_type<'a>(mounts: &'a str, path: &str) -> Option<&'a str> {
    mounts.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        (fields.next()? == path).then(|| fields.next())?
    })
}

fn link_if_missing(target: &str, link: &str) -> Result<()> {
    if std::fs::symlink_metadata(link).is_ok() {
        return Ok(());
    }
    if let Some(parent) = Path::new(link).parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    std::os::unix::fs::symlink(target, link).with_context(|| format!("linking {link} to {target}"))
}

/// Makes the few device nodes without which a program cannot start, for a kernel without devtmpfs.
pub fn ensure_basic_nodes() -> Vec<anyhow::Error> {
    let nodes = [("/dev/console", 5, 1), ("/dev/null", 1, 3), ("/dev/kmsg", 1, 11), ("/dev/urandom", 1, 9)];
    let mut errors = Vec::new();
    for (path, major, minor) in nodes {
        if Path::new(path).exists() {
            continue;
        }
        let made = rustix::fs::mknodat(
            rustix::fs::CWD,
            path,
            rustix::fs::FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            makedev(major, minor),
        );
        if let Err(e) = made {
            errors.push(anyhow::Error::new(e).context(format!("creating {path}")));
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_counts() {
        let mounts =
            "rootfs / rootfs rw 0 0\ndevtmpfs /dev devtmpfs rw 0 0\na /x ext4 rw 0 0\nb /x xfs rw 0 0\n";
        assert_eq!(mounted_type(mounts, "/dev"), Some("devtmpfs"));
        assert_eq!(mounted_type(mounts, "/x"), Some("xfs"));
        assert_eq!(mounted_type(mounts, "/proc"), None);
        assert_eq!(mounted_type("broken\n\n x", "/"), None);
    }

    #[test]
    fn parents_come_before_children() {
        for (i, mount) in TABLE.iter().enumerate() {
            assert!(
                TABLE[i..].iter().skip(1).all(|later| !mount.path.starts_with(&format!("{}/", later.path)))
            );
        }
    }
}
