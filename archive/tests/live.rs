//! What a live machine does to a packer: files that change and vanish while they are read, mounts, unreadable files, a
//! sink that fails; and to a restorer: mounts in the target, a full disk.

// Helpers of tests are tests, too, though the lint does not see it.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use ka_archive::testing::{compare_with_rsync, run};
use ka_archive::{
    Observer, PackError, PackOptions, PackSummary, UnpackError, UnpackOptions, UnpackSummary, pack, unpack,
};

fn packed(options: &PackOptions, observer: &mut dyn Observer) -> (Vec<u8>, PackSummary) {
    let mut stream = Vec::new();
    let summary = pack(options, &mut stream, observer).unwrap();
    (stream, summary)
}

fn unpacked(stream: &[u8], root: &Path) -> Result<UnpackSummary, UnpackError> {
    unpack(stream, &UnpackOptions { root: root.into(), sync: false }, &mut ())
}

fn options(root: &Path) -> PackOptions {
    PackOptions { root: root.into(), ..Default::default() }
}

/// Changes files at a known moment: when the first piece of one has been read, and when the root's names are known.
struct Meddler {
    root: PathBuf,
    current: Vec<u8>,
    done: Vec<Vec<u8>>,
}

impl Observer for Meddler {
    fn entry(&mut self, path: &[u8]) {
        self.current = path.to_vec();
        if path.is_empty() {
            fs::remove_file(self.root.join("vanishes")).unwrap();
            fs::remove_dir(self.root.join("vanishes-too")).unwrap();
        }
    }

    fn bytes(&mut self, _count: u64) {
        if self.done.contains(&self.current) {
            return;
        }
        self.done.push(self.current.clone());
        let path = self.root.join(String::from_utf8(self.current.clone()).unwrap());
        match &self.current[..] {
            b"grows" => OpenOptions::new().append(true).open(path).unwrap().write_all(&[9; 5000]).unwrap(),
            b"shrinks" | b"shrinks-sparse" => {
                OpenOptions::new().write(true).open(path).unwrap().set_len((3 << 20) / 2).unwrap();
            }
            b"is-rewritten" => {
                File::options().write(true).open(path).unwrap().write_all_at(b"new", 5).unwrap();
            }
            b"is-replaced" => {
                fs::remove_file(&path).unwrap();
                fs::write(&path, b"another file of this name").unwrap();
            }
            _ => {}
        }
    }
}

#[test]
fn files_that_change_while_read_keep_the_promise_and_are_listed() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let content = vec![5u8; 3 << 20];
    for name in ["grows", "is-replaced", "is-rewritten", "shrinks", "vanishes", "zz-after"] {
        fs::write(from.path().join(name), &content).unwrap();
    }
    let sparse = File::create(from.path().join("shrinks-sparse")).unwrap();
    sparse.write_all_at(&content, 8192).unwrap();
    sparse.set_len(10 << 20).unwrap();
    fs::create_dir(from.path().join("vanishes-too")).unwrap();
    let mut meddler = Meddler { root: from.path().into(), current: Vec::new(), done: Vec::new() };
    let (stream, summary) = packed(&options(from.path()), &mut meddler);
    assert_eq!(summary.changed.first, ["/grows", "/is-rewritten", "/shrinks", "/shrinks-sparse"]);
    assert_eq!(summary.changed.total, 4);
    assert_eq!(summary.vanished.first, ["/vanishes", "/vanishes-too"]);
    unpacked(&stream, to.path()).unwrap();
    let read = |name: &str| fs::read(to.path().join(name)).unwrap();
    assert!(read("grows") == content, "more than the header promised");
    assert!(read("is-replaced") == content, "the open file is the one that was to be sent");
    let shrunk = read("shrinks");
    assert_eq!(shrunk.len(), 3 << 20);
    assert!(shrunk[..1 << 19].iter().all(|&b| b == 5) && shrunk[(3 << 20) / 2..].iter().all(|&b| b == 0));
    assert_eq!(read("shrinks-sparse").len(), 10 << 20);
    assert!(read("zz-after") == content, "what follows is shifted");
}

