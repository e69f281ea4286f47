//! A schedule: how a wave is made up and what happens to it, all of it from one seed.

use super::chance::Chance;
use crate::CHUNK;
use crate::core::relay::Limits;
use crate::core::wave::Settings;
use std::time::Duration;

/// What befalls a node (its index; 0 is the server) or its link to its parent of that moment. Times in ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The process is gone; its kernel closes its connections.
    Kill(usize),
    /// The machine is off: silence.
    Off(usize),
    /// The process stands still for so long, or for good; its kernel lives.
    Freeze(usize, u64),
    /// No cable for so long, or for good.
    Cut(usize, u64),
    /// From now on nothing gets from the parent to the node (or back) on their data links, redialled ones too.
    OneWay { node: usize, down: bool },
    /// The same for the connection that stands now only.
    OneWayOnce { node: usize, down: bool },
    /// The data connection to the parent is reset while both ends live.
    Reset(usize),
    /// Its disk takes so long for each chunk from now on.
    SlowDisk(usize, u64),
    /// Its disk takes nothing any more.
    StuckDisk(usize),
    /// Its installation fails; it goes on as a relay.
    GiveUp(usize),
    /// It passes chunks on damaged: every one from now on, or the next one only.
    Damages { node: usize, always: bool },
    /// What comes to it is damaged from now on, whoever sent it: its own memory is bad.
    Garbles(usize),
    /// Its messages to and from the server take so much longer for some seconds.
    SlowControl(usize, u64),
    /// The server wants it out of the wave, because it is slow.
    Remove(usize),
}

/// For good.
pub(super) const EVER: u64 = u64::MAX / 4;

/// A fault and when: so many ms after the source gave its so many-th chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    pub(super) fault: Fault,
    pub(super) pushed: u64,
    pub(super) delay: u64,
}

/// The disk of a node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Disk {
    /// ms for each chunk.
    pub(super) interval: u64,
}

/// A schedule.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) settings: Settings,
    pub(super) nodes: usize,
    pub(super) limits: Limits,
    /// Wire bytes that the head keeps beyond its duty.
    pub(super) history: usize,
    /// Chunks of the stream.
    pub(super) total: u64,
    /// The least size of a chunk.
    pub(super) least_size: usize,
    /// ms between two chunks of the source.
    pub(super) source: u64,
    /// ms that a chunk takes on a wire.
    pub(super) wire: u64,
    /// Chunks that the buffers of a connection take.
    pub(super) buffer: usize,
    pub(super) disks: Vec<Disk>,
    pub(super) faults: Vec<Planned>,
    /// An order is now and then delivered again.
    pub(super) repeats: bool,
}

impl Plan {
    pub(super) fn from_seed(seed: u64) -> Self {
        let mut chance = Chance::new(seed);
        let nodes = match chance.within(0, 99) {
            0..=71 => chance.within(1, 8),
            72..=96 => chance.within(4, 12),
            _ => chance.within(13, 40),
        } as usize;
        let settings = Settings {
            arity: chance.pick(&[1, 1, 1, 1, 1, 1, 2, 3]),
            survive: chance.pick(&[0, 1, 1, 2, 2, 2, 2, 3]),
            dead_after: Duration::from_secs(8),
            stall: Duration::from_secs(chance.pick(&[15, 20, 30])),
        };
        let history = if chance.percent(40) { 0 } else { chance.within(1, 200) as usize * CHUNK };
        let window = chance.within(8, 40) as usize * CHUNK;
        let total = if chance.percent(80) { chance.within(30, 120) } else { chance.within(60, 400) };
        let disks = (0..=nodes)
            .map(|_| {
                let interval = if chance.percent(8) { chance.within(60, 250) } else { chance.within(0, 15) };
                Disk { interval }
            })
            .collect();
        let mut plan = Self {
            settings,
            nodes,
            limits: Limits { survive: settings.survive, window, history: 0 },
            history,
            total,
            least_size: CHUNK / chance.pick(&[1, 2, 4, 64]),
            source: chance.within(1, 25),
            wire: chance.within(1, 12),
            buffer: chance.within(2, 6) as usize,
            disks,
            faults: Vec::new(),
            repeats: chance.percent(50),
        };
        if !chance.percent(8) {
            plan.draw_faults(&mut chance);
        }
        plan
    }

