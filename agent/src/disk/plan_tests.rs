//! The plan, without any disk: messages for what does not fit or cannot boot, UUIDs, and what the plan looks like.

use super::discover::{Disk, KernelPartition};
use super::plan::{Plan, check_unique, plan};
use super::superblock::Found;
use ka_layout::model::{Fs, Layout};
use ka_layout::order::{Firmware, Golden, GoldenFs, Layer, RawContent, Used};

const GPT: &str = r#"version = 1
[[disk]]
name = "system"
table = "gpt"
uuid = "11111111-2222-4333-8444-555555555555"
[[partition]]
number = 14
type = "bios-boot"
size = "3M"
[[partition]]
number = 15
type = "esp"
size = "124M"
format = { fs = "vfat", uuid = "abcd-1234" }
mount = { path = "/boot/efi" }
[[partition]]
number = 1
type = "linux"
name = "root"
uuid = "66666666-2222-4333-8444-555555555555"
size = "fill"
format = { fs = "ext4" }
mount = { path = "/" }
"#;

fn disk(gib: u64) -> Disk {
    Disk {
        name: "vda".into(),
        device: "/dev/vda".into(),
        bytes: gib << 30,
        sector: 512,
        transport: "virtio".into(),
        ..Disk::default()
    }
}

fn golden(uuid: &str, gib: u64) -> Golden {
    let filesystem = GoldenFs {
        path: Some("/".into()),
        fs: Fs::Ext4,
        device: "/dev/sda1".into(),
        aliases: Vec::new(),
        disk_aliases: Vec::new(),
        uuid: Some(uuid.into()),
        label: None,
        partuuid: None,
        partlabel: None,
    };
    let used = [("/".to_owned(), Used { bytes: gib << 30, inodes: 1000 })].into();
    Golden { filesystems: vec![filesystem], used, ..Golden::default() }
}

fn layout(text: &str) -> Layout {
    ka_layout::parse(text).unwrap_or_else(|e| panic!("{e}"))
}

const ROOT: &str = "99999999-2222-4333-8444-555555555555";

fn planned(text: &str, disk: Disk, firmware: Firmware) -> Result<Plan, String> {
    plan(&layout(text), &[disk], &golden(ROOT, 1), firmware).map_err(|e| format!("{e:#}"))
}

#[test]
fn a_plan_shows_what_will_happen() {
    let mut old = disk(8);
    old.partitions = vec![KernelPartition {
        name: "vda1".into(),
        device: "/dev/vda1".into(),
        number: 1,
        start: 1 << 20,
        bytes: 1 << 30,
    }];
    let plan = planned(GPT, old, Firmware::Bios).unwrap();
    assert_eq!(
        plan.to_string(),
        "disk `system` is /dev/vda (8.00 GiB, virtio); everything on it is replaced by a gpt table:\n  \
         now there, to be erased: /dev/vda1 (1.00 GiB)\n   \
         no        first         last      size  type               content\n   \
         14         2048         8191  3.00 MiB  bios-boot          empty\n   \
         15         8192       262143   124 MiB  esp                vfat ABCD-1234 at /boot/efi\n    \
         1       262144     16775167  7.87 GiB  linux              \
         ext4 99999999-2222-4333-8444-555555555555 at /\n"
    );
}

#[test]
fn what_is_preserved_keeps_its_names_for_itself() {
    let text = GPT.replace("size = \"fill\"", "size = \"2G\"")
        + "[[partition]]\nnumber = 2\ntype = \"linux\"\nsize = \"fill\"\n";
    let mut plan = planned(&text, disk(8), Firmware::Bios).unwrap();
    check_unique(&plan).unwrap();
    let kept = &mut plan.disks[0].partitions[3];
    kept.preserve = true;
    check_unique(&plan).unwrap();
    let found = Found { fs: Fs::Ext4, uuid: ROOT.to_uppercase(), label: None, dirty: false };
    plan.disks[0].partitions[3].found = Some(found);
    let error = check_unique(&plan).unwrap_err().to_string();
    assert!(
        error.contains("partition 2 has the UUID 99999999-") && error.contains("which / is to get"),
        "{error}"
    );
    let partuuid = plan.disks[0].partitions[2].partuuid.clone();
    let kept = &mut plan.disks[0].partitions[3];
    (kept.found, kept.partuuid) = (None, partuuid);
    let error = check_unique(&plan).unwrap_err().to_string();
    assert!(error.ends_with("which partition 1 is to get"), "{error}");
}

