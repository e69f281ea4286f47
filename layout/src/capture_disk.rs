//! One disk of a running machine, and what lies in a partition or volume of it.

use crate::capture::{self, CaptureError, Mounted};
use crate::capture_facts::{base, node, sysfs_number};
use crate::capture_stack::id;
use crate::facts::{self, Table, TablePartition};
use crate::machine::Machine;
use crate::model::{DiskRule, Format, Fs, Match, Mount, Partition, Pick, Subvolume, TableKind};
use crate::order::GoldenFs;
use crate::size::{MIB, Size};
use crate::types::{self, TypeCode};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A machine that is being looked at.
pub(crate) struct Look<'a> {
    /// The machine.
    pub machine: &'a dyn Machine,
    /// Its mounted file systems, `/` first.
    pub mounted: &'a [Mounted],
    /// The mount options of its fstab, by mount point.
    pub fstab: &'a BTreeMap<String, String>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

/// One disk as it was captured.
pub(crate) struct CapturedDisk {
    /// Its device node.
    pub device: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// Its size.
    pub bytes: u64,
    /// Its rule; without a size.
    pub rule: DiskRule,
    /// Its partitions in the order in which they lie on it.
    pub partitions: Vec<Partition>,
    /// The file systems in them.
    pub golden: Vec<GoldenFs>,
}

/// How a partition or volume is called on the golden machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    /// Its device, as most configuration calls it.
    pub device: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// The whole disk's names.
    pub disk_aliases: Vec<String>,
    /// GUID of the partition.
    pub partuuid: Option<String>,
    /// Name of the partition.
    pub partlabel: Option<String>,
}

/// What lies in a partition or volume.
#[derive(Debug, Default)]
pub(crate) struct Content {
    /// The file system to make.
    pub format: Option<Format>,
    /// Its subvolumes.
    pub subvolumes: Vec<Subvolume>,
    /// Where it is mounted.
    pub mount: Option<Mount>,
    /// What is known of it, once for each mount.
    pub golden: Vec<GoldenFs>,
}

