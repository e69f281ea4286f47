//! Whole machines, as sysfs and the tools of Debian 12 show them (LVM 2.03.16, mdadm 4.2, cryptsetup 2.6.1), captured.

use super::*;
use crate::fit::{Geometry, fit};
use crate::size::MIB;
use crate::stack;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use tempfile::TempDir;

const ESP: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
const BIOS: &str = "21686148-6449-6E6F-744E-656564454649";
const LINUX: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";
const LVM: &str = "E6D6D379-F507-44C2-A23C-238F2A3DF928";
const RAID: &str = "A19D880F-05FC-4D3B-A006-743F0F84911E";
const DUMP: &str = "LUKS header information\nVersion:       \t2\nUUID:          \t0602c009-bdde-45d5-a9f6-95e1b01642ae\n\
    Label:         \t(no label)\n\nData segments:\n  0: crypt\n\toffset: 16777216 [bytes]\n\tcipher: aes-xts-plain64\n\
    \tsector: 512 [bytes]\n\nKeyslots:\n  0: luks2\n\tKey:        512 bits\n\tCipher key: 512 bits\n\
    \tPBKDF:      argon2id\nTokens:\nDigests:\n  0: pbkdf2\n\tHash:       sha256\n";
const CRYPT: &str = "CRYPT-LUKS2-0602c009bdde45d5a9f695e1b01642ae-";

/// A machine in a directory.
struct Lab {
    dir: TempDir,
    sys: PathBuf,
    dev: PathBuf,
    outputs: BTreeMap<String, String>,
    numbers: BTreeMap<String, String>,
    used: BTreeMap<PathBuf, u64>,
    mountinfo: String,
    swaps: String,
    disks: Vec<u64>,
}

impl Machine for Lab {
    fn sys(&self) -> &Path {
        &self.sys
    }

    fn dev(&self) -> &Path {
        &self.dev
    }

    fn run(&self, tool: &str, words: &[&str]) -> Result<String, process::Error> {
        let command = format!("{tool} {}", words.join(" "));
        if let Some(text) = self.outputs.get(&command) {
            return Ok(text.clone());
        }
        // blkid knows nothing of most devices; whatever else is asked for is not recorded.
        let code = if tool == "blkid" { 2 } else { 99 };
        Err(process::Error::Failed {
            command,
            status: ExitStatus::from_raw(code << 8),
            stderr: String::new(),
        })
    }

    fn number(&self, node: &str) -> io::Result<String> {
        self.numbers.get(node).cloned().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }

