//! What the file systems of a running machine lie on when that is no partition: arrays of md, encrypted containers, LVM,
//! one on the other. Pure: facts from sysfs and the tools in, parts of a layout out; [`crate::capture`] asks for the facts.

use crate::model::{Group, Logical, Luks, Raid};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Deeper than this nothing sensible is nested.
const DEEPEST: u32 = 16;

/// A block device as sysfs shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Its directory.
    pub dir: PathBuf,
    /// `major:minor`.
    pub number: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// The kernel names of what it lies on.
    pub slaves: Vec<String>,
    /// What it is.
    pub kind: Kind,
}

/// What a block device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A partition of a disk.
    Partition,
    /// Of the device mapper.
    Mapped {
        /// Its name below `/dev/mapper`.
        name: String,
        /// `LVM-...`, `CRYPT-LUKS2-...` and so on.
        uuid: String,
    },
    /// An array of md.
    Array {
        /// `raid1` and so on.
        level: String,
        /// The version of its superblock, or `external:...`.
        metadata: String,
        /// How many members it should have.
        wanted: u64,
        /// Those that it has.
        members: Vec<Member>,
    },
    /// Anything else, in words.
    Other(String),
}

/// A member of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The kernel's name of the device.
    pub device: String,
    /// Its place among the others; a spare has none.
    pub slot: Option<u64>,
    /// Whether it failed.
    pub faulty: bool,
}

/// A row of `lvm lvs`: a segment of a logical volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// The name of the group.
    pub group: String,
    /// The volume's own.
    pub name: String,
    /// `/dev/mapper/...`.
    pub path: String,
    /// The size of the whole volume in bytes.
    pub bytes: u64,
    /// `linear`, `striped`, `thin` and so on.
    pub kind: String,
    /// What it is a snapshot of.
    pub origin: Option<String>,
}

/// The fields of [`segments`], for `-o`.
pub const SEGMENT_FIELDS: &str = "vg_name,lv_name,lv_dm_path,lv_size,segtype,origin";

/// A row of `lvm pvs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Physical {
    /// The name of its group.
    pub group: String,
    /// The device as LVM calls it.
    pub name: String,
    /// `major:minor`; none when it is missing.
    pub number: Option<String>,
}

/// The fields of [`physicals`], for `-o`.
pub const PHYSICAL_FIELDS: &str = "vg_name,pv_name,pv_major,pv_minor";

/// The fields of [`free_space`], for `-o`.
pub const GROUP_FIELDS: &str = "vg_name,vg_size,vg_free";

/// The words for `lvm` that make it report `fields` as the parsers here read them.
#[must_use]
pub fn report<'a>(what: &'a str, fields: &'a str) -> [&'a str; 9] {
    [what, "--noheadings", "--nosuffix", "--units", "b", "--separator", "|", "-o", fields]
}

/// The rows of a report of `lvm` with `N` fields; lines that have another number are none.
fn rows<const N: usize>(text: &str) -> impl Iterator<Item = [&str; N]> {
    text.lines().filter_map(|line| {
        let mut fields = line.split('|').map(str::trim);
        let mut row = [""; N];
        for field in &mut row {
            *field = fields.next()?;
        }
        fields.next().is_none().then_some(row)
    })
}

/// Reads `lvm lvs`.
#[must_use]
pub fn segments(text: &str) -> Vec<Segment> {
    rows::<6>(text)
        .filter_map(|[group, name, path, bytes, kind, origin]| {
            Some(Segment {
                group: group.to_owned(),
                name: name.to_owned(),
                path: path.to_owned(),
                bytes: bytes.parse().ok()?,
                kind: kind.to_owned(),
                origin: (!origin.is_empty()).then(|| origin.to_owned()),
            })
        })
        .collect()
}

/// Reads `lvm pvs`; those in no group are left out.
#[must_use]
pub fn physicals(text: &str) -> Vec<Physical> {
    rows::<4>(text)
        .filter(|row| !row[0].is_empty())
        .map(|[group, name, major, minor]| Physical {
            group: group.to_owned(),
            name: name.to_owned(),
            number: name.starts_with('/').then(|| format!("{major}:{minor}")),
        })
        .collect()
}

