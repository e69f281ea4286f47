//! The server's one port: control connections and the data connections of the nodes that the server itself feeds are
//! told apart by their first 8 bytes. A connection that says neither is dropped and disturbs nobody.

use super::state::ConnectionId;
use anyhow::{Context, Result};
use ka_chain::control::{self, Registration, ToNode, ToServer};
use ka_chain::link::{self, HANDSHAKE};
use ka_chain::node::Handle;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What comes in from the network.
#[derive(Debug)]
pub enum Incoming {
    /// A node registered.
    Registered(ConnectionId, IpAddr, Registration),
    /// A registered node said something.
    Message(ConnectionId, ToServer),
    /// A registered node's connection ended.
    Closed(ConnectionId, String),
}

/// Connections that have not said yet what they want, at once.
const HANDSHAKES: usize = 256;
/// Messages that may wait for one node; a node that takes none of so many is dead anyway.
const QUEUE: usize = 256;
/// A node that takes no bytes for so long is dropped.
const WRITE: Duration = Duration::from_secs(20);

/// The server's port and everything that is connected to it.
#[derive(Debug)]
pub struct Hub {
    incoming: SyncSender<Incoming>,
    nodes: Mutex<BTreeMap<ConnectionId, (SyncSender<ToNode>, TcpStream)>>,
    head: Mutex<Option<Handle>>,
    next: AtomicU64,
    handshakes: AtomicUsize,
    /// Registered nodes whose connection is open.
    open: AtomicUsize,
    stopped: AtomicBool,
    /// Connections that were neither control nor data.
    pub strays: AtomicU64,
}

