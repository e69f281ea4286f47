//! Network interfaces: what there is (from sysfs), and setting links, addresses and routes (over netlink).

use super::mac::Mac;
use anyhow::{Context, Result, anyhow};
use neli::consts::nl::NlmF;
use neli::consts::rtnl::{Ifa, IfaF, Ifla, RtAddrFamily, RtScope, RtTable, Rta, Rtm, RtmF, Rtn, Rtprot};
use neli::consts::socket::NlFamily;
use neli::nl::NlPayload;
use neli::router::synchronous::NlRouter;
use neli::rtnl::{
    Ifaddrmsg, IfaddrmsgBuilder, Ifinfomsg, IfinfomsgBuilder, Rtattr, RtattrBuilder, Rtmsg, RtmsgBuilder,
};
use neli::types::{Buffer, RtBuffer};
use neli::utils::Groups;
use neli::{FromBytesWithInput, Size, ToBytes};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's name of it.
    pub name: String,
    /// The kernel's number of it.
    pub index: u32,
    /// Its Ethernet address.
    pub mac: Mac,
}

impl Link {
    fn sysfs(&self, file: &str) -> PathBuf {
        Path::new("/sys/class/net").join(&self.name).join(file)
    }

    /// Whether a cable with a living partner is there. False while the link is down.
    #[must_use]
    pub fn has_carrier(&self) -> bool {
        read_trimmed(&self.sysfs("carrier")).as_deref() == Some("1")
    }

    /// Megabits a second, where the driver says.
    #[must_use]
    pub fn speed(&self) -> Option<u32> {
        ka_sys::speed::speed_of(&self.name)
    }
}

/// Every wired Ethernet interface with hardware (or a hypervisor) behind it, in the kernel's order.
///
/// # Errors
/// When sysfs cannot be read.
pub fn ethernet_links() -> Result<Vec<Link>> {
    links_in(Path::new("/sys/class/net"))
}

fn links_in(dir: &Path) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry.with_context(|| format!("reading {}", dir.display()))?.path();
        // ARPHRD_ETHER is 1; bridges, tunnels and the like have no device; wireless needs a password that nobody gave.
        let ethernet = read_trimmed(&path.join("type")).as_deref() == Some("1");
        if !ethernet || !path.join("device").exists() || path.join("phy80211").exists() {
            continue;
        }
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        // An interface may vanish or be renamed while it is looked at.
        let (Some(index), Some(mac)) = (
            read_trimmed(&path.join("ifindex")).and_then(|t| t.parse().ok()),
            read_trimmed(&path.join("address")).and_then(|t| t.parse().ok()),
        ) else {
            continue;
        };
        links.push(Link { name, index, mac });
    }
    links.sort_by_key(|link| link.index);
    Ok(links)
}

fn read_trimmed(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The network devices on the PCI bus that no driver has taken: `0000:00:03.0 8086:10d3`.
#[must_use]
pub fn pci_without_driver() -> Vec<String> {
    pci_without_driver_in(Path::new("/sys/bus/pci/devices"))
}

fn pci_without_driver_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            let network = read_trimmed(&path.join("class"))?.starts_with("0x02");
            let id = |file| read_trimmed(&path.join(file)).map(|t| t.trim_start_matches("0x").to_owned());
            (network && !path.join("driver").exists()).then_some(())?;
            Some(format!("{} {}:{}", entry.file_name().to_string_lossy(), id("vendor")?, id("device")?))
        })
        .collect();
    found.sort();
    found
}

/// A connection to the kernel's routing.
pub struct Netlink(NlRouter);

