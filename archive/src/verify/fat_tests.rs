//! What is compared on FAT, which not every kernel that runs tests has: a clone as vfat would hold it, on another file system
//! that is taken for FAT.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use rustix::fd::BorrowedFd;
use rustix::io::Errno;

use super::{VerifyOptions, What, verify_on};
use crate::manifest::{Header, Writer};
use crate::pack::{PackOptions, pack};
use crate::target;
use crate::testing::set_time;

fn fat(_: BorrowedFd<'_>) -> Result<u32, Errno> {
    Ok(0x4d44)
}

fn found(folder: &Path, magic: super::Magic) -> BTreeSet<(What, String)> {
    let mut told = BTreeSet::new();
    let options = VerifyOptions { root: folder.join("clone"), clone: true, ..VerifyOptions::default() };
    let manifest = File::open(folder.join("manifest")).unwrap();
    verify_on(
        &manifest,
        &options,
        &mut |d| {
            assert!(told.insert((d.what, String::from_utf8(d.path.clone()).unwrap())), "told twice: {d:?}");
        },
        magic,
    )
    .unwrap();
    told
}

/// Copies as vfat does: no modes, owners, attributes, links; even seconds.
fn as_vfat(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let there = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            as_vfat(&entry.path(), &there);
        } else {
            fs::write(&there, fs::read(entry.path()).unwrap()).unwrap();
            fs::set_permissions(&there, fs::Permissions::from_mode(0o755)).unwrap();
            even(&entry.path(), &there);
        }
    }
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
    even(from, to);
}

fn even(from: &Path, to: &Path) {
    set_time(to, fs::metadata(from).unwrap().mtime() & !1, 0).unwrap();
}

#[test]
fn what_fat_cannot_hold_is_not_compared_and_all_else_is() {
    let folder = tempfile::tempdir().unwrap();
    let golden = folder.path().join("golden");
    fs::create_dir_all(golden.join("EFI/debian")).unwrap();
    for (number, name) in (0u32..).zip(["EFI/debian/shim", "EFI/debian/grub.cfg", "a", "b"]) {
        fs::write(golden.join(name), format!("content of {name}")).unwrap();
        fs::set_permissions(golden.join(name), fs::Permissions::from_mode(0o600 + 0o11 * number)).unwrap();
        lchown(golden.join(name), Some(7), Some(8)).unwrap();
        set_time(&golden.join(name), 1_000_001 + i64::from(number), 123_456_789).unwrap();
    }
    fs::hard_link(golden.join("a"), golden.join("z")).unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(golden.join("b"), "user.a", b"b", flags).unwrap();
    let header = Header { root: golden.clone(), ..Header::default() };
    let mut writer = Writer::create(&folder.path().join("manifest"), &header).unwrap();
    let options = PackOptions { root: golden.clone(), ..PackOptions::default() };
    pack(&options, std::io::sink(), &mut writer).unwrap();
    writer.finish().unwrap();
    let clone = folder.path().join("clone");
    as_vfat(&golden, &clone);

    assert_eq!(found(folder.path(), fat), BTreeSet::new());
    let elsewhere: BTreeSet<What> =
        found(folder.path(), target::magic).into_iter().map(|(what, _)| what).collect();
    let wanted = [What::Mode, What::Owner, What::Mtime, What::Xattr, What::HardLink];
    assert_eq!(elsewhere, wanted.into());

    fs::write(clone.join("z"), "content_of a").unwrap();
    fs::write(clone.join("b"), "content_of b").unwrap();
    even(&golden.join("b"), &clone.join("b"));
    fs::write(clone.join("EFI/debian/shim"), "short").unwrap();
    even(&golden.join("EFI/debian/shim"), &clone.join("EFI/debian/shim"));
    set_time(&clone.join("a"), 1_000_006, 0).unwrap();
    fs::remove_file(clone.join("EFI/debian/grub.cfg")).unwrap();
    fs::create_dir(clone.join("EFI/debian/grub.cfg")).unwrap();
    even(&golden.join("EFI/debian"), &clone.join("EFI/debian"));
    let wanted = [
        // A further name is a copy there, and compared as one.
        (What::Content, "z"),
        (What::Content, "b"),
        (What::Size, "EFI/debian/shim"),
        (What::Mtime, "a"),
        (What::Kind, "EFI/debian/grub.cfg"),
    ];
    assert_eq!(found(folder.path(), fat), wanted.map(|(what, path)| (what, path.to_owned())).into());
}
