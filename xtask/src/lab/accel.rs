//! Does KVM work here? `/dev/kvm` alone says little: on some rented machines it opens and then cannot run a kernel. So a
//! small machine is really started with it.

use super::vm::Accel;
use crate::interrupt;
use crate::run::Group;
use crate::say;
use anyhow::{Context, Result};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// A kernel says its first words within a second where KVM works.
const LIMIT: Duration = Duration::from_secs(8);
/// Written by any kernel that was given no root file system: by then it has brought up all of the machine.
const PROOF: &[u8] = b"Kernel panic - not syncing: VFS";

/// The best way to run machines here, found by booting `vmlinuz`. `KA_LAB_ACCEL=tcg` or `kvm` decides without a try.
///
/// # Errors
/// When even asking fails.
pub fn choose(vmlinuz: &Path) -> Result<Accel> {
    match std::env::var("KA_LAB_ACCEL").as_deref() {
        Ok("kvm") => return Ok(Accel::Kvm),
        Ok("tcg") => return Ok(Accel::Tcg),
        _ => {}
    }
    if let Err(e) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        say!(
            "lab",
            "no KVM here (/dev/kvm: {e}): machines are emulated in software, which is slow but works"
        );
        return Ok(Accel::Tcg);
    }
    if boots(vmlinuz)? {
        say!("lab", "KVM works: machines run at the processor's own speed");
        Ok(Accel::Kvm)
    } else {
        say!(
            "lab",
            "/dev/kvm is there but cannot boot a kernel: machines are emulated in software, which is slow but works"
        );
        Ok(Accel::Tcg)
    }
}

fn boots(vmlinuz: &Path) -> Result<bool> {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-M",
            "q35,graphics=off",
            "-m",
            "256",
            "-nodefaults",
            "-no-reboot",
        ])
        .args([
            "-display",
            "none",
            "-monitor",
            "none",
            "-serial",
            "stdio",
            "-append",
            "console=ttyS0 panic=-1",
        ])
        .arg("-kernel")
        .arg(vmlinuz)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut group = Group::spawn(&mut command)?;
    let mut stdout = group.child().stdout.take().context("QEMU has no standard output")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stdout.read(&mut buffer) {
            text.extend_from_slice(&buffer[..n]);
            if text.windows(PROOF.len()).any(|w| w == PROOF) {
                // Nobody listens any more when the time was over: then it is too late anyway.
                let _ = sender.send(());
                return;
            }
        }
    });
    let found = interrupt::poll(LIMIT, || match receiver.try_recv() {
        Ok(()) => Ok(Some(true)),
        Err(mpsc::TryRecvError::Disconnected) => Ok(Some(false)),
        Err(mpsc::TryRecvError::Empty) => Ok(None),
    })?;
    Ok(found.unwrap_or(false))
}