/// Reads `lvm vgs`: how big each group is, and how much of it no volume has.
#[must_use]
pub fn free_space(text: &str) -> BTreeMap<String, (u64, u64)> {
    rows::<3>(text)
        .filter_map(|[group, bytes, free]| {
            Some((group.to_owned(), (bytes.parse().ok()?, free.parse().ok()?)))
        })
        .collect()
}

/// Reads `mdadm --detail --export`.
#[must_use]
pub fn exported(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|l| l.split_once('='))
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

/// What `cryptsetup luksDump` tells of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dump {
    /// Its UUID.
    pub uuid: String,
    /// `aes-xts-plain64`.
    pub cipher: Option<String>,
    /// Bits of its volume key.
    pub bits: Option<u32>,
    /// The hash of a container of version 1.
    pub hash: Option<String>,
    /// How keys are derived, slot by slot.
    pub derivations: Vec<String>,
    /// The kinds of its tokens: `clevis`, `systemd-tpm2`.
    pub tokens: Vec<String>,
    /// Whether it checks the integrity of what it holds.
    pub integrity: bool,
}

/// Reads `cryptsetup luksDump`, of both versions.
#[must_use]
pub fn luks_dump(text: &str) -> Dump {
    let mut dump = Dump::default();
    let (mut section, mut name, mut mode) = ("", None, None);
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if !line.starts_with(char::is_whitespace) && value.is_empty() {
            section = key;
        }
        let first_word = || value.split_whitespace().next().map(str::to_owned);
        match (section, key.trim()) {
            ("", "UUID") => value.clone_into(&mut dump.uuid),
            ("", "Cipher name") => name = first_word(),
            ("", "Cipher mode") => mode = first_word(),
            ("", "Hash spec") => dump.hash = first_word(),
            ("", "MK bits") => dump.bits = value.parse().ok(),
            ("Data segments", "cipher") => dump.cipher = first_word(),
            ("Data segments", "integrity") => dump.integrity = true,
            ("Keyslots", "Key") => dump.bits = first_word().and_then(|w| w.parse().ok()),
            ("Keyslots", "PBKDF") => dump.derivations.extend(first_word()),
            ("Tokens", index) if index.parse::<u32>().is_ok() => dump.tokens.extend(first_word()),
            _ => {}
        }
    }
    if let (Some(name), Some(mode)) = (name, mode) {
        dump.cipher = Some(format!("{name}-{mode}"));
    }
    dump
}

/// A line of crypttab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name of the opened container.
    pub name: String,
    /// Its device.
    pub device: String,
    /// The file with its key.
    pub key_file: Option<String>,
    /// Its options.
    pub options: Option<String>,
}

/// Reads crypttab.
#[must_use]
pub fn crypttab(text: &str) -> Vec<Entry> {
    let entry = |line: &str| {
        let mut fields = line.split_whitespace();
        let name = fields.next().filter(|n| !n.starts_with('#'))?.to_owned();
        let device = fields.next()?.to_owned();
        let key_file = fields.next().filter(|f| !["none", "-"].contains(f)).map(str::to_owned);
        let options = fields.next().filter(|o| *o != "none").map(str::to_owned);
        Some(Entry { name, device, key_file, options })
    };
    text.lines().filter_map(entry).collect()
}

/// All that was found out about the devices under the mounted file systems.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The devices by their kernel names.
    pub blocks: BTreeMap<String, Block>,
    /// `mdadm --detail --export` of the arrays.
    pub arrays: BTreeMap<String, BTreeMap<String, String>>,
    /// `cryptsetup luksDump` of what the opened containers lie on, or why that failed.
    pub dumps: BTreeMap<String, Result<Dump, String>>,
    /// The segments of all logical volumes.
    pub segments: Vec<Segment>,
    /// All physical volumes.
    pub physicals: Vec<Physical>,
    /// Size and free space of the groups.
    pub groups: BTreeMap<String, (u64, u64)>,
    /// crypttab.
    pub crypttab: Vec<Entry>,
}

