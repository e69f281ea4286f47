//! DHCP messages (RFC 2131): what the client sends, and what it takes from an answer. Pure: no sockets, no clock.
//!
//! dhcproto reads and writes them. It stops at the first option that it cannot read and says nothing, so one odd option
//! of a server would hide all that follow, the message type among them; and in debug builds it panics on an option 94 of a wrong
//! length.
//! Hence an answer is first reduced to the options that are used here, those of a wrong length left out.

use super::mac::Mac;
use anyhow::{Context, Result, bail};
use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, OptionCode};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use std::net::Ipv4Addr;
use std::time::Duration;

/// Where options begin in a message: after the fixed part and the magic number.
const OPTIONS: usize = 240;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Some relays drop what is shorter than BOOTP was.
const SHORTEST: usize = 300;
/// An option's code in the raw message.
const PAD: u8 = 0;
const END: u8 = 255;

/// What a server granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The node's address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix: u8,
    /// The server that granted it.
    pub server: Ipv4Addr,
    /// Routes: target, prefix, gateway (none: on the link itself). The default route has prefix 0.
    pub routes: Vec<(Ipv4Addr, u8, Option<Ipv4Addr>)>,
    /// Name servers, at most three.
    pub dns: Vec<Ipv4Addr>,
    /// The host name that the server has for this node.
    pub hostname: Option<String>,
    /// The domain to search.
    pub domain: Option<String>,
    /// The largest packet of the link.
    pub mtu: Option<u32>,
    /// How long it may be used; none is for ever.
    pub lifetime: Option<Duration>,
    /// When to ask the server again.
    pub renew: Duration,
    /// When to ask any server.
    pub rebind: Duration,
}

/// An answer of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It offers an address.
    Offer(Lease),
    /// It grants the address that was asked for.
    Ack(Lease),
    /// It refuses, perhaps with a reason.
    Nak(String),
}

/// What the client says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Say<'a> {
    /// "Who gives addresses?"
    Discover,
    /// "I take this offer."
    Take(&'a Lease),
    /// "I want to keep my address."
    Keep(&'a Lease),
}

/// A message of the client with the number `xid`. `seconds` is how long it has been asking; `broadcast` asks the server to
/// answer to everybody, for networks where answers to an address that is not set yet get lost.
///
/// # Errors
/// When it cannot be written, which would be a bug.
pub fn message(say: Say, mac: Mac, xid: u32, seconds: u16, broadcast: bool) -> Result<Vec<u8>> {
    let none = Ipv4Addr::UNSPECIFIED;
    let own = if let Say::Keep(lease) = say { lease.address } else { none };
    let mut message = Message::new_with_id(xid, own, none, none, none, &mac.0);
    message.set_secs(seconds);
    if broadcast {
        message.set_flags(Flags::default().set_broadcast());
    }
    let options = message.opts_mut();
    let kind = if say == Say::Discover { MessageType::Discover } else { MessageType::Request };
    options.insert(DhcpOption::MessageType(kind));
    let mut id = vec![1]; // of the type Ethernet
    id.extend(mac.0);
    options.insert(DhcpOption::ClientIdentifier(id));
    options.insert(DhcpOption::ClassIdentifier(b"ka-agent".to_vec()));
    options.insert(DhcpOption::MaxMessageSize(1472));
    options.insert(DhcpOption::ParameterRequestList(vec![
        OptionCode::SubnetMask,
        OptionCode::ClasslessStaticRoute,
        OptionCode::Router,
        OptionCode::DomainNameServer,
        OptionCode::Hostname,
        OptionCode::DomainName,
        OptionCode::InterfaceMtu,
        OptionCode::AddressLeaseTime,
        OptionCode::Renewal,
        OptionCode::Rebinding,
        OptionCode::ServerIdentifier,
    ]));
    if let Say::Take(lease) = say {
        options.insert(DhcpOption::RequestedIpAddress(lease.address));
        options.insert(DhcpOption::ServerIdentifier(lease.server));
    }
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).context("writing a DHCP message")?;
    if bytes.len() < SHORTEST {
        bytes.resize(SHORTEST, 0);
    }
    Ok(bytes)
}