    fn used(&self, place: &Path) -> io::Result<u64> {
        self.used.get(place).copied().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        for folder in ["sys/dev/block", "dev/disk/by-uuid", "dev/disk/by-path", "root/etc"] {
            fs::create_dir_all(path.join(folder)).unwrap();
        }
        Self {
            sys: path.join("sys"),
            dev: path.join("dev"),
            dir,
            outputs: BTreeMap::new(),
            numbers: BTreeMap::new(),
            used: BTreeMap::new(),
            mountinfo: String::new(),
            swaps: String::new(),
            disks: Vec::new(),
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join("root")
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn block(&mut self, dir: &str, number: &str, bytes: u64) {
        let name = dir.rsplit('/').next().unwrap().to_owned();
        self.write(&format!("sys/devices/{dir}/uevent"), &format!("DEVNAME={name}\nDEVTYPE=x\n"));
        self.write(&format!("sys/devices/{dir}/dev"), &format!("{number}\n"));
        self.write(&format!("sys/devices/{dir}/size"), &format!("{}\n", bytes / 512));
        self.write(&format!("dev/{name}"), "");
        symlink(self.sys.join("devices").join(dir), self.sys.join("dev/block").join(number)).unwrap();
        self.numbers.insert(format!("/dev/{name}"), number.to_owned());
    }

    /// A disk of `mib` with partitions: type and MiB.
    fn disk(&mut self, name: &str, major: u32, mib: u64, parts: &[(&str, u64)]) {
        self.disks.push(mib * MIB);
        self.block(name, &format!("{major}:0"), mib * MIB);
        symlink(format!("../../{name}"), self.dev.join("disk/by-path").join(format!("pci-{major}"))).unwrap();
        let (mut start, mut json) = (MIB, Vec::new());
        for (i, (kind, mib)) in parts.iter().enumerate() {
            let part = format!("{name}/{name}{}", i + 1);
            self.block(&part, &format!("{major}:{}", i + 1), mib * MIB);
            self.write(&format!("sys/devices/{part}/partition"), &format!("{}\n", i + 1));
            self.write(&format!("sys/devices/{part}/start"), &format!("{}\n", start / 512));
            json.push(format!(
                r#"{{"node":"/dev/{part}","start":{},"size":{},"type":"{kind}","uuid":"{major:08}-0000-4000-8000-{i:012}"}}"#,
                start / 512,
                mib * MIB / 512
            ));
            start += mib * MIB;
        }
        let json = format!(
            r#"{{"partitiontable":{{"label":"gpt","id":"{major:08}-0000-4000-8000-999999999999","device":"/dev/{name}","unit":"sectors","sectorsize":512,"partitions":[{}]}}}}"#,
            json.join(",")
        );
        self.outputs.insert(format!("sfdisk --json /dev/{name}"), json);
    }

    fn on(&self, dir: &str, slaves: &[&str]) {
        fs::create_dir_all(self.sys.join("devices").join(dir).join("slaves")).unwrap();
        for slave in slaves {
            let target =
                fs::canonicalize(self.sys.join("dev/block").join(&self.numbers[&format!("/dev/{slave}")]));
            symlink(target.unwrap(), self.sys.join("devices").join(dir).join("slaves").join(slave)).unwrap();
        }
    }

    /// A mapped device of `mib`: `dm-N` with the number 253:N.
    fn mapped(&mut self, n: u32, name: &str, uuid: &str, mib: u64, slaves: &[&str]) {
        let dir = format!("virtual/block/dm-{n}");
        self.block(&dir, &format!("253:{n}"), mib * MIB);
        self.write(&format!("sys/devices/{dir}/dm/name"), &format!("{name}\n"));
        self.write(&format!("sys/devices/{dir}/dm/uuid"), &format!("{uuid}\n"));
        self.on(&dir, slaves);
        self.numbers.insert(format!("/dev/mapper/{name}"), format!("253:{n}"));
    }

    /// An array `mdN` of metadata 1.2.
    fn array(&mut self, n: u32, name: &str, level: &str, mib: u64, members: &[&str]) {
        let dir = format!("virtual/block/md{n}");
        self.block(&dir, &format!("9:{n}"), mib * MIB);
        for (file, text) in
            [("level", level), ("metadata_version", "1.2"), ("raid_disks", &members.len().to_string())]
        {
            self.write(&format!("sys/devices/{dir}/md/{file}"), &format!("{text}\n"));
        }
        for (i, member) in members.iter().enumerate() {
            self.write(&format!("sys/devices/{dir}/md/dev-{member}/slot"), &format!("{i}\n"));
            self.write(&format!("sys/devices/{dir}/md/dev-{member}/state"), "in_sync\n");
        }
        self.on(&dir, members);
        self.outputs.insert(
            format!("mdadm --detail --export /dev/md{n}"),
            format!(
                "MD_LEVEL={level}\nMD_DEVICES={}\nMD_METADATA=1.2\nMD_UUID=725d4de6:84e9294c:a148f1e4:18e4ce0{n}\n\
                 MD_DEVNAME={name}\nMD_NAME=golden:{name}\nMD_DEVICE_dev_{}_ROLE=0\nMD_DEVICE_dev_{1}_DEV=/dev/{1}\n",
                members.len(),
                members[0]
            ),
        );
    }

    fn lvm(&mut self, lvs: &str, pvs: &str, vgs: &str) {
        for (what, fields, text) in [
            ("lvs", "vg_name,lv_name,lv_dm_path,lv_size,segtype,origin", lvs),
            ("pvs", "vg_name,pv_name,pv_major,pv_minor", pvs),
            ("vgs", "vg_name,vg_size,vg_free", vgs),
        ] {
            let command = format!("lvm {what} --noheadings --nosuffix --units b --separator | -o {fields}");
            self.outputs.insert(command, text.to_owned());
        }
    }

    /// What is on a device, and where it is mounted with how many MiB in use.
    fn holds(&mut self, kernel: &str, fs: &str, place: Option<(&str, u64)>) {
        // A UUID made of the device's name, so that each is another.
        let uuid = if fs == "vfat" {
            "ABCD-1234".to_owned()
        } else {
            let sum = kernel.bytes().fold(7_u64, |sum, b| sum * 31 + u64::from(b)) % 1_000_000_000;
            format!("5c8ba1a8-9d6f-4d21-8b6b-{sum:012}")
        };
        self.outputs.insert(
            format!("blkid --probe --output export /dev/{kernel}"),
            format!("DEVNAME=/dev/{kernel}\nUUID={uuid}\nVERSION=FAT32\nTYPE={fs}\n"),
        );
        let _ = symlink(format!("../../{kernel}"), self.dev.join("disk/by-uuid").join(&uuid));
        self.outputs.insert(
            format!("dumpe2fs -h /dev/{kernel}"),
            "Filesystem features:      has_journal ext_attr extent 64bit\nBlock size:               4096\n"
                .to_owned(),
        );
        if let Some((path, used)) = place {
            let place = self.root().join(path.trim_start_matches('/'));
            let number = self.numbers[&format!("/dev/{kernel}")].clone();
            let at = place.to_string_lossy().trim_end_matches('/').to_owned();
            self.mountinfo.push_str(&format!("27 1 {number} / {at} rw,relatime - {fs} /dev/{kernel} rw\n"));
            self.outputs.insert(format!("xfs_info {at}"), "meta-data=/dev/x isize=512\n".to_owned());
            self.used.insert(PathBuf::from(at), used * MIB);
        }
    }

    fn swap_in_use(&mut self, kernel: &str) {
        self.holds(kernel, "swap", None);
        self.swaps = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n".to_owned();
        self.swaps
            .push_str(&format!("/dev/{kernel}                               partition\t999420\t0\t-2\n"));
    }

    fn try_capture(&self) -> Result<Captured, CaptureError> {
        capture_from(self, &self.root(), &self.mountinfo, &self.swaps)
    }

    /// The captured machine, whose layout reads back, and fits on disks as big as its own and on bigger ones.
    fn captured(&self) -> Captured {
        let captured = self.try_capture().unwrap_or_else(|e| panic!("{e}"));
        let text = crate::to_toml(&captured.layout, &captured.warnings);
        assert_eq!(crate::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}")), captured.layout);
        for times in [1, 3] {
            let made = self.made(&captured.layout, times);
            for (base, bytes) in &made {
                let least = match base {
                    Base::Partition(i) => &captured.layout.partitions[*i].size,
                    Base::Lv(i) => &captured.layout.lvs[*i].size,
                    _ => continue,
                };
                assert!(*bytes >= least.parse::<crate::size::Size>().unwrap().min().unwrap(), "{text}");
            }
        }
        // Every file system is known with its own UUID, and the layout asks for it.
        for golden in &captured.golden_filesystems {
            let uuid = golden.uuid.as_ref().unwrap();
            assert!(golden.device.starts_with("/dev/") && !golden.aliases.is_empty(), "{golden:?}");
            assert!(
                captured.layout.contents().any(|c| c.format.is_some_and(|f| f.uuid.as_ref() == Some(uuid)))
            );
        }
        let mounts: Vec<&str> =
            captured.golden_filesystems.iter().filter_map(|g| g.path.as_deref()).collect();
        assert_eq!(mounts[0], "/");
        let mut wanted: Vec<String> = captured.layout.mount_paths().collect();
        let mut mounts: Vec<String> = mounts.into_iter().map(str::to_owned).collect();
        wanted.sort();
        mounts.sort();
        assert_eq!(mounts, wanted);
        captured
    }

    /// How big all becomes on disks so many times as big as the golden ones.
    fn made(&self, layout: &Layout, times: u64) -> BTreeMap<Base, u64> {
        let mut partitions = BTreeMap::new();
        for (i, bytes) in self.disks.iter().enumerate() {
            let fitted = fit(layout, i, Geometry { bytes: bytes * times, sector: 512 });
            for e in fitted.unwrap_or_else(|e| panic!("{e}")).extents {
                partitions.insert(e.index, (e.last + 1 - e.first) * 512);
            }
        }
        stack::sizes(layout, &partitions).unwrap_or_else(|e| panic!("{e}"))
    }

    fn golden<'a>(&self, captured: &'a Captured, path: Option<&str>) -> &'a GoldenFs {
        captured.golden_filesystems.iter().find(|g| g.path.as_deref() == path).unwrap()
    }
}

