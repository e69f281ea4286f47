//! `cargo test` of the whole workspace, its results counted. A test that could not run prints `SKIPPED: why`; on a machine
//! where it can run (root, tools installed) none may.

use super::Tally;
use crate::binaries;
use crate::run;
use crate::say;
use anyhow::{Context, Result};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Compiling everything on two cores, and running it.
const LIMIT: Duration = Duration::from_secs(2400);

/// Schedules of the chain's simulator in the nightly mode; `ka-chain` itself plays 2,000.
pub const NIGHTLY_SCHEDULES: u32 = 100_000;
/// What they may take in addition; 200 s of CPU time were measured.
const NIGHTLY: Duration = Duration::from_secs(3600);

/// Runs them. Tests that need a Debian system get `tree`; without it they are skipped.
///
/// # Errors
/// When the log cannot be read, or we are interrupted.
pub fn run(tree: Option<&Path>, nightly: bool, log: &Path) -> Result<Tally> {
    say!("test", "cargo test of the whole workspace");
    let mut command = Command::new(binaries::cargo());
    command.current_dir(binaries::workspace()?).args([
        "test",
        "--workspace",
        "--locked",
        "--no-fail-fast",
        "--",
        "--show-output",
    ]);
    if let Some(tree) = tree {
        command.env("KA_DEBIAN_TREE", tree).env("KA_TEST_ROOT", tree);
    }
    let mut limit = LIMIT;
    if nightly {
        say!("test", "{NIGHTLY_SCHEDULES} schedules in the simulator");
        command.env("KA_SIM_SCHEDULES", NIGHTLY_SCHEDULES.to_string());
        limit += NIGHTLY;
    }
    let result = run::logged(&mut command, log, limit);
    crate::interrupt::check()?;
    let text = std::fs::read(log).with_context(|| format!("reading {}", log.display()))?;
    let text = String::from_utf8_lossy(&text);
    let mut tally = count(&text);
    for line in text.lines().filter(|line| is_failure(line) || is_skip(line)) {
        say!("test", "{}", line.trim());
    }
    match result {
        Ok(time) => say!("test", "cargo test: {} passed in {:.0} s", tally.passed, time.as_secs_f64()),
        Err(e) => {
            // Something that failed without being counted: a compilation, a program that crashed.
            tally.failed = tally.failed.max(1);
            say!("test", "FAILED cargo test: {e:#}");
        }
    }
    Ok(tally)
}

fn is_failure(line: &str) -> bool {
    line.starts_with("test ") && line.ends_with("FAILED")
}

/// A test that said so itself, or one that cargo left out; not the helpers that another test starts as programs.
fn is_skip(line: &str) -> bool {
    line.trim_start().starts_with("SKIPPED:")
        || (line.starts_with("test ") && line.contains(" ... ignored") && !line.contains(HELPER))
}

/// The reason that an ignored test gives when it is no test but a program that another test runs.
const HELPER: &str = "ignored, runs in the process that ";

/// Adds the `test result:` lines up. A test that skipped itself has passed for cargo: it is taken out there.
fn count(text: &str) -> Tally {
    let mut tally = Tally::default();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let number = |word: &str| {
                rest.split(['.', ';'])
                    .find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<usize>().ok())
                    .unwrap_or_default()
            };
            tally.add(Tally { passed: number("passed"), failed: number("failed"), skipped: 0 });
        }
    }
    let skips = || text.lines().filter(|line| is_skip(line));
    tally.skipped = skips().count();
    let passed_for_cargo = skips().filter(|line| !line.starts_with("test ")).count();
    tally.passed = tally.passed.saturating_sub(passed_for_cargo);
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up() {
        let text = "running 3 tests\n---- a stdout ----\nSKIPPED: no root\n\n\
                    test b ... ignored, runs in the process that c starts\ntest d ... ignored, slow\n\
                    test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
                    test x ... FAILED\n\
                    test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n";
        assert_eq!(count(text), Tally { passed: 12, failed: 2, skipped: 2 });
    }
}
