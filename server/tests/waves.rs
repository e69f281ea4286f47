//! Deployments with the real programs in which nodes are late, slow, or waited for. Needs root and iproute2.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use lab::{Lab, Program, possible};
use programs::server_program;
use std::process::Command;
use std::time::{Duration, Instant};

/// `ka-server go`: its exit status and everything that it says.
fn go(lab: &Lab) -> (i32, String) {
    let output = Command::new(server_program()).arg("go").arg("--state").arg(lab.state()).output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.code().unwrap(), text)
}

fn said(server: &Program, pattern: &str) -> bool {
    server.text().contains(pattern)
}

/// A source that gives 40 MiB as fast as it is taken.
fn whole(lab: &Lab) -> String {
    format!("cat {}", lab.stream.display())
}

#[test]
fn the_operators_go_starts_the_wave_and_says_why_when_it_cannot() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(2);
    let (code, text) = go(&lab);
    assert!(code == 1 && text.contains("no deployment waits"), "{code} {text}");
    lab.start_server(&whole(&lab), &["--nodes", "9", "--min-nodes", "2"]);
    let (code, text) = go(&lab);
    assert!(code == 1 && text.contains("no node is ready"), "{code} {text}");
    lab.start_node(1, None);
    lab.server.as_ref().unwrap().wait_for("n1 is ready");
    let (code, text) = go(&lab);
    assert!(code == 1 && text.contains("1 nodes are ready, and --min-nodes is 2"), "{code} {text}");
    lab.start_node(2, None);
    lab.server.as_ref().unwrap().wait_for("n2 is ready");
    std::thread::sleep(Duration::from_secs(1));
    assert!(!said(lab.server.as_ref().unwrap(), "starting with"));
    let (code, text) = go(&lab);
    assert!(code == 0 && text.contains("wave 1 begins with 2 nodes"), "{code} {text}");
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0, 0][..]), "{}", lab.everything());
    lab.check_sums(2, &[]);
    assert!(!lab.state().with_extension("sock").exists());
}

#[test]
fn a_slow_disk_is_named_moved_to_the_next_wave_and_installed_there() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(4);
    let options =
        ["--nodes", "4", "--min-rate", "3M", "--slow-grace", "5", "--compress", "off", "--window", "2M"];
    // Longer than the windows of the nodes, which take up to 64 MiB each.
    let long = format!("for i in 1 2 3 4 5; do cat {}; done", lab.stream.display());
    lab.sum = lab::sh(&format!("({long}) | sha256sum"));
    lab.start_server(&long, &options);
    let slow = 2;
    for n in 1..=4 {
        // In its first wave the disk takes about a MiB a second; on its second try it is as good as the others.
        let (sum, marker) = (lab.sum_of(n), lab.folder.path().join("tried"));
        let sink = format!(
            "if [ -e {marker} ]; then sha256sum > {sum}; else touch {marker}; while dd bs=256K count=1 iflag=fullblock \
             status=none | grep -q .; do sleep 0.25; done; fi",
            marker = marker.display(),
            sum = sum.display()
        );
        lab.start_node(n, (n == slow).then_some(&sink));
    }
    let start = Instant::now();
    let server = lab.server.as_ref().unwrap();
    server.wait_for("brake: disk of n2");
    server.wait_for("n2 goes to the next wave: the disk of n2 let ");
    let moved = start.elapsed();
    let (code, nodes) = lab.ends(&[]);
    let text = lab.everything();
    assert_eq!((code, &nodes[..]), (0, &[0; 4][..]), "{text}");
    lab.check_sums(4, &[]);
    assert!(
        text.contains("starting wave 2, with 1 nodes: n2") && text.contains("brakes: disk of n2 "),
        "{text}"
    );
    // Nobody else noticed: no link was lost, nothing had to be fetched again.
    for word in ["lost its parent", "dead", "brought up", "n1 goes", "n3 goes", "n4 goes"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
    println!("n2 was moved after {moved:.1?}");
}

#[test]
fn a_slow_cable_is_named() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(3);
    let id = lab.id.clone();
    // What goes to n2, and nothing else.
    lab::sh(&format!("ip netns exec {id}b tc qdisc add dev p2 root tbf rate 40mbit burst 32k latency 50ms"));
    lab.start_server(&whole(&lab), &["--nodes", "3", "--compress", "off"]);
    for n in 1..=3 {
        lab.start_node(n, None);
    }
    let (code, nodes) = lab.ends(&[]);
    let text = lab.everything();
    assert_eq!((code, &nodes[..]), (0, &[0; 3][..]), "{text}");
    lab.check_sums(3, &[]);
    // Veth interfaces say 10 Gbit/s, whatever the cable lets through.
    let speeds = "link from n1 to n2 (n1's e0: 10000 Mbit/s, n2's e0: 10000 Mbit/s)";
    assert!(
        text.contains(&format!("brake: {speeds}")) && text.contains(&format!("brakes: {speeds} ")),
        "{text}"
    );
}

#[test]
fn staged_releases_come_one_after_the_other() {
    if !possible() {
        return;
    }
    let mut lab = Lab::network(3);
    lab.start_server(&whole(&lab), &["--nodes", "3", "--release-every", "10"]);
    for n in 1..=3 {
        lab.start_node(n, None);
    }
    lab.server.as_ref().unwrap().wait_for("everything was sent");
    let start = Instant::now();
    let (code, nodes) = lab.ends(&[]);
    assert_eq!((code, &nodes[..]), (0, &[0; 3][..]), "{}", lab.everything());
    let took = start.elapsed();
    // Longer than --dead-after for the last.
    assert!(took >= Duration::from_secs(19) && took < Duration::from_secs(30), "{took:?}");
    assert!(!lab.everything().contains("lost its parent"), "{}", lab.everything());
}
