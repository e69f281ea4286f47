//! The oracle: it knows where everybody really is, what really broke, and never asks a node what it believes.

use super::data::HANDSHAKE;
use super::plan::{EVER, Fault, Planned};
use super::world::{SLOW, State, World};
use crate::core::{NodeId, Place};
use crate::link::LinkId;

/// ms by which the server's knowledge of a node lags behind: half a second between two reports, a delay, a tick.
const LAG: u64 = 1_100;
/// ms by which the server's clock may lag behind: it moves on ticks.
const TICK: u64 = 110;
/// ms for which a freeze or a cut may still be the cause of a link that is found dead.
const AFTERMATH: u64 = 30_000;

/// What the oracle remembers.
#[derive(Debug)]
pub(super) struct Oracle {
    pub(super) violation: Option<String>,
    /// The newest order of each.
    pub(super) orders: Vec<Option<Place>>,
    epoch: u64,
    /// When an order was last obeyed.
    pub(super) topology_changed: u64,
    /// Deaths, removals and moved links since everybody was covered.
    losses: u32,
    /// Those whose death was counted when it happened.
    counted: Vec<bool>,
    /// Faults of links: how many connections they cost, from whom, to whom.
    link_faults: Vec<(u32, usize, usize)>,
    /// Freezes and cuts: how many connections they may cost, until when, who.
    host_faults: Vec<(usize, u64, usize)>,
    /// Links that were truly dead when the server said so, by node.
    dead_links: Vec<u32>,
    /// Who lacks a chunk right now, and who above it holds that chunk.
    lacking: Option<(usize, Option<usize>)>,
}

impl Oracle {
    pub(super) fn new(nodes: usize) -> Self {
        Self {
            violation: None,
            orders: vec![None; nodes + 1],
            epoch: 0,
            topology_changed: 0,
            losses: 0,
            counted: vec![false; nodes + 1],
            link_faults: Vec::new(),
            host_faults: Vec::new(),
            dead_links: vec![0; nodes + 1],
            lacking: None,
        }
    }

    pub(super) fn fail(&mut self, now: u64, text: impl std::fmt::Display) {
        self.violation.get_or_insert_with(|| format!("at {now} ms: {text}"));
    }

    pub(super) fn ordered(&mut self, host: usize, place: &Place, now: u64) {
        if place.epoch <= self.epoch {
            self.fail(now, format!("order {} came after order {}", place.epoch, self.epoch));
        }
        self.epoch = place.epoch;
        self.topology_changed = now;
        self.orders[host] = Some(place.clone());
    }

    pub(super) fn killed(&mut self, node: usize) {
        if !self.counted[node] {
            self.counted[node] = true;
            self.losses += 1;
        }
    }

    pub(super) fn link_fault(&mut self, costs: u32, from: usize, to: usize) {
        self.link_faults.push((costs, from, to));
    }

    pub(super) fn host_fault(&mut self, since: u64, until: u64, host: usize) {
        // Who dials it twice meanwhile has lost two. Such a node is dead by then, unless the server stood still as well.
        let costs = if until - since >= 2 * HANDSHAKE { 2 } else { 1 };
        self.host_faults.push((costs, until, host));
    }
}

impl World {
    /// The one above by the server's table, or the one that takes it over when it has been brought up, or when its parent
    /// leaves.
    fn is_above(&self, above: usize, node: usize, generations: u8) -> bool {
        let id = NodeId(node as u32);
        let next = [self.wave.parent(id), self.wave.fetching(id), self.wave.heir(id)];
        generations > 0
            && next.into_iter().flatten().any(|parent| {
                let parent = parent.0 as usize;
                parent == above || (parent != 0 && self.is_above(above, parent, generations - 1))
            })
    }

