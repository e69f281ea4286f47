//! Arrays, LVM and encrypted containers of a former life that something assembled on a disk and nobody uses: a rescue
//! system does so by itself. They hold the disk, so they are closed before it is written. What is mounted, swap in use, or
//! of a kind that is not known here (multipath above all) is no leftover: the disk is in use.

use super::assemble::load;
use super::discover::Disk;
use super::tool;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Time for one call of `dmsetup`.
const LIMIT: Duration = Duration::from_secs(60);

/// A volume that holds a disk and that nobody uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The kernel's name: `dm-0`, `md127`.
    pub name: String,
    /// For people: `the LVM volume vg-root (dm-0)`.
    pub text: String,
    /// The name of a mapping; none of an array.
    pub mapping: Option<String>,
    /// The names in sysfs of all disks that it lies on.
    pub disks: BTreeSet<String>,
}

impl Leftover {
    /// What holds a disk under the kernel's name `name`, with its directory in sysfs; none when such a thing is not closed
    /// by itself.
    #[must_use]
    pub fn read(dir: &Path, name: &str) -> Option<Self> {
        let text = |file: &str| fs::read_to_string(dir.join(file)).map(|t| t.trim().to_owned()).ok();
        if let Some(level) = text("md/level") {
            let text = format!("the array {name} ({level})");
            return Some(Self { name: name.to_owned(), text, mapping: None, disks: disks_below(dir) });
        }
        let mapping = text("dm/name")?;
        let kind = match text("dm/uuid")? {
            id if id.starts_with("LVM-") => "the LVM volume",
            id if id.starts_with("CRYPT-") => "the encrypted container",
            _ => return None,
        };
        let text = format!("{kind} {mapping} ({name})");
        Some(Self { name: name.to_owned(), text, mapping: Some(mapping), disks: disks_below(dir) })
    }

    fn close(&self) -> Result<()> {
        match &self.mapping {
            None => {
                // As the ioctl STOP_ARRAY; no mdadm is needed for it.
                let state = Path::new("/sys/block").join(&self.name).join("md/array_state");
                fs::write(&state, "clear").with_context(|| format!("writing {}", state.display()))
            }
            Some(mapping) => {
                load("dm_mod");
                ka_sys::process::run(
                    Command::new(tool::need("dmsetup")?)
                        .args(["remove", "--retry", mapping])
                        .env("LC_ALL", "C"),
                    LIMIT,
                )?;
                Ok(())
            }
        }
    }
}

/// The disks below what has the directory `dir` in sysfs.
fn disks_below(top: &Path) -> BTreeSet<String> {
    let mut disks = BTreeSet::new();
    let mut left: Vec<PathBuf> = vec![top.to_path_buf()];
    // Slaves lie below each other; so many of them do not.
    for _ in 0..1000 {
        let Some(dir) = left.pop() else { break };
        // A partition's disk may be an array, which lies on disks in turn.
        let whole =
            if dir.join("partition").exists() { dir.parent().unwrap_or(&dir).to_path_buf() } else { dir };
        let slaves = fs::read_dir(whole.join("slaves")).into_iter().flatten().flatten();
        let slaves: Vec<PathBuf> = slaves.filter_map(|s| fs::canonicalize(s.path()).ok()).collect();
        if slaves.is_empty() && whole != top {
            disks.extend(whole.file_name().map(|n| n.to_string_lossy().into_owned()));
        }
        left.extend(slaves);
    }
    disks
}

/// What would be lost beyond the disks that are to be written: a volume that lies on another disk as well is no leftover of
/// theirs.
///
/// # Errors
/// When there is such a volume, with its name and the other disks.
pub fn check_within(disks: &[&Disk]) -> Result<()> {
    for disk in disks {
        for leftover in &disk.leftovers {
            let is_other = |name: &&String| disks.iter().all(|d| d.name != **name);
            let others: Vec<&str> = leftover.disks.iter().filter(is_other).map(String::as_str).collect();
            ensure!(
                others.is_empty(),
                "{disk} is in use: {} lies on {} too, where it would be lost; close it by hand if that is meant",
                leftover.text,
                others.join(", ")
            );
        }
    }
    Ok(())
}

/// Closes `leftovers`, which stand with what lies above before what lies below.
///
/// # Errors
/// When one cannot be closed.
pub fn close(leftovers: &[Leftover]) -> Result<()> {
    let mut closed: Vec<&str> = Vec::new();
    for leftover in leftovers {
        // One that holds two partitions is listed twice.
        if closed.contains(&leftover.name.as_str()) {
            continue;
        }
        log::info!("closing {}, a leftover that nobody uses", leftover.text);
        leftover.close().with_context(|| format!("closing {}", leftover.text))?;
        closed.push(&leftover.name);
    }
    Ok(())
}
