//! A layout from a running machine: what its file systems lie on, as partitions and volumes that a node can be given. The
//! system's own `sfdisk`, `blkid`, `mdadm`, `cryptsetup`, `lvm` and file-system tools are asked; names and numbers come from
//! sysfs.

use crate::capture_disk::{Content, Look, Names};
use crate::capture_facts::{base, gather, sysfs_of};
use crate::capture_stack::{self, Facts, Kind, Stack};
use crate::facts::{self, MountEntry};
use crate::machine::{Machine, This};
use crate::model::{Fs, Layout, Logical};
use crate::order::{GoldenFs, Layer};
use crate::stack::Base;
use ka_sys::process;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What was found out about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// The layout of its disks.
    pub layout: Layout,
    /// Its file systems and swap spaces, `/` first.
    pub golden_filesystems: Vec<GoldenFs>,
    /// What those lie on that are on no partition, by their devices.
    pub stacked: BTreeMap<String, Stacked>,
    /// What was left out or needs a look.
    pub warnings: Vec<String>,
}

/// What a file system lies on when that is no partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stacked {
    /// The volume itself, then those that it lies on.
    pub layers: Vec<Layer>,
    /// The disks below all of them.
    pub disks: Vec<String>,
}

/// What `blkid` finds on a device or in a file of this machine; nothing when there is nothing.
///
/// # Errors
/// When `blkid` cannot be run, or fails.
pub fn probe(device: &str) -> Result<BTreeMap<String, String>, CaptureError> {
    blkid(&This, device)
}

/// The same of any machine.
pub(crate) fn blkid(machine: &dyn Machine, device: &str) -> Result<BTreeMap<String, String>, CaptureError> {
    match machine.run("blkid", &["--probe", "--output", "export", device]) {
        Ok(text) => Ok(facts::blkid(&text)),
        // Status 2: nothing is there that blkid knows.
        Err(process::Error::Failed { status, .. }) if status.code() == Some(2) => Ok(BTreeMap::new()),
        Err(e) => Err(e.into()),
    }
}

/// Why no layout can be taken from the machine.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The machine is built in a way that cannot be captured; the text says which and what to do.
    #[error("{0}; write a layout file by hand and give it with --layout")]
    Refused(String),
    /// A file of `/proc`, `/sys` or `/etc` cannot be read.
    #[error("reading {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A tool failed.
    #[error(transparent)]
    Tool(#[from] process::Error),
    /// A tool said something that is not understood.
    #[error("understanding {tool} on {device}: {message}")]
    Answer {
        /// The tool.
        tool: &'static str,
        /// What it was asked about.
        device: String,
        /// What is wrong.
        message: String,
    },
}

pub(crate) fn read(path: &Path) -> Result<String, CaptureError> {
    fs::read_to_string(path).map_err(|source| CaptureError::Read { path: path.to_path_buf(), source })
}

/// [`read`], but nothing where there is no such file.
fn read_if_there(path: &Path) -> Result<String, CaptureError> {
    match fs::read_to_string(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(CaptureError::Read { path: path.to_path_buf(), source })
        }
        text => Ok(text.unwrap_or_default()),
    }
}

/// A mounted file system.
pub(crate) struct Mounted {
    /// Where, seen from the captured root.
    pub path: String,
    /// Where, as this process sees it.
    pub place: PathBuf,
    /// Its kind.
    pub fs: Fs,
    /// Its device's directory in sysfs.
    pub sysfs: PathBuf,
    /// Which subvolume of a btrfs it is, if it is not the top.
    pub subvolume: Option<String>,
}

/// Without these a clone does not boot or does not run: they are never left out.
const NEEDED: [&str; 6] = ["/", "/boot", "/boot/efi", "/efi", "/usr", "/var"];

/// Captures the layout of the machine whose tree is mounted at `root` (`/` when none is given).
///
/// # Errors
/// When `/` lies on something that a layout cannot express, or a tool is missing or fails.
pub fn capture(root: Option<&Path>) -> Result<Captured, CaptureError> {
    let root = root.unwrap_or(Path::new("/"));
    let root =
        fs::canonicalize(root).map_err(|source| CaptureError::Read { path: root.to_path_buf(), source })?;
    // Another tree has no swap in use.
    let own = root == Path::new("/");
    let swaps = if own { read_if_there(Path::new("/proc/swaps"))? } else { String::new() };
    capture_from(&This, &root, &read(Path::new("/proc/self/mountinfo"))?, &swaps)
}

