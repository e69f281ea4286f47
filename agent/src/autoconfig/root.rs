//! The clone's files, as the clone itself will see them: every path is resolved inside the target root by the kernel
//! (`openat2` with `RESOLVE_IN_ROOT`), so that an absolute symlink in the clone means the clone's file and no path,
//! link or `..` leads out of it. Writing replaces a file in one step and keeps its mode, owner, extended attributes and flags.

mod seal;

use super::pending::{Fate, Pending};
use anyhow::{Context, Result, bail};
use ka_archive::manifest::Attributes;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// More than any configuration file has; a larger one is an error, not a reason to run out of memory.
const FILE_LIMIT: u64 = 64 << 20;
/// Symbolic links followed in a row, as in the kernel.
const LINK_LIMIT: usize = 40;

/// What the SELinux label of a file is called.
const LABEL: &str = "security.selinux";
/// `statfs`'s number for vfat, whose files have no modes nor owners of their own.
const MSDOS_SUPER_MAGIC: i64 = 0x4d44;

/// The root of a mounted clone.
pub struct Root {
    dir: OwnedFd,
    /// Where it lies, as a path of this process.
    place: PathBuf,
    /// Paths that are never changed, as the clone names them.
    kept: Vec<PathBuf>,
    /// In a dry run: what would have been changed.
    pending: Option<Pending>,
    /// Files that were made, by the names that the clone has for them.
    made: RefCell<Vec<String>>,
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
        let place = real_path(&dir).with_context(|| format!("finding {}", path.display()))?;
        Ok(Self { dir, place, kept: Vec::new(), pending: None, made: RefCell::default() })
    }

    /// The same root, where these paths (and what lies below them) are never changed.
    #[must_use]
    pub fn keeping(mut self, kept: &[String]) -> Self {
        self.kept = kept.iter().map(|path| Path::new("/").join(path.trim_matches('/'))).collect();
        self
    }

    /// The same root, where nothing is changed: what would be is kept in memory and read from there.
    #[must_use]
    pub fn dry(mut self) -> Self {
        self.pending = Some(Pending::default());
        self
    }

    /// Files that were made since the last time, where none was before.
    pub fn take_made(&self) -> Vec<String> {
        self.made.take()
    }

    /// Whether the policy keeps `path` as it is, by its own name or by what its links lead to.
    fn is_kept(&self, path: &Path) -> bool {
        if self.kept.is_empty() {
            return false;
        }
        let real = self.real_of(path);
        let inside = real.as_deref().and_then(|real| real.strip_prefix(&self.place).ok());
        let inside = inside.map(|path| Path::new("/").join(path));
        let covers = |path: &Path| self.kept.iter().any(|kept| path.starts_with(kept));
        let kept = covers(path) || inside.is_some_and(|path| covers(&path));
        if kept {
            log::info!("autoconfig: {} is kept by policy", path.display());
        }
        kept
    }

    /// The real path of a file, links followed, whether it exists or not.
    fn real_of(&self, path: &Path) -> Option<PathBuf> {
        let Place { parent, name } = self.locate(path).ok()?;
        Some(real_path(&parent).ok()?.join(name))
    }

    /// In a dry run: what would have become of `path` by now.
    fn fate(&self, path: &Path) -> Option<Fate> {
        self.pending.as_ref()?.fate(&self.real_of(path).or_else(|| self.real_below(path))?)
    }

    /// The real path of a file whose directory exists in a dry run's memory only.
    fn real_below(&self, path: &Path) -> Option<PathBuf> {
        Some(
            self.real_of(path.parent()?).or_else(|| self.real_below(path.parent()?))?.join(path.file_name()?),
        )
    }

    /// Whether the name exists, links followed inside the root.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        match self.fate(path.as_ref()) {
            Some(Fate::Content(_)) => true,
            Some(Fate::Gone) => false,
            Some(Fate::Moved(from)) => from.exists(),
            None => self.open_at(path.as_ref(), OFlags::PATH, Mode::empty()).is_ok(),
        }
    }

    /// Whether it is a directory, links followed inside the root.
    pub fn is_dir(&self, path: impl AsRef<Path>) -> bool {
        match self.fate(path.as_ref()) {
            Some(Fate::Content(_) | Fate::Gone) => return false,
            Some(Fate::Moved(from)) => return from.is_dir(),
            None => {}
        }
        self.open_at(path.as_ref(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).is_ok()
    }

    /// Size in bytes of a regular file; none when there is none.
    pub fn size(&self, path: impl AsRef<Path>) -> Option<u64> {
        match self.fate(path.as_ref()) {
            Some(Fate::Content(content)) => return Some(content.len() as u64),
            Some(Fate::Gone) => return None,
            Some(Fate::Moved(from)) => {
                return from.metadata().ok().filter(std::fs::Metadata::is_file).map(|m| m.len());
            }
            None => {}
        }
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
        match self.fate(path) {
            Some(Fate::Content(content)) => return Ok(Some(content)),
            Some(Fate::Gone) => return Ok(None),
            Some(Fate::Moved(from)) => return std::fs::read(from).map(Some).with_context(reading),
            None => {}
        }
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

    /// Gives a file this content, in one step. A file that exists keeps mode, owner, extended attributes and flags; a new one
    /// gets `mode` and belongs to root. Nothing is done, and false comes back, when it has this content already.
    pub fn write(&self, path: impl AsRef<Path>, content: &[u8], mode: u32) -> Result<bool> {
        let path = path.as_ref();
        if self.is_kept(path) || self.read(path)?.is_some_and(|old| old == content) {
            return Ok(false);
        }
        if let Some(pending) = &self.pending {
            let real = self.real_of(path).or_else(|| self.real_below(path));
            let real = real.with_context(|| format!("writing {} of the clone", path.display()))?;
            pending.set(real, Fate::Content(content.to_vec()));
            return Ok(true);
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
        let attributes = old.as_ref().map(|old| Attributes::read(old.as_fd())).transpose()?;
        let mut temporary = OsString::from(".");
        temporary.push(&name);
        temporary.push(format!(".ka-{}", uuid::Uuid::new_v4().simple()));
        // A name that is nearly as long as names may be leaves no room for more.
        if temporary.len() > 255 {
            temporary = OsString::from(format!(".ka-{}", uuid::Uuid::new_v4().simple()));
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        seal::around(&parent, &name, &mut || {
            let mut new = File::from(fs::openat(&parent, &temporary, flags, Mode::from_raw_mode(0o600))?);
            // Some flags can be given to an empty file only.
            let filled = attributes
                .map_or(Ok(()), |wanted| seal::give(&new, wanted.open()))
                .and_then(|()| fill(&mut new, old.as_ref(), &parent, content, mode))
                .and_then(|()| Ok(fs::renameat(&parent, &temporary, &parent, &name)?));
            if filled.is_err() {
                // The first error is the one that counts; a temporary file left over is the lesser evil.
                let _ = fs::unlinkat(&parent, &temporary, AtFlags::empty());
                return filled;
            }
            attributes.and_then(Attributes::seal).map_or(Ok(()), |wanted| seal::give(&new, wanted))
        })?;
        if old.is_none() {
            self.made.borrow_mut().push(path.to_string_lossy().into_owned());
        }
        Ok(())
    }

    /// Gives a file or directory another name beside the old one's; false when there is none, or it is kept.
    ///
    /// # Errors
    /// When the new name is taken, or the kernel refuses.
    pub fn rename(&self, path: impl AsRef<Path>, name: &str) -> Result<bool> {
        let path = path.as_ref();
        let new = path.with_file_name(name);
        let renaming = || format!("renaming {} of the clone to {name}", path.display());
        if self.is_kept(path) || (!self.exists(path) && self.link(path).is_none()) {
            return Ok(false);
        }
        if self.exists(&new) || self.link(&new).is_some() {
            bail!("renaming {} of the clone: {name} is there already", path.display());
        }
        let (parent, old) = self.parent_of(path).with_context(renaming)?;
        if let Some(pending) = &self.pending {
            let dir = real_path(&parent).with_context(renaming)?;
            pending.rename(&dir.join(&old), &dir.join(name));
        } else {
            seal::around(&parent, &old, &mut || Ok(fs::renameat(&parent, &old, &parent, name)?))
                .with_context(renaming)?;
        }
        Ok(true)
    }

    /// Removes a directory and all that is in it, without following links; false when there is none, or it is kept.
    pub fn remove_tree(&self, path: impl AsRef<Path>) -> Result<bool> {
        let path = path.as_ref();
        if self.link(path).is_some() || !self.is_dir(path) {
            return self.remove(path);
        }
        if self.is_kept(path) {
            return Ok(false);
        }
        let removing = || format!("removing {} of the clone", path.display());
        let (parent, name) = self.parent_of(path).with_context(removing)?;
        let real = real_path(&parent).with_context(removing)?.join(&name);
        let inside = real.strip_prefix(&self.place).map(|inside| Path::new("/").join(inside)).ok();
        let holds = |kept: &PathBuf| {
            kept.starts_with(path) || inside.as_ref().is_some_and(|inside| kept.starts_with(inside))
        };
        if let Some(pending) = &self.pending {
            pending.set(real, Fate::Gone);
        } else if self.kept.iter().any(holds) {
            // Something in it is kept, so it is emptied around that.
            for name in self.list(path)? {
                self.remove_tree(path.join(name))?;
            }
        } else {
            seal::around(&parent, &name, &mut || match std::fs::remove_dir_all(&real) {
                Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                    seal::take_off_all(&parent, &name)?;
                    Ok(std::fs::remove_dir_all(&real)?)
                }
                other => Ok(other?),
            })
            .with_context(removing)?;
        }
        Ok(true)
    }

    /// Leaves a regular file with nothing in it, for whoever writes to it; false when it is kept or no such file.
    pub fn truncate(&self, path: impl AsRef<Path>) -> Result<bool> {
        let path = path.as_ref();
        if self.is_kept(path) || self.size(path).is_none() {
            return Ok(false);
        }
        if self.pending.is_some() {
            return self.write(path, b"", 0o644);
        }
        let emptying = || format!("emptying {} of the clone", path.display());
        let Place { parent, name } = self.locate(path).with_context(emptying)?;
        seal::around(&parent, &name, &mut || {
            self.open_at(path, OFlags::WRONLY | OFlags::TRUNC | OFlags::NONBLOCK, Mode::empty())?;
            Ok(())
        })
        .with_context(emptying)?;
        Ok(true)
    }

    /// The SELinux label of what lies at `path`; none where the tree has none.
    pub fn label(&self, path: &str) -> Option<Vec<u8>> {
        let fd = self.open_at(Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).ok()?;
        label_of(&fd)
    }

    /// Removes a file or a symbolic link (not what it points to); false when there is none. Directories stay.
    pub fn remove(&self, path: impl AsRef<Path>) -> Result<bool> {
        let path = path.as_ref();
        if self.is_kept(path) {
            return Ok(false);
        }
        if let Some(pending) = &self.pending {
            let there = (self.exists(path) || self.link(path).is_some()) && !self.is_dir(path);
            let place = self.parent_of(path).ok().filter(|_| there);
            let place = place.and_then(|(parent, name)| Some(real_path(&parent).ok()?.join(name)));
            return Ok(place.map(|place| pending.set(place, Fate::Gone)).is_some());
        }
        let removing = || format!("removing {} of the clone", path.display());
        let found = self.parent_of(path).and_then(|(parent, name)| {
            let stat = fs::statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            Ok((FileType::from_raw_mode(stat.st_mode), parent, name))
        });
        let (parent, name) = match found {
            Ok((FileType::Directory, ..)) | Err(Errno::NOENT | Errno::NOTDIR) => return Ok(false),
            Ok((_, parent, name)) => (parent, name),
            Err(e) => return Err(e).with_context(removing),
        };
        seal::around(&parent, &name, &mut || Ok(fs::unlinkat(&parent, &name, AtFlags::empty())?))
            .with_context(removing)?;
        Ok(true)
    }

    /// The names in a directory, sorted; empty when it does not exist.
    pub fn list(&self, path: impl AsRef<Path>) -> Result<Vec<OsString>> {
        let path = path.as_ref();
        let listing = || format!("listing {} of the clone", path.display());
        if let Some(pending) = &self.pending {
            return self.list_dry(path, pending).with_context(listing);
        }
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

    fn list_dry(&self, path: &Path, pending: &Pending) -> Result<Vec<OsString>> {
        let opened = self.open_at(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).ok();
        let real = opened.as_ref().and_then(|fd| real_path(fd).ok()).or_else(|| self.real_below(path));
        let Some(real) = real else { return Ok(Vec::new()) };
        let place = match pending.fate(&real) {
            Some(Fate::Gone | Fate::Content(_)) => return Ok(Vec::new()),
            Some(Fate::Moved(from)) => from,
            None => real.clone(),
        };
        let mut names = Vec::new();
        match std::fs::read_dir(place) {
            Ok(entries) => {
                for entry in entries {
                    names.push(entry?.file_name());
                }
            }
            Err(e)
                if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {}
            Err(e) => return Err(e.into()),
        }
        pending.names(&real, &mut names);
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

    /// Makes a directory and those above it, where they are not there yet.
    pub fn make_dir(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if self.pending.is_some() || self.is_dir(path) {
            return Ok(());
        }
        if let Some(above) = path.parent() {
            self.make_dir(above)?;
        }
        let making = || format!("making the directory {} of the clone", path.display());
        let (parent, name) = self.parent_of(path).with_context(making)?;
        make_directory(&parent, &name).with_context(making)
    }

    /// A regular file, opened for reading; none when it does not exist.
    pub fn open_file(&self, path: impl AsRef<Path>) -> Result<Option<File>> {
        let path = path.as_ref();
        let opening = || format!("opening {} of the clone", path.display());
        let fd = match self.fate(path) {
            Some(Fate::Gone | Fate::Content(_)) => return Ok(None),
            Some(Fate::Moved(from)) => return File::open(from).map(Some).with_context(opening),
            None => match self.open_at(path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
                Err(e) => return Err(e).with_context(opening),
            },
        };
        if FileType::from_raw_mode(fs::fstat(&fd).with_context(opening)?.st_mode) != FileType::RegularFile {
            bail!("opening {} of the clone: it is no regular file", path.display());
        }
        Ok(Some(File::from(fd)))
    }

    /// Where a directory of the clone really lies, links resolved inside the root, as a path of this process; it is
    /// created when it does not exist.
    pub fn real_dir(&self, path: &str) -> Result<PathBuf> {
        let opening = || format!("opening the directory {path} of the clone");
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = match self.open_at(Path::new(path), flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                let (parent, name) = self.parent_of(Path::new(path)).with_context(opening)?;
                make_directory(&parent, &name).with_context(opening)?;
                self.open_at(Path::new(path), flags, Mode::empty())
            }
            other => other,
        }
        .with_context(opening)?;
        real_path(&fd).with_context(opening)
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

fn make_directory(parent: &OwnedFd, name: &OsStr) -> Result<()> {
    seal::around(parent, name, &mut || Ok(fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?))
}

/// Where an open file or directory lies, as a path of this process.
fn real_path(fd: &OwnedFd) -> std::io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn label_of(fd: &OwnedFd) -> Option<Vec<u8>> {
    let mut value = vec![0u8; 4096];
    let length = fs::fgetxattr(fd, LABEL, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

/// A new file in a labelled tree gets the label of its directory, as the kernel would give it there; the piece `selinux`
/// gives it its own where the policy has another.
fn label_like_parent(parent: &OwnedFd, file: &File) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if let Some(label) = fs::openat(parent, ".", flags, Mode::empty()).ok().and_then(|dir| label_of(&dir)) {
        fs::fsetxattr(file, LABEL, &label, fs::XattrFlags::empty()).context("labelling it")?;
    }
    Ok(())
}

fn fill(file: &mut File, old: Option<&OwnedFd>, parent: &OwnedFd, content: &[u8], mode: u32) -> Result<()> {
    file.write_all(content)?;
    #[allow(clippy::unnecessary_cast, clippy::cast_lossless)] // its type differs between platforms
    if fs::fstatfs(&*file)?.f_type as i64 == MSDOS_SUPER_MAGIC {
        fs::fsync(&*file)?;
        return Ok(());
    }
    if old.is_none() {
        label_like_parent(parent, file)?;
    }
    let mode = if let Some(old) = old {
        let stat = fs::fstat(old)?;
        let (uid, gid) = (fs::Uid::from_raw(stat.st_uid), fs::Gid::from_raw(stat.st_gid));
        fs::fchown(&*file, Some(uid), Some(gid))?;
        copy_xattrs(old, file)?;
        stat.st_mode & 0o7777
    } else {
        mode
    };
    fs::fchmod(&*file, Mode::from_raw_mode(mode))?;
    fs::fsync(&*file)?;
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
    use std::collections::BTreeSet;
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
    fn what_policy_keeps_is_not_changed_by_any_name() {
        let (_dir, root, target) = tree();
        std::fs::create_dir_all(target.join("etc/lvm/backup")).unwrap();
        for name in ["lvm/backup/vg", "hostname", "other"] {
            std::fs::write(target.join("etc").join(name), "golden").unwrap();
        }
        symlink("/etc/hostname", target.join("etc/HOSTNAME")).unwrap();
        let root = root.keeping(&["/etc/lvm".to_owned(), "/etc/hostname/".to_owned()]);
        assert!(!root.write("/etc/hostname", b"x", 0o644).unwrap());
        assert!(!root.write("/etc/HOSTNAME", b"x", 0o644).unwrap());
        assert!(!root.write("/etc/lvm/new", b"x", 0o644).unwrap());
        assert!(!root.remove("/etc/lvm/backup/vg").unwrap() && !root.remove_tree("/etc/lvm").unwrap());
        assert!(!root.rename("/etc/hostname", "x").unwrap() && !root.truncate("/etc/hostname").unwrap());
        assert!(root.write("/etc/other", b"x", 0o644).unwrap());
        assert!(root.remove_tree("/etc").unwrap(), "what is not kept goes");
        assert_eq!(std::fs::read(target.join("etc/lvm/backup/vg")).unwrap(), b"golden");
        assert_eq!(std::fs::read(target.join("etc/hostname")).unwrap(), b"golden");
        assert!(!target.join("etc/other").exists());
    }

    #[test]
    fn a_dry_root_changes_nothing_and_shows_what_it_would_have_changed() {
        let (_dir, root, target) = tree();
        std::fs::create_dir(target.join("etc/d")).unwrap();
        for name in ["a", "b", "d/x"] {
            std::fs::write(target.join("etc").join(name), "golden").unwrap();
        }
        let root = root.dry();
        assert!(
            root.write("/etc/a", b"new", 0o644).unwrap() && !root.write("/etc/a", b"new", 0o644).unwrap()
        );
        assert!(root.write("/etc/made", b"new", 0o644).unwrap());
        assert!(root.remove("/etc/b").unwrap() && !root.remove("/etc/b").unwrap());
        assert!(root.rename("/etc/d", "e").unwrap());
        assert_eq!(root.read("/etc/a").unwrap().unwrap(), b"new");
        assert_eq!(root.size("/etc/made"), Some(3));
        assert!(!root.exists("/etc/b") && root.read("/etc/b").unwrap().is_none());
        assert_eq!(root.read("/etc/e/x").unwrap().unwrap(), b"golden");
        assert!(root.write("/etc/e/x", b"new", 0o644).unwrap());
        assert_eq!(root.read("/etc/e/x").unwrap().unwrap(), b"new");
        assert!(!root.exists("/etc/d/x") && root.is_dir("/etc/e") && !root.is_dir("/etc/d"));
        assert_eq!(root.list("/etc").unwrap(), ["a", "e", "made"].map(OsString::from));
        assert_eq!(root.list("/etc/e").unwrap(), [OsString::from("x")]);
        assert!(root.write("/no/such/dir", b"x", 0o644).unwrap());
        assert!(root.remove_tree("/etc/e").unwrap() && !root.exists("/etc/e/x"));
        let names: BTreeSet<_> =
            std::fs::read_dir(target.join("etc")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["a", "b", "d"].map(OsString::from).into());
        assert_eq!(std::fs::read(target.join("etc/a")).unwrap(), b"golden");
        assert_eq!(std::fs::read(target.join("etc/d/x")).unwrap(), b"golden");
    }

    #[test]
    fn renaming_takes_no_name_that_is_taken() {
        let (_dir, root, target) = tree();
        std::fs::write(target.join("etc/a"), "a").unwrap();
        std::fs::write(target.join("etc/b"), "b").unwrap();
        assert!(root.rename("/etc/a", "b").unwrap_err().to_string().contains("is there already"));
        assert!(root.rename("/etc/a", "c").unwrap() && !root.rename("/etc/a", "d").unwrap());
        assert_eq!(std::fs::read(target.join("etc/c")).unwrap(), b"a");
        assert!(root.truncate("/etc/c").unwrap() && !root.truncate("/etc/none").unwrap());
        assert_eq!(std::fs::read(target.join("etc/c")).unwrap(), b"");
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
