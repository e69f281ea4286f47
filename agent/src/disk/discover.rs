//! Which disks there are, from sysfs alone: no udev is needed, and names are the kernel's.

use super::leftovers::Leftover;
use anyhow::{Context, Result};
use ka_cli::units::show_size;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A disk as the kernel shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disk {
    /// Its name in sysfs: `sda`, `nvme0n1`, `cciss!c0d0`.
    pub name: String,
    /// Its device node: `/dev/sda`.
    pub device: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its logical sector size in bytes.
    pub sector: u32,
    /// One of [`ka_layout::check::TRANSPORTS`].
    pub transport: String,
    /// The model that it reports.
    pub model: Option<String>,
    /// The serial number that it reports.
    pub serial: Option<String>,
    /// Its world-wide name.
    pub wwn: Option<String>,
    /// Names that tell where it is plugged in (`/dev/disk/by-path/...`), whether such links exist or not.
    pub paths: Vec<String>,
    /// Whether it rotates.
    pub rotational: bool,
    /// Whether its medium can be taken out.
    pub removable: bool,
    /// Whether the kernel refuses to write to it.
    pub read_only: bool,
    /// What uses it or one of its partitions right now: `sda1 is mounted at /`.
    pub in_use: Vec<String>,
    /// Volumes of a former life that hold it and that nobody uses; what lies above comes first.
    pub leftovers: Vec<Leftover>,
    /// The partitions that the kernel knows on it.
    pub partitions: Vec<KernelPartition>,
}

/// A partition that the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelPartition {
    /// Its name in sysfs: `sda1`, `nvme0n1p1`.
    pub name: String,
    /// Its device node.
    pub device: PathBuf,
    /// Its number.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {}", self.device.display(), show_size(self.bytes), self.transport)?;
        if let Some(model) = &self.model {
            write!(f, ", model {model}")?;
        }
        if let Some(serial) = &self.serial {
            write!(f, ", serial {serial}")?;
        }
        if self.sector != 512 {
            write!(f, ", {}-byte sectors", self.sector)?;
        }
        f.write_str(")")
    }
}

