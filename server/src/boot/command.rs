//! `ka-server boot`: the PXE service alone.

use super::dhcp::Dhcp;
use super::events::{BootEvent, Client};
use super::nodes::{NodeStates, Policy, STATE_FILE};
use super::{BootConfig, BootService, HTTP_PORT, OtherDhcpServer, files};
use crate::nodes::{Nodes, Pattern};
use crate::trust::commands::state_folder;
use crate::trust::key_file;
use crate::trust::token_file::{FileTickets, TokenFile};
use anyhow::Result;
use argh::FromArgs;
use ka_cli::exit::Exit;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// serve the install network: DHCP or proxy-DHCP, TFTP, and over HTTP the
/// kernel, the initramfs and a boot script for each node
#[derive(FromArgs, argh::ArgsInfo, Debug, Clone)]
#[argh(subcommand, name = "boot")]
pub struct BootCommand {
    /// the interface of the install network
    #[argh(option, arg_name = "IFACE")]
    pub interface: String,
    /// hand out addresses: FIRST-LAST, or auto; without it, another
    /// server does (proxy); off: only TFTP and HTTP
    #[argh(option, arg_name = "RANGE", default = "Dhcp::Proxy", from_str_fn(dhcp))]
    pub dhcp: Dhcp,
    /// the router that nodes are told with --dhcp; default: none
    #[argh(option, arg_name = "ADDR")]
    pub router: Option<Ipv4Addr>,
    /// hand out addresses although another DHCP server answers
    #[argh(switch)]
    pub force: bool,
    /// the output directory of `ka-image build`; default: /var/lib/ka/boot
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(files::BOOT_DIR)")]
    pub boot_dir: PathBuf,
    /// the HTTP port; default: 8067
    #[argh(option, arg_name = "PORT", default = "HTTP_PORT")]
    pub http_port: u16,
    /// where agents find the deployment; default: this machine, port 5757
    #[argh(option, arg_name = "HOST:PORT")]
    pub server: Option<String>,
    /// further kernel arguments
    #[argh(option, arg_name = "ARGS", default = "String::new()")]
    pub append: String,
    /// lines `MAC NAME [group=G]`; machines that are not in it boot from
    /// their disks; without it every machine is installed
    #[argh(option, arg_name = "FILE")]
    pub nodes_file: Option<PathBuf>,
    /// the names of nodes that are in no file; default: node{n}
    #[argh(option, arg_name = "PATTERN", default = "Pattern::default()", from_str_fn(pattern))]
    pub name_pattern: Pattern,
    /// what became of the nodes, shared with deployments; default:
    /// /var/lib/ka/nodes.json
    #[argh(option, arg_name = "FILE", default = "PathBuf::from(STATE_FILE)")]
    pub state: PathBuf,
    /// this server's secret key; default: /etc/ka/server.key, else
    /// server.key beside --state, made when it is not there
    #[argh(option, arg_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// settings: options under their names, which this command line
    /// overrules; default: /etc/ka/server.toml, if it is there
    #[argh(option, arg_name = "FILE")]
    pub config: Option<PathBuf>,
}

fn dhcp(text: &str) -> Result<Dhcp, String> {
    text.parse().map_err(|e: super::dhcp::Error| e.to_string())
}

fn pattern(text: &str) -> Result<Pattern, String> {
    text.parse().map_err(|e: crate::nodes::Error| e.to_string())
}

impl BootCommand {
    /// What it asks for.
    #[must_use]
    pub fn config(&self) -> BootConfig {
        BootConfig {
            interface: self.interface.clone(),
            dhcp: self.dhcp,
            router: self.router,
            boot_dir: self.boot_dir.clone(),
            http_port: self.http_port,
            server: self.server.clone(),
            append: self.append.clone(),
            force: self.force,
        }
    }

    fn states(&self) -> Result<NodeStates> {
        let (nodes, policy) = match &self.nodes_file {
            Some(path) => (Nodes::read(path, self.name_pattern.clone())?, Policy::ListedOnly),
            None => (Nodes::unlisted(self.name_pattern.clone()), Policy::Everyone),
        };
        let states = NodeStates::new(nodes, policy);
        states.keep_in(&self.state, true)?;
        Ok(states)
    }
}

