//! A node's part in the chain: which chunks it must keep, what each child is sent next, whether more may be read, when it
//! acknowledges. The server at the head is the same without a parent.
//!
//! A chunk stays until the local consumer has it and every living node of the `survive + 1` generations below holds it.
//! So an orphan whose parent, and up to `survive - 1` nodes above that, died finds the chunk it wants next at its nearest
//! living ancestor. The head may keep more, as a history for those who lost more than that.

use super::mutation::{Mutation, is_planted};
use super::{Acknowledgement, Link, NodeId, Place, Time};
use crate::CHUNK;
use crate::link::LinkId;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// New chunks that are acknowledged at once. Few: what is acknowledged soon leaves the windows above soon, and buffers that
/// come back soon are still in the cache; but each costs some 40 us at both ends together. Measured (8 receivers,
/// unshaped, CPU-s/GB): 2 chunks 1.05, 4 0.98, 8 1.01 to 1.15, 32 1.11 to 1.27.
const QUANTUM: u64 = 4;
/// Something changed: an acknowledgement is sent after this time at the latest.
const SOON: Duration = Duration::from_millis(50);
/// Nothing changed: it is said again after this time, so that the parent sees that the child lives.
const AGAIN: Duration = Duration::from_secs(1);

/// How much a node may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Deaths in a row that are survived.
    pub survive: u8,
    /// Bytes of the window, as its buffers occupy them.
    pub window: usize,
    /// Bytes that are kept beyond the window (at the head), counted the same.
    pub history: usize,
}

impl Limits {
    /// Chunks that the window takes whatever their size.
    fn least(&self) -> usize {
        2 * (usize::from(self.survive) + 2)
    }
}

/// What the I/O around a relay is to do after an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Close the connection to the parent.
    CloseParent(LinkId),
    /// Dial the new parent.
    Dial(NodeId, Link),
    /// Close the connection to this child.
    CloseChild(NodeId, LinkId),
}

/// The answer to a child that names its link and the chunk that it wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is sent that chunk and what follows.
    Welcome,
    /// The chunk has left the window; this one is the oldest. It waits here, and the server is asked.
    Lacking(u64),
    /// No such link is known (yet).
    Unknown,
}

#[derive(Debug)]
struct Child {
    link: Link,
    /// The next chunk to be sent, while it is connected.
    next: Option<u64>,
    /// When it last got on, said that it is full, or had nothing to get on with.
    moved: Time,
    /// When it last acknowledged anything at all.
    heard: Time,
    /// It was reported as silent.
    reported: bool,
}

#[derive(Debug)]
struct Parent {
    node: NodeId,
    link: Link,
}

/// A node's part in the chain.
#[derive(Debug)]
pub struct Relay {
    me: NodeId,
    limits: Limits,
    epoch: u64,
    /// The oldest chunk that is held at all.
    first: u64,
    /// The oldest chunk that must be held.
    base: u64,
    /// Sizes of the chunks from `first` on.
    sizes: VecDeque<u32>,
    /// Bytes from `base` on, and of everything.
    duty: usize,
    stored: usize,
    /// Whether no chunk follows those that are held.
    complete: bool,
    /// How far the local consumer is; none when there is none or it gave up.
    consumer: Option<u64>,
    family: BTreeMap<NodeId, u8>,
    held: BTreeMap<NodeId, u64>,
    children: BTreeMap<NodeId, Child>,
    parent: Option<Parent>,
    said: (Time, Acknowledgement),
}

impl Relay {
    /// A relay that holds nothing yet; with `consumes` it waits for a local consumer.
    #[must_use]
    pub fn new(me: NodeId, limits: Limits, consumes: bool) -> Self {
        Self {
            me,
            limits,
            epoch: 0,
            first: 0,
            base: 0,
            sizes: VecDeque::new(),
            duty: 0,
            stored: 0,
            complete: false,
            consumer: consumes.then_some(0),
            family: BTreeMap::new(),
            held: BTreeMap::new(),
            children: BTreeMap::new(),
            parent: None,
            said: (Time::ZERO, Acknowledgement::default()),
        }
    }

