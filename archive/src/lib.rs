//! A directory tree <-> a tar stream, losing nothing: owners, modes, times in ns, hard links, holes, devices, every
//! extended attribute (and with them ACLs and capabilities), and any name the kernel allows. [`pack`] walks a live tree
//! and writes POSIX pax entries that GNU tar and bsdtar read; [`unpack`] reads such a stream, or an ordinary one of those
//! two, and never leaves the target root. The `tar` crate serves as a codec of single headers only: its own walking and
//! unpacking lose data without a word (see `tests/tar_crate.rs`).

mod acl;
mod attributes;
mod batch;
mod deferred;
mod digest;
mod encode;
mod entry;
mod exclude;
mod expected;
mod flusher;
mod glob;
mod header;
mod input;
pub mod manifest;
mod measure;
mod output;
mod pack;
mod pax;
mod pipeline;
mod place;
mod reader;
mod restore;
mod sparse;
mod target;
#[doc(hidden)]
pub mod testing;
mod unpack;
pub mod verify;
mod walk;
mod writers;
mod xattr;

pub use exclude::{active_swap_files, default_excludes};
pub use expected::{Allows, Expected, running_machine};
pub use glob::GlobError;
pub use measure::{Used, measure};
pub use pack::{PackError, PackOptions, PackSummary, pack};
pub use unpack::{UnpackError, UnpackOptions, UnpackSummary, unpack};

/// Hears how far the work is. Every method does nothing unless it is overridden; `()` is the observer that hears nothing.
pub trait Observer {
    /// The entry at `path` (relative to the root, no leading slash, empty for the root itself) begins.
    fn entry(&mut self, _path: &[u8]) {}
    /// `count` more bytes of the tar stream have been written or read.
    fn bytes(&mut self, _count: u64) {}
    /// Whether [`Observer::packed`] is wanted; the packer asks once. It makes the packer digest what it reads.
    fn wants_entries(&self) -> bool {
        false
    }
    /// The packer has sent all of this entry.
    fn packed(&mut self, _entry: &manifest::Entry<'_>) {}
}

impl Observer for () {}

/// Both hear everything.
impl<A: Observer, B: Observer> Observer for (A, B) {
    fn entry(&mut self, path: &[u8]) {
        self.0.entry(path);
        self.1.entry(path);
    }

    fn bytes(&mut self, count: u64) {
        self.0.bytes(count);
        self.1.bytes(count);
    }

    fn wants_entries(&self) -> bool {
        self.0.wants_entries() || self.1.wants_entries()
    }

    fn packed(&mut self, entry: &manifest::Entry<'_>) {
        self.0.packed(entry);
        self.1.packed(entry);
    }
}

/// None hears nothing.
impl<O: Observer> Observer for Option<O> {
    fn entry(&mut self, path: &[u8]) {
        if let Some(observer) = self {
            observer.entry(path);
        }
    }

    fn bytes(&mut self, count: u64) {
        if let Some(observer) = self {
            observer.bytes(count);
        }
    }

    fn wants_entries(&self) -> bool {
        self.as_ref().is_some_and(Observer::wants_entries)
    }

    fn packed(&mut self, entry: &manifest::Entry<'_>) {
        if let Some(observer) = self {
            observer.packed(entry);
        }
    }
}

/// Paths worth telling the operator: all are counted, the first hundred are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PathList {
    /// How many there were.
    pub total: u64,
    /// The first of them, as text; bytes that are not UTF-8 are escaped.
    pub first: Vec<String>,
}

impl PathList {
    const KEPT: usize = 100;

    pub(crate) fn add(&mut self, what: impl FnOnce() -> String) {
        self.total += 1;
        if self.first.len() < Self::KEPT {
            self.first.push(what());
        }
    }
}

/// `path` (relative to the root) as the absolute text that messages show.
pub(crate) fn shown(path: &[u8]) -> String {
    format!("/{}", plain(path))
}

/// Bytes as text on a line: as they are where that is plain, else escaped, so that no two are shown alike.
pub(crate) fn plain(bytes: &[u8]) -> String {
    // Signs that are not seen, or change the order of others, can make one name look like another.
    let odd = |c: char| {
        c.is_control()
            || matches!(c, '\\' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(odd) => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn no_two_paths_are_shown_alike_and_none_plays_tricks() {
        for (path, text) in [
            (&b"etc/a"[..], "/etc/a"),
            ("etc/\u{e9}".as_bytes(), "/etc/\u{e9}"),
            (b"a\nb", "/a\\nb"),
            (b"a\\nb", "/a\\\\nb"),
            (b"\xff", "/\\xff"),
            ("a\u{202e}b".as_bytes(), "/a\\xe2\\x80\\xaeb"),
            ("a\u{200b}".as_bytes(), "/a\\xe2\\x80\\x8b"),
        ] {
            assert_eq!(shown(path), text);
        }
    }
}
