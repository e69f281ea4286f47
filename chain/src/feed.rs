//! The head's side: bytes in, chunks out. Chunks are compressed and sealed on several threads, stay in order, and go into
//! the store from which the server's links send. A feeder that is dropped without [`Feeder::finish`] tells the chain
//! that the stream was given up; it can never look like a success.

use crate::buffer::{Buffer, Pool, Pools};
use crate::chunk::{Header, Kind, Sealed};
use crate::core::level::{Chooser, Level, Work};
use crate::seal::{Seal, Wave};
use crate::sign::{GROUP, Hash, Hashing, Signer};
use crate::store::Store;
use crate::stream::{EndRecord, Part, Tally};
use crate::{CHUNK, Error};
use std::io::{self, Write};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Off,
    /// With zstd at this level (1 to 19).
    Level(i32),
    /// As [`crate::core::level`] chooses, over [`Feeder::dial`].
    Auto,
}

/// What the compressing threads share with whoever chooses their level.
#[derive(Debug)]
pub struct Dial {
    level: AtomicI32,
    threads: u32,
    /// Nanoseconds.
    time: AtomicU64,
    plain: AtomicU64,
    packed: AtomicU64,
}

/// Stands for [`Level::Plain`]; zstd has no such level.
const PLAIN: i32 = i32::MIN;

impl Dial {
    fn new(compression: Compression, threads: usize) -> Self {
        let dial = Self {
            level: AtomicI32::new(PLAIN),
            threads: u32::try_from(threads).unwrap_or(u32::MAX),
            time: AtomicU64::new(0),
            plain: AtomicU64::new(0),
            packed: AtomicU64::new(0),
        };
        dial.set(match compression {
            Compression::Off => Level::Plain,
            Compression::Level(level) => Level::Zstd(level),
            Compression::Auto => Chooser::FIRST,
        });
        dial
    }

    /// Chunks that are begun from now on are compressed like this.
    pub fn set(&self, level: Level) {
        let level = match level {
            Level::Plain => PLAIN,
            Level::Zstd(level) => level,
        };
        self.level.store(level, Ordering::Relaxed);
    }

    /// How chunks are compressed.
    #[must_use]
    pub fn level(&self) -> Level {
        match self.level.load(Ordering::Relaxed) {
            PLAIN => Level::Plain,
            level => Level::Zstd(level),
        }
    }

    /// What the threads have done so far.
    #[must_use]
    pub fn work(&self) -> Work {
        Work {
            threads: self.threads,
            time: Duration::from_nanos(self.time.load(Ordering::Relaxed)),
            plain: self.plain.load(Ordering::Relaxed),
            packed: self.packed.load(Ordering::Relaxed),
        }
    }

    fn worked(&self, since: Instant, plain: usize, packed: usize) {
        let time = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.time.fetch_add(time, Ordering::Relaxed);
        self.plain.fetch_add(plain as u64, Ordering::Relaxed);
        self.packed.fetch_add(packed as u64, Ordering::Relaxed);
    }
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
    pools: Pools,
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
    dial: Arc<Dial>,
    finished: bool,
}

