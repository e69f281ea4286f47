//! `ka-agent`: PID 1 of the initramfs, its worker, the kernel's modprobe, or a command; see `init::role`.

mod ciphers;

use ka_agent::init::{self, Role};
use ka_agent::{commands, disk};
use std::process::ExitCode;

fn main() -> ExitCode {
    let role = init::role();
    // PID 1 leaves its limit to its worker; the kernel's modprobe has one file.
    if matches!(role, Role::Worker | Role::Command)
        && let Err(e) = ka_sys::limits::raise_open_files()
    {
        eprintln!("ka-agent: raising the limit of open files: {e}");
    }
    match role {
        Role::Init => init::supervise(init::Hooks { clear_disks: |list| disk::clear_listed(list).map(drop) }),
        Role::Worker => commands::work().into(),
        Role::Modprobe => init::modprobe(),
        Role::Command => commands::run(&ka_cli::args::parse("ka-agent", env!("CARGO_PKG_VERSION"))).into(),
    }
}
