//! Finds out who holds the addresses that are to be handed out, before any is: dnsmasq's own way is to ping each address
//! for 3 s, one after the other, which lets 64 nodes that boot at once wait for 19 s (measured). Here a datagram to each
//! address makes the kernel ask by ARP, and its table tells who answered, even hosts that answer no ping.
//!
//! An address that is held is pinned to its holder: it is given to nobody else, and a node that is booted again gets the
//! one that it has.

use crate::nodes::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

/// The most addresses that are asked for; the kernel's table has room for 1024 by default.
pub const LIMIT: u32 = 1024;
/// How many are asked for at once.
const BATCH: u32 = 128;
/// How long their answers are waited for.
const WAIT: Duration = Duration::from_millis(400);
/// The discard service: whoever gets the datagram has nothing to do with it.
const DISCARD: u16 = 9;

/// Who holds which address from `first` to `last` (the first 1024 of them) on `interface`, on which `own` is our address.
///
/// # Errors
/// When datagrams cannot be sent at all or the kernel's table cannot be read.
pub fn holders(
    interface: &str,
    own: Ipv4Addr,
    first: Ipv4Addr,
    last: Ipv4Addr,
) -> io::Result<BTreeMap<Ipv4Addr, Mac>> {
    let (first, last) = (u32::from(first), u32::from(last));
    let last = last.min(first.saturating_add(LIMIT - 1));
    let socket = UdpSocket::bind((own, 0))?;
    socket.set_nonblocking(true)?;
    let mut found = BTreeMap::new();
    let mut start = first;
    while start <= last {
        let end = last.min(start.saturating_add(BATCH - 1));
        for address in start..=end {
            // What cannot be sent is not answered either; the answers are what counts.
            let _ = socket.send_to(&[0], (Ipv4Addr::from(address), DISCARD));
        }
        std::thread::sleep(WAIT);
        // The table of this thread's network namespace, which need not be that of the first thread.
        let table = std::fs::read_to_string("/proc/thread-self/net/arp")?;
        found.extend(
            read_table(&table, interface).filter(|(address, _)| (start..=end).contains(&u32::from(*address))),
        );
        match end.checked_add(1) {
            Some(next) => start = next,
            None => break,
        }
    }
    Ok(found)
}

/// The complete entries of the kernel's ARP table on `interface`.
fn read_table(table: &str, interface: &str) -> impl Iterator<Item = (Ipv4Addr, Mac)> {
    table.lines().filter_map(move |line| {
        let mut words = line.split_whitespace();
        let address = words.next()?.parse().ok()?;
        let flags = words.nth(1)?.strip_prefix("0x").and_then(|f| u32::from_str_radix(f, 16).ok())?;
        let mac = words.next()?.parse().ok()?;
        // Bit 1: somebody answered.
        (words.nth(1)? == interface && flags & 2 != 0).then_some((address, mac))
    })
}

/// Which card gets which address: those that are held stay with their holders, and `listed` nodes that hold none get the
/// first free ones in their order, so that they have the same in each deployment and no two are offered one address.
/// An address occurs once; a card may hold several.
#[must_use]
pub fn reservations(
    first: Ipv4Addr,
    last: Ipv4Addr,
    held: &BTreeMap<Ipv4Addr, Mac>,
    listed: &[Mac],
) -> Vec<(Mac, Ipv4Addr)> {
    let holders: BTreeSet<Mac> = held.values().copied().collect();
    let mut reserved: Vec<(Mac, Ipv4Addr)> = held.iter().map(|(address, mac)| (*mac, *address)).collect();
    let mut free = (u32::from(first)..=u32::from(last))
        .map(Ipv4Addr::from)
        .filter(|address| !held.contains_key(address));
    for mac in listed.iter().filter(|mac| !holders.contains(mac)) {
        match free.next() {
            Some(address) => reserved.push((*mac, address)),
            None => break,
        }
    }
    reserved
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mac(last: u8) -> Mac {
        Mac::new([0x52, 0x54, 0, 0, 0, last]).unwrap()
    }

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, last)
    }

    #[test]
    fn the_kernels_table_is_read() {
        let table = "\
IP address       HW type     Flags       HW address            Mask     Device
10.0.0.5         0x1         0x2         52:54:00:00:00:05     *        br0
10.0.0.6         0x1         0x0         00:00:00:00:00:00     *        br0
10.0.0.7         0x1         0x6         52:54:00:00:00:07     *        br0
10.0.0.8         0x1         0x2         52:54:00:00:00:08     *        eth1
";
        let found: Vec<_> = read_table(table, "br0").collect();
        assert_eq!(found, [(ip(5), mac(5)), (ip(7), mac(7))]);
    }

    #[test]
    fn held_addresses_stay_and_listed_nodes_get_the_first_free_ones() {
        let held = BTreeMap::from([(ip(51), mac(9)), (ip(52), mac(2))]);
        assert_eq!(
            reservations(ip(50), ip(54), &held, &[mac(1), mac(2), mac(3), mac(4), mac(5)]),
            [
                (mac(9), ip(51)),
                (mac(2), ip(52)),
                (mac(1), ip(50)),
                (mac(3), ip(53)),
                (mac(4), ip(54)),
                // No address is left for the fifth.
            ]
        );
    }

    proptest! {
        #[test]
        fn no_table_panics(table in "[0-9a-fx:. *\\n]{0,200}") {
            read_table(&table, "br0").for_each(drop);
        }

        #[test]
        fn no_address_is_reserved_twice(
            held in proptest::collection::btree_map(40u8..80, 1u8..20, 0..20),
            listed in proptest::collection::btree_set(1u8..60, 0..40),
        ) {
            let held: BTreeMap<_, _> = held.into_iter().map(|(a, m)| (ip(a), mac(m))).collect();
            let listed: Vec<Mac> = listed.into_iter().map(mac).collect();
            let reserved = reservations(ip(50), ip(70), &held, &listed);
            let addresses: BTreeSet<Ipv4Addr> = reserved.iter().map(|(_, a)| *a).collect();
            prop_assert_eq!(addresses.len(), reserved.len());
        }
    }
}
