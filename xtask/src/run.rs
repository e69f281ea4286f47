//! Running long programs (builds, package managers, servers): their output goes to a log file, they stand in a process
//! group of their own, have a time limit, and end when we are interrupted. Short ones go through `ka_sys::process`.

use crate::interrupt;
use anyhow::{Context, Result, bail};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Time limit of short programs.
pub const SHORT: Duration = Duration::from_secs(60);

/// Lines of the log that an error quotes.
const QUOTED_LINES: usize = 15;

/// Runs `command` to its end with its output appended to `log`; anything but exit status 0 is an error that quotes the
/// end of the log. Returns the time it took.
///
/// # Errors
/// As said; also when it takes longer than `limit` or we are interrupted (it is killed then).
pub fn logged(command: &mut Command, log: &Path, limit: Duration) -> Result<Duration> {
    let line = ka_sys::process::command_line(command);
    let start = Instant::now();
    let mut file = append(log)?;
    writeln!(file, "$ {line}").with_context(|| format!("writing {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file.try_clone()?);
    let mut child = Group::spawn(command)?;
    let Some(status) = child.wait(limit)? else {
        bail!("{line} did not end within {} s; see {}", limit.as_secs(), log.display());
    };
    if !status.success() {
        bail!("{line} ended with {status}; the end of {}:\n{}", log.display(), last_lines(log, QUOTED_LINES));
    }
    Ok(start.elapsed())
}

/// A short program's standard output, trimmed.
///
/// # Errors
/// When it fails or takes longer than [`SHORT`].
pub fn output(program: &str, args: &[&str]) -> Result<String> {
    Ok(ka_sys::process::run(Command::new(program).args(args), SHORT)?.text().trim().to_owned())
}

/// Runs a short program for its effect.
///
/// # Errors
/// As [`output`].
pub fn quiet(program: &str, args: &[&str]) -> Result<()> {
    output(program, args).map(drop)
}

/// Opens a log file for appending, with its folder.
///
/// # Errors
/// When that fails.
pub fn append(log: &Path) -> Result<File> {
    if let Some(folder) = log.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("opening {}", log.display()))
}

/// The last lines of a text file, for error messages; says so itself when it cannot be read.
#[must_use]
pub fn last_lines(path: &Path, count: usize) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(64 << 10)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        Ok(lines[lines.len().saturating_sub(count)..].iter().map(|l| format!("  | {l}\n")).collect())
    };
    read().unwrap_or_else(|e| format!("  (cannot read {}: {e})", path.display()))
}

/// A child in a process group of its own; the whole group is killed when this is dropped before it ended.
#[derive(Debug)]
pub struct Group {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Group {
    /// Starts `command`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let line = ka_sys::process::command_line(command);
        let child = command.process_group(0).spawn().with_context(|| format!("starting {line}"))?;
        Ok(Self { child, ended: None })
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().context("waiting for a child")?;
        }
        Ok(self.ended)
    }

    /// Waits for its end; `None` when `limit` is over.
    ///
    /// # Errors
    /// When we are interrupted.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        interrupt::poll(limit, || self.try_wait())
    }

    /// Sends a signal to the whole group. A group that has ended meanwhile is no error.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        if self.ended.is_none()
            && let Ok(id) = i32::try_from(self.child.id())
        {
            // ESRCH: it ended between our look and our signal, which is what the signal was to bring about.
            let _ = nix::sys::signal::killpg(nix::unistd::Pid::from_raw(id), signal);
        }
    }

    /// Asks the group to end, and kills it when it has not within `grace`.
    pub fn stop(&mut self, grace: Duration) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + grace;
        while matches!(self.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill();
    }

    fn kill(&mut self) {
        if self.ended.is_none() {
            self.signal(nix::sys::signal::Signal::SIGKILL);
            // Collecting it can only fail when it was collected already.
            self.ended = self.child.wait().ok();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_quotes_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("deep/log");
        let error = logged(Command::new("sh").args(["-c", "echo one; echo two >&2; exit 3"]), &log, SHORT)
            .unwrap_err()
            .to_string();
        assert!(error.contains("| one\n") && error.contains("| two\n") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_child_can_be_asked_to_end() {
        crate::interrupt::install().unwrap();
        let mut group = Group::spawn(Command::new("sleep").arg("60").stdin(Stdio::null())).unwrap();
        let start = Instant::now();
        group.signal(nix::sys::signal::Signal::SIGINT);
        let status = group.wait(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(2));
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_hang_takes_its_children_along() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mark = dir.path().join("mark");
        let script = format!("(sleep 1; touch {}) & sleep 60", mark.display());
        let start = Instant::now();
        logged(Command::new("sh").args(["-c", &script]), &log, Duration::from_millis(200)).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!mark.exists(), "a grandchild lived on");
    }
}
