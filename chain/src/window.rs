//! The chunks that a node still holds: pushed by the one who receives (or packs), read by a cursor each for the local
//! consumer and every child. A chunk leaves when every cursor has passed it. When the window is full, pushing blocks, the
//! node stops reading from its socket, and TCP slows the chain down: nothing is ever dropped or unbounded.

use crate::Error;
use crate::buffer::Buffer;
use crate::chunk::Sealed;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Opened copies kept beside their sealed originals, so that the consumer need not open them again. Few, as each costs
/// up to a chunk of memory outside the window's limit.
const OPENED: usize = 8;

/// A bounded queue of chunks with several readers.
#[derive(Debug)]
pub struct Window {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Number of the first chunk held.
    base: u64,
    chunks: VecDeque<Slot>,
    /// Wire bytes of the chunks held.
    bytes: usize,
    opened: usize,
    cursors: BTreeMap<u64, u64>,
    next_cursor: u64,
    ended: bool,
    broken: Option<String>,
}

#[derive(Debug)]
struct Slot {
    sealed: Arc<Sealed>,
    opened: Option<Buffer>,
}

impl State {
    fn end(&self) -> u64 {
        self.base + self.chunks.len() as u64
    }

    /// Lets go of what every cursor has passed.
    fn trim(&mut self) {
        let keep = self.cursors.values().copied().min().unwrap_or_else(|| self.end());
        while self.base < keep {
            let Some(slot) = self.chunks.pop_front() else { break };
            self.bytes -= slot.sealed.wire_len();
            self.opened -= usize::from(slot.opened.is_some());
            self.base += 1;
        }
    }
}

impl Window {
    /// A window that holds at most `limit` wire bytes, and always at least one chunk.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), changed: Condvar::new(), limit })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every critical section leaves the state whole, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds the next chunk, waiting while the window is full. `opened` is kept for the consumer while there is room.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the window was stopped, [`Error::Malformed`] when the chunk is not the next one.
    pub fn push(&self, sealed: Sealed, opened: Option<Buffer>) -> Result<(), Error> {
        let size = sealed.wire_len();
        let mut state = self.lock();
        loop {
            if let Some(reason) = &state.broken {
                return Err(Error::Stopped(reason.clone()));
            }
            if state.chunks.is_empty() || state.bytes + size <= self.limit {
                break;
            }
            state = self.wait(state);
        }
        if sealed.header.number != state.end() {
            let text = format!("chunk {} where {} was next", sealed.header.number, state.end());
            return Err(Error::Malformed(text));
        }
        let opened = opened.filter(|_| state.opened < OPENED);
        state.opened += usize::from(opened.is_some());
        state.bytes += size;
        state.chunks.push_back(Slot { sealed: Arc::new(sealed), opened });
        state.trim();
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Says that no chunk will follow.
    pub fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Makes every push and every cursor fail from now on. The first reason stands.
    pub fn stop(&self, reason: impl Into<String>) {
        self.lock().broken.get_or_insert_with(|| reason.into());
        self.changed.notify_all();
    }

    /// A reader from the first chunk that is still held.
    #[must_use]
    pub fn cursor(self: &Arc<Self>) -> Cursor {
        let mut state = self.lock();
        let id = state.next_cursor;
        state.next_cursor += 1;
        let base = state.base;
        state.cursors.insert(id, base);
        Cursor { window: Arc::clone(self), id, next: base }
    }

    /// Wire bytes held now, and the limit.
    #[must_use]
    pub fn fill(&self) -> (usize, usize) {
        (self.lock().bytes, self.limit)
    }
}

/// A chunk, and its opened copy if one was kept.
pub type Taken = (Arc<Sealed>, Option<Buffer>);

/// One reader of a window. Dropping it lets the window forget it.
#[derive(Debug)]
pub struct Cursor {
    window: Arc<Window>,
    id: u64,
    next: u64,
}

impl Cursor {
    /// The next chunk, waiting for it; `None` after the last. The window counts it as passed; the `Arc` keeps it alive
    /// while it is sent.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the window was stopped.
    pub fn next_chunk(&mut self) -> Result<Option<Arc<Sealed>>, Error> {
        Ok(self.advance(false)?.map(|(sealed, _)| sealed))
    }

