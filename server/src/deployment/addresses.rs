//! Where nodes are: at which addresses a child tries to reach its parent, and from which its connections may come.

use super::state::Node;
use ka_chain::control::Registration;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Where a node's connections may come from: the address that is seen first, then a few of those that it reported.
#[must_use]
pub fn places_of(seen: IpAddr, registration: &Registration) -> Vec<IpAddr> {
    let mut places = vec![seen.to_canonical()];
    for address in registration.addresses.iter().map(IpAddr::to_canonical) {
        if !places.contains(&address) && places.len() < 16 {
            places.push(address);
        }
    }
    places
}

/// Where `child` tries to reach `parent`: the address that the server sees first, then the others that it reported.
/// Loopback only when both are on one host.
#[must_use]
pub fn addresses_for(child: &Node, parent: &Node) -> Vec<SocketAddr> {
    let port = parent.registration.data_port;
    let mut addresses = Vec::new();
    let seen = parent.address.to_canonical();
    if seen.is_loopback() {
        if child.address.to_canonical().is_loopback() {
            addresses.push(seen);
        }
    } else {
        addresses.push(seen);
    }
    addresses.extend(
        parent
            .registration
            .addresses
            .iter()
            .map(IpAddr::to_canonical)
            .filter(|a| !a.is_loopback() && !a.is_unspecified()),
    );
    if addresses.is_empty() {
        addresses.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    let mut unique: Vec<SocketAddr> = Vec::new();
    for address in addresses {
        let address = SocketAddr::new(address, port);
        if !unique.contains(&address) && unique.len() < 16 {
            unique.push(address);
        }
    }
    unique
}