/// Debian's guided LVM with a separate /boot, on UEFI: 20 GiB.
fn guided_lvm() -> Lab {
    let mut lab = Lab::new();
    lab.disk("vda", 254, 20480, &[(ESP, 512), (LINUX, 488), (LVM, 19478)]);
    lab.mapped(0, "golden--vg-root", "LVM-aaaabbbb", 18492, &["vda3"]);
    lab.mapped(1, "golden--vg-swap_1", "LVM-aaaacccc", 976, &["vda3"]);
    lab.lvm(
        "  golden-vg|root|/dev/mapper/golden--vg-root|19390267392|linear|\n  \
         golden-vg|swap_1|/dev/mapper/golden--vg-swap_1|1023410176|linear|\n",
        "  golden-vg|/dev/vda3|254|3\n",
        "  golden-vg|20422066176|8388608\n",
    );
    lab.holds("dm-0", "ext4", Some(("/", 1200)));
    lab.holds("vda1", "vfat", Some(("/boot/efi", 6)));
    lab.holds("vda2", "ext2", Some(("/boot", 100)));
    lab.swap_in_use("dm-1");
    lab.write(
        "root/etc/fstab",
        "/dev/mapper/golden--vg-root / ext4 errors=remount-ro 0 1\n/dev/mapper/golden--vg-swap_1 none swap sw 0 0\n",
    );
    lab
}

