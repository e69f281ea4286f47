//! The command lines of `ka-agent` outside PID 1.

use crate::autoconfig::Nic;
use crate::disk;
use crate::init::{Machine as Found, facts, logger};
use crate::install::{self, Machine, Orders};
use crate::reception::{self, Broken, NextWave, Reception, Relay, Sink};
use crate::session::{Session, Verdict, addresses, data_listener};
use crate::target::Target;
use crate::trust::Trust;
use anyhow::{Context, Result, bail};
use argh::FromArgs;
use ka_chain::control::{Purpose, Registration, ToServer};
use ka_cli::exit::Exit;
use ka_cli::units::parse_time;
use ka_layout::order::{Golden, INTO_DIRECTORY, Secret};
use log::LevelFilter;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// ka-agent installs a node. As PID 1 of the initramfs it takes everything from the kernel command line; here it is an
/// ordinary program.
#[derive(FromArgs, Debug)]
pub struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, Debug)]
#[argh(subcommand)]
enum Command {
    Receive(Receive),
    Deploy(Deploy),
    Disks(Disks),
    Autoconfig(crate::dry_run::Args),
    Stage(Stage),
    Verify(crate::verify_command::VerifyArgs),
}

/// receive the golden tree into a directory; no disk is touched, nothing reboots
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "receive")]
struct Receive {
    /// where ka-server deploys
    #[argh(option, arg_name = "HOST:PORT")]
    server: String,
    /// the server's key, as ka-server shows it
    #[argh(option, arg_name = "PUBKEY")]
    key: String,
    /// a file with the token that lets this node in; - is standard input
    #[argh(option, arg_name = "FILE")]
    token_file: String,
    /// unpack into this directory, which must be there
    #[argh(option, arg_name = "DIR")]
    target: Option<PathBuf>,
    /// give the stream to this command instead
    #[argh(option, arg_name = "COMMAND")]
    sink_cmd: Option<String>,
    /// verify the stream and drop it: for measuring
    #[argh(switch)]
    discard: bool,
    /// the name to ask for (default: this machine's)
    #[argh(option, arg_name = "NAME")]
    name: Option<String>,
    /// how long to look for the server, at first and when the connection to it was lost (default 60 s)
    #[argh(option, arg_name = "TIME", default = "String::from(\"60s\")")]
    patience: String,
    /// say more
    #[argh(switch, short = 'v')]
    verbose: bool,
}

/// install this machine from a running rescue system: everything on the disk is lost
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "deploy")]
struct Deploy {
    /// where ka-server deploys
    #[argh(option, arg_name = "HOST:PORT")]
    server: String,
    /// the server's key, as ka-server shows it
    #[argh(option, arg_name = "PUBKEY")]
    key: String,
    /// a file with the token that lets this node in; - is standard input
    #[argh(option, arg_name = "FILE")]
    token_file: String,
    /// the disk, as /dev/NAME; it takes the place of the layout's rule
    #[argh(option, arg_name = "DEV")]
    disk: String,
    /// yes, everything on the disk may go
    #[argh(switch)]
    yes: bool,
    /// show the plan and stop
    #[argh(switch)]
    dry_run: bool,
    /// say more
    #[argh(switch, short = 'v')]
    verbose: bool,
}

/// show every disk, and what a layout would make of it
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "disks")]
struct Disks {
    /// a layout file
    #[argh(option, arg_name = "FILE")]
    layout: Option<PathBuf>,
}

/// make what a layout says on this machine's disks, empty, and close it again: a rehearsal of an installation without a
/// server. Everything on the disks is lost
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "stage")]
struct Stage {
    /// the layout file
    #[argh(option, arg_name = "FILE")]
    layout: PathBuf,
    /// keys of its encrypted volumes: VOLUME.key in this directory
    #[argh(option, arg_name = "DIR")]
    keys: Option<PathBuf>,
    /// yes, everything on the disks may go
    #[argh(switch)]
    yes: bool,
}

