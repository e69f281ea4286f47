//! What could make a comparison say less than is true, or more: names that became something else, what is mounted over files,
//! directories that cannot be listed, things that go while they are looked at. Needs root and xfsprogs.

// Helpers of tests are tests, too, though the lint does not see it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use ka_archive::manifest::{Header, Writer};
use ka_archive::testing::{run, set_time};
use ka_archive::verify::{Difference, VerifyOptions, What, verify};
use ka_archive::{Expected, PackOptions, UnpackOptions, pack, unpack};

/// A golden tree that was packed, with its manifest; and its clone.
struct Pair(tempfile::TempDir);

impl Pair {
    fn new(fill: impl FnOnce(&Path), excludes: &[&str]) -> Self {
        let pair = Self(tempfile::tempdir().unwrap());
        fs::create_dir(pair.golden()).unwrap();
        fs::create_dir(pair.clone()).unwrap();
        fill(&pair.golden());
        let excludes: Vec<String> = excludes.iter().map(|&text| text.to_owned()).collect();
        let header = Header { root: pair.golden(), excludes: excludes.clone(), ..Header::default() };
        let mut writer = Writer::create(&pair.0.path().join("manifest"), &header).unwrap();
        let mut stream = Vec::new();
        let options = PackOptions { root: pair.golden(), excludes, ..PackOptions::default() };
        pack(&options, &mut stream, &mut writer).unwrap();
        writer.finish().unwrap();
        unpack(&stream[..], &UnpackOptions { root: pair.clone(), sync: false }, &mut ()).unwrap();
        pair
    }

    fn golden(&self) -> PathBuf {
        self.0.path().join("golden")
    }

    fn clone(&self) -> PathBuf {
        self.0.path().join("clone")
    }

    /// What differs; `hear` hears of each as it is found.
    fn compare(&self, root: &Path, expected: Vec<Expected>, hear: impl Fn(&Difference)) -> Vec<Difference> {
        let options = VerifyOptions { root: root.into(), clone: true, expected, ..VerifyOptions::default() };
        let manifest = File::open(self.0.path().join("manifest")).unwrap();
        let mut told = Vec::new();
        verify(&manifest, &options, &mut |difference| {
            hear(difference);
            told.push(difference.clone());
        })
        .unwrap();
        told
    }

    fn differences(&self) -> BTreeSet<(What, String)> {
        named(&self.compare(&self.clone(), Vec::new(), |_| ()))
    }
}

fn named(told: &[Difference]) -> BTreeSet<(What, String)> {
    told.iter().map(|d| (d.what, String::from_utf8(d.path.clone()).unwrap())).collect()
}

fn set(all: &[(What, &str)]) -> BTreeSet<(What, String)> {
    all.iter().map(|(what, path)| (*what, (*path).to_owned())).collect()
}

/// Changes what `path` is, and puts the time of its directory back.
fn unseen(path: &Path, change: impl FnOnce(&Path)) {
    let parent = path.parent().unwrap();
    let before = fs::metadata(parent).unwrap();
    change(path);
    set_time(parent, before.mtime(), before.mtime_nsec()).unwrap();
}

#[test]
fn a_further_name_that_became_something_else_is_told() {
    let pair = Pair::new(
        |root| {
            fs::write(root.join("a"), "one").unwrap();
            for name in ["b", "c", "d", "e"] {
                fs::hard_link(root.join("a"), root.join(name)).unwrap();
            }
        },
        &[],
    );
    assert_eq!(pair.differences(), set(&[]));
    unseen(&pair.clone().join("b"), |path| {
        for (name, make) in [
            ("b", Box::new(|p: &Path| fs::create_dir(p).unwrap()) as Box<dyn Fn(&Path)>),
            ("c", Box::new(|p: &Path| symlink("a", p).unwrap())),
            ("d", Box::new(|p: &Path| fs::write(p, "two").unwrap())),
            ("e", Box::new(|p: &Path| fs::write(p, "three").unwrap())),
        ] {
            let path = path.with_file_name(name);
            fs::remove_file(&path).unwrap();
            make(&path);
        }
    });
    let wanted = [
        (What::Kind, "b"),
        (What::Kind, "c"),
        (What::HardLink, "d"),
        (What::Content, "d"),
        (What::HardLink, "e"),
        (What::Size, "e"),
    ];
    assert_eq!(pair.differences(), set(&wanted));
    // When the first name is gone, the content of the others is still looked at.
    unseen(&pair.clone().join("a"), |path| fs::remove_file(path).unwrap());
    assert!(pair.differences().contains(&(What::Content, "d".to_owned())));
}

#[test]
fn the_time_of_a_directory_whose_content_is_left_out_says_nothing() {
    let pair = Pair::new(
        |root| {
            fs::create_dir(root.join("tmp")).unwrap();
            fs::create_dir(root.join("etc")).unwrap();
        },
        &["/tmp/*"],
    );
    for name in ["tmp", "etc"] {
        fs::write(pair.clone().join(name).join("new"), "").unwrap();
    }
    assert_eq!(pair.differences(), set(&[(What::Mtime, "etc"), (What::Extra, "etc/new")]));
    fs::set_permissions(pair.clone().join("tmp"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(pair.differences().contains(&(What::Mode, "tmp".to_owned())));
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0)).unwrap();
    }
}

