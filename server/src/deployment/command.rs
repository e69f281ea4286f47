//! The command line of `ka-server deploy`, and what it means.

use super::order::Topology;
use crate::nodes::Pattern;
use anyhow::{Context, Result, bail};
use argh::FromArgs;
use ka_chain::core::brake::SlowLimit;
use ka_chain::feed::Compression;
use ka_cli::units::{parse_size, parse_time};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where a deployment listens when nobody says otherwise: one port for control and data.
pub const PORT: u16 = crate::boot::SERVER_PORT;

/// clone this machine (or the tree below --root) onto nodes
#[derive(FromArgs, argh::ArgsInfo, Debug, Default)]
#[argh(subcommand, name = "deploy")]
pub struct DeployArgs {
    /// start when N nodes are ready
    #[argh(option, arg_name = "N")]
    pub nodes: Option<u32>,
    /// with --wait or `ka-server go`: do not start the first wave with fewer (default 1)
    #[argh(option, arg_name = "M", default = "1")]
    pub min_nodes: u32,
    /// start this long after the first node is ready, even without all; later waves too (there the default is 60 s)
    #[argh(option, arg_name = "TIME")]
    pub wait: Option<String>,
    /// give up when the deployment is not over by then
    #[argh(option, arg_name = "TIME")]
    pub deadline: Option<String>,
    /// the golden tree (default /)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(\"/\")")]
    pub root: PathBuf,
    /// leave out what matches; a directory that matches is sent empty (repeatable)
    #[argh(option, arg_name = "GLOB")]
    pub exclude: Vec<String>,
    /// leave out what cannot be read, and list it, instead of failing
    #[argh(switch)]
    pub skip_unreadable: bool,
    /// the layout file (default: the layout of this machine)
    #[argh(option, arg_name = "FILE")]
    pub layout: Option<PathBuf>,
    /// the content of the layout's raw partition ID (its id, else its number) is in this file or device (repeatable; default:
    /// this machine's partition that has the layout's uuid)
    #[argh(option, arg_name = "ID=PATH")]
    pub raw: Vec<String>,
    /// send what this command writes (a tar stream) instead of a tree
    #[argh(option, arg_name = "COMMAND")]
    pub source_cmd: Option<String>,
    /// send this file (a tar stream) instead of a tree; - is standard input,
    /// which a second wave can read again only if it is a file
    #[argh(option, arg_name = "FILE")]
    pub source_file: Option<PathBuf>,
    /// lines `MAC NAME [group=G]`; only these nodes are installed
    #[argh(option, arg_name = "FILE")]
    pub nodes_file: Option<PathBuf>,
    /// names of nodes that are in no file (default node{{n}})
    #[argh(option, arg_name = "PATTERN")]
    pub name_pattern: Option<String>,
    /// order of the chain: ip (default), arrival, or a file that says which nodes share a switch
    #[argh(option, arg_name = "ORDER", default = "String::from(\"ip\")")]
    pub order: String,
    /// children of each node: 1 is a chain (default), more a tree
    #[argh(option, arg_name = "K", default = "1")]
    pub arity: usize,
    /// a node that answers no ping for so long is dead (default 8 s)
    #[argh(option, arg_name = "TIME", default = "String::from(\"8s\")")]
    pub dead_after: String,
    /// deaths in a row that the chain survives (default 2)
    #[argh(option, arg_name = "F", default = "2")]
    pub survive: u8,
    /// a node whose disk takes nothing for so long goes to the next wave (default 60 s)
    #[argh(option, arg_name = "TIME", default = "String::from(\"60s\")")]
    pub stall: String,
    /// a node whose disk or link holds all others up below this many bytes a second goes to the next wave (default: none does)
    #[argh(option, arg_name = "RATE")]
    pub min_rate: Option<String>,
    /// with --min-rate: for so long (default 30 s)
    #[argh(option, arg_name = "TIME", default = "String::from(\"30s\")")]
    pub slow_grace: String,
    /// release the nodes of a wave one every TIME, so that they do not all reboot at once (default: all at once)
    #[argh(option, arg_name = "TIME")]
    pub release_every: Option<String>,
    /// memory for chunks kept for those who lost more parents than --survive (default: an eighth of the RAM, at most 256M)
    #[argh(option, arg_name = "SIZE")]
    pub history: Option<String>,
    /// waves that a node may be in (default 2)
    #[argh(option, arg_name = "N", default = "2")]
    pub tries: u32,
    /// no signed lists: nodes of a wave trust each other not to forge
    #[argh(switch)]
    pub trust_nodes: bool,
    /// auto (default: by what holds the chain up), off, or a zstd level from 1 to 19
    #[argh(option, arg_name = "LEVEL", default = "String::from(\"auto\")")]
    pub compress: String,
    /// memory for chunks that nodes have not taken yet (default 64M)
    #[argh(option, arg_name = "SIZE", default = "String::from(\"64M\")")]
    pub window: String,
    /// address and port for control and data (default [::]:5757)
    #[argh(option, arg_name = "ADDR")]
    pub listen: Option<String>,
    /// also run the PXE service on this interface
    #[argh(option, arg_name = "IFACE")]
    pub pxe: Option<String>,
    /// with --pxe: be the DHCP server, for FIRST-LAST, or auto (default: proxy-DHCP)
    #[argh(option, arg_name = "RANGE")]
    pub dhcp: Option<String>,
    /// with --pxe: what ka-image made (default /var/lib/ka/boot)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(\"/var/lib/ka/boot\")")]
    pub boot_dir: PathBuf,
    /// with --pxe: more words for the nodes' kernel command line
    #[argh(option, arg_name = "ARGS", default = "String::new()")]
    pub append: String,
    /// with --pxe: port of the HTTP service (default: one that is free)
    #[argh(option, arg_name = "PORT", default = "0")]
    pub http_port: u16,
    /// with --pxe: how long to go on serving installed nodes their local boot (default 3m)
    #[argh(option, arg_name = "TIME", default = "String::from(\"3m\")")]
    pub linger: String,
    /// remember node states here (default /var/lib/ka/nodes.json)
    #[argh(option, arg_name = "FILE", default = "PathBuf::from(\"/var/lib/ka/nodes.json\")")]
    pub state: PathBuf,
    /// this server's secret key (default /etc/ka/server.key, else server.key beside --state, made when it is not there)
    #[argh(option, arg_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// keys of the nodes' encrypted volumes, VOLUME.key or NODE/VOLUME.key; missing ones are made for each node (default
    /// /var/lib/ka/luks-keys)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(\"/var/lib/ka/luks-keys\")")]
    pub luks_keys: PathBuf,
    /// the operator's hooks (default /etc/ka/hooks.d, if it is there)
    #[argh(option, arg_name = "DIR")]
    pub hooks: Option<PathBuf>,
    /// leave this autoconfig piece out (repeatable; docs/autoconfig.md names them)
    #[argh(option, arg_name = "PIECE")]
    pub skip: Vec<String>,
    /// run this autoconfig piece and only those named so (repeatable)
    #[argh(option, arg_name = "PIECE")]
    pub only: Vec<String>,
    /// no piece changes this file or directory of the clones; a piece's name is the same as --skip (repeatable)
    #[argh(option, arg_name = "PATH|PIECE")]
    pub keep: Vec<String>,
    /// remove this from the clones as well: logs, histories, puppet, ... (repeatable; docs/autoconfig.md names them)
    #[argh(option, arg_name = "WHAT")]
    pub wipe: Vec<String>,
    /// ssh host keys: generate (default) or keep
    #[argh(option, arg_name = "POLICY", default = "String::from(\"generate\")")]
    pub ssh_keys: String,
    /// drop fstab lines that contain this word (repeatable)
    #[argh(option, arg_name = "WORD")]
    pub drop_fstab: Vec<String>,
    /// uEFI boot order: disk-first (default), pxe-first or bootnext
    #[argh(option, arg_name = "ORDER", default = "String::from(\"disk-first\")")]
    pub efi_boot: String,
    /// build the clones' initramfs anew: auto (default), always, never
    #[argh(option, arg_name = "WHEN", default = "String::from(\"auto\")")]
    pub initramfs: String,
    /// write the names of installed nodes here, one a line
    #[argh(option, arg_name = "FILE")]
    pub ok_file: Option<PathBuf>,
    /// write the names of failed nodes here, one a line
    #[argh(option, arg_name = "FILE")]
    pub failed_file: Option<PathBuf>,
    /// one log file per node goes here (default /var/log/ka)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(\"/var/log/ka\")")]
    pub log_dir: PathBuf,
    /// settings: options under their names, which this command line overrules (default /etc/ka/server.toml, if it is there)
    #[argh(option, arg_name = "FILE")]
    pub config: Option<PathBuf>,
    /// print JSON lines instead of text
    #[argh(switch)]
    pub json: bool,
    /// show the layout and what would be sent, then stop
    #[argh(switch)]
    pub dry_run: bool,
}

