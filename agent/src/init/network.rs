//! The network of a node: the interface that the firmware booted from, or every wired one at once; an address by DHCP or
//! by hand; routes and name servers.

use super::dhcp::Lease;
use super::dhcp_client;
use super::links::{Link, Netlink, ethernet_links, pci_without_driver, same_network};
use super::mac::Mac;
use crate::cmdline::{LinkId, Options, StaticIp};
use anyhow::{Context, Result, anyhow, bail};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// How long a link may take to find its partner after it was set up: some need 4 s, with spanning tree still more.
const CARRIER_LIMIT: Duration = Duration::from_secs(30);
/// How long a DHCP server may take once there is a carrier; switches with spanning tree swallow the first 30 s.
const DHCP_LIMIT: Duration = Duration::from_secs(90);

/// The network as it was set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The kernel's name of the interface.
    pub interface: String,
    /// Its Ethernet address.
    pub mac: Mac,
    /// The node's address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix.
    pub prefix: u8,
    /// The default gateway.
    pub gateway: Option<Ipv4Addr>,
    /// The host name that the DHCP server gave.
    pub hostname: Option<String>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
}

/// Sets the network up as `options` say. `rescan` is called again and again while interfaces are waited for: it loads
/// modules for what has appeared.
///
/// # Errors
/// When there is no interface, no carrier, or no DHCP server answers; each error says which, and what was seen.
pub fn set_up(options: &Options, mut rescan: impl FnMut()) -> Result<Network> {
    let netlink = Netlink::connect()?;
    // Loopback has index 1 in every network namespace.
    netlink.set_up(1, None).context("setting the loopback interface up")?;
    let links = candidates(options, &mut rescan)?;
    let mut errors = String::new();
    let mut up = Vec::new();
    for link in links {
        match netlink.set_up(link.index, None) {
            Ok(()) => up.push(link),
            // One broken interface must not hide the good ones.
            Err(e) => {
                log::warn!("setting {} up: {e:#}", link.name);
                let _ = write!(errors, "; setting {} up: {e:#}", link.name); // to a String: cannot fail
            }
        }
    }
    if up.is_empty() {
        bail!("no interface could be set up{errors}");
    }
    let (link, lease) = match &options.ip {
        Some(ip) => by_hand(ip, &up)?,
        None => by_dhcp(up)?,
    };
    configure(&netlink, &link, &lease)?;
    if lease.lifetime.is_some() {
        let (link, lease) = (link.clone(), lease.clone());
        std::thread::Builder::new()
            .name("dhcp".into())
            .spawn(move || dhcp_client::keep(&link, lease))
            .context("starting the thread that renews the lease")?;
    }
    let network = Network {
        interface: link.name.clone(),
        mac: link.mac,
        address: lease.address,
        prefix: lease.prefix,
        gateway: lease.routes.iter().find(|(_, prefix, _)| *prefix == 0).and_then(|(_, _, gateway)| *gateway),
        hostname: lease.hostname,
        dns: lease.dns,
    };
    let speed = link.speed().map(|s| format!(", {s} Mbit/s")).unwrap_or_default();
    log::info!(
        "{} ({}{speed}) has {}/{}, gateway {}",
        network.interface,
        network.mac,
        network.address,
        network.prefix,
        network.gateway.map_or("none".to_owned(), |g| g.to_string())
    );
    Ok(network)
}

/// The interfaces to try: the one that was named, or the one of BOOTIF, or all. Waits for it to appear.
fn candidates(options: &Options, rescan: &mut impl FnMut()) -> Result<Vec<Link>> {
    let named = options.ip.as_ref().and_then(|ip| ip.link.clone());
    let wanted = named.clone().or(options.bootif.map(LinkId::Mac));
    let end = Instant::now() + options.device_wait;
    loop {
        let links = ethernet_links()?;
        let chosen: Vec<Link> =
            links.iter().filter(|l| wanted.as_ref().is_none_or(|w| is_meant(l, w))).cloned().collect();
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        if Instant::now() >= end {
            return give_up_or_take_all(links, named.as_ref(), options.bootif);
        }
        std::thread::sleep(Duration::from_millis(200));
        rescan();
    }
}

