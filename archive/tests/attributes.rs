//! Flags (`chattr`) and project ids, on file systems made for it: they come back as they were, whatever they forbid; GNU
//! tar and bsdtar read the stream; a file system without them gets all else, and what it lacks is told. Labels of SELinux
//! are xattrs. A manifest has them, too, and a clone is compared in what its file system can hold. Needs root, e2fsprogs, xfsprogs and btrfs-progs.

// Helpers of tests are tests, too, though the lint does not see it.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use ka_archive::manifest::{Header, Writer};
use ka_archive::testing::{difference, listing, run};
use ka_archive::verify::{VerifyOptions, verify};
use ka_archive::{PackOptions, UnpackOptions, UnpackSummary, pack, unpack};

/// A file system in a file, mounted; its flags are removed and it is unmounted at the end.
struct Mount(PathBuf);

impl Mount {
    fn new(directory: &Path, name: &str, mkfs: &[&str]) -> Self {
        let image = directory.join(format!("{name}.img"));
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        run(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image)).unwrap();
        let at = directory.join(name);
        fs::create_dir(&at).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at)).unwrap();
        Self(at)
    }

    fn root(&self) -> PathBuf {
        self.0.join("tree")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0)).unwrap();
    }
}

/// Without project ids, which need a kernel with quotas, and that not every kernel is.
const EXT4: [&str; 3] = ["mkfs.ext4", "-q", "-F"];
const XFS: [&str; 3] = ["mkfs.xfs", "-q", "-f"];

fn chattr(words: &[&str], path: &Path) {
    run(Command::new("chattr").args(words).arg(path)).unwrap();
}

/// Flags and project of everything, by e2fsprogs, which is not ours.
fn attributes(root: &Path) -> Vec<String> {
    let text = run(Command::new("lsattr").args(["-p", "-R", "-a", "."]).current_dir(root)).unwrap();
    let mut lines: Vec<String> = String::from_utf8(text)
        .unwrap()
        .lines()
        .filter(|line| !line.ends_with(':') && !line.ends_with("/..") && !line.is_empty())
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            // How the file system keeps the file is its own affair.
            let flags = words[1].replace(['-', 'e', 'I'], "");
            format!("{} project {} flags {flags}", words[2], words[0])
        })
        .collect();
    lines.sort();
    lines
}

