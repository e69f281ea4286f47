//! The memory of agents in a chain that is held up until every window above the brake is full, with the real programs in
//! network namespaces: at most the window and 32 MiB. Needs root and iproute2.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use ka_chain::node::window_for;
use lab::{LIMIT, Lab, possible, sh};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const NODES: usize = 3;
/// What an agent may take beside its window.
const BESIDE: u64 = 32 << 20;
/// MiB that the source writes at once.
const PIECE: usize = 8;
/// The source is held back when it has written nothing for so long.
const HELD: Duration = Duration::from_secs(3);

/// A MiB of random bytes: they do not shrink.
const RANDOM: &str = "head -c 1M /dev/urandom";
/// A MiB of text that shrinks to a bit more than a third.
const TEXT: &str = "head -c 400K /dev/urandom | od -An -v -tx1 -w32 | head -c 1M";

/// A figure of /proc/PID/status, in bytes; nothing when the process is gone.
fn memory(pid: u32, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().unwrap() << 10)
}

/// A window of an agent on this machine.
fn window() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap();
    let total: u64 = total.trim().strip_suffix("kB").unwrap().trim().parse().unwrap();
    window_for(total << 10) as u64
}

fn mib(bytes: u64) -> String {
    format!("{}.{} MiB", bytes >> 20, (bytes >> 10) % 1024 * 10 / 1024)
}

/// A deployment of `pieces` times a piece that `makes` wrote, a MiB each in turn, in which the disk of node
/// `blocked` takes nothing until nothing moves any more.
fn held_up(blocked: usize, makes: &[&str], pieces: u64, options: &[&str]) {
    if !possible() {
        return;
    }
    let window = window();
    let mut lab = Lab::network(NODES);
    let (piece, count, hold) =
        (lab.stream.clone(), lab.folder.path().join("count"), lab.folder.path().join("hold"));
    // The blocked disk waits until it is gone, as it is too when this test fails.
    std::fs::write(&hold, "").unwrap();
    let each: Vec<&str> = makes.iter().copied().cycle().take(PIECE).collect();
    sh(&format!("({}) > {}", each.join("; "), piece.display()));
    assert_eq!(std::fs::metadata(&piece).unwrap().len(), (PIECE << 20) as u64);
    let stream = |after: &str| format!("for i in $(seq {pieces}); do cat {}; {after} done", piece.display());
    lab.sum = sh(&format!("({}) | sha256sum", stream("")));
    let source = stream(&format!("echo $i > {};", count.display()));
    // What the blocked node lacks stays in the windows of all above it (`--survive`). The head's is the largest, so that it
    // is the nodes' that fill.
    let mine = ["--nodes", "3", "--window", "128M", "--history", "0"];
    lab.start_server(&source, &[&mine[..], options].concat());
    for n in 1..=NODES {
        let sum = lab.sum_of(n);
        let sink =
            format!("while [ -e {} ]; do sleep 0.1; done; sha256sum > {}", hold.display(), sum.display());
        lab.start_node(n, (n == blocked).then_some(&sink));
    }
    lab.server.as_ref().unwrap().wait_for("starting with");

    let written =
        || std::fs::read_to_string(&count).ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0);
    let (mut last, mut since, start) = (0, Instant::now(), Instant::now());
    while last == 0 || since.elapsed() < HELD {
        assert!(start.elapsed() < LIMIT, "never held back\n{}", lab.everything());
        std::thread::sleep(Duration::from_millis(50));
        // Its file is empty for a moment now and then.
        let now = written().max(last);
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    let text = lab.everything();
    assert!(last < pieces, "the source was never held back: it wrote {last} of {pieces} pieces\n{text}");
    // Each window from the first to that of the blocked node is full.
    for n in 1..=blocked {
        let now = memory(lab.nodes[n - 1].child.id(), "VmRSS").unwrap();
        assert!(now >= window, "n{n} holds {} only\n{text}", mib(now));
    }
    let blocked_at = last * PIECE as u64;
    std::fs::remove_file(&hold).unwrap();

    // Until each has ended: what it takes to catch up counts too.
    let pids: BTreeMap<usize, u32> = (1..=NODES).map(|n| (n, lab.nodes[n - 1].child.id())).collect();
    let mut peaks: BTreeMap<usize, u64> = BTreeMap::new();
    let end = Instant::now() + LIMIT;
    while lab.nodes.iter_mut().any(|node| node.child.try_wait().unwrap().is_none()) && Instant::now() < end {
        for (n, pid) in &pids {
            peaks.extend(memory(*pid, "VmHWM").map(|peak| (*n, peak)));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let (code, nodes) = lab.ends(&[]);
    let text = lab.everything();
    assert_eq!((code, &nodes[..]), (0, &[0; NODES][..]), "{text}");
    lab.check_sums(NODES, &[]);
    for (n, peak) in &peaks {
        let beside = peak.saturating_sub(window);
        println!(
            "n{n} of {NODES}, n{blocked} blocked at {blocked_at} MiB: peak {}, window and {}",
            mib(*peak),
            mib(beside)
        );
        assert!(beside <= BESIDE, "n{n}: {} beside its window of {}\n{text}", mib(beside), mib(window));
    }
    assert_eq!(peaks.len(), NODES);
}

#[test]
fn agents_hold_their_window_and_32_mib_when_the_last_disk_is_blocked() {
    held_up(3, &[RANDOM], 32, &["--compress", "off"]);
}

#[test]
fn agents_hold_no_more_when_the_stream_shrinks_and_a_middle_disk_is_blocked() {
    held_up(2, &[TEXT], 64, &["--compress", "3"]);
}

#[test]
fn agents_hold_no_more_when_chunks_are_of_all_sizes() {
    held_up(3, &[RANDOM, TEXT], 46, &["--compress", "3"]);
}