#[test]
fn golden_uuids_are_kept_by_default() {
    let uuid = |text: &str| {
        planned(text, disk(8), Firmware::Bios)
            .map(|p| p.disks[0].partitions[2].content.format.clone().unwrap().uuid)
    };
    assert_eq!(uuid(GPT).unwrap(), ROOT);
    let with = |fs: &str| GPT.replace("{ fs = \"ext4\" }", fs);
    assert_eq!(uuid(&with("{ fs = \"ext4\", uuid = \"keep\" }")).unwrap(), ROOT);
    let new = uuid(&with("{ fs = \"ext4\", uuid = \"new\" }")).unwrap();
    assert!(new != ROOT && new.len() == 36);
    assert_ne!(uuid(&with("{ fs = \"xfs\" }")).unwrap(), ROOT);
    assert_eq!(
        uuid(&with("{ fs = \"xfs\", uuid = \"keep\" }")).unwrap_err(),
        "[[partition]] #3 (/): uuid = \"keep\", but the golden machine has no xfs /"
    );
    let given = "aaaaaaaa-2222-4333-8444-555555555555";
    assert_eq!(
        uuid(&with(&format!("{{ fs = \"ext4\", uuid = \"{}\" }}", given.to_uppercase()))).unwrap(),
        given
    );
}

#[test]
fn a_small_disk_is_refused_with_figures() {
    let text = GPT.replace("\"fill\"", "\"9G-\"");
    assert_eq!(
        planned(&text, disk(8), Firmware::Bios).unwrap_err(),
        "fitting the layout to /dev/vda (8.00 GiB, virtio): disk `system` is too small: it has 8.00 GiB, the layout needs \
         at least 9.13 GiB, 1.13 GiB are missing ([[partition]] #1 (bios-boot): 3M, [[partition]] #2 (/boot/efi): 124M, \
         [[partition]] #3 (/): 9G)"
    );
}

#[test]
fn a_tree_that_does_not_fit_is_refused_with_figures() {
    let error = plan(&layout(GPT), &[disk(8)], &golden(ROOT, 8), Firmware::Bios).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the golden tree needs 8.00 GiB in /, but partition 1 of /dev/vda (7.87 GiB of ext4) holds only 7.47 GiB: 542 MiB \
         are missing"
    );
    // What lies below a path that is no mount of its own counts for the one above.
    let mut two = golden(ROOT, 4);
    two.used.insert("/home".into(), Used { bytes: 4 << 30, inodes: 1 });
    assert!(plan(&layout(GPT), &[disk(8)], &two, Firmware::Bios).is_err());
    two.used.insert("/home".into(), Used { bytes: 2 << 30, inodes: 1 });
    assert!(plan(&layout(GPT), &[disk(8)], &two, Firmware::Bios).is_ok());
}

#[test]
fn many_small_files_get_inodes() {
    let mut many = golden(ROOT, 1);
    many.used.insert("/".into(), Used { bytes: 1 << 30, inodes: 2_000_000 });
    let plan = plan(&layout(GPT), &[disk(8)], &many, Firmware::Bios).unwrap();
    assert_eq!(plan.disks[0].partitions[2].content.format.as_ref().unwrap().options, ["-N", "2501000"]);
}

#[test]
fn what_the_firmware_cannot_boot_is_refused() {
    let no_bios_boot = GPT.replace("\"bios-boot\"", "\"linux\"");
    assert_eq!(
        planned(&no_bios_boot, disk(8), Firmware::Bios).unwrap_err(),
        "this machine booted by BIOS, but the layout has no partition of type bios-boot on [[disk]] `system`, which GRUB \
         needs on gpt"
    );
    assert!(planned(&no_bios_boot, disk(8), Firmware::Uefi).is_ok());
    assert_eq!(
        planned(&GPT.replace("\"esp\"", "\"linux\""), disk(8), Firmware::Uefi).unwrap_err(),
        "this machine booted by UEFI, but the layout has no partition of type esp with vfat that is mounted"
    );
    let mut big_sectors = disk(8);
    big_sectors.sector = 4096;
    assert_eq!(
        planned(GPT, big_sectors.clone(), Firmware::Bios).unwrap_err(),
        "this machine booted by BIOS, which cannot boot from /dev/vda (8.00 GiB, virtio, 4096-byte sectors): its sectors \
         have 4096 bytes (UEFI can)"
    );
    assert!(planned(GPT, big_sectors, Firmware::Uefi).is_ok());
    assert_eq!(
        planned(&GPT.replace("\"/\"", "\"/home\""), disk(8), Firmware::Bios).unwrap_err(),
        "the layout mounts nothing at /"
    );
}

