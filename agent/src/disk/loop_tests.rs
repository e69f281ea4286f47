//! The whole way on real block devices: loop devices on sparse files, 512 and 4096-byte sectors, judged by the tools that
//! people trust (sgdisk, sfdisk, e2fsck, xfs_repair, btrfs, fsck.vfat, blkid). Needs root and those tools.

use super::assemble::Keys;
use super::discover::{Disk, discover, kernel_partitions};
use super::plan::{Plan, compute};
use super::stage::{Formatted, duplicate_uuids};
use super::{clear_listed, show_disks, tool};
use ka_layout::model::Layout;
use ka_layout::order::Golden;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

const TOOLS: [&str; 14] = [
    "losetup",
    "sgdisk",
    "sfdisk",
    "wipefs",
    "blkid",
    "mke2fs",
    "e2fsck",
    "dumpe2fs",
    "mkfs.xfs",
    "xfs_repair",
    "mkfs.btrfs",
    "btrfs",
    "mkfs.vfat",
    "mkswap",
];

/// These tests mount and look at all disks of the machine: one at a time.
static ONE: Mutex<()> = Mutex::new(());

/// Whether such tests can run here; says so if not.
pub(super) fn possible() -> bool {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: loop devices need root");
        return false;
    }
    if let Some(missing) = TOOLS.iter().find(|t| tool::find(t).is_none()) {
        println!("SKIPPED: {missing} is not installed");
        return false;
    }
    true
}

/// A loop device on a sparse file; gone when dropped.
pub(super) struct Loop {
    pub(super) device: PathBuf,
    dir: tempfile::TempDir,
    _guard: Option<MutexGuard<'static, ()>>,
}

impl Loop {
    pub(super) fn new(mib: u64, sector: u32) -> Self {
        let guard = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        Self::make(mib, sector, Some(guard))
    }

    /// Another disk of the same machine.
    pub(super) fn beside(&self, mib: u64) -> Self {
        assert!(self._guard.is_some());
        Self::make(mib, 512, None)
    }

    pub(super) fn make(mib: u64, sector: u32, guard: Option<MutexGuard<'static, ()>>) -> Self {
        // In memory where there is such a place: these tests sync hundreds of times.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let text = says(
            "losetup",
            &[
                "--find",
                "--show",
                "--partscan",
                "--sector-size",
                &sector.to_string(),
                &image.display().to_string(),
            ],
        );
        fs::create_dir(dir.path().join("target")).unwrap();
        Self { device: text.trim().into(), dir, _guard: guard }
    }

    pub(super) fn name(&self) -> String {
        self.device.display().to_string()
    }

    pub(super) fn disk(&self) -> Disk {
        discover().unwrap().into_iter().find(|d| d.device == self.device).unwrap()
    }

    pub(super) fn target(&self) -> PathBuf {
        self.dir.path().join("target")
    }

    pub(super) fn record(&self) -> PathBuf {
        self.dir.path().join("run/disks")
    }

    pub(super) fn layout(&self, text: &str) -> Layout {
        let text = text.replace("\ntable =", &format!("\nmatch = {{ path = \"{}\" }}\ntable =", self.name()));
        ka_layout::parse(&text).unwrap_or_else(|e| panic!("{e}"))
    }

    pub(super) fn plan(&self, text: &str) -> Plan {
        compute(&self.layout(text), &[self.disk()], &Golden::default()).unwrap()
    }

    pub(super) fn part(&self, number: u32) -> String {
        let name = self.device.file_name().unwrap().to_str().unwrap().to_owned();
        let found = kernel_partitions(&name).unwrap().into_iter().find(|p| p.number == number);
        found.unwrap().device.display().to_string()
    }

    pub(super) fn formatted(&self, text: &str) -> Formatted {
        self.plan(text).partition(&self.record(), &Keys::new()).unwrap().format(&self.target()).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let file = File::open(&self.device).unwrap();
        let name = self.device.file_name().unwrap().to_str().unwrap().to_owned();
        for p in kernel_partitions(&name).unwrap() {
            if let Err(e) = ka_sys::block::delete_partition(&file, p.number) {
                println!("deleting {}: {e}", p.name);
            }
        }
        drop(file);
        let done = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(done.is_ok_and(|s| s.success()), "detaching {}", self.device.display());
    }
}

