//! Where the outside programs are: PID 1 has no `PATH`, and busybox must not be met by accident.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

const PLACES: [&str; 6] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/local/bin"];

/// The program `name`, if it is installed.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    PLACES.iter().map(|place| Path::new(place).join(name)).find(|path| path.is_file())
}

/// The program `name`.
///
/// # Errors
/// When it is missing; the message says where it was sought.
pub fn need(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| format!("the program {name} is not there (sought in {})", PLACES.join(", ")))
}
