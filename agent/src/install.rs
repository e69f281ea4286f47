//! The installation, step by step, from registering to the last sync. It runs in the worker of PID 1 and in a rescue
//! system alike; booting and the network come before it.
//!
//! What must hold at every point: until the step `bootloader` the disk has no partition table, so a power cut leaves
//! nothing that boots half; after a failure the table is taken away again; and the node stays in the chain for those
//! below it until the server releases the wave.

use crate::autoconfig::{self, Change, Context as Autoconfig, Nic};
use crate::disk::{self, Formatted};
use crate::init::logger;
use crate::reception::{self, Broken, NextWave, Relay, Sink};
use crate::session::{Session, Verdict, addresses, data_listener};
use crate::trust::Trust;
use anyhow::{Context, Result, bail};
use ka_chain::control::{Purpose, Registration, ToServer};
use ka_layout::order::{Firmware, InstallOrder};
use ka_sys::speed::{Speed, speeds};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Where the clone is mounted while it is made.
pub const TARGET: &str = "/target";
/// How long a node looks for its server: the golden node may be rebooting, or be told later to deploy.
const PATIENCE: Duration = Duration::from_secs(600);
/// The same when the connection to it broke: a deployment that has ended, or a server that was started anew, knows the node's
/// session no more, and then a new start (`ka.on-failure`) is what helps.
const RETURN: Duration = Duration::from_secs(60);
/// Bytes of the log's end that go with a failure.
const LOG_TAIL: usize = 4096;

/// What an installation needs to know of the machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// How it booted.
    pub firmware: Firmware,
    /// Bytes of RAM.
    pub memory: u64,
    /// The interface that it booted from.
    pub nic: Option<Nic>,
    /// A name from DHCP.
    pub hostname: Option<String>,
    /// Facts for the server's operator.
    pub facts: Vec<(String, String)>,
}

/// How the installation is to be done.
#[derive(Debug)]
pub struct Orders {
    /// `HOST:PORT`.
    pub server: String,
    /// The server's key and what lets this node in.
    pub trust: Trust,
    /// Plan and show only.
    pub dry_run: bool,
    /// A shell before this step.
    pub break_at: Option<&'static str>,
    /// This disk, in place of the layout's rule.
    pub disk: Option<String>,
}

/// A failure and the step in which it came.
#[derive(Debug)]
pub struct Failure {
    /// The step.
    pub step: &'static str,
    /// Why.
    pub error: anyhow::Error,
}

/// Not a failure of anything: the plan was shown and nothing was to be done.
#[derive(Debug, thiserror::Error)]
#[error("this is a dry run: nothing was written")]
pub struct DryRun;

/// What is shared by the steps: where we are, and who is told.
struct Steps {
    current: &'static str,
    break_at: Option<&'static str>,
    session: Option<Arc<Session>>,
}

impl Steps {
    fn begin(&mut self, step: &'static str) {
        self.current = step;
        if self.break_at == Some(step) {
            log::info!("ka.break={step}: a shell before this step; `exit` goes on");
            logger::flush(Duration::from_secs(2));
            if let Err(e) = crate::init::shell::run() {
                log::warn!("no shell at the break point: {e:#}; going on");
            }
        }
        logger::set_step(step);
        log::info!("step {step}");
        if let Some(session) = &self.session {
            session.tell(ToServer::Step(step.to_owned()));
        }
    }
}

