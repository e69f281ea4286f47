//! The server's part in one wave: who feeds whom, who is dead, who takes over the orphans, and when all is over.
//!
//! Nodes report, the server judges. There are three verdicts. *Node dead*: its control connection closed, or it was silent
//! there for too long. *Link dead*: the connection between two living nodes was lost, dialled anew, and lost again. *Node
//! stuck*: its own disk keeps the chain waiting. A neighbour's report alone never kills.
//!
//! Every change is made in one table of parents; [`Wave::sync`] then tells those whose place is another now, parents
//! before children.

mod damage;
mod removal;

use super::mutation::{Mutation, is_planted};
use super::{HEAD, Link, NodeId, Place, Time};
use crate::link::LinkId;
use removal::{Leaving, Planned};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// Dead links that a node may have before it must wait for the next wave.
const DEAD_LINKS: u8 = 2;
/// How often a node may be brought up from the history.
const FETCHES: u8 = 4;
/// What was said before a link was lost may arrive so much later: it is no sign that the end of the link lives.
const UNDER_WAY: Duration = Duration::from_secs(1);

/// How a wave is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Children of each node.
    pub arity: usize,
    /// Deaths in a row that are survived.
    pub survive: u8,
    /// How long a node or a link may be silent.
    pub dead_after: Duration,
    /// How long a node's own disk may keep its window full without taking anything.
    pub stall: Duration,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// This node's place, or the head's.
    Order(NodeId, Place),
    /// The node is dead; its connection is to be closed.
    Dead(NodeId, String),
    /// The node lives but has no place in this wave any more.
    Out(NodeId, String),
    /// Worth telling the operator.
    Say(String),
}

/// How a node stands in the wave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// In the chain.
    In,
    /// Dead.
    Dead,
    /// Taken out.
    Out,
}

/// What a node says of itself twice a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// It holds every chunk before this one.
    pub held: u64,
    /// Its consumer has every chunk before this one.
    pub consumed: u64,
    /// Its own consumer alone keeps its window full.
    pub stuck: bool,
    /// The epoch of the last order that it obeyed.
    pub epoch: u64,
    /// How many generations below it hold everything that has left its window.
    pub cover: u8,
}

#[derive(Debug)]
struct Member {
    standing: Standing,
    parent: NodeId,
    link: Link,
    /// The link stands.
    joined: bool,
    /// The link to this parent was lost before.
    lost_before: bool,
    /// It was lost again: dead once both ends have been heard after this time.
    suspected: Option<Time>,
    dead_links: u8,
    /// Fed by the server (or by one whose window reaches back further) until it holds every chunk before the number; then
    /// the node takes over.
    fetching: Option<(NodeId, u64)>,
    fetches: u8,
    heard: Time,
    status: Status,
    stuck_since: Option<Time>,
    ended: bool,
    failed: bool,
    damage: damage::Damage,
}

impl Member {
    /// It was heard so long after this time that it lived then.
    fn lives_after(&self, since: Time) -> bool {
        let under_way = if is_planted(Mutation::JudgeAtOnce) { Duration::ZERO } else { UNDER_WAY };
        self.heard > since + under_way
    }
}

/// Makes links from one random key, so that the wave itself needs no source of chance.
#[derive(Debug)]
struct Links {
    key: [u8; 32],
    next: u64,
}

impl Links {
    fn make(&mut self) -> Link {
        let mut bytes = [0; 48];
        self.next += 1;
        blake3::Hasher::new_keyed(&self.key).update(&self.next.to_le_bytes()).finalize_xof().fill(&mut bytes);
        let (mut id, mut secret) = ([0; 16], [0; 32]);
        id.copy_from_slice(&bytes[..16]);
        secret.copy_from_slice(&bytes[16..]);
        Link { id, secret }
    }
}

/// One wave.
#[derive(Debug)]
pub struct Wave {
    settings: Settings,
    links: Links,
    epoch: u64,
    members: BTreeMap<NodeId, Member>,
    sent: BTreeMap<NodeId, Place>,
    /// What the head says of itself.
    head: Status,
    planned: VecDeque<Planned>,
    leaving: Option<Leaving>,
    released: bool,
}

