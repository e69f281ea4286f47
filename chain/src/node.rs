//! A place in the chain: a node's, or the server's at the head. Chunks come from the parent (at the server: from its
//! source), are kept as long as [`crate::core::relay`] wants, and go to the children and to the local consumer. One thread
//! does all of that ([`crate::engine`]); this is how others speak to it.

use crate::buffer::Pools;
use crate::core::relay::{Answer, Limits};
use crate::core::waits::Waits;
use crate::core::wave::Status;
use crate::core::{Acknowledgement, HEAD, Link, NodeId, Place};
use crate::engine::Engine;
use crate::entrance::{Entrance, Guest, Refusal};
use crate::link::{self, Dialled, HANDSHAKE, HELLO, LinkId};
use crate::noise::Bounded;
use crate::noise::link::LinkSession;
use crate::seal::{Seal, Wave};
use crate::sign::PublicKey;
use crate::store::{Cursor, Store};
use crate::stream::{EndRecord, StreamReader};
use crate::{CHUNK, Error};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::collections::{BTreeMap, VecDeque};
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How soon a greeting that waits for its order sees that it has to leave.
const LOOK: Duration = Duration::from_millis(50);
/// How soon the thread that accepts children sees that the node was stopped.
const STOPPED: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The largest window that a node with `memory` bytes of RAM should have: a sixteenth, at least 8 chunks, at most 64 MiB.
#[must_use]
pub fn window_for(memory: u64) -> usize {
    usize::try_from((memory / 16).min(64 << 20)).unwrap_or(64 << 20).max(8 * CHUNK)
}

/// What a place in the chain needs to know beside its [`Place`].
#[derive(Debug, Clone)]
pub struct Config {
    /// The wave and its key.
    pub wave: Wave,
    /// The node's name in it; [`HEAD`] at the server.
    pub me: NodeId,
    /// How much it holds.
    pub limits: Limits,
    /// How long a child may be silent while chunks are under way to it.
    pub dead_after: Duration,
    /// The key that signs the lists; none when nodes trust each other.
    pub signer: Option<PublicKey>,
}

/// What the server must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The link to the parent stands.
    Joined(LinkId),
    /// It was lost, or never came to stand.
    Lost(LinkId, String),
    /// The parent has the chunk wanted next no more; its oldest is this one.
    Lacking(LinkId, u64),
    /// A child was sent chunks over this link and has acknowledged nothing for too long.
    Silent(NodeId, LinkId),
    /// The parent's copy of this chunk was refused, and why: it is damaged or forged. The link is given up.
    Damaged(LinkId, u64, String),
}

/// Takes reports; it must not wait.
pub type Reporter = Box<dyn Fn(Report) + Send>;

/// For the relaying thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// A new place, and where the parent listens.
    Place(Place, Vec<SocketAddr>),
    Dialled(LinkId, Result<Dialled, Error>),
    /// A child names its link and what it wants; nothing changes yet.
    Hello(LinkId, u64, SyncSender<Answer>),
    /// It was answered, has shown that it is there, and takes chunks.
    Child(Box<Welcomed>),
}

/// A child after its handshake.
#[derive(Debug)]
pub(crate) struct Welcomed {
    pub link: LinkId,
    pub want: u64,
    pub stream: TcpStream,
    pub session: LinkSession,
    pub said: Acknowledgement,
}

/// Counters of what came in.
#[derive(Debug, Default)]
pub struct Received {
    /// Chunks that came in and opened.
    pub chunks: AtomicU64,
    /// Bytes on the wire.
    pub wire: AtomicU64,
    /// Plain bytes of the data chunks.
    pub plain: AtomicU64,
    /// Chunks that did not open, were out of order or cut off, or not what the server signed.
    pub refused: AtomicU64,
}

/// How a place stands, as last seen by its thread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// For the server.
    pub status: Status,
    /// Wire bytes in the window.
    pub fill: usize,
    /// At the head: everybody below holds everything that was pushed.
    pub drained: bool,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub store: Arc<Store>,
    commands: Mutex<VecDeque<Command>>,
    /// Links on which children may come, and which child.
    expected: Mutex<BTreeMap<LinkId, (NodeId, Link)>>,
    me: NodeId,
    wave: Wave,
    arrived: Condvar,
    pub standing: Mutex<Standing>,
    pub waits: Mutex<Waits>,
    pub received: Received,
    outcome: Mutex<Option<Result<EndRecord, String>>>,
    ended: Condvar,
    entrance: Arc<Entrance>,
    stopped: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its data whole, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn command(&self, command: Command) {
        lock(&self.commands).push_back(command);
        self.store.waker.wake();
    }

    pub(crate) fn next_command(&self) -> Option<Command> {
        lock(&self.commands).pop_front()
    }

    pub(crate) fn has_commands(&self) -> bool {
        !lock(&self.commands).is_empty()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    pub(crate) fn expect(&self, links: BTreeMap<LinkId, (NodeId, Link)>) {
        *lock(&self.expected) = links;
        self.arrived.notify_all();
    }

    /// The stream ended, well or not. The first word stands.
    pub(crate) fn end(&self, outcome: Result<EndRecord, String>) {
        lock(&self.outcome).get_or_insert(outcome);
        self.ended.notify_all();
    }
}

