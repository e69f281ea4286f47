//! A node's place in the chain: takes the stream from its parent, gives it to its children, and to the local consumer as
//! a [`StreamReader`]. When the consumer gives up, the node goes on as a relay: failed is not dead.

use crate::buffer::Pool;
use crate::link::{self, HANDSHAKE, HELLO, LinkId, Received};
use crate::seal::{Seal, Wave};
use crate::stream::{EndRecord, StreamReader};
use crate::window::{Cursor, Window};
use crate::{CHUNK, Error};
use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a node tries to reach its parent at the beginning of a wave.
const DIAL: Duration = Duration::from_secs(30);
/// Handshakes under way at once; a connection beyond that is closed at once.
const HANDSHAKES: usize = 64;

/// What a node is told at the beginning of a wave.
#[derive(Debug, Clone)]
pub struct Place {
    /// The wave.
    pub wave: Wave,
    /// Where the parent listens: addresses to be tried in this order.
    pub parent: Vec<SocketAddr>,
    /// The link to the parent.
    pub link: LinkId,
    /// The links on which children will come.
    pub children: Vec<LinkId>,
    /// Wire bytes that the window may hold.
    pub window: usize,
}

/// The largest window that a node with `memory` bytes of RAM should have: a sixteenth, at least 8 chunks, at most 64 MiB.
#[must_use]
pub fn window_for(memory: u64) -> usize {
    usize::try_from((memory / 16).min(64 << 20)).unwrap_or(64 << 20).max(8 * CHUNK)
}

/// Children that are expected, each with its cursor from the stream's first chunk on, and the sockets of those that came.
#[derive(Debug)]
pub struct Children {
    window: Arc<Window>,
    waiting: Mutex<BTreeMap<LinkId, Cursor>>,
    sockets: Mutex<Vec<TcpStream>>,
    handshakes: AtomicUsize,
    stopped: AtomicBool,
    /// Connections that were not a child's.
    pub strays: AtomicU64,
}

impl Children {
    /// Expects `links` on `window`.
    #[must_use]
    pub fn new(window: &Arc<Window>, links: &[LinkId]) -> Arc<Self> {
        let waiting = links.iter().map(|l| (*l, window.cursor())).collect();
        Arc::new(Self {
            window: Arc::clone(window),
            waiting: Mutex::new(waiting),
            sockets: Mutex::default(),
            handshakes: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            strays: AtomicU64::new(0),
        })
    }

    /// Serves a new connection whose first 8 bytes were not read yet, on a thread of its own.
    pub fn accept(self: &Arc<Self>, mut stream: TcpStream, from: SocketAddr) {
        if self.handshakes.fetch_add(1, Ordering::Relaxed) >= HANDSHAKES {
            self.handshakes.fetch_sub(1, Ordering::Relaxed);
            self.strays.fetch_add(1, Ordering::Relaxed);
            log::warn!("a connection from {from} is dropped: too many handshakes under way");
            return;
        }
        let children = Arc::clone(self);
        std::thread::spawn(move || {
            let greeted = stream.set_read_timeout(Some(HANDSHAKE)).and_then(|()| {
                let mut hello = [0; 8];
                stream.read_exact(&mut hello).map(|()| hello == HELLO)
            });
            match greeted {
                Ok(true) => children.serve(stream, from),
                Ok(false) => children.stray(from, "it is not a child"),
                Err(e) => children.stray(from, &e.to_string()),
            }
            children.handshakes.fetch_sub(1, Ordering::Relaxed);
        });
    }

    fn stray(&self, from: SocketAddr, why: &str) {
        self.strays.fetch_add(1, Ordering::Relaxed);
        log::warn!("a connection from {from} is dropped: {why}");
    }

    /// Serves a connection after [`HELLO`] was read from it: the rest of the handshake here, the sending on a new thread.
    pub fn serve(self: &Arc<Self>, mut stream: TcpStream, from: SocketAddr) {
        let link = match link::read_link(&mut stream) {
            Ok(link) => link,
            Err(e) => return self.stray(from, &e.to_string()),
        };
        let Some(cursor) = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&link) else {
            return self.stray(from, "it names no link that is expected");
        };
        let kept = link::welcome(&mut stream)
            .and_then(|()| stream.try_clone().map_err(Error::io("cloning a socket")));
        match kept {
            Ok(clone) => self.sockets.lock().unwrap_or_else(PoisonError::into_inner).push(clone),
            Err(e) => {
                // The cursor goes back: the child will dial again.
                self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(link, cursor);
                return self.stray(from, &e.to_string());
            }
        }
        if self.stopped.load(Ordering::SeqCst) {
            self.close();
            return;
        }
        std::thread::spawn(move || {
            let sent = AtomicU64::new(0);
            match link::send_chunks(&mut stream, cursor, &sent) {
                // The socket stays open until the wave is released: its end is not the end of the stream.
                Ok(()) => log::debug!("everything was sent to the child at {from}"),
                // Those below must learn that nothing more comes; a silent open socket would let them wait.
                Err(Error::Stopped(_)) => {
                    let _ = stream.shutdown(Shutdown::Both);
                }
                Err(e) => {
                    log::warn!(
                        "the child at {from} was lost after {} chunks: {e}",
                        sent.load(Ordering::Relaxed)
                    );
                }
            }
        });
    }

    /// Closes every connection and forgets children that never came.
    pub fn close(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for socket in self.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // It may be closed already, by the other side.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// The window that they are fed from.
    #[must_use]
    pub fn window(&self) -> &Arc<Window> {
        &self.window
    }
}

