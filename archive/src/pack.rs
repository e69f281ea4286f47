//! Writes a tree as a tar stream. One thread walks, several open and read, and the caller's writes what they made, in the
//! order of the walk; a large file is read by the caller's, straight into the stream's buffer. What changed, vanished or
//! cannot be sent stands in the summary. What cannot be read fails the whole run.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;

use rustix::io::{Errno, pread};
use tar::EntryType;

use crate::attributes::Attributes;
use crate::batch::{Batch, Found, LinkKey, Links, Thing, link_key};
use crate::digest::Digester;
use crate::encode::{Encoder, Head};
use crate::glob::GlobError;
use crate::manifest::{self, Kind};
use crate::output::Output;
use crate::pipeline::{Pipeline, READERS};
use crate::reader::{self, AHEAD, Counts, Large, Outcome, Packed, Reader, fail, names};
use crate::walk::Walker;
use crate::xattr::Xattrs;
use crate::{Observer, PathList, shown};

/// What is packed.
#[derive(Debug, Clone, Default)]
pub struct PackOptions {
    /// The directory whose content is sent.
    pub root: PathBuf,
    /// Mount points, as paths inside the root (`/`, `/boot`, ...), whose file systems are sent. Where any other file
    /// system is mounted, only an empty directory is sent, with the mode and owner that are seen. None: the root's alone.
    /// One in a directory whose content exclude patterns leave out is left out, too; any other that is not there is an error.
    pub mounts: Option<Vec<String>>,
    /// Globs on the absolute path inside the root; see [`crate::default_excludes`]. A directory that matches is sent
    /// empty; a pattern ending in `/*` means a directory's content alone; other matches are left out.
    pub excludes: Vec<String>,
    /// Leave out what cannot be opened, and list it, instead of failing. A file that breaks off while it is read fails
    /// the run all the same.
    pub skip_unreadable: bool,
}

/// What was sent, and what was not.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PackSummary {
    /// Regular files, each inode once.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Further names of files that were sent before.
    pub hard_links: u64,
    /// Block and character devices.
    pub devices: u64,
    /// Named pipes.
    pub fifos: u64,
    /// Bytes of file content in the stream, without holes.
    pub content_bytes: u64,
    /// Bytes of the stream.
    pub archive_bytes: u64,
    /// Things that exclude patterns left out; directories that were sent empty are not counted.
    pub left_out: u64,
    /// Files that changed while they were read: their copy is of the promised size, but may mix old and new content.
    pub changed: PathList,
    /// What was listed in a directory and gone a moment later.
    pub vanished: PathList,
    /// Sockets, which no archive can hold; the programs that own them make them anew.
    pub sockets: PathList,
    /// Where other file systems are mounted that are not sent; last those of [`PackOptions::mounts`] that lie in what exclude
    /// patterns leave out.
    pub other_mounts: PathList,
    /// What could not be opened, with the cause; only with [`PackOptions::skip_unreadable`].
    pub unreadable: PathList,
}

/// Why the tree was not sent.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The root is not there or no directory.
    #[error("opening the root {}: {source}", root.display())]
    Root {
        /// As in the options.
        root: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An exclude pattern is no glob.
    #[error("exclude pattern: {0}")]
    Pattern(#[from] GlobError),
    /// `/proc` is needed for the xattrs of what cannot be opened.
    #[error("/proc is not mounted: {0}")]
    NoProc(io::Error),
    /// Something in the tree could not be read.
    #[error("{operation} {path}: {source}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Absolute, inside the root.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory was moved while its content was walked, and the way back is lost.
    #[error("the directory {path} was moved while it was read")]
    Moved {
        /// Absolute, inside the root.
        path: String,
    },
    /// A mount that was to be sent was never come upon.
    #[error(
        "the file system at {path} was to be sent, but is not reached (is a mount above it not in the list?)"
    )]
    MountNotFound {
        /// Absolute, inside the root.
        path: String,
    },
    /// More extended attributes than a header may hold.
    #[error("{path} has {bytes} bytes of extended attributes, more than can be sent")]
    TooManyXattrs {
        /// Absolute, inside the root.
        path: String,
        /// Size of the extended header.
        bytes: usize,
    },
    /// The stream could not be written.
    #[error("writing the stream: {0}")]
    Write(#[source] io::Error),
}