/// Takes an answer to the message `xid` of `mac` apart; none if it is not for us.
///
/// # Errors
/// When it is for us and makes no sense.
pub fn parse(bytes: &[u8], mac: Mac, xid: u32) -> Result<Option<Answer>> {
    let ours = bytes.len() >= OPTIONS
        && bytes[0] == 2 // an answer
        && bytes[1] == 1 // for Ethernet
        && bytes[2] == 6
        && bytes[4..8] == xid.to_be_bytes()
        && bytes[28..34] == mac.0
        && bytes[236..240] == MAGIC;
    if !ours {
        return Ok(None);
    }
    let mut reduced = bytes[..OPTIONS].to_vec();
    // Server name and boot file are of no use here, and dhcproto wants them well formed.
    reduced[44..236].fill(0);
    keep_usable(&bytes[OPTIONS..], &mut reduced);
    reduced.push(END);
    let message = Message::decode(&mut Decoder::new(&reduced)).context("reading a DHCP answer")?;
    let kind = message.opts().msg_type().context("DHCP answer without a message type")?;
    Ok(match kind {
        MessageType::Offer => Some(Answer::Offer(lease(&message)?)),
        MessageType::Ack => Some(Answer::Ack(lease(&message)?)),
        MessageType::Nak => Some(Answer::Nak(match message.opts().get(OptionCode::Message) {
            Some(DhcpOption::Message(text)) if !text.is_empty() => text.clone(),
            _ => "no reason given".to_owned(),
        })),
        _ => None,
    })
}

/// Copies the options that are used here, each once, if their length is right; a long one that comes in pieces
/// (RFC 3396) is used by its first piece only.
fn keep_usable(mut options: &[u8], out: &mut Vec<u8>) {
    let mut seen = [false; 256];
    while let [code, rest @ ..] = options {
        match (*code, rest) {
            (PAD, _) => options = rest,
            (END, _) | (_, []) => return,
            (code, [len, rest @ ..]) => {
                let Some((data, after)) = rest.split_at_checked(usize::from(*len)) else { return };
                let usable = match code {
                    1 | 51 | 54 | 58 | 59 => data.len() == 4,
                    3 | 6 => !data.is_empty() && data.len() % 4 == 0,
                    12 | 15 | 56 => std::str::from_utf8(data).is_ok(),
                    26 => data.len() == 2,
                    53 => data.len() == 1,
                    121 => classless_is_sound(data),
                    _ => false,
                };
                if usable && !seen[usize::from(code)] {
                    seen[usize::from(code)] = true;
                    out.extend([code, *len]);
                    out.extend(data);
                }
                options = after;
            }
        }
    }
}

/// Whether classless routes (RFC 3442) are whole.
fn classless_is_sound(mut data: &[u8]) -> bool {
    while let [prefix, rest @ ..] = data {
        let Some(after) = rest.get(usize::from(*prefix).div_ceil(8) + 4..) else { return false };
        if *prefix > 32 {
            return false;
        }
        data = after;
    }
    true
}