impl std::fmt::Debug for Feeder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feeder").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Feeder {
    /// A feeder of `store`, from `pools`, with `threads` compressing threads. With a `signer` lists go into the stream.
    #[must_use]
    pub fn new(
        wave: &Wave,
        store: Arc<Store>,
        pools: Pools,
        signer: Option<Arc<Signer>>,
        compression: Compression,
        threads: usize,
    ) -> Self {
        let seal = Arc::new(Seal::new(wave));
        let threads = threads.clamp(1, 64);
        let (jobs, queue) = sync_channel::<Job>(threads);
        let queue = Arc::new(Mutex::new(queue));
        let stubborn = Arc::new(AtomicU32::new(0));
        let dial = Arc::new(Dial::new(compression, threads));
        let signs = signer.is_some();
        let workers = (0..threads)
            .map(|_| {
                let (seal, stubborn, dial) = (Arc::clone(&seal), Arc::clone(&stubborn), Arc::clone(&dial));
                let (queue, pools) = (Arc::clone(&queue), pools.clone());
                std::thread::spawn(move || work(&queue, &seal, &pools, &stubborn, &dial, signs))
            })
            .collect();
        let (order, ordered) = sync_channel(threads * 2);
        let pusher = Pusher {
            store,
            signer,
            seal: Arc::clone(&seal),
            pool: pools.sealed.clone(),
            tally: Tally::default(),
            group: Vec::with_capacity(GROUP),
        };
        let pusher = std::thread::spawn(move || pusher.run(&ordered));
        let buffer = pools.plain.take(CHUNK);
        Self {
            seal,
            pools,
            signs,
            jobs: Some(jobs),
            order: Some(order),
            workers,
            pusher: Some(pusher),
            buffer,
            next: 0,
            grouped: 0,
            plain: Arc::default(),
            dial,
            finished: false,
        }
    }

    /// A counter of the plain bytes taken so far.
    #[must_use]
    pub fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.plain)
    }

    /// Where the level is chosen, while the stream flows.
    #[must_use]
    pub fn dial(&self) -> Arc<Dial> {
        Arc::clone(&self.dial)
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
        let number = self.reserve();
        let header = Header::new(kind, number, false, bytes.len(), bytes.len())?;
        pusher.push(make(&self.seal, header, bytes, &self.pools.sealed, self.signs)?)?;
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

    /// Where the stream's next bytes go, never empty: what can be read there needs no copy. [`Feeder::filled`] takes them.
    pub fn space(&mut self) -> &mut [u8] {
        let room = CHUNK - self.buffer.len();
        &mut self.buffer.spare()[..room]
    }

    /// Takes the first `n` bytes of [`Feeder::space`].
    ///
    /// # Errors
    /// When the chain has stopped.
    pub fn filled(&mut self, n: usize) -> Result<(), Error> {
        let n = n.min(CHUNK - self.buffer.len());
        self.buffer.grown(n);
        self.plain.fetch_add(n as u64, Ordering::Relaxed);
        if self.buffer.len() == CHUNK { self.dispatch(Kind::Data) } else { Ok(()) }
    }

    fn dispatch(&mut self, kind: Kind) -> Result<(), Error> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let stopped = || Error::Stopped("the chain takes no more chunks".to_owned());
        let plain = std::mem::replace(&mut self.buffer, self.pools.plain.take(CHUNK));
        let (done, receiver) = sync_channel(1);
        let job = Job { kind, number: self.reserve(), plain, done };
        self.order.as_ref().ok_or_else(stopped)?.send(receiver).map_err(|_| stopped())?;
        self.jobs.as_ref().ok_or_else(stopped)?.send(job).map_err(|_| stopped())
    }
}

impl Write for Feeder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let space = self.space();
        let n = bytes.len().min(space.len());
        space[..n].copy_from_slice(&bytes[..n]);
        self.filled(n)?;
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

