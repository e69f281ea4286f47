//! `cargo xtask bench archive`: Ka's archive code beside GNU tar and bsdtar, packing and unpacking the same trees in one
//! run. Streams go to `/dev/zero`, which takes all and keeps nothing (GNU tar knows `/dev/null` and does not even read
//! files for it). Trees are unpacked into a fresh ext4 on a loop device in memory: a disk of its own would measure the disk,
//! and a file system in which trees were removed lately makes new inodes slowly. Each unpacking ends with a sync of it.

mod contender;
mod report;
mod tree;

use crate::bench::machine;
use crate::bench::process::{Ended, Output, Process};
use crate::{interrupt, say};
use anyhow::{Context, Result, bail};
pub use contender::Archiver;
use report::{Figures, Report, Run};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
pub use tree::Kind;
use tree::{Target, Tree};

/// What one run may take.
const LIMIT: Duration = Duration::from_secs(1800);
/// How often a running program's memory is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// What is to be run.
#[derive(Debug)]
pub struct Options {
    /// The archivers; all when empty.
    pub only: Vec<Archiver>,
    /// The trees; all when empty.
    pub trees: Vec<Kind>,
    /// Runs of each, after one that is not counted.
    pub rounds: usize,
    /// Files in the tree of small ones.
    pub files: u64,
    /// Bytes in the tree of large ones.
    pub large: u64,
    /// Where the report goes.
    pub output: PathBuf,
}

/// What is done with a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Work {
    Pack,
    Unpack,
}

/// Measures, and writes the report; whether every run of Ka ended well and restored as many inodes as there were.
///
/// # Errors
/// When something cannot be run at all.
pub fn run(options: &Options, program: &Path, facts: super::facts::Facts, dir: &Path) -> Result<bool> {
    let all = |only: &[Archiver]| if only.is_empty() { Archiver::ALL.to_vec() } else { only.to_vec() };
    let kinds = if options.trees.is_empty() { Kind::ALL.to_vec() } else { options.trees.clone() };
    let bench = Bench { program, log: dir.join("archivers.log") };
    let mut report = Report::new(facts, options.rounds);
    for kind in kinds {
        let tree = Tree::make(kind, options, dir)?;
        report.trees.push(tree.facts());
        let stream = dir.join("stream.tar");
        bench.stream(&tree, &stream)?;
        for cold in [false, true] {
            for round in 0..=options.rounds {
                for archiver in all(&options.only) {
                    for work in [Work::Pack, Work::Unpack] {
                        interrupt::check()?;
                        // What is cold has nothing to warm up.
                        if cold && round == 0 {
                            continue;
                        }
                        let figures = bench.one(archiver, work, cold, &tree, &stream)?;
                        if round > 0 {
                            let run = Run { tree: kind, work, cold, archiver, figures };
                            say!("bench", "{}", run.line());
                            report.runs.push(run);
                        }
                    }
                }
            }
        }
        std::fs::remove_file(&stream).with_context(|| format!("removing {}", stream.display()))?;
    }
    super::write_both(&options.output, "bench-archive", &report, &report.markdown())?;
    println!("{}", report.markdown());
    Ok(report.ka_is_right())
}

struct Bench<'a> {
    program: &'a Path,
    log: PathBuf,
}

impl Bench<'_> {
    /// The stream that everybody unpacks: Ka's.
    fn stream(&self, tree: &Tree, stream: &Path) -> Result<()> {
        let words = Archiver::Ka.pack(self.program, tree.root(), stream);
        let (ended, _) = self.run(&words)?;
        if !ended.status.success() {
            bail!("packing {} ended with {}", tree.root().display(), ended.status);
        }
        Ok(())
    }

    fn one(&self, archiver: Archiver, work: Work, cold: bool, tree: &Tree, stream: &Path) -> Result<Figures> {
        match work {
            Work::Pack => {
                temper(cold)?;
                let start = Instant::now();
                let (ended, peak) =
                    self.run(&archiver.pack(self.program, tree.root(), Path::new("/dev/zero")))?;
                Ok(Figures::of(ended.at.duration_since(start), &[ended], peak, None))
            }
            Work::Unpack => {
                let target = Target::make(tree, &self.log)?;
                temper(cold)?;
                let start = Instant::now();
                let (ended, peak) = self.run(&archiver.unpack(self.program, stream, &target.path()))?;
                let mut parts = vec![ended];
                if !archiver.syncs() {
                    let words = ["sync".into(), "-f".into(), target.path().into()];
                    parts.push(self.run(&words)?.0);
                }
                let end = parts[parts.len() - 1].at;
                let inodes = target.inodes()?;
                let mut figures = Figures::of(end.duration_since(start), &parts, peak, Some(inodes));
                figures.whole = Some(inodes == tree.inodes());
                Ok(figures)
            }
        }
    }

    /// Runs a program to its end; the most memory that it was seen to have.
    fn run(&self, words: &[OsString]) -> Result<(Ended, u64)> {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).env("LC_ALL", "C.UTF-8");
        let what = words[0].to_string_lossy().into_owned();
        let process = Process::start(&what, &mut command, Stdio::null(), Output::Kept, &self.log)?;
        let (start, mut peak) = (Instant::now(), 0);
        loop {
            peak = machine::peak_memory(process.pid()).unwrap_or(0).max(peak);
            if let Some(ended) = process.ended() {
                return Ok((ended, peak));
            }
            interrupt::check()?;
            if start.elapsed() > LIMIT {
                bail!("{what} does not end{}", process.tail());
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// Empties the caches, or leaves them as the run before has filled them; what is unwritten is written first.
fn temper(cold: bool) -> Result<()> {
    if cold {
        rustix::fs::sync();
        let path = "/proc/sys/vm/drop_caches";
        std::fs::write(path, "3").with_context(|| format!("writing {path}"))?;
    }
    Ok(())
}
