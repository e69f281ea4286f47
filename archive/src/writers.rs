//! Threads that make small files while the stream is read on. A directory belongs to one of them, so that they do not wait
//! for each other in it. Two things done to one path never run at once: whoever hands out work has all earlier work done
//! ([`Writers::settle`]) where one entry may concern another. Of several errors the first of the stream is told.

use std::collections::HashSet;
use std::collections::hash_map::RandomState;
use std::ffi::CStr;
use std::hash::BuildHasher;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, OFlags, openat, unlinkat};
use rustix::io::Errno;

use crate::attributes::Attributes;
use crate::place::{Metadata, Notes, Place, first_mode, write_all};
use crate::shown;
use crate::target::Directory;
use crate::unpack::UnpackError;
use crate::xattr::Xattrs;

/// Files of at most so many bytes of content and attributes are made here.
pub(crate) const SMALL: u64 = 128 << 10;
/// Most threads.
const MOST: usize = 4;
/// Bytes and files after which a batch is handed over.
const BYTES: usize = 256 << 10;
const FILES: usize = 64;
/// Directories after which it is, too: each is held open.
const FOLDERS: usize = 16;
/// Batches that wait for a thread.
const WAITING: usize = 2;
/// A buffer that grew beyond this many bytes is not used again.
const KEPT: usize = 1 << 20;
/// Paths that are remembered before all work is waited for and forgotten.
const PATHS: usize = 1 << 16;

/// A small file to be made.
pub(crate) struct File {
    pub number: u64,
    pub parent: Arc<Directory>,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    pub mtime: (i64, u32),
    pub xattrs: Xattrs,
    pub attributes: Attributes,
}

/// Files with their paths and contents, each path with a NUL behind it.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    files: Vec<(File, Range<usize>, Range<usize>)>,
    /// How many directories they are in, at most.
    folders: usize,
    /// Bytes of their attributes.
    xattrs: usize,
}

#[derive(Default)]
struct State {
    /// Batches that were done.
    done: u64,
    /// A thread ended by a panic.
    dead: bool,
    failed: Option<(u64, UnpackError)>,
    /// To be used again.
    free: Vec<Batch>,
}

/// What the threads share.
#[derive(Default)]
pub(crate) struct Shared {
    pub notes: Notes,
    state: Mutex<State>,
    /// A batch was done.
    done: Condvar,
    has_failed: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere ends the run by itself; the state is whole at every moment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, batches: &Receiver<Batch>) {
        let _panic = Panic(self);
        for mut batch in batches {
            for (file, path, content) in &batch.files {
                if let Err(e) = self.make(file, &batch.bytes[path.clone()], &batch.bytes[content.clone()]) {
                    self.fail(file.number, e);
                    break;
                }
            }
            batch.files.clear();
            batch.bytes.clear();
            (batch.folders, batch.xattrs) = (0, 0);
            let mut state = self.lock();
            state.done += 1;
            if batch.bytes.capacity() <= KEPT {
                state.free.push(batch);
            }
            drop(state);
            self.done.notify_one();
        }
    }

    fn fail(&self, number: u64, error: UnpackError) {
        let mut state = self.lock();
        if state.failed.as_ref().is_none_or(|(first, _)| number < *first) {
            state.failed = Some((number, error));
        }
        self.has_failed.store(true, Ordering::Release);
    }

    fn make(&self, file: &File, path: &[u8], content: &[u8]) -> Result<(), UnpackError> {
        let plain = path.strip_suffix(b"\0").unwrap_or(path);
        let place = Place { notes: &self.notes, number: file.number, kind: file.parent.kind, path: plain };
        let start = plain.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
        let name =
            CStr::from_bytes_with_nul(&path[start..]).map_err(|_| place.fail("creating", Errno::INVAL))?;
        let fd = create(&file.parent, name, plain, file.mode)?;
        // Some can be given to an empty file only.
        place.attributes(fd.as_fd(), file.attributes)?;
        place.properties(fd.as_fd(), &file.xattrs)?;
        write_all(&fd, content).map_err(|e| place.fail("writing", e))?;
        let File { uid, gid, mode, mtime, .. } = *file;
        place.file_metadata(&fd, &Metadata { uid, gid, mode, mtime, xattrs: &file.xattrs })
    }
}

/// Tells that its thread ended by a panic.
struct Panic<'a>(&'a Shared);

impl Drop for Panic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().dead = true;
            self.0.done.notify_one();
        }
    }
}

/// A new file that is open for writing. What is in its way, and was there before the stream, goes.
fn create(parent: &Directory, name: &CStr, path: &[u8], mode: u32) -> Result<OwnedFd, UnpackError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || openat(parent, name, flags, first_mode(mode));
    let opened = match open() {
        Err(Errno::EXIST) => {
            remove(parent, name, path)?;
            open()
        }
        other => other,
    };
    opened.map_err(|e| UnpackError::file("creating", path, e))
}

/// Removes what stands at `name`, but no directory with content; true when it was a directory.
pub(crate) fn remove(parent: &Directory, name: &CStr, path: &[u8]) -> Result<bool, UnpackError> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(false),
        Err(Errno::ISDIR) => {}
        Err(e) => return Err(UnpackError::file("removing what was at", path, e)),
    }
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Err(UnpackError::Refused {
            path: shown(path),
            why: "a directory with content is in its place".to_owned(),
        }),
        Err(e) => Err(UnpackError::file("removing the directory that was at", path, e)),
    }
}

