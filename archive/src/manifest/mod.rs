//! The manifest of a golden tree: what was sent, entry by entry, with metadata and a digest of each file's content, made while
//! it was packed. With it a clone is judged later without its golden node (see [`crate::verify`]). The format is a dialect
//! of mtree(5), packed by zstd; `docs/verify.md` describes it.

mod reader;
mod text;
mod writer;

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ffi::CString;
use std::io;
use std::path::PathBuf;

pub use crate::attributes::Attributes;
pub use crate::digest::Digest;
pub use crate::entry::Kind;
pub use reader::Reader;
pub use writer::{Writer, Written};

use crate::expected::Expected;

/// The version of the format that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// What stands in front of the entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// The deployment's name.
    pub deployment: String,
    /// The wave, from 1; each reads the golden tree anew.
    pub wave: u32,
    /// Where the golden tree was.
    pub root: PathBuf,
    /// As [`crate::PackOptions::mounts`]; none means the root's file system alone.
    pub mounts: Vec<String>,
    /// As [`crate::PackOptions::excludes`].
    pub excludes: Vec<String>,
    /// In what a clone may differ.
    pub expected: Vec<Expected>,
}

/// One entry of the tree, as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Relative to the root, no slashes at its ends; empty for the root.
    pub path: Cow<'a, [u8]>,
    /// What it is. [`Kind::HardLink`] is a further name of the entry at `link`, and only `path` and `link` mean anything.
    pub kind: Kind,
    /// Permissions with the set-id and sticky bits, at most `0o7777`.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Time of modification: seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Major and minor number of a device, else zeros.
    pub device: (u32, u32),
    /// Names that the inode had on the golden node; not all need be in the tree.
    pub links: u32,
    /// A symbolic link's target, or the path of a hard link's first name.
    pub link: Cow<'a, [u8]>,
    /// Extended attributes, in the order of their names.
    pub xattrs: Cow<'a, [(CString, Vec<u8>)]>,
    /// Flags (`chattr`) and project id, of files and directories.
    pub attributes: Attributes,
    /// A regular file's content.
    pub content: Option<Content>,
    /// The file changed while it was read; the content is what was sent.
    pub changed: bool,
}

/// A regular file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// Bytes, holes included.
    pub size: u64,
    /// Whether the digest is of the sparse form; see `digest.rs`.
    pub sparse: bool,
    /// The digest.
    pub digest: Digest,
}

/// Why a manifest cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The kernel, or zstd, said so.
    #[error("{operation}: {source}")]
    Io {
        /// What was tried, with the file's name where it is known.
        operation: String,
        /// The cause.
        source: io::Error,
    },
    /// Not a manifest at all.
    #[error("this is no manifest of Ka")]
    Foreign,
    /// Of a version that is not known.
    #[error("the manifest is of version {0}; this program reads version {VERSION}")]
    Version(String),
    /// A line that is wrong.
    #[error("the manifest is damaged: line {line}: {what}")]
    Line {
        /// From 1.
        line: u64,
        /// What is wrong.
        what: String,
    },
    /// Without its last line.
    #[error("the manifest breaks off after line {line}, without the line that ends it")]
    Truncated {
        /// Lines that were there.
        line: u64,
    },
}

impl ManifestError {
    pub(crate) fn io(operation: impl Into<String>, source: io::Error) -> Self {
        Self::Io { operation: operation.into(), source }
    }
}

/// The order of entries: depth first, names by their bytes, a directory before what it holds.
pub(crate) fn order(a: &[u8], b: &[u8]) -> Ordering {
    a.split(|&c| c == b'/').cmp(b.split(|&c| c == b'/'))
}

/// Whether `path` lies below `directory`, both relative to the root.
pub(crate) fn is_below(path: &[u8], directory: &[u8]) -> bool {
    if directory.is_empty() {
        return !path.is_empty();
    }
    path.strip_prefix(directory).is_some_and(|rest| rest.first() == Some(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_a_walk() {
        let walk: [&[u8]; 8] = [b"", b"a", b"a/b", b"a/b/c", b"a/b.d", b"a.b", b"a0", b"b"];
        for (i, a) in walk.iter().enumerate() {
            for (j, b) in walk.iter().enumerate() {
                assert_eq!(order(a, b), i.cmp(&j), "{a:?} {b:?}");
            }
        }
        assert!(is_below(b"a", b"") && is_below(b"a/b", b"a"));
        assert!(!is_below(b"", b"") && !is_below(b"a", b"a") && !is_below(b"ab", b"a"));
    }
}
