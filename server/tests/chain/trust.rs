//! Who is let in and who is trusted, with the real programs: wrong keys, wrong and spent tokens, a listener on the way, slow
//! and silent connections, and what others on the machine can see.

use super::{Deployment, Running, make_token, noise, server_program};
use ka_archive::testing::compare_with_rsync;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A deployment of one small file.
fn small(nodes: usize) -> (tempfile::TempDir, Deployment) {
    let golden = tempfile::tempdir_in("/var/tmp").unwrap();
    noise(golden.path(), 1);
    let deployment = Deployment::start(nodes, &["--root", golden.path().to_str().unwrap()]);
    (golden, deployment)
}

/// Runs an agent that is to be refused; what it says.
fn refused(d: &Deployment, key: &str, token: &Path) -> String {
    let target = d.folder.path().join("refused");
    std::fs::create_dir_all(&target).unwrap();
    let mut command = d.command("refused", key, token);
    command.arg("--target").arg(&target);
    let mut agent = Running::start(command);
    assert_eq!(agent.exit(), 1, "{}", agent.text());
    assert_eq!(std::fs::read_dir(&target).unwrap().count(), 0);
    agent.text()
}

#[test]
fn only_the_right_key_and_the_right_token_make_a_node() {
    let (golden, mut d) = small(2);
    let token = d.folder.path().join("token");
    // A key that is not this server's.
    let other = "11".repeat(32);
    let text = refused(&d, &other, &token);
    assert!(text.contains(&other) && text.contains(&d.key) && text.contains("trusts only"), "{text}");
    // A token that nobody made, one that has expired, and one of another server.
    let made_up = d.folder.path().join("made-up");
    std::fs::write(&made_up, "22".repeat(32)).unwrap();
    let expired = make_token(d.folder.path(), "expired", &["--expires", "0s"]);
    let elsewhere = tempfile::tempdir_in("/var/tmp").unwrap();
    let foreign = make_token(elsewhere.path(), "foreign", &["--shared"]);
    for token in [&made_up, &expired, &foreign] {
        let text = refused(&d, &d.key, token);
        assert!(text.contains("unknown there, spent, or expired"), "{text}");
    }
    // A token for one node lets one node in.
    let single = make_token(d.folder.path(), "single", &[]);
    let target = d.target(0);
    std::fs::create_dir_all(&target).unwrap();
    let mut command = d.command("n0", &d.key, &single);
    command.arg("--target").arg(&target);
    let agent = Running::start(command);
    d.server.wait_line("n0 is ready");
    d.agents.push(agent);
    let text = refused(&d, &d.key, &single);
    assert!(text.contains("unknown there, spent, or expired"), "{text}");
    // And nobody was disturbed.
    d.receiver();
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0, 0][..]), "{}", d.everything());
    for n in 0..2 {
        assert!(compare_with_rsync(golden.path(), &d.target(n), &[]).unwrap().is_empty());
    }
    let text = d.server.text();
    for line in [
        "its token is unknown",
        "its token has expired",
        "its token is spent",
        "made for another server's key",
        "4 nodes were refused because of their token",
        "1 handshakes did not open and were refused",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

/// Stands between nodes and server, passes everything on, and keeps what the first connection said.
fn listener_on_the_way(server: u16) -> (u16, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&heard);
    std::thread::spawn(move || {
        for (number, node) in listener.incoming().enumerate() {
            let node = node.unwrap();
            let server = TcpStream::connect(("127.0.0.1", server)).unwrap();
            let kept = (number == 0).then(|| Arc::clone(&kept));
            pass(node.try_clone().unwrap(), server.try_clone().unwrap(), kept);
            pass(server, node, None);
        }
    });
    (port, heard)
}

fn pass(mut from: TcpStream, mut to: TcpStream, kept: Option<Arc<Mutex<Vec<u8>>>>) {
    std::thread::spawn(move || {
        let mut bytes = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            if let Some(kept) = &kept {
                kept.lock().unwrap().extend(&bytes[..n]);
            }
            if to.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        // Either may be closed already.
        let _ = to.shutdown(Shutdown::Write);
    });
}

