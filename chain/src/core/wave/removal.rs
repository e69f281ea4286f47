//! Planned removals: a node whose disk is stuck, or that is too slow, leaves the chain while it still works. So nobody need lose
//! anything: first everybody is covered, then the parent keeps what the node's children want next, then they are fed by the
//! parent, and only then the node goes. One at a time.

use super::super::mutation::{Mutation, is_planted};
use super::{Action, Standing, Status, Wave};
use crate::core::{HEAD, NodeId, Time};
use crate::link::LinkId;
use std::time::Duration;

/// So many times the patience: then not even a missing link is waited for. One that comes and goes without end would keep
/// everybody behind a stuck disk.
const OVERDUE: u32 = 3;

/// A node that is to leave.
#[derive(Debug)]
pub(super) struct Planned {
    node: NodeId,
    why: String,
    /// It goes without the care above when that takes longer.
    patience: Option<Duration>,
}

/// How far the removal under way is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Until every link stands and everybody is covered.
    Waiting,
    /// Until the parent keeps what the children, and those below them, want next: deaths that nobody has noticed yet must not
    /// add up with this departure.
    Covering,
    /// Until the parent feeds them.
    Relinking,
}

/// The removal under way.
#[derive(Debug)]
pub(super) struct Leaving {
    planned: Planned,
    stage: Stage,
    since: Time,
}

impl Wave {
    /// A node is to leave the chain as soon as nobody is harmed by it; with `patience`, after this time even so when every
    /// link stands, and after three times as long whatever is missing.
    pub fn plan_out(&mut self, node: NodeId, why: &str, patience: Option<Duration>) {
        let leaving = self.leaving.as_mut().map(|leaving| &mut leaving.planned);
        let known = self.planned.iter_mut().chain(leaving).find(|planned| planned.node == node);
        if let Some(known) = known {
            // A slow disk may be stuck by now.
            known.patience = known.patience.or(patience);
        } else if node != HEAD && self.is_in(node) {
            self.planned.push_back(Planned { node, why: why.to_owned(), patience });
        }
    }

    /// Whether this is the link to the parent that a node was last told of.
    #[must_use]
    pub fn stands_on(&self, node: NodeId, link: &LinkId) -> bool {
        self.members.get(&node).is_some_and(|m| m.standing == Standing::In && m.link.id == *link)
    }

    /// Whether a node is about to leave.
    #[must_use]
    pub fn is_removing(&self) -> bool {
        self.leaving.is_some() || !self.planned.is_empty()
    }

    /// How the head stands.
    pub fn head_status(&mut self, status: Status) {
        self.head = status;
    }

    /// The nodes that are in, and who feeds each.
    pub fn pairs(&self) -> impl Iterator<Item = (NodeId, NodeId)> {
        let living = self.members.iter().filter(|(_, m)| m.standing == Standing::In);
        living.map(|(node, m)| (*node, m.parent))
    }

    /// Who takes a node over when its parent leaves, and keeps chunks for it already.
    #[must_use]
    pub fn heir(&self, node: NodeId) -> Option<NodeId> {
        self.parent(node).and_then(|parent| self.heir_of(parent))
    }

    /// Who takes over the children of a node that is leaving, and keeps chunks for them already.
    pub(super) fn heir_of(&self, node: NodeId) -> Option<NodeId> {
        let leaving =
            self.leaving.as_ref().filter(|l| l.planned.node == node && l.stage == Stage::Covering)?;
        self.members.get(&leaving.planned.node).map(|m| m.parent)
    }

    /// What a place said after it had obeyed its last order.
    fn up_to_date(&self, node: NodeId) -> Option<Status> {
        let status = if node == HEAD { self.head } else { self.members.get(&node)?.status };
        self.sent.get(&node).is_some_and(|place| place.epoch <= status.epoch).then_some(status)
    }

    /// Every link stands and nobody is being brought up.
    fn is_whole(&self) -> bool {
        self.members.values().filter(|m| m.standing == Standing::In).all(|m| m.joined && m.fetching.is_none())
    }

    /// Whether a place holds what all of those want that it is to cover, by its last order.
    fn is_full(&self, node: NodeId) -> bool {
        self.up_to_date(node).is_some_and(|s| s.cover > self.settings.survive)
    }

    fn is_covered(&self) -> bool {
        self.is_full(HEAD) && self.pairs().all(|(node, _)| self.is_full(node))
    }

