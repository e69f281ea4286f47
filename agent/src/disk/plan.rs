//! The whole plan, computed and checked before the first byte is written: which disk, where each partition lies, what is
//! made in it, and whether the golden tree fits.

use super::choose::choose;
use super::discover::Disk;
use anyhow::{Context, Result, bail, ensure};
use ka_cli::units::show_size;
use ka_layout::fit::{Extent, Fitted, Geometry, fit};
use ka_layout::model::{Format, Fs, Layout, Mount, Partition, TableKind};
use ka_layout::order::{Firmware, Golden, GoldenFs, Used};
use ka_layout::types::{self, TypeCode};
use std::collections::BTreeMap;
use std::fmt;
use uuid::Uuid;

/// Everything that will be done to this machine's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The disks, in the layout's order.
    pub disks: Vec<DiskPlan>,
}

/// What will be done to one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    /// Its name in the layout.
    pub rule: String,
    /// The disk that was chosen.
    pub disk: Disk,
    /// Where the partitions lie.
    pub fitted: Fitted,
    /// GUID of a GPT, or the signature of an MBR in its first four bytes.
    pub id: Uuid,
    /// The partitions, in the order in which they lie on the disk.
    pub partitions: Vec<PartitionPlan>,
}

/// What will become of one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionPlan {
    /// Number and sectors.
    pub extent: Extent,
    /// Its type as the layout writes it.
    pub kind: String,
    /// Its type in the table.
    pub code: TypeCode,
    /// Its name in the table.
    pub name: Option<String>,
    /// Its GUID in a GPT.
    pub guid: Option<Uuid>,
    /// Its PARTUUID as blkid prints it.
    pub partuuid: String,
    /// Active flag, or the legacy-BIOS-bootable attribute.
    pub bootable: bool,
    /// The file system to make.
    pub format: Option<FormatPlan>,
    /// Where the clone mounts it.
    pub mount: Option<Mount>,
}

/// A file system to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatPlan {
    /// Its kind.
    pub fs: Fs,
    /// Its UUID as blkid prints it.
    pub uuid: String,
    /// Its label.
    pub label: Option<String>,
    /// More words for mkfs.
    pub options: Vec<String>,
}

impl DiskPlan {
    /// The four bytes of an MBR's disk signature, as they stand on the disk.
    #[must_use]
    pub fn signature(&self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.id.into_bytes();
        // Kept in the order in which people write it; on the disk it is little-endian.
        [d, c, b, a]
    }

    /// Bytes of the partition `extent` of this disk.
    #[must_use]
    pub const fn bytes(&self, extent: &Extent) -> u64 {
        extent.bytes(self.fitted.geometry.sector)
    }
}

/// Computes and checks the plan. Nothing is written.
///
/// # Errors
/// When no disk, or not exactly one, matches a rule; a disk is too small, in use or read-only; the firmware could not boot
/// the result; the golden tree does not fit. The message names sizes and what is missing.
pub fn plan(layout: &Layout, disks: &[Disk], golden: &Golden, firmware: Firmware) -> Result<Plan> {
    let mut plan = compute(layout, disks, golden)?;
    check_boot(&plan, firmware)?;
    check_space(&mut plan, golden)?;
    Ok(plan)
}

/// The plan without the checks of firmware and space.
pub(super) fn compute(layout: &Layout, disks: &[Disk], golden: &Golden) -> Result<Plan> {
    for (i, partition) in layout.partitions.iter().enumerate() {
        let text = layout.partition_text(i);
        ensure!(!partition.preserve, "{text}: preserve is not supported yet");
        ensure!(!partition.raw, "{text}: raw is not supported yet");
    }
    let chosen = choose(layout, disks)?;
    let mut uuids = Uuids { golden, swaps_seen: 0 };
    let mut plans = Vec::new();
    for (i, index) in chosen.into_iter().enumerate() {
        plans.push(plan_disk(layout, i, &disks[index], &mut uuids)?);
    }
    Ok(Plan { disks: plans })
}

