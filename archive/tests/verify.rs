//! A tree of hard cases is packed, its manifest made on the way, unpacked, and compared: nothing differs. Then differences
//! of every kind are planted, and each is told, with nothing beside it. Needs root.

// Helpers of tests are tests, too, though the lint does not see it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use ka_archive::manifest::{Header, Kind, Reader, Writer};
use ka_archive::testing::{hard_cases, run, set_time};
use ka_archive::verify::{Difference, VerifyOptions, VerifySummary, What, verify};
use ka_archive::{Expected, Observer, PackOptions, PackSummary, UnpackOptions, pack, unpack};

/// A golden tree, its clone and the manifest.
struct Pair {
    folder: tempfile::TempDir,
    stream: Vec<u8>,
    packed: PackSummary,
}

impl Pair {
    fn new(fill: impl FnOnce(&Path), options: PackOptions, expected: Vec<Expected>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let golden = folder.path().join("golden");
        fs::create_dir(&golden).unwrap();
        fs::create_dir(folder.path().join("clone")).unwrap();
        fill(&golden);
        let options = PackOptions { root: golden.clone(), ..options };
        let header = Header {
            deployment: "test".to_owned(),
            wave: 1,
            root: golden,
            mounts: options.mounts.clone().unwrap_or_default(),
            excludes: options.excludes.clone(),
            expected,
        };
        let mut writer = Writer::create(&folder.path().join("manifest"), &header).unwrap();
        let mut stream = Vec::new();
        let packed = pack(&options, &mut stream, &mut writer).unwrap();
        writer.finish().unwrap();
        let pair = Self { folder, stream, packed };
        pair.restore();
        pair
    }

    /// Makes the clone equal to the golden tree again; what is only there stays.
    fn restore(&self) {
        let options = UnpackOptions { root: self.clone(), sync: false };
        unpack(&self.stream[..], &options, &mut ()).unwrap();
    }

    fn clone(&self) -> PathBuf {
        self.folder.path().join("clone")
    }

    fn golden(&self) -> PathBuf {
        self.folder.path().join("golden")
    }

    fn manifest(&self) -> File {
        File::open(self.folder.path().join("manifest")).unwrap()
    }

    fn verify(&self, options: &VerifyOptions) -> (VerifySummary, Vec<Difference>) {
        let mut told = Vec::new();
        let summary = verify(&self.manifest(), options, &mut |d| told.push(d.clone())).unwrap();
        let unexpected = told.iter().filter(|d| d.expected.is_none()).count() as u64;
        assert_eq!(summary.differences, unexpected);
        assert_eq!(summary.expected.values().sum::<u64>(), told.len() as u64 - unexpected);
        (summary, told)
    }

    /// What differs in the clone: words and paths.
    fn differences(&self) -> BTreeSet<(What, String)> {
        let (_, told) = self.verify(&VerifyOptions { root: self.clone(), ..Default::default() });
        let named = told.iter().map(|d| (d.what, d.path.escape_ascii().to_string())).collect::<Vec<_>>();
        let set: BTreeSet<_> = named.iter().cloned().collect();
        assert_eq!(set.len(), named.len(), "told twice: {told:?}");
        set
    }
}

fn set(all: &[(What, &str)]) -> BTreeSet<(What, String)> {
    all.iter().map(|(what, path)| (*what, (*path).to_owned())).collect()
}

#[test]
fn a_clone_of_the_hard_cases_is_clean_and_so_is_the_golden_tree() {
    let pair = Pair::new(|root| hard_cases(root).unwrap(), PackOptions::default(), Vec::new());
    for root in [pair.clone(), pair.golden()] {
        for threads in [0, 1, 7] {
            let options = VerifyOptions { root: root.clone(), threads, ..Default::default() };
            let (summary, told) = pair.verify(&options);
            assert_eq!(told, []);
            let p = &pair.packed;
            let all = p.files + p.directories + p.symlinks + p.hard_links + p.devices + p.fifos;
            assert_eq!(summary.entries, all);
            // Each file once, and no holes.
            assert!((3_000_000..8 << 20).contains(&summary.bytes), "{} bytes", summary.bytes);
            assert!(summary.is_clean() && summary.expected.is_empty());
        }
    }
}