/// The parts of a layout that are no partitions. What lies on others comes behind them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stack {
    /// The kernel names of the partitions that carry something.
    pub carriers: Vec<String>,
    /// Arrays with their kernel names.
    pub raids: Vec<(String, Raid)>,
    /// Containers with their kernel names.
    pub luks: Vec<(String, Luks)>,
    /// Volume groups.
    pub vgs: Vec<Group>,
    /// Logical volumes with their kernel names.
    pub lvs: Vec<(String, Logical)>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}

/// The id that a layout gives to the partition that the kernel calls `name`.
#[must_use]
pub fn id(name: &str) -> String {
    name.replace(|c: char| !c.is_ascii_alphanumeric() && !"_.+-".contains(c), "-")
}

impl Facts {
    /// The mapped device that lies at `path`, `/dev/mapper/...`, with its kernel name.
    #[must_use]
    pub fn mapped(&self, path: &str) -> Option<(&str, &Block)> {
        let own = path.strip_prefix("/dev/mapper/")?;
        let is = |block: &Block| matches!(&block.kind, Kind::Mapped { name, .. } if name == own);
        self.blocks.iter().find(|(_, block)| is(block)).map(|(kernel, block)| (kernel.as_str(), block))
    }

    /// Adds the device `name`, and all that it lies on, to `stack`; as others refer to it.
    ///
    /// # Errors
    /// In words, what it is, when a layout cannot express it; `stack` is as it was then.
    pub fn add(&self, stack: &mut Stack, name: &str) -> Result<String, String> {
        let mut trial = stack.clone();
        let added = self.add_at(&mut trial, name, 0)?;
        *stack = trial;
        Ok(added)
    }

    fn add_at(&self, stack: &mut Stack, name: &str, depth: u32) -> Result<String, String> {
        let block = self.blocks.get(name).ok_or_else(|| format!("{name}, of which sysfs says nothing"))?;
        if depth > DEEPEST {
            return Err(format!("{name}, with more than {DEEPEST} devices above it"));
        }
        match &block.kind {
            Kind::Partition => {
                if !stack.carriers.iter().any(|c| c == name) {
                    stack.carriers.push(name.to_owned());
                }
                Ok(id(name))
            }
            Kind::Other(words) => Err(words.clone()),
            Kind::Array { level, metadata, wanted, members } => {
                self.add_array(stack, name, (level, metadata, *wanted), members)
            }
            Kind::Mapped { name: mapped, uuid } if uuid.starts_with("LVM-") => {
                self.add_logical(stack, name, mapped, depth)
            }
            Kind::Mapped { name: mapped, uuid } if uuid.starts_with("CRYPT-LUKS") => {
                let version = if uuid.starts_with("CRYPT-LUKS1-") { 1 } else { 2 };
                self.add_luks(stack, name, mapped, version, depth)
            }
            Kind::Mapped { name: mapped, uuid } => Err(match uuid.split('-').next() {
                _ if uuid.contains("mpath-") => {
                    format!("the multipath device {mapped}, of which a node's disks know nothing")
                }
                Some("CRYPT") => format!("the volume {mapped}, encrypted without a LUKS header"),
                _ => format!("the device-mapper volume {mapped} of an unknown kind (`{uuid}`)"),
            }),
        }
    }