/// [`capture`] of any machine, with its `/proc/self/mountinfo` and `/proc/swaps`.
pub(crate) fn capture_from(
    machine: &dyn Machine,
    root: &Path,
    mountinfo: &str,
    swaps: &str,
) -> Result<Captured, CaptureError> {
    let mut warnings = Vec::new();
    let found = mounted(machine, &facts::mountinfo(mountinfo), root, &mut warnings)?;
    let fstab = fs::read_to_string(root.join("etc/fstab")).map(|t| facts::fstab(&t)).unwrap_or_default();
    let mut crypttab = Vec::new();
    for file in ["etc/crypttab", "etc/crypttab.initramfs"] {
        crypttab.extend(capture_stack::crypttab(&read_if_there(&root.join(file))?));
    }
    let mut swap_dirs = Vec::new();
    for device in facts::swaps(swaps) {
        let number = machine
            .number(&device)
            .map_err(|source| CaptureError::Read { path: PathBuf::from(&device), source })?;
        swap_dirs.push(sysfs_of(machine, &number)?);
    }
    let dirs = found.iter().map(|m| m.sysfs.clone()).chain(swap_dirs.iter().cloned()).collect();
    let facts = gather(machine, dirs, crypttab)?;

    let mut stack = Stack::default();
    let mut disks: Vec<PathBuf> = Vec::new();
    let mut tops: Vec<(String, Fs)> = Vec::new();
    let (mut kept, mut told) = (Vec::new(), Vec::new());
    // `/` comes first, and so does its disk.
    for mount in found {
        let name = base(&mount.sysfs);
        if let Err(why) = place(&facts, &mut stack, &mut disks, &name) {
            if NEEDED.contains(&mount.path.as_str()) {
                return Err(CaptureError::Refused(format!("{} lies on {why}", mount.place.display())));
            }
            warnings.push(format!("{} lies on {why}: it is left out of the layout", mount.path));
            told.push(name);
            continue;
        }
        tops.push((name, mount.fs));
        kept.push(mount);
    }
    for name in swap_dirs.iter().map(|dir| base(dir)).filter(|name| !name.starts_with("zram")) {
        // A partition is found with its disk.
        if let Some(block) = facts.blocks.get(&name).filter(|b| b.kind == Kind::Partition) {
            if !disks.iter().any(|disk| block.dir.parent() == Some(disk)) {
                warnings.push(format!(
                    "swap lies on {name}, a partition of a disk without captured file systems: it is left out of the layout"
                ));
            }
            continue;
        }
        match place(&facts, &mut stack, &mut disks, &name) {
            Ok(()) => tops.push((name, Fs::Swap)),
            Err(why) => {
                warnings.push(format!("swap lies on {why}: it is left out of the layout"));
                told.push(name);
            }
        }
    }
    let mut look = Look { machine, mounted: &kept, fstab: &fstab, warnings };
    other_volumes(&mut look, &facts, &mut stack, &mut tops, &told)?;
    look.warnings.append(&mut stack.warnings);

    let mut layout = Layout { version: 1, ..Layout::default() };
    let mut golden = Vec::new();
    let mut nodes = Vec::new();
    let mut places = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        let name = if i == 0 { "system".to_owned() } else { format!("disk{}", i + 1) };
        let mut one = look.disk(disk, &name, &stack.carriers)?;
        if disks.len() > 1 {
            one.partitions.iter_mut().for_each(|p| p.disk = Some(name.clone()));
            one.rule.matching.size =
                Some(format!("{}G-{}G", (one.bytes >> 30) * 9 / 10, (one.bytes >> 30) * 11 / 10 + 1));
        }
        let place = one.aliases.iter().find_map(|a| a.strip_prefix("/dev/disk/by-path/"));
        places.push((one.bytes, place.map(str::to_owned)));
        layout.disks.push(one.rule);
        layout.partitions.extend(one.partitions);
        golden.extend(one.golden);
        nodes.push((one.device, one.aliases));
    }
    if disks.len() > 1 {
        look.warnings.push(tell_apart(&mut layout, &places));
    }
    let mut contents = BTreeMap::new();
    for (name, fs) in &tops {
        let Some(block) = facts.blocks.get(name).filter(|b| b.kind != Kind::Partition) else { continue };
        if !contents.contains_key(name) {
            let names = names(&look, &facts, &stack, name)?;
            contents.insert(name.clone(), look.volume(&block.dir, *fs, &names)?);
        }
    }
    let tops = fill(&mut layout, stack, &mut contents);
    let mut stacked = BTreeMap::new();
    for (kernel, base) in &tops {
        let Some(content) = contents.get_mut(kernel) else { continue };
        let under = under(&layout, &facts, &tops, *base);
        let on = under.1.iter().filter_map(|disk| nodes.get(*disk));
        let aliases: Vec<String> = on.clone().flat_map(|(_, aliases)| aliases.clone()).collect();
        let disks = on.map(|(device, _)| device.clone()).collect();
        if let Some(first) = content.golden.first() {
            stacked.insert(first.device.clone(), Stacked { layers: under.0, disks });
        }
        content.golden.iter_mut().for_each(|g| g.disk_aliases.clone_from(&aliases));
        golden.append(&mut content.golden);
    }
    sizes(&mut layout, &mut look, &facts, &tops)?;
    golden.sort_by_key(|g| (g.path.as_deref() != Some("/"), g.path.is_none()));
    let warnings = look.warnings;
    if let Some(problem) = crate::check::check(&layout).first() {
        return Err(CaptureError::Refused(format!(
            "the captured layout cannot be used: {}",
            problem.message
        )));
    }
    Ok(Captured { layout, golden_filesystems: golden, stacked, warnings })
}

