//! For tests, ours and other crates': a tree of everything that archivers get wrong, and comparisons of two trees by
//! tools that are not ours (rsync, find, getfattr, sha256sum). Needs root, and a file system with xattrs and devices.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, XattrFlags, lsetxattr, makedev,
    mkdirat, mknodat, openat, utimensat,
};

/// The size of the sparse file in [`hard_cases`], in bytes.
pub const SPARSE_SIZE: u64 = 10 << 30;
/// The socket in [`hard_cases`], which no archive can carry: leave it out of comparisons.
pub const SOCKET: &str = "socket";

/// Builds the tree of hard cases in the empty directory `root`.
///
/// # Errors
/// When anything cannot be made: not root, or a file system that lacks a feature.
pub fn hard_cases(root: &Path) -> io::Result<()> {
    contents(root)?;
    names(root)?;
    links(root)?;
    attributes(root)?;
    nodes(root)?;
    owners_and_modes(root)?;
    times(root)
}

fn contents(root: &Path) -> io::Result<()> {
    fs::write(root.join("empty"), b"")?;
    fs::write(root.join("one-block"), [7; 512])?;
    fs::write(root.join("block-and-one"), [8; 513])?;
    let noise: Vec<u8> = (0..3_000_001u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    fs::write(root.join("three-megabytes"), noise)?;
    let sparse = File::create(root.join("sparse-10G"))?;
    sparse.set_len(SPARSE_SIZE)?;
    sparse.write_all_at(b"near the start", 4096 * 3)?;
    sparse.write_all_at(b"past 8 GiB", 9 << 30)?;
    File::create(root.join("all-hole"))?.set_len(1 << 20)?;
    let ends_in_data = File::create(root.join("hole-then-data"))?;
    ends_in_data.write_all_at(b"end", (1 << 20) - 3)?;
    let many = File::create(root.join("many-holes"))?;
    for i in 0..200 {
        many.write_all_at(b"data", i * 16384)?;
    }
    many.set_len(200 * 16384)
}

fn names(root: &Path) -> io::Result<()> {
    let dir = root.join("names");
    fs::create_dir(&dir)?;
    for name in [
        &b"with space"[..],
        b"new\nline",
        b"-dash",
        b"~",
        b"back\\slash",
        b"\xff\xfe not utf-8",
        b"*?[x]",
        b"\xc3\xa9",
    ] {
        fs::write(dir.join(OsStr::from_bytes(name)), name)?;
    }
    fs::write(dir.join("l".repeat(255)), b"long")?;
    fs::write(dir.join(OsStr::from_bytes(&[0xe9; 255])), b"long and not UTF-8")?;
    // Around the 100 bytes that fit a plain header.
    for length in 92..97 {
        fs::write(dir.join("n".repeat(length)), b"edge")?;
        fs::create_dir(dir.join("d".repeat(length)))?;
    }
    let sparse =
        File::create(dir.join(OsStr::from_bytes(&[b"\xffsparse"[..].to_vec(), vec![b's'; 200]].concat())))?;
    sparse.write_all_at(b"x", 1 << 20)?;
    deep(root, "deep", 15)
}

/// `count` directories of 200-byte names inside each other, with a file in the innermost; not limited by `PATH_MAX`.
///
/// # Errors
/// When they cannot be made.
pub fn deep(root: &Path, top: &str, count: usize) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at: OwnedFd = openat(CWD, root, flags, Mode::empty())?;
    for level in 0..count {
        let name = if level == 0 { top.to_owned() } else { format!("{level:03}{}", "p".repeat(197)) };
        mkdirat(&at, &name, Mode::from_raw_mode(0o755))?;
        at = openat(&at, &name, flags, Mode::empty())?;
    }
    let file = openat(
        &at,
        "innermost",
        OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o644),
    )?;
    File::from(file).write_all(b"deep down")
}

