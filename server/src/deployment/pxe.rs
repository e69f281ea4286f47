//! The nodes' names and the PXE service as a part of a deployment: whose name is whose, and who is sent to its disk.
//! Without `--pxe` only the names remain.

use super::command::DeployArgs;
use crate::boot::events::BootEvent;
use crate::boot::nodes::{NodeState, NodeStates, Policy};
use crate::boot::{BootConfig, BootService, address_of, command};
use crate::nodes::{Identity, Mac, Nodes, is_host_name};
use crate::trust::gate::Gate;
use anyhow::{Context, Result, bail};
use ka_chain::control::{Purpose, Registration};
use ka_chain::keys::CredentialId;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// Names, states, and perhaps the service.
pub(super) struct Pxe {
    states: Arc<NodeStates>,
    listed_only: bool,
    service: Option<(BootService, Receiver<BootEvent>)>,
    macs: BTreeMap<String, Mac>,
    /// Installed nodes that have not come back for their local boot yet.
    owed: BTreeSet<Mac>,
    /// Nodes without a MAC address, by name.
    guests: BTreeMap<String, Guest>,
    /// The same by their sessions: one that comes again keeps its name.
    returning: BTreeMap<CredentialId, Identity>,
}

/// A node without a MAC address.
#[derive(Debug, Clone, Copy)]
struct Guest {
    address: IpAddr,
    index: u32,
}

impl Pxe {
    /// Starts the service when `--pxe` asks for it; `port` is where the deployment listens, and `gate` knows the tokens
    /// that go into the boot scripts.
    ///
    /// # Errors
    /// When the service cannot be started or the state file cannot be read.
    pub(super) fn start(args: &DeployArgs, nodes: Nodes, port: u16, gate: &Arc<Gate>) -> Result<Self> {
        let listed_only = args.nodes_file.is_some();
        let policy = if listed_only { Policy::ListedOnly } else { Policy::Everyone };
        let states = Arc::new(NodeStates::new(nodes, policy));
        states.keep_in(&args.state, false)?;
        states.install_listed();
        let service = match &args.pxe {
            None => None,
            Some(interface) => {
                let mut config = BootConfig::new(interface);
                if let Some(range) = &args.dhcp {
                    config.dhcp = range.parse().context("--dhcp")?;
                }
                config.boot_dir.clone_from(&args.boot_dir);
                config.http_port = args.http_port;
                config.append.clone_from(&args.append);
                config.server = Some(format!("{}:{port}", address_of(interface)?.address));
                let tickets = Arc::clone(gate);
                let mut service = BootService::start(&config, Arc::clone(&states), tickets)
                    .context("starting the PXE service")?;
                for line in service.description() {
                    log::info!("{line}");
                }
                let events = service.events().context("the PXE service has no events")?;
                Some((service, events))
            }
        };
        Ok(Self::new(states, listed_only, service))
    }

    /// Without a service the names and states alone.
    pub(super) fn new(
        states: Arc<NodeStates>,
        listed_only: bool,
        service: Option<(BootService, Receiver<BootEvent>)>,
    ) -> Self {
        Self {
            states,
            listed_only,
            service,
            macs: BTreeMap::new(),
            owed: BTreeSet::new(),
            guests: BTreeMap::new(),
            returning: BTreeMap::new(),
        }
    }

