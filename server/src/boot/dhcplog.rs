//! Reads dnsmasq's log (with `log-dhcp`) and tells which machines ask for what. Lines that are not understood are passed
//! over: they stand in our log as they are.

use super::events::{BootEvent, Client};
use crate::nodes::Mac;
use std::collections::VecDeque;
use std::net::IpAddr;

/// How many transactions are followed at once.
const TRANSACTIONS: usize = 256;

/// What dnsmasq has said so far about one transaction.
#[derive(Debug)]
struct Transaction {
    id: u32,
    vendor: Option<String>,
    mac: Option<Mac>,
}

/// The reader of one dnsmasq's log.
#[derive(Debug, Default)]
pub struct LogReader {
    open: VecDeque<Transaction>,
    /// Who has been told lately, with the transaction: clients ask several times in one.
    told: VecDeque<(u32, Mac, Client)>,
}

impl LogReader {
    /// Reads one line and returns what happened, if that is known now.
    pub fn line(&mut self, line: &str) -> Option<BootEvent> {
        let (program, text) = line.split_once(": ")?;
        let program = program.split('[').next()?;
        match program {
            "dnsmasq-dhcp" => self.dhcp(text),
            "dnsmasq-tftp" => tftp(text),
            _ => None,
        }
    }

    fn dhcp(&mut self, text: &str) -> Option<BootEvent> {
        let (id, text) = text.split_once(' ')?;
        let id: u32 = id.parse().ok()?;
        if let Some(vendor) = text.strip_prefix("vendor class: ") {
            self.transaction(id).vendor = Some(vendor.chars().take(64).collect());
            return None;
        }
        if let Some(tags) = text.strip_prefix("tags: ") {
            let at = self.open.iter().position(|t| t.id == id)?;
            let done = self.open.remove(at)?;
            let client = client(done.vendor.as_deref(), tags.split(", ").any(|tag| tag.trim() == "ipxe"));
            let mac = done.mac?;
            if self.told.contains(&(id, mac, client)) {
                return None;
            }
            if self.told.len() >= TRANSACTIONS {
                self.told.pop_front();
            }
            self.told.push_back((id, mac, client));
            return Some(BootEvent::Seen { mac, client });
        }
        let (verb, rest) = text.split_once('(')?;
        let mut words = rest.split_once(')')?.1.split_whitespace();
        match verb {
            "DHCPDISCOVER" | "PXE" => {
                // The address that is asked for stands before the card's, if there is one.
                let mac = words.find_map(|word| word.parse().ok())?;
                self.transaction(id).mac = Some(mac);
                None
            }
            "DHCPACK" => {
                let address: IpAddr = words.next()?.parse().ok()?;
                let mac = words.next()?.parse().ok()?;
                Some(BootEvent::Address { mac, address })
            }
            _ => None,
        }
    }

    fn transaction(&mut self, id: u32) -> &mut Transaction {
        let at = match self.open.iter().position(|t| t.id == id) {
            Some(at) => at,
            None => {
                if self.open.len() >= TRANSACTIONS {
                    self.open.pop_front();
                }
                self.open.push_back(Transaction { id, vendor: None, mac: None });
                self.open.len() - 1
            }
        };
        &mut self.open[at]
    }
}

fn client(vendor: Option<&str>, ipxe: bool) -> Client {
    let arch = |rest: &str| rest.split(':').next().and_then(|n| n.parse().ok()).unwrap_or(u16::MAX);
    match vendor {
        _ if ipxe => Client::Ipxe,
        Some(vendor) => {
            match (vendor.strip_prefix("PXEClient:Arch:"), vendor.strip_prefix("HTTPClient:Arch:")) {
                (Some(rest), _) => Client::Pxe(arch(rest)),
                (_, Some(rest)) => Client::HttpBoot(arch(rest)),
                _ => Client::Other,
            }
        }
        None => Client::Other,
    }
}

