//! A layout from a running machine: what its file systems lie on, as partitions that a node can be given. The system's own
//! `sfdisk`, `blkid` and file-system tools are asked; names and numbers come from sysfs.

use crate::facts::{self, MountEntry, Table, TablePartition};
use crate::model::{DiskRule, Format, Fs, Layout, Match, Mount, Partition, Pick, Subvolume, TableKind};
use crate::order::GoldenFs;
use crate::size::{MIB, Size};
use crate::types::{self, TypeCode};
use ka_sys::process::{self, run};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use uuid::Uuid;

/// Time for one of the tools.
const LIMIT: Duration = Duration::from_secs(60);
/// A file system up to this size is made as big as it was; bigger ones follow the node's disk.
const SMALL: u64 = 2 << 30;

/// What was found out about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// The layout of its disks.
    pub layout: Layout,
    /// Its file systems and swap spaces, `/` first.
    pub golden_filesystems: Vec<GoldenFs>,
    /// What was left out or needs a look.
    pub warnings: Vec<String>,
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

fn read(path: &Path) -> Result<String, CaptureError> {
    fs::read_to_string(path).map_err(|source| CaptureError::Read { path: path.to_path_buf(), source })
}

/// A mounted file system on a partition.
struct Mounted {
    /// Where, seen from the captured root.
    path: String,
    /// Where, as this process sees it.
    place: PathBuf,
    fs: Fs,
    /// The partition's directory in sysfs.
    sysfs: PathBuf,
    /// Which subvolume of a btrfs it is, if it is not the top.
    subvolume: Option<String>,
}

/// Captures the layout of the machine whose tree is mounted at `root` (`/` when none is given).
///
/// # Errors
/// When `/` does not lie on a plain partition, or a tool is missing or fails.
pub fn capture(root: Option<&Path>) -> Result<Captured, CaptureError> {
    let root = root.unwrap_or(Path::new("/"));
    let root =
        fs::canonicalize(root).map_err(|source| CaptureError::Read { path: root.to_path_buf(), source })?;
    let mut warnings = Vec::new();
    let entries = facts::mountinfo(&read(Path::new("/proc/self/mountinfo"))?);
    let mounted = mounted(&entries, &root, &mut warnings)?;
    let fstab = fs::read_to_string(root.join("etc/fstab")).map(|t| facts::fstab(&t)).unwrap_or_default();

    // Disks in the order of their mounts; `/` comes first.
    let mut disks: Vec<PathBuf> = Vec::new();
    for m in &mounted {
        let disk = m.sysfs.parent().map(Path::to_path_buf).unwrap_or_default();
        if !disks.contains(&disk) {
            disks.push(disk);
        }
    }
    let mut layout = Layout { version: 1, ..Layout::default() };
    let mut golden = Vec::new();
    for (i, disk) in disks.iter().enumerate() {
        let name = if i == 0 { "system".to_owned() } else { format!("disk{}", i + 1) };
        let mut one = capture_disk(disk, &name, &mounted, &fstab, &mut warnings)?;
        if disks.len() > 1 {
            one.partitions.iter_mut().for_each(|p| p.disk = Some(name.clone()));
            let bytes = sysfs_number(&disk.join("size"))? * 512;
            one.rule.matching.size =
                Some(format!("{}G-{}G", (bytes >> 30) * 9 / 10, (bytes >> 30) * 11 / 10 + 1));
        }
        layout.disks.push(one.rule);
        layout.partitions.extend(one.partitions);
        golden.extend(one.golden);
    }
    if disks.len() > 1 {
        warnings.push(
            "several disks were captured: their match rules go by size only; look whether each names one disk of a node"
                .into(),
        );
    }
    choose_sizes(&mut layout, &mounted)?;
    golden.sort_by_key(|g| (g.path.as_deref() != Some("/"), g.path.is_none()));
    let problems = crate::check::check(&layout);
    if let Some(problem) = problems.first() {
        return Err(CaptureError::Refused(format!(
            "the captured layout cannot be used: {}",
            problem.message
        )));
    }
    Ok(Captured { layout, golden_filesystems: golden, warnings })
}