/// What a tool prints; it must end well.
pub(super) fn says(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).env("LC_ALL", "C").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn fails(program: &str, args: &[&str]) -> bool {
    !Command::new(program).args(args).output().unwrap().status.success()
}

/// The value of `key` that blkid finds on a device, probing it anew.
pub(super) fn blkid(device: &str, key: &str) -> String {
    says("blkid", &["-p", "-o", "value", "-s", key, device]).trim().to_owned()
}

/// Every kind of file system, with numbers out of order as on Debian's cloud images. vfat is not mounted: not every kernel
/// that runs these tests can.
const ALL: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
uuid = "0fc4b3a2-1111-4222-8333-444455556666"
[[partition]]
number = 14
type = "bios-boot"
size = "3M"
[[partition]]
number = 15
type = "esp"
name = "EFI System"
size = "64M"
format = { fs = "vfat", uuid = "AB12-34CD", label = "ESP" }
[[partition]]
number = 2
type = "swap"
size = "32M"
format = { fs = "swap", uuid = "a0000002-1111-4222-8333-444455556666", label = "swap" }
[[partition]]
number = 3
type = "linux"
size = "40M"
bootable = true
format = { fs = "ext2", uuid = "a0000003-1111-4222-8333-444455556666", label = "two" }
mount = { path = "/a/deep/place" }
[[partition]]
number = 4
type = "linux"
size = "40M"
format = { fs = "ext3", uuid = "a0000004-1111-4222-8333-444455556666" }
mount = { path = "/a/deep", options = "ro,noatime" }
[[partition]]
number = 5
type = "linux-home"
size = "140M"
format = { fs = "btrfs", uuid = "a0000005-1111-4222-8333-444455556666", label = "b" }
mount = { path = "/b", options = "compress=zstd" }
[[partition]]
number = 6
type = "linux"
size = "320M"
format = { fs = "xfs", uuid = "a0000006-1111-4222-8333-444455556666", label = "x", options = ["-m", "crc=1,bigtime=0"] }
mount = { path = "/x" }
[[partition]]
number = 1
type = "linux-root-x86-64"
name = "Grüße"
uuid = "b0000001-1111-4222-8333-444455556666"
size = "fill"
format = { fs = "ext4", uuid = "a0000001-1111-4222-8333-444455556666", label = "root", options = ["-O", "^metadata_csum"] }
mount = { path = "/" }
"#;

const MOUNTS: [(&str, u32, &str); 5] =
    [("", 1, "ext4"), ("a/deep", 4, "ext3"), ("a/deep/place", 3, "ext2"), ("b", 5, "btrfs"), ("x", 6, "xfs")];

fn judge_file_systems(disk: &Loop) {
    for number in [1, 3, 4] {
        says("e2fsck", &["-fn", &disk.part(number)]);
    }
    says("xfs_repair", &["-n", &disk.part(6)]);
    says("btrfs", &["check", "--readonly", &disk.part(5)]);
    says("fsck.vfat", &["-n", &disk.part(15)]);
    for (number, fs, uuid, label) in [
        (1, "ext4", "a0000001-1111-4222-8333-444455556666", "root"),
        (2, "swap", "a0000002-1111-4222-8333-444455556666", "swap"),
        (3, "ext2", "a0000003-1111-4222-8333-444455556666", "two"),
        (4, "ext3", "a0000004-1111-4222-8333-444455556666", ""),
        (5, "btrfs", "a0000005-1111-4222-8333-444455556666", "b"),
        (6, "xfs", "a0000006-1111-4222-8333-444455556666", "x"),
        (15, "vfat", "AB12-34CD", "ESP"),
    ] {
        let device = disk.part(number);
        assert_eq!(
            (blkid(&device, "TYPE"), blkid(&device, "UUID"), blkid(&device, "LABEL")),
            (fs.into(), uuid.into(), label.into())
        );
    }
    assert!(!says("dumpe2fs", &["-h", &disk.part(1)]).contains("metadata_csum"), "options reach mke2fs");
}

