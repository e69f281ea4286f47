//! What the archivers took, as JSON and as tables.

use super::tree::{Facts as TreeFacts, Kind};
use super::{Archiver, Work};
use crate::bench::facts::Facts;
use crate::bench::figures::median;
use crate::bench::process::Ended;
use crate::bench::table::{Table, mebibytes, number};
use serde::Serialize;
use std::time::Duration;

/// What one run took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// From the start to the end, the final sync included.
    pub seconds: f64,
    /// User and system time of the programs. What kernel threads do for them is in nobody's.
    pub cpu: f64,
    /// Most memory resident, bytes.
    pub peak: u64,
    /// Inodes that unpacking made.
    pub inodes: Option<u64>,
    /// Whether that is as many as there were.
    pub whole: Option<bool>,
    /// Whether the program said that it succeeded.
    pub success: bool,
}

impl Figures {
    /// Of the programs that ran one after the other.
    #[must_use]
    pub fn of(time: Duration, programs: &[Ended], peak: u64, inodes: Option<u64>) -> Self {
        let cpu: Duration = programs.iter().map(|ended| ended.usage.user + ended.usage.system).sum();
        Self {
            seconds: time.as_secs_f64(),
            cpu: cpu.as_secs_f64(),
            peak,
            inodes,
            whole: None,
            success: programs.iter().all(|ended| ended.status.success()),
        }
    }
}

/// One run.
#[derive(Debug, Serialize)]
pub struct Run {
    pub tree: Kind,
    pub work: Work,
    pub cold: bool,
    pub archiver: Archiver,
    #[serde(flatten)]
    pub figures: Figures,
}

impl Run {
    /// For the terminal.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{} {}: {:.2} s, {:.2} s of CPU, {} MiB{}",
            case(self.tree, self.work, self.cold),
            self.archiver.name(),
            self.figures.seconds,
            self.figures.cpu,
            mebibytes(Some(self.figures.peak)),
            self.trouble()
        )
    }

    fn trouble(&self) -> &'static str {
        match (self.figures.success, self.figures.whole) {
            (false, _) => ", with errors",
            (_, Some(false)) => ", with another number of inodes",
            _ => "",
        }
    }
}

fn case(tree: Kind, work: Work, cold: bool) -> String {
    let work = if work == Work::Pack { "pack" } else { "unpack" };
    format!("{}, {work}, {}", tree.name(), if cold { "cold" } else { "hot" })
}

/// The whole report.
#[derive(Debug, Serialize)]
pub struct Report {
    facts: Facts,
    rounds: usize,
    pub trees: Vec<TreeFacts>,
    pub runs: Vec<Run>,
}

impl Report {
    /// An empty one.
    #[must_use]
    pub fn new(facts: Facts, rounds: usize) -> Self {
        Self { facts, rounds, trees: Vec::new(), runs: Vec::new() }
    }

    /// Whether Ka never failed and never made another number of inodes than there were.
    #[must_use]
    pub fn ka_is_right(&self) -> bool {
        self.runs.iter().filter(|run| run.archiver == Archiver::Ka).all(|run| run.trouble().is_empty())
    }

    fn of(&self, tree: Kind, work: Work, cold: bool, archiver: Archiver) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |run| {
            run.tree == tree && run.work == work && run.cold == cold && run.archiver == archiver
        })
    }

    fn seconds(&self, tree: Kind, work: Work, cold: bool, archiver: Archiver) -> Option<f64> {
        median(&self.of(tree, work, cold, archiver).map(|run| run.figures.seconds).collect::<Vec<_>>())
    }

    /// The report as Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = "# Benchmark of the archive\n\n".to_owned();
        text.push_str(&self.facts.markdown());
        text.push_str(&format!(
            "\nMedians of {} runs; the archivers take turns. Packing: from the host's ext4 to `/dev/zero`. Unpacking: of \
             Ka's stream,\nin a file on the host's ext4, into a fresh ext4 on a loop device in memory, to the end of a \
             sync of it (Ka's own, else\n`sync -f`). Cold: page, dentry and inode caches dropped before. GNU tar with \
             `--xattrs --acls --sparse`, bsdtar with\n`--xattrs --acls`. CPU is what the programs used, without kernel \
             threads.\n\n",
            self.rounds
        ));
        for tree in &self.trees {
            text.push_str(&format!(
                "- {}: {} inodes, {} of content\n",
                tree.kind.name(),
                tree.inodes,
                ka_cli::units::show_size(tree.bytes)
            ));
        }
        text.push('\n');
        let mut table =
            Table::new(&["", "seconds", "of GNU tar's", "CPU seconds", "peak MiB", "runs", "trouble"]);
        for tree in &self.trees {
            for work in [Work::Pack, Work::Unpack] {
                for cold in [false, true] {
                    let yardstick = self.seconds(tree.kind, work, cold, Archiver::Tar);
                    for archiver in Archiver::ALL {
                        let runs: Vec<&Run> = self.of(tree.kind, work, cold, archiver).collect();
                        if runs.is_empty() {
                            continue;
                        }
                        let seconds = self.seconds(tree.kind, work, cold, archiver);
                        let cpu = median(&runs.iter().map(|run| run.figures.cpu).collect::<Vec<_>>());
                        let trouble = runs.iter().filter(|run| !run.trouble().is_empty()).count();
                        table.row([
                            format!("{}, {}", case(tree.kind, work, cold), archiver.name()),
                            number(seconds, 2),
                            number(seconds.zip(yardstick).map(|(own, tar)| own / tar.max(1e-9)), 2),
                            number(cpu, 2),
                            mebibytes(runs.iter().map(|run| run.figures.peak).max()),
                            runs.len().to_string(),
                            if trouble > 0 { format!("{trouble} runs") } else { "-".to_owned() },
                        ]);
                    }
                }
            }
        }
        text.push_str(&table.render());
        text.push_str(
            "\nTrouble: the program said that it failed (bsdtar does so over names that are no UTF-8), or unpacking made \
             another\nnumber of inodes than the tree has.\n",
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(archiver: Archiver, seconds: f64, success: bool, whole: Option<bool>) -> Run {
        let figures = Figures { seconds, cpu: 1.0, peak: 3 << 20, inodes: None, whole, success };
        Run { tree: Kind::Debian, work: Work::Unpack, cold: true, archiver, figures }
    }

    #[test]
    fn the_report_compares_with_gnu_tar_and_counts_trouble() {
        let mut report = Report::new(crate::bench::report::tests::facts(), 3);
        report.trees.push(TreeFacts { kind: Kind::Debian, inodes: 5, bytes: 1 << 20 });
        for seconds in [1.0, 9.0, 1.5] {
            report.runs.push(run(Archiver::Ka, seconds, true, Some(true)));
            report.runs.push(run(Archiver::Tar, 2.0 * seconds, true, Some(true)));
        }
        let text = report.markdown();
        let row = text.lines().find(|line| line.starts_with("| debian, unpack, cold, ka ")).unwrap();
        assert!(row.contains(" 1.50 ") && row.contains(" 0.50 ") && row.contains(" 3 "), "{text}");
        assert!(report.ka_is_right());
        report.runs.push(run(Archiver::Bsdtar, 1.0, false, None));
        assert!(report.ka_is_right() && report.markdown().contains("1 runs"));
        report.runs.push(run(Archiver::Ka, 1.0, true, Some(false)));
        assert!(!report.ka_is_right());
    }
}
