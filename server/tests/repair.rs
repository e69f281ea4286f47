//! Deployments with the real programs, each node in a network namespace of its own, in which nodes die, freeze, or lose
//! their cable in the middle of the stream. The survivors must end with every byte, in time. Needs root and iproute2.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod programs;

use ka_sys::process::run;
use programs::{agent_program, key_in, make_token, server_program};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// MiB of the stream; it takes at least [`STREAM`] seconds.
const SIZE: usize = 40;
const STREAM: u64 = 4;
/// No deployment here may take longer.
const LIMIT: Duration = Duration::from_secs(60);

fn sh(script: &str) -> String {
    run(Command::new("sh").args(["-ec", script]), Duration::from_secs(30)).unwrap().text()
}

fn possible() -> bool {
    let root = rustix::process::geteuid().is_root();
    let ip = Command::new("sh").args(["-c", "command -v ip"]).output().is_ok_and(|o| o.status.success());
    if !root || !ip {
        println!("SKIPPED: needs root and iproute2");
    }
    root && ip
}

struct Program {
    child: Child,
    text: Arc<Mutex<String>>,
}

impl Program {
    fn start(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let text = Arc::new(Mutex::new(String::new()));
        let stderr = child.stderr.take().unwrap();
        let kept = Arc::clone(&text);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        Self { child, text }
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    fn wait_for(&self, pattern: &str) {
        let end = Instant::now() + LIMIT;
        while !self.text().contains(pattern) {
            assert!(Instant::now() < end, "`{pattern}` never came; this did:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What happens to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Killed,
    Frozen,
    /// For 5 s, then it goes on.
    FrozenAndBack,
    /// Both directions, for good; its programs run on.
    CableCut,
    /// What it sends is lost from now on.
    CutOneWay,
    /// No word to anybody.
    MachineOff,
}

/// A bridge with a server and nodes on it, gone when dropped.
struct Lab {
    id: String,
    server: Option<Program>,
    nodes: Vec<Program>,
    folder: tempfile::TempDir,
    stream: PathBuf,
    sum: String,
}

impl Lab {
    fn new(nodes: usize, options: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("karp{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let stream = folder.path().join("stream");
        let mut bytes = vec![0; SIZE << 20];
        std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
        std::fs::write(&stream, &bytes).unwrap();
        let sum = sh(&format!("sha256sum < {}", stream.display()));
        sh(&format!(
            "ip netns add {id}b; ip -n {id}b link add name br0 type bridge; ip -n {id}b link set br0 up"
        ));
        for n in 0..=nodes {
            sh(&format!(
                "ip netns add {id}n{n}; ip -n {id}n{n} link set lo up
                 ip link add e0 netns {id}n{n} type veth peer name p{n} netns {id}b
                 ip -n {id}b link set p{n} master br0 up
                 ip -n {id}n{n} addr add 10.77.0.{}/24 dev e0; ip -n {id}n{n} link set e0 up",
                n + 1
            ));
        }
        let mut lab = Self { id, server: None, nodes: Vec::new(), folder, stream, sum };
        lab.start(nodes, options);
        lab
    }

    fn inside(&self, n: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}n{n}", self.id)]).arg(program);
        command
    }

    fn start(&mut self, nodes: usize, options: &[&str]) {
        let token = make_token(self.folder.path(), "token", &["--shared"]);
        let layout = self.folder.path().join("layout.toml");
        let text = "version = 1\n[[disk]]\nname = \"system\"\ntable = \"gpt\"\n[[partition]]\ntype = \"linux\"\n\
                    size = \"fill\"\nformat = { fs = \"ext4\" }\nmount = { path = \"/\" }\n";
        std::fs::write(&layout, text).unwrap();
        let mut command = self.inside(0, &server_program());
        // A source with a rate of its own, so that the faults fall into the stream.
        let source = format!(
            "for i in $(seq 0 {}); do dd if={} bs=1M skip=$i count=1 status=none; sleep 0.{}; done",
            SIZE - 1,
            self.stream.display(),
            STREAM * 100 / SIZE as u64
        );
        command
            .args(["deploy", "--listen", "10.77.0.1:5757", "--nodes", &nodes.to_string()])
            .arg("--layout")
            .arg(&layout)
            .args(["--source-cmd", &source])
            .arg("--log-dir")
            .arg(self.folder.path().join("log"))
            .arg("--state")
            .arg(self.folder.path().join("nodes.json"))
            .args(options);
        let server = Program::start(command);
        server.wait_for("listening on TCP port");
        server.wait_for("this server's key is ");
        let key = key_in(&server.text());
        for n in 1..=nodes {
            let mut command = self.inside(n, &agent_program());
            command
                .args(["receive", "--server", "10.77.0.1:5757", "--name", &format!("n{n}"), "--key", &key])
                .arg("--token-file")
                .arg(&token)
                .args(["--sink-cmd", &format!("sha256sum > {}", self.sum_of(n).display())]);
            self.nodes.push(Program::start(command));
        }
        server.wait_for("starting with");
        self.server = Some(server);
    }

    fn sum_of(&self, n: usize) -> PathBuf {
        self.folder.path().join(format!("sum{n}"))
    }

    fn strike(&self, n: usize, fault: Fault) {
        let node = &self.nodes[n - 1];
        let id = &self.id;
        let cut = || sh(&format!("ip -n {id}b link set p{n} down"));
        match fault {
            Fault::Killed => node.signal(rustix::process::Signal::KILL),
            Fault::Frozen | Fault::FrozenAndBack => node.signal(rustix::process::Signal::STOP),
            Fault::CableCut => drop(cut()),
            Fault::CutOneWay => drop(sh(&format!(
                "ip netns exec {id}n{n} tc qdisc add dev e0 root tbf rate 8bit burst 1 limit 1"
            ))),
            Fault::MachineOff => {
                cut();
                node.signal(rustix::process::Signal::KILL);
            }
        }
        if fault == Fault::FrozenAndBack {
            std::thread::sleep(Duration::from_secs(5));
            node.signal(rustix::process::Signal::CONT);
        }
    }

    /// The exit statuses of the server and of the nodes, those of `struck` left out.
    fn ends(&mut self, struck: &[usize]) -> (i32, Vec<i32>) {
        let end = Instant::now() + LIMIT;
        let everything = self.everything();
        let wait = |program: &mut Program| loop {
            if let Some(status) = program.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < end, "no end:\n{everything}\n{}", program.text());
            std::thread::sleep(Duration::from_millis(20));
        };
        let nodes = self.nodes.iter_mut().enumerate().filter(|(n, _)| !struck.contains(&(n + 1)));
        let nodes = nodes.map(|(_, node)| wait(node)).collect();
        (wait(self.server.as_mut().unwrap()), nodes)
    }

    fn everything(&self) -> String {
        let mut text = self.server.as_ref().map(Program::text).unwrap_or_default();
        for (n, node) in self.nodes.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = std::fmt::Write::write_fmt(&mut text, format_args!("--- n{}\n{}", n + 1, node.text()));
        }
        text
    }

    fn check_sums(&self, count: usize, struck: &[usize]) {
        for n in (1..=count).filter(|n| !struck.contains(n)) {
            let sum = std::fs::read_to_string(self.sum_of(n)).unwrap();
            assert_eq!(sum.trim(), self.sum.trim(), "node {n}:\n{}", self.everything());
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in &self.nodes {
            let _ = rustix::process::kill_process(
                rustix::process::Pid::from_child(&node.child),
                rustix::process::Signal::CONT,
            );
        }
        self.nodes.clear();
        self.server = None;
        let id = &self.id;
        sh(&format!(
            "for n in $(ip netns list | cut -d' ' -f1 | grep '^{id}[bn]'); do ip netns del $n; done"
        ));
    }
}

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
