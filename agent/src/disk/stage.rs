//! Carrying the plan out, step by step: [`Plan::partition`] -> [`Partitioned::format`] -> [`Formatted`]. Until
//! [`Formatted::commit_table`] no table stands on the disk; the kernel knows the partitions by BLKPG alone.

use super::assemble::{self, Assembled, Keys};
use super::discover::{Disk, KernelPartition, discover, kernel_partitions};
use super::plan::{ContentPlan, DiskPlan, PartitionPlan, Plan};
use super::raw::RawPlace;
use super::stack::{self, VolumePlan};
use super::wipe::{self, Area};
use super::{btrfs, gpt_table, kept, leftovers, mbr_table, mkfs, superblock};
use anyhow::{Context, Result, bail, ensure};
use ka_layout::model::{Fs, TableKind};
use ka_layout::order::Volume;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where the disks under installation are listed, one path a line, for the supervisor.
pub const RECORD: &str = "/run/ka/disks";
/// How long to wait for somebody else's lock on a disk, and for device nodes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A disk that is being installed, locked while this lives.
struct Open {
    plan: DiskPlan,
    file: File,
    /// The table with the preserved partitions alone.
    kept: Option<Vec<kept::Piece>>,
    /// The device nodes of the plan's partitions, in the plan's order.
    devices: Vec<PathBuf>,
}

/// The disks are empty and the kernel knows the new partitions.
pub struct Partitioned {
    disks: Vec<Open>,
    volumes: Vec<VolumePlan>,
    keys: Keys,
    record: PathBuf,
}

/// The file systems are made and mounted.
pub struct Formatted {
    disks: Vec<Open>,
    volumes: Vec<VolumePlan>,
    record: PathBuf,
    // Dropped in this order: what is mounted lies on what was assembled.
    mounts: Mounts,
    assembled: Assembled,
}

/// What is mounted, in order; unmounted in reverse when it is dropped without [`Formatted::finish`].
#[derive(Default)]
pub(super) struct Mounts(pub(super) Vec<PathBuf>);

impl Drop for Mounts {
    fn drop(&mut self) {
        while let Some(place) = self.0.pop() {
            if let Err(e) = ka_sys::mount::unmount(&place).or_else(|_| ka_sys::mount::unmount_lazy(&place)) {
                log::error!("unmounting {}: {e}", place.display());
            }
        }
    }
}

impl Plan {
    /// Step `disk`: locks the disks, records them in `record`, wipes every signature and table, and tells the kernel of the
    /// new partitions. From here on the disks cannot boot. `keys` are those of the encrypted containers.
    ///
    /// # Errors
    /// When a disk is in use or locked by another, cannot be written, or a program for a file system is missing. Nothing
    /// was written if a check failed.
    pub fn partition(self, record: &Path, keys: &Keys) -> Result<Partitioned> {
        // What an earlier try left listed is none of this one's business, above all if a check below fails.
        remove_record(record)?;
        mkfs::check_tools(self.contents().filter_map(|c| c.format.as_ref()))?;
        btrfs::check_tools(self.contents())?;
        assemble::check(&self.volumes, keys)?;
        let now = without_leftovers(&self).context("looking at the disks once more")?;
        for warning in duplicate_uuids(&self, &now) {
            log::warn!("{warning}");
        }
        let mut opened = Vec::new();
        for plan in self.disks {
            let disk = &plan.disk;
            // Time has passed since the plan was made: it must still be the same disk, and unused.
            let current = now.iter().find(|d| d.name == disk.name);
            let current = current.with_context(|| format!("{disk} is gone"))?;
            ensure!(
                (current.bytes, current.sector, &current.serial) == (disk.bytes, disk.sector, &disk.serial),
                "{} is another disk than the plan was made for: {disk} was, {current} is",
                disk.device.display()
            );
            ensure!(current.in_use.is_empty(), "{disk} is in use: {}", current.in_use.join(", "));
            let file = open_disk(&disk.device)?;
            ensure!(
                ka_sys::block::size(&file).context("asking the disk's size")? == disk.bytes,
                "{} is not what sysfs says",
                disk.device.display()
            );
            check_kept(&plan)?;
            opened.push((Open { plan, file, kept: None, devices: Vec::new() }, current.partitions.clone()));
        }
        for (open, _) in &mut opened {
            let name = open.plan.disk.device.display().to_string();
            open.kept = keep(open).with_context(|| format!("keeping what is preserved on {name}"))?;
        }
        write_record(record, opened.iter().map(|(open, _)| open))?;
        let mut disks = Vec::new();
        for (mut open, old) in opened {
            let name = open.plan.disk.device.display().to_string();
            empty(&open, &old).with_context(|| format!("emptying {name}"))?;
            open.devices = tell_kernel(&open).with_context(|| format!("partitioning {name}"))?;
            disks.push(open);
        }
        Ok(Partitioned { disks, volumes: self.volumes, keys: keys.clone(), record: record.to_path_buf() })
    }
}

