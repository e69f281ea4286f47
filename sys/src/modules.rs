//! Loading kernel modules. Which ones, in which order and with which options is decided elsewhere.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened.
    #[error("opening {path}: {source}")]
    Open {
        /// The module's file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The options hold a NUL byte.
    #[error("options of {path} hold a NUL byte")]
    Options {
        /// The module's file.
        path: PathBuf,
    },
    /// The kernel refused the module.
    #[error("loading {path}: {} ({errno})", meaning(*errno))]
    Refused {
        /// The module's file.
        path: PathBuf,
        /// What the kernel said.
        errno: Errno,
    },
}

/// What the errors of finit_module mean; `dmesg` says more.
fn meaning(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => "a module that it needs is missing (unknown symbol)",
        Errno::NOEXEC => "it was built for another kernel, or is damaged",
        Errno::NODEV => "no device for it",
        Errno::KEYREJECTED | Errno::NOKEY => "its signature is not accepted",
        Errno::INVAL => "it refused its options",
        Errno::NOMEM => "not enough memory",
        Errno::BUSY => "what it drives is in use",
        _ => "refused by the kernel",
    }
}

/// Loads the module in `path` with `options` (`name=value name=value`). True when it is new, false when the kernel had
/// it already.
///
/// # Errors
/// See [`Error`].
pub fn load(path: &Path, options: &str) -> Result<bool, Error> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::Open { path: path.to_owned(), source: e.into() })?;
    let options = CString::new(options).map_err(|_| Error::Options { path: path.to_owned() })?;
    match rustix::system::finit_module(&file, &options, 0) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(errno) => Err(Error::Refused { path: path.to_owned(), errno }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file_and_the_cause() {
        let missing = load(Path::new("/nonexistent/x.ko"), "").unwrap_err().to_string();
        assert!(missing.starts_with("opening /nonexistent/x.ko: No such file"), "{missing}");
        let error = Error::Refused { path: "/m/ahci.ko".into(), errno: Errno::NOENT }.to_string();
        assert!(error.contains("/m/ahci.ko") && error.contains("missing"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_module_is_refused() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: loading modules needs root");
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"not a module").unwrap();
        let error = load(file.path(), "").unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }
}
