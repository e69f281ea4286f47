//! The simulator: one wave with all its nodes, driven through random deaths, freezes, cuts, resets and slow disks, and an
//! oracle that knows the truth. What runs is the very code of [`super::relay`] and [`super::wave`]; machines, clocks,
//! cables, kernels' buffers and disks are played by [`world`], [`control`] and [`data`].
//!
//! `KA_SIM_SCHEDULES=100000` runs so many schedules, `KA_SIM_SEED=n` one, and prints what happens in it.

mod chance;
mod control;
mod data;
mod oracle;
mod plan;
mod table;
mod world;

use super::mutation::{ALL, Mutation, plant};
use std::panic::{AssertUnwindSafe, catch_unwind};
use world::World;

/// Runs one schedule; the text says what the oracle found.
fn run(seed: u64, trace: bool) -> Result<(), String> {
    // An arithmetic overflow or a broken assertion inside counts as found, too.
    let run = AssertUnwindSafe(|| {
        World::new(seed, trace).run().and_then(|mut world| {
            world.check_quiet_run();
            world.oracle.violation.take().map_or(Ok(()), Err)
        })
    });
    catch_unwind(run).unwrap_or_else(|_| Err("a panic".to_owned()))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

#[test]
fn random_schedules_pass() {
    if let Some(seed) = number("KA_SIM_SEED") {
        let mutation = std::env::var("KA_SIM_MUTATION").ok();
        plant(mutation.and_then(|name| ALL.into_iter().find(|m| format!("{m:?}") == name)));
        let result = run(seed, true);
        plant(None);
        assert_eq!(result, Ok(()), "seed {seed}");
        return;
    }
    let first = number("KA_SIM_FIRST").unwrap_or(0);
    let count = number("KA_SIM_SCHEDULES").unwrap_or(2_000);
    let mut failed = Vec::new();
    for seed in first..first + count {
        if let Err(text) = run(seed, false) {
            println!(
                "KA_SIM_SEED={seed} cargo test -p ka-chain --lib random_schedules -- --nocapture    {text}"
            );
            failed.push(seed);
            if failed.len() == 20 {
                break;
            }
        }
    }
    assert!(failed.is_empty(), "schedules {failed:?} failed");
}

/// Schedules that found what 2,000 do not meet: a link that is dead for good below which everything is held already kept a
/// stuck node from being taken out, for ever.
#[test]
fn schedules_that_once_failed_pass() {
    for seed in [14_724, 25_908, 70_155, 74_267, 85_125] {
        assert_eq!(run(seed, false), Ok(()), "schedule {seed}");
        plant(Some(Mutation::WaitForEnded));
        let found = run(seed, false).is_err();
        plant(None);
        assert!(found, "schedule {seed} does not show it any more");
    }
    // A parent that stood still for as long as two dials take, while the server did, too: its link is rightly dead.
    for seed in [63_612, 69_328] {
        assert_eq!(run(seed, false), Ok(()), "schedule {seed}");
    }
    // A node left by plan while two below it had died unnoticed, and its parent did not hold what those behind them wanted
    // (42,279; 71,593); a slow node waited for a stuck one below it, which waited for its turn to be removed.
    for seed in [42_279, 69_123, 71_593, 86_566] {
        assert_eq!(run(seed, false), Ok(()), "schedule {seed}");
    }
}

#[test]
fn every_planted_bug_is_found() {
    const MOST: u64 = 10_000;
    let mut missed = Vec::new();
    std::panic::set_hook(Box::new(|_| {}));
    let first = std::env::var("KA_SIM_MUTATION").ok();
    for mutation in
        ALL.into_iter().skip_while(|m| first.as_ref().is_some_and(|name| format!("{m:?}") != *name))
    {
        plant(Some(mutation));
        let found = (0..MOST).find_map(|seed| run(seed, false).err().map(|text| (seed, text)));
        plant(None);
        match found {
            Some((seed, text)) => println!("{mutation:?}: schedule {}: {text}", seed + 1),
            None => missed.push(mutation),
        }
    }
    drop(std::panic::take_hook());
    assert!(missed.is_empty(), "not found: {missed:?}");
}
