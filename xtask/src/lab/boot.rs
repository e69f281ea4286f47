//! `cargo xtask lab boot`: a clone's disk booted by itself, on a network where nobody answers, and looked at.

use super::accel;
use super::net::Net;
use super::vm::{Board, Spec, Vm};
use crate::{fleet, golden, node, say, setup};
use anyhow::{Result, bail};
use argh::FromArgs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Boots the disk of an earlier run's clone by itself, logs in and checks who it
/// is.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "boot")]
pub struct Boot {
    /// the disk, a raw file; it is written to
    #[argh(positional)]
    disk: PathBuf,
    /// what the clone calls itself
    #[argh(option)]
    name: String,
    /// ide, ahci, nvme (UEFI) or virtio (default)
    #[argh(option, default = "String::from(\"virtio\")")]
    board: String,
}

/// Boots it.
///
/// # Errors
/// When it does not come to its login or is not itself.
pub fn run(boot: &Boot, dir: &Path) -> Result<()> {
    let board = match boot.board.as_str() {
        "ide" => Board::BiosIde,
        "ahci" => Board::BiosAhci,
        "nvme" => Board::UefiNvme,
        "virtio" => Board::BiosVirtio,
        other => bail!("--board {other}: ide, ahci, nvme or virtio"),
    };
    setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
    let golden = golden::get(&dir.join("golden.log"))?;
    let net = Net::new(false)?;
    let spec = Spec {
        name: boot.name.clone(),
        board,
        memory: fleet::MEMORY,
        disks: vec![boot.disk.clone()],
        extra: None,
        mac: "52:54:00:6b:61:fd".into(),
        tap: net.tap()?,
        accel: accel::choose(&golden.vmlinuz())?,
        dir: dir.to_path_buf(),
        kernel: None,
    };
    let start = Instant::now();
    let mut vm = Vm::start(&spec, &net)?;
    vm.login(&boot.name, golden::PASSWORD, node::LOGIN_LIMIT)?;
    say!(&boot.name, "logged in after {:.0} s", start.elapsed().as_secs_f64());
    for command in
        ["uname -r", "systemctl --failed --no-legend", "df -h /", "ip -brief addr", "cat /etc/fstab"]
    {
        let (status, output) = vm.shell(command, node::COMMAND_LIMIT)?;
        say!(&boot.name, "{command} ({status}): {output}");
    }
    let identity = node::check_identity(&mut vm, &boot.name, &golden.tree)?;
    say!(&boot.name, "is itself: {}, {}", identity.machine_id, identity.ssh_keys.join(" "));
    node::power_off(&mut vm)
}
