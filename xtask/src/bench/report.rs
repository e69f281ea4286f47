//! The report of `bench chain`: JSON with every run, Markdown with the medians and what follows from them.

use crate::bench::contender::Contender;
use crate::bench::facts::Facts;
use crate::bench::figures::Figures;
use crate::bench::table::{Table, mebibytes, number, percent};
use crate::bench::write_both;
use anyhow::Result;
use serde::{Serialize, Serializer};
use std::path::Path;

/// One run.
#[derive(Debug, Serialize)]
pub struct Run {
    /// What was measured, if it ended well.
    pub figures: Option<Figures>,
    /// Whether the machine was too busy for it to count.
    pub void: bool,
    /// Why it failed.
    pub error: Option<String>,
}

/// A contender in a case.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Who.
    #[serde(serialize_with = "name")]
    pub contender: Contender,
    /// Every run.
    pub runs: Vec<Run>,
    /// Of those that count.
    pub median: Option<Figures>,
}

fn name<S: Serializer>(contender: &Contender, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(contender.name())
}

/// A case: links, stream, receivers.
#[derive(Debug, Serialize)]
pub struct Case {
    /// The kind.
    pub family: &'static str,
    /// How many receive.
    pub receivers: usize,
    /// Of each link; none is unshaped.
    pub megabits: Option<u32>,
    /// Of the stream.
    pub bytes: u64,
    /// Who took part.
    pub entries: Vec<Entry>,
}

impl Case {
    fn median(&self, contender: Contender) -> Option<&Figures> {
        self.entries.iter().find(|entry| entry.contender == contender)?.median.as_ref()
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&[
            "",
            "MB/s at the slowest",
            "of one TCP stream",
            "CPU-s/GB, machine",
            "x relay",
            "CPU-s/GB, processes",
            "idle",
            "busy before",
            "peak RSS of a node, MiB",
            "of the head",
            "runs",
        ]);
        let tcp = self.median(Contender::Tcp).map(|f| f.mb_per_s);
        let relay = self.median(Contender::Relay).map(|f| f.cpu_machine);
        for entry in &self.entries {
            let median = entry.median.as_ref();
            table.row([
                entry.contender.name().to_owned(),
                number(median.map(|f| f.mb_per_s), 1),
                percent(ratio(median.map(|f| f.mb_per_s), tcp)),
                number(median.map(|f| f.cpu_machine), 2),
                number(ratio(median.map(|f| f.cpu_machine), relay), 2),
                number(median.map(|f| f.cpu_processes), 2),
                percent(median.map(|f| f.idle)),
                percent(median.map(|f| f.baseline)),
                mebibytes(median.map(|f| f.peak_node)),
                mebibytes(median.map(|f| f.peak_head)),
                entry.runs_text(),
            ]);
        }
        table
    }
}

impl Entry {
    fn runs_text(&self) -> String {
        let count = |wanted: fn(&Run) -> bool| self.runs.iter().filter(|run| wanted(run)).count();
        let (void, failed) = (count(|run| run.void), count(|run| run.error.is_some()));
        let mut text = (self.runs.len() - void - failed).to_string();
        if void > 0 {
            text.push_str(&format!(", {void} void"));
        }
        if failed > 0 {
            text.push_str(&format!(", {failed} failed"));
        }
        text
    }
}

fn ratio(value: Option<f64>, to: Option<f64>) -> Option<f64> {
    let to = to.filter(|to| *to > 0.0)?;
    Some(value? / to)
}

/// The whole report.
#[derive(Debug, Serialize)]
pub struct Report {
    /// How it came to be.
    #[serde(flatten)]
    pub facts: Facts,
    /// How the stream enters and leaves Ka.
    pub ka: String,
    /// All cases that were run.
    pub cases: Vec<Case>,
}

impl Report {
    /// An empty one.
    #[must_use]
    pub fn new(facts: Facts, ka: String) -> Self {
        Self { facts, ka, cases: Vec::new() }
    }

    /// How many runs failed of the contenders that `of` picks.
    #[must_use]
    pub fn failures(&self, of: fn(Contender) -> bool) -> usize {
        let entries = self.cases.iter().flat_map(|case| &case.entries).filter(|e| of(e.contender));
        entries.flat_map(|entry| &entry.runs).filter(|run| run.error.is_some()).count()
    }

