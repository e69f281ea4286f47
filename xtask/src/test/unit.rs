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

/// Runs them.
///
/// # Errors
/// When the log cannot be read, or we are interrupted.
pub fn run(log: &Path) -> Result<Tally> {
    say!("test", "cargo test of the whole workspace");
    let result = run::logged(
        Command::new(binaries::cargo()).current_dir(binaries::workspace()?).args([
            "test",
            "--workspace",
            "--locked",
            "--no-fail-fast",
            "--",
            "--show-output",
        ]),
        log,
        LIMIT,
    );
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

fn is_skip(line: &str) -> bool {
    line.trim_start().starts_with("SKIPPED:")
}

/// Adds the `test result:` lines up. A skipped test has passed for cargo: it is taken out there.
fn count(text: &str) -> Tally {
    let mut tally = Tally::default();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let number = |word: &str| {
                rest.split(['.', ';'])
                    .find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<usize>().ok())
                    .unwrap_or_default()
            };
            tally.add(Tally {
                passed: number("passed"),
                failed: number("failed"),
                skipped: number("ignored"),
            });
        }
    }
    let skipped = text.lines().filter(|line| is_skip(line)).count();
    tally.passed = tally.passed.saturating_sub(skipped);
    tally.skipped += skipped;
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up() {
        let text = "running 3 tests\n---- a stdout ----\nSKIPPED: no root\n\n\
                    test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
                    test x ... FAILED\n\
                    test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s\n";
        assert_eq!(count(text), Tally { passed: 12, failed: 2, skipped: 2 });
    }
}
