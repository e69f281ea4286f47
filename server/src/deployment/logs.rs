//! One log file for each node, below a folder of the deployment's own, so that everything a node says survives it.

use super::state::clean;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A node's log stops growing here; a node gone mad must not fill the golden node's disk.
const LONGEST: u64 = 64 << 20;

/// The log files.
#[derive(Debug)]
pub struct Logs {
    folder: PathBuf,
    open: BTreeMap<String, (File, u64)>,
    failed: bool,
}

impl Logs {
    /// Makes the folder `base/<deployment>`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(base: &Path, deployment: &str) -> Result<Self> {
        let folder = base.join(deployment);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("making the log folder {}", folder.display()))?;
        Ok(Self { folder, open: BTreeMap::new(), failed: false })
    }

    /// Where they are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Adds a line to a node's log. `node` is a host name, so it is a safe file name.
    pub fn line(&mut self, node: &str, text: &str) {
        if let Err(e) = self.try_line(node, text) {
            // Told once: a full disk would otherwise make this the only thing that is ever said.
            if !std::mem::replace(&mut self.failed, true) {
                log::error!("writing the log of {node}: {e:#}");
            }
        }
    }

    fn try_line(&mut self, node: &str, text: &str) -> Result<()> {
        if !self.open.contains_key(node) {
            let path = self.folder.join(format!("{node}.log"));
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| format!("opening {}", path.display()))?;
            self.open.insert(node.to_owned(), (file, 0));
        }
        let Some((file, size)) = self.open.get_mut(node) else { return Ok(()) };
        if *size > LONGEST {
            return Ok(());
        }
        let line = format!("{}\n", clean(text, 4096));
        *size += line.len() as u64;
        file.write_all(line.as_bytes()).context("writing")?;
        Ok(())
    }
}