/// A tree with flags of all kinds, and project ids if they are wanted.
fn tree(root: &Path, projects: bool) {
    for folder in ["sealed", "sealed/inside", "log", "project", "project/inside"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    for file in
        ["plain", "sealed/file", "sealed/first", "log/grows", "noatim", "project/mine", "project/zother"]
    {
        fs::write(root.join(file), file).unwrap();
    }
    fs::write(root.join("big"), vec![7; 300_000]).unwrap();
    fs::hard_link(root.join("sealed/first"), root.join("zlink")).unwrap();
    run(Command::new("setfattr")
        .args(["-n", "security.selinux", "-v", "system_u:object_r:etc_t:s0"])
        .arg(root.join("plain")))
    .unwrap();
    chattr(&["+dA"], &root.join("noatim"));
    chattr(&["+Sd"], &root.join("big"));
    if projects {
        chattr(&["-p", "42"], &root.join("project"));
        chattr(&["-p", "42"], &root.join("project/mine"));
        chattr(&["-p", "43"], &root.join("big"));
    }
    chattr(&["+P"], &root.join("project"));
    for path in ["log/grows", "log"] {
        chattr(&["+a"], &root.join(path));
    }
    for path in ["sealed/first", "sealed/file", "big", "sealed"] {
        chattr(&["+i"], &root.join(path));
    }
}

fn packed(root: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    pack(&PackOptions { root: root.into(), ..Default::default() }, &mut stream, &mut ()).unwrap();
    stream
}

fn unpacked(stream: &[u8], root: &Path) -> UnpackSummary {
    fs::create_dir(root).unwrap();
    unpack(stream, &UnpackOptions { root: root.into(), sync: true }, &mut ()).unwrap()
}

#[test]
fn flags_and_projects_come_back_on_ext4_and_xfs() {
    let directory = tempfile::tempdir().unwrap();
    for (name, mkfs, projects) in [("ext4", &EXT4[..], false), ("xfs", &XFS, true)] {
        let mount = Mount::new(directory.path(), name, mkfs);
        fs::create_dir(mount.root()).unwrap();
        tree(&mount.root(), projects);
        let stream = packed(&mount.root());
        let to = mount.0.join("again");
        let summary = unpacked(&stream, &to);
        assert_eq!((summary.not_representable.total, summary.ignored_records), (0, 0), "{name}");
        let wanted = attributes(&mount.root());
        let project = if projects { "42" } else { "0" };
        for line in
            ["./sealed project 0 flags i", "./log/grows project 0 flags a", "./noatim project 0 flags dA"]
        {
            assert!(wanted.iter().any(|found| found == line), "{name}: {wanted:?}");
        }
        assert!(wanted.contains(&format!("./project project {project} flags P")), "{name}: {wanted:?}");
        // Made in a directory whose project new entries take, but not of it.
        assert!(wanted.contains(&"./project/zother project 0 flags ".to_owned()), "{name}: {wanted:?}");
        assert_eq!(difference(&wanted, &attributes(&to)), [""; 0], "{name}");
        assert_eq!(difference(&listing(&mount.root()).unwrap(), &listing(&to).unwrap()), [""; 0], "{name}");
    }
}

#[test]
fn other_tars_read_the_stream_and_we_read_bsdtars_flags() {
    let directory = tempfile::tempdir().unwrap();
    let mount = Mount::new(directory.path(), "ext4", &EXT4);
    fs::create_dir(mount.root()).unwrap();
    tree(&mount.root(), false);
    let stream = directory.path().join("stream.tar");
    fs::write(&stream, packed(&mount.root())).unwrap();
    let (gnu, bsd, ours) = (mount.0.join("gnu"), mount.0.join("bsd"), mount.0.join("ours"));
    fs::create_dir(&gnu).unwrap();
    fs::create_dir(&bsd).unwrap();
    let arguments = ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--acls", "-xpf"];
    run(Command::new("tar").args(arguments).arg(&stream).arg("-C").arg(&gnu)).unwrap();
    assert_eq!(difference(&listing(&mount.root()).unwrap(), &listing(&gnu).unwrap()), [""; 0]);
    // Flags too, but no project ids. It sets those of files before it makes hard links to them, so without that one.
    let arguments = ["--numeric-owner", "--xattrs", "--acls", "--fflags", "--exclude=zlink", "-xpf"];
    run(Command::new("bsdtar").args(arguments).arg(&stream).arg("-C").arg(&bsd)).unwrap();
    let flags = |root: &Path, name: &str| {
        let text = run(Command::new("lsattr").arg("-d").arg(root.join(name))).unwrap();
        String::from_utf8(text).unwrap().split(' ').next().unwrap().to_owned()
    };
    for name in ["noatim", "big", "sealed", "sealed/file", "log", "log/grows"] {
        assert_eq!(flags(&mount.root(), name), flags(&bsd, name), "{name}");
    }
    let arguments = ["--format=pax", "--numeric-owner", "--xattrs", "--acls", "--fflags", "-cf", "-"];
    let theirs = run(Command::new("bsdtar").args(arguments).arg("-C").arg(mount.root()).arg(".")).unwrap();
    unpacked(&theirs, &ours);
    for name in ["noatim", "big", "sealed", "sealed/file", "log", "log/grows"] {
        assert_eq!(flags(&mount.root(), name), flags(&ours, name), "{name}");
    }
}

#[test]
fn what_a_file_system_lacks_is_told_and_the_rest_comes() {
    let directory = tempfile::tempdir().unwrap();
    let from = Mount::new(directory.path(), "btrfs", &["mkfs.btrfs", "-q"]);
    fs::create_dir(from.root()).unwrap();
    let file = from.root().join("nocow");
    fs::write(&file, b"").unwrap();
    chattr(&["+CdA"], &file);
    fs::write(&file, b"never copied on write").unwrap();
    let stream = packed(&from.root());
    let again = from.0.join("again");
    assert_eq!(unpacked(&stream, &again).not_representable.total, 0);
    assert_eq!(difference(&attributes(&from.root()), &attributes(&again)), [""; 0]);
    let to = Mount::new(directory.path(), "ext4", &EXT4);
    let summary = unpacked(&stream, &to.root());
    assert_eq!(summary.not_representable.first, ["setting the flags or the project id of /nocow"]);
    assert_eq!(fs::read(to.root().join("nocow")).unwrap(), b"never copied on write");
    assert!(attributes(&to.root()).contains(&"./nocow project 0 flags dA".to_owned()));
    let xfs = Mount::new(directory.path(), "xfs", &XFS);
    fs::create_dir(xfs.root()).unwrap();
    fs::write(xfs.root().join("counted"), b"").unwrap();
    chattr(&["-p", "42"], &xfs.root().join("counted"));
    let summary = unpacked(&packed(&xfs.root()), &to.0.join("more"));
    assert_eq!(summary.not_representable.first, ["setting the flags or the project id of /counted"]);
}

/// Packs `root` with its manifest beside `stream`, which is returned.
fn with_manifest(root: &Path, manifest: &Path) -> Vec<u8> {
    let mut writer = Writer::create(manifest, &Header { root: root.into(), ..Header::default() }).unwrap();
    let mut stream = Vec::new();
    let options = PackOptions { root: root.into(), ..PackOptions::default() };
    pack(&options, &mut stream, &mut writer).unwrap();
    writer.finish().unwrap();
    stream
}

/// What differs, each as `WORD PATH: GOLDEN, HERE`.
fn differences(manifest: &Path, root: &Path) -> Vec<String> {
    let mut told = Vec::new();
    let options = VerifyOptions { root: root.into(), clone: true, ..VerifyOptions::default() };
    verify(&File::open(manifest).unwrap(), &options, &mut |d| {
        let text = |side: &Option<String>| side.clone().unwrap_or_default();
        let path = String::from_utf8(d.path.clone()).unwrap();
        told.push(format!("{} {path}: {}, {}", d.what.word(), text(&d.golden), text(&d.here)));
    })
    .unwrap();
    told.sort();
    told
}

#[test]
fn flags_and_project_ids_that_differ_are_told_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let manifest = directory.path().join("manifest");
    for (name, mkfs, projects) in [("ext4", &EXT4, false), ("xfs", &XFS, true)] {
        let mount = Mount::new(directory.path(), name, mkfs);
        fs::create_dir(mount.root()).unwrap();
        tree(&mount.root(), projects);
        let stream = with_manifest(&mount.root(), &manifest);
        let clone = mount.0.join("again");
        unpacked(&stream, &clone);
        for root in [&mount.root(), &clone] {
            assert_eq!(differences(&manifest, root), [""; 0], "{name}");
        }
        chattr(&["-i"], &clone.join("sealed/file"));
        chattr(&["+d"], &clone.join("plain"));
        chattr(&["-i"], &clone.join("sealed"));
        let mut wanted = vec![
            "flags plain: none, nodump".to_owned(),
            "flags sealed/file: schg, none".to_owned(),
            "flags sealed: schg, none".to_owned(),
        ];
        if projects {
            chattr(&["-p", "7"], &clone.join("project/mine"));
            chattr(&["-p", "0"], &clone.join("project"));
            chattr(&["-p", "9"], &clone.join("plain"));
            wanted.extend(
                ["plain: 0, 9", "project/mine: 42, 7", "project: 42, 0"].map(|t| format!("project {t}")),
            );
        }
        wanted.sort();
        assert_eq!(differences(&manifest, &clone), wanted, "{name}");
        // One that was made before flags were looked at says nothing of them.
        let text = run(Command::new("zstdcat").arg(&manifest)).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains("#attributes flags projid\n") && text.contains(" flags=schg"), "{text}");
        assert_eq!(text.contains(" projid=42"), projects);
        let is_old = |word: &&str| !word.starts_with("flags=") && !word.starts_with("projid=");
        let old: String = text
            .lines()
            .filter(|line| !line.starts_with("#attributes"))
            .map(|line| line.split(' ').filter(is_old).collect::<Vec<_>>().join(" ") + "\n")
            .collect();
        fs::write(&manifest, old).unwrap();
        assert_eq!(differences(&manifest, &clone), [""; 0], "{name}");
        for root in [mount.root(), clone] {
            run(Command::new("chattr").args(["-R", "-f", "-i", "-a"]).arg(root)).unwrap();
        }
    }
}

