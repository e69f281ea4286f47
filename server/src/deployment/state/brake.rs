//! What holds the chain up, by name, for the operator; and which node is moved to the next wave because it is too slow
//! (`--min-rate`). The verdict itself is [`ka_chain::core::brake`]'s.

use super::{Action, Deployment};
use ka_chain::control::Progress;
use ka_chain::core::brake::{Brake, Brakes, Report, Slow, SlowLimit};
use ka_chain::core::level::{Chooser, Holds, Level, Used, Work};
use ka_chain::core::waits::Waits;
use ka_chain::core::wave;
use ka_chain::core::{HEAD, NodeId, Time};
use ka_cli::units::{show_size, show_time};
use ka_sys::speed::Speed;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How often the verdict is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Interfaces shown of one end of a link.
const INTERFACES: usize = 4;
/// The head's name.
const SERVER: &str = "the server";

/// A brake, by the names of the nodes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Held {
    /// The source, or what packs, compresses and seals it.
    Server,
    /// A node's disk.
    Disk(String),
    /// The link between two nodes; the server is `the server`.
    Link(String, String),
}

impl std::fmt::Display for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Server => f.write_str("server"),
            Self::Disk(node) => write!(f, "disk of {node}"),
            Self::Link(from, to) => write!(f, "link from {from} to {to}"),
        }
    }
}

impl Held {
    /// For the JSON lines.
    #[must_use]
    pub fn to_json(&self) -> Value {
        match self {
            Self::Server => json!({"kind": "server"}),
            Self::Disk(node) => json!({"kind": "disk", "node": node}),
            Self::Link(from, to) => json!({"kind": "link", "from": from, "to": to}),
        }
    }
}

/// A wave's brake.
#[derive(Debug)]
pub(super) struct Braking {
    brakes: Brakes,
    slow: Option<(SlowLimit, Slow)>,
    /// With `--compress auto`.
    chooser: Option<Chooser>,
    work: Work,
    brake: Option<Brake>,
    looked: Option<Time>,
}

impl Braking {
    /// For a wave of so many nodes; `auto` is `--compress auto`.
    pub(super) fn new(limit: Option<SlowLimit>, nodes: usize, auto: bool) -> Self {
        let slow = limit.map(|limit| (limit, Slow::new(limit, nodes)));
        let chooser = auto.then(Chooser::default);
        Self { brakes: Brakes::default(), slow, chooser, work: Work::default(), brake: None, looked: None }
    }

    /// A node said how far it is and what it waited for.
    pub(super) fn reported(&mut self, node: NodeId, progress: &Progress, time: Time) {
        let (received, consumed) = (progress.plain, progress.consumed);
        self.brakes.reported(node, Report { waits: progress.waits.clone(), received, consumed }, time);
    }

    /// The level, if the brake makes it another.
    fn choose_level(&mut self, time: Time) -> Option<Level> {
        let chooser = self.chooser.as_mut()?;
        let holds = match self.brake {
            Some(Brake::Server) => Holds::Server,
            Some(Brake::Disk(_)) => Holds::Disk,
            None if !self.brakes.is_head_blocked(time) => Holds::Nothing,
            Some(Brake::Link(..)) | None => Holds::Wire,
        };
        chooser.see(holds, self.work, time)
    }
}

impl Deployment {
    /// How the head stands and what it waited for; tell it a few times a second.
    pub fn head_progress(&mut self, status: wave::Status, waits: Waits, now: Instant) {
        let time = self.time(now);
        if let Some(current) = &mut self.current {
            current.core.head_status(status);
            current.braking.brakes.reported(HEAD, Report { waits, ..Report::default() }, time);
        }
    }

    /// What the compressing threads have done so far; tell it a few times a second.
    pub fn compressed(&mut self, work: Work) {
        if let Some(current) = &mut self.current {
            current.braking.work = work;
        }
    }

    /// What holds the chain up right now.
    #[must_use]
    pub fn brake(&self) -> Option<Held> {
        self.named(self.current.as_ref()?.braking.brake?)
    }

    fn named(&self, brake: Brake) -> Option<Held> {
        let names = &self.current.as_ref()?.names;
        let name = |id: NodeId| {
            if id == HEAD { Some(SERVER.to_owned()) } else { names.get(&id).cloned() }
        };
        Some(match brake {
            Brake::Server => Held::Server,
            Brake::Disk(node) => Held::Disk(name(node)?),
            Brake::Link(from, to) => Held::Link(name(from)?, name(to)?),
        })
    }

