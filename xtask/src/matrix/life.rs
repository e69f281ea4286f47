//! One row: a deployment to a bare machine, its first boot, and `ka-agent verify` in the clone itself, from a disk that
//! holds the manifest.

use super::rows::{Layout, RAW, Row};
use super::shape;
use crate::binaries::Binaries;
use crate::golden::{self, Golden};
use crate::lab::net::Net;
use crate::lab::vm::{Accel, Board, Spec, Vm};
use crate::server::{Deploy, Server};
use crate::{node, run, say, server};
use anyhow::{Context, Result, bail};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What opens the encrypted containers.
const PASSPHRASE: &str = "correct horse battery staple";
const MAC: &str = "52:54:00:6b:63:01";
/// Power on to the reboot into the clone, emulated beside another machine.
const INSTALL: Duration = Duration::from_secs(1800);
/// Power on to the login, with a passphrase to be asked for.
const LOGIN: Duration = Duration::from_secs(900);
/// Comparing a clone with its manifest, on an emulated processor.
const VERIFY: Duration = Duration::from_secs(900);
/// The label of the disk with the manifest.
const LABEL: &str = "KAVERIFY";

/// What a row needs of the run.
#[derive(Debug)]
pub struct Setting<'a> {
    /// Ka's programs.
    pub binaries: &'a Binaries,
    /// The golden machine.
    pub golden: &'a Golden,
    /// What `ka-image` made of it.
    pub boot_dir: &'a Path,
    /// How machines are run.
    pub accel: Accel,
    /// The folder of this row.
    pub dir: &'a Path,
    /// The machine.
    pub board: Board,
    /// Its disks, as they are.
    pub disks: &'a [PathBuf],
    /// The layout that the row before captured.
    pub captured: Option<&'a Path>,
}

/// What was seen of a clone that came to its login.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Power on to the reboot into its own disk.
    pub installed: Duration,
    /// Second power on to the login prompt.
    pub login: Duration,
    /// The last line of `ka-agent verify`.
    pub verified: String,
    /// What `ka-server layout` wrote on it.
    pub captured: Option<PathBuf>,
    /// What was not as it must be.
    pub wrong: Vec<String>,
}

/// Runs a row.
///
/// # Errors
/// When the clone does not come to its login, or cannot be asked.
pub fn live(row: &Row, setting: &Setting<'_>) -> Result<Seen> {
    let Setting { binaries, golden, boot_dir, accel, dir, board, disks, captured } = setting;
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let net = Net::new(true)?;
    let mut spec = Spec {
        name: row.name.into(),
        board: *board,
        // What derives a key from a passphrase wants memory.
        memory: if row.unlock.is_some() { 1024 } else { crate::fleet::MEMORY },
        disks: disks.to_vec(),
        extra: None,
        mac: MAC.into(),
        tap: net.tap()?,
        accel: *accel,
        dir: dir.to_path_buf(),
        kernel: None,
    };
    let deploy = Deploy {
        dir: dir.join("server"),
        boot_dir: boot_dir.to_path_buf(),
        nodes: 1,
        append: "",
        more: words(row, golden, dir, *captured)?,
    };
    let mut server = Server::deploy(&net, &deploy, binaries, false)?;
    server.wait_for(&[server::LISTENING], Duration::from_secs(60))?;
    let installed = node::install(&spec, &net, INSTALL)?;
    spec.extra = Some(verify_disk(binaries, &deploy.dir, dir)?);

    let start = Instant::now();
    let mut vm = Vm::start(&spec, &net)?;
    if let Some(container) = row.unlock {
        vm.wait_for(&[&format!("unlock disk {container}"), " login:"], LOGIN)
            .and_then(|which| if which == 0 { Ok(()) } else { bail!("nothing was asked for") })
            .with_context(|| format!("waiting for the question for the passphrase of {container}"))?;
        vm.send(&format!("{PASSPHRASE}\n"))?;
    }
    vm.login(row.name, golden::PASSWORD, LOGIN)?;
    let login = start.elapsed();
    say!(row.name, "booted from its own disk, logged in after {:.0} s", login.as_secs_f64());
    // Everything is asked, however much is wrong: a row takes minutes.
    let mut wrong = Vec::new();
    let mut note = |result: Result<()>| wrong.extend(result.err().map(|e| format!("{e:#}")));
    note(healthy(&mut vm));
    note(node::check_itself(&mut vm, row.name, &golden.tree).map(drop));
    let verified = verify(&mut vm);
    let verified = verified.unwrap_or_else(|e| {
        note(Err(e));
        String::new()
    });
    for (command, wanted) in row.checks {
        note(ask(&mut vm, command, wanted));
    }
    let captured = capture_layout(&mut vm, dir);
    if let (Ok(path), Layout::File(made)) = (&captured, row.layout) {
        let read = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
        note(read.and_then(|text| shape::compare(made, &text)));
    }
    let captured = captured.map_err(|e| note(Err(e))).ok();
    node::power_off(&mut vm)?;
    match server.wait(Duration::from_secs(60))? {
        0 => Ok(Seen { installed, login, verified, captured, wrong }),
        code => Err(server.failure(code)),
    }
}

