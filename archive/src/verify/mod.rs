//! Compares a tree (a clone that is mounted somewhere, or the root of a running machine) with a manifest of its golden tree. The
//! walk and the manifest have one order, so that both are gone through once, side by side, and memory does not grow with
//! the tree. Everything that the manifest holds is compared; where holes lie is not.

pub mod command;
mod content;
#[cfg(test)]
mod fat_tests;
mod holds;
mod links;
mod mounts;
pub mod report;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Seek};
use std::path::PathBuf;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, fstat, readlinkat};
use rustix::io::Errno;

use crate::attributes::Attributes;
use crate::expected::{Expectations, Expected, running_machine};
use crate::glob::GlobError;
use crate::manifest::{Content, Entry, Kind, ManifestError, Reader, is_below, order};
use crate::pack::{PackError, PackOptions};
use crate::reader::{Name, open_file};
use crate::target;
use crate::walk::{Event, Item, Walker, file_type};
use crate::xattr::{self, Object};
use crate::{plain, shown};
use content::{Answer, Pool};
use holds::Holds;
use links::Links;

/// Which tree is compared, and what may differ.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    /// The tree.
    pub root: PathBuf,
    /// It is a clone: it may differ in what the manifest says.
    pub clone: bool,
    /// It runs, or ran: it may differ in what [`running_machine`] says.
    pub running: bool,
    /// What else may differ.
    pub expected: Vec<Expected>,
    /// Threads that read contents; 0 for as many as there are processors.
    pub threads: usize,
}

/// In what an entry differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum What {
    /// It is not there.
    Missing,
    /// The golden tree has it not.
    Extra,
    /// It is another kind of thing.
    Kind,
    /// The content, at the same size.
    Content,
    /// The size, and so the content.
    Size,
    /// Permissions, set-id and sticky bits.
    Mode,
    /// User or group.
    Owner,
    /// Time of modification.
    Mtime,
    /// An extended attribute: ACLs, capabilities and SELinux labels are such.
    Xattr,
    /// A symbolic link's target.
    Target,
    /// Which names are one file.
    HardLink,
    /// A device's numbers.
    Device,
    /// Flags, as `chattr` sets them.
    Flags,
    /// The project id.
    Project,
    /// It cannot be read.
    Unreadable,
}

impl What {
    /// The word for it in text and JSON.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Kind => "kind",
            Self::Content => "content",
            Self::Size => "size",
            Self::Mode => "mode",
            Self::Owner => "owner",
            Self::Mtime => "mtime",
            Self::Xattr => "xattr",
            Self::Target => "target",
            Self::HardLink => "hardlink",
            Self::Device => "device",
            Self::Flags => "flags",
            Self::Project => "project",
            Self::Unreadable => "unreadable",
        }
    }
}

/// One difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Relative to the root.
    pub path: Vec<u8>,
    /// In what.
    pub what: What,
    /// How it is in the golden tree, where that can be said in short.
    pub golden: Option<String>,
    /// How it is here.
    pub here: Option<String>,
    /// Why it was to be expected; none when it was not.
    pub expected: Option<String>,
}

/// What was compared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifySummary {
    /// Entries of the manifest.
    pub entries: u64,
    /// Bytes of content read.
    pub bytes: u64,
    /// Differences that nothing explains.
    pub differences: u64,
    /// Differences that were to be expected, by reason.
    pub expected: BTreeMap<String, u64>,
    /// Things below a directory that is missing, or extra, as a whole; they are not told one by one.
    pub below: u64,
}

impl VerifySummary {
    /// Whether the tree is as it should be.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.differences == 0
    }
}