impl Wave {
    /// A wave of the nodes 1 to `count`, in this order. `key` is random and secret: links are made from it.
    #[must_use]
    pub fn new(settings: Settings, count: u32, key: [u8; 32], now: Time) -> Self {
        let mut links = Links { key, next: 0 };
        let arity = u32::try_from(settings.arity.max(1)).unwrap_or(u32::MAX);
        // Numbered as a heap whose root is the server.
        let member = |n: u32, links: &mut Links| Member {
            standing: Standing::In,
            parent: NodeId((n - 1) / arity),
            link: links.make(),
            joined: false,
            lost_before: false,
            suspected: None,
            dead_links: 0,
            fetching: None,
            fetches: 0,
            heard: now,
            status: Status::default(),
            stuck_since: None,
            ended: false,
            failed: false,
            damage: damage::Damage::default(),
        };
        let members = (1..=count).map(|n| (NodeId(n), member(n, &mut links))).collect();
        Self {
            settings,
            links,
            epoch: 0,
            members,
            sent: BTreeMap::new(),
            head: Status::default(),
            planned: VecDeque::new(),
            leaving: None,
            released: false,
        }
    }

    /// The first orders.
    pub fn begin(&mut self) -> Vec<Action> {
        self.sync()
    }

    /// How a node stands.
    #[must_use]
    pub fn standing(&self, node: NodeId) -> Option<Standing> {
        self.members.get(&node).map(|m| m.standing)
    }

    /// Who feeds a node.
    #[must_use]
    pub fn parent(&self, node: NodeId) -> Option<NodeId> {
        self.members.get(&node).filter(|m| m.standing == Standing::In).map(|m| m.parent)
    }

    /// Who takes a node over once the server has brought it up from the history.
    #[must_use]
    pub fn fetching(&self, node: NodeId) -> Option<NodeId> {
        let member = self.members.get(&node).filter(|m| m.standing == Standing::In)?;
        member.fetching.map(|(ancestor, _)| ancestor)
    }

    fn living(&mut self, node: NodeId) -> Option<&mut Member> {
        self.members.get_mut(&node).filter(|m| m.standing == Standing::In)
    }

    fn is_in(&self, node: NodeId) -> bool {
        node == HEAD || self.members.get(&node).is_some_and(|m| m.standing == Standing::In)
    }

    /// A node said something, anything.
    pub fn heard(&mut self, node: NodeId, now: Time) {
        if let Some(member) = self.living(node) {
            member.heard = now;
        }
    }

    /// How far a node is.
    pub fn status(&mut self, node: NodeId, status: Status, now: Time) -> Vec<Action> {
        let Some(member) = self.living(node) else { return Vec::new() };
        member.heard = now;
        let moved = status.consumed > member.status.consumed && !is_planted(Mutation::SlowIsStuck);
        member.stuck_since = match member.stuck_since {
            _ if !status.stuck => None,
            Some(since) if !moved => Some(since),
            _ => Some(now),
        };
        member.status = status;
        self.verified(node, status.held);
        let Some(member) = self.living(node) else { return Vec::new() };
        let caught_up = member.fetching.filter(|(_, to)| status.held >= *to);
        match caught_up {
            Some((ancestor, _)) if !is_planted(Mutation::StayWithServer) => {
                let ancestor = self.nearest_in(ancestor);
                // It may stand below the node by now: then the one that feeds it goes on.
                if !self.subtree(node).contains(&ancestor) {
                    self.attach(node, ancestor);
                } else if let Some(member) = self.living(node) {
                    member.fetching = None;
                }
                self.sync()
            }
            _ => Vec::new(),
        }
    }

    /// A node's link to its parent stands.
    pub fn joined(&mut self, node: NodeId, link: &LinkId, now: Time) {
        if let Some(member) = self.living(node)
            && member.link.id == *link
        {
            member.heard = now;
            member.joined = true;
        }
    }

