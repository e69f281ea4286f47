//! Hostile and odd neighbours, with the real programs: floods of strangers, second claims, connections that break and come
//! again, replayed and foreign sessions; IPv6 alone, host names that lead to loopback, several networks, two deployments
//! side by side. What needs a network has namespaces of its own (root and iproute2).

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use ka_chain::control::{Purpose, Registration, ToNode, ToServer};
use ka_chain::keys::{Credential, PublicKey, Token};
use ka_chain::noise::control::{Session, initiate};
use lab::{Program, possible, sh};
use programs::{agent_program, key_in, make_token, server_program};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Network namespaces on bridges, gone when dropped.
struct Net {
    id: String,
}

impl Net {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("kanb{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        sh(&format!("ip netns add {id}b"));
        Self { id }
    }

    fn bridge(&self, name: &str) {
        let id = &self.id;
        sh(&format!("ip -n {id}b link add {name} type bridge; ip -n {id}b link set {name} up"));
    }

    fn host(&self, n: usize) {
        let id = &self.id;
        sh(&format!("ip netns add {id}n{n}; ip -n {id}n{n} link set lo up"));
    }

    /// A cable from a host to a bridge, with these addresses at the host.
    fn cable(&self, n: usize, device: &str, bridge: &str, addresses: &[&str]) {
        let id = &self.id;
        sh(&format!(
            "ip link add {device} netns {id}n{n} type veth peer name {bridge}h{n} netns {id}b
             ip -n {id}b link set {bridge}h{n} master {bridge} up"
        ));
        for address in addresses {
            let quick = if address.contains(':') { "nodad" } else { "" };
            sh(&format!("ip -n {id}n{n} addr add {address} dev {device} {quick}"));
        }
        sh(&format!("ip -n {id}n{n} link set {device} up"));
    }

    fn inside(&self, n: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{}n{n}", self.id)]).arg(program);
        command
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let id = &self.id;
        sh(&format!(
            "for n in $(ip netns list | cut -d' ' -f1 | grep '^{id}[bn]'); do ip netns del $n; done"
        ));
    }
}

/// A server, its nodes, and what they are to end with.
struct Deployment {
    server: Program,
    nodes: Vec<Program>,
    port: u16,
    key: String,
    folder: tempfile::TempDir,
    sum: String,
}

impl Deployment {
    /// A server that feeds `mib` MiB, `pause` s after each. `base` runs it, on this host or inside of another.
    fn start(
        mut base: Command,
        listen: &str,
        nodes: usize,
        mib: usize,
        pause: f32,
        options: &[&str],
    ) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let stream = folder.path().join("stream");
        let mut bytes = vec![0; mib << 20];
        std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
        std::fs::write(&stream, &bytes).unwrap();
        let sum = sh(&format!("sha256sum < {}", stream.display()));
        let layout = folder.path().join("layout.toml");
        let text = "version = 1\n[[disk]]\nname = \"system\"\ntable = \"gpt\"\n[[partition]]\ntype = \"linux\"\n\
                    size = \"fill\"\nformat = { fs = \"ext4\" }\nmount = { path = \"/\" }\n";
        std::fs::write(&layout, text).unwrap();
        make_token(folder.path(), "token", &["--shared"]);
        let source = format!(
            "for i in $(seq 0 {}); do dd if={} bs=1M skip=$i count=1 status=none; sleep {pause}; done",
            mib - 1,
            stream.display()
        );
        base.args(["deploy", "--listen", listen, "--nodes", &nodes.to_string(), "--layout"])
            .arg(&layout)
            .args(["--source-cmd", &source, "--log-dir"])
            .arg(folder.path().join("log"))
            .arg("--state")
            .arg(folder.path().join("nodes.json"))
            .args(options);
        let server = Program::start(base);
        server.wait_for("listening on TCP port ");
        server.wait_for("this server's key is ");
        let text = server.text();
        let port = text.split("TCP port ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        let key = key_in(&text);
        Self { server, nodes: Vec::new(), port, key, folder, sum }
    }

    fn local(nodes: usize, mib: usize, pause: f32, options: &[&str]) -> Self {
        Self::start(Command::new(server_program()), "127.0.0.1:0", nodes, mib, pause, options)
    }

