//! Deployments with the real programs, each node in a network namespace of its own, in which nodes die, freeze, or lose
//! their cable in the middle of the stream. The survivors must end with every byte, in time. Needs root and iproute2.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use ka_sys::process::run;
use lab::{Fault, Lab, STREAM, possible, sh};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// Strikes these nodes of a chain of four after a third of the stream, and sees to the others.
fn strike(nodes: &[usize], fault: Fault, more: Duration) {
    if !possible() {
        return;
    }
    let mut lab = Lab::new(4, &[]);
    let start = Instant::now();
    std::thread::sleep(Duration::from_millis(STREAM * 1000 / 3));
    for n in nodes {
        lab.strike(*n, fault);
    }
    let struck = if fault == Fault::FrozenAndBack { &[][..] } else { nodes };
    let (server, others) = lab.ends(struck);
    let took = start.elapsed();
    let expected = if struck.is_empty() { 0 } else { 3 };
    assert_eq!(server, expected, "{}", lab.everything());
    assert!(others.iter().all(|code| *code == 0), "{others:?}\n{}", lab.everything());
    lab.check_sums(4, struck);
    let limit = Duration::from_secs(STREAM + 4) + more;
    assert!(took < limit, "{took:?} of {limit:?}\n{}", lab.everything());
}

const AT_ONCE: Duration = Duration::from_secs(1);
const DEAD_AFTER: Duration = Duration::from_secs(9);

#[test]
fn killed_nodes_are_bridged_at_once() {
    for nodes in [&[1][..], &[2], &[4], &[2, 3]] {
        strike(nodes, Fault::Killed, AT_ONCE);
    }
}

#[test]
fn frozen_nodes_are_bridged_when_they_are_declared_dead() {
    for nodes in [&[1][..], &[3], &[4]] {
        strike(nodes, Fault::Frozen, DEAD_AFTER);
    }
}

#[test]
fn a_node_that_was_frozen_for_5_seconds_is_not_thrown_out() {
    for nodes in [&[1][..], &[4]] {
        strike(nodes, Fault::FrozenAndBack, Duration::from_secs(6));
    }
}

#[test]
fn a_cut_cable_costs_one_node() {
    for nodes in [&[1][..], &[3]] {
        strike(nodes, Fault::CableCut, DEAD_AFTER);
    }
}

#[test]
fn a_node_that_is_heard_no_more_costs_one_node() {
    for nodes in [&[2][..], &[4]] {
        strike(nodes, Fault::CutOneWay, DEAD_AFTER);
    }
}

#[test]
fn a_machine_that_is_switched_off_costs_one_node() {
    for nodes in [&[1][..], &[2, 3]] {
        strike(nodes, Fault::MachineOff, DEAD_AFTER);
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
                  \x20  for what in (b'', b'GET / HTTP/1.0\\r\\n\\r\\n', b'KADATA02' + os.urandom(24), b'KACTRL01' + os.urandom(400)):\n\
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
