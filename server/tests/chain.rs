//! Deployments with the real programs on this machine: `ka-server deploy` and several `ka-agent receive`, over loopback.
//! What comes out is compared by rsync, find and getfattr, not by our own code.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

#[path = "chain/many.rs"]
mod many;
mod programs;
#[path = "chain/raw.rs"]
mod raw;
#[path = "chain/trust.rs"]
mod trust;
#[path = "chain/verify.rs"]
mod verify;

use ka_archive::testing::{SOCKET, compare_with_rsync, difference, hard_cases, listing};
use programs::{agent_program, key_in, make_token, server_program};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// No test here may take longer.
const LIMIT: Duration = Duration::from_secs(240);

fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: not root");
    }
    root
}

/// A program under test: its standard error is kept, and it is killed when the test ends.
struct Running {
    child: Child,
    text: Arc<Mutex<String>>,
    lines: Receiver<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let text = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = channel();
        let stderr = child.stderr.take().unwrap();
        let kept = Arc::clone(&text);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.lock().unwrap().push_str(&(line.clone() + "\n"));
                let _ = sender.send(line);
            }
        });
        Self { child, text, lines }
    }

    fn wait_line(&self, pattern: &str) -> String {
        let end = Instant::now() + LIMIT;
        while let Ok(line) = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            if line.contains(pattern) {
                return line;
            }
        }
        panic!("`{pattern}` never came; this did:\n{}", self.text());
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    fn exit(&mut self) -> i32 {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // The reading thread may still have a line.
                std::thread::sleep(Duration::from_millis(50));
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < end, "no end; it said:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Deployment {
    server: Running,
    port: u16,
    /// The server's key, as it shows it.
    key: String,
    agents: Vec<Running>,
    folder: tempfile::TempDir,
}

impl Deployment {
    /// A server for `nodes` nodes with these further options.
    fn start(nodes: usize, options: &[&str]) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let layout = layout(folder.path());
        Self::start_in(folder, nodes, &layout, options)
    }

    /// The same with this layout.
    fn start_with(nodes: usize, layout: &Path, options: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir_in("/var/tmp").unwrap(), nodes, layout, options)
    }

    fn start_in(folder: tempfile::TempDir, nodes: usize, layout: &Path, options: &[&str]) -> Self {
        make_token(folder.path(), "token", &["--shared"]);
        let mut command = Command::new(server_program());
        command.args(["deploy", "--listen", "127.0.0.1:0", "--nodes", &nodes.to_string()]);
        command.arg("--layout").arg(layout);
        command.arg("--log-dir").arg(folder.path().join("log"));
        command.arg("--state").arg(folder.path().join("nodes.json"));
        command.args(options);
        let server = Running::start(command);
        let line = server.wait_line("listening on TCP port");
        let port = line.split("port ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        let key = key_in(&server.wait_line("this server's key is"));
        Self { server, port, key, agents: Vec::new(), folder }
    }

    fn target(&self, n: usize) -> PathBuf {
        self.folder.path().join(format!("target{n}"))
    }

    /// Starts agent `n` (from 0) that unpacks into [`Deployment::target`].
    fn receiver(&mut self) {
        let target = self.target(self.agents.len());
        std::fs::create_dir_all(&target).unwrap();
        self.agent(&["--target", target.to_str().unwrap()]);
    }

    /// The command of an agent with this name, key and token.
    fn command(&self, name: &str, key: &str, token_file: &Path) -> Command {
        let mut command = Command::new(agent_program());
        let server = format!("127.0.0.1:{}", self.port);
        command.args(["receive", "--server", &server, "--name", name, "--key", key, "--token-file"]);
        command.arg(token_file);
        command
    }

    fn agent(&mut self, options: &[&str]) {
        let name = format!("n{}", self.agents.len());
        let mut command = self.command(&name, &self.key, &self.folder.path().join("token"));
        command.args(options);
        let agent = Running::start(command);
        // One after the other, so that they stand in the chain in this order (they share one address).
        self.server.wait_line(&format!("{name} is ready"));
        self.agents.push(agent);
    }

    fn exits(&mut self) -> (i32, Vec<i32>) {
        let agents = self.agents.iter_mut().map(Running::exit).collect();
        (self.server.exit(), agents)
    }

    fn everything(&self) -> String {
        let mut text = format!("--- server\n{}", self.server.text());
        for (n, agent) in self.agents.iter().enumerate() {
            text.push_str(&format!("--- agent {n}\n{}", agent.text()));
        }
        text
    }
}

