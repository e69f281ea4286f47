//! Buffers that are used again, last in first out, so that the hot ones stay in the cache. A fresh 256 KiB allocation
//! for every chunk costs a system call and 64 page faults; measured, reuse makes a relay a third cheaper.
//!
//! Their bytes begin at a page. On AMD's Zen 3 and 4 a copy (`rep movs`, in the kernel and in musl alike) runs at a third of
//! its speed or less when the target lies 1 to 31 bytes behind the source modulo 4096, and that is where malloc puts
//! large blocks (16 bytes behind a page) while the kernel's network buffers begin at one: measured with a bare relay,
//! 8 receivers, 0.38 CPU-s/GB against 0.86.
//!
//! Sealed bytes and plain ones come from pools of their own: sockets are given the pages of the sealed ones instead of copies
//! ([`crate::sockets`]), and what is left in one of a link that died may still be sent when its buffer is taken again.

use crate::CHUNK;
use crate::chunk::TAG;
use ka_sys::pages::{PAGE, Pages};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Capacities are multiples of this, so that few sizes are kept.
const STEP: usize = 4 * PAGE;

/// A pool of byte buffers.
#[derive(Clone, Debug)]
pub struct Pool {
    free: Arc<Mutex<Free>>,
    /// Bytes of free buffers that are kept in any case.
    keep: usize,
    /// Bytes of buffers, free ones and others, up to which all are kept.
    total: usize,
}

/// Bytes of free buffers that a node keeps beside its window, of either kind.
const NODE_SPARE: usize = 16 * CHUNK;
/// Bytes of free sealed buffers that the head keeps beyond: what leaves its history comes in bursts, when nodes acknowledge.
const HEAD_SPARE: usize = 32 << 20;
/// Bytes of free plain buffers at the head: those between the source and the threads that seal are few.
const HEAD_PLAIN: usize = 32 * CHUNK;

/// Where sealed bytes and plain ones go: never into each other's buffers, see above.
#[derive(Clone, Debug)]
pub struct Pools {
    pub(crate) sealed: Pool,
    pub(crate) plain: Pool,
}

impl Pools {
    /// What a node with this window needs.
    #[must_use]
    pub fn of_node(window: usize) -> Self {
        Self { sealed: Pool::within(window, NODE_SPARE), plain: Pool::new(NODE_SPARE) }
    }

    /// What the head needs that holds so many bytes, window and history.
    #[must_use]
    pub fn of_head(held: usize) -> Self {
        Self { sealed: Pool::within(held, HEAD_SPARE), plain: Pool::new(HEAD_PLAIN) }
    }

    /// Gets the memory for all that these pools keep in any case: better while nodes are waited for than while they wait.
    pub fn fill(&self) {
        self.sealed.fill(CHUNK + TAG, self.sealed.total);
        self.plain.fill(CHUNK, self.plain.keep);
    }
}

#[derive(Debug, Default)]
struct Free {
    /// By capacity: the `n`th list has those of `n` times [`STEP`].
    lists: Vec<Vec<Pages>>,
    bytes: usize,
    /// Bytes of the buffers that are in use.
    used: usize,
}

impl Free {
    /// Takes out big buffers until no more are free than may be.
    fn shed(&mut self, keep: usize, total: usize) -> Vec<Pages> {
        let mut shed = Vec::new();
        while self.bytes > keep && self.bytes + self.used > total {
            let Some(memory) = self.lists.iter_mut().rev().find_map(Vec::pop) else { break };
            self.bytes -= memory.len();
            shed.push(memory);
        }
        shed
    }
}

impl Pool {
    /// A pool that keeps at most `keep` bytes of free buffers.
    #[must_use]
    pub fn new(keep: usize) -> Self {
        Self::within(0, keep)
    }

    /// A pool that keeps every buffer as long as all together, free ones and others, have at most `total` bytes, and
    /// `keep` bytes of free ones beyond. What is in use may rise and fall by much from one moment to the next, as a window
    /// does: memory that went back to the system would come again page by page.
    #[must_use]
    pub fn within(total: usize, keep: usize) -> Self {
        Self { free: Arc::default(), keep, total }
    }

    /// Adds free buffers of this capacity until all together have `bytes`.
    fn fill(&self, capacity: usize, bytes: usize) {
        let size = capacity.div_ceil(STEP).max(1) * STEP;
        loop {
            let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            if free.bytes + free.used + size > bytes {
                return;
            }
            drop(free);
            let memory = Pages::new(size);
            self.put(memory, 0);
        }
    }