    fn sum_of(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("sum-{name}"))
    }

    /// Starts a node and waits until it is ready.
    fn node(&mut self, mut base: Command, name: &str, server: &str, token: &Path) {
        base.args(["receive", "--server", server, "--name", name, "--key", &self.key, "--token-file"])
            .arg(token)
            .args(["--sink-cmd", &format!("sha256sum > {}", self.sum_of(name).display())]);
        self.nodes.push(Program::start(base));
        self.server.wait_for(&format!("{name} is ready"));
    }

    fn shared(&self) -> PathBuf {
        self.folder.path().join("token")
    }

    fn everything(&self) -> String {
        let mut text = self.server.text();
        for (n, node) in self.nodes.iter().enumerate() {
            text.push_str(&format!("--- node {n}\n{}", node.text()));
        }
        text
    }

    /// Everybody is done and has every byte.
    fn all_done(&mut self, names: &[&str]) {
        let codes: Vec<i32> = self.nodes.iter_mut().map(Program::exit).collect();
        assert!(codes.iter().all(|code| *code == 0), "{codes:?}\n{}", self.everything());
        assert_eq!(self.server.exit(), 0, "{}", self.everything());
        for name in names {
            let sum = std::fs::read_to_string(self.sum_of(name)).unwrap();
            assert_eq!(sum.trim(), self.sum.trim(), "{name}:\n{}", self.everything());
        }
    }
}

/// Stands between a node and the server, passes everything on, hears what the node says, and cuts connections.
struct Router {
    port: u16,
    /// Both ends of each connection, and what the node has said over it.
    #[allow(clippy::type_complexity)] // a list of a test
    connections: Arc<Mutex<Vec<(TcpStream, TcpStream, Arc<Mutex<Vec<u8>>>)>>>,
}

impl Router {
    fn to(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&connections);
        std::thread::spawn(move || {
            for node in listener.incoming() {
                let node = node.unwrap();
                let server = TcpStream::connect(("127.0.0.1", server)).unwrap();
                let heard = Arc::new(Mutex::new(Vec::new()));
                let clone = |stream: &TcpStream| stream.try_clone().unwrap();
                kept.lock().unwrap().push((clone(&node), clone(&server), Arc::clone(&heard)));
                pass(clone(&node), clone(&server), Some(heard));
                pass(server, node, None);
            }
        });
        Self { port, connections }
    }

    /// The control connections, in the order in which they came: their places in the list.
    fn control(&self) -> Vec<usize> {
        let connections = self.connections.lock().unwrap();
        let is_control = |n: &usize| connections[*n].2.lock().unwrap().starts_with(b"KACTRL");
        (0..connections.len()).filter(is_control).collect()
    }

    fn heard(&self, n: usize) -> Vec<u8> {
        self.connections.lock().unwrap()[n].2.lock().unwrap().clone()
    }

    /// The node's end is closed; the server's only when it `hears` of it.
    fn cut(&self, n: usize, hears: bool) {
        let connections = self.connections.lock().unwrap();
        let (node, server, _) = &connections[n];
        // They may be closed already.
        let _ = node.shutdown(Shutdown::Both);
        if hears {
            let _ = server.shutdown(Shutdown::Both);
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, kept: Option<Arc<Mutex<Vec<u8>>>>) {
    std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            if let Some(kept) = &kept {
                let mut kept = kept.lock().unwrap();
                let room = 4096usize.saturating_sub(kept.len());
                kept.extend(&bytes[..n.min(room)]);
            }
            if to.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
    });
}

fn agent() -> Command {
    Command::new(agent_program())
}

#[test]
fn a_node_that_loses_its_connection_comes_again_with_its_session_and_needs_no_token() {
    for hears in [true, false] {
        let mut d = Deployment::local(2, 20, 0.15, &[]);
        let router = Router::to(d.port);
        // Each is good for one registration.
        let tokens = ["t0", "t1"].map(|name| make_token(d.folder.path(), name, &[]));
        d.node(agent(), "n0", &format!("127.0.0.1:{}", router.port), &tokens[0]);
        d.node(agent(), "n1", &format!("127.0.0.1:{}", d.port), &tokens[1]);
        d.server.wait_for("starting with 2 nodes");
        std::thread::sleep(Duration::from_secs(1));
        router.cut(router.control()[0], hears);
        d.server.wait_for("n0 is here again");
        d.server.wait_for("starting wave 2, with 1 nodes: n0");
        let controls = router.control();
        assert_eq!(controls.len(), 2, "{}", d.everything());
        let (first, second) = (router.heard(controls[0]), router.heard(controls[1]));
        assert_eq!(&first[..8], &second[..8]);
        assert!(first[8..24] != second[8..24], "the token's name, then the session's");
        if hears {
            replayed_and_foreign_sessions_are_refused(&d, &second);
        }
        d.all_done(&["n0", "n1"]);
        assert!(!d.server.text().contains("ALARM"), "{}", d.everything());
    }
}

