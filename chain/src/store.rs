//! The chunks that a node holds, shared by the thread that relays them and the one that consumes them (at the server: that
//! makes them). What stays and what goes is decided by [`crate::core::relay`]; here they are only kept.
//!
//! The relaying thread never waits here. The consumer waits for chunks, the server's source for room.

use crate::Error;
use crate::buffer::Buffer;
use crate::chunk::{Kind, Sealed};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Opened copies kept beside their sealed originals, so that the consumer need not open them again. Few, as each costs up
/// to a chunk of memory outside the window.
const OPENED: usize = 8;
/// A consumer that waits is woken when it can take so many chunks at once, or when the relaying thread has nothing else to do.
const WORTH_WAKING: u64 = 4;
/// Chunks that the server's source may be ahead of the relaying thread.
const INCOMING: usize = 4;

/// Wakes the relaying thread out of its `poll`.
#[derive(Debug)]
pub struct Waker {
    event: OwnedFd,
    /// Set while the thread sleeps, so that nobody pays for waking one that is awake.
    asleep: AtomicBool,
}

impl Waker {
    fn new() -> Result<Self, Error> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("making an eventfd")(e.into()))?;
        Ok(Self { event, asleep: AtomicBool::new(false) })
    }

    /// Wakes it.
    pub fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It can only fail when the counter is full: then it is awake already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// The thread is about to sleep: whoever has something for it after this wakes it.
    pub(crate) fn sleeping(&self) {
        self.asleep.store(true, Ordering::SeqCst);
    }

    /// The thread is awake; `readable` says that `poll` saw the event.
    pub(crate) fn awake(&self, readable: bool) {
        self.asleep.store(false, Ordering::SeqCst);
        if readable {
            let mut count = [0; 8];
            // Only this thread reads, so there is something to read.
            let _ = rustix::io::read(&self.event, &mut count);
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[derive(Debug, Default)]
struct State {
    /// Number of the first chunk held.
    first: u64,
    chunks: VecDeque<Slot>,
    opened: usize,
    /// The next chunk that the consumer takes; it may take some before it consumes them.
    next: u64,
    waiting: bool,
    /// From the source, not yet seen by the relaying thread.
    incoming: VecDeque<Sealed>,
    complete: bool,
    broken: Option<String>,
}

impl State {
    /// Chunks that the consumer has not taken.
    fn available(&self) -> u64 {
        (self.first + self.chunks.len() as u64).saturating_sub(self.next)
    }

    /// The consumer's next chunk, if it is there.
    fn take(&mut self) -> Result<Option<Taken>, Error> {
        // A stop counts even when chunks are left: whoever stops wants nobody to go on.
        if let Some(reason) = &self.broken {
            return Err(Error::Stopped(reason.clone()));
        }
        if self.available() == 0 {
            return Ok(None);
        }
        let next = self.next;
        let slot = next.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        let slot = slot
            .and_then(|at| self.chunks.get_mut(at))
            .ok_or_else(|| Error::Malformed(format!("chunk {next} has left the window")))?;
        let sealed = Arc::clone(&slot.sealed);
        let opened = slot.opened.take();
        self.opened -= usize::from(opened.is_some());
        self.next += 1;
        Ok(Some((sealed, opened)))
    }
}

#[derive(Debug)]
struct Slot {
    sealed: Arc<Sealed>,
    opened: Option<Buffer>,
}

/// The chunks that are held.
#[derive(Debug)]
pub struct Store {
    state: Mutex<State>,
    consumer: Condvar,
    source: Condvar,
    consumed: AtomicU64,
    gone: AtomicBool,
    /// Whether it was stopped; why, says the state.
    halted: AtomicBool,
    /// The relaying thread reads nothing because the window is full.
    full: AtomicBool,
    /// For the relaying thread.
    pub waker: Waker,
}

/// A chunk, and its opened copy if one was kept.
pub type Taken = (Arc<Sealed>, Option<Buffer>);

impl Store {
    /// An empty store.
    ///
    /// # Errors
    /// When the kernel gives no event descriptor.
    pub fn new() -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self {
            state: Mutex::default(),
            consumer: Condvar::new(),
            source: Condvar::new(),
            consumed: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            halted: AtomicBool::new(false),
            full: AtomicBool::new(false),
            waker: Waker::new()?,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the next chunk; its opened copy is kept for the consumer while there is room.
    pub(crate) fn append(&self, sealed: Arc<Sealed>, opened: Option<Buffer>) {
        let mut state = self.lock();
        let keep = state.opened < OPENED && !self.gone.load(Ordering::Relaxed);
        let opened = opened.filter(|_| keep);
        state.opened += usize::from(opened.is_some());
        state.complete |= matches!(sealed.header.kind, Kind::End | Kind::GivenUp);
        state.chunks.push_back(Slot { sealed, opened });
        let wake = state.complete || state.available() >= WORTH_WAKING;
        self.wake_consumer(state, wake);
    }

    /// The relaying thread is about to sleep: whoever waits for a chunk that is there gets it now.
    pub(crate) fn nudge(&self) {
        let state = self.lock();
        let wake = state.available() > 0;
        self.wake_consumer(state, wake);
    }

    fn wake_consumer(&self, mut state: MutexGuard<'_, State>, wake: bool) {
        let wake = wake && std::mem::take(&mut state.waiting);
        drop(state);
        if wake {
            self.consumer.notify_all();
        }
    }

    /// Forgets every chunk before `first`.
    pub(crate) fn trim(&self, first: u64) {
        let mut gone = Vec::new();
        let mut state = self.lock();
        while state.first < first {
            let Some(slot) = state.chunks.pop_front() else { break };
            state.opened -= usize::from(slot.opened.is_some());
            state.first += 1;
            gone.push(slot);
        }
        // Their buffers go back to the pool without this lock.
        drop(state);
        drop(gone);
    }

    /// A chunk that is held.
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Sealed>> {
        let state = self.lock();
        let at = usize::try_from(number.checked_sub(state.first)?).ok()?;
        state.chunks.get(at).map(|slot| Arc::clone(&slot.sealed))
    }

    /// How far the consumer is, and whether it is gone.
    pub(crate) fn consumed(&self) -> (u64, bool) {
        (self.consumed.load(Ordering::SeqCst), self.gone.load(Ordering::SeqCst))
    }

    /// Whether the relaying thread waits for room: then the consumer wakes it.
    pub(crate) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }

    /// What the source has made since.
    pub(crate) fn take_incoming(&self) -> Option<Sealed> {
        let mut state = self.lock();
        let taken = state.incoming.pop_front();
        drop(state);
        if taken.is_some() {
            self.source.notify_one();
        }
        taken
    }

    /// Whether the source has made something since.
    pub(crate) fn has_incoming(&self) -> bool {
        !self.lock().incoming.is_empty()
    }

    /// Gives the chain its next chunk, waiting for room.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn push(&self, sealed: Sealed) -> Result<(), Error> {
        let mut state = self.lock();
        loop {
            if let Some(reason) = &state.broken {
                return Err(Error::Stopped(reason.clone()));
            }
            if state.incoming.len() < INCOMING {
                break;
            }
            state = self.source.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.incoming.push_back(sealed);
        drop(state);
        self.waker.wake();
        Ok(())
    }

    /// Makes the source and the consumer fail from now on. The first reason stands.
    pub fn stop(&self, reason: &str) {
        self.lock().broken.get_or_insert_with(|| reason.to_owned());
        self.halted.store(true, Ordering::SeqCst);
        self.consumer.notify_all();
        self.source.notify_all();
        self.waker.wake();
    }

    /// Why it was stopped, if it was.
    #[must_use]
    pub fn stopped(&self) -> Option<String> {
        self.lock().broken.clone()
    }
}

/// The local consumer's view. Dropping it lets the node go on as a relay for others.
#[derive(Debug)]
pub struct Cursor {
    store: Arc<Store>,
}

impl Cursor {
    /// The one consumer of a store, from its first chunk on.
    #[must_use]
    pub fn new(store: &Arc<Store>) -> Self {
        Self { store: Arc::clone(store) }
    }

    /// The next chunk, waiting for it; `None` after the last. It stays in the window until [`Cursor::consumed`] counts it.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the store was stopped.
    pub fn take(&mut self) -> Result<Option<Taken>, Error> {
        let mut state = self.store.lock();
        loop {
            if let Some(taken) = state.take()? {
                return Ok(Some(taken));
            }
            if state.complete {
                return Ok(None);
            }
            state.waiting = true;
            state = self.store.consumer.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next chunk if it is there.
    ///
    /// # Errors
    /// As [`Cursor::take`].
    pub fn try_take(&mut self) -> Result<Option<Taken>, Error> {
        self.store.lock().take()
    }

    /// A chunk that was taken, and all before it, count as consumed: they may leave the window.
    ///
    /// # Errors
    /// As [`Cursor::take`].
    pub fn consumed(&mut self, number: u64) -> Result<(), Error> {
        // A stop counts even when chunks are left: whoever stops wants nobody to go on.
        if self.store.halted.load(Ordering::SeqCst)
            && let Some(reason) = self.store.stopped()
        {
            return Err(Error::Stopped(reason));
        }
        self.store.consumed.store(number + 1, Ordering::SeqCst);
        if self.store.full.load(Ordering::SeqCst) {
            self.store.waker.wake();
        }
        Ok(())
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        self.store.gone.store(true, Ordering::SeqCst);
        self.store.waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Pool;
    use crate::chunk::{Header, TAG};
    use std::time::Duration;

    fn chunk(number: u64, kind: Kind) -> Sealed {
        let bytes = Pool::new(0).take_sized(100 + TAG);
        Sealed { header: Header { kind, compressed: false, number, plain: 100, sealed: 116 }, bytes }
    }

    #[test]
    fn the_consumer_waits_takes_in_order_and_ends_after_the_last() {
        let store = Store::new().unwrap();
        let mut cursor = Cursor::new(&store);
        let reading = std::thread::spawn(move || {
            let mut seen = Vec::new();
            while let Some((chunk, _)) = cursor.take().unwrap() {
                seen.push(chunk.header.number);
                cursor.consumed(chunk.header.number).unwrap();
            }
            seen
        });
        for number in 0..20 {
            let kind = if number == 19 { Kind::End } else { Kind::Data };
            store.append(Arc::new(chunk(number, kind)), Some(Pool::new(0).take(0)));
            if number % 5 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            store.trim(store.consumed().0);
        }
        assert_eq!(reading.join().unwrap(), (0..20).collect::<Vec<u64>>());
        assert_eq!(store.consumed(), (20, true));
        store.trim(20);
        assert!(store.get(19).is_none());
    }

    #[test]
    fn a_source_waits_for_room_and_a_stop_reaches_everybody() {
        let store = Store::new().unwrap();
        let pushing = std::thread::spawn({
            let store = Arc::clone(&store);
            move || (0..).find_map(|n| store.push(chunk(n, Kind::Data)).err().map(|e| (n, e.to_string())))
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!pushing.is_finished());
        assert_eq!(store.take_incoming().unwrap().header.number, 0);
        std::thread::sleep(Duration::from_millis(50));
        let mut cursor = Cursor::new(&store);
        let waiting = std::thread::spawn(move || cursor.take().map(|_| ()));
        std::thread::sleep(Duration::from_millis(20));
        store.stop("enough");
        assert_eq!(pushing.join().unwrap(), Some((5, "stopped: enough".to_owned())));
        assert!(matches!(waiting.join().unwrap(), Err(Error::Stopped(reason)) if reason == "enough"));
    }

    #[test]
    fn a_sleeping_thread_is_woken_once_and_one_that_is_awake_is_not_bothered() {
        let store = Store::new().unwrap();
        let ready = || {
            let mut fds = [rustix::event::PollFd::new(&store.waker, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&rustix::time::Timespec::default())).unwrap()
        };
        store.waker.wake();
        assert_eq!(ready(), 0);
        store.waker.sleeping();
        store.waker.wake();
        store.waker.wake();
        assert_eq!(ready(), 1);
        store.waker.awake(true);
        assert_eq!(ready(), 0);
    }
}
