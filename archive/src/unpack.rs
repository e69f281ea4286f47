//! The public face of the restorer: its options, its summary, its errors, and the loop over the entries of a stream.

use std::io::{self, Read};
use std::path::PathBuf;

use rustix::io::Errno;

use crate::entry::Decoder;
use crate::flusher::Flusher;
use crate::restore::Restorer;
use crate::writers::{Shared, Writers};
use crate::{Observer, PathList, shown};

/// Where to unpack to.
#[derive(Debug, Clone, Default)]
pub struct UnpackOptions {
    /// The directory that the tree goes to; it must be there. File systems may be mounted inside it.
    pub root: PathBuf,
    /// Have the file systems that were written to put everything on the disk before success is reported.
    pub sync: bool,
}

/// What was restored.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UnpackSummary {
    /// Regular files, each inode once.
    pub files: u64,
    /// Directories, the root included when it is in the stream.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Further names of files.
    pub hard_links: u64,
    /// Block and character devices.
    pub devices: u64,
    /// Named pipes.
    pub fifos: u64,
    /// Bytes of file content in the stream, without holes.
    pub content_bytes: u64,
    /// Bytes of the stream.
    pub archive_bytes: u64,
    /// What FAT file systems could not hold: the feature and the path.
    pub not_representable: PathList,
    /// Hard links that became copies, because the file is on another file system or on FAT.
    pub copied_links: PathList,
    /// PAX records that mean nothing to us, as foreign programs write them.
    pub ignored_records: u64,
}

/// Why the tree was not restored. The target is then incomplete.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The target is not there or no directory.
    #[error("opening the target {}: {source}", root.display())]
    Root {
        /// As in the options.
        root: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// `/proc` is needed for the xattrs of what cannot be opened.
    #[error("/proc is not mounted: {0}")]
    NoProc(io::Error),
    /// The stream could not be read.
    #[error("reading the stream at byte {at}: {source}")]
    Read {
        /// Offset in the stream.
        at: u64,
        /// What the source said.
        source: io::Error,
    },
    /// The stream ended before its end mark.
    #[error("the stream breaks off after {at} bytes, without the mark that ends it")]
    Truncated {
        /// Offset in the stream.
        at: u64,
    },
    /// The stream is no proper tar stream.
    #[error("the stream is damaged near byte {at}: {what}")]
    Format {
        /// Offset in the stream.
        at: u64,
        /// What is wrong.
        what: String,
    },
    /// An entry of a kind that is not understood.
    #[error("{path} is an entry of the unknown type '{code}'")]
    UnknownType {
        /// Absolute, inside the target.
        path: String,
        /// The type's letter.
        code: String,
    },
    /// An entry that tries to leave the target, or to take the place of a directory with content.
    #[error("refusing {path}: {why}")]
    Refused {
        /// The entry's name.
        path: String,
        /// The reason.
        why: String,
    },
    /// Something could not be made or written.
    #[error("{operation} {path}: {source}")]
    File {
        /// What was tried.
        operation: String,
        /// Absolute, inside the target.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl UnpackError {
    pub(crate) fn file(operation: impl Into<String>, path: &[u8], errno: Errno) -> Self {
        Self::File { operation: operation.into(), path: shown(path), source: errno.into() }
    }
}

/// Restores the tar stream `input` below the directory that `options` name, and reads it to its very end.
///
/// # Errors
/// See [`UnpackError`]. What was restored up to there stays.
pub fn unpack<R: Read>(
    input: R,
    options: &UnpackOptions,
    observer: &mut dyn Observer,
) -> Result<UnpackSummary, UnpackError> {
    std::fs::metadata("/proc/self/fd").map_err(UnpackError::NoProc)?;
    let mut decoder = Decoder::new(input);
    let shared = Shared::default();
    let mut summary = std::thread::scope(|scope| {
        let writers = Writers::start(&shared, scope);
        let flusher = options.sync.then(|| Flusher::start(scope));
        let mut restorer = Restorer::new(&options.root, &shared, writers, flusher)?;
        if let Err(later) = entries(&mut decoder, &mut restorer, observer) {
            restorer.settle()?;
            return Err(later);
        }
        restorer.finish()
    })?;
    summary.archive_bytes = decoder.input.position();
    summary.ignored_records = decoder.ignored;
    Ok(summary)
}

fn entries<R: Read>(
    decoder: &mut Decoder<R>,
    restorer: &mut Restorer<'_, '_>,
    observer: &mut dyn Observer,
) -> Result<(), UnpackError> {
    let mut reported = 0;
    while let Some(entry) = decoder.next()? {
        restorer.entry(&entry, &mut decoder.input, &mut reported, observer)?;
    }
    observer.bytes(decoder.input.position() - reported);
    Ok(())
}