/// Why a tree could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The manifest is not as it should be.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The tree cannot be walked.
    #[error(transparent)]
    Walk(#[from] PackError),
    /// A glob of what may differ is none.
    #[error("what may differ: {0}")]
    Pattern(#[from] GlobError),
    /// What is mounted where is not known.
    #[error("reading /proc/self/mountinfo: {0}")]
    Mounts(io::Error),
    /// The manifest cannot be read twice.
    #[error("going back to the manifest's beginning: {0}")]
    Rewind(io::Error),
    /// What was found cannot be told.
    #[error("writing the report: {0}")]
    Report(io::Error),
}

/// Compares the tree that `options` name with `manifest`, and tells of each difference, also of those that were to be
/// expected. The manifest is read twice: first to see that it is whole.
///
/// # Errors
/// See [`VerifyError`]. What cannot be read in the tree is a difference, not an error.
pub fn verify(
    manifest: &File,
    options: &VerifyOptions,
    tell: &mut dyn FnMut(&Difference),
) -> Result<VerifySummary, VerifyError> {
    verify_on(manifest, options, tell, target::magic)
}

/// As [`verify`], where `magic` tells what the file systems are.
fn verify_on(
    manifest: &File,
    options: &VerifyOptions,
    tell: &mut dyn FnMut(&Difference),
    magic: Magic,
) -> Result<VerifySummary, VerifyError> {
    std::fs::metadata("/proc/self/fd").map_err(PackError::NoProc)?;
    let mut rewound = manifest;
    rewound.rewind().map_err(VerifyError::Rewind)?;
    let mounts = mounts::with_content(&options.root, Reader::new(manifest)?)?;
    rewound.rewind().map_err(VerifyError::Rewind)?;
    let reader = Reader::new(manifest)?;
    let header = reader.header();
    let mut walker = Walker::new(&PackOptions {
        root: options.root.clone(),
        mounts: Some(mounts),
        excludes: header.excludes.clone(),
        skip_unreadable: true,
    })?;
    let mut expected = options.expected.clone();
    if options.clone {
        expected.extend(header.expected.iter().cloned());
    }
    if options.running {
        expected.extend(running_machine());
    }
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
        threads => threads,
    };
    let comparison = Comparison {
        account: Account {
            expectations: Expectations::new(expected)?,
            tell,
            summary: VerifySummary::default(),
            changed: !options.clone,
        },
        reader,
        next: None,
        pool: Pool::new(threads),
        links: Links::default(),
        missing: None,
        extra: None,
        unreadable: None,
        devices: HashMap::new(),
        magic,
        scratch: Vec::new(),
    };
    comparison.run(&mut walker)
}

/// What was found, and who is told.
struct Account<'a> {
    expectations: Expectations,
    tell: &'a mut dyn FnMut(&Difference),
    summary: VerifySummary,
    /// The golden tree itself: what changed while it was packed may have changed since.
    changed: bool,
}

impl Account<'_> {
    fn difference(
        &mut self,
        path: &[u8],
        what: What,
        directory: bool,
        golden: Option<String>,
        here: Option<String>,
    ) -> bool {
        let reason = self.expectations.reason(path, what, directory).map(str::to_owned);
        self.told(&Difference { path: path.to_vec(), what, golden, here, expected: reason })
    }

    /// An SELinux label, which more may give anew than may change other attributes.
    fn label(&mut self, path: &[u8], golden: Option<String>, here: Option<String>) {
        let expected = self.expectations.label(path).map(str::to_owned);
        self.told(&Difference { path: path.to_vec(), what: What::Xattr, golden, here, expected });
    }

    /// Whether it was to be expected.
    fn told(&mut self, difference: &Difference) -> bool {
        match &difference.expected {
            Some(why) => *self.summary.expected.entry(why.clone()).or_default() += 1,
            None => self.summary.differences += 1,
        }
        (self.tell)(difference);
        difference.expected.is_some()
    }

    fn answer(&mut self, answer: &Answer) {
        self.summary.bytes += answer.bytes;
        match answer.same {
            Ok(true) => {}
            Ok(false) => {
                self.difference(&answer.path, What::Content, false, None, None);
            }
            Err((operation, errno)) => {
                let why = format!("{operation}: {}", io::Error::from(errno));
                self.difference(&answer.path, What::Unreadable, false, None, Some(why));
            }
        }
    }
}

struct Comparison<'m, 'a> {
    account: Account<'a>,
    reader: Reader<'m>,
    next: Option<Entry<'static>>,
    pool: Pool,
    links: Links,
    /// Directories that are missing, extra or unreadable as a whole.
    missing: Option<Vec<u8>>,
    extra: Option<Vec<u8>>,
    unreadable: Option<Vec<u8>>,
    /// Devices, and what is on them.
    devices: HashMap<(u32, u32), Holds>,
    magic: Magic,
    scratch: Vec<u8>,
}