fn plan_disk(layout: &Layout, index: usize, disk: &Disk, uuids: &mut Uuids) -> Result<DiskPlan> {
    let rule = &layout.disks[index];
    ensure!(!disk.read_only, "{disk}, which is [[disk]] `{}`, is read-only", rule.name);
    ensure!(
        disk.in_use.is_empty(),
        "{disk}, which is [[disk]] `{}`, is in use: {}",
        rule.name,
        disk.in_use.join(", ")
    );
    let fitted = fit(layout, index, Geometry { bytes: disk.bytes, sector: disk.sector })
        .with_context(|| format!("fitting the layout to {disk}"))?;
    let id = match (&rule.uuid, rule.table) {
        (Some(text), TableKind::Gpt) => Uuid::try_parse(text).context("reading the disk's uuid")?,
        (Some(text), TableKind::Mbr) => {
            let signature = u32::from_str_radix(text, 16).context("reading the disk's signature")?;
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&signature.to_be_bytes());
            Uuid::from_bytes(bytes)
        }
        (None, _) => Uuid::new_v4(),
    };
    let mut partitions = Vec::new();
    for extent in &fitted.extents {
        let partition = &layout.partitions[extent.index];
        let text = layout.partition_text(extent.index);
        let code =
            types::code(&partition.kind, rule.table).map_err(anyhow::Error::msg).context(text.clone())?;
        let guid = match (&partition.uuid, rule.table) {
            (_, TableKind::Mbr) => None,
            (Some(text), _) => Some(Uuid::try_parse(text).context("reading the partition's uuid")?),
            (None, _) => Some(Uuid::new_v4()),
        };
        let partuuid = guid.map_or_else(
            || format!("{}-{:02x}", &id.simple().to_string()[..8], extent.number),
            |g| g.to_string(),
        );
        let format =
            partition.format.as_ref().map(|f| uuids.resolve(f, partition)).transpose().context(text)?;
        partitions.push(PartitionPlan {
            extent: *extent,
            kind: partition.kind.clone(),
            code,
            name: partition.name.clone(),
            guid,
            partuuid,
            bootable: partition.bootable,
            format,
            mount: partition.mount.clone(),
        });
    }
    Ok(DiskPlan { rule: rule.name.clone(), disk: disk.clone(), fitted, id, partitions })
}

/// Turns `keep` and `new` into UUIDs.
struct Uuids<'a> {
    golden: &'a Golden,
    /// Swap spaces have no path: the first of the layout is the golden machine's first, and so on.
    swaps_seen: usize,
}

impl Uuids<'_> {
    fn resolve(&mut self, format: &Format, partition: &Partition) -> Result<FormatPlan> {
        let kept = self.golden_of(format.fs, partition.mount.as_ref()).and_then(|g| g.uuid.clone());
        let uuid = match format.uuid.as_deref() {
            Some("new") => new_uuid(format.fs),
            Some("keep") => {
                let place = partition.mount.as_ref().map_or("as swap", |m| m.path.as_str());
                let fs = format.fs.name();
                kept.with_context(|| format!("uuid = \"keep\", but the golden machine has no {fs} {place}"))?
            }
            None => kept.unwrap_or_else(|| new_uuid(format.fs)),
            Some(uuid) if format.fs == Fs::Vfat => uuid.to_uppercase(),
            Some(uuid) => uuid.to_lowercase(),
        };
        Ok(FormatPlan { fs: format.fs, uuid, label: format.label.clone(), options: format.options.clone() })
    }

    fn golden_of(&mut self, fs: Fs, mount: Option<&Mount>) -> Option<&GoldenFs> {
        if fs == Fs::Swap {
            self.swaps_seen += 1;
            return self.golden.filesystems.iter().filter(|g| g.fs == Fs::Swap).nth(self.swaps_seen - 1);
        }
        let path = &mount?.path;
        self.golden.filesystems.iter().find(|g| g.fs == fs && g.path.as_ref() == Some(path))
    }
}

fn new_uuid(fs: Fs) -> String {
    let uuid = Uuid::new_v4();
    if fs == Fs::Vfat {
        let [a, b, c, d, ..] = uuid.into_bytes();
        format!("{a:02X}{b:02X}-{c:02X}{d:02X}")
    } else {
        uuid.to_string()
    }
}

/// Whether the firmware will be able to boot what is planned.
fn check_boot(plan: &Plan, firmware: Firmware) -> Result<()> {
    let find = |path: &str| {
        plan.disks
            .iter()
            .find(|d| d.partitions.iter().any(|p| p.mount.as_ref().is_some_and(|m| m.path == path)))
    };
    let Some(root) = find("/") else { bail!("the layout mounts nothing at /") };
    match firmware {
        Firmware::Uefi => {
            let esp =
                plan.disks.iter().flat_map(|d| d.partitions.iter().map(move |p| (d, p))).find(|(d, p)| {
                    types::is_esp(&p.kind, d.fitted.table)
                        && p.format.as_ref().is_some_and(|f| f.fs == Fs::Vfat)
                        && p.mount.is_some()
                });
            ensure!(
                esp.is_some(),
                "this machine booted by UEFI, but the layout has no partition of type esp with vfat that is mounted"
            );
        }
        Firmware::Bios => {
            let boot = find("/boot").unwrap_or(root);
            ensure!(
                boot.disk.sector == 512,
                "this machine booted by BIOS, which cannot boot from {}: its sectors have {} bytes (UEFI can)",
                boot.disk,
                boot.disk.sector
            );
            ensure!(
                boot.fitted.table == TableKind::Mbr
                    || boot.partitions.iter().any(|p| types::is_bios_boot(&p.kind, TableKind::Gpt)),
                "this machine booted by BIOS, but the layout has no partition of type bios-boot on [[disk]] `{}`, which \
                 GRUB needs on gpt",
                boot.rule
            );
        }
    }
    Ok(())
}

