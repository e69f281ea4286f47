//! The deployment's decisions, driven without sockets.

use super::*;
use crate::deployment::command::Order;
use ka_chain::feed::Compression;

pub(super) fn settings(nodes: u32) -> Settings {
    Settings {
        nodes: Some(nodes),
        min_nodes: 1,
        wait: None,
        deadline: None,
        order: Order::Ip,
        arity: 1,
        dead_after: Duration::from_secs(8),
        survive: 2,
        stall: Duration::from_secs(60),
        slow: None,
        release_every: None,
        history: 0,
        tries: 2,
        trust_nodes: true,
        compression: Compression::Off,
        window: 2 << 20,
        listen: Vec::new(),
        linger: Duration::ZERO,
        pattern: crate::nodes::Pattern::default(),
    }
}

pub(super) fn registration(port: u16) -> Registration {
    Registration {
        version: "1".to_owned(),
        purpose: Purpose::Install,
        mac: None,
        hostname: None,
        data_port: port,
        addresses: Vec::new(),
        memory: 1 << 30,
        facts: Vec::new(),
    }
}

pub(super) fn record() -> EndRecord {
    EndRecord { parts: 1, chunks: 9, bytes: 900, digest: [4; 32] }
}

pub(super) struct Lab {
    pub d: Deployment,
    pub now: Instant,
    /// Each node's link to its parent, from its first order.
    pub links: BTreeMap<NodeId, ka_chain::link::LinkId>,
}

impl Lab {
    pub fn new(settings: Settings) -> Self {
        let now = Instant::now();
        Self { d: Deployment::new(settings, [1; 16], now), now, links: BTreeMap::new() }
    }

    pub fn register(&mut self, connection: u64, ip: &str) -> Vec<Action> {
        self.comes(connection, &format!("n{connection}"), ip, connection as u8)
    }

    pub fn comes(&mut self, connection: u64, name: &str, ip: &str, session: u8) -> Vec<Action> {
        let newcomer = Newcomer {
            connection,
            name: name.to_owned(),
            address: ip.parse().unwrap(),
            registration: registration(1000),
            order: vec![1],
            session: [session; 16],
        };
        self.d.register(newcomer, self.now)
    }

    pub fn says(&mut self, connection: u64, message: ToServer) -> Vec<Action> {
        self.d.message(connection, message, self.now)
    }

    pub fn started(count: u64) -> Self {
        let mut lab = Self::new(settings(count as u32));
        for n in 1..=count {
            // Arrival and address order differ.
            lab.register(n, &format!("10.0.0.{}", 20 - n));
            lab.says(n, ToServer::Ready);
        }
        for action in lab.d.tick(lab.now) {
            if let Action::Send(_, ToNode::Start(start)) = action {
                lab.links.extend(start.place.parent.map(|(_, link)| (start.me, link.id)));
            }
        }
        assert!(lab.d.started.is_some());
        lab
    }

    /// Time passes in steps of a tick, for nodes that are heard all the while but for `silent` ones.
    pub fn pass(&mut self, time: Duration, silent: &[u64]) -> Vec<Action> {
        let mut actions = Vec::new();
        let end = self.now + time;
        while self.now < end {
            self.now = end.min(self.now + Duration::from_millis(100));
            let connected: Vec<u64> =
                self.d.nodes.values().filter(|n| n.connected).map(|n| n.connection).collect();
            for connection in connected.into_iter().filter(|c| !silent.contains(c)) {
                actions.extend(self.d.message(connection, ToServer::Pong(1), self.now));
            }
            actions.extend(self.d.tick(self.now));
        }
        actions
    }

    pub fn status(&self, name: &str) -> &Status {
        &self.d.nodes[name].status
    }
}

