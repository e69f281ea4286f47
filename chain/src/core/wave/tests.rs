//! The server's part in a wave, event by event.

use super::*;
use crate::core::Clock;

fn settings() -> Settings {
    Settings { arity: 1, survive: 2, dead_after: Duration::from_secs(8), stall: Duration::from_secs(60) }
}

pub(super) fn wave(count: u32) -> (Wave, BTreeMap<NodeId, Place>) {
    let mut wave = Wave::new(settings(), count, [7; 32], Time::ZERO);
    let mut places = BTreeMap::new();
    let actions = wave.begin();
    obey(&mut wave, &mut places, actions);
    (wave, places)
}

/// Keeps the orders; everybody joins at once.
pub(super) fn obey(wave: &mut Wave, places: &mut BTreeMap<NodeId, Place>, actions: Vec<Action>) {
    for action in actions {
        if let Action::Order(node, place) = action {
            if let Some((_, link)) = &place.parent {
                wave.joined(node, &link.id, Time::ZERO);
            }
            let old = places.insert(node, place.clone());
            assert!(old.is_none_or(|old| old.epoch < place.epoch));
        }
    }
}

pub(super) fn parent_of(places: &BTreeMap<NodeId, Place>, node: u32) -> u32 {
    places[&NodeId(node)].parent.as_ref().unwrap().0.0
}

fn all_heard(wave: &mut Wave, except: &[u32], now: Time) {
    for node in wave.members.keys().copied().collect::<Vec<_>>() {
        if !except.contains(&node.0) {
            wave.heard(node, now);
        }
    }
}

#[test]
fn orphans_of_two_deaths_in_a_row_go_to_the_nearest_living_ancestor() {
    let (mut wave, mut places) = wave(5);
    assert_eq!(places[&NodeId(1)].family, [(NodeId(2), 1), (NodeId(3), 2), (NodeId(4), 3)]);
    let actions = wave.gone(NodeId(3), "x");
    assert_eq!(actions[0], Action::Dead(NodeId(3), "x".into()));
    obey(&mut wave, &mut places, actions);
    assert_eq!((parent_of(&places, 4), parent_of(&places, 5)), (2, 4));
    assert_eq!(places[&HEAD].family, [(NodeId(1), 1), (NodeId(2), 2), (NodeId(4), 3)]);
    let actions = wave.gone(NodeId(2), "y");
    obey(&mut wave, &mut places, actions);
    assert_eq!(parent_of(&places, 4), 1);
    let actions = wave.gone(NodeId(1), "z");
    obey(&mut wave, &mut places, actions);
    assert_eq!(parent_of(&places, 4), 0);
    assert_eq!(places[&HEAD].children.len(), 1);
    wave.ended(NodeId(4));
    assert!(!wave.may_release());
    wave.ended(NodeId(5));
    assert!(wave.may_release());
}

#[test]
fn silence_kills_and_five_seconds_do_not() {
    let (mut wave, _) = wave(3);
    let at = Duration::from_millis;
    all_heard(&mut wave, &[2], at(7900));
    assert!(wave.tick(at(7900)).is_empty());
    let actions = wave.tick(at(8000));
    assert_eq!(actions[0], Action::Dead(NodeId(2), "it was silent for 8 s".into()));
    let mut clock = Clock::default();
    clock.advance(at(100));
    assert_eq!(clock.advance(at(60_000)), at(600), "a pause is half a second");
}

