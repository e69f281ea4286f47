//! Discovery, driven with trees that look like the sysfs of real machines.

use super::discover::{Disk, Roots, discover_at};
use super::leftovers::check_within;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

struct Machine {
    dir: tempfile::TempDir,
    roots: Roots,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let roots = Roots { sys: at("sys"), dev: at("dev"), proc: at("proc") };
        for path in [roots.sys.join("block"), roots.dev.join("disk/by-path"), roots.proc.join("self")] {
            fs::create_dir_all(path).unwrap();
        }
        let machine = Self { dir, roots };
        machine.write("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n");
        machine.write("proc/swaps", "Filename Type Size Used Priority\n");
        machine
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A disk whose device lies at `path` below /sys/devices.
    fn disk(&self, path: &str, name: &str, number: &str, facts: &[(&str, &str)]) {
        let real = format!("sys/devices/{path}/block/{name}");
        for (file, text) in [
            ("size", "41943040\n"),
            ("ro", "0\n"),
            ("removable", "0\n"),
            ("queue/rotational", "0\n"),
            ("queue/logical_block_size", "512\n"),
        ] {
            self.write(&format!("{real}/{file}"), text);
        }
        self.write(&format!("{real}/dev"), &format!("{number}\n"));
        self.write(&format!("{real}/uevent"), &format!("DEVNAME={}\nDEVTYPE=disk\n", name.replace('!', "/")));
        fs::create_dir_all(self.dir.path().join(&real).join("holders")).unwrap();
        for (file, text) in facts {
            self.write(&format!("{real}/{file}"), text);
        }
        symlink(
            Path::new("..").join(real.strip_prefix("sys/").unwrap()),
            self.roots.sys.join("block").join(name),
        )
        .unwrap();
    }

    fn partition(&self, disk: &str, name: &str, number: u32, dev: &str) {
        let base = format!("sys/block/{disk}/{name}");
        for (file, text) in [
            ("partition", format!("{number}\n")),
            ("start", "2048\n".into()),
            ("size", "4096\n".into()),
            ("dev", format!("{dev}\n")),
            ("uevent", format!("DEVNAME={name}\nDEVTYPE=partition\n")),
        ] {
            self.write(&format!("{base}/{file}"), &text);
        }
        fs::create_dir_all(self.dir.path().join(base).join("holders")).unwrap();
    }

    fn disks(&self) -> Vec<Disk> {
        discover_at(&self.roots).unwrap()
    }

    fn only(&self) -> Disk {
        let mut disks = self.disks();
        assert_eq!(disks.len(), 1, "{disks:?}");
        disks.remove(0)
    }
}

const PCI: &str = "pci0000:00/0000:00:1f.2";

#[test]
fn transports_are_told_apart() {
    let cases = [
        ("pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0", "sda", "sata"),
        ("pci0000:00/0000:00:05.0/virtio2/host3/target3:0:0/3:0:0:1", "sda", "scsi"),
        ("pci0000:00/0000:00:05.0/virtio2", "vda", "virtio"),
        ("pci0000:00/0000:00:04.0/nvme/nvme0", "nvme0n1", "nvme"),
        ("pci0000:00/0000:00:14.0/usb2/2-3/2-3:1.0/host6/target6:0:0/6:0:0:0", "sdb", "usb"),
        ("platform/fe330000.mmc/mmc_host/mmc0/mmc0:0001", "mmcblk0", "mmc"),
        ("pci0000:00/0000:03:00.0/host0/port-0:0/end_device-0:0/target0:0:0/0:0:0:0", "sda", "sas"),
        ("vbd-51712", "xvda", "xen"),
        ("virtual", "loop0", "loop"),
    ];
    for (path, name, transport) in cases {
        let machine = Machine::new();
        machine.disk(path, name, "8:0", &[]);
        assert_eq!(machine.only().transport, transport, "{path}");
    }
    let machine = Machine::new();
    machine.disk(&format!("{PCI}/ata1/host0/target0:0:0/0:0:0:0"), "sda", "8:0", &[]);
    machine.write(&format!("sys/devices/{PCI}/class"), "0x010180\n");
    assert_eq!(machine.only().transport, "ide");
}