/// Sends the tree that `options` name to `out` as a tar stream.
///
/// # Errors
/// See [`PackError`]. After an error the stream is incomplete and has no end mark.
pub fn pack<W: Write>(
    options: &PackOptions,
    out: W,
    observer: &mut dyn Observer,
) -> Result<PackSummary, PackError> {
    std::fs::metadata("/proc/self/fd").map_err(PackError::NoProc)?;
    let mut walker = Walker::new(options)?;
    let tells = observer.wants_entries();
    let mut packer = Packer {
        output: Output::new(out),
        observer,
        tells,
        skip_unreadable: options.skip_unreadable,
        summary: PackSummary::default(),
        links: HashMap::new(),
        reader: Reader::new(tells),
        reported: 0,
    };
    let mut links = Links::default();
    // The root stands in the stream before anything in it is looked at.
    let mut root = Batch::default();
    if let Some(event) = walker.next()? {
        root.take(&event, &mut links);
    }
    let skip = options.skip_unreadable;
    let packed = packer.reader.batch(&root, Vec::new(), skip);
    packer.batch(&root, packed)?;
    let pipeline = Pipeline::default();
    std::thread::scope(|scope| {
        let _over = pipeline.until_written();
        scope.spawn(|| pipeline.walk(&mut walker, links));
        for _ in 0..READERS {
            scope.spawn(|| pipeline.read(tells, skip));
        }
        while let Some((batch, packed)) = pipeline.next()? {
            let buffer = packer.batch(&batch, packed)?;
            pipeline.done(batch, buffer);
        }
        Ok::<(), PackError>(())
    })?;
    for mount in &walker.hidden {
        packer.summary.other_mounts.add(|| shown(mount));
    }
    packer.finish()
}

struct Packer<'o, W> {
    output: Output<W>,
    observer: &'o mut dyn Observer,
    /// Whether the observer wants entries.
    tells: bool,
    skip_unreadable: bool,
    summary: PackSummary,
    links: HashMap<LinkKey, Link>,
    reader: Reader,
    reported: u64,
}

/// Where a file with several names was sent, and how many of them are still to come.
struct Link {
    path: Box<[u8]>,
    left: u32,
}

