//! The entrance of a port: a thread for each connection whose handshake is under way, as many as [`Door`] lets in, and a
//! count of those that got no further, by reason. One that has to leave finds its socket closed. The first few refusals
//! are written to the log, of the others how many they were.

use crate::Error;
use crate::core::door::{Door, GuestId, Quiet};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Why a connection got no further than its handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many handshakes were under way.
    Crowded,
    /// It did not say all that it had to say in time.
    Late,
    /// It closed, or its connection broke.
    Left,
    /// It spoke another protocol, or wrongly.
    Garbled,
    /// It named a link that nobody expects.
    Unexpected,
    /// It could not prove who it is: another key, a wrong secret, a repetition.
    Unproven,
    /// Its token or session is not taken.
    Token,
}

impl Refusal {
    const ALL: [Self; 7] =
        [Self::Crowded, Self::Late, Self::Left, Self::Garbled, Self::Unexpected, Self::Unproven, Self::Token];

    const fn words(self) -> &'static str {
        match self {
            Self::Crowded => "came or stood there while too many did",
            Self::Late => "did not finish in time",
            Self::Left => "broke off",
            Self::Garbled => "spoke another protocol",
            Self::Unexpected => "named a link that nobody expects",
            Self::Unproven => "could not prove who they are",
            Self::Token => "had no token that is taken",
        }
    }

    /// What kind of failure an error of a handshake is.
    #[must_use]
    pub fn of(error: &Error) -> Self {
        match error {
            Error::Io { source, .. } => Self::of_io(source),
            Error::Handshake(_) | Error::Frame(_) => Self::Unproven,
            Error::Stopped(_) => Self::Left,
            _ => Self::Garbled,
        }
    }

    /// The same for what a socket says.
    #[must_use]
    pub fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::Late,
            _ => Self::Left,
        }
    }
}

/// Connections that were refused, by reason.
#[derive(Debug)]
pub struct Refusals {
    counts: [AtomicU64; Refusal::ALL.len()],
    quiet: Mutex<Quiet>,
    begun: Instant,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { counts: Default::default(), quiet: Mutex::default(), begun: Instant::now() }
    }
}

impl Refusals {
    /// Counts a refusal. Some: it may be written to the log, with this at its end.
    pub fn count(&self, reason: Refusal) -> Option<String> {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
        let kept = self.quiet.lock().unwrap_or_else(PoisonError::into_inner).may_say(self.begun.elapsed())?;
        Some(if kept == 0 { String::new() } else { format!(" (and {kept} more that are not written here)") })
    }

    /// Counts a refusal, and writes it to the log when there are not too many.
    pub fn refuse(&self, from: SocketAddr, reason: Refusal, why: &str) {
        if let Some(more) = self.count(reason) {
            log::warn!("a connection from {from} is dropped: {why}{more}");
        }
    }

    /// How many there were for this reason.
    #[must_use]
    pub fn of(&self, reason: Refusal) -> u64 {
        self.counts[reason as usize].load(Ordering::Relaxed)
    }

    /// How many there were in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        Refusal::ALL.iter().map(|reason| self.of(*reason)).sum()
    }

    /// All of them in words, the reasons that occurred.
    #[must_use]
    pub fn text(&self) -> String {
        let said = |reason: &Refusal| match self.of(*reason) {
            0 => None,
            count => Some(format!("{count} {}", reason.words())),
        };
        Refusal::ALL.iter().filter_map(said).collect::<Vec<_>>().join(", ")
    }
}

#[derive(Debug, Default)]
struct Inside {
    door: Door,
    sockets: BTreeMap<GuestId, (TcpStream, Arc<AtomicBool>)>,
}

/// An entrance.
#[derive(Debug, Default)]
pub struct Entrance {
    inside: Mutex<Inside>,
    /// Who got no further.
    pub refusals: Refusals,
}

impl Entrance {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        // Every critical section leaves it whole.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nodes at these addresses have places of their own: so many nodes at each. One that is named again has
    /// those as well.
    pub fn know(&self, addresses: impl IntoIterator<Item = (IpAddr, usize)>) {
        self.lock().door.know(addresses);
    }