/// XFS lists ACLs a second time, as attributes of its own.
#[test]
fn acls_go_to_and_from_xfs_as_acls_alone() {
    let directory = tempfile::tempdir().unwrap();
    let manifest = directory.path().join("manifest");
    let mounts =
        [("ext4", &EXT4), ("xfs", &XFS)].map(|(name, mkfs)| Mount::new(directory.path(), name, mkfs));
    // Version 2; owner 6, uid 1000 7, group 4, mask 7, others 4.
    let acl = "0x02000000\
        01000600ffffffff02000700e803000004000400ffffffff10000700ffffffff20000400ffffffff";
    let acl: String = acl.split_whitespace().collect();
    for (i, golden) in mounts.iter().enumerate() {
        let root = golden.root();
        fs::create_dir_all(root.join("folder")).unwrap();
        fs::write(root.join("file"), b"x").unwrap();
        for (name, path) in [("access", "file"), ("access", "folder"), ("default", "folder")] {
            let name = format!("system.posix_acl_{name}");
            run(Command::new("setfattr").args(["-n", &name, "-v", &acl]).arg(root.join(path))).unwrap();
        }
        let stream = with_manifest(&root, &manifest);
        assert!(!stream.windows(7).any(|bytes| bytes == b"SGI_ACL"));
        for mount in &mounts {
            let clone = mount.0.join(format!("clone{i}"));
            unpacked(&stream, &clone);
            assert_eq!(differences(&manifest, &clone), [""; 0], "{i} to {}", mount.0.display());
            let told = run(Command::new("getfattr").args(["-m", "-", "-d"]).arg(clone.join("file"))).unwrap();
            let told = String::from_utf8(told).unwrap();
            assert!(told.contains("posix_acl_access"), "{told}");
            assert_eq!(told.contains("SGI_ACL"), mount.0.ends_with("xfs"), "{told}");
        }
    }
}

