//! One node's life in the lab: bare, installed by PXE, compared, started again by PXE, sent to its disk, logged in to.

use crate::compare::{self, Compared};
use crate::golden;
use crate::lab::disk::{self, Mounted};
use crate::lab::net::Net;
use crate::lab::vm::{Board, Spec, Vm};
use crate::say;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

/// From power on to the login prompt of a clone, with three emulated machines on two cores.
pub const LOGIN_LIMIT: Duration = Duration::from_secs(480);
/// One command on an emulated machine.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// What the agent writes on the console when it gives up.
const FAILED: &str = "INSTALLATION FAILED";

/// What was found out about a clone that is as it must be.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// Power on to the reboot into its own disk.
    pub installed: Duration,
    /// Second power on to the login prompt.
    pub login: Duration,
    /// Its tree against the golden one.
    pub compared: Compared,
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// Fingerprints of its ssh host keys.
    pub ssh_keys: Vec<String>,
}

/// A bare machine becomes a clone; then everything that makes it one is checked.
///
/// # Errors
/// At the first thing that is not as it must be.
pub fn install_and_check(spec: &Spec, net: &Net, golden: &Path, limit: Duration) -> Result<Report> {
    let result = life(spec, net, golden, limit);
    if let Err(e) = &result {
        say!(&spec.name, "FAILED: {e:#}");
    }
    result
}

fn life(spec: &Spec, net: &Net, golden: &Path, limit: Duration) -> Result<Report> {
    let installed = install(spec, net, limit)?;
    let image = spec.disks.first().context("a node needs a disk")?;
    let compared = compare_disk(golden, image, &[compare::AUTOCONFIG, compare::NOT_SENT])?;
    say!(
        &spec.name,
        "its disk holds the golden tree: {} files equal, {} differ as they must",
        compared.files,
        compared.allowed
    );
    say!(&spec.name, "they differ for these reasons: {}", compared.reasons.join(", "));
    if spec.board == Board::UefiNvme {
        let files = disk::esp_files(image, "EFI/BOOT").context("looking for the removable boot loader")?;
        if !files.to_ascii_uppercase().contains("BOOTX64.EFI") {
            bail!("the EFI system partition holds no EFI/BOOT/BOOTX64.EFI:\n{files}");
        }
    }
    let start = Instant::now();
    let mut vm = Vm::start(spec, net)?;
    vm.login(&spec.name, golden::PASSWORD, LOGIN_LIMIT)?;
    let login = start.elapsed();
    say!(&spec.name, "booted from its own disk, logged in after {:.0} s", login.as_secs_f64());
    let identity = check_identity(&mut vm, &spec.name, golden)?;
    power_off(&mut vm)?;
    say!(&spec.name, "is itself: {}", identity.machine_id);
    Ok(Report {
        name: spec.name.clone(),
        installed,
        login,
        compared,
        machine_id: identity.machine_id,
        ssh_keys: identity.ssh_keys,
    })
}

/// From power on to the moment when the installed machine wants to start again.
///
/// # Errors
/// When it does not within `limit`.
pub fn install(spec: &Spec, net: &Net, limit: Duration) -> Result<Duration> {
    let start = Instant::now();
    let mut vm = Vm::start(spec, net)?;
    vm.wait_off_unless(Some(FAILED), limit).context("installing")?;
    if vm.text().contains("Ka: giving up") {
        bail!("{}: iPXE could not start the installer; see {}", spec.name, spec.serial_log().display());
    }
    let took = start.elapsed();
    say!(&spec.name, "installed and wants to reboot, {:.0} s after power on", took.as_secs_f64());
    Ok(took)
}

/// Mounts the root file system of a disk image read-only and compares it.
///
/// # Errors
/// When anything differs that is on no list.
pub fn compare_disk(golden: &Path, image: &Path, lists: &[&[compare::Allowed]]) -> Result<Compared> {
    let root = Mounted::root(image)?;
    compare::same_tree(golden, &root.path(), lists)
        .with_context(|| format!("comparing {} with {}", image.display(), golden.display()))
}

/// Shuts a machine down that was logged in to.
///
/// # Errors
/// When it does not go off.
pub fn power_off(vm: &mut Vm) -> Result<()> {
    vm.send("systemctl poweroff\n")?;
    vm.wait_off(Duration::from_secs(180)).context("shutting down")
}

