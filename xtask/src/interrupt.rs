//! Interrupts: SIGINT, SIGTERM and SIGHUP set a flag that every wait looks at, so that the guards that own virtual
//! machines, namespaces and mounts are dropped in good order. A second SIGINT ends the program at once. (A handler, not a
//! blocked mask: children would inherit that and could not be asked to end.)

use anyhow::{Context, Result};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

static FLAG: OnceLock<&'static AtomicBool> = OnceLock::new();

/// The work was interrupted by a signal.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// From now on the signals set the flag.
///
/// # Errors
/// When the kernel refuses.
pub fn install() -> Result<()> {
    let flag = ka_sys::signals::termination_flag().context("catching signals")?;
    FLAG.get_or_init(|| flag);
    Ok(())
}

/// Whether a signal came.
#[must_use]
pub fn interrupted() -> bool {
    FLAG.get().is_some_and(|flag| flag.load(Ordering::SeqCst))
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
