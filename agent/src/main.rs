//! `ka-agent`: PID 1 of the initramfs, its worker, the kernel's modprobe, or a command; see `init::role`.

use ka_agent::init::{self, Role};
use ka_agent::{commands, disk};
use std::process::ExitCode;

fn main() -> ExitCode {
    match init::role() {
        Role::Init => init::supervise(init::Hooks { clear_disks: |list| disk::clear_listed(list).map(drop) }),
        Role::Worker => commands::work().into(),
        Role::Modprobe => init::modprobe(),
        Role::Command => commands::run(&ka_cli::args::parse("ka-agent", env!("CARGO_PKG_VERSION"))).into(),
    }
}