/// The state of a node's reception.
#[derive(Debug, Default)]
struct Outcome {
    ended: Mutex<Option<Result<EndRecord, String>>>,
    changed: Condvar,
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    window: Arc<Window>,
    children: Arc<Children>,
    received: Arc<Received>,
    outcome: Arc<Outcome>,
    parent: Arc<Mutex<Option<TcpStream>>>,
    reader: Option<StreamReader>,
}

impl Node {
    /// Takes its place: children may come on `listener`, the parent is dialled, chunks flow.
    ///
    /// # Errors
    /// When threads or zstd cannot be set up. What happens to the stream later shows in [`Node::wait_end`].
    pub fn start(place: Place, listener: TcpListener) -> Result<Self, Error> {
        let window = Window::new(place.window);
        let seal = Arc::new(Seal::new(&place.wave));
        let pool = Pool::new(16);
        let reader = StreamReader::new(window.cursor(), Arc::clone(&seal), pool.clone())?;
        let children = Children::new(&window, &place.children);
        let node = Self {
            window: Arc::clone(&window),
            children: Arc::clone(&children),
            received: Arc::default(),
            outcome: Arc::default(),
            parent: Arc::default(),
            reader: Some(reader),
        };
        std::thread::spawn(move || accept_loop(&listener, &children));
        let (received, outcome, parent) =
            (Arc::clone(&node.received), Arc::clone(&node.outcome), Arc::clone(&node.parent));
        std::thread::spawn(move || {
            let result = receive(&place, &seal, &window, &pool, &received, &parent);
            if let Err(e) = &result {
                // Those below learn from their own connection; the reader here from the window.
                if !matches!(e, Error::GivenUp(_)) {
                    window.stop(e.to_string());
                }
            }
            *outcome.ended.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(result.map_err(|e| e.to_string()));
            outcome.changed.notify_all();
        });
        Ok(node)
    }

    /// The stream for the local consumer; there is one.
    pub fn reader(&mut self) -> Option<StreamReader> {
        self.reader.take()
    }

    /// Counters of what came in.
    #[must_use]
    pub fn received(&self) -> Arc<Received> {
        Arc::clone(&self.received)
    }

    /// Wire bytes in the window, and its limit.
    #[must_use]
    pub fn fill(&self) -> (usize, usize) {
        self.window.fill()
    }

    /// Waits for the end record.
    ///
    /// # Errors
    /// The reason why it will not come.
    pub fn wait_end(&self) -> Result<EndRecord, String> {
        let mut ended = self.outcome.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(result) = &*ended {
                return result.clone();
            }
            ended = self.outcome.changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The end record, or why it will not come; `None` while the stream flows.
    #[must_use]
    pub fn ended(&self) -> Option<Result<EndRecord, String>> {
        self.outcome.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops everything: sockets close, readers and writers fail with `reason`.
    pub fn stop(&self, reason: &str) {
        self.window.stop(reason);
        self.children.close();
        if let Some(parent) = self.parent.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // It may be closed already, by the other side.
            let _ = parent.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop("the node left the chain");
    }
}

fn accept_loop(listener: &TcpListener, children: &Arc<Children>) {
    // Not blocking for ever: a stopped node gives its port back.
    if let Err(e) = listener.set_nonblocking(true) {
        log::error!("preparing the data port: {e}; children cannot come");
        return;
    }
    while !children.stopped.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, from)) => match stream.set_nonblocking(false) {
                Ok(()) => children.accept(stream, from),
                Err(e) => children.stray(from, &e.to_string()),
            },
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => {
                log::warn!("accepting a child: {e}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn receive(
    place: &Place,
    seal: &Seal,
    window: &Window,
    pool: &Pool,
    received: &Received,
    parent: &Mutex<Option<TcpStream>>,
) -> Result<EndRecord, Error> {
    let mut stream = link::dial(&place.parent, &place.link, Instant::now() + DIAL)?;
    let clone = stream.try_clone().map_err(Error::io("cloning the parent's socket"))?;
    *parent.lock().unwrap_or_else(PoisonError::into_inner) = Some(clone);
    link::receive_chunks(&mut stream, seal, window, pool, received)
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
