//! `cargo xtask bench chain`: every contender clones the same stream in the same network, round after round, so that what
//! else the machine does hits all alike; the medians stand in the report.

use crate::bench::Prepared;
use crate::bench::contender::Contender;
use crate::bench::figures::{Figures, medians};
use crate::bench::net::Net;
use crate::bench::report::{Case, Entry, Report, Run};
use crate::bench::source::{Source, Store};
use crate::bench::trial::{self, Stage};
use crate::{golden, interrupt, say, setup};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Below this idle share a shaped run says more about the machine than about the contender.
const IDLE: f64 = 0.10;
/// Above this busy share before a run somebody else works here, and the machine's figures cannot be trusted.
const BUSY: f64 = 0.05;
/// How often such a run is repeated.
const REPEATS: usize = 2;

/// A kind of case: links, stream, how many receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// As fast as the machine can, incompressible.
    Unshaped,
    /// 1 Gbit/s, incompressible.
    Gigabit,
    /// 100 Mbit/s, incompressible.
    Fast,
    /// 100 Mbit/s, a Debian root.
    FastRoot,
}

impl Family {
    /// All, in the order in which they run.
    pub const ALL: [Self; 4] = [Self::Unshaped, Self::Gigabit, Self::Fast, Self::FastRoot];

    /// Its name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unshaped => "unshaped",
            Self::Gigabit => "1g",
            Self::Fast => "100m",
            Self::FastRoot => "100m-root",
        }
    }

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// Of each link, in each direction.
    #[must_use]
    pub fn megabits(self) -> Option<u32> {
        match self {
            Self::Unshaped => None,
            Self::Gigabit => Some(1000),
            Self::Fast | Self::FastRoot => Some(100),
        }
    }

    fn receivers(self) -> &'static [usize] {
        match self {
            Self::Unshaped => &[1, 4, 8],
            Self::Gigabit => &[8],
            Self::Fast => &[1, 8, 60],
            Self::FastRoot => &[8, 60],
        }
    }

    /// How long a run may take before it counts as hanging.
    fn limit(self, bytes: u64) -> Duration {
        // Unshaped, the slowest peer was measured at 30 MB/s; shaped, none needs four times the wire's time.
        let megabits = self.megabits().map_or(80.0, |megabits| f64::from(megabits) / 4.0);
        Duration::from_secs_f64(30.0 + bytes as f64 * 8.0 / (megabits * 1e6))
    }
}

/// What is to be run.
#[derive(Debug)]
pub struct Options {
    /// The contenders; all when empty.
    pub only: Vec<Contender>,
    /// The kinds of cases; all when empty.
    pub cases: Vec<Family>,
    /// Instead of each kind's own numbers of receivers, if not empty.
    pub receivers: Vec<usize>,
    /// Runs of each contender in each case.
    pub rounds: usize,
    /// Bytes of the incompressible stream.
    pub size: u64,
    /// Where the report goes.
    pub output: PathBuf,
}

impl Options {
    fn families(&self) -> impl Iterator<Item = Family> {
        Family::ALL.into_iter().filter(|family| self.cases.is_empty() || self.cases.contains(family))
    }

    fn contenders(&self, family: Family) -> impl Iterator<Item = Contender> {
        // Without a shaped link one TCP stream is no yardstick.
        let fits = move |contender: &Contender| *contender != Contender::Tcp || family.megabits().is_some();
        let wanted = |contender: &Contender| self.only.is_empty() || self.only.contains(contender);
        Contender::ALL.into_iter().filter(fits).filter(wanted)
    }

    fn counts(&self, family: Family) -> &[usize] {
        if self.receivers.is_empty() { family.receivers() } else { &self.receivers }
    }
}

/// Runs all cases; whether every run of Ka ended well. The report is written after each case.
///
/// # Errors
/// When the machine cannot be prepared, or we are interrupted.
pub fn run(options: &Options, prepared: &Prepared, dir: &Path) -> Result<bool> {
    let mut report = Report::new(prepared.facts()?, prepared.ka.about());
    let mut store = Sources { store: Store::new()?, noise: None, root: None };
    for family in options.families() {
        let source = store.of(family, options.size, dir)?;
        for &receivers in options.counts(family) {
            report.cases.push(case(options, prepared, family, receivers, &source, dir)?);
            report.write(&options.output)?;
        }
    }
    print!("\n{}", report.markdown());
    let failed = report.failures(Contender::is_ka);
    if failed > 0 {
        say!("bench", "{failed} runs of Ka failed");
    }
    Ok(failed == 0)
}

