//! Interrupts: SIGINT, SIGTERM and SIGHUP set a flag that every wait looks at, so that the guards that own virtual
//! machines, namespaces and mounts are dropped in good order. A second signal ends the program at once.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The work was interrupted by a signal.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Blocks the signals and starts the thread that waits for them. To be called before any other thread is started;
/// `std::process::Command` gives children an empty mask again.
///
/// # Errors
/// When the kernel refuses.
pub fn install() -> Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().context("blocking the signals")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            match set.wait() {
                Ok(signal) if INTERRUPTED.swap(true, Ordering::SeqCst) => {
                    eprintln!("{signal} again: ending at once, without cleaning up");
                    std::process::exit(130);
                }
                Ok(signal) => eprintln!("{signal}: cleaning up"),
                Err(e) => eprintln!("waiting for signals: {e}"),
            }
        }
    })?;
    Ok(())
}

/// Whether a signal came.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error once a signal came.
///
/// # Errors
/// [`Interrupted`].
pub fn check() -> Result<()> {
    if interrupted() { Err(Interrupted.into()) } else { Ok(()) }
}

/// Polls `ready` every 50 ms until it gives a value; `None` after `limit`.
///
/// # Errors
/// Those of `ready`, and [`Interrupted`].
pub fn poll<T>(limit: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = ready()? {
            return Ok(Some(value));
        }
        check()?;
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