/// The file systems below `root` that lie on partitions.
fn mounted(
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
        let refuse = |why: String, warnings: &mut Vec<String>| {
            if is_root {
                return Err(CaptureError::Refused(format!("{} lies on {why}", root.display())));
            }
            warnings.push(format!("{path} lies on {why}: it is left out of the layout"));
            Ok(())
        };
        let Some(fs) = Fs::from_name(&entry.kind) else {
            let is_virtual = !entry.source.starts_with('/') && !entry.source.contains(':');
            if is_root {
                refuse(format!("{}, not on a partition", entry.kind), warnings)?;
            } else if !is_virtual {
                warnings.push(format!("{path} ({}, {}) is left out of the layout", entry.kind, entry.source));
            }
            continue;
        };
        let subvolume = entry.subvolume.clone().filter(|_| fs == Fs::Btrfs);
        if entry.root.trim_start_matches('/') != subvolume.as_deref().unwrap_or_default() {
            if is_root {
                refuse(format!("the directory {} of {}", entry.root, entry.source), warnings)?;
            }
            // Else it is a bind mount: its content belongs to another file system.
            continue;
        }
        let sysfs = sysfs_of(entry)?;
        if let Some(why) = not_a_partition(&sysfs) {
            refuse(why, warnings)?;
            continue;
        }
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

/// The sysfs directory of the block device under a mount.
fn sysfs_of(entry: &MountEntry) -> Result<PathBuf, CaptureError> {
    let mut number = entry.device.clone();
    if number.starts_with("0:") {
        // btrfs: the number is made up, the source is the device.
        let fail = |source: io::Error| CaptureError::Read { path: entry.source.clone().into(), source };
        let status = rustix::fs::stat(&entry.source).map_err(|e| fail(e.into()))?;
        number = format!("{}:{}", rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    }
    let link = Path::new("/sys/dev/block").join(number);
    fs::canonicalize(&link).map_err(|source| CaptureError::Read { path: link, source })
}

fn base(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Why a block device is no plain partition, if it is none.
fn not_a_partition(sysfs: &Path) -> Option<String> {
    if sysfs.join("partition").exists() {
        return None;
    }
    let name = base(sysfs);
    let text = |file: &str| fs::read_to_string(sysfs.join(file)).unwrap_or_default().trim().to_owned();
    if name.starts_with("dm-") {
        let kind = match text("dm/uuid") {
            id if id.starts_with("LVM-") => "the LVM volume",
            id if id.starts_with("CRYPT-") => "the encrypted (LUKS) volume",
            id if id.starts_with("mpath-") => "the multipath device",
            _ => "the device-mapper volume",
        };
        return Some(format!("{kind} {}, which is not supported yet", text("dm/name")));
    }
    if sysfs.join("md").exists() {
        return Some(format!("the RAID array {name} (md), which is not supported yet"));
    }
    Some(format!("the whole disk {name}, which has no partition table"))
}

fn sysfs_number(path: &Path) -> Result<u64, CaptureError> {
    let text = read(path)?;
    text.trim().parse().map_err(|_| CaptureError::Read {
        path: path.to_path_buf(),
        source: io::Error::new(io::ErrorKind::InvalidData, format!("`{}` is no number", text.trim())),
    })
}

/// The device node of what has the sysfs directory `dir`.
fn node(dir: &Path) -> Result<String, CaptureError> {
    let path = dir.join("uevent");
    let text = read(&path)?;
    let name = text.lines().find_map(|l| l.strip_prefix("DEVNAME=")).ok_or_else(|| CaptureError::Read {
        path,
        source: io::Error::new(io::ErrorKind::InvalidData, "there is no DEVNAME"),
    })?;
    Ok(format!("/dev/{name}"))
}

/// One disk as it was captured.
struct CapturedDisk {
    rule: DiskRule,
    partitions: Vec<Partition>,
    golden: Vec<GoldenFs>,
}

fn capture_disk(
    sysfs: &Path,
    name: &str,
    mounted: &[Mounted],
    fstab: &BTreeMap<String, String>,
    warnings: &mut Vec<String>,
) -> Result<CapturedDisk, CaptureError> {
    let device = node(sysfs)?;
    let json = run(tool("sfdisk").args(["--json", &device]), LIMIT)?.text();
    let answer = |message: String| CaptureError::Answer { tool: "sfdisk", device: device.clone(), message };
    let table = facts::sfdisk(&json).map_err(|e| answer(e.to_string()))?;
    let kind = match table.label.as_str() {
        "gpt" => TableKind::Gpt,
        "dos" => TableKind::Mbr,
        other => {
            return Err(CaptureError::Refused(format!(
                "{device} has a partition table of kind {other}; gpt and mbr are supported"
            )));
        }
    };
    // The kernel's numbers, by where the partitions begin.
    let mut by_start: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let entries =
        fs::read_dir(sysfs).map_err(|source| CaptureError::Read { path: sysfs.to_path_buf(), source })?;
    for dir in entries.flatten().map(|e| e.path()).filter(|p| p.join("partition").exists()) {
        by_start.insert(sysfs_number(&dir.join("start"))? * 512, dir);
    }
    let disk_aliases = aliases(&device);
    let mut sorted: Vec<&TablePartition> = table.partitions.iter().collect();
    sorted.sort_by_key(|p| p.start);
    let (mut partitions, mut golden) = (Vec::new(), Vec::new());
    for entry in sorted {
        if kind == TableKind::Mbr && matches!(entry.kind.as_str(), "5" | "f" | "85") {
            continue;
        }
        let Some(dir) = by_start.get(&(entry.start * table.sector)) else {
            warnings.push(format!(
                "{device} has a partition at sector {} in its table that the kernel does not know: it is left out",
                entry.start
            ));
            continue;
        };
        if let Some((partition, fs)) = capture_partition(dir, entry, &table, kind, mounted, fstab, warnings)?
        {
            golden.extend(fs.into_iter().map(|fs| GoldenFs { disk_aliases: disk_aliases.clone(), ..fs }));
            partitions.push(partition);
        }
    }
    let transport = ["sata", "nvme", "virtio", "ide", "scsi", "sas", "mmc", "xen"];
    let rule = DiskRule {
        name: name.to_owned(),
        matching: Match { transport: Some(transport.map(str::to_owned).to_vec()), ..Match::default() },
        pick: Pick::Only,
        table: kind,
        uuid: match kind {
            TableKind::Gpt => Uuid::try_parse(&table.id).ok().map(|u| u.to_string()),
            TableKind::Mbr => table.id.strip_prefix("0x").filter(|h| h.len() == 8).map(str::to_owned),
        },
    };
    Ok(CapturedDisk { rule, partitions, golden })
}

fn capture_partition(
    dir: &Path,
    entry: &TablePartition,
    table: &Table,
    kind: TableKind,
    mounted: &[Mounted],
    fstab: &BTreeMap<String, String>,
    warnings: &mut Vec<String>,
) -> Result<Option<(Partition, Vec<GoldenFs>)>, CaptureError> {
    let device = node(dir)?;
    let answer = |message: &str| CaptureError::Answer {
        tool: "sfdisk",
        device: device.clone(),
        message: format!("{message} `{}`", entry.kind),
    };
    let code = match kind {
        TableKind::Gpt => TypeCode::Gpt(Uuid::try_parse(&entry.kind).map_err(|_| answer("no type GUID"))?),
        TableKind::Mbr => {
            TypeCode::Mbr(u8::from_str_radix(&entry.kind, 16).map_err(|_| answer("no type code"))?)
        }
    };
    let all_here = || mounted.iter().filter(|m| m.sysfs == dir);
    let here = all_here().next();
    let top = all_here().find(|m| m.subvolume.is_none());
    let facts = probe(&device)?;
    let found = facts.get("TYPE").and_then(|t| Fs::from_name(t));
    let bytes = entry.size * table.sector;
    let plain = types::name(code);
    let fs = match (here, found) {
        (Some(m), _) => Some(m.fs),
        (None, Some(Fs::Swap)) => Some(Fs::Swap),
        (None, Some(Fs::Vfat)) if types::is_esp(&plain, kind) => {
            warnings
                .push(format!("{device} is an EFI system partition that is not mounted: it will be empty"));
            Some(Fs::Vfat)
        }
        (None, _) if types::is_bios_boot(&plain, kind) || plain == "prep" => None,
        (None, content) => {
            let content = facts.get("TYPE").cloned().unwrap_or_else(|| {
                content.map_or_else(|| "nothing that is known".to_owned(), |fs| fs.name().to_owned())
            });
            warnings.push(format!(
                "{device} ({content}, {}) is not mounted: it is left out of the layout",
                ka_cli::units::show_size(bytes)
            ));
            return Ok(None);
        }
    };
    let number = sysfs_number(&dir.join("partition"))?;
    let subvolumes = match here {
        Some(here) if here.fs == Fs::Btrfs => subvolumes(here, all_here(), fstab, warnings)?,
        _ => Vec::new(),
    };
    let uuid = facts.get("UUID").cloned();
    let label = facts.get("LABEL").cloned();
    let format = match fs {
        None => None,
        Some(fs) => Some(Format {
            fs,
            label: label.clone(),
            uuid: uuid.clone(),
            options: features(fs, &device, here.map(|m| m.place.as_path()), &facts)?,
        }),
    };
    let partition = Partition {
        disk: None,
        id: None,
        number: u32::try_from(number).ok(),
        kind: plain,
        size: Size::Exact(bytes.div_ceil(MIB) * MIB).to_string(),
        start: None,
        weight: None,
        name: entry.name.clone().filter(|n| !n.is_empty()),
        uuid: (kind == TableKind::Gpt).then(|| entry.uuid.as_ref().map(|u| u.to_lowercase())).flatten(),
        bootable: entry.bootable || entry.attrs.as_ref().is_some_and(|a| a.contains("LegacyBIOSBootable")),
        format,
        subvolumes,
        mount: top.map(|m| Mount {
            options: fstab.get(&m.path).filter(|o| *o != "defaults").cloned(),
            path: m.path.clone(),
        }),
        preserve: false,
        raw: false,
    };
    let golden = |fs: Fs, path: Option<String>| GoldenFs {
        path,
        fs,
        aliases: aliases(&device),
        device: device.clone(),
        disk_aliases: Vec::new(),
        uuid: uuid.clone(),
        label: label.clone(),
        partuuid: facts.get("PART_ENTRY_UUID").cloned().or_else(|| partuuid(entry, table, number)),
        partlabel: entry.name.clone().filter(|n| !n.is_empty()),
    };
    let golden = match (fs, here) {
        (None, _) => Vec::new(),
        (Some(fs), None) => vec![golden(fs, None)],
        (Some(fs), Some(_)) => all_here().map(|m| golden(fs, Some(m.path.clone()))).collect(),
    };
    Ok(Some((partition, golden)))
}

/// The subvolumes of a btrfs that are mounted, and the default one. Others are left out with a warning: most are
/// snapshots.
fn subvolumes<'a>(
    here: &Mounted,
    all: impl Iterator<Item = &'a Mounted>,
    fstab: &BTreeMap<String, String>,
    warnings: &mut Vec<String>,
) -> Result<Vec<Subvolume>, CaptureError> {
    let ask = |word: &str| {
        let text = run(tool("btrfs").args(["subvolume", word]).arg(&here.place), LIMIT)?.text();
        Ok::<_, CaptureError>(facts::subvolume_paths(&text))
    };
    let default = ask("get-default")?.into_iter().next();
    let mut found: Vec<Subvolume> = all
        .filter_map(|m| {
            Some(Subvolume {
                name: m.subvolume.clone()?,
                path: Some(m.path.clone()),
                options: fstab.get(&m.path).and_then(|o| facts::without_subvolume(o)),
                default: m.subvolume == default,
            })
        })
        .collect();
    if let Some(name) = default.filter(|name| found.iter().all(|s| s.name != *name)) {
        found.push(Subvolume { name, path: None, options: None, default: true });
    }
    for name in ask("list")?.iter().filter(|name| found.iter().all(|s| s.name != **name)) {
        warnings.push(format!(
            "the btrfs at {} has the subvolume {name}, which is not mounted by itself: it is left out of the layout",
            here.place.display()
        ));
    }
    Ok(found)
}

fn partuuid(entry: &TablePartition, table: &Table, number: u64) -> Option<String> {
    match &entry.uuid {
        Some(uuid) => Some(uuid.to_lowercase()),
        None => table.id.strip_prefix("0x").map(|id| format!("{id}-{number:02x}")),
    }
}

/// A tool of the system, found wherever the caller's `PATH` leads, and speaking English.
fn tool(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    command
}

/// What `blkid` finds on a device or in a file; nothing when there is nothing.
///
/// # Errors
/// When `blkid` cannot be run, or fails.
pub fn probe(device: &str) -> Result<BTreeMap<String, String>, CaptureError> {
    match run(tool("blkid").args(["--probe", "--output", "export", device]), LIMIT) {
        Ok(output) => Ok(facts::blkid(&output.text())),
        // Status 2: nothing is there that blkid knows.
        Err(process::Error::Failed { status, .. }) if status.code() == Some(2) => Ok(BTreeMap::new()),
        Err(e) => Err(e.into()),
    }
}

/// Words for mkfs that give a file system the features of the golden one: what the golden machine's boot loader and kernel
/// can read, they must be able to read on the clone.
fn features(
    fs: Fs,
    device: &str,
    place: Option<&Path>,
    facts: &BTreeMap<String, String>,
) -> Result<Vec<String>, CaptureError> {
    Ok(match fs {
        Fs::Ext2 | Fs::Ext3 | Fs::Ext4 => {
            facts::ext_options(&run(tool("dumpe2fs").args(["-h", device]), LIMIT)?.text())
        }
        Fs::Xfs => {
            let place = place.unwrap_or(Path::new(device));
            facts::xfs_options(&run(tool("xfs_info").arg(place), LIMIT)?.text())
        }
        Fs::Btrfs => {
            let mut command = tool("btrfs");
            facts::btrfs_options(
                &run(command.args(["inspect-internal", "dump-super", device]), LIMIT)?.text(),
            )
        }
        Fs::Vfat => {
            let bits = facts.get("VERSION").and_then(|v| v.strip_prefix("FAT"));
            bits.map_or_else(Vec::new, |bits| vec!["-F".to_owned(), bits.to_owned()])
        }
        Fs::Swap => Vec::new(),
    })
}

/// Every name under `/dev/disk` that leads to `device`.
fn aliases(device: &str) -> Vec<String> {
    let target = fs::canonicalize(device).ok();
    let mut found = Vec::new();
    let kinds = fs::read_dir("/dev/disk").into_iter().flatten().flatten();
    for link in kinds.flat_map(|kind| fs::read_dir(kind.path()).into_iter().flatten().flatten()) {
        if target.is_some() && fs::canonicalize(link.path()).ok() == target {
            found.push(link.path().to_string_lossy().into_owned());
        }
    }
    found.sort();
    found
}

/// Lets the big data partitions follow the size of a node's disk: the biggest without limit, others up to what they are.
fn choose_sizes(layout: &mut Layout, mounted: &[Mounted]) -> Result<(), CaptureError> {
    let mut biggest: Option<(u64, usize)> = None;
    let mut needs = vec![0; layout.disks.len()];
    let mut ranges = Vec::new();
    for (i, partition) in layout.partitions.iter().enumerate() {
        let Ok(Size::Exact(bytes)) = partition.size.parse::<Size>() else { continue };
        let mounts = partition.content().mounts();
        let mount = mounts.first().and_then(|m| mounted.iter().find(|x| x.path == m.path));
        let mut least = bytes;
        let root = mounts.iter().any(|m| m.path == "/");
        if let Some(mount) = mount.filter(|m| m.fs != Fs::Vfat && (root || bytes > SMALL)) {
            let space = rustix::fs::statvfs(&mount.place)
                .map_err(|e| CaptureError::Read { path: mount.place.clone(), source: e.into() })?;
            let used = (space.f_blocks - space.f_bfree) * space.f_frsize;
            // A fifth more than is used now, and some room for the file system itself.
            least = ((used + used / 5 + 128 * MIB).div_ceil(MIB) * MIB).min(bytes);
            ranges.push((i, least, bytes));
            if biggest.is_none_or(|(b, _)| bytes > b) {
                biggest = Some((bytes, i));
            }
        }
        if let Some(disk) = layout.disk_of(partition) {
            needs[disk] += least;
        }
    }
    for (i, least, bytes) in ranges {
        let limit = biggest.is_none_or(|(_, b)| b != i).then_some(bytes);
        layout.partitions[i].size = Size::Range { min: least, max: limit }.to_string();
    }
    for (disk, needs) in layout.disks.iter_mut().zip(needs) {
        if disk.matching.size.is_none() {
            // Rounded down: whether it really fits is told with figures when the layout is fitted.
            let gib = needs >> 30;
            disk.matching.size =
                Some(if gib > 0 { format!("{gib}G-") } else { format!("{}M-", needs / MIB) });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        mounted(&facts::mountinfo(text), Path::new("/"), &mut Vec::new()).err().unwrap().to_string()
    }

    #[test]
    fn what_cannot_be_captured_is_refused_by_name() {
        let advice = "; write a layout file by hand and give it with --layout";
        assert_eq!(
            refusal("27 1 0:30 / / rw - overlay overlay rw,lowerdir=/x\n"),
            format!("/ lies on overlay, not on a partition{advice}")
        );
        assert_eq!(
            refusal("27 1 0:30 /@rootfs/srv / rw - btrfs /dev/sda1 rw,subvol=/@rootfs\n"),
            format!("/ lies on the directory /@rootfs/srv of /dev/sda1{advice}")
        );
        assert_eq!(refusal(""), format!("no file system is mounted at /{advice}"));
    }

    #[test]
    fn volumes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for (name, file, content, expected) in [
            ("dm-0", "dm/uuid", "LVM-abc\n", "the LVM volume vg-root, which is not supported yet"),
            (
                "dm-1",
                "dm/uuid",
                "CRYPT-LUKS2-1\n",
                "the encrypted (LUKS) volume vg-root, which is not supported yet",
            ),
            ("md127", "md/level", "raid1\n", "the RAID array md127 (md), which is not supported yet"),
            ("vda", "size", "1\n", "the whole disk vda, which has no partition table"),
        ] {
            let sysfs = dir.path().join(name);
            let path = sysfs.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
            if name.starts_with("dm") {
                fs::write(sysfs.join("dm/name"), "vg-root\n").unwrap();
            }
            assert_eq!(not_a_partition(&sysfs).as_deref(), Some(expected));
            fs::write(sysfs.join("partition"), "1\n").unwrap();
            assert_eq!(not_a_partition(&sysfs), None);
        }
    }

    #[test]
    fn this_machine_is_captured_or_refused_in_words() {
        match capture(None) {
            Ok(captured) => {
                let text = crate::to_toml(&captured.layout, &captured.warnings);
                assert_eq!(crate::parse(&text).unwrap(), captured.layout);
                assert_eq!(captured.golden_filesystems[0].path.as_deref(), Some("/"));
            }
            Err(e @ CaptureError::Refused(_)) => {
                let text = e.to_string();
                assert!(text.starts_with("/ lies on ") && text.contains("--layout"), "{text}");
            }
            Err(e) => panic!("{e}"),
        }
    }
}
