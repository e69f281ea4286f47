//! `cargo xtask lab matrix`: guests, firmware, disks, layouts and file systems in every combination that matters. Each row is a
//! whole deployment: a bare machine is installed by PXE, boots its clone, and is compared there with the manifest of what
//! was sent. Rows of one series run one after the other on the same machine, so that a row can find what another has left.

mod life;
mod report;
mod rows;
mod shape;

use crate::bench::facts;
use crate::binaries::{self, Binaries};
use crate::golden::{self, Golden, Guest};
use crate::lab::accel;
use crate::lab::vm::{self, Accel};
use crate::{interrupt, run, say, server, setup};
use anyhow::{Context, Result, bail};
use argh::FromArgs;
use ka_cli::units::show_time;
use life::{Seen, Setting};
use report::Outcome;
use rows::{Layout, Row, SERIES, Series};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

/// Installs, boots and compares clones of many kinds of guests, machines and
/// layouts.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "matrix")]
pub struct Matrix {
    /// only this row, and those before it on whose disks it builds (repeatable)
    #[argh(option, arg_name = "NAME")]
    row: Vec<String>,
    /// machines at once (default 2)
    #[argh(option, default = "2", arg_name = "N")]
    jobs: usize,
    /// write the table here, too; what stands there of rows that did not run stays
    #[argh(option, arg_name = "FILE")]
    table: Option<PathBuf>,
    /// only list the rows
    #[argh(switch)]
    list: bool,
}

/// Bytes that builds and virtual disks take; those of a row that passed are removed.
const ROOM: u64 = 12 << 30;

/// Runs the matrix; whether every row passed.
///
/// # Errors
/// When it cannot be run at all.
pub fn run(matrix: &Matrix, dir: &Path) -> Result<bool> {
    let all = chosen(&matrix.row)?;
    if matrix.list {
        for (series, row) in all.iter().flat_map(|series| series.rows.iter().map(move |row| (series, row))) {
            println!("{:<14} {:<10} {:<16} {}", row.name, row.guest.name, series.board.name(), row.about);
        }
        return Ok(true);
    }
    let start = Instant::now();
    say!("matrix", "logs are kept in {}", dir.display());
    setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
    setup::room(dir, ROOM)?;
    let binaries = binaries::build(&dir.join("build.log"))?;
    // Before the hour in which the tree may go on.
    let version = facts::ka_version(&binaries.server)?;
    let outcomes = run_all(&all, &binaries, dir, matrix.jobs)?;
    let when = format!("{}, {version}", run::output("date", &["-u", "+%F"])?);
    let table = report::table(&outcomes, dir, &when);
    print!("{table}");
    let passed = outcomes.iter().filter(|outcome| outcome.result.is_ok()).count();
    say!("matrix", "{passed} of {} rows passed in {}", outcomes.len(), show_time(start.elapsed()));
    if let Some(path) = &matrix.table {
        report::keep(path, &table)?;
    }
    Ok(outcomes.iter().all(|outcome| outcome.result.is_ok()))
}

/// The series, cut behind the last row that is wanted; all of them when nothing is named.
fn chosen(names: &[String]) -> Result<Vec<Series>> {
    if let Some(odd) = names.iter().find(|name| !self::names().any(|row| row == name.as_str())) {
        bail!("there is no row `{odd}`; see `cargo xtask lab matrix --list`");
    }
    if names.is_empty() {
        return Ok(SERIES.to_vec());
    }
    let cut = |series: &Series| {
        let last = series.rows.iter().rposition(|row| names.iter().any(|name| name == row.name))?;
        // What the wanted row does not build on need not be run.
        let first = (0..=last)
            .rev()
            .find(|&i| series.rows[i].disks.is_some() && series.rows[i].layout != Layout::Captured)?;
        Some(Series { board: series.board, rows: &series.rows[first..=last] })
    };
    Ok(SERIES.iter().filter_map(cut).collect())
}

/// The names of all rows.
pub fn names() -> impl Iterator<Item = &'static str> {
    SERIES.iter().flat_map(|series| series.rows).map(|row| row.name)
}

/// The same for tests: the rows `names`, whose programs are built already.
///
/// # Errors
/// When one is not as it must be.
pub fn run_rows(names: &[&str], binaries: &Binaries, dir: &Path) -> Result<()> {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let outcomes = run_all(&chosen(&names)?, binaries, dir, 2)?;
    let failed: Vec<&str> = outcomes.iter().filter(|o| o.result.is_err()).map(|o| o.row.name).collect();
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("of {} rows these failed: {}", outcomes.len(), failed.join(", "))
    }
}

/// A guest, ready to be cloned.
struct Prepared {
    guest: Guest,
    golden: Golden,
    boot_dir: PathBuf,
}

fn prepare(guest: Guest, binaries: &Binaries, dir: &Path) -> Result<Prepared> {
    let name = guest.name.replace(' ', "-").to_lowercase();
    let golden = golden::get_guest(&guest, &dir.join(format!("{name}.golden.log")))?;
    let boot_dir = dir.join(format!("{name}.boot"));
    server::build_image(binaries, &golden.tree, &boot_dir, &dir.join(format!("{name}.image.log")))?;
    Ok(Prepared { guest, golden, boot_dir })
}

