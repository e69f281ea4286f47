//! Running other programs: nothing is run without its exit status being looked at, and an error carries the command, how
//! it ended and the last KiB of what it wrote to standard error.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use rustix::process::{Pid, Signal, kill_process_group};
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes of standard error that an error quotes.
const STDERR_TAIL: usize = 1024;
/// How long a pipe must be silent after the program's end until nothing more is expected of it: what the program has left
/// behind may hold it open for ever.
const SILENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// Bytes kept of each output stream; the rest is read and dropped, so that a noisy program cannot fill the memory.
const OUTPUT_LIMIT: usize = 4 << 20;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program could not be started at all.
    #[error("cannot run {command}: {source}")]
    Spawn {
        /// The command line.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program ended with another status than 0, or by a signal.
    #[error("{command} {}{}", describe(*status), tail_text(stderr))]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of its standard error.
        stderr: String,
    },
    /// The program did not end in time and was killed.
    #[error("{command} did not end within {} s and was killed{}", limit.as_secs(), tail_text(stderr))]
    TimedOut {
        /// The command line.
        command: String,
        /// The time it had.
        limit: Duration,
        /// The end of its standard error.
        stderr: String,
    },
    /// Talking to the program failed.
    #[error("talking to {command}: {source}")]
    Io {
        /// The command line.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

fn tail_text(stderr: &str) -> String {
    let text = stderr.trim();
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// What a program that ended well wrote.
#[derive(Debug, Clone)]
pub struct Output {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text, with invalid UTF-8 replaced.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// The command line of `command` as a person would write it.
#[must_use]
pub fn command_line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| {
        let a = a.to_string_lossy();
        if a.is_empty() || a.contains(char::is_whitespace) { format!("'{a}'") } else { a.into_owned() }
    }));
    words.join(" ")
}

/// Runs `command` to its end and returns its output; anything but exit status 0 is an error. After `limit` it is killed with
/// all that it has started.
///
/// # Errors
/// See [`Error`].
pub fn run(command: &mut Command, limit: Duration) -> Result<Output, Error> {
    run_with_input(command, &[], limit)
}

/// [`run`], with `input` on standard input.
///
/// # Errors
/// See [`Error`].
pub fn run_with_input(command: &mut Command, input: &[u8], limit: Duration) -> Result<Output, Error> {
    let line = command_line(command);
    command
        .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command.spawn().map_err(|source| Error::Spawn { command: line.clone(), source })?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let over = AtomicBool::new(false);
    let over = &over;
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.map_or(Ok(()), |mut pipe| pipe.write_all(input)));
        let out = scope.spawn(move || stdout.map_or_else(|| Ok(Vec::new()), |pipe| read_bounded(pipe, over)));
        let err = scope.spawn(move || stderr.map_or_else(|| Ok(Vec::new()), |pipe| read_bounded(pipe, over)));
        let ended = wait_until(&mut child, Instant::now() + limit);
        if !matches!(ended, Ok(Some(_))) {
            // A script's programs, too. Killing can only fail when all ended meanwhile; waiting then still collects it.
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let _ = group.map(|group| kill_process_group(group, Signal::KILL));
            let _ = child.kill();
            let _ = child.wait();
        }
        over.store(true, Ordering::SeqCst);
        let join = |r: std::thread::Result<io::Result<Vec<u8>>>| {
            r.unwrap_or_else(|_| Err(io::Error::other("the reading thread ended badly")))
        };
        let (stdout, stderr) = (join(out.join()), join(err.join()));
        let written =
            writer.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread ended badly")));
        let io = |source| Error::Io { command: line.clone(), source };
        let stderr = stderr.map_err(io)?;
        match ended.map_err(io)? {
            None => Err(Error::TimedOut { command: line.clone(), limit, stderr: tail(&stderr) }),
            Some(status) if !status.success() => {
                Err(Error::Failed { command: line.clone(), status, stderr: tail(&stderr) })
            }
            Some(_) => {
                match written {
                    // A program may rightly end well without reading all of its input.
                    Err(e) if e.kind() != io::ErrorKind::BrokenPipe => return Err(io(e)),
                    _ => {}
                }
                Ok(Output { stdout: stdout.map_err(io)?, stderr })
            }
        }
    })
}

