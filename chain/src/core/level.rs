//! How hard the server compresses (`--compress auto`), by what holds the chain up. Compressing pays as long as it does not
//! make the server the brake: while the wire is the brake the level rises to 3 at least, and above as long as the
//! compressing threads would have time left; when they are what the chain waits for, it falls, in the end to no
//! compression at all. A level that made the server the brake is not tried again for [`BARRED`].
//!
//! The rungs are few, as a decision takes seconds, and chosen by what they cost and bring. Measured on 128 MiB of a Debian's
//! `/usr/bin` and `/usr/lib` in pieces of 256 KiB, one thread of zstd 1.5 (user time of `zstd -LEVEL -c PIECE...`; the ratio is
//! that of the sizes):
//!
//! | level | -5 | 1 | 3 | 4 | 5 | 6 | 9 | 12 |
//! |---|---|---|---|---|---|---|---|---|
//! | CPU-s/GiB | 2.8 | 4.2 | 8.7 | 15.7 | 17.5 | 23.3 | 27.8 | 124.8 |
//! | shrinks to 1/ | 2.20 | 3.05 | 3.26 | 3.30 | 3.32 | 3.38 | 3.49 | 3.51 |
//!
//! So 9 is the highest: 12 costs four times as much for half a percent.

use super::Time;
use serde::Serialize;
use std::collections::VecDeque;
use std::time::Duration;

/// How chunks are compressed: the less the smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(untagged)]
pub enum Level {
    /// Not at all.
    Plain,
    /// By zstd at this level; below 0 are the quick ones.
    Zstd(i32),
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain => f.write_str("off"),
            Self::Zstd(level) => write!(f, "{level}"),
        }
    }
}

/// A level, and what compressing and sealing with it costs, where level 3 costs 100.
struct Rung(Level, u64);

/// See above.
const LADDER: [Rung; 6] = [
    Rung(Level::Plain, 10),
    Rung(Level::Zstd(-5), 32),
    Rung(Level::Zstd(1), 50),
    Rung(Level::Zstd(3), 100),
    Rung(Level::Zstd(6), 270),
    Rung(Level::Zstd(9), 320),
];
/// The rung on which a wave begins, and which the wire is worth at least: on real clusters it is the brake.
const BEGIN: usize = 3;

/// A change is left alone for so long: the brake is judged by the last 3 s.
const SETTLE: Duration = Duration::from_secs(3);
/// So much of the threads' past is looked at.
const SPAN: Duration = Duration::from_secs(3);
/// A level that made the server the brake is not tried again for so long.
pub const BARRED: Duration = Duration::from_secs(30);
/// Thousandths of their time that the threads must work before they are what a braking server lacks: below it is the source.
const BUSY: u64 = 500;
/// Thousandths of their time that the threads may be expected to work on the next rung.
const ROOM: u64 = 700;

/// What the compressing threads have done, counted up since the wave began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// How many there are.
    pub threads: u32,
    /// The time that they worked, of all together.
    pub time: Duration,
    /// Plain bytes of data that they took.
    pub plain: u64,
    /// Bytes that they made of them.
    pub packed: u64,
}

/// What holds the chain up, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// The server.
    Server,
    /// A link, or whatever keeps the head from sending.
    Wire,
    /// A node's disk.
    Disk,
    /// Nothing clearly.
    Nothing,
}

/// The levels that were in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Used {
    /// The one in force, or the last one.
    pub level: Level,
    /// The lowest.
    pub lowest: Level,
    /// The highest.
    pub highest: Level,
}

impl Used {
    /// At the beginning.
    #[must_use]
    pub fn new(level: Level) -> Self {
        Self { level, lowest: level, highest: level }
    }

    /// Another level is in force.
    pub fn saw(&mut self, level: Level) {
        self.level = level;
        self.lowest = self.lowest.min(level);
        self.highest = self.highest.max(level);
    }
}

impl std::fmt::Display for Used {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.lowest == self.highest {
            return write!(f, "level {}", self.level);
        }
        write!(f, "levels {} to {}, last {}", self.lowest, self.highest, self.level)
    }
}

/// Chooses the level for one wave.
#[derive(Debug, Default)]
pub struct Chooser {
    /// Steps from [`BEGIN`].
    rung: Option<usize>,
    changed: Option<Time>,
    /// Until when each rung is not to be tried.
    barred: [Time; LADDER.len()],
    /// What the threads said on this rung, the oldest first.
    past: VecDeque<(Time, Work)>,
}

impl Chooser {
    /// The level with which every wave begins.
    pub const FIRST: Level = LADDER[BEGIN].0;