#[test]
fn lvm_on_one_disk_is_captured() {
    let lab = guided_lvm();
    let captured = lab.captured();
    assert_eq!(captured.warnings, [""; 0]);
    let uuid = |path| lab.golden(&captured, path).uuid.clone().unwrap();
    let written = crate::to_toml(&captured.layout, &[]);
    let volumes = written.split_once("[[vg]]").unwrap().1;
    assert_eq!(
        volumes,
        format!(
            "\nname = \"golden-vg\"\non = [\"vda3\"]\n\n\
             [[lv]]\nvg = \"golden-vg\"\nname = \"root\"\nsize = \"1568M-\"\n\
             format = {{ fs = \"ext4\", uuid = \"{}\", options = [\"-O\", \"none,has_journal,ext_attr,extent,64bit\", \"-b\", \
             \"4096\"] }}\nmount = {{ path = \"/\", options = \"errors=remount-ro\" }}\n\n\
             [[lv]]\nvg = \"golden-vg\"\nname = \"swap_1\"\nsize = \"976M\"\nformat = {{ fs = \"swap\", uuid = \"{}\" }}\n",
            uuid(Some("/")),
            uuid(None)
        )
    );
    let parts: Vec<_> = captured
        .layout
        .partitions
        .iter()
        .map(|p| (p.number, p.id.as_deref(), p.kind.as_str(), p.size.as_str(), p.format.is_some()))
        .collect();
    assert_eq!(
        parts,
        [
            (Some(1), None, "esp", "512M", true),
            (Some(2), None, "linux", "488M", true),
            // 1568 + 976, and 1 for LVM.
            (Some(3), Some("vda3"), "linux-lvm", "2545M-", false),
        ]
    );
    assert_eq!(captured.layout.disks[0].matching.size.as_deref(), Some("3G-"));
    let root = lab.golden(&captured, Some("/"));
    assert_eq!(root.device, "/dev/mapper/golden--vg-root");
    assert_eq!(
        root.aliases,
        [
            "/dev/disk/by-uuid/".to_owned() + &uuid(Some("/")),
            "/dev/dm-0".into(),
            "/dev/golden-vg/root".into()
        ]
    );
    assert_eq!(root.disk_aliases, ["/dev/disk/by-path/pci-254"]);
    let stacked = &captured.stacked["/dev/mapper/golden--vg-root"];
    assert_eq!(stacked.layers, [Layer::Lvm { group: "golden-vg".into(), name: "root".into() }]);
    assert_eq!(stacked.disks, ["/dev/vda"]);
    // On a disk of thrice the size, the root gets what there is more.
    let made = lab.made(&captured.layout, 3);
    assert!(made[&Base::Lv(0)] > 55 << 30 && made[&Base::Lv(1)] == 976 * MIB, "{made:?}");
}