/// A tmpfs that is unmounted at the end.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: PathBuf, size: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size},mode=0751"), "tmpfs"])
            .arg(&at))
        .unwrap();
        Self(at)
    }

    fn bind(from: &Path, at: PathBuf) -> Self {
        run(Command::new("mount").arg("--bind").arg(from).arg(&at)).unwrap();
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0)).unwrap();
    }
}

#[test]
fn mounts_are_sent_when_listed_and_empty_when_not() {
    let from = tempfile::tempdir().unwrap();
    fs::create_dir(from.path().join("under")).unwrap();
    fs::write(from.path().join("under/hidden"), b"below the mount").unwrap();
    let mount = Mount::tmpfs(from.path().join("under"), "1m");
    fs::create_dir(mount.0.join("nested")).unwrap();
    fs::write(mount.0.join("file"), b"on the mount").unwrap();
    fs::write(from.path().join("plain"), b"secret").unwrap();
    fs::write(from.path().join("zz-file-mount"), b"not seen").unwrap();
    let nested = Mount::tmpfs(mount.0.join("nested"), "1m");
    fs::write(nested.0.join("inner"), b"x").unwrap();
    let file_mount = Mount::bind(&from.path().join("plain"), from.path().join("zz-file-mount"));

    let to = tempfile::tempdir().unwrap();
    let (stream, summary) = packed(&options(from.path()), &mut ());
    unpacked(&stream, to.path()).unwrap();
    assert_eq!(summary.other_mounts.first, ["/under", "/zz-file-mount"]);
    assert_eq!(fs::metadata(to.path().join("under")).unwrap().mode() & 0o7777, 0o751);
    assert_eq!(fs::read_dir(to.path().join("under")).unwrap().count(), 0);
    assert_eq!(fs::metadata(to.path().join("zz-file-mount")).unwrap().len(), 0);

    let to = tempfile::tempdir().unwrap();
    let mut some = PackOptions { mounts: Some(vec!["/".into(), "/under".into()]), ..options(from.path()) };
    let (stream, summary) = packed(&some, &mut ());
    unpacked(&stream, to.path()).unwrap();
    assert_eq!(summary.other_mounts.first, ["/under/nested", "/zz-file-mount"]);
    let excludes = ["/under/nested/*", "/zz-file-mount"];
    assert_eq!(compare_with_rsync(from.path(), to.path(), &excludes).unwrap(), [""; 0]);
    let used = ka_archive::measure(&some).unwrap();
    assert_eq!((used["/under"].inodes, used["/"].inodes), (3, 3));

    // What lies in something that is left out is not looked for.
    for (exclude, above) in
        [("/under/*", "/under"), ("/under", "/under"), ("/*", "/under"), ("/under/*", "/")]
    {
        let mounts = Some(vec!["/".into(), above.into(), "/under/nested".into()]);
        let some = PackOptions { mounts, excludes: vec![exclude.into()], ..options(from.path()) };
        let summary = packed(&some, &mut ()).1;
        assert!(summary.other_mounts.first.contains(&"/under/nested".to_owned()), "{exclude} {summary:?}");
        assert_eq!(ka_archive::measure(&some).unwrap()["/under/nested"].inodes, 0, "{exclude}");
    }
    let mounts = Some(vec!["/".into(), "/under2/nested".into()]);
    let other = PackOptions { mounts, excludes: vec!["/under/*".into()], ..options(from.path()) };
    let error = pack(&other, io::sink(), &mut ()).unwrap_err();
    assert!(matches!(&error, PackError::MountNotFound { path } if path == "/under2/nested"), "{error}");
    some.mounts = Some(vec!["/".into(), "/under/nested".into()]);
    let error = pack(&some, io::sink(), &mut ()).unwrap_err();
    assert!(matches!(&error, PackError::MountNotFound { path } if path == "/under/nested"), "{error}");
    drop(file_mount);
    drop(nested);
}