/// Adds where a disk is plugged in to the rules of those whose sizes do not tell them apart, the two of an array mostly; what
/// the operator should look at.
fn tell_apart(layout: &mut Layout, places: &[(u64, Option<String>)]) -> String {
    // As far as the ranges in the rules reach.
    let alike = |a: u64, b: u64| a.min(b) / 9 * 11 + (2 << 30) >= a.max(b);
    let mut lost = Vec::new();
    for (i, (bytes, place)) in places.iter().enumerate() {
        if places.iter().enumerate().any(|(j, (other, _))| i != j && alike(*bytes, *other)) {
            layout.disks[i].matching.path.clone_from(place);
            lost.extend(place.is_none().then(|| layout.disks[i].name.clone()));
        }
    }
    let mut text = "several disks were captured: their match rules go by size, and where sizes are alike by where a disk is \
                    plugged in (path); look whether each names one disk of a node"
        .to_owned();
    if !lost.is_empty() {
        text += &format!("; nothing tells {} apart from others: add serial or wwn", lost.join(", "));
    }
    text
}

/// Adds what the device `name` lies on, to `stack` when it is no partition, and the disks below it.
fn place(facts: &Facts, stack: &mut Stack, disks: &mut Vec<PathBuf>, name: &str) -> Result<(), String> {
    let before = stack.carriers.len();
    let partition = facts.blocks.get(name).is_some_and(|b| b.kind == Kind::Partition);
    if !partition {
        facts.add(stack, name)?;
    }
    let own = partition.then_some(name);
    for partition in own.into_iter().chain(stack.carriers[before..].iter().map(String::as_str)) {
        let disk = facts.blocks.get(partition).and_then(|b| b.dir.parent());
        if let Some(disk) = disk.filter(|disk| !disks.iter().any(|d| d == disk)) {
            disks.push(disk.to_path_buf());
        }
    }
    Ok(())
}

/// The logical volumes of captured groups that nothing uses: swap spaces are taken, others left out with a warning, unless
/// they were `told` of before.
fn other_volumes(
    look: &mut Look,
    facts: &Facts,
    stack: &mut Stack,
    tops: &mut Vec<(String, Fs)>,
    told: &[String],
) -> Result<(), CaptureError> {
    let mut seen: Vec<&str> = Vec::new();
    for segment in &facts.segments {
        let used = stack.lvs.iter().any(|(_, l)| l.vg == segment.group && l.name == segment.name);
        let captured = stack.vgs.iter().any(|v| v.name == segment.group);
        if used || !captured || seen.contains(&segment.path.as_str()) {
            continue;
        }
        seen.push(&segment.path);
        let content = match facts.mapped(&segment.path) {
            Some((kernel, _)) if told.iter().any(|t| t == kernel) => continue,
            Some((kernel, block)) => {
                let kind = look.probe(&block.dir)?.remove("TYPE");
                if kind.as_deref() == Some("swap") && facts.add(stack, kernel).is_ok() {
                    tops.push((kernel.to_owned(), Fs::Swap));
                    continue;
                }
                kind
            }
            None => None,
        };
        look.warnings.push(format!(
            "the LVM volume {}/{} ({}, {}, {}) is not mounted: it is left out of the layout",
            segment.group,
            segment.name,
            segment.origin.as_ref().map_or_else(|| segment.kind.clone(), |o| format!("a snapshot of {o}")),
            content.as_deref().unwrap_or("nothing that is known"),
            ka_cli::units::show_size(segment.bytes)
        ));
    }
    Ok(())
}