/// A thread's compressor, at the level in force when it was last wanted.
#[derive(Default)]
struct Packer(Option<(i32, Option<zstd::bulk::Compressor<'static>>)>);

impl Packer {
    /// None when nothing is compressed.
    fn at(&mut self, level: Level) -> Option<&mut zstd::bulk::Compressor<'static>> {
        let Level::Zstd(level) = level else { return None };
        if self.0.as_ref().is_none_or(|(known, _)| *known != level) {
            let compressor = zstd::bulk::Compressor::new(level)
                .inspect_err(|e| log::warn!("setting up zstd at level {level}: {e}; chunks go uncompressed"));
            self.0 = Some((level, compressor.ok()));
        }
        self.0.as_mut()?.1.as_mut()
    }
}

/// Seals a chunk, and hashes it when lists are signed.
fn make(seal: &Seal, header: Header, payload: &[u8], pool: &Pool, signs: bool) -> Result<Made, Error> {
    let mut hashing = signs.then(Hashing::default);
    let sealed = seal.seal_pieces(header, payload, pool, |piece| {
        if let Some(hashing) = &mut hashing {
            hashing.update(piece);
        }
    })?;
    Ok((sealed, hashing.map(|hashing| hashing.finish(&header))))
}

fn work(
    queue: &Mutex<Receiver<Job>>,
    seal: &Seal,
    pools: &Pools,
    stubborn: &AtomicU32,
    dial: &Dial,
    signs: bool,
) {
    let mut packer = Packer::default();
    let mut packed = pools.plain.take_sized(CHUNK);
    loop {
        // The lock is held while waiting for a job; the other workers then wait for the lock instead of the channel.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { kind, number, plain, done }) = job else { return };
        let (begun, len) = (Instant::now(), plain.len());
        let tries = stubborn.load(Ordering::Relaxed) < PATIENCE || number.is_multiple_of(16);
        let mut payload = None;
        if let (Kind::Data, true, Some(compressor)) = (kind, tries, packer.at(dial.level())) {
            match compressor.compress_to_buffer(&plain[..], &mut packed[..len]) {
                // Shrinking by less than a sixty-fourth is not worth the node's time.
                Ok(n) if n < len - len / 64 => {
                    stubborn.store(0, Ordering::Relaxed);
                    payload = Some(&packed[..n]);
                }
                // Too long for the buffer: it did not shrink.
                Ok(_) | Err(_) => {
                    stubborn.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let compressed = payload.is_some();
        let payload = payload.unwrap_or(&plain);
        let packed_len = payload.len();
        let made = Header::new(kind, number, compressed, len, payload.len())
            .and_then(|header| make(seal, header, payload, &pools.sealed, signs));
        let counted = if kind == Kind::Data { (len, packed_len) } else { (0, 0) };
        dial.worked(begun, counted.0, counted.1);
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
        self.store.push(self.seal.seal(Kind::List, number, false, list.len(), &list, &self.pool)?)?;
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

    /// A byte that does not compress with its neighbours.
    fn noise(i: u64) -> u8 {
        let mixed = (i ^ (i >> 15)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        ((mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 33) as u8
    }

    fn part(name: &str) -> Part {
        Part { name: name.to_owned(), kind: PartKind::Tar }
    }

    fn pair(compression: Compression, signed: bool) -> (Feeder, StreamReader, Arc<Store>) {
        pair_on(compression, signed, 2)
    }

    /// A reader on so many threads.
    fn pair_on(compression: Compression, signed: bool, threads: usize) -> (Feeder, StreamReader, Arc<Store>) {
        let wave = Wave::new([3; 16], 1).unwrap();
        let store = Store::new().unwrap();
        let (seal, pool) = (Arc::new(Seal::new(&wave)), Pool::new(1 << 20));
        let reader = StreamReader::with_threads(Cursor::new(&store), seal, pool, threads).unwrap();
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
                    let mut hashing = Hashing::default();
                    hashing.update(&chunk.bytes);
                    checker.check(&chunk.header, &hashing.finish(&chunk.header), &opened).unwrap();
                }
                let last = matches!(chunk.header.kind, Kind::End | Kind::GivenUp);
                moving.append(Arc::new(chunk), Some(opened));
                if last {
                    return;
                }
            }
        });
        let pools = Pools::of_head(0);
        (Feeder::new(&wave, Arc::clone(&store), pools, signer, compression, 3), reader, store)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn parts_come_out_as_they_went_in(
            sizes in proptest::collection::vec(0usize..9 * CHUNK, 0..4), level in 0i32..4,
            noisy in 0u64..16, signed: bool, threads in 1usize..=4
        ) {
            let compression = match level {
                0 => Compression::Off,
                3 => Compression::Auto,
                level => Compression::Level(level),
            };
            let (mut feeder, mut reader, _) = pair_on(compression, signed, threads);
            // Each bit of `noisy` says whether a chunk is noise: none, some in between, or all.
            let parts: Vec<Vec<u8>> = sizes.iter().map(|n| (0..*n as u64).map(|i|
                if noisy >> (i / CHUNK as u64 % 4) & 1 == 1 { noise(i) } else { (i / 1000) as u8 }).collect()).collect();
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
    fn a_stream_whose_level_changes_reads_back_right() {
        let (mut feeder, mut reader, _) = pair(Compression::Auto, true);
        let dial = feeder.dial();
        assert_eq!(dial.level(), Level::Zstd(3));
        let plain: Vec<u8> = (0..70 * CHUNK as u64).map(|i| noise(i) % 7 + (i / 90_000) as u8).collect();
        let sent = plain.clone();
        let writing = std::thread::spawn(move || {
            feeder.begin_part(&part("/")).unwrap();
            let levels = [Level::Zstd(3), Level::Plain, Level::Zstd(-5), Level::Zstd(9), Level::Zstd(1)];
            let mut packed = Vec::new();
            for (bytes, level) in sent.chunks(14 * CHUNK).zip(levels) {
                feeder.dial().set(level);
                feeder.write_all(bytes).unwrap();
                packed.push(feeder.dial().work().packed);
            }
            feeder.finish().unwrap();
            packed
        });
        assert_eq!(reader.next_part().unwrap(), Some(part("/")));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read == plain);
        assert_eq!(reader.next_part().unwrap(), None);
        let packed = writing.join().unwrap();
        let work = dial.work();
        assert_eq!((work.threads, work.plain), (3, plain.len() as u64));
        assert!(work.time > Duration::ZERO);
        // The part that went plain is longer on the wire than any other, though the threads are a few chunks behind.
        let each: Vec<u64> = packed.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(each[0] > each[1] && each[0] > each[2] && work.packed < work.plain, "{packed:?} {work:?}");
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
