//! When waves begin and end, driven without sockets.

use super::super::tests::{Lab, record, settings};
use super::*;
use crate::deployment::command::Settings;
use crate::deployment::order::Topology;
use ka_chain::control::ToServer;

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn ready(lab: &mut Lab, nodes: std::ops::RangeInclusive<u64>) {
    for n in nodes {
        lab.register(n, &format!("10.0.0.{n}"));
        lab.says(n, ToServer::Ready);
    }
}

/// These nodes hold the end and say that they are done; the source is through.
fn finish(lab: &mut Lab, nodes: &[u64]) -> Vec<Action> {
    for n in nodes {
        lab.says(*n, ToServer::Ended(record()));
        lab.says(*n, ToServer::Done);
    }
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now)
}

fn released(actions: &[Action]) -> Vec<u64> {
    let of = |a: &Action| match a {
        Action::Send(connection, ToNode::Release) => Some(*connection),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

#[test]
fn go_starts_what_is_ready_and_never_below_min_nodes() {
    let mut lab = Lab::new(Settings { min_nodes: 2, ..settings(9) });
    assert_eq!(lab.d.go(lab.now).unwrap_err(), "no node is ready");
    ready(&mut lab, 1..=1);
    assert_eq!(lab.d.go(lab.now).unwrap_err(), "1 nodes are ready, and --min-nodes is 2");
    ready(&mut lab, 2..=2);
    lab.pass(seconds(100), &[]);
    assert_eq!(lab.d.waves, 0, "nobody said go");
    let (text, actions) = lab.d.go(lab.now).unwrap();
    assert_eq!((text.as_str(), lab.d.waves), ("wave 1 begins with 2 nodes", 1));
    assert!(actions.iter().any(|a| matches!(a, Action::Send(2, ToNode::Start(_)))), "{actions:?}");
    // A late node waits until the wave is over; then one that still prepares is not waited for.
    ready(&mut lab, 3..=3);
    assert_eq!(lab.d.go(lab.now).unwrap_err(), "wave 1 is running; 1 nodes are ready for the next");
    lab.register(4, "10.0.0.4");
    finish(&mut lab, &[1, 2]);
    assert_eq!(lab.d.waves, 1);
    assert_eq!(lab.d.go(lab.now).unwrap().0, "wave 2 begins with 1 nodes");
    lab.says(4, ToServer::Failed { step: "disk".to_owned(), error: "no disk".to_owned() });
    finish(&mut lab, &[3]);
    assert_eq!(lab.d.go(lab.now).unwrap_err(), "the deployment is over");
}

#[test]
fn a_later_wave_waits_from_the_end_of_the_one_before_and_as_long_as_wait_says() {
    for (wait, expected) in [(None, 60), (Some(seconds(20)), 20)] {
        let mut lab = Lab::new(Settings { wait, min_nodes: 2, ..settings(2) });
        ready(&mut lab, 1..=2);
        lab.d.tick(lab.now);
        assert_eq!(lab.d.waves, 1);
        // One is ready for the next wave long before the first is over, another only prepares.
        ready(&mut lab, 3..=3);
        lab.register(4, "10.0.0.4");
        lab.pass(seconds(100), &[]);
        finish(&mut lab, &[1, 2]);
        lab.pass(seconds(expected) - Duration::from_millis(200), &[]);
        assert_eq!(lab.d.waves, 1, "{wait:?}");
        lab.pass(Duration::from_millis(400), &[]);
        assert_eq!(lab.d.waves, 2, "--min-nodes is for the first wave");
    }
}

#[test]
fn staged_releases_come_one_at_a_time_from_the_end_of_the_chain_and_nobody_dies_of_waiting() {
    let every = seconds(90);
    let mut lab = Lab::new(Settings { release_every: Some(every), ..settings(4) });
    ready(&mut lab, 1..=4);
    lab.d.tick(lab.now);
    let mut actions = finish(&mut lab, &[1, 2, 3, 4]);
    assert!(actions.contains(&Action::CloseHead));
    assert_eq!((released(&actions), lab.d.counts(), lab.d.is_over()), (vec![4], (4, 0), false));
    lab.d.closed(4, "it reboots", lab.now);
    // One that hiccups for longer than --dead-after while it waits keeps its turn.
    actions = lab.pass(seconds(30), &[2]);
    actions.extend(lab.pass(every - seconds(30), &[]));
    assert_eq!(released(&actions), [3]);
    // One that goes by itself is not waited for.
    lab.d.closed(2, "switched off", lab.now);
    assert!(released(&lab.pass(every - seconds(1), &[])).is_empty());
    assert!(!lab.d.is_over());
    assert_eq!(released(&lab.pass(seconds(2), &[])), [1]);
    assert!(lab.d.is_over());
    assert_eq!(lab.d.counts(), (4, 0));
    let mut at_once = Lab::new(settings(3));
    ready(&mut at_once, 1..=3);
    at_once.d.tick(at_once.now);
    assert_eq!(released(&finish(&mut at_once, &[1, 2, 3])), [3, 2, 1]);
}

#[test]
fn the_chain_follows_the_topology_file() {
    let file = Topology::parse("here: n3 n1\nthere: 10.0.0.2 n9\n").unwrap();
    let mut lab = Lab::new(Settings { order: Order::File(file), ..settings(4) });
    ready(&mut lab, 1..=4);
    let actions = lab.d.tick(lab.now);
    let said = "starting with 4 nodes: n3 n1 n2 n4";
    assert!(actions.contains(&Action::Say(said.to_owned())), "{actions:?}");
}