/// Runs a command.
#[must_use]
pub fn run(args: &Args) -> Exit {
    let result = match &args.command {
        Command::Receive(args) => receive(args),
        Command::Deploy(args) => deploy(args),
        Command::Disks(args) => disks(args),
        Command::Autoconfig(args) => crate::dry_run::run(args),
        Command::Stage(args) => stage(args),
        Command::Verify(args) => crate::verify_command::run(args),
    };
    result.unwrap_or_else(|e| {
        eprintln!("ka-agent: {e:#}");
        Exit::Failed
    })
}

fn level(verbose: bool) -> LevelFilter {
    if verbose { LevelFilter::Debug } else { LevelFilter::Info }
}

fn receive(args: &Receive) -> Result<Exit> {
    logger::install(level(args.verbose));
    let sink = match (&args.target, &args.sink_cmd, args.discard) {
        (Some(target), None, false) => {
            if !target.is_dir() {
                bail!("--target {}: not a directory", target.display());
            }
            Sink::Directory { target, raw: &[] }
        }
        (None, Some(command), false) => Sink::Command(command),
        (None, None, true) => Sink::Discard,
        _ => {
            eprintln!("ka-agent: give one of --target DIR, --sink-cmd COMMAND, --discard");
            return Ok(Exit::Usage);
        }
    };
    let patience = match parse_time(&args.patience) {
        Ok(patience) => patience,
        Err(e) => {
            eprintln!("ka-agent: --patience: {e}");
            return Ok(Exit::Usage);
        }
    };
    let trust = match Trust::from_args(&args.key, &args.token_file) {
        Ok(trust) => trust,
        Err(e) => {
            eprintln!("ka-agent: {e:#}");
            return Ok(Exit::Usage);
        }
    };
    let memory = Found::detect().memory;
    let listener = data_listener()?;
    let port = listener.local_addr().context("asking for the data port")?.port();
    let name = args.name.clone().or_else(hostname);
    let target = match &sink {
        Sink::Directory { target, .. } => Some(Target::new(target)?),
        Sink::Command(_) | Sink::Discard => None,
    };
    let mut facts = install::link_facts();
    if target.is_some() {
        facts.push((INTO_DIRECTORY.0.to_owned(), INTO_DIRECTORY.1.to_owned()));
    }
    let open = || {
        let register = |_: &std::net::TcpStream| {
            Ok(Registration {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                purpose: Purpose::Receive,
                mac: None,
                hostname: name.clone(),
                data_port: port,
                addresses: addresses()?,
                memory,
                facts: facts.clone(),
            })
        };
        Session::open(&args.server, &trust, patience, register).map(Arc::new)
    };
    let mut session = open()?;
    loop {
        session.tell(ToServer::Ready);
        let listener = listener.try_clone().context("opening the data port anew")?;
        let result = reception::receive(&session, listener, memory, &sink, || {
            session.tell(ToServer::Step("receive".to_owned()));
        });
        let Broken { error, relay } = match result {
            Ok(reception) => return received(&session, reception),
            Err(broken) => broken,
        };
        // Half a tree is not unpacked over; a command is run once more.
        let empty = || target.as_ref().map_or(Ok(()), Target::empty);
        if error.is::<NextWave>() {
            log::warn!("{error:#}; this node makes itself ready for the next wave");
            drop(relay);
            session.again();
            if let Err(error) = empty() {
                return failed(&session, error, None);
            }
        } else if let Some(why) = session.broken() {
            log::warn!("{error:#}; this node goes back to the server");
            drop(relay);
            empty()?;
            session = open().with_context(|| why)?;
        } else {
            return failed(&session, error, relay);
        }
    }
}

