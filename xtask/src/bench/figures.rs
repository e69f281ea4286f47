//! The figures of a benchmark and their arithmetic: from what a run used to rates and costs, from several runs to medians.

use serde::Serialize;
use std::time::Duration;

/// Bytes in a GB and in a MB, as networks count.
const GB: f64 = 1e9;
const MB: f64 = 1e6;

/// What one run was measured to be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// From the first byte read by the head to the end of the last receiver.
    pub seconds: f64,
    /// MB/s at the slowest receiver.
    pub mb_per_s: f64,
    /// The machine's busy seconds beyond its idle baseline, per GB received.
    pub cpu_machine: f64,
    /// User and system seconds of the processes over their whole lives, per GB received.
    pub cpu_processes: f64,
    /// Idle share of the machine, from 0 to 1.
    pub idle: f64,
    /// Busy share of the machine before the run, which the machine's figures leave out.
    pub baseline: f64,
    /// Most memory resident at any receiver, bytes.
    pub peak_node: u64,
    /// The same of the head.
    pub peak_head: u64,
}

/// What was measured of a run.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Bytes of the stream.
    pub bytes: u64,
    /// Who received it.
    pub receivers: usize,
    /// See [`Figures::seconds`].
    pub time: Duration,
    /// The machine's busy seconds beyond its baseline.
    pub machine: f64,
    /// User and system time of the processes.
    pub processes: Duration,
    /// See [`Figures::idle`].
    pub idle: f64,
    /// See [`Figures::baseline`].
    pub baseline: f64,
    /// See [`Figures::peak_node`].
    pub peak_node: u64,
    /// See [`Figures::peak_head`].
    pub peak_head: u64,
}

impl Measured {
    /// Rates and costs.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let bytes = self.bytes as f64;
        let received = bytes * self.receivers as f64 / GB;
        // Without a byte received there is no cost of one.
        let per_gb = |seconds: f64| if received > 0.0 { seconds / received } else { 0.0 };
        let seconds = self.time.as_secs_f64();
        Figures {
            seconds,
            mb_per_s: bytes / MB / seconds.max(1e-9),
            cpu_machine: per_gb(self.machine),
            cpu_processes: per_gb(self.processes.as_secs_f64()),
            idle: self.idle,
            baseline: self.baseline,
            peak_node: self.peak_node,
            peak_head: self.peak_head,
        }
    }
}

/// The middle value; of an even number the mean of the two in the middle. Nothing of nothing.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// Each figure's median by itself; of the memory the most that was seen.
#[must_use]
pub fn medians(runs: &[&Figures]) -> Option<Figures> {
    let of = |figure: fn(&Figures) -> f64| median(&runs.iter().map(|run| figure(run)).collect::<Vec<_>>());
    Some(Figures {
        seconds: of(|f| f.seconds)?,
        mb_per_s: of(|f| f.mb_per_s)?,
        cpu_machine: of(|f| f.cpu_machine)?,
        cpu_processes: of(|f| f.cpu_processes)?,
        idle: of(|f| f.idle)?,
        baseline: of(|f| f.baseline)?,
        peak_node: runs.iter().map(|f| f.peak_node).max()?,
        peak_head: runs.iter().map(|f| f.peak_head).max()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), Some(3.0));
    }

    #[test]
    fn rates_and_costs() {
        let measured = Measured {
            bytes: 2_000_000_000,
            receivers: 4,
            time: Duration::from_secs(10),
            machine: 4.0,
            processes: Duration::from_millis(2400),
            idle: 0.3,
            baseline: 0.0,
            peak_node: 7,
            peak_head: 9,
        };
        let figures = measured.figures();
        assert!((figures.mb_per_s - 200.0).abs() < 1e-9, "{figures:?}");
        assert!((figures.cpu_machine - 0.5).abs() < 1e-9 && (figures.cpu_processes - 0.3).abs() < 1e-9);
        let nothing = Measured { bytes: 0, time: Duration::ZERO, ..measured }.figures();
        assert!(nothing.mb_per_s.is_finite() && nothing.cpu_machine.is_finite());
    }

    #[test]
    fn medians_are_of_each_figure_and_memory_is_the_most() {
        let run = |seconds, idle, peak| Figures {
            seconds,
            mb_per_s: 1.0,
            cpu_machine: 1.0,
            cpu_processes: 1.0,
            idle,
            baseline: 0.0,
            peak_node: peak,
            peak_head: 1,
        };
        let runs = [run(1.0, 0.9, 5), run(2.0, 0.1, 8), run(3.0, 0.5, 2)];
        let medians = medians(&runs.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!((medians.seconds, medians.idle, medians.peak_node), (2.0, 0.5, 8));
        assert_eq!(super::medians(&[]), None);
    }
}
