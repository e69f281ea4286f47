//! When waves begin and how they end: who is waited for, the operator's `go`, the order of the chain, and the release, all at
//! once or one node after the other.

use super::brake::Braking;
use super::{Action, Current, Deployment, Node, Status};
use crate::deployment::command::Order;
use ka_chain::control::{Progress, ToNode};
use ka_chain::core::level::{Chooser, Used};
use ka_chain::core::wave::{self, Standing, Wave};
use ka_chain::core::{NodeId, Time};
use ka_chain::feed::Compression;
use ka_chain::seal::{self, random};
use ka_chain::sign::Signer;
use ka_chain::topology;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the nodes that are owed another wave wait for each other, when `--wait` does not say.
const NEXT_WAVE: Duration = Duration::from_secs(60);

impl Deployment {
    fn count(&self, test: impl Fn(&Node) -> bool) -> usize {
        self.nodes.values().filter(|n| test(n)).count()
    }

    /// Whether a wave is to begin by itself. Only the first must have `--min-nodes`: later ones are for those who are left.
    pub(super) fn may_start(&self, time: Time) -> bool {
        let ready = self.count(|n| n.status == Status::Ready);
        if ready == 0 {
            return false;
        }
        let waited =
            |wait: Duration| self.waiting_since.is_some_and(|since| time.saturating_sub(since) >= wait);
        if self.waves > 0 {
            let owed = self.count(|n| n.status == Status::Preparing);
            return owed == 0 || waited(self.settings.wait.unwrap_or(NEXT_WAVE));
        }
        // A node that failed before the start will not become ready: nobody waits for it.
        let failed = self.count(Node::is_final);
        let all = self.settings.nodes.is_some_and(|n| ready + failed >= n as usize);
        all || (self.settings.wait.is_some_and(waited) && ready >= self.settings.min_nodes as usize)
    }

    /// The operator wants the waiting wave to begin now.
    ///
    /// # Errors
    /// Why it does not, in words.
    pub fn go(&mut self, now: Instant) -> Result<(String, Vec<Action>), String> {
        let time = self.time(now);
        let ready = self.count(|n| n.status == Status::Ready);
        let least = self.settings.min_nodes;
        if self.current.is_some() {
            return Err(format!("wave {} is running; {ready} nodes are ready for the next", self.waves));
        }
        if self.is_over() {
            return Err("the deployment is over".to_owned());
        }
        if ready == 0 {
            return Err("no node is ready".to_owned());
        }
        if self.waves == 0 && ready < least as usize {
            return Err(format!("{ready} nodes are ready, and --min-nodes is {least}"));
        }
        match self.start(now, time) {
            Ok(mut actions) => {
                actions.insert(0, Action::Say("the operator says go".to_owned()));
                Ok((format!("wave {} begins with {ready} nodes", self.waves), actions))
            }
            Err(e) => Err(format!("starting failed: {e}")),
        }
    }

    pub(super) fn start(&mut self, now: Instant, time: Time) -> Result<Vec<Action>, ka_chain::Error> {
        let number = self.waves + 1;
        let key = seal::Wave::new(self.id, number)?;
        let signer = match self.settings.trust_nodes {
            true => None,
            false => Some(Arc::new(Signer::new(&key)?)),
        };
        let mut ready: Vec<&Node> = self.nodes.values().filter(|n| n.status == Status::Ready).collect();
        let addresses: Vec<IpAddr> = ready.iter().map(|n| n.address).collect();
        match &self.settings.order {
            Order::Arrival => ready.sort_by_key(|n| n.connection),
            order => {
                ready = topology::by_address(&addresses).into_iter().map(|i| ready[i]).collect();
                if let Order::File(file) = order {
                    ready
                        .sort_by_cached_key(|n| file.rank(&n.name, n.registration.mac.as_deref(), n.address));
                }
            }
        }
        let order: Vec<String> = ready.iter().map(|n| n.name.clone()).collect();
        let count = u32::try_from(order.len()).unwrap_or(u32::MAX);
        let names: BTreeMap<NodeId, String> = (1..=count).map(NodeId).zip(order.iter().cloned()).collect();
        let ids = names.iter().map(|(id, name)| (name.clone(), *id)).collect();
        let settings = wave::Settings {
            arity: self.settings.arity,
            survive: self.settings.survive,
            dead_after: self.settings.dead_after,
            stall: self.settings.stall,
        };
        let core = Wave::new(settings, count, random()?, time);
        let which = if number == 1 { String::new() } else { format!("wave {number}, ") };
        let mut actions = vec![
            Action::Say(format!("starting {which}with {count} nodes: {}", order.join(" "))),
            // The links must be known before the first child dials.
            Action::Feed(key.clone(), signer.clone()),
        ];
        for name in &order {
            if let Some(node) = self.nodes.get_mut(name) {
                node.status = Status::Running;
                node.wave = number;
                node.tries += 1;
                node.progress = Progress::default();
            }
        }
        let auto = self.settings.compression == Compression::Auto;
        if auto {
            self.levels.get_or_insert(Used::new(Chooser::FIRST)).saw(Chooser::FIRST);
        }
        let braking = Braking::new(self.settings.slow, order.len(), auto);
        let mut current = Current { core, key, signer, names, ids, placed: BTreeSet::new(), braking };
        let orders = current.core.begin();
        self.current = Some(current);
        self.waves = number;
        self.waiting_since = None;
        self.started.get_or_insert(now);
        self.released = None;
        actions.extend(self.carry_out(orders, now));
        Ok(actions)
    }

    /// Every living node of the wave holds the end, or failed; and the source knows what the end is.
    pub(super) fn may_release(&self) -> bool {
        let Some(current) = &self.current else { return false };
        let all_final = current.ids.iter().all(|(name, id)| {
            current.core.standing(*id) != Some(Standing::In)
                || self.nodes.get(name).is_none_or(Node::is_final)
        });
        (self.sent.contains_key(&self.waves) && current.core.may_release()) || all_final
    }

    /// The wave is over. Its nodes are released all at once, or one after the other, those at the chain's end first: so nobody
    /// loses a parent that it still has a connection to.
    pub(super) fn release(&mut self, now: Instant, time: Time) -> Vec<Action> {
        let Some(current) = self.current.take() else { return Vec::new() };
        self.released = Some(now);
        // Those who have waited for this wave's end wait for those who were put out of it, from now on.
        self.waiting_since = self.waiting_since.map(|_| time);
        let still_in = |id: NodeId| current.core.standing(id) == Some(Standing::In);
        let nodes = current.names.iter().rev().filter(|(id, _)| still_in(**id));
        let nodes = nodes.filter_map(|(_, name)| self.nodes.get(name)).filter(|node| node.connected);
        self.releasing.extend(nodes.map(|node| node.connection));
        let mut actions = self.release_next(time);
        actions.push(Action::CloseHead);
        actions
    }

    /// Releases those whose turn it is.
    pub(super) fn release_next(&mut self, time: Time) -> Vec<Action> {
        let mut actions = Vec::new();
        while time >= self.next_release
            && let Some(connection) = self.releasing.pop_front()
        {
            actions.push(Action::Send(connection, ToNode::Release));
            if let Some(every) = self.settings.release_every {
                self.next_release = time + every;
                if !self.releasing.is_empty()
                    && let Some(node) = self.node_of(connection)
                {
                    let left = self.releasing.len();
                    actions
                        .push(Action::Say(format!("{} is released; {left} wait for their turn", node.name)));
                }
            }
        }
        actions
    }
}

#[cfg(test)]
#[path = "waves_tests.rs"]
mod tests;
