//! What is sent: bytes that do not compress, made once for a benchmark in memory, or a Debian root.

use crate::golden::Golden;
use crate::{run, say};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A file system in memory: reading from it costs every contender the same.
pub const MEMORY: &str = "/dev/shm";
const TAR_LIMIT: Duration = Duration::from_secs(600);

/// A folder in memory, removed when this is dropped.
#[derive(Debug)]
pub struct Store(tempfile::TempDir);

impl Store {
    /// Makes one.
    ///
    /// # Errors
    /// When that fails.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("ka-bench-")
            .tempdir_in(MEMORY)
            .with_context(|| format!("making a folder in {MEMORY}"))?;
        Ok(Self(dir))
    }

    /// `bytes` random bytes.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn noise(&self, bytes: u64) -> Result<Source> {
        let file = self.0.path().join("noise");
        let making = || format!("making {}", file.display());
        let mut random = File::open("/dev/urandom").with_context(making)?.take(bytes);
        let mut out = io::BufWriter::with_capacity(1 << 20, File::create(&file).with_context(making)?);
        io::copy(&mut random, &mut out).with_context(making)?;
        out.flush().with_context(making)?;
        Ok(Source { file, bytes, tree: None })
    }

    /// The golden machine's tree: GNU tar's stream of it for the peers, the tree itself for Ka.
    ///
    /// # Errors
    /// When tar fails.
    pub fn root(&self, golden: &Golden, log: &Path) -> Result<Source> {
        let file = self.0.path().join("root.tar");
        say!("bench", "making a tar of {} for the peers", golden.tree.display());
        let words = ["--xattrs", "--acls", "--sparse", "--numeric-owner", "-cf"];
        run::logged(
            Command::new("tar").arg("-C").arg(&golden.tree).args(words).arg(&file).arg("."),
            log,
            TAR_LIMIT,
        )?;
        let bytes = std::fs::metadata(&file).with_context(|| format!("looking at {}", file.display()))?.len();
        Ok(Source { file, bytes, tree: Some(golden.tree.clone()) })
    }
}

/// A stream.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file that holds it.
    pub file: PathBuf,
    /// Its length, by which all contenders are measured.
    pub bytes: u64,
    /// The tree that Ka reads instead of the file.
    pub tree: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_its_length_and_goes_with_the_store() {
        let store = Store::new().unwrap();
        let source = store.noise(300_000).unwrap();
        assert_eq!(std::fs::metadata(&source.file).unwrap().len(), 300_000);
        drop(store);
        assert!(!source.file.exists());
    }
}
