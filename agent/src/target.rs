//! The directory that `ka-agent receive` unpacks into. When a wave went on without the node it holds a part of a tree that
//! may be another one by now: it must be empty before the next.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// The directory, and whether everything in it is ours.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    was_empty: bool,
}

impl Target {
    /// Looks at the directory before anything is unpacked.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn new(path: &Path) -> Result<Self> {
        let mut entries = fs::read_dir(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Self { path: path.to_owned(), was_empty: entries.next().is_none() })
    }

    /// Removes what was unpacked.
    ///
    /// # Errors
    /// When something cannot be removed, and when there was something before that is not ours.
    pub fn empty(&self) -> Result<()> {
        let path = self.path.display();
        if !self.was_empty {
            bail!("{path} held something before the first wave, so it is not emptied for the next");
        }
        for entry in fs::read_dir(&self.path).with_context(|| format!("reading {path}"))? {
            let entry = entry.with_context(|| format!("reading {path}"))?.path();
            let kind = entry.symlink_metadata().with_context(|| format!("looking at {}", entry.display()))?;
            let removed = if kind.is_dir() { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
            removed.with_context(|| format!("removing {} for the next wave", entry.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_unpacked_goes_and_what_was_there_before_stays() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::write(&outside, "x").unwrap();
        let path = folder.path().join("target");
        fs::create_dir(&path).unwrap();
        let target = Target::new(&path).unwrap();
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::write(path.join("a/b/c"), "x").unwrap();
        fs::write(path.join("d"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, path.join("e")).unwrap();
        target.empty().unwrap();
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
        assert!(outside.exists());
        fs::write(path.join("mine"), "x").unwrap();
        let error = Target::new(&path).unwrap().empty().unwrap_err().to_string();
        assert!(error.contains("held something before"), "{error}");
        assert!(path.join("mine").exists());
    }
}
