//! What capture asks of a machine: sysfs, device nodes, how full a file system is, and the system's own tools. Tests answer
//! from a tree of their own and from what real tools printed.

use ka_sys::process;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Time for one of the tools.
const LIMIT: Duration = Duration::from_secs(60);

/// A machine that can be looked at.
pub(crate) trait Machine {
    /// Its `/sys`.
    fn sys(&self) -> &Path;
    /// Its `/dev`.
    fn dev(&self) -> &Path;
    /// What the tool prints; it speaks English.
    ///
    /// # Errors
    /// When it cannot be run or fails.
    fn run(&self, tool: &str, words: &[&str]) -> Result<String, process::Error>;
    /// `major:minor` of a device node.
    ///
    /// # Errors
    /// When there is none.
    fn number(&self, node: &str) -> io::Result<String>;
    /// Bytes in use on the file system mounted at `place`.
    ///
    /// # Errors
    /// When it cannot be asked.
    fn used(&self, place: &Path) -> io::Result<u64>;
}

/// The machine that this process runs on.
pub(crate) struct This;

impl Machine for This {
    fn sys(&self) -> &Path {
        Path::new("/sys")
    }

    fn dev(&self) -> &Path {
        Path::new("/dev")
    }

    fn run(&self, tool: &str, words: &[&str]) -> Result<String, process::Error> {
        let mut command = Command::new(tool);
        command.args(words).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
        Ok(process::run(&mut command, LIMIT)?.text())
    }

    fn number(&self, node: &str) -> io::Result<String> {
        let status = rustix::fs::stat(node)?;
        Ok(format!("{}:{}", rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev)))
    }

    fn used(&self, place: &Path) -> io::Result<u64> {
        let space = rustix::fs::statvfs(place)?;
        Ok((space.f_blocks - space.f_bfree) * space.f_frsize)
    }
}