    fn add_array(
        &self,
        stack: &mut Stack,
        kernel: &str,
        (level, metadata, wanted): (&str, &str, u64),
        members: &[Member],
    ) -> Result<String, String> {
        if let Some((_, raid)) = stack.raids.iter().find(|(k, _)| k == kernel) {
            return Ok(raid.name.clone());
        }
        if metadata.starts_with("external") {
            return Err(format!("the RAID array {kernel} of the firmware ({metadata})"));
        }
        if level != "raid1" {
            return Err(format!("the RAID array {kernel} of level {level}; a layout can have raid1 only"));
        }
        let exported = self.arrays.get(kernel);
        let said = |key: &str| exported.and_then(|e| e.get(key)).filter(|v| !v.is_empty());
        // `HOST:NAME` when another host made it.
        let name = said("MD_DEVNAME").or_else(|| said("MD_NAME")).map_or(kernel, String::as_str);
        let name = name.rsplit(':').next().unwrap_or(name).to_owned();
        let kept = match metadata {
            "1.0" | "1.2" => metadata,
            "0.90" => "1.0",
            "1.1" => "1.2",
            other => return Err(format!("the RAID array {kernel} with metadata `{other}`")),
        };
        if kept != metadata {
            stack.warnings.push(format!(
                "the array {name} ({kernel}) has metadata {metadata}: nodes get {kept}, whose initramfs must assemble it"
            ));
        }
        let mut present: Vec<&Member> = members.iter().filter(|m| m.slot.is_some() && !m.faulty).collect();
        present.sort_by_key(|m| m.slot);
        let count = u64::try_from(present.len()).unwrap_or(u64::MAX);
        if count < 2 {
            return Err(format!(
                "the RAID array {name} ({kernel}), which has {count} of {wanted} members; add the missing ones \
                 (mdadm {kernel} --add), and capture again"
            ));
        }
        if count < wanted {
            stack.warnings.push(format!(
                "the array {name} ({kernel}) has {count} of {wanted} members: nodes get one of {count}"
            ));
        }
        if members.len() > present.len() {
            let others: Vec<&str> =
                members.iter().filter(|m| !present.contains(m)).map(|m| m.device.as_str()).collect();
            stack.warnings.push(format!(
                "the array {name} ({kernel}) has spare or failed members that are left out: {}",
                others.join(", ")
            ));
        }
        let mut ids = Vec::new();
        for member in present {
            match self.blocks.get(&member.device).map(|b| &b.kind) {
                Some(Kind::Partition) => ids.push(self.add_at(stack, &member.device, 0)?),
                Some(Kind::Other(words)) => {
                    return Err(format!("the RAID array {name} ({kernel}) with the member {words}"));
                }
                _ => {
                    return Err(format!(
                        "the RAID array {name} ({kernel}) with the member {}, which is no partition",
                        member.device
                    ));
                }
            }
        }
        let raid = Raid {
            name: name.clone(),
            level: 1,
            members: ids,
            metadata: kept.to_owned(),
            format: None,
            subvolumes: Vec::new(),
            mount: None,
        };
        stack.raids.push((kernel.to_owned(), raid));
        Ok(name)
    }

    fn add_luks(
        &self,
        stack: &mut Stack,
        kernel: &str,
        mapped: &str,
        version: u32,
        depth: u32,
    ) -> Result<String, String> {
        if let Some((_, luks)) = stack.luks.iter().find(|(k, _)| k == kernel) {
            return Ok(luks.name.clone());
        }
        let below = match self.blocks.get(kernel).map(|b| &b.slaves[..]) {
            Some([one]) => one,
            _ => {
                return Err(format!(
                    "the encrypted volume {mapped}, which lies on more or less than one device"
                ));
            }
        };
        let dump = match self.dumps.get(kernel) {
            Some(Ok(dump)) => dump.clone(),
            Some(Err(why)) => {
                return Err(format!("the encrypted volume {mapped}, whose header is not on {below}: {why}"));
            }
            None => Dump::default(),
        };
        if dump.integrity {
            return Err(format!("the encrypted volume {mapped}, which has integrity protection"));
        }
        let by_uuid = |e: &&Entry| {
            let uuid = ["UUID=", "/dev/disk/by-uuid/"].iter().find_map(|p| e.device.strip_prefix(p));
            uuid.is_some_and(|u| u.trim_matches('"').eq_ignore_ascii_case(&dump.uuid))
        };
        let entry =
            self.crypttab.iter().find(|e| e.name == mapped).or_else(|| self.crypttab.iter().find(by_uuid));
        let name = entry.map_or(mapped, |e| &e.name).to_owned();
        if name != mapped {
            stack.warnings.push(format!(
                "the container {mapped} is called {name} in crypttab: that is its name on the nodes"
            ));
        }
        let mut openers: Vec<String> = entry
            .and_then(|e| e.key_file.as_ref())
            .map(|f| format!("the key file {f}"))
            .into_iter()
            .collect();
        let options = entry.and_then(|e| e.options.clone());
        let words = ["tpm2-device=", "fido2-device=", "pkcs11-uri=", "keyscript="];
        let named =
            options.iter().flat_map(|o| o.split(',')).filter(|o| words.iter().any(|w| o.starts_with(w)));
        openers.extend(named.map(|o| format!("the option {o}")));
        openers.extend(dump.tokens.iter().map(|t| format!("a token of {t}")));
        if !openers.is_empty() {
            stack.warnings.push(format!(
                "the container {name} is opened by {}: a node's container has a key of its own (--luks-keys), so enrol \
                 that by a hook",
                openers.join(", ")
            ));
        }
        let on = self.add_at(stack, below, depth + 1)?;
        let mut words = Vec::new();
        let mut word = |option: &str, value: String| words.extend([option.to_owned(), value]);
        if let Some(cipher) = &dump.cipher {
            word("--cipher", cipher.clone());
        }
        if let Some(bits) = dump.bits {
            word("--key-size", bits.to_string());
        }
        if let Some(hash) = &dump.hash {
            word("--hash", hash.clone());
        }
        // GRUB derives keys of version 2 in this way only.
        if !dump.derivations.is_empty() && dump.derivations.iter().all(|d| d == "pbkdf2") {
            word("--pbkdf", "pbkdf2".to_owned());
        }
        let luks = Luks {
            name: name.clone(),
            on,
            version,
            crypttab: options.filter(|o| o != "luks"),
            options: words,
            format: None,
            subvolumes: Vec::new(),
            mount: None,
        };
        stack.luks.push((kernel.to_owned(), luks));
        Ok(name)
    }

