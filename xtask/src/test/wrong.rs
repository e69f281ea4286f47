//! Deployments that must fail, each in its own way: the node says why, its disk does not boot, the server says which node
//! failed and ends with the right status, and nobody else is harmed.

use super::{Lab, Tally};
use crate::fleet::{Bare, Fleet};
use crate::golden;
use crate::lab::disk;
use crate::lab::vm::{Board, Spec, Vm};
use crate::node;
use crate::server::{self, Deploy, Server};
use anyhow::{Context, Result, bail};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// Power on to the end of a failing installation, several machines at once.
const LIMIT: Duration = Duration::from_secs(900);
const GIB: u64 = 1 << 30;

/// What must become of a node.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// It is installed; its disk holds the golden tree.
    Installed,
    /// It switches itself off after one of these words stood on its console, and its disk cannot boot.
    Fails(&'static [&'static str]),
}

/// A layout without what only booting needs: the root file system has the size that is asked for.
fn small_layout(root: &str) -> String {
    format!(
        "version = 1\n[[disk]]\nname = \"system\"\nmatch = {{ size = \"2G-\" }}\ntable = \"gpt\"\n\
         [[partition]]\ntype = \"bios-boot\"\nsize = \"1M\"\n\
         [[partition]]\ntype = \"linux\"\nsize = \"{root}\"\nformat = {{ fs = \"ext4\" }}\nmount = {{ path = \"/\" }}\n"
    )
}

/// Runs them: first several nodes of different fates in one deployment, then three deployments at once.
///
/// # Errors
/// Only when we are interrupted.
pub fn run(lab: &Lab, tally: &mut Tally) -> Result<()> {
    tally.test("wrong-disks-and-hook", || disks_and_hook(lab))?;
    // Each has a network of its own; together they take hardly longer than one.
    let [died, full, killed] = std::thread::scope(|scope| {
        [
            scope.spawn(|| source_dies(lab)),
            scope.spawn(|| target_full(lab)),
            scope.spawn(|| server_killed(lab)),
        ]
        .map(|thread| {
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the thread of a test ended badly")))
        })
    });
    tally.test("source-command-dies", || died)?;
    tally.test("target-disk-full", || full)?;
    tally.test("server-killed", || killed)
}

/// No disk matches, two match, a hook fails: and the fourth node is installed all the same.
fn disks_and_hook(lab: &Lab) -> Result<()> {
    const MACHINES: [Bare; 4] = [
        Bare { name: "too-small", board: Board::BiosVirtio, disks: &[GIB] },
        Bare { name: "two-disks", board: Board::BiosVirtio, disks: &[3 * GIB, 3 * GIB] },
        Bare { name: "bad-hook", board: Board::BiosAhci, disks: &[3 * GIB] },
        Bare { name: "unharmed", board: Board::BiosVirtio, disks: &[3 * GIB] },
    ];
    let dir = lab.dir.join("wrong-disks-and-hook");
    let fleet = Fleet::new(&dir, &MACHINES, golden::LAYOUT, lab.accel)?;
    let hooks = dir.join("hooks.d");
    std::fs::create_dir_all(&hooks).with_context(|| format!("making {}", hooks.display()))?;
    let hook = hooks.join("50-picky");
    let script = "#!/bin/sh\ncase $KA_NODE in\nbad-hook) echo this node is not liked >&2; exit 9;;\nesac\n";
    std::fs::write(&hook, script).with_context(|| format!("writing {}", hook.display()))?;
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755))
        .context("making the hook executable")?;
    let mut more = fleet.words(&lab.tree);
    more.extend(["--hooks".into(), hooks.display().to_string()]);
    let mut server = start(lab, &fleet, &dir, more)?;
    let fates = [
        Fate::Fails(&["no disk matches"]),
        Fate::Fails(&["2 disks match"]),
        Fate::Fails(&["this node is not liked"]),
        Fate::Installed,
    ];
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = fleet
            .specs
            .iter()
            .zip(fates)
            .map(|(spec, fate)| {
                let fleet = &fleet;
                scope.spawn(move || meets(lab, fleet, spec, fate))
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the thread of a node ended badly"))))
            .collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    server.wait_for(&["1 done, 3 failed"], Duration::from_secs(30))?;
    let text = server.text();
    for name in ["too-small", "two-disks", "bad-hook"] {
        if !text.lines().any(|line| line.contains(name) && line.to_ascii_lowercase().contains("failed")) {
            bail!("the server does not say that {name} failed");
        }
    }
    if !text.contains("this node is not liked") {
        bail!("the server does not show what the hook said");
    }
    ends_with(&mut server, 3)
}

/// The source command writes a part of a tar stream, then fails.
fn source_dies(lab: &Lab) -> Result<()> {
    let command = format!("tar -C {}/usr -c lib | head -c 60000000; exit 7", lab.tree.display());
    single(
        lab,
        "source-command-dies",
        &small_layout("fill"),
        &command,
        &["the server gave up: the source command"],
        |server| {
            server.wait_for(
                &["exit status 7", "exit code 7", "ended with 7", "status: 7"],
                Duration::from_secs(30),
            )?;
            Ok(())
        },
    )
}

/// What arrives does not fit.
fn target_full(lab: &Lab) -> Result<()> {
    let command = "mkdir -p $TMPDIR/full && head -c 300000000 /dev/urandom > $TMPDIR/full/big && tar -C $TMPDIR/full -c .";
    let dir = lab.dir.join("target-disk-full/tmp");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let command = command.replace("$TMPDIR", &dir.display().to_string());
    single(lab, "target-disk-full", &small_layout("100M"), &command, &["No space left on device"], |_| Ok(()))
}

/// One node, a source command, and what the node must say.
fn single(
    lab: &Lab,
    name: &'static str,
    layout: &str,
    command: &str,
    says: &'static [&'static str],
    also: impl FnOnce(&mut Server) -> Result<()>,
) -> Result<()> {
    let dir = lab.dir.join(name);
    let machine = Bare { name, board: Board::BiosVirtio, disks: &[3 * GIB] };
    let fleet = Fleet::new(&dir, &[machine], layout, lab.accel)?;
    let mut more = fleet.words(&lab.tree);
    more.extend(["--source-cmd".into(), command.into()]);
    let mut server = start(lab, &fleet, &dir, more)?;
    meets(lab, &fleet, &fleet.specs[0], Fate::Fails(says))?;
    also(&mut server)?;
    ends_with(&mut server, 1)
}

