//! The server's one port: control connections and the data connections of the nodes that the server itself feeds are
//! told apart by their first 8 bytes. A connection that says neither is dropped and disturbs nobody. A node gets a
//! session at the gate; everything from accepting its connection to its registration takes 5 s at most, and how many may
//! be on their way to it at once is the [`Entrance`]'s.

use super::addresses::places_of;
use super::state::ConnectionId;
use crate::nodes::Mac;
use crate::trust::gate::Gate;
use anyhow::{Context, Result};
use ka_chain::control::{Registration, ToNode, ToServer};
use ka_chain::entrance::{Entrance, Guest, Refusal};
use ka_chain::keys::CredentialId;
use ka_chain::link::{self, HANDSHAKE};
use ka_chain::node::Handle;
use ka_chain::noise::Bounded;
use ka_chain::noise::control::{self, Denied, Session};
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
    /// A node registered, and this is its session: the same one whenever it comes again.
    Registered(ConnectionId, IpAddr, Registration, CredentialId),
    /// A registered node said something.
    Message(ConnectionId, ToServer),
    /// A registered node's connection ended.
    Closed(ConnectionId, String),
}

/// The longest registration, in bytes.
const REGISTRATION: usize = 256 << 10;
/// Messages that may wait for one node; a node that takes none of so many is dead anyway.
const QUEUE: usize = 256;
/// Addresses of nodes that are remembered.
const ADDRESSES: usize = 16_384;
/// A node that takes no bytes for so long is dropped.
const WRITE: Duration = Duration::from_secs(20);

/// The server's port and everything that is connected to it.
#[derive(Debug)]
pub struct Hub {
    incoming: SyncSender<Incoming>,
    gate: Arc<Gate>,
    nodes: Mutex<BTreeMap<ConnectionId, (SyncSender<ToNode>, TcpStream)>>,
    head: Mutex<Option<Handle>>,
    next: AtomicU64,
    /// Where registered nodes are, and how many of them at each address; none when they have gone.
    addresses: Mutex<BTreeMap<IpAddr, usize>>,
    /// Registered nodes whose connection is open.
    open: AtomicUsize,
    stopped: AtomicBool,
    /// Who may have a handshake under way, and who got no further.
    pub entrance: Arc<Entrance>,
}

/// A node that has proved who it is, and registered.
struct Admitted {
    session: Session<TcpStream, TcpStream>,
    registration: Registration,
    /// The name of its session.
    name: CredentialId,
}

