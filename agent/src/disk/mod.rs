//! From a layout and the disks that are there to mounted, empty file systems, and back to a table that boots, or not.
//!
//! [`discover`] -> [`plan`] (nothing is written; printing it is the dry run) -> [`Plan::partition`] (step `disk`) ->
//! [`Partitioned::format`] (step `format`) -> [`Formatted`]: restore the tree, [`Formatted::commit_table`], boot loader,
//! [`Formatted::finish`]. The table is written last, so that a power cut before it leaves a disk that cannot boot; after a
//! failure [`clear_listed`] makes sure of it.

pub mod assemble;
mod btrfs;
pub mod choose;
pub mod discover;
mod gpt_table;
mod kept;
pub mod leftovers;
mod mbr_table;
mod mkfs;
pub mod plan;
pub mod raw;
mod stack;
mod stage;
pub mod superblock;
mod tool;
mod wipe;

#[cfg(test)]
mod keep_tests;
#[cfg(test)]
mod loop_tests;
#[cfg(test)]
mod plan_tests;
#[cfg(test)]
mod raw_tests;
#[cfg(test)]
mod sysfs_tests;
#[cfg(test)]
mod trap_tests;

pub use choose::name_disk;
pub use discover::{Disk, discover};
pub use plan::{Plan, plan};
pub use stage::{Formatted, Partitioned, RECORD};
pub use wipe::clear_listed;

use anyhow::Result;
use ka_cli::units::show_size;
use ka_layout::fit::{Geometry, fit_keeping};
use ka_layout::model::Layout;
use std::fmt::Write;
use std::fs::File;

/// What `ka-agent disks` prints: every disk, what is on it, and what `layout` would make of it or why it would not.
///
/// # Errors
/// When the disks cannot be listed.
pub fn show_disks(layout: Option<&Layout>) -> Result<String> {
    let disks = discover()?;
    let mut text = String::new();
    // Writing to a String cannot fail.
    for disk in &disks {
        let _ = writeln!(text, "{disk}");
        let mut facts: Vec<String> = Vec::new();
        facts.extend(disk.rotational.then(|| "rotates".into()));
        facts.extend(disk.removable.then(|| "removable".into()));
        facts.extend(disk.read_only.then(|| "read-only".into()));
        facts.extend(disk.wwn.as_ref().map(|w| format!("wwn {w}")));
        facts.extend(disk.paths.iter().cloned());
        facts.extend(disk.in_use.iter().cloned());
        facts.extend(disk.leftovers.iter().map(|l| format!("{}, which nobody uses", l.text)));
        for fact in facts {
            let _ = writeln!(text, "    {fact}");
        }
        for part in &disk.partitions {
            let content = File::open(&part.device).ok().and_then(|f| superblock::read(&f).ok().flatten());
            let content = content.map_or_else(String::new, |c| format!("  {} {}", c.fs.name(), c.uuid));
            let _ = writeln!(text, "    {} {}{content}", part.device.display(), show_size(part.bytes));
        }
        for (i, rule) in layout.iter().flat_map(|l| l.disks.iter().enumerate()) {
            let why = choose::reasons(rule, disk);
            let geometry = Geometry { bytes: disk.bytes, sector: disk.sector };
            let kept: Vec<_> = kept::read(&disk.device, disk.sector, rule.table)
                .map(|s| s.entries.iter().map(|e| e.place).collect())
                .unwrap_or_default();
            let verdict = match layout.map(|l| fit_keeping(l, i, geometry, &kept)) {
                _ if !why.is_empty() => format!("is not [[disk]] `{}`: {}", rule.name, why.join("; ")),
                Some(Err(e)) => format!("matches [[disk]] `{}`, but {e}", rule.name),
                _ => format!("matches [[disk]] `{}`", rule.name),
            };
            let _ = writeln!(text, "    => {verdict}");
        }
    }
    if disks.is_empty() {
        text.push_str("this machine shows no disk at all: is the driver of its controller missing?\n");
    }
    if let Some(layout) = layout {
        match choose::choose(layout, &disks) {
            Ok(chosen) => {
                for (rule, index) in layout.disks.iter().zip(chosen) {
                    let _ = writeln!(text, "[[disk]] `{}` is {}", rule.name, disks[index]);
                }
            }
            Err(e) => {
                let _ = writeln!(text, "{e}");
            }
        }
    }
    Ok(text)
}
