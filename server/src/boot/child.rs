//! Runs dnsmasq as a child in the foreground: its log becomes ours and is read for events, its end is noticed at once and
//! told with its cause, and it never outlives us.

use super::dhcplog::LogReader;
use super::events::{BootEvent, Events};
use super::pins::Pins;
use anyhow::{Context, Result, anyhow, bail};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long dnsmasq may take to say that it has started.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to end when asked to.
const STOP_LIMIT: Duration = Duration::from_secs(3);
/// The longest line that is read of its log, in bytes.
const LINE_LIMIT: u64 = 4096;
/// How many of its last lines an error quotes.
const LAST_LINES: usize = 4;

/// A dnsmasq that runs.
pub struct Dnsmasq {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    pid: u32,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The child, until it has been waited for.
    child: Option<Child>,
    /// Whether its end is our wish.
    stopping: bool,
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dnsmasq {
    /// Starts `program` with the configuration file `configuration` and waits until it says that it runs. The addresses
    /// that it offers are put into `pins`.
    ///
    /// # Errors
    /// When it cannot be started or ends at once: the last that it said.
    pub fn start(program: &Path, configuration: &Path, pins: Option<Pins>, events: Events) -> Result<Self> {
        let mut command = Command::new(program);
        let mut file = std::ffi::OsString::from("--conf-file=");
        file.push(configuration);
        command.arg("--keep-in-foreground").arg(file).env("LC_ALL", "C");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        ka_sys::process::die_with_parent(&mut command);
        let shared = Arc::new(Shared::default());
        let (started, wait) = channel();
        // The kernel kills the child when the *thread* that started it ends, so that thread stays until then.
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("dnsmasq".to_owned())
            .spawn(move || supervise(command, &theirs, &started, pins, &events))
            .context("starting the thread that watches dnsmasq")?;
        let mut dnsmasq = Self { shared, thread: Some(thread), pid: 0 };
        match wait.recv_timeout(START_LIMIT) {
            Ok(Ok(pid)) => {
                dnsmasq.pid = pid;
                Ok(dnsmasq)
            }
            Ok(Err(e)) => Err(e).context(format!("starting {}", program.display())),
            Err(_) => bail!("dnsmasq did not say within {} s that it has started", START_LIMIT.as_secs()),
        }
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let kill = |signal| {
            let mut state = self.shared.lock();
            state.stopping = true;
            if let Some(child) = &state.child
                && let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw)
                && let Err(e) = rustix::process::kill_process(pid, signal)
            {
                log::warn!("stopping dnsmasq: {e}");
            }
        };
        kill(rustix::process::Signal::TERM);
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + STOP_LIMIT;
        while !thread.is_finished() {
            if Instant::now() > deadline {
                kill(rustix::process::Signal::KILL);
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.join().is_err() {
            log::error!("the thread that watches dnsmasq ended badly");
        }
    }
}

type Started = Sender<Result<u32>>;

fn supervise(
    mut command: Command,
    shared: &Shared,
    started: &Started,
    mut pins: Option<Pins>,
    events: &Events,
) {
    // Whoever waits for the start may have given up; then this thread's work is to collect the child.
    let tell = |result| drop(started.send(result));
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return tell(Err(anyhow!(e))),
    };
    let pid = child.id();
    let Some(stderr) = child.stderr.take() else { return tell(Err(anyhow!("it has no standard error"))) };
    {
        let mut state = shared.lock();
        state.child = Some(child);
        if state.stopping {
            // Dropped before there was a child to be killed.
            if let Some(child) = &mut state.child {
                // It can only have ended already; then there is nothing to kill.
                let _ = child.kill();
            }
        }
    }
    let mut running = false;
    let mut last = VecDeque::new();
    let mut reader = LogReader::default();
    let mut lines = BufReader::new(stderr);
    while let Some(line) = next_line(&mut lines) {
        if !running && line.starts_with("dnsmasq[") && line.contains(": started, ") {
            running = true;
            tell(Ok(pid));
        }
        if let Some(pins) = &mut pins {
            pins.line(&line);
        }
        log_line(&line);
        if let Some(event) = reader.line(&line, Instant::now()) {
            events.send(event);
        }
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
    let ended = wait(shared);
    let stopping = shared.lock().stopping;
    let said: Vec<&str> = last.iter().map(|line| plain(line)).collect();
    let cause = match ended {
        Ok(status) => format!("dnsmasq ended ({status}): {}", said.join("; ")),
        Err(e) => format!("waiting for dnsmasq: {e}"),
    };
    if !running {
        tell(Err(anyhow!(cause)));
    } else if !stopping {
        log::error!("{cause}");
        events.send(BootEvent::DnsmasqExited { cause });
    }
}

/// Waits for the child without keeping the lock while it runs.
fn wait(shared: &Shared) -> std::io::Result<ExitStatus> {
    loop {
        let mut state = shared.lock();
        let Some(child) = &mut state.child else {
            return Err(std::io::Error::other("it was never started"));
        };
        if let Some(status) = child.try_wait()? {
            state.child = None;
            return Ok(status);
        }
        drop(state);
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn next_line(lines: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    match lines.take(LINE_LIMIT).read_until(b'\n', &mut line) {
        Ok(0) => None,
        Ok(_) => Some(
            // Names and vendor classes in the log come from the net: nothing in them may reach a terminal raw.
            String::from_utf8_lossy(&line)
                .trim_end()
                .chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect(),
        ),
        Err(e) => {
            log::warn!("reading the log of dnsmasq: {e}");
            None
        }
    }
}

/// The line without the program's name and number.
fn plain(line: &str) -> &str {
    line.split_once("]: ").or_else(|| line.split_once(": ")).map_or(line, |(_, text)| text)
}

fn log_line(line: &str) {
    // With log-dhcp there are some 20 lines for each request; what matters is told as events.
    let detail = line.starts_with("dnsmasq-dhcp[") || line.contains("compile time options");
    let trouble = ["error", "failed", "cannot", "not giving", "no address range", "warning", "ignoring"];
    // UEFI asks for a file's size first and breaks that transfer off.
    let usual = line.contains("error 8 User aborted the transfer");
    let trouble = !usual && trouble.iter().any(|word| line.contains(word));
    if trouble {
        log::warn!("{line}");
    } else if detail || usual {
        log::debug!("{line}");
    } else {
        log::info!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::events::queue;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A stand-in that says what a real dnsmasq says, then does `then`.
    fn stand_in(directory: &Path, then: &str) -> std::path::PathBuf {
        let path = directory.join("dnsmasq");
        std::fs::write(
            &path,
            format!("#!/bin/sh\necho \"dnsmasq[$$]: started, version 2.90\" >&2\n{then}\n"),
        )
        .unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn an_end_at_once_is_an_error_with_its_cause() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dnsmasq");
        std::fs::write(
            &path,
            "#!/bin/sh\necho 'dnsmasq: failed to bind DHCP server socket: Address in use' >&2; exit 2\n",
        )
        .unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let error = format!("{:#}", Dnsmasq::start(&path, Path::new("/x"), None, queue().0).err().unwrap());
        assert!(
            error.ends_with(
                "dnsmasq ended (exit status: 2): failed to bind DHCP server socket: Address in use"
            ),
            "{error}"
        );
        let missing = format!(
            "{:#}",
            Dnsmasq::start(Path::new("/no/dnsmasq"), Path::new("/x"), None, queue().0).err().unwrap()
        );
        assert!(missing.starts_with("starting /no/dnsmasq: No such file"), "{missing}");
    }

    #[test]
    fn an_unexpected_end_is_an_event_with_its_cause() {
        let directory = tempfile::tempdir().unwrap();
        let program = stand_in(directory.path(), "echo 'dnsmasq-dhcp[1]: interface vanished' >&2; exit 3");
        let (events, receiver) = queue();
        let _dnsmasq = Dnsmasq::start(&program, Path::new("/x"), None, events).unwrap();
        let event = receiver.recv_timeout(Duration::from_secs(5)).unwrap();
        let BootEvent::DnsmasqExited { cause } = event else { panic!("{event:?}") };
        assert!(cause.contains("exit status: 3") && cause.contains("interface vanished"), "{cause}");
    }

    #[test]
    fn it_ends_with_us_and_then_there_is_no_event() {
        let directory = tempfile::tempdir().unwrap();
        for then in ["exec sleep 60", "trap '' TERM; exec 2>&-; sleep 7 & wait; wait"] {
            let program = stand_in(directory.path(), then);
            let (events, receiver) = queue();
            let dnsmasq = Dnsmasq::start(&program, Path::new("/x"), None, events).unwrap();
            let pid = dnsmasq.pid();
            drop(dnsmasq);
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{then}");
            assert!(receiver.try_recv().is_err());
        }
    }

    #[test]
    fn endless_lines_and_bytes_of_all_kinds_do_no_harm() {
        let directory = tempfile::tempdir().unwrap();
        let program = stand_in(
            directory.path(),
            "head -c 3000000 /dev/zero >&2; printf '\\n\\033[2J\\377dnsmasq-dhcp[1]: x\\n' >&2; exit 1",
        );
        let (events, receiver) = queue();
        let _dnsmasq = Dnsmasq::start(&program, Path::new("/x"), None, events).unwrap();
        let event = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        let BootEvent::DnsmasqExited { cause } = event else { panic!("{event:?}") };
        assert!(!cause.chars().any(char::is_control));
    }
}
