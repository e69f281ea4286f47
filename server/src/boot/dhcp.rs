//! How DHCP is done on the install network: beside another server (the default: it hands out no address and so can take
//! none away), fully, or not at all; and which addresses are handed out.

use ka_sys::ifaddr::Ipv4Net;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// The most addresses that a range derived from the interface holds.
const DERIVED_LIMIT: u32 = super::scan::LIMIT;

/// What we do about DHCP, as the operator says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dhcp {
    /// Another DHCP server hands out addresses; we only add what to boot (proxy-DHCP).
    Proxy,
    /// We hand out addresses from a range derived from the interface's own address.
    Auto,
    /// We hand out addresses of this range.
    Range(Ipv4Addr, Ipv4Addr),
    /// DHCP is somebody else's work altogether; only TFTP and HTTP are served.
    Off,
}

/// What is wrong with a DHCP setting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a setting.
    #[error("`{0}` is not a DHCP setting (examples: 10.0.0.50-10.0.0.200, auto, proxy, off)")]
    Syntax(String),
    /// The range is not within the interface's network.
    #[error("the range {0}-{1} is not within {2}, the network of the interface")]
    Outside(Ipv4Addr, Ipv4Addr, Ipv4Net),
    /// The range holds an address that cannot be handed out.
    #[error("the range {0}-{1} holds {2}, which is {3}")]
    Holds(Ipv4Addr, Ipv4Addr, Ipv4Addr, &'static str),
    /// The network is too small.
    #[error("the network {0} has no room for nodes")]
    Small(Ipv4Net),
}

impl FromStr for Dhcp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::Syntax(text.to_owned());
        match text {
            "proxy" => Ok(Self::Proxy),
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => {
                let (first, last) = text.split_once(['-', ',']).ok_or_else(wrong)?;
                let first: Ipv4Addr = first.trim().parse().map_err(|_| wrong())?;
                let last: Ipv4Addr = last.trim().parse().map_err(|_| wrong())?;
                if first <= last { Ok(Self::Range(first, last)) } else { Err(wrong()) }
            }
        }
    }
}

impl fmt::Display for Dhcp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Proxy => f.write_str("proxy"),
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Range(first, last) => write!(f, "{first}-{last}"),
        }
    }
}

/// What we do about DHCP on one network, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Proxy-DHCP.
    Proxy,
    /// Addresses from the first to the last are handed out.
    Full(Ipv4Addr, Ipv4Addr),
    /// Nothing.
    Off,
}

