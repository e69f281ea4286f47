//! A bridge with a server and nodes on it, each in a network namespace of its own, running the real programs. Needs root and
//! iproute2.

#![allow(dead_code)] // each test takes what it needs

use crate::programs::{agent_program, key_in, make_token, server_program};
use ka_sys::process::run;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// MiB of the stream; it takes at least [`STREAM`] seconds.
pub const SIZE: usize = 40;
pub const STREAM: u64 = 4;
/// No deployment here may take longer.
pub const LIMIT: Duration = Duration::from_secs(90);

/// What a shell script prints; it must succeed within 30 s.
pub fn sh(script: &str) -> String {
    run(Command::new("sh").args(["-ec", script]), Duration::from_secs(30)).unwrap().text()
}

/// Whether this machine can run the lab; says so when not.
pub fn possible() -> bool {
    let root = rustix::process::geteuid().is_root();
    let ip = Command::new("sh").args(["-c", "command -v ip"]).output().is_ok_and(|o| o.status.success());
    if !root || !ip {
        println!("SKIPPED: needs root and iproute2");
    }
    root && ip
}

/// A program under test and what it writes to its standard error.
pub struct Program {
    pub child: Child,
    text: Arc<Mutex<String>>,
}

impl Program {
    pub fn start(command: Command) -> Self {
        Self::reading(command, Stdio::null())
    }

    /// With this standard input.
    pub fn reading(mut command: Command, input: Stdio) -> Self {
        let mut child = command.stdin(input).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
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

    pub fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    pub fn wait_for(&self, pattern: &str) {
        let end = Instant::now() + LIMIT;
        while !self.text().contains(pattern) {
            assert!(Instant::now() < end, "`{pattern}` never came; this did:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its exit status; `told` stands in the message when it does not end.
    fn end(&mut self, told: &str) -> i32 {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // The reading thread may still have a line.
                std::thread::sleep(Duration::from_millis(50));
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < end, "no end:\n{told}\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Its exit status.
    pub fn exit(&mut self) -> i32 {
        self.end("")
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.child.id())).map_or(0, Iterator::count)
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
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
pub enum Fault {
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
pub struct Lab {
    pub id: String,
    pub server: Option<Program>,
    pub nodes: Vec<Program>,
    pub folder: tempfile::TempDir,
    /// What is sent.
    pub stream: PathBuf,
    /// What `sha256sum` says of it.
    pub sum: String,
}

impl Lab {
    /// A deployment that has begun: `nodes` nodes, more options for the server.
    pub fn new(nodes: usize, options: &[&str]) -> Self {
        let mut lab = Self::network(nodes);
        let count = nodes.to_string();
        let source = lab.source();
        lab.start_server(&source, &[&["--nodes", &count], options].concat());
        for n in 1..=nodes {
            lab.start_node(n, None);
        }
        lab.server.as_ref().unwrap().wait_for("starting with");
        lab
    }

    /// Namespaces and cables for a server and `nodes` nodes; no program runs yet.
    pub fn network(nodes: usize) -> Self {
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
        Self { id, server: None, nodes: Vec::new(), folder, stream, sum }
    }

    pub fn inside(&self, n: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}n{n}", self.id)]).arg(program);
        command
    }

    /// A source with a rate of its own, so that faults fall into the stream.
    pub fn source(&self) -> String {
        format!(
            "for i in $(seq 0 {}); do dd if={} bs=1M skip=$i count=1 status=none; sleep 0.{}; done",
            SIZE - 1,
            self.stream.display(),
            STREAM * 100 / SIZE as u64
        )
    }

    /// Starts the server of a deployment that sends what `source` writes, and waits until it listens. With `-` the stream
    /// is its standard input.
    pub fn start_server(&mut self, source: &str, options: &[&str]) {
        make_token(self.folder.path(), "token", &["--shared"]);
        let layout = self.folder.path().join("layout.toml");
        let text = "version = 1\n[[disk]]\nname = \"system\"\ntable = \"gpt\"\n[[partition]]\ntype = \"linux\"\n\
                    size = \"fill\"\nformat = { fs = \"ext4\" }\nmount = { path = \"/\" }\n";
        std::fs::write(&layout, text).unwrap();
        let mut command = self.inside(0, &server_program());
        command
            .args(["deploy", "--listen", "10.77.0.1:5757"])
            .arg("--layout")
            .arg(&layout)
            .args([if source == "-" { "--source-file" } else { "--source-cmd" }, source])
            .arg("--log-dir")
            .arg(self.folder.path().join("log"))
            .arg("--state")
            .arg(self.state())
            .args(options);
        let stream = std::fs::File::open(&self.stream).unwrap();
        let server = Program::reading(command, stream.into());
        server.wait_for("listening on TCP port");
        server.wait_for("this server's key is ");
        self.server = Some(server);
    }

    /// The server's `--state`.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("nodes.json")
    }

    /// Starts the next node, which must be the `n`-th; a sink of its own takes the stream on standard input.
    pub fn start_node(&mut self, n: usize, sink: Option<&str>) {
        assert_eq!(self.nodes.len() + 1, n);
        let token = self.folder.path().join("token");
        let key = key_in(&self.server.as_ref().unwrap().text());
        let sum = format!("sha256sum > {}", self.sum_of(n).display());
        let mut command = self.inside(n, &agent_program());
        command
            .args(["receive", "--server", "10.77.0.1:5757", "--name", &format!("n{n}"), "--key", &key])
            .arg("--token-file")
            .arg(&token)
            .args(["--sink-cmd", sink.unwrap_or(&sum)]);
        self.nodes.push(Program::start(command));
    }

    pub fn sum_of(&self, n: usize) -> PathBuf {
        self.folder.path().join(format!("sum{n}"))
    }

    pub fn strike(&self, n: usize, fault: Fault) {
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
    pub fn ends(&mut self, struck: &[usize]) -> (i32, Vec<i32>) {
        let nodes = self.nodes_end(struck);
        (self.server_ends(), nodes)
    }

    /// The exit statuses of the nodes, those of `struck` left out.
    pub fn nodes_end(&mut self, struck: &[usize]) -> Vec<i32> {
        let everything = self.everything();
        let nodes = self.nodes.iter_mut().enumerate().filter(|(n, _)| !struck.contains(&(n + 1)));
        nodes.map(|(_, node)| node.end(&everything)).collect()
    }

    /// The exit status of the server.
    pub fn server_ends(&mut self) -> i32 {
        let everything = self.everything();
        self.server.as_mut().unwrap().end(&everything)
    }

    pub fn everything(&self) -> String {
        let mut text = self.server.as_ref().map(Program::text).unwrap_or_default();
        for (n, node) in self.nodes.iter().enumerate() {
            // Writing to a String cannot fail.
            let _ = std::fmt::Write::write_fmt(&mut text, format_args!("--- n{}\n{}", n + 1, node.text()));
        }
        text
    }

    pub fn check_sums(&self, count: usize, struck: &[usize]) {
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