/// Everything was received: the node stays until the wave is released.
fn received(session: &Session, reception: Reception) -> Result<Exit> {
    if let Some(summary) = &reception.unpacked {
        log::info!("{summary:?}");
    }
    session.tell(ToServer::Done);
    let verdict = session.wait_verdict();
    drop(reception);
    session.close();
    match verdict {
        Verdict::Released => Ok(Exit::Done),
        // Everything was received and verified, and the server knows it.
        Verdict::Out(why) | Verdict::Lost(why) | Verdict::Broken(why) => bail!("{why}"),
    }
}

/// The reception failed for good: the node stays a relay until the wave is released.
fn failed(session: &Session, error: anyhow::Error, relay: Option<Box<Relay>>) -> Result<Exit> {
    session.tell(ToServer::Failed { step: "receive".to_owned(), error: format!("{error:#}") });
    if relay.is_some() {
        log::error!("{error:#}");
        // Released or lost: nobody below needs this relay any more.
        let _ = session.wait_verdict();
    }
    drop(relay);
    session.close();
    Err(error)
}

fn deploy(args: &Deploy) -> Result<Exit> {
    logger::install(level(args.verbose));
    if !args.yes && !args.dry_run {
        eprintln!("ka-agent: refused: everything on {} would be lost; say --yes if that is meant", args.disk);
        return Ok(Exit::Refused);
    }
    let trust = match Trust::from_args(&args.key, &args.token_file) {
        Ok(trust) => trust,
        Err(e) => {
            eprintln!("ka-agent: {e:#}");
            return Ok(Exit::Usage);
        }
    };
    std::fs::create_dir_all("/run/ka").context("making /run/ka")?;
    let orders = Orders {
        server: args.server.clone(),
        trust,
        dry_run: args.dry_run,
        break_at: None,
        disk: Some(args.disk.clone()),
    };
    let machine = Machine {
        firmware: facts::firmware(),
        memory: Found::detect().memory,
        nic: nic_towards(&args.server),
        hostname: hostname(),
        facts: Vec::new(),
    };
    match install::install(&orders, &machine) {
        Ok(()) => Ok(Exit::Done),
        Err(failure) if failure.error.is::<install::DryRun>() => Ok(Exit::Done),
        Err(failure) => bail!("step {}: {:#}", failure.step, failure.error),
    }
}

fn disks(args: &Disks) -> Result<Exit> {
    let layout = match &args.layout {
        None => None,
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            Some(ka_layout::parse::parse(&text).with_context(|| path.display().to_string())?)
        }
    };
    print!("{}", disk::show_disks(layout.as_ref())?);
    Ok(Exit::Done)
}

fn stage(args: &Stage) -> Result<Exit> {
    logger::install(LevelFilter::Info);
    let text = std::fs::read_to_string(&args.layout)
        .with_context(|| format!("reading {}", args.layout.display()))?;
    let mut layout = ka_layout::parse::parse(&text).with_context(|| args.layout.display().to_string())?;
    for index in 0..layout.partitions.len() {
        if layout.partitions[index].raw {
            let part = layout.partition_text(index);
            println!("{part}: raw content comes from a server: it is left empty");
            layout.partitions[index].raw = false;
        }
    }
    let disks = disk::discover().context("looking at the disks")?;
    let plan =
        disk::plan(&layout, &disks, &Golden::default(), facts::firmware()).context("planning the disks")?;
    print!("{plan}");
    if !args.yes {
        eprintln!(
            "ka-agent: refused: everything that is not preserved would be lost; say --yes if that is meant"
        );
        return Ok(Exit::Refused);
    }
    let mut keys = disk::assemble::Keys::new();
    for luks in &layout.luks {
        let folder = args.keys.as_ref().with_context(|| format!("--keys DIR: {} needs one", luks.name))?;
        let path = folder.join(format!("{}.key", luks.name));
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let text = text.strip_suffix(b"\n").unwrap_or(&text);
        keys.insert(luks.name.clone(), Secret::new(text.to_vec()));
    }
    let target = std::path::Path::new("/run/ka/stage");
    std::fs::create_dir_all(target).with_context(|| format!("making {}", target.display()))?;
    let record = std::path::Path::new(disk::RECORD);
    let staged = plan.partition(record, &keys).and_then(|partitioned| {
        let mut formatted = partitioned.format(target)?;
        for volume in formatted.volumes() {
            let Some(mount) = &volume.mount else { continue };
            let place = target.join(mount.path.trim_start_matches('/')).join("ka-stage");
            std::fs::write(&place, &mount.path).with_context(|| format!("writing {}", place.display()))?;
            println!("{} is {}", mount.path, volume.device);
        }
        formatted.commit_table()?;
        formatted.finish()
    });
    if let Err(error) = staged {
        disk::clear_listed(record).context("making the disks unbootable")?;
        return Err(error);
    }
    println!("staged: everything was made, mounted, written to, closed and read back");
    Ok(Exit::Done)
}