#[test]
fn a_disk_in_use_or_read_only_is_refused_even_when_named() {
    let named = GPT.replace("table =", "match = { path = \"/dev/vda\" }\ntable =");
    let mut used = disk(8);
    used.in_use = vec!["vda1 is mounted at /".into()];
    assert_eq!(
        planned(&named, used, Firmware::Bios).unwrap_err(),
        "/dev/vda (8.00 GiB, virtio), which is [[disk]] `system`, is in use: vda1 is mounted at /"
    );
    let mut locked = disk(8);
    locked.read_only = true;
    assert_eq!(
        planned(&named, locked, Firmware::Bios).unwrap_err(),
        "/dev/vda (8.00 GiB, virtio), which is [[disk]] `system`, is read-only"
    );
}

#[test]
fn subvolumes_share_the_space_of_their_file_system() {
    let text = GPT.replace(
        "format = { fs = \"ext4\" }\nmount = { path = \"/\" }",
        "format = { fs = \"btrfs\" }\nsubvolumes = [{ name = \"@\", path = \"/\" }, { name = \"@home\", path = \"/home\" }, \
         { name = \"@snap\" }]",
    );
    let mut golden = golden(ROOT, 3);
    golden.used.insert("/home".into(), Used { bytes: 3 << 30, inodes: 1 });
    let shown = plan(&layout(&text), &[disk(8)], &golden, Firmware::Bios).unwrap().to_string();
    assert!(shown.contains(" with @ at /, @home at /home, @snap\n"), "{shown}");
    golden.used.insert("/home".into(), Used { bytes: 5 << 30, inodes: 1 });
    let error = plan(&layout(&text), &[disk(8)], &golden, Firmware::Bios).unwrap_err().to_string();
    assert!(
        error.starts_with("the golden tree needs 8.00 GiB in / and /home, but partition 1 of"),
        "{error}"
    );
}

#[test]
fn a_raw_partition_holds_its_content_or_is_refused_with_figures() {
    let text = GPT.replace("size = \"fill\"", "size = \"2G\"")
        + "[[partition]]\nnumber = 4\ntype = \"data\"\nname = \"win\"\nsize = \"100M\"\nraw = true\n";
    let with = |raw: Option<RawContent>| {
        let golden = Golden { raw: raw.into_iter().collect(), ..golden(ROOT, 1) };
        plan(&layout(&text), &[disk(8)], &golden, Firmware::Bios).map_err(|e| format!("{e:#}"))
    };
    let content = |bytes| RawContent {
        index: 3,
        part: "win".into(),
        bytes,
        uuid: Some("7A3C5E6F01020304".into()),
        label: Some("Recovery".into()),
    };
    let made = with(Some(content(100 << 20))).unwrap();
    let raw = &made.disks[0].partitions[3];
    assert_eq!(
        (raw.raw.as_ref().unwrap().bytes, raw.fs(), raw.content.format.as_ref()),
        (100 << 20, None, None)
    );
    assert_eq!((raw.uuid(), raw.label()), (Some("7A3C5E6F01020304"), Some("Recovery")));
    assert!(made.to_string().ends_with(" data               raw: 100 MiB from the stream\n"), "{made}");
    assert_eq!(
        with(Some(content((100 << 20) + 512))).unwrap_err(),
        "[[partition]] #4 (win): raw: its content has 100 MiB, but partition 4 of /dev/vda only 100 MiB: 512 B are missing"
    );
    let lost = "[[partition]] #4 (win): raw: the server does not say what comes into it";
    assert_eq!(with(None).unwrap_err(), lost);
    assert_eq!(with(Some(RawContent { index: 2, ..content(1) })).unwrap_err(), lost);
}