/// While the session that `heard` begins with is in use.
fn replayed_and_foreign_sessions_are_refused(d: &Deployment, heard: &[u8]) {
    let mut replay = TcpStream::connect(("127.0.0.1", d.port)).unwrap();
    replay.write_all(heard).unwrap();
    replay.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = Vec::new();
    // Unread bytes of ours make the kernel reset the connection; that is an end too.
    let _ = replay.read_to_end(&mut answer);
    assert!(answer.len() < 200, "{} bytes", answer.len());
    // Its name alone, which goes over the wire in clear.
    let mut foreign = Credential::generate().unwrap();
    foreign.id.copy_from_slice(&heard[8..24]);
    let stream = TcpStream::connect(("127.0.0.1", d.port)).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    let error = initiate(&stream, &d.key.parse().unwrap(), &foreign, end).unwrap_err().to_string();
    assert!(error.contains("it is not the one with that id"), "{error}");
    let unknown = Credential::generate().unwrap();
    let stream = TcpStream::connect(("127.0.0.1", d.port)).unwrap();
    let error = initiate(&stream, &d.key.parse().unwrap(), &unknown, end).unwrap_err().to_string();
    assert!(error.contains("unknown there"), "{error}");
    d.server.wait_for("it does not open");
    d.server.wait_for("made for another server's key, or with a wrong token");
    d.server.wait_for("its token is unknown");
}

/// A node with a MAC address, played by the test.
struct Player {
    session: Session<TcpStream, TcpStream>,
}

impl Player {
    fn register(d: &Deployment, credential: &Credential) -> (Self, Credential) {
        let stream = TcpStream::connect(("127.0.0.1", d.port)).unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        let key: PublicKey = d.key.parse().unwrap();
        let (mut session, given) = initiate(&stream, &key, credential, end).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let registration = Registration {
            version: "1".to_owned(),
            purpose: Purpose::Install,
            mac: Some("52:54:00:00:00:07".to_owned()),
            hostname: None,
            data_port: 9,
            addresses: Vec::new(),
            memory: 1 << 30,
            facts: Vec::new(),
        };
        session.writer.send(&ToServer::Register(registration)).unwrap();
        (Self { session }, given)
    }

    /// What the server says next, pings left out; they are answered when `alive`.
    fn hears(&mut self, alive: bool) -> Option<ToNode> {
        loop {
            match self.session.reader.receive().ok().flatten()? {
                ToNode::Ping(n) if alive => self.session.writer.send(&ToServer::Pong(n)).unwrap(),
                ToNode::Ping(_) => {}
                other => return Some(other),
            }
        }
    }
}

#[test]
fn a_second_claim_to_a_mac_is_refused_while_the_first_answers_and_replaces_it_when_silent() {
    let d = Deployment::local(5, 1, 0.0, &["--dead-after", "2s"]);
    let text = std::fs::read_to_string(d.shared()).unwrap();
    let token: Token = text.lines().find(|l| l.len() == 64).unwrap().parse().unwrap();
    let token = token.credential();
    let (mut first, session) = Player::register(&d, &token);
    assert!(matches!(first.hears(true), Some(ToNode::Order { .. })));
    let falls_silent = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&falls_silent);
    let answering = std::thread::spawn(move || {
        while !flag.load(Ordering::SeqCst) {
            // One comes each second.
            match first.session.reader.receive().unwrap() {
                Some(ToNode::Ping(n)) => first.session.writer.send(&ToServer::Pong(n)).unwrap(),
                other => panic!("{other:?}"),
            }
        }
        first
    });
    let (mut second, _) = Player::register(&d, &token);
    match second.hears(true) {
        Some(ToNode::Refused(why)) => {
            assert!(why.contains("here already") && why.contains("answers"), "{why}");
        }
        other => panic!("{other:?}"),
    }
    d.server.wait_for("ALARM: a second node claims to be ");
    // From here on the first says nothing, but its connection stands.
    falls_silent.store(true, Ordering::SeqCst);
    let mut first = answering.join().unwrap();
    let start = Instant::now();
    let (mut third, _) = Player::register(&d, &token);
    assert!(matches!(third.hears(true), Some(ToNode::Order { .. })), "{}", d.server.text());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    d.server.wait_for("takes its place");
    assert!(first.hears(false).is_none(), "it is cut off");
    // It cannot come back beside the new one either: its session is good, but the place is taken.
    let stay = std::thread::spawn(move || third.hears(true));
    let (mut again, _) = Player::register(&d, &session);
    assert!(matches!(again.hears(true), Some(ToNode::Refused(_))), "{}", d.server.text());
    drop(d);
    assert!(stay.join().unwrap().is_none());
}