/// In which order nodes stand in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// By address, numerically.
    Ip,
    /// As they registered.
    Arrival,
    /// As a topology file says.
    File(Topology),
}

/// The values that are not plain words, read and checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Nodes to wait for.
    pub nodes: Option<u32>,
    /// Never start with fewer.
    pub min_nodes: u32,
    /// Start so long after the first is ready.
    pub wait: Option<Duration>,
    /// Give up after this.
    pub deadline: Option<Duration>,
    /// The order of the chain.
    pub order: Order,
    /// Children of each node.
    pub arity: usize,
    /// Silence that means death.
    pub dead_after: Duration,
    /// Deaths in a row that are survived.
    pub survive: u8,
    /// How long a node's disk may take nothing.
    pub stall: Duration,
    /// When a slow node goes to the next wave; none does without.
    pub slow: Option<SlowLimit>,
    /// The time between two releases; all at once without.
    pub release_every: Option<Duration>,
    /// Wire bytes kept beyond the window.
    pub history: usize,
    /// Waves that a node may be in.
    pub tries: u32,
    /// Whether signed lists are left out.
    pub trust_nodes: bool,
    /// How chunks are compressed.
    pub compression: Compression,
    /// Wire bytes of the server's window.
    pub window: usize,
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
    /// How long to serve local boots at the end.
    pub linger: Duration,
    /// Names of nodes that are in no file.
    pub pattern: Pattern,
}