/// Installs this machine.
///
/// # Errors
/// [`Failure`]; the server was told, and the disk does not boot.
pub fn install(orders: &Orders, machine: &Machine) -> Result<(), Failure> {
    let mut steps = Steps { current: "register", break_at: orders.break_at, session: None };
    steps.begin("register");
    let opened =
        data_listener().and_then(|listener| Ok((open(orders, machine, &listener, PATIENCE)?, listener)));
    let (mut session, listener) = opened.map_err(|error| Failure { step: "register", error })?;
    steps.session = Some(Arc::clone(&session));
    let mut relay = None;
    let result = loop {
        let result = listener
            .try_clone()
            .context("opening the data port anew")
            .and_then(|listener| run(&mut steps, orders, machine, &session, listener, &mut relay));
        match result {
            // The server decides how often.
            Err(error) if error.is::<NextWave>() => {
                log::warn!("{error:#}; this node makes itself ready for the next wave");
                relay = None;
                session.again();
            }
            // Its session lets it in again, and it gets its place in the next wave.
            Err(error) if session.broken().is_some() => {
                log::warn!("{error:#}; this node goes back to the server");
                relay = None;
                match open(orders, machine, &listener, RETURN) {
                    Ok(opened) => session = opened,
                    Err(also) => break Err(error.context(format!("going back to the server: {also:#}"))),
                }
                steps.session = Some(Arc::clone(&session));
            }
            other => break other,
        }
    };
    let step = steps.current;
    let outcome = match result {
        Ok(()) => {
            session.tell(ToServer::Done);
            // Before the release this node's window may be needed below.
            match session.wait_verdict() {
                Verdict::Released | Verdict::Out(_) => Ok(()),
                // The clone is whole and verified; only the wave's end was not heard of.
                Verdict::Lost(why) | Verdict::Broken(why) => {
                    log::warn!("{why} before the wave was released; this node is done all the same");
                    Ok(())
                }
            }
        }
        Err(error) => {
            let tail = logger::tail(LOG_TAIL);
            log::error!("{error:#}");
            session.tell(ToServer::Log { level: 1, text: format!("end of the log:\n{tail}") });
            session.tell(ToServer::Failed { step: step.to_owned(), error: format!("{error:#}") });
            if relay.is_some() {
                log::info!("this node stays in the chain for those below it until the wave is over");
                // Released or lost: both mean that nobody needs it any more.
                let _ = session.wait_verdict();
            }
            Err(Failure { step, error })
        }
    };
    drop(relay);
    logger::flush(Duration::from_millis(200));
    detach_log();
    session.close();
    outcome
}

/// Registers at the server; from then on the log goes there.
fn open(
    orders: &Orders,
    machine: &Machine,
    listener: &std::net::TcpListener,
    patience: Duration,
) -> Result<Arc<Session>> {
    let port = listener.local_addr().context("asking for the data port")?.port();
    let session = Session::open(&orders.server, &orders.trust, patience, |_| registration(machine, port))?;
    log::info!("the server at {} knows this node as {}", session.server, session.name);
    let session = Arc::new(session);
    forward_log(&session);
    Ok(session)
}

fn run(
    steps: &mut Steps,
    orders: &Orders,
    machine: &Machine,
    session: &Arc<Session>,
    listener: std::net::TcpListener,
    relay: &mut Option<Box<Relay>>,
) -> Result<()> {
    let order = InstallOrder::from_bytes(&session.order).context("reading the server's order")?;
    steps.begin("disk");
    let mut layout = ka_layout::parse::parse(&order.layout).context("reading the layout")?;
    let disks = disk::discover().context("looking at the disks")?;
    if let Some(wanted) = &orders.disk {
        disk::name_disk(&mut layout, Path::new(wanted)).context("naming the disk")?;
    }
    let plan = disk::plan(&layout, &disks, &order.golden, machine.firmware).context("planning the disks")?;
    for line in plan.to_string().lines() {
        log::info!("{line}");
    }
    if orders.dry_run {
        return Err(DryRun.into());
    }
    let record = Path::new(disk::RECORD);
    let result = plan.partition(record, &order.keys).context("partitioning").and_then(|partitioned| {
        steps.begin("format");
        let formatted = partitioned.format(Path::new(TARGET)).context("making file systems")?;
        fill(steps, machine, session, listener, relay, &order, formatted)
    });
    let Err(error) = result else { return Ok(()) };
    // First the cause goes to the log, then the disk is made unbootable.
    log::error!("step {}: {error:#}", steps.current);
    match disk::clear_listed(record) {
        Ok(cleared) => {
            for disk in cleared {
                log::info!("{} was made unbootable", disk.display());
            }
            Err(error)
        }
        Err(also) => Err(error.context(format!("and the disk could not be made unbootable: {also:#}"))),
    }
}