fn whole_way(sector: u32) {
    if !possible() {
        return;
    }
    let disk = Loop::new(1200, sector);
    let mut formatted = disk.formatted(ALL);
    assert_eq!(fs::read_to_string(disk.record()).unwrap(), format!("{}\n", disk.name()));
    for (path, number, fs) in MOUNTS {
        let place = disk.target().join(path);
        let line = says("findmnt", &["-n", "-o", "SOURCE,FSTYPE,OPTIONS", &place.display().to_string()]);
        assert!(line.starts_with(&disk.part(number)) && line.contains(fs), "{line}");
        assert!(line.contains(" rw,"), "the clone's own ro must not hold while the tree is restored: {line}");
        let mut file = File::create(place.join("file")).unwrap();
        file.write_all(&vec![7; 1 << 20]).unwrap();
    }
    // Nothing of this can boot yet: there is no table at all.
    assert!(fails("sfdisk", &["--json", &disk.name()]), "a table before the end");

    let volumes = formatted.volumes();
    let root = volumes.iter().find(|v| v.mount.as_ref().is_some_and(|m| m.path == "/")).unwrap();
    assert_eq!((root.device.as_str(), root.disk.as_str()), (disk.part(1).as_str(), disk.name().as_str()));
    assert_eq!(root.partuuid.as_deref(), Some("b0000001-1111-4222-8333-444455556666"));
    assert_eq!(volumes.len(), 8);

    formatted.commit_table().unwrap();
    formatted.finish().unwrap();
    assert!(!disk.record().exists());
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&disk.name()));

    let verdict = says("sgdisk", &["--verify", &disk.name()]);
    assert!(verdict.contains("No problems found"), "{verdict}");
    says("sfdisk", &["--verify", &disk.name()]);
    let json: Table = table(&disk);
    assert_eq!(json.id.to_lowercase(), "0fc4b3a2-1111-4222-8333-444455556666");
    let numbers: Vec<u32> = json.rows.iter().map(|r| r.number).collect();
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [1, 2, 3, 4, 5, 6, 14, 15]);
    // The table on the disk is what the kernel was told.
    let known = kernel_partitions(disk.device.file_name().unwrap().to_str().unwrap()).unwrap();
    for row in &json.rows {
        let kernel = known.iter().find(|k| k.number == row.number).unwrap();
        assert_eq!(
            (kernel.start, kernel.bytes),
            (row.start * u64::from(sector), row.size * u64::from(sector))
        );
    }
    let root = json.rows.iter().find(|r| r.number == 1).unwrap();
    assert_eq!(
        (root.name.as_str(), root.uuid.to_lowercase().as_str()),
        ("Grüße", "b0000001-1111-4222-8333-444455556666")
    );
    assert!(json.rows.iter().all(|r| r.legacy_boot == (r.number == 3)));
    judge_file_systems(&disk);
}

#[test]
fn the_whole_way_on_512_byte_sectors() {
    whole_way(512);
}

#[test]
fn the_whole_way_on_4096_byte_sectors() {
    whole_way(4096);
}

struct Table {
    id: String,
    rows: Vec<Row>,
}

struct Row {
    number: u32,
    start: u64,
    size: u64,
    name: String,
    uuid: String,
    legacy_boot: bool,
}

