//! The head's side: bytes in, chunks out. Chunks are compressed and sealed on several threads, stay in order, and go into
//! the store from which the server's links send. A feeder that is dropped without [`Feeder::finish`] tells the chain
//! that the stream was given up; it can never look like a success.

use crate::buffer::{Buffer, Pool};
use crate::chunk::{Kind, Sealed, TAG};
use crate::seal::{Seal, Wave};
use crate::sign::{self, GROUP, Hash, Signer};
use crate::store::Store;
use crate::stream::{EndRecord, Part, Tally};
use crate::{CHUNK, Error};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Off,
    /// With zstd at this level (1 to 19).
    Level(i32),
}

/// After so many chunks in a row that did not shrink, only every sixteenth is tried.
const PATIENCE: u32 = 8;

struct Job {
    kind: Kind,
    number: u64,
    plain: Buffer,
    done: SyncSender<Result<Made, Error>>,
}

/// A sealed chunk, and its hash when it is to be signed.
type Made = (Sealed, Option<Hash>);

/// Takes the stream's bytes and gives them to the chain.
pub struct Feeder {
    seal: Arc<Seal>,
    pool: Pool,
    signs: bool,
    jobs: Option<SyncSender<Job>>,
    order: Option<SyncSender<Receiver<Result<Made, Error>>>>,
    workers: Vec<JoinHandle<()>>,
    pusher: Option<JoinHandle<Result<Pusher, Error>>>,
    buffer: Buffer,
    next: u64,
    /// Chunks since the last list.
    grouped: usize,
    plain: Arc<AtomicU64>,
    finished: bool,
}

