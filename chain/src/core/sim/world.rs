//! The world: the machines, their clocks and what befalls them. An event is that a machine is woken: because a message
//! arrived, because a timer ran out, or because 100 ms have passed. It then does all that it can do at that instant. A frozen
//! machine is not woken; what is sent to it waits.

use super::chance::Chance;
use super::control::Wire;
use super::data::Conn;
use super::oracle::Oracle;
use super::plan::{EVER, Fault, Plan};
use crate::CHUNK;
use crate::core::relay::Relay;
use crate::core::wave::{Standing, Wave};
use crate::core::{Clock, NodeId, Place, Time};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// Why a node is removed that is only slow.
pub(super) const SLOW: &str = "it was too slow";
/// ms between two ticks of a machine.
const TICK: u64 = 100;

/// How a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Up,
    /// The process is gone, its kernel refuses connections.
    Killed,
    Off,
    /// It left the chain by itself or because it was told to; it refuses connections.
    Left,
}

/// What takes the chunks at a node.
#[derive(Debug)]
pub(super) struct Consumer {
    /// The chunk that it takes next.
    pub(super) next: u64,
    pub(super) busy_until: Option<u64>,
    pub(super) interval: u64,
    pub(super) stuck: bool,
    pub(super) gone: bool,
    /// When it last took one.
    pub(super) took: u64,
}

/// A machine: the server is the first.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) relay: Relay,
    pub(super) clock: Clock,
    /// Its running time, as of its last tick.
    pub(super) time: Time,
    pub(super) next_tick: u64,
    pub(super) state: State,
    pub(super) frozen_until: u64,
    /// Without a cable from, until.
    pub(super) cut: (u64, u64),
    /// Data connections whose end here is open.
    pub(super) conns: Vec<usize>,
    pub(super) consumer: Consumer,
    pub(super) next_status: u64,
    pub(super) ended_said: bool,
    /// The newest order that was delivered to it.
    pub(super) obeyed: Option<Place>,
    /// When it was silent towards the server by its own fault: from, until.
    pub(super) silences: Vec<(u64, u64)>,
    /// As the oracle last saw them.
    pub(super) seen_base: u64,
    pub(super) seen_first: u64,
    wake_at: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Run(usize),
    RunAll,
    Fault(usize),
}

/// Everything.
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) chance: Chance,
    pub(super) now: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    count: u64,
    pub(super) hosts: Vec<Host>,
    /// Control connections; the first is not used.
    pub(super) wires: Vec<Wire>,
    pub(super) conns: Vec<Conn>,
    /// Pairs between which data goes no longer, from and to.
    pub(super) one_way: Vec<(usize, usize)>,
    /// Who passes chunks on damaged, always or once more.
    pub(super) damages: Vec<(usize, bool)>,
    /// To whom every chunk comes damaged.
    pub(super) garbles: Vec<usize>,
    pub(super) wave: Wave,
    pub(super) sizes: Vec<u32>,
    pub(super) pushed: u64,
    next_push: u64,
    pub(super) released: bool,
    /// When the last fault was over, so far.
    pub(super) quiet_from: u64,
    pub(super) oracle: Oracle,
    trace: bool,
}

impl World {
    pub(super) fn new(seed: u64, trace: bool) -> Self {
        let plan = Plan::from_seed(seed);
        let mut chance = Chance::new(!seed);
        let host = |n: usize| {
            let mut limits = plan.limits;
            if n == 0 {
                limits.history = plan.history;
            }
            Host {
                relay: Relay::new(NodeId(n as u32), limits, n > 0),
                clock: Clock::default(),
                time: Time::ZERO,
                next_tick: 0,
                state: State::Up,
                frozen_until: 0,
                cut: (0, 0),
                conns: Vec::new(),
                consumer: Consumer {
                    next: 0,
                    busy_until: None,
                    interval: plan.disks[n].interval,
                    stuck: false,
                    gone: false,
                    took: 0,
                },
                next_status: 0,
                ended_said: false,
                obeyed: None,
                silences: Vec::new(),
                seen_base: 0,
                seen_first: 0,
                wake_at: EVER,
            }
        };
        let hosts: Vec<Host> = (0..=plan.nodes).map(host).collect();
        let most = (CHUNK + 64) as u64;
        let sizes = (0..plan.total).map(|_| chance.within(plan.least_size as u64, most) as u32).collect();
        let wires = (0..=plan.nodes).map(|_| Wire::new(chance.pick(&[30, 30, 30, 400]))).collect();
        let wave = Wave::new(plan.settings, plan.nodes as u32, [7; 32], Time::ZERO);
        let mut world = Self {
            oracle: Oracle::new(plan.nodes),
            wires,
            now: 0,
            events: BinaryHeap::new(),
            count: 0,
            hosts,
            conns: Vec::new(),
            one_way: Vec::new(),
            damages: Vec::new(),
            garbles: Vec::new(),
            wave,
            sizes,
            pushed: 0,
            next_push: 0,
            released: false,
            quiet_from: 0,
            trace,
            chance,
            plan,
        };
        if trace {
            println!("{:#?}", world.plan);
        }
        for n in 0..world.hosts.len() {
            world.hosts[n].next_tick = world.chance.within(0, TICK);
            let at = world.hosts[n].next_tick;
            world.wake(n, at);
        }
        world
    }