#[test]
fn what_is_mounted_over_a_file_does_not_hide_it() {
    let pair = Pair::new(
        |root| {
            fs::write(root.join("sudo"), "good").unwrap();
            fs::write(root.join("empty"), "").unwrap();
        },
        &[],
    );
    let evil = pair.0.path().join("evil");
    fs::write(&evil, "evil").unwrap();
    let bind = |name: &str| {
        let at = pair.clone().join(name);
        run(Command::new("mount").arg("--bind").arg(&evil).arg(&at)).unwrap();
        Mounted(at)
    };
    let empty = bind("empty");
    // A mount point that was made for one.
    assert_eq!(pair.differences(), set(&[]));
    let sudo = bind("sudo");
    assert_eq!(pair.differences(), set(&[(What::Unreadable, "sudo")]));
    drop((empty, sudo));
}

#[test]
fn a_directory_that_cannot_be_listed_is_a_difference_and_the_rest_is_compared() {
    let names = (0..20).map(|i| format!("bad/{i:0>100}")).collect::<Vec<_>>();
    let pair = Pair::new(
        |root| {
            for folder in ["bad", "good"] {
                fs::create_dir(root.join(folder)).unwrap();
            }
            for name in &names {
                fs::write(root.join(name), "").unwrap();
            }
            fs::write(root.join("good/file"), "x").unwrap();
            fs::write(root.join("zlast"), "x").unwrap();
        },
        &[],
    );
    // The directory's only block of the clone's file system is overwritten.
    let image = pair.0.path().join("image");
    let file = File::options().read(true).write(true).create_new(true).open(&image).unwrap();
    file.set_len(400 << 20).unwrap();
    run(Command::new("mkfs.xfs").args(["-q", "-f"]).arg(&image)).unwrap();
    let at = pair.0.path().join("mount");
    fs::create_dir(&at).unwrap();
    let mount = || {
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at)).unwrap();
        Mounted(at.clone())
    };
    let mounted = mount();
    run(Command::new("cp").args(["-a", "-T"]).arg(pair.clone()).arg(&at)).unwrap();
    drop(mounted);
    let bytes = fs::read(&image).unwrap();
    let block = bytes.chunks_exact(4096).position(|block| block.starts_with(b"XDB3")).unwrap();
    file.write_all_at(&[0xa5; 4096], block as u64 * 4096).unwrap();
    let mounted = mount();
    fs::write(at.join("good/file"), "y").unwrap();
    let told = pair.compare(&at, Vec::new(), |_| ());
    let wanted = [(What::Unreadable, "bad"), (What::Content, "good/file"), (What::Mtime, "good/file")];
    assert_eq!(named(&told), set(&wanted), "{told:?}");
    assert!(told[0].here.as_ref().unwrap().starts_with("listing: "), "{told:?}");
    drop(mounted);
}

#[test]
fn what_goes_while_it_is_looked_at_is_missing_and_what_comes_in_its_place_is_told() {
    let fill = |root: &Path| {
        for name in ["fifo", "gone", "link", "other"] {
            fs::write(root.join(name), "same").unwrap();
        }
    };
    let pair = Pair::new(fill, &[]);
    let root = pair.clone();
    for name in ["fifo", "gone", "link", "other"] {
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    // Of each the mode is told first, and then it is opened.
    let told = pair.compare(&root, Vec::new(), |difference| {
        if difference.what != What::Mode {
            return;
        }
        let name = String::from_utf8(difference.path.clone()).unwrap();
        let path = root.join(&name);
        fs::remove_file(&path).unwrap();
        match &name[..] {
            "fifo" => drop(run(Command::new("mkfifo").arg(&path)).unwrap()),
            "link" => symlink("other", &path).unwrap(),
            "other" => fs::write(&path, "evil").unwrap(),
            _ => {}
        }
    });
    let found: BTreeSet<_> = named(&told).into_iter().filter(|(what, _)| *what != What::Mode).collect();
    let wanted =
        [(What::Kind, "fifo"), (What::Missing, "gone"), (What::Kind, "link"), (What::Content, "other")];
    assert_eq!(found, set(&wanted), "{told:?}");
}

#[test]
fn labels_may_differ_where_they_are_made_anew_and_nothing_else_may() {
    let label = |path: &Path, name: &str, value: &str| {
        run(Command::new("setfattr").args(["-n", name, "-v", value]).arg(path)).unwrap();
    };
    let pair = Pair::new(
        |root| {
            fs::create_dir_all(root.join("etc/ssh")).unwrap();
            for name in ["etc/ssh/sshd_config", "etc/passwd"] {
                fs::write(root.join(name), "x").unwrap();
                label(&root.join(name), "security.selinux", "u:object_r:old_t:s0");
            }
        },
        &[],
    );
    for name in ["etc/ssh", "etc/ssh/sshd_config", "etc/passwd"] {
        label(&pair.clone().join(name), "security.selinux", "u:object_r:new_t:s0");
    }
    let compare = || {
        let globs = ["/etc/ssh", "/etc/ssh/**"].map(|glob| Expected::new("label", glob, "labels"));
        let told = pair.compare(&pair.clone(), globs.into(), |_| ());
        let unexpected: Vec<_> = told.iter().filter(|d| d.expected.is_none()).cloned().collect();
        (told.len() - unexpected.len(), named(&unexpected))
    };
    assert_eq!(compare(), (2, set(&[(What::Xattr, "etc/passwd")])));
    label(&pair.clone().join("etc/ssh/sshd_config"), "user.other", "x");
    fs::set_permissions(pair.clone().join("etc/ssh"), fs::Permissions::from_mode(0o777)).unwrap();
    let wanted = [(What::Xattr, "etc/passwd"), (What::Xattr, "etc/ssh/sshd_config"), (What::Mode, "etc/ssh")];
    assert_eq!(compare(), (2, set(&wanted)));
}