#[test]
fn it_starts_when_all_are_ready_in_order_of_addresses() {
    let mut lab = Lab::new(settings(3));
    for (n, ip) in [(1, "10.0.0.10"), (2, "10.0.0.9"), (3, "10.0.1.1")] {
        assert!(lab.d.tick(lab.now).is_empty());
        let actions = lab.register(n, ip);
        assert!(actions.iter().any(|a| matches!(a, Action::Send(c, ToNode::Order { .. }) if *c == n)));
        lab.says(n, ToServer::Ready);
    }
    let actions = lab.d.tick(lab.now);
    assert!(matches!(&actions[1], Action::Feed(wave, None) if wave.number == 1));
    assert!(matches!(&actions[2], Action::Head(place) if place.children.len() == 1));
    let starts: Vec<(u64, &Start)> = actions
        .iter()
        .filter_map(|a| match a {
            Action::Send(c, ToNode::Start(s)) => Some((*c, &**s)),
            _ => None,
        })
        .collect();
    assert_eq!(starts.iter().map(|(c, _)| *c).collect::<Vec<_>>(), [2, 1, 3]);
    assert!(starts[0].1.addresses.is_empty());
    assert_eq!(starts[1].1.addresses, ["10.0.0.9:1000".parse().unwrap()]);
    assert_eq!(starts[2].1.addresses, ["10.0.0.10:1000".parse().unwrap()]);
    // Each parent knows its child's link.
    let up = |n: usize| starts[n].1.place.parent.clone().unwrap().1;
    assert_eq!(starts[0].1.place.children, [(NodeId(2), up(1))]);
    assert_eq!(starts[1].1.place.children, [(NodeId(3), up(2))]);
    assert!(starts[2].1.place.children.is_empty());
    assert!(lab.d.tick(lab.now).is_empty(), "it starts once");
}

#[test]
fn it_is_released_when_everybody_holds_the_end_and_over_when_everybody_is_done() {
    let mut lab = Lab::started(2);
    lab.d.fed(Ok(record()));
    lab.says(1, ToServer::Ended(record()));
    assert!(lab.d.tick(lab.now).is_empty());
    lab.says(1, ToServer::Done);
    lab.says(2, ToServer::Ended(record()));
    let released = lab.d.tick(lab.now);
    assert_eq!(
        released,
        [Action::Send(1, ToNode::Release), Action::Send(2, ToNode::Release), Action::CloseHead]
    );
    assert!(!lab.d.is_over());
    lab.says(2, ToServer::Done);
    // After the release, closed connections are not deaths.
    lab.d.closed(1, "it rebooted", lab.now);
    lab.d.closed(2, "it rebooted", lab.now);
    assert!(lab.d.is_over());
    assert_eq!(lab.d.counts(), (2, 0));
}

#[test]
fn a_node_with_another_stream_than_was_sent_is_not_done() {
    let mut lab = Lab::started(1);
    lab.d.fed(Ok(record()));
    lab.says(1, ToServer::Ended(EndRecord { digest: [5; 32], ..record() }));
    lab.d.tick(lab.now);
    lab.says(1, ToServer::Done);
    assert!(matches!(lab.status("n1"), Status::Failed { .. }));
    // Nor is one that says so without any stream.
    let mut lab = Lab::started(1);
    lab.says(1, ToServer::Done);
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now);
    assert!(matches!(lab.status("n1"), Status::Failed { .. }));
}

#[test]
fn a_node_may_be_done_before_the_source_has_said_so() {
    let mut lab = Lab::started(1);
    lab.says(1, ToServer::Ended(record()));
    lab.says(1, ToServer::Done);
    assert_eq!(*lab.status("n1"), Status::Running);
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now);
    assert_eq!(*lab.status("n1"), Status::Done);
    assert!(lab.d.is_over());
}

#[test]
fn a_failed_node_does_not_hold_the_others_up() {
    let mut lab = Lab::started(3);
    lab.d.fed(Ok(record()));
    lab.says(1, ToServer::Failed { step: "receive".into(), error: "No space left on device".into() });
    for n in [2, 3] {
        lab.says(n, ToServer::Ended(record()));
    }
    let released = lab.d.tick(lab.now);
    assert_eq!(released.len(), 4, "the failed one is released as well, and the head closed");
    for n in [2, 3] {
        lab.says(n, ToServer::Done);
    }
    assert!(lab.d.is_over());
    assert_eq!(lab.d.counts(), (2, 1));
}

#[test]
fn a_lost_connection_is_a_failure_after_the_start_and_none_before() {
    let mut lab = Lab::new(settings(2));
    lab.register(1, "10.0.0.1");
    lab.d.closed(1, "gone", lab.now);
    assert!(lab.d.nodes.is_empty());
    let mut lab = Lab::started(2);
    lab.d.closed(2, "gone", lab.now);
    assert!(matches!(lab.status("n2"), Status::Failed { error, .. } if error.contains("gone")));
}