    /// A buffer of which so many bytes counted as used is free, if it is to be kept.
    fn put(&self, memory: Pages, used: usize) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.used -= used;
        let bytes = free.bytes + memory.len();
        if bytes > self.keep && bytes + free.used > self.total {
            // Given back to the system without the lock.
            drop(free);
            return drop(memory);
        }
        let steps = memory.len() / STEP;
        if free.lists.len() <= steps {
            free.lists.resize_with(steps + 1, Vec::new);
        }
        free.bytes = bytes;
        free.lists[steps].push(memory);
    }

    /// An empty buffer in which `capacity` bytes have room.
    #[must_use]
    pub fn take(&self, capacity: usize) -> Buffer {
        let steps = capacity.div_ceil(STEP).max(1);
        let (kept, shed) = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = free.lists.get_mut(steps).and_then(Vec::pop);
            free.bytes -= kept.as_ref().map_or(0, |memory| memory.len());
            free.used += steps * STEP;
            let shed = if kept.is_none() { free.shed(self.keep, self.total) } else { Vec::new() };
            (kept, shed)
        };
        // Given back to the system without the lock.
        drop(shed);
        Buffer { memory: kept.unwrap_or_else(|| Pages::new(steps * STEP)), len: 0, pool: self.clone() }
    }

    /// A buffer of `len` bytes whose content is whatever it was: it is to be read into. Filling 256 KiB with zeros for each
    /// chunk would cost as much as copying it.
    #[must_use]
    pub fn take_sized(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.len = len;
        buffer
    }

    /// A buffer that holds these bytes.
    #[must_use]
    pub fn copy_of(&self, bytes: &[u8]) -> Buffer {
        let mut buffer = self.take_sized(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

/// A buffer that goes back to its pool when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Pages,
    len: usize,
    pool: Pool,
}

impl Buffer {
    /// How many bytes have room.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.memory.len()
    }

    /// Forgets what follows the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The free bytes behind the content, to be written to; [`Buffer::grown`] makes them content.
    pub fn spare(&mut self) -> &mut [u8] {
        &mut self.memory[self.len..]
    }

    /// `more` bytes of [`Buffer::spare`] are content now.
    pub fn grown(&mut self, more: usize) {
        self.len = (self.len + more).min(self.memory.len());
    }

    /// Adds these bytes, in a bigger buffer if they have no room.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        if bytes.len() > self.capacity() - self.len {
            let mut bigger = self.pool.take(self.len + bytes.len());
            bigger.extend_from_slice(self);
            *self = bigger;
        }
        self.spare()[..bytes.len()].copy_from_slice(bytes);
        self.grown(bytes.len());
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let used = memory.len();
        self.pool.put(memory, used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_back_is_the_first_one_out_and_the_pool_is_bounded() {
        let pool = Pool::new(3 * STEP);
        let (mut a, mut b, c) = (pool.take(10), pool.take(STEP), pool.take(STEP + 1));
        a.extend_from_slice(b"a");
        b.extend_from_slice(b"b");
        drop(a);
        drop(b);
        // Two steps long: it has no room beside the others.
        drop(c);
        let again = pool.take_sized(1);
        assert_eq!(&again[..], b"b");
        assert_eq!(&pool.take_sized(1)[..], b"a");
        assert_eq!(&pool.take_sized(STEP + 1)[..2], [0, 0]);
        drop(again);
        let free = pool.free.lock().unwrap();
        assert_eq!(free.bytes, free.lists.iter().flatten().map(|m| m.len()).sum::<usize>());
    }

    #[test]
    fn a_pool_keeps_all_up_to_its_total_and_sheds_other_sizes_beyond() {
        let pool = Pool::within(10 * STEP, 2 * STEP);
        let state = || {
            let free = pool.free.lock().unwrap();
            (free.bytes / STEP, free.used / STEP)
        };
        let many: Vec<Buffer> = (0..12).map(|_| pool.take(STEP)).collect();
        assert_eq!(state(), (0, 12));
        drop(many);
        // Two went back to the system: ten are kept.
        assert_eq!(state(), (10, 0));
        let other = pool.take(5 * STEP);
        assert_eq!(state(), (5, 5));
        let more = pool.take(6 * STEP);
        assert_eq!(state(), (2, 11));
        drop(other);
        drop(more);
        assert_eq!(state(), (8, 0));
    }

    #[test]
    fn what_is_filled_before_is_what_is_taken_and_no_more_is_kept() {
        let pools = Pools::of_node(20 * (CHUNK + STEP));
        pools.fill();
        let state = || {
            let free = pools.sealed.free.lock().unwrap();
            (free.bytes / (CHUNK + STEP), free.used)
        };
        assert_eq!(state(), (20, 0));
        pools.fill();
        assert_eq!(state(), (20, 0));
        let taken: Vec<Buffer> = (0..3).map(|_| pools.sealed.take(CHUNK + TAG)).collect();
        assert_eq!(state(), (17, 3 * (CHUNK + STEP)));
        pools.fill();
        assert_eq!(state().0, 17);
        drop(taken);
        assert_eq!(state(), (20, 0));
        assert_eq!(pools.plain.free.lock().unwrap().bytes, NODE_SPARE);
    }

    #[test]
    fn bytes_begin_at_a_page_and_grow_beyond_their_room() {
        let pool = Pool::new(1 << 20);
        let mut buffer = pool.take(5);
        for n in 0..10u8 {
            assert_eq!(buffer.as_ptr().align_offset(PAGE), 0);
            buffer.extend_from_slice(&vec![n; 3000]);
        }
        assert_eq!(buffer.len(), 30_000);
        assert!(buffer.chunks(3000).enumerate().all(|(n, part)| part.iter().all(|b| usize::from(*b) == n)));
        let (len, room) = (buffer.len(), buffer.capacity());
        assert_eq!(buffer.spare().len(), room - len);
        buffer.grown(room);
        assert_eq!(buffer.len(), room);
        buffer.truncate(7);
        assert_eq!(&pool.copy_of(&buffer)[..], [0; 7]);
    }
}