fn links(root: &Path) -> io::Result<()> {
    for dir in ["links", "links/a", "links/z"] {
        fs::create_dir(root.join(dir))?;
    }
    fs::write(root.join("links/z/first"), b"three names")?;
    fs::hard_link(root.join("links/z/first"), root.join("links/a/second"))?;
    fs::hard_link(root.join("links/z/first"), root.join("zz-third"))?;
    symlink("z/first", root.join("links/relative"))?;
    symlink("/etc/passwd", root.join("links/absolute"))?;
    symlink("no/such/thing", root.join("links/dangling"))?;
    symlink("../..", root.join("links/upwards"))?;
    symlink(
        OsStr::from_bytes(&[b"/\xff\xfe/"[..].to_vec(), vec![b't'; 3000]].concat()),
        root.join("links/long-target"),
    )?;
    fs::hard_link(root.join("links/dangling"), root.join("links/dangling-too"))?;
    // Another name of a symlink whose own path is long, so that both need PAX records.
    fs::hard_link(root.join("links/long-target"), root.join("links").join("h".repeat(200)))
}

fn attributes(root: &Path) -> io::Result<()> {
    let dir = root.join("attributes");
    fs::create_dir(&dir)?;
    fs::write(dir.join("capable"), b"#!/bin/sh\n")?;
    run(Command::new("setcap").arg("cap_net_raw,cap_sys_admin+ep").arg(dir.join("capable")))?;
    fs::write(dir.join("acl"), b"gid 10 has a newline byte in its ACL")?;
    run(Command::new("setfacl").args(["-m", "g:10:rwx,u:4000000000:r--"]).arg(dir.join("acl")))?;
    fs::create_dir(dir.join("acl-dir"))?;
    run(Command::new("setfacl").args(["-m", "g:10:rwx,d:g:10:r-x,d:u:7:rwx"]).arg(dir.join("acl-dir")))?;
    // Made before its directory had the default ACL, so without it: restoring must not add it.
    fs::create_dir(dir.join("acl-late"))?;
    fs::write(dir.join("acl-late/plain"), b"no ACL of its own")?;
    fs::create_dir(dir.join("acl-late/plain-dir"))?;
    run(Command::new("setfacl").args(["-d", "-m", "g:10:rwx"]).arg(dir.join("acl-late")))?;
    fs::write(dir.join("xattrs"), b"")?;
    fs::create_dir(dir.join("xattr-dir"))?;
    symlink("xattrs", dir.join("xattr-link"))?;
    for (name, value) in [
        ("user.newline", &b"a\nb\n30 linkpath=/etc/evil\n"[..]),
        ("user.nul", b"a\0b\0"),
        ("user.empty", b""),
        ("user.a=b%3D", b"the name has the sign that ends a key"),
        ("user.binary", &[0xff; 1000]),
        ("trusted.ka", b"only root sees it"),
        ("trusted.overlay.opaque", b"y"),
    ] {
        for path in ["xattrs", "xattr-dir"] {
            lsetxattr(dir.join(path), name, value, XattrFlags::empty())?;
        }
    }
    lsetxattr(dir.join("xattr-link"), "trusted.link", b"on the link", XattrFlags::empty())?;
    Ok(())
}

fn nodes(root: &Path) -> io::Result<()> {
    let make =
        |name: &str, kind, device| mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), device);
    make("char", FileType::CharacterDevice, makedev(1, 3))?;
    make("block", FileType::BlockDevice, makedev(259, 1_000_000))?;
    make("whiteout", FileType::CharacterDevice, makedev(0, 0))?;
    make("fifo", FileType::Fifo, 0)?;
    lsetxattr(root.join("fifo"), "trusted.fifo", b"1", XattrFlags::empty())?;
    fs::hard_link(root.join("char"), root.join("char-too"))?;
    // The name goes with the listener's address, not with the listener.
    drop(UnixListener::bind(root.join(SOCKET))?);
    Ok(())
}