/// Runs `program` with `args` inside `root` (chroot), with `/` as its working directory.
///
/// # Errors
/// See [`Error`].
pub fn run_in<S: AsRef<OsStr>>(
    root: &Path,
    program: &str,
    args: &[S],
    limit: Duration,
) -> Result<Output, Error> {
    run(command_in(root, program).args(args), limit)
}

/// A command that will run `program` inside `root` (chroot) with a plain, predictable environment.
#[must_use]
pub fn command_in(root: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .env("HOME", "/root")
        .env("DEBIAN_FRONTEND", "noninteractive");
    enter_root(&mut command, root);
    command
}

#[allow(unsafe_code)]
fn enter_root(command: &mut Command, root: &Path) {
    use std::os::unix::process::CommandExt;
    let root = root.to_path_buf();
    // SAFETY: between fork and exec only the two system calls chroot and chdir are made, both async-signal-safe; the
    // path was allocated before the fork and rustix copies paths shorter than 256 bytes to the stack.
    unsafe {
        command.pre_exec(move || {
            rustix::process::chroot(&root)?;
            rustix::process::chdir("/")?;
            Ok(())
        });
    }
}

/// Makes the program that `command` will start be killed when the thread that starts it ends, however it ends.
#[allow(unsafe_code)]
pub fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only the system calls prctl and getppid are made, both async-signal-safe; nothing
    // is allocated.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // The parent may have ended before the line above took effect.
            if rustix::process::getppid() == Some(parent) {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(rustix::io::Errno::SRCH.raw_os_error()))
            }
        });
    }
}

fn wait_until(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn read_bounded(mut pipe: impl Read + AsFd, over: &AtomicBool) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        // Asked before the pipe is: what was written before the end is seen.
        let is_over = over.load(Ordering::SeqCst);
        let silent = match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&SILENCE)) {
            Ok(ready) => ready == 0,
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        if silent && is_over {
            return Ok(kept);
        }
        if silent {
            continue;
        }
        let n = match pipe.read(&mut buffer) {
            Ok(0) => return Ok(kept),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let room = OUTPUT_LIMIT.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..n.min(room)]);
    }
}

fn tail(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(STDERR_TAIL)..]).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn what_a_script_started_is_killed_with_it_and_holds_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let start = Instant::now();
        let script = format!("sleep 60 & echo $! > {}; wait", pid.display());
        let error = run(Command::new("sh").args(["-c", &script]), Duration::from_secs(1)).unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(20));
        let pid = std::fs::read_to_string(pid).unwrap();
        // It is gone, or nobody has collected it yet.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    }

    #[test]
    fn a_daemon_that_keeps_the_pipe_open_is_not_waited_for() {
        let start = Instant::now();
        let script = "(sleep 30; echo late) & echo early; echo $! >&2";
        let output = run(Command::new("sh").args(["-c", script]), LIMIT).unwrap();
        assert_eq!(output.text(), "early\n");
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
        let pid: i32 = String::from_utf8_lossy(&output.stderr).trim().parse().unwrap();
        // It is in the group of the script that ended.
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }

    #[test]
    fn output_and_input_pass() {
        let out = run_with_input(&mut Command::new("cat"), b"hello", LIMIT).unwrap();
        assert_eq!(out.text(), "hello");
    }

    #[test]
    fn a_failure_names_command_status_and_stderr() {
        let error =
            run(Command::new("sh").args(["-c", "echo broken >&2; exit 7"]), LIMIT).unwrap_err().to_string();
        assert_eq!(error, "sh -c 'echo broken >&2; exit 7' ended with exit status 7: broken");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("/no/such/program"), LIMIT).unwrap_err().to_string();
        assert!(error.starts_with("cannot run /no/such/program: No such file"), "{error}");
    }

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let mut command = Command::new("sleep");
        command.arg("60");
        die_with_parent(&mut command);
        let start = Instant::now();
        let mut child = std::thread::spawn(move || command.spawn().unwrap()).join().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(9));
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_hang_is_killed_in_time() {
        let start = Instant::now();
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