#[test]
fn facts_are_read() {
    let machine = Machine::new();
    machine.disk(
        &format!("{PCI}/ata2/host1/target1:0:0/1:0:0:0"),
        "sda",
        "8:0",
        &[
            ("device/model", "QEMU HARDDISK   \n"),
            ("device/vpd_pg80", "\0\u{0}\0\u{6}QM0000 \n"),
            ("device/wwid", "t10.ATA  QEMU\n"),
            ("queue/rotational", "1\n"),
        ],
    );
    machine.write(&format!("sys/devices/{PCI}/ata2/ata_port/ata2/port_no"), "2\n");
    let disk = machine.only();
    assert_eq!((disk.bytes, disk.sector, disk.rotational), (20 << 30, 512, true));
    assert_eq!(disk.model.as_deref(), Some("QEMU HARDDISK"));
    assert_eq!(disk.serial.as_deref(), Some("QM0000"));
    assert_eq!(disk.wwn.as_deref(), Some("t10.ATA  QEMU"));
    assert_eq!(
        disk.paths,
        ["/dev/disk/by-path/pci-0000:00:1f.2-ata-2", "/dev/disk/by-path/pci-0000:00:1f.2-ata-2.0"]
    );
    assert_eq!(disk.device, machine.roots.dev.join("sda"));
}

#[test]
fn names_come_from_the_kernel() {
    let machine = Machine::new();
    machine.disk("pci0000:00/0000:00:04.0", "cciss!c0d0", "104:0", &[]);
    assert_eq!(machine.only().device, machine.roots.dev.join("cciss/c0d0"));
}

#[test]
fn what_is_no_disk_is_left_out() {
    let machine = Machine::new();
    for name in
        ["ram0", "zram0", "sr0", "fd0", "dm-0", "md127", "md_d0", "nbd0", "mmcblk0boot0", "mmcblk0rpmb"]
    {
        machine.disk("virtual", name, "1:0", &[]);
    }
    machine.disk("virtual/empty", "loop3", "7:3", &[("size", "0\n")]);
    machine.disk("pci0000:00/nvme", "nvme0c0n1", "259:0", &[("hidden", "1\n")]);
    assert_eq!(machine.disks(), []);
}

#[test]
fn use_is_seen() {
    let machine = Machine::new();
    machine.disk("pci0000:00/0000:00:05.0/virtio2", "vda", "254:0", &[]);
    machine.partition("vda", "vda1", 1, "254:1");
    machine.partition("vda", "vda2", 2, "254:2");
    machine.partition("vda", "vda3", 3, "254:3");
    assert_eq!(machine.only().in_use, [""; 0]);
    let dev = machine.roots.dev.display().to_string();
    machine.write(
        "proc/self/mountinfo",
        &format!(
            "27 1 254:1 / / rw - ext4 /dev/root rw\n28 27 0:40 / /data\\040x rw - btrfs {dev}/vda3 rw\n"
        ),
    );
    machine.write("proc/swaps", &format!("Filename Type Size Used Priority\n{dev}/vda2 partition 1 0 -2\n"));
    machine.write("sys/block/vda/vda3/holders/dm-0/x", "");
    let disk = machine.only();
    assert_eq!(
        disk.in_use,
        ["vda1 is mounted at /", "vda2 is swap in use", "vda3 is mounted at /data x", "vda3 is held by dm-0"]
    );
    assert_eq!(disk.partitions.len(), 3);
    assert_eq!((disk.partitions[1].start, disk.partitions[1].bytes), (1 << 20, 2 << 20));
}