fn layout(folder: &Path) -> PathBuf {
    let path = folder.join("layout.toml");
    let text = "version = 1\n[[disk]]\nname = \"system\"\ntable = \"gpt\"\n[[partition]]\ntype = \"linux\"\nsize = \"fill\"\n\
                format = { fs = \"ext4\" }\nmount = { path = \"/\" }\n";
    std::fs::write(&path, text).unwrap();
    path
}

/// A tree of `mib` MiB that does not compress.
fn noise(folder: &Path, mib: usize) {
    std::fs::create_dir_all(folder).unwrap();
    let mut random = std::fs::File::open("/dev/urandom").unwrap();
    for n in 0..mib {
        let mut bytes = vec![0; 1 << 20];
        random.read_exact(&mut bytes).unwrap();
        std::fs::write(folder.join(format!("file{n:04}")), bytes).unwrap();
    }
}

#[test]
fn hard_cases_come_out_equal_at_every_node_of_a_chain_of_three() {
    if !root() {
        return;
    }
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    let tree = golden.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    hard_cases(&tree).unwrap();
    let mut d = Deployment::start(3, &["--root", tree.to_str().unwrap()]);
    for _ in 0..3 {
        d.receiver();
    }
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0, 0, 0][..]), "{}", d.everything());
    let expected = listing(&tree).unwrap();
    for n in 0..3 {
        let target = d.target(n);
        let differences = compare_with_rsync(&tree, &target, &[SOCKET]).unwrap();
        assert!(differences.is_empty(), "node {n}: {differences:#?}");
        let differences = difference(&expected, &listing(&target).unwrap());
        assert!(differences.is_empty(), "node {n}: {differences:#?}");
    }
}

#[test]
fn files_that_grow_and_shrink_while_they_are_read_harm_nobody() {
    if !root() {
        return;
    }
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    let tree = golden.path().join("tree");
    noise(&tree.join("quiet"), 8);
    std::fs::create_dir(tree.join("busy")).unwrap();
    for name in ["grows", "shrinks"] {
        std::fs::write(tree.join("busy").join(name), vec![b'x'; 32 << 20]).unwrap();
    }
    std::fs::create_dir(tree.join("zlast")).unwrap();
    std::fs::write(tree.join("zlast/file"), "after the busy ones").unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let busy = std::thread::spawn({
        let (stop, folder) = (Arc::clone(&stop), tree.join("busy"));
        move || {
            let mut grows = std::fs::OpenOptions::new().append(true).open(folder.join("grows")).unwrap();
            let shrinks = std::fs::OpenOptions::new().write(true).open(folder.join("shrinks")).unwrap();
            let mut size = 32 << 20;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) && size > 4096 {
                grows.write_all(&[b'y'; 4096]).unwrap();
                size -= 4096;
                shrinks.set_len(size).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let mut d = Deployment::start(2, &["--root", tree.to_str().unwrap()]);
    d.receiver();
    d.receiver();
    let (server, agents) = d.exits();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    busy.join().unwrap();
    assert_eq!((server, &agents[..]), (0, &[0, 0][..]), "{}", d.everything());
    assert!(d.server.text().contains("changed while they were read: /busy/"), "{}", d.everything());
    for n in 0..2 {
        for part in ["quiet", "zlast"] {
            let differences = compare_with_rsync(&tree.join(part), &d.target(n).join(part), &[]).unwrap();
            assert!(differences.is_empty(), "{differences:?}");
        }
    }
    let differences = compare_with_rsync(&d.target(0), &d.target(1), &[]).unwrap();
    assert!(differences.is_empty(), "both nodes hold the same copy: {differences:?}");
}

#[test]
fn a_tree_of_five_delivers_too_and_strays_disturb_nobody() {
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    noise(&golden.path().join("tree"), 20);
    let tree = golden.path().join("tree");
    let mut d =
        Deployment::start(5, &["--root", tree.to_str().unwrap(), "--arity", "2", "--compress", "off"]);
    let mut strays = Vec::new();
    for garbage in [
        &b""[..],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"KADATA01garbagegarbage!!",
        b"KACTRL01\xff\xff\xff\xff",
        b"KACTRL03\xff\xff\xff\xff",
        &[&b"KACTRL03"[..], &[7; 16], &[48, 0], &[9; 48]].concat(),
    ] {
        let mut stray = TcpStream::connect(("127.0.0.1", d.port)).unwrap();
        stray.write_all(garbage).unwrap();
        strays.push(stray);
    }
    for _ in 0..5 {
        d.receiver();
    }
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0; 5][..]), "{}", d.everything());
    for n in 0..5 {
        assert!(compare_with_rsync(&tree, &d.target(n), &[]).unwrap().is_empty());
    }
    assert!(d.server.text().contains("neither nodes nor children"), "{}", d.everything());
    assert!(d.server.text().contains("1 nodes were refused because of their token"), "{}", d.everything());
}