/// What sgdisk and sfdisk say of the table: numbers by sgdisk, as sfdisk names by device.
fn table(disk: &Loop) -> Table {
    let parsed = ka_layout::facts::sfdisk(&says("sfdisk", &["--json", &disk.name()])).unwrap();
    let listed = says("sgdisk", &["--print", &disk.name()]);
    let row = |p: &ka_layout::facts::TablePartition| {
        let line = listed.lines().find(|l| l.split_whitespace().nth(1) == Some(p.start.to_string().as_str()));
        Row {
            number: line.unwrap().split_whitespace().next().unwrap().parse().unwrap(),
            start: p.start,
            size: p.size,
            name: p.name.clone().unwrap_or_default(),
            uuid: p.uuid.clone().unwrap_or_default(),
            legacy_boot: p.attrs.as_ref().is_some_and(|a| a.contains("LegacyBIOSBootable")),
        }
    };
    Table { rows: parsed.partitions.iter().map(row).collect(), id: parsed.id }
}

/// Logical partitions, the second beyond 4 GiB, where mbrman's own chain goes wrong.
const MBR: &str = r#"version = 1
[[disk]]
name = "system"
table = "mbr"
uuid = "1a2b3c4d"
[[partition]]
number = 1
type = "linux"
bootable = true
size = "100M"
format = { fs = "ext4", uuid = "c0000001-1111-4222-8333-444455556666" }
mount = { path = "/" }
[[partition]]
number = 5
type = "swap"
size = "4500M"
format = { fs = "swap", uuid = "c0000005-1111-4222-8333-444455556666" }
[[partition]]
number = 6
type = "linux"
size = "fill"
format = { fs = "ext4", uuid = "c0000006-1111-4222-8333-444455556666" }
mount = { path = "/home" }
[[partition]]
number = 7
type = "0x83"
size = "50M"
"#;

fn mbr_way(sector: u32) {
    if !possible() {
        return;
    }
    let disk = Loop::new(6000, sector);
    let mut formatted = disk.formatted(MBR);
    fs::write(disk.target().join("home/file"), "x").unwrap();
    formatted.commit_table().unwrap();
    let volumes = formatted.volumes();
    formatted.finish().unwrap();
    let verdict = says("sfdisk", &["--verify", &disk.name()]);
    assert!(verdict.contains("No errors detected"), "{verdict}");
    let parsed = ka_layout::facts::sfdisk(&says("sfdisk", &["--json", &disk.name()])).unwrap();
    assert_eq!(parsed.id, "0x1a2b3c4d");
    let kinds: Vec<(&str, bool)> = parsed.partitions.iter().map(|p| (p.kind.as_str(), p.bootable)).collect();
    assert_eq!(kinds, [("83", true), ("5", false), ("82", false), ("83", false), ("83", false)]);
    let known = kernel_partitions(disk.device.file_name().unwrap().to_str().unwrap()).unwrap();
    let numbers: Vec<u32> = known.iter().map(|k| k.number).collect();
    assert_eq!(numbers, [1, 2, 5, 6, 7]);
    for (kernel, row) in known.iter().zip(&parsed.partitions) {
        assert_eq!(kernel.start, row.start * u64::from(sector));
        assert!(kernel.number == 2 || kernel.bytes == row.size * u64::from(sector));
    }
    // What blkid reads from the table is what the volumes say.
    for volume in &volumes {
        assert_eq!(Some(blkid(&volume.device, "PART_ENTRY_UUID")), volume.partuuid, "{}", volume.device);
    }
    says("e2fsck", &["-fn", &disk.part(1)]);
    says("e2fsck", &["-fn", &disk.part(6)]);
    assert_eq!(blkid(&disk.part(5), "UUID"), "c0000005-1111-4222-8333-444455556666");
}

#[test]
fn mbr_with_logical_partitions_on_512_byte_sectors() {
    mbr_way(512);
}

#[test]
fn mbr_with_logical_partitions_on_4096_byte_sectors() {
    mbr_way(4096);
}

const SMALL: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
[[partition]]
type = "linux"
size = "fill"
format = { fs = "ext4" }
mount = { path = "/" }
"#;