impl Look<'_> {
    /// The disk with the sysfs directory `sysfs`. `carriers` are the kernel names of partitions on which volumes lie.
    ///
    /// # Errors
    /// When its table is of another kind, or a tool fails.
    pub fn disk(
        &mut self,
        sysfs: &Path,
        name: &str,
        carriers: &[String],
    ) -> Result<CapturedDisk, CaptureError> {
        let device = node(sysfs)?;
        let json = self.machine.run("sfdisk", &["--json", &device])?;
        let table = facts::sfdisk(&json).map_err(|e| CaptureError::Answer {
            tool: "sfdisk",
            device: device.clone(),
            message: e.to_string(),
        })?;
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
        let aliases = self.aliases(&device);
        let mut sorted: Vec<&TablePartition> = table.partitions.iter().collect();
        sorted.sort_by_key(|p| p.start);
        let (mut partitions, mut golden) = (Vec::new(), Vec::new());
        for entry in sorted {
            if kind == TableKind::Mbr && matches!(entry.kind.as_str(), "5" | "f" | "85") {
                continue;
            }
            let Some(dir) = by_start.get(&(entry.start * table.sector)) else {
                self.warnings.push(format!(
                    "{device} has a partition at sector {} in its table that the kernel does not know: it is left out",
                    entry.start
                ));
                continue;
            };
            let carrier = carriers.contains(&base(dir));
            if let Some((partition, fs)) = self.partition(dir, entry, &table, kind, carrier)? {
                golden.extend(fs.into_iter().map(|fs| GoldenFs { disk_aliases: aliases.clone(), ..fs }));
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
        let bytes = sysfs_number(&sysfs.join("size"))? * 512;
        Ok(CapturedDisk { device, aliases, bytes, rule, partitions, golden })
    }

    fn partition(
        &mut self,
        dir: &Path,
        entry: &TablePartition,
        table: &Table,
        kind: TableKind,
        carrier: bool,
    ) -> Result<Option<(Partition, Vec<GoldenFs>)>, CaptureError> {
        let device = node(dir)?;
        let answer = |message: &str| CaptureError::Answer {
            tool: "sfdisk",
            device: device.clone(),
            message: format!("{message} `{}`", entry.kind),
        };
        let code = match kind {
            TableKind::Gpt => {
                TypeCode::Gpt(Uuid::try_parse(&entry.kind).map_err(|_| answer("no type GUID"))?)
            }
            TableKind::Mbr => {
                TypeCode::Mbr(u8::from_str_radix(&entry.kind, 16).map_err(|_| answer("no type code"))?)
            }
        };
        let here = self.mounted.iter().find(|m| m.sysfs == dir);
        let bytes = entry.size * table.sector;
        let plain = types::name(code);
        let probed = if carrier { BTreeMap::new() } else { self.probe(dir)? };
        let found = probed.get("TYPE").and_then(|t| Fs::from_name(t));
        let fs = match (here, found) {
            _ if carrier => None,
            (Some(m), _) => Some(m.fs),
            (None, Some(Fs::Swap)) => Some(Fs::Swap),
            (None, Some(Fs::Vfat)) if types::is_esp(&plain, kind) => {
                self.warnings.push(format!(
                    "{device} is an EFI system partition that is not mounted: it will be empty"
                ));
                Some(Fs::Vfat)
            }
            (None, _) if types::is_bios_boot(&plain, kind) || plain == "prep" => None,
            (None, _) => {
                self.warnings.push(format!(
                    "{device} ({}, {}) is not mounted: it is left out of the layout",
                    probed.get("TYPE").map_or("nothing that is known", String::as_str),
                    ka_cli::units::show_size(bytes)
                ));
                return Ok(None);
            }
        };
        let number = sysfs_number(&dir.join("partition"))?;
        let name = entry.name.clone().filter(|n| !n.is_empty());
        let content = match fs {
            None => Content::default(),
            Some(fs) => {
                let names = Names {
                    device: device.clone(),
                    aliases: self.aliases(&device),
                    disk_aliases: Vec::new(),
                    partuuid: probed
                        .get("PART_ENTRY_UUID")
                        .cloned()
                        .or_else(|| partuuid(entry, table, number)),
                    partlabel: name.clone(),
                };
                self.content(dir, fs, &probed, &names)?
            }
        };
        let partition = Partition {
            disk: None,
            id: carrier.then(|| id(&base(dir))),
            number: u32::try_from(number).ok(),
            kind: plain,
            size: Size::Exact(bytes.div_ceil(MIB) * MIB).to_string(),
            start: None,
            weight: None,
            name,
            uuid: (kind == TableKind::Gpt).then(|| entry.uuid.as_ref().map(|u| u.to_lowercase())).flatten(),
            bootable: entry.bootable
                || entry.attrs.as_ref().is_some_and(|a| a.contains("LegacyBIOSBootable")),
            format: content.format,
            subvolumes: content.subvolumes,
            mount: content.mount,
            preserve: false,
            raw: false,
        };
        Ok(Some((partition, content.golden)))
    }

    /// What lies in the volume with the sysfs directory `dir`.
    ///
    /// # Errors
    /// When a tool fails.
    pub fn volume(&mut self, dir: &Path, fs: Fs, names: &Names) -> Result<Content, CaptureError> {
        let probed = self.probe(dir)?;
        self.content(dir, fs, &probed, names)
    }

    fn content(
        &mut self,
        dir: &Path,
        fs: Fs,
        probed: &BTreeMap<String, String>,
        names: &Names,
    ) -> Result<Content, CaptureError> {
        let all: Vec<&Mounted> = self.mounted.iter().filter(|m| m.sysfs == dir).collect();
        let top = all.iter().find(|m| m.subvolume.is_none());
        let mount = top.map(|m| Mount {
            options: self.fstab.get(&m.path).filter(|o| *o != "defaults").cloned(),
            path: m.path.clone(),
        });
        let uuid = probed.get("UUID").cloned();
        let label = probed.get("LABEL").cloned();
        let options = self.features(fs, &node(dir)?, all.first().map(|m| m.place.as_path()), probed)?;
        let format = Some(Format { fs, label: label.clone(), uuid: uuid.clone(), options });
        let golden = |path: Option<String>| GoldenFs {
            path,
            fs,
            aliases: names.aliases.clone(),
            device: names.device.clone(),
            disk_aliases: names.disk_aliases.clone(),
            uuid: uuid.clone(),
            label: label.clone(),
            partuuid: names.partuuid.clone(),
            partlabel: names.partlabel.clone(),
        };
        let golden = match &all[..] {
            [] => vec![golden(None)],
            all => all.iter().map(|m| golden(Some(m.path.clone()))).collect(),
        };
        let subvolumes =
            if all.first().is_some_and(|m| m.fs == Fs::Btrfs) { self.subvolumes(&all)? } else { Vec::new() };
        Ok(Content { format, subvolumes, mount, golden })
    }

    /// The subvolumes of a btrfs that are mounted, and the default one. Others are left out with a warning: most are
    /// snapshots.
    fn subvolumes(&mut self, all: &[&Mounted]) -> Result<Vec<Subvolume>, CaptureError> {
        let Some(here) = all.first() else { return Ok(Vec::new()) };
        let ask = |word: &str| {
            let text = self.machine.run("btrfs", &["subvolume", word, &here.place.to_string_lossy()])?;
            Ok::<_, CaptureError>(facts::subvolume_paths(&text))
        };
        let default = ask("get-default")?.into_iter().next();
        let mut found: Vec<Subvolume> = all
            .iter()
            .filter_map(|m| {
                Some(Subvolume {
                    name: m.subvolume.clone()?,
                    path: Some(m.path.clone()),
                    options: self.fstab.get(&m.path).and_then(|o| facts::without_subvolume(o)),
                    default: m.subvolume == default,
                })
            })
            .collect();
        if let Some(name) = default.filter(|name| found.iter().all(|s| s.name != *name)) {
            found.push(Subvolume { name, path: None, options: None, default: true });
        }
        let all = ask("list")?;
        for name in all.iter().filter(|name| found.iter().all(|s| s.name != **name)) {
            self.warnings.push(format!(
                "the btrfs at {} has the subvolume {name}, which is not mounted by itself: it is left out of the layout",
                here.place.display()
            ));
        }
        Ok(found)
    }

    /// What `blkid` finds on the device with the sysfs directory `dir`; nothing when there is nothing.
    ///
    /// # Errors
    /// When it fails.
    pub fn probe(&self, dir: &Path) -> Result<BTreeMap<String, String>, CaptureError> {
        capture::blkid(self.machine, &node(dir)?)
    }

    /// Words for mkfs that give a file system the features of the golden one: what the golden machine's boot loader and
    /// kernel can read, they must be able to read on the clone.
    fn features(
        &self,
        fs: Fs,
        device: &str,
        place: Option<&Path>,
        probed: &BTreeMap<String, String>,
    ) -> Result<Vec<String>, CaptureError> {
        let run = |tool: &str, words: &[&str]| self.machine.run(tool, words);
        Ok(match fs {
            Fs::Ext2 | Fs::Ext3 | Fs::Ext4 => facts::ext_options(&run("dumpe2fs", &["-h", device])?),
            Fs::Xfs => {
                let place = place.unwrap_or(Path::new(device));
                facts::xfs_options(&run("xfs_info", &[&place.to_string_lossy()])?)
            }
            Fs::Btrfs => facts::btrfs_options(&run("btrfs", &["inspect-internal", "dump-super", device])?),
            Fs::Vfat => {
                let bits = probed.get("VERSION").and_then(|v| v.strip_prefix("FAT"));
                bits.map_or_else(Vec::new, |bits| vec!["-F".to_owned(), bits.to_owned()])
            }
            Fs::Swap => Vec::new(),
        })
    }

    /// Every name under `/dev/disk` that leads to `device`.
    pub fn aliases(&self, device: &str) -> Vec<String> {
        let dev = self.machine.dev();
        let here = |name: &str| dev.join(name.trim_start_matches("/dev/"));
        let target = fs::canonicalize(here(device)).ok();
        let mut found = Vec::new();
        let kinds = fs::read_dir(dev.join("disk")).into_iter().flatten().flatten();
        for link in kinds.flat_map(|kind| fs::read_dir(kind.path()).into_iter().flatten().flatten()) {
            if target.is_some() && fs::canonicalize(link.path()).ok() == target {
                let path = link.path();
                let name = path.strip_prefix(dev).unwrap_or(&path);
                found.push(Path::new("/dev").join(name).to_string_lossy().into_owned());
            }
        }
        found.sort();
        found
    }
}

fn partuuid(entry: &TablePartition, table: &Table, number: u64) -> Option<String> {
    match &entry.uuid {
        Some(uuid) => Some(uuid.to_lowercase()),
        None => table.id.strip_prefix("0x").map(|id| format!("{id}-{number:02x}")),
    }
}