#[test]
fn what_was_heard_on_the_way_cannot_be_used_again() {
    let (golden, mut d) = small(2);
    let server = d.port;
    let (port, heard) = listener_on_the_way(server);
    d.port = port;
    d.receiver();
    d.port = server;
    let heard = heard.lock().unwrap().clone();
    assert!(heard.starts_with(b"KACTRL03"), "a node spoke");
    let mut replay = TcpStream::connect(("127.0.0.1", server)).unwrap();
    replay.write_all(&heard).unwrap();
    // The handshake of a shared token is answered; what follows does not open and the server closes.
    replay.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut answer = Vec::new();
    // Unread bytes of ours make the kernel reset the connection; that is an end too.
    let _ = replay.read_to_end(&mut answer);
    assert!(answer.len() < 200, "{} bytes", answer.len());
    d.server.wait_line("it does not open");
    d.receiver();
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0, 0][..]), "{}", d.everything());
    assert!(compare_with_rsync(golden.path(), &d.target(0), &[]).unwrap().is_empty());
}

#[test]
fn a_connection_that_dawdles_is_closed_in_time() {
    let (_golden, mut d) = small(1);
    // Before the connection: the server's clock runs as soon as it has it, however late this thread gets on.
    let start = Instant::now();
    let mut slow = TcpStream::connect(("127.0.0.1", d.port)).unwrap();
    let hello = [&b"KACTRL03"[..], &[7; 16], &[48, 0], &[9; 48]].concat();
    let mut bytes = hello.iter();
    slow.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let closed = loop {
        // A byte now and then.
        let written = bytes.next().map_or(Ok(()), |b| slow.write_all(&[*b]));
        let mut answer = [0; 64];
        match slow.read(&mut answer) {
            _ if written.is_err() => break start.elapsed(),
            Ok(0) => break start.elapsed(),
            Ok(n) => panic!("the server said {n} bytes"),
            // An interrupted read says nothing about the connection.
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => break start.elapsed(),
        }
        assert!(start.elapsed() < Duration::from_secs(20), "it is never closed");
    };
    assert!((5..7).contains(&closed.as_secs()), "{closed:?}: {}", d.everything());
    d.receiver();
    assert_eq!(d.exits(), (0, vec![0]), "{}", d.everything());
}

/// Every word with which a process was started.
fn argv(pid: u32) -> String {
    String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap()).into_owned()
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

#[test]
fn nothing_secret_shows_in_argv_logs_or_files_of_others() {
    let mut d = Deployment::start(1, &["--source-cmd", "sleep 2; tar -c -T /dev/null"]);
    let folder = d.folder.path().to_owned();
    let word = |name: &str| {
        let text = std::fs::read_to_string(folder.join(name)).unwrap();
        text.lines().find(|l| l.len() == 64).unwrap().to_owned()
    };
    let mut secrets = vec![word("token")];
    // A machine where `ka-server init` was run has its key elsewhere.
    if folder.join("server.key").exists() {
        secrets.push(word("server.key"));
    }
    d.receiver();
    d.server.wait_line("starting with 1 nodes");
    for pid in [d.server.child.id(), d.agents[0].child.id()] {
        let words = argv(pid);
        assert!(words.contains("ka-"), "{words}");
        assert!(secrets.iter().all(|s| !words.contains(s)), "{words}");
    }
    let (server, agents) = d.exits();
    assert_eq!((server, &agents[..]), (0, &[0][..]), "{}", d.everything());
    let text = d.everything();
    assert!(secrets.iter().all(|s| !text.contains(s)), "{text}");
    let mut found = Vec::new();
    files(&folder, &mut found);
    let mut holders = Vec::new();
    for path in found {
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        if secrets.iter().any(|s| text.contains(s)) {
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{}", path.display());
            holders.push(path.file_name().unwrap().to_str().unwrap().to_owned());
        }
    }
    holders.sort();
    assert_eq!(holders, ["server.key", "token", "tokens.json"][3 - secrets.len() - 1..]);
}

#[test]
fn init_makes_a_key_that_stays() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ka");
    let init = |options: &[&str]| {
        let output =
            Command::new(server_program()).arg("init").arg("--dir").arg(&dir).args(options).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap().trim().to_owned())
    };
    let (code, first) = init(&[]);
    assert_eq!((code, first.len()), (0, 64));
    assert_eq!(std::fs::read_to_string(dir.join("server.pub")).unwrap().trim(), first);
    let mode = std::fs::metadata(dir.join("server.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(dir.join("server.toml").exists());
    assert_eq!(init(&[]).0, 5, "refused for safety");
    let (code, second) = init(&["--force"]);
    assert!(code == 0 && second != first);
}
