//! The clone's files, as the clone itself will see them: every path is resolved inside the target root by the kernel
//! (`openat2` with `RESOLVE_IN_ROOT`), so that an absolute symlink in the clone means the clone's file and no path,
//! link or `..` leads out of it. Writing replaces a file in one step and keeps its mode, owner and extended attributes.

use anyhow::{Context, Result, bail};
use rustix::fd::OwnedFd;
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// More than any configuration file has; a larger one is an error, not a reason to run out of memory.
const FILE_LIMIT: u64 = 64 << 20;
/// Symbolic links followed in a row, as in the kernel.
const LINK_LIMIT: usize = 40;

/// The root of a mounted clone.
pub struct Root {
    dir: OwnedFd,
}

/// The directory that really holds a file, and the file's name there; the name is no symbolic link.
struct Place {
    parent: OwnedFd,
    name: OsString,
}

impl Root {
    /// Opens the root at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let dir = fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("opening the target root {}", path.display()))?;
        Ok(Self { dir })
    }

    /// Whether the name exists, links followed inside the root.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.open_at(path.as_ref(), OFlags::PATH, Mode::empty()).is_ok()
    }

    /// Whether it is a directory, links followed inside the root.
    pub fn is_dir(&self, path: impl AsRef<Path>) -> bool {
        self.open_at(path.as_ref(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).is_ok()
    }

    /// Size in bytes of a regular file; none when there is none.
    pub fn size(&self, path: impl AsRef<Path>) -> Option<u64> {
        let fd = self.open_at(path.as_ref(), OFlags::PATH, Mode::empty()).ok()?;
        let stat = fs::fstat(&fd).ok()?;
        (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
            .then(|| u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Where the name itself is a symbolic link: what it says.
    pub fn link(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        let path = path.as_ref();
        let (parent, name) = self.parent_of(path).ok()?;
        let target = fs::readlinkat(&parent, &name, Vec::new()).ok()?;
        Some(PathBuf::from(OsString::from_vec(target.into_bytes())))
    }

    /// A regular file's content; none when it does not exist.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Option<Vec<u8>>> {
        let path = path.as_ref();
        let reading = || format!("reading {} of the clone", path.display());
        // Not blocking: a fifo in a file's place must not hang the node.
        let fd = match self.open_at(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(e).with_context(reading),
        };
        let kind = FileType::from_raw_mode(fs::fstat(&fd).with_context(reading)?.st_mode);
        if kind != FileType::RegularFile {
            bail!("reading {} of the clone: it is no regular file", path.display());
        }
        let mut content = Vec::new();
        File::from(fd).take(FILE_LIMIT + 1).read_to_end(&mut content).with_context(reading)?;
        if content.len() as u64 > FILE_LIMIT {
            bail!("reading {} of the clone: it is larger than {FILE_LIMIT} bytes", path.display());
        }
        Ok(Some(content))
    }

    /// A file's content as text of one character a byte (see [`from_bytes`]), so that none is lost or changed.
    pub fn read_text(&self, path: impl AsRef<Path>) -> Result<Option<String>> {
        Ok(self.read(path)?.map(|bytes| from_bytes(&bytes)))
    }

    /// Writes text of one character a byte; see [`Root::write`].
    pub fn write_text(&self, path: impl AsRef<Path>, text: &str, mode: u32) -> Result<bool> {
        self.write(path, &to_bytes(text), mode)
    }

    /// Gives a file this content, in one step. A file that exists keeps mode, owner and extended attributes; a new one
    /// gets `mode` and belongs to root. Nothing is done, and false comes back, when it has this content already.
    pub fn write(&self, path: impl AsRef<Path>, content: &[u8], mode: u32) -> Result<bool> {
        let path = path.as_ref();
        if self.read(path)?.is_some_and(|old| old == content) {
            return Ok(false);
        }
        self.replace(path, content, mode)
            .with_context(|| format!("writing {} of the clone", path.display()))?;
        Ok(true)
    }

    fn replace(&self, path: &Path, content: &[u8], mode: u32) -> Result<()> {
        let Place { parent, name } = self.locate(path)?;
        let old = match fs::openat(
            &parent,
            &name,
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW,
            Mode::empty(),
        ) {
            Ok(fd) => Some(fd),
            Err(Errno::NOENT) => None,
            Err(e) => return Err(e.into()),
        };
        let mut temporary = OsString::from(".");
        temporary.push(&name);
        temporary.push(format!(".ka-{}", uuid::Uuid::new_v4().simple()));
        // A name that is nearly as long as names may be leaves no room for more.
        if temporary.len() > 255 {
            temporary = OsString::from(format!(".ka-{}", uuid::Uuid::new_v4().simple()));
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let new = fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(0o600))?;
        let filled = fill(new, old.as_ref(), content, mode)
            .and_then(|()| Ok(fs::renameat(&parent, &temporary, &parent, &name)?));
        if filled.is_err() {
            // The first error is the one that counts; a temporary file left over is the lesser evil.
            let _ = fs::unlinkat(&parent, &temporary, AtFlags::empty());
        }
        filled
    }

    /// Removes a file or a symbolic link (not what it points to); false when there is none. Directories stay.
    pub fn remove(&self, path: impl AsRef<Path>) -> Result<bool> {
        let path = path.as_ref();
        let removed = self.parent_of(path).and_then(|(parent, name)| {
            let kind =
                FileType::from_raw_mode(fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode);
            if kind == FileType::Directory {
                return Ok(false);
            }
            fs::unlinkat(&parent, &name, AtFlags::empty())?;
            Ok(true)
        });
        match removed {
            Ok(done) => Ok(done),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(e) => Err(e).with_context(|| format!("removing {} of the clone", path.display())),
        }
    }

    /// The names in a directory, sorted; empty when it does not exist.
    pub fn list(&self, path: impl AsRef<Path>) -> Result<Vec<OsString>> {
        let path = path.as_ref();
        let listing = || format!("listing {} of the clone", path.display());
        let fd = match self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
            Err(e) => return Err(e).with_context(listing),
        };
        let mut names = Vec::new();
        for entry in fs::Dir::read_from(&fd).with_context(listing)? {
            let entry = entry.with_context(listing)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The paths in `dir` whose names begin with `prefix` and end with `suffix`, sorted.
    pub fn matching(&self, dir: &str, prefix: &str, suffix: &str) -> Result<Vec<PathBuf>> {
        let fits = |name: &OsString| {
            let name = name.as_bytes();
            name.len() >= prefix.len() + suffix.len()
                && name.starts_with(prefix.as_bytes())
                && name.ends_with(suffix.as_bytes())
        };
        Ok(self.list(dir)?.into_iter().filter(fits).map(|name| Path::new(dir).join(name)).collect())
    }

    /// Where a directory of the clone really lies, links resolved inside the root, as a path of this process; it is
    /// created when it does not exist.
    pub fn real_dir(&self, path: &str) -> Result<PathBuf> {
        let opening = || format!("opening the directory {path} of the clone");
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = match self.open_at(Path::new(path), flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                let (parent, name) = self.parent_of(Path::new(path)).with_context(opening)?;
                fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)).with_context(opening)?;
                self.open_at(Path::new(path), flags, Mode::empty())
            }
            other => other,
        }
        .with_context(opening)?;
        let link = format!("/proc/self/fd/{}", rustix::fd::AsRawFd::as_raw_fd(&fd));
        std::fs::read_link(link).with_context(opening)
    }

    fn open_at(&self, path: &Path, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // EAGAIN: the kernel saw a rename while it resolved `..`; nothing here races with us for long.
        for _ in 0..100 {
            match fs::openat2(&self.dir, path, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
        Err(Errno::AGAIN)
    }

    /// The directory of `path`, and its last name, which may be a symbolic link.
    fn parent_of(&self, path: &Path) -> rustix::io::Result<(OwnedFd, OsString)> {
        let name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("/"));
        Ok((self.open_at(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?, name))
    }

    /// Follows the links at the end of `path`, inside the root.
    fn locate(&self, path: &Path) -> rustix::io::Result<Place> {
        let mut path = path.to_path_buf();
        for _ in 0..LINK_LIMIT {
            let (parent, name) = self.parent_of(&path)?;
            match fs::readlinkat(&parent, &name, Vec::new()) {
                Ok(target) => {
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    // `join` takes an absolute target as it is, which the root then resolves inside itself. `..` is left
                    // in: only the kernel knows what it means behind other links.
                    path = path.parent().unwrap_or(Path::new("/")).join(target);
                }
                Err(Errno::INVAL | Errno::NOENT) => return Ok(Place { parent, name }),
                Err(e) => return Err(e),
            }
        }
        Err(Errno::LOOP)
    }
}

fn fill(new: OwnedFd, old: Option<&OwnedFd>, content: &[u8], mode: u32) -> Result<()> {
    let mut file = File::from(new);
    file.write_all(content)?;
    let mode = if let Some(old) = old {
        let stat = fs::fstat(old)?;
        let (uid, gid) = (fs::Uid::from_raw(stat.st_uid), fs::Gid::from_raw(stat.st_gid));
        fs::fchown(&file, Some(uid), Some(gid))?;
        copy_xattrs(old, &file)?;
        stat.st_mode & 0o7777
    } else {
        mode
    };
    fs::fchmod(&file, Mode::from_raw_mode(mode))?;
    fs::fsync(&file)?;
    Ok(())
}

fn copy_xattrs(old: &OwnedFd, new: &File) -> Result<()> {
    let mut names = vec![0u8; 64 << 10];
    let length = match fs::flistxattr(old, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let mut value = vec![0u8; 64 << 10];
    for name in names[..length].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        // A capability belongs to the content that it was given to; configuration has none that should survive.
        if name == b"security.capability" {
            continue;
        }
        let name = OsStr::from_bytes(name);
        let length = fs::fgetxattr(old, name, &mut value[..])?;
        fs::fsetxattr(new, name, &value[..length], fs::XattrFlags::empty())?;
    }
    Ok(())
}

/// Bytes as text, one character a byte: configuration files are ASCII where it matters and anything in their comments,
/// and what we do not understand must come out as it went in.
pub fn from_bytes(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| char::from(b)).collect()
}

/// The bytes of a text that [`from_bytes`] made; characters beyond one byte that were added come out as UTF-8.
pub fn to_bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        if let Ok(b) = u8::try_from(u32::from(c)) {
            bytes.push(b);
        } else {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn tree() -> (tempfile::TempDir, Root, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::fs::create_dir_all(target.join("etc")).unwrap();
        std::fs::create_dir_all(target.join("var/lib/dbus")).unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        let root = Root::open(&target).unwrap();
        (dir, root, target)
    }

    #[test]
    fn absolute_links_mean_the_clones_files() {
        let (_dir, root, target) = tree();
        std::fs::write(target.join("etc/machine-id"), "old\n").unwrap();
        symlink("/etc/machine-id", target.join("var/lib/dbus/machine-id")).unwrap();
        assert_eq!(root.read("/var/lib/dbus/machine-id").unwrap().unwrap(), b"old\n");
        assert!(root.write("/var/lib/dbus/machine-id", b"new\n", 0o444).unwrap());
        assert_eq!(std::fs::read(target.join("etc/machine-id")).unwrap(), b"new\n");
        assert_eq!(root.link("/var/lib/dbus/machine-id"), Some(PathBuf::from("/etc/machine-id")));
        assert_eq!(root.link("/etc/machine-id"), None);
    }

    #[test]
    fn no_link_leads_out() {
        let (dir, root, target) = tree();
        let outside = dir.path().join("secret");
        symlink(&outside, target.join("etc/absolute")).unwrap();
        symlink("../../secret", target.join("etc/relative")).unwrap();
        symlink("../../../../../../../../..", target.join("etc/up")).unwrap();
        symlink(dir.path(), target.join("etc/dir")).unwrap();
        for path in ["/etc/absolute", "/etc/relative", "/etc/dir/secret", "/../secret", "/etc/../../secret"] {
            assert_eq!(root.read(path).unwrap(), None, "{path}");
            assert!(!root.exists(path), "{path}");
        }
        // `..` at the root is the root: the file lands inside.
        assert!(root.write("/etc/relative", b"inside", 0o644).unwrap());
        assert_eq!(std::fs::read(target.join("secret")).unwrap(), b"inside");
        root.write("/etc/up/marker", b"inside", 0o644).unwrap();
        assert!(target.join("marker").exists());
        root.write("/etc/dir/secret", b"inside", 0o644).unwrap_err();
        root.write("/etc/absolute", b"inside", 0o644).unwrap_err();
        assert!(!root.remove("/etc/dir/secret").unwrap());
        assert!(root.remove("/etc/absolute").unwrap(), "the link itself goes");
        assert_eq!(std::fs::read(&outside).unwrap(), b"outside");
    }

    #[test]
    fn loops_and_special_files_are_errors() {
        let (_dir, root, target) = tree();
        symlink("b", target.join("etc/a")).unwrap();
        symlink("a", target.join("etc/b")).unwrap();
        root.read("/etc/a").unwrap_err();
        root.write("/etc/a", b"x", 0o644).unwrap_err();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            target.join("etc/fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let error = format!("{:#}", root.read("/etc/fifo").unwrap_err());
        assert!(error.contains("no regular file"), "{error}");
    }

    #[test]
    fn writing_keeps_mode_owner_and_attributes() {
        let (_dir, root, target) = tree();
        let file = target.join("etc/x");
        std::fs::write(&file, "old").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let with_xattr =
            rustix::fs::setxattr(&file, "user.note", b"a\nb", rustix::fs::XattrFlags::empty()).is_ok();
        let chowned =
            rustix::fs::chown(&file, Some(fs::Uid::from_raw(7)), Some(fs::Gid::from_raw(8))).is_ok();
        assert!(root.write("/etc/x", b"new", 0o644).unwrap());
        let meta = std::fs::metadata(&file).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o640);
        if chowned {
            assert_eq!((meta.uid(), meta.gid()), (7, 8));
        } else {
            eprintln!("SKIPPED: owners: not root");
        }
        if with_xattr {
            let mut value = [0; 16];
            let n = rustix::fs::getxattr(&file, "user.note", &mut value[..]).unwrap();
            assert_eq!(&value[..n], b"a\nb");
        } else {
            eprintln!("SKIPPED: attributes: this file system has none");
        }
        assert!(!root.write("/etc/x", b"new", 0o644).unwrap(), "unchanged content is not written");
        assert_eq!(std::fs::read_dir(target.join("etc")).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn names_are_listed_and_matched() {
        let (_dir, root, target) = tree();
        for name in ["ssh_host_b_key", "ssh_host_a_key", "ssh_host_a_key.pub", "sshd_config"] {
            std::fs::write(target.join("etc").join(name), "").unwrap();
        }
        let keys = root.matching("/etc", "ssh_host_", "_key").unwrap();
        assert_eq!(keys, ["/etc/ssh_host_a_key", "/etc/ssh_host_b_key"].map(PathBuf::from));
        assert!(root.list("/no/such").unwrap().is_empty());
    }

    #[test]
    fn every_byte_survives_as_text() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(to_bytes(&from_bytes(&all)), all);
        assert_eq!(to_bytes("\u{20ac}"), "\u{20ac}".as_bytes());
    }
}
