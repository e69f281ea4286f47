//! Attributes of inodes that only ioctls tell: project ids, by which ext4, xfs and f2fs count the space that trees take.

use rustix::fd::{AsFd, AsRawFd};
use std::io;

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct FsXattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    copy_extent_size: u32,
    padding: [u8; 8],
}

#[allow(unsafe_code)]
mod raw {
    use super::FsXattr;
    nix::ioctl_read!(fs_get, b'X', 31, FsXattr);
    nix::ioctl_write_ptr!(fs_set, b'X', 32, FsXattr);
}

#[allow(unsafe_code)]
fn get(file: impl AsFd) -> io::Result<FsXattr> {
    let mut attributes = FsXattr::default();
    // SAFETY: the pointer is to a writable struct of the layout that FS_IOC_FSGETXATTR fills, and lives through the call.
    unsafe { raw::fs_get(file.as_fd().as_raw_fd(), &raw mut attributes) }?;
    Ok(attributes)
}

/// The project id of an open file or directory.
///
/// # Errors
/// What the kernel says: ENOTTY or EOPNOTSUPP where the file system has nothing of the kind.
pub fn project(file: impl AsFd) -> io::Result<u32> {
    get(file).map(|attributes| attributes.project)
}

/// Sets the project id of an open file or directory; all else that the same call would set stays as it is.
///
/// # Errors
/// What the kernel says: EOPNOTSUPP where the file system was made without project ids.
#[allow(unsafe_code)]
pub fn set_project(file: impl AsFd, project: u32) -> io::Result<()> {
    let mut attributes = get(&file)?;
    attributes.project = project;
    // SAFETY: the pointer is to a struct of the layout that FS_IOC_FSSETXATTR reads, and lives through the call.
    unsafe { raw::fs_set(file.as_fd().as_raw_fd(), &raw const attributes) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_projects_says_so() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        assert_eq!(project(&file).unwrap_err().raw_os_error(), Some(nix::libc::ENOTTY));
        assert_eq!(set_project(&file, 7).unwrap_err().raw_os_error(), Some(nix::libc::ENOTTY));
    }

    #[test]
    fn the_struct_is_the_kernels() {
        assert_eq!(size_of::<FsXattr>(), 28);
    }
}
