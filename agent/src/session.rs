//! The control connection as the agent sees it. One thread reads and answers pings, one writes; the log goes to the
//! server through a bounded queue that never makes the installation wait.

use crate::trust::Trust;
use anyhow::{Context, Result, bail};
use ka_chain::control::{self, Progress, Registration, SILENCE, Start, ToNode, ToServer};
use ka_chain::core::Place;
use ka_chain::keys::Credential;
use ka_chain::link::HANDSHAKE;
use ka_chain::node::{Handle, Report};
use ka_chain::noise::control::{Reader, Session as Noise, initiate};
use ka_chain::stream::EndRecord;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Messages to the server that may wait.
const QUEUE: usize = 1024;
/// How long one attempt to connect may take.
const CONNECT: Duration = Duration::from_secs(10);

/// What the server decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The wave is over.
    Released,
    /// This node has no place in the wave any more, but in the next.
    Out(String),
    /// The server gave the deployment up.
    Lost(String),
    /// The connection to the server is over, and nobody said why. The node may come again with its session.
    Broken(String),
}

/// What the writing thread takes.
#[derive(Debug)]
enum Out {
    Message(ToServer),
    /// Answered when everything before it has been written.
    Flush(SyncSender<()>),
}

/// A place that came before the node was ready for it: where the parent is, where the children are.
type Early = (Place, Vec<SocketAddr>, Vec<IpAddr>);

/// What the reading thread shares with the others.
#[derive(Debug, Default)]
struct Inbox {
    verdict: Option<Verdict>,
    /// The node's place in the chain, and orders that came before it was taken.
    relay: Option<Handle>,
    early: Vec<Early>,
}

/// The connection ended between the handshake and the server's answer.
#[derive(Debug, thiserror::Error)]
#[error("registering at the server: the connection ended before it answered: {0}")]
struct Dropped(String);

/// A session with the server.
#[derive(Debug)]
pub struct Session {
    out: SyncSender<Out>,
    orders: Mutex<Receiver<ToNode>>,
    inbox: Arc<Mutex<Inbox>>,
    socket: TcpStream,
    /// Disconnected when the reading thread is gone: the server has closed, or the connection broke.
    reading: Mutex<Receiver<()>>,
    /// The server's address.
    pub server: SocketAddr,
    /// The name by which the server knows this node.
    pub name: String,
    /// What the node is to become, as opaque bytes.
    pub order: Vec<u8>,
}