    /// What a node is called: by its MAC address, or, for those that only receive, the name that they ask for.
    ///
    /// # Errors
    /// When the node is not let in.
    pub(super) fn identity(
        &mut self,
        mac: Option<Mac>,
        node: &Registration,
        address: IpAddr,
        session: CredentialId,
        is_gone: impl Fn(&str) -> bool,
    ) -> Result<Identity> {
        if let Some(mac) = mac {
            if self.listed_only && !self.states.is_listed(mac) {
                bail!("{mac} is not in the nodes file");
            }
            if self.states.get(mac) == NodeState::Installed {
                bail!("{mac} was installed in this deployment already");
            }
            return self.states.identity(mac);
        }
        if node.purpose == Purpose::Install {
            bail!("it does not say which MAC address it has");
        }
        if let Some(identity) = self.returning.get(&session) {
            return Ok(identity.clone());
        }
        let wanted =
            node.hostname.clone().filter(|n| is_host_name(n)).unwrap_or_else(|| "receiver".to_owned());
        // Several receivers on one machine have the same name. One that went away without success and comes again from
        // there is the same, whatever its session: else it would have its `--tries` anew each time.
        let mut name = wanted.clone();
        let mut number = 2;
        while let Some(guest) = self.guests.get(&name) {
            if guest.address == address && is_gone(&name) {
                let identity = Identity { name, index: guest.index, group: None };
                self.returning.insert(session, identity.clone());
                return Ok(identity);
            }
            name = format!("{wanted}-{number}");
            number += 1;
        }
        let index = u32::try_from(self.guests.len() + 1).context("too many receivers")?;
        self.guests.insert(name.clone(), Guest { address, index });
        let identity = Identity { name, index, group: None };
        self.returning.insert(session, identity.clone());
        Ok(identity)
    }

    /// A node begins its installation.
    pub(super) fn installing(&mut self, name: &str, mac: Option<Mac>) {
        if let Some(mac) = mac {
            self.macs.insert(name.to_owned(), mac);
            self.set(mac, NodeState::Installing);
        }
    }

    /// A node is through.
    pub(super) fn finished(&mut self, name: &str, installed: bool) {
        if let Some(mac) = self.macs.get(name).copied() {
            if installed {
                self.owed.insert(mac);
            }
            self.set(mac, if installed { NodeState::Installed } else { NodeState::Failed });
        }
    }

    fn set(&self, mac: Mac, state: NodeState) {
        if !self.states.set(mac, state) {
            log::error!("{mac} cannot be remembered: too many nodes");
        }
        if let Err(e) = self.states.save() {
            log::error!("{e:#}");
        }
    }

    /// What happened in the service, for the operator.
    pub(super) fn news(&mut self) -> Vec<String> {
        let Some((_, events)) = &self.service else { return Vec::new() };
        let mut lines = Vec::new();
        for event in events.try_iter().take(1000) {
            command::tell(&event);
            match event {
                BootEvent::Script { mac, name, kind, platform } => {
                    lines.push(format!(
                        "{} ({mac}, {platform:?}) asked for its script: {kind:?}",
                        name.as_deref().unwrap_or("?")
                    ));
                }
                BootEvent::LocalBoot { mac, name, .. } => {
                    self.owed.remove(&mac);
                    lines.push(format!("{} ({mac}) was sent to its disk", name.as_deref().unwrap_or("?")));
                }
                BootEvent::DnsmasqExited { cause } | BootEvent::HttpFailed { cause } => {
                    lines.push(format!("THE PXE SERVICE FAILED: {cause}"));
                }
                _ => {}
            }
        }
        lines
    }

    /// Goes on serving until every installed node was sent to its disk, `limit` at most.
    pub(super) fn linger(&mut self, limit: Duration, interrupted: &AtomicBool, say: impl Fn(&str)) {
        if self.service.is_none() || self.owed.is_empty() {
            return;
        }
        say(&format!("waiting for {} installed nodes to ask for their disk (--linger)", self.owed.len()));
        let end = Instant::now() + limit;
        while !self.owed.is_empty() && Instant::now() < end && !interrupted.load(Ordering::SeqCst) {
            for line in self.news() {
                say(&line);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        // The last one still loads what it needs to boot its disk.
        std::thread::sleep(Duration::from_secs(3));
        if !self.owed.is_empty() {
            say(&format!(
                "{} installed nodes did not ask for their disk; the PXE service stops",
                self.owed.len()
            ));
        }
    }
}
