//! What arrays, containers and LVM become, from facts and from what the tools print.

use super::*;
use proptest::prelude::*;

/// What LVM 2.03.16 printed of a group on two devices.
const LVS: &str = "  my-vg|m|/dev/mapper/my--vg-m|12582912|raid1|\n  \
        my-vg|ro-ot|/dev/mapper/my--vg-ro--ot|545259520|linear|\n  \
        my-vg|ro-ot|/dev/mapper/my--vg-ro--ot|545259520|linear|\n  \
        my-vg|snap|/dev/mapper/my--vg-snap|16777216|linear|ro-ot\n  \
        my-vg|str|/dev/mapper/my--vg-str|16777216|striped|\n  \
        my-vg|swap_1|/dev/mapper/my--vg-swap_1|41943040|linear|\n  \
        my-vg|thin|/dev/mapper/my--vg-thin|33554432|thin|\n  \
        my-vg|tp|/dev/mapper/my--vg-tp|33554432|thin-pool|\n";
const PVS: &str = "  my-vg|/dev/loop0|7|0\n  my-vg|/dev/loop1|7|1\n  |/dev/vdc1|254|33\n";

/// What cryptsetup 2.6.1 printed of a container, less its salts and digests.
const DUMP: &str = "LUKS header information\nVersion:       \t2\nEpoch:         \t3\n\
        Metadata area: \t16384 [bytes]\nKeyslots area: \t16744448 [bytes]\n\
        UUID:          \t0602c009-bdde-45d5-a9f6-95e1b01642ae\nLabel:         \t(no label)\n\
        Subsystem:     \t(no subsystem)\nFlags:       \t(no flags)\n\nData segments:\n  0: crypt\n\
        \toffset: 16777216 [bytes]\n\tlength: (whole device)\n\tcipher: aes-xts-plain64\n\
        \tsector: 4096 [bytes]\n\nKeyslots:\n  0: luks2\n\tKey:        512 bits\n\tPriority:   normal\n\
        \tCipher:     aes-xts-plain64\n\tCipher key: 512 bits\n\tPBKDF:      argon2id\n\tTime cost:  4\n\
        \tAF hash:    sha256\n\tDigest ID:  0\nTokens:\n  0: clevis\n\tKeyslot:    0\nDigests:\n  0: pbkdf2\n\
        \tHash:       sha256\n\tIterations: 1000\n";
const DUMP_1: &str = "LUKS header information for c1.img\n\nVersion:       \t1\nCipher name:   \taes\n\
        Cipher mode:   \txts-plain64\nHash spec:     \tsha256\nPayload offset:\t4096\nMK bits:       \t512\n\
        MK digest:     \tf0 1c 74\nMK iterations: \t1000\nUUID:          \t540a0adc-9c5a-45ea-830e-2ea1e1f9fa33\n\n\
        Key Slot 0: ENABLED\n\tIterations:         \t1000\n\tKey material offset:\t8\n\
        Key Slot 1: DISABLED\n";

fn block(number: &str, kind: Kind, slaves: &[&str]) -> Block {
    Block {
        dir: PathBuf::new(),
        number: number.to_owned(),
        bytes: 1 << 30,
        slaves: slaves.iter().map(|s| (*s).to_owned()).collect(),
        kind,
    }
}

fn mapped(name: &str, uuid: &str) -> Kind {
    Kind::Mapped { name: name.to_owned(), uuid: uuid.to_owned() }
}

fn array(level: &str, metadata: &str, wanted: u64, members: &[(&str, Option<u64>, bool)]) -> Kind {
    let member = |&(device, slot, faulty): &(&str, _, _)| Member { device: device.to_owned(), slot, faulty };
    Kind::Array {
        level: level.to_owned(),
        metadata: metadata.to_owned(),
        wanted,
        members: members.iter().map(member).collect(),
    }
}

fn facts(blocks: Vec<(&str, Block)>) -> Facts {
    let mut all: BTreeMap<String, Block> = blocks.into_iter().map(|(n, b)| (n.to_owned(), b)).collect();
    for (name, number) in [("vda1", "7:0"), ("vdb1", "7:1"), ("vdc1", "7:2")] {
        all.insert(name.to_owned(), block(number, Kind::Partition, &[]));
    }
    Facts {
        blocks: all,
        segments: segments(LVS),
        physicals: physicals(PVS),
        groups: free_space("  my-vg|1249902592|570425344\n"),
        ..Facts::default()
    }
}

