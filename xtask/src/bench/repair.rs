//! `cargo xtask bench repair`: a node of Ka's chain fails at a third of the stream, in every way and at every place; the
//! figure is how much longer the survivors take than in the undisturbed run. What came out is digested at every node by a
//! program that is not Ka, and what went wrong is reported as it was: nodes lost, wrong streams, false successes, hangs.

use crate::bench::Prepared;
use crate::bench::contender::Contender;
use crate::bench::facts::Facts;
use crate::bench::figures::median;
use crate::bench::net::Net;
use crate::bench::process::Process;
use crate::bench::programs;
use crate::bench::source::{Source, Store};
use crate::bench::table::{Table, number};
use crate::bench::trial::{Begin, Running, Stage};
use crate::bench::write_both;
use crate::{interrupt, say};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Of each link.
const MEGABITS: u32 = 1000;
/// How long a hiccup lasts.
const HICCUP: Duration = Duration::from_secs(5);
/// What a run may take beyond twice the wire's time: `--dead-after` several times over. Who is not done then, hangs.
const PATIENCE: Duration = Duration::from_secs(45);
/// Undisturbed runs, whose median is what the others are compared with.
const CALM_RUNS: usize = 3;

/// A way to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL: the kernel closes its connections.
    Killed,
    /// SIGSTOP for good: its kernel still acknowledges.
    Frozen,
    /// SIGSTOP for 5 s.
    Hiccup,
    /// The cable is pulled.
    Cut,
    /// Nothing reaches it, it is still heard.
    Deaf,
    /// It hears, but nothing of it arrives.
    Mute,
    /// It can speak to all but its parent, which it still hears.
    Estranged,
    /// The machine is off: the cable dead and the program gone, nobody says goodbye.
    Off,
}

impl Fault {
    const ALL: [Self; 8] = [
        Self::Killed,
        Self::Frozen,
        Self::Hiccup,
        Self::Cut,
        Self::Deaf,
        Self::Mute,
        Self::Estranged,
        Self::Off,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::Frozen => "frozen",
            Self::Hiccup => "hiccup",
            Self::Cut => "cut",
            Self::Deaf => "deaf",
            Self::Mute => "mute",
            Self::Estranged => "estranged",
            Self::Off => "off",
        }
    }

    fn about(self) -> &'static str {
        match self {
            Self::Killed => "SIGKILL: the kernel closes its connections",
            Self::Frozen => "SIGSTOP for good: the kernel still acknowledges",
            Self::Hiccup => "SIGSTOP, and SIGCONT 5 s later: it must complete, too",
            Self::Cut => "the cable is pulled (veth down)",
            Self::Deaf => "all that is sent to it is dropped; it is still heard",
            Self::Mute => "all that it sends is dropped; it still hears",
            Self::Estranged => {
                "what it sends to its parent is dropped, nothing else: it must complete, too, unless that is the server"
            }
            Self::Off => "the machine is off: cable dead and program gone at once, no RST",
        }
    }

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// Whether the node that has it must complete as well.
    fn survivable(self, victim: usize) -> bool {
        match self {
            Self::Hiccup => true,
            // The first node's parent is the server: of a node that it never hears nothing can be known.
            Self::Estranged => victim != 1,
            _ => false,
        }
    }

    fn strike(self, net: &Net, nodes: &[Process], victim: usize) -> Result<()> {
        let process = &nodes[victim - 1];
        match self {
            Self::Killed => process.signal(Signal::SIGKILL),
            Self::Frozen | Self::Hiccup => process.signal(Signal::SIGSTOP),
            Self::Cut => net.pull(victim)?,
            Self::Deaf => net.deafen(victim)?,
            Self::Mute => net.mute(victim)?,
            Self::Estranged => net.estrange(victim, victim - 1)?,
            Self::Off => {
                // In this order: what the dying program's kernel would send finds no cable.
                net.pull(victim)?;
                process.signal(Signal::SIGKILL);
            }
        }
        Ok(())
    }
}

/// Where in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The server's child.
    First,
    /// Neither.
    Middle,
    /// Nobody is below.
    Last,
}

