//! Why we do not let the `tar` crate walk and unpack. Each test shows a loss of its own; when one of them fails because
//! the crate has become better, good: read crates.md again.

// Helpers of tests are tests, too, though the lint does not see it.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use ka_archive::testing::{run, set_time};
use ka_archive::{PackOptions, pack};

fn appended(root: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all(".", root).unwrap();
    builder.into_inner().unwrap()
}

fn ours(root: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    pack(&PackOptions { root: root.into(), ..Default::default() }, &mut stream, &mut ()).unwrap();
    stream
}

fn unpacked_by_crate(stream: &[u8], root: &Path) {
    let mut archive = tar::Archive::new(stream);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(true);
    archive.set_unpack_xattrs(true);
    archive.unpack(root).unwrap();
}

#[test]
fn append_dir_all_loses_xattrs_links_and_times() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("a"), b"content").unwrap();
    fs::hard_link(from.join("a"), from.join("b")).unwrap();
    run(Command::new("setfattr").args(["-n", "user.x", "-v", "y"]).arg(from.join("a"))).unwrap();
    set_time(&from.join("a"), 1, 5).unwrap();
    // GNU tar reads it, so that the loss is the writer's.
    let stream = directory.path().join("s.tar");
    fs::write(&stream, appended(&from)).unwrap();
    run(Command::new("tar").args(["--xattrs", "--xattrs-include=*", "-xpf"]).arg(&stream).arg("-C").arg(&to))
        .unwrap();
    assert_eq!(fs::metadata(to.join("a")).unwrap().nlink(), 1, "hard links became copies");
    assert_eq!(fs::metadata(to.join("a")).unwrap().mtime_nsec(), 0, "nanoseconds are gone");
    assert!(run(Command::new("getfattr").arg(to.join("a"))).unwrap().is_empty(), "xattrs are gone");
}

#[test]
fn append_dir_all_stops_at_a_socket() {
    let directory = tempfile::tempdir().unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(directory.path().join("s")).unwrap();
    assert!(tar::Builder::new(Vec::new()).append_dir_all(".", directory.path()).is_err());
}

#[test]
fn unpack_loses_devices_holes_directory_times_and_xattrs_with_newlines() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    fs::create_dir_all(from.join("dir")).unwrap();
    fs::create_dir(&to).unwrap();
    run(Command::new("mknod").arg(from.join("null")).args(["c", "1", "3"])).unwrap();
    let sparse = File::create(from.join("sparse")).unwrap();
    sparse.write_all_at(b"x", 1 << 20).unwrap();
    fs::write(from.join("f"), b"").unwrap();
    rustix::fs::lsetxattr(from.join("f"), "user.a", b"1\n2", rustix::fs::XattrFlags::empty()).unwrap();
    set_time(&from.join("dir"), 1000, 0).unwrap();
    unpacked_by_crate(&ours(&from), &to);
    assert!(
        !fs::symlink_metadata(to.join("null")).unwrap().file_type().is_char_device(),
        "a device became a file"
    );
    let holes = fs::metadata(to.join("sparse")).map(|m| m.len()).unwrap_or(0);
    assert_ne!(holes, (1 << 20) + 1, "a sparse file came out wrong");
    assert_ne!(fs::metadata(to.join("dir")).unwrap().mtime(), 1000, "a directory's time is lost");
    let value = rustix::fs::lgetxattr(to.join("f"), "user.a", &mut [0u8; 9]);
    assert!(value.is_err() || value == Ok(0), "an xattr with a newline is lost: {value:?}");
}

#[test]
fn a_stream_cut_at_an_entry_is_fine_for_the_crate() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    fs::write(from.join("a"), b"1").unwrap();
    let stream = ours(&from);
    // The end mark is gone, and all that came after "a" would be.
    unpacked_by_crate(&stream[..stream.len() - 1024], &to);
    assert!(to.join("a").exists());
}

#[test]
fn a_file_that_shrinks_shifts_all_that_follows() {
    /// Gives three bytes where a thousand were promised.
    struct Shrunk(usize);
    impl std::io::Read for Shrunk {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            let count = self.0.min(out.len());
            out[..count].fill(b'x');
            self.0 -= count;
            Ok(count)
        }
    }
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_path("shrunk").unwrap();
    header.set_size(1000);
    header.set_cksum();
    builder.append(&header, Shrunk(3)).unwrap();
    let stream = builder.into_inner().unwrap();
    assert_eq!(stream.len(), 512 + 512 + 1024, "Ok, and a block too few");
}
