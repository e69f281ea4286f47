//! The order of the nodes in a chain; it is computed once per wave.

use std::net::IpAddr;

/// The order of nodes by address, numerically (10.0.0.9 before 10.0.0.10), IPv4 before IPv6.
#[must_use]
pub fn by_address(addresses: &[IpAddr]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..addresses.len()).collect();
    order.sort_by_key(|i| addresses[*i].to_canonical());
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_ordered_as_numbers() {
        let addresses =
            ["10.0.0.10", "10.0.0.9", "::ffff:10.0.0.8", "2001:db8::1"].map(|a| a.parse().unwrap());
        assert_eq!(by_address(&addresses), [2, 1, 0, 3]);
    }
}
