//! Autoconfig: makes the clone itself. Every concern is a [`Piece`] in a file of its own that changes files below the
//! mounted clone and says what it changed; `docs/autoconfig.md` lists them all, and nothing else may differ from the
//! golden tree. [`configure`] is the step `configure`, [`bootloader`] the step of that name, and [`verify`] the check
//! without which no installation is a success.

mod boot_entries;
mod chroot;
mod clock;
mod connections;
mod crypttab;
mod debconf;
mod efi;
mod entries;
mod esp_files;
mod extlinux;
mod fstab;
mod grub;
mod grub_cfg;
mod grub_devices;
mod grubenv;
mod hooks;
mod host_ids;
mod hostname;
mod ifcfg;
mod initramfs;
mod initramfs_tools;
mod interfaces;
mod kernel_cmdline;
mod leftovers;
mod loader;
mod machine_id;
mod mkinitcpio;
mod names;
mod nvram;
mod pending;
mod programs;
mod resume;
mod root;
mod selinux;
mod ssh_keys;
mod storage;
mod subvolumes;
mod systemd_boot;
mod uki;
mod verify;
mod wipe;

use anyhow::{Context as _, Result, anyhow};
use chroot::Chroot;
use ka_layout::model::Fs;
use ka_layout::order::{Firmware, InstallOrder, Volume};
use names::Names;
use programs::Programs;
use root::Root;
use std::cell::RefCell;
use std::fmt;
use std::path::Path;

pub use verify::verify;

/// The interface over which the node was installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The kernel's name of it in the initramfs, `eth0`.
    pub interface: String,
    /// Its MAC address, `52:54:00:12:34:56`.
    pub mac: String,
    /// Its IP address, without a prefix length.
    pub address: Option<String>,
}

/// All that the pieces know of the node and of what it is to become.
pub struct Context<'a> {
    /// Where the clone is mounted.
    pub target: &'a Path,
    /// What the server ordered.
    pub order: &'a InstallOrder,
    /// What was made on the node's disks.
    pub volumes: &'a [Volume],
    /// How the node booted.
    pub firmware: Firmware,
    /// The interface over which it is installed, if any.
    pub network: Option<&'a Nic>,
    /// The clone's files.
    root: Root,
    /// How its programs are run.
    programs: Programs,
    /// Why the clone's initramfs must be built anew; pieces add to it.
    stale_initramfs: RefCell<Vec<String>>,
    /// The golden node's machine id and the clone's own, once the piece `machine-id` has made it.
    machine_ids: RefCell<Option<(String, String)>>,
}

impl<'a> Context<'a> {
    /// Opens the clone that is mounted at `target`.
    ///
    /// # Errors
    /// When `target` cannot be opened.
    pub fn new(
        target: &'a Path,
        order: &'a InstallOrder,
        volumes: &'a [Volume],
        firmware: Firmware,
        network: Option<&'a Nic>,
    ) -> Result<Self> {
        let kept: Vec<String> =
            order.policy.keep.iter().cloned().chain(volumes.iter().filter_map(foreign)).collect();
        let root = Root::open(target)?.keeping(&kept);
        Ok(Self {
            target,
            order,
            volumes,
            firmware,
            network,
            root,
            programs: Programs::Inside,
            stale_initramfs: RefCell::default(),
            machine_ids: RefCell::default(),
        })
    }

    /// The same, for a dry run: nothing is changed, and no program is run that would change something.
    #[must_use]
    pub fn dry(mut self) -> Self {
        self.root = self.root.dry();
        self.programs = Programs::Noted(RefCell::default());
        self
    }

    fn names(&self) -> Names<'_> {
        Names::new(&self.order.golden, self.volumes)
    }

    fn skips(&self, piece: &str) -> bool {
        let policy = &self.order.policy;
        let left_out = !policy.only.is_empty() && !policy.only.iter().any(|s| s == piece);
        policy.skip.iter().any(|s| s == piece) || (left_out && piece != "verify")
    }

    /// The volume mounted at `path` in the clone.
    fn mounted_at(&self, path: &str) -> Option<&Volume> {
        self.volumes.iter().find(|v| v.mount.as_ref().is_some_and(|m| m.path == path))
    }

    fn root_volume(&self) -> Result<&Volume> {
        self.mounted_at("/").context("finding the root file system: no volume is mounted at /")
    }

    /// What the initramfs mounts: `/`, and `/usr` where that is a file system of its own.
    fn early_volumes(&self) -> impl Iterator<Item = &Volume> {
        ["/", "/usr"].into_iter().filter_map(move |path| self.mounted_at(path))
    }

    /// The volume that holds `/boot`, which may be the root file system.
    fn boot_volume(&self) -> Result<&Volume> {
        self.mounted_at("/boot").map_or_else(|| self.root_volume(), Ok)
    }

    /// The disks that a BIOS may boot: all below `/boot`.
    fn boot_disks(&self) -> Result<impl Iterator<Item = &String>> {
        let boot = self.boot_volume()?;
        Ok(std::iter::once(&boot.disk).chain(&boot.more_disks))
    }

    fn initramfs_is_stale(&self, reason: String) {
        self.stale_initramfs.borrow_mut().push(reason);
    }
}