fn tftp(text: &str) -> Option<BootEvent> {
    let (path, address) = text.strip_prefix("sent ")?.rsplit_once(" to ")?;
    let file = path.rsplit('/').next()?.chars().take(64).collect();
    Some(BootEvent::Tftp { address: address.trim().parse().ok()?, file })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(log: &str) -> Vec<BootEvent> {
        let mut reader = LogReader::default();
        log.lines().filter_map(|line| reader.line(line)).collect()
    }

    fn mac(text: &str) -> Mac {
        text.parse().unwrap()
    }

    #[test]
    fn a_whole_lease_is_read() {
        let log = "\
dnsmasq[32104]: started, version 2.90 DNS disabled
dnsmasq-dhcp[32104]: DHCP, IP range 10.91.0.50 -- 10.91.0.200, lease time 1h
dnsmasq-dhcp[32104]: 1647621211 available DHCP range: 10.91.0.50 -- 10.91.0.200
dnsmasq-dhcp[32104]: 1647621211 vendor class: udhcp 1.35.0
dnsmasq-dhcp[32104]: 1647621211 DHCPDISCOVER(v0) 7e:16:bc:f9:8c:d1 
dnsmasq-dhcp[32104]: 1647621211 tags: v0
dnsmasq-dhcp[32104]: 1647621211 DHCPOFFER(v0) 10.91.0.166 7e:16:bc:f9:8c:d1 
dnsmasq-dhcp[32104]: 1647621211 DHCPACK(v0) 10.91.0.166 7e:16:bc:f9:8c:d1 
dnsmasq-tftp[32104]: sent /usr/lib/ipxe/undionly.kpxe to 10.91.0.60";
        let mac = mac("7e:16:bc:f9:8c:d1");
        assert_eq!(
            read(log),
            [
                BootEvent::Seen { mac, client: Client::Other },
                BootEvent::Address { mac, address: IpAddr::from([10, 91, 0, 166]) },
                BootEvent::Tftp { address: IpAddr::from([10, 91, 0, 60]), file: "undionly.kpxe".into() },
            ]
        );
    }

    #[test]
    fn the_stages_of_a_boot_are_told_apart() {
        for (lines, client) in [
            (
                "vendor class: PXEClient:Arch:00007:UNDI:003016|DHCPDISCOVER(v0) 52:54:00:00:00:01 |tags: efi64, v0",
                Client::Pxe(7),
            ),
            (
                "vendor class: PXEClient:Arch:00000:UNDI:002001|PXE(v0) 52:54:00:00:00:01 proxy|tags: bios, v0",
                Client::Pxe(0),
            ),
            (
                "vendor class: PXEClient:Arch:00000:UNDI:002001|DHCPDISCOVER(v0) 10.0.0.7 52:54:00:00:00:01 |tags: bios, ipxe, v0",
                Client::Ipxe,
            ),
            (
                "vendor class: HTTPClient:Arch:00016:UNDI:003001|DHCPDISCOVER(v0) 52:54:00:00:00:01 |tags: http64, v0",
                Client::HttpBoot(16),
            ),
        ] {
            let log: String = lines.split('|').map(|line| format!("dnsmasq-dhcp[7]: 42 {line}\n")).collect();
            assert_eq!(read(&log), [BootEvent::Seen { mac: mac("52:54:00:00:00:01"), client }], "{lines}");
        }
    }

    #[test]
    fn interleaved_transactions_are_kept_apart_and_bounded() {
        let mut reader = LogReader::default();
        for id in 0..10_000 {
            assert_eq!(
                reader.line(&format!("dnsmasq-dhcp[7]: {id} DHCPDISCOVER(v0) 52:54:00:00:00:01")),
                None
            );
        }
        assert_eq!(reader.open.len(), TRANSACTIONS);
        assert!(reader.line("dnsmasq-dhcp[7]: 9999 tags: v0").is_some());
        assert!(reader.line("dnsmasq-dhcp[7]: 9998 tags: ipxe").is_some());
        assert!(reader.line("dnsmasq-dhcp[7]: 5 tags: v0").is_none(), "forgotten long ago");
    }

    #[test]
    fn asking_again_in_one_transaction_is_told_once() {
        let ask =
            "dnsmasq-dhcp[7]: 42 DHCPDISCOVER(v0) 52:54:00:00:00:01\ndnsmasq-dhcp[7]: 42 tags: ipxe, v0\n";
        assert_eq!(read(&ask.repeat(3)).len(), 1);
        let again = ask.replace(" 42 ", " 43 ");
        assert_eq!(read(&format!("{ask}{again}")).len(), 2);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".{0,120}", rest in "[0-9a-zA-Z :()/,.]{0,80}") {
            let mut reader = LogReader::default();
            reader.line(&line);
            reader.line(&format!("dnsmasq-dhcp[1]: {rest}"));
            reader.line(&format!("dnsmasq-dhcp[1]: 7 {rest}"));
            reader.line(&format!("dnsmasq-tftp[1]: sent {rest}"));
        }
    }
}
