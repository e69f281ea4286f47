//! Block device ioctls: sizes, sector sizes, partitions by hand (BLKPG), locks. Offsets and lengths are bytes.
//!
//! With BLKPG the kernel is told of partitions that stand in no table on the disk (yet); that is how Ka installs onto a
//! disk which cannot boot until everything is in place.

use rustix::fd::{AsFd, AsRawFd};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

const BLKPG_ADD_PARTITION: i32 = 1;
const BLKPG_DEL_PARTITION: i32 = 2;

/// `struct blkpg_partition` of linux/blkpg.h.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: i32,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg` of linux/blkpg.h.
#[repr(C)]
struct BlkpgArgument {
    operation: i32,
    flags: i32,
    length: i32,
    data: *mut BlkpgPartition,
}

#[allow(unsafe_code)]
mod raw {
    use super::BlkpgArgument;
    nix::ioctl_write_ptr_bad!(blkpg, nix::request_code_none!(0x12, 105), BlkpgArgument);
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
    nix::ioctl_read!(blkgetsize64, 0x12, 114, usize);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), nix::libc::c_int);
}

/// The size of the block device in bytes.
///
/// # Errors
/// What the kernel says; ENOTTY when it is no block device.
#[allow(unsafe_code)]
pub fn size(device: &File) -> io::Result<u64> {
    // The kernel writes 64 bits whatever the request code's type says.
    let mut bytes = 0_u64;
    // SAFETY: the pointer is to 8 writable bytes that live through the call, which is what BLKGETSIZE64 writes.
    unsafe { raw::blkgetsize64(device.as_raw_fd(), std::ptr::from_mut(&mut bytes).cast()) }?;
    Ok(bytes)
}

/// The logical sector size in bytes.
///
/// # Errors
/// What the kernel says; ENOTTY when it is no block device.
pub fn sector_size(device: &File) -> io::Result<u32> {
    Ok(rustix::fs::ioctl_blksszget(device.as_fd())?)
}

/// Whether the kernel holds the device for read-only.
///
/// # Errors
/// What the kernel says; ENOTTY when it is no block device.
#[allow(unsafe_code)]
pub fn is_read_only(device: &File) -> io::Result<bool> {
    let mut flag: nix::libc::c_int = 0;
    // SAFETY: BLKROGET writes one int, to which the pointer leads.
    unsafe { raw::blkroget(device.as_raw_fd(), &raw mut flag) }?;
    Ok(flag != 0)
}

/// Writes back and drops what the page cache holds of the device, so that the next read comes from the device.
///
/// # Errors
/// What the kernel says; ENOTTY when it is no block device.
#[allow(unsafe_code)]
pub fn flush_buffers(device: &File) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument.
    unsafe { raw::blkflsbuf(device.as_raw_fd()) }?;
    Ok(())
}

/// Tells the kernel of a partition on `disk`: `start` and `length` in bytes. Nothing is written to the disk.
///
/// # Errors
/// EBUSY when it overlaps another or the number is taken; EINVAL beyond the disk's end or off a sector boundary.
pub fn add_partition(disk: &File, number: u32, start: u64, length: u64) -> io::Result<()> {
    partition_call(disk, BLKPG_ADD_PARTITION, number, start, length)
}

/// Makes the kernel forget a partition of `disk`.
///
/// # Errors
/// EBUSY when it is in use; ENXIO when there is none of this number.
pub fn delete_partition(disk: &File, number: u32) -> io::Result<()> {
    partition_call(disk, BLKPG_DEL_PARTITION, number, 0, 0)
}

#[allow(unsafe_code)]
fn partition_call(disk: &File, operation: i32, number: u32, start: u64, length: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut partition = BlkpgPartition {
        start: i64::try_from(start).map_err(invalid)?,
        length: i64::try_from(length).map_err(invalid)?,
        number: i32::try_from(number).map_err(invalid)?,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let argument = BlkpgArgument {
        operation,
        flags: 0,
        // The structure is 152 bytes long.
        length: i32::try_from(size_of::<BlkpgPartition>()).map_err(invalid)?,
        data: &raw mut partition,
    };
    // SAFETY: both structures have the layout of linux/blkpg.h and live through the call; `data` leads to the other.
    unsafe { raw::blkpg(disk.as_raw_fd(), &raw const argument) }?;
    Ok(())
}

/// Takes the exclusive advisory lock that keeps udev's hands off a disk; it is held until `file` is closed.
///
/// # Errors
/// `WouldBlock` when somebody else still holds it after `patience`.
pub fn lock_exclusive(file: &File, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(e) if e == rustix::io::Errno::WOULDBLOCK || e == rustix::io::Errno::INTR => {
                if Instant::now() >= deadline {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_kernels_sizes() {
        assert_eq!(size_of::<BlkpgPartition>(), 152);
        assert_eq!(size_of::<BlkpgArgument>(), 24);
    }

    #[test]
    fn a_plain_file_is_no_block_device() {
        let file = tempfile::tempfile().unwrap();
        for error in [
            size(&file).unwrap_err(),
            sector_size(&file).unwrap_err(),
            add_partition(&file, 1, 1 << 20, 1 << 20).unwrap_err(),
            delete_partition(&file, 1).unwrap_err(),
            flush_buffers(&file).unwrap_err(),
        ] {
            assert_eq!(error.raw_os_error(), Some(25), "{error}");
        }
    }

    #[test]
    fn a_lock_is_refused_to_a_second_holder() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (File::open(path.path()).unwrap(), File::open(path.path()).unwrap());
        lock_exclusive(&a, Duration::ZERO).unwrap();
        assert_eq!(
            lock_exclusive(&b, Duration::from_millis(60)).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(a);
        lock_exclusive(&b, Duration::ZERO).unwrap();
    }
}
