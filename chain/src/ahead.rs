//! The consumer's chunks, opened and decompressed on several threads, in order. A few chunks are taken from the store ahead
//! of the consumer; the compressed ones among them go to threads of their own, and the consumer lends a hand while it waits.
//!
//! Chunks that are not compressed cost what they cost without this: as long as none is under way that is compressed, nothing
//! is taken ahead, nobody is woken, and nothing is copied. (One whose opened copy was not kept is then opened by the
//! consumer: that is quicker than the relaying thread, which opened it before.) With one processor there are no threads.
//!
//! A chunk counts as consumed when the consumer gets it, not when it is taken ahead: until then the window holds it. Beside
//! the window there are [`Ahead::depth`] chunks at most (2 MiB of plain bytes at 8), and one opened copy for each thread.

use crate::Error;
use crate::buffer::{Buffer, Pool};
use crate::chunk::{Header, Kind};
use crate::seal::Seal;
use crate::store::{Cursor, Taken};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// More threads than this are of no use: two decompress more than a 10 Gbit/s link brings.
const THREADS: usize = 4;

/// How many threads a node decompresses with, its consumer's own among them.
#[must_use]
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(THREADS)
}

/// Makes of a chunk what its reader wants: the plain bytes of a data chunk, the payload of another.
struct Opener {
    seal: Arc<Seal>,
    pool: Pool,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Opener {
    fn new(seal: Arc<Seal>, pool: Pool) -> Result<Self, Error> {
        let decompressor = zstd::bulk::Decompressor::new().map_err(Error::io("setting up zstd"))?;
        Ok(Self { seal, pool, decompressor })
    }

    fn open(&mut self, (sealed, opened): Taken) -> Result<Buffer, Error> {
        let payload = match opened {
            Some(opened) => opened,
            None => self.seal.open(&sealed, &self.pool)?,
        };
        let Header { kind, compressed, number, plain, .. } = sealed.header;
        if kind != Kind::Data {
            return Ok(payload);
        }
        let plain = plain as usize;
        let bytes = if compressed {
            let mut bytes = self.pool.take_sized(plain);
            let len = self
                .decompressor
                .decompress_to_buffer(&payload, &mut bytes[..])
                .map_err(Error::io(format!("decompressing chunk {number}")))?;
            bytes.truncate(len);
            bytes
        } else {
            payload
        };
        if bytes.len() != plain {
            return Err(Error::Malformed(format!("chunk {number} has {} bytes, not {plain}", bytes.len())));
        }
        Ok(bytes)
    }
}

type Opened = Result<Buffer, Error>;

struct Job {
    chunk: Taken,
    done: SyncSender<Opened>,
}

impl Job {
    fn run(self, opener: &mut Opener) {
        // Nobody waits for it any more when the reader is gone.
        let _ = self.done.send(opener.open(self.chunk));
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads that wait for one.
    idle: usize,
    closed: bool,
}

/// What the threads and the consumer share.
#[derive(Default)]
struct Jobs {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Every critical section leaves the queue whole, so a panic elsewhere does not spoil it.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, job: Job) {
        let mut queue = self.lock();
        queue.jobs.push_back(job);
        let wake = queue.idle > 0;
        drop(queue);
        if wake {
            self.arrived.notify_one();
        }
    }

    /// The oldest job that nobody has begun.
    fn take(&self) -> Option<Job> {
        self.lock().jobs.pop_front()
    }

    /// The same, waiting for one; `None` when the reader is gone.
    fn wait(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue.idle += 1;
            queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    fn close(&self) {
        let mut queue = self.lock();
        queue.closed = true;
        let left = std::mem::take(&mut queue.jobs);
        drop(queue);
        drop(left);
        self.arrived.notify_all();
    }
}

/// A chunk taken ahead.
enum State {
    /// Nothing is to be done but what costs nothing.
    Easy(Taken),
    /// A thread has it, or will.
    Handed(Receiver<Opened>),
}

/// The consumer's view of the store: chunks in order, opened and decompressed.
pub(crate) struct Ahead {
    cursor: Cursor,
    opener: Opener,
    jobs: Arc<Jobs>,
    /// The consumer's own among them.
    threads: usize,
    workers: Vec<JoinHandle<()>>,
    queue: VecDeque<(Header, State)>,
}

impl Ahead {
    /// Over what `cursor` gives, on so many threads; they start when they are needed.
    ///
    /// # Errors
    /// When zstd cannot be set up.
    pub(crate) fn new(cursor: Cursor, seal: Arc<Seal>, pool: Pool, threads: usize) -> Result<Self, Error> {
        let opener = Opener::new(seal, pool)?;
        let threads = threads.clamp(1, THREADS);
        let (jobs, queue) = (Arc::default(), VecDeque::with_capacity(threads * 2));
        Ok(Self { cursor, opener, jobs, threads, workers: Vec::new(), queue })
    }

