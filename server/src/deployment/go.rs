//! `ka-server go`: the operator starts the waiting wave now. A deployment listens on a Unix socket beside its state file, for
//! root (and its own user) only; one question, one answer, both a line.

use anyhow::{Context, Result, bail};
use argh::FromArgs;
use ka_cli::exit::Exit;
use rustix::net::sockopt::socket_peercred;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// The question.
const GO: &str = "go";
/// How long one end waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest line, in bytes.
const LINE: u64 = 1000;

/// start the waiting wave of a running deployment now
#[derive(FromArgs, argh::ArgsInfo, Debug)]
#[argh(subcommand, name = "go")]
pub struct GoArgs {
    /// the deployment's --state (default /var/lib/ka/nodes.json)
    #[argh(option, arg_name = "FILE", default = "PathBuf::from(\"/var/lib/ka/nodes.json\")")]
    pub state: PathBuf,
}

/// Where the deployment with this state file listens.
#[must_use]
pub fn socket_path(state: &Path) -> PathBuf {
    state.with_extension("sock")
}

/// Runs `ka-server go`.
///
/// # Errors
/// When no deployment waits, or it does not start.
pub fn run(args: &GoArgs) -> Result<Exit> {
    println!("{}", ask(&socket_path(&args.state))?);
    Ok(Exit::Done)
}

/// Says go to the deployment that listens there, and returns what it does.
fn ask(path: &Path) -> Result<String> {
    let asking = || format!("asking the deployment at {}", path.display());
    let stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        // A file that nobody listens on was left by a deployment that was killed.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            bail!(
                "no deployment waits: nobody listens at {} (its --state must be given here too)",
                path.display()
            )
        }
        Err(e) => return Err(e).with_context(asking),
    };
    stream.set_read_timeout(Some(2 * PATIENCE)).with_context(asking)?;
    (&stream).write_all(format!("{GO}\n").as_bytes()).with_context(asking)?;
    let mut answer = String::new();
    (&stream).take(LINE).read_to_string(&mut answer).with_context(asking)?;
    match answer.trim().split_once(' ') {
        Some(("yes", text)) => Ok(text.to_owned()),
        Some(("no", why)) => bail!("nothing was started: {why}"),
        _ => bail!("{}: it did not answer", asking()),
    }
}

/// The operator's word, and where its answer goes.
#[derive(Debug)]
pub struct Request(SyncSender<Result<String, String>>);

impl Request {
    /// Answers it.
    pub fn answer(self, answer: Result<String, String>) {
        // Whoever asked may have gone away.
        let _ = self.0.try_send(answer);
    }
}

/// Takes the operator's word until it is dropped.
#[derive(Debug)]
pub struct Listener {
    path: PathBuf,
    requests: Receiver<Request>,
    stopped: Arc<AtomicBool>,
}

impl Listener {
    /// Listens for a deployment with this state file. What a dead one left there is replaced.
    ///
    /// # Errors
    /// When the socket cannot be made, or another deployment listens there.
    pub fn start(state: &Path) -> Result<Self> {
        let path = socket_path(state);
        let making = || format!("making {}", path.display());
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(making)?;
        }
        let listener = match UnixListener::bind(&path) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                if UnixStream::connect(&path).is_ok() {
                    bail!("another deployment listens at {}", path.display());
                }
                std::fs::remove_file(&path).with_context(making)?;
                UnixListener::bind(&path)
            }
            other => other,
        }
        .with_context(making)?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).with_context(making)?;
        listener.set_nonblocking(true).with_context(making)?;
        let (sender, requests) = sync_channel(4);
        let stopped = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&stopped);
        std::thread::Builder::new()
            .name("go".into())
            .spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    match listener.accept() {
                        Ok((stream, _)) => {
                            if let Err(e) = serve(&stream, &sender) {
                                log::warn!("a word to the deployment was not taken: {e:#}");
                            }
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(50)),
                    }
                }
            })
            .with_context(making)?;
        Ok(Self { path, requests, stopped })
    }

    /// What the operator wants, if anything.
    pub fn next(&self) -> Option<Request> {
        self.requests.try_recv().ok()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // It may have been removed by hand.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One question; one at a time, each with its limit.
fn serve(stream: &UnixStream, requests: &SyncSender<Request>) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // The file's mode keeps others out; this also holds while the mode is being set.
    let user = socket_peercred(stream).context("asking who is there")?.uid;
    if !user.is_root() && user != rustix::process::geteuid() {
        bail!("user {} may not", user.as_raw());
    }
    let mut line = String::new();
    BufReader::new(stream.take(LINE)).read_line(&mut line).context("reading the question")?;
    let answer = if line.trim() == GO {
        let (sender, answer) = sync_channel(1);
        requests.try_send(Request(sender)).context("passing it on")?;
        answer.recv_timeout(PATIENCE).unwrap_or_else(|_| Err("the deployment does not answer".to_owned()))
    } else {
        Err("that is no question that this deployment knows".to_owned())
    };
    let answer = answer.map_or_else(|why| format!("no {why}\n"), |text| format!("yes {text}\n"));
    let mut stream = stream;
    stream.write_all(answer.as_bytes()).context("answering")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answering(listener: Listener, answer: Result<String, String>) -> std::thread::JoinHandle<Listener> {
        std::thread::spawn(move || {
            loop {
                if let Some(request) = listener.next() {
                    request.answer(answer);
                    return listener;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        })
    }

    #[test]
    fn a_word_is_passed_on_and_answered_and_the_socket_is_private_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("sub/nodes.json");
        let path = socket_path(&state);
        let listener = Listener::start(&state).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(Listener::start(&state).unwrap_err().to_string().contains("another deployment"));
        // The look at who listens there was a connection without a question.
        let serving = answering(listener, Ok("wave 1 begins with 2 nodes".to_owned()));
        assert_eq!(ask(&path).unwrap(), "wave 1 begins with 2 nodes");
        let serving = answering(serving.join().unwrap(), Err("no node is ready".to_owned()));
        assert_eq!(ask(&path).unwrap_err().to_string(), "nothing was started: no node is ready");
        drop(serving.join().unwrap());
        assert!(!path.exists());
        let error = ask(&path).unwrap_err().to_string();
        assert!(error.starts_with("no deployment waits"), "{error}");
    }

    #[test]
    fn what_a_killed_deployment_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("nodes.json");
        drop(UnixListener::bind(socket_path(&state)).unwrap());
        assert!(ask(&socket_path(&state)).unwrap_err().to_string().starts_with("no deployment waits"));
        let listener = Listener::start(&state).unwrap();
        let serving = answering(listener, Ok("it begins".to_owned()));
        assert_eq!(ask(&socket_path(&state)).unwrap(), "it begins");
        serving.join().unwrap();
    }
}