#[test]
fn an_mbr_names_its_partitions_by_signature() {
    let text = r#"version = 1
[[disk]]
name = "system"
table = "mbr"
uuid = "1a2b3c4d"
[[partition]]
number = 1
type = "0x83"
size = "1G-"
bootable = true
format = { fs = "ext4" }
mount = { path = "/" }
[[partition]]
number = 5
type = "swap"
size = "64M"
format = { fs = "swap" }
"#;
    let plan = planned(text, disk(8), Firmware::Bios).unwrap();
    let ids: Vec<&str> = plan.disks[0].partitions.iter().map(|p| p.partuuid.as_str()).collect();
    assert_eq!(ids, ["1a2b3c4d-01", "1a2b3c4d-05"]);
    assert_eq!(plan.disks[0].signature(), [0x4d, 0x3c, 0x2b, 0x1a]);
    assert!(plan.to_string().contains("extended\n"), "{plan}");
}

/// Two disks with RAID 1, LUKS in it, LVM in that.
const TALL: &str = r#"version = 1
[[disk]]
name = "a"
match = { size = "-9G" }
table = "gpt"
[[disk]]
name = "b"
match = { size = "10G-" }
table = "gpt"
[[partition]]
disk = "a"
type = "bios-boot"
size = "1M"
[[partition]]
disk = "b"
type = "bios-boot"
size = "1M"
[[partition]]
disk = "a"
id = "a"
type = "linux-raid"
size = "fill"
[[partition]]
disk = "b"
id = "b"
type = "linux-raid"
size = "fill"
[[raid]]
name = "md0"
members = ["a", "b"]
[[luks]]
name = "crypt"
on = "md0"
[[vg]]
name = "vg0"
on = ["crypt"]
[[lv]]
vg = "vg0"
name = "root"
size = "fill"
format = { fs = "ext4" }
mount = { path = "/" }
"#;

fn tall(text: &str, gib: u64) -> Result<Plan, String> {
    let second = Disk { name: "vdb".into(), device: "/dev/vdb".into(), ..disk(12) };
    plan(&layout(text), &[disk(8), second], &golden(ROOT, gib), Firmware::Bios).map_err(|e| format!("{e:#}"))
}

#[test]
fn volumes_are_planned_on_what_they_lie_on() {
    let plan = tall(TALL, 1).unwrap();
    let shown = plan.to_string();
    // 8 GiB less the partitions' ends, less a 512th, less 16 MiB, less 1 MiB, in extents.
    assert!(
        shown.ends_with(&format!("  [[lv]] `vg0/root`             7.96 GiB ext4 {ROOT} at /\n")),
        "{shown}"
    );
    let kinds: Vec<(usize, Vec<usize>)> =
        plan.volumes.iter().map(|v| (v.below.len(), v.disks.clone())).collect();
    assert_eq!(kinds, [(2, vec![0, 1]), (1, vec![0, 1]), (1, vec![0, 1]), (1, vec![0, 1])]);
    let below: Vec<String> = super::stack::layers_below(&plan.volumes, &plan.volumes[3])
        .into_iter()
        .map(|layer| match layer {
            Layer::Raid { name, .. } | Layer::Luks { name, .. } | Layer::Lvm { name, .. } => name,
        })
        .collect();
    assert_eq!(below, ["crypt", "md0"]);
    let error = tall(TALL, 8).unwrap_err();
    let expected =
        "the golden tree needs 8.00 GiB in /, but [[lv]] `vg0/root` (7.96 GiB of ext4) holds only ";
    assert!(error.starts_with(expected), "{error}");
    // A mirror must boot from whichever disk is left.
    let one = TALL.replacen("disk = \"b\"\ntype = \"bios-boot\"", "disk = \"b\"\ntype = \"linux\"", 1);
    assert!(tall(&one, 1).unwrap_err().contains("no partition of type bios-boot on [[disk]] `b`"));
    // Without its key nothing is begun, and no error shows a key.
    let keys = super::assemble::Keys::new();
    let luks = &plan.volumes[1..2];
    let error = super::assemble::check(luks, &keys).map_err(|e| format!("{e:#}"));
    let expected = if super::tool::find("cryptsetup").is_some() {
        "the server sent no key for [[luks]] `crypt`"
    } else {
        "making [[luks]] `crypt` is not possible: the program cryptsetup is not there (sought in /usr/sbin, /sbin, /usr/bin, \
         /bin, /usr/local/sbin, /usr/local/bin)"
    };
    assert_eq!(error.unwrap_err(), expected);
}
