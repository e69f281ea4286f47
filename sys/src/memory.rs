//! Advice about memory.

use rustix::mm::{Advice, madvise};
use std::io;

/// Asks for huge pages under these bytes. They are an optimization of the kernel's: nothing that can be read changes.
///
/// # Errors
/// What the kernel says; it has no huge pages, for example.
#[allow(unsafe_code)]
pub fn advise_huge_pages(bytes: &mut [u8]) -> io::Result<()> {
    const PAGE: usize = 4096;
    let start = bytes.as_ptr().align_offset(PAGE).min(bytes.len());
    let inside = &mut bytes[start..];
    if inside.len() < PAGE {
        return Ok(());
    }
    let length = inside.len() / PAGE * PAGE;
    // SAFETY: the range lies within one borrowed allocation, and this advice changes neither content nor mapping.
    unsafe { madvise(inside.as_mut_ptr().cast(), length, Advice::LinuxHugepage) }.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_stays_and_short_ranges_are_left_alone() {
        let mut bytes: Vec<u8> = (0..=255).cycle().take(4 << 20).collect();
        let before = bytes.clone();
        // A kernel without huge pages refuses with EINVAL, which is all that may go wrong.
        match advise_huge_pages(&mut bytes) {
            Ok(()) => {}
            Err(e) => assert_eq!(e.raw_os_error(), Some(rustix::io::Errno::INVAL.raw_os_error())),
        }
        assert_eq!(bytes, before);
        advise_huge_pages(&mut bytes[1..100]).unwrap();
    }
}
