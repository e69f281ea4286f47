//! The whole plan, computed and checked before the first byte is written: which disk, where each partition lies, what is
//! made in it, and whether the golden tree fits.

use super::choose::choose;
use super::discover::Disk;
use super::kept;
use super::leftovers;
use super::stack::{self, VolumePlan};
use super::superblock::{self, Found};
use anyhow::{Context, Result, bail, ensure};
use gpt::partition::PartitionAttributes;
use ka_cli::units::show_size;
use ka_layout::fit::{Extent, Fitted, Geometry, Kept, fit_keeping};
use ka_layout::model::{Content, Format, Fs, Layout, Mount, Partition, Subvolume, TableKind};
use ka_layout::order::{Firmware, Golden, GoldenFs, RawContent, Used};
use ka_layout::types::{self, TypeCode};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use uuid::Uuid;

/// Everything that will be done to this machine's disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The disks, in the layout's order.
    pub disks: Vec<DiskPlan>,
    /// The volumes on top of their partitions, in the order in which they are made.
    pub volumes: Vec<VolumePlan>,
}

impl Plan {
    /// What is made in every partition and volume.
    pub fn contents(&self) -> impl Iterator<Item = &ContentPlan> {
        let partitions = self.disks.iter().flat_map(|d| d.partitions.iter().map(|p| &p.content));
        partitions.chain(self.volumes.iter().map(|v| &v.content))
    }

    /// The disks below what is mounted at `path`, as indices.
    fn disks_under(&self, path: &str) -> Option<Vec<usize>> {
        let holds = |c: &ContentPlan| c.mounts.iter().any(|m| m.path == path);
        let disk = self.disks.iter().position(|d| d.partitions.iter().any(|p| holds(&p.content)));
        let volume = || self.volumes.iter().find(|v| holds(&v.content)).map(|v| v.disks.clone());
        disk.map(|d| vec![d]).or_else(volume)
    }
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
    /// The attributes of a GPT entry.
    pub attributes: u64,
    /// What is made in it.
    pub content: ContentPlan,
    /// It stands already and is kept, with all its content.
    pub preserve: bool,
    /// The file system that a preserved partition holds.
    pub found: Option<Found>,
    /// What is sent into it block for block.
    pub raw: Option<RawContent>,
}

impl PartitionPlan {
    /// The file system in it: the one that is made, or the one that is kept.
    #[must_use]
    pub fn fs(&self) -> Option<Fs> {
        self.content.format.as_ref().map(|f| f.fs).or(self.found.as_ref().map(|f| f.fs))
    }

    /// Its UUID, or that of the file system which raw content brings.
    #[must_use]
    pub fn uuid(&self) -> Option<&str> {
        let made = self.content.format.as_ref().map(|f| f.uuid.as_str());
        let found = self.found.as_ref().map(|f| f.uuid.as_str());
        made.or(found).or(self.raw.as_ref().and_then(|r| r.uuid.as_deref()))
    }

    /// Its label.
    #[must_use]
    pub fn label(&self) -> Option<&str> {
        let made = self.content.format.as_ref().and_then(|f| f.label.as_deref());
        let found = self.found.as_ref().and_then(|f| f.label.as_deref());
        made.or(found).or(self.raw.as_ref().and_then(|r| r.label.as_deref()))
    }
}

/// What is made in a partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContentPlan {
    /// The file system.
    pub format: Option<FormatPlan>,
    /// The subvolumes of a btrfs.
    pub subvolumes: Vec<Subvolume>,
    /// Every place where the clone mounts it or a subvolume of it.
    pub mounts: Vec<Mount>,
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

impl ContentPlan {
    fn is_subvolume(&self, mount: &Mount) -> bool {
        self.subvolumes.iter().any(|s| s.path.as_ref() == Some(&mount.path))
    }