    fn rung(&self) -> usize {
        self.rung.unwrap_or(BEGIN)
    }

    /// The level in force.
    #[must_use]
    pub fn level(&self) -> Level {
        LADDER.get(self.rung()).map_or(Self::FIRST, |rung| rung.0)
    }

    /// What holds the chain up and what the threads have done, now; look a few times a second. The level, if it changes.
    pub fn see(&mut self, holds: Holds, work: Work, now: Time) -> Option<Level> {
        self.past.push_back((now, work));
        // The oldest that is kept is the last one before the span, or the first in it.
        while self.past.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= SPAN) {
            self.past.pop_front();
        }
        if now.saturating_sub(*self.changed.get_or_insert(now)) < SETTLE {
            return None;
        }
        let (rung, (busy, shrinks)) = (self.rung(), self.lately());
        let may_rise = self.barred.get(rung + 1).is_some_and(|until| *until <= now);
        let next = match holds {
            Holds::Server if busy >= BUSY && rung > 0 => {
                self.barred[rung] = now + BARRED;
                // What fell from above 3 was a try: the chain goes on at once with what is known to do.
                rung.saturating_sub(1).min(BEGIN)
            }
            Holds::Wire | Holds::Disk if rung < BEGIN && may_rise => rung + 1,
            Holds::Wire if may_rise && shrinks && self.expected(busy) <= ROOM => rung + 1,
            _ => return None,
        };
        self.rung = Some(next);
        self.changed = Some(now);
        self.past.clear();
        Some(self.level())
    }

    /// Thousandths of their time that the threads worked lately, and whether that took off an eighth of the stream or more.
    fn lately(&self) -> (u64, bool) {
        let (Some((from, first)), Some((to, last))) = (self.past.front(), self.past.back()) else {
            return (0, false);
        };
        let whole = to.saturating_sub(*from).as_micros() * u128::from(last.threads);
        let worked = last.time.saturating_sub(first.time).as_micros() * 1000;
        let busy = worked.checked_div(whole).and_then(|busy| u64::try_from(busy).ok()).unwrap_or(0);
        let (plain, packed) =
            (last.plain.saturating_sub(first.plain), last.packed.saturating_sub(first.packed));
        (busy, plain > 0 && packed <= plain - plain / 8)
    }

    /// Thousandths of their time that the threads would work on the next rung, at the same rate.
    fn expected(&self, busy: u64) -> u64 {
        match (LADDER.get(self.rung()), LADDER.get(self.rung() + 1)) {
            (Some(Rung(_, cost)), Some(Rung(_, more))) => busy.saturating_mul(*more) / cost,
            _ => u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A chooser whose two threads work so many thousandths of their time on level 3, and in proportion on others.
    struct Lab {
        chooser: Chooser,
        work: Work,
        now: Time,
        busy: u64,
        shrinks: bool,
    }

    impl Lab {
        fn new(busy: u64) -> Self {
            let work = Work { threads: 2, ..Work::default() };
            Self { chooser: Chooser::default(), work, now: Time::ZERO, busy, shrinks: true }
        }

        /// So many seconds of the same; the levels that came into force, and when.
        fn pass(&mut self, seconds: u64, holds: impl Fn(Level) -> Holds) -> Vec<(u64, Level)> {
            let mut seen = Vec::new();
            for _ in 0..seconds * 2 {
                let cost = LADDER[self.chooser.rung()].1;
                let busy = (self.busy * cost / 100).min(1000);
                self.now += Duration::from_millis(500);
                self.work.time += Duration::from_millis(500) * 2 * u32::try_from(busy).unwrap() / 1000;
                self.work.plain += 1000;
                self.work.packed += if self.shrinks { 400 } else { 900 };
                let level = self.chooser.level();
                if let Some(new) = self.chooser.see(holds(level), self.work, self.now) {
                    assert_ne!(new, level);
                    assert_eq!(new, self.chooser.level());
                    seen.push((self.now.as_secs(), new));
                }
            }
            seen
        }
    }

    use Level::{Plain, Zstd};

    #[test]
    fn a_wave_begins_with_3_and_nothing_changes_without_a_reason() {
        let mut lab = Lab::new(100);
        assert_eq!(Chooser::FIRST, Zstd(3));
        assert_eq!(lab.chooser.level(), Zstd(3));
        assert_eq!(lab.pass(60, |_| Holds::Nothing), []);
        assert_eq!(lab.pass(60, |_| Holds::Disk), []);
    }

    #[test]
    fn a_braking_server_compresses_less_and_less_while_its_threads_are_busy() {
        let mut lab = Lab::new(5000);
        let seen = lab.pass(60, |_| Holds::Server);
        assert_eq!(seen, [(3, Zstd(1)), (6, Zstd(-5)), (9, Plain)]);
        assert_eq!(Lab::new(490).pass(60, |_| Holds::Server), [], "the source is what is slow");
        let seen = Lab::new(600).pass(60, |_| Holds::Server);
        assert_eq!(seen, [(3, Zstd(1))], "at 1 they work 300 thousandths of their time");
    }

    #[test]
    fn a_braking_wire_is_worth_more_as_long_as_time_is_left() {
        assert_eq!(Lab::new(100).pass(60, |_| Holds::Wire), [(3, Zstd(6)), (6, Zstd(9))]);
        assert_eq!(Lab::new(259).pass(60, |_| Holds::Wire), [(3, Zstd(6))], "9 would take 828 thousandths");
        assert_eq!(Lab::new(270).pass(60, |_| Holds::Wire), []);
        let mut noise = Lab { shrinks: false, ..Lab::new(10) };
        assert_eq!(noise.pass(60, |_| Holds::Wire), [], "there is nothing to gain");
    }

    #[test]
    fn what_made_the_server_the_brake_is_not_tried_again_for_a_while() {
        // Another hand takes the processors as soon as the level is 6, whatever the threads say before.
        let mut lab = Lab::new(230);
        let holds = |level| if level > Zstd(3) { Holds::Server } else { Holds::Wire };
        let seen = lab.pass(80, holds);
        assert_eq!(
            seen,
            [(3, Zstd(6)), (6, Zstd(3)), (36, Zstd(6)), (39, Zstd(3)), (69, Zstd(6)), (72, Zstd(3))]
        );
    }

    #[test]
    fn a_fall_from_above_ends_at_3_at_once() {
        let mut lab = Lab::new(100);
        lab.pass(10, |_| Holds::Wire);
        assert_eq!(lab.chooser.level(), Zstd(9));
        lab.busy = 1000;
        // As soon as they were busy for half of the last 3 s.
        assert_eq!(lab.pass(2, |_| Holds::Server), [(11, Zstd(3))]);
        assert_eq!(lab.pass(3, |_| Holds::Server), [(14, Zstd(1))]);
    }

    #[test]
    fn a_disk_and_a_wire_bring_it_back_to_3_when_the_bar_is_lifted() {
        for holds in [Holds::Disk, Holds::Wire] {
            let mut lab = Lab::new(5000);
            lab.pass(10, |_| Holds::Server);
            assert_eq!(lab.chooser.level(), Plain);
            let seen = lab.pass(60, |_| holds);
            assert_eq!(seen, [(39, Zstd(-5)), (42, Zstd(1)), (45, Zstd(3))], "{holds:?}");
        }
    }

    #[test]
    fn the_levels_used_are_told() {
        let mut used = Used::new(Zstd(3));
        assert_eq!(used.to_string(), "level 3");
        used.saw(Plain);
        used.saw(Zstd(1));
        assert_eq!(used.to_string(), "levels off to 3, last 1");
    }

    proptest! {
        #[test]
        fn the_level_stays_on_the_ladder_and_changes_by_few_rungs_and_not_too_often(
            steps in proptest::collection::vec((0u8..4, 0u64..2000, 0u64..5000, 0u64..3000), 0..400)
        ) {
            let on = |level| LADDER.iter().position(|rung| rung.0 == level);
            let mut chooser = Chooser::default();
            let (mut now, mut work) = (Time::ZERO, Work { threads: 3, ..Work::default() });
            let mut last: Option<Time> = None;
            for (holds, time, busy, bytes) in steps {
                now += Duration::from_millis(time);
                work.time += Duration::from_millis(busy);
                work.plain += bytes;
                work.packed += bytes / 2;
                let holds = [Holds::Server, Holds::Wire, Holds::Disk, Holds::Nothing][usize::from(holds)];
                let before = on(chooser.level()).unwrap();
                let changed = chooser.see(holds, work, now);
                let after = on(chooser.level()).unwrap();
                prop_assert_eq!(changed.is_some(), before != after);
                prop_assert!(chooser.past.len() <= 400);
                if changed.is_some() {
                    prop_assert!(last.is_none_or(|last| now - last >= SETTLE));
                    prop_assert!(after == before + 1 || (after < before && (after + 1 == before || after == BEGIN)));
                    prop_assert!(after < before || holds != Holds::Server);
                    last = Some(now);
                }
            }
        }
    }
}
