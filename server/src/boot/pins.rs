//! Pins an address to the card that it was offered to, at the moment of the offer.
//!
//! dnsmasq chooses by a hash of the card's address and remembers an address only once it is leased. UEFI collects offers
//! for some seconds before it asks for one; of two nodes that are switched on together and were offered the same, the
//! second is refused, and then EDK2 gives up booting from the network (seen with three of the same hash: one booted).
//! So each offer, read from dnsmasq's log, becomes a reservation in a directory that dnsmasq watches.

use super::dhcplog;
use crate::nodes::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// The reservations of one dnsmasq.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    addresses: BTreeMap<Ipv4Addr, Mac>,
    macs: BTreeSet<Mac>,
}

impl Pins {
    /// Reservations in `directory`, which dnsmasq watches; `reserved` ones stand in its configuration already.
    #[must_use]
    pub fn new(directory: PathBuf, reserved: &[(Mac, Ipv4Addr)]) -> Self {
        let addresses = reserved.iter().map(|(mac, address)| (*address, *mac)).collect();
        Self { directory, addresses, macs: reserved.iter().map(|(mac, _)| *mac).collect() }
    }

    /// Reads a line of dnsmasq's log, and pins the address if it tells of an offer of one that is not pinned.
    pub fn line(&mut self, line: &str) {
        let Some((mac, address)) = dhcplog::offer(line) else { return };
        // Each address is pinned once: the range bounds how many there are.
        if self.macs.contains(&mac) || self.addresses.contains_key(&address) {
            return;
        }
        match self.write(mac, address) {
            Ok(()) => {
                self.addresses.insert(address, mac);
                self.macs.insert(mac);
            }
            // Then two nodes may be offered one address, as without pins.
            Err(e) => log::warn!("pinning {address} to {mac} in {}: {e}", self.directory.display()),
        }
    }

    fn write(&self, mac: Mac, address: Ipv4Addr) -> io::Result<()> {
        // Closing the file is what dnsmasq waits for; it is too short to be read half-written.
        std::fs::write(self.directory.join(mac.to_string().replace(':', "-")), format!("{mac},{address}\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_are_pinned_once() {
        let directory = tempfile::tempdir().unwrap();
        let reserved = [("52:54:00:00:00:01".parse().unwrap(), Ipv4Addr::new(10, 0, 0, 51))];
        let mut pins = Pins::new(directory.path().to_path_buf(), &reserved);
        for (address, mac) in [
            ("10.0.0.51", "52:54:00:00:00:02"), // another's
            ("10.0.0.52", "52:54:00:00:00:01"), // it has one
            ("10.0.0.53", "52:54:00:00:00:03"),
            ("10.0.0.53", "52:54:00:00:00:04"), // taken just now
            ("10.0.0.54", "52:54:00:00:00:03"), // it has one now
        ] {
            pins.line(&format!("dnsmasq-dhcp[1]: 42 DHCPOFFER(v0) {address} {mac} "));
        }
        pins.line("dnsmasq-dhcp[1]: 42 DHCPACK(v0) 10.0.0.55 52:54:00:00:00:05 ");
        let files: Vec<_> =
            std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(files, ["52-54-00-00-00-03"]);
        let text = std::fs::read_to_string(directory.path().join("52-54-00-00-00-03")).unwrap();
        assert_eq!(text, "52:54:00:00:00:03,10.0.0.53\n");
    }
}
