//! Who feeds whom. The server is the head; positions are computed once per wave.

use std::net::IpAddr;

/// Where a node takes the stream from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// From the server.
    Server,
    /// From the node at this position.
    Node(usize),
}

/// The parent of each position (0 is the first node) in a chain (`arity` 1) or a tree of `arity` children each.
#[must_use]
pub fn parents(nodes: usize, arity: usize) -> Vec<Parent> {
    let arity = arity.max(1);
    // Numbered as a heap whose root, 0, is the server: node `p` is number p + 1.
    (1..=nodes)
        .map(|n| (n - 1) / arity)
        .map(|p| if p == 0 { Parent::Server } else { Parent::Node(p - 1) })
        .collect()
}

/// The positions fed by each position, from [`parents`].
#[must_use]
pub fn children(parents: &[Parent]) -> Vec<Vec<usize>> {
    let mut children = vec![Vec::new(); parents.len()];
    for (node, parent) in parents.iter().enumerate() {
        if let Parent::Node(p) = parent {
            children[*p].push(node);
        }
    }
    children
}

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
    use proptest::prelude::*;

    #[test]
    fn a_chain_and_a_tree() {
        use Parent::{Node, Server};
        assert_eq!(parents(3, 1), [Server, Node(0), Node(1)]);
        assert_eq!(parents(7, 2), [Server, Server, Node(0), Node(0), Node(1), Node(1), Node(2)]);
        assert_eq!(children(&parents(7, 2))[..3], [vec![2, 3], vec![4, 5], vec![6]]);
    }

    #[test]
    fn addresses_are_ordered_as_numbers() {
        let addresses =
            ["10.0.0.10", "10.0.0.9", "::ffff:10.0.0.8", "2001:db8::1"].map(|a| a.parse().unwrap());
        assert_eq!(by_address(&addresses), [2, 1, 0, 3]);
    }

    proptest! {
        #[test]
        fn everybody_has_one_parent_before_itself_and_nobody_too_many_children(nodes in 0usize..300, arity in 1usize..5) {
            let parents = parents(nodes, arity);
            for (n, parent) in parents.iter().enumerate() {
                if let Parent::Node(p) = parent { prop_assert!(*p < n); }
            }
            prop_assert!(children(&parents).iter().all(|c| c.len() <= arity));
            prop_assert!(parents.iter().filter(|p| **p == Parent::Server).count() <= arity);
        }
    }
}