    /// Runs to the end; the text says what was wrong.
    pub(super) fn run(mut self) -> Result<Self, String> {
        let first = self.wave.begin();
        self.act(first);
        self.faults_at(0);
        let bound = self.plan.bound();
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            self.now = at;
            match event {
                Event::Run(host) => {
                    if self.hosts[host].wake_at == at {
                        self.hosts[host].wake_at = EVER;
                    }
                    self.run_host(host);
                }
                Event::RunAll => (0..self.hosts.len()).for_each(|host| self.run_host(host)),
                Event::Fault(n) => self.strike(self.plan.faults[n].fault),
            }
            if self.now > self.quiet_from + bound {
                let text = format!("no end {bound} ms after the last fault; {}", self.positions());
                self.oracle.fail(self.now, text);
            }
            if let Some(violation) = self.oracle.violation.take() {
                return Err(violation);
            }
            if self.released {
                return Ok(self);
            }
        }
        Err("nothing happens any more".to_owned())
    }

    pub(super) fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>9.3} {}", self.now as f64 / 1000.0, text());
        }
    }

    fn positions(&self) -> String {
        let of = |(n, host): (usize, &Host)| {
            let node = NodeId(n as u32);
            let at = format!("{}..{}..{}", host.relay.first(), host.relay.base(), host.relay.end());
            let how = (self.wave.standing(node), host.state);
            format!(
                "{n}<-{:?} {at} consumed {} {how:?}",
                self.wave.parent(node).map(|p| p.0),
                host.consumer.next
            )
        };
        self.hosts.iter().enumerate().map(of).collect::<Vec<_>>().join(", ")
    }

    pub(super) fn wake(&mut self, host: usize, at: u64) {
        let at = at.max(self.now);
        if self.hosts[host].wake_at != at {
            self.hosts[host].wake_at = at;
            self.schedule(at, Event::Run(host));
        }
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, event)));
    }

    pub(super) fn is_up(&self, host: usize) -> bool {
        self.hosts[host].state == State::Up
    }

    pub(super) fn is_in(&self, host: usize) -> bool {
        self.wave.standing(NodeId(host as u32)) == Some(Standing::In)
    }

    /// Whether what was to arrive at `at` has arrived, for all that the cables let through.
    pub(super) fn arrived(&self, from: usize, to: usize, at: u64) -> bool {
        let held_up = |host: usize| {
            let (since, until) = self.hosts[host].cut;
            at > since && self.now < until
        };
        at <= self.now && !held_up(from) && !held_up(to)
    }

    fn run_host(&mut self, host: usize) {
        match self.hosts[host].state {
            State::Off => return,
            State::Killed | State::Left => {
                // Nobody listens.
                self.close_all(host, false);
                return;
            }
            State::Up if self.now < self.hosts[host].frozen_until => return,
            State::Up => {}
        }
        let ticks = self.now >= self.hosts[host].next_tick;
        if ticks {
            let shown = Duration::from_millis(self.now);
            self.hosts[host].time = self.hosts[host].clock.advance(shown);
            self.hosts[host].next_tick = self.now + TICK;
            self.wake(host, self.now + TICK);
        }
        if host == 0 {
            self.serve_nodes(ticks);
            self.push_source();
        } else {
            self.hear_server(host);
            if self.hosts[host].state != State::Up {
                return;
            }
            self.consume(host);
        }
        self.serve_children(host);
        self.read_parent(host);
        if host > 0 {
            self.consume(host);
            self.read_parent(host);
            self.say_status(host);
        }
        self.send_children(host);
        self.acknowledge(host);
        if ticks {
            self.find_silent(host);
        }
        self.check_window(host);
    }

    fn push_source(&mut self) {
        while self.pushed < self.plan.total && self.now >= self.next_push && self.hosts[0].relay.room() {
            let last = self.pushed + 1 == self.plan.total;
            self.hosts[0].relay.pushed(self.sizes[self.pushed as usize], last);
            self.pushed += 1;
            self.next_push = self.now + self.plan.source;
            self.faults_at(self.pushed);
            let at = self.next_push;
            self.wake(0, at);
        }
    }

    pub(super) fn consume(&mut self, host: usize) {
        loop {
            let at = self.now;
            let Host { consumer, relay, .. } = &mut self.hosts[host];
            if consumer.gone || consumer.stuck {
                return;
            }
            match consumer.busy_until {
                Some(until) if until > at => return,
                Some(_) => {
                    consumer.busy_until = None;
                    consumer.next += 1;
                    consumer.took = at;
                    relay.consumed(consumer.next);
                }
                None if consumer.next < relay.end() => {
                    if consumer.next < relay.first() {
                        let text = format!("chunk {} left node {host} before its disk had it", consumer.next);
                        self.oracle.fail(at, text);
                        return;
                    }
                    let until = at + consumer.interval;
                    consumer.busy_until = Some(until);
                    self.wake(host, until);
                }
                None => return,
            }
        }
    }

    fn faults_at(&mut self, pushed: u64) {
        for n in 0..self.plan.faults.len() {
            let planned = self.plan.faults[n];
            if planned.pushed == pushed {
                self.schedule(self.now + planned.delay, Event::Fault(n));
            }
        }
    }

    fn strike(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {fault:?}"));
        let now = self.now;
        let until = |time: u64| if time == EVER { EVER } else { now + time };
        let mut over = now;
        match fault {
            Fault::Kill(node) if self.is_up(node) => {
                self.hosts[node].state = State::Killed;
                self.oracle.killed(node);
                self.close_all(node, true);
                self.close_control(node);
            }
            Fault::Off(node) if self.is_up(node) => {
                self.hosts[node].state = State::Off;
                self.hosts[node].silences.push((now, EVER));
                self.oracle.killed(node);
            }
            Fault::Freeze(host, time) if self.is_up(host) => {
                let until = until(time).max(self.hosts[host].frozen_until);
                self.hosts[host].frozen_until = until;
                self.hosts[host].silences.push((now, until));
                self.over(until, &mut over, host);
            }
            Fault::Cut(node, time) if self.is_up(node) => {
                let until = until(time);
                let old = self.hosts[node].cut;
                self.hosts[node].cut = if old.1 > now { (old.0, old.1.max(until)) } else { (now, until) };
                self.hosts[node].silences.push((now, until));
                self.over(until, &mut over, node);
            }
            Fault::OneWay { node, down } => {
                if let Some(parent) = self.wave.parent(NodeId(node as u32)) {
                    let parent = parent.0 as usize;
                    self.one_way.push(if down { (parent, node) } else { (node, parent) });
                    self.oracle.link_fault(1 << 16, parent, node);
                }
            }
            Fault::OneWayOnce { node, down } => {
                if let Some(conn) = self.conn_to_parent(node) {
                    self.oracle.link_fault(1, self.conns[conn].parent, node);
                    if down {
                        self.conns[conn].cut_down = true;
                    } else {
                        self.conns[conn].cut_up = true;
                    }
                }
            }
            Fault::Reset(node) => {
                if let Some(conn) = self.conn_to_parent(node) {
                    self.oracle.link_fault(1, self.conns[conn].parent, node);
                    self.reset(conn);
                }
            }
            Fault::SlowDisk(node, interval) => self.hosts[node].consumer.interval = interval,
            Fault::StuckDisk(node) => self.hosts[node].consumer.stuck = true,
            Fault::GiveUp(node) => {
                self.hosts[node].consumer.gone = true;
                if self.is_up(node) {
                    self.hosts[node].relay.consumer_gone();
                    self.wake(node, now);
                }
            }
            Fault::Remove(node) => self.wave.plan_out(NodeId(node as u32), SLOW, None),
            Fault::Damages { node, always } => self.damages.push((node, always)),
            Fault::Garbles(node) => self.garbles.push(node),
            Fault::SlowControl(node, extra) => {
                self.wires[node].slow = (now + 5_000, extra);
                over = now + 5_000;
            }
            _ => {}
        }
        self.quiet_from = self.quiet_from.max(over);
    }

    /// A freeze or a cut lasts until then; for good means until it is noticed.
    fn over(&mut self, until: u64, over: &mut u64, host: usize) {
        self.oracle.host_fault(self.now, until, host);
        if until < EVER {
            *over = until;
            // A frozen machine's waiting messages are read, everybody's resume.
            self.schedule(until, Event::RunAll);
            // What was sent in a cut is sent again a little later.
            self.schedule(until + 200, Event::RunAll);
        }
    }
}