/// Signatures of a former life, where they really lie: offset from the beginning, or from the end when negative.
const TRACES: [(i64, &[u8]); 8] = [
    (0, b"LUKS\xba\xbe\0\x02"),
    (512, b"LABELONE\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0LVM2 001"),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0]),
    (0x10040, b"_BHRfS_M"),
    (4 << 20, b"SKUL\xba\xbe\0\x02"),
    (-8192, &[0xfc, 0x4e, 0x2b, 0xa9, 1, 0, 0, 0]),
    (-65536, &[0xfc, 0x4e, 0x2b, 0xa9, 0, 0, 0, 0]),
    (-1024, b"Intel Raid ISM Cfg Sig. 1.3.00"),
];

/// Where the traces of an area lie on the disk.
fn traces(start: u64, bytes: u64) -> impl Iterator<Item = (u64, &'static [u8])> {
    TRACES.iter().map(move |(offset, data)| {
        let base = if *offset < 0 { start + bytes } else { start };
        (base.checked_add_signed(*offset).unwrap(), *data)
    })
}

#[test]
fn leftovers_of_a_former_life_are_gone() {
    if !possible() {
        return;
    }
    let disk = Loop::new(400, 512);
    // A former installation with other partitions, and traces at the ends of the disk and of each partition.
    let text =
        SMALL.replace("[[partition]]", "[[partition]]\ntype = \"linux\"\nsize = \"90M\"\n[[partition]]");
    let mut former = disk.formatted(&text);
    former.commit_table().unwrap();
    former.finish().unwrap();
    let old = kernel_partitions(disk.device.file_name().unwrap().to_str().unwrap()).unwrap();
    let file = File::options().write(true).open(&disk.device).unwrap();
    let places =
        || old.iter().map(|p| (p.start, p.bytes)).chain([(0, 400 << 20)]).flat_map(|(s, b)| traces(s, b));
    for (at, data) in places() {
        file.write_all_at(data, at).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    assert!(
        !says("wipefs", &["--no-act", &disk.name()]).is_empty(),
        "the traces are not seen: what is tested here?"
    );

    let partitioned = disk.plan(SMALL).partition(&disk.record(), &Keys::new()).unwrap();
    assert_eq!(says("wipefs", &["--no-act", &disk.name()]), "");
    assert_eq!(says("wipefs", &["--no-act", &disk.part(1)]), "");
    let image = File::open(disk.dir.path().join("image")).unwrap();
    for (at, data) in places() {
        let mut now = vec![1; data.len()];
        image.read_exact_at(&mut now, at).unwrap();
        assert!(now.iter().all(|b| *b == 0), "a trace at {at} is still there: {now:?}");
    }
    drop(partitioned);
}

#[test]
fn a_disk_in_use_is_refused_and_unharmed() {
    if !possible() {
        return;
    }
    let disk = Loop::new(200, 512);
    let plan = disk.plan(SMALL);
    let mut first = disk.formatted(SMALL);
    first.commit_table().unwrap();
    // Mounted since the plan was made. A check that fails lists nothing, not even what an earlier try had listed.
    let error = format!("{:#}", plan.partition(&disk.record(), &Keys::new()).err().unwrap());
    let expected = format!(
        "{}p1 is mounted at {}",
        disk.device.file_name().unwrap().to_str().unwrap(),
        disk.target().display()
    );
    assert!(error.contains("is in use: ") && error.contains(&expected), "{error}");
    assert!(!disk.record().exists());
    let error = compute(&disk.layout(SMALL), &[disk.disk()], &Golden::default()).unwrap_err().to_string();
    assert!(error.contains(&expected), "{error}");
    first.finish().unwrap();
    says("sgdisk", &["--verify", &disk.name()]);

    // Locked by another program, as udev or sfdisk do.
    let other = File::open(&disk.device).unwrap();
    ka_sys::block::lock_exclusive(&other, std::time::Duration::ZERO).unwrap();
    let plan = disk.plan(SMALL);
    let error = format!("{:#}", plan.partition(&disk.record(), &Keys::new()).err().unwrap());
    assert!(error.starts_with(&format!("locking {}: another program works on it", disk.name())), "{error}");
    let verdict = says("sgdisk", &["--verify", &disk.name()]);
    assert!(verdict.contains("No problems found"), "{verdict}");
}

#[test]
fn a_file_system_in_use_cannot_be_finished_and_is_cleared() {
    if !possible() {
        return;
    }
    let disk = Loop::new(200, 512);
    let mut formatted = disk.formatted(SMALL);
    formatted.commit_table().unwrap();
    let busy = File::create(disk.target().join("open")).unwrap();
    let error = format!("{:#}", formatted.finish().unwrap_err());
    assert!(error.starts_with(&format!("unmounting {}", disk.target().display())), "{error}");
    drop(busy);
    // The record is still there, so the supervisor finds the disk and makes it unbootable.
    assert_eq!(clear_listed(&disk.record()).unwrap(), std::slice::from_ref(&disk.device));
    assert!(!disk.record().exists(), "a list that was worked off is gone");
    assert!(fails("sfdisk", &["--json", &disk.name()]));
    let mut ends = vec![0xff; 34 * 512];
    let file = File::open(&disk.device).unwrap();
    file.read_exact_at(&mut ends, 0).unwrap();
    assert!(ends.iter().all(|b| *b == 0));
    file.read_exact_at(&mut ends[..33 * 512], (200 << 20) - 33 * 512).unwrap();
    assert!(ends.iter().all(|b| *b == 0));
}

#[test]
fn another_mount_namespace_that_holds_the_file_system_is_waited_for() {
    if !possible() {
        return;
    }
    let disk = Loop::new(200, 512);
    let mut formatted = disk.formatted(SMALL);
    formatted.commit_table().unwrap();
    let mut other = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 2"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let start = std::time::Instant::now();
    formatted.finish().unwrap();
    let held = start.elapsed();
    assert!(held > std::time::Duration::from_secs(1), "it was held until the other one ended: {held:?}");
    other.wait().unwrap();
}

#[test]
fn a_uuid_that_another_disk_has_is_warned_of() {
    if !possible() {
        return;
    }
    let text = SMALL
        .replace("{ fs = \"ext4\" }", "{ fs = \"ext4\", uuid = \"d0000001-1111-4222-8333-444455556666\" }");
    let disk = Loop::new(200, 512);
    let other = disk.beside(200);
    drop(other.formatted(&text));
    let now = discover().unwrap();
    assert_eq!(
        duplicate_uuids(&disk.plan(&text), &now),
        [format!(
            "{} on another disk has the UUID d0000001-1111-4222-8333-444455556666 that is about to be used: the clone may \
             mount the wrong one",
            other.part(1)
        )]
    );
    assert_eq!(duplicate_uuids(&disk.plan(SMALL), &now), [""; 0]);
    assert_eq!(duplicate_uuids(&other.plan(&text), &now), [""; 0], "its own old content does not count");
}

#[test]
fn a_failed_installation_leaves_nothing_that_boots() {
    if !possible() {
        return;
    }
    let disk = Loop::new(200, 512);
    let mut former = disk.formatted(SMALL);
    former.commit_table().unwrap();
    former.clear_table().unwrap();
    drop(former);
    assert!(fails("sfdisk", &["--json", &disk.name()]));
    assert!(
        !fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&disk.name()),
        "unmounted when dropped"
    );

    // A mkfs that fails is named with its last words, and nothing stands on the disk.
    let bad = SMALL.replace("{ fs = \"ext4\" }", "{ fs = \"ext4\", options = [\"-b\", \"777\"] }");
    let error = format!(
        "{:#}",
        disk.plan(&bad)
            .partition(&disk.record(), &Keys::new())
            .unwrap()
            .format(&disk.target())
            .err()
            .unwrap()
    );
    assert!(error.starts_with(&format!("making ext4 on {}: ", disk.part(1))), "{error}");
    assert!(error.contains("invalid block size"), "{error}");
    assert!(fails("sfdisk", &["--json", &disk.name()]));
}