fn run_all(all: &[Series], binaries: &Binaries, dir: &Path, jobs: usize) -> Result<Vec<Outcome>> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let mut guests: Vec<Prepared> = Vec::new();
    for row in all.iter().flat_map(|series| series.rows) {
        if guests.iter().all(|prepared| prepared.guest != row.guest) {
            guests.push(prepare(row.guest, binaries, dir)?);
        }
    }
    let Some(first) = guests.first() else { return Ok(Vec::new()) };
    let accel = accel::choose(&first.golden.vmlinuz())?;
    let run = Run { binaries, guests: &guests, accel, dir };
    // The longest series first, so that no machine is idle at the end.
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(all[i].rows.len()));
    order.reverse();
    let queue = Mutex::new(order);
    let done: Mutex<Vec<(usize, Vec<Outcome>)>> = Mutex::new(Vec::new());
    // The lock is held for the taking only.
    let take = || lock(&queue).pop();
    let work = || {
        while let Some(next) = take() {
            let outcomes = run.series(&all[next]);
            lock(&done).push((next, outcomes));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(work);
        }
    });
    interrupt::check()?;
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().flat_map(|(_, outcomes)| outcomes).collect())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Run<'a> {
    binaries: &'a Binaries,
    guests: &'a [Prepared],
    accel: Accel,
    dir: &'a Path,
}

impl Run<'_> {
    /// All rows of a series. After a failure, those that build on it fail for that reason.
    fn series(&self, series: &Series) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let mut disks: Result<Vec<PathBuf>> = Ok(Vec::new());
        let mut captured = None;
        for (i, row) in series.rows.iter().enumerate() {
            let start = Instant::now();
            let next = series.rows.get(i + 1);
            if let Some(sizes) = row.disks {
                disks = new_disks(sizes, &self.dir.join(row.name));
            }
            let result = match (&disks, interrupt::check()) {
                (_, Err(e)) => Err(e),
                (Err(e), _) => Err(anyhow::anyhow!("{e:#}")),
                (Ok(disks), Ok(())) => self.row(series, row, disks, captured.as_deref()),
            };
            // What booted has left its disks to the next row, whatever else was wrong.
            let result = match result {
                Ok(seen) => {
                    captured.clone_from(&seen.captured);
                    if next.is_none_or(|next| next.disks.is_some()) {
                        // They are not looked at any more, and the lab's disk is not endless.
                        remove(disks.as_deref().unwrap_or_default());
                    }
                    if seen.wrong.is_empty() {
                        Ok(seen)
                    } else {
                        Err(anyhow::anyhow!("{}", seen.wrong.join("; ")))
                    }
                }
                Err(e) => {
                    disks = Err(anyhow::anyhow!("{} failed, whose disks this builds on", row.name));
                    Err(e)
                }
            };
            match &result {
                Ok(seen) => say!(row.name, "PASSED ({}): {}", show_time(start.elapsed()), seen.verified),
                Err(e) => say!(row.name, "FAILED ({}): {e:#}", show_time(start.elapsed())),
            }
            outcomes.push(Outcome { board: series.board, row: *row, result });
        }
        outcomes
    }

    fn row(&self, series: &Series, row: &Row, disks: &[PathBuf], captured: Option<&Path>) -> Result<Seen> {
        let prepared =
            self.guests.iter().find(|p| p.guest == row.guest).context("its golden machine was not made")?;
        let dir = self.dir.join(row.name);
        say!(row.name, "{} on {}: {}", row.guest.name, series.board.name(), row.about);
        let setting = Setting {
            binaries: self.binaries,
            golden: &prepared.golden,
            boot_dir: &prepared.boot_dir,
            accel: self.accel,
            dir: &dir,
            board: series.board,
            disks,
            captured,
        };
        life::live(row, &setting)
    }
}

fn new_disks(sizes: &[u64], dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let mut disks = Vec::new();
    for (i, size) in sizes.iter().enumerate() {
        let path = dir.join(format!("disk{i}"));
        vm::empty_disk(&path, *size)?;
        disks.push(path);
    }
    Ok(disks)
}

fn remove(disks: &[PathBuf]) {
    for disk in disks {
        if let Err(e) = std::fs::remove_file(disk) {
            say!("matrix", "cannot remove {}: {e}", disk.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_brings_what_it_builds_on() {
        let names = |wanted: &[&str]| -> Vec<&str> {
            let wanted: Vec<String> = wanted.iter().map(|&name| name.to_owned()).collect();
            chosen(&wanted).unwrap().iter().flat_map(|series| series.rows).map(|row| row.name).collect()
        };
        assert_eq!(names(&["preserve"]), ["mbr-logical", "preserve"]);
        assert_eq!(names(&["smaller"]), ["big", "smaller"]);
        assert_eq!(names(&["mbr-logical", "plain-13"]), ["mbr-logical", "plain-13"]);
        assert_eq!(names(&[]).len(), super::names().count());
        assert!(chosen(&["nobody".to_owned()]).is_err());
    }
}