    /// Obeys an order, if it is newer than the last.
    pub fn place(&mut self, place: Place, now: Time) -> Vec<Change> {
        if place.epoch <= self.epoch && !is_planted(Mutation::IgnoreEpoch) {
            return Vec::new();
        }
        self.epoch = place.epoch;
        let mut changes = Vec::new();
        let mut old = std::mem::take(&mut self.children);
        for (node, link) in place.children {
            let child = match old.remove(&node) {
                Some(child) if child.link == link || is_planted(Mutation::KeepOldChild) => child,
                replaced => {
                    changes.extend(replaced.map(|child| Change::CloseChild(node, child.link.id)));
                    Child { link, next: None, moved: now, heard: now, reported: false }
                }
            };
            self.children.insert(node, child);
        }
        changes.extend(old.into_iter().map(|(node, child)| Change::CloseChild(node, child.link.id)));
        self.family = place.family.into_iter().collect();
        let replaced = match (&self.parent, &place.parent) {
            (Some(old), Some((_, link))) => old.link != *link,
            (Some(_), None) | (None, Some(_)) => true,
            (None, None) => false,
        };
        if replaced {
            if let Some(old) = self.parent.take()
                && !is_planted(Mutation::KeepOldParent)
            {
                changes.push(Change::CloseParent(old.link.id));
            }
            if let Some((node, link)) = place.parent {
                changes.push(Change::Dial(node, link.clone()));
                self.parent = Some(Parent { node, link });
            }
        }
        self.trim();
        changes
    }

