//! What the walker finds, taken from it in batches, so that others can read it while the walk goes on. A batch is a few
//! hundred KiB of content at most, in the order of the stream, and holds at most 17 descriptors open: one for each directory
//! that it needs, and one for a large file.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Statx, StatxFlags};
use rustix::io::Errno;

use crate::walk::{Event, Item, file_type, inode};

/// Files of more bytes are not read into a batch's buffer, but by whoever writes the stream.
pub(crate) const LARGE: u64 = 256 << 10;
/// Bytes of content after which a batch is full.
const BYTES: u64 = 256 << 10;
/// Things after which a batch is full.
const THINGS: usize = 64;
/// What an open directory counts beside content: few batches are under way, and so few descriptors are open.
const DIRECTORY: u64 = BYTES / 16;

/// An inode; its birth time tells it from a later one with the same number.
pub(crate) type LinkKey = ((u32, u32, u64), (i64, u32));

pub(crate) fn link_key(stat: &Statx) -> LinkKey {
    let born = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
    let birth = if born { (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec) } else { (0, 0) };
    (inode(stat), birth)
}

/// An entry that is to be sent, as [`Item`].
pub(crate) struct Found {
    /// For a directory that is open: itself.
    pub parent: Arc<OwnedFd>,
    pub stat: Statx,
    /// It is a directory, and `parent` is itself.
    pub open: bool,
    pub other_mount: bool,
    /// Very likely another name of a file that is in the stream already.
    pub again: bool,
}

/// One thing found. Nearly all are entries.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Thing {
    Entry(Found),
    Vanished,
    LeftOut,
    Unreadable(&'static str, Errno),
}

/// Things in the order of the stream.
#[derive(Default)]
pub(crate) struct Batch {
    paths: Vec<u8>,
    things: Vec<(Range<usize>, Thing)>,
    /// Of content, with what stands for open descriptors.
    bytes: u64,
    /// The directory of the last entry.
    last: Option<Arc<OwnedFd>>,
}

impl Batch {
    pub(crate) fn is_full(&self) -> bool {
        self.things.len() >= THINGS || self.bytes >= BYTES
    }

    pub(crate) fn len(&self) -> usize {
        self.things.len()
    }

    /// Empties it; its memory stays.
    pub(crate) fn clear(&mut self) {
        self.paths.clear();
        self.things.clear();
        self.bytes = 0;
        self.last = None;
    }

    /// The things with their paths (relative to the root).
    pub(crate) fn things(&self) -> impl Iterator<Item = (&[u8], &Thing)> {
        self.things.iter().map(|(path, thing)| (&self.paths[path.clone()], thing))
    }

    fn add(&mut self, path: &[u8], thing: Thing) {
        let start = self.paths.len();
        self.paths.extend_from_slice(path);
        self.things.push((start..self.paths.len(), thing));
    }

    /// Takes what the walker found.
    pub(crate) fn take(&mut self, event: &Event<'_>, links: &mut Links) {
        match event {
            Event::Entry(item) => {
                if file_type(&item.stat) == FileType::RegularFile {
                    // A large one stays open until it is written.
                    self.bytes += item.stat.stx_size.min(LARGE);
                }
                let found = found(item, links);
                if !self.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &found.parent)) {
                    self.bytes += DIRECTORY;
                    self.last = Some(Arc::clone(&found.parent));
                }
                self.add(item.path, Thing::Entry(found));
            }
            Event::Vanished(path) => self.add(path, Thing::Vanished),
            Event::LeftOut => self.add(b"", Thing::LeftOut),
            Event::Unreadable(path, operation, errno) => {
                self.add(path, Thing::Unreadable(operation, *errno));
            }
        }
    }
}

/// The entry, free of the walker.
fn found(item: &Item<'_>, links: &mut Links) -> Found {
    let again = !item.other_mount
        && file_type(&item.stat) != FileType::Directory
        && item.stat.stx_nlink > 1
        && links.again(&item.stat);
    Found {
        parent: Arc::clone(item.directory.unwrap_or(item.parent)),
        stat: item.stat,
        open: item.directory.is_some(),
        other_mount: item.other_mount,
        again,
    }
}

/// Which files with several names were found before, and how many of their names are still to come.
#[derive(Default)]
pub(crate) struct Links(HashMap<LinkKey, u32>);

impl Links {
    /// Whether `stat` is of a file that was found before.
    fn again(&mut self, stat: &Statx) -> bool {
        let key = link_key(stat);
        let Some(left) = self.0.get_mut(&key) else {
            self.0.insert(key, stat.stx_nlink - 1);
            return false;
        };
        *left = left.saturating_sub(1);
        if *left == 0 {
            self.0.remove(&key);
        }
        true
    }
}
