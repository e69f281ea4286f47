//! What a place in the chain waits for, in running time counted up: its own disk, its children, its parent. From two looks at
//! these counters [`crate::core::brake`] sees what holds the chain up.

use super::NodeId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Children that are spoken of; [`crate::core::wave::Settings::arity`] is smaller, repairs may add some.
const CHILDREN: usize = 64;

/// Microseconds, counted up since the place was taken. They overlap: a place can wait for two children at once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Waits {
    /// Everything: what the others are shares of.
    pub time: u64,
    /// The window is full and the local consumer is the last to need its oldest chunk: the queue of the disk is full.
    pub disk: u64,
    /// There is room and nothing comes: from the parent, or at the head from the source.
    pub starved: u64,
    /// This child's socket takes nothing more.
    pub blocked: Vec<(NodeId, u64)>,
}

impl Waits {
    /// A wait has ended after this time: what for.
    pub fn waited(
        &mut self,
        time: Duration,
        disk: bool,
        starved: bool,
        blocked: impl Iterator<Item = NodeId>,
    ) {
        let micros = micros(time);
        self.disk += if disk { micros } else { 0 };
        self.starved += if starved { micros } else { 0 };
        for node in blocked {
            if let Some((_, sum)) = self.blocked.iter_mut().find(|(known, _)| *known == node) {
                *sum += micros;
            } else if self.blocked.len() < CHILDREN {
                self.blocked.push((node, micros));
            }
        }
    }

    /// So long the place has been held.
    pub fn at(&mut self, time: Duration) {
        self.time = self.time.max(micros(time));
    }

    /// How long this child's socket has taken nothing, in all.
    #[must_use]
    pub fn blocked_by(&self, child: NodeId) -> u64 {
        self.blocked.iter().find(|(node, _)| *node == child).map_or(0, |(_, sum)| *sum)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_added_up_by_what_they_are_for() {
        let mut waits = Waits::default();
        let ms = Duration::from_millis;
        waits.waited(ms(5), true, false, [NodeId(2), NodeId(3)].into_iter());
        waits.waited(ms(7), false, true, std::iter::once(NodeId(3)));
        waits.at(ms(20));
        waits.at(ms(19));
        assert_eq!((waits.time, waits.disk, waits.starved), (20_000, 5_000, 7_000));
        assert_eq!([2, 3, 4].map(|n| waits.blocked_by(NodeId(n))), [5_000, 12_000, 0]);
        for n in 0..200 {
            waits.waited(ms(1), false, false, std::iter::once(NodeId(n)));
        }
        assert_eq!(waits.blocked.len(), CHILDREN);
    }
}