    /// A node's link to its parent was lost, or never came to stand.
    pub fn lost(&mut self, node: NodeId, link: &LinkId, now: Time) -> Vec<Action> {
        if self.released {
            return Vec::new();
        }
        let Some(member) = self.living(node) else { return Vec::new() };
        member.heard = now;
        if member.link.id != *link && !is_planted(Mutation::AnyLinkLost) {
            // That of an order which was replaced meanwhile.
            return Vec::new();
        }
        member.joined = false;
        if member.lost_before && !is_planted(Mutation::RedialForEver) {
            // The parent may be dead and we do not know it yet.
            member.suspected.get_or_insert(now);
            return Vec::new();
        }
        member.lost_before = true;
        if is_planted(Mutation::NoRedial) {
            return Vec::new();
        }
        let link = self.links.make();
        if let Some(member) = self.living(node) {
            member.link = link;
        }
        self.sync()
    }

    /// A parent has sent chunks to a child over this link and heard nothing for too long, though the child does not say that
    /// it is full.
    pub fn silent_link(&mut self, child: NodeId, link: &LinkId, now: Time) -> Vec<Action> {
        let Some(member) = self.living(child) else { return Vec::new() };
        // The child was not heard: it is its parent that speaks.
        let heard = member.heard;
        let actions = self.lost(child, link, now);
        if let Some(member) = self.living(child) {
            member.heard = heard;
        }
        actions
    }

    /// The parent no longer has the chunk that the node wants next; its oldest is `oldest`.
    pub fn lacking(&mut self, node: NodeId, link: &LinkId, oldest: u64, now: Time) -> Vec<Action> {
        let Some(member) = self.living(node).filter(|m| m.link.id == *link) else { return Vec::new() };
        member.heard = now;
        let (asked, fetching) = (member.parent, member.fetching);
        if fetching.is_none() {
            member.fetches += 1;
        }
        let allowed = member.fetches <= FETCHES && !is_planted(Mutation::NoHistory);
        // The server's history first; then those above the ancestor, whose windows may reach back further because a disk
        // there is slow.
        let above = |node| self.members.get(&node).map_or(HEAD, |m| m.parent);
        let (feeder, ancestor, oldest) = match fetching {
            None => (HEAD, asked, oldest),
            Some((ancestor, to)) => (above(if asked == HEAD { ancestor } else { asked }), ancestor, to),
        };
        let hopeless = if fetching.is_none() { asked == HEAD } else { feeder == HEAD };
        if hopeless || !allowed || (fetching.is_some() && is_planted(Mutation::HistoryOnly)) {
            let why = "what it wants next has left every window and the history";
            let mut actions = Vec::new();
            // Those below it are behind it.
            for below in self.subtree(node) {
                actions.extend(self.take(below, Standing::Out, why));
            }
            actions.extend(self.sync());
            return actions;
        }
        let from = if feeder == HEAD { "the server's history".to_owned() } else { feeder.to_string() };
        let mut actions = vec![Action::Say(format!("{node} is brought up from {from}, to chunk {oldest}"))];
        self.attach(node, feeder);
        if let Some(member) = self.living(node) {
            member.fetching = Some((ancestor, oldest));
        }
        actions.extend(self.sync());
        actions
    }

    /// A node's control connection ended.
    pub fn gone(&mut self, node: NodeId, why: &str) -> Vec<Action> {
        if self.released || !self.is_in(node) {
            return Vec::new();
        }
        let mut actions = self.take(node, Standing::Dead, why);
        actions.extend(self.sync());
        actions
    }

    /// A node holds the end record.
    pub fn ended(&mut self, node: NodeId) {
        if let Some(member) = self.living(node) {
            member.ended = true;
        }
    }

    /// A node's installation failed; it goes on as a relay.
    pub fn failed(&mut self, node: NodeId) {
        if let Some(member) = self.living(node) {
            member.failed = true;
        }
    }

    /// Whether every node that is still in, and has not failed, holds the end.
    #[must_use]
    pub fn may_release(&self) -> bool {
        let mut relevant =
            self.members.values().filter(|m| m.standing == Standing::In || is_planted(Mutation::WaitForDead));
        if is_planted(Mutation::ReleaseEarly) {
            relevant.any(|m| m.ended)
        } else {
            relevant.all(|m| m.ended || m.failed)
        }
    }