    fn add_logical(
        &self,
        stack: &mut Stack,
        kernel: &str,
        mapped: &str,
        depth: u32,
    ) -> Result<String, String> {
        if let Some((_, lv)) = stack.lvs.iter().find(|(k, _)| k == kernel) {
            return Ok(format!("{}/{}", lv.vg, lv.name));
        }
        let path = format!("/dev/mapper/{mapped}");
        let segments: Vec<&Segment> = self.segments.iter().filter(|s| s.path == path).collect();
        let Some(first) = segments.first() else {
            return Err(format!("the LVM volume {mapped}, which `lvm lvs` does not list"));
        };
        let name = format!("{}/{}", first.group, first.name);
        if let Some(origin) = &first.origin {
            return Err(format!(
                "the LVM volume {name}, a snapshot of {origin}; merge or copy it to a linear volume"
            ));
        }
        if let Some(other) = segments.iter().find(|s| !["linear", "striped"].contains(&s.kind.as_str())) {
            return Err(format!(
                "the LVM volume {name} of kind {}; a layout can have linear ones only",
                other.kind
            ));
        }
        if segments.iter().any(|s| s.kind == "striped") {
            stack.warnings.push(format!("the LVM volume {name} is striped: nodes get a linear one"));
        }
        if !stack.vgs.iter().any(|v| v.name == first.group) {
            let mut on = Vec::new();
            for physical in self.physicals.iter().filter(|p| p.group == first.group) {
                let number = physical.number.as_ref().ok_or_else(|| {
                    format!(
                        "the LVM volume {name}, whose group misses a physical volume; bring it back or remove it \
                         (vgreduce --removemissing)"
                    )
                })?;
                let found = self.blocks.iter().find(|(_, block)| block.number == *number);
                let (device, _) = found.ok_or_else(|| {
                    format!("the LVM volume {name} on {}, which sysfs lacks", physical.name)
                })?;
                on.push(self.add_at(stack, device, depth + 1)?);
            }
            stack.vgs.push(Group { name: first.group.clone(), on });
        }
        let lv = Logical {
            vg: first.group.clone(),
            name: first.name.clone(),
            size: crate::size::exact_text(first.bytes),
            weight: None,
            format: None,
            subvolumes: Vec::new(),
            mount: None,
        };
        stack.lvs.push((kernel.to_owned(), lv));
        Ok(name)
    }
}

#[cfg(test)]
#[path = "capture_stack_tests.rs"]
mod tests;