/// How the golden machine calls a volume.
fn names(look: &Look, facts: &Facts, stack: &Stack, kernel: &str) -> Result<Names, CaptureError> {
    let Some(block) = facts.blocks.get(kernel) else { return Ok(Names::default()) };
    let node = crate::capture_facts::node(&block.dir)?;
    let mut aliases = look.aliases(&node);
    let mut device = node.clone();
    if let Kind::Mapped { name, .. } = &block.kind {
        device = format!("/dev/mapper/{name}");
        aliases.push(node);
    }
    if let Some((_, lv)) = stack.lvs.iter().find(|(k, _)| k == kernel) {
        aliases.push(format!("/dev/{}/{}", lv.vg, lv.name));
    }
    if let Some((_, raid)) = stack.raids.iter().find(|(k, _)| k == kernel) {
        aliases.push(format!("/dev/md/{}", raid.name));
    }
    let name = facts.arrays.get(kernel).and_then(|a| a.get("MD_DEVNAME")).map(|n| format!("/dev/md/{n}"));
    aliases.extend(name);
    aliases.sort();
    aliases.dedup();
    Ok(Names { device, aliases, ..Names::default() })
}

/// Puts the volumes of `stack` and what lies in them into `layout`; what each has become, by its kernel name.
fn fill(layout: &mut Layout, stack: Stack, contents: &mut BTreeMap<String, Content>) -> Vec<(String, Base)> {
    let mut found = Vec::new();
    macro_rules! put {
        ($list:expr, $all:expr, $base:path) => {
            for (kernel, mut volume) in $all {
                if let Some(content) = contents.get_mut(&kernel) {
                    volume.format = content.format.take();
                    volume.subvolumes = std::mem::take(&mut content.subvolumes);
                    volume.mount = content.mount.take();
                }
                found.push((kernel, $base($list.len())));
                $list.push(volume);
            }
        };
    }
    put!(layout.raids, stack.raids, Base::Raid);
    put!(layout.luks, stack.luks, Base::Luks);
    put!(layout.lvs, stack.lvs, Base::Lv);
    layout.vgs = stack.vgs;
    found
}

/// What `top` is and lies on, itself first, and the indices of the disks below it.
fn under(layout: &Layout, facts: &Facts, tops: &[(String, Base)], top: Base) -> (Vec<Layer>, Vec<usize>) {
    let (mut layers, mut disks) = (Vec::new(), Vec::new());
    let mut next = vec![top];
    while let Some(base) = next.pop() {
        let kernel = tops.iter().find(|(_, b)| *b == base).map(|(k, _)| k.as_str()).unwrap_or_default();
        let layer = match base {
            Base::Partition(i) => {
                let disk = layout.disk_of(&layout.partitions[i]);
                disks.extend(disk.filter(|d| !disks.contains(d)));
                None
            }
            Base::Vg(_) => None,
            Base::Raid(i) => Some(Layer::Raid {
                name: layout.raids[i].name.clone(),
                uuid: facts.arrays.get(kernel).and_then(|a| a.get("MD_UUID")).cloned().unwrap_or_default(),
                metadata: layout.raids[i].metadata.clone(),
            }),
            Base::Luks(i) => Some(Layer::Luks {
                name: layout.luks[i].name.clone(),
                uuid: match facts.dumps.get(kernel) {
                    Some(Ok(dump)) => dump.uuid.clone(),
                    _ => String::new(),
                },
                options: layout.luks[i].crypttab.clone().unwrap_or_else(|| "luks".to_owned()),
            }),
            Base::Lv(i) => {
                Some(Layer::Lvm { group: layout.lvs[i].vg.clone(), name: layout.lvs[i].name.clone() })
            }
        };
        layers.extend(layer.filter(|l| !layers.contains(l)));
        next.extend(layout.bases_of(base).into_iter().rev());
    }
    (layers, disks)
}