#[test]
fn a_silent_node_is_dead_after_the_time_given() {
    let mut lab = Lab::started(2);
    lab.pass(Duration::from_millis(7900), &[1]);
    assert_eq!(*lab.status("n1"), Status::Running);
    lab.says(1, ToServer::Pong(1));
    lab.pass(Duration::from_millis(7900), &[1]);
    assert_eq!(*lab.status("n1"), Status::Running);
    let actions = lab.pass(Duration::from_millis(200), &[1]);
    assert!(matches!(lab.status("n1"), Status::Failed { error, .. } if error.contains("silent for 8 s")));
    assert!(actions.contains(&Action::Cut(1)));
    assert_eq!(*lab.status("n2"), Status::Running);
    // A server that was stopped for a minute finds nobody silent when it wakes up.
    lab.now += Duration::from_secs(60);
    lab.d.tick(lab.now);
    assert_eq!(*lab.status("n2"), Status::Running);
}

#[test]
fn a_death_gives_the_child_another_parent() {
    let mut lab = Lab::started(3);
    // By address: n3, n2, n1.
    let actions = lab.d.closed(2, "reset", lab.now);
    let moved = actions.iter().find_map(|a| match a {
        Action::Send(1, ToNode::Place { place, addresses, .. }) => {
            Some((place.parent.clone(), addresses.clone()))
        }
        _ => None,
    });
    let (parent, addresses) = moved.unwrap();
    assert_eq!(parent.unwrap().0, NodeId(1));
    assert_eq!(addresses, ["10.0.0.17:1000".parse().unwrap()]);
    assert!(matches!(lab.status("n2"), Status::Failed { .. }));
    for n in [1, 3] {
        lab.says(n, ToServer::Ended(record()));
        lab.says(n, ToServer::Done);
    }
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now);
    assert!(!lab.d.is_over(), "the one that was lost may come again");
    lab.pass(RETURN, &[]);
    assert!(lab.d.is_over());
    assert_eq!(lab.d.counts(), (2, 1));
}

#[test]
fn late_and_stuck_nodes_go_into_the_next_wave_and_tries_are_counted() {
    let mut lab = Lab::started(2);
    lab.register(7, "10.0.0.7");
    lab.says(7, ToServer::Ready);
    assert_eq!(*lab.status("n7"), Status::Ready);
    let stuck = |taken| Progress { held: 50, taken, stuck: true, ..Progress::default() };
    lab.says(1, ToServer::Progress(stuck(3)));
    for connection in [1, 2] {
        let link = lab.d.current.as_ref().unwrap();
        let id = link.ids[&format!("n{connection}")];
        let node = lab.d.nodes[&format!("n{connection}")].clone();
        assert_eq!(node.tries, 1);
        // The real links are in the orders; joining is what a whole chain means.
        let joined = lab.links.get(&id).copied().unwrap();
        lab.says(connection, ToServer::Joined(joined));
    }
    // A stuck disk is not waited for longer than for the dead to be covered.
    let actions = lab.pass(Duration::from_secs(69), &[]);
    assert!(actions.iter().any(|a| matches!(a, Action::Send(1, ToNode::Out(_)))), "{actions:?}");
    assert_eq!(*lab.status("n1"), Status::Preparing);
    lab.says(2, ToServer::Ended(record()));
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now);
    assert!(lab.d.waves == 1 && !lab.d.is_over());
    lab.says(2, ToServer::Done);
    lab.says(1, ToServer::Ready);
    let actions = lab.d.tick(lab.now);
    assert!(matches!(&actions[1], Action::Feed(wave, None) if wave.number == 2), "{actions:?}");
    assert_eq!(lab.d.nodes["n1"].tries, 2);
    for n in [1, 7] {
        lab.says(n, ToServer::Ended(record()));
        lab.says(n, ToServer::Done);
    }
    assert!(!lab.d.is_over(), "the second wave's source is not through");
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now);
    assert!(lab.d.is_over());
    assert_eq!(lab.d.counts(), (3, 0));
}

/// Its disk is hung, its machine answers pings.
#[test]
fn a_node_that_never_gets_ready_for_the_next_wave_does_not_hold_the_deployment() {
    let mut lab = Lab::started(1);
    lab.register(2, "10.0.0.2");
    lab.says(1, ToServer::Ended(record()));
    lab.d.fed(Ok(record()));
    lab.says(1, ToServer::Done);
    let quiet = lab.pass(NEXT_READY - Duration::from_secs(1), &[]);
    assert!(!quiet.iter().any(|a| matches!(a, Action::Send(2, ToNode::Abort(_)))) && !lab.d.is_over());
    lab.says(2, ToServer::Step("format".to_owned()));
    lab.pass(NEXT_READY - Duration::from_secs(1), &[]);
    assert!(!lab.d.is_over(), "it said how far it is");
    let actions = lab.pass(Duration::from_secs(2), &[]);
    assert!(actions.iter().any(|a| matches!(a, Action::Send(2, ToNode::Abort(_)))), "{actions:?}");
    assert!(lab.d.is_over());
    assert_eq!(lab.d.counts(), (1, 1));
}