impl<W: Write> Packer<'_, W> {
    /// Writes what was made of a batch; returns the buffer.
    fn batch(&mut self, batch: &Batch, packed: Packed) -> Result<Vec<u8>, PackError> {
        let bytes = packed.bytes;
        let (mut written, mut last) = (0, 0);
        for ((path, thing), (end, outcome)) in batch.things().zip(packed.outcomes) {
            if let Thing::Entry(found) = thing {
                self.observer.entry(path);
                if found.other_mount {
                    self.summary.other_mounts.add(|| shown(path));
                }
            }
            // Whole entries are written together at the end, or before what must follow them at once.
            if matches!(outcome, Outcome::Large(_) | Outcome::Again) {
                self.put(&bytes[written..end])?;
                written = end;
            }
            match (thing, outcome) {
                (Thing::Entry(found), Outcome::Again) => self.again(path, found)?,
                (_, outcome) => self.outcome(path, outcome)?,
            }
            last = end;
        }
        self.put(&bytes[written..last])?;
        Ok(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), PackError> {
        self.output.put(bytes).map_err(PackError::Write)?;
        self.report();
        Ok(())
    }

    fn outcome(&mut self, path: &[u8], outcome: Outcome) -> Result<(), PackError> {
        match outcome {
            Outcome::Done { counts, link, content, changed, told } => {
                if let Some(told) = told {
                    self.observer.packed(&told);
                }
                self.count(counts, path, link, content, changed);
            }
            Outcome::Large(mut large) => {
                let changed = self.large(path, &mut large)?;
                self.count(Counts::File, path, names(&large.stat), large.content, changed);
            }
            Outcome::Vanished | Outcome::Again => self.summary.vanished.add(|| shown(path)),
            Outcome::Socket => self.summary.sockets.add(|| shown(path)),
            Outcome::LeftOut => self.summary.left_out += 1,
            Outcome::Unreadable(error) if self.skip_unreadable => {
                log::warn!("leaving out {error}");
                self.summary.unreadable.add(|| error.to_string());
            }
            Outcome::Unreadable(error) | Outcome::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// Sends a further name of a file that was sent before, and the file itself when it was not after all.
    fn again(&mut self, path: &[u8], found: &Found) -> Result<(), PackError> {
        let mut bytes = Vec::new();
        let key = link_key(&found.stat);
        let Some(link) = self.links.get_mut(&key) else {
            let outcome = self.reader.entry(path, found, &mut bytes)?;
            self.put(&bytes)?;
            return self.outcome(path, outcome);
        };
        link.left = link.left.saturating_sub(1);
        let target = if link.left == 0 {
            self.links.remove(&key).map(|link| link.path).unwrap_or_default()
        } else {
            link.path.clone()
        };
        let (kind, stat, xattrs) = (EntryType::Link, &found.stat, &Xattrs::new());
        let head = Head {
            path,
            stat,
            kind,
            link: &target,
            xattrs,
            attributes: Attributes::default(),
            size: 0,
            map: None,
        };
        Encoder::default().put(&mut bytes, &head)?;
        self.put(&bytes)?;
        if self.tells {
            let none = Attributes::default();
            self.observer.packed(&reader::entry(path, stat, Kind::HardLink, &target, xattrs, none));
        }
        self.summary.hard_links += 1;
        Ok(())
    }

    /// Counts what has been sent in full, and remembers it when it has more names.
    fn count(
        &mut self,
        counts: Counts,
        path: &[u8],
        link: Option<(LinkKey, u32)>,
        content: u64,
        changed: bool,
    ) {
        let summary = &mut self.summary;
        match counts {
            Counts::File => summary.files += 1,
            Counts::Directory => summary.directories += 1,
            Counts::Symlink => summary.symlinks += 1,
            Counts::Device => summary.devices += 1,
            Counts::Fifo => summary.fifos += 1,
            Counts::Nothing => {}
        }
        summary.content_bytes += content;
        if changed {
            summary.changed.add(|| shown(path));
        }
        if let Some((key, names)) = link
            && !matches!(counts, Counts::Directory | Counts::Nothing)
        {
            self.links.insert(key, Link { path: path.into(), left: names - 1 });
        }
    }

    /// Sends a large file's content; tells whether it changed meanwhile.
    fn large(&mut self, path: &[u8], large: &mut Large) -> Result<bool, PackError> {
        let mut short = false;
        let mut digester = large.told.is_some().then(|| Digester::new(large.sparse));
        for &(offset, length) in &large.map {
            short |= self.copy(large, path, offset, length, digester.as_mut())?;
        }
        self.output.pad().map_err(PackError::Write)?;
        self.report();
        let changed = short || large.changed(path)?;
        if let (Some(mut told), Some(digester)) = (large.told.take(), digester) {
            let size = large.stat.stx_size;
            let digest = digester.finish(size);
            told.content = Some(manifest::Content { size, sparse: large.sparse, digest });
            told.changed = changed;
            self.observer.packed(&told);
        }
        Ok(changed)
    }

    /// Sends exactly `length` bytes from `offset` on; tells whether the file had less and zeros stand in for the rest.
    fn copy(
        &mut self,
        large: &Large,
        path: &[u8],
        offset: u64,
        length: u64,
        mut digester: Option<&mut Digester>,
    ) -> Result<bool, PackError> {
        let (mut position, mut left) = (offset, length);
        // What comes first is being read already.
        let mut ahead = offset + AHEAD / 2;
        while left > 0 {
            if position >= ahead {
                large.read_ahead(position + AHEAD / 2);
                ahead = position + AHEAD;
            }
            let room = self.output.room().map_err(PackError::Write)?;
            let count = room.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match pread(&large.fd, &mut room[..count], position) {
                Ok(0) => {
                    self.output.zeros(left).map_err(PackError::Write)?;
                    return Ok(true);
                }
                Ok(count) => {
                    if let Some(digester) = &mut digester {
                        digester.data(position, &room[..count]);
                    }
                    self.output.advance(count);
                    position += count as u64;
                    left -= count as u64;
                    self.report();
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(fail("reading", path, e)),
            }
        }
        Ok(false)
    }

    /// Tells the observer of what was written since the last time.
    fn report(&mut self) {
        let position = self.output.position();
        self.observer.bytes(position - self.reported);
        self.reported = position;
    }

    fn finish(mut self) -> Result<PackSummary, PackError> {
        let reported = self.reported;
        self.summary.archive_bytes = self.output.finish().map_err(PackError::Write)?;
        self.observer.bytes(self.summary.archive_bytes - reported);
        Ok(self.summary)
    }
}