    /// No chunk left the window of this host while somebody that it was told of lacks it.
    pub(super) fn check_window(&mut self, host: usize) {
        let (base, first) = (self.hosts[host].relay.base(), self.hosts[host].relay.first());
        let moved = base > self.hosts[host].seen_base;
        let history_moved = host == 0 && first > self.hosts[host].seen_first;
        self.hosts[host].seen_base = base;
        self.hosts[host].seen_first = first;
        if !moved && !history_moved {
            return;
        }
        let Some(obeyed) = &self.hosts[host].obeyed else { return };
        let generations = self.plan.settings.survive + 1;
        for (named, _) in &obeyed.family {
            let node = named.0 as usize;
            let end = self.hosts[node].relay.end();
            let lacks = (moved && end < base) || (history_moved && end < first && self.fed_by_head(*named));
            if lacks && self.is_in(node) && self.is_up(node) && self.is_above(host, node, generations) {
                let text = format!("host {host} let chunk {} go, node {node} wants {end}", base - 1);
                self.oracle.fail(self.now, text);
                return;
            }
        }
        let consumer = &self.hosts[host].consumer;
        if host > 0 && !consumer.gone && consumer.next < base {
            let text = format!("node {host} let chunk {} go before its disk had it", consumer.next);
            self.oracle.fail(self.now, text);
        }
    }

    fn fed_by_head(&self, node: NodeId) -> bool {
        self.wave.parent(node) == Some(NodeId(0))
    }

    /// ms by which the server's knowledge of a node lags behind.
    fn lag_of(&self, node: usize) -> u64 {
        LAG + self.wires[node].delay + self.wires[node].slow.1
    }

    /// How long a node has been silent by its own fault, when that goes on or ended just now, or while the server stood
    /// still until just now.
    fn silent_for(&self, node: usize) -> u64 {
        let paused = |(_, until): &&(u64, u64)| *until + LAG >= self.now;
        let looked = self.hosts[0].silences.iter().filter(paused).map(|(since, _)| *since).min();
        let mut from = looked.unwrap_or(self.now).min(self.now);
        let mut silences = self.hosts[node].silences.clone();
        silences.sort_unstable();
        let mut over = 0;
        for (since, until) in silences.into_iter().rev() {
            if until.saturating_add(self.lag_of(node)) >= from {
                from = from.min(since);
                over = over.max(until.min(self.now));
            }
        }
        over.saturating_sub(from)
    }

    /// Nobody is declared dead who is not.
    pub(super) fn check_dead(&mut self, node: usize, why: &str) {
        let killed = matches!(self.hosts[node].state, State::Killed | State::Left);
        let dead_after = self.plan.settings.dead_after.as_millis() as u64;
        let silent = self.silent_for(node);
        if !killed && silent + self.lag_of(node) < dead_after {
            let text = format!("node {node} is declared dead ({why}) and was silent for {silent} ms");
            self.oracle.fail(self.now, text);
        }
        self.oracle.killed(node);
    }