    /// The wave is over: from now on closed connections are no deaths.
    pub fn release(&mut self) {
        self.released = true;
    }

    /// Time passed: the silent are dead, dead links are replaced, the stuck are taken out.
    pub fn tick(&mut self, now: Time) -> Vec<Action> {
        if self.released {
            return Vec::new();
        }
        let mut actions = Vec::new();
        let of = |wave: &Self, test: &dyn Fn(&Member) -> bool| -> Vec<NodeId> {
            let living = wave.members.iter().filter(|(_, m)| m.standing == Standing::In);
            living.filter(|(_, m)| test(m)).map(|(node, _)| *node).collect()
        };
        let limit = self.settings.dead_after;
        for node in of(self, &|m| now.saturating_sub(m.heard) >= limit && !is_planted(Mutation::NeverDead)) {
            let why = format!("it was silent for {} s", limit.as_secs());
            actions.extend(self.take(node, Standing::Dead, &why));
        }
        for node in of(self, &|m| m.suspected.is_some_and(|since| m.lives_after(since))) {
            actions.extend(self.judge_link(node));
        }
        let stall = self.settings.stall;
        for node in of(self, &|m| m.stuck_since.is_some_and(|since| now.saturating_sub(since) >= stall)) {
            if !is_planted(Mutation::NeverStuck) {
                let why = format!("its disk took nothing for {} s", stall.as_secs());
                // Nothing may move before it is out, so that cover is not waited for without end.
                self.plan_out(node, &why, Some(limit));
            }
        }
        actions.extend(self.remove_planned(now));
        actions.extend(self.sync());
        actions
    }

    /// The link of a node was lost twice and the node lives; when its parent does too, the link is dead.
    fn judge_link(&mut self, node: NodeId) -> Vec<Action> {
        let Some((parent, since)) = self.members.get(&node).and_then(|m| Some((m.parent, m.suspected?)))
        else {
            return Vec::new();
        };
        if parent != HEAD && self.members.get(&parent).is_some_and(|m| !m.lives_after(since)) {
            return Vec::new();
        }
        let mut actions =
            vec![Action::Say(format!("the link from {parent} to {node} is dead though both ends live"))];
        let above = self.nearest_in(self.members.get(&parent).map_or(HEAD, |m| m.parent));
        for end in [node, parent] {
            if let Some(member) = self.living(end) {
                member.dead_links += 1;
            }
        }
        self.attach(node, above);
        if parent != HEAD && self.settings.arity == 1 {
            // So that the node above keeps feeding one only.
            let mut last = node;
            while let Some(next) = self.children(last).first() {
                last = *next;
            }
            if last != node {
                self.attach(parent, last);
            } else if above != HEAD {
                // At the end the two would meet again: the one above goes between them.
                let higher = self.members.get(&above).map_or(HEAD, |m| m.parent);
                self.attach(node, self.nearest_in(higher));
                self.attach(above, node);
            }
            // Else there is nobody to go between, and the server feeds both.
        }
        let dead_links = if is_planted(Mutation::OneDeadLinkIsEnough) { 1 } else { DEAD_LINKS };
        for end in [node, parent] {
            // One that holds everything only waits for the release.
            if self.members.get(&end).is_some_and(|m| m.dead_links >= dead_links && !m.ended) {
                let why = format!("{DEAD_LINKS} of its links were dead");
                actions.extend(self.take(end, Standing::Out, &why));
            }
        }
        actions
    }

    /// Takes a node out of the chain; its children go to the nearest ancestor that is in.
    fn take(&mut self, node: NodeId, standing: Standing, why: &str) -> Vec<Action> {
        let Some(member) = self.living(node) else { return Vec::new() };
        member.standing = standing;
        let above = member.parent;
        let above = if is_planted(Mutation::AttachToDead) {
            NodeId(node.0.saturating_sub(1) / u32::try_from(self.settings.arity.max(1)).unwrap_or(1))
        } else {
            self.nearest_in(above)
        };
        if !is_planted(Mutation::ForgetOrphans) {
            let orphans: Vec<NodeId> = self
                .members
                .iter()
                .filter(|(_, m)| m.standing == Standing::In && m.parent == node)
                .map(|(orphan, _)| *orphan)
                .collect();
            for orphan in orphans {
                self.attach(orphan, above);
            }
        }
        for member in self.members.values_mut() {
            if let Some((ancestor, _)) = &mut member.fetching
                && *ancestor == node
            {
                *ancestor = above;
            }
        }
        match standing {
            Standing::Dead => vec![Action::Dead(node, why.to_owned())],
            _ => vec![Action::Out(node, why.to_owned())],
        }
    }