/// The threads, seen from the one that reads the stream.
pub(crate) struct Writers<'a> {
    shared: &'a Shared,
    threads: Vec<(SyncSender<Batch>, Batch)>,
    /// Batches that were handed over.
    sent: u64,
    hash: RandomState,
    /// Digests of paths that were handed out since all work was last waited for.
    paths: HashSet<u64>,
}

impl<'a> Writers<'a> {
    /// As many threads as pay here.
    pub(crate) fn usual() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from).min(MOST)
    }

    /// Starts so many threads, which end when this is dropped. Without any, nothing may be handed out.
    pub(crate) fn start<'scope>(shared: &'a Shared, scope: &'scope Scope<'scope, 'a>, count: usize) -> Self {
        let thread = |_| {
            let (sender, receiver) = sync_channel(WAITING);
            scope.spawn(move || shared.work(&receiver));
            (sender, Batch::default())
        };
        Self {
            shared,
            threads: (0..count).map(thread).collect(),
            sent: 0,
            hash: RandomState::new(),
            paths: HashSet::new(),
        }
    }

    /// Whether there is no thread.
    pub(crate) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Digest of a path.
    fn digest(&self, path: &[u8]) -> u64 {
        self.hash.hash_one(path)
    }

    /// Has all work done before something else is done to `path`, if it was handed out.
    pub(crate) fn settle_path(&mut self, path: &[u8]) -> Result<(), UnpackError> {
        if self.paths.contains(&self.digest(path)) { self.settle() } else { Ok(()) }
    }

    /// Hands out a file at `path` (relative to the root), in the directory `folder`; `content` appends its content.
    pub(crate) fn make(
        &mut self,
        file: File,
        path: &[u8],
        folder: &[u8],
        content: impl FnOnce(&mut Vec<u8>) -> Result<(), UnpackError>,
    ) -> Result<(), UnpackError> {
        let digest = self.digest(path);
        if self.paths.len() >= PATHS || self.paths.contains(&digest) {
            self.settle()?;
        }
        if self.shared.has_failed.load(Ordering::Acquire) {
            return self.settle();
        }
        self.paths.insert(digest);
        let thread = usize::try_from(self.digest(folder) % self.threads.len() as u64).unwrap_or(0);
        let batch = &mut self.threads[thread].1;
        let start = batch.bytes.len();
        batch.bytes.extend_from_slice(path);
        batch.bytes.push(0);
        let middle = batch.bytes.len();
        content(&mut batch.bytes)?;
        let same = batch.files.last().is_some_and(|(last, ..)| Arc::ptr_eq(&last.parent, &file.parent));
        batch.folders += usize::from(!same);
        batch.xattrs += file.xattrs.iter().map(|(_, value)| value.len()).sum::<usize>();
        batch.files.push((file, start..middle, middle..batch.bytes.len()));
        let bytes = batch.bytes.len() + batch.xattrs;
        if batch.files.len() >= FILES || bytes >= BYTES || batch.folders >= FOLDERS {
            self.send(thread);
        }
        Ok(())
    }

    fn send(&mut self, thread: usize) {
        let fresh = self.shared.lock().free.pop().unwrap_or_default();
        let (sender, batch) = &mut self.threads[thread];
        let batch = std::mem::replace(batch, fresh);
        // A thread that is not there any more ended by a panic, which goes on where the threads are joined.
        if sender.send(batch).is_ok() {
            self.sent += 1;
        }
    }

    /// Has all work done that was handed out.
    ///
    /// # Errors
    /// The first in the stream's order that any of it met.
    pub(crate) fn settle(&mut self) -> Result<(), UnpackError> {
        for thread in 0..self.threads.len() {
            if !self.threads[thread].1.files.is_empty() {
                self.send(thread);
            }
        }
        self.paths.clear();
        let mut state = self.shared.lock();
        while state.done < self.sent && !state.dead {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failed.take().map_or(Ok(()), |(_, error)| Err(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Target;

    /// How many of some empty files wait for more before a thread gets them.
    fn waiting(count: u64, folders: usize, xattr: usize) -> usize {
        let root = tempfile::tempdir().unwrap();
        let shared = Shared::default();
        std::thread::scope(|scope| {
            let mut target = Target::open(root.path()).unwrap();
            let mut writers = Writers::start(&shared, scope, 1);
            let parents: Vec<_> =
                (0..folders).map(|i| target.directory(format!("d{i}").as_bytes(), true).unwrap()).collect();
            for number in 0..count {
                let parent = Arc::clone(&parents[usize::try_from(number).unwrap() % folders]);
                let xattrs = vec![(c"user.a".to_owned(), vec![0; xattr])];
                let attributes = Attributes::default();
                let (uid, gid, mode, mtime) = (0, 0, 0o600, (0, 0));
                let file = File { number, parent, uid, gid, mode, mtime, xattrs, attributes };
                writers.make(file, format!("{number}").as_bytes(), b"", |_| Ok(())).unwrap();
            }
            let waiting = writers.threads[0].1.files.len();
            assert_eq!(writers.sent, u64::from(waiting as u64 != count));
            waiting
        })
    }

    #[test]
    fn a_batch_is_bounded_in_files_directories_and_attributes() {
        assert_eq!(waiting(63, 1, 1), 63);
        assert_eq!(waiting(64, 1, 1), 0);
        assert_eq!(waiting(15, 15, 1), 15);
        assert_eq!(waiting(16, 16, 1), 0);
        assert_eq!(waiting(3, 1, 64 << 10), 3);
        assert_eq!(waiting(4, 1, 64 << 10), 0);
    }
}
