//! On real block devices (loop devices): what is preserved stays, byte for byte; btrfs subvolumes. As in `loop_tests`, this
//! needs root and the tools.

use super::assemble::Keys;
use super::clear_listed;
use super::discover::kernel_partitions;
use super::loop_tests::{Loop, blkid, possible, says};
use super::plan::compute;
use ka_layout::order::Golden;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const FORMER: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
[[partition]]
type = "linux"
size = "60M"
format = { fs = "ext4" }
mount = { path = "/" }
[[partition]]
number = 7
type = "data"
size = "40M"
name = "mine"
bootable = true
format = { fs = "ext4", label = "keepme" }
mount = { path = "/home" }
[[partition]]
type = "linux"
size = "50M"
"#;

/// `/home` is kept; before and behind it everything is new.
const KEEPING: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
[[partition]]
type = "linux"
size = "fill"
format = { fs = "ext4" }
mount = { path = "/" }
[[partition]]
number = 7
type = "data"
size = "30M-50M"
preserve = true
[[partition]]
type = "linux"
size = "fill"
format = { fs = "ext4" }
mount = { path = "/new" }
"#;

/// The bytes of a partition, past every cache.
fn content(disk: &Loop, number: u32) -> Vec<u8> {
    let file = File::open(disk.part(number)).unwrap();
    ka_sys::block::flush_buffers(&file).unwrap();
    let mut bytes = vec![0; usize::try_from(ka_sys::block::size(&file).unwrap()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn preserving(former: &str, keeping: &str, number: u32) {
    if !possible() {
        return;
    }
    let disk = Loop::new(300, 512);
    let mut first = disk.formatted(former);
    fs::write(disk.target().join("home/file"), "mine").unwrap();
    first.commit_table().unwrap();
    first.finish().unwrap();
    let entry = |disk: &Loop| {
        let start = kernel_partitions(disk.device.file_name().unwrap().to_str().unwrap()).unwrap();
        let start = start.into_iter().find(|p| p.number == number).unwrap().start / 512;
        let parsed = ka_layout::facts::sfdisk(&says("sfdisk", &["--json", &disk.name()])).unwrap();
        let entry = parsed.partitions.into_iter().find(|p| p.start == start).unwrap();
        (parsed.id, entry, blkid(&disk.part(number), "PART_ENTRY_UUID"))
    };
    let (before, bytes) = (entry(&disk), content(&disk, number));
    let plan = disk.plan(keeping);
    assert!(plan.to_string().contains(" preserved: ext4 "), "{plan}");
    assert!(plan.to_string().contains("everything on it but what is preserved is replaced"), "{plan}");

    // A failure leaves a table with what is kept alone.
    let formatted = plan.partition(&disk.record(), &Keys::new()).unwrap().format(&disk.target()).unwrap();
    drop(formatted);
    clear_listed(&disk.record()).unwrap();
    let parsed = ka_layout::facts::sfdisk(&says("sfdisk", &["--json", &disk.name()])).unwrap();
    let real = parsed.partitions.iter().filter(|p| p.kind != "5").count();
    assert_eq!(real, 1, "{parsed:?}");
    assert_eq!(entry(&disk), before);
    assert!(content(&disk, number) == bytes, "a failed installation changed what is preserved");

    let mut formatted = disk.formatted(keeping);
    fs::write(disk.target().join("new/file"), "x").unwrap();
    formatted.commit_table().unwrap();
    formatted.clear_table().unwrap();
    assert_eq!(entry(&disk), before);
    formatted.commit_table().unwrap();
    formatted.finish().unwrap();
    assert_eq!(entry(&disk), before, "start, size, type, name, attributes and PARTUUID are kept");
    assert!(content(&disk, number) == bytes, "the installation changed what is preserved");
    let verdict = says("sfdisk", &["--verify", &disk.name()]);
    assert!(verdict.contains("No errors detected"), "{verdict}");

    // Mounted, it is shown with what it holds, and not made anew.
    let mounted = keeping.replace("preserve = true", "preserve = true\nmount = { path = \"/home\" }");
    let mut formatted = disk.formatted(&mounted);
    assert_eq!(fs::read_to_string(disk.target().join("home/file")).unwrap(), "mine");
    let home = formatted.volumes().into_iter().find(|v| v.number == number).unwrap();
    assert_eq!(
        (home.uuid.unwrap(), home.partuuid.unwrap()),
        (blkid(&disk.part(number), "UUID"), before.2.clone())
    );
    formatted.commit_table().unwrap();
    formatted.finish().unwrap();
    assert_eq!(entry(&disk), before);

    // What is not as the layout says is refused, and nothing is written.
    let refused = |text: &str| {
        let error = compute(&disk.layout(text), &[disk.disk()], &Golden::default()).unwrap_err();
        format!("{error:#}")
    };
    let error = refused(&keeping.replace("30M-50M", "60M"));
    assert!(error.contains(&format!("preserve: partition {number} has 40M, not 60M")), "{error}");
    let error = refused(&keeping.replace("\"data\"\nsize = \"30M", "\"swap\"\nsize = \"30M"));
    assert!(error.contains(", not swap"), "{error}");
    let error = refused(&keeping.replacen("size = \"fill\"", "size = \"100M\"", 1));
    assert!(error.contains("they overlap"), "{error}");
    assert_eq!(entry(&disk), before);
}

#[test]
fn a_partition_is_preserved_on_gpt() {
    preserving(FORMER, KEEPING, 7);
}

#[test]
fn a_logical_partition_is_preserved_on_mbr() {
    let mbr = |text: &str| {
        let text = text.replace("\"gpt\"", "\"mbr\"").replace("number = 7", "number = 5");
        let text = text.replace("name = \"mine\"\nbootable = true\n", "");
        text.replacen("[[partition]]\ntype", "[[partition]]\nnumber = 1\ntype", 1)
    };
    preserving(&mbr(FORMER), &mbr(KEEPING), 5);
}

/// The numbers of logical partitions are counted along their chain: what is kept alone must not be counted anew.
#[test]
fn a_later_logical_partition_keeps_its_number() {
    const LATER: &str = r#"version = 1
[[disk]]
name = "system"
table = "mbr"
[[partition]]
number = 1
type = "linux"
size = "50M"
format = { fs = "ext4" }
mount = { path = "/" }
[[partition]]
number = 5
type = "swap"
size = "20M"
format = { fs = "swap" }
[[partition]]
number = 6
type = "data"
size = "40M"
format = { fs = "ext4" }
mount = { path = "/home" }
"#;
    let keeping = LATER
        .replace("size = \"40M\"\nformat = { fs = \"ext4\" }\n", "size = \"30M-50M\"\npreserve = true\n");
    let keeping = keeping.replace(
        "mount = { path = \"/home\" }",
        "[[partition]]\ntype = \"linux\"\nsize = \"fill\"\n\
        format = { fs = \"ext4\" }\nmount = { path = \"/new\" }",
    );
    if !possible() {
        return;
    }
    let disk = Loop::new(300, 512);
    let mut first = disk.formatted(LATER);
    first.commit_table().unwrap();
    first.finish().unwrap();
    let bytes = content(&disk, 6);
    for _ in 0..2 {
        // Twice: after a failure the plan is made anew, from the table that the failure left.
        drop(disk.plan(&keeping).partition(&disk.record(), &Keys::new()).unwrap());
        clear_listed(&disk.record()).unwrap();
        let parsed = ka_layout::facts::sfdisk(&says("sfdisk", &["--json", &disk.name()])).unwrap();
        assert_eq!(parsed.partitions.iter().filter(|p| p.kind == "7").count(), 1, "{parsed:?}");
        assert!(parsed.partitions.iter().all(|p| !p.bootable));
    }
    let mut formatted = disk.formatted(&keeping);
    formatted.commit_table().unwrap();
    formatted.finish().unwrap();
    assert!(content(&disk, 6) == bytes);
}

/// A root in a subvolume as openSUSE has it, nested ones, one that is not mounted, and the top itself.
const SUBVOLUMES: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
[[partition]]
type = "linux"
size = "fill"
format = { fs = "btrfs", uuid = "e0000001-1111-4222-8333-444455556666", label = "b" }
subvolumes = [
  { name = "@/.snapshots/1/snapshot", path = "/", options = "compress=zstd:1", default = true },
  { name = "@" },
  { name = "@home", path = "/home", options = "noatime" },
]
mount = { path = "/srv/top", options = "noexec" }
"#;

#[test]
fn btrfs_subvolumes_are_made_mounted_and_captured() {
    if !possible() {
        return;
    }
    let disk = Loop::new(400, 512);
    let mut formatted = disk.formatted(SUBVOLUMES);
    for (path, options) in [
        ("", "subvol=/@/.snapshots/1/snapshot"),
        ("", "compress=zstd:1"),
        ("home", "subvol=/@home"),
        ("srv/top", "subvol=/"),
    ] {
        let place = disk.target().join(path);
        let line = says("findmnt", &["-n", "-o", "SOURCE,OPTIONS", &place.display().to_string()]);
        assert!(
            line.starts_with(&disk.part(1)) && line.trim_end().split(',').any(|w| w == options),
            "{} with {options}: {line}",
            disk.part(1)
        );
    }
    fs::create_dir(disk.target().join("etc")).unwrap();
    fs::write(
        disk.target().join("etc/fstab"),
        "UUID=e / btrfs defaults,compress=zstd:1 0 0\nUUID=e /home btrfs noatime,subvol=@home 0 0\n\
         UUID=e /srv/top btrfs noexec,subvolid=5 0 0\n",
    )
    .unwrap();
    fs::write(disk.target().join("home/file"), "x").unwrap();
    assert!(disk.target().join("srv/top/@home/file").exists(), "the top shows all");

    let volumes = formatted.volumes();
    let facts: Vec<(&str, &str, Option<&str>)> = volumes
        .iter()
        .map(|v| {
            let mount = v.mount.as_ref().unwrap();
            (
                mount.path.as_str(),
                mount.options.as_deref().unwrap(),
                v.subvolume.as_ref().map(|s| s.name.as_str()),
            )
        })
        .collect();
    assert_eq!(
        facts,
        [
            ("/srv/top", "subvolid=5,noexec", None),
            ("/", "subvol=@/.snapshots/1/snapshot,compress=zstd:1", Some("@/.snapshots/1/snapshot")),
            ("/home", "subvol=@home,noatime", Some("@home")),
        ]
    );
    formatted.commit_table().unwrap();
    let captured = ka_layout::capture(Some(&disk.target())).unwrap();
    let partition = &captured.layout.partitions[0];
    let mut names: Vec<_> =
        partition.subvolumes.iter().map(|s| (s.name.as_str(), s.path.as_deref(), s.default)).collect();
    names.sort_unstable();
    assert_eq!(names, [("@/.snapshots/1/snapshot", Some("/"), true), ("@home", Some("/home"), false)]);
    assert_eq!(partition.subvolumes[0].options.as_deref(), Some("defaults,compress=zstd:1"));
    assert_eq!(partition.mount.as_ref().map(|m| m.path.as_str()), Some("/srv/top"));
    assert!(captured.warnings.iter().any(|w| w.contains("has the subvolume @,")), "{:?}", captured.warnings);
    let paths: Vec<_> = captured.golden_filesystems.iter().map(|g| g.path.as_deref().unwrap()).collect();
    assert_eq!((paths[0], paths.len()), ("/", 3));
    let written = ka_layout::to_toml(&captured.layout, &captured.warnings);
    assert_eq!(ka_layout::parse(&written).unwrap_or_else(|e| panic!("{e}\n{written}")), captured.layout);
    formatted.finish().unwrap();
    says("btrfs", &["check", "--readonly", &disk.part(1)]);
}