    /// Medians and what follows from them.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = "# Benchmark of the chain\n\n".to_owned();
        text.push_str(&self.facts.markdown());
        text.push_str(&format!(
            "\nEach node is a network namespace of its own, on one machine. All contenders read the stream from a file in \
             memory on the\nstandard input of their head (`< FILE`; for a Debian root Ka reads the tree itself) and drop \
             it at every receiver.\nKa verifies it first; {}. The rounds are interleaved; medians. MB/s is the stream's \
             length by the time from the\nfirst byte read to the end of the last receiver. CPU is per GB received, over \
             all nodes: the machine's busy time\nbeyond its idle baseline, and the sum over the processes. A shaped run \
             with less than 10 % idle is void.\n",
            self.ka
        ));
        for case in &self.cases {
            let links = case.megabits.map_or("unshaped".to_owned(), |m| format!("{m} Mbit/s per link"));
            text.push_str(&format!(
                "\n## {}: {} receivers, {links}, {}\n\n{}",
                case.family,
                case.receivers,
                ka_cli::units::show_size(case.bytes),
                case.table().render()
            ));
        }
        text.push_str(&self.growth());
        text.push_str("\n## Contenders\n\n");
        for contender in Contender::ALL {
            text.push_str(&format!("- {}: {}\n", contender.name(), contender.about()));
        }
        text
    }

    /// How much longer the longest chain takes than one node, where both were run on the same shaped link.
    fn growth(&self) -> String {
        let mut text = String::new();
        for one in self.cases.iter().filter(|case| case.receivers == 1 && case.megabits.is_some()) {
            let same = self.cases.iter().filter(|case| case.family == one.family && case.receivers > 1);
            let Some(many) = same.max_by_key(|case| case.receivers) else { continue };
            let mut table = Table::new(&["", &format!("T({})/T(1)", many.receivers)]);
            for entry in many.entries.iter().filter(|entry| entry.contender != Contender::Tcp) {
                let seconds = |case: &Case| case.median(entry.contender).map(|f| f.seconds);
                table.row([entry.contender.name().to_owned(), number(ratio(seconds(many), seconds(one)), 3)]);
            }
            text.push_str(&format!("\n## {}: what more nodes cost\n\n{}", one.family, table.render()));
        }
        text
    }

    /// Writes `bench-chain.json` and `bench-chain.md` into `dir`.
    ///
    /// # Errors
    /// When that fails.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_both(dir, "bench-chain", self, &self.markdown())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn facts() -> Facts {
        Facts {
            command: "cargo xtask bench".to_owned(),
            date: "today".to_owned(),
            kernel: "6".to_owned(),
            cpu: "x".to_owned(),
            cpus: 2,
            memory: 1 << 30,
            socket_buffers: ["1".to_owned(), "1".to_owned()],
            versions: Vec::new(),
        }
    }

    fn entry(contender: Contender, seconds: f64, cpu: f64) -> Entry {
        let figures = Figures {
            seconds,
            mb_per_s: 1000.0 / seconds,
            cpu_machine: cpu,
            cpu_processes: cpu,
            idle: 0.5,
            baseline: 0.0,
            peak_node: 3 << 20,
            peak_head: 4 << 20,
        };
        let run = |figures: Option<Figures>, void| Run {
            error: figures.is_none().then(|| "broke".to_owned()),
            figures,
            void,
        };
        Entry {
            contender,
            runs: vec![run(Some(figures.clone()), false), run(None, false), run(Some(figures.clone()), true)],
            median: Some(figures),
        }
    }

    fn report() -> Report {
        let case = |receivers, ka, relay| Case {
            family: "100m",
            receivers,
            megabits: Some(100),
            bytes: 1_000_000_000,
            entries: vec![
                entry(Contender::Relay, relay, 0.2),
                entry(Contender::Ka, ka, 0.5),
                entry(Contender::Tcp, 10.0, 0.1),
            ],
        };
        Report {
            cases: vec![case(1, 10.0, 10.0), case(60, 10.4, 10.1)],
            ..Report::new(facts(), "x".to_owned())
        }
    }

    #[test]
    fn the_report_compares() {
        let text = report().markdown();
        let row = text.lines().filter(|l| l.starts_with("| ka ")).nth(1).unwrap();
        assert!(
            row.contains("96.2 %") && row.contains("2.50") && row.contains("1, 1 void, 1 failed"),
            "{row}"
        );
        assert!(text.contains("T(60)/T(1)") && text.contains("1.040"), "{text}");
        assert_eq!(report().failures(Contender::is_ka), 2);
    }

    #[test]
    fn both_files_are_written() {
        let folder = tempfile::tempdir().unwrap();
        report().write(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("bench-chain.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["cases"][1]["entries"][1]["contender"], "ka");
        assert_eq!(json["cpus"], 2);
        assert!(folder.path().join("bench-chain.md").exists());
    }
}