#[test]
fn digests_are_those_of_b3sum_and_of_nothing_else() {
    let pair = Pair::new(|root| hard_cases(root).unwrap(), PackOptions::default(), Vec::new());
    let mut reader = Reader::new(pair.manifest()).unwrap();
    let (mut whole, mut sparse) = (0, 0);
    while let Some(entry) = reader.next_entry().unwrap() {
        let Some(content) = entry.content else { continue };
        assert_eq!(entry.kind, Kind::File);
        if content.sparse {
            sparse += 1;
        } else if !entry.path.starts_with(b"deep") {
            use std::os::unix::ffi::OsStrExt;
            let path = pair.golden().join(std::ffi::OsStr::from_bytes(&entry.path));
            let bytes = fs::read(&path).unwrap();
            assert_eq!(content.size, bytes.len() as u64);
            assert_eq!(content.digest, *blake3::hash(&bytes).as_bytes(), "{}", path.display());
            whole += 1;
        }
    }
    assert!(whole > 30 && sparse >= 4, "{whole} {sparse}");
}

/// Changes one thing and puts its time back, so that only the change itself is left.
fn unseen(root: &Path, name: &str, change: impl FnOnce(&Path)) {
    use std::os::unix::fs::MetadataExt;
    let path = root.join(name);
    let parent = path.parent().unwrap().to_owned();
    let time = |path: &Path| fs::symlink_metadata(path).map(|m| (m.mtime(), m.mtime_nsec()));
    let (own, above) = (time(&path), time(&parent).unwrap());
    change(&path);
    if let (Ok(own), true) = (own, path.symlink_metadata().is_ok()) {
        set_time(&path, own.0, own.1).unwrap();
    }
    set_time(&parent, above.0, above.1).unwrap();
}

#[test]
fn one_planted_difference_of_each_kind_is_told_and_nothing_else() {
    let pair = Pair::new(|root| hard_cases(root).unwrap(), PackOptions::default(), Vec::new());
    let root = pair.clone();
    type Change = Box<dyn Fn(&Path)>;
    let tool = |program: &'static str, arguments: &'static [&'static str]| -> Change {
        Box::new(move |path: &Path| {
            run(Command::new(program).args(arguments).arg(path)).unwrap();
        })
    };
    let write_at = |bytes: &'static [u8], at: u64| -> Change {
        Box::new(move |path: &Path| {
            File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
        })
    };
    let replaced = |make: fn(&Path)| -> Change {
        Box::new(move |path: &Path| {
            fs::remove_file(path).or_else(|_| fs::remove_dir_all(path)).unwrap();
            make(path);
        })
    };
    let cases: Vec<(&str, Change, Vec<What>)> = vec![
        ("three-megabytes", write_at(b"\x01", 2_999_999), vec![What::Content]),
        ("block-and-one", write_at(b"\x01", 0), vec![What::Content]),
        // Into a hole, and into data beside one.
        ("sparse-10G", write_at(b"!", 5 << 30), vec![What::Content]),
        ("sparse-10G", write_at(b"P", 9 << 30), vec![What::Content]),
        ("many-holes", write_at(b"DATA", 16384), vec![What::Content]),
        ("one-block", tool("truncate", &["-s", "513"]), vec![What::Size]),
        ("empty", tool("truncate", &["-s", "1"]), vec![What::Size]),
        ("all-hole", tool("truncate", &["-s", "4096"]), vec![What::Size]),
        ("modes/file-4755", tool("chmod", &["0755"]), vec![What::Mode]),
        ("modes/dir-1777", tool("chmod", &["0777"]), vec![What::Mode]),
        ("modes/link", Box::new(|p| lchown(p, Some(12), Some(35)).unwrap()), vec![What::Owner]),
        ("fifo", Box::new(|p| lchown(p, Some(7), None).unwrap()), vec![What::Owner]),
        // What the kernel takes away with it is told, too: the capability of a file with a new owner.
        ("attributes/capable", tool("chown", &["5:5"]), vec![What::Owner, What::Xattr]),
        ("attributes/capable", tool("setcap", &["cap_net_raw+ep"]), vec![What::Xattr]),
        ("attributes/capable", tool("setcap", &["-r"]), vec![What::Xattr]),
        ("attributes/acl", tool("setfacl", &["-m", "g:10:rwx,u:4000000001:r--"]), vec![What::Xattr]),
        ("attributes/acl-dir", tool("setfacl", &["-k"]), vec![What::Xattr]),
        ("attributes/xattrs", tool("setfattr", &["-n", "user.nul", "-v", "a"]), vec![What::Xattr]),
        ("attributes/xattr-dir", tool("setfattr", &["-x", "user.empty"]), vec![What::Xattr]),
        (
            "attributes/xattr-link",
            tool("setfattr", &["-h", "-n", "trusted.link", "-v", "x"]),
            vec![What::Xattr],
        ),
        ("empty", tool("setfattr", &["-n", "security.selinux", "-v", "u:r:t:s0"]), vec![What::Xattr]),
        (
            "char",
            replaced(|p| drop(run(Command::new("mknod").arg(p).args(["c", "1", "5"])).unwrap())),
            vec![What::Device, What::HardLink, What::Mode, What::Owner],
        ),
        ("whiteout", tool("setfattr", &["-n", "trusted.x", "-v", "x"]), vec![What::Xattr]),
        ("links/relative", replaced(|p| symlink("z/second", p).unwrap()), vec![What::Target]),
        ("links/upwards", replaced(|p| fs::write(p, b"").unwrap()), vec![What::Kind]),
        ("names/-dash", replaced(|p| fs::create_dir(p).unwrap()), vec![What::Kind]),
        ("names", replaced(|p| fs::write(p, b"").unwrap()), vec![What::Kind]),
        ("names/new\nline", replaced(|_| ()), vec![What::Missing]),
        ("deep", replaced(|_| ()), vec![What::Missing]),
        ("names/more\nnames", Box::new(|p| fs::write(p, b"x").unwrap()), vec![What::Extra]),
        ("links/more", Box::new(|p| fs::create_dir_all(p.join("and/more")).unwrap()), vec![What::Extra]),
    ];
    for (name, change, expected) in cases {
        unseen(&root, name, |path| change(path));
        let found = pair.differences();
        let path = name.as_bytes().escape_ascii().to_string();
        let mut wanted: Vec<(What, &str)> = expected.iter().map(|what| (*what, &path[..])).collect();
        if name == "char" {
            // `char-too` was its second name, and is a file of its own now.
            wanted.retain(|(what, _)| *what != What::HardLink);
            wanted.push((What::HardLink, "char-too"));
            wanted.retain(|(what, _)| !matches!(what, What::Mode | What::Owner));
            let more: Vec<_> =
                found.iter().filter(|(w, p)| matches!(w, What::Mode | What::Owner) && p == "char").collect();
            assert!(!more.is_empty());
            let found: BTreeSet<_> = found.iter().filter(|d| !more.contains(d)).cloned().collect();
            assert_eq!(found, set(&wanted));
        } else {
            assert_eq!(found, set(&wanted), "{name}");
        }
        let at = root.join(name);
        if expected == [What::Extra] {
            unseen(&root, name, |_| fs::remove_file(&at).or_else(|_| fs::remove_dir_all(&at)).unwrap());
        }
        if at.is_dir() && expected == [What::Kind] {
            fs::remove_dir_all(&at).unwrap();
        }
        pair.restore();
        assert_eq!(pair.differences(), set(&[]), "after {name} was put right");
    }
}

