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
    unpack_by(input, options, observer, Writers::usual())
}

/// [`unpack`] with so many threads that make small files.
fn unpack_by<R: Read>(
    input: R,
    options: &UnpackOptions,
    observer: &mut dyn Observer,
    threads: usize,
) -> Result<UnpackSummary, UnpackError> {
    std::fs::metadata("/proc/self/fd").map_err(UnpackError::NoProc)?;
    let mut decoder = Decoder::new(input);
    let shared = Shared::default();
    let mut summary = std::thread::scope(|scope| {
        let writers = Writers::start(&shared, scope, threads);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::{self, Meta};
    use proptest::prelude::*;
    use std::path::Path;
    use tar::EntryType;

    /// An entry of a stream: its type, its path, what it links to, and what else tells it from others.
    type Step = (u8, &'static str, &'static str, u8);

    fn stream(steps: &[Step]) -> Vec<u8> {
        let mut out = Vec::new();
        for &(kind, path, link, tag) in steps {
            let content = if kind == b'0' { vec![tag; usize::from(tag) * 7] } else { Vec::new() };
            let link = if matches!(kind, b'1' | b'2') { link } else { "" };
            let meta = Meta { mode: 0o600 | u32::from(tag % 8), seconds: tag.into(), ..Meta::default() };
            let kind = EntryType::new(kind);
            let size = content.len() as u64;
            out.extend_from_slice(&header::build(kind, path.as_bytes(), link.as_bytes(), &meta, size));
            out.extend_from_slice(&content);
            out.resize(out.len().next_multiple_of(header::BLOCK), 0);
        }
        out.extend_from_slice(&[0; 1024]);
        out
    }

    /// The result of unpacking over what is in the way, and what the tree is then.
    fn outcome(stream: &[u8], threads: usize) -> (String, Vec<String>) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("c/d")).unwrap();
        std::fs::write(root.path().join("a"), b"old").unwrap();
        crate::testing::set_time(&root.path().join("a"), 1000, 0).unwrap();
        std::fs::create_dir(root.path().join("empty")).unwrap();
        let options = UnpackOptions { root: root.path().into(), sync: false };
        let result = unpack_by(stream, &options, &mut (), threads);
        match result {
            Ok(summary) => (format!("{summary:?}"), tree(root.path())),
            // What comes after the failed entry may or may not have been made.
            Err(e) => (e.to_string(), Vec::new()),
        }
    }

    fn tree(root: &Path) -> Vec<String> {
        // Directories that were there before have times of their own.
        let queries =
            [(&["-type", "d"][..], "%P %y %m\\n"), (&["!", "-type", "d"], "%P %y %m %n %l %s %T@\\n")];
        let mut lines: Vec<String> = Vec::new();
        for (test, format) in queries {
            let mut command = std::process::Command::new("find");
            command.arg(root).args(["-mindepth", "1"]);
            let found = crate::testing::run(command.args(test).args(["-printf", format])).unwrap();
            lines.extend(String::from_utf8(found).unwrap().lines().map(str::to_owned));
        }
        lines.sort();
        lines
    }

    fn path() -> impl Strategy<Value = &'static str> {
        prop::sample::select(vec![
            "a", "b", "c", "c/d", "c/d/e", "c/f", "b/x", "b/y/z", "empty", "empty/x", "g",
        ])
    }

    #[test]
    fn a_link_through_a_file_that_is_under_way_is_refused_as_such() {
        let bytes = stream(&[(b'0', "b", "", 199), (b'1', "c", "b/y/z", 1)]);
        let one = outcome(&bytes, 0);
        assert!(one.0.contains("no directory"), "{}", one.0);
        // The threads raced: a few in a hundred told another error.
        for _ in 0..200 {
            assert_eq!(outcome(&bytes, 3), one);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        /// Entries at one path again and again, over what was there before, through each other: whatever one thread
        /// makes of it, several make, and they tell the same error.
        #[test]
        fn several_threads_do_what_one_does(
            steps in proptest::collection::vec(
                (prop::sample::select(vec![b'0', b'0', b'0', b'1', b'2', b'5']), path(), path(), 1u8..200), 1..24),
        ) {
            let bytes = stream(&steps);
            let (one, several) = (outcome(&bytes, 0), outcome(&bytes, 3));
            prop_assert_eq!(&one.0, &several.0);
            prop_assert_eq!(&one.1, &several.1);
        }
    }
}