/// Runs the PXE service until `interrupted` says so or it ends by itself.
///
/// # Errors
/// When it cannot be started, or dnsmasq or the HTTP server ended.
pub fn run_boot(command: &BootCommand, interrupted: impl Fn() -> bool) -> Result<Exit> {
    let states = Arc::new(command.states()?);
    let folder = state_folder(&command.state);
    let (key, path) = key_file::find_or_make(command.key_file.as_deref(), folder)?;
    log::info!("nodes are told to trust the key {} (of {})", key.public(), path.display());
    let tickets = Arc::new(FileTickets { key: key.public(), file: TokenFile::in_folder(folder) });
    let mut service = match BootService::start(&command.config(), states, tickets) {
        Ok(service) => service,
        Err(e) if e.is::<OtherDhcpServer>() => {
            log::error!("{e:#}");
            return Ok(Exit::Refused);
        }
        Err(e) => return Err(e),
    };
    for line in service.description() {
        log::info!("{line}");
    }
    let Some(events) = service.events() else { return Ok(Exit::Failed) };
    loop {
        match events.recv_timeout(Duration::from_millis(200)) {
            Ok(event) => {
                tell(&event);
                if let BootEvent::DnsmasqExited { cause } | BootEvent::HttpFailed { cause } = event {
                    anyhow::bail!(cause);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the PXE service ended"),
        }
        if interrupted() {
            service.stop();
            return Ok(Exit::Interrupted);
        }
    }
}

/// Logs `event` as a line for people. Scripts are logged where they are made.
pub fn tell(event: &BootEvent) {
    match event {
        BootEvent::Seen { mac, client } => match client {
            Client::Pxe(0 | 7 | 9) | Client::HttpBoot(16) | Client::Ipxe => {
                log::info!("{mac} boots: {client:?}");
            }
            Client::Pxe(arch) | Client::HttpBoot(arch) => {
                log::warn!(
                    "{mac} cannot boot here: its firmware says architecture {arch}, and only x86 BIOS (0) and x86-64 UEFI (7, 9, 16) are served"
                );
            }
            Client::Other => log::debug!("{mac} asks for an address"),
        },
        BootEvent::Address { mac, address } => log::info!("{mac} has {address}"),
        BootEvent::Tftp { address, file } => log::info!("{address} got {file} by TFTP"),
        BootEvent::Http { address, file } => log::info!("{address} loads {file}"),
        BootEvent::Dropped(n) => log::warn!("{n} events of the PXE service were not told"),
        BootEvent::Script { .. }
        | BootEvent::LocalBoot { .. }
        | BootEvent::DnsmasqExited { .. }
        | BootEvent::HttpFailed { .. } => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<BootCommand, String> {
        BootCommand::from_args(&["ka-server", "boot"], words).map_err(|e| e.output)
    }

    #[test]
    fn the_command_line_is_read() {
        let plain = parse(&["--interface", "br0"]).unwrap();
        assert_eq!((plain.dhcp, plain.http_port), (Dhcp::Proxy, HTTP_PORT));
        assert!(!plain.force && plain.nodes_file.is_none());
        let full = parse(&[
            "--interface",
            "br0",
            "--dhcp",
            "auto",
            "--router",
            "10.0.0.1",
            "--name-pattern",
            "n{n:02}",
        ])
        .unwrap();
        assert_eq!((full.dhcp, full.router), (Dhcp::Auto, Some(Ipv4Addr::new(10, 0, 0, 1))));
        for wrong in [
            &["--interface"][..],
            &[],
            &["--interface", "x", "--dhcp", "yes"],
            &["--interface", "x", "--name-pattern", "x"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_help_fits_a_terminal() {
        let help = parse(&["--help"]).unwrap_err();
        assert!(help.contains("node{n}"), "{help}");
        // argh wraps neither the usage line nor the description.
        for line in help.lines().skip_while(|line| !line.starts_with("Options:")) {
            assert!(line.len() <= 80, "{line}");
        }
    }

    #[test]
    fn without_a_nodes_file_everybody_is_installed_and_with_one_only_its_nodes() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state.json");
        let nodes = directory.path().join("nodes");
        std::fs::write(&nodes, "52:54:00:00:00:01 alpha\n").unwrap();
        let mut command = parse(&["--interface", "br0", "--state", state.to_str().unwrap()]).unwrap();
        let stranger = "52:54:00:00:00:02".parse().unwrap();
        assert_eq!(command.states().unwrap().decide(stranger).kind, super::super::nodes::ScriptKind::Install);
        command.nodes_file = Some(nodes);
        assert_eq!(
            command.states().unwrap().decide(stranger).kind,
            super::super::nodes::ScriptKind::LocalBoot
        );
    }
}