/// A layout may put the names of a file on different file systems.
#[test]
fn a_hard_link_that_becomes_a_copy_keeps_flags_and_project() {
    let directory = tempfile::tempdir().unwrap();
    let [golden, clone, other] =
        ["golden", "clone", "other"].map(|name| Mount::new(directory.path(), name, &XFS));
    let root = golden.root();
    fs::create_dir_all(root.join("mnt")).unwrap();
    for (name, words) in [("sealed", &["+id"][..]), ("plain", &["+dA"]), ("grows", &["+a"])] {
        let file = root.join(name);
        fs::write(&file, vec![7; 200_000]).unwrap();
        fs::hard_link(&file, root.join("mnt").join(name)).unwrap();
        chattr(&["-p", "42"], &file);
        chattr(words, &file);
    }
    let stream = packed(&root);
    fs::create_dir_all(clone.root().join("mnt")).unwrap();
    let at = clone.root().join("mnt");
    run(Command::new("mount").arg("--bind").arg(&other.0).arg(&at)).unwrap();
    let options = UnpackOptions { root: clone.root(), sync: true };
    let summary = unpack(&stream[..], &options, &mut ());
    let found = attributes(&clone.root());
    run(Command::new("umount").arg(&at)).unwrap();
    // The walk comes to `grows` first and to `plain` and `sealed` under `mnt`, so that copies go both ways.
    assert_eq!(summary.unwrap().copied_links.total, 3);
    let wanted: Vec<String> =
        attributes(&root).into_iter().filter(|line| !line.starts_with("./mnt project")).collect();
    assert!(wanted.contains(&"./sealed project 42 flags id".to_owned()), "{wanted:?}");
    let found: Vec<String> = found.into_iter().filter(|line| !line.starts_with("./mnt project")).collect();
    assert_eq!(difference(&wanted, &found), [""; 0]);
}