impl Netlink {
    /// Connects.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn connect() -> Result<Self> {
        let (router, _) = NlRouter::connect(NlFamily::Route, None, Groups::empty())
            .map_err(|e| anyhow!("connecting to netlink: {e}"))?;
        Ok(Self(router))
    }

    fn request<P>(&self, kind: Rtm, flags: NlmF, payload: P) -> Result<()>
    where
        P: Size + ToBytes + FromBytesWithInput<Input = usize> + std::fmt::Debug,
    {
        let answers = self
            .0
            .send::<_, _, Rtm, P>(kind, flags | NlmF::ACK, NlPayload::Payload(payload))
            .map_err(|e| anyhow!("{e}"))?;
        for answer in answers {
            answer.map_err(|e| anyhow!("{e}"))?;
        }
        Ok(())
    }

    /// Sets a link up; `mtu` too, if given.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_up(&self, index: u32, mtu: Option<u32>) -> Result<()> {
        let mut attributes = RtBuffer::new();
        if let Some(mtu) = mtu {
            attributes.push(attribute(Ifla::Mtu, mtu)?);
        }
        let message: Ifinfomsg = IfinfomsgBuilder::default()
            .ifi_family(RtAddrFamily::Unspecified)
            .ifi_index(i32::try_from(index)?)
            .up()
            .rtattrs(attributes)
            .build()?;
        self.request(Rtm::Newlink, NlmF::empty(), message)
    }

    /// Gives a link an address; the same one again is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> Result<()> {
        let mut attributes = RtBuffer::new();
        attributes.push(attribute(Ifa::Local, address.octets())?);
        attributes.push(attribute(Ifa::Address, address.octets())?);
        if prefix < 31 {
            attributes.push(attribute(Ifa::Broadcast, broadcast(address, prefix).octets())?);
        }
        self.request(Rtm::Newaddr, NlmF::CREATE | NlmF::REPLACE, address_message(index, prefix, attributes)?)
    }

    /// Takes an address from a link.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> Result<()> {
        let mut attributes = RtBuffer::new();
        attributes.push(attribute(Ifa::Local, address.octets())?);
        self.request(Rtm::Deladdr, NlmF::empty(), address_message(index, prefix, attributes)?)
    }

    /// Adds or replaces a route: to `to`/`prefix` over `gateway`, or straight onto the link without one.
    ///
    /// # Errors
    /// When the kernel refuses: the gateway is not on the link's network.
    pub fn add_route(&self, index: u32, to: Ipv4Addr, prefix: u8, gateway: Option<Ipv4Addr>) -> Result<()> {
        let mut attributes = RtBuffer::new();
        if prefix > 0 {
            attributes.push(attribute(Rta::Dst, to.octets())?);
        }
        if let Some(gateway) = gateway {
            attributes.push(attribute(Rta::Gateway, gateway.octets())?);
        }
        attributes.push(attribute(Rta::Oif, index)?);
        let message: Rtmsg = RtmsgBuilder::default()
            .rtm_family(RtAddrFamily::Inet)
            .rtm_dst_len(prefix)
            .rtm_src_len(0)
            .rtm_tos(0)
            .rtm_table(RtTable::Main)
            .rtm_protocol(Rtprot::Boot)
            .rtm_scope(if gateway.is_some() { RtScope::Universe } else { RtScope::Link })
            .rtm_type(Rtn::Unicast)
            .rtm_flags(RtmF::empty())
            .rtattrs(attributes)
            .build()?;
        self.request(Rtm::Newroute, NlmF::CREATE | NlmF::REPLACE, message)
    }
}

fn address_message(index: u32, prefix: u8, attributes: RtBuffer<Ifa, Buffer>) -> Result<Ifaddrmsg> {
    Ok(IfaddrmsgBuilder::default()
        .ifa_family(RtAddrFamily::Inet)
        .ifa_prefixlen(prefix)
        .ifa_flags(IfaF::empty())
        .ifa_scope(RtScope::Universe)
        .ifa_index(index)
        .rtattrs(attributes)
        .build()?)
}

fn attribute<T, P>(kind: T, payload: P) -> Result<Rtattr<T, Buffer>>
where
    T: Size,
    P: Size + ToBytes,
{
    Ok(RtattrBuilder::default().rta_type(kind).rta_payload(payload).build()?)
}

/// The mask of a prefix of 0 to 32 bits.
#[must_use]
pub fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0)
}

/// The broadcast address of the network that `address` is in.
#[must_use]
pub fn broadcast(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(address) | !mask(prefix))
}

/// Whether two addresses are in one network.
#[must_use]
pub fn same_network(a: Ipv4Addr, b: Ipv4Addr, prefix: u8) -> bool {
    (u32::from(a) ^ u32::from(b)) & mask(prefix) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let a = Ipv4Addr::new(10, 1, 2, 3);
        assert_eq!((mask(0), mask(24), mask(32)), (0, 0xffff_ff00, u32::MAX));
        assert_eq!(broadcast(a, 22), Ipv4Addr::new(10, 1, 3, 255));
        assert!(
            same_network(a, Ipv4Addr::new(10, 1, 0, 1), 22)
                && !same_network(a, Ipv4Addr::new(10, 1, 4, 1), 22)
        );
    }

    #[test]
    fn only_wired_ethernet_with_a_device_counts() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, kind: &str, index: &str, device: bool| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            for (file, text) in [("type", kind), ("ifindex", index), ("address", "52:54:00:00:00:01")] {
                fs::write(path.join(file), format!("{text}\n")).unwrap();
            }
            if device {
                fs::create_dir(path.join("device")).unwrap();
            }
        };
        make("eth1", "1", "3", true);
        make("eth0", "1", "2", true);
        make("lo", "772", "1", false);
        make("br0", "1", "4", false);
        make("wlan0", "1", "5", true);
        fs::create_dir(dir.path().join("wlan0/phy80211")).unwrap();
        let names: Vec<_> = links_in(dir.path()).unwrap().into_iter().map(|l| l.name).collect();
        assert_eq!(names, ["eth0", "eth1"]);
    }

    #[test]
    fn network_devices_without_driver_are_named_by_id() {
        let dir = tempfile::tempdir().unwrap();
        for (slot, class, driver) in [
            ("0000:00:03.0", "0x020000", false),
            ("0000:00:04.0", "0x020000", true),
            ("0000:00:05.0", "0x010601", false),
        ] {
            let path = dir.path().join(slot);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("class"), class).unwrap();
            fs::write(path.join("vendor"), "0x8086\n").unwrap();
            fs::write(path.join("device"), "0x10d3\n").unwrap();
            if driver {
                fs::create_dir(path.join("driver")).unwrap();
            }
        }
        assert_eq!(pci_without_driver_in(dir.path()), ["0000:00:03.0 8086:10d3"]);
    }
}