#[test]
fn a_captured_layout_makes_the_same_machine() {
    if !possible() {
        return;
    }
    for text in [ALL, MBR] {
        let golden = Loop::new(6000, 512);
        let mut formatted = golden.formatted(text);
        formatted.commit_table().unwrap();
        fs::create_dir(golden.target().join("etc")).unwrap();
        fs::write(golden.target().join("etc/fstab"), "UUID=x / ext4 errors=remount-ro 0 1\n").unwrap();
        let captured = ka_layout::capture(Some(&golden.target())).unwrap();
        let original = formatted.volumes();
        formatted.finish().unwrap();

        let written = ka_layout::to_toml(&captured.layout, &captured.warnings);
        let mut layout = ka_layout::parse(&written).unwrap_or_else(|e| panic!("{e}\n{written}"));
        assert_eq!(layout, captured.layout);
        let root =
            layout.partitions.iter().find(|p| p.mount.as_ref().is_some_and(|m| m.path == "/")).unwrap();
        assert_eq!(root.mount.as_ref().unwrap().options.as_deref(), Some("errors=remount-ro"));
        assert_eq!(captured.golden_filesystems[0].path.as_deref(), Some("/"));

        let features = |disk: &Loop| {
            let ext = ka_layout::facts::ext_options(&says("dumpe2fs", &["-h", &disk.part(1)]));
            let xfs =
                (text == ALL).then(|| ka_layout::facts::xfs_options(&says("xfs_info", &[&disk.part(6)])));
            (ext, xfs)
        };
        let golden_features = features(&golden);
        // mkfs.btrfs refuses a UUID that it sees on another disk, so the golden one goes first.
        drop(golden);

        // A bigger disk takes it.
        let clone = Loop::new(7000, 512);
        layout.disks[0].matching = ka_layout::model::Match { path: Some(clone.name()), ..Default::default() };
        let plan = compute(&layout, &[clone.disk()], &Golden::default()).unwrap();
        let mut formatted =
            plan.partition(&clone.record(), &Keys::new()).unwrap().format(&clone.target()).unwrap();
        formatted.commit_table().unwrap();
        let made = formatted.volumes();
        for volume in original.iter().filter(|v| v.fs.is_some()) {
            let same = made.iter().find(|v| v.number == volume.number).unwrap();
            assert_eq!(
                (&same.uuid, &same.label, &same.partuuid, &same.kind, same.fs),
                (&volume.uuid, &volume.label, &volume.partuuid, &volume.kind, volume.fs)
            );
            if let Some(mount) = &volume.mount {
                assert_eq!(same.mount.as_ref().map(|m| &m.path), Some(&mount.path));
            }
        }
        assert_eq!(golden_features, features(&clone), "the clone has the golden features");
        formatted.finish().unwrap();
    }
}