    /// One step of the removal under way, or of the next.
    pub(super) fn remove_planned(&mut self, now: Time) -> Vec<Action> {
        if self.leaving.as_ref().is_some_and(|l| !self.is_in(l.planned.node)) {
            // It died meanwhile: its children have another parent.
            self.leaving = None;
        }
        self.let_the_stuck_pass();
        while self.leaving.is_none()
            && let Some(planned) = self.planned.pop_front()
        {
            if self.is_in(planned.node) {
                self.leaving = Some(Leaving { planned, stage: Stage::Waiting, since: now });
            }
        }
        let Some(leaving) = &self.leaving else { return Vec::new() };
        let (node, stage) = (leaving.planned.node, leaving.stage);
        let later_than = |patience: Duration| now.saturating_sub(leaving.since) >= patience;
        let late = leaving.planned.patience.is_some_and(later_than);
        let overdue = leaving.planned.patience.is_some_and(|p| later_than(OVERDUE * p))
            && !is_planted(Mutation::WaitForEnded);
        let parent = self.members.get(&node).map_or(HEAD, |m| m.parent);
        let children = self.children(node);
        // One that holds everything needs no parent any more: its link may be dead for good.
        let settled = |m: &super::Member| m.joined || (m.ended && !is_planted(Mutation::WaitForEnded));
        let all_joined = self.pairs().all(|(node, _)| self.members.get(&node).is_some_and(settled));
        let goes = match stage {
            _ if is_planted(Mutation::RemoveAtOnce) => all_joined,
            Stage::Waiting if self.is_whole() && self.is_covered() => {
                self.go_on(Stage::Covering);
                false
            }
            Stage::Covering if self.is_full(parent) && self.is_whole() => {
                for child in children {
                    self.attach(child, parent);
                }
                self.go_on(Stage::Relinking);
                false
            }
            Stage::Relinking if !children.is_empty() => {
                // Repairs have given it others.
                self.go_on(Stage::Covering);
                false
            }
            Stage::Relinking => self.is_whole() || (late && all_joined) || overdue,
            Stage::Waiting | Stage::Covering => (late && all_joined) || overdue,
        };
        match self.leaving.take_if(|_| goes) {
            Some(leaving) => self.take(node, Standing::Out, &leaving.planned.why),
            None => Vec::new(),
        }
    }

    /// A removal that is waited for without end gives way to one that is not: what it waits for may be that very node, whose
    /// disk is stuck below it.
    fn let_the_stuck_pass(&mut self) {
        let yields = |l: &mut Leaving| l.planned.patience.is_none() && l.stage != Stage::Relinking;
        let urgent = self.planned.iter().position(|p| p.patience.is_some() && self.is_in(p.node));
        if let Some(urgent) = urgent
            && let Some(leaving) = self.leaving.take_if(yields)
        {
            let first = self.planned.remove(urgent);
            self.planned.push_back(leaving.planned);
            self.planned.extend(first);
            self.planned.rotate_right(1);
        }
    }