fn lease(message: &Message) -> Result<Lease> {
    let options = message.opts();
    let address = message.yiaddr();
    if address.is_unspecified() || address.is_broadcast() || address.is_multicast() || address.is_loopback() {
        bail!("DHCP server gave {address}, which cannot be a node's address");
    }
    let prefix = match options.get(OptionCode::SubnetMask) {
        Some(DhcpOption::SubnetMask(mask)) => {
            let bits = u32::from(*mask);
            if bits.leading_ones() + bits.trailing_zeros() != 32 || bits == 0 {
                bail!("DHCP server gave {mask}, which is no network mask");
            }
            u8::try_from(bits.leading_ones())?
        }
        // Before masks, the first bits told; servers that give none mean that.
        _ => match address.octets()[0] {
            0..128 => 8,
            128..192 => 16,
            _ => 24,
        },
    };
    let server = match options.get(OptionCode::ServerIdentifier) {
        Some(DhcpOption::ServerIdentifier(server)) => *server,
        _ => bail!("DHCP answer that does not name its server"),
    };
    let routes = match (options.get(OptionCode::ClasslessStaticRoute), options.get(OptionCode::Router)) {
        (Some(DhcpOption::ClasslessStaticRoute(routes)), _) => routes
            .iter()
            .map(|(net, gateway)| {
                (net.network(), net.prefix_len(), (!gateway.is_unspecified()).then_some(*gateway))
            })
            .collect(),
        (_, Some(DhcpOption::Router(routers))) => {
            routers.iter().take(1).map(|router| (Ipv4Addr::UNSPECIFIED, 0, Some(*router))).collect()
        }
        _ => Vec::new(),
    };
    let seconds = |code| match options.get(code) {
        Some(DhcpOption::AddressLeaseTime(s) | DhcpOption::Renewal(s) | DhcpOption::Rebinding(s)) => Some(*s),
        _ => None,
    };
    let lifetime = seconds(OptionCode::AddressLeaseTime).filter(|s| *s != u32::MAX).map(|s| s.max(20));
    // Without a lifetime nothing is ever renewed.
    let whole = lifetime.unwrap_or(u32::MAX);
    let rebind = seconds(OptionCode::Rebinding).filter(|s| *s < whole).unwrap_or(whole - whole / 8);
    let renew = seconds(OptionCode::Renewal).filter(|s| *s < rebind).unwrap_or(whole / 2).min(rebind);
    let text = |code| match options.get(code) {
        Some(DhcpOption::Hostname(t) | DhcpOption::DomainName(t)) => clean_name(t),
        _ => None,
    };
    Ok(Lease {
        address,
        prefix,
        server,
        routes,
        dns: match options.get(OptionCode::DomainNameServer) {
            Some(DhcpOption::DomainNameServer(servers)) => servers.iter().take(3).copied().collect(),
            _ => Vec::new(),
        },
        hostname: text(OptionCode::Hostname),
        domain: text(OptionCode::DomainName),
        mtu: match options.get(OptionCode::InterfaceMtu) {
            // Less than IPv4's minimum is a mistake or an attack.
            Some(DhcpOption::InterfaceMtu(mtu)) if *mtu >= 576 => Some((*mtu).into()),
            _ => None,
        },
        lifetime: lifetime.map(|s| Duration::from_secs(s.into())),
        renew: Duration::from_secs(renew.into()),
        rebind: Duration::from_secs(rebind.into()),
    })
}