impl std::fmt::Debug for Feeder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feeder").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Feeder {
    /// A feeder of `store` with `threads` compressing threads. With a `signer` lists go into the stream.
    #[must_use]
    pub fn new(
        wave: &Wave,
        store: Arc<Store>,
        signer: Option<Arc<Signer>>,
        compression: Compression,
        threads: usize,
    ) -> Self {
        let seal = Arc::new(Seal::new(wave));
        let threads = threads.clamp(1, 64);
        let pool = Pool::new((threads * 4 + 16) * (CHUNK + TAG));
        let (jobs, queue) = sync_channel::<Job>(threads);
        let queue = Arc::new(Mutex::new(queue));
        let stubborn = Arc::new(AtomicU32::new(0));
        let signs = signer.is_some();
        let workers = (0..threads)
            .map(|_| {
                let (queue, seal, pool, stubborn) =
                    (Arc::clone(&queue), Arc::clone(&seal), pool.clone(), Arc::clone(&stubborn));
                std::thread::spawn(move || work(&queue, &seal, &pool, &stubborn, compression, signs))
            })
            .collect();
        let (order, ordered) = sync_channel(threads * 2);
        let pusher = Pusher {
            store,
            signer,
            seal: Arc::clone(&seal),
            pool: pool.clone(),
            tally: Tally::default(),
            group: Vec::with_capacity(GROUP),
        };
        let pusher = std::thread::spawn(move || pusher.run(&ordered));
        let buffer = pool.take(CHUNK + TAG);
        Self {
            seal,
            pool,
            signs,
            jobs: Some(jobs),
            order: Some(order),
            workers,
            pusher: Some(pusher),
            buffer,
            next: 0,
            grouped: 0,
            plain: Arc::default(),
            finished: false,
        }
    }

    /// A counter of the plain bytes taken so far.
    #[must_use]
    pub fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.plain)
    }

    /// Begins a part.
    ///
    /// # Errors
    /// When the chain has stopped.
    pub fn begin_part(&mut self, part: &Part) -> Result<(), Error> {
        self.dispatch(Kind::Data)?;
        let bytes =
            postcard::to_stdvec(part).map_err(|e| Error::Malformed(format!("writing a part: {e}")))?;
        if bytes.len() > CHUNK {
            return Err(Error::Malformed("the name of a part is too long".to_owned()));
        }
        self.buffer.extend_from_slice(&bytes);
        self.dispatch(Kind::Part)
    }

    /// Ends the stream with its end record, and returns that.
    ///
    /// # Errors
    /// When the chain has stopped.
    pub fn finish(mut self) -> Result<EndRecord, Error> {
        self.dispatch(Kind::Data)?;
        let pusher = self.drain()?;
        let record = pusher.tally.record();
        let bytes =
            postcard::to_stdvec(&record).map_err(|e| Error::Malformed(format!("writing the end: {e}")))?;
        self.push_last(pusher, Kind::End, &bytes)?;
        self.finished = true;
        Ok(record)
    }

    /// Gives the stream up: every node learns the reason and fails.
    pub fn give_up(mut self, reason: &str) {
        self.tell_given_up(reason);
    }

    fn tell_given_up(&mut self, reason: &str) {
        self.finished = true;
        let mut end = reason.len().min(4096);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let reason = &reason.as_bytes()[..end];
        if let Err(e) = self.drain().and_then(|pusher| self.push_last(pusher, Kind::GivenUp, reason)) {
            // The chain stopped before: its links are closed, and the nodes know from control.
            log::debug!("the chain could not be told that the stream was given up: {e}");
        }
    }

    fn push_last(&mut self, mut pusher: Pusher, kind: Kind, bytes: &[u8]) -> Result<(), Error> {
        let payload = self.pool.copy_of(bytes);
        let number = self.reserve();
        let sealed = self.seal.seal(kind, number, false, bytes.len(), payload)?;
        let hash = self.signs.then(|| sign::hash(&sealed));
        pusher.push((sealed, hash))?;
        pusher.flush()
    }

    /// The next chunk's number. A list that must go before it gets the number before.
    fn reserve(&mut self) -> u64 {
        if self.signs {
            self.next += u64::from(self.grouped == 0);
            self.grouped = (self.grouped + 1) % GROUP;
        }
        self.next += 1;
        self.next - 1
    }

    /// Waits until everything dispatched is in the store, or in the last group.
    fn drain(&mut self) -> Result<Pusher, Error> {
        self.jobs = None;
        self.order = None;
        let bad = || Error::Stopped("a thread of the feeder ended badly".to_owned());
        for worker in self.workers.drain(..) {
            worker.join().map_err(|_| bad())?;
        }
        self.pusher.take().ok_or_else(bad)?.join().map_err(|_| bad())?
    }

    fn dispatch(&mut self, kind: Kind) -> Result<(), Error> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let stopped = || Error::Stopped("the chain takes no more chunks".to_owned());
        let plain = std::mem::replace(&mut self.buffer, self.pool.take(CHUNK + TAG));
        let (done, receiver) = sync_channel(1);
        let job = Job { kind, number: self.reserve(), plain, done };
        self.order.as_ref().ok_or_else(stopped)?.send(receiver).map_err(|_| stopped())?;
        self.jobs.as_ref().ok_or_else(stopped)?.send(job).map_err(|_| stopped())
    }
}

impl Write for Feeder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..n]);
        self.plain.fetch_add(n as u64, Ordering::Relaxed);
        if self.buffer.len() == CHUNK {
            self.dispatch(Kind::Data)?;
        }
        Ok(n)
    }

    /// Does nothing: a short chunk is only made at the end of a part.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        if !self.finished {
            self.tell_given_up("the source ended without finishing");
        }
    }
}