/// The golden node loses its power while the node unpacks.
fn server_killed(lab: &Lab) -> Result<()> {
    let name = "server-killed";
    let dir = lab.dir.join(name);
    let machine = Bare { name, board: Board::BiosVirtio, disks: &[3 * GIB] };
    let fleet = Fleet::new(&dir, &[machine], golden::LAYOUT, lab.accel)?;
    let mut server = start(lab, &fleet, &dir, fleet.words(&lab.tree))?;
    let spec = &fleet.specs[0];
    let mut vm = Vm::start(spec, &fleet.net)?;
    // Some of the tree is on its disk when the power goes.
    server.wait_for(&[": 1 receive"], LIMIT)?;
    std::thread::sleep(Duration::from_secs(8));
    server.kill();
    vm.wait_off(LIMIT).context("waiting for the node to give up")?;
    // What the kernel of a killed server sends, a FIN or a reset, depends on whether it had read everything.
    said(&vm.text(), &["the server closed the control connection", "the control connection failed"])?;
    unbootable(spec)
}

fn start(lab: &Lab, fleet: &Fleet, dir: &Path, more: Vec<String>) -> Result<Server> {
    let deploy = Deploy {
        dir: dir.join("server"),
        boot_dir: lab.boot_dir.clone(),
        nodes: fleet.specs.len(),
        append: "ka.on-failure=poweroff",
        more,
    };
    let mut server = Server::deploy(&fleet.net, &deploy, &lab.binaries, false)?;
    server.wait_for(&[server::LISTENING], Duration::from_secs(60))?;
    Ok(server)
}

fn meets(lab: &Lab, fleet: &Fleet, spec: &Spec, fate: Fate) -> Result<()> {
    let mut vm = Vm::start(spec, &fleet.net)?;
    vm.wait_off(LIMIT)?;
    match fate {
        Fate::Installed => {
            node::compare_disk(
                &lab.tree,
                &spec.disks[0],
                &[crate::compare::AUTOCONFIG, crate::compare::NOT_SENT],
            )?;
            Ok(())
        }
        Fate::Fails(words) => {
            said(&vm.text(), words)
                .with_context(|| format!("{}: see {}", spec.name, spec.serial_log().display()))?;
            unbootable(spec)
        }
    }
}

fn said(text: &str, words: &[&str]) -> Result<()> {
    if words.iter().any(|word| text.contains(word)) {
        return Ok(());
    }
    let lines: Vec<&str> = text.lines().collect();
    let end = lines[lines.len().saturating_sub(30)..].join("\n");
    bail!("its console does not say `{}`; it ends with:\n{end}", words.join("` or `"))
}

fn unbootable(spec: &Spec) -> Result<()> {
    for image in &spec.disks {
        if disk::can_boot(image)? {
            bail!("{}: {} could boot after a failed installation", spec.name, image.display());
        }
    }
    Ok(())
}

fn ends_with(server: &mut Server, expected: i32) -> Result<()> {
    // A node that was installed and is not switched on again is waited for: an operator would press ^C then.
    if expected == 3 {
        server.wait_for(&["(--linger)"], Duration::from_secs(30))?;
        server.interrupt();
    }
    match server.wait(Duration::from_secs(60))? {
        status if status == expected => Ok(()),
        status => bail!("ka-server ended with {status}, {expected} was expected"),
    }
}