#[test]
fn other_volumes_of_a_group_are_looked_at() {
    let mut lab = guided_lvm();
    // Swap that is not in use just now is taken, as from a partition; a snapshot, a pool and data are told.
    lab.swaps = String::new();
    lab.mapped(2, "golden--vg-data", "LVM-aaaadddd", 400, &["vda3"]);
    lab.holds("dm-2", "xfs", None);
    lab.lvm(
        "  golden-vg|root|/dev/mapper/golden--vg-root|19390267392|linear|\n  \
         golden-vg|swap_1|/dev/mapper/golden--vg-swap_1|1023410176|linear|\n  \
         golden-vg|data|/dev/mapper/golden--vg-data|419430400|linear|\n  \
         golden-vg|old|/dev/mapper/golden--vg-old|419430400|linear|root\n  \
         other|x|/dev/mapper/other-x|419430400|linear|\n",
        "  golden-vg|/dev/vda3|254|3\n  other|/dev/vdz1|254|99\n",
        "  golden-vg|20422066176|8388608\n",
    );
    let captured = lab.captured();
    assert_eq!(captured.layout.lvs[1].name, "swap_1");
    assert_eq!(
        captured.warnings,
        [
            "the LVM volume golden-vg/data (linear, xfs, 400 MiB) is not mounted: it is left out of the layout",
            "the LVM volume golden-vg/old (a snapshot of root, nothing that is known, 400 MiB) is not mounted: it is left \
             out of the layout"
        ]
    );
}