/// The disks of this machine, once volumes of a former life that nobody uses no longer hold those of the plan.
fn without_leftovers(plan: &Plan) -> Result<Vec<Disk>> {
    let now = discover()?;
    let is_planned = |d: &&Disk| plan.disks.iter().any(|p| p.disk.name == d.name) && d.in_use.is_empty();
    let planned: Vec<&Disk> = now.iter().filter(is_planned).collect();
    leftovers::check_within(&planned)?;
    let leftovers: Vec<_> = planned.iter().flat_map(|d| d.leftovers.clone()).collect();
    if leftovers.is_empty() {
        return Ok(now);
    }
    leftovers::close(&leftovers)?;
    discover()
}

/// File systems on other disks that carry a UUID of the plan: what is mounted by that UUID could be either.
pub(super) fn duplicate_uuids(plan: &Plan, disks: &[Disk]) -> Vec<String> {
    let planned: Vec<&str> =
        plan.contents().filter_map(|c| c.format.as_ref()).map(|f| f.uuid.as_str()).collect();
    let others = disks.iter().filter(|d| plan.disks.iter().all(|p| p.disk.name != d.name));
    let mut warnings = Vec::new();
    for partition in others.flat_map(|d| &d.partitions) {
        // A partition that cannot be read (an empty card reader) holds nothing that could be confused.
        let found = File::open(&partition.device).ok().and_then(|f| superblock::read(&f).ok().flatten());
        if let Some(found) = found.filter(|f| planned.iter().any(|uuid| uuid.eq_ignore_ascii_case(&f.uuid))) {
            warnings.push(format!(
                "{} on another disk has the UUID {} that is about to be used: the clone may mount the wrong one",
                partition.device.display(),
                found.uuid
            ));
        }
    }
    warnings
}

/// Opens a disk for writing, with the lock that udev respects, after making sure that nobody has claimed it.
fn open_disk(device: &Path) -> Result<File> {
    let open = |exclusive: bool| {
        let flags = if exclusive { nix::libc::O_EXCL } else { 0 };
        File::options().read(true).write(true).custom_flags(flags | nix::libc::O_CLOEXEC).open(device)
    };
    // O_EXCL fails while a file system, swap, md or dm holds the disk or a partition. It is not kept: our own mounts would
    // fail too.
    drop(open(true).with_context(|| format!("opening {} for us alone", device.display()))?);
    let file = open(false).with_context(|| format!("opening {}", device.display()))?;
    ka_sys::block::lock_exclusive(&file, PATIENCE)
        .with_context(|| format!("locking {}: another program works on it", device.display()))?;
    Ok(file)
}

fn remove_record(record: &Path) -> Result<()> {
    match fs::remove_file(record) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", record.display()))
        }
        _ => Ok(()),
    }
}

/// What the plan keeps must still stand as it did when the plan was made.
fn check_kept(plan: &DiskPlan) -> Result<()> {
    let Some(alone) = plan.kept_alone() else { return Ok(()) };
    let disk = &plan.disk;
    let standing = kept::read(&disk.device, disk.sector, plan.fitted.table)?;
    for p in alone.partitions.iter().filter(|p| p.preserve) {
        let same = standing.entries.iter().any(|e| {
            (e.place.number, e.place.first, e.place.last) == (p.extent.number, p.extent.first, p.extent.last)
                && (e.code, e.guid, &e.name) == (p.code, p.guid, &p.name)
        });
        ensure!(
            same,
            "partition {} of {disk} is no longer what it was when the plan was made",
            p.extent.number
        );
    }
    Ok(())
}