impl Comparison<'_, '_> {
    fn run(mut self, walker: &mut Walker) -> Result<VerifySummary, VerifyError> {
        self.advance()?;
        loop {
            let event = match walker.next() {
                Ok(Some(event)) => event,
                // What is below a mount that is not there is missing, which is told.
                Ok(None) | Err(PackError::MountNotFound { .. }) => break,
                Err(e) => return Err(e.into()),
            };
            match event {
                Event::Entry(item) => {
                    self.missing_before(item.path)?;
                    match self.next.take() {
                        Some(entry) if entry.path == item.path => {
                            self.advance()?;
                            self.compare(&entry, &item);
                        }
                        other => {
                            self.next = other;
                            self.extra(&item);
                        }
                    }
                }
                Event::Unreadable(path, operation, errno) => {
                    self.missing_before(path)?;
                    if self.next.as_ref().is_some_and(|entry| entry.path == path) {
                        self.advance()?;
                    }
                    self.unreadable = Some(path.to_vec());
                    self.fails(path, operation, errno);
                }
                // What the manifest has of it is missing.
                Event::Vanished(_) | Event::LeftOut => {}
            }
        }
        while let Some(entry) = self.next.take() {
            self.missing(&entry);
            self.advance()?;
        }
        self.pool.wait(0, |answer| self.account.answer(&answer));
        Ok(self.account.summary)
    }

    fn advance(&mut self) -> Result<(), ManifestError> {
        self.next = self.reader.next_entry()?;
        if let Some(entry) = &self.next {
            self.account.summary.entries += 1;
            self.links.remember(entry);
        }
        Ok(())
    }

    /// What the manifest has in front of `path` is not in the tree.
    fn missing_before(&mut self, path: &[u8]) -> Result<(), ManifestError> {
        while self.next.as_ref().is_some_and(|entry| order(&entry.path, path).is_lt()) {
            if let Some(entry) = self.next.take() {
                self.missing(&entry);
            }
            self.advance()?;
        }
        Ok(())
    }

    fn missing(&mut self, entry: &Entry<'_>) {
        let gone = [&self.missing, &self.unreadable];
        if gone.into_iter().flatten().any(|directory| is_below(&entry.path, directory)) {
            self.account.summary.below += 1;
            return;
        }
        let directory = entry.kind == Kind::Directory;
        let golden = Some(kind_word(entry.kind).to_owned());
        let expected = self.account.difference(&entry.path, What::Missing, directory, golden, None);
        if directory && !expected {
            self.missing = Some(entry.path.to_vec());
        }
    }

    fn extra(&mut self, item: &Item<'_>) {
        if self.extra.as_ref().is_some_and(|directory| is_below(item.path, directory)) {
            self.account.summary.below += 1;
            return;
        }
        let here = file_type(&item.stat);
        if here == FileType::Socket {
            // No archive holds them.
            return;
        }
        let directory = here == FileType::Directory;
        let word = type_word(here).to_owned();
        let expected = self.account.difference(item.path, What::Extra, directory, None, Some(word));
        if directory && !expected {
            self.extra = Some(item.path.to_vec());
        }
    }

    fn fails(&mut self, path: &[u8], operation: &str, errno: Errno) {
        if errno == Errno::NOENT {
            // It was there a moment ago.
            self.account.difference(path, What::Missing, false, None, None);
            return;
        }
        let why = format!("{operation}: {}", io::Error::from(errno));
        self.account.difference(path, What::Unreadable, false, None, Some(why));
    }

    fn compare(&mut self, entry: &Entry<'_>, item: &Item<'_>) {
        let here = file_type(&item.stat);
        let holds = self.holds(item);
        let directory = here == FileType::Directory;
        let leader = if entry.kind == Kind::HardLink { self.links.leader(entry) } else { None };
        let golden = if entry.kind == Kind::HardLink { &entry.link } else { &entry.path };
        let kind = leader.map_or(entry.kind, |leader| leader.kind);
        // Looked at in any case, so that the file is known when its other names come.
        let alone = if directory { None } else { self.links.look(item, golden) };
        // A further name of what the manifest does not have may be anything but a directory.
        let unknown = kind == Kind::HardLink && !directory;
        if file_kind(here) != Some(kind) && !unknown {
            let words = (kind_word(kind).to_owned(), type_word(here).to_owned());
            let expected =
                self.account.difference(item.path, What::Kind, directory, Some(words.0), Some(words.1));
            if !expected {
                // What is or was in it is part of this difference.
                if directory {
                    self.extra = Some(item.path.to_vec());
                } else {
                    self.missing = Some(item.path.to_vec());
                }
            }
            return;
        }
        if let Some(why) = alone {
            // FAT has no links: there a further name is a copy.
            if holds.unix {
                let first = (**golden != *item.path).then(|| format!("another name of {}", shown(golden)));
                self.account.difference(item.path, What::HardLink, false, first, Some(why));
            }
            if let Some(content) = leader.and_then(|leader| leader.content).filter(|_| !item.other_mount)
                && let Some(file) = self.open(item)
            {
                self.content(content, file, item);
            }
        }
        if entry.kind == Kind::HardLink {
            return;
        }
        if item.other_mount {
            // What is seen belongs to another file system. Of a file that is mounted over, nothing was sent; where the golden
            // tree has content, it cannot be seen, and neither can what may be wrong with it.
            if entry.content.is_some_and(|content| content.size > 0) {
                let why = "something else is mounted over it".to_owned();
                self.account.difference(item.path, What::Unreadable, false, None, Some(why));
            }
            return;
        }
        self.metadata(entry, item, holds, directory);
        match entry.kind {
            Kind::File => self.file(entry, item, holds),
            Kind::Symlink => self.target(entry, item),
            Kind::Char | Kind::Block => {
                let device = (item.stat.stx_rdev_major, item.stat.stx_rdev_minor);
                if device != entry.device {
                    let text = |(major, minor)| Some(format!("{major}:{minor}"));
                    let (golden, here) = (text(entry.device), text(device));
                    self.account.difference(item.path, What::Device, false, golden, here);
                }
            }
            _ => {}
        }
        if entry.kind != Kind::File && holds.unix {
            let mut name = Name::default();
            let object = match item.directory {
                Some(fd) => Object::Open(fd.as_fd()),
                None => Object::Named(item.parent.as_fd(), name.of(item.path)),
            };
            self.xattrs(entry, object, item.path, holds);
        }
        if let (Kind::Directory, Some(fd)) = (entry.kind, item.directory) {
            self.attributes(entry, fd.as_fd(), item.path, holds);
        }
    }