impl Hub {
    /// Listens on `addresses`; what comes in goes to `incoming`. Returns the hub and the port.
    ///
    /// # Errors
    /// When none of the addresses can be listened on.
    pub fn listen(addresses: &[SocketAddr], incoming: SyncSender<Incoming>) -> Result<(Arc<Self>, u16)> {
        let hub = Arc::new(Self {
            incoming,
            nodes: Mutex::default(),
            head: Mutex::default(),
            next: AtomicU64::new(1),
            handshakes: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            strays: AtomicU64::new(0),
        });
        let mut port = 0;
        let mut listeners = Vec::new();
        let mut failure = None;
        for address in addresses {
            let mut address = *address;
            if address.port() == 0 {
                // All addresses share the port that the first one was given.
                address.set_port(port);
            }
            match TcpListener::bind(address) {
                Ok(listener) => {
                    port = listener.local_addr().context("asking for the port")?.port();
                    listeners.push(listener);
                }
                // An IPv6 socket on all addresses takes IPv4 as well.
                Err(e) if e.kind() == ErrorKind::AddrInUse && !listeners.is_empty() => {}
                Err(e) => {
                    log::debug!("listening on {address}: {e}");
                    failure = Some((address, e));
                }
            }
        }
        if listeners.is_empty() {
            let (address, e) = failure.context("no address to listen on")?;
            return Err(e).with_context(|| format!("listening on {address}"));
        }
        for listener in listeners {
            listener.set_nonblocking(true).context("preparing the port")?;
            let hub = Arc::clone(&hub);
            std::thread::Builder::new().name("accept".into()).spawn(move || hub.accept(&listener))?;
        }
        Ok((hub, port))
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while !self.stopped.load(Ordering::SeqCst) {
            match listener.accept() {
                Ok((stream, from)) => self.greet(stream, from),
                Err(e) if e.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(10)),
                Err(e) => {
                    log::warn!("accepting a connection: {e}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn stray(&self, from: SocketAddr, why: &str) {
        self.strays.fetch_add(1, Ordering::Relaxed);
        log::warn!("a connection from {from} is dropped: {why}");
    }

    fn greet(self: &Arc<Self>, mut stream: TcpStream, from: SocketAddr) {
        if self.handshakes.fetch_add(1, Ordering::Relaxed) >= HANDSHAKES {
            self.handshakes.fetch_sub(1, Ordering::Relaxed);
            return self.stray(from, "too many handshakes under way");
        }
        let hub = Arc::clone(self);
        let started = std::thread::Builder::new().name("greet".into()).spawn(move || {
            let mut hello = [0; 8];
            let greeted = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_nodelay(true))
                .and_then(|()| stream.set_read_timeout(Some(HANDSHAKE)))
                .and_then(|()| stream.set_write_timeout(Some(WRITE)))
                .and_then(|()| stream.read_exact(&mut hello));
            match greeted {
                Err(e) => hub.stray(from, &format!("it did not say what it wants: {e}")),
                Ok(()) if hello == link::HELLO => match hub.head() {
                    Some(head) => head.serve(stream, from),
                    None => hub.stray(from, "no wave has begun"),
                },
                Ok(()) if hello == control::HELLO => match control::receive(&mut stream) {
                    Ok(Some(ToServer::Register(registration))) => {
                        hub.handshakes.fetch_sub(1, Ordering::Relaxed);
                        return hub.serve(stream, from, registration);
                    }
                    Ok(_) => hub.stray(from, "it did not register"),
                    Err(e) => hub.stray(from, &e.to_string()),
                },
                Ok(()) => hub.stray(from, "it speaks another protocol"),
            }
            hub.handshakes.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(e) = started {
            self.handshakes.fetch_sub(1, Ordering::Relaxed);
            self.stray(from, &format!("no thread for it: {e}"));
        }
    }

    /// Reads a registered node's messages until it closes; runs on the connection's thread.
    fn serve(self: &Arc<Self>, mut stream: TcpStream, from: SocketAddr, registration: Registration) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, queue) = sync_channel::<ToNode>(QUEUE);
        let halves = stream.try_clone().and_then(|w| stream.try_clone().map(|k| (w, k)));
        let (mut writer, kept) = match halves {
            Ok(halves) => halves,
            Err(e) => return self.stray(from, &e.to_string()),
        };
        if let Err(e) = stream.set_read_timeout(None) {
            return self.stray(from, &e.to_string());
        }
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (sender, kept));
        std::thread::spawn(move || {
            for message in queue {
                if let Err(e) = control::send(&mut writer, &message) {
                    log::debug!("connection {id}: {e}");
                    break;
                }
            }
            // Only this half: closing both would throw away what the node has not read yet. The node then closes its own.
            // It may be closed already.
            let _ = writer.shutdown(Shutdown::Write);
        });
        // The deployment's loop takes from this queue as long as it lives; when it is gone there is nobody to tell.
        let tell = |event| self.incoming.send(event).is_ok();
        self.open.fetch_add(1, Ordering::SeqCst);
        let mut open = tell(Incoming::Registered(id, from.ip(), registration));
        let mut why = "the server stopped".to_owned();
        while open {
            match control::receive::<ToServer>(&mut stream) {
                Ok(Some(message)) => open = tell(Incoming::Message(id, message)),
                Ok(None) => {
                    why = "the node closed it".to_owned();
                    break;
                }
                Err(e) => {
                    why = e.to_string();
                    break;
                }
            }
        }
        self.close(id);
        tell(Incoming::Closed(id, why));
        self.open.fetch_sub(1, Ordering::SeqCst);
    }

    fn head(&self) -> Option<Handle> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on data connections belong to `head`, or to nobody.
    pub fn feed(&self, head: Option<Handle>) {
        *self.head.lock().unwrap_or_else(PoisonError::into_inner) = head;
    }

    /// Queues a message for a node; never waits.
    pub fn send(&self, id: ConnectionId, message: ToNode) {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((sender, stream)) = nodes.get(&id) else { return };
        match sender.try_send(message) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                log::warn!("connection {id} takes no messages; it is closed");
                let _ = stream.shutdown(Shutdown::Both);
                nodes.remove(&id);
            }
        }
    }

    /// Closes a node's connection after what is queued was sent.
    pub fn close(&self, id: ConnectionId) {
        // Dropping the sender ends the writing thread, which closes the socket.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Says goodbye: what is queued goes out, and every node that closes its side in time has read it.
    pub fn drain(&self, limit: Duration) {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let end = Instant::now() + limit;
        while self.open.load(Ordering::SeqCst) > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Stops listening and closes everything.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        if let Some(head) = self.head() {
            head.stop("the server stopped");
        }
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}