impl Hub {
    /// Listens on `addresses`; nodes are let in at `gate`, and what comes in goes to `incoming`. Returns the hub and the
    /// port.
    ///
    /// # Errors
    /// When none of the addresses can be listened on.
    pub fn listen(
        addresses: &[SocketAddr],
        incoming: SyncSender<Incoming>,
        gate: Arc<Gate>,
    ) -> Result<(Arc<Self>, u16)> {
        let hub = Arc::new(Self {
            incoming,
            gate,
            nodes: Mutex::default(),
            head: Mutex::default(),
            next: AtomicU64::new(1),
            addresses: Mutex::default(),
            open: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            entrance: Arc::default(),
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
                    if let Some(more) = self.entrance.refusals.count(Refusal::Crowded) {
                        log::warn!("accepting a connection: {e}{more}");
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn greet(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) {
        let hub = Arc::clone(self);
        let end = Instant::now() + HANDSHAKE;
        self.entrance.enter(stream, from, move |stream, guest| {
            let mut hello = [0; 8];
            let greeted = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_nodelay(true))
                .and_then(|()| Bounded::new(&stream, end).read_exact(&mut hello))
                .and_then(|()| stream.set_read_timeout(Some(HANDSHAKE)))
                .and_then(|()| stream.set_write_timeout(Some(WRITE)));
            match greeted {
                Err(e) => guest.refuse(Refusal::of_io(&e), &format!("it did not say what it wants: {e}")),
                Ok(()) if hello == link::HELLO => match hub.head() {
                    Some(head) => head.serve(stream, &guest, end),
                    None => guest.refuse(Refusal::Unexpected, "no wave has begun"),
                },
                Ok(()) if hello == control::HELLO => {
                    let admitted = hub.admit(&stream, &guest, end);
                    // The handshake is over: others may have the place.
                    drop(guest);
                    if let Some(admitted) = admitted {
                        hub.serve(&stream, from, admitted);
                    }
                }
                Ok(()) => guest.refuse(Refusal::Garbled, "it speaks another protocol"),
            }
        });
    }

    /// Brings a connection to a registered node, or tells the log why it does not get there. A token is spent when the
    /// first message opens, not before.
    fn admit(&self, stream: &TcpStream, guest: &Guest, end: Instant) -> Option<Admitted> {
        let from = guest.from;
        let refusals = &self.entrance.refusals;
        let mut known = None;
        let mut why = None;
        let find = |id: &CredentialId| match self.gate.find(id) {
            Ok(found) => {
                let pair = (found.used.clone(), found.next.clone());
                known = Some(found);
                Some(pair)
            }
            Err(e) => {
                why = Some(e);
                None
            }
        };
        let mut session = match control::respond(stream, self.gate.key(), find, end) {
            Ok(session) => session,
            Err(denied) => {
                match denied {
                    Denied::Credential => {
                        self.gate.count_token();
                        let why = why.map_or_else(|| denied.to_string(), |e| format!("{e:#}"));
                        if let Some(more) = refusals.count(Refusal::Token) {
                            log::warn!("a node from {from} is refused: {why}{more}");
                        }
                    }
                    Denied::Key => {
                        self.gate.count_handshake();
                        if let Some(more) = refusals.count(Refusal::Unproven) {
                            log::warn!("a node from {from} is refused: {denied}{more}");
                        }
                    }
                    Denied::Other(e) => guest.refuse(Refusal::of(&e), &e.to_string()),
                }
                return None;
            }
        };
        let known = known?;
        let registration = match session.reader.first(REGISTRATION, end) {
            Ok(Some(ToServer::Register(registration))) => registration,
            Ok(_) => {
                guest.refuse(Refusal::Garbled, "it did not register");
                return None;
            }
            Err(e) => {
                // Somebody repeats what a node once said, or the node left.
                self.gate.count_handshake();
                guest.refuse(Refusal::of(&e), &e.to_string());
                return None;
            }
        };
        // An address that is none is refused when the node's order is written; it has no token of its own.
        let mac = registration.mac.as_deref().and_then(|text| text.parse::<Mac>().ok());
        if let Err(e) = self.gate.admit(&known, mac) {
            self.gate.count_token();
            if let Some(more) = refusals.count(Refusal::Token) {
                let who = mac.map_or_else(|| "without a MAC address".to_owned(), |mac| mac.to_string());
                log::error!("ALARM: a node from {from} ({who}) is refused: {e:#}{more}");
            }
            // It may have gone already.
            let _ = session.writer.send(&ToNode::Refused(format!("{e:#}")));
            let _ = stream.shutdown(Shutdown::Write);
            return None;
        }
        Some(Admitted { session, registration, name: known.next.id })
    }

    /// Reads a registered node's messages until it closes; runs on the connection's thread.
    fn serve(self: &Arc<Self>, stream: &TcpStream, from: SocketAddr, admitted: Admitted) {
        let Admitted { session, registration, name } = admitted;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, queue) = sync_channel::<ToNode>(QUEUE);
        let limits = stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(Some(WRITE)));
        let kept = match limits.and_then(|()| stream.try_clone()) {
            Ok(kept) => kept,
            Err(e) => return self.entrance.refusals.refuse(from, Refusal::Left, &e.to_string()),
        };
        let addresses = places_of(from.ip(), &registration);
        self.know(&addresses, true);
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (sender, kept));
        let Session { mut reader, mut writer } = session;
        std::thread::spawn(move || {
            for message in queue {
                if let Err(e) = writer.send(&message) {
                    log::debug!("connection {id}: {e}");
                    break;
                }
            }
            // Only this half: closing both would throw away what the node has not read yet. The node then closes its own.
            // It may be closed already.
            let _ = writer.stream().shutdown(Shutdown::Write);
        });
        // The deployment's loop takes from this queue as long as it lives; when it is gone there is nobody to tell.
        let tell = |event| self.incoming.send(event).is_ok();
        self.open.fetch_add(1, Ordering::SeqCst);
        let mut open = tell(Incoming::Registered(id, from.ip(), registration, name));
        let mut why = "the server stopped".to_owned();
        while open {
            match reader.receive::<ToServer>() {
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
        self.know(&addresses, false);
        tell(Incoming::Closed(id, why));
        self.open.fetch_sub(1, Ordering::SeqCst);
    }

    /// A node is at these addresses, or has gone from there; it may come again, so they stay known.
    fn know(&self, places: &[IpAddr], here: bool) {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        for place in places {
            if here && (addresses.len() < ADDRESSES || addresses.contains_key(place)) {
                *addresses.entry(*place).or_default() += 1;
            } else if let Some(count) = addresses.get_mut(place) {
                *count = count.saturating_sub(1);
            }
        }
        let known: Vec<(IpAddr, usize)> =
            addresses.iter().map(|(at, count)| (*at, (*count).max(1))).collect();
        drop(addresses);
        self.entrance.know(known);
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

    /// Closes a node's connection at once, so that [`Hub::drain`] does not wait for a node that reads nothing any more.
    pub fn cut(&self, id: ConnectionId) {
        let removed = self.nodes.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        if let Some((_, stream)) = removed {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
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