impl Place {
    const ALL: [Self; 3] = [Self::First, Self::Middle, Self::Last];

    fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Middle => "middle",
            Self::Last => "last",
        }
    }

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|place| place.name() == name)
    }

    /// The node there, from 1.
    fn node(self, receivers: usize) -> usize {
        match self {
            Self::First => 1,
            Self::Middle => receivers.div_ceil(2),
            Self::Last => receivers,
        }
    }
}

/// What is to be run.
#[derive(Debug)]
pub struct Options {
    /// The failures; all when empty.
    pub only: Vec<Fault>,
    /// The places; all when empty.
    pub places: Vec<Place>,
    /// Lengths of the chain.
    pub receivers: Vec<usize>,
    /// Runs of each.
    pub rounds: usize,
    /// Bytes of the stream.
    pub size: u64,
    /// Where the report goes.
    pub output: PathBuf,
}

/// What became of a node.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Node {
    /// Its exit code, a signal below zero; none when it had to be killed at the end.
    exit: Option<i32>,
    /// Whether its sink got the whole stream, byte for byte; none when the sink never saw an end.
    right: Option<bool>,
    /// When its sink had all, seconds after the first byte.
    data: Option<f64>,
    /// When its agent ended, seconds after the first byte.
    end: Option<f64>,
}

/// One run.
#[derive(Debug, Serialize)]
struct Outcome {
    /// None is the undisturbed run.
    fault: Option<&'static str>,
    place: Option<&'static str>,
    receivers: usize,
    /// The node that failed, from 1.
    victim: Option<usize>,
    /// Whether it must complete, too.
    victim_completes: bool,
    /// Exit code of the server; none when it had to be killed at the end.
    server: Option<i32>,
    nodes: Vec<Node>,
    /// When the last survivor's sink had all; none when one is lost.
    data: Option<f64>,
    /// When the last survivor's agent ended.
    end: Option<f64>,
    /// Seconds more than the undisturbed run, for data and end.
    extra_data: Option<f64>,
    extra_end: Option<f64>,
    /// Why the run could not be made at all.
    error: Option<String>,
}

impl Outcome {
    fn survivors(&self) -> impl Iterator<Item = &Node> {
        let lost = self.victim.filter(|_| !self.victim_completes);
        self.nodes.iter().enumerate().filter(move |(n, _)| Some(n + 1) != lost).map(|(_, node)| node)
    }

    /// Survivors that hold the right stream and say so.
    fn complete(&self) -> usize {
        self.survivors().filter(|node| node.right == Some(true) && node.exit == Some(0)).count()
    }

    fn all_complete(&self) -> bool {
        self.error.is_none() && self.complete() == self.survivors().count()
    }

    /// Nodes that say 0 without holding the right stream.
    fn false_successes(&self) -> usize {
        self.nodes.iter().filter(|node| node.exit == Some(0) && node.right != Some(true)).count()
    }

    /// Survivors (and the server) that had to be killed.
    fn hung(&self) -> usize {
        self.survivors().filter(|node| node.exit.is_none()).count() + usize::from(self.server.is_none())
    }