fn owners_and_modes(root: &Path) -> io::Result<()> {
    let dir = root.join("modes");
    fs::create_dir(&dir)?;
    for mode in [0o0, 0o444, 0o4755, 0o2755, 0o1777, 0o6711, 0o7777] {
        let file = dir.join(format!("file-{mode:o}"));
        fs::write(&file, b"mode")?;
        chown(&file, Some(4_000_000_000), Some(4_000_000_001))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
        let sub = dir.join(format!("dir-{mode:o}"));
        fs::create_dir(&sub)?;
        fs::write(sub.join("inside"), b"")?;
        chown(&sub, Some(1000), Some(u32::MAX - 1))?;
        fs::set_permissions(&sub, fs::Permissions::from_mode(mode))?;
    }
    symlink("nowhere", dir.join("link"))?;
    lchown(dir.join("link"), Some(12), Some(34))?;
    chown(root.join("fifo"), Some(5), Some(6))?;
    fs::create_dir(dir.join("empty-odd"))?;
    fs::set_permissions(dir.join("empty-odd"), fs::Permissions::from_mode(0o1001))
}

fn times(root: &Path) -> io::Result<()> {
    let dir = root.join("times");
    fs::create_dir(&dir)?;
    for (name, seconds, nanos) in [
        ("before-1970", -1_000_000_000, 0),
        ("before-1970-ns", -5, 123_456_789),
        ("just-before", -1, 999_999_999),
        ("epoch", 0, 0),
        ("one-ns", 1, 1),
        ("after-2038", 5_000_000_000, 1),
    ] {
        fs::create_dir_all(dir.join(name))?;
        fs::write(dir.join(name).join("file"), b"time")?;
        symlink("file", dir.join(name).join("link"))?;
        for path in ["file", "link", "."] {
            set_time(&dir.join(name).join(path), seconds, nanos)?;
        }
    }
    for (i, path) in ["char", "fifo", "names", "links/z", "deep"].iter().enumerate() {
        set_time(&root.join(path), 1_000_000_000, 1 + i64::try_from(i).unwrap_or(0))?;
    }
    set_time(root, 1_234_567_890, 987_654_321)
}

/// Sets the modification time of `path` itself, not of what it links to.
///
/// # Errors
/// What the kernel says.
pub fn set_time(path: &Path, seconds: i64, nanos: i64) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanos },
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Runs a program; its standard output, or an error with its standard error.
///
/// # Errors
/// When it cannot be run or does not exit with 0.
pub fn run(command: &mut Command) -> io::Result<Vec<u8>> {
    let failed = |e: String| io::Error::other(format!("{command:?}: {e}"));
    let mut again = Command::new(command.get_program());
    again.args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        again.current_dir(dir);
    }
    let output = again.env("LC_ALL", "C").output().map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(failed(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))))
    }
}

/// What rsync would do to make `b` equal to `a` (content by checksum, all metadata, times to the ns, links, ACLs, xattrs),
/// a line for each difference. `excludes` are rsync patterns. Files above 1 GiB are compared by what GNU tar finds in
/// their data regions, since reading all their holes would take minutes.
///
/// # Errors
/// When one of the tools fails.
pub fn compare_with_rsync(a: &Path, b: &Path, excludes: &[&str]) -> io::Result<Vec<String>> {
    let large = large_files(a)?;
    let rsync = |extra: &[&str], left_out: &[String]| {
        let mut command = Command::new("rsync");
        command
            .args(["-aHAXni", "--numeric-ids", "--modify-window=-1", "--delete"])
            .args(extra)
            .args(left_out);
        run(command.arg(a.join("")).arg(b.join("")))
    };
    let mut left_out: Vec<String> = excludes.iter().map(|pattern| format!("--exclude={pattern}")).collect();
    let mut lines = String::from_utf8_lossy(&rsync(&[], &left_out)?).into_owned();
    // It would read the large ones for their checksums even where told to pass them by for their size.
    left_out.extend(
        large.iter().map(|path| format!("--exclude={}", path.to_string_lossy().trim_start_matches('.'))),
    );
    lines.push_str(&String::from_utf8_lossy(&rsync(&["-c"], &left_out)?));
    let mut lines: Vec<String> = lines.lines().map(str::to_owned).collect();
    lines.sort();
    lines.dedup();
    for path in large {
        if large_digest(a, &path)? != large_digest(b, &path)? {
            lines.push(format!("content differs: {}", path.display()));
        }
    }
    Ok(lines)
}

