//! What is packed, and where it is unpacked to.

use super::Options;
use crate::bench::source::MEMORY;
use crate::{golden, run, say};
use anyhow::{Context, Result};
use rustix::fs::statvfs;
use serde::Serialize;
use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Files in one directory of the tree of small ones.
const FOLDER: u64 = 100;
/// Files in the tree of large ones.
const LARGE: u64 = 4;
const LIMIT: Duration = Duration::from_secs(300);

/// A kind of tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The lab's golden machine.
    Debian,
    /// Very many small files.
    Small,
    /// A few large files.
    Large,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 3] = [Self::Debian, Self::Small, Self::Large];

    /// Its name on command lines and in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Small => "small",
            Self::Large => "large",
        }
    }

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// A tree that is there.
#[derive(Debug)]
pub struct Tree {
    kind: Kind,
    root: PathBuf,
    inodes: u64,
    bytes: u64,
    /// Removed with this, when it was made for the benchmark.
    _made: Option<tempfile::TempDir>,
}

/// What a report says of a tree.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Which.
    pub kind: Kind,
    /// Inodes in it that an archive can hold, its root included.
    pub inodes: u64,
    /// Bytes of content.
    pub bytes: u64,
}

impl Tree {
    /// Finds or makes it; below `dir`, where the Debian tree is not taken as it stands.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(kind: Kind, options: &Options, dir: &Path) -> Result<Self> {
        let (root, made) = match kind {
            Kind::Debian => (golden::get(&dir.join("golden.log"))?.tree, None),
            Kind::Small | Kind::Large => {
                let made = tempfile::Builder::new()
                    .prefix("tree-")
                    .tempdir_in(dir)
                    .with_context(|| format!("making a folder in {}", dir.display()))?;
                let making = || format!("making files in {}", made.path().display());
                if kind == Kind::Small {
                    say!("bench", "making {} small files", options.files);
                    small(made.path(), options.files).with_context(making)?;
                } else {
                    large(made.path(), options.large).with_context(making)?;
                }
                (made.path().to_owned(), Some(made))
            }
        };
        let mut tree = Self { kind, root, inodes: 1, bytes: 0, _made: made };
        tree.count(&mut HashSet::new())?;
        Ok(tree)
    }

    fn count(&mut self, seen: &mut HashSet<(u64, u64)>) -> Result<()> {
        let mut folders = vec![self.root.clone()];
        while let Some(folder) = folders.pop() {
            let reading = || format!("reading {}", folder.display());
            for entry in std::fs::read_dir(&folder).with_context(reading)? {
                let entry = entry.with_context(reading)?;
                let meta = entry.metadata().with_context(reading)?;
                if meta.is_dir() {
                    folders.push(entry.path());
                }
                let again = !meta.is_dir() && meta.nlink() > 1 && !seen.insert((meta.dev(), meta.ino()));
                if again || meta.file_type().is_socket() {
                    continue;
                }
                self.inodes += 1;
                self.bytes += if meta.is_file() { meta.blocks() * 512 } else { 0 };
            }
        }
        Ok(())
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// See [`Facts::inodes`].
    #[must_use]
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// For the report.
    #[must_use]
    pub fn facts(&self) -> Facts {
        Facts { kind: self.kind, inodes: self.inodes, bytes: self.bytes }
    }
}

/// `count` files of up to 4 KiB, a hundred to a directory.
fn small(root: &Path, count: u64) -> Result<()> {
    let content = noise(4096);
    for number in 0..count {
        let folder =
            root.join(format!("{:04}", number / FOLDER / 100)).join(format!("{:02}", number / FOLDER % 100));
        if number % FOLDER == 0 {
            std::fs::create_dir_all(&folder)?;
        }
        // A prime, so that sizes are spread evenly.
        let size = usize::try_from(number * 1741 % 4096)?;
        std::fs::write(folder.join(format!("file-{:02}", number % FOLDER)), &content[..size])?;
    }
    Ok(())
}

fn large(root: &Path, bytes: u64) -> Result<()> {
    let content = noise(1 << 20);
    for number in 0..LARGE {
        let mut file = File::create(root.join(format!("file-{number}")))?;
        let mut left = bytes / LARGE;
        while left > 0 {
            let part = usize::try_from(left.min(content.len() as u64))?;
            file.write_all(&content[..part])?;
            left -= part as u64;
        }
    }
    Ok(())
}

/// Bytes that are no zeros: nothing may take them for holes.
fn noise(count: u32) -> Vec<u8> {
    (0..count).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3] | 1).collect()
}

/// A fresh ext4 in memory, mounted; gone when this is dropped.
#[derive(Debug)]
pub struct Target {
    folder: tempfile::TempDir,
    mount: PathBuf,
    mounted: bool,
    inodes_before: u64,
}

impl Target {
    /// One with room for `tree`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(tree: &Tree, log: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("ka-bench-")
            .tempdir_in(MEMORY)
            .with_context(|| format!("making a folder in {MEMORY}"))?;
        let (image, mount) = (folder.path().join("image"), folder.path().join("mount"));
        let making = || format!("making {}", image.display());
        std::fs::create_dir(&mount).with_context(|| format!("making {}", mount.display()))?;
        let size = (tree.bytes + tree.inodes * 1024) * 5 / 4 + (512 << 20);
        File::create(&image).and_then(|file| file.set_len(size)).with_context(making)?;
        let inodes = (tree.inodes * 5 / 4 + 1000).to_string();
        let mkfs = ["-q", "-F", "-N", &inodes, "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"];
        run::logged(Command::new("mkfs.ext4").args(mkfs).arg(&image), log, LIMIT)?;
        run::logged(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount), log, LIMIT)?;
        let mut target = Self { folder, mount, mounted: true, inodes_before: 0 };
        std::fs::create_dir(target.path()).with_context(|| format!("making {}", target.path().display()))?;
        ka_sys::mount::sync_file_system(&target.mount)
            .with_context(|| format!("syncing {}", target.mount.display()))?;
        target.inodes_before = target.used()?;
        Ok(target)
    }

    /// Where to unpack to: an empty directory.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.mount.join("root")
    }

    fn used(&self) -> Result<u64> {
        let stat = statvfs(&self.mount).with_context(|| format!("asking about {}", self.mount.display()))?;
        Ok(stat.f_files - stat.f_ffree)
    }

    /// Inodes that were made, and the directory that was there.
    ///
    /// # Errors
    /// When the file system does not tell.
    pub fn inodes(&self) -> Result<u64> {
        Ok(self.used()? - self.inodes_before + 1)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.mounted
            && let Err(e) = ka_sys::mount::unmount(&self.mount)
        {
            say!("bench", "unmounting {} in {}: {e}", self.mount.display(), self.folder.path().display());
            // Without this, removing the folder would remove what is mounted in it first.
            if let Err(e) = ka_sys::mount::unmount_lazy(&self.mount) {
                say!("bench", "unmounting it lazily: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_hold_what_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            only: Vec::new(),
            trees: Vec::new(),
            rounds: 1,
            files: 250,
            large: 8 << 20,
            output: PathBuf::new(),
        };
        let small = Tree::make(Kind::Small, &options, folder.path()).unwrap();
        // The root, one directory above, three with files, and the files.
        assert_eq!(small.inodes(), 1 + 1 + 3 + 250);
        let large = Tree::make(Kind::Large, &options, folder.path()).unwrap();
        assert_eq!((large.inodes(), large.bytes), (5, 8 << 20));
        let root = large.root().to_owned();
        drop(large);
        assert!(!root.exists());
    }
}
