//! `cargo xtask demo`: three bare machines on a virtual network become three running clones, and everything that makes
//! them clones is checked.

use crate::binaries::{self, Binaries};
use crate::fleet::{self, Bare, Fleet};
use crate::lab::accel;
use crate::lab::vm::{Accel, Board};
use crate::node::{self, Report};
use crate::server::{self, Deploy, Server};
use crate::{golden, interrupt, say, setup};
use anyhow::{Result, bail};
use ka_cli::units::show_time;
use std::path::Path;
use std::time::{Duration, Instant};

/// The three machines.
pub const MACHINES: [Bare; 3] = [
    Bare { name: "clone-ide", board: Board::BiosIde, disks: &[fleet::DISK] },
    Bare { name: "clone-sata", board: Board::BiosAhci, disks: &[fleet::DISK] },
    Bare { name: "clone-nvme", board: Board::UefiNvme, disks: &[fleet::DISK] },
];
/// The whole deployment, on a loaded machine without KVM.
const LIMIT: Duration = Duration::from_secs(1200);

/// Bytes that builds and virtual disks take.
const ROOM: u64 = 8 << 30;

/// Runs the demonstration in `dir`.
///
/// # Errors
/// When anything is not as it must be.
pub fn run(dir: &Path) -> Result<()> {
    let start = Instant::now();
    say!("demo", "logs are kept in {}", dir.display());
    setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
    setup::room(dir, ROOM)?;
    let binaries = binaries::build(&dir.join("build.log"))?;
    let golden = golden::get(&dir.join("golden.log"))?;
    let accel = accel::choose(&golden.vmlinuz())?;
    let boot_dir = dir.join("boot");
    server::build_image(&binaries, &golden.tree, &boot_dir, &dir.join("image.log"))?;
    let ready = start.elapsed();

    let deploying = Instant::now();
    let (results, exit) = clone_all(dir, &binaries, &golden.tree, &boot_dir, accel, true)?;
    let cloned = deploying.elapsed();
    let reports = summarize(&results);
    println!();
    println!(
        "ready after {}, deployment and first boot {}, together {}; {}",
        show_time(ready),
        show_time(cloned),
        show_time(start.elapsed()),
        accel.name()
    );
    println!("logs: {}", dir.display());
    exit?;
    if reports.len() != MACHINES.len() {
        bail!("{} of {} clones are not as they must be", MACHINES.len() - reports.len(), MACHINES.len());
    }
    node::all_different(&reports)
}

/// What came of each machine, and whether the server ended with exit status 0.
pub type Outcome = (Vec<Result<Report>>, Result<()>);

/// Deploys `tree` onto the three machines and checks each.
///
/// # Errors
/// When the lab cannot be set up, or we are interrupted.
pub fn clone_all(
    dir: &Path,
    binaries: &Binaries,
    tree: &Path,
    boot_dir: &Path,
    accel: Accel,
    show: bool,
) -> Result<Outcome> {
    let fleet = Fleet::new(dir, &MACHINES, golden::LAYOUT, accel)?;
    let mut more = fleet.words(tree);
    // QEMU sorts the boot order itself at every start: the network stays first, whatever the clone writes.
    more.extend(["--efi-boot".into(), "pxe-first".into()]);
    let deploy = Deploy {
        dir: dir.join("server"),
        boot_dir: boot_dir.to_path_buf(),
        nodes: fleet.specs.len(),
        append: "",
        more,
    };
    let mut server = Server::deploy(&fleet.net, &deploy, binaries, show)?;
    server.wait_for(&[server::LISTENING], Duration::from_secs(60))?;
    say!(
        "demo",
        "switching on {} bare machines of {} MiB with empty disks",
        fleet.specs.len(),
        fleet::MEMORY
    );
    let results = std::thread::scope(|scope| {
        let net = &fleet.net;
        let threads: Vec<_> = fleet
            .specs
            .iter()
            .map(|spec| scope.spawn(move || node::install_and_check(spec, net, tree, LIMIT)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the thread of a node ended badly"))))
            .collect()
    });
    interrupt::check()?;
    let exit = match server.wait(Duration::from_secs(60)) {
        Ok(0) => Ok(()),
        Ok(code) => Err(server.failure(code)),
        Err(e) => Err(e),
    };
    Ok((results, exit))
}

/// Prints the table; the reports of those that are well.
pub fn summarize(results: &[Result<Report>]) -> Vec<Report> {
    println!(
        "\n{:<11} {:<11} {:>10} {:>8} {:>9} {:>9}  {:<13} ssh key",
        "clone", "board", "installed", "login", "files", "differ", "machine-id"
    );
    let mut reports = Vec::new();
    for (Bare { name, board, .. }, result) in MACHINES.iter().zip(results) {
        match result {
            Ok(report) => {
                println!(
                    "{name:<11} {:<11} {:>8.0} s {:>6.0} s {:>9} {:>9}  {:<13} {}",
                    board.name(),
                    report.installed.as_secs_f64(),
                    report.login.as_secs_f64(),
                    report.compared.files,
                    report.compared.allowed,
                    short(&report.machine_id),
                    short(report.ssh_keys.first().map_or("", String::as_str)),
                );
                reports.push(report.clone());
            }
            Err(e) => println!("{name:<11} {:<11} FAILED: {e:#}", board.name()),
        }
    }
    println!(
        "(differ: only what docs/autoconfig.md names; the rest is equal in content, owner, mode, times, links, ACLs and xattrs)"
    );
    reports
}

fn short(text: &str) -> String {
    let text = text.strip_prefix("SHA256:").unwrap_or(text);
    let start: String = text.chars().take(12).collect();
    format!("{start}…")
}