/// The streams, each made when the first case wants it.
struct Sources {
    store: Store,
    noise: Option<Source>,
    root: Option<Source>,
}

impl Sources {
    fn of(&mut self, family: Family, size: u64, dir: &Path) -> Result<Source> {
        let place = if family == Family::FastRoot { &mut self.root } else { &mut self.noise };
        if let Some(source) = place {
            return Ok(source.clone());
        }
        let source = if family == Family::FastRoot {
            setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
            self.store.root(&golden::get(&dir.join("golden.log"))?, &dir.join("golden.log"))?
        } else {
            self.store.noise(size)?
        };
        Ok(place.insert(source).clone())
    }
}

fn case(
    options: &Options,
    prepared: &Prepared,
    family: Family,
    receivers: usize,
    source: &Source,
    dir: &Path,
) -> Result<Case> {
    let name = format!("{}-{receivers}", family.name());
    let net = Net::new(receivers, family.megabits())?;
    let stage = Stage { net: &net, ka: &prepared.ka, xtask: &prepared.xtask };
    let mut entries: Vec<Entry> = Vec::new();
    for contender in options.contenders(family) {
        if prepared.ka.can(contender) {
            entries.push(Entry { contender, runs: Vec::new(), median: None });
        } else {
            say!("bench", "{name}: this version of Ka cannot be {}", contender.name());
        }
    }
    for round in 1..=options.rounds {
        for entry in &mut entries {
            let dir = dir.join(&name).join(format!("{}-{round}", entry.contender.name()));
            attempts(stage, family, source, entry, &name, &dir)?;
        }
    }
    for entry in &mut entries {
        let valid: Vec<&Figures> =
            entry.runs.iter().filter(|run| !run.void).filter_map(|run| run.figures.as_ref()).collect();
        entry.median = medians(&valid);
    }
    Ok(Case { family: family.name(), receivers, megabits: family.megabits(), bytes: source.bytes, entries })
}

/// One run, and again while it is void.
fn attempts(
    stage: Stage,
    family: Family,
    source: &Source,
    entry: &mut Entry,
    case: &str,
    dir: &Path,
) -> Result<()> {
    for attempt in 0..=REPEATS {
        let who = entry.contender.name();
        let dir = dir.join(attempt.to_string());
        let run = trial::run(stage, entry.contender, source, &dir, family.limit(source.bytes));
        interrupt::check()?;
        match run.map(|measured| measured.figures()) {
            Ok(figures) => {
                let void = family.megabits().is_some() && figures.idle < IDLE;
                say!(
                    "bench",
                    "{case} {who}: {:.1} MB/s, {:.2} CPU-s/GB ({:.2} by processes), {:.0} % idle{}{}",
                    figures.mb_per_s,
                    figures.cpu_machine,
                    figures.cpu_processes,
                    figures.idle * 100.0,
                    if figures.baseline > BUSY { "; the machine was busy before already" } else { "" },
                    if void { ": void, the machine was the brake" } else { "" }
                );
                entry.runs.push(Run { figures: Some(figures), void, error: None });
                if !void {
                    break;
                }
            }
            Err(e) => {
                say!("bench", "{case} {who}: FAILED: {e:#}");
                entry.runs.push(Run { figures: None, void: false, error: Some(format!("{e:#}")) });
                break;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(only: Vec<Contender>, receivers: Vec<usize>) -> Options {
        Options { only, cases: Vec::new(), receivers, rounds: 1, size: 1, output: PathBuf::new() }
    }

    #[test]
    fn names_lead_back() {
        for family in Family::ALL {
            assert_eq!(Family::named(family.name()), Some(family));
        }
    }

    #[test]
    fn the_yardstick_needs_a_shaped_link() {
        let all = options(Vec::new(), Vec::new());
        assert!(!all.contenders(Family::Unshaped).any(|c| c == Contender::Tcp));
        assert!(all.contenders(Family::Gigabit).any(|c| c == Contender::Tcp));
        assert_eq!(all.counts(Family::Fast), [1, 8, 60]);
        let some = options(vec![Contender::Ka], vec![2]);
        assert_eq!(some.contenders(Family::Fast).collect::<Vec<_>>(), [Contender::Ka]);
        assert_eq!(some.counts(Family::Fast), [2]);
    }

    #[test]
    fn limits_leave_room_and_end() {
        let gib = 1 << 30;
        assert!(Family::Fast.limit(gib) > Duration::from_secs(300));
        assert!(Family::Gigabit.limit(gib) < Duration::from_secs(90));
        assert!(Family::Unshaped.limit(gib) < Duration::from_secs(150));
    }
}