fn is_meant(link: &Link, id: &LinkId) -> bool {
    match id {
        LinkId::Name(name) => link.name == *name,
        LinkId::Mac(mac) => link.mac == *mac,
    }
}

fn give_up_or_take_all(links: Vec<Link>, named: Option<&LinkId>, bootif: Option<Mac>) -> Result<Vec<Link>> {
    let mut seen = links.iter().map(|l| format!("{} ({})", l.name, l.mac)).collect::<Vec<_>>().join(", ");
    if seen.is_empty() {
        seen.push_str("none");
    }
    let unserved = match pci_without_driver() {
        list if list.is_empty() => String::new(),
        list => format!("; network devices without a driver in this image: {}", list.join(", ")),
    };
    match (named, bootif) {
        (Some(id), _) => {
            let id = match id {
                LinkId::Name(name) => name.clone(),
                LinkId::Mac(mac) => mac.to_string(),
            };
            bail!("ka.ip= names interface {id}, which is not there; wired interfaces: {seen}{unserved}")
        }
        (None, Some(mac)) if !links.is_empty() => {
            log::warn!("no interface has the address {mac} that BOOTIF names{unserved}; trying all: {seen}");
            Ok(links)
        }
        _ => bail!("no wired network interface{unserved}"),
    }
}

/// The address given by hand, on the first interface that has a carrier.
fn by_hand(ip: &StaticIp, links: &[Link]) -> Result<(Link, Lease)> {
    let end = Instant::now() + CARRIER_LIMIT;
    let link = loop {
        if let Some(link) = links.iter().find(|l| l.has_carrier()) {
            break link.clone();
        }
        if Instant::now() >= end {
            bail!("no carrier on {} after {} s", names(links), CARRIER_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    Ok((link, by_hand_lease(ip)))
}

/// An address given by hand as a lease that never ends.
fn by_hand_lease(ip: &StaticIp) -> Lease {
    Lease {
        address: ip.address,
        prefix: ip.prefix,
        server: Ipv4Addr::UNSPECIFIED,
        routes: ip.gateway.iter().map(|g| (Ipv4Addr::UNSPECIFIED, 0, Some(*g))).collect(),
        dns: Vec::new(),
        hostname: None,
        domain: None,
        mtu: None,
        lifetime: None,
        renew: Duration::MAX,
        rebind: Duration::MAX,
    }
}

/// Asks on every interface at once; the first lease wins.
fn by_dhcp(links: Vec<Link>) -> Result<(Link, Lease)> {
    log::info!("asking for an address on {}", names(&links));
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, results) = mpsc::channel();
    let count = links.len();
    for link in links {
        let (sender, stop) = (sender.clone(), Arc::clone(&stop));
        std::thread::Builder::new()
            .name(format!("dhcp {}", link.name))
            .spawn(move || {
                let result = dhcp_on(&link, &stop);
                // Nobody listens any more when another interface was faster.
                let _ = sender.send((link, result));
            })
            .context("starting a thread")?;
    }
    drop(sender);
    let mut errors = Vec::new();
    for (link, result) in results {
        match result {
            Ok(lease) => {
                stop.store(true, Ordering::Relaxed);
                return Ok((link, lease));
            }
            Err(e) => {
                log::debug!("{}: {e:#}", link.name);
                errors.push(format!("{e:#}"));
            }
        }
    }
    let unserved = match pci_without_driver() {
        list if list.is_empty() => String::new(),
        list => format!("; devices without a driver in this image: {}", list.join(", ")),
    };
    Err(anyhow!("no address on {count} interface(s): {}{unserved}", errors.join("; ")))
}

fn dhcp_on(link: &Link, stop: &AtomicBool) -> Result<Lease> {
    let start = Instant::now();
    while !link.has_carrier() {
        if stop.load(Ordering::Relaxed) {
            bail!("another interface was faster");
        }
        if start.elapsed() >= CARRIER_LIMIT {
            bail!("no carrier on {} after {} s (cable? switch port?)", link.name, CARRIER_LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    log::debug!("{}: carrier after {:.1} s", link.name, start.elapsed().as_secs_f64());
    dhcp_client::acquire(link, DHCP_LIMIT, stop)
}

fn configure(netlink: &Netlink, link: &Link, lease: &Lease) -> Result<()> {
    if let Some(mtu) = lease.mtu
        && let Err(e) = netlink.set_up(link.index, Some(mtu))
    {
        log::warn!("{}: the MTU {mtu} that the DHCP server gave cannot be set: {e:#}", link.name);
    }
    netlink
        .add_address(link.index, lease.address, lease.prefix)
        .with_context(|| format!("giving {} the address {}/{}", link.name, lease.address, lease.prefix))?;
    // Routes onto the link first: later ones may go over them.
    let (direct, over): (Vec<_>, Vec<_>) = lease.routes.iter().partition(|(_, _, gateway)| gateway.is_none());
    for (to, prefix, gateway) in direct.into_iter().chain(over) {
        if let Some(gateway) = gateway
            && !same_network(gateway, lease.address, lease.prefix)
        {
            // Hosting providers do that: the gateway is on the link, though its address is not of the network.
            netlink
                .add_route(link.index, gateway, 32, None)
                .with_context(|| format!("reaching the gateway {gateway}"))?;
        }
        netlink.add_route(link.index, to, prefix, gateway).with_context(|| {
            format!(
                "setting the route to {to}/{prefix} over {}",
                gateway.map_or(link.name.clone(), |g| g.to_string())
            )
        })?;
    }
    let text = resolv_conf(lease);
    if !text.is_empty() {
        std::fs::create_dir_all("/etc").context("creating /etc")?;
        std::fs::write("/etc/resolv.conf", text).context("writing /etc/resolv.conf")?;
    }
    Ok(())
}

fn resolv_conf(lease: &Lease) -> String {
    let mut text = String::new();
    if let Some(domain) = &lease.domain {
        text.push_str(&format!("search {domain}\n"));
    }
    for server in &lease.dns {
        text.push_str(&format!("nameserver {server}\n"));
    }
    text
}

fn names(links: &[Link]) -> String {
    links.iter().map(|l| l.name.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, last: u8) -> Link {
        Link { name: name.into(), index: last.into(), mac: Mac([2, 0, 0, 0, 0, last]) }
    }

    #[test]
    fn a_missing_bootif_falls_back_to_all_but_a_missing_named_one_does_not() {
        let links = vec![link("eth0", 1), link("eth1", 2)];
        let absent = Mac([2, 0, 0, 0, 0, 9]);
        assert_eq!(give_up_or_take_all(links.clone(), None, Some(absent)).unwrap(), links);
        let id = LinkId::Name("eth7".into());
        let error = give_up_or_take_all(links, Some(&id), None).unwrap_err().to_string();
        assert!(error.contains("eth7") && error.contains("eth0 (02:00:00:00:00:01)"), "{error}");
        assert!(
            give_up_or_take_all(vec![], None, Some(absent)).unwrap_err().to_string().contains("no wired")
        );
    }

    #[test]
    fn interfaces_are_meant_by_name_or_address() {
        assert!(is_meant(&link("eth0", 1), &LinkId::Name("eth0".into())));
        assert!(is_meant(&link("eth0", 1), &LinkId::Mac(Mac([2, 0, 0, 0, 0, 1]))));
        assert!(!is_meant(&link("eth0", 1), &LinkId::Name("eth".into())));
    }

    #[test]
    fn resolv_conf_has_what_the_server_gave() {
        let ip = StaticIp { address: Ipv4Addr::new(10, 0, 0, 2), prefix: 24, gateway: None, link: None };
        let mut lease = by_hand_lease(&ip);
        assert_eq!(resolv_conf(&lease), "");
        lease.dns = vec![Ipv4Addr::new(10, 0, 0, 1)];
        lease.domain = Some("lab".into());
        assert_eq!(resolv_conf(&lease), "search lab\nnameserver 10.0.0.1\n");
    }
}
