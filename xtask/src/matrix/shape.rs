//! What a layout makes, whatever its sizes and names of disks: so that what `ka-server layout` captures on a clone can be
//! compared with what the clone was made from.

use anyhow::{Context, Result, bail};
use ka_layout::model::{Fs, Layout};
use std::collections::BTreeSet;

/// Fails where what was captured on a clone is not what `made` it.
///
/// # Errors
/// Says what one has and the other has not.
pub fn compare(made: &str, captured: &str) -> Result<()> {
    let made = ka_layout::parse(made).context("reading the row's layout")?;
    let captured =
        ka_layout::parse(captured).with_context(|| format!("reading what was captured:\n{captured}"))?;
    // What was preserved has a file system that the row's layout does not name.
    let preserved: Vec<&str> = made.preserved_paths().collect();
    let (made, captured) = (shape(&made, &preserved), shape(&captured, &preserved));
    let only =
        |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).cloned().collect::<Vec<_>>().join(", ");
    if made != captured {
        bail!(
            "`ka-server layout` on the clone lacks [{}] and has [{}] of its own",
            only(&made, &captured),
            only(&captured, &made)
        );
    }
    Ok(())
}

fn shape(layout: &Layout, preserved: &[&str]) -> BTreeSet<String> {
    let mut shape = BTreeSet::new();
    let mut swaps = 0;
    for content in layout.contents() {
        let fs = content.format.map_or("", |format| format.fs.name());
        swaps += usize::from(content.format.is_some_and(|format| format.fs == Fs::Swap));
        let mounts = content.mounts().into_iter().filter(|mount| !preserved.contains(&mount.path.as_str()));
        shape.extend(mounts.map(|mount| format!("{fs} at {}", mount.path)));
    }
    shape.insert(format!("{swaps} swap"));
    shape.extend(layout.raids.iter().map(|raid| {
        format!("array {} of {} with metadata {}", raid.name, raid.members.len(), raid.metadata)
    }));
    shape.extend(
        layout.luks.iter().map(|luks| format!("container {} of version {}", luks.name, luks.version)),
    );
    shape.extend(layout.vgs.iter().map(|vg| format!("group {} on {}", vg.name, vg.on.len())));
    shape.extend(layout.lvs.iter().map(|lv| format!("volume {}/{}", lv.vg, lv.name)));
    shape.extend(layout.disks.iter().map(|disk| format!("{:?} table", disk.table)));
    shape
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_numbers_do_not_count_and_kinds_do() {
        let layout = |rest: &str| format!("version = 1\n[[disk]]\nname = 'd'\ntable = 'gpt'\n{rest}");
        let root = |size: &str, fs: &str| {
            format!(
                "[[partition]]\ntype = 'linux'\nsize = '{size}'\nformat = {{ fs = '{fs}' }}\nmount = {{ path = '/' }}\n"
            )
        };
        let made = layout(&root("fill", "ext4"));
        compare(&made, &layout(&root("2G-", "ext4"))).unwrap();
        let error = compare(&made, &layout(&root("fill", "xfs"))).unwrap_err().to_string();
        assert!(error.contains("lacks [ext4 at /] and has [xfs at /]"), "{error}");
        let swap = "[[partition]]\ntype = 'swap'\nsize = '1G'\nformat = { fs = 'swap' }\n";
        let error = compare(&made, &layout(&(root("fill", "ext4") + swap))).unwrap_err().to_string();
        assert!(error.contains("lacks [0 swap] and has [1 swap]"), "{error}");
    }

    #[test]
    fn what_was_preserved_may_be_any_file_system() {
        let layout = |home: &str| {
            format!(
                "version = 1\n[[disk]]\nname = 'd'\ntable = 'gpt'\n\
                 [[partition]]\ntype = 'linux'\nsize = 'fill'\nformat = {{ fs = 'xfs' }}\nmount = {{ path = '/' }}\n\
                 [[partition]]\nnumber = 6\ntype = 'linux-home'\nsize = '1G'\n{home}\nmount = {{ path = '/home' }}\n"
            )
        };
        compare(&layout("preserve = true"), &layout("format = { fs = 'ext4' }")).unwrap();
        let error = compare(&layout("format = { fs = 'xfs' }"), &layout("format = { fs = 'ext4' }"));
        assert!(error.unwrap_err().to_string().contains("lacks [xfs at /home]"));
    }
}