#[test]
fn a_link_that_dies_twice_moves_the_child_up_and_the_parent_to_the_end() {
    let (mut wave, mut places) = wave(4);
    let link = |places: &BTreeMap<NodeId, Place>, n| places[&NodeId(n)].parent.clone().unwrap().1.id;
    let first = link(&places, 3);
    let actions = wave.lost(NodeId(3), &first, Duration::from_secs(1));
    obey(&mut wave, &mut places, actions);
    assert!(parent_of(&places, 3) == 2 && link(&places, 3) != first);
    let (now, later) = (Duration::from_secs(2), Duration::from_millis(3100));
    assert!(wave.lost(NodeId(3), &first, now).is_empty(), "an old link");
    let second = link(&places, 3);
    assert!(wave.lost(NodeId(3), &second, now).is_empty());
    assert!(wave.tick(now).is_empty(), "the parent may be dead");
    all_heard(&mut wave, &[], now + Duration::from_millis(400));
    assert!(wave.tick(now).is_empty(), "its last words may have been under way when it died");
    all_heard(&mut wave, &[], later);
    let actions = wave.tick(later);
    obey(&mut wave, &mut places, actions);
    assert_eq!([1, 3, 4, 2].map(|n| parent_of(&places, n)), [0, 1, 3, 4]);
}

/// The link above a node is lost twice, and both ends live.
fn kill_link(wave: &mut Wave, places: &mut BTreeMap<NodeId, Place>, node: u32) {
    let now = Duration::from_secs(1);
    for _ in 0..2 {
        let link = places[&NodeId(node)].parent.clone().unwrap().1.id;
        let actions = wave.lost(NodeId(node), &link, now);
        obey(wave, places, actions);
    }
    all_heard(wave, &[], now * 3);
    let actions = wave.tick(now * 3);
    obey(wave, places, actions);
}

#[test]
fn the_two_last_ones_with_a_dead_link_between_them_are_not_put_together_again() {
    let (mut wave, mut places) = wave(5);
    kill_link(&mut wave, &mut places, 5);
    assert_eq!([1, 2, 5, 3, 4].map(|n| parent_of(&places, n)), [0, 1, 2, 5, 3]);
    // Of three the first goes between; of two there is only the server above, and it feeds both.
    for count in [2, 3] {
        let (mut wave, mut places) = self::wave(count);
        kill_link(&mut wave, &mut places, count);
        let parents: Vec<u32> = (1..=count).map(|n| parent_of(&places, n)).collect();
        assert_eq!(parents, if count == 2 { vec![0, 0] } else { vec![3, 1, 0] });
        assert!((1..=count).all(|n| wave.is_in(NodeId(n))), "nobody is lost");
    }
}

#[test]
fn the_last_words_of_a_dead_parent_are_no_sign_of_life() {
    use crate::core::mutation::plant;
    for mutation in [None, Some(Mutation::JudgeAtOnce)] {
        let (mut wave, mut places) = wave(4);
        for _ in 0..2 {
            let link = places[&NodeId(3)].parent.clone().unwrap().1.id;
            let actions = wave.lost(NodeId(3), &link, Duration::from_secs(1));
            obey(&mut wave, &mut places, actions);
        }
        all_heard(&mut wave, &[], Duration::from_millis(1030));
        plant(mutation);
        let judged = !wave.tick(Duration::from_millis(1040)).is_empty();
        plant(None);
        assert_eq!(judged, mutation.is_some(), "the planted bug is found");
    }
}

#[test]
fn what_the_ancestor_lacks_comes_from_the_server_and_what_that_lacks_is_out() {
    let (mut wave, mut places) = wave(4);
    let actions = wave.gone(NodeId(2), "x");
    obey(&mut wave, &mut places, actions);
    let link = places[&NodeId(3)].parent.clone().unwrap().1.id;
    let actions = wave.lacking(NodeId(3), &link, 40, Time::ZERO);
    obey(&mut wave, &mut places, actions);
    assert_eq!(parent_of(&places, 3), 0);
    assert!(places[&NodeId(1)].family.contains(&(NodeId(3), 1)), "node 1 keeps its oldest chunk for it");
    assert!(wave.status(NodeId(3), Status { held: 39, ..Status::default() }, Time::ZERO).is_empty());
    let actions = wave.status(NodeId(3), Status { held: 40, ..Status::default() }, Time::ZERO);
    obey(&mut wave, &mut places, actions);
    assert_eq!(parent_of(&places, 3), 1);
    let link = places[&NodeId(3)].parent.clone().unwrap().1.id;
    let actions = wave.lacking(NodeId(3), &link, 40, Time::ZERO);
    obey(&mut wave, &mut places, actions);
    let link = places[&NodeId(3)].parent.clone().unwrap().1.id;
    let actions = wave.lacking(NodeId(3), &link, 50, Time::ZERO);
    let out = |n| actions.iter().any(|a| matches!(a, Action::Out(NodeId(m), _) if *m == n));
    assert!(out(3) && out(4) && !out(1));
}