#[test]
fn a_source_command_that_dies_in_the_middle_fails_everybody_and_says_so() {
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    noise(golden.path(), 12);
    let command = format!("tar -C {} -c . | head -c 7000000; exit 9", golden.path().display());
    let mut d = Deployment::start(3, &["--source-cmd", &command]);
    for _ in 0..3 {
        d.receiver();
    }
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (1, &[1, 1, 1][..]), "{}", d.everything());
    assert!(d.server.text().contains("ended with exit status 9"), "{}", d.everything());
    for agent in &d.agents {
        assert!(agent.text().contains("ended with exit status 9"), "{}", d.everything());
    }
}

#[test]
fn a_stream_cut_at_an_entry_boundary_is_no_success() {
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = golden.path().join("cut.tar");
    noise(&golden.path().join("tree"), 1);
    let status = Command::new("tar")
        .args(["-b1", "-C"])
        .arg(golden.path().join("tree"))
        .arg("-cf")
        .arg(&file)
        .arg(".")
        .status()
        .unwrap();
    assert!(status.success());
    // The two zero blocks that end the archive are cut off.
    let mut bytes = std::fs::read(&file).unwrap();
    assert!(bytes[bytes.len() - 1024..].iter().all(|b| *b == 0));
    bytes.truncate(bytes.len() - 1024);
    std::fs::write(&file, bytes).unwrap();
    let mut d = Deployment::start(1, &["--source-cmd", &format!("cat {}", file.display())]);
    d.receiver();
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (1, &[1][..]), "{}", d.everything());
    assert!(d.server.text().contains("FAILED in step receive"), "{}", d.everything());
}

#[test]
fn a_failing_sink_and_a_full_disk_fail_their_nodes_only() {
    if !root() {
        return;
    }
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    noise(golden.path(), 40);
    let mut d = Deployment::start(4, &["--root", golden.path().to_str().unwrap()]);
    d.receiver();
    d.agent(&["--sink-cmd", "head -c 100000 >/dev/null; exit 6"]);
    let full = d.target(2);
    std::fs::create_dir_all(&full).unwrap();
    let mount = |args: &[&str]| assert!(Command::new(args[0]).args(&args[1..]).status().unwrap().success());
    mount(&["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", full.to_str().unwrap()]);
    d.receiver();
    d.receiver();
    let (server, agents) = d.exits();
    mount(&["umount", full.to_str().unwrap()]);
    assert_eq!((server, &agents[..]), (3, &[0, 1, 1, 0][..]), "{}", d.everything());
    for n in [0, 3] {
        let differences = compare_with_rsync(golden.path(), &d.target(n), &[]).unwrap();
        assert!(differences.is_empty(), "{differences:?}");
    }
    let text = d.server.text();
    assert!(text.contains("exit status 6") && text.contains("No space left on device"), "{}", d.everything());
    assert!(d.agents[2].text().contains("No space left on device"), "{}", d.everything());
}