/// What of a preserved volume no piece changes: all of it is the node's own. On an ESP the boot loader gets its directory,
/// and the boot entries of other systems stay.
fn foreign(volume: &Volume) -> Option<String> {
    let mount = volume.mount.as_ref().filter(|_| volume.preserved)?;
    let is_esp =
        volume.kind == "esp" || (volume.fs == Some(Fs::Vfat) && grub::ESPS.contains(&mount.path.as_str()));
    Some(if is_esp { format!("{}/loader", mount.path) } else { mount.path.clone() })
}

/// Something that autoconfig did to the clone, or noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The piece that did it.
    pub piece: &'static str,
    /// The file as the clone names it, or the thing (`NVRAM`, `/dev/sda`).
    pub file: String,
    /// What was done.
    pub what: String,
    /// Whether an operator should read it: nothing was changed, but something may not be as wanted.
    pub warning: bool,
}

impl Change {
    fn new(piece: &'static str, file: impl Into<String>, what: impl Into<String>) -> Self {
        Self { piece, file: file.into(), what: what.into(), warning: false }
    }

    fn warning(piece: &'static str, file: impl Into<String>, what: impl Into<String>) -> Self {
        Self { warning: true, ..Self::new(piece, file, what) }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.warning { "warning: " } else { "" };
        write!(f, "{mark}{}: {}: {}", self.piece, self.file, self.what)
    }
}

/// One concern of autoconfig.
trait Piece {
    /// The name by which `policy.skip` leaves it out.
    fn name(&self) -> &'static str;
    /// Does it; what was done comes back in order.
    fn apply(&self, context: &Context) -> Result<Vec<Change>>;
}

/// The pieces of the step `configure`, in the order in which they run. The initramfs comes last, for the others may have
/// changed what is baked into it.
const PIECES: &[&dyn Piece] = &[
    &fstab::Fstab,
    &crypttab::Crypttab,
    &storage::Storage,
    &hostname::Hostname,
    &machine_id::MachineId,
    &ssh_keys::SshKeys,
    &leftovers::Leftovers,
    &wipe::Wipe,
    &interfaces::Interfaces,
    &connections::Connections,
    &host_ids::HostIds,
    &clock::Clock,
    &resume::Resume,
    &kernel_cmdline::KernelCmdline,
    &boot_entries::BootEntries,
    &grub_devices::GrubDevices,
    &debconf::Debconf,
    &initramfs::Initramfs,
];

/// What comes after the operator's hooks, which may have made files too.
const LAST: &[&dyn Piece] = &[&selinux::Selinux];

/// The pieces of the step `bootloader`.
const LOADERS: &[&dyn Piece] = &[&loader::BootLoader, &selinux::Selinux];

/// The step `configure`: all identity pieces, then the operator's hooks.
///
/// # Errors
/// When a piece or a hook fails; the error names it.
pub fn configure(context: &Context) -> Result<Vec<Change>> {
    let chroot = Chroot::enter(context)?;
    let result = apply_all(context, PIECES).and_then(|mut changes| {
        if !context.skips(hooks::NAME) {
            changes.extend(hooks::run_all(context)?);
        }
        changes.extend(apply_all(context, LAST)?);
        Ok(changes)
    });
    leave(chroot, result)
}

/// What [`configure`] and [`bootloader`] would do, for a context made by [`Context::dry`]. Hooks are only named, for
/// nobody knows what they would do.
///
/// # Errors
/// When a piece fails, as it would in earnest.
pub fn dry_run(context: &Context) -> Result<Vec<Change>> {
    let mut changes = apply_all(context, PIECES)?;
    if !context.skips(hooks::NAME) {
        let hooks = context.order.hooks.iter();
        changes.extend(hooks.map(|hook| Change::new(hooks::NAME, &hook.name, "to be run")));
    }
    changes.extend(apply_all(context, LAST)?);
    changes.extend(apply_all(context, LOADERS)?);
    Ok(changes)
}

/// The step `bootloader`: the clone's boot loader, onto the disk (whose partition table is written by now) and into the
/// firmware's boot entries.
///
/// # Errors
/// When the boot loader cannot be installed; the error says what is missing.
pub fn bootloader(context: &Context) -> Result<Vec<Change>> {
    let chroot = Chroot::enter(context)?;
    let result = apply_all(context, LOADERS);
    leave(chroot, result)
}

fn apply_all(context: &Context, pieces: &[&dyn Piece]) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    for piece in pieces {
        let name = piece.name();
        if context.skips(name) {
            log::info!("autoconfig: {name} is skipped by policy");
            continue;
        }
        let mut done = piece.apply(context).with_context(|| format!("autoconfig piece {name}"))?;
        done.extend(
            context
                .take_notes()
                .into_iter()
                .map(|line| Change::new(name, "program", format!("to be run: {line}"))),
        );
        for change in &done {
            if change.warning {
                log::warn!("{change}");
            } else {
                log::info!("{change}");
            }
        }
        changes.extend(done);
    }
    Ok(changes)
}

/// Unmounts what the chroot needed; the work's own error goes first.
fn leave(chroot: Chroot, result: Result<Vec<Change>>) -> Result<Vec<Change>> {
    match (result, chroot.leave()) {
        (Ok(changes), Ok(())) => Ok(changes),
        (Ok(_), Err(e)) => Err(e),
        (Err(e), Ok(())) => Err(e),
        (Err(e), Err(also)) => Err(anyhow!("{e:#}; then {also:#}")),
    }
}

#[cfg(test)]
mod pieces_tests;
#[cfg(test)]
mod real;
#[cfg(test)]
mod testing;