    fn metadata(&mut self, entry: &Entry<'_>, item: &Item<'_>, holds: Holds, directory: bool) {
        let (path, stat) = (item.path, &item.stat);
        let mode = u32::from(stat.stx_mode) & 0o7777;
        if mode != entry.mode && entry.kind != Kind::Symlink && holds.unix {
            let text = |mode| Some(format!("{mode:04o}"));
            self.account.difference(path, What::Mode, directory, text(entry.mode), text(mode));
        }
        let owner = (stat.stx_uid, stat.stx_gid);
        if owner != (entry.uid, entry.gid) && holds.unix {
            let text = |(uid, gid)| Some(format!("{uid}:{gid}"));
            self.account.difference(path, What::Owner, directory, text((entry.uid, entry.gid)), text(owner));
        }
        let mtime = (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec);
        // A file that changed while it was packed may have changed since; and the time of a directory whose content was
        // not sent tells of that content alone.
        let stale = entry.changed && self.account.changed;
        if !holds.same_time(entry.mtime, mtime) && !stale && !item.emptied {
            let text = |(seconds, nanos)| Some(format!("{seconds}.{nanos:09}"));
            self.account.difference(path, What::Mtime, directory, text(entry.mtime), text(mtime));
        }
    }

    fn target(&mut self, entry: &Entry<'_>, item: &Item<'_>) {
        match readlinkat(item.parent.as_fd(), Name::default().of(item.path), Vec::new()) {
            Ok(target) if target.as_bytes() == &entry.link[..] => {}
            Ok(target) => {
                let text = |bytes: &[u8]| Some(short(bytes));
                let (golden, here) = (text(&entry.link), text(target.as_bytes()));
                self.account.difference(item.path, What::Target, false, golden, here);
            }
            Err(e) => self.fails(item.path, "reading the link", e),
        }
    }

    fn file(&mut self, entry: &Entry<'_>, item: &Item<'_>, holds: Holds) {
        let Some(file) = self.open(item) else { return };
        if holds.unix {
            self.xattrs(entry, Object::Open(file.as_fd()), item.path, holds);
        }
        self.attributes(entry, file.as_fd(), item.path, holds);
        let Some(content) = entry.content else { return };
        if entry.changed && self.account.changed {
            let why = Some("it changed while it was packed".to_owned());
            let path = item.path.to_vec();
            self.account.told(&Difference {
                path,
                what: What::Content,
                golden: None,
                here: None,
                expected: why,
            });
            return;
        }
        self.content(content, file, item);
    }

