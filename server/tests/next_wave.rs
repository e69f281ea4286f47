//! What repair cannot mend, with the real programs in network namespaces: more deaths in a row than the chain survives, a
//! node that is bad in every wave, a golden machine that stood still. The rest goes to the next wave and the deployment ends.
//! Needs root and iproute2.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use ka_sys::process::run;
use lab::{Fault, Lab, Program, possible, sh};
use programs::{agent_program, key_in};
use std::process::Command;
use std::time::{Duration, Instant};

/// Six nodes; the fifth lags behind over a slow cable when the three before it die at once, one more than the chain
/// survives. What it wants next has left the window of the first by then. A stream on standard input is as slow as the
/// source of the other tests, by the server's cable.
fn three_adjacent_deaths(history: &str, input: bool) -> Lab {
    let mut lab = Lab::network(6);
    let source = if input { "-".to_owned() } else { lab.source() };
    if input {
        sh(&format!("tc -n {}n0 qdisc add dev e0 root tbf rate 84mbit burst 128k latency 100ms", lab.id));
    }
    lab.start_server(&source, &["--nodes", "6", "--compress", "off", "--history", history]);
    for n in 1..=6 {
        lab.start_node(n, None);
    }
    let id = lab.id.clone();
    sh(&format!("ip netns exec {id}b tc qdisc add dev p5 root tbf rate 20mbit burst 128k latency 100ms"));
    lab.server.as_ref().unwrap().wait_for("starting with");
    std::thread::sleep(Duration::from_millis(2500));
    for n in [2, 3, 4] {
        lab.strike(n, Fault::Killed);
    }
    sh(&format!("ip netns exec {id}b tc qdisc del dev p5 root"));
    let (server, others) = lab.ends(&[2, 3, 4]);
    assert_eq!((server, &others[..]), (3, &[0, 0, 0][..]), "{}", lab.everything());
    lab.check_sums(6, &[2, 3, 4]);
    lab
}

#[test]
fn survive_plus_one_adjacent_deaths_are_bridged_from_the_history() {
    if !possible() {
        return;
    }
    let lab = three_adjacent_deaths("1G", false);
    let text = lab.everything();
    assert!(text.contains("n5 is brought up from the server's history"), "{text}");
    assert!(!text.contains("wave 2"), "{text}");
}

#[test]
fn without_a_history_the_orphans_of_too_many_deaths_finish_in_the_next_wave() {
    if !possible() {
        return;
    }
    let lab = three_adjacent_deaths("0", false);
    let text = lab.everything();
    assert!(text.contains("n5 goes to the next wave") && text.contains("n6 goes to the next wave"), "{text}");
    assert!(text.contains("starting wave 2, with 2 nodes: n5 n6"), "{text}");
}

#[test]
fn the_next_wave_gets_the_whole_of_a_stream_on_standard_input_again() {
    if !possible() {
        return;
    }
    let lab = three_adjacent_deaths("0", true);
    let text = lab.everything();
    assert!(text.contains("starting wave 2, with 2 nodes: n5 n6"), "{text}");
}

/// Its disk takes nothing any more after the first MB.
#[test]
fn a_node_that_stalls_in_every_wave_ends_the_deployment_with_exit_code_3() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(3);
    // More than its window and every buffer on the way take.
    let stream = lab.folder.path().join("big");
    run(
        Command::new("sh").args(["-c", &format!("head -c 120M /dev/urandom > {}", stream.display())]),
        Duration::from_secs(30),
    )
    .unwrap();
    let options = ["--nodes", "3", "--compress", "off", "--stall", "6s", "--dead-after", "4s"];
    lab.start_server(&format!("cat {}", stream.display()), &options);
    for n in 1..=3 {
        lab.start_node(n, (n == 2).then_some("head -c 1000000 >/dev/null; sleep 60; true"));
    }
    lab.server.as_ref().unwrap().wait_for("starting with");
    let start = Instant::now();
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (3, &[0, 1, 0][..]), "{}", lab.everything());
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}\n{}", start.elapsed(), lab.everything());
    let text = lab.everything();
    assert!(text.contains("starting wave 2, with 1 nodes: n2") && !text.contains("wave 3"), "{text}");
    assert!(text.contains("n2 FAILED in step receive: its disk took nothing for 6 s"), "{text}");
    let sum = sh(&format!("sha256sum < {}", stream.display()));
    for n in [1, 3] {
        assert_eq!(std::fs::read_to_string(lab.sum_of(n)).unwrap(), sum);
    }
}