/// What an empty file system of this kind and size takes for itself, estimated on the safe side.
fn overhead(fs: Fs, bytes: u64, inodes: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    match fs {
        // Inode tables, bitmaps and descriptors (1/64 for an inode of 256 bytes every 16 KiB), and the journal.
        Fs::Ext2 => bytes / 50,
        Fs::Ext3 | Fs::Ext4 => bytes / 50 + (bytes / 32).clamp(4 * MIB, 1024 * MIB),
        // The log, the free-space trees, and inodes of 512 bytes.
        Fs::Xfs => (bytes / 2048).max(64 * MIB) + bytes / 100 + inodes * 512,
        // Metadata is kept twice.
        Fs::Btrfs => 100 * MIB + bytes / 50 + inodes * 2048,
        Fs::Vfat => bytes / 100 + MIB,
        Fs::Swap => 0,
    }
}

/// Whether each file system holds what the golden machine has there; more inodes are asked of mke2fs where the tree has
/// more files than it would provide for.
fn check_space(plan: &mut Plan, golden: &Golden) -> Result<()> {
    let mounts: Vec<String> = plan
        .disks
        .iter()
        .flat_map(|d| d.partitions.iter().filter_map(|p| p.mount.as_ref().map(|m| m.path.clone())))
        .collect();
    // A tree below a path that the layout does not mount lies in the file system above it.
    let mut needs: BTreeMap<&str, Used> = BTreeMap::new();
    for (path, used) in &golden.used {
        let Some(mount) = mounts.iter().filter(|m| is_below(path, m)).max_by_key(|m| m.len()) else {
            continue;
        };
        let sum = needs.entry(mount).or_default();
        sum.bytes = sum.bytes.saturating_add(used.bytes);
        sum.inodes = sum.inodes.saturating_add(used.inodes);
    }
    for disk in &mut plan.disks {
        let sector = disk.fitted.geometry.sector;
        for partition in &mut disk.partitions {
            let (Some(mount), Some(format)) = (&partition.mount, &mut partition.format) else { continue };
            let Some(used) = needs.get(mount.path.as_str()) else { continue };
            let bytes = partition.extent.bytes(sector);
            let available = bytes.saturating_sub(overhead(format.fs, bytes, used.inodes));
            ensure!(
                used.bytes <= available,
                "the golden tree needs {} in {}, but partition {} of {} ({} of {}) holds only {}: {} are missing",
                show_size(used.bytes),
                mount.path,
                partition.extent.number,
                disk.disk.device.display(),
                show_size(bytes),
                format.fs.name(),
                show_size(available),
                show_size(used.bytes - available)
            );
            let ext = matches!(format.fs, Fs::Ext2 | Fs::Ext3 | Fs::Ext4);
            let decided =
                format.options.iter().any(|o| o.starts_with("-N") || o.starts_with("-i") || o == "-T");
            let wanted = used.inodes + used.inodes / 4 + 1000;
            if ext && !decided && wanted > bytes / 16384 {
                format.options.extend(["-N".to_owned(), wanted.to_string()]);
            }
        }
    }
    Ok(())
}

fn is_below(path: &str, mount: &str) -> bool {
    mount == "/" || path.strip_prefix(mount).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for disk in &self.disks {
            let table = if disk.fitted.table == TableKind::Gpt { "gpt" } else { "mbr" };
            writeln!(
                f,
                "disk `{}` is {}; everything on it is replaced by a {table} table:",
                disk.rule, disk.disk
            )?;
            if !disk.disk.partitions.is_empty() {
                let old: Vec<String> = disk
                    .disk
                    .partitions
                    .iter()
                    .map(|p| format!("{} ({})", p.device.display(), show_size(p.bytes)))
                    .collect();
                writeln!(f, "  now there, to be erased: {}", old.join(", "))?;
            }
            writeln!(
                f,
                "  {:>3} {:>12} {:>12} {:>9}  {:<18} content",
                "no", "first", "last", "size", "type"
            )?;
            for p in &disk.partitions {
                write!(
                    f,
                    "  {:>3} {:>12} {:>12} {:>9}  {:<18}",
                    p.extent.number,
                    p.extent.first,
                    p.extent.last,
                    show_size(disk.bytes(&p.extent)),
                    p.kind
                )?;
                match &p.format {
                    Some(format) => {
                        write!(f, " {} {}", format.fs.name(), format.uuid)?;
                        if let Some(label) = &format.label {
                            write!(f, " \"{label}\"")?;
                        }
                    }
                    None => f.write_str(" empty")?,
                }
                if let Some(mount) = &p.mount {
                    write!(f, " at {}", mount.path)?;
                }
                if p.bootable {
                    f.write_str(" (bootable)")?;
                }
                writeln!(f)?;
            }
            if let Some(e) = &disk.fitted.extended {
                writeln!(f, "  {:>3} {:>12} {:>12} {:>9}  extended", e.number, e.first, e.last, "")?;
            }
        }
        Ok(())
    }
}