#[test]
fn disks_are_shown_with_what_a_layout_makes_of_them() {
    if !possible() {
        return;
    }
    let disk = Loop::new(200, 512);
    let formatted = disk.formatted(SMALL);
    drop(formatted);
    let text = show_disks(Some(&disk.layout(&SMALL.replace("\"fill\"", "\"1G\"")))).unwrap();
    assert!(text.contains(&format!("{} (200 MiB, loop)", disk.name())), "{text}");
    assert!(text.contains("ext4 "), "{text}");
    assert!(text.contains("=> matches [[disk]] `system`, but disk `system` is too small: "), "{text}");
    let none = show_disks(Some(
        &ka_layout::parse(&SMALL.replace("table =", "match = { serial = \"no-such\" }\ntable =")).unwrap(),
    ));
    assert!(none.unwrap().contains("no disk matches [[disk]] `system`:"));
    assert!(show_disks(None).unwrap().contains(&disk.name()));
}

#[test]
fn nothing_is_mounted_outside_the_target() {
    if !possible() {
        return;
    }
    // A path in the layout cannot leave the target: the layout is refused before anything happens.
    let error = ka_layout::parse(&SMALL.replace("\"/\"", "\"/../../etc\"")).unwrap_err().to_string();
    assert!(error.contains("contains `..`"), "{error}");
    assert!(Path::new("/etc/passwd").exists());
}