/// From mounted, empty file systems to a clone that boots.
fn fill(
    steps: &mut Steps,
    machine: &Machine,
    session: &Arc<Session>,
    listener: std::net::TcpListener,
    relay: &mut Option<Box<Relay>>,
    order: &InstallOrder,
    mut formatted: Formatted,
) -> Result<()> {
    steps.begin("ready");
    session.tell(ToServer::Ready);
    let target = Path::new(TARGET);
    let start = std::time::Instant::now();
    let raw = formatted.raw_places();
    let sink = Sink::Directory { target, raw: &raw };
    let received = reception::receive(session, listener, machine.memory, &sink, || {
        steps.begin("receive");
    });
    let reception = match received {
        Ok(reception) => reception,
        Err(Broken { error, relay: kept }) => {
            *relay = kept;
            return Err(error);
        }
    };
    *relay = Some(Box::new(reception.relay));
    if let Some(summary) = &reception.unpacked {
        let seconds = start.elapsed().as_secs_f64();
        log::info!("unpacked {} files in {seconds:.1} s: {summary:?}", summary.files);
    }
    session.tell(ToServer::Fact { name: "peak memory".to_owned(), value: peak_memory() });
    still_wanted(session)?;
    steps.begin("configure");
    let volumes = formatted.volumes();
    let context = Autoconfig::new(target, order, &volumes, machine.firmware, machine.nic.as_ref())
        .context("opening the clone")?;
    tell_changes(session, &autoconfig::configure(&context)?);
    still_wanted(session)?;
    steps.begin("bootloader");
    formatted.commit_table().context("writing the partition table")?;
    tell_changes(session, &autoconfig::bootloader(&context)?);
    steps.begin("finish");
    autoconfig::verify(&context).context("verifying the clone")?;
    drop(context);
    still_wanted(session)?;
    formatted.finish().context("unmounting the clone")?;
    Ok(())
}

/// A server that gave up before this node was done leaves it with a stream that nobody vouches for.
fn still_wanted(session: &Session) -> Result<()> {
    match session.lost() {
        Some(why) => bail!("{why}"),
        None => Ok(()),
    }
}

fn tell_changes(session: &Session, changes: &[Change]) {
    for change in changes {
        session.tell(ToServer::Fact { name: format!("changed {}", change.piece), value: change.to_string() });
    }
}

/// What this node says of itself.
///
/// # Errors
/// When the addresses cannot be listed.
pub fn registration(machine: &Machine, data_port: u16) -> Result<Registration> {
    Ok(Registration {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        purpose: Purpose::Install,
        mac: machine.nic.as_ref().map(|n| n.mac.clone()),
        hostname: machine.hostname.clone(),
        data_port,
        addresses: addresses()?,
        memory: machine.memory,
        facts: [machine.facts.clone(), link_facts()].concat(),
    })
}

/// How fast this machine's network interfaces are.
#[must_use]
pub fn link_facts() -> Vec<(String, String)> {
    speeds().iter().map(Speed::fact).collect()
}

/// The most memory that this process had, as the kernel says.
fn peak_memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.map_or_else(|| "unknown".to_owned(), |l| l.trim().to_owned())
}

/// Sends every line of the log to the server, from now until [`detach_log`].
fn forward_log(session: &Arc<Session>) {
    let lines = logger::attach(2000);
    let session = Arc::clone(session);
    std::thread::spawn(move || {
        for line in lines {
            let level = match line.level {
                log::Level::Error => 1,
                log::Level::Warn => 2,
                log::Level::Info => 3,
                log::Level::Debug | log::Level::Trace => 4,
            };
            // A line that finds no room is dropped: the log must never hold the installation up.
            session.try_tell(ToServer::Log { level, text: line.to_string() });
        }
    });
}

/// Ends [`forward_log`] by putting a reader in its place that nobody reads.
fn detach_log() {
    drop(logger::attach(1));
    std::thread::sleep(Duration::from_millis(100));
}