/// Chooses the sizes, and says what free space becomes.
fn sizes(
    layout: &mut Layout,
    look: &mut Look,
    facts: &Facts,
    tops: &[(String, Base)],
) -> Result<(), CaptureError> {
    let mut golden: BTreeMap<Base, u64> = BTreeMap::new();
    for (i, partition) in layout.partitions.iter().enumerate() {
        if let Ok(crate::size::Size::Exact(bytes)) = partition.size.parse() {
            golden.insert(Base::Partition(i), bytes);
        }
    }
    let of = |kernel: &String| facts.blocks.get(kernel).map_or(0, |b| b.bytes);
    golden.extend(tops.iter().map(|(kernel, base)| (*base, of(kernel))));
    for (i, group) in layout.vgs.iter().enumerate() {
        golden.insert(Base::Vg(i), facts.groups.get(&group.name).map_or(0, |g| g.0));
    }
    let mut used = BTreeMap::new();
    for mount in look.mounted {
        let bytes = look
            .machine
            .used(&mount.place)
            .map_err(|source| CaptureError::Read { path: mount.place.clone(), source })?;
        used.insert(mount.path.clone(), bytes);
    }
    let biggest = crate::capture_sizes::choose(layout, &golden, &used);
    if let Some(Base::Lv(i)) = biggest
        && let Some((bytes, free)) = facts.groups.get(&layout.lvs[i].vg)
        && *free > bytes / 100
    {
        let Logical { vg, name, .. } = &layout.lvs[i];
        look.warnings.push(format!(
            "the volume group {vg} has {} free: on a node {vg}/{name} takes all that is left over; give it an upper size \
             (\"20G-100G\") to keep space free",
            ka_cli::units::show_size(*free)
        ));
    }
    for raid in layout.raids.iter().filter(|r| r.format.as_ref().is_some_and(|f| f.fs == Fs::Vfat)) {
        if let Some(mount) = &raid.mount {
            look.warnings.push(format!(
                "{} is vfat on the array {}: UEFI nodes need an EFI system partition that is mounted itself, on one disk",
                mount.path, raid.name
            ));
        }
    }
    Ok(())
}

/// The file systems below `root` that lie on block devices.
fn mounted(
    machine: &dyn Machine,
    entries: &[MountEntry],
    root: &Path,
    warnings: &mut Vec<String>,
) -> Result<Vec<Mounted>, CaptureError> {
    let mut found: Vec<Mounted> = Vec::new();
    let mut seen_root = false;
    for (i, entry) in entries.iter().enumerate() {
        let Ok(below) = entry.place.strip_prefix(root) else { continue };
        // What was mounted over since does not count.
        if entries[i + 1..].iter().any(|later| later.place == entry.place) {
            continue;
        }
        let is_root = below.as_os_str().is_empty();
        seen_root |= is_root;
        let path = format!("/{}", below.display());
        let refuse = |why: String| CaptureError::Refused(format!("{} lies on {why}", root.display()));
        let Some(fs) = Fs::from_name(&entry.kind) else {
            let is_virtual = !entry.source.starts_with('/') && !entry.source.contains(':');
            if is_root {
                return Err(refuse(format!("{}, not on a partition", entry.kind)));
            } else if !is_virtual {
                warnings.push(format!("{path} ({}, {}) is left out of the layout", entry.kind, entry.source));
            }
            continue;
        };
        let subvolume = entry.subvolume.clone().filter(|_| fs == Fs::Btrfs);
        if entry.root.trim_start_matches('/') != subvolume.as_deref().unwrap_or_default() {
            if is_root {
                return Err(refuse(format!("the directory {} of {}", entry.root, entry.source)));
            }
            // Else it is a bind mount: its content belongs to another file system.
            continue;
        }
        let mut number = entry.device.clone();
        if number.starts_with("0:") {
            // btrfs: the number is made up, the source is the device.
            number = machine
                .number(&entry.source)
                .map_err(|source| CaptureError::Read { path: entry.source.clone().into(), source })?;
        }
        let sysfs = sysfs_of(machine, &number)?;
        if found.iter().any(|m| m.sysfs == sysfs && m.subvolume == subvolume) {
            continue;
        }
        found.push(Mounted { path, place: entry.place.clone(), fs, sysfs, subvolume });
    }
    if !seen_root {
        return Err(CaptureError::Refused(format!("no file system is mounted at {}", root.display())));
    }
    found.sort_by_key(|m| (m.path != "/", m.path.clone()));
    Ok(found)
}

#[cfg(test)]
#[path = "capture_tests.rs"]
mod tests;
