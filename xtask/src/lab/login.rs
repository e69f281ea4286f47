//! `cargo xtask lab login`: the golden tree on a disk made by mke2fs, booted with its kernel given from outside. No part of
//! Ka is in this: it shows that tree, emulator and serial console are fit for the other tests.

use super::accel;
use super::net::Net;
use super::vm::{Board, Spec, Vm};
use crate::{golden, node, run, say, setup};
use anyhow::Result;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Boots it and logs in.
///
/// # Errors
/// When it does not come to its login.
pub fn run(dir: &Path) -> Result<()> {
    setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
    let golden = golden::get(&dir.join("golden.log"))?;
    let accel = accel::choose(&golden.vmlinuz())?;
    let disk = dir.join("disk");
    super::vm::empty_disk(&disk, 2 << 30)?;
    run::logged(
        Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-U", golden::ROOT_UUID, "-d"])
            .arg(&golden.tree)
            .arg(&disk),
        &dir.join("mke2fs.log"),
        Duration::from_secs(300),
    )?;
    // The one file system has no swap and no EFI system partition beside it.
    run::quiet("debugfs", &["-w", "-R", "rm /etc/fstab", &disk.display().to_string()])?;
    let net = Net::new(true)?;
    let spec = Spec {
        name: "golden".into(),
        board: Board::BiosVirtio,
        memory: 512,
        disks: vec![disk],
        extra: None,
        mac: "52:54:00:6b:61:fe".into(),
        tap: net.tap()?,
        accel,
        dir: dir.to_path_buf(),
        kernel: Some(golden.clone()),
    };
    let start = Instant::now();
    let mut vm = Vm::start(&spec, &net)?;
    vm.login(golden::HOSTNAME, golden::PASSWORD, node::LOGIN_LIMIT)?;
    say!("golden", "logged in after {:.0} s", start.elapsed().as_secs_f64());
    for command in ["uname -r", "systemctl --failed --no-legend", "df -h /", "systemd-analyze"] {
        let (status, output) = vm.shell(command, node::COMMAND_LIMIT)?;
        say!("golden", "{command}: {status} {output}");
    }
    node::power_off(&mut vm)
}