    /// Chunks that are taken ahead at most.
    fn depth(&self) -> usize {
        self.threads * 2
    }

    /// The next chunk's header and its bytes, waiting for it; `None` after the last. It counts as consumed.
    ///
    /// # Errors
    /// [`Error::Stopped`] when the store was stopped; else what is wrong with this chunk, those before it having been given.
    pub(crate) fn next(&mut self) -> Result<Option<(Header, Buffer)>, Error> {
        let Some((header, state)) = self.queue.pop_front() else {
            let Some(chunk) = self.cursor.take()? else { return Ok(None) };
            let header = chunk.0.header;
            if is_work(&header) {
                // Those behind it are begun by others before this one is done here.
                self.look_ahead()?;
            }
            self.cursor.consumed(header.number)?;
            return Ok(Some((header, self.opener.open(chunk)?)));
        };
        let work = is_work(&header) || self.queue.iter().any(|(header, _)| is_work(header));
        if work && self.queue.len() <= self.threads {
            self.look_ahead()?;
        }
        let bytes = match state {
            State::Easy(chunk) => self.opener.open(chunk),
            State::Handed(done) => self.wait_for(&done),
        };
        self.cursor.consumed(header.number)?;
        Ok(Some((header, bytes?)))
    }

    /// Takes what is there, and hands over what is work.
    fn look_ahead(&mut self) -> Result<(), Error> {
        if self.threads == 1 {
            return Ok(());
        }
        while self.queue.len() < self.depth() {
            let Some(chunk) = self.cursor.try_take()? else { break };
            let header = chunk.0.header;
            // The threads are awake: they also open what nobody kept an opened copy of.
            let state = if (is_work(&header) || chunk.1.is_none()) && self.has_workers() {
                let (done, receiver) = sync_channel(1);
                self.jobs.push(Job { chunk, done });
                State::Handed(receiver)
            } else {
                State::Easy(chunk)
            };
            self.queue.push_back((header, state));
        }
        Ok(())
    }

    /// Starts the threads when they are wanted for the first time. Without them the consumer does everything.
    fn has_workers(&mut self) -> bool {
        while self.workers.len() + 1 < self.threads {
            let jobs = Arc::clone(&self.jobs);
            let started = Opener::new(Arc::clone(&self.opener.seal), self.opener.pool.clone()).and_then(
                |mut opener| {
                    let work = move || {
                        while let Some(job) = jobs.wait() {
                            job.run(&mut opener);
                        }
                    };
                    std::thread::Builder::new()
                        .name("decompress".into())
                        .spawn(work)
                        .map_err(Error::io("starting a decompressing thread"))
                },
            );
            match started {
                Ok(worker) => self.workers.push(worker),
                Err(e) => {
                    log::warn!("{e}; there are {} beside the consumer's own", self.workers.len());
                    self.threads = self.workers.len() + 1;
                }
            }
        }
        !self.workers.is_empty()
    }