/// What adding the device `x` gives, and the warnings.
fn add(kind: Kind, slaves: &[&str], change: impl FnOnce(&mut Facts)) -> (Result<String, String>, Stack) {
    let mut facts = facts(vec![("x", block("253:9", kind, slaves))]);
    change(&mut facts);
    let mut stack = Stack::default();
    let added = facts.add(&mut stack, "x");
    if added.is_err() {
        assert_eq!(stack, Stack::default());
    }
    (added, stack)
}

#[test]
fn reports_of_lvm_are_read() {
    let rows = segments(LVS);
    assert_eq!(rows.len(), 8);
    assert_eq!((rows[1].name.as_str(), rows[1].bytes, &rows[1].origin), ("ro-ot", 545_259_520, &None));
    assert_eq!(rows[3].origin.as_deref(), Some("ro-ot"));
    let found = physicals("  my-vg|/dev/loop0|7|0\n  my-vg|[unknown]|0|0\n  |/dev/vdc1|254|33\n");
    assert_eq!(found.iter().map(|p| p.number.as_deref()).collect::<Vec<_>>(), [Some("7:0"), None]);
    assert_eq!(free_space("  my-vg|1249902592|570425344\n")["my-vg"], (1_249_902_592, 570_425_344));
}

#[test]
fn containers_are_read() {
    let dump = luks_dump(DUMP);
    assert_eq!(dump.uuid, "0602c009-bdde-45d5-a9f6-95e1b01642ae");
    assert_eq!((dump.cipher.as_deref(), dump.bits), (Some("aes-xts-plain64"), Some(512)));
    assert_eq!((dump.derivations, dump.tokens), (vec!["argon2id".to_owned()], vec!["clevis".to_owned()]));
    assert!(!dump.integrity && dump.hash.is_none());
    assert!(luks_dump(&DUMP.replace("\tsector:", "\tintegrity: hmac(sha256)\n\tsector:")).integrity);
    let dump = luks_dump(DUMP_1);
    assert_eq!(dump.uuid, "540a0adc-9c5a-45ea-830e-2ea1e1f9fa33");
    assert_eq!((dump.cipher.as_deref(), dump.bits), (Some("aes-xts-plain64"), Some(512)));
    assert_eq!(dump.hash.as_deref(), Some("sha256"));
    assert!(dump.derivations.is_empty() && dump.tokens.is_empty());
}

#[test]
fn crypttab_is_read() {
    let lines =
        crypttab("# name\n\na UUID=1 none luks,discard\nb /dev/sda2 /etc/b.key luks\nc UUID=2\nbad\n");
    assert_eq!(lines.len(), 3);
    assert_eq!((lines[0].key_file.as_deref(), lines[0].options.as_deref()), (None, Some("luks,discard")));
    assert_eq!(lines[1].key_file.as_deref(), Some("/etc/b.key"));
    assert_eq!(lines[2].options, None);
}