impl DeployArgs {
    /// Whether the stream is a tree that is walked, not what a command or a file gives.
    #[must_use]
    pub fn sends_tree(&self) -> bool {
        self.source_cmd.is_none() && self.source_file.is_none()
    }

    /// Reads and checks the values.
    ///
    /// # Errors
    /// Names the option and what is wrong with it.
    pub fn settings(&self) -> Result<Settings> {
        let time = |name: &str, text: &str| parse_time(text).with_context(|| format!("--{name}"));
        if self.nodes == Some(0) || self.min_nodes == 0 {
            bail!("--nodes and --min-nodes must be at least 1");
        }
        if self.source_cmd.is_some() && self.source_file.is_some() {
            bail!("give one of --source-cmd and --source-file");
        }
        if self.layout.is_none() && self.root != std::path::Path::new("/") {
            bail!(
                "--root {} is not this running machine: its layout must be given by --layout",
                self.root.display()
            );
        }
        if self.nodes.is_none() && self.wait.is_none() && !self.dry_run {
            bail!(
                "say when to start: --nodes N (when N are ready) or --wait TIME (after the first is ready)"
            );
        }
        if self.nodes.is_some_and(|n| n < self.min_nodes) {
            bail!("--min-nodes {} is more than --nodes", self.min_nodes);
        }
        if !(1..=16).contains(&self.arity) {
            bail!("--arity must be from 1 to 16");
        }
        let compression = match self.compress.as_str() {
            "auto" => Compression::Auto,
            "off" => Compression::Off,
            level => match level.parse() {
                Ok(level @ 1..=19) => Compression::Level(level),
                _ => bail!("--compress {level}: auto, off, or a level from 1 to 19"),
            },
        };
        let order = match self.order.as_str() {
            "ip" => Order::Ip,
            "arrival" => Order::Arrival,
            file => Order::File(
                Topology::read(file.as_ref())
                    .with_context(|| format!("--order {file}: ip, arrival, or a file"))?,
            ),
        };
        let window = parse_size(&self.window).context("--window")?;
        if !(2 << 20..=4 << 30).contains(&window) {
            bail!("--window must be from 2M to 4G");
        }
        let dead_after = time("dead-after", &self.dead_after)?;
        if dead_after < Duration::from_secs(2) {
            bail!("--dead-after must be at least 2 s: nodes are pinged once a second");
        }
        let stall = time("stall", &self.stall)?;
        if stall < dead_after {
            bail!("--stall must not be shorter than --dead-after");
        }
        let grace = time("slow-grace", &self.slow_grace)?;
        if grace < Duration::from_secs(5) {
            bail!("--slow-grace must be at least 5 s: rates are averaged over 3 s");
        }
        let slow = match &self.min_rate {
            None => None,
            Some(rate) => {
                let rate = parse_size(rate.strip_suffix("/s").unwrap_or(rate)).context("--min-rate")?;
                Some(SlowLimit { rate, grace })
            }
        };
        if self.survive > 8 {
            bail!("--survive must be at most 8: windows grow with it");
        }
        if self.tries == 0 {
            bail!("--tries must be at least 1");
        }
        Ok(Settings {
            nodes: self.nodes,
            min_nodes: self.min_nodes,
            wait: self.wait.as_deref().map(|t| time("wait", t)).transpose()?,
            deadline: self.deadline.as_deref().map(|t| time("deadline", t)).transpose()?,
            order,
            arity: self.arity,
            dead_after,
            survive: self.survive,
            stall,
            slow,
            release_every: self.release_every.as_deref().map(|t| time("release-every", t)).transpose()?,
            history: self.history_bytes()?,
            tries: self.tries,
            trust_nodes: self.trust_nodes,
            compression,
            window: usize::try_from(window).context("--window")?,
            listen: self.listen_addresses()?,
            linger: time("linger", &self.linger)?,
            pattern: match &self.name_pattern {
                None => Pattern::default(),
                Some(text) => text.parse().context("--name-pattern")?,
            },
        })
    }

