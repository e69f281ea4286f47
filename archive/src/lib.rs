//! A directory tree <-> a tar stream, losing nothing: owners, modes, times in ns, hard links, holes, devices, every
//! extended attribute (and with them ACLs and capabilities), and any name the kernel allows. [`pack`] walks a live tree
//! and writes POSIX pax entries that GNU tar and bsdtar read; [`unpack`] reads such a stream, or an ordinary one of those
//! two, and never leaves the target root. The `tar` crate serves as a codec of single headers only: its own walking and
//! unpacking lose data without a word (see `tests/tar_crate.rs`).

mod acl;
mod attributes;
mod batch;
mod deferred;
mod encode;
mod entry;
mod exclude;
mod flusher;
mod header;
mod input;
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
mod walk;
mod writers;
mod xattr;

pub use exclude::{active_swap_files, default_excludes};
pub use measure::{Used, measure};
pub use pack::{PackError, PackOptions, PackSummary, pack};
pub use unpack::{UnpackError, UnpackOptions, UnpackSummary, unpack};

/// Hears how far the work is. Every method does nothing unless it is overridden; `()` is the observer that hears nothing.
pub trait Observer {
    /// The entry at `path` (relative to the root, no leading slash, empty for the root itself) begins.
    fn entry(&mut self, _path: &[u8]) {}
    /// `count` more bytes of the tar stream have been written or read.
    fn bytes(&mut self, _count: u64) {}
}

impl Observer for () {}

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
    let text = match std::str::from_utf8(path) {
        Ok(text) if !text.contains(char::is_control) => text.to_owned(),
        _ => path.escape_ascii().to_string(),
    };
    format!("/{text}")
}