    /// Gives a new connection to `greet` on a thread of its own, if there is room for it. The thread may go on with
    /// something else after it dropped the [`Guest`].
    pub fn enter(
        self: &Arc<Self>,
        stream: TcpStream,
        from: SocketAddr,
        greet: impl FnOnce(TcpStream, Guest) + Send + 'static,
    ) {
        let kept = match stream.try_clone() {
            Ok(kept) => kept,
            Err(e) => return self.refusals.refuse(from, Refusal::Crowded, &format!("no room for it: {e}")),
        };
        let told = Arc::new(AtomicBool::new(false));
        let mut inside = self.lock();
        let entered = inside.door.arrive(from.ip());
        let mut displaced = None;
        if let Some(entered) = entered {
            displaced = entered.displaced.and_then(|id| inside.sockets.remove(&id));
            inside.sockets.insert(entered.id, (kept, Arc::clone(&told)));
        }
        drop(inside);
        if let Some((socket, told)) = displaced {
            told.store(true, Ordering::SeqCst);
            // It may be closed already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        let Some(entered) = entered else {
            return self.refusals.refuse(from, Refusal::Crowded, "too many handshakes are under way");
        };
        let guest = Guest { entrance: Arc::clone(self), id: entered.id, from, told };
        let started = std::thread::Builder::new().name("greet".into()).spawn(move || greet(stream, guest));
        if let Err(e) = started {
            // The guest went with the thread that was not to be.
            self.refusals.refuse(from, Refusal::Crowded, &format!("no thread for it: {e}"));
        }
    }

    /// Handshakes under way, and connections that were told to leave and have not left.
    #[must_use]
    pub fn guests(&self) -> (usize, usize) {
        self.lock().door.count()
    }
}

/// A connection whose handshake is under way; dropped when that is over.
#[derive(Debug)]
pub struct Guest {
    entrance: Arc<Entrance>,
    id: GuestId,
    /// Where it comes from.
    pub from: SocketAddr,
    told: Arc<AtomicBool>,
}

impl Guest {
    /// Whether it has to leave because others came.
    #[must_use]
    pub fn must_leave(&self) -> bool {
        self.told.load(Ordering::SeqCst)
    }

    /// It gets no further; one that had to leave failed for that reason, whatever its socket says.
    pub fn refuse(&self, reason: Refusal, why: &str) {
        let refusals = &self.entrance.refusals;
        if self.must_leave() {
            refusals.refuse(self.from, Refusal::Crowded, "others came while its handshake was under way");
        } else {
            refusals.refuse(self.from, reason, why);
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut inside = self.entrance.lock();
        inside.door.left(self.id);
        let socket = inside.sockets.remove(&self.id);
        drop(inside);
        drop(socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::time::Duration;

    #[test]
    fn a_flood_from_one_address_has_few_threads_and_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let entrance = Arc::new(Entrance::default());
        let mut clients = Vec::new();
        let most = Arc::new(AtomicU64::new(0));
        let running = Arc::new(AtomicU64::new(0));
        for _ in 0..300 {
            clients.push(TcpStream::connect(address).unwrap());
            let (stream, from) = listener.accept().unwrap();
            let (most, running) = (Arc::clone(&most), Arc::clone(&running));
            entrance.enter(stream, from, move |stream, guest| {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let result = (&stream).read_exact(&mut [0; 8]);
                running.fetch_sub(1, Ordering::SeqCst);
                guest.refuse(Refusal::of_io(&result.unwrap_err()), "it said nothing");
            });
            let (guests, leaving) = entrance.guests();
            assert!(guests <= 4 && leaving <= 256);
        }
        drop(clients);
        let end = Instant::now() + Duration::from_secs(10);
        while entrance.refusals.total() < 300 || entrance.guests() != (0, 0) {
            assert!(Instant::now() < end, "{} {:?}", entrance.refusals.text(), entrance.guests());
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(entrance.refusals.of(Refusal::Crowded), 296, "{}", entrance.refusals.text());
        assert_eq!(entrance.refusals.of(Refusal::Left), 4);
        assert!(most.load(Ordering::SeqCst) <= 260);
        assert!(entrance.refusals.text().contains("4 broke off"));
    }

    #[test]
    fn reasons_are_told_apart() {
        let io = |kind| Error::io("x")(io::Error::from(kind));
        assert_eq!(Refusal::of(&io(io::ErrorKind::TimedOut)), Refusal::Late);
        assert_eq!(Refusal::of(&io(io::ErrorKind::UnexpectedEof)), Refusal::Left);
        assert_eq!(Refusal::of(&Error::Frame(3)), Refusal::Unproven);
        assert_eq!(Refusal::of(&Error::Malformed("x".to_owned())), Refusal::Garbled);
    }
}