#[test]
fn an_encrypted_root_is_captured() {
    let mut lab = Lab::new();
    lab.disk("sda", 8, 10240, &[(BIOS, 1), (LINUX, 488), (LINUX, 9749)]);
    lab.mapped(0, "sda3_crypt", &format!("{CRYPT}sda3_crypt"), 9733, &["sda3"]);
    lab.outputs.insert("cryptsetup luksDump /dev/sda3".into(), DUMP.into());
    lab.holds("dm-0", "ext4", Some(("/", 2000)));
    lab.holds("sda2", "ext4", Some(("/boot", 100)));
    lab.write(
        "root/etc/crypttab",
        "sda3_crypt UUID=0602c009-bdde-45d5-a9f6-95e1b01642ae none luks,discard\n",
    );
    let captured = lab.captured();
    assert_eq!(captured.warnings, [""; 0]);
    let luks = &captured.layout.luks[0];
    assert_eq!((luks.name.as_str(), luks.on.as_str(), luks.version), ("sda3_crypt", "sda3", 2));
    assert_eq!(luks.crypttab.as_deref(), Some("luks,discard"));
    assert_eq!(luks.options, ["--cipher", "aes-xts-plain64", "--key-size", "512"]);
    // 2000 and a fifth, 128 for the file system, 16 for the container.
    assert_eq!(captured.layout.partitions[2].size, "2544M-");
    assert_eq!(captured.layout.partitions[0].kind, "bios-boot");
    let stacked = &captured.stacked["/dev/mapper/sda3_crypt"];
    assert_eq!(
        stacked.layers,
        [Layer::Luks {
            name: "sda3_crypt".into(),
            uuid: "0602c009-bdde-45d5-a9f6-95e1b01642ae".into(),
            options: "luks,discard".into()
        }]
    );
}

fn mirrored(level: &str) -> Lab {
    let mut lab = Lab::new();
    for (disk, major) in [("sda", 8), ("sdb", 65)] {
        lab.disk(disk, major, 20480, &[(BIOS, 1), (RAID, 1024), (RAID, 19453)]);
    }
    lab.array(0, "boot", level, 1022, &["sda2", "sdb2"]);
    lab.array(127, "golden:root", level, 19436, &["sda3", "sdb3"]);
    lab
}

#[test]
fn a_mirror_of_two_disks_is_captured() {
    let mut lab = mirrored("raid1");
    lab.holds("md127", "xfs", Some(("/", 3000)));
    lab.holds("md0", "ext4", Some(("/boot", 200)));
    let captured = lab.captured();
    assert_eq!(
        captured.warnings,
        [
            "several disks were captured: their match rules go by size, and where sizes are alike by where a disk is \
             plugged in (path); look whether each names one disk of a node"
        ]
    );
    let raids: Vec<_> = captured
        .layout
        .raids
        .iter()
        .map(|r| (r.name.as_str(), r.members.join(" "), r.mount.as_ref().unwrap().path.as_str()))
        .collect();
    assert_eq!(raids, [("root", "sda3 sdb3".into(), "/"), ("boot", "sda2 sdb2".into(), "/boot")]);
    let parts: Vec<_> = captured
        .layout
        .partitions
        .iter()
        .map(|p| (p.disk.as_deref().unwrap(), p.id.as_deref(), p.size.as_str()))
        .collect();
    // 3000 and a fifth, 128, and a 511th for the array's own.
    assert_eq!(
        parts,
        [
            ("system", None, "1M"),
            ("system", Some("sda2"), "1G"),
            ("system", Some("sda3"), "3736M-"),
            ("disk2", None, "1M"),
            ("disk2", Some("sdb2"), "1G"),
            ("disk2", Some("sdb3"), "3736M-"),
        ]
    );
    assert_eq!(captured.layout.disks[1].matching.size.as_deref(), Some("18G-23G"));
    // Two of one size: nothing but their places tells them apart.
    let paths: Vec<_> = captured.layout.disks.iter().map(|d| d.matching.path.as_deref()).collect();
    assert_eq!(paths, [Some("pci-8"), Some("pci-65")]);
    let root = lab.golden(&captured, Some("/"));
    assert_eq!(root.device, "/dev/md127");
    assert!(root.aliases.iter().any(|a| a == "/dev/md/root"), "{root:?}");
    assert!(root.aliases.iter().any(|a| a == "/dev/md/golden:root"), "{root:?}");
    assert_eq!(root.disk_aliases, ["/dev/disk/by-path/pci-8", "/dev/disk/by-path/pci-65"]);
    assert_eq!(captured.stacked["/dev/md127"].disks, ["/dev/sda", "/dev/sdb"]);
    let Layer::Raid { uuid, .. } = &captured.stacked["/dev/md127"].layers[0] else { panic!() };
    assert_eq!(uuid, "725d4de6:84e9294c:a148f1e4:18e4ce0127");
}

