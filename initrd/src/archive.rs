//! Writing the initramfs: a newc cpio archive, compressed with what the kernel can unpack, written to a temporary file
//! and renamed. Sorted names, owner 0:0, time 0 and counted inode numbers make it reproducible.

use crate::Error;
use crate::tree::{Content, Entry, Node, Tree};
use cpio::newc;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};

/// How the archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// zstd, levels 1 to 19.
    Zstd(i32),
    /// gzip, levels 1 to 9.
    Gzip(u32),
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the archive before compression.
    pub plain: u64,
    /// Bytes of the file.
    pub packed: u64,
}

/// Writes `tree` to `path`: a temporary file beside it first, which is synced and renamed when it is whole.
///
/// # Errors
/// When a source file changed its size meanwhile, or the system refuses.
pub fn write_file(tree: &Tree, path: &Path, compression: Compression) -> Result<Written, Error> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary)
        .map_err(Error::io("creating", &temporary))
        .and_then(|file| write_compressed(tree, file, &temporary, compression))
        .and_then(|written| {
            fs::rename(&temporary, path).map_err(Error::io("renaming to", path))?;
            Ok(written)
        });
    if written.is_err() {
        // It may never have been made; the error that matters is the first one.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_compressed(tree: &Tree, file: File, path: &Path, how: Compression) -> Result<Written, Error> {
    let failed = || Error::io("writing", path);
    let out = BufWriter::with_capacity(1 << 20, file);
    let (plain, out) = match how {
        Compression::Zstd(level) => {
            let mut encoder = zstd::Encoder::new(out, level).map_err(failed())?;
            // With workers the bytes are the same for any number of them, but not for none: never fewer than one.
            let workers = std::thread::available_parallelism().map_or(1, NonZero::get).min(8);
            encoder
                .multithread(u32::try_from(workers).unwrap_or(1))
                .and_then(|()| encoder.include_checksum(true))
                .map_err(failed())?;
            let (plain, encoder) = write_cpio(tree, encoder, path)?;
            (plain, encoder.finish().map_err(failed())?)
        }
        Compression::Gzip(level) => {
            let encoder = flate2::write::GzEncoder::new(out, flate2::Compression::new(level));
            let (plain, encoder) = write_cpio(tree, encoder, path)?;
            (plain, encoder.finish().map_err(failed())?)
        }
    };
    let file = out.into_inner().map_err(|e| failed()(e.into_error()))?;
    file.sync_all().map_err(failed())?;
    let packed = file.metadata().map_err(failed())?.len();
    Ok(Written { plain, packed })
}

/// Writes the archive of `tree` to `out`, which `path` stands for in errors; returns its size, and `out`.
///
/// # Errors
/// As [`write_file`].
pub fn write_cpio<W: Write>(tree: &Tree, out: W, path: &Path) -> Result<(u64, W), Error> {
    let mut out = Counted { out, bytes: 0 };
    let failed = || Error::io("writing", path);
    for (inode, (name, entry)) in (1..).zip(tree.entries()) {
        let (kind, content) = match &entry.node {
            Node::Directory => (0o040_000, Vec::new()),
            Node::Symlink(target) => (0o120_000, target.clone().into_bytes()),
            Node::Device(..) => (0o020_000, Vec::new()),
            Node::File(content) => (0o100_000, load(content)?),
        };
        let size = u32::try_from(content.len())
            .map_err(|_| Error::bad(name, "too large for an initramfs (4 GiB or more)"))?;
        let mut writer = header(name, entry, kind).ino(inode).write(&mut out, size);
        writer.write_all(&content).and_then(|()| writer.finish().map(drop)).map_err(failed())?;
    }
    newc::trailer(&mut out).map_err(failed())?;
    Ok((out.bytes, out.out))
}

fn header(name: &str, entry: &Entry, kind: u32) -> newc::Builder {
    let builder = newc::Builder::new(name).mode(kind | entry.mode).mtime(0).uid(0).gid(0);
    match entry.node {
        Node::Directory => builder.nlink(2),
        Node::Device(major, minor) => builder.rdev_major(major).rdev_minor(minor),
        _ => builder,
    }
}

fn load(content: &Content) -> Result<Vec<u8>, Error> {
    match content {
        Content::Bytes(bytes) => Ok(bytes.clone()),
        Content::File { path, size } => {
            let bytes = fs::read(path).map_err(Error::io("reading", path))?;
            if bytes.len() as u64 != *size {
                return Err(Error::bad(path, "changed its size while the image was being made"));
            }
            Ok(bytes)
        }
    }
}

/// Counts what passes. Ignores `flush`: the cpio crate flushes after every entry, which would end a block of the
/// compressor each time and cost some percent of size.
struct Counted<W> {
    out: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Part;
    use proptest::prelude::*;
    use std::io::Read;
    use std::process::{Command, Stdio};

