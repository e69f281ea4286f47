//! Memory straight from the kernel, in whole pages, and the way to give a pipe those pages instead of a copy.
//!
//! Not from the allocator: a page that the kernel still has to send must never become somebody else's memory. When
//! [`Pages`] are unmapped, whoever still refers to them keeps the old ones, and nobody is given them again until that is over.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::pipe::{IoSliceRaw, PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, vmsplice};
use std::alloc::{Layout, handle_alloc_error};
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::ptr::{NonNull, null_mut};

/// Bytes of a page. Every architecture that Ka runs on has at least these, and a larger page begins at a multiple of them.
pub const PAGE: usize = 4096;

/// Zeroed memory that begins at a page. None when it has no bytes.
#[derive(Default)]
pub struct Pages(Option<(NonNull<u8>, usize)>);

// SAFETY: it owns its mapping alone, as a `Vec<u8>` owns its memory.
#[allow(unsafe_code)]
unsafe impl Send for Pages {}
// SAFETY: a shared reference only gives `&[u8]`.
#[allow(unsafe_code)]
unsafe impl Sync for Pages {}

impl Pages {
    /// `len` bytes. Their pages are there from the beginning: one by one, when they are first written to, they would cost several
    /// times as much.
    ///
    /// Ends the program when the kernel has no more, as `Vec` does.
    #[must_use]
    #[allow(unsafe_code)]
    pub fn new(len: usize) -> Self {
        if len == 0 {
            return Self(None);
        }
        let (protection, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::POPULATE);
        // SAFETY: a new private mapping where the kernel wants it touches nothing that is there.
        let mapped = unsafe { mmap_anonymous(null_mut(), len, protection, flags) };
        match mapped.ok().and_then(|start| NonNull::new(start.cast())) {
            Some(start) => Self(Some((start, len))),
            None => handle_alloc_error(Layout::array::<u8>(len).unwrap_or(Layout::new::<u8>())),
        }
    }
}

impl Deref for Pages {
    type Target = [u8];
    #[allow(unsafe_code)]
    fn deref(&self) -> &[u8] {
        match self.0 {
            // SAFETY: the mapping has so many readable bytes and lives as long as `self`; all bit patterns are bytes.
            Some((start, len)) => unsafe { std::slice::from_raw_parts(start.as_ptr(), len) },
            None => &[],
        }
    }
}

impl DerefMut for Pages {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut [u8] {
        match self.0 {
            // SAFETY: as in `deref`; `&mut self` makes it the only reference.
            Some((start, len)) => unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) },
            None => &mut [],
        }
    }
}

impl Drop for Pages {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if let Some((start, len)) = self.0.take() {
            // SAFETY: this mapping was made by `new`, whole, and no reference to it outlives `self`.
            let unmapped = unsafe { munmap(start.as_ptr().cast(), len) };
            debug_assert!(unmapped.is_ok(), "{unmapped:?}");
        }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The content stays out of every log.
        write!(f, "Pages({})", self.len())
    }
}

/// The writing end of a pipe that can be given pages. Only [`pipe`] makes one: at a reading end the same system call would
/// write to the memory instead of reading it.
#[derive(Debug)]
pub struct Giver(OwnedFd);

/// A pipe for pages, neither end of which ever waits, and its reading end.
///
/// # Errors
/// What the kernel says: too many open files, mostly.
pub fn pipe() -> io::Result<(OwnedFd, Giver)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    Ok((read, Giver(write)))
}

impl Giver {
    /// Makes room for so many bytes, when they begin at a page.
    ///
    /// # Errors
    /// `EPERM` when the user's pipes together would become too large: then it has the room that it had.
    pub fn set_room(&self, bytes: usize) -> io::Result<()> {
        fcntl_setpipe_size(&self.0, bytes)?;
        Ok(())
    }

    /// Gives the pipe the pages that hold `bytes`, without copying and without waiting, and returns how many bytes it took. What
    /// is written to these bytes before the pipe's reader is done with them may be what it reads: it can spoil, and leak, what
    /// is sent, but nothing in this program.
    ///
    /// # Errors
    /// `EAGAIN` when the pipe is full, and whatever else `vmsplice` says; some sandboxes refuse it.
    #[allow(unsafe_code)]
    pub fn give(&self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: this is a writing end, so the kernel only reads. The pages are lent, not gifted (no `SPLICE_F_GIFT`): it
        // holds references of its own to them, so that neither unmapping nor writing to them afterwards breaks a promise of
        // Rust's.
        let given = unsafe { vmsplice(&self.0, &[IoSliceRaw::from_slice(bytes)], SpliceFlags::NONBLOCK) };
        given.map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn pages_begin_at_a_page_are_zero_and_hold_what_is_written() {
        let mut pages = Pages::new(3 * PAGE - 7);
        assert_eq!(pages.as_ptr().align_offset(PAGE), 0);
        assert!(pages.len() == 3 * PAGE - 7 && pages.iter().all(|b| *b == 0));
        pages.fill(0x5a);
        assert!(pages.iter().all(|b| *b == 0x5a));
        assert_eq!(format!("{pages:?}"), "Pages(12281)");
        assert!(Pages::new(0).is_empty() && Pages::default().is_empty());
    }

    #[test]
    fn a_pipe_is_given_pages_and_keeps_them_when_they_are_unmapped() {
        let (read, write) = pipe().unwrap();
        let mut pages = Pages::new(2 * PAGE);
        pages[..PAGE].fill(b'a');
        pages[PAGE..].fill(b'b');
        assert_eq!(write.give(&pages[10..PAGE + 5]).unwrap(), PAGE - 5);
        // Not a copy: what is written now is what is read.
        pages[PAGE] = b'c';
        drop(pages);
        // Memory that comes after it is not what the pipe holds.
        let mut others = Pages::new(2 * PAGE);
        others.fill(b'x');
        let mut got = vec![0; PAGE - 5];
        File::from(read).read_exact(&mut got).unwrap();
        assert!(got[..PAGE - 10].iter().all(|b| *b == b'a'));
        assert_eq!(&got[PAGE - 10..], b"cbbbb");
        assert_eq!(others[0], b'x');
    }

    #[test]
    fn a_full_pipe_says_so() {
        let (_read, write) = pipe().unwrap();
        write.set_room(4 * PAGE).unwrap();
        let pages = Pages::new(9 * PAGE);
        assert_eq!(write.give(&pages).unwrap(), 4 * PAGE);
        assert_eq!(write.give(&pages).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