    /// The epoch of the last order that was obeyed.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number after the last chunk held: what is wanted next.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first + self.sizes.len() as u64
    }

    /// The oldest chunk that is held.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The oldest chunk that is held because somebody may need it.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes of the window in use, as its buffers occupy them.
    #[must_use]
    pub fn fill(&self) -> usize {
        self.duty
    }

    /// Whether another chunk may be taken.
    #[must_use]
    pub fn room(&self) -> bool {
        let chunks = self.end() - self.base;
        self.duty + CHUNK <= self.limits.window || chunks < self.limits.least() as u64
    }

    /// Whether the local consumer alone keeps the window full.
    #[must_use]
    pub fn stuck(&self) -> bool {
        !self.room() && self.consumer == Some(self.base)
    }

    /// The next chunk is held, which occupies `size` bytes; with `last` none follows it.
    pub fn pushed(&mut self, size: u32, last: bool) {
        self.sizes.push_back(size);
        self.duty += size as usize;
        self.stored += size as usize;
        self.complete |= last;
        self.trim();
    }

    /// Whether every chunk of the stream has come.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// The local consumer has every chunk before this one.
    pub fn consumed(&mut self, to: u64) {
        if let Some(consumer) = &mut self.consumer {
            *consumer = to.max(*consumer);
        }
        self.trim();
    }

    /// The local consumer gave up: from now on this is a relay for those below.
    pub fn consumer_gone(&mut self) {
        self.consumer = None;
        if is_planted(Mutation::FailedIsDead) {
            self.family.clear();
        }
        self.trim();
    }

    /// A child names its link and the chunk that it wants next.
    pub fn hello(&mut self, link: &LinkId, want: u64, now: Time) -> (Option<NodeId>, Answer) {
        let Some((node, child)) = self.children.iter_mut().find(|(_, child)| child.link.id == *link) else {
            return (None, Answer::Unknown);
        };
        let node = *node;
        hold(&mut self.held, node, want);
        child.moved = now;
        child.heard = now;
        if want < self.first && !is_planted(Mutation::ResumeFromOldest) {
            child.next = None;
            return (Some(node), Answer::Lacking(self.first));
        }
        let want = want.max(self.first);
        child.next = Some(if is_planted(Mutation::ResumeOneLate) {
            want + 1
        } else if is_planted(Mutation::ResumeOneEarly) {
            want.saturating_sub(1).max(self.first)
        } else if is_planted(Mutation::ResumeAtEnd) {
            want.min(self.first + self.sizes.len() as u64)
        } else {
            want
        });
        self.trim();
        (Some(node), Answer::Welcome)
    }

    /// The connection of a link to a child ended.
    pub fn child_closed(&mut self, link: &LinkId) {
        if let Some(child) = self.children.values_mut().find(|child| child.link.id == *link) {
            child.next = None;
        }
    }

    /// Who is at the other end of a link to a child.
    #[must_use]
    pub fn child_of(&self, link: &LinkId) -> Option<NodeId> {
        self.children.iter().find(|(_, child)| child.link.id == *link).map(|(node, _)| *node)
    }

    /// The link to a child.
    #[must_use]
    pub fn link_to(&self, child: NodeId) -> Option<&Link> {
        self.children.get(&child).map(|child| &child.link)
    }

    /// The links on which children may come, and which child.
    #[must_use]
    pub fn links(&self) -> BTreeMap<LinkId, (NodeId, Link)> {
        self.children.iter().map(|(node, child)| (child.link.id, (*node, child.link.clone()))).collect()
    }

    /// What [`Relay::hello`] would answer; nothing changes.
    #[must_use]
    pub fn look(&self, link: &LinkId, want: u64) -> Answer {
        match self.child_of(link) {
            None => Answer::Unknown,
            Some(_) if want < self.first => Answer::Lacking(self.first),
            Some(_) => Answer::Welcome,
        }
    }

    /// Whether there is something to acknowledge that waits only for its time.
    #[must_use]
    pub fn has_news(&self) -> bool {
        self.acknowledgement() != self.said.1
    }

    /// Whether a local consumer is waited for.
    #[must_use]
    pub fn has_consumer(&self) -> bool {
        self.consumer.is_some()
    }

    /// The parent, over which link.
    #[must_use]
    pub fn parent(&self) -> Option<(NodeId, &Link)> {
        self.parent.as_ref().map(|parent| (parent.node, &parent.link))
    }

    /// A child acknowledges.
    pub fn acknowledged(&mut self, link: &LinkId, said: &Acknowledgement, now: Time) {
        let Some((node, child)) = self.children.iter_mut().find(|(_, child)| child.link.id == *link) else {
            return;
        };
        let before = self.held.get(node).copied().unwrap_or_default();
        for (node, to) in &said.held {
            // A name that the wave does not have cannot grow this map without bound: the family is bounded by the server.
            if self.family.contains_key(node) || self.held.len() < MOST_HELD {
                hold(&mut self.held, *node, *to);
            }
        }
        child.heard = now;
        // That it was full once is no excuse for ever: one that lives says so again each second.
        let full = said.full && !is_planted(Mutation::FullIsDead);
        if self.held.get(node).copied().unwrap_or_default() > before || full {
            child.moved = now;
            child.reported = false;
        }
        self.trim();
    }

    /// The chunk that this child is to be sent next, if it is here.
    #[must_use]
    pub fn next_for(&self, node: NodeId) -> Option<u64> {
        self.children.get(&node)?.next.filter(|next| *next < self.end())
    }

    /// Connected children that can be sent something now.
    pub fn sendable(&self) -> impl Iterator<Item = (NodeId, &Link, u64)> {
        self.children.iter().filter_map(|(node, child)| {
            let next = child.next.filter(|next| *next < self.end())?;
            Some((*node, &child.link, next))
        })
    }

    /// This chunk was given to the kernel for this child.
    pub fn sent(&mut self, node: NodeId, number: u64, now: Time) {
        let held = self.held.get(&node).copied().unwrap_or_default();
        if let Some(child) = self.children.get_mut(&node) {
            if child.next.is_some_and(|next| next <= held) {
                // Nothing was under way until now.
                child.moved = now;
            }
            child.next = Some(number + 1);
        }
    }

    /// Children that were sent chunks, and for `limit` have neither acknowledged any nor said that they are full; and those
    /// that have said nothing at all for so long, though one that lives says something each second: it may hold all that it
    /// was sent, and what is not heard is how far those below it are. Each is reported once.
    pub fn silent(&mut self, now: Time, limit: Duration) -> Vec<NodeId> {
        let mut silent = Vec::new();
        for (node, child) in &mut self.children {
            let held = self.held.get(node).copied().unwrap_or_default();
            let under_way = child.next.is_some_and(|next| next > held);
            let mute = child.next.is_some() && !is_planted(Mutation::OnlyChunksCount);
            let silent_for = |since: Time| now.saturating_sub(since) >= limit;
            if !child.reported && (under_way && silent_for(child.moved) || mute && silent_for(child.heard)) {
                child.reported = true;
                silent.push(*node);
            }
        }
        if is_planted(Mutation::SilentLinkStays) { Vec::new() } else { silent }
    }

    /// What the parent is to be told now, if anything: when much has changed, or something and a little time has passed, or
    /// a second has.
    pub fn acknowledge(&mut self, now: Time) -> Option<Acknowledgement> {
        let since = now.saturating_sub(self.said.0);
        if since < SOON && !self.much_is_new() {
            return None;
        }
        let due = self.acknowledgement();
        if since < AGAIN && due == self.said.1 {
            return None;
        }
        self.said = (now, due.clone());
        Some(due)
    }

    /// What the parent is told on every new link and after every order, whatever was said before.
    pub fn acknowledge_again(&mut self, now: Time) -> Acknowledgement {
        let due = self.acknowledgement();
        self.said = (now, due.clone());
        due
    }

    fn much_is_new(&self) -> bool {
        // In a small window sooner still: it must not fill while words wait.
        let quantum = QUANTUM.min((self.limits.window / CHUNK / 16).max(1) as u64);
        let said = self.said.1.held.first().map_or(0, |(_, to)| *to);
        self.end() >= said + quantum
    }

    fn acknowledgement(&self) -> Acknowledgement {
        // One generation more than the parent covers: before this node leaves by plan, the parent must hold what all those
        // want that it covers then.
        let mut deepest = self.limits.survive + 1;
        if is_planted(Mutation::DropLastGeneration) {
            deepest = deepest.saturating_sub(2);
        }
        let below = self
            .family
            .iter()
            .filter(|(_, depth)| **depth <= deepest && !is_planted(Mutation::DropDescendants));
        let held = std::iter::once((self.me, self.end()))
            .chain(below.map(|(node, _)| (*node, self.held.get(node).copied().unwrap_or_default())))
            .collect();
        Acknowledgement { full: !self.room(), held }
    }

    /// How many generations below, one after the other, hold everything that has left this window: an orphan behind fewer
    /// dead nodes than that is served from here.
    #[must_use]
    pub fn cover(&self) -> u8 {
        let deepest = self.limits.survive + 1;
        let covered = |depth: &u8| {
            self.family
                .iter()
                .filter(|(_, d)| *d == depth)
                .all(|(node, _)| self.held.get(node).copied().unwrap_or_default() >= self.base)
        };
        let count = (1..=deepest).take_while(covered).count();
        u8::try_from(count).unwrap_or(deepest)
    }

    /// The server is at the head: whether all below hold everything.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.complete && self.base == self.end()
    }

    fn keep(&self) -> u64 {
        let mut keep = self.end();
        if let Some(consumer) = self.consumer
            && !is_planted(Mutation::ForgetConsumer)
        {
            keep = keep.min(consumer);
        }
        for (node, depth) in &self.family {
            if *depth > 1 && is_planted(Mutation::KeepForChildrenOnly) {
                continue;
            }
            match self.held.get(node) {
                None if is_planted(Mutation::UnreportedCountsAsDone) => {}
                held => keep = keep.min(held.copied().unwrap_or_default()),
            }
        }
        keep
    }

    /// Lets go of what nobody needs. What has once left does not come back: `base` never falls.
    fn trim(&mut self) {
        let keep = self.keep() + u64::from(is_planted(Mutation::LetGoOneMore));
        while self.base < keep {
            let at = usize::try_from(self.base - self.first).unwrap_or(usize::MAX);
            let Some(size) = self.sizes.get(at) else { break };
            self.duty -= *size as usize;
            self.base += 1;
        }
        // The history goes when it is too long. While a child is being given from it `base` stands still, and so does this.
        let orphan =
            || self.children.keys().any(|node| self.held.get(node).copied().unwrap_or_default() < self.base);
        let history = if is_planted(Mutation::HistoryForgets) && orphan() { 0 } else { self.limits.history };
        while self.first < self.base && self.stored - self.duty > history {
            let Some(size) = self.sizes.pop_front() else { break };
            self.stored -= size as usize;
            self.first += 1;
        }
    }
}