fn hostname() -> Option<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Some(name).filter(|n| !n.is_empty() && n != "(none)" && n != "localhost")
}

/// The interface over which the server is reached, found by the address that the kernel would use.
fn nic_towards(server: &str) -> Option<Nic> {
    use std::net::{ToSocketAddrs, UdpSocket};
    let to = server.to_socket_addrs().ok()?.next()?;
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).ok()?;
    // Connecting a UDP socket sends nothing; it only picks the route.
    socket.connect(to).ok()?;
    let local = socket.local_addr().ok()?.ip();
    let name = nix::ifaddrs::getifaddrs().ok()?.find_map(|i| {
        let address = i.address?;
        let ip = address
            .as_sockaddr_in()
            .map(|a| std::net::IpAddr::V4(a.ip()))
            .or_else(|| address.as_sockaddr_in6().map(|a| std::net::IpAddr::V6(a.ip())));
        (ip == Some(local)).then_some(i.interface_name)
    })?;
    let mac = std::fs::read_to_string(format!("/sys/class/net/{name}/address")).ok()?.trim().to_owned();
    Some(Nic { interface: name, mac, address: Some(local.to_string()) })
}

/// The worker of PID 1: everything from modules to the last sync.
#[must_use]
pub fn work() -> Exit {
    let options = crate::cmdline::Options::from_proc();
    match work_steps(&options) {
        Ok(()) => Exit::Done,
        Err((step, error)) => {
            crate::init::report_failure(step, &error);
            Exit::Failed
        }
    }
}

fn work_steps(options: &crate::cmdline::Options) -> Result<(), (&'static str, anyhow::Error)> {
    let mut started = crate::init::start_worker(options).map_err(|e| ("boot", e))?;
    let network = crate::init::network(options, &mut started.modules).map_err(|e| ("network", e))?;
    let server = options
        .server
        .clone()
        .context("the kernel command line has no ka.server=HOST:PORT")
        .map_err(|e| ("register", e))?;
    let trust =
        crate::trust::Trust::from_boot(options, std::path::Path::new("/")).map_err(|e| ("register", e))?;
    let found = &started.machine;
    let mut facts = vec![
        ("firmware".to_owned(), format!("{:?}", found.firmware)),
        ("kernel".to_owned(), found.kernel.clone()),
        ("cpus".to_owned(), found.cpus.to_string()),
    ];
    for (name, value) in [("vendor", &found.vendor), ("product", &found.product), ("serial", &found.serial)] {
        facts.extend(value.iter().map(|v| (name.to_owned(), v.clone())));
    }
    let machine = Machine {
        firmware: found.firmware,
        memory: found.memory,
        nic: Some(Nic {
            interface: network.interface.clone(),
            mac: network.mac.to_string(),
            address: Some(network.address.to_string()),
        }),
        hostname: network.hostname.clone(),
        facts,
    };
    let orders = Orders { server, trust, dry_run: options.dry_run, break_at: options.break_at, disk: None };
    // The lease is renewed by a thread of `network`; it must live until the end.
    let result = install::install(&orders, &machine).map_err(|f| (f.step, f.error));
    drop(network);
    logger::flush(Duration::from_secs(1));
    result
}