/// A deployment to three nodes; the second may have a sink of its own.
fn three(second: Option<&str>) -> Lab {
    let mut lab = Lab::network(3);
    let source = lab.source();
    lab.start_server(&source, &["--nodes", "3"]);
    for n in 1..=3 {
        lab.start_node(n, second.filter(|_| n == 2));
    }
    lab
}

/// It has the whole stream, but its disk is not done with it for a long time.
#[test]
fn a_node_whose_disk_hangs_at_the_very_end_holds_nobody() {
    if !possible() {
        return;
    }
    let mut lab = three(Some("cat >/dev/null; sleep 20"));
    lab.server.as_ref().unwrap().wait_for("starting with");
    let start = Instant::now();
    assert_eq!(lab.nodes_end(&[2]), [0, 0], "{}", lab.everything());
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}\n{}", start.elapsed(), lab.everything());
    let (server, n2) = lab.ends(&[1, 3]);
    assert_eq!((server, &n2[..]), (0, &[0][..]), "{}", lab.everything());
    assert!(start.elapsed() > Duration::from_secs(20), "n2 did not hang: {:?}", start.elapsed());
    assert!(!lab.everything().contains("wave 2"), "{}", lab.everything());
}

/// It is power-cycled each time and comes again under its name.
#[test]
fn a_node_that_is_killed_in_every_wave_ends_the_deployment_with_exit_code_3() {
    if !possible() {
        return;
    }
    let mut lab = three(None);
    let start = Instant::now();
    let key = key_in(&lab.server.as_ref().unwrap().text());
    let again = |lab: &Lab| {
        let mut command = lab.inside(2, &agent_program());
        command.args([
            "receive",
            "--server",
            "10.77.0.1:5757",
            "--name",
            "n2",
            "--patience",
            "5s",
            "--discard",
        ]);
        command.args(["--key", &key, "--token-file"]).arg(lab.folder.path().join("token"));
        Program::start(command)
    };
    lab.server.as_ref().unwrap().wait_for("starting with");
    std::thread::sleep(Duration::from_secs(1));
    lab.strike(2, Fault::Killed);
    lab.server.as_ref().unwrap().wait_for("n2 FAILED");
    lab.nodes[1] = again(&lab);
    lab.server.as_ref().unwrap().wait_for("starting wave 2, with 1 nodes: n2");
    std::thread::sleep(Duration::from_secs(1));
    lab.strike(2, Fault::Killed);
    lab.nodes[1] = again(&lab);
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (3, &[0, 1, 0][..]), "{}", lab.everything());
    assert!(start.elapsed() < Duration::from_secs(40), "{:?}\n{}", start.elapsed(), lab.everything());
    let everything = lab.everything();
    assert!(!everything.contains("wave 3") && !everything.contains("n2-2"), "{everything}");
    lab.check_sums(3, &[2]);
}

/// As a virtual machine that is paused: its kernel answers nothing either.
#[test]
fn a_golden_machine_that_stood_still_for_10_seconds_loses_nobody() {
    if !possible() {
        return;
    }
    let mut lab = Lab::new(3, &[]);
    std::thread::sleep(Duration::from_secs(1));
    let id = lab.id.clone();
    let server = lab.server.as_ref().unwrap();
    server.signal(rustix::process::Signal::STOP);
    sh(&format!("ip -n {id}b link set p0 down"));
    std::thread::sleep(Duration::from_secs(10));
    sh(&format!("ip -n {id}b link set p0 up"));
    server.signal(rustix::process::Signal::CONT);
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0, 0, 0][..]), "{}", lab.everything());
    lab.check_sums(3, &[]);
}
