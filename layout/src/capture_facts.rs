//! What sysfs and the tools say about the devices under mounted file systems; [`crate::capture_stack`] judges it.

use crate::capture::{CaptureError, read};
use crate::capture_stack::{
    self, Block, Entry, Facts, GROUP_FIELDS, Kind, Member, PHYSICAL_FIELDS, SEGMENT_FIELDS, report,
};
use crate::machine::Machine;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The name of a device, by its directory in sysfs.
pub(crate) fn base(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The sysfs directory of the block device `major:minor`.
pub(crate) fn sysfs_of(machine: &dyn Machine, number: &str) -> Result<PathBuf, CaptureError> {
    let link = machine.sys().join("dev/block").join(number);
    fs::canonicalize(&link).map_err(|source| CaptureError::Read { path: link, source })
}

/// The number in a file of sysfs.
pub(crate) fn sysfs_number(path: &Path) -> Result<u64, CaptureError> {
    let text = read(path)?;
    text.trim().parse().map_err(|_| CaptureError::Read {
        path: path.to_path_buf(),
        source: io::Error::new(io::ErrorKind::InvalidData, format!("`{}` is no number", text.trim())),
    })
}

/// The device node of what has the sysfs directory `dir`.
pub(crate) fn node(dir: &Path) -> Result<String, CaptureError> {
    let path = dir.join("uevent");
    let text = read(&path)?;
    let name = text.lines().find_map(|l| l.strip_prefix("DEVNAME=")).ok_or_else(|| CaptureError::Read {
        path,
        source: io::Error::new(io::ErrorKind::InvalidData, "there is no DEVNAME"),
    })?;
    Ok(format!("/dev/{name}"))
}

/// The entries of a directory by name; none when there is no such directory.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    let fail = |source: io::Error| CaptureError::Read { path: dir.to_path_buf(), source };
    let mut found = match fs::read_dir(dir) {
        Ok(list) => list.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>().map_err(fail)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(fail(e)),
    };
    found.sort();
    Ok(found)
}

/// The block device with the sysfs directory `dir`.
fn block(dir: &Path) -> Result<Block, CaptureError> {
    let name = base(dir);
    let text = |file: &str| read(&dir.join(file)).map(|t| t.trim().to_owned());
    let slaves = entries(&dir.join("slaves"))?;
    let kind = if dir.join("partition").exists() {
        match dir.parent() {
            Some(whole) if whole.join("md").exists() => {
                Kind::Other(format!("the partition {name} of the RAID array {}", base(whole)))
            }
            _ => Kind::Partition,
        }
    } else if dir.join("dm").exists() {
        Kind::Mapped { name: text("dm/name")?, uuid: text("dm/uuid")? }
    } else if dir.join("md").exists() {
        let mut members = Vec::new();
        for slave in &slaves {
            let device = base(slave);
            let own = dir.join("md").join(format!("dev-{device}"));
            let slot = read(&own.join("slot"))?.trim().parse().ok();
            let faulty = read(&own.join("state"))?.trim().split(',').any(|w| w == "faulty");
            members.push(Member { device, slot, faulty });
        }
        Kind::Array {
            level: text("md/level")?,
            metadata: text("md/metadata_version")?,
            wanted: sysfs_number(&dir.join("md/raid_disks"))?,
            members,
        }
    } else if dir.join("bcache").exists() || name.starts_with("bcache") {
        Kind::Other(format!("the bcache device {name}"))
    } else if dir.join("loop").exists() {
        Kind::Other(format!("the loop device {name}"))
    } else {
        Kind::Other(format!("the whole disk {name}, which has no partition table"))
    };
    Ok(Block {
        dir: dir.to_path_buf(),
        number: text("dev")?,
        bytes: sysfs_number(&dir.join("size"))? * 512,
        slaves: slaves.iter().map(|s| base(s)).collect(),
        kind,
    })
}

/// Everything about the devices with the sysfs directories `todo` and what they lie on.
///
/// # Errors
/// When sysfs cannot be read, or a tool is missing or fails.
pub(crate) fn gather(
    machine: &dyn Machine,
    mut todo: Vec<PathBuf>,
    crypttab: Vec<Entry>,
) -> Result<Facts, CaptureError> {
    let mut facts = Facts { crypttab, ..Facts::default() };
    let mut asked_lvm = false;
    while let Some(dir) = todo.pop() {
        let name = base(&dir);
        if facts.blocks.contains_key(&name) {
            continue;
        }
        let found = block(&dir)?;
        for slave in entries(&dir.join("slaves"))? {
            let below =
                fs::canonicalize(&slave).map_err(|source| CaptureError::Read { path: slave, source })?;
            todo.push(below);
        }
        match &found.kind {
            // What is refused anyway is not asked for details.
            Kind::Array { level, metadata, .. } if level == "raid1" && !metadata.starts_with("external") => {
                let text = machine.run("mdadm", &["--detail", "--export", &node(&dir)?])?;
                facts.arrays.insert(name.clone(), capture_stack::exported(&text));
            }
            Kind::Mapped { uuid, .. } if uuid.starts_with("CRYPT-LUKS") => {
                if let Some(below) = todo.last().filter(|_| found.slaves.len() == 1) {
                    let dump = machine.run("cryptsetup", &["luksDump", &node(below)?]);
                    let dump = dump.map(|text| capture_stack::luks_dump(&text)).map_err(|e| e.to_string());
                    facts.dumps.insert(name.clone(), dump);
                }
            }
            Kind::Mapped { name: mapped, uuid } if uuid.starts_with("LVM-") => {
                if !asked_lvm {
                    asked_lvm = true;
                    let ask = |what, fields| machine.run("lvm", &report(what, fields));
                    facts.segments = capture_stack::segments(&ask("lvs", SEGMENT_FIELDS)?);
                    facts.physicals = capture_stack::physicals(&ask("pvs", PHYSICAL_FIELDS)?);
                    facts.groups = capture_stack::free_space(&ask("vgs", GROUP_FIELDS)?);
                }
                let path = format!("/dev/mapper/{mapped}");
                let group = facts.segments.iter().find(|s| s.path == path).map(|s| s.group.as_str());
                for physical in facts.physicals.iter().filter(|p| Some(p.group.as_str()) == group) {
                    if let Some(number) = &physical.number {
                        todo.push(sysfs_of(machine, number)?);
                    }
                }
                for segment in facts.segments.iter().filter(|s| Some(s.group.as_str()) == group) {
                    // A volume that is not active has no node.
                    if let Ok(number) = machine.number(&segment.path) {
                        todo.push(sysfs_of(machine, &number)?);
                    }
                }
            }
            _ => {}
        }
        facts.blocks.insert(name, found);
    }
    Ok(facts)
}