    fn go_on(&mut self, stage: Stage) {
        if let Some(leaving) = &mut self.leaving {
            leaving.stage = stage;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::*;
    use crate::core::Place;
    use std::collections::BTreeMap;

    /// A wave whose nodes obey, join and say so at once, but for the cover, which the test gives.
    struct Lab {
        wave: Wave,
        places: BTreeMap<NodeId, Place>,
        cover: BTreeMap<NodeId, u8>,
        now: Time,
        out: Vec<NodeId>,
    }

    impl Lab {
        fn new(count: u32) -> Self {
            let (dead_after, stall) = (Duration::from_secs(8), Duration::from_secs(60));
            let settings = Settings { arity: 1, survive: 2, dead_after, stall };
            let mut wave = Wave::new(settings, count, [7; 32], Time::ZERO);
            let actions = wave.begin();
            let cover = (0..=count).map(|n| (NodeId(n), 3)).collect();
            let mut lab = Self { wave, places: BTreeMap::new(), cover, now: Time::ZERO, out: Vec::new() };
            lab.obey(actions);
            lab
        }

        fn obey(&mut self, actions: Vec<Action>) {
            for action in actions {
                match action {
                    Action::Order(node, place) => {
                        if let Some((_, link)) = &place.parent {
                            self.wave.joined(node, &link.id, self.now);
                        }
                        self.places.insert(node, place);
                    }
                    Action::Out(node, _) => self.out.push(node),
                    Action::Dead(..) | Action::Say(_) => {}
                }
            }
            for (node, place) in &self.places {
                let status = Status { epoch: place.epoch, cover: self.cover[node], ..Status::default() };
                match *node {
                    HEAD => self.wave.head_status(status),
                    node => drop(self.wave.status(node, status, self.now)),
                }
            }
        }

        fn tick(&mut self) {
            self.now += Duration::from_millis(100);
            let actions = self.wave.tick(self.now);
            self.obey(actions);
        }

        fn parent(&self, node: u32) -> Option<u32> {
            self.wave.parent(NodeId(node)).map(|p| p.0)
        }
    }

    #[test]
    fn the_child_is_fed_by_the_parent_before_the_node_goes() {
        let mut lab = Lab::new(4);
        lab.wave.plan_out(NodeId(2), "slow", None);
        lab.tick();
        assert!(lab.places[&NodeId(1)].family.contains(&(NodeId(3), 1)), "it keeps chunks for it already");
        assert_eq!((lab.parent(3), lab.out.len()), (Some(2), 0));
        lab.tick();
        assert_eq!((lab.parent(2), lab.parent(3), lab.out.len()), (Some(1), Some(1), 0));
        lab.tick();
        assert_eq!((lab.parent(3), &lab.out[..]), (Some(1), &[NodeId(2)][..]));
        assert_eq!(lab.places[&NodeId(1)].children.len(), 1);
        assert!(!lab.wave.is_removing());
    }

    #[test]
    fn full_cover_is_waited_for_and_one_goes_at_a_time() {
        let mut lab = Lab::new(5);
        lab.cover.insert(NodeId(4), 2);
        lab.obey(Vec::new());
        for node in [2, 3, 3] {
            lab.wave.plan_out(NodeId(node), "slow", None);
        }
        for _ in 0..1000 {
            lab.tick();
        }
        assert!(lab.out.is_empty() && lab.parent(3) == Some(2));
        lab.cover.insert(NodeId(4), 3);
        lab.obey(Vec::new());
        for _ in 0..3 {
            lab.tick();
        }
        assert_eq!(lab.out, [NodeId(2)]);
        // The repair has to settle before the next.
        lab.cover.insert(NodeId(1), 2);
        lab.obey(Vec::new());
        for _ in 0..100 {
            lab.tick();
        }
        assert_eq!(lab.out.len(), 1);
        lab.cover.insert(NodeId(1), 3);
        lab.obey(Vec::new());
        for _ in 0..3 {
            lab.tick();
        }
        assert_eq!(lab.out, [NodeId(2), NodeId(3)]);
    }

    #[test]
    fn a_parent_that_does_not_cover_the_children_yet_is_waited_for() {
        let mut lab = Lab::new(3);
        lab.wave.plan_out(NodeId(1), "slow", None);
        lab.tick();
        lab.cover.insert(HEAD, 2);
        lab.obey(Vec::new());
        lab.tick();
        lab.tick();
        assert_eq!((lab.parent(2), lab.out.len()), (Some(1), 0));
        lab.cover.insert(HEAD, 3);
        lab.obey(Vec::new());
        lab.tick();
        lab.tick();
        assert_eq!((lab.parent(2), lab.out.len()), (Some(0), 1));
    }

    #[test]
    fn a_slow_node_that_waits_for_a_stuck_one_below_lets_it_go_first() {
        let mut lab = Lab::new(4);
        lab.wave.plan_out(NodeId(1), "slow", None);
        lab.tick();
        // The head cannot cover node 3, which takes nothing.
        lab.cover.insert(HEAD, 1);
        lab.obey(Vec::new());
        for _ in 0..10 {
            lab.tick();
        }
        lab.wave.plan_out(NodeId(2), "slow", None);
        lab.wave.plan_out(NodeId(3), "stuck", Some(Duration::from_secs(8)));
        for _ in 0..82 {
            lab.tick();
        }
        assert_eq!(lab.out, [NodeId(3)]);
        lab.cover.insert(HEAD, 3);
        lab.obey(Vec::new());
        for _ in 0..10 {
            lab.tick();
        }
        assert_eq!(lab.out[0], NodeId(3));
        assert_eq!(lab.out.len(), 3, "{:?}", lab.out);
        assert!(!lab.wave.is_removing());
    }

    #[test]
    fn a_stuck_disk_is_not_waited_for_without_end_and_a_dead_node_needs_no_removal() {
        let mut lab = Lab::new(4);
        lab.cover.insert(NodeId(1), 0);
        lab.obey(Vec::new());
        lab.wave.plan_out(NodeId(3), "stuck", Some(Duration::from_secs(8)));
        for _ in 0..80 {
            lab.tick();
        }
        assert!(lab.out.is_empty());
        lab.tick();
        assert_eq!((&lab.out[..], lab.parent(4)), (&[NodeId(3)][..], Some(2)));
        // A link that never comes to stand does not keep a stuck disk in the chain for ever.
        let mut broken = Lab::new(4);
        let link = broken.places[&NodeId(4)].parent.clone().unwrap().1.id;
        drop(broken.wave.lost(NodeId(4), &link, broken.now));
        broken.wave.plan_out(NodeId(2), "stuck", Some(Duration::from_secs(8)));
        for n in 1..=241 {
            assert!(broken.out.is_empty(), "{n}");
            broken.now += Duration::from_millis(100);
            for node in 1..=4 {
                broken.wave.heard(NodeId(node), broken.now);
            }
            let actions = broken.wave.tick(broken.now);
            broken.out.extend(actions.iter().filter_map(|a| match a {
                Action::Out(node, _) => Some(*node),
                _ => None,
            }));
        }
        assert_eq!(broken.out, [NodeId(2)]);
        lab.wave.plan_out(NodeId(2), "slow", None);
        lab.tick();
        let actions = lab.wave.gone(NodeId(2), "killed");
        lab.obey(actions);
        lab.tick();
        assert!(!lab.wave.is_removing() && lab.out.len() == 1 && lab.parent(4) == Some(1));
        // Nor does one that is not there, or the head.
        lab.wave.plan_out(NodeId(2), "slow", None);
        lab.wave.plan_out(HEAD, "slow", None);
        assert!(!lab.wave.is_removing());
    }
}