fn work(
    queue: &Mutex<Receiver<Job>>,
    seal: &Seal,
    pool: &Pool,
    stubborn: &AtomicU32,
    compression: Compression,
    signs: bool,
) {
    let mut compressor = match compression {
        Compression::Off => None,
        Compression::Level(level) => zstd::bulk::Compressor::new(level)
            .inspect_err(|e| log::warn!("setting up zstd at level {level}: {e}; chunks go uncompressed"))
            .ok(),
    };
    let mut packed = pool.take_sized(CHUNK);
    loop {
        // The lock is held while waiting for a job; the other workers then wait for the lock instead of the channel.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { kind, number, plain, done }) = job else { return };
        let len = plain.len();
        let tries = stubborn.load(Ordering::Relaxed) < PATIENCE || number.is_multiple_of(16);
        let mut payload = None;
        if let (Kind::Data, true, Some(compressor)) = (kind, tries, compressor.as_mut()) {
            match compressor.compress_to_buffer(&plain[..], &mut packed[..len]) {
                // Shrinking by less than a sixty-fourth is not worth the node's time.
                Ok(n) if n < len - len / 64 => {
                    stubborn.store(0, Ordering::Relaxed);
                    // In a buffer of its own size: what is held is counted by what it occupies.
                    let mut fitting = pool.take(n + TAG);
                    fitting.extend_from_slice(&packed[..n]);
                    payload = Some(fitting);
                }
                // Too long for the buffer: it did not shrink.
                Ok(_) | Err(_) => {
                    stubborn.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let compressed = payload.is_some();
        let made = seal
            .seal(kind, number, compressed, len, payload.unwrap_or(plain))
            .map(|sealed| (signs.then(|| sign::hash(&sealed)), sealed))
            .map(|(hash, sealed)| (sealed, hash));
        // Nobody waits for it any more when the chain has stopped.
        if done.send(made).is_err() {
            return;
        }
    }
}

/// Puts the chunks into the store, in order, each group after its list.
struct Pusher {
    store: Arc<Store>,
    signer: Option<Arc<Signer>>,
    seal: Arc<Seal>,
    pool: Pool,
    tally: Tally,
    group: Vec<(Sealed, Hash)>,
}

impl Pusher {
    fn run(mut self, ordered: &Receiver<Receiver<Result<Made, Error>>>) -> Result<Self, Error> {
        while let Ok(next) = ordered.recv() {
            let made =
                next.recv().map_err(|_| Error::Stopped("a compressing thread ended badly".to_owned()))??;
            self.push(made)?;
        }
        Ok(self)
    }

    fn push(&mut self, (sealed, hash): Made) -> Result<(), Error> {
        if !matches!(sealed.header.kind, Kind::End | Kind::GivenUp) {
            self.tally.add(&sealed);
        }
        match hash {
            None => self.store.push(sealed),
            Some(hash) => {
                self.group.push((sealed, hash));
                if self.group.len() == GROUP { self.flush() } else { Ok(()) }
            }
        }
    }

    fn flush(&mut self) -> Result<(), Error> {
        let (Some(signer), Some((first, _))) = (&self.signer, self.group.first()) else { return Ok(()) };
        // `Feeder::reserve` has left a number before the first of the group.
        let number = first.header.number - 1;
        let hashes: Vec<Hash> = self.group.iter().map(|(_, hash)| *hash).collect();
        let list = signer.list(number, &hashes);
        let payload = self.pool.copy_of(&list);
        self.store.push(self.seal.seal(Kind::List, number, false, list.len(), payload)?)?;
        for (sealed, _) in self.group.drain(..) {
            self.store.push(sealed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sign::Checker;
    use crate::store::Cursor;
    use crate::stream::{PartKind, StreamReader};
    use proptest::prelude::*;
    use std::io::Read;

    fn part(name: &str) -> Part {
        Part { name: name.to_owned(), kind: PartKind::Tar }
    }

    fn pair(compression: Compression, signed: bool) -> (Feeder, StreamReader, Arc<Store>) {
        let wave = Wave::new([3; 16], 1).unwrap();
        let store = Store::new().unwrap();
        let reader =
            StreamReader::new(Cursor::new(&store), Arc::new(Seal::new(&wave)), Pool::new(1 << 20)).unwrap();
        let signer = signed.then(|| Arc::new(Signer::new(&wave).unwrap()));
        let checker = signer.as_ref().map(|signer| Checker::new(signer.public(), &wave));
        let (moving, seal) = (Arc::clone(&store), Seal::new(&wave));
        // What the relaying thread does, without a chain: from the source to the consumer.
        std::thread::spawn(move || {
            let (mut checker, pool) = (checker, Pool::new(1 << 20));
            for number in 0.. {
                let chunk = loop {
                    match (moving.take_incoming(), moving.stopped()) {
                        (Some(chunk), _) => break chunk,
                        (None, Some(_)) => return,
                        (None, None) => std::thread::sleep(std::time::Duration::from_millis(1)),
                    }
                };
                assert_eq!(chunk.header.number, number);
                let opened = seal.open(&chunk, &pool).unwrap();
                if let Some(checker) = &mut checker {
                    checker.check(&chunk, &opened).unwrap();
                }
                let last = matches!(chunk.header.kind, Kind::End | Kind::GivenUp);
                moving.append(Arc::new(chunk), Some(opened));
                if last {
                    return;
                }
            }
        });
        (Feeder::new(&wave, Arc::clone(&store), signer, compression, 3), reader, store)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn parts_come_out_as_they_went_in(
            sizes in proptest::collection::vec(0usize..3 * CHUNK, 0..4), level in 0i32..4, noise: bool, signed: bool
        ) {
            let compression = if level == 0 { Compression::Off } else { Compression::Level(level) };
            let (mut feeder, mut reader, _) = pair(compression, signed);
            let parts: Vec<Vec<u8>> = sizes.iter().map(|n| (0..*n as u64).map(|i|
                if noise { (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) as u8 } else { (i / 1000) as u8 }).collect()).collect();
            let expected = parts.clone();
            let writing = std::thread::spawn(move || {
                for (i, bytes) in parts.iter().enumerate() {
                    feeder.begin_part(&part(&i.to_string())).unwrap();
                    feeder.write_all(bytes).unwrap();
                }
                feeder.finish().unwrap()
            });
            for (i, bytes) in expected.iter().enumerate() {
                prop_assert_eq!(reader.next_part().unwrap(), Some(part(&i.to_string())));
                let mut read = Vec::new();
                reader.read_to_end(&mut read).unwrap();
                prop_assert!(read == *bytes);
            }
            prop_assert_eq!(reader.next_part().unwrap(), None);
            let record = writing.join().unwrap();
            prop_assert_eq!(record.bytes, expected.iter().map(Vec::len).sum::<usize>() as u64);
            prop_assert_eq!(record.parts as usize, expected.len());
        }
    }

    #[test]
    fn a_dropped_feeder_is_no_success() {
        let (mut feeder, mut reader, _) = pair(Compression::Off, true);
        feeder.begin_part(&part("/")).unwrap();
        feeder.write_all(b"half").unwrap();
        drop(feeder);
        assert!(reader.next_part().unwrap().is_some());
        let error = reader.read_to_end(&mut Vec::new()).unwrap_err().to_string();
        assert_eq!(error, "the server gave up: the source ended without finishing");
    }

    #[test]
    fn a_reason_reaches_the_reader() {
        let (feeder, mut reader, _) = pair(Compression::Off, false);
        feeder.give_up("tar ended with exit status 2");
        assert_eq!(
            reader.next_part().unwrap_err().to_string(),
            "the server gave up: tar ended with exit status 2"
        );
    }

    #[test]
    fn a_stopped_chain_stops_the_writer() {
        let (mut feeder, reader, store) = pair(Compression::Off, false);
        store.stop("no nodes");
        drop(reader);
        let error = feeder.write_all(&vec![1; 64 * CHUNK]).unwrap_err().to_string();
        assert!(error.contains("stopped"), "{error}");
    }
}
