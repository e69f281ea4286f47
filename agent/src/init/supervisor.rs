//! PID 1: mounts the kernel's file systems, starts this program again as the worker that does everything else, reaps
//! whatever dies, and stops the machine as ordered when the worker has ended. The kernel panics when PID 1 leaves, so
//! nothing here returns, and every mishap ends in a reboot.
//!
//! The worker is a process of its own so that it can use `Command` freely (nobody else reaps its children) and so that its
//! death, even by `panic = "abort"`, is an event and not the end.

use super::{DISKS_FILE, FAILURE_FILE, WORKER_ARG, logger, mounts, shell};
use crate::cmdline::{OnFailure, OnSuccess, Options};
use anyhow::{Context, Result};
use ka_sys::power::{self, Stop};
use ka_sys::signals::{Queue, unblock_in_child};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a sync of the disks may take before the machine is stopped all the same: a disk that hangs must not keep a
/// failed node from rebooting.
const SYNC_LIMIT: Duration = Duration::from_secs(60);
/// A shell that ended sooner was not left by a person.
const TOO_SOON: Duration = Duration::from_secs(1);

/// What PID 1 needs from other parts.
#[derive(Clone, Copy)]
pub struct Hooks {
    /// Makes every disk that the given file lists unbootable; called when the worker died without doing so itself.
    pub clear_disks: fn(&Path) -> Result<()>,
}

/// How the worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Success,
    /// It failed and said why itself.
    Failed,
    /// It died, or was stopped, before it could clean up; the text says how.
    Died(String),
    /// Somebody pressed ctrl-alt-del.
    CtrlAltDel,
}

/// Is PID 1 for the rest of this machine's uptime.
pub fn run(hooks: Hooks) -> ! {
    std::panic::set_hook(Box::new(|info| {
        // Aborting would make the kernel panic: stop here and for good.
        log::error!("PID 1 panicked: {info}");
        stop(Stop::Reboot, Duration::from_secs(10));
    }));
    logger::install(log::LevelFilter::Info);
    let mut errors = mounts::ensure_basic_nodes();
    errors.extend(mounts::mount_all());
    let options = Options::from_proc();
    log::set_max_level(options.log);
    // Signals first, threads (the console's) second: they inherit what is blocked.
    let queue = Queue::new(&[
        Signal::SIGCHLD,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGHUP,
    ]);
    logger::open_consoles(&options.consoles);
    log::info!("ka-agent {} is PID 1", env!("CARGO_PKG_VERSION"));
    for error in errors {
        log::error!("{error:#}");
    }
    for error in &options.errors {
        log::error!("{error}");
    }
    let end = match queue.context("taking over the signals").and_then(|queue| {
        if let Err(e) = power::catch_ctrl_alt_del() {
            log::warn!("catching ctrl-alt-del: {e}");
        }
        install_modprobe();
        let end = supervise(&queue)?;
        Ok((end, queue))
    }) {
        Ok((end, queue)) => finish(&end, &options, hooks, &queue),
        Err(e) => {
            log::error!("PID 1: {e:#}");
            clear(hooks);
            Stop::Reboot
        }
    };
    let pause = if end == Stop::Reboot { options.pause } else { Duration::ZERO };
    stop(end, pause)
}

/// The kernel starts /sbin/modprobe when a mount or a socket needs a module; this program can be that.
fn install_modprobe() {
    let path = Path::new("/sbin/modprobe");
    if path.exists() {
        return;
    }
    let result = std::fs::create_dir_all("/sbin")
        .and_then(|()| std::env::current_exe())
        .and_then(|exe| std::os::unix::fs::symlink(exe, path));
    if let Err(e) = result {
        log::warn!("installing {}: {e}", path.display());
    }
}

/// Starts the worker and waits for its end.
fn supervise(queue: &Queue) -> Result<End> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command
        .arg0("ka-agent")
        .arg(WORKER_ARG)
        .stdin(Stdio::null())
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    unblock_in_child(&mut command);
    let worker = pid_of(&command.spawn().context("starting the worker")?)?;
    loop {
        if let Some(status) = reap(worker) {
            return Ok(status);
        }
        match queue.wait(Duration::from_secs(60)).context("waiting for signals")? {
            Some(Signal::SIGINT) => {
                log::warn!("ctrl-alt-del: stopping the installation");
                end_worker(worker, queue);
                return Ok(End::CtrlAltDel);
            }
            Some(signal @ (Signal::SIGTERM | Signal::SIGUSR1 | Signal::SIGUSR2)) => {
                log::warn!("{signal} to PID 1 is not acted upon; use reboot -f, or ctrl-alt-del");
            }
            _ => {}
        }
    }
}

