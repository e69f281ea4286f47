//! Damaged and forged chunks. A node that is given a copy which does not open, or is not what the server signed, asks the
//! same parent once more; when that parent's copy is bad again, the node is attached one node up. If the copy from there
//! is good, the node in between is taken out. Nobody else is blamed: neither those below, nor one whose copy was bad
//! once, as a bit may fall over anywhere.

use super::super::mutation::{Mutation, is_planted};
use super::{Action, HEAD, LinkId, NodeId, Standing, Time, Wave};
use std::collections::BTreeSet;
use std::time::Duration;

/// So often a node's word takes others out; the next time it is the one that goes.
const BELIEVED: u8 = 2;

/// What a node has said of the copies that it was given.
#[derive(Debug, Default)]
pub(super) struct Damage {
    /// Those that have given it a bad copy once.
    asked: BTreeSet<NodeId>,
    /// Those that have given it two, and have not been judged; and which chunk it was.
    accused: Vec<NodeId>,
    chunk: u64,
    believed: u8,
}

impl Wave {
    /// The copy of a chunk that came to a node over this link is not what the server sent.
    pub fn damaged(&mut self, node: NodeId, link: &LinkId, chunk: u64, now: Time) -> Vec<Action> {
        if self.released {
            return Vec::new();
        }
        let fresh = self.links.make();
        let Some(member) = self.living(node).filter(|m| m.link.id == *link) else { return Vec::new() };
        member.heard = now;
        member.joined = false;
        let parent = member.parent;
        if member.damage.asked.insert(parent) {
            member.link = fresh;
            return self.sync();
        }
        let mut actions = Vec::new();
        if parent == HEAD {
            // What the server sends is good: it is the node, or its way to the server.
            let why = format!("chunk {chunk} came to it damaged twice, from the server itself");
            actions.extend(self.take(node, Standing::Out, &why));
        } else {
            member.damage.accused.push(parent);
            member.damage.chunk = chunk;
            let above = self.members.get(&parent).map_or(HEAD, |m| m.parent);
            actions.push(Action::Say(format!(
                "{parent} gave {node} chunk {chunk} damaged twice; the node above is asked for it"
            )));
            if is_planted(Mutation::BlameAtOnce) {
                self.plan_out(parent, &passed_on(chunk), Some(Duration::ZERO));
            }
            self.attach(node, self.nearest_in(above));
        }
        actions.extend(self.sync());
        actions
    }

    /// A node holds every chunk before this one: perhaps the copy that shows who was to blame.
    pub(super) fn verified(&mut self, node: NodeId, held: u64) {
        let Some(member) = self.living(node) else { return };
        if member.damage.accused.is_empty() || held <= member.damage.chunk {
            return;
        }
        let accused = std::mem::take(&mut member.damage.accused);
        let chunk = member.damage.chunk;
        member.damage.believed += 1;
        if member.damage.believed > BELIEVED {
            self.plan_out(
                node,
                "it says of one node after the other that it damages chunks",
                Some(Duration::ZERO),
            );
        } else if is_planted(Mutation::BlameTheWitness) {
            self.plan_out(node, &passed_on(chunk), Some(Duration::ZERO));
        } else {
            for node in accused {
                self.plan_out(node, &passed_on(chunk), Some(Duration::ZERO));
            }
        }
    }
}

fn passed_on(chunk: u64) -> String {
    format!("it passed chunk {chunk} on damaged, which it had been given whole")
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::{obey, parent_of, wave};
    use super::*;
    use crate::core::Place;
    use std::collections::BTreeMap;

    type Places = BTreeMap<NodeId, Place>;

    fn refuses(wave: &mut Wave, places: &mut Places, node: u32, chunk: u64) -> Vec<Action> {
        let link = places[&NodeId(node)].parent.clone().unwrap().1.id;
        let actions = wave.damaged(NodeId(node), &link, chunk, Time::ZERO);
        obey(wave, places, actions.clone());
        assert!(wave.damaged(NodeId(node), &link, chunk, Time::ZERO).is_empty(), "an old link is no news");
        actions
    }

    fn holds(wave: &mut Wave, places: &mut Places, node: u32, held: u64) -> Vec<u32> {
        let mut actions = wave.status(NodeId(node), Status { held, ..Status::default() }, Time::ZERO);
        obey(wave, places, actions.clone());
        // One goes in each tick.
        for _ in 0..4 {
            let more = wave.tick(Time::ZERO);
            obey(wave, places, more.clone());
            actions.extend(more);
        }
        let out = |a: &Action| if let Action::Out(node, _) = a { Some(node.0) } else { None };
        actions.iter().filter_map(out).collect()
    }

    #[test]
    fn a_bit_that_falls_over_once_costs_nobody_anything() {
        let (mut wave, mut places) = wave(4);
        refuses(&mut wave, &mut places, 3, 7);
        assert_eq!(parent_of(&places, 3), 2);
        assert!(holds(&mut wave, &mut places, 3, 8).is_empty());
        assert_eq!(wave.standing(NodeId(2)), Some(Standing::In));
    }

    #[test]
    fn the_node_in_between_is_out_when_the_copy_from_above_is_good_and_not_before() {
        let (mut wave, mut places) = wave(4);
        refuses(&mut wave, &mut places, 3, 7);
        refuses(&mut wave, &mut places, 3, 7);
        assert_eq!([3, 4, 2].map(|n| parent_of(&places, n)), [1, 3, 1]);
        assert!(holds(&mut wave, &mut places, 3, 7).is_empty(), "chunk 7 has not come");
        assert_eq!(holds(&mut wave, &mut places, 3, 8), [2]);
        assert_eq!(places[&NodeId(1)].children.len(), 1);
    }

    #[test]
    fn two_liars_in_a_row_go_together_and_the_witness_stays() {
        let (mut wave, mut places) = wave(4);
        for _ in 0..4 {
            refuses(&mut wave, &mut places, 4, 7);
        }
        assert_eq!(parent_of(&places, 4), 1);
        assert_eq!(holds(&mut wave, &mut places, 4, 9), [3, 2]);
        assert_eq!([1, 4].map(|n| wave.standing(NodeId(n))), [Some(Standing::In); 2]);
    }

    #[test]
    fn one_to_whom_the_server_itself_gives_only_bad_copies_goes_alone() {
        let (mut wave, mut places) = wave(3);
        refuses(&mut wave, &mut places, 1, 7);
        let actions = refuses(&mut wave, &mut places, 1, 7);
        assert!(matches!(&actions[0], Action::Out(NodeId(1), why) if why.contains("the server itself")));
        assert_eq!(parent_of(&places, 2), 0);
    }

    #[test]
    fn one_that_accuses_everybody_goes_itself() {
        let (mut wave, mut places) = wave(5);
        let mut out = Vec::new();
        for chunk in [10, 20, 30] {
            for _ in 0..2 {
                refuses(&mut wave, &mut places, 5, chunk);
            }
            out.extend(holds(&mut wave, &mut places, 5, chunk + 5));
        }
        assert_eq!(out, [4, 3, 5]);
    }
}