#[test]
fn after_the_release_a_busy_node_is_given_more_time() {
    let mut lab = Lab::started(1);
    lab.says(1, ToServer::Ended(record()));
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now);
    assert!(lab.d.released.is_some());
    lab.pass(Duration::from_secs(59), &[1]);
    lab.says(1, ToServer::Done);
    assert_eq!(*lab.status("n1"), Status::Done);
    let mut lost = Lab::started(1);
    lost.says(1, ToServer::Ended(record()));
    lost.d.fed(Ok(record()));
    lost.d.tick(lost.now);
    lost.pass(Duration::from_secs(61), &[1]);
    assert!(matches!(lost.status("n1"), Status::Failed { error, .. } if error.contains("silent for 60 s")));
    // It holds the stream, but its disk does not yet.
    let mut lost = Lab::started(1);
    lost.says(1, ToServer::Step("receive".into()));
    lost.says(1, ToServer::Ended(record()));
    lost.d.fed(Ok(record()));
    lost.d.tick(lost.now);
    lost.pass(Duration::from_secs(9), &[1]);
    assert!(matches!(lost.status("n1"), Status::Failed { error, .. } if error.contains("silent for 8 s")));
}

#[test]
fn a_node_that_fails_before_the_start_is_not_waited_for() {
    let mut lab = Lab::new(settings(2));
    lab.register(1, "10.0.0.1");
    lab.register(2, "10.0.0.2");
    lab.says(1, ToServer::Failed { step: "disk".into(), error: "no disk matches".into() });
    lab.d.closed(1, "bye", lab.now);
    assert!(lab.d.tick(lab.now).is_empty());
    lab.says(2, ToServer::Ready);
    lab.d.tick(lab.now);
    assert!(lab.d.started.is_some() && lab.d.counts() == (0, 1));
    let mut all = Lab::new(settings(1));
    all.register(1, "10.0.0.1");
    all.says(1, ToServer::Failed { step: "disk".into(), error: "no disk matches".into() });
    assert!(all.d.is_over());
}

fn refused(actions: &[Action], connection: u64) -> bool {
    actions.iter().any(|a| matches!(a, Action::Send(c, ToNode::Refused(_)) if *c == connection))
}

fn says(actions: &[Action], text: &str) -> bool {
    actions.iter().any(|a| matches!(a, Action::Say(said) if said.contains(text)))
}

fn pinged(actions: &[Action], connection: u64) -> u64 {
    let ping = |a: &Action| match a {
        Action::Send(c, ToNode::Ping(number)) if *c == connection => Some(*number),
        _ => None,
    };
    actions.iter().find_map(ping).unwrap()
}

#[test]
fn a_second_claim_is_refused_when_the_holder_answers() {
    for started in [false, true] {
        let mut lab = if started { Lab::started(2) } else { Lab::new(settings(2)) };
        if !started {
            lab.register(1, "10.0.0.1");
        }
        let actions = lab.comes(9, "n1", "10.0.0.66", 99);
        assert!(!refused(&actions, 9) && !says(&actions, "ALARM"), "{actions:?}");
        let number = pinged(&actions, 1);
        assert!(refused(&lab.comes(10, "n1", "10.0.0.67", 98), 10), "one claim at a time");
        assert!(lab.says(1, ToServer::Pong(1)).is_empty(), "that of every second may have been under way");
        let actions = lab.says(1, ToServer::Pong(number));
        assert!(
            refused(&actions, 9) && says(&actions, "ALARM") && says(&actions, "10.0.0.66"),
            "{actions:?}"
        );
        assert_eq!(lab.d.nodes["n1"].connection, 1);
        assert!(lab.says(1, ToServer::Pong(number)).is_empty());
    }
}

#[test]
fn a_second_claim_takes_the_place_of_a_holder_that_stays_silent() {
    for started in [false, true] {
        let mut lab = if started { Lab::started(2) } else { Lab::new(settings(2)) };
        if !started {
            lab.register(1, "10.0.0.1");
        }
        lab.comes(9, "n1", "10.0.0.66", 99);
        let actions = lab.pass(Duration::from_millis(7900), &[1]);
        assert!(!says(&actions, "takes its place"), "{actions:?}");
        let actions = lab.pass(Duration::from_millis(300), &[1]);
        assert!(says(&actions, "n1 said nothing; the one from 10.0.0.66 takes its place"), "{actions:?}");
        assert!(actions.iter().any(|a| matches!(a, Action::Send(9, ToNode::Order { .. }))), "{actions:?}");
        assert_eq!((lab.d.nodes["n1"].connection, lab.status("n1")), (9, &Status::Preparing));
        // A claim whose node has left is forgotten.
        lab.comes(11, "n1", "10.0.0.67", 98);
        lab.d.closed(11, "x", lab.now);
        let actions = lab.pass(Duration::from_secs(9), &[9]);
        assert!(!says(&actions, "takes its place"), "{actions:?}");
    }
}