fn large_files(root: &Path) -> io::Result<Vec<PathBuf>> {
    let found = run(Command::new("find")
        .args([".", "-type", "f", "-size", "+1048576k", "-print0"])
        .current_dir(root))?;
    Ok(found.split(|&b| b == 0).filter(|p| !p.is_empty()).map(|p| OsStr::from_bytes(p).into()).collect())
}

/// A digest of the data regions of a file with holes; of nothing else of it, where it is missing.
fn large_digest(root: &Path, path: &Path) -> io::Result<Vec<u8>> {
    if !root.join(path).exists() {
        return Ok(Vec::new());
    }
    let script = "tar -S --format=gnu --mtime=@0 --numeric-owner --owner=0 --group=0 --mode=0 -cf - -- \"$1\" | sha256sum";
    run(Command::new("sh").args(["-c", script, "sh"]).arg(path).current_dir(root))
}

/// The tree at `root` as sorted text, by find, getfattr and sha256sum: names, types, modes, owners, sizes, times, link
/// counts and targets, xattrs, content (of files above 1 GiB as GNU tar sees it). Sockets are left out. Equal trees have equal listings.
///
/// # Errors
/// When one of the tools fails.
pub fn listing(root: &Path) -> io::Result<Vec<String>> {
    let find = |arguments: &[&str]| run(Command::new("find").arg(".").args(arguments).current_dir(root));
    let common = "%y %m %U %G %T@";
    let mut text = find(&["-type", "d", "-printf", &format!("%p\\t{common}\\n")])?;
    text.extend(find(&[
        "!",
        "-type",
        "d",
        "!",
        "-type",
        "s",
        "-printf",
        &format!("%p\\t{common} %s %n %l\\n"),
    ])?);
    text.extend(find(&["-type", "f", "-size", "-1048576k", "-exec", "sha256sum", "{}", "+"])?);
    let nodes =
        find(&["(", "-type", "c", "-o", "-type", "b", ")", "-exec", "stat", "-c", "%n %t:%T", "{}", "+"])?;
    text.extend(nodes);
    let mut lines: Vec<String> =
        text.split(|&b| b == b'\n').map(|line| line.escape_ascii().to_string()).collect();
    let xattrs = run(Command::new("getfattr")
        .args(["-R", "-P", "-h", "-d", "-m", "-", "-e", "hex", "."])
        .current_dir(root))?;
    let xattrs = String::from_utf8_lossy(&xattrs).into_owned();
    lines.extend(xattrs.split("\n\n").map(|block| {
        let mut attributes: Vec<&str> = block.lines().collect();
        attributes.sort_unstable();
        attributes.join(" ")
    }));
    for path in large_files(root)? {
        let digest = large_digest(root, &path)?;
        lines.push(format!("{} {}", String::from_utf8_lossy(&digest).trim(), path.display()));
    }
    lines.sort();
    Ok(lines)
}

/// Lines of `a` that `b` lacks (`-`) and the other way round (`+`).
#[must_use]
pub fn difference(a: &[String], b: &[String]) -> Vec<String> {
    let lacking = |sign: &'static str, of: &[String], other: &[String]| -> Vec<String> {
        let other: std::collections::HashSet<String> = other.iter().cloned().collect();
        of.iter().filter(|line| !other.contains(*line)).map(|line| format!("{sign}{line}")).collect()
    };
    let mut lines = lacking("-", a, b);
    lines.extend(lacking("+", b, a));
    lines
}