#[test]
fn lvm_on_luks_on_a_mirror_is_captured() {
    let mut lab = mirrored("raid1");
    lab.mapped(0, "md127_crypt", &format!("{CRYPT}md127_crypt"), 19420, &["md127"]);
    lab.outputs.insert("cryptsetup luksDump /dev/md127".into(), DUMP.into());
    lab.mapped(1, "vg0-root", "LVM-aaaabbbb", 12288, &["dm-0"]);
    lab.mapped(2, "vg0-home", "LVM-aaaacccc", 4096, &["dm-0"]);
    lab.lvm(
        "  vg0|home|/dev/mapper/vg0-home|4294967296|linear|\n  vg0|root|/dev/mapper/vg0-root|12884901888|linear|\n  \
         vg0|root|/dev/mapper/vg0-root|12884901888|linear|\n",
        "  vg0|/dev/mapper/md127_crypt|253|0\n",
        "  vg0|20359151616|3179282432\n",
    );
    lab.holds("md0", "ext4", Some(("/boot", 200)));
    lab.holds("dm-1", "ext4", Some(("/", 5000)));
    lab.holds("dm-2", "xfs", Some(("/home", 1000)));
    lab.write("root/etc/crypttab", "md127_crypt /dev/md127 /root/key luks\n");
    let captured = lab.captured();
    let layout = &captured.layout;
    assert_eq!((layout.luks[0].on.as_str(), &layout.luks[0].crypttab), ("root", &None));
    assert_eq!(layout.vgs[0].on, ["md127_crypt"]);
    let lvs: Vec<_> = layout.lvs.iter().map(|l| (l.name.as_str(), l.size.as_str())).collect();
    assert_eq!(lvs, [("root", "6128M-"), ("home", "1328M-4G")]);
    // 6128 + 1328, 1 for LVM, 16 for LUKS, and a 511th (15) for the array.
    assert_eq!(layout.partitions[2].size, "7488M-");
    assert_eq!(layout.partitions[5].size, "7488M-");
    let layers = &captured.stacked["/dev/mapper/vg0-root"].layers;
    assert!(
        matches!(&layers[..], [Layer::Lvm { .. }, Layer::Luks { .. }, Layer::Raid { name, .. }] if name == "root"),
        "{layers:?}"
    );
    let told = captured.warnings.join("\n");
    assert!(told.contains("md127_crypt is opened by the key file /root/key: a node's container"), "{told}");
    assert!(told.contains("vg0 has 2.96 GiB free: on a node vg0/root takes all"), "{told}");
}

#[test]
fn lvm_across_two_disks_is_captured() {
    let mut lab = Lab::new();
    lab.disk("nvme", 259, 10240, &[(ESP, 600), (LINUX, 1024), (LVM, 8614)]);
    lab.disk("vdb", 254, 20480, &[(LVM, 20478)]);
    lab.mapped(0, "rl-root", "LVM-aaaabbbb", 29080, &["nvme3", "vdb1"]);
    lab.lvm(
        "  rl|root|/dev/mapper/rl-root|30492590080|linear|\n  rl|root|/dev/mapper/rl-root|30492590080|linear|\n",
        "  rl|/dev/nvme3|259|3\n  rl|/dev/vdb1|254|1\n",
        "  rl|30496784384|4194304\n",
    );
    lab.holds("dm-0", "xfs", Some(("/", 10000)));
    lab.holds("nvme1", "vfat", Some(("/boot/efi", 6)));
    lab.holds("nvme2", "xfs", Some(("/boot", 200)));
    let captured = lab.captured();
    assert_eq!(captured.layout.vgs[0].on, ["nvme3", "vdb1"]);
    assert_eq!(captured.layout.disks.len(), 2);
    let sizes: Vec<&str> = captured.layout.partitions.iter().map(|p| p.size.as_str()).collect();
    // 12128 MiB in the proportion of 8614 to 20478, in extents, and 1 for each.
    assert_eq!(sizes, ["600M", "1G", "3593M-", "8541M-"]);
    assert_eq!(captured.stacked["/dev/mapper/rl-root"].disks, ["/dev/nvme", "/dev/vdb"]);
    assert_eq!(captured.warnings.len(), 1, "{:?}", captured.warnings);
}