/// A handle on a place in the chain; cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// A new place; the parent listens at one of `addresses`.
    pub fn place(&self, place: Place, addresses: Vec<SocketAddr>) {
        self.0.command(Command::Place(place, addresses));
    }

    /// Counters of what came in.
    #[must_use]
    pub fn received(&self) -> &Received {
        &self.0.received
    }

    /// How it stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        *lock(&self.0.standing)
    }

    /// What it has waited for so far.
    #[must_use]
    pub fn waits(&self) -> Waits {
        lock(&self.0.waits).clone()
    }

    /// Who came to the data port and got no further than the handshake.
    #[must_use]
    pub fn entrance(&self) -> &Arc<Entrance> {
        &self.0.entrance
    }

    /// Children come from these addresses; one that is named several times has several children.
    pub fn know(&self, addresses: &[IpAddr]) {
        self.0.entrance.know(addresses.iter().map(|address| (*address, 1)));
    }

    /// Where a source puts its chunks, at the head.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.0.store
    }

    /// Waits for the end record.
    ///
    /// # Errors
    /// The reason why it will not come.
    pub fn wait_end(&self) -> Result<EndRecord, String> {
        let mut outcome = lock(&self.0.outcome);
        loop {
            if let Some(result) = &*outcome {
                return result.clone();
            }
            outcome = self.0.ended.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The end record, or why it will not come; `None` while the stream flows.
    #[must_use]
    pub fn ended(&self) -> Option<Result<EndRecord, String>> {
        lock(&self.0.outcome).clone()
    }

    /// Stops everything: sockets close, reader and source fail with `reason`.
    pub fn stop(&self, reason: &str) {
        self.0.stopped.store(true, Ordering::SeqCst);
        self.0.end(Err(reason.to_owned()));
        self.0.store.stop(reason);
        self.0.arrived.notify_all();
        // Awake or not: it looks before it sleeps.
        self.0.store.waker.wake();
    }

    /// Serves a new connection whose first 8 bytes were not read yet, on a thread of its own.
    pub fn accept(&self, stream: TcpStream, from: SocketAddr) {
        let handle = self.clone();
        self.0.entrance.enter(stream, from, move |stream, guest| {
            let mut hello = [0; 8];
            let end = Instant::now() + HANDSHAKE;
            match Bounded::new(&stream, end).read_exact(&mut hello) {
                Ok(()) if hello == HELLO => handle.serve(stream, &guest, end),
                Ok(()) => guest.refuse(Refusal::Garbled, "it is not a child"),
                Err(e) => guest.refuse(Refusal::of_io(&e), &e.to_string()),
            }
        });
    }

    /// Serves a connection after [`HELLO`] was read from it: the rest of the handshake, until `end`, then the relaying
    /// thread has it.
    pub fn serve(&self, stream: TcpStream, guest: &Guest, end: Instant) {
        match self.greet(stream, guest, end) {
            Ok(true) => {}
            Ok(false) => guest.refuse(Refusal::Unexpected, "it names no link that is expected"),
            Err(e) => guest.refuse(Refusal::of(&e), &e.to_string()),
        }
    }

    /// False when nobody expects its link.
    fn greet(&self, mut stream: TcpStream, guest: &Guest, end: Instant) -> Result<bool, Error> {
        let id = link::read_link(&stream, end)?;
        // A child may be quicker than the order that names its link.
        let mut expected = lock(&self.0.expected);
        let (child, link) = loop {
            if let Some(found) = expected.get(&id) {
                break found.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.0.is_stopped() || guest.must_leave() {
                return Ok(false);
            }
            expected = self
                .0
                .arrived
                .wait_timeout(expected, left.min(LOOK))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        drop(expected);
        let prologue = link::prologue(&self.0.wave, &id, self.0.me, child);
        let (mut session, want, answer) = link::respond(&mut stream, &link, &prologue, end, |want| {
            let (reply, answer) = sync_channel(1);
            self.0.command(Command::Hello(id, want, reply));
            answer
                .recv_timeout(HANDSHAKE)
                .map_err(|_| Error::Stopped("the place in the chain is given up".to_owned()))
        })?;
        if answer == Answer::Welcome {
            let said = link::first_acknowledgement(&stream, &mut session, end)?;
            link::prepare(&stream)?;
            self.0.command(Command::Child(Box::new(Welcomed { link: id, want, stream, session, said })));
        }
        Ok(true)
    }
}

/// A running place in the chain, given up when it is dropped.
#[derive(Debug)]
pub struct Node {
    handle: Handle,
    reader: Option<StreamReader>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Node {
    /// A node that takes the stream into `pools`, passes it on, and consumes it. Children come on `listener`. What happens to the stream
    /// shows in [`Handle::wait_end`].
    ///
    /// # Errors
    /// When threads, descriptors or zstd cannot be set up.
    pub fn start(
        config: Config,
        pools: Pools,
        listener: TcpListener,
        report: Reporter,
    ) -> Result<Self, Error> {
        let store = Store::new()?;
        let seal = Arc::new(Seal::new(&config.wave));
        let reader = StreamReader::new(Cursor::new(&store), Arc::clone(&seal), pools.plain.clone())?;
        let mut node = Self::spawn(config, store, seal, pools, report)?;
        node.reader = Some(reader);
        let handle = node.handle.clone();
        let accepting = std::thread::Builder::new().name("accept".into());
        accepting
            .spawn(move || accept_loop(&listener, &handle))
            .map_err(Error::io("starting the thread that accepts children"))?;
        Ok(node)
    }

    /// The head of the chain: a source puts its chunks into [`Handle::store`], children come by [`Handle::serve`].
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn head(config: Config, report: Reporter) -> Result<Self, Error> {
        let seal = Arc::new(Seal::new(&config.wave));
        // Its chunks come from the source, in buffers of the source's own pools.
        let pools = Pools::of_head(0);
        Self::spawn(Config { me: HEAD, ..config }, Store::new()?, seal, pools, report)
    }

    fn spawn(
        config: Config,
        store: Arc<Store>,
        seal: Arc<Seal>,
        pools: Pools,
        report: Reporter,
    ) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            store,
            commands: Mutex::default(),
            expected: Mutex::default(),
            me: config.me,
            wave: config.wave.clone(),
            arrived: Condvar::new(),
            standing: Mutex::default(),
            waits: Mutex::default(),
            received: Received::default(),
            outcome: Mutex::default(),
            ended: Condvar::new(),
            entrance: Arc::default(),
            stopped: AtomicBool::new(false),
        });
        let engine = Engine::new(config, Arc::clone(&shared), seal, pools, report);
        let thread = std::thread::Builder::new()
            .name("relay".into())
            .spawn(move || engine.run())
            .map_err(Error::io("starting the relaying thread"))?;
        Ok(Self { handle: Handle(shared), reader: None, thread: Some(thread) })
    }

    /// To speak to it from elsewhere.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// The stream for the local consumer; there is one.
    pub fn reader(&mut self) -> Option<StreamReader> {
        self.reader.take()
    }
}

impl std::ops::Deref for Node {
    type Target = Handle;
    fn deref(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.handle.stop("the node left the chain");
        let refusals = &self.handle.0.entrance.refusals;
        if refusals.total() > 0 {
            log::info!(
                "at this node's port {} connections were refused: {}",
                refusals.total(),
                refusals.text()
            );
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the relaying thread ended badly");
        }
    }
}

fn accept_loop(listener: &TcpListener, handle: &Handle) {
    // Not blocking for ever: a stopped node gives its port back.
    if let Err(e) = listener.set_nonblocking(true) {
        log::error!("preparing the data port: {e}; children cannot come");
        return;
    }
    while !handle.0.is_stopped() {
        match listener.accept() {
            Ok((stream, from)) => match stream.set_nonblocking(false) {
                Ok(()) => handle.accept(stream, from),
                Err(e) => handle.0.entrance.refusals.refuse(from, Refusal::of_io(&e), &e.to_string()),
            },
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(listener, PollFlags::IN)];
                if let Err(e) = poll(&mut fds, Some(&STOPPED)) {
                    // A signal, or no memory: without the pause this would spin.
                    log::debug!("waiting for children: {e}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Err(e) => {
                if let Some(more) = handle.0.entrance.refusals.count(Refusal::Crowded) {
                    log::warn!("accepting a child: {e}{more}");
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