#[test]
fn a_nanosecond_is_a_difference() {
    let pair = Pair::new(|root| hard_cases(root).unwrap(), PackOptions::default(), Vec::new());
    let root = pair.clone();
    for (name, seconds, nanos) in [
        ("times/one-ns/file", 1, 2),
        ("times/before-1970-ns/link", -5, 123_456_788),
        ("times/epoch", 0, 1),
        ("char", 1, 1),
    ] {
        set_time(&root.join(name), seconds, nanos).unwrap();
    }
    let wanted = ["times/one-ns/file", "times/before-1970-ns/link", "times/epoch", "char"];
    assert_eq!(pair.differences(), set(&wanted.map(|name| (What::Mtime, name))));
    let (_, told) = pair.verify(&VerifyOptions { root, ..Default::default() });
    let one = told.iter().find(|d| d.path == b"times/one-ns/file").unwrap();
    assert_eq!((one.golden.as_deref(), one.here.as_deref()), (Some("1.000000001"), Some("1.000000002")));
}

#[test]
fn groups_of_hard_links_that_break_or_join_are_told() {
    let pair = Pair::new(
        |root| {
            for (name, text) in [("a", "one"), ("b", "two"), ("c", "two"), ("d", "three")] {
                fs::write(root.join(name), text).unwrap();
            }
            for name in ["a2", "a3", "z"] {
                fs::hard_link(root.join("a"), root.join(name)).unwrap();
            }
            for name in ["a", "b", "c", "d", ""] {
                set_time(&root.join(name), 1000, 1).unwrap();
            }
        },
        PackOptions::default(),
        Vec::new(),
    );
    let root = pair.clone();
    assert_eq!(pair.differences(), set(&[]));
    let swap = |name: &str, other: Option<&str>, text: &str| {
        fs::remove_file(root.join(name)).unwrap();
        match other {
            Some(other) => fs::hard_link(root.join(other), root.join(name)).unwrap(),
            None => fs::write(root.join(name), text).unwrap(),
        }
        set_time(&root.join(name), 1000, 1).unwrap();
        set_time(&root, 1000, 1).unwrap();
    };
    // A copy with the same content.
    swap("a3", None, "one");
    assert_eq!(pair.differences(), set(&[(What::HardLink, "a3")]));
    pair.restore();
    // Two files that are one now.
    swap("c", Some("b"), "");
    assert_eq!(pair.differences(), set(&[(What::HardLink, "c")]));
    pair.restore();
    // A name that went to another file.
    swap("z", Some("d"), "");
    assert_eq!(pair.differences(), set(&[(What::HardLink, "z"), (What::Size, "z")]));
    pair.restore();
    assert_eq!(pair.differences(), set(&[]));
    // A further name is extra, not a difference of the others.
    fs::hard_link(root.join("d"), root.join("more")).unwrap();
    set_time(&root, 1000, 1).unwrap();
    assert_eq!(pair.differences(), set(&[(What::Extra, "more")]));
}

