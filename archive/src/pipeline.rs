//! One walks, several read, one writes, all at once, and what is written is in the order of the walk. What is under way is
//! bounded: [`BATCHES`] batches, each with one buffer.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::batch::{Batch, Links};
use crate::pack::PackError;
use crate::reader::{Packed, Reader};
use crate::walk::Walker;

/// Threads that read. More than processors, because what they mostly do with cold caches is wait.
pub(crate) const READERS: usize = 8;
/// Batches that are under way at once.
const BATCHES: usize = 2 * READERS;
/// A buffer that grew beyond this many bytes is not used again.
const KEPT: usize = 1 << 20;

#[derive(Default)]
struct State {
    /// Found, and nobody reads it yet. The numbers are those of the walk.
    found: VecDeque<(u64, Batch)>,
    /// From the one that is to be written next; none where it is still being read.
    packed: VecDeque<Option<(Batch, Packed)>>,
    /// Number of the first of them.
    first: u64,
    /// How the walk ended, once it has.
    walked: Option<Result<(), PackError>>,
    /// Nobody wants any more.
    over: bool,
    /// To be used again.
    buffers: Vec<Vec<u8>>,
    batches: Vec<Batch>,
}

#[derive(Default)]
pub(crate) struct Pipeline {
    state: Mutex<State>,
    /// For readers: something was found, or it is over.
    found: Condvar,
    /// For the writer: the next batch is packed, or the walk has ended.
    packed: Condvar,
    /// For the walker: there is room, or it is over.
    room: Condvar,
}

/// Ends everything when it is dropped: by the writer when it is done, by any other thread only in a panic.
pub(crate) struct Over<'a> {
    pipeline: &'a Pipeline,
    always: bool,
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        if self.always || std::thread::panicking() {
            self.pipeline.lock().over = true;
            for waiting in [&self.pipeline.found, &self.pipeline.packed, &self.pipeline.room] {
                waiting.notify_all();
            }
        }
    }
}

impl Pipeline {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere ends the run by itself; the state is whole at every moment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(waiting: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        waiting.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held by the writing thread: when it leaves, the others do.
    pub(crate) fn until_written(&self) -> Over<'_> {
        Over { pipeline: self, always: true }
    }

    /// The walking thread.
    pub(crate) fn walk(&self, walker: &mut Walker, mut links: Links) {
        let _panic = Over { pipeline: self, always: false };
        let mut batch = Batch::default();
        let walked = loop {
            match walker.next() {
                Ok(Some(event)) => batch.take(&event, &mut links),
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
            if batch.is_full() {
                let fresh = self.lock().batches.pop().unwrap_or_default();
                if !self.put(std::mem::replace(&mut batch, fresh)) {
                    break Ok(());
                }
            }
        };
        self.put(batch);
        self.lock().walked = Some(walked);
        self.packed.notify_one();
        self.found.notify_all();
    }

    /// Hands a batch to the readers; false when nobody wants it any more.
    fn put(&self, batch: Batch) -> bool {
        let mut state = self.lock();
        while state.packed.len() >= BATCHES && !state.over {
            state = Self::wait(&self.room, state);
        }
        let number = state.first + state.packed.len() as u64;
        state.packed.push_back(None);
        state.found.push_back((number, batch));
        let over = state.over;
        drop(state);
        self.found.notify_one();
        !over
    }

    /// A reading thread.
    pub(crate) fn read(&self, tells: bool, skip_unreadable: bool) {
        let _panic = Over { pipeline: self, always: false };
        let mut reader = Reader::new(tells);
        let mut state = self.lock();
        loop {
            if state.over {
                break;
            }
            let Some((number, batch)) = state.found.pop_front() else {
                if state.walked.is_some() {
                    break;
                }
                state = Self::wait(&self.found, state);
                continue;
            };
            let buffer = state.buffers.pop().unwrap_or_default();
            drop(state);
            let packed = reader.batch(&batch, buffer, skip_unreadable);
            state = self.lock();
            // Numbers below the first have been written, which only those that are packed can be.
            let place = usize::try_from(number - state.first).unwrap_or(usize::MAX);
            if let Some(slot) = state.packed.get_mut(place) {
                *slot = Some((batch, packed));
            }
            if place == 0 {
                self.packed.notify_one();
            }
        }
    }

    /// The next batch of the stream; none after the last.
    ///
    /// # Errors
    /// What ended the walk, when all before that has been taken.
    pub(crate) fn next(&self) -> Result<Option<(Batch, Packed)>, PackError> {
        let mut state = self.lock();
        loop {
            if let Some(done) = state.packed.front_mut().and_then(Option::take) {
                state.packed.pop_front();
                state.first += 1;
                drop(state);
                self.room.notify_one();
                return Ok(Some(done));
            }
            if state.over {
                // A thread ended by a panic, which goes on where the threads are joined.
                return Ok(None);
            }
            if state.packed.is_empty()
                && let Some(walked) = state.walked.take()
            {
                return walked.map(|()| None);
            }
            state = Self::wait(&self.packed, state);
        }
    }

    /// Takes back what was written.
    pub(crate) fn done(&self, mut batch: Batch, mut buffer: Vec<u8>) {
        batch.clear();
        buffer.clear();
        let mut state = self.lock();
        state.batches.push(batch);
        if buffer.capacity() <= KEPT {
            state.buffers.push(buffer);
        }
    }
}