/// Puts the table with the preserved partitions alone in the place of the old one; its bytes come back. It boots no clone,
/// and it stands until the final one is written, and again after a failure.
fn keep(open: &mut Open) -> Result<Option<Vec<kept::Piece>>> {
    let Some(alone) = open.plan.kept_alone() else { return Ok(None) };
    write_table(&mut open.file, &alone)?;
    ka_sys::block::flush_buffers(&open.file).context("dropping the disk's cache")?;
    let mut pieces = Vec::new();
    for area in table_areas(&alone) {
        let mut bytes = vec![0; usize::try_from(area.bytes).context("the table's size")?];
        open.file.read_exact_at(&mut bytes, area.start).context("reading the table back")?;
        pieces.push((area.start, bytes));
    }
    Ok(Some(pieces))
}

fn write_table(file: &mut File, plan: &DiskPlan) -> Result<()> {
    match plan.fitted.table {
        TableKind::Gpt => gpt_table::write(file, plan),
        TableKind::Mbr => mbr_table::write(file, plan),
    }
}

/// Where the table of `plan` stands on its disk.
fn table_areas(plan: &DiskPlan) -> Vec<Area> {
    let sector = u64::from(plan.fitted.geometry.sector);
    match plan.fitted.table {
        // MBR, header and 128 entries; the backup is the same without the MBR.
        TableKind::Gpt => {
            let backup = 16384 + sector;
            vec![
                Area { start: 0, bytes: 16384 + 2 * sector },
                Area { start: plan.fitted.geometry.bytes - backup, bytes: backup },
            ]
        }
        TableKind::Mbr => {
            let logical = plan.fitted.extents.iter().filter(|e| e.number > 4);
            let records = logical.map(|e| plan.fitted.ebr_of(e));
            std::iter::once(0).chain(records).map(|at| Area { start: at * sector, bytes: sector }).collect()
        }
    }
}

fn write_record<'a>(record: &Path, disks: impl Iterator<Item = &'a Open>) -> Result<()> {
    if let Some(parent) = record.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    let mut text = String::new();
    for open in disks {
        text.push_str(&open.plan.disk.device.display().to_string());
        if let Some(pieces) = &open.kept {
            let path =
                record.with_file_name(format!("kept-{}", open.plan.disk.name.replace(['/', '!'], "-")));
            kept::save(&path, pieces)?;
            text.push_str(&format!("\t{}", path.display()));
        }
        text.push('\n');
    }
    fs::write(record, text).with_context(|| format!("writing {}", record.display()))
}

fn empty(open: &Open, old: &[KernelPartition]) -> Result<()> {
    let whole = Area { start: 0, bytes: open.plan.disk.bytes };
    let mut areas = vec![whole];
    let alone = open.plan.kept_alone();
    let sector = u64::from(open.plan.fitted.geometry.sector);
    let area = |p: &PartitionPlan| Area {
        start: p.extent.first * sector,
        bytes: p.extent.bytes(open.plan.fitted.geometry.sector),
    };
    let preserved = open.plan.partitions.iter().filter(|p| p.preserve).map(area);
    let kept: Vec<Area> = preserved.chain(alone.iter().flat_map(table_areas)).collect();
    for partition in old {
        let area = Area { start: partition.start, bytes: partition.bytes };
        // An old extended partition may begin with a boot record of the table that stands there now.
        if !kept.iter().any(|k| k.overlaps(area)) {
            wipe::wipefs(&partition.device)?;
        }
        areas.push(area);
    }
    for partition in old {
        ka_sys::block::delete_partition(&open.file, partition.number)
            .with_context(|| format!("making the kernel forget {}", partition.name))?;
    }
    // What looks like a signature at the end of the disk could be the content of a preserved partition.
    if alone.is_none() {
        wipe::wipefs(&open.plan.disk.device)?;
    }
    // New partitions lie elsewhere than the old ones, perhaps on what an even older table had there.
    areas.extend(open.plan.partitions.iter().map(area));
    areas.retain(|a| a.start + a.bytes <= whole.bytes);
    wipe::zero_ends(&open.file, &areas, &kept)?;
    wipe::verify_empty(&open.file, &areas, &kept)
}