/// What makes a clone itself.
#[derive(Debug)]
pub struct Identity {
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// Fingerprints of its ssh host keys.
    pub ssh_keys: Vec<String>,
}

/// Asks a machine with the layout of the demonstration, that was logged in to, who it is.
///
/// # Errors
/// When it is not `name`, has an identity of the golden tree's, or does not run as it should.
pub fn check_identity(vm: &mut Vm, name: &str, golden: &Path) -> Result<Identity> {
    let identity = check_itself(vm, name, golden)?;
    let mut ask = |command: &str| vm.shell_ok(command, COMMAND_LIMIT);
    let root = ask("findmnt -no UUID,FSTYPE /")?;
    if root.split_whitespace().collect::<Vec<_>>() != [golden::ROOT_UUID, "ext4"] {
        bail!("/ is `{root}`");
    }
    let swap = ask("tail -n +2 /proc/swaps | wc -l")?;
    if swap != "1" {
        bail!("{swap} swap spaces are in use, 1 was expected");
    }
    ask("findmnt -no FSTYPE /boot/efi").context("the EFI system partition is not mounted")?;
    Ok(identity)
}

/// Asks a machine of any layout, that was logged in to, who it is.
///
/// # Errors
/// When it is not `name`, has an identity of the golden tree's, or its sshd does not run.
pub fn check_itself(vm: &mut Vm, name: &str, golden: &Path) -> Result<Identity> {
    let mut ask = |command: &str| vm.shell_ok(command, COMMAND_LIMIT);
    let host = ask("cat /proc/sys/kernel/hostname")?;
    if host != name {
        bail!("it calls itself `{host}`, not `{name}`");
    }
    let machine_id = ask("cat /etc/machine-id")?;
    let golden_id =
        std::fs::read_to_string(golden.join("etc/machine-id")).context("reading the golden machine-id")?;
    if machine_id.len() != 32
        || !machine_id.bytes().all(|b| b.is_ascii_hexdigit())
        || machine_id == golden_id.trim()
    {
        bail!("/etc/machine-id is `{machine_id}`; the golden node's is `{}`", golden_id.trim());
    }
    ask("sshd -t").context("sshd does not like its keys")?;
    ask("for i in $(seq 60); do systemctl is-active --quiet ssh && break; sleep 1; done; systemctl is-active --quiet ssh")
        .context("sshd does not run")?;
    let keys = ask("for k in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -lf $k; done")?;
    let ssh_keys: Vec<String> =
        keys.lines().filter_map(|line| line.split_whitespace().nth(1)).map(str::to_owned).collect();
    if ssh_keys.len() < 3 {
        bail!("it has {} ssh host keys, 3 were expected:\n{keys}", ssh_keys.len());
    }
    for key in golden_keys(golden)? {
        if ssh_keys.contains(&key) {
            bail!("the golden node's ssh host key {key} is still there");
        }
    }
    Ok(Identity { machine_id, ssh_keys })
}

fn golden_keys(golden: &Path) -> Result<Vec<String>> {
    let mut keys = Vec::new();
    let dir = golden.join("etc/ssh");
    for entry in std::fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry.with_context(|| format!("reading {}", dir.display()))?.path();
        if path.extension().is_some_and(|e| e == "pub") {
            let line = crate::run::output("ssh-keygen", &["-lf", &path.display().to_string()])?;
            keys.extend(line.split_whitespace().nth(1).map(str::to_owned));
        }
    }
    Ok(keys)
}

/// No two clones may share an identity.
///
/// # Errors
/// When two do.
pub fn all_different(reports: &[Report]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for report in reports {
        for id in report.ssh_keys.iter().chain([&report.machine_id]) {
            if !seen.insert(id) {
                bail!("{} shares {id} with another clone", report.name);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str, machine_id: &str, key: &str) -> Report {
        Report {
            name: name.into(),
            installed: Duration::ZERO,
            login: Duration::ZERO,
            compared: Compared { files: 0, allowed: 0, reasons: Vec::new() },
            machine_id: machine_id.into(),
            ssh_keys: vec![key.into()],
        }
    }

    #[test]
    fn shared_identities_are_seen() {
        assert!(all_different(&[report("a", "1", "x"), report("b", "2", "y")]).is_ok());
        assert!(all_different(&[report("a", "1", "x"), report("b", "1", "y")]).is_err());
        assert!(all_different(&[report("a", "1", "x"), report("b", "2", "x")]).is_err());
    }
}
