//! Asks whether a DHCP server answers on a network, before one is started there: two of them quarrel, and the network's
//! other machines suffer.

use crate::nodes::Mac;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

/// How long answers are waited for.
pub const WAIT: Duration = Duration::from_secs(3);
const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// How many packets are looked at.
const PACKETS: u32 = 1000;

/// Sends a DHCPDISCOVER on `interface` and returns the address of the first server that makes an offer. Nothing is taken:
/// an offer that nobody requests is forgotten by the server.
///
/// # Errors
/// When it cannot be asked: not root, the client's port is taken, the interface is down.
pub fn dhcp_server(interface: &str, wait: Duration) -> io::Result<Option<Ipv4Addr>> {
    let socket = ka_sys::net::udp_on(interface, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, CLIENT_PORT))?;
    // An address of our own making (locally administered), so that no lease of a real machine is touched.
    let xid = (std::process::id() ^ Instant::now().elapsed().subsec_nanos()).wrapping_mul(0x9e37_79b1);
    let [a, b, c, d] = xid.to_be_bytes();
    let mac = Mac::new([0x06, 0x6b, a, b, c, d]).map_err(io::Error::other)?;
    let request = discover(xid, mac);
    let start = Instant::now();
    let mut asked = 0u64;
    let mut packet = [0; 1500];
    for _ in 0..PACKETS {
        let passed = start.elapsed();
        if passed >= wait {
            break;
        }
        // Asked again each second, as any client does.
        if asked <= passed.as_secs() {
            asked += 1;
            socket.send_to(&request, (Ipv4Addr::BROADCAST, SERVER_PORT))?;
        }
        if let Some(server) = receive(&socket, &mut packet, xid)? {
            return Ok(Some(server));
        }
    }
    Ok(None)
}

fn receive(socket: &UdpSocket, packet: &mut [u8], xid: u32) -> io::Result<Option<Ipv4Addr>> {
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    match socket.recv_from(packet) {
        Ok((length, SocketAddr::V4(from))) => {
            Ok(offer(packet.get(..length).unwrap_or_default(), xid).then(|| *from.ip()))
        }
        Ok(_) => Ok(None),
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

fn discover(xid: u32, mac: Mac) -> Vec<u8> {
    let mut packet = vec![0; 236];
    // BOOTREQUEST, Ethernet, 6 bytes of address; answers are to be broadcast, as we have no address to be sent to.
    packet[..3].copy_from_slice(&[1, 1, 6]);
    packet[4..8].copy_from_slice(&xid.to_be_bytes());
    packet[10] = 0x80;
    packet[28..34].copy_from_slice(&mac.bytes());
    packet.extend(COOKIE);
    packet.extend([53, 1, 1, 55, 2, 1, 3, 255]);
    packet.resize(300, 0);
    packet
}

/// Whether `packet` is an offer of an address in the transaction `xid`. Proxy-DHCP servers offer none.
fn offer(packet: &[u8], xid: u32) -> bool {
    let Some((head, options)) = packet.split_at_checked(240) else { return false };
    head[0] == 2
        && head[4..8] == xid.to_be_bytes()
        && head[236..240] == COOKIE
        && head[16..20] != [0; 4]
        && message_type(options) == Some(2)
}

fn message_type(mut options: &[u8]) -> Option<u8> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [53, 1, kind, ..] => return Some(*kind),
            [255, ..] | [] | [_] => return None,
            [_, length, rest @ ..] => options = rest.get(usize::from(*length)..)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(xid: u32, address: [u8; 4], kind: u8) -> Vec<u8> {
        let mut packet = discover(xid, Mac::new([6, 0, 0, 0, 0, 1]).unwrap());
        packet[0] = 2;
        packet[16..20].copy_from_slice(&address);
        packet.truncate(240);
        packet.extend([0, 51, 4, 0, 0, 0, 9, 53, 1, kind, 255]);
        packet
    }

    #[test]
    fn only_an_offer_to_us_counts() {
        assert!(offer(&reply(7, [10, 0, 0, 9], 2), 7));
        assert!(!offer(&reply(8, [10, 0, 0, 9], 2), 7), "another's");
        assert!(!offer(&reply(7, [0; 4], 2), 7), "a proxy offers no address");
        assert!(!offer(&reply(7, [10, 0, 0, 9], 6), 7), "a refusal");
        assert!(!offer(&discover(7, Mac::new([6, 0, 0, 0, 0, 1]).unwrap()), 7), "our own question");
    }

    proptest! {
        #[test]
        fn no_packet_panics(packet in proptest::collection::vec(any::<u8>(), 0..400), cut in 0usize..300) {
            offer(&packet, 7);
            let mut near = reply(7, [10, 0, 0, 9], 2);
            near.truncate(cut);
            near.extend(&packet);
            offer(&near, 7);
            message_type(&packet);
        }
    }
}