/// Adds the partitions with BLKPG and waits for their nodes, whose names come from the kernel.
fn tell_kernel(open: &Open) -> Result<Vec<PathBuf>> {
    let sector = u64::from(open.plan.fitted.geometry.sector);
    let add = |number: u32, start: u64, bytes: u64| {
        ka_sys::block::add_partition(&open.file, number, start, bytes)
            .with_context(|| format!("telling the kernel of partition {number} ({start}+{bytes})"))
    };
    if let Some(extended) = &open.plan.fitted.extended {
        // As the kernel itself shows an extended partition: just long enough for a boot loader.
        add(extended.number, extended.first * sector, sector.max(1024))?;
    }
    for p in &open.plan.partitions {
        add(p.extent.number, p.extent.first * sector, p.extent.bytes(open.plan.fitted.geometry.sector))?;
    }
    let deadline = Instant::now() + PATIENCE;
    let mut devices = Vec::new();
    for p in &open.plan.partitions {
        devices.push(wait_for(open, p, deadline)?);
    }
    Ok(devices)
}

fn wait_for(open: &Open, plan: &PartitionPlan, deadline: Instant) -> Result<PathBuf> {
    let number = plan.extent.number;
    let sector = u64::from(open.plan.fitted.geometry.sector);
    let (start, bytes) = (plan.extent.first * sector, plan.extent.bytes(open.plan.fitted.geometry.sector));
    loop {
        let known = kernel_partitions(&open.plan.disk.name)?.into_iter().find(|p| p.number == number);
        if let Some(known) = &known {
            ensure!(
                (known.start, known.bytes) == (start, bytes),
                "the kernel has partition {number} at {}+{}, not {start}+{bytes}",
                known.start,
                known.bytes
            );
            if File::open(&known.device).is_ok() {
                return Ok(known.device.clone());
            }
        }
        if Instant::now() > deadline {
            match known {
                Some(known) => bail!("the device node {} did not appear", known.device.display()),
                None => bail!("the kernel does not show partition {number}"),
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Partitioned {
    /// Step `format`: makes volumes and file systems, reads them back, and mounts them below `target` in the order of their paths.
    ///
    /// # Errors
    /// When a mkfs fails, what it wrote does not read back, or the kernel cannot mount it.
    pub fn format(self, target: &Path) -> Result<Formatted> {
        let partitions = self.disks.iter().flat_map(|open| {
            open.plan.partitions.iter().zip(&open.devices).map(|(p, d)| (p.extent.index, d.clone()))
        });
        let assembled = assemble::make(&self.volumes, partitions.collect(), &self.keys)?;
        for (content, device) in contents(&self.disks, &self.volumes, &assembled) {
            if let Some(format) = &content.format {
                log::info!("making {} on {}", format.fs.name(), device.display());
                mkfs::make(device, format)?;
            }
            btrfs::make_subvolumes(device, &content.subvolumes, target)
                .with_context(|| format!("making subvolumes on {}", device.display()))?;
        }
        let mounts = mount_all(&self.disks, &self.volumes, &assembled, target)?;
        Ok(Formatted { disks: self.disks, volumes: self.volumes, record: self.record, mounts, assembled })
    }
}

/// What is made in every partition and volume, with the device node.
fn contents<'a>(
    disks: &'a [Open],
    volumes: &'a [VolumePlan],
    assembled: &'a Assembled,
) -> impl Iterator<Item = (&'a ContentPlan, &'a PathBuf)> {
    let partitions =
        disks.iter().flat_map(|open| open.plan.partitions.iter().map(|p| &p.content).zip(&open.devices));
    partitions.chain(volumes.iter().filter_map(|v| Some((&v.content, assembled.devices.get(&v.base)?))))
}

fn mount_all(disks: &[Open], volumes: &[VolumePlan], assembled: &Assembled, target: &Path) -> Result<Mounts> {
    let mut wanted = Vec::new();
    for open in disks {
        for (plan, device) in open.plan.partitions.iter().zip(&open.devices) {
            if let Some(fs) = plan.fs() {
                wanted.extend(plan.content.mounts.iter().map(|mount| (mount, fs, device)));
            }
        }
    }
    for volume in volumes {
        if let (Some(format), Some(device)) = (&volume.content.format, assembled.devices.get(&volume.base)) {
            wanted.extend(volume.content.mounts.iter().map(|mount| (mount, format.fs, device)));
        }
    }
    let depth = |path: &str| path.split('/').filter(|p| !p.is_empty()).count();
    wanted.sort_by(|a, b| (depth(&a.0.path), &a.0.path).cmp(&(depth(&b.0.path), &b.0.path)));
    let mut mounts = Mounts::default();
    for (mount, fs, device) in wanted {
        let place = target.join(mount.path.trim_start_matches('/'));
        fs::create_dir_all(&place).with_context(|| format!("creating {}", place.display()))?;
        let options = install_options(fs, mount.options.as_deref().unwrap_or_default());
        ka_sys::mount::mount(device, &place, fs.name(), &options)
            .map_err(|e| match e.raw_os_error() {
                Some(19) => anyhow::anyhow!("the kernel does not know {}: is its module missing?", fs.name()),
                _ => e.into(),
            })
            .with_context(|| format!("mounting {} at {}", device.display(), place.display()))?;
        mounts.0.push(place);
    }
    Ok(mounts)
}

/// The options while the tree is being restored: access times are of no interest; of the clone's own options only those
/// count that decide how data is stored (read-only, for one, must not).
fn install_options(fs: Fs, options: &str) -> String {
    let stored = |w: &&str| {
        fs == Fs::Btrfs
            && (["compress", "subvol=", "subvolid="].iter().any(|p| w.starts_with(p))
                || *w == "nodatacow"
                || *w == "nodatasum")
    };
    let mut words = vec!["noatime"];
    words.extend(options.split(',').map(str::trim).filter(stored));
    words.join(",")
}

impl Formatted {
    /// What was made, for autoconfig and the boot loader; a file system that is mounted at several places comes once for
    /// each.
    #[must_use]
    pub fn volumes(&self) -> Vec<Volume> {
        let mut volumes = Vec::new();
        for open in &self.disks {
            for (plan, device) in open.plan.partitions.iter().zip(&open.devices) {
                let volume = Volume {
                    device: device.to_string_lossy().into_owned(),
                    disk: open.plan.disk.device.to_string_lossy().into_owned(),
                    number: plan.extent.number,
                    kind: plan.kind.clone(),
                    fs: plan.fs(),
                    uuid: plan.uuid().map(str::to_owned),
                    label: plan.label().map(str::to_owned),
                    partuuid: Some(plan.partuuid.clone()),
                    partlabel: plan.name.clone(),
                    mount: None,
                    subvolume: None,
                    layer: None,
                    below: Vec::new(),
                    more_disks: Vec::new(),
                    preserved: plan.preserve,
                };
                mounted(&mut volumes, &volume, &plan.content);
            }
        }
        for plan in &self.volumes {
            let (Some(device), Some(layer)) = (self.assembled.devices.get(&plan.base), plan.layer()) else {
                continue;
            };
            let disks = plan.disks.iter().filter_map(|i| self.disks.get(*i));
            let mut disks = disks.map(|open| open.plan.disk.device.to_string_lossy().into_owned());
            let format = plan.content.format.as_ref();
            let volume = Volume {
                device: device.to_string_lossy().into_owned(),
                disk: disks.next().unwrap_or_default(),
                number: 0,
                kind: "volume".into(),
                fs: format.map(|f| f.fs),
                uuid: format.map(|f| f.uuid.clone()),
                label: format.and_then(|f| f.label.clone()),
                partuuid: None,
                partlabel: None,
                mount: None,
                subvolume: None,
                layer: Some(layer),
                below: stack::layers_below(&self.volumes, plan),
                more_disks: disks.collect(),
                preserved: false,
            };
            mounted(&mut volumes, &volume, &plan.content);
        }
        volumes
    }

    /// Where the parts of the stream go that are sent block for block.
    #[must_use]
    pub fn raw_places(&self) -> Vec<RawPlace> {
        let partitions = self.disks.iter().flat_map(|open| open.plan.partitions.iter().zip(&open.devices));
        let place = |(plan, device): (&PartitionPlan, &PathBuf)| {
            let raw = plan.raw.as_ref()?;
            Some(RawPlace { part: raw.part.clone(), device: device.clone(), bytes: raw.bytes })
        };
        partitions.filter_map(place).collect()
    }

    /// Writes the partition tables and reads them back. To be called when the tree is complete, right before the boot
    /// loader: from here on the disk can boot.
    ///
    /// # Errors
    /// When a table cannot be written or reads back differently. The caller then clears it.
    pub fn commit_table(&mut self) -> Result<()> {
        for open in &mut self.disks {
            let device = open.plan.disk.device.display().to_string();
            write_table(&mut open.file, &open.plan)
                .with_context(|| format!("writing the partition table of {device}"))?;
            verify_table(open)?;
        }
        Ok(())
    }

    /// Clears the partition tables but for what is preserved: after a failure nothing on these disks boots.
    ///
    /// # Errors
    /// When a disk cannot be written, after all were tried.
    pub fn clear_table(&self) -> Result<()> {
        let mut failed = Vec::new();
        for open in &self.disks {
            let cleared = match &open.kept {
                Some(pieces) => kept::restore(&open.file, pieces),
                None => wipe::clear_table(&open.file),
            };
            if let Err(e) = cleared {
                failed.push(format!("{}: {e:#}", open.plan.disk.device.display()));
            }
        }
        ensure!(failed.is_empty(), "clearing the partition table: {}", failed.join("; "));
        Ok(())
    }

    /// Step `finish`: syncs, unmounts in reverse, and looks whether every file system is clean and every table stands.
    /// Then the disks are no longer listed as under installation.
    ///
    /// # Errors
    /// When data could not be written, something is still in use, or a file system is not clean. The caller then clears
    /// the tables with [`wipe::clear_listed`], as this value is gone.
    pub fn finish(mut self) -> Result<()> {
        for place in &self.mounts.0 {
            ka_sys::mount::sync_file_system(place).with_context(|| format!("syncing {}", place.display()))?;
        }
        while let Some(place) = self.mounts.0.last() {
            unmount_patiently(place)?;
            self.mounts.0.pop();
        }
        for (content, device) in contents(&self.disks, &self.volumes, &self.assembled) {
            if let Some(format) = &content.format {
                mkfs::check_clean(device, format, LET_GO)
                    .with_context(|| format!("checking {} after unmounting", device.display()))?;
            }
        }
        self.assembled.close()?;
        for open in &self.disks {
            open.file.sync_all().with_context(|| format!("syncing {}", open.plan.disk.device.display()))?;
            verify_table(open)?;
        }
        remove_record(&self.record)
    }
}

/// Adds `volume` once for each place where it is mounted.
fn mounted(volumes: &mut Vec<Volume>, volume: &Volume, content: &ContentPlan) {
    if content.mounts.is_empty() {
        volumes.push(volume.clone());
    }
    for mount in &content.mounts {
        let subvolume = content.subvolumes.iter().find(|s| s.path.as_ref() == Some(&mount.path)).cloned();
        volumes.push(Volume { mount: Some(mount.clone()), subvolume, ..volume.clone() });
    }
}

fn verify_table(open: &Open) -> Result<()> {
    ka_sys::block::flush_buffers(&open.file).context("dropping the disk's cache")?;
    match open.plan.fitted.table {
        TableKind::Gpt => gpt_table::verify(&open.file, &open.plan),
        TableKind::Mbr => mbr_table::verify(&open.file, &open.plan),
    }
    .with_context(|| format!("reading the partition table of {} back", open.plan.disk.device.display()))
}

/// How long a file system that we have unmounted may be held by another mount namespace.
const LET_GO: Duration = Duration::from_secs(30);

/// A daemon that a hook started may need a moment to end.
fn unmount_patiently(place: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match ka_sys::mount::unmount(place) {
            Ok(()) => return Ok(()),
            Err(e) if e.raw_os_error() == Some(16) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(e) => return Err(e).with_context(|| format!("unmounting {}", place.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_options_that_shape_the_data_hold_while_installing() {
        assert_eq!(install_options(Fs::Ext4, "ro,errors=remount-ro,compress=zstd"), "noatime");
        assert_eq!(
            install_options(Fs::Btrfs, "ro,compress=zstd:3,subvol=@,autodefrag"),
            "noatime,compress=zstd:3,subvol=@"
        );
    }
}
