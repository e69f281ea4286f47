//! The second generation: a clone that runs from its own disk becomes the golden node. It builds its own boot image and
//! deploys its own live `/`, without a layout file, to a bare machine, which must come out equal.

use super::Lab;
use crate::compare::{self, Allowed};
use crate::fleet;
use crate::golden;
use crate::lab::disk::Mounted;
use crate::lab::net::{Net, SERVER_IP};
use crate::lab::vm::{self, Board, Spec, Vm};
use crate::node;
use crate::say;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::time::{Duration, Instant};

/// The clone of the first generation: the golden node now.
const GOLDEN: &str = "clone-sata";
/// The clone of the second generation. Another disk controller than its golden node's.
const CLONE: &str = "grandchild";
const CLONE_MAC: &str = "52:54:00:6b:62:01";
const IMAGE_LIMIT: Duration = Duration::from_secs(400);
const DEPLOY_LIMIT: Duration = Duration::from_secs(900);

/// What a running golden node changes by itself between the moment at which a file is read and its shutdown. Nothing else
/// may differ.
const LIVE: &[Allowed] = &[
    Allowed { path: "var/log/journal/**", times_only: false, why: "the journal goes on while it is read" },
    Allowed { path: "var/log/wtmp", times_only: false, why: "shutdown is recorded in it" },
    Allowed { path: "var/log/lastlog", times_only: false, why: "logins" },
    Allowed { path: "var/log/btmp", times_only: false, why: "logins" },
    Allowed { path: "var/log/ka/**", times_only: false, why: "ka-server's logs of the nodes" },
    Allowed { path: "var/lib/ka/**", times_only: false, why: "ka-server's state and boot files" },
    Allowed { path: "var/lib/systemd/timers/**", times_only: false, why: "systemd's clocks" },
    Allowed { path: "root/.bash_history", times_only: false, why: "written when root logs out" },
    Allowed { path: "var/log", times_only: true, why: "holds the logs above" },
    Allowed { path: "root", times_only: true, why: "holds .bash_history" },
    Allowed { path: "var/lib", times_only: true, why: "holds var/lib/ka" },
];

/// Runs the test; `first` is the disk of [`GOLDEN`].
///
/// # Errors
/// When the clone is not as it must be.
pub fn run(lab: &Lab, first: &Path) -> Result<()> {
    if !first.exists() {
        bail!("{} is not there: the first generation failed", first.display());
    }
    let dir = lab.dir.join("second-generation");
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    // No address on the bridge: the golden node is the server here.
    let net = Net::new(false)?;
    let disk = dir.join("grandchild.disk");
    vm::empty_disk(&disk, fleet::DISK + (1 << 30))?;
    let spec = |name: &str, board, memory, disk: &Path, mac: &str| -> Result<Spec> {
        Ok(Spec {
            name: name.into(),
            board,
            memory,
            disks: vec![disk.to_path_buf()],
            extra: None,
            mac: mac.into(),
            tap: net.tap()?,
            accel: lab.accel,
            dir: dir.clone(),
            kernel: None,
        })
    };
    let golden = spec(GOLDEN, Board::BiosAhci, 1024, first, "52:54:00:6b:62:fe")?;
    let clone = spec(CLONE, Board::BiosVirtio, fleet::MEMORY, &disk, CLONE_MAC)?;

    let mut server = Vm::start(&golden, &net)?;
    server.login(GOLDEN, golden::PASSWORD, node::LOGIN_LIMIT)?;
    say!(GOLDEN, "runs from its own disk");
    let interface = give_address(&mut server)?;
    let start = Instant::now();
    server
        .shell_ok("ka-image build --output /var/lib/ka/boot --compress zstd --level 1", IMAGE_LIMIT)
        .context("building the boot image on the golden node itself")?;
    say!(GOLDEN, "built its own boot image in {:.0} s", start.elapsed().as_secs_f64());
    server.send(&format!(
        "echo '{CLONE_MAC} {CLONE}' > /var/lib/ka/nodes.txt; ka-server deploy --pxe {interface} --dhcp auto --nodes 1 \
         --nodes-file /var/lib/ka/nodes.txt --linger 15m --append console=ttyS0 2>&1 | cat; echo ka-'deployed':${{PIPESTATUS[0]}}:\n"
    ))?;
    server.wait_for(&[crate::server::LISTENING], Duration::from_secs(180))?;
    say!(GOLDEN, "deploys its own live root");
    node::install(&clone, &net, DEPLOY_LIMIT)?;

    // Before its first boot the clone's disk must equal the golden one's; that goes on running until it has sent the clone
    // to its disk.
    let pristine = dir.join("grandchild.pristine");
    sparse_copy(&disk, &pristine)?;
    let start = Instant::now();
    let mut grandchild = Vm::start(&clone, &net)?;
    grandchild.login(CLONE, golden::PASSWORD, node::LOGIN_LIMIT)?;
    say!(CLONE, "booted from its own disk, logged in after {:.0} s", start.elapsed().as_secs_f64());
    node::check_identity(&mut grandchild, CLONE, &lab.tree)?;
    node::power_off(&mut grandchild)?;

    server.wait_for(&["ka-deployed:"], Duration::from_secs(120))?;
    if server.wait_for(&["0:", ":"], Duration::from_secs(10))? != 0 {
        bail!("ka-server on the golden node did not end with 0");
    }
    node::power_off(&mut server)?;
    let before = Mounted::root(first)?;
    let after = Mounted::root(&pristine)?;
    let compared =
        compare::same_tree(&before.path(), &after.path(), &[compare::AUTOCONFIG, compare::NOT_SENT, LIVE])
            .context("comparing the second generation with the first")?;
    say!(CLONE, "equals its golden node: {} files, {} differ as they must", compared.files, compared.allowed);
    Ok(())
}

/// Gives the golden node the server's address, for good, as an operator would; the interface's name.
fn give_address(server: &mut Vm) -> Result<String> {
    let interface = server.shell_ok("ls /sys/class/net | grep -vx lo", node::COMMAND_LIMIT)?;
    let file = "/etc/systemd/network/10-server.network";
    server.shell_ok(
        &format!(
            "printf '[Match]\\nName={interface}\\n\\n[Network]\\nAddress={SERVER_IP}/24\\nAddress=fd91::1/64\\n\
             IPv6AcceptRA=no\\nLinkLocalAddressing=ipv6\\n' > {file} && networkctl reload && \
             networkctl reconfigure {interface}"
        ),
        node::COMMAND_LIMIT,
    )?;
    server
        .shell_ok(
            &format!("for i in $(seq 60); do ip addr show {interface} | grep -q {SERVER_IP}/ && break; sleep 1; done; ip addr show {interface} | grep {SERVER_IP}/"),
            node::COMMAND_LIMIT,
        )
        .context("the golden node did not take its address")?;
    Ok(interface)
}

fn sparse_copy(from: &Path, to: &Path) -> Result<()> {
    ka_sys::process::run(
        std::process::Command::new("cp").arg("--sparse=always").arg(from).arg(to),
        Duration::from_secs(120),
    )
    .with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}