/// Names that acknowledgements may bring before the server has named them.
const MOST_HELD: usize = 1 << 16;

fn hold(held: &mut BTreeMap<NodeId, u64>, node: NodeId, to: u64) {
    let known = held.entry(node).or_default();
    *known = to.max(*known);
}

#[cfg(test)]
mod tests {
    use super::super::HEAD;
    use super::*;

    fn link(n: u8) -> Link {
        Link { id: [n; 16], secret: [0; 32] }
    }

    fn limits(survive: u8) -> Limits {
        Limits { survive, window: 8 * CHUNK, history: 0 }
    }

    fn place(epoch: u64, children: &[(u32, u8)], family: &[(u32, u8)]) -> Place {
        Place {
            epoch,
            parent: None,
            children: children.iter().map(|(n, l)| (NodeId(*n), link(*l))).collect(),
            family: family.iter().map(|(n, d)| (NodeId(*n), *d)).collect(),
        }
    }

    fn says(relay: &mut Relay, by: u8, held: &[(u32, u64)]) {
        let held = held.iter().map(|(n, p)| (NodeId(*n), *p)).collect();
        relay.acknowledged(&[by; 16], &Acknowledgement { full: false, held }, Time::ZERO);
    }

    #[test]
    fn a_chunk_stays_for_the_grandchildren_and_what_an_orphan_wants_is_there() {
        let mut relay = Relay::new(NodeId(1), limits(1), true);
        relay.place(place(1, &[(2, 2)], &[(2, 1), (3, 2)]), Time::ZERO);
        assert_eq!(relay.hello(&[2; 16], 0, Time::ZERO), (Some(NodeId(2)), Answer::Welcome));
        for _ in 0..6 {
            relay.pushed(100, false);
        }
        relay.consumed(6);
        says(&mut relay, 2, &[(2, 6)]);
        assert_eq!(relay.base(), 0, "node 3 has said nothing");
        says(&mut relay, 2, &[(2, 6), (3, 4)]);
        assert_eq!((relay.base(), relay.first(), relay.end()), (4, 4, 6));
        // Node 2 dies, node 3 comes with what it wants next.
        let changes = relay.place(place(2, &[(3, 3)], &[(3, 1)]), Time::ZERO);
        assert_eq!(changes, [Change::CloseChild(NodeId(2), [2; 16])]);
        assert_eq!(relay.hello(&[2; 16], 6, Time::ZERO).1, Answer::Unknown);
        assert_eq!(relay.hello(&[3; 16], 4, Time::ZERO).1, Answer::Welcome);
        assert_eq!(relay.next_for(NodeId(3)), Some(4));
        // One that is behind everything is told so.
        relay.place(place(3, &[(3, 3), (4, 4)], &[(3, 1), (4, 1)]), Time::ZERO);
        assert_eq!(relay.hello(&[4; 16], 3, Time::ZERO).1, Answer::Lacking(4));
    }

