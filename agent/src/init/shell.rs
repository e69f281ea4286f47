//! A shell on the console for people: after a failure, or before a step (`ka.break=`).

use anyhow::{Context, Result, bail};
use ka_sys::signals;
use std::fs::OpenOptions;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SHELL: &str = "/bin/sh";
/// A shell that ends sooner than this was not left by a person: its console gave end-of-file.
const TOO_SOON: Duration = Duration::from_secs(1);

/// The command of a shell on `/dev/console`, as the leader of a session with that terminal.
///
/// # Errors
/// When there is no shell in this image, or no console.
pub fn command() -> Result<Command> {
    if !Path::new(SHELL).exists() {
        bail!("there is no {SHELL} in this image");
    }
    // A shell cannot control /dev/console itself, only the terminal behind it.
    let terminal = terminal();
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&terminal)
            .with_context(|| format!("opening {terminal}"))
    };
    let mut command = Command::new(SHELL);
    command
        .stdin(Stdio::from(open()?))
        .stdout(Stdio::from(open()?))
        .stderr(Stdio::from(open()?))
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/")
        .env("TERM", "linux")
        .env("PS1", "ka# ")
        .current_dir("/");
    signals::unblock_in_child(&mut command);
    signals::give_terminal_to_child(&mut command);
    Ok(command)
}

/// The terminal behind `/dev/console`: the console that became active last.
fn terminal() -> String {
    let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    active
        .split_whitespace()
        .next_back()
        .map(|name| format!("/dev/{name}"))
        .filter(|path| Path::new(path).exists())
        .unwrap_or_else(|| "/dev/console".to_owned())
}

/// Runs a shell until somebody types `exit`; one that is killed is started anew. For the worker only: PID 1 reaps by
/// itself.
///
/// # Errors
/// When there is no shell or no console, or the console is at its end.
pub fn run() -> Result<()> {
    loop {
        let start = Instant::now();
        let status = command()?.status().context("starting the shell")?;
        match status.code() {
            Some(_) if start.elapsed() >= TOO_SOON => return Ok(()),
            Some(code) => bail!("the shell ended at once with {code}: nobody is at the console"),
            None => log::warn!("the shell was killed; here is another"),
        }
    }
}
