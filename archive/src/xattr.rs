//! Extended attributes of anything: through a descriptor where there is one, else (symlinks, devices, fifos, which must
//! not be opened) by name below `/proc/self/fd/<directory>`, which follows no symlink and leaves the directory not.

use std::ffi::{CStr, CString};
use std::fmt::Write as _;

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::fs;
use rustix::io::Errno;

pub(crate) const ACCESS_ACL: &CStr = c"system.posix_acl_access";
pub(crate) const DEFAULT_ACL: &CStr = c"system.posix_acl_default";

/// Where XFS keeps ACLs in a form of its own, and lists them beside the two above. They say nothing more, and elsewhere they
/// would be attributes that nobody reads.
const XFS_ACLS: [&CStr; 2] = [c"trusted.SGI_ACL_FILE", c"trusted.SGI_ACL_DEFAULT"];

/// Whether it is a property of btrfs (`btrfs.compression`): it says how content is kept that is written from then on, and new
/// files take it from their directory.
pub(crate) fn is_property(name: &CStr) -> bool {
    name.to_bytes().starts_with(b"btrfs.")
}

/// Names and values, in the order of the names.
pub(crate) type Xattrs = Vec<(CString, Vec<u8>)>;

/// What the attributes belong to.
#[derive(Clone, Copy)]
pub(crate) enum Object<'a> {
    /// An open file or directory.
    Open(BorrowedFd<'a>),
    /// A name in an open directory; a symlink means the symlink itself.
    Named(BorrowedFd<'a>, &'a CStr),
}

fn proc_path(directory: BorrowedFd<'_>, name: &CStr) -> CString {
    let mut path = String::new();
    // Writing to a String cannot fail.
    let _ = write!(path, "/proc/self/fd/{}/", directory.as_raw_fd());
    let mut path = path.into_bytes();
    path.extend_from_slice(name.to_bytes());
    // A CStr has no NUL inside, so nothing is cut here.
    CString::new(path).unwrap_or_default()
}

/// All attributes of `object`, but for what XFS says twice. A file system without attributes has none; one that vanishes meanwhile is left out.
pub(crate) fn read_all(object: Object<'_>, scratch: &mut Vec<u8>) -> Result<Xattrs, Errno> {
    let path = match object {
        Object::Open(_) => CString::default(),
        Object::Named(directory, name) => proc_path(directory, name),
    };
    let list = |buffer: &mut [u8]| match object {
        Object::Open(fd) => fs::flistxattr(fd, buffer),
        Object::Named(..) => fs::llistxattr(&path, buffer),
    };
    let get = |name: &CStr, buffer: &mut [u8]| match object {
        Object::Open(fd) => fs::fgetxattr(fd, name, buffer),
        Object::Named(..) => fs::lgetxattr(&path, name, buffer),
    };
    let length = match retry_larger(scratch, list) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        other => other?,
    };
    if length == 0 {
        return Ok(Vec::new());
    }
    let names: Vec<CString> = scratch[..length]
        .split_inclusive(|&b| b == 0)
        .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
        .filter(|name| !XFS_ACLS.contains(name))
        .map(CStr::to_owned)
        .collect();
    let mut xattrs = Vec::with_capacity(names.len());
    for name in names {
        match retry_larger(scratch, |buffer| get(&name, buffer)) {
            Ok(length) => xattrs.push((name, scratch[..length].to_vec())),
            Err(Errno::NODATA) => {}
            Err(e) => return Err(e),
        }
    }
    xattrs.sort();
    Ok(xattrs)
}

/// Calls with 4 KiB of room and, where that is too little, with the 64 KiB that the kernel never exceeds.
fn retry_larger(
    scratch: &mut Vec<u8>,
    mut call: impl FnMut(&mut [u8]) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    scratch.resize(scratch.len().max(4 << 10), 0);
    match call(scratch) {
        Err(Errno::RANGE) => {
            scratch.resize(64 << 10, 0);
            call(scratch)
        }
        other => other,
    }
}

/// Sets one attribute.
pub(crate) fn set(object: Object<'_>, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    match object {
        Object::Open(fd) => fs::fsetxattr(fd, name, value, fs::XattrFlags::empty()),
        Object::Named(directory, entry) => {
            fs::lsetxattr(proc_path(directory, entry), name, value, fs::XattrFlags::empty())
        }
    }
}

/// Removes one attribute; that it was not there is fine.
pub(crate) fn remove(fd: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    match fs::fremovexattr(fd, name) {
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
        other => other,
    }
}