    fn draw_faults(&mut self, chance: &mut Chance) {
        let count = chance.within(1, 6);
        // Faults keep company: near one moment of the stream, or anywhere.
        let moment = self.draw_moment(chance);
        let together = chance.percent(50);
        while (self.faults.len() as u64) < count {
            let (pushed, delay) = match (together, chance.within(0, 9)) {
                (true, 0..=4) => moment,
                (true, 5..=7) => (moment.0, moment.1 + chance.within(0, 12_000)),
                _ => self.draw_moment(chance),
            };
            let node = chance.within(1, self.nodes as u64) as usize;
            if chance.percent(15) {
                // Neighbours at one instant.
                let fault =
                    chance.pick(&[Fault::Kill(0), Fault::Kill(0), Fault::Off(0), Fault::Cut(0, EVER)]);
                for next in 0..chance.within(2, 4) as usize {
                    let node = node + next;
                    if node <= self.nodes {
                        let fault = match fault {
                            Fault::Off(_) => Fault::Off(node),
                            Fault::Cut(_, time) => Fault::Cut(node, time),
                            _ => Fault::Kill(node),
                        };
                        self.faults.push(Planned { fault, pushed, delay });
                    }
                }
                continue;
            }
            let short = chance.within(500, 5500);
            let down = chance.percent(50);
            let fault = match chance.within(0, 99) {
                0..=21 => Fault::Kill(node),
                22..=29 => Fault::Off(node),
                30..=34 => Fault::Freeze(node, EVER),
                35..=44 => Fault::Freeze(node, short),
                45..=48 => Fault::Freeze(node, chance.within(9_000, 14_000)),
                49..=52 => Fault::Cut(node, EVER),
                53..=60 => Fault::Cut(node, short),
                61..=66 => Fault::OneWay { node, down },
                67..=71 => Fault::OneWayOnce { node, down },
                72..=79 => Fault::Reset(node),
                80..=83 => Fault::SlowDisk(node, chance.within(50, 400)),
                84..=86 => Fault::StuckDisk(node),
                87..=89 => Fault::GiveUp(node),
                90..=91 => Fault::SlowControl(node, chance.within(50, 400)),
                92..=93 => Fault::Remove(node),
                94..=95 => Fault::Damages { node, always: down },
                96 => Fault::Garbles(node),
                _ => Fault::Freeze(0, chance.within(1_000, 20_000)),
            };
            self.faults.push(Planned { fault, pushed, delay });
        }
    }

    fn draw_moment(&self, chance: &mut Chance) -> (u64, u64) {
        match chance.within(0, 9) {
            0 => (0, chance.within(0, 300)),
            1..=2 => (self.total, chance.within(0, 600)),
            _ => (chance.within(0, self.total), chance.within(0, 50)),
        }
    }

    /// ms within which a run without faults moves one chunk through the slowest place, generously: the source, the wire
    /// (once for each child), the slowest disk, or the round of acknowledgements from the farthest generation that is
    /// waited for (one tick of 100 ms and a delay for each) shared by the chunks of a window.
    pub(super) fn pace(&self) -> u64 {
        let slow = |fault: &Planned| match fault.fault {
            Fault::SlowDisk(_, interval) => interval,
            _ => 0,
        };
        let disk = self.disks.iter().map(|d| d.interval).chain(self.faults.iter().map(slow)).max();
        let generations = u64::from(self.settings.survive) + 1;
        let window = (self.limits.window / (CHUNK + 64)).max(2 * (generations as usize + 1)) as u64;
        let round = (generations + 1) * 150 / window;
        let wire = 2 * self.wire + 12;
        self.source.max(wire).max(disk.unwrap_or_default()).max(round) + 2
    }

    /// ms within which the wave must be over after the last fault has passed: what there is to move, at the pace, twice
    /// (once to bring an orphan up from the history while the others wait); for each disk that is stuck its stall; for
    /// each death its silence and the dial that may time out before; for each bad link two silences and two dials for
    /// each of the two verdicts that it may cost; and one silence and one stall.
    pub(super) fn bound(&self) -> u64 {
        let dead = self.settings.dead_after.as_millis() as u64;
        let stall = self.settings.stall.as_millis() as u64;
        let each: u64 = self
            .faults
            .iter()
            .map(|planned| match planned.fault {
                Fault::StuckDisk(_) => stall + dead + 2_000,
                Fault::OneWay { .. } => 4 * (dead + 7_000),
                Fault::Damages { .. } | Fault::Garbles(_) => 3 * 7_000,
                Fault::OneWayOnce { .. } | Fault::Reset(_) => dead + 7_000,
                _ => 7_000,
            })
            .sum();
        let chunks = 2 * (self.total + self.nodes as u64 * 4);
        stall + dead + each + chunks * self.pace() + 5_000
    }

    /// ms after which the cover must be full again when nothing happens: one window at the pace, and for each of
    /// `survive + 2` hops a tick, a delay and an acknowledgement.
    pub(super) fn settle(&self) -> u64 {
        let least = 2 * (u64::from(self.settings.survive) + 2);
        let window = ((self.limits.window / self.least_size) as u64 + 2).max(least).min(self.total);
        window * self.pace() + (u64::from(self.settings.survive) + 2) * 1_300 + 2_000
    }
}
