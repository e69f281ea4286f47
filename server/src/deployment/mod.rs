//! `ka-server deploy`: one deployment from start to summary. [`state`] decides, [`listen`] talks to the nodes, [`source`]
//! feeds the chain, and the loop here carries events and actions between them.

pub mod addresses;
pub mod claims;
pub mod command;
pub mod display;
pub mod expected;
pub mod fstab;
pub mod go;
pub mod golden;
pub mod listen;
pub mod logs;
pub mod manifests;
pub mod order;
mod policy;
mod pxe;
pub mod raw;
pub mod source;
pub mod state;
mod withheld;

use crate::nodes::{Identity, Mac, Nodes};
use crate::trust::commands::state_folder;
use crate::trust::gate::Gate;
use crate::trust::token_file::TokenFile;
use crate::trust::{key_file, luks_keys};
use anyhow::{Context, Result, ensure};
use claims::Newcomer;
use command::{DeployArgs, Settings};
use display::Display;
use golden::Plan;
use ka_archive::manifest::{ManifestError, Written};
use ka_chain::buffer::Pools;
use ka_chain::control::{Registration, ToNode, ToServer};
use ka_chain::core::HEAD;
use ka_chain::core::relay::Limits;
use ka_chain::feed::{Dial, Feeder};
use ka_chain::keys::CredentialId;
use ka_chain::node::{Config, Node, Report};
use ka_chain::seal::{Wave, random};
use ka_chain::sign::Signer;
use ka_cli::exit::Exit;
use ka_layout::order::{INTO_DIRECTORY, InstallOrder};
use listen::{Hub, Incoming};
use logs::Logs;
use pxe::Pxe;
use source::{Current, Sent, Source};
use state::{Action, Deployment, Status, installs};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often the state machine looks at the clock.
const TICK: Duration = Duration::from_millis(100);
/// Events from the network that may wait.
const QUEUE: usize = 4096;
/// How long closing connections may take at the end, so that last messages arrive.
const GOODBYE: Duration = Duration::from_secs(5);

/// Runs a deployment.
///
/// # Errors
/// When it cannot begin; what happens to nodes is in the exit code and the summary.
pub fn run(args: &DeployArgs) -> Result<Exit> {
    let settings = match args.settings() {
        Ok(settings) => settings,
        Err(e) => {
            eprintln!("ka-server: {e:#}");
            return Ok(Exit::Usage);
        }
    };
    let interrupted = ka_sys::signals::termination_flag().context("catching signals")?;
    let mut display = Display::new(args.json);
    let plan = Plan::make(args)?;
    for warning in &plan.warnings {
        display.say(&format!("warning: {warning}"));
    }
    if args.dry_run {
        println!("{}", plan.layout_text.trim_end());
        for (path, used) in &plan.golden.used {
            println!("# {path}: {} in {} entries", ka_cli::units::show_size(used.bytes), used.inodes);
        }
        for source in &plan.raw {
            println!("# {}", source.text());
        }
        return Ok(Exit::Done);
    }
    let nodes = match &args.nodes_file {
        Some(path) => Nodes::read(path, settings.pattern.clone())?,
        None => Nodes::unlisted(settings.pattern.clone()),
    };
    let id = random().context("making an id for the deployment")?;
    let name = deployment_name(&id);
    let logs = Logs::new(&args.log_dir, &name)?;
    let (sender, incoming) = sync_channel(QUEUE);
    let folder = state_folder(&args.state);
    let (key, key_path) = key_file::find_or_make(args.key_file.as_deref(), folder)?;
    let gate = Arc::new(Gate::new(key, id, TokenFile::in_folder(folder)));
    let (hub, port) = Hub::listen(&settings.listen, sender, Arc::clone(&gate))?;
    display.say(&format!(
        "deployment {name}: listening on TCP port {port} (open it in the firewall), logs in {}",
        logs.folder().display()
    ));
    display.say(&format!("this server's key is {} ({})", gate.key().public(), key_path.display()));
    let pxe = match Pxe::start(args, nodes, port, &gate) {
        Err(e) if e.is::<crate::boot::OtherDhcpServer>() => {
            eprintln!("ka-server: {e:#}");
            return Ok(Exit::Refused);
        }
        other => other?,
    };
    let go = go::Listener::start(&args.state)
        .inspect_err(|e| {
            display.say(&format!("warning: `ka-server go` does not reach this deployment: {e:#}"));
        })
        .ok();
    let linger = settings.linger;
    let deadline = settings.deadline.map(|d| Instant::now() + d);
    let pools = Pools::of_head(settings.window + settings.history);
    let mut run = Run {
        args,
        plan,
        name,
        logs,
        hub: Arc::clone(&hub),
        gate,
        deployment: Deployment::new(settings.clone(), id, Instant::now()),
        threads: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
        settings,
        pxe,
        go,
        head: None,
        reports: sync_channel(QUEUE),
        feeding: None,
        pools: pools.clone(),
        plain: Arc::default(),
        dial: None,
        current: Current::default(),
        input: source::Input::default(),
        summary: None,
        connections: BTreeMap::new(),
    };
    run.deployment.speeds = ka_sys::speed::speeds();
    // While nodes are waited for.
    std::thread::spawn(move || pools.fill());
    let ended = run.until_over(&incoming, &mut display, interrupted, deadline);
    let exit = run.finish(&mut display, ended)?;
    if matches!(exit, Exit::Done | Exit::SomeNodesFailed) {
        run.pxe.linger(linger, interrupted, |text| display.say(text));
    }
    hub.stop();
    Ok(exit)
}