#[test]
fn what_a_layout_cannot_express_is_refused_by_name() {
    let two = [("vda1", Some(0), false), ("vdb1", Some(1), false)];
    let uuid = "CRYPT-LUKS2-0602c009bdde45d5a9f695e1b01642ae-x";
    for (kind, slaves, message) in [
        (
            array("raid5", "1.2", 3, &[]),
            &[][..],
            "the RAID array x of level raid5; a layout can have raid1 only",
        ),
        (
            array("raid1", "external:/md127/0", 2, &two),
            &[],
            "the RAID array x of the firmware (external:/md127/0)",
        ),
        (array("raid1", "none", 2, &two), &[], "the RAID array x with metadata `none`"),
        (
            array("raid1", "1.2", 2, &two[..1]),
            &[],
            "the RAID array x (x), which has 1 of 2 members; add the missing ones (mdadm x --add), and capture again",
        ),
        (
            array("raid1", "1.2", 2, &[("vda1", Some(0), false), ("vdz", Some(1), false)]),
            &[],
            "the RAID array x (x) with the member vdz, which is no partition",
        ),
        (
            mapped("mpatha-part1", "part1-mpath-3600"),
            &[],
            "the multipath device mpatha-part1, of which a node's disks know nothing",
        ),
        (mapped("c", "CRYPT-PLAIN-c"), &["vda1"], "the volume c, encrypted without a LUKS header"),
        (mapped("o", "other"), &[], "the device-mapper volume o of an unknown kind (`other`)"),
        (
            mapped("c", uuid),
            &["vda1", "vdb1"],
            "the encrypted volume c, which lies on more or less than one device",
        ),
        (
            mapped("my--vg-thin", "LVM-x"),
            &[],
            "the LVM volume my-vg/thin of kind thin; a layout can have linear ones only",
        ),
        (
            mapped("my--vg-m", "LVM-x"),
            &[],
            "the LVM volume my-vg/m of kind raid1; a layout can have linear ones only",
        ),
        (
            mapped("my--vg-snap", "LVM-x"),
            &[],
            "the LVM volume my-vg/snap, a snapshot of ro-ot; merge or copy it to a linear volume",
        ),
        (mapped("gone", "LVM-x"), &[], "the LVM volume gone, which `lvm lvs` does not list"),
        (Kind::Other("the bcache device x".into()), &[], "the bcache device x"),
    ] {
        assert_eq!(add(kind, slaves, |_| {}).0.unwrap_err(), message);
    }
    let root = || mapped("my--vg-ro--ot", "LVM-x");
    let missing = |f: &mut Facts| f.physicals = physicals("  my-vg|/dev/loop0|7|0\n  my-vg|[unknown]|0|0\n");
    assert_eq!(
        add(root(), &[], missing).0.unwrap_err(),
        "the LVM volume my-vg/ro-ot, whose group misses a physical volume; bring it back or remove it (vgreduce \
             --removemissing)"
    );
    let whole = |f: &mut Facts| {
        let disk = Kind::Other("the whole disk vdb, which has no partition table".into());
        f.blocks.insert("vdb1".into(), block("7:1", disk, &[]));
    };
    assert_eq!(add(root(), &[], whole).0.unwrap_err(), "the whole disk vdb, which has no partition table");
    let header = |f: &mut Facts| {
        f.dumps.insert("x".into(), Err("no valid LUKS device".into()));
    };
    assert_eq!(
        add(mapped("c", uuid), &["vda1"], header).0.unwrap_err(),
        "the encrypted volume c, whose header is not on vda1: no valid LUKS device"
    );
    let integrity = |f: &mut Facts| {
        f.dumps.insert("x".into(), Ok(Dump { integrity: true, ..Dump::default() }));
    };
    assert_eq!(
        add(mapped("c", uuid), &["vda1"], integrity).0.unwrap_err(),
        "the encrypted volume c, which has integrity protection"
    );
    // What lies on itself ends too.
    assert!(add(mapped("c", uuid), &["x"], |_| {}).0.unwrap_err().contains("more than 16 devices"));
}

#[test]
fn arrays_keep_their_names_and_members() {
    let exported = |f: &mut Facts| {
        f.arrays
            .insert("x".into(), exported("MD_LEVEL=raid1\nMD_DEVNAME=golden:boot\nMD_NAME=golden:boot\n"));
    };
    let members = [("vdb1", Some(1), false), ("vda1", Some(0), false)];
    let (name, stack) = add(array("raid1", "1.2", 2, &members), &[], exported);
    assert_eq!(
        (name.unwrap().as_str(), &stack.raids[0].1.members[..]),
        ("boot", &["vda1".into(), "vdb1".into()][..])
    );
    assert_eq!((stack.raids[0].1.metadata.as_str(), stack.warnings.len()), ("1.2", 0));
    // A third that failed, a spare, one that is missing altogether; metadata that Ka does not make.
    let members = [members[0], members[1], ("vdc1", None, false)];
    let (_, stack) = add(array("raid1", "0.90", 3, &members), &[], |_| {});
    assert_eq!(stack.raids[0].1.metadata, "1.0");
    assert_eq!(
        stack.warnings,
        [
            "the array x (x) has metadata 0.90: nodes get 1.0, whose initramfs must assemble it",
            "the array x (x) has 2 of 3 members: nodes get one of 2",
            "the array x (x) has spare or failed members that are left out: vdc1"
        ]
    );
}