fn pid_of(child: &std::process::Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id()).context("a process id")?))
}

/// Reaps everything that has died; tells how `child` ended if it was among them.
fn reap(child: Pid) -> Option<End> {
    let mut end = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                end = Some(if code == 0 { End::Success } else { End::Failed });
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                end = Some(End::Died(format!("it was killed by {signal}")));
            }
            // No child has changed, or there is none (any more).
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => return end,
            Err(nix::errno::Errno::EINTR) | Ok(_) => {}
            Err(e) => {
                log::error!("waiting for processes: {e}");
                return end;
            }
        }
    }
}

/// Ends the worker: asked first, killed after 5 s.
fn end_worker(worker: Pid, queue: &Queue) {
    for (signal, patience) in [(Signal::SIGTERM, 5), (Signal::SIGKILL, 5)] {
        // It may have ended by itself meanwhile.
        let _ = nix::sys::signal::kill(worker, signal);
        let end = Instant::now() + Duration::from_secs(patience);
        while Instant::now() < end {
            if reap(worker).is_some() || nix::sys::signal::kill(worker, None).is_err() {
                return;
            }
            if let Err(e) = queue.wait(Duration::from_millis(100)) {
                log::error!("waiting for the worker: {e}");
                break;
            }
        }
    }
}

/// Does what the end of the worker calls for and says how the machine is to be stopped.
fn finish(end: &End, options: &Options, hooks: Hooks, queue: &Queue) -> Stop {
    match end {
        End::Success => {
            log::info!("done");
            sync();
            let how = match options.on_success {
                OnSuccess::Reboot => Stop::Reboot,
                OnSuccess::PowerOff => Stop::PowerOff,
                OnSuccess::Halt => Stop::Halt,
            };
            stop(how, Duration::ZERO)
        }
        End::CtrlAltDel => {
            clear(hooks);
            stop(Stop::Reboot, Duration::ZERO)
        }
        End::Failed => {}
        End::Died(how) => {
            log::error!("the worker died: {how}");
            clear(hooks);
        }
    }
    let cause = std::fs::read_to_string(FAILURE_FILE).unwrap_or_default();
    log::error!("INSTALLATION FAILED{}{}", if cause.is_empty() { "" } else { ": " }, cause.trim());
    match options.on_failure {
        OnFailure::Reboot => {
            log::info!("rebooting in {} s (ka.on-failure=reboot)", options.pause.as_secs());
            Stop::Reboot
        }
        OnFailure::PowerOff => {
            log::info!("powering off in {} s (ka.on-failure=poweroff)", options.pause.as_secs());
            idle(queue, options.pause, None);
            Stop::PowerOff
        }
        OnFailure::Wait => wait_for_person(queue),
        OnFailure::Shell => match shells(queue) {
            Ok(how) => stop(how, Duration::ZERO),
            Err(e) => {
                log::error!("no shell: {e:#}");
                wait_for_person(queue)
            }
        },
    }
}

fn clear(hooks: Hooks) {
    let list = Path::new(DISKS_FILE);
    if !list.exists() {
        return;
    }
    match (hooks.clear_disks)(list) {
        Ok(()) => log::info!("the disks that were being written have been made unbootable"),
        Err(e) => log::error!("making the disks unbootable: {e:#}"),
    }
}

/// What ended a wait.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    TimeIsOver,
    CtrlAltDel,
    Ended(End),
}

/// Reaps until `time` is over, ctrl-alt-del is pressed, or `child` has ended. Whoever waits for a child must name it here:
/// its end can be learned only once.
fn idle(queue: &Queue, time: Duration, child: Option<Pid>) -> Event {
    let end = Instant::now() + time;
    loop {
        // This process is not its own child, so it stands for none.
        if let Some(how) = reap(child.unwrap_or_else(Pid::this)) {
            return Event::Ended(how);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Event::TimeIsOver;
        }
        // Looking once a second even without a signal costs nothing, and a lost one does no harm.
        match queue.wait(left.min(Duration::from_secs(1))) {
            Ok(Some(Signal::SIGINT)) => return Event::CtrlAltDel,
            Ok(_) => {}
            Err(_) => std::thread::sleep(left.min(Duration::from_secs(1))),
        }
    }
}