#[test]
fn idle_volumes_of_a_former_life_are_told_from_busy_ones() {
    let machine = Machine::new();
    machine.disk("pci0000:00/0000:00:05.0/virtio2", "vda", "254:0", &[]);
    machine.partition("vda", "vda1", 1, "254:1");
    // An array that holds an encrypted container that holds a logical volume.
    for (name, number, facts) in [
        ("md127", "9:127", &[("md/level", "raid1\n")][..]),
        ("dm-0", "253:0", &[("dm/name", "crypt\n"), ("dm/uuid", "CRYPT-LUKS2-1-crypt\n")]),
        ("dm-1", "253:1", &[("dm/name", "vg-root\n"), ("dm/uuid", "LVM-abc\n")]),
    ] {
        machine.disk("virtual", name, number, facts);
    }
    machine.write("sys/block/vda/vda1/holders/md127/x", "");
    machine.write("sys/block/md127/holders/dm-0/x", "");
    machine.write("sys/block/dm-0/holders/dm-1/x", "");
    let disk = machine.only();
    assert_eq!(disk.in_use, [""; 0]);
    let texts: Vec<&str> = disk.leftovers.iter().map(|l| l.text.as_str()).collect();
    assert_eq!(
        texts,
        ["the LVM volume vg-root (dm-1)", "the encrypted container crypt (dm-0)", "the array md127 (raid1)"],
        "what lies above comes first"
    );
    // It may go with its disks, and with no others.
    let base = "sys/devices/virtual/block";
    for (above, below) in [
        ("dm-1", "../../dm-0"),
        ("dm-0", "../../md127"),
        ("md127", "../../../../pci0000:00/0000:00:05.0/virtio2/block/vda/vda1"),
    ] {
        let slaves = machine.dir.path().join(base).join(above).join("slaves");
        fs::create_dir(&slaves).unwrap();
        symlink(below, slaves.join(below.rsplit('/').next().unwrap())).unwrap();
    }
    check_within(&[&machine.only()]).unwrap();
    machine.disk("pci0000:00/0000:00:06.0/virtio3", "vdb", "254:16", &[]);
    let slaves = machine.dir.path().join(base).join("md127/slaves");
    symlink("../../../../pci0000:00/0000:00:06.0/virtio3/block/vdb", slaves.join("vdb")).unwrap();
    machine.write("sys/block/vdb/holders/md127/x", "");
    let disks = machine.disks();
    check_within(&disks.iter().collect::<Vec<_>>()).unwrap();
    let error = check_within(&[&disks[0]]).unwrap_err().to_string();
    assert!(error.contains("is in use: the LVM volume vg-root (dm-1) lies on vdb too"), "{error}");
    fs::remove_file(slaves.join("vdb")).unwrap();
    fs::remove_file(machine.dir.path().join("sys/block/vdb")).unwrap();
    // Mounted, it is none; nor is what lies below it.
    machine.write("proc/self/mountinfo", "27 1 253:1 / /mnt rw - ext4 /dev/mapper/vg-root rw\n");
    let disk = machine.only();
    assert_eq!(
        disk.in_use,
        [
            "vda1 is held by the array md127 (raid1): md127 is held by the encrypted container crypt (dm-0): dm-0 is held by \
          the LVM volume vg-root (dm-1): dm-1 is mounted at /mnt"
        ]
    );
    assert_eq!(disk.leftovers, []);
    // What is not known is never closed.
    machine.write("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n");
    machine.write("sys/block/dm-1/dm/uuid", "mpath-3600\n");
    assert!(machine.only().in_use[0].ends_with("dm-0 is held by dm-1"));
}

#[test]
fn partitions_of_an_array_are_looked_at() {
    let machine = Machine::new();
    machine.disk("pci0000:00/0000:00:05.0/virtio2", "vda", "254:0", &[]);
    machine.disk("virtual", "md127", "9:127", &[("md/level", "raid1\n")]);
    machine.partition("md127", "md127p1", 1, "259:0");
    machine.write("sys/block/vda/holders/md127/x", "");
    let disk = machine.only();
    assert_eq!((disk.in_use.len(), disk.leftovers.len()), (0, 1), "{disk:?}");
    machine.write("proc/self/mountinfo", "27 1 259:0 / /srv rw - ext4 /dev/md127p1 rw\n");
    let disk = machine.only();
    assert_eq!(disk.in_use, ["vda is held by the array md127 (raid1): md127p1 is mounted at /srv"]);
    assert_eq!(disk.leftovers, []);
    // What holds such a partition goes first, and lies on the array's disks and no others.
    machine.write("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n");
    machine.disk("virtual", "dm-0", "253:0", &[("dm/name", "vg-root\n"), ("dm/uuid", "LVM-abc\n")]);
    machine.write("sys/block/md127/md127p1/holders/dm-0/x", "");
    let base = machine.dir.path().join("sys/devices/virtual/block");
    for (above, below) in
        [("dm-0", "../../md127/md127p1"), ("md127", "../../../../pci0000:00/0000:00:05.0/virtio2/block/vda")]
    {
        let slaves = base.join(above).join("slaves");
        fs::create_dir(&slaves).unwrap();
        symlink(below, slaves.join(below.rsplit('/').next().unwrap())).unwrap();
    }
    let disk = machine.only();
    assert_eq!(disk.in_use, [""; 0]);
    let names: Vec<&str> = disk.leftovers.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["dm-0", "md127"]);
    check_within(&[&disk]).unwrap();
}

#[test]
fn a_broken_entry_does_not_hide_the_others() {
    let machine = Machine::new();
    machine.disk("pci0000:00/0000:00:05.0/virtio2", "vda", "254:0", &[("size", "many\n")]);
    machine.disk("pci0000:00/0000:00:06.0/virtio3", "vdb", "254:16", &[]);
    assert_eq!(machine.only().name, "vdb");
}
