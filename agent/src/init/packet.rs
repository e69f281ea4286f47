//! IPv4 and UDP headers around a DHCP message: for sending before there is an address, and for taking apart what a packet
//! socket received.

use std::net::Ipv4Addr;

const IP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const UDP: u8 = 17;

/// What is wrong with a packet that looked like ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// The checksum of the IP header is wrong.
    #[error("wrong IP header checksum")]
    IpChecksum,
    /// The UDP checksum is wrong.
    #[error("wrong UDP checksum")]
    UdpChecksum,
}

/// An IPv4 packet from `from`:`from_port` to `to`:`to_port` with `payload`.
///
/// # Panics
/// Never: a payload that is too long for one packet gives an empty one.
#[must_use]
pub fn build(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let (Ok(total), Ok(udp_len)) =
        (u16::try_from(IP_HEADER + UDP_HEADER + payload.len()), u16::try_from(UDP_HEADER + payload.len()))
    else {
        return Vec::new();
    };
    let mut packet = Vec::with_capacity(total.into());
    packet.extend([0x45, 0x10]); // version 4, 5 words of header; low delay
    packet.extend(total.to_be_bytes());
    packet.extend([0, 0, 0, 0]); // one packet, never a fragment
    packet.extend([64, UDP, 0, 0]); // time to live, protocol, checksum
    packet.extend(from.0.octets());
    packet.extend(to.0.octets());
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(from.1.to_be_bytes());
    packet.extend(to.1.to_be_bytes());
    packet.extend(udp_len.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    let sum = match checksum(&[&pseudo_header(from.0, to.0, udp_len), &packet[IP_HEADER..]]) {
        0 => 0xffff, // 0 means "none"
        sum => sum,
    };
    packet[IP_HEADER + 6..IP_HEADER + 8].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The sender and the payload of a UDP packet to `port`; none if it is another kind of packet, or a fragment.
///
/// # Errors
/// When a checksum is wrong. That of UDP is not looked at unless `checksum_ready`.
pub fn open(packet: &[u8], port: u16, checksum_ready: bool) -> Result<Option<(Ipv4Addr, &[u8])>, Damage> {
    let Some(found) = split(packet, port) else { return Ok(None) };
    if checksum(&[found.header]) != 0 {
        return Err(Damage::IpChecksum);
    }
    let sent = u16::from_be_bytes([found.udp[6], found.udp[7]]);
    let length = u16::try_from(found.udp.len()).unwrap_or(u16::MAX);
    if checksum_ready
        && sent != 0
        && checksum(&[&pseudo_header(found.from, found.to, length), found.udp]) != 0
    {
        return Err(Damage::UdpChecksum);
    }
    Ok(Some((found.from, &found.udp[UDP_HEADER..])))
}

struct Parts<'a> {
    header: &'a [u8],
    udp: &'a [u8],
    from: Ipv4Addr,
    to: Ipv4Addr,
}

fn split(packet: &[u8], port: u16) -> Option<Parts<'_>> {
    let first = *packet.first()?;
    let header = packet.get(..usize::from(first & 0xf) * 4).filter(|h| h.len() >= IP_HEADER)?;
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let fragment = word(6) & 0x3fff != 0; // more fragments, or an offset
    if first >> 4 != 4 || header[9] != UDP || fragment {
        return None;
    }
    // Short frames are padded; the header says how much counts.
    let body = packet.get(header.len()..usize::from(word(2)))?;
    let udp_len = usize::from(u16::from_be_bytes([*body.get(4)?, *body.get(5)?]));
    let udp = body.get(..udp_len).filter(|u| u.len() >= UDP_HEADER)?;
    let address = |at: usize| Ipv4Addr::new(header[at], header[at + 1], header[at + 2], header[at + 3]);
    (u16::from_be_bytes([udp[2], udp[3]]) == port).then(|| Parts {
        header,
        udp,
        from: address(12),
        to: address(16),
    })
}

fn pseudo_header(from: Ipv4Addr, to: Ipv4Addr, udp_len: u16) -> [u8; 12] {
    let mut header = [0; 12];
    header[..4].copy_from_slice(&from.octets());
    header[4..8].copy_from_slice(&to.octets());
    header[9] = UDP;
    header[10..].copy_from_slice(&udp_len.to_be_bytes());
    header
}

/// The Internet checksum over the parts; all but the last must be of even length.
#[allow(clippy::cast_possible_truncation)] // folded to 16 bits before
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u64 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FROM: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 0, 0, 1), 67);
    const TO: (Ipv4Addr, u16) = (Ipv4Addr::BROADCAST, 68);

    #[test]
    fn other_packets_are_passed_over() {
        let packet = build(FROM, TO, b"abc");
        assert_eq!(open(&packet, 69, true), Ok(None));
        let mut fragment = packet.clone();
        fragment[6] = 0x20;
        assert_eq!(open(&fragment, 68, true), Ok(None));
        let mut tcp = packet;
        tcp[9] = 6;
        assert_eq!(open(&tcp, 68, true), Ok(None));
    }

    #[test]
    fn a_checksum_left_to_hardware_is_not_checked() {
        let mut packet = build(FROM, TO, b"abc");
        packet[IP_HEADER + 6] ^= 1;
        assert_eq!(open(&packet, 68, true), Err(Damage::UdpChecksum));
        assert!(open(&packet, 68, false).unwrap().is_some());
        packet[IP_HEADER + 6..IP_HEADER + 8].fill(0);
        assert!(open(&packet, 68, true).unwrap().is_some(), "0 means that there is none");
    }

    proptest! {
        #[test]
        fn what_is_built_is_opened(payload in proptest::collection::vec(any::<u8>(), 0..600), padding in 0usize..40) {
            let mut packet = build(FROM, TO, &payload);
            packet.extend(vec![0; padding]);
            prop_assert_eq!(open(&packet, 68, true), Ok(Some((FROM.0, payload.as_slice()))));
        }

        #[test]
        fn any_flipped_bit_is_noticed(payload in proptest::collection::vec(any::<u8>(), 0..60), bit in any::<proptest::sample::Index>()) {
            let packet = build(FROM, TO, &payload);
            let mut damaged = packet.clone();
            let bit = bit.index(packet.len() * 8);
            damaged[bit / 8] ^= 1 << (bit % 8);
            // Passed over, an error, or the same in all that counts: never another payload.
            if let Ok(Some((from, got))) = open(&damaged, 68, true) {
                prop_assert!(from == FROM.0 && got == payload && damaged[IP_HEADER + 6..IP_HEADER + 8] == [0, 0]);
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100), version in any::<bool>()) {
            let mut bytes = bytes;
            if version && !bytes.is_empty() {
                bytes[0] = 0x40 | bytes[0] & 0xf;
            }
            let _ = open(&bytes, 68, true);
        }
    }
}