    /// Adds up what the nodes say, and compares with the calm run's times.
    fn judge(&mut self, calm: Option<(f64, f64)>) {
        if !self.all_complete() {
            return;
        }
        let last = |of: fn(&Node) -> Option<f64>| self.survivors().filter_map(of).max_by(f64::total_cmp);
        (self.data, self.end) = (last(|n| n.data), last(|n| n.end));
        if let Some((data, end)) = calm {
            self.extra_data = self.data.map(|time| time - data);
            self.extra_end = self.end.map(|time| time - end);
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    facts: Facts,
    bytes: u64,
    megabits: u32,
    runs: Vec<Outcome>,
}

/// Runs all; whether every survivor of every run completed.
///
/// # Errors
/// When the machine cannot be prepared, or we are interrupted.
pub fn run(options: &Options, prepared: &Prepared, dir: &Path) -> Result<bool> {
    let store = Store::new()?;
    let source = store.noise(options.size)?;
    let right = programs::digest(&source.file)?;
    let mut report =
        Report { facts: prepared.facts()?, bytes: source.bytes, megabits: MEGABITS, runs: Vec::new() };
    let bench = Bench { prepared, source: &source, right: &right };
    for &receivers in &options.receivers {
        let mut calm = Vec::new();
        for round in 1..=options.rounds.max(CALM_RUNS) {
            let mut outcome =
                bench.outcome(receivers, None, &dir.join(format!("{receivers}-calm-{round}")))?;
            outcome.judge(None);
            outcome.tell();
            calm.extend(outcome.data.zip(outcome.end));
            report.runs.push(outcome);
        }
        let middle = |of: fn(&(f64, f64)) -> f64| median(&calm.iter().map(of).collect::<Vec<_>>());
        let calm = middle(|c| c.0).zip(middle(|c| c.1));
        for round in 1..=options.rounds {
            for (fault, place) in cases(options, receivers) {
                let name = format!("{receivers}-{}-{}-{round}", fault.name(), place.name());
                let mut outcome = bench.outcome(receivers, Some((fault, place)), &dir.join(name))?;
                outcome.judge(calm);
                outcome.tell();
                report.runs.push(outcome);
            }
        }
        write_both(&options.output, "bench-repair", &report, &report.markdown())?;
    }
    print!("\n{}", report.markdown());
    Ok(report.runs.iter().all(|run| run.all_complete() && run.false_successes() == 0))
}

fn cases(options: &Options, receivers: usize) -> Vec<(Fault, Place)> {
    let faults = Fault::ALL.into_iter().filter(|f| options.only.is_empty() || options.only.contains(f));
    let places: Vec<Place> =
        Place::ALL.into_iter().filter(|p| options.places.is_empty() || options.places.contains(p)).collect();
    // In a short chain two places can be one node.
    let distinct: Vec<Place> = places
        .iter()
        .enumerate()
        .filter(|(n, place)| !places[..*n].iter().any(|p| p.node(receivers) == place.node(receivers)))
        .map(|(_, place)| *place)
        .collect();
    faults.flat_map(|fault| distinct.iter().map(move |place| (fault, *place)).collect::<Vec<_>>()).collect()
}

/// What all runs share.
struct Bench<'a> {
    prepared: &'a Prepared,
    source: &'a Source,
    /// What a sink that got the whole stream writes.
    right: &'a str,
}

impl Bench<'_> {
    /// One run, in a network of its own. What goes wrong in it is part of the outcome; only an interrupt is an error.
    fn outcome(&self, receivers: usize, struck: Option<(Fault, Place)>, dir: &Path) -> Result<Outcome> {
        let victim = struck.map(|(_, place)| place.node(receivers));
        let mut outcome = Outcome {
            fault: struck.map(|(fault, _)| fault.name()),
            place: struck.map(|(_, place)| place.name()),
            receivers,
            victim,
            victim_completes: struck.zip(victim).is_some_and(|((fault, _), victim)| fault.survivable(victim)),
            server: None,
            nodes: Vec::new(),
            data: None,
            end: None,
            extra_data: None,
            extra_end: None,
            error: None,
        };
        match self.attempt(receivers, struck.zip(victim), dir) {
            Ok((server, nodes)) => (outcome.server, outcome.nodes) = (server, nodes),
            Err(e) => {
                interrupt::check()?;
                outcome.error = Some(format!("{e:#}"));
            }
        }
        Ok(outcome)
    }