#[test]
fn containers_keep_their_names_and_their_openers_are_told() {
    let kind = || mapped("luks-0602", "CRYPT-LUKS2-0602c009bdde45d5a9f695e1b01642ae-luks-0602");
    let dumped = |text: &str| {
        let dump = luks_dump(text);
        move |f: &mut Facts| {
            f.dumps.insert("x".into(), Ok(dump));
        }
    };
    let plain = DUMP.replace("  0: clevis\n\tKeyslot:    0\n", "");
    let (name, stack) = add(kind(), &["vda1"], dumped(&plain));
    assert_eq!((name.unwrap().as_str(), stack.warnings.len()), ("luks-0602", 0));
    let luks = &stack.luks[0].1;
    assert_eq!((luks.on.as_str(), luks.version, &luks.crypttab), ("vda1", 2, &None));
    assert_eq!(luks.options, ["--cipher", "aes-xts-plain64", "--key-size", "512"]);
    let (_, stack) = add(kind(), &["vda1"], |f| {
        dumped(&DUMP.replace("argon2id", "pbkdf2"))(f);
        f.crypttab = crypttab(
            "root UUID=0602C009-bdde-45d5-a9f6-95e1b01642ae /etc/root.key luks,discard,tpm2-device=auto\n",
        );
    });
    let luks = &stack.luks[0].1;
    assert_eq!(luks.name, "root");
    assert_eq!(luks.crypttab.as_deref(), Some("luks,discard,tpm2-device=auto"));
    assert_eq!(luks.options[4..], ["--pbkdf", "pbkdf2"]);
    assert_eq!(
        stack.warnings,
        [
            "the container luks-0602 is called root in crypttab: that is its name on the nodes",
            "the container root is opened by the key file /etc/root.key, the option tpm2-device=auto, a token of \
                 clevis: a node's container has a key of its own (--luks-keys), so enrol that by a hook"
        ]
    );
    let old = mapped("old", "CRYPT-LUKS1-540a0adc9c5a45ea830e2ea1e1f9fa33-old");
    let (_, stack) = add(old, &["vda1"], dumped(DUMP_1));
    let luks = &stack.luks[0].1;
    assert_eq!(luks.version, 1);
    assert_eq!(luks.options, ["--cipher", "aes-xts-plain64", "--key-size", "512", "--hash", "sha256"]);
}

#[test]
fn groups_bring_all_their_physical_volumes() {
    let (name, stack) = add(mapped("my--vg-str", "LVM-x"), &["vda1"], |_| {});
    assert_eq!(name.unwrap(), "my-vg/str");
    assert_eq!(stack.vgs[0].on, ["vda1", "vdb1"]);
    assert_eq!(stack.carriers, ["vda1", "vdb1"]);
    assert_eq!(stack.lvs[0].1.size, "16M");
    assert_eq!(stack.warnings, ["the LVM volume my-vg/str is striped: nodes get a linear one"]);
    assert_eq!(id("cciss!c0d0p1"), "cciss-c0d0p1");
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic(text in "\\PC{0,80}", lines in "([A-Za-z0-9_ :=|\\t\n/.-]{0,80})") {
        for text in [&text, &lines] {
            let _ = (segments(text), physicals(text), free_space(text), exported(text));
            let _ = (luks_dump(text), crypttab(text));
        }
    }

    #[test]
    fn rows_are_read_as_they_were_written(rows in proptest::collection::vec(
        ("[a-z0-9+_.-]{1,8}", "[a-z0-9+_.-]{1,8}", any::<u64>(), "[a-z0-9-]{1,8}", proptest::option::of("[a-z]{1,8}")), 0..5))
    {
        let wanted: Vec<Segment> = rows.into_iter().map(|(group, name, bytes, kind, origin)| {
            let path = format!("/dev/mapper/{group}-{name}");
            Segment { group, name, path, bytes, kind, origin }
        }).collect();
        let text: String = wanted.iter().map(|s| {
            let origin = s.origin.clone().unwrap_or_default();
            format!("  {}|{}|{}|{}|{}|{origin}\n", s.group, s.name, s.path, s.bytes, s.kind)
        }).collect();
        prop_assert_eq!(segments(&text), wanted);
    }
}