    /// Gives a node another parent, over a new link.
    fn attach(&mut self, node: NodeId, parent: NodeId) {
        let link = self.links.make();
        if let Some(member) = self.living(node) {
            member.parent = parent;
            member.link = link;
            member.joined = false;
            member.lost_before = false;
            member.suspected = None;
            member.fetching = None;
        }
    }

    fn nearest_in(&self, mut node: NodeId) -> NodeId {
        while !self.is_in(node) {
            node = self.members.get(&node).map_or(HEAD, |m| m.parent);
        }
        node
    }

    fn children(&self, parent: NodeId) -> Vec<NodeId> {
        let of = |m: &Member| m.standing == Standing::In && m.parent == parent;
        self.members.iter().filter(|(_, m)| of(m)).map(|(node, _)| *node).collect()
    }

    /// A node and everybody below it.
    fn subtree(&self, node: NodeId) -> Vec<NodeId> {
        let mut found = vec![node];
        let mut at = 0;
        while let Some(next) = found.get(at) {
            found.extend(self.children(*next));
            at += 1;
        }
        found
    }

    /// Tells everybody whose place has changed.
    fn sync(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        let mut children: BTreeMap<NodeId, Vec<(NodeId, Link)>> = BTreeMap::new();
        let mut families: BTreeMap<NodeId, BTreeMap<NodeId, u8>> = BTreeMap::new();
        for (node, member) in &self.members {
            if member.standing != Standing::In {
                if is_planted(Mutation::DeadStayInFamilies) {
                    self.credit(member, 1, *node, &mut families);
                }
                continue;
            }
            children.entry(member.parent).or_default().push((*node, member.link.clone()));
            self.credit(member, 1, *node, &mut families);
        }
        // Parents first: what a child dials should be expected when it comes.
        let mut queue: VecDeque<NodeId> = VecDeque::from([HEAD]);
        let mut seen = BTreeSet::new();
        while let Some(node) = queue.pop_front() {
            if !seen.insert(node) {
                continue;
            }
            queue.extend(children.get(&node).into_iter().flatten().map(|(child, _)| *child));
            let place = Place {
                epoch: self.epoch + 1,
                parent: self.members.get(&node).map(|m| (m.parent, m.link.clone())),
                children: children.remove(&node).unwrap_or_default(),
                family: families.remove(&node).unwrap_or_default().into_iter().collect(),
            };
            let same = |old: &Place| {
                old.parent == place.parent
                    && old.children == place.children
                    && (old.family == place.family || is_planted(Mutation::StaleFamilies))
            };
            if !self.sent.get(&node).is_some_and(same) {
                self.epoch += 1;
                self.sent.insert(node, place.clone());
                actions.push(Action::Order(node, place));
            }
        }
        actions
    }

    /// Enters `node` into the families of those above `member`, also above the one that will take it over later.
    fn credit(
        &self,
        member: &Member,
        depth: u8,
        node: NodeId,
        families: &mut BTreeMap<NodeId, BTreeMap<NodeId, u8>>,
    ) {
        if depth > self.settings.survive + 1 {
            return;
        }
        let ancestor = member.fetching.map(|(ancestor, _)| ancestor);
        let ancestor = ancestor.filter(|_| !is_planted(Mutation::AncestorForgets));
        for above in std::iter::once(member.parent).chain(ancestor).chain(self.heir_of(member.parent)) {
            if above == node {
                continue;
            }
            let known = families.entry(above).or_default().entry(node).or_insert(depth);
            *known = depth.min(*known);
            if let Some(next) = self.members.get(&above) {
                self.credit(next, depth + 1, node, families);
            }
        }
    }
}

#[cfg(test)]
mod tests;