    #[test]
    fn a_full_window_takes_no_more_and_an_old_order_is_not_obeyed() {
        let mut relay = Relay::new(NodeId(1), Limits { survive: 0, window: CHUNK, history: 0 }, false);
        relay.place(place(5, &[(2, 2)], &[(2, 1)]), Time::ZERO);
        for _ in 0..4 {
            assert!(relay.room());
            relay.pushed(CHUNK as u32, false);
        }
        assert!(!relay.room());
        assert!(relay.place(place(5, &[], &[]), Time::ZERO).is_empty() && !relay.room());
        relay.place(place(6, &[], &[]), Time::ZERO);
        assert!(relay.room() && relay.base() == 4);
    }

    #[test]
    fn the_head_keeps_a_history_that_an_orphan_pins() {
        let mut head = Relay::new(HEAD, Limits { survive: 0, window: 8 * CHUNK, history: 300 }, false);
        head.place(place(1, &[(1, 1)], &[(1, 1)]), Time::ZERO);
        for _ in 0..10 {
            head.pushed(100, false);
        }
        says(&mut head, 1, &[(1, 10)]);
        assert_eq!((head.first(), head.base()), (7, 10));
        head.place(place(2, &[(1, 1), (9, 9)], &[(1, 1), (9, 1)]), Time::ZERO);
        assert_eq!(head.hello(&[9; 16], 6, Time::ZERO).1, Answer::Lacking(7));
        head.place(place(3, &[(1, 1), (8, 8)], &[(1, 1), (8, 1)]), Time::ZERO);
        assert_eq!(head.hello(&[8; 16], 7, Time::ZERO).1, Answer::Welcome);
        for _ in 0..10 {
            head.pushed(100, false);
        }
        says(&mut head, 1, &[(1, 20)]);
        assert_eq!(head.first(), 7, "node 8 is being given chunk 7");
        says(&mut head, 8, &[(8, 20)]);
        assert_eq!(head.first(), 17);
    }

