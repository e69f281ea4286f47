//! `cargo xtask demo`: three bare machines on a virtual network become three running clones, and everything that makes
//! them clones is checked.

use crate::binaries::{self, Profile};
use crate::lab::net::Net;
use crate::lab::vm::{Board, Spec};
use crate::lab::{accel, vm};
use crate::node::{self, Report};
use crate::server::{self, Deploy, Server};
use crate::{golden, interrupt, say, setup};
use anyhow::{Context, Result, bail};
use ka_cli::units::show_time;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// The boards of the demonstration, with the clones' names.
const BOARDS: [(&str, Board); 3] =
    [("clone-ide", Board::BiosIde), ("clone-sata", Board::BiosAhci), ("clone-nvme", Board::UefiNvme)];
/// MiB of memory of a node: the smallest that the project promises.
const MEMORY: u32 = 512;
/// Bytes of a node's disk.
const DISK: u64 = 3 << 30;
/// The whole deployment, on a loaded machine without KVM.
const LIMIT: Duration = Duration::from_secs(1200);

/// Runs the demonstration in `dir`.
///
/// # Errors
/// When anything is not as it must be.
pub fn run(dir: &Path) -> Result<()> {
    let start = Instant::now();
    say!("demo", "logs are kept in {}", dir.display());
    setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
    let binaries = binaries::build(Profile::Lab, &dir.join("build.log"))?;
    let golden = golden::get(&dir.join("golden.log"))?;
    let accel = accel::choose(&golden.vmlinuz())?;
    let boot_dir = dir.join("boot");
    server::build_image(&binaries, &golden.tree, &boot_dir, &dir.join("image.log"))?;
    let ready = start.elapsed();

    let net = Net::new(true)?;
    let mut specs = Vec::new();
    let mut nodes_file = String::new();
    for (i, (name, board)) in BOARDS.into_iter().enumerate() {
        let disk = dir.join(format!("{name}.disk"));
        vm::empty_disk(&disk, DISK)?;
        let mac = format!("52:54:00:6b:61:{:02x}", i + 1);
        writeln!(nodes_file, "{mac} {name}")?;
        let tap = net.tap()?;
        specs.push(Spec {
            name: name.into(),
            board,
            memory: MEMORY,
            disks: vec![disk],
            mac,
            tap,
            accel,
            dir: dir.to_path_buf(),
            kernel: None,
        });
    }
    let nodes_path = dir.join("nodes.txt");
    let layout_path = dir.join("layout.toml");
    std::fs::write(&nodes_path, nodes_file).with_context(|| format!("writing {}", nodes_path.display()))?;
    std::fs::write(&layout_path, golden::LAYOUT)
        .with_context(|| format!("writing {}", layout_path.display()))?;
    let deploy = Deploy {
        dir: dir.join("server"),
        boot_dir,
        nodes: specs.len(),
        more: vec![
            "--root".into(),
            golden.tree.display().to_string(),
            "--layout".into(),
            layout_path.display().to_string(),
            "--nodes-file".into(),
            nodes_path.display().to_string(),
            "--listed-only".into(),
            "--efi-boot".into(),
            "pxe-first".into(),
        ],
    };
    let mut server = Server::deploy(&net, &deploy, &binaries, true)?;
    let deploying = Instant::now();
    say!("demo", "switching on {} bare machines of {MEMORY} MiB with empty disks", specs.len());
    let results: Vec<Result<Report>> = std::thread::scope(|scope| {
        let (net, golden) = (&net, &golden);
        let threads: Vec<_> = specs
            .iter()
            .map(|spec| scope.spawn(move || node::install_and_check(spec, net, &golden.tree, LIMIT)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the thread of a node ended badly"))))
            .collect()
    });
    interrupt::check()?;
    let cloned = deploying.elapsed();
    let exit = server.wait(Duration::from_secs(60));
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
    match exit? {
        0 => {}
        code => bail!("ka-server ended with exit status {code}"),
    }
    if reports.len() != BOARDS.len() {
        bail!("{} of {} clones are not as they must be", BOARDS.len() - reports.len(), BOARDS.len());
    }
    node::all_different(&reports)
}

/// Prints the table; the reports of those that are well.
fn summarize(results: &[Result<Report>]) -> Vec<Report> {
    println!(
        "\n{:<11} {:<11} {:>10} {:>8} {:>9} {:>9}  {:<13} ssh key",
        "clone", "board", "installed", "login", "files", "differ", "machine-id"
    );
    let mut reports = Vec::new();
    for ((name, board), result) in BOARDS.iter().zip(results) {
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