/// The words of `ka-server deploy` for a row.
fn words(row: &Row, golden: &Golden, dir: &Path, captured: Option<&Path>) -> Result<Vec<String>> {
    let write = |path: &Path, text: &str| {
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    };
    let nodes = dir.join("nodes.txt");
    write(&nodes, &format!("{MAC} {}\n", row.name))?;
    let layout = match row.layout {
        Layout::File(text) => {
            let path = dir.join("layout.toml");
            write(&path, text)?;
            path
        }
        Layout::Captured => captured.context("the row before captured no layout")?.to_path_buf(),
    };
    let path = |p: &Path| p.display().to_string();
    let mut words = vec!["--root".into(), path(&golden.tree), "--layout".into(), path(&layout)];
    words.extend(["--nodes-file".into(), path(&nodes)]);
    // QEMU sorts the boot order itself at every start: the network stays first, whatever the clone writes.
    words.extend(["--efi-boot".into(), "pxe-first".into()]);
    if let Some((id, length)) = row.raw {
        let source = dir.join("raw");
        write(&source, &RAW.repeat(length.div_ceil(RAW.len()))[..length])?;
        words.extend(["--raw".into(), format!("{id}={}", path(&source))]);
    }
    if let Some(container) = row.unlock {
        let keys = dir.join("keys");
        std::fs::create_dir_all(&keys).with_context(|| format!("making {}", keys.display()))?;
        let file = keys.join(format!("{container}.key"));
        write(&file, &format!("{PASSPHRASE}\n"))?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("changing the mode of {}", file.display()))?;
        words.extend(["--luks-keys".into(), path(&keys)]);
    }
    Ok(words)
}

/// A file system with the manifest of the deployment and the programs that are run on the clone.
fn verify_disk(binaries: &Binaries, server: &Path, dir: &Path) -> Result<PathBuf> {
    let folder = dir.join("verify");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let manifest = manifest(&server.join("nodes"))?;
    let files =
        [(manifest.as_path(), "manifest"), (&binaries.agent, "ka-agent"), (&binaries.server, "ka-server")];
    for (from, name) in files {
        let to = folder.join(name);
        std::fs::copy(from, &to)
            .with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    }
    let disk = dir.join("verify.disk");
    crate::lab::vm::empty_disk(&disk, 64 << 20)?;
    run::quiet(
        "mke2fs",
        &[
            "-q",
            "-F",
            "-t",
            "ext2",
            "-L",
            LABEL,
            "-d",
            &folder.display().to_string(),
            &disk.display().to_string(),
        ],
    )
    .context("making the disk with the manifest")?;
    Ok(disk)
}

/// The one manifest below `folder`.
fn manifest(folder: &Path) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path().join("manifest-1.mtree.zst");
        if path.exists() {
            found.push(path);
        }
    }
    match found.as_slice() {
        [one] => Ok(one.clone()),
        _ => bail!("{} should hold one manifest, it holds {found:?}", folder.display()),
    }
}

/// Everything that systemd starts must have started.
fn healthy(vm: &mut Vm) -> Result<()> {
    let (_, state) = vm.shell("systemctl is-system-running --wait", LOGIN)?;
    if state != "running" {
        let (_, failed) = vm.shell("systemctl --failed --no-legend --plain", node::COMMAND_LIMIT)?;
        bail!("systemd calls the clone `{state}`:\n{failed}");
    }
    Ok(())
}

/// What `command` must print on the clone.
fn ask(vm: &mut Vm, command: &str, wanted: &str) -> Result<()> {
    let (_, said) = vm.shell(command, node::COMMAND_LIMIT)?;
    // Columns are as wide as they like.
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    if words(&said) != words(wanted) {
        bail!("`{command}` printed `{said}`, not `{wanted}`");
    }
    Ok(())
}

/// Compares the running clone with what was sent; what the comparison says at last.
fn verify(vm: &mut Vm) -> Result<String> {
    vm.shell_ok(
        &format!("mkdir -p /run/ka-verify && mount -r -L {LABEL} /run/ka-verify"),
        node::COMMAND_LIMIT,
    )
    .context("mounting the disk with the manifest")?;
    let said = vm
        .shell_ok("/run/ka-verify/ka-agent verify --manifest /run/ka-verify/manifest", VERIFY)
        .context("comparing the clone with what was sent")?;
    Ok(said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default().to_owned())
}

/// What `ka-server layout` writes on the clone, as a file of this run.
fn capture_layout(vm: &mut Vm, dir: &Path) -> Result<PathBuf> {
    let text = vm
        .shell_ok(
            "/run/ka-verify/ka-server layout 2>/run/ka-layout.err || cat /run/ka-layout.err",
            node::COMMAND_LIMIT,
        )
        .context("capturing the clone's layout")?;
    let path = dir.join("captured.toml");
    std::fs::write(&path, text.replace('\r', "")).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}
