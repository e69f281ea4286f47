//! What PID 1 must do before and after the installation: console, mounts, modules, network, reaping, reboot.
//!
//! `main` asks for its [`role`] first. As PID 1 it becomes the [`supervise`]r, which starts the same program again as the
//! worker; the worker calls [`start_worker`] and [`network`], installs, and ends with exit status 0 or, after
//! [`report_failure`], another.

pub mod alias;
pub mod dhcp;
pub mod dhcp_client;
pub mod facts;
pub mod links;
pub mod logger;
pub mod mac;
pub mod modindex;
pub mod modules;
pub mod mounts;
pub mod network;
pub mod packet;
pub mod shell;
mod supervisor;

use crate::cmdline::Options;
use anyhow::{Context, Result};
pub use facts::Machine;
use modules::Modules;
pub use network::Network;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
pub use supervisor::{Hooks, run as supervise};

/// The argument with which PID 1 starts the worker.
pub const WORKER_ARG: &str = "--worker";
/// Where the disk step lists the disks that it is writing, one device a line.
pub const DISKS_FILE: &str = "/run/ka/disks";
/// Where the worker leaves the cause of a failure for PID 1 to show.
pub const FAILURE_FILE: &str = "/run/ka/failure";

/// What this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// PID 1 of the initramfs: call [`supervise`].
    Init,
    /// The worker that PID 1 started: install.
    Worker,
    /// The kernel called for a module: call [`modprobe`].
    Modprobe,
    /// A program that somebody typed.
    Command,
}

/// What this process is, by its number and arguments. The kernel hands words of its command line to PID 1 as arguments,
/// so those of PID 1 mean nothing.
#[must_use]
pub fn role() -> Role {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    if std::process::id() == 1 {
        Role::Init
    } else if Path::new(&program).file_name().is_some_and(|name| name == "modprobe") {
        Role::Modprobe
    } else if args.next().is_some_and(|arg| arg == WORKER_ARG) {
        Role::Worker
    } else {
        Role::Command
    }
}

/// Acts as `/sbin/modprobe` with this process's arguments.
#[must_use]
pub fn modprobe() -> std::process::ExitCode {
    modules::modprobe(std::env::args().skip(1)).into()
}

/// What [`start_worker`] leaves behind.
pub struct Started {
    /// The machine.
    pub machine: Machine,
    /// The modules, for later waits.
    pub modules: Modules,
}

/// The first thing in the worker, step `boot`: log, modules for all devices, and a bounded wait for disks to appear.
///
/// # Errors
/// When the index of the modules cannot be read.
pub fn start_worker(options: &Options) -> Result<Started> {
    logger::install(options.log);
    logger::open_consoles(&options.consoles);
    logger::set_step("boot");
    std::panic::set_hook(Box::new(|info| {
        log::error!("panic: {info}");
        leave_failure(&format!("panic: {info}"));
        logger::flush(Duration::from_secs(2));
    }));
    fs::create_dir_all("/run/ka").context("creating /run/ka")?;
    let start = Instant::now();
    let mut modules = Modules::open()?;
    if modules.known() == 0 {
        log::warn!(
            "this image has no modules for kernel {}",
            rustix::system::uname().release().to_string_lossy()
        );
    }
    let loaded = modules.coldplug() + modules.load_by_name();
    let loaded = loaded + modules.coldplug();
    if let Err(e) = mounts::apply(&mounts::EFIVARS) {
        log::warn!("{e:#}");
    }
    let machine = Machine::detect();
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "?".to_owned());
    log::info!(
        "{} {} (serial {}), {:?}, {} of memory, {} CPUs, Linux {}; {loaded} of {} modules in {:.1} s",
        text(&machine.vendor),
        text(&machine.product),
        text(&machine.serial),
        machine.firmware,
        ka_cli::units::show_size(machine.memory),
        machine.cpus,
        machine.kernel,
        modules.known(),
        start.elapsed().as_secs_f64()
    );
    if !wait_for_devices(&mut modules, options.device_wait, || !disks().is_empty()) {
        log::warn!("no disk appeared within {} s", options.device_wait.as_secs());
    } else {
        settle(&mut modules);
        log::info!("disks: {}", disks().join(" "));
    }
    Ok(Started { machine, modules })
}

/// Step `network`: the interface, its address, routes and name servers.
///
/// # Errors
/// See [`network::set_up`].
pub fn network(options: &Options, modules: &mut Modules) -> Result<Network> {
    logger::set_step("network");
    network::set_up(options, || {
        modules.coldplug();
    })
}

/// Waits until `there` says yes, loading modules for what appears meanwhile. False when `limit` passed first.
pub fn wait_for_devices(modules: &mut Modules, limit: Duration, there: impl Fn() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if there() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
        modules.coldplug();
    }
}

/// Waits until no disk has appeared for half a second (5 s at most): with several controllers, the first disk is not the
/// only one, and a rule must see them all.
fn settle(modules: &mut Modules) {
    let end = Instant::now() + Duration::from_secs(5);
    let mut last = disks();
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(500) && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
        let new = modules.coldplug();
        let now = disks();
        if new > 0 || now != last {
            last = now;
            since = Instant::now();
        }
    }
}

/// The whole disks that the kernel knows and that have a size: not loop, RAM or optical ones.
fn disks() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| {
            let size = fs::read_to_string(entry.path().join("size")).unwrap_or_default();
            size.trim().parse::<u64>().is_ok_and(|sectors| sectors > 0)
                && entry.path().join("device").exists()
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with("sr") && !name.starts_with("fd"))
        .collect();
    names.sort();
    names
}

/// Logs a failure of the worker and leaves it for PID 1 to show. To be called right before the worker ends with an exit
/// status that is not 0.
pub fn report_failure(step: &str, error: &anyhow::Error) {
    let text = format!("{step}: {error:#}");
    log::error!("{error:#}");
    leave_failure(&text);
    logger::flush(Duration::from_secs(2));
}

fn leave_failure(text: &str) {
    // PID 1 then shows that the worker failed, though not why; the log has it.
    if let Err(e) = fs::write(FAILURE_FILE, text) {
        log::warn!("writing {FAILURE_FILE}: {e}");
    }
}
