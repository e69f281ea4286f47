//! What holds the chain up: a disk, a link, or the server. Nodes report what they waited for ([`crate::core::waits`]); the
//! verdict follows from the last seconds of it.
//!
//! A slow disk keeps its node's window full, so everybody above it is blocked and everybody below it starves: the one whose
//! own consumer is waited for is the brake. A slow link has a parent that is blocked and a child that starves. When the
//! head itself waits for its source, the server is the brake, whatever else is slow.

use super::waits::Waits;
use super::{HEAD, NodeId, Time};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// So much of the past is looked at.
const SPAN: Duration = Duration::from_secs(3);
/// Less of it says nothing.
const LEAST: Duration = Duration::from_millis(1500);
/// A node that has reported nothing for so long is not judged.
const FRESH: Duration = Duration::from_millis(2500);
/// Thousandths of the time that must have been spent waiting.
const MOSTLY: u64 = 600;

/// What holds the chain up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Brake {
    /// The window of the head is empty: what is sent is not made quickly enough.
    Server,
    /// The queue of this node's disk is full.
    Disk(NodeId),
    /// The parent is blocked in sending while the child starves.
    Link(NodeId, NodeId),
}

/// A report: what a place has waited for, and how far it is, in plain bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// What it waited for.
    pub waits: Waits,
    /// Bytes that came in.
    pub received: u64,
    /// Bytes that its disk took.
    pub consumed: u64,
}

/// What all places of a wave have reported lately.
#[derive(Debug, Default)]
pub struct Brakes {
    reports: BTreeMap<NodeId, VecDeque<(Time, Report)>>,
}

impl Brakes {
    /// A place reported; the head does too.
    pub fn reported(&mut self, node: NodeId, report: Report, now: Time) {
        let reports = self.reports.entry(node).or_default();
        if reports.back().is_some_and(|(_, last)| last.waits.time >= report.waits.time) {
            // Overtaken, or it says the same again.
            return;
        }
        reports.push_back((now, report));
        // The oldest that is kept is the last one before the span, or the first in it.
        while reports.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= SPAN) {
            reports.pop_front();
        }
    }

    /// The oldest and the newest of what a place said lately.
    fn span(&self, node: NodeId, now: Time) -> Option<(&Report, &Report)> {
        let reports = self.reports.get(&node)?;
        let ((_, first), (at, last)) = (reports.front()?, reports.back()?);
        let long = last.waits.time - first.waits.time >= u64::try_from(LEAST.as_micros()).unwrap_or(u64::MAX);
        (long && now.saturating_sub(*at) <= FRESH).then_some((first, last))
    }

    /// Thousandths of its time that a place spent on what `of` counts.
    fn share(&self, node: NodeId, now: Time, of: impl Fn(&Waits) -> u64) -> u64 {
        let Some((first, last)) = self.span(node, now) else { return 0 };
        let waited = of(&last.waits).saturating_sub(of(&first.waits));
        (waited.saturating_mul(1000)).checked_div(last.waits.time - first.waits.time).unwrap_or(0)
    }

    /// What holds up a chain of these nodes and their parents; `None` when nothing does clearly, or it is not known yet.
    #[must_use]
    pub fn judge(&self, chain: impl Iterator<Item = (NodeId, NodeId)>, now: Time) -> Option<Brake> {
        if self.share(HEAD, now, |w| w.starved) >= MOSTLY {
            return Some(Brake::Server);
        }
        let mut worst: Option<(u64, Brake)> = None;
        let mut judge = |share: u64, brake: Brake| {
            if share >= MOSTLY && worst.is_none_or(|(most, _)| share > most) {
                worst = Some((share, brake));
            }
        };
        for (node, parent) in chain {
            judge(self.share(node, now, |w| w.disk), Brake::Disk(node));
            let blocked = self.share(parent, now, |w| w.blocked_by(node));
            judge(blocked.min(self.share(node, now, |w| w.starved)), Brake::Link(parent, node));
        }
        worst.map(|(_, brake)| brake)
    }

    /// Whether one of its children has kept the head from sending, though it may not be clear why.
    #[must_use]
    pub fn is_head_blocked(&self, now: Time) -> bool {
        let Some((_, last)) = self.span(HEAD, now) else { return false };
        last.waits.blocked.iter().any(|(child, _)| self.share(HEAD, now, |w| w.blocked_by(*child)) >= MOSTLY)
    }

    /// Plain bytes a second that get past a brake; none when it is not known.
    #[must_use]
    pub fn rate(&self, brake: Brake, now: Time) -> Option<u64> {
        let (node, of): (NodeId, fn(&Report) -> u64) = match brake {
            Brake::Server => return None,
            Brake::Disk(node) => (node, |r| r.consumed),
            Brake::Link(_, child) => (child, |r| r.received),
        };
        let (first, last) = self.span(node, now)?;
        let bytes = of(last).saturating_sub(of(first));
        u128::from(bytes)
            .saturating_mul(1_000_000)
            .checked_div(u128::from(last.waits.time - first.waits.time))
            .and_then(|rate| u64::try_from(rate).ok())
    }
}