impl Session {
    /// Connects to the server, trying again until `patience` is over, and registers.
    ///
    /// # Errors
    /// When no server answers in time, it cannot prove that it is the one that `trust` names, or it refuses the node.
    pub fn open(
        server: &str,
        trust: &Trust,
        patience: Duration,
        register: impl Fn(&TcpStream) -> Result<Registration>,
    ) -> Result<Self> {
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match Self::register(server, trust, left, &register) {
                // It has more to do than it can, or was stopped just then.
                Err(e) if e.is::<Dropped>() && !left.is_zero() => {
                    log::warn!("{e:#}; trying again");
                    std::thread::sleep(Duration::from_secs(1));
                }
                other => return other,
            }
        }
    }

    fn register(
        server: &str,
        trust: &Trust,
        patience: Duration,
        register: impl Fn(&TcpStream) -> Result<Registration>,
    ) -> Result<Self> {
        let (socket, session, given) = connect(server, trust, patience)?;
        let Noise { mut reader, mut writer } = session;
        let address = socket.peer_addr().context("asking for the server's address")?;
        let dropped = |e: ka_chain::Error| Dropped(e.to_string());
        writer.send(&ToServer::Register(register(&socket)?)).map_err(dropped)?;
        // From here on the token may be spent, and the session takes its place.
        trust.keep(Some(given));
        let (name, order) = loop {
            match reader.receive().map_err(dropped)? {
                Some(ToNode::Order { name, body }) => break (name, body),
                Some(ToNode::Ping(n)) => writer.send(&ToServer::Pong(n)).map_err(dropped)?,
                Some(ToNode::Refused(why)) => bail!("the server refused this node: {why}"),
                Some(_) => bail!("the server answered with something else than an order"),
                None => return Err(Dropped("the server closed it".to_owned()).into()),
            }
        };
        let (out, queue) = sync_channel::<Out>(QUEUE);
        let (orders_in, orders) = sync_channel(16);
        let inbox = Arc::new(Mutex::new(Inbox::default()));
        std::thread::spawn(move || {
            for out in queue {
                match out {
                    // The reading thread says what happened.
                    Out::Message(message) if writer.send(&message).is_err() => break,
                    Out::Message(_) => {}
                    // Whoever asked may have stopped waiting.
                    Out::Flush(done) => drop(done.try_send(())),
                }
            }
        });
        let pongs = out.clone();
        let shared = Arc::clone(&inbox);
        let (alive, reading) = sync_channel(0);
        std::thread::spawn(move || {
            read_loop(&mut reader, address, &pongs, &orders_in, &shared);
            drop(alive);
        });
        let (orders, reading) = (Mutex::new(orders), Mutex::new(reading));
        Ok(Self { out, orders, inbox, socket, reading, server: address, name, order })
    }

    /// Tells the server something. A dead connection shows in [`Session::lost`], not here.
    pub fn tell(&self, message: ToServer) {
        // The writing thread is gone only when the connection is.
        let _ = self.out.send(Out::Message(message));
    }

    /// Tells the server something if there is room, else not.
    pub fn try_tell(&self, message: ToServer) -> bool {
        !matches!(self.out.try_send(Out::Message(message)), Err(TrySendError::Full(_)))
    }

    /// Tells how far the node is.
    pub fn progress(&self, progress: Progress) {
        self.try_tell(ToServer::Progress(progress));
    }

    /// Passes on what the node's place in the chain reports; never waits.
    pub fn report(&self, report: Report) {
        let message = match report {
            Report::Joined(link) => ToServer::Joined(link),
            Report::Lost(link, why) => ToServer::Lost { link, why },
            Report::Lacking(link, oldest) => ToServer::Lacking { link, oldest },
            Report::Silent(child, link) => ToServer::Silent { child, link },
            Report::Damaged(link, chunk, why) => ToServer::Damaged { link, chunk, why },
        };
        if !self.try_tell(message) {
            log::warn!("a report to the server found no room");
        }
    }

    /// From now on orders go to this place in the chain; with none they wait for the next.
    pub fn set_relay(&self, relay: Option<Handle>) {
        let mut inbox = lock(&self.inbox);
        if let Some(relay) = &relay {
            for (place, addresses, children) in inbox.early.drain(..) {
                relay.know(&children);
                relay.place(place, addresses);
            }
        }
        inbox.relay = relay;
    }

    /// Forgets that the node was put out of a wave: it makes itself ready for the next.
    pub fn again(&self) {
        let mut inbox = lock(&self.inbox);
        inbox.relay = None;
        inbox.early.clear();
        if matches!(inbox.verdict, Some(Verdict::Out(_))) {
            inbox.verdict = None;
        }
    }

    /// Says that the node holds the end record.
    pub fn ended(&self, record: EndRecord) {
        self.tell(ToServer::Ended(record));
    }

    /// Waits for the node's place in the chain.
    ///
    /// # Errors
    /// When the server gives up or goes away first.
    pub fn wait_start(&self) -> Result<Start> {
        loop {
            let next = self
                .orders
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .recv_timeout(Duration::from_millis(200));
            match next {
                Ok(ToNode::Start(start)) => return Ok(*start),
                Ok(ToNode::Refused(why)) => bail!("the server refused this node: {why}"),
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{}", self.lost().unwrap_or_else(|| "the server is gone".to_owned()))
                }
            }
            if let Some(why) = self.lost() {
                bail!("{why}");
            }
        }
    }

    /// Waits until the wave is released, the node is out of it, or the server is lost.
    #[must_use]
    pub fn wait_verdict(&self) -> Verdict {
        loop {
            if let Some(verdict) = self.verdict() {
                return verdict;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What the server decided, if it did.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        lock(&self.inbox).verdict.clone()
    }

    /// Why the server is lost, if it is.
    #[must_use]
    pub fn lost(&self) -> Option<String> {
        match self.verdict() {
            Some(Verdict::Lost(why) | Verdict::Broken(why)) => Some(why),
            _ => None,
        }
    }

    /// Why the connection to the server is over, if it is and the server did not give up: the node may come again.
    #[must_use]
    pub fn broken(&self) -> Option<String> {
        match self.verdict() {
            Some(Verdict::Broken(why)) => Some(why),
            _ => None,
        }
    }

    /// Ends the session: everything that is queued is written first, and the server, which closes when it has read the
    /// last of it, is waited for: bytes in the kernel's buffer are lost when the machine reboots. At most 5 s are waited.
    pub fn close(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        let (done, flushed) = sync_channel(1);
        let mut flush = Out::Flush(done);
        loop {
            match self.out.try_send(flush) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if Instant::now() < end => {
                    flush = back;
                    std::thread::sleep(Duration::from_millis(10));
                }
                // The writing thread is gone, and the connection with it; or the server takes nothing any more.
                Err(_) => return,
            }
        }
        if flushed.recv_timeout(end.saturating_duration_since(Instant::now())).is_err() {
            log::debug!("the server did not take the last messages");
        }
        // Only this half: what the server still sends is read until it closes. It may be closed already.
        let _ = self.socket.shutdown(Shutdown::Write);
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let left = end.saturating_duration_since(Instant::now());
        if reading.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
            log::debug!("the server did not close the control connection");
        }
    }
}