/// Where to look; tests make a tree of their own.
#[derive(Debug, Clone)]
pub struct Roots {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/dev`.
    pub dev: PathBuf,
    /// `/proc`.
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into(), proc: "/proc".into() }
    }
}

/// All disks of this machine, by name.
///
/// # Errors
/// When sysfs or `/proc/self/mountinfo` cannot be read.
pub fn discover() -> Result<Vec<Disk>> {
    discover_at(&Roots::default())
}

/// [`discover`] below other roots.
///
/// # Errors
/// When the tree cannot be read.
pub fn discover_at(roots: &Roots) -> Result<Vec<Disk>> {
    let users = Users::read(&roots.proc)?;
    let block = roots.sys.join("block");
    let mut disks = Vec::new();
    let entries = fs::read_dir(&block).with_context(|| format!("listing {}", block.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", block.display()))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_no_disk(&name) {
            continue;
        }
        match read_disk(roots, &name, &users).with_context(|| format!("reading {}", entry.path().display())) {
            Ok(Some(disk)) => disks.push(disk),
            Ok(None) => {}
            // A disk that was pulled out while we looked is not there; any other trouble with one disk is shown, and that
            // disk cannot be chosen.
            Err(e) => log::warn!("disk {name} is left out: {e:#}"),
        }
    }
    disks.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
    Ok(disks)
}

/// Devices that are never a node's disk: RAM, optical and floppy drives, mapped and assembled devices, and the boot and
/// replay-protected areas of eMMC.
fn is_no_disk(name: &str) -> bool {
    let prefix = ["ram", "zram", "sr", "fd", "dm-", "md", "nbd", "mtdblock", "rbd", "drbd", "zd"];
    let followed_by_digit =
        |p: &str| name.strip_prefix(p).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    prefix.iter().any(|p| followed_by_digit(p) || (*p == "md" && name.starts_with("md_")))
        || (name.starts_with("mmcblk") && (name.contains("boot") || name.contains("rpmb")))
}

fn text(path: &Path) -> Option<String> {
    let bytes = fs::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '\0');
    // Strings of drives can hold anything; what goes to terminals and logs is printable.
    let text: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    (!text.is_empty()).then_some(text)
}

fn number(path: &Path) -> Result<u64> {
    text(path)
        .with_context(|| format!("reading {}", path.display()))?
        .parse()
        .with_context(|| format!("reading the number in {}", path.display()))
}

fn flag(path: &Path) -> bool {
    text(path).as_deref() == Some("1")
}

fn uevent(dir: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(dir.join("uevent")).unwrap_or_default();
    text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// The device node of what stands in the sysfs directory `dir`.
fn node(roots: &Roots, dir: &Path) -> Result<PathBuf> {
    let name = uevent(dir).remove("DEVNAME").with_context(|| format!("{} has no DEVNAME", dir.display()))?;
    Ok(roots.dev.join(name))
}

fn read_disk(roots: &Roots, name: &str, users: &Users) -> Result<Option<Disk>> {
    let dir = roots.sys.join("block").join(name);
    let bytes = number(&dir.join("size"))?.saturating_mul(512);
    if bytes == 0 || flag(&dir.join("hidden")) {
        return Ok(None);
    }
    let real = fs::canonicalize(&dir).with_context(|| format!("resolving {}", dir.display()))?;
    let device = node(roots, &dir)?;
    let partitions = kernel_partitions_at(roots, name)?;
    let mut leftovers = Vec::new();
    let mut in_use = users.of(roots, &dir, name, &device, &mut leftovers);
    for partition in &partitions {
        let dir = dir.join(&partition.name);
        in_use.extend(users.of(roots, &dir, &partition.name, &partition.device, &mut leftovers));
    }
    let own = dir.join("device");
    let transport = transport(&real, name);
    let sector = number(&dir.join("queue/logical_block_size"))?;
    Ok(Some(Disk {
        name: name.to_owned(),
        paths: paths(roots, &real, &device, &transport),
        bytes,
        sector: u32::try_from(sector).context("reading the sector size")?,
        model: text(&own.join("model")).or_else(|| text(&own.join("name"))),
        serial: text(&dir.join("serial")).or_else(|| text(&own.join("serial"))).or_else(|| vpd_serial(&own)),
        wwn: text(&dir.join("wwid")).or_else(|| text(&own.join("wwid"))),
        rotational: flag(&dir.join("queue/rotational")),
        removable: flag(&dir.join("removable")),
        read_only: flag(&dir.join("ro")),
        transport,
        device,
        in_use,
        leftovers,
        partitions,
    }))
}

/// The serial number in the SCSI vital product data page 0x80, which libata fills for ATA drives too.
fn vpd_serial(own: &Path) -> Option<String> {
    let page = fs::read(own.join("vpd_pg80")).ok()?;
    let length = usize::from(u16::from_be_bytes([*page.get(2)?, *page.get(3)?]));
    let serial = String::from_utf8_lossy(page.get(4..4 + length)?).trim().to_owned();
    let serial: String = serial.chars().filter(|c| !c.is_control()).collect();
    (!serial.is_empty()).then_some(serial)
}

/// The partitions that the kernel knows on the disk `name` of this machine, by number.
///
/// # Errors
/// When sysfs cannot be read.
pub fn kernel_partitions(name: &str) -> Result<Vec<KernelPartition>> {
    kernel_partitions_at(&Roots::default(), name)
}

fn kernel_partitions_at(roots: &Roots, disk: &str) -> Result<Vec<KernelPartition>> {
    let dir = roots.sys.join("block").join(disk);
    let mut found = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))? {
        let path = entry.with_context(|| format!("listing {}", dir.display()))?.path();
        if !path.join("partition").is_file() {
            continue;
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        found.push(KernelPartition {
            device: node(roots, &path)?,
            number: u32::try_from(number(&path.join("partition"))?)
                .context("reading a partition's number")?,
            // In units of 512 bytes whatever the disk's sector size.
            start: number(&path.join("start"))?.saturating_mul(512),
            bytes: number(&path.join("size"))?.saturating_mul(512),
            name,
        });
    }
    found.sort_by_key(|p| p.number);
    Ok(found)
}

/// How the disk is attached, from the path of its device in sysfs.
fn transport(real: &Path, name: &str) -> String {
    let parts: Vec<String> = real.iter().map(|p| p.to_string_lossy().into_owned()).collect();
    let numbered = |prefix: &str| {
        parts.iter().any(|p| {
            p.strip_prefix(prefix).is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        })
    };
    let word = if name.starts_with("loop") {
        "loop"
    } else if numbered("usb") {
        "usb"
    } else if name.starts_with("nvme") {
        "nvme"
    } else if parts.iter().any(|p| p == "mmc_host") {
        "mmc"
    } else if numbered("ata") {
        // The PCI class of the controller tells IDE (0x0101..) from SATA.
        let ide = real
            .ancestors()
            .find_map(|dir| text(&dir.join("class")).filter(|c| c.starts_with("0x")))
            .is_some_and(|class| class.starts_with("0x0101"));
        if ide { "ide" } else { "sata" }
    } else if parts.iter().any(|p| p.starts_with("end_device-")) {
        "sas"
    } else if parts.iter().any(|p| p.starts_with("target")) {
        "scsi"
    } else if numbered("virtio") {
        "virtio"
    } else if parts.iter().any(|p| p.starts_with("vbd-")) {
        "xen"
    } else {
        "other"
    };
    word.to_owned()
}

/// The names under `/dev/disk/by-path` that udev gives such a disk, made from sysfs since the initramfs has no udev, and
/// those that are really there.
fn paths(roots: &Roots, real: &Path, device: &Path, transport: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    let parts: Vec<String> = real.iter().map(|p| p.to_string_lossy().into_owned()).collect();
    let pci = parts.iter().rev().find(|p| {
        p.len() == 12 && p.as_bytes()[4] == b':' && p.as_bytes()[7] == b':' && p.as_bytes()[10] == b'.'
    });
    let scsi = || parts.iter().rev().find(|p| p.matches(':').count() == 3).cloned();
    if let Some(pci) = pci {
        let mut add = |rest: String| names.push(format!("/dev/disk/by-path/pci-{pci}{rest}"));
        match transport {
            "virtio" => add(String::new()),
            "nvme" => {
                let nsid = text(&real.join("nsid")).unwrap_or_else(|| "1".into());
                add(format!("-nvme-{nsid}"));
            }
            "ide" | "sata" => {
                let port = real.ancestors().find_map(|dir| {
                    let name = dir.file_name()?.to_string_lossy().into_owned();
                    text(&dir.join("ata_port").join(&name).join("port_no"))
                });
                if let (Some(port), Some(address)) = (port, scsi()) {
                    let drive = address.split(':').nth(2).unwrap_or("0");
                    add(format!("-ata-{port}.{drive}"));
                    if drive == "0" {
                        add(format!("-ata-{port}"));
                    }
                }
            }
            "scsi" => {
                if let Some(address) = scsi() {
                    // udev counts the host from 0 on each controller; with one host per controller that is 0.
                    add(format!("-scsi-0{}", &address[address.find(':').unwrap_or(0)..]));
                }
            }
            _ => {}
        }
    }
    let directory = roots.dev.join("disk/by-path");
    if let Ok(entries) = fs::read_dir(&directory) {
        let same = |link: &Path| fs::canonicalize(link).ok() == fs::canonicalize(device).ok();
        names.extend(
            entries
                .flatten()
                .filter(|e| same(&e.path()))
                .map(|e| format!("/dev/disk/by-path/{}", e.file_name().to_string_lossy())),
        );
    }
    names.sort();
    names.dedup();
    names
}

/// Who uses which block device.
struct Users {
    /// Device number or source path, and where it is mounted.
    mounts: Vec<(String, String, String)>,
    swaps: Vec<String>,
}

impl Users {
    fn read(proc: &Path) -> Result<Self> {
        let path = proc.join("self/mountinfo");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let mounts = text.lines().filter_map(|line| {
            // 36 35 98:0 /root /mount-point options... - type source super-options
            let (left, right) = line.split_once(" - ")?;
            let left: Vec<&str> = left.split(' ').collect();
            let source = right.split(' ').nth(1)?;
            Some(((*left.get(2)?).to_owned(), unescape(source), unescape(left.get(4)?)))
        });
        let mounts = mounts.collect();
        // A kernel without swap has no such file.
        let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
        let swaps = swaps.lines().skip(1).filter_map(|l| l.split_whitespace().next()).map(unescape).collect();
        Ok(Self { mounts, swaps })
    }

    /// What uses a device; what holds it and is used by nobody goes to `leftovers`.
    fn of(
        &self,
        roots: &Roots,
        dir: &Path,
        name: &str,
        device: &Path,
        leftovers: &mut Vec<Leftover>,
    ) -> Vec<String> {
        let number = text(&dir.join("dev")).unwrap_or_default();
        let is_device = |source: &str| {
            Path::new(source) == device
                || (source.starts_with('/') && fs::canonicalize(source).is_ok_and(|p| p == device))
        };
        let mut found: Vec<String> = self
            .mounts
            .iter()
            .filter(|(n, source, _)| *n == number || is_device(source))
            .map(|(_, _, place)| format!("{name} is mounted at {place}"))
            .collect();
        found.extend(self.swaps.iter().filter(|s| is_device(s)).map(|_| format!("{name} is swap in use")));
        let holders = fs::read_dir(dir.join("holders")).into_iter().flatten().flatten();
        let mut holders: Vec<String> =
            holders.map(|h| h.file_name().to_string_lossy().into_owned()).collect();
        holders.sort();
        for holder in holders {
            let own = roots.sys.join("block").join(&holder);
            let node = node(roots, &own).unwrap_or_default();
            match Leftover::read(&own, &holder) {
                Some(leftover) => {
                    let mut users = self.of(roots, &own, &holder, &node, leftovers);
                    // An array may be partitioned like a disk.
                    match kernel_partitions_at(roots, &holder) {
                        Ok(partitions) => {
                            users.extend(partitions.iter().flat_map(|p| {
                                self.of(roots, &own.join(&p.name), &p.name, &p.device, leftovers)
                            }))
                        }
                        Err(e) => users.push(format!("its partitions cannot be told: {e:#}")),
                    }
                    found.extend(
                        users.iter().map(|user| format!("{name} is held by {}: {user}", leftover.text)),
                    );
                    if users.is_empty() {
                        leftovers.push(leftover);
                    }
                }
                None => found.push(format!("{name} is held by {holder}")),
            }
        }
        found
    }
}

/// Undoes the octal escapes of mountinfo and swaps (`\040` is a space).
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