/// What must have been the brake, and too slow, for how long, before a node is moved to the next wave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlowLimit {
    /// Plain bytes a second.
    pub rate: u64,
    /// For so long.
    pub grace: Duration,
}

/// Another brake, or none, for so long: the time of the one before counts no more.
const BLIP: Duration = Duration::from_secs(2);

/// Finds the node that is to be moved to the next wave because it is too slow. At most a quarter of a wave is.
#[derive(Debug)]
pub struct Slow {
    limit: SlowLimit,
    /// How many may still be moved.
    left: usize,
    /// The brake that is too slow, since when, and when it was last seen.
    current: Option<(Brake, Time, Time)>,
    /// Parents that were at the upper end of a slow link whose lower end was moved.
    blamed: BTreeSet<NodeId>,
}

impl Slow {
    /// For a wave of so many nodes.
    #[must_use]
    pub fn new(limit: SlowLimit, nodes: usize) -> Self {
        Self { limit, left: nodes / 4, current: None, blamed: BTreeSet::new() }
    }

    /// The verdict of this moment and the rate past it. A node that must go is named once; [`Slow::moved`] says that it goes.
    pub fn see(&mut self, brake: Option<Brake>, rate: Option<u64>, now: Time) -> Option<NodeId> {
        let slow = brake.filter(|b| *b != Brake::Server && rate.is_some_and(|rate| rate < self.limit.rate));
        self.current = match (self.current, slow) {
            // While the server is the brake nobody is too slow.
            _ if brake == Some(Brake::Server) => None,
            (Some((known, since, _)), Some(slow)) if known == slow => Some((known, since, now)),
            (Some((known, since, seen)), _) if now.saturating_sub(seen) < BLIP => Some((known, since, seen)),
            (_, Some(slow)) => Some((slow, now, now)),
            (_, None) => None,
        };
        let (brake, since, seen) = self.current?;
        if self.left == 0 || seen != now || now.saturating_sub(since) < self.limit.grace {
            return None;
        }
        match brake {
            Brake::Server => None,
            Brake::Disk(node) => Some(node),
            // Which end is at fault is not known: the lower one goes, and when the next child starves too, it was the upper.
            Brake::Link(parent, _) if self.blamed.contains(&parent) => Some(parent),
            Brake::Link(_, child) => Some(child),
        }
    }