    /// For people, with a blank before: ` ext4 UUID "label" at /`.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        if let Some(format) = &self.format {
            text.push_str(&format!(" {} {}", format.fs.name(), format.uuid));
            if let Some(label) = &format.label {
                text.push_str(&format!(" \"{label}\""));
            }
        }
        for mount in self.mounts.iter().filter(|m| !self.is_subvolume(m)) {
            text.push_str(&format!(" at {}", mount.path));
        }
        if !self.subvolumes.is_empty() {
            text.push_str(&format!(" with {}", self.subvolume_text()));
        }
        text
    }

    /// The subvolumes for people: `@ at /, @home at /home`.
    fn subvolume_text(&self) -> String {
        let one = |s: &Subvolume| match &s.path {
            Some(path) => format!("{} at {path}", s.name),
            None => s.name.clone(),
        };
        self.subvolumes.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

impl DiskPlan {
    /// The plan of a table with the preserved partitions alone; none when there are none. Logical partitions are counted
    /// along their chain, so those before a preserved one stand in it too, that it keeps its number.
    #[must_use]
    pub fn kept_alone(&self) -> Option<Self> {
        let preserved = || self.partitions.iter().filter(|p| p.preserve).map(|p| p.extent.number);
        let chain = preserved().max().filter(|_| self.fitted.table == TableKind::Mbr).unwrap_or_default();
        let kept = |number: u32| preserved().any(|n| n == number) || (number > 4 && number <= chain);
        let mut plan = self.clone();
        plan.partitions.retain(|p| kept(p.extent.number));
        plan.partitions.iter_mut().filter(|p| !p.preserve).for_each(|p| p.bootable = false);
        plan.fitted.extents.retain(|e| kept(e.number));
        if !plan.fitted.extents.iter().any(|e| e.number > 4) {
            plan.fitted.extended = None;
        }
        (!plan.partitions.is_empty()).then_some(plan)
    }

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
    let chosen = choose(layout, disks)?;
    leftovers::check_within(&chosen.iter().map(|i| &disks[*i]).collect::<Vec<_>>())?;
    let mut uuids = Uuids { golden, swaps_seen: 0 };
    let mut plans = Vec::new();
    for (i, index) in chosen.into_iter().enumerate() {
        plans.push(plan_disk(layout, i, &disks[index], &mut uuids)?);
    }
    let volumes = stack::plan(layout, &plans, &mut uuids)?;
    let plan = Plan { disks: plans, volumes };
    check_unique(&plan)?;
    Ok(plan)
}

/// What is made bears no name of what is preserved: else the clone could take the one for the other.
pub(super) fn check_unique(plan: &Plan) -> Result<()> {
    let partitions = || plan.disks.iter().flat_map(|d| &d.partitions);
    for kept in partitions().filter(|p| p.preserve) {
        let number = kept.extent.number;
        let uuid = kept.uuid().unwrap_or_default();
        let made =
            plan.contents().find(|c| c.format.as_ref().is_some_and(|f| f.uuid.eq_ignore_ascii_case(uuid)));
        if let Some(made) = made {
            let place = made.mounts.first().map_or("swap", |m| m.path.as_str());
            bail!(
                "preserve: the file system of partition {number} has the UUID {uuid}, which {place} is to get: say uuid = \
                 \"new\" there"
            );
        }
        let twin = partitions().find(|p| p.partuuid == kept.partuuid && p.extent.index != kept.extent.index);
        if let Some(twin) = twin {
            bail!(
                "preserve: partition {number} has the UUID {}, which partition {} is to get",
                kept.partuuid,
                twin.extent.number
            );
        }
    }
    Ok(())
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
    let standing = match layout.partitions_of(index).find(|(_, p)| p.preserve) {
        Some((i, _)) => Some(
            kept::read(&disk.device, disk.sector, rule.table)
                .with_context(|| format!("{}: preserve", layout.partition_text(i)))?,
        ),
        None => None,
    };
    let entries: &[kept::Entry] = standing.as_ref().map_or(&[], |s| &s.entries);
    let places: Vec<Kept> = entries.iter().map(|e| e.place).collect();
    let geometry = Geometry { bytes: disk.bytes, sector: disk.sector };
    let fitted = fit_keeping(layout, index, geometry, &places)
        .with_context(|| format!("fitting the layout to {disk}"))?;
    let id = match (&rule.uuid, rule.table) {
        (None, _) if standing.is_some() => standing.as_ref().map(|s| s.id).unwrap_or_default(),
        (Some(text), TableKind::Gpt) => Uuid::try_parse(text).context("reading the disk's uuid")?,
        (Some(text), TableKind::Mbr) => {
            let signature = u32::from_str_radix(text, 16).context("reading the disk's signature")?;
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&signature.to_be_bytes());
            Uuid::from_bytes(bytes)
        }
        (None, _) => Uuid::new_v4(),
    };
    if let Some(standing) = standing
        .as_ref()
        .filter(|s| rule.table == TableKind::Mbr && s.id.as_bytes()[..4] != id.as_bytes()[..4])
    {
        bail!(
            "[[disk]] `{}`: uuid would change the signature {} of {disk}, and with it the PARTUUID of what is preserved",
            rule.name,
            &standing.id.simple().to_string()[..8]
        );
    }
    let mut partitions = Vec::new();
    for extent in &fitted.extents {
        let partition = &layout.partitions[extent.index];
        let text = layout.partition_text(extent.index);
        let code =
            types::code(&partition.kind, rule.table).map_err(anyhow::Error::msg).context(text.clone())?;
        if partition.preserve {
            let entry = entries.iter().find(|e| e.place.number == extent.number);
            let entry = entry.with_context(|| format!("{text}: preserve: it is not there"))?;
            partitions.push(preserved(partition, entry, code, *extent, disk, id).context(text)?);
            continue;
        }
        let guid = match (&partition.uuid, rule.table) {
            (_, TableKind::Mbr) => None,
            (Some(text), _) => Some(Uuid::try_parse(text).context("reading the partition's uuid")?),
            (None, _) => Some(Uuid::new_v4()),
        };
        let partuuid = partuuid(guid, id, extent.number);
        let content = uuids.content(partition.content()).context(text.clone())?;
        let raw =
            if partition.raw { Some(raw_content(uuids.golden, *extent, disk).context(text)?) } else { None };
        partitions.push(PartitionPlan {
            extent: *extent,
            kind: partition.kind.clone(),
            code,
            name: partition.name.clone(),
            guid,
            partuuid,
            bootable: partition.bootable,
            attributes: if partition.bootable { PartitionAttributes::BOOTABLE.bits() } else { 0 },
            content,
            preserve: false,
            found: None,
            raw,
        });
    }
    Ok(DiskPlan { rule: rule.name.clone(), disk: disk.clone(), fitted, id, partitions })
}

