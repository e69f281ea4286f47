//! Reboot, power off, halt, and what ctrl-alt-del does. Only the kernel is spoken to: syncing and stopping what still
//! runs is the caller's affair.

use rustix::system::{RebootCommand, reboot};
use std::io;

/// How a machine stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Restart through the firmware.
    Reboot,
    /// Off, where the machine can.
    PowerOff,
    /// Stopped, with the power on.
    Halt,
}

/// Stops the machine. Returns only when the kernel refused.
#[must_use]
pub fn stop(how: Stop) -> io::Error {
    let command = match how {
        Stop::Reboot => RebootCommand::Restart,
        Stop::PowerOff => RebootCommand::PowerOff,
        Stop::Halt => RebootCommand::Halt,
    };
    match reboot(command) {
        Ok(()) => io::Error::other("the kernel returned from stopping the machine"),
        Err(e) => e.into(),
    }
}

/// Makes ctrl-alt-del send SIGINT to PID 1 instead of restarting the machine on the spot.
///
/// # Errors
/// When the kernel refuses (not root).
pub fn catch_ctrl_alt_del() -> io::Result<()> {
    Ok(reboot(RebootCommand::CadOff)?)
}