/// What has a property of btrfs, with its value.
fn properties(root: &Path) -> Vec<String> {
    let found =
        run(Command::new("getfattr").args(["-R", "-m", "^btrfs", "-d", "."]).current_dir(root)).unwrap();
    let text = String::from_utf8(found).unwrap();
    let mut all: Vec<String> = text.split("\n\n").map(|block| block.replace('\n', " ")).collect();
    all.sort();
    all
}

/// New files take their directory's compression, which is not always what they had.
#[test]
fn properties_of_directories_are_not_inherited_by_what_is_unpacked() {
    let directory = tempfile::tempdir().unwrap();
    let mount = Mount::new(directory.path(), "btrfs", &["mkfs.btrfs", "-q"]);
    let root = mount.root();
    fs::create_dir_all(root.join("late/inside")).unwrap();
    let large = vec![b'x'; 1 << 20];
    for name in ["late/small", "late/inside/small"] {
        fs::write(root.join(name), b"x").unwrap();
    }
    fs::write(root.join("late/large"), &large).unwrap();
    fs::hard_link(root.join("late/large"), root.join("late/other")).unwrap();
    let compress = |path: &Path, how: &str| {
        run(Command::new("setfattr").args(["-n", "btrfs.compression", "-v", how]).arg(path)).unwrap();
    };
    compress(&root.join("late"), "zstd");
    fs::write(root.join("late/own"), &large).unwrap();
    compress(&root.join("late/own"), "lzo");
    let stream = packed(&root);
    let (again, over) = (mount.0.join("again"), mount.0.join("over"));
    unpacked(&stream, &again);
    // One that is there before passes nothing on either.
    fs::create_dir_all(over.join("late")).unwrap();
    compress(&over.join("late"), "zlib");
    unpack(&stream[..], &UnpackOptions { root: over.clone(), sync: true }, &mut ()).unwrap();
    let wanted = properties(&root);
    assert!(wanted.len() >= 2 && wanted.iter().any(|line| line.contains("lzo")), "{wanted:?}");
    for clone in [&again, &over] {
        assert_eq!(properties(clone), wanted);
        assert_eq!(difference(&attributes(&root), &attributes(clone)), [""; 0]);
    }
    // Compressed when it was written, and not only called so afterwards.
    let extents = run(Command::new("filefrag").arg("-v").arg(again.join("late/own"))).unwrap();
    assert!(String::from_utf8_lossy(&extents).contains("encoded"), "{}", String::from_utf8_lossy(&extents));
}

#[test]
fn what_the_clones_file_system_cannot_hold_is_not_compared() {
    let directory = tempfile::tempdir().unwrap();
    let manifest = directory.path().join("manifest");
    let btrfs = Mount::new(directory.path(), "btrfs", &["mkfs.btrfs", "-q"]);
    let ext4 = Mount::new(directory.path(), "ext4", &EXT4);
    fs::create_dir(btrfs.root()).unwrap();
    let file = btrfs.root().join("nocow");
    fs::write(&file, b"").unwrap();
    chattr(&["+CdA"], &file);
    let compressed = btrfs.root().join("compressed");
    fs::write(&compressed, b"x").unwrap();
    run(Command::new("setfattr").args(["-n", "btrfs.compression", "-v", "zstd"]).arg(&compressed)).unwrap();
    let stream = with_manifest(&btrfs.root(), &manifest);
    unpacked(&stream, &ext4.root());
    assert_eq!(differences(&manifest, &ext4.root()), [""; 0]);
    chattr(&["-d"], &ext4.root().join("nocow"));
    assert_eq!(differences(&manifest, &ext4.root()), ["flags nocow: nodump,noatime, noatime"]);
}
