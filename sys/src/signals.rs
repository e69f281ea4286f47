//! Signals as values: a signal queue that PID 1 waits on, a termination flag that loops can poll, and the start of
//! children with a clean signal state and a terminal of their own.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Signals that are waited for instead of being delivered.
pub struct Queue(SignalFd);

impl Queue {
    /// Blocks `signals` in this thread (and those it starts later) and queues them here. Call it before any thread is
    /// started: one that has not blocked them would receive them.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(signals: &[Signal]) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in signals {
            mask.add(*signal);
        }
        mask.thread_block()?;
        Ok(Self(SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    /// The next signal, or none when `limit` has passed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn wait(&self, limit: Duration) -> io::Result<Option<Signal>> {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], limit) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let Some(info) = self.0.read_signal()? else { return Ok(None) };
        let number = i32::try_from(info.ssi_signo).unwrap_or_default();
        Ok(Signal::try_from(number).ok())
    }
}

static TERMINATE: AtomicBool = AtomicBool::new(false);

extern "C" fn note_termination(_: i32) {
    TERMINATE.store(true, Ordering::SeqCst);
}

/// From now on SIGINT, SIGTERM and SIGHUP set the flag that is returned, instead of ending the process. System calls
/// that wait are interrupted (EINTR). A second SIGINT ends the process as usual.
///
/// # Errors
/// When the kernel refuses.
#[allow(unsafe_code)]
pub fn termination_flag() -> io::Result<&'static AtomicBool> {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut flags = SaFlags::empty();
        flags.set(SaFlags::SA_RESETHAND, signal == Signal::SIGINT);
        let action = SigAction::new(SigHandler::Handler(note_termination), flags, SigSet::empty());
        // SAFETY: the handler does nothing but store to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(&TERMINATE)
}

/// Has `command` start with no signal blocked, whatever this process has blocked for its [`Queue`].
#[allow(unsafe_code)]
pub fn unblock_in_child(command: &mut Command) {
    // SAFETY: between fork and exec only sigprocmask is called, which is async-signal-safe; nothing is allocated.
    unsafe {
        command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?));
    }
}

/// Has `command` start as the leader of a session of its own, with its standard input as the controlling terminal, so
/// that ctrl-C and job control work in a shell. Without a terminal there, it only gets the session.
#[allow(unsafe_code)]
pub fn give_terminal_to_child(command: &mut Command) {
    // SAFETY: between fork and exec only system calls are made (setsid, ioctl), nothing is allocated; descriptor 0 is
    // the child's standard input, which `Command` has set up before it calls this.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            // Not a terminal, or one that another session owns: a shell without job control is better than none.
            let _ = rustix::process::ioctl_tiocsctty(rustix::stdio::stdin());
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queued_signals_are_values_and_children_do_not_inherit_the_block() {
        let queue = Queue::new(&[Signal::SIGUSR1]).unwrap();
        assert_eq!(queue.wait(Duration::ZERO).unwrap(), None);
        let mut child = Command::new("sh");
        child.args(["-c", "kill -USR1 $$; sleep 5; exit 0"]);
        unblock_in_child(&mut child);
        let status = child.status().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(Signal::SIGUSR1 as i32));
        nix::sys::signal::raise(Signal::SIGUSR1).unwrap();
        assert_eq!(queue.wait(Duration::from_secs(5)).unwrap(), Some(Signal::SIGUSR1));
    }

    #[test]
    fn a_child_gets_a_session() {
        let mut child = Command::new("sh");
        child.args(["-c", "test $(cut -d' ' -f6 /proc/$$/stat) = $$"]).stdin(std::process::Stdio::null());
        give_terminal_to_child(&mut child);
        assert!(child.status().unwrap().success());
    }

    #[test]
    fn termination_sets_the_flag() {
        let flag = termination_flag().unwrap();
        assert!(!flag.load(Ordering::SeqCst));
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(flag.load(Ordering::SeqCst));
    }
}