#[test]
fn a_server_that_dies_in_the_middle_is_a_failure_at_every_node() {
    let mut d = Deployment::start(2, &["--source-cmd", "cat /dev/urandom"]);
    // A little patience: the server does not come back.
    d.agent(&["--sink-cmd", "cat >/dev/null", "--patience", "2s"]);
    d.agent(&["--sink-cmd", "cat >/dev/null", "--patience", "2s"]);
    d.server.wait_line("starting with 2 nodes");
    std::thread::sleep(Duration::from_secs(1));
    d.server.kill();
    for agent in &mut d.agents {
        assert_eq!(agent.exit(), 1, "{}", agent.text());
        let text = agent.text();
        assert!(
            text.contains("the server closed the control connection")
                || text.contains("the control connection failed"),
            "{text}"
        );
    }
}

#[test]
fn a_node_that_is_killed_in_the_middle_ends_in_the_summary_and_nobody_hangs() {
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    noise(golden.path(), 4);
    let command = format!("tar -C {} -c . ; sleep 3", golden.path().display());
    let mut d = Deployment::start(3, &["--source-cmd", &command]);
    for _ in 0..3 {
        d.receiver();
    }
    d.server.wait_line("starting with 3 nodes");
    std::thread::sleep(Duration::from_millis(500));
    d.agents[1].kill();
    let (server, agents) = d.exits();
    assert_eq!((server, agents[0], agents[2]), (3, 0, 0), "{}", d.everything());
    assert!(d.server.text().contains("n1 FAILED"), "{}", d.everything());
    for n in [0, 2] {
        // GNU tar's own format knows no parts of a second, so names and content are compared.
        let same = Command::new("diff").arg("-r").arg(golden.path()).arg(d.target(n)).status().unwrap();
        assert!(same.success(), "node {n}");
    }
}

#[test]
fn an_interrupted_deployment_says_so_with_exit_code_130() {
    let mut d = Deployment::start(2, &["--source-cmd", "cat /dev/urandom"]);
    d.agent(&["--sink-cmd", "cat >/dev/null"]);
    let pid = rustix::process::Pid::from_child(&d.server.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (130, &[1][..]), "{}", d.everything());
    assert!(d.agents[0].text().contains("the operator interrupted"), "{}", d.everything());
}

/// A tar header with exactly this name and link, checksum and all.
fn header(kind: tar::EntryType, name: &str, link: &str, size: u64) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    let raw = header.as_old_mut();
    raw.name[..name.len()].copy_from_slice(name.as_bytes());
    raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    header.as_bytes().to_vec()
}

#[test]
fn entries_that_try_to_leave_the_target_are_refused_and_write_nothing_outside() {
    use tar::EntryType::{Link, Regular, Symlink};
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let outside = folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "untouched").unwrap();
    let file = |name: &str| {
        let mut bytes = header(Regular, name, "", 4);
        bytes.extend_from_slice(b"evil");
        bytes.resize(1024, 0);
        bytes
    };
    let absolute = outside.join("absolute").to_str().unwrap().to_owned();
    let secret = outside.join("secret").to_str().unwrap().to_owned();
    let through: Vec<u8> =
        [header(Symlink, "door", outside.to_str().unwrap(), 0), file("door/through")].concat();
    let linked: Vec<u8> = [header(Link, "hard", &secret, 0), file("hard")].concat();
    let dotted: Vec<u8> = [header(Link, "hard2", "../../outside/secret", 0), file("hard2")].concat();
    for (what, entries) in [
        ("..", file("../../outside/dotdot")),
        ("absolute", file(&absolute)),
        ("symlink", through),
        ("hard link", linked),
        ("hard link by ..", dotted),
    ] {
        let archive = folder.path().join("evil.tar");
        let mut bytes = entries;
        bytes.resize(bytes.len() + 1024, 0);
        std::fs::write(&archive, bytes).unwrap();
        let mut d = Deployment::start(1, &["--source-cmd", &format!("cat {}", archive.display())]);
        d.receiver();
        let (server, agents) = d.exits();
        assert_eq!((server, &agents[..]), (1, &[1][..]), "{what}: {}", d.everything());
        assert!(d.agents[0].text().contains("unpacking into"), "{what}: {}", d.everything());
        assert!(
            d.server.text().contains("FAILED in step receive: unpacking into"),
            "{what}: {}",
            d.everything()
        );
        let left: Vec<_> = std::fs::read_dir(&outside).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["secret"], "{what}");
        assert_eq!(std::fs::read_to_string(outside.join("secret")).unwrap(), "untouched", "{what}");
    }
}