    /// Nobody is taken out without a reason.
    pub(super) fn check_out(&mut self, node: usize, why: &str) {
        let stall = self.plan.settings.stall.as_millis() as u64;
        let consumer = &self.hosts[node].consumer;
        let wrong = if why.starts_with("its disk") {
            let idle = self.now - consumer.took;
            (consumer.gone || idle + TICK < stall).then(|| format!("its disk took a chunk {idle} ms ago"))
        } else if why == SLOW {
            // Nobody hangs on it any more.
            let fed = (1..self.hosts.len())
                .filter(|child| self.is_in(*child) && self.is_up(*child))
                .find(|child| self.hosts[*child].relay.parent().is_some_and(|(p, _)| p.0 as usize == node));
            fed.map(|child| format!("it still feeds node {child}"))
        } else if why.contains("links were dead") {
            let dead = self.oracle.dead_links[node];
            (dead < 2).then(|| format!("{dead} of its links were dead"))
        } else if why.contains("on damaged") {
            // Two that did it once each look like one that did it twice only to the one that was given both.
            let does = self.damages.contains(&(node, true)) || self.once_damaged(node) >= 2;
            (!does).then(|| "it damages nothing".to_owned())
        } else if why.contains("of one node after the other") {
            let liars = self.damages.iter().filter(|(_, always)| *always).count();
            (liars < 3).then(|| format!("{liars} damage chunks"))
        } else if why.contains("from the server itself") {
            (!self.garbles.contains(&node)).then(|| "the server damages nothing".to_owned())
        } else {
            match self.oracle.lacking {
                Some((lacking, Some(holder))) if lacking == node => {
                    Some(format!("host {holder} above it holds what it wants"))
                }
                Some((lacking, _)) if lacking == node || self.is_above(lacking, node, u8::MAX) => None,
                // Those below one that was taken out an instant ago hang on its parent now.
                Some((lacking, _)) if !self.is_in(lacking) => None,
                _ => Some("it lacks nothing".to_owned()),
            }
        };
        if let Some(wrong) = wrong {
            self.oracle.fail(self.now, format!("node {node} is taken out ({why}), but {wrong}"));
        }
        self.oracle.killed(node);
    }

    /// A node is about to tell the server that its parent lacks the chunk that it wants.
    pub(super) fn check_lacking(&mut self, node: usize, link: &LinkId) {
        let current = self.oracle.orders[node].as_ref().and_then(|order| order.parent.as_ref());
        if !self.is_in(node) || current.is_none_or(|(_, known)| known.id != *link) {
            return;
        }
        let losses = self.oracle.losses;
        let survive = self.plan.settings.survive;
        if losses <= u32::from(survive) {
            let text = format!("node {node} lacks a chunk after {losses} losses, and {survive} are survived");
            self.oracle.fail(self.now, text);
        }
        let want = self.hosts[node].relay.end();
        let holds = |host: &usize| {
            self.is_up(*host)
                && self.hosts[*host].relay.first() <= want
                && self.is_above(*host, node, u8::MAX)
        };
        let holder = (0..self.hosts.len()).find(holds);
        self.oracle.lacking = Some((node, holder));
    }

    /// How often this node was to pass a chunk on damaged once.
    fn once_damaged(&self, node: usize) -> usize {
        let once = |fault: &&Planned| fault.fault == Fault::Damages { node, always: false };
        self.plan.faults.iter().filter(once).count()
    }

    /// A link is declared dead: it must have had a fault of its own, and both its ends live.
    pub(super) fn check_said(&mut self, text: &str) {
        if text.contains("damaged twice") {
            // The one who damages is passed over like one that is dead.
            self.oracle.losses += 1;
        }
        let Some((parent, node)) = dead_link(text) else { return };
        let now = self.now;
        let fault = |(_, from, to): &&(u32, usize, usize)| {
            (*from, *to) == (parent, node) || (*from, *to) == (node, parent)
        };
        let recent = |(_, until, host): &&(usize, u64, usize)| {
            (*host == parent || *host == node) && until.saturating_add(AFTERMATH) > now
        };
        // It is dialled once more: one connection that was lost is not enough.
        let costs: u32 = self.oracle.link_faults.iter().filter(fault).map(|(costs, ..)| *costs).sum();
        let hosts: usize = self.oracle.host_faults.iter().filter(recent).map(|(costs, ..)| *costs).sum();
        let real = costs as usize + hosts >= 2;
        if !self.is_up(parent) || !self.is_up(node) {
            self.oracle.fail(now, format!("{text}: one of them is dead, not the link"));
        } else if !real {
            self.oracle.fail(now, format!("{text}: it lost {costs} connections at most"));
        }
        // The upper node goes behind one that may not have been told yet: until all is covered again, chunks may be lacked.
        self.oracle.losses += u32::from(self.plan.settings.survive) + 1;
        self.oracle.dead_links[parent] += 1;
        self.oracle.dead_links[node] += 1;
    }