#[test]
fn what_the_history_lacks_is_asked_for_of_those_above_the_ancestor() {
    let (mut wave, mut places) = wave(5);
    let lacks = |wave: &mut Wave, places: &mut BTreeMap<NodeId, Place>, oldest| {
        let link = places[&NodeId(4)].parent.clone().unwrap().1.id;
        let actions = wave.lacking(NodeId(4), &link, oldest, Time::ZERO);
        obey(wave, places, actions.clone());
        actions
    };
    let actions = wave.gone(NodeId(3), "x");
    obey(&mut wave, &mut places, actions);
    lacks(&mut wave, &mut places, 40);
    assert_eq!(parent_of(&places, 4), 0);
    lacks(&mut wave, &mut places, 45);
    assert_eq!((parent_of(&places, 4), wave.fetching(NodeId(4))), (1, Some(NodeId(2))));
    let actions = wave.status(NodeId(4), Status { held: 40, ..Status::default() }, Time::ZERO);
    obey(&mut wave, &mut places, actions);
    assert_eq!((parent_of(&places, 4), wave.fetching(NodeId(4))), (2, None));
    // Nobody has it.
    for _ in 0..2 {
        lacks(&mut wave, &mut places, 60);
    }
    let actions = lacks(&mut wave, &mut places, 60);
    let out = |n| actions.iter().any(|a| matches!(a, Action::Out(NodeId(m), _) if *m == n));
    assert!(out(4) && out(5) && !out(2));
}

#[test]
fn a_silence_on_a_link_that_was_replaced_is_no_news() {
    let (mut wave, mut places) = wave(3);
    let old = places[&NodeId(2)].parent.clone().unwrap().1.id;
    let actions = wave.lost(NodeId(2), &old, Time::ZERO);
    obey(&mut wave, &mut places, actions);
    assert!(wave.silent_link(NodeId(2), &old, Time::ZERO).is_empty());
    assert_eq!(wave.members[&NodeId(2)].suspected, None);
}

#[test]
fn a_stuck_node_is_taken_out_after_the_stall_and_one_that_moves_is_not() {
    let (mut wave, _) = wave(3);
    let stuck = |consumed| Status { held: 99, consumed, stuck: true, ..Status::default() };
    // Nobody says that it is covered: that is not waited for longer than for the dead.
    for s in 0..=68 {
        let now = Duration::from_secs(s);
        all_heard(&mut wave, &[], now);
        wave.status(NodeId(1), stuck(s), now);
        wave.status(NodeId(2), stuck(5), now);
        let out = wave.tick(now).iter().any(|a| matches!(a, Action::Out(..)));
        assert_eq!(out, s == 68, "{s}");
    }
    assert_eq!(wave.standing(NodeId(1)), Some(Standing::In));
    assert_eq!(wave.standing(NodeId(2)), Some(Standing::Out));
}

#[test]
fn secrets_differ_and_stay_out_of_debug_texts() {
    let mut links = Links { key: [1; 32], next: 0 };
    let (a, b) = (links.make(), links.make());
    assert!(a.id != b.id && a.secret != b.secret);
    assert!(!format!("{a:?}").contains(&format!("{:?}", a.secret[0])) || format!("{a:?}").len() == 14);
}
