//! A process of a benchmark: in a process group of its own, output in a log, the moment of its end and what it used
//! noted by a thread that does nothing but wait, so that waiting costs nothing and is exact.

use crate::bench::machine;
use crate::run;
use anyhow::{Context, Result};
use ka_sys::usage::{self, Usage};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where a process' standard output goes. What it says to standard error is always kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Into the log.
    Kept,
    /// It is the stream: dropped.
    Dropped,
}

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// When.
    pub at: Instant,
    /// With what.
    pub status: ExitStatus,
    /// What it used, with the children that it waited for.
    pub usage: Usage,
}

impl Ended {
    /// Exit code, or the signal's number below zero.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| -self.status.signal().unwrap_or(0))
    }
}

/// A running or ended process; its group is killed when this is dropped before it ended.
#[derive(Debug)]
pub struct Process {
    /// What it is called in messages.
    pub what: String,
    pid: u32,
    log: PathBuf,
    ended: Arc<Mutex<Option<Ended>>>,
    waiter: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `command`, with what it says appended to `log`.
    ///
    /// # Errors
    /// When the log or the program cannot be started.
    pub fn start(
        what: &str,
        command: &mut Command,
        stdin: Stdio,
        output: Output,
        log: &Path,
    ) -> Result<Self> {
        let line = ka_sys::process::command_line(command);
        let mut file = run::append(log)?;
        writeln!(file, "$ {line}").with_context(|| format!("writing {}", log.display()))?;
        let error = file.try_clone().context("opening a log twice")?;
        let stdout = match output {
            Output::Kept => Stdio::from(file),
            Output::Dropped => Stdio::null(),
        };
        command.stdin(stdin).stdout(stdout).stderr(error).process_group(0);
        // Started by the thread that runs the benchmark, which lives as long as the benchmark.
        ka_sys::process::die_with_parent(command);
        let child = command.spawn().with_context(|| format!("starting {line}"))?;
        let pid = child.id();
        let ended = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&ended);
        let waiter = std::thread::spawn(move || {
            wait(pid, &shared);
        });
        Ok(Self { what: what.to_owned(), pid, log: log.to_path_buf(), ended, waiter: Some(waiter) })
    }

    /// Its process id, which is its group's too.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<Ended> {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a signal to the group, if its leader has not ended.
    pub fn signal(&self, signal: Signal) {
        // Under the lock the leader is not collected, so that its number is still its own.
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.is_none()
            && let Ok(group) = i32::try_from(self.pid)
        {
            // ESRCH: all of the group have ended, which is no less than a signal would do.
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }

    /// Waits until it listens on TCP `port`.
    ///
    /// # Errors
    /// When it ends before, or does not within `limit`.
    pub fn wait_listening(&self, port: u16, limit: Duration) -> Result<()> {
        let ready = crate::interrupt::poll(limit, || {
            if let Some(ended) = self.ended() {
                anyhow::bail!("{} ended with {} before it listened{}", self.what, ended.status, self.tail());
            }
            Ok(machine::listening(self.pid, port).then_some(()))
        })?;
        ready.with_context(|| format!("{} does not listen on port {port}{}", self.what, self.tail()))
    }

    /// The end of its log, for messages.
    #[must_use]
    pub fn tail(&self) -> String {
        format!("; the end of {}:\n{}", self.log.display(), run::last_lines(&self.log, 8))
    }
}

fn wait(pid: u32, shared: &Mutex<Option<Ended>>) {
    let Some(raw) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return };
    // It stays a zombie until it is collected below, so that nobody else gets its number meanwhile.
    let gone = || waitid(WaitId::Pid(raw), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    while gone().is_err_and(|e| e == rustix::io::Errno::INTR) {}
    let at = Instant::now();
    let mut ended = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if let Ok((status, usage)) = usage::wait(pid) {
        *ended = Some(Ended { at, status, usage });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        if let Some(waiter) = self.waiter.take() {
            // It cannot panic, and if it did the process would be collected by nobody, which harms nobody.
            let _ = waiter.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, folder: &Path) -> Process {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Process::start("test", &mut command, Stdio::null(), Output::Kept, &folder.join("log")).unwrap()
    }

    fn end(process: &Process) -> Ended {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(ended) = process.ended() {
                return ended;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("no end");
    }

    #[test]
    fn end_and_output_are_noted() {
        let folder = tempfile::tempdir().unwrap();
        let process = start("echo hello; exit 4", folder.path());
        assert_eq!(end(&process).code(), 4);
        assert!(process.tail().contains("| hello"), "{}", process.tail());
        // A signal to one that ended goes to nobody.
        process.signal(Signal::SIGKILL);
    }

    #[test]
    fn signals_reach_the_whole_group() {
        let folder = tempfile::tempdir().unwrap();
        let process = start("sleep 60 | sleep 60", folder.path());
        process.signal(Signal::SIGKILL);
        assert_eq!(end(&process).code(), -9);
        let start = Instant::now();
        drop(self::start("sleep 60", folder.path()));
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
