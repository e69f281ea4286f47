//! The DHCP client: gets a lease over a packet socket while the interface has no address yet, and keeps it from a thread
//! of its own while the installation runs (which may well take longer than a lease of an hour).

use super::dhcp::{self, Answer, Lease, Say};
use super::links::Link;
use super::packet;
use anyhow::{Context, Result, bail};
use ka_sys::net::{BROADCAST, PacketSocket, udp_on};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const CLIENT: u16 = 68;
const SERVER: u16 = 67;
/// Seconds to wait for an answer to the first, second, ... message; the last one goes for all that follow. Short at
/// first, as the switch's port may just have come up.
const WAITS: [u64; 5] = [1, 2, 4, 8, 12];
/// From this try on, servers are asked to answer to everybody.
const BROADCAST_FROM: usize = 2;
/// What an interrupted wait looks at its stop flag.
const SLICE: Duration = Duration::from_millis(250);

/// Gets a lease for `link`, which must be up. Gives up after `limit`, or soon after `stop` is set.
///
/// # Errors
/// When no server answered usefully in time, or the socket fails.
pub fn acquire(link: &Link, limit: Duration, stop: &AtomicBool) -> Result<Lease> {
    let socket =
        PacketSocket::open(link.index).with_context(|| format!("opening a socket on {}", link.name))?;
    let mut client = Client { link, socket, start: Instant::now(), limit, stop, trouble: None };
    // One number for the whole conversation: some servers think for seconds (they ping the address first), and their
    // offer must still count when it comes after the next question.
    let mut xid = random();
    for attempt in 0.. {
        let Some(Answer::Offer(offer)) = client.ask(Say::Discover, xid, attempt)? else { continue };
        log::debug!("{}: {} offers {}/{}", link.name, offer.server, offer.address, offer.prefix);
        for again in 0..3 {
            match client.ask(Say::Take(&offer), xid, again.max(attempt.min(BROADCAST_FROM)))? {
                Some(Answer::Ack(lease)) => return Ok(lease),
                Some(Answer::Nak(reason)) => {
                    client.trouble = Some(format!("{} refused {}: {reason}", offer.server, offer.address));
                    xid = random();
                    break;
                }
                Some(Answer::Offer(_)) | None => {}
            }
        }
    }
    bail!("the number of tries ran out")
}

struct Client<'a> {
    link: &'a Link,
    socket: PacketSocket,
    start: Instant,
    limit: Duration,
    stop: &'a AtomicBool,
    /// The last thing that went wrong with an answer, for the final error.
    trouble: Option<String>,
}

impl Client<'_> {
    /// Sends one message and returns the first fitting answer, or none after this try's wait.
    fn ask(&mut self, say: Say, xid: u32, attempt: usize) -> Result<Option<Answer>> {
        let elapsed = self.start.elapsed();
        if self.stop.load(Ordering::Relaxed) {
            bail!("another interface was faster");
        }
        if elapsed >= self.limit {
            let trouble = self.trouble.as_ref().map(|t| format!("; {t}")).unwrap_or_default();
            bail!("no DHCP server answered on {} within {} s{trouble}", self.link.name, self.limit.as_secs());
        }
        let seconds = u16::try_from(elapsed.as_secs()).unwrap_or(u16::MAX);
        let broadcast = attempt >= BROADCAST_FROM;
        let payload = dhcp::message(say, self.link.mac, xid, seconds, broadcast)?;
        let bytes = packet::build((Ipv4Addr::UNSPECIFIED, CLIENT), (Ipv4Addr::BROADCAST, SERVER), &payload);
        if let Err(e) = self.socket.send(&bytes, BROADCAST) {
            // The link may be going down and up just now; the next try tells.
            self.trouble = Some(format!("sending: {e}"));
        }
        let end = Instant::now() + wait(attempt, xid);
        let mut buffer = vec![0; 4096];
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let got = match self.socket.receive(&mut buffer, left.min(SLICE)) {
                Ok(Some(got)) => got,
                Ok(None) => continue,
                Err(e) => {
                    self.trouble = Some(format!("receiving: {e}"));
                    std::thread::sleep(SLICE.min(left));
                    continue;
                }
            };
            match packet::open(&buffer[..got.len], CLIENT, got.checksum_ready) {
                Err(damage) => self.note(format!("an answer with {damage} was dropped")),
                Ok(None) => {}
                Ok(Some((from, payload))) => match dhcp::parse(payload, self.link.mac, xid) {
                    Err(e) => self.note(format!("answer of {from}: {e:#}")),
                    Ok(Some(answer)) if fits(&say, &answer) => return Ok(Some(answer)),
                    Ok(_) => {}
                },
            }
        }
    }

    fn note(&mut self, trouble: String) {
        log::debug!("{}: {trouble}", self.link.name);
        self.trouble = Some(trouble);
    }
}

/// Whether an answer is one to this message: a late offer is none to a request; only the server that was asked grants or
/// refuses.
fn fits(say: &Say, answer: &Answer) -> bool {
    match (say, answer) {
        (Say::Discover, Answer::Offer(_)) => true,
        (Say::Take(offer), Answer::Ack(lease)) => lease.server == offer.server,
        (Say::Keep(_), Answer::Ack(_)) | (Say::Take(_) | Say::Keep(_), Answer::Nak(_)) => true,
        _ => false,
    }
}