    fn sample() -> Tree {
        let mut tree = Tree::new();
        tree.text("/etc/passwd", "root:x:0:0\n", Part::Base).unwrap();
        tree.file("/init", 0o755, Content::Bytes(vec![7; 5]), Part::Agent).unwrap();
        tree.device("/dev/console", 0o600, 5, 1).unwrap();
        tree.symlink("/etc/mtab", "/proc/self/mounts", Part::Base).unwrap();
        tree.text("/empty", "", Part::Base).unwrap();
        tree
    }

    fn plain(tree: &Tree) -> Vec<u8> {
        write_cpio(tree, Vec::new(), Path::new("test")).unwrap().1
    }

    /// What GNU cpio makes of an archive: one line an entry.
    fn listing(archive: &[u8]) -> Option<String> {
        let child = Command::new("cpio")
            .args(["-itv", "--numeric-uid-gid", "--quiet"])
            .env("TZ", "UTC")
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(e) => {
                println!("SKIPPED: cpio: {e}");
                return None;
            }
        };
        child.stdin.take().unwrap().write_all(archive).unwrap();
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
        Some(String::from_utf8(out.stdout).unwrap())
    }

    #[test]
    fn gnu_cpio_sees_what_was_put_in() {
        let Some(list) = listing(&plain(&sample())) else { return };
        let lines: Vec<String> =
            list.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for line in [
            "lrwxrwxrwx 1 0 0 7 Jan 1 1970 bin -> usr/bin",
            "crw------- 1 0 0 5, 1 Jan 1 1970 dev/console",
            "-rw-r--r-- 1 0 0 0 Jan 1 1970 empty",
            "drwxr-xr-x 2 0 0 0 Jan 1 1970 etc",
            "lrwxrwxrwx 1 0 0 17 Jan 1 1970 etc/mtab -> /proc/self/mounts",
            "-rwxr-xr-x 1 0 0 5 Jan 1 1970 init",
            "drwxr-xr-x 2 0 0 0 Jan 1 1970 usr/sbin",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line} in {lines:#?}");
        }
    }

    #[test]
    fn the_crate_flushes_after_entries_and_we_do_not_pass_it_on() {
        struct NoFlush(Vec<u8>);
        impl Write for NoFlush {
            fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
                self.0.extend(buf);
                Ok(buf.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::Error::other("flushed"))
            }
        }
        // The trap: a plain writer is flushed by the crate. When this fails, `Counted` need not ignore flushes any more.
        let mut entry = newc::Builder::new("x").write(NoFlush(Vec::new()), 1);
        entry.write_all(b"1").unwrap();
        assert!(entry.finish().is_err());
        write_cpio(&sample(), NoFlush(Vec::new()), Path::new("test")).unwrap();
    }

    #[test]
    fn a_file_that_changes_meanwhile_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::write(&source, "12345").unwrap();
        let mut tree = sample();
        tree.file("/x", 0o644, Content::of_file(&source).unwrap(), Part::Included).unwrap();
        fs::write(&source, "123456").unwrap();
        let out = dir.path().join("out");
        let error = write_file(&tree, &out, Compression::Gzip(1)).unwrap_err().to_string();
        assert!(error.contains("source: changed its size"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the source is left");
    }

    #[test]
    fn both_compressions_give_back_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let tree = sample();
        let wanted = plain(&tree);
        for how in [Compression::Zstd(3), Compression::Zstd(19), Compression::Gzip(9)] {
            let written = write_file(&tree, &out, how).unwrap();
            let packed = fs::read(&out).unwrap();
            assert_eq!((written.plain, written.packed), (wanted.len() as u64, packed.len() as u64));
            let mut got = Vec::new();
            match how {
                Compression::Zstd(_) => got = zstd::decode_all(&packed[..]).unwrap(),
                Compression::Gzip(_) => {
                    flate2::read::MultiGzDecoder::new(&packed[..]).read_to_end(&mut got).unwrap();
                }
            }
            assert!(got == wanted, "{how:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_tree_is_read_back_by_cpio(
            files in prop::collection::btree_map("[a-z]{1,3}(/[a-z]{1,60}){0,4}", 0..3000_usize, 1..12)
        ) {
            let mut tree = Tree::new();
            let mut put = Vec::new();
            for (name, size) in &files {
                // `a` and `a/b` cannot both be files.
                if tree.file(name, 0o644, Content::Bytes(vec![1; *size]), Part::Base).is_ok() {
                    put.push((name.clone(), *size));
                }
            }
            let archive = plain(&tree);
            if let Some(list) = listing(&archive) {
                prop_assert_eq!(list.lines().count(), tree.entries().count());
                for (name, size) in put {
                    let line = list.lines().find(|l| l.ends_with(&format!(" {name}"))).unwrap_or_default();
                    let size = size.to_string();
                    prop_assert_eq!(line.split_whitespace().nth(4), Some(size.as_str()), "{}", line);
                }
            }
        }
    }
}