fn lock(inbox: &Mutex<Inbox>) -> std::sync::MutexGuard<'_, Inbox> {
    // Every critical section leaves it whole.
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_loop(
    reader: &mut Reader<TcpStream>,
    server: SocketAddr,
    pongs: &SyncSender<Out>,
    orders: &SyncSender<ToNode>,
    inbox: &Mutex<Inbox>,
) {
    let decide = |what: Verdict| {
        let mut inbox = lock(inbox);
        // A release stands: after it a closed connection is no loss. A loss follows on being out of a wave.
        if matches!(inbox.verdict, None | Some(Verdict::Out(_))) {
            inbox.verdict = Some(what);
        }
    };
    loop {
        match reader.receive::<ToNode>() {
            // When the queue is full the server has other signs of life.
            Ok(Some(ToNode::Ping(n))) => drop(pongs.try_send(Out::Message(ToServer::Pong(n)))),
            Ok(Some(ToNode::Release)) => decide(Verdict::Released),
            Ok(Some(ToNode::Out(why))) => decide(Verdict::Out(why)),
            Ok(Some(ToNode::Abort(why))) => decide(Verdict::Lost(format!("the server gave up: {why}"))),
            Ok(Some(ToNode::Place { place, addresses, children })) => {
                let addresses = if addresses.is_empty() { vec![server] } else { addresses };
                let mut inbox = lock(inbox);
                match &inbox.relay {
                    Some(relay) => {
                        relay.know(&children);
                        relay.place(place, addresses);
                    }
                    None if inbox.early.len() < EARLY => inbox.early.push((place, addresses, children)),
                    // Each order says everything, so only the last ones matter.
                    None => {
                        inbox.early.clear();
                        inbox.early.push((place, addresses, children));
                    }
                }
            }
            Ok(Some(order)) => {
                if orders.try_send(order).is_err() {
                    decide(Verdict::Lost("the server sends more orders than there can be".to_owned()));
                    return;
                }
            }
            Ok(None) => {
                decide(Verdict::Broken("the server closed the control connection".to_owned()));
                return;
            }
            Err(e) => {
                decide(Verdict::Broken(format!("the control connection failed: {e}")));
                return;
            }
        }
    }
}