    /// Opens what was a regular file when it was looked at; what became of it meanwhile is told.
    fn open(&mut self, item: &Item<'_>) -> Option<OwnedFd> {
        let here = match open_file(item.parent.as_fd(), Name::default().of(item.path)) {
            Ok(file) => match fstat(&file).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
                Ok(FileType::RegularFile) => return Some(file),
                Ok(here) => type_word(here),
                Err(e) => {
                    self.fails(item.path, "looking at it", e);
                    return None;
                }
            },
            Err(Errno::LOOP) => type_word(FileType::Symlink),
            Err(Errno::NXIO) => type_word(FileType::Socket),
            Err(e) => {
                self.fails(item.path, "opening", e);
                return None;
            }
        };
        let golden = Some(kind_word(Kind::File).to_owned());
        self.account.difference(item.path, What::Kind, false, golden, Some(here.to_owned()));
        None
    }

    fn content(&mut self, content: Content, file: OwnedFd, item: &Item<'_>) {
        if item.stat.stx_size != content.size {
            let (golden, here) = (content.size.to_string(), item.stat.stx_size.to_string());
            self.account.difference(item.path, What::Size, false, Some(golden), Some(here));
            return;
        }
        let account = &mut self.account;
        self.pool.submit(item.path, file, content, |answer| account.answer(&answer));
    }

    fn xattrs(&mut self, entry: &Entry<'_>, object: Object<'_>, path: &[u8], holds: Holds) {
        let here = match xattr::read_all(object, &mut self.scratch) {
            Ok(here) => here,
            Err(e) => return self.fails(path, "reading the extended attributes", e),
        };
        if here[..] == entry.xattrs[..] {
            return;
        }
        let mut names: Vec<_> = here.iter().chain(entry.xattrs.iter()).map(|(name, _)| name).collect();
        names.retain(|name| holds.has_xattr(name.as_bytes()));
        names.sort_unstable();
        names.dedup();
        let directory = entry.kind == Kind::Directory;
        for name in names {
            let value = |of: &[(std::ffi::CString, Vec<u8>)]| {
                of.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
            };
            let (golden, here) = (value(&entry.xattrs), value(&here));
            if golden != here {
                let text = |value: Option<Vec<u8>>| match value {
                    Some(value) => format!("{}={}", short(name.as_bytes()), short(&value)),
                    None => format!("no {}", short(name.as_bytes())),
                };
                let (golden, here) = (Some(text(golden)), Some(text(here)));
                if name.as_bytes() == b"security.selinux" {
                    self.account.label(path, golden, here);
                } else {
                    self.account.difference(path, What::Xattr, directory, golden, here);
                }
            }
        }
    }

    fn attributes(&mut self, entry: &Entry<'_>, fd: BorrowedFd<'_>, path: &[u8], holds: Holds) {
        if !self.reader.has_attributes() {
            return;
        }
        let directory = entry.kind == Kind::Directory;
        let here = match Attributes::read(fd) {
            Ok(here) => holds.part(here),
            Err(e) => return self.fails(path, "reading the flags", e),
        };
        let golden = holds.part(entry.attributes);
        let (words, others) = (golden.words(), here.words());
        if words != others {
            let text = |words: String| Some(if words.is_empty() { "none".to_owned() } else { words });
            self.account.difference(path, What::Flags, directory, text(words), text(others));
        }
        if golden.project != here.project {
            let text = |project: u32| Some(project.to_string());
            let (golden, here) = (text(golden.project), text(here.project));
            self.account.difference(path, What::Project, directory, golden, here);
        }
    }

    /// What can be compared there. Where the kernel does not say what is there, everything can.
    fn holds(&mut self, item: &Item<'_>) -> Holds {
        let magic = self.magic;
        let of = || Holds::new(magic(item.parent.as_fd()).unwrap_or_default(), &item.stat);
        if item.other_mount {
            return of();
        }
        let device = (item.stat.stx_dev_major, item.stat.stx_dev_minor);
        *self.devices.entry(device).or_insert_with(of)
    }
}

/// Tells a file system's magic number.
type Magic = fn(BorrowedFd<'_>) -> Result<u32, Errno>;

fn file_kind(here: FileType) -> Option<Kind> {
    Some(match here {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharacterDevice => Kind::Char,
        FileType::BlockDevice => Kind::Block,
        FileType::Fifo => Kind::Fifo,
        _ => return None,
    })
}

fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::HardLink => "hard link",
        Kind::Symlink => "symbolic link",
        Kind::Char => "character device",
        Kind::Block => "block device",
        Kind::Fifo => "fifo",
        Kind::Directory => "directory",
    }
}

fn type_word(here: FileType) -> &'static str {
    file_kind(here).map_or("socket", kind_word)
}

/// Bytes as text that fits a line.
fn short(bytes: &[u8]) -> String {
    const LONGEST: usize = 60;
    let text = plain(bytes);
    if text.chars().count() <= LONGEST {
        return text;
    }
    let start: String = text.chars().take(LONGEST).collect();
    format!("{start}... ({} bytes)", bytes.len())
}
