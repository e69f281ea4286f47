//! One run of one contender: its nodes are started, the moment of the first byte is caught, its receivers are waited for,
//! and what all that took is added up. Nothing here may hang: every wait has a limit, and what still runs at the end of a
//! run is killed.

use crate::bench::contender::Contender;
use crate::bench::figures::Measured;
use crate::bench::ka::{self, Ka, Sink};
use crate::bench::machine::{self, Ticks};
use crate::bench::net::Net;
use crate::bench::process::{Output, Process};
use crate::bench::source::Source;
use crate::interrupt;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::Seek;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long all nodes have to come up.
const START: Duration = Duration::from_secs(30);
/// How long the head may take to end after the last receiver.
const HEAD: Duration = Duration::from_secs(15);
/// Pause between two looks at the receivers; their ends are noted elsewhere, to the microsecond.
const LOOK: Duration = Duration::from_millis(20);
/// Pause between two looks at their memory.
const SAMPLE: Duration = Duration::from_millis(250);
/// udpcast's receivers have no socket to wait for; they answer the sender's call whenever it comes.
const SETTLE: Duration = Duration::from_millis(300);

/// Where runs take place.
#[derive(Debug, Clone, Copy)]
pub struct Stage<'a> {
    /// The nodes' network.
    pub net: &'a Net,
    /// Ka's programs.
    pub ka: &'a Ka,
    /// Our own program, for the bare relay.
    pub xtask: &'a Path,
}

/// A contender whose processes run.
#[derive(Debug)]
pub struct Running {
    /// The head.
    pub head: Process,
    /// Node 1 and those after it.
    pub nodes: Vec<Process>,
    /// The head's standard input. Its position is the head's, for both are one open file.
    input: Option<File>,
}

/// The moment of the first byte.
#[derive(Debug, Clone, Copy)]
pub struct Begin {
    /// When.
    pub at: Instant,
    /// The machine's processor time then.
    pub ticks: Ticks,
}

impl Running {
    /// Starts a peer or the relay, from the last node to the head.
    ///
    /// # Errors
    /// When a node does not come up.
    pub fn peer(stage: Stage, contender: Contender, source: &Source, dir: &Path) -> Result<Self> {
        let receivers = contender.receivers(stage.net.receivers());
        let start = |node: usize, stdin: Stdio| {
            let words = contender.command(node, receivers, stage.xtask);
            let (program, rest) = words.split_first().context("a contender without a command line")?;
            let mut command = stage.net.command(node, program);
            command.args(rest);
            start(contender, node, &mut command, stdin, Output::Dropped, dir)
        };
        let mut nodes = Vec::new();
        for node in (1..=receivers).rev() {
            let process = start(node, Stdio::null())?;
            if let Some(port) = contender.listens() {
                process.wait_listening(port, START)?;
            }
            nodes.push(process);
        }
        nodes.reverse();
        if contender.listens().is_none() {
            std::thread::sleep(SETTLE);
        }
        let (input, stdin) = input(source)?;
        Ok(Self { head: start(0, stdin)?, nodes, input: Some(input) })
    }

    /// Starts Ka, from the server to the last node; `sink` says what each node does with the stream.
    ///
    /// # Errors
    /// When the server does not come up.
    pub fn ka(
        stage: Stage,
        contender: Contender,
        source: &Source,
        dir: &Path,
        sink: impl Fn(usize) -> Option<String>,
    ) -> Result<Self> {
        let receivers = contender.receivers(stage.net.receivers());
        let trust_nodes = contender == Contender::KaTrustNodes;
        let mut command = stage.ka.server(stage.net, source, trust_nodes, receivers, dir)?;
        let (input, stdin) = if stage.ka.reads_standard_input(source) {
            let (input, stdin) = input(source)?;
            (Some(input), stdin)
        } else {
            (None, Stdio::null())
        };
        let head = start(contender, 0, &mut command, stdin, Output::Kept, dir)?;
        head.wait_listening(ka::PORT, START)?;
        let mut nodes = Vec::new();
        for node in 1..=receivers {
            let command = sink(node);
            let sink = command.as_deref().map_or(Sink::Discard, Sink::Command);
            let mut command = stage.ka.agent(stage.net, node, sink, dir);
            nodes.push(start(contender, node, &mut command, Stdio::null(), Output::Kept, dir)?);
        }
        Ok(Self { head, nodes, input })
    }

    /// Waits for the first byte: the head has read from its input, or, when that cannot be seen, says that it begins.
    ///
    /// # Errors
    /// When the head or a node ends before, or it does not come.
    pub fn wait_begin(&mut self) -> Result<Begin> {
        let deadline = Instant::now() + START;
        loop {
            let begun = match self.sent()? {
                Some(bytes) => bytes > 0,
                None => std::fs::read_to_string(self.head.log()).is_ok_and(|text| text.contains(ka::BEGINS)),
            };
            if begun {
                return Ok(Begin { at: Instant::now(), ticks: machine::ticks()? });
            }
            self.check()?;
            interrupt::check()?;
            if Instant::now() >= deadline {
                bail!("{} read nothing within {} s{}", self.head.what, START.as_secs(), self.head.tail());
            }
            std::thread::sleep(Duration::from_millis(if self.input.is_some() { 1 } else { 5 }));
        }
    }

