//! Deployments with the real programs, each node in a network namespace of its own, in which nodes die, freeze, or lose
//! their cable in the middle of the stream. The survivors must end with every byte, in time. Needs root and iproute2.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use ka_sys::process::run;
use lab::{Fault, Lab, STREAM, possible, sh};
use std::io::Write;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// When a fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// A quarter of the stream is still to come, so that what a repair costs cannot hide in the rest of it.
    MidStream,
    /// The last chunk is out, the nodes' consumers still work.
    FinalFlush,
}

/// Nodes in the chain that is struck.
const NODES: usize = 4;

/// A deployment that has begun. In the final flush each consumer stops for 3 s before it takes the last quarter.
fn begin(when: When) -> (Lab, Instant) {
    let mut lab = Lab::network(NODES);
    let source = lab.source();
    lab.start_server(&source, &["--nodes", &NODES.to_string()]);
    for n in 1..=NODES {
        let slow = format!("(head -c 30M; sleep 3; cat) | sha256sum > {}", lab.sum_of(n).display());
        lab.start_node(n, (when == When::FinalFlush).then_some(&slow));
    }
    lab.server.as_ref().unwrap().wait_for("starting with");
    (lab, Instant::now())
}

/// How long the same run takes when nothing happens, here and now: measured once in this process.
fn undisturbed(when: When) -> Duration {
    static MEASURED: [OnceLock<Duration>; 2] = [OnceLock::new(), OnceLock::new()];
    *MEASURED[when as usize].get_or_init(|| {
        let (mut lab, start) = begin(when);
        let (server, nodes) = lab.ends(&[]);
        let took = start.elapsed();
        assert_eq!((server, &nodes[..]), (0, &[0; NODES][..]), "{}", lab.everything());
        println!("undisturbed, {when:?}: {took:?}");
        took
    })
}

/// Strikes these nodes, and sees to the others: they end well, and at most `more` later than when nothing happens.
fn strike(nodes: &[usize], fault: Fault, when: When, more: Duration) {
    if !possible() {
        return;
    }
    let undisturbed = undisturbed(when);
    let (mut lab, start) = begin(when);
    match when {
        When::MidStream => std::thread::sleep(Duration::from_millis(STREAM * 750)),
        When::FinalFlush => lab.server.as_ref().unwrap().wait_for("everything was sent"),
    }
    for n in nodes {
        lab.strike(*n, fault);
    }
    let struck = if fault == Fault::FrozenAndBack { &[][..] } else { nodes };
    let others = lab.nodes_end(struck);
    let took = start.elapsed();
    let server = lab.server_ends();
    let all = start.elapsed();
    let expected = if struck.is_empty() { 0 } else { 3 };
    assert_eq!(server, expected, "{}", lab.everything());
    assert!(others.iter().all(|code| *code == 0), "{others:?}\n{}", lab.everything());
    lab.check_sums(NODES, struck);
    println!("{fault:?} {nodes:?} {when:?}: {took:?}, server {all:?}, undisturbed {undisturbed:?}");
    assert!(took < undisturbed + more, "{took:?}, undisturbed {undisturbed:?}\n{}", lab.everything());
    // Nor does the server wait for the dead, but for a moment in which one whose connection broke may come again.
    assert!(all < undisturbed + more + RETURN, "{all:?}, undisturbed {undisturbed:?}\n{}", lab.everything());
}

/// How long the server waits at its end for nodes that may come again.
const RETURN: Duration = Duration::from_secs(5);
/// What survivors may lose when a connection closes.
const AT_ONCE: Duration = Duration::from_secs(1);
/// What they may lose when a node or a link falls silent: `--dead-after`, and a second.
const DEAD_AFTER: Duration = Duration::from_secs(9);

#[test]
fn killed_nodes_are_bridged_at_once() {
    for nodes in [&[1][..], &[2], &[4], &[2, 3]] {
        strike(nodes, Fault::Killed, When::MidStream, AT_ONCE);
    }
}

#[test]
fn nodes_killed_in_the_final_flush_hold_nobody_up() {
    for nodes in [&[1][..], &[2], &[4], &[2, 3]] {
        strike(nodes, Fault::Killed, When::FinalFlush, AT_ONCE);
    }
}

#[test]
fn frozen_nodes_are_bridged_when_they_are_declared_dead() {
    for nodes in [&[1][..], &[3], &[4]] {
        strike(nodes, Fault::Frozen, When::MidStream, DEAD_AFTER);
    }
}

#[test]
fn nodes_frozen_in_the_final_flush_end_the_wave_when_they_are_declared_dead() {
    for nodes in [&[1][..], &[3], &[4]] {
        strike(nodes, Fault::Frozen, When::FinalFlush, DEAD_AFTER);
    }
}

#[test]
fn a_node_that_was_frozen_for_5_seconds_is_not_thrown_out() {
    for nodes in [&[1][..], &[2], &[4]] {
        strike(nodes, Fault::FrozenAndBack, When::MidStream, Duration::from_secs(6));
    }
}

#[test]
fn a_cut_cable_costs_one_node() {
    for nodes in [&[1][..], &[3], &[4]] {
        strike(nodes, Fault::CableCut, When::MidStream, DEAD_AFTER);
    }
}

#[test]
fn a_cable_cut_in_the_final_flush_costs_one_node() {
    for nodes in [&[1][..], &[3], &[4]] {
        strike(nodes, Fault::CableCut, When::FinalFlush, DEAD_AFTER);
    }
}

#[test]
fn a_node_that_is_heard_no_more_costs_one_node() {
    for nodes in [&[1][..], &[2], &[4]] {
        strike(nodes, Fault::CutOneWay, When::MidStream, DEAD_AFTER);
    }
}