    /// The node that was named leaves the wave: the next one gets a time of its own.
    pub fn moved(&mut self) {
        self.left = self.left.saturating_sub(1);
        if let Some((Brake::Link(parent, _), ..)) = self.current.take()
            && parent != HEAD
        {
            self.blamed.insert(parent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// A chain of the server and three nodes, whose places report twice a second for `time` ms.
    fn chain(time: u64, wait: impl Fn(u32, &mut Waits)) -> Brakes {
        let mut brakes = Brakes::default();
        let mut waits = vec![Waits::default(); 4];
        for at in (0..=time).step_by(500) {
            for n in 0..4u32 {
                let waits = &mut waits[n as usize];
                waits.at(ms(at + 1));
                let report = Report { waits: waits.clone(), received: at * 1000, consumed: at * 500 };
                brakes.reported(NodeId(n), report, ms(at + 10 * u64::from(n)));
                wait(n, waits);
            }
        }
        brakes
    }

    fn parents() -> impl Iterator<Item = (NodeId, NodeId)> {
        (1..4).map(|n| (NodeId(n), NodeId(n - 1)))
    }

    fn waited(waits: &mut Waits, time: u64, disk: bool, starved: bool, blocked: Option<u32>) {
        waits.waited(ms(time), disk, starved, blocked.map(NodeId).into_iter());
    }

    #[test]
    fn a_full_disk_queue_is_the_brake_though_others_are_blocked_and_starve() {
        let brakes = chain(4000, |n, w| match n {
            0 | 1 => waited(w, 480, false, false, Some(n + 1)),
            2 => waited(w, 450, true, false, None),
            _ => waited(w, 490, false, true, None),
        });
        assert_eq!(brakes.judge(parents(), ms(4030)), Some(Brake::Disk(NodeId(2))));
        assert_eq!(brakes.rate(Brake::Disk(NodeId(2)), ms(4030)), Some(500_000));
        assert_eq!(brakes.rate(Brake::Link(NodeId(1), NodeId(2)), ms(4030)), Some(1_000_000));
    }

    #[test]
    fn a_blocked_parent_of_a_starving_child_is_a_slow_link_and_not_that_of_a_full_one() {
        let brakes = chain(4000, |n, w| match n {
            0 | 1 => waited(w, 480, false, false, Some(n + 1)),
            _ => waited(w, 490, false, true, None),
        });
        assert_eq!(brakes.judge(parents(), ms(4030)), Some(Brake::Link(NodeId(1), NodeId(2))));
        // Nobody starves: the processors are busy, nothing is named.
        let brakes = chain(4000, |n, w| waited(w, 400, false, false, Some(n + 1)));
        assert_eq!(brakes.judge(parents(), ms(4030)), None);
        assert!(brakes.is_head_blocked(ms(4030)) && !brakes.is_head_blocked(ms(7000)));
        let brakes = chain(4000, |n, w| waited(w, 400, false, false, (n > 0).then_some(n + 1)));
        assert!(!brakes.is_head_blocked(ms(4030)));
    }

    #[test]
    fn a_head_that_waits_for_its_source_is_the_brake_whatever_else_is_slow() {
        let brakes = chain(4000, |n, w| match n {
            0 => waited(w, 400, false, true, None),
            1 => waited(w, 480, true, false, None),
            _ => waited(w, 490, false, true, None),
        });
        assert_eq!(brakes.judge(parents(), ms(4030)), Some(Brake::Server));
        assert_eq!(brakes.rate(Brake::Server, ms(4030)), None);
    }

    #[test]
    fn the_past_is_forgotten_and_the_silent_are_not_judged() {
        let slow = |n: u32, w: &mut Waits| waited(w, if n == 2 { 450 } else { 0 }, true, false, None);
        assert_eq!(chain(1000, slow).judge(parents(), ms(1030)), None, "too short");
        let mut brakes = chain(4000, slow);
        assert_eq!(brakes.judge(parents(), ms(4030)), Some(Brake::Disk(NodeId(2))));
        assert_eq!(brakes.judge(parents(), ms(7000)), None, "nobody says anything any more");
        let (_, mut last) = brakes.reports[&NodeId(2)].back().cloned().unwrap();
        for at in (4500..=8000).step_by(500) {
            last.waits.at(ms(at + 1));
            brakes.reported(NodeId(2), last.clone(), ms(at));
        }
        assert_eq!(brakes.judge(parents(), ms(8000)), None);
        assert!(brakes.reports[&NodeId(2)].len() <= 8, "what is kept is bounded");
    }

    fn slow(nodes: usize) -> Slow {
        Slow::new(SlowLimit { rate: 1000, grace: Duration::from_secs(30) }, nodes)
    }

    /// Sees the same for so many seconds; the first node that is named, and when.
    fn see(
        slow: &mut Slow,
        brake: Option<Brake>,
        rate: u64,
        seconds: std::ops::Range<u64>,
    ) -> Option<(u64, NodeId)> {
        seconds
            .flat_map(|s| [s * 1000, s * 1000 + 500])
            .find_map(|at| slow.see(brake, Some(rate), ms(at)).map(|node| (at, node)))
    }

    #[test]
    fn a_brake_below_the_rate_for_the_grace_names_its_node_once() {
        let disk = Some(Brake::Disk(NodeId(2)));
        let mut all = slow(8);
        assert_eq!(see(&mut all, disk, 1000, 0..90), None, "just quick enough");
        assert_eq!(see(&mut all, disk, 999, 90..200), Some((120_000, NodeId(2))));
        all.moved();
        let next = Some(Brake::Disk(NodeId(5)));
        assert_eq!(see(&mut all, next, 5, 121..200), Some((151_000, NodeId(5))));
        all.moved();
        assert_eq!(
            see(&mut all, Some(Brake::Disk(NodeId(6))), 5, 152..300),
            None,
            "a quarter of eight is gone"
        );
        assert_eq!(see(&mut slow(3), disk, 5, 0..100), None, "a quarter of three is nobody");
    }

    #[test]
    fn a_short_interruption_does_not_begin_the_time_anew_and_the_server_does() {
        let disk = Some(Brake::Disk(NodeId(2)));
        let mut blip = slow(4);
        assert_eq!(see(&mut blip, disk, 5, 0..20), None);
        assert_eq!(see(&mut blip, None, 5, 20..21), None);
        assert_eq!(see(&mut blip, disk, 5, 21..60), Some((30_000, NodeId(2))));
        let mut quick = slow(4);
        assert_eq!(see(&mut quick, disk, 5, 0..20), None);
        assert_eq!(see(&mut quick, disk, 5000, 20..25), None);
        assert_eq!(see(&mut quick, disk, 5, 25..60), Some((55_000, NodeId(2))));
        let mut server = slow(4);
        assert_eq!(see(&mut server, disk, 5, 0..20), None);
        assert_eq!(see(&mut server, Some(Brake::Server), 5, 20..21), None);
        assert_eq!(see(&mut server, disk, 5, 21..60), Some((51_000, NodeId(2))));
    }

    #[test]
    fn the_child_of_a_slow_link_goes_first_and_then_the_parent() {
        let link = |child| Some(Brake::Link(NodeId(2), NodeId(child)));
        let mut all = slow(8);
        assert_eq!(see(&mut all, link(3), 5, 0..60), Some((30_000, NodeId(3))));
        all.moved();
        assert_eq!(see(&mut all, link(4), 5, 31..90), Some((61_000, NodeId(2))));
    }
}