    /// [`Cursor::next_chunk`] for the consumer: with the opened copy, if there is one.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the window was stopped.
    pub fn next_opened(&mut self) -> Result<Option<Taken>, Error> {
        self.advance(true)
    }

    fn advance(&mut self, take: bool) -> Result<Option<Taken>, Error> {
        let mut state = self.window.lock();
        loop {
            // A stop counts even when chunks are left: whoever stops wants nobody to go on.
            if let Some(reason) = &state.broken {
                return Err(Error::Stopped(reason.clone()));
            }
            if self.next < state.end() {
                break;
            }
            if state.ended {
                return Ok(None);
            }
            state = self.window.wait(state);
        }
        let at = usize::try_from(self.next - state.base)
            .map_err(|_| Error::Malformed("window too long".into()))?;
        let Some(slot) = state.chunks.get_mut(at) else {
            return Err(Error::Malformed(format!("chunk {} has left the window", self.next)));
        };
        let sealed = Arc::clone(&slot.sealed);
        let opened = if take { slot.opened.take() } else { None };
        state.opened -= usize::from(opened.is_some());
        self.next += 1;
        let next = self.next;
        state.cursors.insert(self.id, next);
        state.trim();
        drop(state);
        self.window.changed.notify_all();
        Ok(Some((sealed, opened)))
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        let mut state = self.window.lock();
        state.cursors.remove(&self.id);
        state.trim();
        drop(state);
        self.window.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Pool;
    use crate::chunk::{Header, Kind, TAG};
    use std::time::Duration;

    fn chunk(number: u64) -> Sealed {
        let mut bytes = Pool::new(0).take();
        bytes.resize(100 + TAG, 0);
        Sealed {
            header: Header { kind: Kind::Data, compressed: false, number, plain: 100, sealed: 116 },
            bytes,
        }
    }

    #[test]
    fn a_full_window_blocks_until_the_slowest_reader_moves() {
        let window = Window::new(chunk(0).wire_len() * 2);
        let (mut fast, mut slow) = (window.cursor(), window.cursor());
        window.push(chunk(0), None).unwrap();
        window.push(chunk(1), None).unwrap();
        fast.next_chunk().unwrap();
        fast.next_chunk().unwrap();
        let pushing = std::thread::spawn({
            let window = Arc::clone(&window);
            move || window.push(chunk(2), None)
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!pushing.is_finished());
        assert_eq!(slow.next_chunk().unwrap().unwrap().header.number, 0);
        pushing.join().unwrap().unwrap();
        assert_eq!(fast.next_chunk().unwrap().unwrap().header.number, 2);
    }

    #[test]
    fn a_reader_that_goes_away_holds_nobody_up_and_nobody_means_no_memory() {
        let window = Window::new(1);
        let slow = window.cursor();
        window.push(chunk(0), None).unwrap();
        drop(slow);
        for n in 1..100 {
            window.push(chunk(n), None).unwrap();
        }
        assert_eq!(window.fill().0, 0);
    }

    #[test]
    fn end_and_stop_reach_a_waiting_reader() {
        for stop in [true, false] {
            let window = Window::new(1);
            let mut cursor = window.cursor();
            let waiting = std::thread::spawn(move || cursor.next_chunk());
            std::thread::sleep(Duration::from_millis(20));
            if stop {
                window.stop("enough");
            } else {
                window.end();
            }
            match waiting.join().unwrap() {
                Ok(None) => assert!(!stop),
                Err(Error::Stopped(reason)) => assert!(stop && reason == "enough"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_chunk_out_of_order_is_refused() {
        let window = Window::new(1000);
        window.push(chunk(0), None).unwrap();
        assert!(window.push(chunk(2), None).is_err());
        assert!(window.push(chunk(0), None).is_err());
    }
}