/// How the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Over,
    Interrupted,
    Deadline,
}

struct Run<'a> {
    args: &'a DeployArgs,
    plan: Plan,
    name: String,
    logs: Logs,
    hub: Arc<Hub>,
    gate: Arc<Gate>,
    deployment: Deployment,
    threads: usize,
    settings: Settings,
    pxe: Pxe,
    go: Option<go::Listener>,
    head: Option<Node>,
    /// What the head reports.
    reports: (SyncSender<Report>, Receiver<Report>),
    feeding: Option<Receiver<Result<Sent>>>,
    /// Memory for what the head holds, of all waves.
    pools: Pools,
    plain: Arc<AtomicU64>,
    /// How hard the wave's source is compressed.
    dial: Option<Arc<Dial>>,
    current: Current,
    /// Standard input, when it is the source.
    input: source::Input,
    summary: Option<ka_archive::PackSummary>,
    /// Names of nodes by connection, also of those that the deployment refused, for their logs.
    connections: BTreeMap<state::ConnectionId, String>,
}

impl Run<'_> {
    fn until_over(
        &mut self,
        incoming: &Receiver<Incoming>,
        display: &mut Display,
        interrupted: &AtomicBool,
        deadline: Option<Instant>,
    ) -> Ended {
        let mut ping = 0;
        let mut last_ping = Instant::now();
        loop {
            let mut actions = Vec::new();
            match incoming.recv_timeout(TICK) {
                Ok(event) => {
                    actions.extend(self.event(event));
                    // What waits already is taken at once; bounded, so that time is looked at too.
                    for event in incoming.try_iter().take(QUEUE) {
                        actions.extend(self.event(event));
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            let now = Instant::now();
            if let Some(done) = &self.feeding
                && let Ok(result) = done.try_recv()
            {
                self.feeding = None;
                let result = result.map(|sent| {
                    report_manifest(sent.manifest, display);
                    self.summary = sent.summary;
                    sent.record
                });
                actions.extend(self.deployment.fed(result.map_err(|e| format!("{e:#}"))));
            }
            while let Ok(report) = self.reports.1.try_recv() {
                actions.extend(self.deployment.head_report(&report, now));
            }
            if let Some(head) = &self.head {
                self.deployment.head_progress(head.standing().status, head.waits(), now);
            }
            if let Some(dial) = &self.dial {
                self.deployment.compressed(dial.work());
            }
            while let Some(request) = self.go.as_ref().and_then(go::Listener::next) {
                request.answer(self.deployment.go(now).map(|(text, more)| {
                    actions.extend(more);
                    text
                }));
            }
            actions.extend(self.deployment.tick(now));
            if now.duration_since(last_ping) >= ka_chain::control::PING {
                last_ping = now;
                ping += 1;
                let connected = self.deployment.nodes.values().filter(|n| n.connected);
                actions.extend(connected.map(|n| Action::Send(n.connection, ToNode::Ping(ping))));
            }
            for line in self.pxe.news() {
                display.say(&line);
            }
            for action in actions {
                self.perform(action, display);
            }
            let plain = self.plain.load(Ordering::Relaxed);
            display.update(&self.deployment, plain, self.plan.total(), &self.current.get());
            if self.deployment.is_over() {
                return Ended::Over;
            }
            if interrupted.load(Ordering::SeqCst) {
                return Ended::Interrupted;
            }
            if deadline.is_some_and(|d| now >= d) {
                return Ended::Deadline;
            }
        }
    }

    fn event(&mut self, event: Incoming) -> Vec<Action> {
        let now = Instant::now();
        match event {
            Incoming::Registered(connection, address, registration, session) => {
                match self.order_for(&registration, address, session) {
                    Ok((identity, order)) => {
                        let name = identity.name;
                        self.connections.insert(connection, name.clone());
                        let newcomer = Newcomer { connection, name, address, registration, order, session };
                        self.deployment.register(newcomer, now)
                    }
                    Err(e) => vec![
                        Action::Send(connection, ToNode::Refused(format!("{e:#}"))),
                        Action::Close(connection),
                        Action::Say(format!("{address} was refused: {e:#}")),
                    ],
                }
            }
            Incoming::Message(connection, message) => {
                if let Some(name) = self.connections.get(&connection) {
                    match &message {
                        ToServer::Log { text, .. } => self.logs.line(name, text),
                        ToServer::Failed { step, error } => {
                            self.logs.line(name, &format!("FAILED in step {step}: {error}"));
                        }
                        // What autoconfig changed stands in the node's own log already.
                        ToServer::Fact { name: fact, value } if !fact.starts_with("changed ") => {
                            self.logs.line(name, &format!("{fact}: {value}"));
                        }
                        _ => {}
                    }
                }
                self.deployment.message(connection, message, now)
            }
            Incoming::Closed(connection, why) => {
                if let Some(name) = self.connections.remove(&connection) {
                    self.logs.line(&name, &format!("connection closed: {why}"));
                }
                self.deployment.closed(connection, &why, now)
            }
        }
    }

    /// Who a node becomes, and what it is told.
    fn order_for(
        &mut self,
        registration: &Registration,
        address: std::net::IpAddr,
        session: CredentialId,
    ) -> Result<(Identity, Vec<u8>)> {
        let mac: Option<Mac> = match &registration.mac {
            Some(text) => Some(text.parse().context("the node's MAC address")?),
            None => None,
        };
        let deployment = &self.deployment;
        let identity =
            self.pxe.identity(mac, registration, address, session, |name| deployment.is_gone(name))?;
        if !installs(registration) {
            ensure!(
                self.plan.raw.is_empty()
                    || registration
                        .facts
                        .iter()
                        .all(|(name, value)| (name.as_str(), value.as_str()) != INTO_DIRECTORY),
                "the layout has raw partitions, for which a directory has no place; give the stream to a command (--sink-cmd)"
            );
            return Ok((identity, Vec::new()));
        }
        self.pxe.installing(&identity.name, mac);
        let order = InstallOrder {
            deployment: self.name.clone(),
            node: ka_layout::order::Identity {
                name: identity.name.clone(),
                index: identity.index,
                mac: registration.mac.clone(),
                group: identity.group.clone(),
            },
            layout: self.plan.layout_text.clone(),
            golden: self.plan.golden.clone(),
            policy: self.plan.policy.clone(),
            hooks: self.plan.hooks.clone(),
            keys: luks_keys::for_node(
                &self.args.luks_keys,
                &identity.name,
                self.plan.layout.luks.iter().map(|l| l.name.as_str()),
            )?,
        };
        let body = order.to_bytes().context("writing the order")?;
        Ok((identity, body))
    }

    fn perform(&mut self, action: Action, display: &mut Display) {
        match action {
            Action::Send(connection, message) => self.hub.send(connection, message),
            Action::Close(connection) => self.hub.close(connection),
            Action::Cut(connection) => self.hub.cut(connection),
            Action::Say(text) => display.say(&text),
            Action::Feed(wave, signer) => {
                if let Err(e) = self.start_feeding(&wave, signer) {
                    for action in self.deployment.fed(Err(format!("{e:#}"))) {
                        self.perform(action, display);
                    }
                }
            }
            Action::Head(place) => {
                if let Some(head) = &self.head {
                    head.place(place, Vec::new());
                }
            }
            Action::Compress(level) => {
                if let Some(dial) = &self.dial {
                    dial.set(level);
                }
            }
            Action::CloseHead => {
                self.hub.feed(None);
                self.dial = None;
                self.head = None;
            }
            Action::Final(name) => {
                let installed = self
                    .deployment
                    .nodes
                    .get(&name)
                    .is_some_and(|n| n.status == Status::Done && installs(&n.registration));
                self.pxe.finished(&name, installed);
            }
        }
    }

    fn start_feeding(&mut self, wave: &Wave, signer: Option<Arc<Signer>>) -> Result<()> {
        let config = Config {
            wave: wave.clone(),
            me: HEAD,
            limits: Limits {
                survive: self.settings.survive,
                window: self.settings.window,
                history: self.settings.history,
            },
            dead_after: self.settings.dead_after,
            signer: None,
        };
        let reports = self.reports.0.clone();
        let report = move |report| {
            if reports.try_send(report).is_err() {
                log::warn!("a report of the head found no room");
            }
        };
        let head = Node::head(config, Box::new(report)).context("setting up the head of the chain")?;
        self.hub.feed(Some(head.handle()));
        let store = Arc::clone(head.store());
        let pools = self.pools.clone();
        let feeder = Feeder::new(wave, store, pools, signer, self.settings.compression, self.threads);
        self.head = Some(head);
        self.plain = feeder.counter();
        self.dial = Some(feeder.dial());
        let source = match (&self.args.source_cmd, &self.args.source_file) {
            (Some(command), _) => Source::Command(command.clone()),
            (None, Some(file)) if file == Path::new("-") => Source::Input(self.input.clone()),
            (None, Some(file)) => Source::File(file.clone()),
            (None, None) => Source::Tree(self.plan.pack.clone(), self.plan.raw.clone()),
        };
        let current = self.current.clone();
        let manifest = match &source {
            Source::Tree(..) => manifests::begin(self.logs.folder(), &self.name, wave.number, &self.plan)
                .inspect_err(|e| log::warn!("{NO_MANIFEST}: {e}"))
                .ok(),
            Source::Command(_) | Source::File(_) | Source::Input(_) => None,
        };
        let (done, receiver) = sync_channel(1);
        std::thread::spawn(move || {
            // Nobody takes it when the deployment was interrupted.
            let _ = done.send(source::feed(&source, feeder, current, manifest));
        });
        self.feeding = Some(receiver);
        Ok(())
    }

    /// Summary, files, exit code.
    fn finish(&mut self, display: &mut Display, ended: Ended) -> Result<Exit> {
        let why = match ended {
            Ended::Over => None,
            Ended::Interrupted => Some("the operator interrupted the deployment"),
            Ended::Deadline => Some("the deployment's deadline has passed"),
        };
        if let Some(why) = why {
            display.say(why);
            let connected = self.deployment.nodes.values().filter(|n| n.connected);
            for connection in connected.map(|n| n.connection) {
                self.hub.send(connection, ToNode::Abort(why.to_owned()));
                self.hub.close(connection);
            }
            if let Some(head) = &self.head {
                head.stop(why);
            }
        }
        // A release or an abort that is still queued must reach its node.
        self.hub.drain(GOODBYE);
        if let Some(summary) = &self.summary {
            report_pack(summary, display);
        }
        display.summary(&self.deployment, self.plan.total(), Instant::now());
        let refusals = &self.hub.entrance.refusals;
        if refusals.total() > 0 {
            display.say(&format!(
                "{} connections were neither nodes nor children and were dropped: {}",
                refusals.total(),
                refusals.text()
            ));
        }
        if self.deployment.damaged > 0 {
            display
                .say(&format!("{} damaged or forged chunks were refused by nodes", self.deployment.damaged));
        }
        for (count, what) in [
            (&self.gate.refused_tokens, "nodes were refused because of their token"),
            (&self.gate.refused_handshakes, "handshakes did not open and were refused"),
        ] {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                display.say(&format!("{count} {what}"));
            }
        }
        self.write_names(self.args.ok_file.as_deref(), |s| *s == Status::Done)?;
        self.write_names(self.args.failed_file.as_deref(), |s| *s != Status::Done)?;
        let (done, failed) = self.deployment.counts();
        Ok(match ended {
            Ended::Interrupted => Exit::Interrupted,
            Ended::Deadline => Exit::TimedOut,
            Ended::Over if failed == 0 && done > 0 => Exit::Done,
            Ended::Over if done > 0 => Exit::SomeNodesFailed,
            Ended::Over => Exit::Failed,
        })
    }

    fn write_names(&self, path: Option<&Path>, wanted: impl Fn(&Status) -> bool) -> Result<()> {
        let Some(path) = path else { return Ok(()) };
        let mut text = String::new();
        for node in self.deployment.nodes.values().filter(|n| wanted(&n.status)) {
            text.push_str(&node.name);
            text.push('\n');
        }
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

/// Why `verify` will have nothing to compare with.
const NO_MANIFEST: &str = "this wave has no manifest, so that `verify` cannot compare its clones";

/// Tells where the manifest of a wave is, or why it is not there.
fn report_manifest(manifest: Option<Result<Written, ManifestError>>, display: &Display) {
    match manifest {
        Some(Ok(written)) => display.say(&format!(
            "manifest of {} entries for `verify`: {}",
            written.entries,
            written.path.display()
        )),
        Some(Err(e)) => display.say(&format!("warning: {NO_MANIFEST}: {e}")),
        None => {}
    }
}

/// What the operator should know of the golden tree after it was sent.
fn report_pack(summary: &ka_archive::PackSummary, display: &Display) {
    for (what, list) in [
        ("changed while they were read", &summary.changed),
        ("vanished while they were read", &summary.vanished),
        ("could not be read and were left out", &summary.unreadable),
    ] {
        if list.total > 0 {
            let more = if list.total > list.first.len() as u64 { " ..." } else { "" };
            display.say(&format!("{} files {what}: {}{more}", list.total, list.first.join(" ")));
        }
    }
}

/// A name for people and file names: the time in UTC and a part of the random id.
fn deployment_name(id: &[u8; 16]) -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970, by the method of era, year of era and day of year.
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    let mut name =
        format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}-", rest / 3600, rest / 60 % 60, rest % 60);
    for byte in &id[..3] {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}