/// What the server sends into a partition, once it is known and fits.
fn raw_content(golden: &Golden, extent: Extent, disk: &Disk) -> Result<RawContent> {
    let content = golden.raw.iter().find(|r| r.index == extent.index);
    let content = content.context("raw: the server does not say what comes into it")?;
    let room = extent.bytes(disk.sector);
    ensure!(
        content.bytes <= room,
        "raw: its content has {}, but partition {} of {} only {}: {} are missing",
        show_size(content.bytes),
        extent.number,
        disk.device.display(),
        show_size(room),
        show_size(content.bytes - room)
    );
    Ok(content.clone())
}

fn partuuid(guid: Option<Uuid>, disk: Uuid, number: u32) -> String {
    guid.map_or_else(|| format!("{}-{number:02x}", &disk.simple().to_string()[..8]), |g| g.to_string())
}

/// A partition that is kept: its entry as it stands, once it is what the layout says.
fn preserved(
    partition: &Partition,
    entry: &kept::Entry,
    code: TypeCode,
    extent: Extent,
    disk: &Disk,
    id: Uuid,
) -> Result<PartitionPlan> {
    let number = extent.number;
    ensure!(
        entry.code == code,
        "preserve: partition {number} of {disk} has the type {}, not {}",
        types::name(entry.code),
        partition.kind
    );
    let partuuid = partuuid(entry.guid, id, number);
    if let Some(wanted) = &partition.uuid {
        ensure!(
            partuuid.eq_ignore_ascii_case(wanted),
            "preserve: partition {number} of {disk} has the UUID {partuuid}, not {wanted}"
        );
    }
    let known = disk.partitions.iter().find(|p| p.number == number);
    let known = known.with_context(|| format!("preserve: the kernel does not know partition {number}"))?;
    let sector = u64::from(disk.sector);
    ensure!(
        (known.start, known.bytes) == (extent.first * sector, extent.bytes(disk.sector)),
        "preserve: the kernel has partition {number} at {}+{}, the table at {}+{}",
        known.start,
        known.bytes,
        extent.first * sector,
        extent.bytes(disk.sector)
    );
    let found = File::open(&known.device)
        .and_then(|file| superblock::read(&file))
        .with_context(|| format!("preserve: reading {}", known.device.display()))?;
    if let Some(mount) = &partition.mount {
        ensure!(
            found.as_ref().is_some_and(|f| f.fs != Fs::Swap),
            "preserve: {} holds no file system that is known here, so it cannot be mounted at {}",
            known.device.display(),
            mount.path
        );
    }
    Ok(PartitionPlan {
        extent,
        kind: partition.kind.clone(),
        code,
        name: entry.name.clone(),
        guid: entry.guid,
        partuuid,
        bootable: entry.bootable,
        attributes: entry.attributes,
        content: ContentPlan { mounts: partition.content().mounts(), ..ContentPlan::default() },
        preserve: true,
        found,
        raw: None,
    })
}