    fn attempt(
        &self,
        receivers: usize,
        struck: Option<((Fault, Place), usize)>,
        dir: &Path,
    ) -> Result<(Option<i32>, Vec<Node>)> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let net = Net::new(receivers, Some(MEGABITS))?;
        let stage = Stage { net: &net, ka: &self.prepared.ka, xtask: &self.prepared.xtask };
        let file = |node: usize| dir.join(format!("stream-{node}"));
        let sink = |node: usize| {
            let program = self.prepared.xtask.display();
            Some(format!("exec {program} {} {}", programs::SINK, file(node).display()))
        };
        let mut running = Running::ka(stage, Contender::Ka, self.source, dir, sink)?;
        let begin = running.wait_begin()?;
        let clock = SystemTime::now();
        let wire = Duration::from_secs_f64(self.source.bytes as f64 * 8.0 / (f64::from(MEGABITS) * 1e6));
        let limit = 2 * wire + PATIENCE;
        if let Some(((fault, _), victim)) = struck {
            self.wait_third(&mut running, begin, wire)?;
            fault.strike(&net, &running.nodes, victim)?;
            if fault == Fault::Hiccup {
                wait(HICCUP)?;
                running.nodes[victim - 1].signal(Signal::SIGCONT);
            }
        }
        let waited_for = |node: usize| match struck {
            Some(((fault, _), victim)) => victim != node || fault.survivable(victim),
            None => true,
        };
        while begin.at.elapsed() < limit {
            let nodes = running.nodes.iter().enumerate();
            let open = nodes.filter(|(n, node)| waited_for(n + 1) && node.ended().is_none()).count();
            if open == 0 && running.head.ended().is_some() {
                break;
            }
            interrupt::check()?;
            std::thread::sleep(Duration::from_millis(20));
        }
        let nodes = (1..).zip(&running.nodes).map(|(n, node)| self.node(node, &file(n), begin, clock));
        Ok((running.head.ended().map(|ended| ended.code()), nodes.collect()))
    }

    /// Until the head has read a third of the stream; where that cannot be seen, for a third of the wire's time.
    fn wait_third(&self, running: &mut Running, begin: Begin, wire: Duration) -> Result<()> {
        if running.sent()?.is_none() {
            return wait((wire / 3).saturating_sub(begin.at.elapsed()));
        }
        let third = self.source.bytes / 3;
        while running.sent()?.is_some_and(|bytes| bytes < third) {
            interrupt::check()?;
            if begin.at.elapsed() > 2 * wire + PATIENCE {
                bail!("the head never read a third of the stream{}", running.head.tail());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn node(&self, process: &Process, file: &Path, begin: Begin, clock: SystemTime) -> Node {
        let text = std::fs::read_to_string(file).ok();
        let right = text.map(|text| text.trim() == self.right);
        let written = std::fs::metadata(file).and_then(|m| m.modified()).ok();
        let data = written.and_then(|at| at.duration_since(clock).ok());
        let ended = process.ended();
        Node {
            exit: ended.map(|ended| ended.code()),
            right,
            data: data.map(|time| time.as_secs_f64()),
            end: ended.map(|ended| ended.at.saturating_duration_since(begin.at).as_secs_f64()),
        }
    }
}

fn wait(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

impl Outcome {
    fn title(&self) -> String {
        match (self.fault, self.place) {
            (Some(fault), Some(place)) => format!("{fault}, {place}"),
            _ => "undisturbed".to_owned(),
        }
    }

    /// In one line.
    fn tell(&self) {
        let text = match &self.error {
            Some(e) => format!("FAILED: {e}"),
            None => format!(
                "{} of {} survivors complete, extra {} s (to the end {} s), server's exit {}",
                self.complete(),
                self.survivors().count(),
                number(self.extra_data, 2),
                number(self.extra_end, 2),
                code(self.server)
            ),
        };
        say!("bench", "{} receivers, {}: {text}", self.receivers, self.title());
    }
}

fn code(exit: Option<i32>) -> String {
    exit.map_or_else(|| "none".to_owned(), |code| code.to_string())
}

impl Report {
    fn markdown(&self) -> String {
        let mut text = "# Benchmark of repair\n\n".to_owned();
        text.push_str(&self.facts.markdown());
        text.push_str(&format!(
            "\nA stream of {} to a chain at {} Mbit/s per link; one node fails when the server has read a third of it. \
             Extra is\nhow much later than in the undisturbed runs (median of {CALM_RUNS}) the last survivor's sink had \
             all, and its agent ended.\nComplete means: the right BLAKE3 of what the sink got, and exit code 0. A dash \
             under extra: a survivor was lost. Exit\ncodes stand in the order of the chain, - for who had to be killed \
             at the end of the run.\n",
            ka_cli::units::show_size(self.bytes),
            self.megabits
        ));
        let mut lengths: Vec<usize> = self.runs.iter().map(|run| run.receivers).collect();
        lengths.dedup();
        for receivers in lengths {
            let mut table = Table::new(&[
                "",
                "survivors complete",
                "seconds",
                "extra",
                "extra to the end",
                "false successes",
                "hung",
                "server's exit",
                "nodes' exits",
            ]);
            for run in self.runs.iter().filter(|run| run.receivers == receivers) {
                let exits: Vec<String> =
                    run.nodes.iter().map(|n| n.exit.map_or("-".to_owned(), |c| c.to_string())).collect();
                let complete = match &run.error {
                    Some(_) => "the run failed".to_owned(),
                    None => format!("{} of {}", run.complete(), run.survivors().count()),
                };
                table.row([
                    run.title(),
                    complete,
                    number(run.data, 2),
                    number(run.extra_data, 2),
                    number(run.extra_end, 2),
                    run.false_successes().to_string(),
                    run.hung().to_string(),
                    code(run.server),
                    exits.join(" "),
                ]);
            }
            text.push_str(&format!("\n## {receivers} receivers\n\n{}", table.render()));
        }
        text.push_str("\n## Failures\n\n");
        for fault in Fault::ALL {
            text.push_str(&format!("- {}: {}\n", fault.name(), fault.about()));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(exit: Option<i32>, right: Option<bool>, data: f64) -> Node {
        Node { exit, right, data: right.map(|_| data), end: exit.map(|_| data + 1.0) }
    }

    fn outcome(fault: Fault, nodes: Vec<Node>) -> Outcome {
        Outcome {
            fault: Some(fault.name()),
            place: Some("middle"),
            receivers: nodes.len(),
            victim: Some(2),
            victim_completes: fault.survivable(2),
            server: Some(3),
            nodes,
            data: None,
            end: None,
            extra_data: None,
            extra_end: None,
            error: None,
        }
    }

    #[test]
    fn the_victim_does_not_count_unless_it_must_complete() {
        let nodes =
            vec![node(Some(0), Some(true), 5.0), node(None, None, 0.0), node(Some(0), Some(true), 6.0)];
        let mut killed = outcome(Fault::Killed, nodes.clone());
        killed.judge(Some((4.0, 6.5)));
        assert!(killed.all_complete() && killed.hung() == 0);
        assert_eq!((killed.data, killed.extra_data, killed.extra_end), (Some(6.0), Some(2.0), Some(0.5)));
        let mut hiccup = outcome(Fault::Hiccup, nodes);
        hiccup.judge(Some((4.0, 6.5)));
        assert!(!hiccup.all_complete() && hiccup.hung() == 1 && hiccup.extra_data.is_none());
    }

    #[test]
    fn lost_survivors_and_false_successes_are_counted() {
        let run = outcome(
            Fault::Cut,
            vec![node(Some(1), Some(false), 1.0), node(Some(0), None, 1.0), node(Some(0), Some(false), 1.0)],
        );
        assert_eq!((run.complete(), run.false_successes(), run.hung()), (0, 2, 0));
        let text = Report {
            facts: crate::bench::report::tests::facts(),
            bytes: 1,
            megabits: MEGABITS,
            runs: vec![run],
        }
        .markdown();
        assert!(text.contains("| cut, middle |") && text.contains("0 of 2"), "{text}");
    }

    #[test]
    fn places_in_a_short_chain_are_taken_once() {
        let mut options = Options {
            only: vec![Fault::Killed],
            places: Vec::new(),
            receivers: Vec::new(),
            rounds: 1,
            size: 1,
            output: PathBuf::new(),
        };
        let at = |options: &Options, n| cases(options, n).iter().map(|c| c.1.node(n)).collect::<Vec<_>>();
        assert_eq!((at(&options, 1), at(&options, 2), at(&options, 8)), (vec![1], vec![1, 2], vec![1, 4, 8]));
        options.places = vec![Place::Last];
        assert_eq!(at(&options, 4), [4]);
    }

    #[test]
    fn names_lead_back() {
        assert!(Fault::ALL.into_iter().all(|fault| Fault::named(fault.name()) == Some(fault)));
        assert!(Place::ALL.into_iter().all(|place| Place::named(place.name()) == Some(place)));
    }
}
