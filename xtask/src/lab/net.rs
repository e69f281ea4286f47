//! A network of its own: a namespace with a bridge and taps, gone with everything in it when it is dropped. Nothing of
//! the host's network is touched.

use crate::{run, say};
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// The bridge inside the namespace; the server listens there.
pub const BRIDGE: &str = "br0";
/// The server's address on the bridge.
pub const SERVER_IP: &str = "10.91.0.1";
/// First part of the name of every namespace that xtask makes; the process id follows.
pub const PREFIX: &str = "ka-lab-";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A namespace with a bridge.
#[derive(Debug)]
pub struct Net {
    name: String,
    taps: AtomicU32,
}

impl Net {
    /// Makes one, with [`SERVER_IP`] on the bridge if `address`.
    ///
    /// # Errors
    /// When the kernel or `ip` refuses.
    pub fn new(address: bool) -> Result<Self> {
        // Once: networks that are made at the same time would fight over them.
        static LEFTOVERS: std::sync::Mutex<bool> = std::sync::Mutex::new(false);
        let mut removed = LEFTOVERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !*removed {
            remove_leftovers()?;
            *removed = true;
        }
        drop(removed);
        let name = format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        run::quiet("ip", &["netns", "add", &name]).context("making a network namespace")?;
        let net = Self { name, taps: AtomicU32::new(0) };
        net.ip(&["link", "set", "lo", "up"])?;
        net.ip(&["link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0"])?;
        if address {
            net.ip(&["addr", "add", &format!("{SERVER_IP}/24"), "dev", BRIDGE])?;
            // iPXE waits 13 s for a router: whoever answers DHCP here can announce one from this address.
            net.ip(&["addr", "add", "fd91::1/64", "dev", BRIDGE, "nodad"])?;
        }
        net.ip(&["link", "set", BRIDGE, "up"])?;
        Ok(net)
    }

    fn ip(&self, args: &[&str]) -> Result<()> {
        let mut words = vec!["-n", &self.name];
        words.extend(args);
        run::quiet("ip", &words).context("setting the lab's network up")
    }

    /// A new tap on the bridge; its name.
    ///
    /// # Errors
    /// As [`Net::new`].
    pub fn tap(&self) -> Result<String> {
        let tap = format!("tap{}", self.taps.fetch_add(1, Ordering::Relaxed));
        self.ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
        self.ip(&["link", "set", &tap, "master", BRIDGE, "up"])?;
        Ok(tap)
    }

    /// A command that runs inside. `ip netns exec` replaces itself by the program, so its process id is the program's.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.name) {
            say!("lab", "cannot remove the network namespace {}: {e:#}", self.name);
        }
    }
}

/// Ends what still runs in a namespace, then removes it.
///
/// # Errors
/// When `ip` refuses.
pub fn remove(name: &str) -> Result<()> {
    let pids = run::output("ip", &["netns", "pids", name])?;
    for pid in pids.split_whitespace().filter_map(|pid| pid.parse().ok()) {
        // ESRCH: it ended meanwhile.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    run::quiet("ip", &["netns", "del", name])
}

/// Removes the namespaces of earlier runs that were killed before they could clean up.
///
/// # Errors
/// When the folder of the names cannot be read.
pub fn remove_leftovers() -> Result<()> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Ok(()) };
    for entry in entries {
        let name = entry.context("reading /run/netns")?.file_name().to_string_lossy().into_owned();
        if owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            say!("lab", "removing {name}, left by a run that was killed");
            if let Err(e) = remove(&name) {
                say!("lab", "cannot remove {name}: {e:#}");
            }
        }
    }
    Ok(())
}

fn owner(namespace: &str) -> Option<u32> {
    namespace.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_namespaces_have_an_owner() {
        assert_eq!(owner("ka-lab-123-0"), Some(123));
        assert_eq!(owner("ka-lab-x-0"), None);
        assert_eq!(owner("somebody-123"), None);
    }
}
