//! Whether the server's orders say what its table of parents says, worked out once more by other means.

use super::world::World;
use crate::core::{HEAD, NodeId, Place};
use std::collections::{BTreeMap, BTreeSet};

impl World {
    /// What is wrong with the table or with the newest orders.
    pub(super) fn check_table(&mut self) {
        if let Some(text) = self.wrong_table().or_else(|| self.wrong_orders()) {
            self.oracle.fail(self.now, text);
        }
    }

    /// Everybody in the chain hangs on the server, through nodes that are in it.
    fn wrong_table(&self) -> Option<String> {
        for node in (1..self.hosts.len()).filter(|node| self.is_in(*node)) {
            let mut at = NodeId(node as u32);
            let mut steps = 0;
            while at != HEAD {
                let Some(parent) = self.wave.parent(at) else {
                    return Some(format!("node {node} hangs on {at}, which is not in the chain"));
                };
                at = parent;
                steps += 1;
                if steps > self.hosts.len() {
                    return Some(format!("node {node} is in a circle"));
                }
            }
        }
        None
    }

    fn wrong_orders(&self) -> Option<String> {
        // Downwards: who takes chunks from whom, now or when it has been brought up.
        let mut below: BTreeMap<NodeId, BTreeSet<NodeId>> = BTreeMap::new();
        let mut children: BTreeMap<NodeId, BTreeSet<NodeId>> = BTreeMap::new();
        for node in (1..self.hosts.len()).filter(|node| self.is_in(*node)).map(|n| NodeId(n as u32)) {
            let parent = self.wave.parent(node)?;
            children.entry(parent).or_default().insert(node);
            below.entry(parent).or_default().insert(node);
            for ancestor in [self.wave.fetching(node), self.wave.heir(node)].into_iter().flatten() {
                below.entry(ancestor).or_default().insert(node);
            }
        }
        for host in (0..self.hosts.len()).filter(|host| *host == 0 || self.is_in(*host)) {
            let me = NodeId(host as u32);
            let Some(order) = &self.oracle.orders[host] else {
                return Some(format!("{me} has no order"));
            };
            if order.parent.as_ref().map(|(node, _)| *node) != self.wave.parent(me) {
                return Some(format!("the order of {me} names another parent than the table"));
            }
            if let Some((parent, link)) = &order.parent {
                let theirs = self.oracle.orders[parent.0 as usize].as_ref();
                let known = theirs.is_some_and(|o| o.children.iter().any(|(n, l)| *n == me && l == link));
                if !known {
                    return Some(format!("{parent} and {me} do not know the same link"));
                }
            }
            let named: BTreeSet<NodeId> = order.children.iter().map(|(node, _)| *node).collect();
            if named != children.remove(&me).unwrap_or_default() || named.len() != order.children.len() {
                return Some(format!("the order of {me} names other children than the table"));
            }
            if let Some(text) = self.wrong_family(me, order, &below) {
                return Some(text);
            }
        }
        None
    }

    fn wrong_family(
        &self,
        me: NodeId,
        order: &Place,
        below: &BTreeMap<NodeId, BTreeSet<NodeId>>,
    ) -> Option<String> {
        let mut family: BTreeMap<NodeId, u8> = BTreeMap::new();
        let mut level: BTreeSet<NodeId> = BTreeSet::from([me]);
        for depth in 1..=self.plan.settings.survive + 1 {
            level = level.iter().filter_map(|node| below.get(node)).flatten().copied().collect();
            for node in &level {
                if *node != me {
                    family.entry(*node).or_insert(depth);
                }
            }
        }
        let named: BTreeMap<NodeId, u8> = order.family.iter().copied().collect();
        (family != named).then(|| format!("the family of {me} should be {family:?} and is {named:?}"))
    }
}
