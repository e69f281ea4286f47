//! The deployment's decisions, driven without sockets.

use super::*;
use ka_chain::feed::Compression;

fn settings(nodes: u32) -> Settings {
    Settings {
        nodes: Some(nodes),
        min_nodes: 1,
        wait: None,
        deadline: None,
        order: Order::Ip,
        arity: 1,
        dead_after: Duration::from_secs(8),
        compression: Compression::Off,
        window: 2 << 20,
        listen: Vec::new(),
        linger: Duration::ZERO,
        pattern: crate::nodes::Pattern::default(),
    }
}

fn registration(port: u16) -> Registration {
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

fn record() -> EndRecord {
    EndRecord { parts: 1, chunks: 9, bytes: 900, digest: [4; 32] }
}

struct Lab {
    d: Deployment,
    now: Instant,
}

impl Lab {
    fn new(settings: Settings) -> Self {
        Self { d: Deployment::new(settings, [1; 16]), now: Instant::now() }
    }

    fn register(&mut self, connection: u64, ip: &str) -> Vec<Action> {
        let name = format!("n{connection}");
        self.d.register(connection, name, ip.parse().unwrap(), registration(1000), vec![1], self.now)
    }

    fn says(&mut self, connection: u64, message: ToServer) -> Vec<Action> {
        self.d.message(connection, message, self.now)
    }

    fn started(count: u64) -> Self {
        let mut lab = Self::new(settings(count as u32));
        for n in 1..=count {
            // Arrival and address order differ.
            lab.register(n, &format!("10.0.0.{}", 20 - n));
            lab.says(n, ToServer::Ready);
        }
        lab.d.tick(lab.now);
        assert!(lab.d.started.is_some());
        lab
    }

    fn status(&self, name: &str) -> &Status {
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
    assert!(matches!(&actions[0], Action::Feed(_, links) if links.len() == 1));
    let starts: Vec<(u64, &Start)> = actions
        .iter()
        .filter_map(|a| match a {
            Action::Send(c, ToNode::Start(s)) => Some((*c, &**s)),
            _ => None,
        })
        .collect();
    assert_eq!(starts.iter().map(|(c, _)| *c).collect::<Vec<_>>(), [2, 1, 3]);
    assert!(starts[0].1.parent.is_empty());
    assert_eq!(starts[1].1.parent, ["10.0.0.9:1000".parse().unwrap()]);
    assert_eq!(starts[2].1.parent, ["10.0.0.10:1000".parse().unwrap()]);
    // Each parent knows its child's link.
    assert_eq!(starts[0].1.children, [starts[1].1.link]);
    assert_eq!(starts[1].1.children, [starts[2].1.link]);
    assert!(starts[2].1.children.is_empty());
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
    assert_eq!(released, [Action::Send(1, ToNode::Release), Action::Send(2, ToNode::Release)]);
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
    assert_eq!(released.len(), 3, "the failed one is released as well");
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
    let mut lab = Lab::started(1);
    lab.now += Duration::from_secs(7);
    lab.d.tick(lab.now);
    assert_eq!(*lab.status("n1"), Status::Running);
    lab.says(1, ToServer::Pong(1));
    lab.now += Duration::from_millis(7900);
    lab.d.tick(lab.now);
    assert_eq!(*lab.status("n1"), Status::Running);
    lab.now += Duration::from_millis(200);
    lab.d.tick(lab.now);
    assert!(matches!(lab.status("n1"), Status::Failed { error, .. } if error.contains("silent for 8 s")));
}

#[test]
fn after_the_release_a_busy_node_is_given_more_time() {
    let mut lab = Lab::started(1);
    lab.says(1, ToServer::Ended(record()));
    lab.d.fed(Ok(record()));
    lab.d.tick(lab.now);
    assert!(lab.d.released.is_some());
    lab.now += Duration::from_secs(59);
    lab.d.tick(lab.now);
    lab.says(1, ToServer::Done);
    assert_eq!(*lab.status("n1"), Status::Done);
    let mut lost = Lab::started(1);
    lost.says(1, ToServer::Ended(record()));
    lost.d.fed(Ok(record()));
    lost.d.tick(lost.now);
    lost.now += Duration::from_secs(60);
    lost.d.tick(lost.now);
    assert!(matches!(lost.status("n1"), Status::Failed { error, .. } if error.contains("silent for 60 s")));
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

#[test]
fn second_claims_and_late_nodes_are_refused() {
    let mut lab = Lab::new(settings(2));
    lab.register(1, "10.0.0.1");
    let twice =
        lab.d.register(9, "n1".into(), "10.0.0.66".parse().unwrap(), registration(1), vec![], lab.now);
    assert!(matches!(&twice[0], Action::Send(9, ToNode::Refused(_))));
    assert!(twice.iter().any(|a| matches!(a, Action::Say(s) if s.starts_with("ALARM"))));
    let mut lab = Lab::started(1);
    let late = lab.register(5, "10.0.0.5");
    assert!(matches!(&late[0], Action::Send(5, ToNode::Refused(_))));
}

#[test]
fn waiting_ends_with_wait_but_never_below_min_nodes() {
    let mut s = settings(5);
    s.wait = Some(Duration::from_secs(30));
    s.min_nodes = 2;
    let mut lab = Lab::new(s);
    lab.register(1, "10.0.0.1");
    lab.says(1, ToServer::Ready);
    lab.now += Duration::from_secs(7);
    lab.says(1, ToServer::Pong(1));
    lab.now += Duration::from_secs(7);
    lab.says(1, ToServer::Pong(1));
    lab.register(2, "10.0.0.2");
    lab.says(2, ToServer::Ready);
    lab.d.tick(lab.now);
    assert!(lab.d.started.is_none());
    for _ in 0..4 {
        lab.now += Duration::from_secs(5);
        lab.says(1, ToServer::Pong(1));
        lab.says(2, ToServer::Pong(1));
    }
    lab.d.tick(lab.now);
    assert!(lab.d.started.is_some());
}

#[test]
fn text_from_nodes_is_shown_without_control_characters() {
    assert_eq!(clean("a\x1b[31mb\tc\nd", 100), "a [31mb c\nd");
    assert_eq!(clean(&"x".repeat(50), 10).len(), 10);
}