#[test]
fn what_no_layout_can_express_is_refused() {
    let advice = "; write a layout file by hand and give it with --layout";
    let mut lab = mirrored("raid5");
    lab.holds("md127", "xfs", Some(("/", 3000)));
    assert_eq!(
        lab.try_capture().unwrap_err().to_string(),
        format!(
            "{} lies on the RAID array md127 of level raid5; a layout can have raid1 only{advice}",
            lab.root().display()
        )
    );
    let thin = |place: &str| {
        let mut lab = guided_lvm();
        lab.mapped(5, "golden--vg-thin", "LVM-aaaaeeee", 100, &["vda3"]);
        lab.lvm(
            "  golden-vg|root|/dev/mapper/golden--vg-root|19390267392|linear|\n  \
             golden-vg|tp|/dev/mapper/golden--vg-tp|419430400|thin-pool|\n  \
             golden-vg|thin|/dev/mapper/golden--vg-thin|104857600|thin|\n",
            "  golden-vg|/dev/vda3|254|3\n",
            "  golden-vg|20422066176|8388608\n",
        );
        lab.swaps = String::new();
        lab.holds("dm-5", "ext4", Some((place, 10)));
        lab
    };
    let kind = "the LVM volume golden-vg/thin of kind thin; a layout can have linear ones only";
    let lab = thin("/var");
    assert_eq!(
        lab.try_capture().unwrap_err().to_string(),
        format!("{} lies on {kind}{advice}", lab.root().join("var").display())
    );
    // Data that the machine boots without are left out, loudly.
    let captured = thin("/srv").captured();
    assert_eq!(captured.warnings[0], format!("/srv lies on {kind}: it is left out of the layout"));
    assert!(captured.warnings[1].starts_with("the LVM volume golden-vg/tp (thin-pool, "), "{captured:?}");
    assert_eq!(captured.warnings.len(), 2);
}

#[test]
fn whole_disks_and_partitions_of_arrays_are_refused_by_name() {
    let mut lab = Lab::new();
    lab.disk("vda", 254, 10240, &[]);
    lab.holds("vda", "ext4", Some(("/", 3000)));
    let text = lab.try_capture().unwrap_err().to_string();
    assert!(text.contains("lies on the whole disk vda, which has no partition table; "), "{text}");
    let mut lab = mirrored("raid1");
    lab.block("virtual/block/md127/md127p1", "259:0", MIB);
    lab.write("sys/devices/virtual/block/md127/md127p1/partition", "1\n");
    lab.holds("md127p1", "ext4", Some(("/", 3000)));
    let text = lab.try_capture().unwrap_err().to_string();
    assert!(text.contains("lies on the partition md127p1 of the RAID array md127; "), "{text}");
    // Compressed memory is no swap of the machine's disks.
    let mut lab = guided_lvm();
    lab.block("virtual/block/zram0", "251:0", MIB);
    lab.swap_in_use("zram0");
    assert_eq!(lab.captured().warnings, [""; 0]);
    lab.disk("vdb", 253_000, 2048, &[(LINUX, 1024)]);
    lab.swap_in_use("vdb1");
    lab.disks.pop();
    assert_eq!(
        lab.captured().warnings,
        [
            "swap lies on vdb1, a partition of a disk without captured file systems: it is left out of the layout"
        ]
    );
}

fn refusal(text: &str) -> String {
    capture_from(&This, Path::new("/"), text, "").unwrap_err().to_string()
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