/// Opens connections as fast as it can for so many seconds, from several addresses, and says nothing, or garbage.
const FLOOD: &str = "
import socket, sys, time
host, seconds = sys.argv[1], float(sys.argv[2])
ports, froms = [int(p) for p in sys.argv[3].split(',')], sys.argv[4].split(',')
end, made, kept = time.time() + seconds, 0, []
what = [b'', b'GET / HTTP/1.0\\r\\n\\r\\n', b'KADATA03' + bytes(16), b'KACTRL03' + bytes(100)]
while time.time() < end:
    for port in ports:
        s = socket.socket()
        s.settimeout(0.2)
        try:
            s.bind((froms[made % len(froms)], 0))
            s.connect((host, port))
            s.send(what[made // 7 % 4])
        except OSError: pass
        kept.append(s)
        made += 1
    while len(kept) > 400: kept.pop(0).close()
print(made)
";

#[test]
fn a_flood_of_strangers_stops_nobody_and_fills_neither_log_nor_memory() {
    if !possible() {
        return;
    }
    let net = Net::new();
    net.bridge("br0");
    for n in 0..=4 {
        net.host(n);
        net.cable(n, "e0", "br0", &[&format!("10.77.0.{}/16", n + 1)]);
    }
    let froms: Vec<String> = (1..=100).map(|n| format!("10.77.9.{n}")).collect();
    let id = &net.id;
    for from in &froms {
        sh(&format!("ip -n {id}n4 addr add {from}/16 dev e0"));
    }
    let mut d =
        Deployment::start(net.inside(0, &server_program()), "10.77.0.1:5757", 3, 24, 0.15, &["--arity", "1"]);
    let token = d.shared();
    d.node(net.inside(1, &agent_program()), "n1", "10.77.0.1:5757", &token);
    let flood = |host: usize, port: &str, seconds: f32| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &format!("{id}n4"), "python3", "-c", FLOOD]);
        command.args([&format!("10.77.0.{}", host + 1), &seconds.to_string(), port, &froms.join(",")]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    };
    let ports = |n: usize| {
        sh(&format!("ip netns exec {id}n{n} ss -Hltn | awk '{{print $4}}' | sed 's/.*://' | sort -u"))
            .trim()
            .to_owned()
    };
    // The others register while the flood is on, and every link of the chain is made.
    let mut floods = vec![flood(0, "5757", 6.0), flood(1, &ports(1), 6.0)];
    std::thread::sleep(Duration::from_millis(700));
    d.node(net.inside(2, &agent_program()), "n2", "10.77.0.1:5757", &token);
    d.node(net.inside(3, &agent_program()), "n3", "10.77.0.1:5757", &token);
    let mut most = 0;
    while floods.iter_mut().any(|f| f.try_wait().unwrap().is_none()) {
        most = most.max(d.server.threads()).max(d.nodes[0].threads());
        std::thread::sleep(Duration::from_millis(20));
    }
    let made: u64 = floods
        .into_iter()
        .map(|f| {
            String::from_utf8(f.wait_with_output().unwrap().stdout).unwrap().trim().parse::<u64>().unwrap()
        })
        .sum();
    assert!(made > 1000, "{made}");
    d.all_done(&["n1", "n2", "n3"]);
    assert!(most < 600, "{most} threads");
    for program in [&d.server, &d.nodes[0]] {
        let text = program.text();
        let lines =
            text.lines().filter(|line| line.contains("is dropped") || line.contains("is refused")).count();
        assert!((1..50).contains(&lines), "{lines} lines of {made} connections:\n{text}");
    }
    let text = d.server.text();
    assert!(text.contains("came or stood there while too many did"), "{text}");
    assert!(d.nodes[0].text().contains("at this node's port "), "{}", d.nodes[0].text());
    println!("{made} connections, at most {most} threads");
}