    /// The wave is about to be released.
    pub(super) fn check_release(&mut self) {
        for node in (1..self.hosts.len()).filter(|node| self.is_in(*node)) {
            let host = &self.hosts[node];
            let end = host.relay.end();
            if end != self.plan.total || !host.relay.is_complete() {
                self.oracle.fail(self.now, format!("released, and node {node} wants chunk {end}"));
                return;
            }
            if !host.consumer.gone && host.consumer.next < host.relay.first() {
                let text = format!("released, and chunk {} is gone from node {node}", host.consumer.next);
                self.oracle.fail(self.now, text);
                return;
            }
        }
    }

    /// Nothing happens without a fault.
    pub(super) fn check_quiet_run(&mut self) {
        if self.plan.faults.is_empty() {
            if (1..self.hosts.len()).any(|node| !self.is_in(node)) {
                self.oracle.fail(self.now, "somebody was lost and nothing had happened".to_owned());
            }
            if self.wires.iter().any(|wire| wire.orders.len() > 1) {
                self.oracle.fail(self.now, "a link was dialled anew and nothing had happened".to_owned());
            }
        }
    }

    /// Whether everybody is covered is looked at on each tick of the server.
    pub(super) fn check_cover(&mut self) {
        let dead = (1..self.hosts.len()).any(|node| self.is_in(node) && !self.is_up(node));
        if dead {
            return;
        }
        if self.oracle.losses > 0 && self.is_covered() {
            self.oracle.losses = 0;
        }
        let since = self.oracle.topology_changed.max(self.quiet_from);
        if self.now < since + self.plan.settle() || !self.is_calm() {
            return;
        }
        let full = self.plan.settings.survive + 1;
        for host in (0..self.hosts.len()).filter(|host| *host == 0 || self.is_in(*host)) {
            let cover = self.hosts[host].relay.cover();
            if cover != full {
                let text = format!("host {host} has cover {cover} long after the last change");
                self.oracle.fail(self.now, text);
                return;
            }
        }
    }

    /// Every order was obeyed, and everybody holds what has left the windows above it.
    fn is_covered(&self) -> bool {
        let generations = self.plan.settings.survive + 1;
        let everybody = || (0..self.hosts.len()).filter(|host| *host == 0 || self.is_in(*host));
        everybody().all(|host| {
            let epoch = |place: &Option<Place>| place.as_ref().map(|p| p.epoch);
            epoch(&self.hosts[host].obeyed) == epoch(&self.oracle.orders[host])
                && self.wave.fetching(NodeId(host as u32)).is_none()
        }) && everybody().all(|host| {
            let mut above = NodeId(host as u32);
            let end = self.hosts[host].relay.end();
            (0..generations).all(|_| match self.wave.parent(above) {
                Some(parent) => {
                    above = parent;
                    end >= self.hosts[parent.0 as usize].relay.base()
                }
                None => true,
            })
        })
    }

    /// Nothing is broken, stuck or frozen, and every link stands.
    fn is_calm(&self) -> bool {
        let mut nodes = (1..self.hosts.len()).filter(|node| self.is_in(*node));
        self.one_way.is_empty()
            && !self.conns.iter().any(|conn| conn.cut_down || conn.cut_up)
            && nodes.all(|node| {
                let host = &self.hosts[node];
                !host.consumer.stuck
                    && host.frozen_until < EVER
                    && host.cut.1 < EVER
                    && self.conn_to_parent(node).is_some_and(|conn| self.conns[conn].joined)
            })
    }
}

/// The ends of a link that is said to be dead.
fn dead_link(text: &str) -> Option<(usize, usize)> {
    let (parent, rest) = text.strip_prefix("the link from ")?.split_once(" to node ")?;
    let parent = if parent == "the server" { 0 } else { parent.strip_prefix("node ")?.parse().ok()? };
    Some((parent, rest.split_once(' ')?.0.parse().ok()?))
}
