//! Subvolumes of a btrfs, made with the golden machine's own `btrfs` while its top is mounted for a moment.

use super::plan::ContentPlan;
use super::stage::Mounts;
use super::tool;
use anyhow::{Context, Result, ensure};
use ka_layout::model::Subvolume;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Time for one call of `btrfs`.
const LIMIT: Duration = Duration::from_secs(120);

/// The program that makes subvolumes must be there before the disk is touched.
///
/// # Errors
/// When it is needed and missing.
pub fn check_tools<'a>(mut contents: impl Iterator<Item = &'a ContentPlan>) -> Result<()> {
    if contents.any(|c| !c.subvolumes.is_empty()) {
        tool::need("btrfs").context("making btrfs subvolumes is not possible")?;
    }
    Ok(())
}

/// Makes `subvolumes` on the new btrfs of `device`, which is mounted at `place` meanwhile, outer ones first, and reads back
/// which is the default.
///
/// # Errors
/// When it cannot be mounted, or `btrfs` fails.
pub fn make_subvolumes(device: &Path, subvolumes: &[Subvolume], place: &Path) -> Result<()> {
    if subvolumes.is_empty() {
        return Ok(());
    }
    let program = tool::need("btrfs")?;
    let btrfs = |words: &[&str], path: &Path| {
        ka_sys::process::run(Command::new(&program).args(words).arg(path).env("LC_ALL", "C"), LIMIT)
    };
    ka_sys::mount::mount(device, place, "btrfs", "subvolid=5,noatime")
        .with_context(|| format!("mounting its top at {}", place.display()))?;
    let mut mounted = Mounts(vec![place.to_path_buf()]);
    let mut sorted: Vec<&Subvolume> = subvolumes.iter().collect();
    sorted.sort_by_key(|s| s.name.split('/').count());
    for subvolume in sorted {
        let path = place.join(&subvolume.name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        btrfs(&["subvolume", "create"], &path).with_context(|| format!("making {}", subvolume.name))?;
    }
    if let Some(default) = subvolumes.iter().find(|s| s.default) {
        let name = &default.name;
        btrfs(&["subvolume", "set-default"], &place.join(name))
            .with_context(|| format!("making {name} the default"))?;
        let said = btrfs(&["subvolume", "get-default"], place).context("reading the default back")?.text();
        ensure!(
            said.trim_end().ends_with(&format!(" path {name}")),
            "the default reads back as `{}`, not {name}",
            said.trim()
        );
    }
    ka_sys::mount::sync_file_system(place).context("syncing it")?;
    ka_sys::mount::unmount(place).with_context(|| format!("unmounting {}", place.display()))?;
    mounted.0.clear();
    Ok(())
}