#[test]
fn a_node_that_is_heard_no_more_in_the_final_flush_costs_one_node() {
    for nodes in [&[1][..], &[2], &[4]] {
        strike(nodes, Fault::CutOneWay, When::FinalFlush, DEAD_AFTER);
    }
}

#[test]
fn a_machine_that_is_switched_off_costs_one_node() {
    for nodes in [&[1][..], &[2, 3], &[4]] {
        strike(nodes, Fault::MachineOff, When::MidStream, DEAD_AFTER);
    }
}

#[test]
fn a_machine_that_is_switched_off_in_the_final_flush_costs_one_node() {
    for nodes in [&[1][..], &[2, 3], &[4]] {
        strike(nodes, Fault::MachineOff, When::FinalFlush, DEAD_AFTER);
    }
}

/// Nothing of node `n`'s connection to its parent gets through any more, in either direction, and no end hears of it; what
/// both say to the server does, and so would a new connection.
fn half_open(lab: &Lab, n: usize) {
    let id = &lab.id;
    let connection = sh(&format!("ip netns exec {id}n{n} ss -Htn state established dst 10.77.0.{n}"));
    // The server's port is that of its control connection.
    let port: Vec<&str> = connection
        .lines()
        .filter(|line| !line.contains(":5757"))
        .filter_map(|line| line.split_whitespace().nth(2)?.rsplit(':').next())
        .collect();
    assert_eq!(port.len(), 1, "{connection}");
    for (space, device, side) in
        [(format!("{id}n{n}"), "e0".into(), "sport"), (format!("{id}b"), format!("p{n}"), "dport")]
    {
        sh(&format!(
            "tc() {{ ip netns exec {space} tc \"$@\"; }}
             tc qdisc add dev {device} root handle 1: htb default 10
             tc class add dev {device} parent 1: classid 1:10 htb rate 10gbit quantum 200000
             tc class add dev {device} parent 1: classid 1:20 htb rate 8bit quantum 2000
             tc qdisc add dev {device} parent 1:20 handle 20: tbf rate 8bit burst 1 limit 1
             tc filter add dev {device} parent 1: protocol ip prio 1 u32 match ip protocol 6 0xff \
               match ip {side} {} 0xffff flowid 1:20",
            port[0]
        ));
    }
}

/// Both machines live and so does the cable: nobody may be lost.
#[test]
fn a_half_open_connection_is_dialled_anew_and_costs_nobody() {
    if !possible() {
        return;
    }
    let undisturbed = undisturbed(When::MidStream);
    for n in [2, 3, 4] {
        let (mut lab, start) = begin(When::MidStream);
        std::thread::sleep(Duration::from_millis(STREAM * 750));
        half_open(&lab, n);
        let (server, nodes) = lab.ends(&[]);
        let took = start.elapsed();
        assert_eq!((server, &nodes[..]), (0, &[0; NODES][..]), "{}", lab.everything());
        lab.check_sums(NODES, &[]);
        let text = lab.everything();
        assert!(took > undisturbed + Duration::from_secs(3), "nobody noticed: {took:?}\n{text}");
        println!("half open at {n}: {took:?}, undisturbed {undisturbed:?}");
        assert!(took < undisturbed + DEAD_AFTER, "{took:?}, undisturbed {undisturbed:?}\n{text}");
    }
}

#[test]
fn a_golden_node_that_was_stopped_for_10_seconds_loses_nobody() {
    if !possible() {
        return;
    }
    let mut lab = Lab::new(3, &[]);
    std::thread::sleep(Duration::from_secs(1));
    let server = lab.server.as_ref().unwrap();
    server.signal(rustix::process::Signal::STOP);
    std::thread::sleep(Duration::from_secs(10));
    server.signal(rustix::process::Signal::CONT);
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0, 0, 0][..]), "{}", lab.everything());
    lab.check_sums(3, &[]);
}

#[test]
fn strays_on_every_port_disturb_nobody() {
    if !possible() {
        return;
    }
    let mut lab = Lab::new(3, &[]);
    // From inside the bridge's network: garbage, silence and scans on the server's port and on each node's.
    let id = lab.id.clone();
    let script = "import os, socket, sys\n\
                  for host in range(1, 5):\n\
                  \x20 for port in [int(p) for p in sys.argv[1:]]:\n\
                  \x20  for what in (b'', b'GET / HTTP/1.0\\r\\n\\r\\n', b'KADATA03' + os.urandom(24), b'KACTRL03' + os.urandom(400)):\n\
                  \x20   try:\n\
                  \x20    s = socket.create_connection((f'10.77.0.{host}', port), 1)\n\
                  \x20    s.send(what)\n\
                  \x20   except OSError: pass\n";
    let ports: Vec<String> = (1..=3)
        .map(|n| {
            sh(&format!("ip netns exec {id}n{n} ss -Hltn | awk '{{print $4}}' | sed 's/.*://' | sort -u"))
        })
        .flat_map(|ports| ports.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .chain(["5757".to_owned()])
        .collect();
    assert!(ports.len() >= 4, "{ports:?}");
    let mut python = lab.inside(0, Path::new("python3"));
    python.arg("-c").arg(script).args(&ports);
    run(&mut python, Duration::from_secs(30)).unwrap();
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0, 0, 0][..]), "{}", lab.everything());
    lab.check_sums(3, &[]);
}

#[test]
fn nobody_writes_while_nothing_is_wrong() {
    if !possible() {
        return;
    }
    let mut lab = Lab::new(4, &["--arity", "2"]);
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0; 4][..]), "{}", lab.everything());
    let text = lab.everything();
    for word in ["lost its parent", "dead", "wave 2", "brought up"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
    lab.check_sums(4, &[]);
    std::io::stdout().flush().unwrap();
}