    /// What `--history` says, or an eighth of the RAM, at most 256 MiB. More is rarely of use, since what a dead node holds
    /// up is held up all the way to the head; and memory that was never touched is dear in a virtual machine: with 1 GiB, its
    /// page faults were a quarter of what the whole chain of 8 cost.
    fn history_bytes(&self) -> Result<usize> {
        let bytes = match &self.history {
            Some(text) => parse_size(text).context("--history")?,
            None => {
                let info = rustix::system::sysinfo();
                let ram = u64::from(info.mem_unit) * info.totalram;
                (ram / 8).min(256 << 20)
            }
        };
        usize::try_from(bytes).context("--history")
    }

    /// `ADDR`, `ADDR:PORT`, `:PORT` or nothing. Without an address all are listened on, by IPv6 and IPv4.
    fn listen_addresses(&self) -> Result<Vec<SocketAddr>> {
        let everywhere =
            |port: u16| vec![SocketAddr::from(([0u16; 8], port)), SocketAddr::from(([0u8; 4], port))];
        let Some(text) = self.listen.as_deref() else { return Ok(everywhere(PORT)) };
        if let Some(port) = text.strip_prefix(':').or_else(|| text.strip_prefix("[::]:")) {
            return Ok(everywhere(port.parse().with_context(|| format!("--listen {text}: not a port"))?));
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(vec![address]);
        }
        match text.parse() {
            Ok(ip) => Ok(vec![SocketAddr::new(ip, PORT)]),
            Err(_) => bail!("--listen {text}: an IP address, with or without a port, or :PORT"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ka_cli::args::parse_from;

    /// test
    #[derive(FromArgs)]
    struct Top {
        #[argh(subcommand)]
        command: Sub,
    }
    #[derive(FromArgs)]
    #[argh(subcommand)]
    enum Sub {
        Deploy(DeployArgs),
    }

    fn settings(words: &[&str]) -> Result<Settings> {
        let words = std::iter::once("deploy").chain(words.iter().copied()).map(Into::into);
        let Sub::Deploy(args) = parse_from::<Top>("ka-server", "0", words).unwrap().command;
        args.settings()
    }

    #[test]
    fn values_are_read() {
        let s = settings(&["--nodes=3", "--compress=off", "--listen=10.0.0.1", "--order=arrival"]).unwrap();
        assert_eq!((s.nodes, s.compression, s.order), (Some(3), Compression::Off, Order::Arrival));
        assert_eq!(s.listen, ["10.0.0.1:5757".parse().unwrap()]);
        let s = settings(&["--nodes=1", "--min-rate=5M/s", "--release-every=20s"]).unwrap();
        assert_eq!(s.slow, Some(SlowLimit { rate: 5 << 20, grace: Duration::from_secs(30) }));
        assert_eq!(s.release_every, Some(Duration::from_secs(20)));
        let s = settings(&["--nodes=1", "--listen", ":0"]).unwrap();
        assert_eq!((s.listen.len(), s.compression), (2, Compression::Auto));
    }

    #[test]
    fn wrong_values_are_named() {
        for (words, expected) in [
            (&[][..], "say when to start"),
            (&["--nodes=0"], "at least 1"),
            (&["--nodes=2", "--min-nodes=3"], "--min-nodes 3"),
            (&["--nodes=1", "--compress=20"], "--compress 20"),
            (&["--nodes=1", "--order=random"], "--order random"),
            (&["--nodes=1", "--dead-after=1"], "at least 2 s"),
            (&["--nodes=1", "--slow-grace=1"], "at least 5 s"),
            (&["--nodes=1", "--min-rate=much"], "--min-rate"),
            (&["--nodes=1", "--release-every=often"], "--release-every"),
            (&["--nodes=1", "--listen=nowhere"], "--listen nowhere"),
            (&["--nodes=1", "--arity=0"], "--arity"),
            (&["--nodes=1", "--wait=soon"], "--wait"),
            (&["--nodes=1", "--source-cmd=x", "--source-file=y"], "one of --source-cmd"),
        ] {
            let error = format!("{:#}", settings(words).unwrap_err());
            assert!(error.contains(expected), "{words:?}: {error}");
        }
    }
}