    /// The interfaces at both ends of a link whose speeds are known, each with its node: the upper end first. Which of
    /// several the link goes over is not known here.
    fn speeds(&self, held: &Held) -> Vec<(String, Speed)> {
        let Held::Link(from, to) = held else { return Vec::new() };
        let of = |name: &str| -> Vec<Speed> {
            match self.nodes.get(name) {
                Some(node) => {
                    let facts = node.registration.facts.iter();
                    facts.filter_map(|(name, value)| Speed::from_fact(name, value)).take(INTERFACES).collect()
                }
                None if name == SERVER => self.speeds.iter().take(INTERFACES).cloned().collect(),
                None => Vec::new(),
            }
        };
        [from, to]
            .into_iter()
            .flat_map(|name| of(name).into_iter().map(|speed| (name.clone(), speed)))
            .collect()
    }

    /// A brake in words; a link with the speeds of the interfaces at its ends.
    #[must_use]
    pub fn describe(&self, held: &Held) -> String {
        let speeds = self.speeds(held);
        let speeds: Vec<String> = speeds.iter().map(|(node, speed)| format!("{node}'s {speed}")).collect();
        if speeds.is_empty() { held.to_string() } else { format!("{held} ({})", speeds.join(", ")) }
    }

    /// The same for the JSON lines; speeds are megabits a second.
    #[must_use]
    pub fn describe_json(&self, held: &Held) -> Value {
        let mut value = held.to_json();
        if matches!(held, Held::Link(..)) {
            let speeds = self.speeds(held);
            let each = speeds.iter().map(|(node, speed)| {
                json!({"node": node, "interface": speed.interface, "mbit_per_s": speed.megabits})
            });
            value["speeds"] = each.collect();
        }
        value
    }

    /// Looks at the brake, chooses the level, and plans the removal of a node that is too slow.
    pub(super) fn judge_brake(&mut self, time: Time) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(current) = self.current.as_mut() else { return actions };
        let braking = &mut current.braking;
        let since = time.saturating_sub(*braking.looked.get_or_insert(time));
        if since < LOOK {
            return actions;
        }
        braking.looked = Some(time);
        let before = std::mem::replace(&mut braking.brake, braking.brakes.judge(current.core.pairs(), time));
        if let Some(level) = braking.choose_level(time) {
            log::debug!("compression goes to level {level}, as the brake is {:?}", braking.brake);
            self.levels.get_or_insert(Used::new(level)).saw(level);
            actions.push(Action::Compress(level));
        }
        actions.extend(self.judge_slow(before, since, time));
        actions
    }

    fn judge_slow(&mut self, before: Option<Brake>, since: Duration, time: Time) -> Option<Action> {
        let current = self.current.as_mut()?;
        let braking = &mut current.braking;
        let brake = braking.brake;
        let rate = brake.and_then(|brake| braking.brakes.rate(brake, time));
        let slow = match &mut braking.slow {
            // One after the other, and each only when those below the one before are covered again.
            Some((limit, slow)) if !current.core.is_removing() => {
                slow.see(brake, rate, time).map(|node| (*limit, node))
            }
            _ => None,
        };
        if let Some(held) = before.filter(|_| before == brake).and_then(|brake| self.named(brake)) {
            *self.held_up.entry(held).or_default() += since;
        }
        let (limit, id) = slow?;
        let held = self.describe(&self.named(brake?)?);
        let current = self.current.as_mut()?;
        let node = self.nodes.get(current.names.get(&id)?)?;
        // In its last wave a slow node is better than none.
        if node.is_final() || node.ended.is_some() || node.tries >= self.settings.tries {
            return None;
        }
        let why = format!(
            "the {held} let {}/s through, less than --min-rate, for {}",
            show_size(rate.unwrap_or_default()),
            show_time(limit.grace)
        );
        let say = format!("{} is to leave the wave: {why}", node.name);
        current.core.plan_out(id, &why, None);
        if let Some((_, slow)) = &mut current.braking.slow {
            slow.moved();
        }
        Some(Action::Say(say))
    }
}

#[cfg(test)]
#[path = "brake_tests.rs"]
mod tests;
