//! What can go wrong while an initramfs is gathered and written. Each error names the step and the file.

use std::io;
use std::path::{Path, PathBuf};

/// Why an initramfs could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("{step} {}: {cause}", path.display())]
    Io {
        /// What was being done ("reading", "writing").
        step: &'static str,
        /// The file it was done to.
        path: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// A file has a content or a kind that cannot be used.
    #[error("{}: {what}", path.display())]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Two things are to stand at one place of the image.
    #[error("/{path} in the image: {what}")]
    Conflict {
        /// The place, without a leading slash.
        path: String,
        /// What clashes.
        what: String,
    },
    /// Programs that every node needs are not installed in the root.
    #[error("missing in {}: {list}", root.display())]
    Programs {
        /// Where they were looked for.
        root: PathBuf,
        /// The programs, each with the Debian package that has it.
        list: String,
    },
    /// A shared library was not found.
    #[error("{wanted_by} needs the library {library}, which is nowhere in {}", root.display())]
    Library {
        /// The program or library that needs it.
        wanted_by: String,
        /// The name that was looked for.
        library: String,
        /// Where it was looked for.
        root: PathBuf,
    },
    /// There is no kernel that can be used.
    #[error("{0}")]
    Kernel(String),
    /// A module that was asked for does not exist.
    #[error("{0}")]
    Module(String),
}

impl Error {
    /// For `map_err`: an [`Error::Io`] of this step and file.
    pub(crate) fn io(step: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |cause| Self::Io { step, path, cause }
    }

    /// An [`Error::Bad`].
    pub(crate) fn bad(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::Bad { path: path.as_ref().to_path_buf(), what: what.into() }
    }
}