fn wait_for_person(queue: &Queue) -> Stop {
    log::info!("this machine waits here: ctrl-alt-del reboots it");
    while idle(queue, Duration::from_secs(3600), None) != Event::CtrlAltDel {}
    log::info!("ctrl-alt-del: rebooting");
    stop(Stop::Reboot, Duration::ZERO)
}

/// Shells, one after another, until one is left by `exit` or ctrl-alt-del is pressed.
fn shells(queue: &Queue) -> Result<Stop> {
    log::info!("here is a shell; the log is in dmesg; `exit` reboots");
    loop {
        logger::flush(Duration::from_secs(2));
        let start = Instant::now();
        let shell = pid_of(&shell::command()?.spawn().context("starting the shell")?)?;
        let end = loop {
            match idle(queue, Duration::from_secs(3600), Some(shell)) {
                Event::CtrlAltDel => return Ok(Stop::Reboot),
                Event::Ended(end) => break end,
                Event::TimeIsOver => {}
            }
        };
        match end {
            End::Success | End::Failed if start.elapsed() < TOO_SOON => {
                anyhow::bail!("it ended at once: nobody is at the console")
            }
            End::Success | End::Failed => return Ok(Stop::Reboot),
            End::Died(_) | End::CtrlAltDel => log::warn!("the shell was killed; here is another"),
        }
    }
}

/// Writes to disk what is in memory, waiting no longer than [`SYNC_LIMIT`].
fn sync() {
    let started = std::thread::Builder::new().name("sync".into()).spawn(rustix::fs::sync);
    match started {
        Ok(thread) => {
            let end = Instant::now() + SYNC_LIMIT;
            while !thread.is_finished() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            if !thread.is_finished() {
                log::error!("the disks did not sync within {} s", SYNC_LIMIT.as_secs());
            }
        }
        Err(e) => log::error!("starting a thread to sync: {e}"),
    }
}

/// Stops the machine after `pause`. When the kernel refuses, tries again for ever.
fn stop(how: Stop, pause: Duration) -> ! {
    logger::flush(Duration::from_secs(2));
    std::thread::sleep(pause);
    // What still runs would write on; there may be nothing left to kill.
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if nix::sys::signal::kill(Pid::from_raw(-1), signal).is_ok() {
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    sync();
    log::info!(
        "{}",
        match how {
            Stop::Reboot => "rebooting",
            Stop::PowerOff => "powering off",
            Stop::Halt => "halting",
        }
    );
    logger::flush(Duration::from_secs(2));
    loop {
        let error = power::stop(how);
        log::error!("{how:?}: {error}");
        std::thread::sleep(Duration::from_secs(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart_and_strangers_are_reaped() {
        // Each case in a process of its own: waitpid(None) would take the children of other tests.
        let spawn = |script: &str| Command::new("sh").args(["-c", script]).spawn().unwrap();
        if std::env::var_os("KA_REAP_TEST").is_none() {
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "init::supervisor::tests::ends_are_told_apart_and_strangers_are_reaped"])
                .env("KA_REAP_TEST", "1")
                .status()
                .unwrap();
            assert!(status.success());
            return;
        }
        for (script, expected) in [
            ("exit 0", End::Success),
            ("exit 7", End::Failed),
            ("kill -ABRT $$", End::Died("it was killed by SIGABRT".into())),
        ] {
            let stranger = pid_of(&spawn("exit 3")).unwrap();
            let child = pid_of(&spawn(script)).unwrap();
            let end = loop {
                if let Some(end) = reap(child) {
                    break end;
                }
                std::thread::sleep(Duration::from_millis(5));
            };
            assert_eq!(end, expected);
            while nix::sys::signal::kill(stranger, None).is_ok() {
                assert_eq!(reap(child), None);
            }
        }
        // Found in QEMU: the wait itself reaped the shell, and its `exit` was never noticed.
        let queue = Queue::new(&[Signal::SIGCHLD, Signal::SIGINT]).unwrap();
        for (script, expected) in [
            ("sleep 0.3; exit 0", Event::Ended(End::Success)),
            ("kill -KILL $$", Event::Ended(End::Died("it was killed by SIGKILL".into()))),
            ("exec sleep 60", Event::TimeIsOver),
        ] {
            let child = pid_of(&spawn(script)).unwrap();
            let time = Duration::from_secs(if expected == Event::TimeIsOver { 1 } else { 30 });
            assert_eq!(idle(&queue, time, Some(child)), expected);
        }
        nix::sys::signal::raise(Signal::SIGINT).unwrap();
        assert_eq!(idle(&queue, Duration::from_secs(30), None), Event::CtrlAltDel);
    }
}