/// Turns `keep` and `new` into UUIDs.
pub(super) struct Uuids<'a> {
    golden: &'a Golden,
    /// Swap spaces have no path: the first of the layout is the golden machine's first, and so on.
    swaps_seen: usize,
}

impl Uuids<'_> {
    pub(super) fn content(&mut self, content: Content<'_>) -> Result<ContentPlan> {
        let mounts = content.mounts();
        let format = content.format.map(|f| self.resolve(f, &mounts)).transpose()?;
        Ok(ContentPlan { format, subvolumes: content.subvolumes.to_vec(), mounts })
    }

    fn resolve(&mut self, format: &Format, mounts: &[Mount]) -> Result<FormatPlan> {
        let kept = self.golden_of(format.fs, mounts).and_then(|g| g.uuid.clone());
        let uuid = match format.uuid.as_deref() {
            Some("new") => new_uuid(format.fs),
            Some("keep") => {
                let place = mounts.first().map_or("as swap", |m| m.path.as_str());
                let fs = format.fs.name();
                kept.with_context(|| format!("uuid = \"keep\", but the golden machine has no {fs} {place}"))?
            }
            None => kept.unwrap_or_else(|| new_uuid(format.fs)),
            Some(uuid) if format.fs == Fs::Vfat => uuid.to_uppercase(),
            Some(uuid) => uuid.to_lowercase(),
        };
        Ok(FormatPlan { fs: format.fs, uuid, label: format.label.clone(), options: format.options.clone() })
    }

    fn golden_of(&mut self, fs: Fs, mounts: &[Mount]) -> Option<&GoldenFs> {
        if fs == Fs::Swap {
            self.swaps_seen += 1;
            return self.golden.filesystems.iter().filter(|g| g.fs == Fs::Swap).nth(self.swaps_seen - 1);
        }
        let of = |path: &str| {
            self.golden.filesystems.iter().find(|g| g.fs == fs && g.path.as_deref() == Some(path))
        };
        mounts.iter().find_map(|m| of(&m.path))
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
    let Some(root) = plan.disks_under("/") else { bail!("the layout mounts nothing at /") };
    match firmware {
        Firmware::Uefi => {
            let esp =
                plan.disks.iter().flat_map(|d| d.partitions.iter().map(move |p| (d, p))).find(|(d, p)| {
                    types::is_esp(&p.kind, d.fitted.table)
                        && p.fs() == Some(Fs::Vfat)
                        && !p.content.mounts.is_empty()
                });
            ensure!(
                esp.is_some(),
                "this machine booted by UEFI, but the layout has no partition of type esp with vfat that is mounted"
            );
        }
        Firmware::Bios => {
            for boot in
                plan.disks_under("/boot").unwrap_or(root).into_iter().filter_map(|i| plan.disks.get(i))
            {
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
    let mounts: Vec<String> = plan.contents().flat_map(|c| c.mounts.iter().map(|m| m.path.clone())).collect();
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
            let bytes = partition.extent.bytes(sector);
            let text = format!("partition {} of {}", partition.extent.number, disk.disk.device.display());
            check_content(&mut partition.content, bytes, &text, &needs)?;
        }
    }
    for volume in &mut plan.volumes {
        check_content(&mut volume.content, volume.bytes, &volume.text, &needs)?;
    }
    Ok(())
}

/// Whether the file system in `text`, of `bytes` bytes, holds what is mounted from it.
fn check_content(
    content: &mut ContentPlan,
    bytes: u64,
    text: &str,
    needs: &BTreeMap<&str, Used>,
) -> Result<()> {
    let ContentPlan { mounts, format: Some(format), .. } = content else { return Ok(()) };
    // Subvolumes share the space of their file system.
    let mut used = Used::default();
    for need in mounts.iter().filter_map(|m| needs.get(m.path.as_str())) {
        used.bytes = used.bytes.saturating_add(need.bytes);
        used.inodes = used.inodes.saturating_add(need.inodes);
    }
    if used == Used::default() {
        return Ok(());
    }
    let available = bytes.saturating_sub(overhead(format.fs, bytes, used.inodes));
    ensure!(
        used.bytes <= available,
        "the golden tree needs {} in {}, but {text} ({} of {}) holds only {}: {} are missing",
        show_size(used.bytes),
        mounts.iter().map(|m| m.path.as_str()).collect::<Vec<_>>().join(" and "),
        show_size(bytes),
        format.fs.name(),
        show_size(available),
        show_size(used.bytes - available)
    );
    let ext = matches!(format.fs, Fs::Ext2 | Fs::Ext3 | Fs::Ext4);
    let decided = format.options.iter().any(|o| o.starts_with("-N") || o.starts_with("-i") || o == "-T");
    let wanted = used.inodes + used.inodes / 4 + 1000;
    if ext && !decided && wanted > bytes / 16384 {
        format.options.extend(["-N".to_owned(), wanted.to_string()]);
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
            let kept = |number: u32| disk.partitions.iter().any(|p| p.preserve && p.extent.number == number);
            let but = if disk.kept_alone().is_some() { " but what is preserved" } else { "" };
            writeln!(
                f,
                "disk `{}` is {}; everything on it{but} is replaced by a {table} table:",
                disk.rule, disk.disk
            )?;
            for leftover in &disk.disk.leftovers {
                writeln!(f, "  to be closed: {}", leftover.text)?;
            }
            if disk.disk.partitions.iter().any(|p| !kept(p.number)) {
                let old: Vec<String> = disk
                    .disk
                    .partitions
                    .iter()
                    .filter(|p| !kept(p.number))
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
                match &p.found {
                    Some(found) => write!(f, " preserved: {} {}", found.fs.name(), found.uuid)?,
                    None if p.raw.is_some() => {
                        write!(
                            f,
                            " raw: {} from the stream",
                            show_size(p.raw.as_ref().map_or(0, |r| r.bytes))
                        )?;
                    }
                    None if p.preserve => f.write_str(" preserved")?,
                    None if p.content.format.is_none() => f.write_str(" empty")?,
                    None => {}
                }
                f.write_str(&p.content.text())?;
                if p.bootable {
                    f.write_str(" (bootable)")?;
                }
                writeln!(f)?;
            }
            if let Some(e) = &disk.fitted.extended {
                writeln!(f, "  {:>3} {:>12} {:>12} {:>9}  extended", e.number, e.first, e.last, "")?;
            }
        }
        if !self.volumes.is_empty() {
            writeln!(f, "on these partitions:")?;
        }
        for volume in &self.volumes {
            writeln!(f, "{}", volume.line())?;
        }
        Ok(())
    }
}
