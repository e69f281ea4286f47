//! `cargo xtask test`: unit, property and integration tests, then the whole path in virtual machines. One line a test,
//! and a closing line that counts them.

mod programs;
mod second;
mod unit;
mod wrong;

use crate::binaries::{self, Binaries};
use crate::golden::Golden;
use crate::lab::accel;
use crate::lab::vm::Accel;
use crate::{demo, golden, interrupt, matrix, node, run, say, server, setup};
use anyhow::{Context, Result, bail};
use ka_cli::units::show_time;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The tests that need virtual machines.
const MACHINE_TESTS: [&str; 4] = ["three-boards", "second-generation", "wrong-inputs", "matrix"];
/// The rows of the matrix that are run here: the newest guest. Stacks of volumes take three times as long.
const MATRIX_ROWS: [&str; 1] = ["plain-13"];

/// Bytes that builds and virtual disks take.
const ROOM: u64 = 12 << 30;

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Well.
    pub passed: usize,
    /// Badly.
    pub failed: usize,
    /// Not run, with the reason printed.
    pub skipped: usize,
}

impl Tally {
    /// Counts another tally in.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Runs one test and says how it ended.
    ///
    /// # Errors
    /// Only when we are interrupted.
    pub fn test(&mut self, name: &str, test: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = Instant::now();
        let result = test();
        interrupt::check()?;
        match result {
            Ok(()) => {
                self.passed += 1;
                say!("test", "PASSED {name} ({})", show_time(start.elapsed()));
            }
            Err(e) => {
                self.failed += 1;
                say!("test", "FAILED {name} ({}): {e:#}", show_time(start.elapsed()));
            }
        }
        Ok(())
    }
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Leave the virtual machines out.
    pub quick: bool,
    /// Play [`unit::NIGHTLY_SCHEDULES`] in the simulator of the chain, in place of its own 2,000.
    pub nightly: bool,
    /// Only these of [`MACHINE_TESTS`], without anything else.
    pub only: Vec<String>,
    /// The disk of an earlier run's first generation, to try the second alone.
    pub first: Option<PathBuf>,
}

/// Runs the tests in `dir`; whether all passed.
///
/// # Errors
/// When the tests cannot be run at all.
pub fn run(options: &Options, dir: &Path) -> Result<bool> {
    let start = Instant::now();
    if let Some(odd) = options.only.iter().find(|name| !MACHINE_TESTS.contains(&name.as_str())) {
        bail!("there is no test `{odd}`; those with machines are {}", MACHINE_TESTS.join(", "));
    }
    say!("test", "logs are kept in {}", dir.display());
    let scope = if options.quick { setup::Scope::Tests } else { setup::Scope::Lab };
    setup::ensure(scope, &dir.join("setup.log"))?;
    setup::room(dir, ROOM)?;
    let mut tally = Tally::default();
    if options.only.is_empty() {
        let golden = match options.quick {
            true => None,
            false => Some(golden::get(&dir.join("golden.log"))?),
        };
        let tree = golden.as_ref().map(|golden| golden.tree.as_path());
        tally.add(unit::run(tree, options.nightly, &dir.join("cargo-test.log"))?);
        tally.test("release-agent", || binaries::build_agent(&dir.join("release.log")).map(drop))?;
    }
    if options.quick {
        for name in MACHINE_TESTS {
            say!("test", "SKIPPED {name}: virtual machines are left out (--quick)");
            tally.skipped += 1;
        }
    } else {
        machines(options, dir, &mut tally)?;
    }
    println!(
        "{} passed, {} failed, {} skipped in {}",
        tally.passed,
        tally.failed,
        tally.skipped,
        show_time(start.elapsed())
    );
    Ok(tally.failed == 0)
}

/// Everything that the tests in virtual machines share.
#[derive(Debug)]
pub struct Lab {
    /// Ka's programs.
    pub binaries: Binaries,
    /// A golden tree that has Ka's programs in `/usr/local`.
    pub tree: PathBuf,
    /// What `ka-image` made of it.
    pub boot_dir: PathBuf,
    /// How machines are run.
    pub accel: Accel,
    /// The folder of this run.
    pub dir: PathBuf,
}

fn machines(options: &Options, dir: &Path, tally: &mut Tally) -> Result<()> {
    let lab = match prepare(dir) {
        Ok(lab) => lab,
        Err(e) => {
            interrupt::check()?;
            say!("test", "FAILED to prepare the tests in virtual machines: {e:#}");
            tally.failed += MACHINE_TESTS.len();
            return Ok(());
        }
    };
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    if wanted("wrong-inputs") {
        programs::run(&lab, tally)?;
        wrong::run(&lab, tally)?;
    }
    if let Some(first) = &options.first {
        return tally.test("second-generation", || second::run(&lab, first));
    }
    if wanted("three-boards") || wanted("second-generation") {
        let folder = dir.join("three-boards");
        tally.test("three-boards", || {
            let (results, exit) =
                demo::clone_all(&folder, &lab.binaries, &lab.tree, &lab.boot_dir, lab.accel, false)?;
            let reports = demo::summarize(&results);
            if reports.len() != results.len() {
                bail!(
                    "{} of {} clones are not as they must be",
                    results.len() - reports.len(),
                    results.len()
                );
            }
            node::all_different(&reports)?;
            exit
        })?;
        if wanted("second-generation") {
            let first = folder.join("clone-sata.disk0");
            tally.test("second-generation", || second::run(&lab, &first))?;
        }
    }
    if wanted("matrix") {
        tally.test("matrix", || matrix::run_rows(&MATRIX_ROWS, &lab.binaries, &dir.join("matrix")))?;
    }
    Ok(())
}

fn prepare(dir: &Path) -> Result<Lab> {
    let binaries = binaries::build(&dir.join("build.log"))?;
    let golden = golden::get(&dir.join("golden.log"))?;
    let accel = accel::choose(&golden.vmlinuz())?;
    let tree = with_programs(&golden, &binaries, dir)?;
    let boot_dir = dir.join("boot");
    server::build_image(&binaries, &tree, &boot_dir, &dir.join("image.log"))?;
    Ok(Lab { binaries, tree, boot_dir, accel, dir: dir.to_path_buf() })
}

/// A copy of the golden tree with Ka's programs, so that its clones can be golden nodes themselves.
fn with_programs(golden: &Golden, binaries: &Binaries, dir: &Path) -> Result<PathBuf> {
    let tree = dir.join("golden");
    run::logged(
        Command::new("cp").args(["-a", "--sparse=always"]).arg(&golden.tree).arg(&tree),
        &dir.join("golden.log"),
        Duration::from_secs(300),
    )
    .context("copying the golden tree")?;
    for (program, place) in [
        (&binaries.server, "sbin/ka-server"),
        (&binaries.image, "bin/ka-image"),
        (&binaries.agent, "bin/ka-agent"),
    ] {
        let to = tree.join("usr/local").join(place);
        std::fs::copy(program, &to).with_context(|| format!("copying {}", to.display()))?;
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_are_rows_of_the_matrix() {
        for name in MATRIX_ROWS {
            assert!(matrix::names().any(|row| row == name), "{name}");
        }
    }

    #[test]
    fn tests_are_counted() {
        let mut tally = Tally::default();
        tally.test("good", || Ok(())).unwrap();
        tally.test("bad", || bail!("as it must")).unwrap();
        tally.add(Tally { passed: 1, failed: 0, skipped: 2 });
        assert_eq!(tally, Tally { passed: 2, failed: 1, skipped: 2 });
    }
}