#[test]
fn btrfs_subvolumes_are_no_borders_and_its_properties_stay_where_they_mean_something() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(256 << 20).unwrap();
    run(Command::new("mkfs.btrfs").arg("-q").arg(&image)).unwrap();
    let from = directory.path().join("from");
    fs::create_dir(&from).unwrap();
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&from)).unwrap();
    let mount = Mount(from);
    run(Command::new("btrfs").args(["subvolume", "create"]).arg(mount.0.join("home"))).unwrap();
    fs::write(mount.0.join("home/file"), b"in the subvolume").unwrap();
    fs::write(mount.0.join("compressed"), b"x").unwrap();
    run(Command::new("btrfs")
        .args(["property", "set"])
        .arg(mount.0.join("compressed"))
        .args(["compression", "zstd"]))
    .unwrap();
    let (stream, summary) = packed(&options(&mount.0), &mut ());
    assert_eq!(summary.other_mounts.total, 0);
    let to = tempfile::tempdir().unwrap();
    let summary = unpacked(&stream, to.path()).unwrap();
    assert_eq!(fs::read(to.path().join("home/file")).unwrap(), b"in the subvolume");
    assert_eq!(
        summary.not_representable.first,
        ["setting the extended attribute btrfs.compression of /compressed"]
    );
    let again = mount.0.join("again");
    fs::create_dir(&again).unwrap();
    assert_eq!(unpacked(&stream, &again).unwrap().not_representable.total, 0);
}

#[test]
fn what_cannot_be_read_fails_the_run_unless_told_otherwise() {
    // A file that not even root may open for reading.
    let root = Path::new("/proc/sys/net/ipv4/route");
    let error = pack(&options(root), io::sink(), &mut ()).unwrap_err().to_string();
    assert_eq!(error, "opening /flush: Permission denied (os error 13)");
    let summary = pack(&PackOptions { skip_unreadable: true, ..options(root) }, io::sink(), &mut ()).unwrap();
    assert_eq!(summary.unreadable.first, ["opening /flush: Permission denied (os error 13)"]);
    let error = pack(&options(Path::new("/no/such")), io::sink(), &mut ()).unwrap_err().to_string();
    assert_eq!(error, "opening the root /no/such: No such file or directory (os error 2)");
    let odd = PackOptions { excludes: vec!["/a[".into()], ..options(Path::new("/")) };
    assert!(matches!(pack(&odd, io::sink(), &mut ()), Err(PackError::Pattern(_))));
}

#[test]
fn a_sink_that_fails_fails_the_run() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::Error::other("the chain is gone"));
            }
            let count = bytes.len().min(self.0);
            self.0 -= count;
            Ok(count)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("f"), vec![1; 4 << 20]).unwrap();
    for room in [0, 1, 1 << 20, 4 << 20] {
        let error = pack(&options(from.path()), Full(room), &mut ()).unwrap_err().to_string();
        assert_eq!(error, "writing the stream: the chain is gone");
    }
}

#[test]
fn a_full_disk_is_an_error_that_names_the_file() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir(from.path().join("dir")).unwrap();
    fs::write(from.path().join("dir/big"), vec![1; 2 << 20]).unwrap();
    let (stream, _) = packed(&options(from.path()), &mut ());
    let mount = Mount::tmpfs(to.path().join("small"), "1m");
    let error = unpacked(&stream, &mount.0).unwrap_err().to_string();
    assert_eq!(error, "writing /dir/big: No space left on device (os error 28)");
}

#[test]
fn a_hard_link_across_the_targets_file_systems_becomes_a_copy() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir(from.path().join("mnt")).unwrap();
    let file = File::create(from.path().join("a")).unwrap();
    file.write_all_at(b"x", 1 << 20).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(from.path().join("a"), from.path().join("mnt/b")).unwrap();
    fs::hard_link(from.path().join("a"), from.path().join("mnt/c")).unwrap();
    let (stream, summary) = packed(&options(from.path()), &mut ());
    assert_eq!(summary.hard_links, 2);
    let mount = Mount::tmpfs(to.path().join("mnt"), "8m");
    let summary = unpacked(&stream, to.path()).unwrap();
    assert_eq!(summary.copied_links.first, ["/mnt/b", "/mnt/c"]);
    let plain = |root: &Path| {
        let arguments = ["-rlptgoDnic", "--numeric-ids", "--modify-window=-1", "--delete"];
        run(Command::new("rsync").args(arguments).arg(root.join("")).arg(to.path().join(""))).unwrap()
    };
    assert_eq!(String::from_utf8(plain(from.path())).unwrap(), "");
    assert!(fs::metadata(mount.0.join("b")).unwrap().blocks() < 100, "holes stay holes");
}