#[test]
fn expected_differences_are_told_apart() {
    let expected = vec![
        Expected::new("content,extra", "/etc/{hostname,hosts}", "its own name"),
        Expected::new("missing", "/var/lib/dhcp/*.leases", "leases"),
        Expected::new("all", "/boot/grub/**", "grub"),
    ];
    let fill = |root: &Path| {
        for dir in ["etc", "var/lib/dhcp", "boot/grub"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for file in ["etc/hostname", "etc/passwd", "var/lib/dhcp/eth0.leases", "boot/grub/grub.cfg"] {
            fs::write(root.join(file), "golden").unwrap();
        }
    };
    let pair = Pair::new(fill, PackOptions::default(), expected);
    let root = pair.clone();
    fs::write(root.join("etc/hostname"), "clone").unwrap();
    fs::write(root.join("etc/hosts"), "new").unwrap();
    fs::remove_file(root.join("var/lib/dhcp/eth0.leases")).unwrap();
    fs::create_dir(root.join("boot/grub/fonts")).unwrap();
    fs::write(root.join("boot/grub/fonts/x"), "new").unwrap();
    let clone = VerifyOptions { root: root.clone(), clone: true, ..Default::default() };
    let (summary, told) = pair.verify(&clone);
    assert!(summary.is_clean(), "{told:?}");
    let names: Vec<&str> = summary.expected.keys().map(String::as_str).collect();
    assert_eq!(names, ["grub", "its own name", "leases"]);
    // Not for the golden tree itself, nor beyond what is allowed.
    let (summary, _) = pair.verify(&VerifyOptions { clone: false, ..clone.clone() });
    assert!(summary.differences >= 5, "{summary:?}");
    fs::set_permissions(root.join("etc/hostname"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(root.join("etc/passwd"), "cloned").unwrap();
    let (_, told) = pair.verify(&clone);
    let found: BTreeSet<_> = told
        .iter()
        .filter(|d| d.expected.is_none())
        .map(|d| (d.what, String::from_utf8(d.path.clone()).unwrap()))
        .collect();
    let wanted = [(What::Mode, "etc/hostname"), (What::Content, "etc/passwd"), (What::Mtime, "etc/passwd")];
    assert_eq!(found, set(&wanted));
    // The operator's own word.
    let also = vec![Expected::new("all", "/etc/**", "a hook")];
    assert!(pair.verify(&VerifyOptions { expected: also, ..clone }).0.is_clean());
}

#[test]
fn what_is_not_sent_is_not_compared() {
    let options =
        PackOptions { excludes: ["/tmp/*", "/swapfile"].map(str::to_owned).into(), ..Default::default() };
    let pair = Pair::new(
        |root| {
            fs::create_dir(root.join("tmp")).unwrap();
            fs::write(root.join("tmp/golden"), "x").unwrap();
            fs::write(root.join("swapfile"), "x").unwrap();
        },
        options,
        Vec::new(),
    );
    unseen(&pair.clone(), "tmp/clone", |path| fs::create_dir_all(path.join("and/more")).unwrap());
    unseen(&pair.clone(), "swapfile", |path| fs::write(path, "y").unwrap());
    assert_eq!(pair.differences(), set(&[]));
    unseen(&pair.clone(), "tmp", |path| run(Command::new("chmod").arg("0700").arg(path)).map(drop).unwrap());
    assert_eq!(pair.differences(), set(&[(What::Mode, "tmp")]));
}

/// Changes a file while it is read.
struct Meddler<'a> {
    writer: Writer,
    root: &'a Path,
    current: Vec<u8>,
}

impl Observer for Meddler<'_> {
    fn entry(&mut self, path: &[u8]) {
        self.current = path.to_vec();
    }

    fn bytes(&mut self, _: u64) {
        if self.current == b"shrinks" {
            File::options().write(true).open(self.root.join("shrinks")).unwrap().set_len(5000).unwrap();
        }
    }

    fn wants_entries(&self) -> bool {
        true
    }

    fn packed(&mut self, entry: &ka_archive::manifest::Entry<'_>) {
        self.writer.packed(entry);
    }
}

#[test]
fn a_file_that_changed_while_it_was_packed_is_judged_by_what_was_sent() {
    let folder = tempfile::tempdir().unwrap();
    let (golden, clone) = (folder.path().join("golden"), folder.path().join("clone"));
    fs::create_dir(&golden).unwrap();
    fs::create_dir(&clone).unwrap();
    fs::write(golden.join("shrinks"), vec![3; 3 << 20]).unwrap();
    let path = folder.path().join("manifest");
    let writer = Writer::create(&path, &Header { root: golden.clone(), ..Header::default() }).unwrap();
    let mut meddler = Meddler { writer, root: &golden, current: Vec::new() };
    let mut stream = Vec::new();
    let options = PackOptions { root: golden.clone(), ..Default::default() };
    let summary = pack(&options, &mut stream, &mut meddler).unwrap();
    assert_eq!(summary.changed.total, 1);
    meddler.writer.finish().unwrap();
    unpack(&stream[..], &UnpackOptions { root: clone.clone(), sync: false }, &mut ()).unwrap();
    let manifest = File::open(&path).unwrap();
    let run = |root: &Path, clone| {
        let options = VerifyOptions { root: root.into(), clone, ..Default::default() };
        let mut told = Vec::new();
        let summary = verify(&manifest, &options, &mut |d| told.push(d.clone())).unwrap();
        (summary, told)
    };
    let (summary, told) = run(&clone, true);
    assert!(summary.is_clean() && told.is_empty(), "{told:?}");
    let (summary, told) = run(&golden, false);
    assert!(summary.is_clean(), "{told:?}");
    assert_eq!(summary.expected["it changed while it was packed"], 1);
    // A clone has no such excuse.
    assert!(!run(&golden, true).0.is_clean());
}

#[test]
fn other_mounts_and_mounts_of_the_clone_alone() {
    // `data` is a file system of its own in the golden tree that is not sent; `home` one of the clone's.
    let pair = Pair::new(
        |root| {
            for dir in ["data", "home"] {
                fs::create_dir(root.join(dir)).unwrap();
            }
            fs::write(root.join("home/file"), "x").unwrap();
        },
        PackOptions::default(),
        Vec::new(),
    );
    let root = pair.clone();
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            run(Command::new("umount").arg(&self.0)).unwrap();
        }
    }
    let mount = |name: &str| {
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=0755", "none"]).arg(root.join(name)))
            .unwrap();
        Mounted(root.join(name))
    };
    let home = mount("home");
    pair.restore();
    let data = mount("data");
    fs::write(root.join("data/not-looked-at"), "x").unwrap();
    assert_eq!(pair.differences(), set(&[]));
    fs::write(root.join("home/file"), "y").unwrap();
    fs::write(root.join("home/more"), "y").unwrap();
    let wanted = [
        (What::Content, "home/file"),
        (What::Mtime, "home/file"),
        (What::Extra, "home/more"),
        (What::Mtime, "home"),
    ];
    assert_eq!(pair.differences(), set(&wanted));
    drop((home, data));
}

#[test]
fn a_manifest_that_breaks_off_judges_nothing() {
    let pair = Pair::new(|root| hard_cases(root).unwrap(), PackOptions::default(), Vec::new());
    let path = pair.folder.path().join("manifest");
    let length = fs::metadata(&path).unwrap().len();
    File::options().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
    let options = VerifyOptions { root: pair.clone(), ..Default::default() };
    let mut told = 0;
    let error = verify(&pair.manifest(), &options, &mut |_| told += 1).unwrap_err();
    assert!(error.to_string().contains("breaks off"), "{error}");
    assert_eq!(told, 0);
}