    /// How many bytes the head has read, if that can be seen.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn sent(&mut self) -> Result<Option<u64>> {
        let Some(input) = &mut self.input else { return Ok(None) };
        input.stream_position().map(Some).context("asking how far the head has read")
    }

    /// An error when one of the processes has failed.
    fn check(&self) -> Result<()> {
        for process in std::iter::once(&self.head).chain(&self.nodes) {
            if let Some(ended) = process.ended()
                && !ended.status.success()
            {
                bail!("{} ended with {}{}", process.what, ended.status, process.tail());
            }
        }
        Ok(())
    }
}

/// Opens the stream, once for us and once for the head, with one position for both.
fn input(source: &Source) -> Result<(File, Stdio)> {
    let open = || format!("opening {}", source.file.display());
    let file = File::open(&source.file).with_context(open)?;
    let stdin = Stdio::from(file.try_clone().with_context(open)?);
    Ok((file, stdin))
}

fn start(
    contender: Contender,
    node: usize,
    command: &mut Command,
    stdin: Stdio,
    output: Output,
    dir: &Path,
) -> Result<Process> {
    let (what, log) = if node == 0 {
        (format!("{}'s head", contender.name()), "head.log".to_owned())
    } else {
        (format!("{}'s node {node}", contender.name()), format!("node-{node}.log"))
    };
    Process::start(&what, command, stdin, output, &dir.join(log))
}

/// Runs `contender` once, with its logs in `dir`.
///
/// # Errors
/// When a process fails, or not all receivers have ended within `limit`.
pub fn run(
    stage: Stage,
    contender: Contender,
    source: &Source,
    dir: &Path,
    limit: Duration,
) -> Result<Measured> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let baseline = machine::baseline(Duration::from_secs(1))?;
    let mut running = if contender.is_ka() {
        Running::ka(stage, contender, source, dir, |_| None)?
    } else {
        Running::peer(stage, contender, source, dir)?
    };
    let begin = running.wait_begin()?;
    let mut memory = Memory::new(&running, contender);
    while running.nodes.iter().any(|node| node.ended().is_none()) {
        memory.look();
        running.check()?;
        interrupt::check()?;
        if begin.at.elapsed() > limit {
            let left: Vec<&str> =
                running.nodes.iter().filter(|n| n.ended().is_none()).map(|n| n.what.as_str()).collect();
            bail!("not over after {} s: {}", limit.as_secs(), left.join(", "));
        }
        std::thread::sleep(LOOK);
    }
    let spent = machine::ticks()? - begin.ticks;
    interrupt::poll(HEAD, || Ok(running.head.ended().map(drop)))?
        .with_context(|| format!("{} does not end{}", running.head.what, running.head.tail()))?;
    running.check()?;
    let mut last = begin.at;
    let mut processes = Duration::ZERO;
    for ended in std::iter::once(&running.head).chain(&running.nodes).filter_map(Process::ended) {
        processes += ended.usage.user + ended.usage.system;
    }
    for ended in running.nodes.iter().filter_map(Process::ended) {
        last = last.max(ended.at);
    }
    let (peak_head, peak_node) = memory.peaks(&running);
    Ok(Measured {
        bytes: source.bytes,
        receivers: running.nodes.len(),
        time: last - begin.at,
        machine: spent.busy_seconds_beyond(baseline, rustix::param::clock_ticks_per_second()),
        processes,
        idle: spent.idle_share(),
        baseline,
        peak_node,
        peak_head,
    })
}

/// The most memory that each node had resident, by looking now and then: the kernel keeps each process' highest mark.
#[derive(Debug)]
struct Memory {
    /// Processes of the head and of each node.
    pids: Vec<Vec<u32>>,
    peaks: Vec<u64>,
    next: Instant,
    /// Whether a node is one process, whose highest mark the kernel also tells at its end.
    single: bool,
}

impl Memory {
    fn new(running: &Running, contender: Contender) -> Self {
        let single = contender != Contender::Nc;
        let leaders = std::iter::once(&running.head).chain(&running.nodes).map(Process::pid);
        let groups = if single { std::collections::BTreeMap::new() } else { machine::groups() };
        let pids: Vec<Vec<u32>> =
            leaders.map(|leader| groups.get(&leader).cloned().unwrap_or_else(|| vec![leader])).collect();
        let peaks = vec![0; pids.len()];
        Self { pids, peaks, next: Instant::now(), single }
    }

    fn look(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        for (pids, peak) in self.pids.iter().zip(&mut self.peaks) {
            let now: u64 = pids.iter().filter_map(|pid| machine::peak_memory(*pid)).sum();
            *peak = now.max(*peak);
        }
        self.next = Instant::now() + SAMPLE;
    }

    /// The head's, and the highest of the nodes.
    fn peaks(mut self, running: &Running) -> (u64, u64) {
        // What the kernel tells at the end includes what we had ourselves when the process began: below that it says
        // nothing, above it is exact.
        let own = machine::peak_memory(std::process::id()).unwrap_or(u64::MAX);
        for (process, peak) in std::iter::once(&running.head).chain(&running.nodes).zip(&mut self.peaks) {
            if let Some(ended) = process.ended()
                && self.single
                && ended.usage.peak > own
            {
                *peak = ended.usage.peak;
            }
        }
        (self.peaks.first().copied().unwrap_or(0), self.peaks.iter().skip(1).copied().max().unwrap_or(0))
    }
}
