//! What a report of a benchmark says about how it came to be: command, time, machine, versions.

use crate::bench::machine::{field, kilobytes};
use crate::{binaries, run};
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;

/// The Debian packages of the chain's peers.
pub const PEERS: [&str; 3] = ["mbuffer", "netcat-openbsd", "udpcast"];

/// How a report came to be.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// The command that made it.
    pub command: String,
    /// When, in UTC.
    pub date: String,
    /// The kernel's version.
    pub kernel: String,
    /// The processor's model.
    pub cpu: String,
    /// How many of them.
    pub cpus: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Most bytes of a socket's send and receive buffer.
    pub socket_buffers: [String; 2],
    /// Name and version of everything that took part.
    pub versions: Vec<(String, String)>,
}

impl Facts {
    /// Asks the machine, Ka's program `ka`, and dpkg about the packages of its peers.
    ///
    /// # Errors
    /// When it does not tell.
    pub fn gather(ka: &Path, peers: &[&str]) -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| format!("reading {path}"));
        let cpuinfo = read("/proc/cpuinfo")?;
        let mut versions = vec![("ka".to_owned(), ka_version(ka)?)];
        for &package in peers {
            let version = run::output("dpkg-query", &["-W", "-f", "${Version}", package]);
            versions.push((package.to_owned(), version.unwrap_or_else(|_| "not a package".to_owned())));
        }
        Ok(Self {
            command: command(std::env::args().skip(1)),
            date: run::output("date", &["-u", "+%F %H:%M UTC"])?,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpu: field(&cpuinfo, "model name").unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().context("counting processors")?.get(),
            memory: kilobytes(&read("/proc/meminfo")?, "MemTotal").unwrap_or(0),
            socket_buffers: ["/proc/sys/net/core/wmem_max", "/proc/sys/net/core/rmem_max"]
                .map(|path| read(path).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())),
            versions,
        })
    }

    /// The same as Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let versions: Vec<String> =
            self.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        format!(
            "Command: `{}`\n\n{}; {} processors ({}), {}; Linux {}; cubic everywhere; \
             wmem_max {}, rmem_max {}.\n{}.\n",
            self.command,
            self.date,
            self.cpus,
            self.cpu,
            ka_cli::units::show_size(self.memory),
            self.kernel,
            self.socket_buffers[0],
            self.socket_buffers[1],
            versions.join(", ")
        )
    }
}

fn command(words: impl Iterator<Item = String>) -> String {
    std::iter::once("cargo xtask".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// What the program says, and the commit from which it was most likely built.
///
/// # Errors
/// When it says nothing.
pub fn ka_version(program: &Path) -> Result<String> {
    let version = run::output(&program.to_string_lossy(), &["--version"])?;
    let version = version.split_whitespace().next_back().unwrap_or("unknown").to_owned();
    let workspace = binaries::workspace()?;
    let commit = run::output("git", &["-C", &workspace.to_string_lossy(), "rev-parse", "--short", "HEAD"]);
    // A source that was unpacked from an archive has no commits.
    Ok(commit.map_or(version.clone(), |commit| format!("{version} ({commit})")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_says_how_it_came_to_be() {
        let facts = Facts {
            command: command(["bench", "chain", "--rounds", "3"].map(str::to_owned).into_iter()),
            date: "2026-11-22 19:00 UTC".to_owned(),
            kernel: "6.1".to_owned(),
            cpu: "Some CPU".to_owned(),
            cpus: 2,
            memory: 24 << 30,
            socket_buffers: ["1".to_owned(), "2".to_owned()],
            versions: vec![("ka".to_owned(), "0.1.0".to_owned()), ("mbuffer".to_owned(), "1".to_owned())],
        };
        let text = facts.markdown();
        assert!(text.starts_with("Command: `cargo xtask bench chain --rounds 3`\n"), "{text}");
        assert!(text.contains("2 processors (Some CPU)") && text.contains("ka 0.1.0, mbuffer 1."), "{text}");
    }
}