    #[test]
    fn a_silent_child_is_reported_once_and_one_that_says_it_is_full_never() {
        let mut relay = Relay::new(NodeId(1), limits(0), false);
        relay.place(place(1, &[(2, 2)], &[(2, 1)]), Time::ZERO);
        relay.hello(&[2; 16], 0, Time::ZERO);
        let (eight, limit) = (Time::from_secs(8), Duration::from_secs(8));
        relay.acknowledged(&[2; 16], &Acknowledgement::default(), Time::from_secs(7));
        assert!(relay.silent(eight, limit).is_empty(), "nothing was sent");
        relay.pushed(10, false);
        relay.sent(NodeId(2), 0, eight);
        relay.acknowledged(&[2; 16], &Acknowledgement::default(), Time::from_secs(15));
        assert!(relay.silent(Time::from_secs(15), limit).is_empty());
        assert_eq!(relay.silent(eight * 2, limit), [NodeId(2)]);
        assert!(relay.silent(eight * 3, limit).is_empty());
        let full = Acknowledgement { full: true, held: Vec::new() };
        for second in 24..72 {
            relay.acknowledged(&[2; 16], &full, Time::from_secs(second));
            assert!(relay.silent(Time::from_secs(second + 1), limit).is_empty());
        }
        // Its last word was that it is full, and then nothing came any more: the way back is cut.
        assert_eq!(relay.silent(Time::from_secs(71 + 8), limit), [NodeId(2)]);
    }

    #[test]
    fn a_child_that_holds_all_and_says_nothing_any_more_is_silent_too() {
        let mut relay = Relay::new(NodeId(1), limits(1), false);
        relay.place(place(1, &[(2, 2)], &[(2, 1), (3, 2)]), Time::ZERO);
        let limit = Duration::from_secs(8);
        relay.pushed(10, false);
        assert!(relay.silent(Time::from_secs(20), limit).is_empty(), "it is not connected");
        relay.hello(&[2; 16], 0, Time::ZERO);
        relay.sent(NodeId(2), 0, Time::ZERO);
        says(&mut relay, 2, &[(2, 1), (3, 0)]);
        assert!(relay.silent(Time::from_millis(7900), limit).is_empty());
        assert_eq!((relay.base(), relay.silent(Time::from_secs(8), limit)), (0, vec![NodeId(2)]));
    }

    #[test]
    fn acknowledgements_come_soon_when_something_changed_and_each_second_when_not() {
        let mut relay = Relay::new(NodeId(1), limits(2), false);
        relay.place(place(1, &[(2, 2)], &[(2, 1), (3, 2), (4, 3)]), Time::ZERO);
        relay.pushed(10, false);
        let first = relay.acknowledge(Time::ZERO).unwrap();
        assert_eq!(first.held, [(NodeId(1), 1), (NodeId(2), 0), (NodeId(3), 0), (NodeId(4), 0)]);
        assert_eq!(relay.acknowledge(Time::from_millis(900)), None);
        assert_eq!(relay.acknowledge(Time::from_millis(1000)), Some(first));
        says(&mut relay, 2, &[(3, 1)]);
        assert_eq!(relay.acknowledge(Time::from_millis(1020)), None);
        assert!(relay.acknowledge(Time::from_millis(1051)).is_some());
    }

    #[test]
    fn what_is_acknowledged_at_once_depends_on_the_window() {
        for (window, quantum) in [(8, 1), (32, 2), (64, QUANTUM), (256, QUANTUM)] {
            let limits = Limits { survive: 2, window: window * CHUNK, history: 0 };
            let mut relay = Relay::new(NodeId(1), limits, false);
            for _ in 1..quantum {
                relay.pushed(10, false);
                assert_eq!(relay.acknowledge(Time::from_millis(49)), None, "{window}");
            }
            relay.pushed(10, false);
            assert!(relay.acknowledge(Time::from_millis(49)).is_some(), "{window}");
        }
    }
}