/// A host or domain name with nothing in it that could mean something elsewhere (a newline in resolv.conf, a slash).
fn clean_name(text: &str) -> Option<String> {
    let name = text.trim_matches('\0').trim_end_matches('.');
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (!name.is_empty() && name.len() <= 253 && !name.starts_with(['-', '.']) && name.chars().all(fine))
        .then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    const XID: u32 = 0x1234_5678;

    /// An answer with these options, each code, length and data.
    fn answer(options: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; OPTIONS];
        bytes[..3].copy_from_slice(&[2, 1, 6]);
        bytes[4..8].copy_from_slice(&XID.to_be_bytes());
        bytes[16..20].copy_from_slice(&[10, 9, 8, 7]);
        bytes[28..34].copy_from_slice(&MAC.0);
        bytes[236..240].copy_from_slice(&MAGIC);
        bytes.extend(options);
        bytes
    }

    const ACK: &[u8] = &[53, 1, 5, 54, 4, 10, 0, 0, 1, 1, 4, 255, 255, 0, 0];

    fn ack(more: &[u8]) -> Lease {
        match parse(&answer(&[ACK, more].concat()), MAC, XID).unwrap() {
            Some(Answer::Ack(lease)) => lease,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_full_answer_is_understood() {
        let lease = ack(&[
            &[
                3, 8, 10, 9, 0, 1, 10, 9, 0, 2, 6, 4, 10, 9, 0, 3, 12, 3, b'n', b'0', b'7', 15, 3, b'l',
                b'a', b'b',
            ][..],
            &[26, 2, 5, 0xdc, 51, 4, 0, 0, 0x0e, 0x10, 255],
        ]
        .concat());
        assert_eq!(
            lease,
            Lease {
                address: Ipv4Addr::new(10, 9, 8, 7),
                prefix: 16,
                server: Ipv4Addr::new(10, 0, 0, 1),
                routes: vec![(Ipv4Addr::UNSPECIFIED, 0, Some(Ipv4Addr::new(10, 9, 0, 1)))],
                dns: vec![Ipv4Addr::new(10, 9, 0, 3)],
                hostname: Some("n07".into()),
                domain: Some("lab".into()),
                mtu: Some(1500),
                lifetime: Some(Duration::from_secs(3600)),
                renew: Duration::from_secs(1800),
                rebind: Duration::from_secs(3150),
            }
        );
    }

    /// dhcproto alone stops at the host name (not UTF-8) and at the short MTU, and never sees what follows.
    #[test]
    fn one_bad_option_does_not_hide_the_others() {
        let bad = answer(&[&[12, 2, 0xff, 0xfe][..], ACK].concat());
        let alone = Message::decode(&mut Decoder::new(&bad)).unwrap();
        assert_eq!(alone.opts().msg_type(), None, "dhcproto learned to go on: keep_usable may go");
        let lease = parse(&answer(&[&[12, 2, 0xff, 0xfe, 26, 1, 5][..], ACK].concat()), MAC, XID).unwrap();
        assert!(matches!(lease, Some(Answer::Ack(Lease { hostname: None, mtu: None, prefix: 16, .. }))));
    }

    /// Found by a property test: dhcproto asserts the length of option 94 (in debug builds).
    #[test]
    fn an_option_that_dhcproto_panics_on_is_passed_over() {
        let evil = answer(&[&[94, 2, 1, 2][..], ACK].concat());
        let alone = std::panic::catch_unwind(|| Message::decode(&mut Decoder::new(&evil)).is_ok());
        assert_eq!(alone.is_err(), cfg!(debug_assertions), "dhcproto was mended");
        assert!(matches!(parse(&evil, MAC, XID).unwrap(), Some(Answer::Ack(_))));
    }

    #[test]
    fn classless_routes_replace_the_router() {
        let lease = ack(&[3, 4, 10, 9, 0, 1, 121, 14, 24, 192, 168, 5, 0, 0, 0, 0, 0, 10, 9, 0, 9, 0, 0]);
        assert_eq!(lease.routes.len(), 1, "a route cut short makes the option unusable: {:?}", lease.routes);
        let lease = ack(&[3, 4, 10, 9, 0, 1, 121, 13, 24, 192, 168, 5, 0, 0, 0, 0, 0, 10, 9, 0, 9]);
        assert_eq!(
            lease.routes,
            [
                (Ipv4Addr::new(192, 168, 5, 0), 24, None),
                (Ipv4Addr::UNSPECIFIED, 0, Some(Ipv4Addr::new(10, 9, 0, 9)))
            ]
        );
    }

    #[test]
    fn answers_for_others_are_passed_over() {
        let mut other = answer(ACK);
        other[33] ^= 1;
        assert_eq!(parse(&other, MAC, XID).unwrap(), None);
        assert_eq!(parse(&answer(ACK), MAC, XID + 1).unwrap(), None);
        let mut request = answer(ACK);
        request[0] = 1;
        assert_eq!(parse(&request, MAC, XID).unwrap(), None);
    }

    #[test]
    fn nonsense_is_refused() {
        let mut zero = answer(ACK);
        zero[16..20].fill(0);
        assert!(parse(&zero, MAC, XID).is_err());
        assert!(parse(&answer(&[53, 1, 5]), MAC, XID).is_err(), "no server");
        assert!(
            parse(&answer(&[53, 1, 5, 54, 4, 10, 0, 0, 1, 1, 4, 255, 0, 255, 0]), MAC, XID).is_err(),
            "mask"
        );
        assert!(parse(&answer(&[54, 4, 10, 0, 0, 1]), MAC, XID).is_err(), "no type");
        let nak = parse(&answer(&[53, 1, 6, 56, 2, b'n', b'o']), MAC, XID).unwrap();
        assert_eq!(nak, Some(Answer::Nak("no".into())));
        let lease = ack(&[12, 5, b'a', b'\n', b'b', b' ', b'c']);
        assert_eq!(lease.hostname, None);
    }

    #[test]
    fn an_endless_lease_is_never_renewed_soon() {
        assert_eq!(ack(&[51, 4, 255, 255, 255, 255]).lifetime, None);
        assert!(ack(&[]).renew > Duration::from_secs(1 << 30));
        // Times in the wrong order are replaced by the usual ones.
        let odd = ack(&[51, 4, 0, 0, 0, 100, 58, 4, 0, 0, 1, 0, 59, 4, 0, 0, 1, 0]);
        assert_eq!((odd.renew.as_secs(), odd.rebind.as_secs()), (50, 88));
    }

    #[test]
    fn what_the_client_says() {
        let lease = ack(&[]);
        for (say, kind) in [(Say::Discover, 1), (Say::Take(&lease), 3), (Say::Keep(&lease), 3)] {
            let bytes = message(say, MAC, XID, 7, true).unwrap();
            assert!(bytes.len() >= SHORTEST && bytes[0] == 1 && bytes[2] == 6);
            assert_eq!((&bytes[4..8], &bytes[8..12]), (&XID.to_be_bytes()[..], &[0, 7, 0x80, 0][..]));
            assert_eq!(&bytes[28..34], MAC.0);
            let own = if matches!(say, Say::Keep(_)) { lease.address.octets() } else { [0; 4] };
            assert_eq!(bytes[12..16], own);
            let decoded = Message::decode(&mut Decoder::new(&bytes)).unwrap();
            assert_eq!(u8::from(decoded.opts().msg_type().unwrap()), kind);
            assert_eq!(decoded.opts().contains(OptionCode::ServerIdentifier), matches!(say, Say::Take(_)));
        }
    }

    proptest! {
        #[test]
        fn no_options_panic(options in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&answer(&options), MAC, XID);
        }

        #[test]
        fn no_usable_looking_options_panic(
            options in proptest::collection::vec(
                (proptest::sample::select(vec![1u8, 3, 6, 12, 15, 26, 51, 53, 54, 56, 58, 59, 121, 77]),
                 proptest::collection::vec(any::<u8>(), 0..20)), 0..12),
            fixed in proptest::collection::vec(any::<u8>(), 12..28),
        ) {
            let mut bytes = answer(&[53, 1, 5, 54, 4, 1, 2, 3, 4]);
            bytes[8..8 + fixed.len()].copy_from_slice(&fixed);
            for (code, data) in options {
                bytes.push(code);
                bytes.push(u8::try_from(data.len()).unwrap());
                bytes.extend(data);
            }
            if let Ok(Some(Answer::Ack(lease))) = parse(&bytes, MAC, XID) {
                prop_assert!((1..=32).contains(&lease.prefix));
                prop_assert!(lease.renew <= lease.rebind);
                prop_assert!(lease.lifetime.is_none_or(|l| lease.rebind <= l));
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes, MAC, XID);
        }
    }
}
