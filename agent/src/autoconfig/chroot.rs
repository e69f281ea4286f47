//! What programs need around them inside the clone: `/dev`, `/proc`, `/sys` (with the firmware's variables) and an empty
//! `/run`. All of it is unmounted again in reverse order, also after an error, and whoever was left running inside is
//! killed first, so that the clone's file systems can be unmounted clean.

use super::Context;
use anyhow::{Context as _, Result, anyhow, bail};
use ka_layout::order::Firmware;
use rustix::io::Errno;
use rustix::mount::{self, MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal};
use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The mounts; dropping it takes them away too, but only [`Chroot::leave`] says whether that went well.
pub struct Chroot {
    target: PathBuf,
    mounts: Vec<PathBuf>,
}

impl Chroot {
    /// Mounts everything.
    pub fn enter(context: &Context) -> Result<Self> {
        let target = std::fs::canonicalize(context.target)
            .with_context(|| format!("finding {}", context.target.display()))?;
        if target == Path::new("/") {
            bail!("the target root is this system's own root");
        }
        let mut chroot = Self { target, mounts: Vec::new() };
        chroot.bind(context, "/dev")?;
        chroot.mount(context, "proc", "/proc", "")?;
        chroot.bind(context, "/sys")?;
        chroot.mount(context, "tmpfs", "/run", "mode=0755")?;
        let variables = "/sys/firmware/efi/efivars";
        if context.firmware == Firmware::Uefi
            && context.root.is_dir(variables)
            && context.root.list(variables)?.is_empty()
            && let Err(e) = chroot.mount(context, "efivarfs", variables, "")
        {
            // The boot loader step says what this means for it.
            log::warn!("the firmware's variables are out of reach: {e:#}");
        }
        Ok(chroot)
    }

    fn bind(&mut self, context: &Context, path: &str) -> Result<()> {
        let place = context.root.real_dir(path)?;
        mount::mount_bind_recursive(path, &place)
            .with_context(|| format!("binding {path} to {}", place.display()))?;
        self.mounts.push(place.clone());
        // Else unmounting here would unmount the original's submounts where they are shared.
        mount::mount_change(&place, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .with_context(|| format!("making {} private", place.display()))
    }

    fn mount(&mut self, context: &Context, kind: &str, path: &str, options: &str) -> Result<()> {
        let place = context.root.real_dir(path)?;
        let options = std::ffi::CString::new(options).context("writing mount options")?;
        let options: Option<&CStr> = (!options.is_empty()).then_some(&options);
        mount::mount(kind, &place, kind, MountFlags::empty(), options)
            .with_context(|| format!("mounting {kind} on {}", place.display()))?;
        self.mounts.push(place);
        Ok(())
    }

    /// Unmounts everything.
    pub fn leave(mut self) -> Result<()> {
        self.unmount_all()
    }

    fn unmount_all(&mut self) -> Result<()> {
        if self.mounts.is_empty() {
            return Ok(());
        }
        kill_inhabitants(&self.target);
        let mut problems = Vec::new();
        while let Some(place) = self.mounts.pop() {
            // Detached, because the recursive binds have mounts below them; none of these holds the clone's data.
            match mount::unmount(&place, UnmountFlags::DETACH) {
                Ok(()) | Err(Errno::INVAL) => {}
                Err(e) => problems.push(format!("unmounting {}: {e}", place.display())),
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(anyhow!("{}", problems.join("; "))) }
    }
}

impl Drop for Chroot {
    fn drop(&mut self) {
        if let Err(e) = self.unmount_all() {
            log::error!("{e:#}");
        }
    }
}

/// Kills all processes whose root directory is `target`, daemons that a program started there among them.
fn kill_inhabitants(target: &Path) {
    // One that forks while we look is found in the next round.
    for _ in 0..20 {
        let inhabitants = inhabitants(target);
        if inhabitants.is_empty() {
            return;
        }
        for (pid, name) in inhabitants {
            log::warn!(
                "killing {name} (process {}), which was left running in the clone",
                pid.as_raw_nonzero()
            );
            // It may have ended meanwhile.
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn inhabitants(target: &Path) -> Vec<(Pid, String)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let inside =
        pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/root")).is_ok_and(|r| r == target));
    inside
        .filter_map(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Some((Pid::from_raw(pid)?, name.trim().to_owned()))
        })
        .collect()
}