#[test]
fn a_node_that_comes_again_with_its_session_is_the_same_and_gets_the_next_wave() {
    let mut lab = Lab::started(3);
    // Its old connection looks whole still: the link flapped, or a router forgot it.
    let actions = lab.comes(11, "n1", "10.0.0.19", 1);
    assert!(says(&actions, "n1 is here again") && actions.contains(&Action::Close(1)), "{actions:?}");
    assert!(!says(&actions, "ALARM"));
    assert_eq!((lab.status("n1"), lab.d.nodes["n1"].connection), (&Status::Preparing, 11));
    assert!(lab.d.closed(1, "at last", lab.now).is_empty());
    lab.says(11, ToServer::Ready);
    for n in [2, 3] {
        lab.says(n, ToServer::Ended(record()));
    }
    lab.d.fed(Ok(record()));
    let mut actions = lab.d.tick(lab.now);
    actions.extend(lab.d.tick(lab.now));
    assert!(actions.iter().any(|a| matches!(a, Action::Send(2, ToNode::Release))), "{actions:?}");
    let started = |a: &Action| matches!(a, Action::Send(11, ToNode::Start(s)) if s.wave.number == 2);
    assert!(actions.iter().any(started), "{actions:?}");
}

#[test]
fn a_deployment_waits_a_little_for_a_node_that_lost_its_connection() {
    for all in [false, true] {
        let mut lab = Lab::started(2);
        lab.d.closed(1, "reset", lab.now);
        lab.says(2, ToServer::Ended(record()));
        lab.d.fed(Ok(record()));
        if all {
            lab.d.closed(2, "reset", lab.now);
        } else {
            lab.says(2, ToServer::Done);
        }
        let (short, long) = if all { (59, 61) } else { (4, 6) };
        lab.pass(Duration::from_secs(short), &[]);
        assert!(!lab.d.is_over(), "{all}");
        lab.pass(Duration::from_secs(long - short), &[]);
        assert!(lab.d.is_over(), "{all}");
    }
    // It had its tries.
    let mut s = settings(1);
    s.tries = 1;
    let mut lab = Lab::new(s);
    lab.register(1, "10.0.0.1");
    lab.says(1, ToServer::Ready);
    lab.d.tick(lab.now);
    lab.d.closed(1, "reset", lab.now);
    lab.d.tick(lab.now);
    assert!(lab.d.is_over());
}

#[test]
fn late_nodes_wait_for_the_next_wave() {
    let mut lab = Lab::started(1);
    let late = lab.register(5, "10.0.0.5");
    assert!(matches!(late.last(), Some(Action::Send(5, ToNode::Order { .. }))), "{late:?}");
    assert!(matches!(&late[0], Action::Say(s) if s.ends_with("for the next wave")));
}

#[test]
fn waiting_ends_with_wait_but_never_below_min_nodes() {
    let mut s = settings(5);
    s.wait = Some(Duration::from_secs(30));
    s.min_nodes = 2;
    let mut lab = Lab::new(s);
    lab.register(1, "10.0.0.1");
    lab.says(1, ToServer::Ready);
    lab.pass(Duration::from_secs(40), &[]);
    assert!(lab.d.started.is_none());
    lab.register(2, "10.0.0.2");
    lab.says(2, ToServer::Ready);
    lab.d.tick(lab.now);
    assert!(lab.d.started.is_some());
    let mut early = Lab::new(Settings { min_nodes: 1, ..lab.d.settings.clone() });
    early.register(1, "10.0.0.1");
    early.says(1, ToServer::Ready);
    early.pass(Duration::from_secs(29), &[]);
    assert!(early.d.started.is_none());
    early.pass(Duration::from_secs(2), &[]);
    assert!(early.d.started.is_some());
}

#[test]
fn text_from_nodes_is_shown_without_control_characters() {
    assert_eq!(clean("a\x1b[31mb\tc\nd", 100), "a [31mb c\nd");
    assert_eq!(clean(&"x".repeat(50), 10).len(), 10);
}
