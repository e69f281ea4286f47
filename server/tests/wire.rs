//! What somebody who listens on the wire learns: a capture of every packet of a deployment holds nothing of the golden tree.
//! Needs root, iproute2 and tcpdump.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

mod lab;
mod programs;

use lab::{Lab, Program, possible, sh};
use programs::{make_token, server_program};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// In a file's content, in a file's name, in an extended attribute.
const MARKERS: [&str; 3] = ["ka-marker-content-7d1e", "ka-marker-name-52c9", "ka-marker-xattr-e04b"];
/// Files in the tree, and how often the marker stands in each: it must not be missed because packets cut it.
const FILES: usize = 200;
const TIMES: usize = 2_000;

/// Somebody who takes what comes in clear.
const RECEIVE: &str = "import socket, sys\n\
    s = socket.create_server(('10.77.0.2', 7000))\n\
    print('listening', file=sys.stderr, flush=True)\n\
    c = s.accept()[0]\n\
    while c.recv(1 << 20): pass\n\
    print('received', file=sys.stderr, flush=True)\n";
/// Somebody who sends its standard input in clear.
const SEND: &str = "import shutil, socket, sys; s = socket.create_connection(('10.77.0.2', 7000)); \
    f = s.makefile('wb'); shutil.copyfileobj(sys.stdin.buffer, f); f.close()";

fn has_tcpdump() -> bool {
    let there = Path::new("/usr/bin/tcpdump").exists() || Path::new("/usr/sbin/tcpdump").exists();
    if !there {
        println!("SKIPPED: needs tcpdump");
    }
    there
}

fn golden_tree(lab: &Lab) -> PathBuf {
    let tree = lab.folder.path().join("golden");
    std::fs::create_dir(&tree).unwrap();
    let content = MARKERS[0].repeat(TIMES);
    for n in 0..FILES {
        std::fs::write(tree.join(format!("{}-{n}", MARKERS[1])), format!("{n}{content}")).unwrap();
    }
    sh(&format!("cd {}; setfattr -n user.ka -v {} *", tree.display(), MARKERS[2]));
    tree
}

/// Every packet on every port of the bridge, while this lives.
struct Capture {
    child: Child,
    file: PathBuf,
    notes: PathBuf,
}

impl Capture {
    fn start(lab: &Lab, name: &str) -> Self {
        let file = lab.folder.path().join(format!("{name}.pcap"));
        let notes = file.with_extension("notes");
        let child = Command::new("ip")
            .args(["netns", "exec", &format!("{}b", lab.id), "tcpdump", "-i", "any", "-n", "-U"])
            // Whole packets, and room for all that come while the disk is busy (KiB).
            .args(["-s", "0", "-B", "262144", "-w", "-"])
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&file).unwrap())
            .stderr(std::fs::File::create(&notes).unwrap())
            .spawn()
            .unwrap();
        let capture = Self { child, file, notes };
        let end = Instant::now() + Duration::from_secs(10);
        while !capture.notes().contains("listening on") {
            assert!(Instant::now() < end, "tcpdump does not listen: {}", capture.notes());
            std::thread::sleep(Duration::from_millis(20));
        }
        capture
    }

    fn notes(&self) -> String {
        std::fs::read_to_string(&self.notes).unwrap()
    }

    /// Everything that was captured.
    fn finish(mut self) -> Vec<u8> {
        // The last packets are on their way to tcpdump.
        std::thread::sleep(Duration::from_millis(500));
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        self.child.wait().unwrap();
        let notes = self.notes();
        assert!(notes.contains("\n0 packets dropped by kernel"), "the capture is not whole: {notes}");
        std::fs::read(&self.file).unwrap()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How often each marker stands in the bytes.
fn found(bytes: &[u8]) -> [usize; 3] {
    MARKERS.map(|marker| {
        let marker = marker.as_bytes();
        let mut count = 0;
        let mut rest = bytes;
        while let Some(at) = rest.iter().position(|b| *b == marker[0]) {
            rest = &rest[at..];
            count += usize::from(rest.starts_with(marker));
            rest = &rest[1..];
        }
        count
    })
}

#[test]
fn a_capture_of_a_deployment_holds_nothing_of_the_golden_tree() {
    if !possible() || !has_tcpdump() {
        return;
    }
    let mut lab = Lab::network(2);
    let tree = golden_tree(&lab);
    let size = FILES * TIMES * MARKERS[0].len();

    // The same tree in clear, to see that the capture sees: the wire from the server to a node, and nothing else.
    let capture = Capture::start(&lab, "clear");
    let mut receiving = lab.inside(1, Path::new("python3"));
    receiving.args(["-c", RECEIVE]);
    let receiving = Program::start(receiving);
    receiving.wait_for("listening");
    sh(&format!(
        "tar -C {} --xattrs --format=posix -c . | ip netns exec {}n0 python3 -c \"{SEND}\"",
        tree.display(),
        lab.id
    ));
    receiving.wait_for("received");
    let bytes = capture.finish();
    let seen = found(&bytes);
    assert!(bytes.len() >= size, "{} of {size} bytes were captured", bytes.len());
    assert!(seen[0] > FILES * TIMES / 2 && seen[1] > FILES / 2 && seen[2] > FILES / 2, "{seen:?}");

    // Not compressed: only the sealing hides it.
    let capture = Capture::start(&lab, "sealed");
    let layout = lab.folder.path().join("layout.toml");
    std::fs::write(
        &layout,
        "version = 1\n[[disk]]\nname = \"system\"\ntable = \"gpt\"\n[[partition]]\ntype = \"linux\"\nsize = \"fill\"\n\
         format = { fs = \"ext4\" }\nmount = { path = \"/\" }\n",
    )
    .unwrap();
    make_token(lab.folder.path(), "token", &["--shared"]);
    let mut server = lab.inside(0, &server_program());
    server.args(["deploy", "--listen", "10.77.0.1:5757", "--nodes", "2", "--compress", "off", "--root"]);
    server.arg(&tree).arg("--layout").arg(&layout).arg("--log-dir").arg(lab.folder.path().join("log"));
    server.arg("--state").arg(lab.state());
    let server = Program::start(server);
    server.wait_for("listening on TCP port");
    server.wait_for("this server's key is ");
    lab.server = Some(server);
    for n in 1..=2 {
        let sink = format!("cat > {}", lab.folder.path().join(format!("received{n}")).display());
        lab.start_node(n, Some(&sink));
    }
    let (server, nodes) = lab.ends(&[]);
    assert_eq!((server, &nodes[..]), (0, &[0, 0][..]), "{}", lab.everything());
    let bytes = capture.finish();
    for n in 1..=2 {
        let received = std::fs::read(lab.folder.path().join(format!("received{n}"))).unwrap();
        let whole = found(&received);
        assert!(whole[0] == FILES * TIMES && whole[1] >= FILES && whole[2] >= FILES, "node {n}: {whole:?}");
    }
    // Both hops.
    assert!(bytes.len() >= 2 * size, "{} of {} bytes were captured", bytes.len(), 2 * size);
    assert_eq!(found(&bytes), [0, 0, 0]);
}
