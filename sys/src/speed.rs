//! How fast this machine's network interfaces are, from sysfs, and how a node says so in a fact to the server.

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{SockaddrIn, SockaddrIn6};
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

/// What the name of a fact begins with; the interface follows.
const FACT: &str = "speed of ";
const UNIT: &str = " Mbit/s";
/// The longest name that the kernel gives an interface.
const NAME: usize = 15;

/// The speed of a network interface; shown as `eth0: 1000 Mbit/s`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Speed {
    /// The kernel's name of the interface.
    pub interface: String,
    /// Megabits a second, never 0.
    pub megabits: u32,
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}{UNIT}", self.interface, self.megabits)
    }
}

impl Speed {
    /// As a fact: its name and its value, `speed of eth0` and `1000 Mbit/s`.
    #[must_use]
    pub fn fact(&self) -> (String, String) {
        (format!("{FACT}{}", self.interface), format!("{}{UNIT}", self.megabits))
    }

    /// From a fact; nothing when that is about something else, or is none that [`Speed::fact`] makes.
    #[must_use]
    pub fn from_fact(name: &str, value: &str) -> Option<Self> {
        let interface = name.strip_prefix(FACT)?;
        let visible = |c: char| !c.is_control() && !c.is_whitespace();
        if interface.is_empty() || interface.len() > NAME || !interface.chars().all(visible) {
            return None;
        }
        let megabits = parse(value.strip_suffix(UNIT)?)?;
        Some(Self { interface: interface.to_owned(), megabits })
    }
}

/// Drivers that do not know say -1, as a signed or an unsigned number, or 0.
fn parse(text: &str) -> Option<u32> {
    text.trim().parse().ok().filter(|speed| ![0, u32::MAX].contains(speed))
}

/// Megabits a second of an interface, where its driver says.
#[must_use]
pub fn speed_of(interface: &str) -> Option<u32> {
    // A link that is down has no speed: reading the file fails.
    parse(&std::fs::read_to_string(Path::new("/sys/class/net").join(interface).join("speed")).ok()?)
}

/// The speeds of those interfaces that have an address which others could reach: no loopback, no link-local one. Those
/// whose speed is not known are left out; all are when the kernel does not list the addresses.
#[must_use]
pub fn speeds() -> Vec<Speed> {
    let Ok(addresses) = getifaddrs() else { return Vec::new() };
    let reachable = addresses.filter(|entry| {
        let Some(address) = &entry.address else { return false };
        let v4 = address.as_sockaddr_in().map(SockaddrIn::ip);
        let v6 = address.as_sockaddr_in6().map(SockaddrIn6::ip);
        v4.is_some_and(|ip| !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified())
            || v6.is_some_and(|ip| !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified())
    });
    // An address with a label (`eth0:1`) is listed under the label.
    let names = reachable.map(|entry| entry.interface_name.split(':').next().unwrap_or_default().to_owned());
    let names: BTreeSet<String> = names.collect();
    let speed = |interface: String| Some(Speed { megabits: speed_of(&interface)?, interface });
    names.into_iter().filter_map(speed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_driver_does_not_know_is_no_speed() {
        assert_eq!(parse("1000\n"), Some(1000));
        for text in ["-1\n", "4294967295\n", "0\n", "", "fast", "10000000000000"] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(speed_of("lo"), None);
        assert_eq!(speed_of("no-such-interface"), None);
        assert!(speeds().iter().all(|speed| speed.interface != "lo" && speed.megabits > 0));
    }

    #[test]
    fn a_fact_that_is_no_speed_is_none() {
        for (name, value) in [
            ("serial", "7"),
            ("speed of eth0", "-1 Mbit/s"),
            ("speed of eth0", "0 Mbit/s"),
            ("speed of eth0", "1000"),
            ("speed of ", "1000 Mbit/s"),
            ("speed of a\nline", "1000 Mbit/s"),
            ("speed of longer-than-the-kernel-allows", "1000 Mbit/s"),
        ] {
            assert_eq!(Speed::from_fact(name, value), None, "{name}: {value}");
        }
    }

    proptest! {
        #[test]
        fn facts_go_there_and_back(interface in "[a-z]{1,8}[0-9]{0,4}", megabits in 1..u32::MAX) {
            let speed = Speed { interface, megabits };
            let (name, value) = speed.fact();
            prop_assert_eq!(Speed::from_fact(&name, &value), Some(speed));
        }

        #[test]
        fn any_fact_is_taken_or_left(name in "(speed of )?.{0,20}", value in ".{0,12}( Mbit/s)?") {
            if let Some(speed) = Speed::from_fact(&name, &value) {
                prop_assert!(speed.megabits > 0 && speed.interface.len() <= NAME);
                prop_assert!(!speed.to_string().contains(char::is_control));
            }
        }
    }
}