impl Dhcp {
    /// Fits the setting to the network of the interface.
    ///
    /// # Errors
    /// When the range is not within the network, holds our own, the network's or the broadcast address, or there is no
    /// room.
    pub fn plan(self, net: Ipv4Net) -> Result<Plan, Error> {
        let (low, high) = (u32::from(net.network()), u32::from(net.broadcast()));
        let own = u32::from(net.address);
        match self {
            Self::Proxy => Ok(Plan::Proxy),
            Self::Off => Ok(Plan::Off),
            Self::Auto => {
                if net.prefix > 30 {
                    return Err(Error::Small(net));
                }
                // The larger side of our own address.
                let (first, last) =
                    if own - low > high - own { (low + 1, own - 1) } else { (own + 1, high - 1) };
                if first > last {
                    return Err(Error::Small(net));
                }
                let last = last.min(first.saturating_add(DERIVED_LIMIT - 1));
                Ok(Plan::Full(first.into(), last.into()))
            }
            Self::Range(first, last) => {
                let (a, b) = (u32::from(first), u32::from(last));
                if a < low || b > high {
                    return Err(Error::Outside(first, last, net));
                }
                for (address, what) in [
                    (own, "our own address"),
                    (low, "the network's address"),
                    (high, "the broadcast address"),
                ] {
                    if (a..=b).contains(&address) {
                        return Err(Error::Holds(first, last, address.into(), what));
                    }
                }
                Ok(Plan::Full(first, last))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(address: [u8; 4], prefix: u8) -> Ipv4Net {
        Ipv4Net { address: address.into(), prefix }
    }

    fn ip(a: u8, b: u8, c: u8, d: u8) -> Ipv4Addr {
        Ipv4Addr::new(a, b, c, d)
    }

    #[test]
    fn settings_are_read() {
        for text in ["proxy", "auto", "off", "10.0.0.5-10.0.0.9"] {
            assert_eq!(text.parse::<Dhcp>().unwrap().to_string(), text);
        }
        assert_eq!("10.0.0.5,10.0.0.9".parse(), Ok(Dhcp::Range(ip(10, 0, 0, 5), ip(10, 0, 0, 9))));
        for text in
            ["", "full", "10.0.0.9-10.0.0.5", "10.0.0.5", "10.0.0.5-", "10.0.0-10.0.0.9", "fd00::1-fd00::2"]
        {
            assert!(text.parse::<Dhcp>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_range_is_derived_from_the_interface() {
        for (address, prefix, first, last) in [
            ([10, 91, 0, 1], 24, [10, 91, 0, 2], [10, 91, 0, 254]),
            ([10, 91, 0, 254], 24, [10, 91, 0, 1], [10, 91, 0, 253]),
            ([10, 91, 0, 100], 24, [10, 91, 0, 101], [10, 91, 0, 254]),
            ([172, 16, 0, 1], 12, [172, 16, 0, 2], [172, 16, 4, 1]),
            ([10, 0, 0, 1], 30, [10, 0, 0, 2], [10, 0, 0, 2]),
            ([10, 0, 0, 2], 30, [10, 0, 0, 1], [10, 0, 0, 1]),
        ] {
            assert_eq!(Dhcp::Auto.plan(net(address, prefix)), Ok(Plan::Full(first.into(), last.into())));
        }
        assert!(matches!(Dhcp::Auto.plan(net([10, 0, 0, 1], 31)), Err(Error::Small(_))));
        assert!(matches!(Dhcp::Auto.plan(net([10, 0, 0, 1], 32)), Err(Error::Small(_))));
    }

    #[test]
    fn a_range_must_fit_the_network() {
        let net = net([10, 0, 0, 1], 24);
        let plan = |text: &str| text.parse::<Dhcp>().unwrap().plan(net);
        assert_eq!(plan("10.0.0.50-10.0.0.60"), Ok(Plan::Full(ip(10, 0, 0, 50), ip(10, 0, 0, 60))));
        for (text, error) in [
            (
                "10.0.1.5-10.0.1.9",
                "the range 10.0.1.5-10.0.1.9 is not within 10.0.0.1/24, the network of the interface",
            ),
            ("10.0.0.1-10.0.0.9", "the range 10.0.0.1-10.0.0.9 holds 10.0.0.1, which is our own address"),
            (
                "10.0.0.9-10.0.0.255",
                "the range 10.0.0.9-10.0.0.255 holds 10.0.0.255, which is the broadcast address",
            ),
        ] {
            assert_eq!(plan(text).unwrap_err().to_string(), error);
        }
    }

    proptest! {
        #[test]
        fn a_derived_range_is_always_a_valid_range(address: u32, prefix in 0u8..=32) {
            let net = Ipv4Net { address: address.into(), prefix };
            // Our own address being the network's or the broadcast address is not an address that a host can have.
            prop_assume!(net.address != net.network() && net.address != net.broadcast());
            if let Ok(Plan::Full(first, last)) = Dhcp::Auto.plan(net) {
                prop_assert_eq!(Dhcp::Range(first, last).plan(net), Ok(Plan::Full(first, last)));
            }
        }

        #[test]
        fn no_setting_panics(text in "[0-9a-z.,\\-]{0,40}", address: u32, prefix in 0u8..=32) {
            if let Ok(dhcp) = text.parse::<Dhcp>() {
                let _ = dhcp.plan(Ipv4Net { address: address.into(), prefix });
            }
            let _ = Dhcp::Auto.plan(Ipv4Net { address: address.into(), prefix });
        }
    }
}
