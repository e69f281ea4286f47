//! The addresses of network interfaces, from the kernel by way of getifaddrs.

use nix::ifaddrs::getifaddrs;
use std::fmt;
use std::io;
use std::net::Ipv4Addr;

/// An IPv4 address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Net {
    /// The address of the interface itself.
    pub address: Ipv4Addr,
    /// Bits of the network's prefix, 0 to 32.
    pub prefix: u8,
}

impl Ipv4Net {
    /// The netmask.
    #[must_use]
    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(self.prefix.min(32))).unwrap_or(0))
    }

    /// The first address of the network.
    #[must_use]
    pub fn network(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.address) & u32::from(self.netmask()))
    }

    /// The last address of the network.
    #[must_use]
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.address) | !u32::from(self.netmask()))
    }
}

impl fmt::Display for Ipv4Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The IPv4 addresses of `interface`, in the kernel's order. An interface without one and an interface that does not
/// exist both give none; [`interface_index`] tells them apart.
///
/// # Errors
/// When the kernel does not tell.
pub fn ipv4_of(interface: &str) -> io::Result<Vec<Ipv4Net>> {
    let mut found = Vec::new();
    for entry in getifaddrs()? {
        // An address with a label (`eth0:1`) is listed under the label.
        if entry.interface_name.split(':').next() != Some(interface) {
            continue;
        }
        let address =
            entry.address.as_ref().and_then(|a| a.as_sockaddr_in()).map(nix::sys::socket::SockaddrIn::ip);
        let mask =
            entry.netmask.as_ref().and_then(|a| a.as_sockaddr_in()).map(nix::sys::socket::SockaddrIn::ip);
        if let (Some(address), Some(mask)) = (address, mask) {
            #[allow(clippy::cast_possible_truncation)] // at most 32
            let prefix = u32::from(mask).leading_ones() as u8;
            found.push(Ipv4Net { address, prefix });
        }
    }
    Ok(found)
}

/// The names of all interfaces, sorted.
///
/// # Errors
/// When the kernel does not tell.
pub fn interfaces() -> io::Result<Vec<String>> {
    let mut names: Vec<String> = getifaddrs()?.map(|entry| entry.interface_name).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// The kernel's number of `interface`.
///
/// # Errors
/// When there is no such interface.
pub fn interface_index(interface: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(interface)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_computed() {
        let net = Ipv4Net { address: Ipv4Addr::new(10, 91, 3, 7), prefix: 22 };
        assert_eq!(net.netmask(), Ipv4Addr::new(255, 255, 252, 0));
        assert_eq!(net.network(), Ipv4Addr::new(10, 91, 0, 0));
        assert_eq!(net.broadcast(), Ipv4Addr::new(10, 91, 3, 255));
        assert_eq!(net.to_string(), "10.91.3.7/22");
        let all = Ipv4Net { address: Ipv4Addr::new(1, 2, 3, 4), prefix: 0 };
        assert_eq!((all.network(), all.broadcast()), (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
        let one = Ipv4Net { address: Ipv4Addr::new(1, 2, 3, 4), prefix: 32 };
        assert_eq!((one.network(), one.broadcast()), (one.address, one.address));
    }

    #[test]
    fn loopback_has_its_address() {
        assert_eq!(interface_index("lo").unwrap(), 1);
        assert!(interface_index("no-such-if").is_err());
        assert!(ipv4_of("no-such-if").unwrap().is_empty());
        assert!(interfaces().unwrap().contains(&"lo".to_owned()));
        let lo = ipv4_of("lo").unwrap();
        assert!(lo.contains(&Ipv4Net { address: Ipv4Addr::LOCALHOST, prefix: 8 }), "{lo:?}");
    }
}