/// How long to wait for an answer, up to half a second more or less so that machines that were switched on together do
/// not ask together.
fn wait(attempt: usize, xid: u32) -> Duration {
    let seconds = WAITS[attempt.min(WAITS.len() - 1)];
    let more = u64::from(xid.rotate_left(u32::try_from(attempt % 32).unwrap_or(0)) % 1000);
    Duration::from_millis(seconds * 1000 - 500 + more)
}

/// A number that other nodes do not use at the same time.
fn random() -> u32 {
    let none = Ipv4Addr::UNSPECIFIED;
    dhcproto::v4::Message::new(none, none, none, none, &[]).xid()
}

/// Renews `lease` for as long as the process lives; runs in a thread of its own. A node whose lease is refused or runs
/// out keeps its address: it is in the middle of an installation that only it can finish, and giving the address up would
/// end that for certain. The log says so.
pub fn keep(link: &Link, mut lease: Lease) {
    let Some(mut lifetime) = lease.lifetime else { return };
    let mut granted = Instant::now();
    let mut warned = false;
    loop {
        let age = granted.elapsed();
        if age < lease.renew {
            std::thread::sleep(lease.renew - age);
            continue;
        }
        let anyone = age >= lease.rebind;
        match extend(link, &lease, anyone) {
            Ok(Answer::Ack(renewed)) if renewed.address == lease.address => {
                log::info!("{}: lease of {} renewed by {}", link.name, lease.address, renewed.server);
                granted = Instant::now();
                warned = false;
                lease = renewed;
                match lease.lifetime {
                    Some(new) => lifetime = new,
                    None => return,
                }
                continue;
            }
            Ok(Answer::Ack(other)) => {
                log::error!(
                    "{}: server {} now wants the address to be {}, not {}; kept",
                    link.name,
                    other.server,
                    other.address,
                    lease.address
                );
            }
            Ok(Answer::Nak(reason)) => {
                log::error!(
                    "{}: the lease of {} was refused ({reason}); the address is kept",
                    link.name,
                    lease.address
                );
            }
            Ok(Answer::Offer(_)) => {}
            Err(e) => log::warn!("{}: renewing the lease of {}: {e:#}", link.name, lease.address),
        }
        let age = granted.elapsed();
        if age >= lifetime && !warned {
            warned = true;
            log::error!("{}: the lease of {} has run out; the address is kept", link.name, lease.address);
        }
        // Half of what is left until the next stage, as RFC 2131 has it, but never a storm and never asleep for long.
        let next = if anyone { lifetime } else { lease.rebind };
        std::thread::sleep(
            (next.saturating_sub(age) / 2).clamp(Duration::from_secs(10), Duration::from_secs(600)),
        );
    }
}

/// Asks once for more time: the server that granted the lease, or (`anyone`) whichever answers a broadcast. Waits 5 s.
///
/// # Errors
/// When the port is taken, or nobody answers.
pub fn extend(link: &Link, lease: &Lease, anyone: bool) -> Result<Answer> {
    let socket = udp_on(&link.name, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, CLIENT))
        .with_context(|| format!("opening port {CLIENT}"))?;
    socket.set_read_timeout(Some(SLICE)).context("setting a time limit")?;
    let xid = random();
    let to = if anyone { Ipv4Addr::BROADCAST } else { lease.server };
    let payload = dhcp::message(Say::Keep(lease), link.mac, xid, 0, false)?;
    socket.send_to(&payload, (to, SERVER)).with_context(|| format!("sending to {to}"))?;
    let end = Instant::now() + Duration::from_secs(5);
    let mut buffer = vec![0; 4096];
    while Instant::now() < end {
        let len = match socket.recv_from(&mut buffer) {
            Ok((len, _)) => len,
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock
                        | std::io::ErrorKind::TimedOut
                        | std::io::ErrorKind::Interrupted
                ) =>
            {
                continue;
            }
            Err(e) => return Err(e).context("receiving"),
        };
        if let Some(answer) = dhcp::parse(&buffer[..len], link.mac, xid)?
            && fits(&Say::Keep(lease), &answer)
        {
            return Ok(answer);
        }
    }
    bail!("{to} did not answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_differ() {
        assert!(wait(0, 0) == Duration::from_millis(500) && wait(0, 999) == Duration::from_millis(1499));
        assert!(wait(32, 500) == Duration::from_secs(12));
        assert_ne!(wait(4, 501), wait(5, 501));
        assert_ne!(random(), random());
    }

    #[test]
    fn only_the_server_that_was_asked_grants() {
        let offer = Lease {
            address: Ipv4Addr::new(10, 0, 0, 2),
            prefix: 24,
            server: Ipv4Addr::new(10, 0, 0, 1),
            routes: vec![],
            dns: vec![],
            hostname: None,
            domain: None,
            mtu: None,
            lifetime: None,
            renew: Duration::ZERO,
            rebind: Duration::ZERO,
        };
        let other = Lease { server: Ipv4Addr::new(10, 0, 0, 9), ..offer.clone() };
        assert!(fits(&Say::Discover, &Answer::Offer(offer.clone())));
        assert!(!fits(&Say::Discover, &Answer::Ack(offer.clone())));
        assert!(fits(&Say::Take(&offer), &Answer::Ack(offer.clone())));
        assert!(!fits(&Say::Take(&offer), &Answer::Ack(other.clone())));
        assert!(fits(&Say::Keep(&offer), &Answer::Ack(other)));
        assert!(!fits(&Say::Take(&offer), &Answer::Offer(offer.clone())));
    }
}