    /// Waits for what was handed over, and does meanwhile what nobody has begun: the oldest, so perhaps this very one.
    fn wait_for(&mut self, done: &Receiver<Opened>) -> Opened {
        let bad = || Error::Stopped("a decompressing thread ended badly".to_owned());
        loop {
            match done.try_recv() {
                Ok(opened) => return opened,
                Err(TryRecvError::Disconnected) => return Err(bad()),
                Err(TryRecvError::Empty) => {}
            }
            match self.jobs.take() {
                Some(job) => job.run(&mut self.opener),
                None => return done.recv().map_err(|_| bad())?,
            }
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.jobs.close();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                log::error!("a decompressing thread ended badly");
            }
        }
    }
}

/// Whether a thread of its own is worth it.
fn is_work(header: &Header) -> bool {
    header.kind == Kind::Data && header.compressed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CHUNK;
    use crate::seal::Wave;
    use crate::store::Store;
    use std::time::Duration;

    struct Lab {
        store: Arc<Store>,
        seal: Arc<Seal>,
        pool: Pool,
        next: u64,
    }

    impl Lab {
        fn new() -> Self {
            let seal = Arc::new(Seal::new(&Wave::new([3; 16], 1).unwrap()));
            Self { store: Store::new().unwrap(), seal, pool: Pool::new(1 << 20), next: 0 }
        }

        fn ahead(&self, threads: usize) -> Ahead {
            let cursor = Cursor::new(&self.store);
            Ahead::new(cursor, Arc::clone(&self.seal), self.pool.clone(), threads).unwrap()
        }

        /// Appends a chunk as the relaying thread does.
        fn append(&mut self, kind: Kind, compressed: bool, plain: usize, payload: &[u8]) {
            let sealed = self.seal.seal(kind, self.next, compressed, plain, payload, &self.pool).unwrap();
            let opened = self.seal.open(&sealed, &self.pool).unwrap();
            self.next += 1;
            self.store.append(Arc::new(sealed), Some(opened));
        }

        /// A chunk of so many bytes, all of them its number.
        fn packed(&mut self, plain: usize) {
            let bytes = vec![self.next as u8; plain];
            let packed = zstd::bulk::compress(&bytes, 1).unwrap();
            self.append(Kind::Data, true, plain, &packed);
        }

        fn plain(&mut self) {
            self.append(Kind::Data, false, 100, &[self.next as u8; 100]);
        }
    }

    #[test]
    fn chunks_come_in_order_and_count_when_they_are_given() {
        for threads in 1..=4 {
            let mut lab = Lab::new();
            for n in 0..60 {
                if n % 3 == 1 { lab.plain() } else { lab.packed(1000 + n) }
            }
            lab.append(Kind::End, false, 3, b"end");
            let mut ahead = lab.ahead(threads);
            for number in 0..60 {
                let (header, bytes) = ahead.next().unwrap().unwrap();
                assert_eq!(header.number, number);
                assert!(
                    bytes.len() == header.plain as usize && bytes.iter().all(|b| u64::from(*b) == number)
                );
                assert_eq!(lab.store.consumed(), (number + 1, false));
                assert!(ahead.queue.len() <= ahead.depth());
            }
            assert_eq!(&ahead.next().unwrap().unwrap().1[..], b"end");
            assert!(ahead.next().unwrap().is_none());
            assert_eq!(ahead.workers.len(), threads - 1);
        }
    }

    #[test]
    fn plain_chunks_take_no_thread_and_nothing_ahead() {
        let mut lab = Lab::new();
        // More than have their opened copies kept.
        (0..40).for_each(|_| lab.plain());
        let mut ahead = lab.ahead(4);
        for _ in 0..40 {
            assert!(ahead.next().unwrap().is_some());
            assert!(ahead.queue.is_empty() && ahead.workers.is_empty());
        }
        // After some that are compressed it is soon so again.
        (0..9).for_each(|_| lab.packed(CHUNK));
        (0..40).for_each(|_| lab.plain());
        for _ in 0..9 + ahead.depth() {
            assert!(ahead.next().unwrap().is_some());
        }
        for _ in ahead.depth()..40 {
            assert!(ahead.queue.is_empty());
            assert!(ahead.next().unwrap().is_some());
        }
    }

    #[test]
    fn an_error_comes_where_it_belongs_and_what_was_before_it_is_given() {
        for threads in 1..=4 {
            let mut lab = Lab::new();
            (0..5).for_each(|_| lab.packed(CHUNK));
            lab.append(Kind::Data, true, CHUNK, b"this is no zstd at all");
            let short = zstd::bulk::compress(&[1; 70], 1).unwrap();
            lab.append(Kind::Data, true, 80, &short);
            lab.plain();
            let mut ahead = lab.ahead(threads);
            for number in 0..5 {
                assert_eq!(ahead.next().unwrap().unwrap().0.number, number);
            }
            let error = ahead.next().unwrap_err().to_string();
            assert!(error.starts_with("decompressing chunk 5"), "{error}");
            let error = ahead.next().unwrap_err().to_string();
            assert!(error.contains("chunk 6 has 70 bytes, not 80"), "{error}");
            assert_eq!(ahead.next().unwrap().unwrap().0.number, 7);
        }
    }

    #[test]
    fn a_stop_counts_though_chunks_were_taken_ahead() {
        let mut lab = Lab::new();
        (0..8).for_each(|_| lab.packed(CHUNK));
        let mut ahead = lab.ahead(4);
        assert!(ahead.next().unwrap().is_some());
        assert!(!ahead.queue.is_empty());
        lab.store.stop("enough");
        assert!(matches!(ahead.next(), Err(Error::Stopped(reason)) if reason == "enough"));
    }

    #[test]
    fn a_stop_wakes_a_reader_that_waits_for_a_chunk() {
        let mut lab = Lab::new();
        (0..3).for_each(|_| lab.packed(CHUNK));
        let mut ahead = lab.ahead(2);
        let reading = std::thread::spawn(move || {
            loop {
                if let Err(e) = ahead.next() {
                    return e;
                }
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        lab.store.stop("enough");
        assert!(matches!(reading.join().unwrap(), Error::Stopped(_)));
    }

    #[test]
    fn a_reader_dropped_in_mid_stream_takes_its_threads_along() {
        for _ in 0..20 {
            let mut lab = Lab::new();
            (0..16).for_each(|_| lab.packed(CHUNK));
            let mut ahead = lab.ahead(4);
            assert!(ahead.next().unwrap().is_some());
            assert_eq!(ahead.workers.len(), 3);
            drop(ahead);
            // Each thread had it too.
            assert_eq!(Arc::strong_count(&lab.seal), 1);
            assert!(lab.store.consumed().1, "the node goes on as a relay");
        }
    }
}
