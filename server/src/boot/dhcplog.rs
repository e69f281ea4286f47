//! Reads dnsmasq's log (with `log-dhcp`) and tells which machines ask for what. Lines that are not understood are passed
//! over: they stand in our log as they are.

use super::events::{BootEvent, Client};
use crate::nodes::Mac;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// How many transactions are followed at once.
const TRANSACTIONS: usize = 256;
/// How long a machine's repeated questions count as one.
const SAME: Duration = Duration::from_secs(20);

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
    /// Who has been told lately: clients ask several times. The number of their transaction does not tell one boot from
    /// the next, as EDK2 takes the same ones again, also on several machines.
    told: VecDeque<(Instant, Mac, Client)>,
}

impl LogReader {
    /// Reads one line that came at the time `now` and returns what happened, if that is known now.
    pub fn line(&mut self, line: &str, now: Instant) -> Option<BootEvent> {
        let (program, text) = line.split_once(": ")?;
        let program = program.split('[').next()?;
        match program {
            "dnsmasq-dhcp" => self.dhcp(text, now),
            "dnsmasq-tftp" => tftp(text),
            _ => None,
        }
    }

    fn dhcp(&mut self, text: &str, now: Instant) -> Option<BootEvent> {
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
            let fresh = |then: Instant| now.saturating_duration_since(then) < SAME;
            if self.told.iter().any(|(then, m, c)| *m == mac && *c == client && fresh(*then)) {
                return None;
            }
            if self.told.len() >= TRANSACTIONS {
                self.told.pop_front();
            }
            self.told.push_back((now, mac, client));
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

/// The address that a line tells was offered, and to which card.
#[must_use]
pub fn offer(line: &str) -> Option<(Mac, Ipv4Addr)> {
    let text = line.strip_prefix("dnsmasq-dhcp[")?.split_once(": ")?.1.split_once(' ')?.1;
    let mut words = text.strip_prefix("DHCPOFFER(")?.split_once(')')?.1.split_whitespace();
    let address = words.next()?.parse().ok()?;
    Some((words.next()?.parse().ok()?, address))
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
        log.lines().filter_map(|line| reader.line(line, Instant::now())).collect()
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
        let now = Instant::now();
        for id in 0..10_000 {
            let line = format!("dnsmasq-dhcp[7]: {id} DHCPDISCOVER(v0) 52:54:00:00:{:02x}:01", id % 256);
            assert_eq!(reader.line(&line, now), None);
        }
        assert_eq!(reader.open.len(), TRANSACTIONS);
        assert!(reader.line("dnsmasq-dhcp[7]: 9999 tags: v0", now).is_some());
        assert!(reader.line("dnsmasq-dhcp[7]: 9998 tags: ipxe", now).is_some());
        assert!(reader.line("dnsmasq-dhcp[7]: 5 tags: v0", now).is_none(), "forgotten long ago");
    }

    #[test]
    fn asking_again_is_told_once_and_another_boot_again() {
        let mut reader = LogReader::default();
        let start = Instant::now();
        let mut told = |seconds: u64, mac: &str| {
            let now = start + Duration::from_secs(seconds);
            reader.line(&format!("dnsmasq-dhcp[7]: 42 DHCPDISCOVER(v0) {mac}"), now);
            reader.line("dnsmasq-dhcp[7]: 42 tags: ipxe, v0", now).is_some()
        };
        assert!(told(0, "52:54:00:00:00:01"));
        assert!(!told(4, "52:54:00:00:00:01"));
        assert!(told(5, "52:54:00:00:00:02"), "another machine with the same transaction number");
        assert!(told(60, "52:54:00:00:00:01"));
    }

    #[test]
    fn offers_are_read() {
        let mac = mac("7e:16:bc:f9:8c:d1");
        let line = "dnsmasq-dhcp[32104]: 1647621211 DHCPOFFER(v0) 10.91.0.166 7e:16:bc:f9:8c:d1 ";
        assert_eq!(offer(line), Some((mac, Ipv4Addr::new(10, 91, 0, 166))));
        assert_eq!(offer(&line.replace("OFFER", "ACK")), None);
        assert_eq!(offer(&line.replace("dnsmasq-dhcp", "dnsmasq-tftp")), None);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in ".{0,120}", rest in "[0-9a-zA-Z :()/,.]{0,80}") {
            let mut reader = LogReader::default();
            let now = Instant::now();
            for line in [
                line,
                format!("dnsmasq-dhcp[1]: {rest}"),
                format!("dnsmasq-dhcp[1]: 7 {rest}"),
                format!("dnsmasq-dhcp[1]: 7 DHCPOFFER({rest}"),
                format!("dnsmasq-tftp[1]: sent {rest}"),
            ] {
                reader.line(&line, now);
                // Only that it returns is asked here.
                let _ = offer(&line);
            }
        }
    }
}
