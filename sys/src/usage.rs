//! What an ended child has used, which the standard library's wait does not tell.

use nix::libc;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

/// Processor time and memory of an ended child and of the children that it waited for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Time in user space.
    pub user: Duration,
    /// Time in the kernel on its behalf.
    pub system: Duration,
    /// Most memory resident at once, in bytes. Counts what the parent had resident when it started the child.
    pub peak: u64,
}

/// Waits for child `pid` and collects it.
///
/// # Errors
/// What the kernel says: `ECHILD` when it is no child of ours or was collected already.
#[allow(unsafe_code)]
pub fn wait(pid: u32) -> io::Result<(ExitStatus, Usage)> {
    let pid = i32::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut status = 0;
    // SAFETY: rusage holds plain integers only, for which all bits zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers lead to values of the right types that outlive the call.
        let collected = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
        if collected == pid {
            break;
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
    let usage = Usage {
        user: duration(usage.ru_utime),
        system: duration(usage.ru_stime),
        peak: u64::try_from(usage.ru_maxrss).unwrap_or(0).saturating_mul(1024),
    };
    Ok((ExitStatus::from_raw(status), usage))
}

fn duration(time: libc::timeval) -> Duration {
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    Duration::from_secs(part(time.tv_sec)) + Duration::from_micros(part(time.tv_usec))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    #[allow(clippy::zombie_processes)] // it is waited for, by what is tested
    fn a_busy_child_has_used_time_and_memory() {
        let script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exit 3";
        let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let (status, usage) = wait(child.id()).unwrap();
        assert_eq!(status.code(), Some(3));
        assert!(usage.user + usage.system > Duration::from_millis(5), "{usage:?}");
        assert!(usage.peak > 100_000, "{usage:?}");
        assert_eq!(wait(child.id()).unwrap_err().raw_os_error(), Some(libc::ECHILD));
    }
}