/// Orders that may come before the node has taken its place.
const EARLY: usize = 64;

/// A connection, the session over it, and the credential for the next one.
type Connected = (TcpStream, Noise<TcpStream, TcpStream>, Credential);

/// Connects and opens a session. A server that cannot be reached is tried again; one that refuses, or is another one than
/// the node trusts, is not.
fn connect(server: &str, trust: &Trust, patience: Duration) -> Result<Connected> {
    let end = Instant::now() + patience;
    let mut said = false;
    loop {
        let failure = match server.to_socket_addrs() {
            Err(e) => anyhow::Error::new(e).context(format!("looking up the server {server}")),
            Ok(addresses) => {
                let mut failure = anyhow::anyhow!("the server {server} has no address");
                for address in addresses {
                    match connect_to(address, trust) {
                        Ok(connected) => return Ok(connected),
                        Err(e) if matches!(e, ka_chain::Error::Handshake(_)) => {
                            return Err(
                                anyhow::Error::new(e).context(format!("greeting the server at {address}"))
                            );
                        }
                        Err(e) => failure = e.into(),
                    }
                }
                failure
            }
        };
        if Instant::now() >= end {
            return Err(failure);
        }
        if !said {
            log::warn!("{failure:#}; trying again for {} s", patience.as_secs());
            said = true;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn connect_to(address: SocketAddr, trust: &Trust) -> Result<Connected, ka_chain::Error> {
    loop {
        let socket = control::connect(address, CONNECT)?;
        let (credential, is_session) = trust.credential();
        match initiate(&socket, &trust.key, &credential, Instant::now() + HANDSHAKE) {
            Ok((session, given)) => {
                let limits = || ka_chain::Error::io("preparing the control socket");
                socket.set_read_timeout(Some(SILENCE)).map_err(limits())?;
                socket.set_write_timeout(Some(SILENCE)).map_err(limits())?;
                return Ok((socket, session, given));
            }
            // It was never good (the registration got lost), or the server begins anew: the token may still be.
            Err(ka_chain::Error::Handshake(why)) if is_session => {
                log::info!("the server does not take this node's session any more ({why}); trying its token");
                trust.keep(None);
            }
            Err(e) => return Err(e),
        }
    }
}

/// A listener for the node's children, on any free port, over IPv6 and IPv4 where there is IPv6.
///
/// # Errors
/// When the kernel gives no port.
pub fn data_listener() -> Result<TcpListener> {
    TcpListener::bind("[::]:0")
        .or_else(|_| TcpListener::bind("0.0.0.0:0"))
        .context("opening a port for the chain")
}

/// This machine's addresses that others could reach: no loopback, no link-local ones.
///
/// # Errors
/// When the kernel does not tell.
pub fn addresses() -> Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    for interface in nix::ifaddrs::getifaddrs().context("listing the addresses")? {
        let Some(address) = interface.address else { continue };
        let ip = if let Some(v4) = address.as_sockaddr_in() {
            IpAddr::V4(v4.ip())
        } else if let Some(v6) = address.as_sockaddr_in6() {
            IpAddr::V6(v6.ip())
        } else {
            continue;
        };
        let link_local = match ip {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if !ip.is_loopback() && !ip.is_unspecified() && !link_local {
            found.push(ip);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ka_chain::keys::{SecretKey, Token};
    use ka_chain::noise::control::respond;
    use std::io::Read;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn register() -> Registration {
        Registration {
            version: "1".to_owned(),
            purpose: control::Purpose::Receive,
            mac: None,
            hostname: None,
            data_port: 1,
            addresses: Vec::new(),
            memory: 1,
            facts: Vec::new(),
        }
    }

    /// A server for one node; `then` has the session after the registration.
    fn server(
        listener: TcpListener,
        key: SecretKey,
        known: Credential,
        then: impl FnOnce(Noise<TcpStream, TcpStream>) + Send + 'static,
    ) -> std::thread::JoinHandle<()> {
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 8]).unwrap();
            let next = Credential::generate().unwrap();
            let find = |id: &ka_chain::keys::CredentialId| (known.id == *id).then_some((known, next));
            let end = Instant::now() + Duration::from_secs(5);
            // A node that is refused leaves.
            let Ok(mut session) = respond(&stream, &key, find, end) else { return };
            assert!(matches!(session.reader.first(1000, end).unwrap(), Some(ToServer::Register(_))));
            stream.set_read_timeout(None).unwrap();
            session.writer.send(&ToNode::Order { name: "n".to_owned(), body: Vec::new() }).unwrap();
            then(session);
        })
    }

    /// A machine reboots right after: what is still in its kernel's buffer then never arrives.
    #[test]
    fn closing_waits_until_the_server_has_read_the_last_message() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let read = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&read);
        let (key, token) = (SecretKey::generate().unwrap(), Token::generate().unwrap());
        let trust = Trust::new(key.public(), token.clone());
        let server = server(listener, key, token.credential(), move |mut session| {
            std::thread::sleep(Duration::from_millis(500));
            assert_eq!(session.reader.receive().unwrap(), Some(ToServer::Done));
            assert_eq!(session.reader.receive::<ToServer>().unwrap(), None);
            seen.store(true, Ordering::SeqCst);
        });
        let session = Session::open(&address, &trust, Duration::from_secs(5), |_| Ok(register())).unwrap();
        assert!(trust.credential().1, "later connections use the session");
        session.tell(ToServer::Done);
        session.close();
        assert!(read.load(Ordering::SeqCst));
        server.join().unwrap();
    }

    /// A crowded server may close just when a node has registered.
    #[test]
    fn a_connection_that_is_dropped_before_the_answer_is_tried_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (key, token) = (SecretKey::generate().unwrap(), Token::generate().unwrap());
        let trust = Trust::new(key.public(), token.clone());
        let thread = std::thread::spawn({
            let (key, known) = (key.clone(), token.credential());
            move || {
                let end = Instant::now() + Duration::from_secs(5);
                // The second time it shows the session that was never good, and is told so.
                for _ in 0..2 {
                    let (mut stream, _) = listener.accept().unwrap();
                    stream.read_exact(&mut [0; 8]).unwrap();
                    let next = Credential::generate().unwrap();
                    let find = |id: &ka_chain::keys::CredentialId| {
                        (known.id == *id).then_some((known.clone(), next))
                    };
                    if let Ok(mut session) = respond(&stream, &key, find, end) {
                        session.reader.first::<ToServer>(1000, end).unwrap();
                    }
                }
                server(listener, key, known, |_| ()).join().unwrap();
            }
        });
        let session = Session::open(&address, &trust, Duration::from_secs(20), |_| Ok(register())).unwrap();
        assert_eq!(session.name, "n");
        thread.join().unwrap();
    }

    #[test]
    fn a_server_with_another_key_is_refused_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (key, other) = (SecretKey::generate().unwrap(), SecretKey::generate().unwrap());
        let token = Token::generate().unwrap();
        let trust = Trust::new(other.public(), token.clone());
        let public = key.public().to_string();
        let server = server(listener, key, token.credential(), |_| panic!("it was taken"));
        let start = Instant::now();
        let error = Session::open(&address, &trust, Duration::from_secs(60), |_| Ok(register())).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains(&public) && text.contains(&other.public().to_string()), "{text}");
        assert!(start.elapsed() < Duration::from_secs(20));
        server.join().unwrap();
    }
}
