//! Answers IPv6 router solicitations, so that iPXE does not wait 13 to 15 s at each of its stages for a router that the
//! install network does not have.
//!
//! The answer says as little as can be said: no prefix, no option, a router lifetime of 0 (we are no router, RFC 4861
//! section 4.2), and it goes to the asking machine alone. So no machine gets an address, a route or a name server from
//! it, and it does no harm on a network with routers of its own. It needs no IPv6 address but the interface's own
//! link-local one; without that (IPv6 switched off) there are no answers and nodes boot some seconds later.

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrV6, SocketFlags, SocketType, ipproto, recvfrom, sendto,
    socket_with, sockopt,
};
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// ICMPv6 type of a router solicitation.
const SOLICITATION: u8 = 133;
/// A router advertisement with nothing in it: type, code, checksum (the kernel fills it in), hop limit, flags, lifetime,
/// reachable time, retransmission timer, all of them unspecified.
const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// All routers of a link.
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// How often the thread looks whether it is to end.
const TICK: Duration = Duration::from_millis(200);

/// The thread that answers.
pub struct RouterAnswers {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl RouterAnswers {
    /// Starts to answer on the interface with index `ifindex`.
    ///
    /// # Errors
    /// When the kernel refuses: not root, no IPv6.
    pub fn start(ifindex: u32) -> Result<Self> {
        let open = || -> rustix::io::Result<OwnedFd> {
            let fd = socket_with(
                AddressFamily::INET6,
                SocketType::RAW,
                SocketFlags::CLOEXEC,
                Some(ipproto::ICMPV6),
            )?;
            sockopt::set_ipv6_add_membership(&fd, &ALL_ROUTERS, ifindex)?;
            // Receivers drop neighbour discovery that came through a router.
            sockopt::set_ipv6_unicast_hops(&fd, Some(255))?;
            sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(TICK))?;
            Ok(fd)
        };
        let fd = open().context("opening a socket for router solicitations")?;
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("boot-router".to_owned())
            .spawn(move || answer(&fd, ifindex, &theirs))
            .context("starting the thread that answers router solicitations")?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for RouterAnswers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that answers router solicitations ended badly");
        }
    }
}

fn answer(fd: &OwnedFd, ifindex: u32, stop: &AtomicBool) {
    let mut packet = [0; 1500];
    while !stop.load(Ordering::Relaxed) {
        let (length, from) = match recvfrom(fd, &mut packet, RecvFlags::empty()) {
            Ok((length, _, from)) => (length, from),
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(e) => {
                log::warn!("receiving router solicitations: {e}");
                std::thread::sleep(TICK);
                continue;
            }
        };
        let Some(SocketAddr::V6(from)) = from.and_then(|a| SocketAddr::try_from(a).ok()) else { continue };
        let packet = packet.get(..length).unwrap_or_default();
        if from.scope_id() != ifindex || !from.ip().is_unicast_link_local() || !is_solicitation(packet) {
            continue;
        }
        log::debug!("answering the router solicitation of {}", from.ip());
        let to = SocketAddrV6::new(*from.ip(), 0, 0, ifindex);
        if let Err(e) = sendto(fd, &ADVERTISEMENT, SendFlags::empty(), &to) {
            log::debug!("answering the router solicitation of {}: {e}", from.ip());
        }
    }
}

fn is_solicitation(packet: &[u8]) -> bool {
    packet.len() >= 8 && packet[0] == SOLICITATION && packet[1] == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_solicitations_are_answered() {
        assert!(is_solicitation(&[133, 0, 0, 0, 0, 0, 0, 0]));
        assert!(!is_solicitation(&[133, 0, 0, 0]));
        assert!(!is_solicitation(&[134, 0, 0, 0, 0, 0, 0, 0]));
        assert!(!is_solicitation(&[133, 1, 0, 0, 0, 0, 0, 0]));
        assert!(!is_solicitation(&[]));
    }
}