#[test]
fn a_cluster_that_speaks_ipv6_alone_is_deployed() {
    if !possible() {
        return;
    }
    let net = Net::new();
    net.bridge("br0");
    for n in 0..=3 {
        net.host(n);
        net.cable(n, "e0", "br0", &[&format!("fd77::{}/64", n + 1)]);
        let id = &net.id;
        assert_eq!(sh(&format!("ip -n {id}n{n} -4 -o addr show dev e0")).trim(), "");
    }
    let mut d = Deployment::start(net.inside(0, &server_program()), "[fd77::1]:5757", 3, 8, 0.0, &[]);
    let token = d.shared();
    for n in 1..=3 {
        d.node(net.inside(n, &agent_program()), &format!("n{n}"), "[fd77::1]:5757", &token);
    }
    d.all_done(&["n1", "n2", "n3"]);
    assert!(d.server.text().contains("fd77::2"), "{}", d.server.text());
}

#[test]
fn a_node_on_the_server_s_own_host_whose_name_leads_to_loopback_feeds_others() {
    if !possible() {
        return;
    }
    let net = Net::new();
    net.bridge("br0");
    for n in 0..=1 {
        net.host(n);
        net.cable(n, "e0", "br0", &[&format!("10.78.0.{}/24", n + 1)]);
    }
    let mut d = Deployment::start(
        net.inside(0, &server_program()),
        "0.0.0.0:5757",
        2,
        8,
        0.0,
        &["--order", "arrival"],
    );
    let token = d.shared();
    let hosts = d.folder.path().join("hosts");
    // As Debian's installer writes it.
    std::fs::write(&hosts, "127.0.0.1 localhost\n127.0.1.1 golden.example.com golden\n").unwrap();
    let mut local = net.inside(0, Path::new("unshare"));
    let script = format!("mount --bind {} /etc/hosts; exec \"$@\"", hosts.display());
    local.args(["-m", "sh", "-ec", &script, "sh"]).arg(agent_program());
    d.node(local, "local", "golden:5757", &token);
    assert!(d.server.text().contains("local registered from 127.0."), "{}", d.everything());
    // It is fed by the one above, which the server knows by a loopback address only.
    d.node(net.inside(1, &agent_program()), "far", "10.78.0.1:5757", &token);
    d.all_done(&["local", "far"]);
    assert!(!d.server.text().contains("lost its parent"), "{}", d.everything());
}

#[test]
fn nodes_with_several_networks_find_each_other_over_the_one_that_they_share() {
    if !possible() {
        return;
    }
    let net = Net::new();
    for bridge in ["bra", "brb"] {
        net.bridge(bridge);
    }
    (0..=2).for_each(|n| net.host(n));
    // The server is on both; node 1 too, and registers over the one that node 2 does not have.
    net.cable(0, "e0", "bra", &["10.81.0.1/24"]);
    net.cable(0, "e1", "brb", &["10.82.0.1/24"]);
    net.cable(1, "e0", "bra", &["10.81.0.2/24"]);
    net.cable(1, "e1", "brb", &["10.82.0.2/24", "169.254.7.7/16"]);
    net.cable(2, "e1", "brb", &["10.82.0.3/24"]);
    let id = &net.id;
    // What node 2 sends to the other network vanishes without a word.
    sh(&format!("ip -n {id}n2 route add default via 10.82.0.99"));
    let mut d = Deployment::start(
        net.inside(0, &server_program()),
        "0.0.0.0:5757",
        2,
        8,
        0.0,
        &["--order", "arrival"],
    );
    let token = d.shared();
    d.node(net.inside(1, &agent_program()), "n1", "10.81.0.1:5757", &token);
    d.node(net.inside(2, &agent_program()), "n2", "10.82.0.1:5757", &token);
    d.all_done(&["n1", "n2"]);
    assert!(!d.server.text().contains("lost its parent"), "{}", d.everything());
}

#[test]
fn two_deployments_side_by_side_do_not_mix() {
    let mut a = Deployment::local(2, 12, 0.1, &[]);
    let mut b = Deployment::local(2, 12, 0.1, &[]);
    assert!(a.port != b.port && a.sum != b.sum);
    // A node that was sent to the wrong server, by its address or by a token.
    for (key, token, server) in [(&a.key, a.shared(), b.port), (&b.key, a.shared(), b.port)] {
        let mut command = agent();
        command.args(["receive", "--server", &format!("127.0.0.1:{server}"), "--key", key, "--token-file"]);
        command.arg(token).arg("--discard");
        assert_eq!(Program::start(command).exit(), 1);
    }
    for name in ["n0", "n1"] {
        for d in [&mut a, &mut b] {
            let (server, token) = (format!("127.0.0.1:{}", d.port), d.shared());
            d.node(agent(), name, &server, &token);
        }
    }
    a.all_done(&["n0", "n1"]);
    b.all_done(&["n0", "n1"]);
}
