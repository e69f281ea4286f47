//! What the kernel tells about the machine and its processes: processor time, memory, who listens where. The parsers take
//! text; the readers below them read `/proc`.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::ops::Sub;
use std::time::Duration;

/// Processor time of the whole machine, summed over its processors, in ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ticks {
    /// Time in which a processor worked for somebody here: user, nice, system, interrupts.
    pub busy: u64,
    /// Time in which it had nothing to do, waiting for disks included.
    pub idle: u64,
    /// All time; what is neither busy nor idle was taken by other guests of the host.
    pub total: u64,
}

impl Sub for Ticks {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            busy: self.busy.saturating_sub(earlier.busy),
            idle: self.idle.saturating_sub(earlier.idle),
            total: self.total.saturating_sub(earlier.total),
        }
    }
}

impl Ticks {
    /// The idle share, from 0 to 1; 1 when no time has passed.
    #[must_use]
    pub fn idle_share(self) -> f64 {
        if self.total == 0 { 1.0 } else { self.idle as f64 / self.total as f64 }
    }

    /// The busy share of the time, from 0 to 1.
    #[must_use]
    pub fn busy_share(self) -> f64 {
        if self.total == 0 { 0.0 } else { self.busy as f64 / self.total as f64 }
    }

    /// Busy seconds beyond those of a machine that does `baseline` (a busy share) without the benchmark.
    #[must_use]
    pub fn busy_seconds_beyond(self, baseline: f64, ticks_per_second: u64) -> f64 {
        let own = self.busy as f64 - baseline * self.total as f64;
        own.max(0.0) / ticks_per_second.max(1) as f64
    }
}

/// The first line of `/proc/stat`.
///
/// # Errors
/// When it is not of the known form.
pub fn parse_ticks(stat: &str) -> Result<Ticks> {
    let line = stat.lines().find(|line| line.starts_with("cpu ")).context("/proc/stat has no line `cpu`")?;
    let numbers: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()
        .with_context(|| format!("/proc/stat: `{line}`"))?;
    // user nice system idle iowait irq softirq steal; guest times after these are in user and nice already.
    let [user, nice, system, idle, iowait, irq, softirq, rest @ ..] = numbers.as_slice() else {
        anyhow::bail!("/proc/stat: `{line}` is too short");
    };
    let busy = user + nice + system + irq + softirq;
    let idle = idle + iowait;
    Ok(Ticks { busy, idle, total: busy + idle + rest.first().unwrap_or(&0) })
}

/// The machine's processor time so far.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub fn ticks() -> Result<Ticks> {
    parse_ticks(&std::fs::read_to_string("/proc/stat").context("reading /proc/stat")?)
}

/// The busy share while nothing of ours runs, watched for `time`.
///
/// # Errors
/// As [`ticks`].
pub fn baseline(time: Duration) -> Result<f64> {
    let before = ticks()?;
    std::thread::sleep(time);
    Ok((ticks()? - before).busy_share())
}

/// A line `NAME: VALUE` of a file like `/proc/meminfo`, `/proc/PID/status`, `/proc/cpuinfo`.
#[must_use]
pub fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim_end() == name).then_some(value.trim())
    })
}

/// A field in kB, in bytes.
#[must_use]
pub fn kilobytes(text: &str, name: &str) -> Option<u64> {
    field(text, name)?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The most memory that a process had resident so far (`VmHWM`), in bytes; nothing when it is gone.
#[must_use]
pub fn peak_memory(pid: u32) -> Option<u64> {
    kilobytes(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmHWM")
}

/// Process group of a line of `/proc/PID/stat`. The program's name may hold spaces and parentheses.
#[must_use]
pub fn process_group(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(2)?.parse().ok()
}

/// Every process by its process group.
#[must_use]
pub fn groups() -> BTreeMap<u32, Vec<u32>> {
    let mut groups: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return groups };
    for pid in entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()) {
        // One that ended since the folder was read is in no group any more.
        if let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat"))
            && let Some(group) = process_group(&stat)
        {
            groups.entry(group).or_default().push(pid);
        }
    }
    groups
}

/// Whether a table of `/proc/PID/net/tcp` (or `tcp6`) has a socket that listens on `port`.
#[must_use]
pub fn listens(table: &str, port: u16) -> bool {
    table.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next(), words.nth(1));
        let found = local.and_then(|l| l.rsplit_once(':')).and_then(|(_, p)| u16::from_str_radix(p, 16).ok());
        found == Some(port) && state == Some("0A")
    })
}

/// Whether somebody listens on TCP `port` in the network namespace of process `pid`.
#[must_use]
pub fn listening(pid: u32, port: u16) -> bool {
    ["tcp", "tcp6"].iter().any(|table| {
        std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).is_ok_and(|text| listens(&text, port))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read() {
        let ticks = parse_ticks("cpu  10 1 20 300 40 2 3 24 5 0\ncpu0 1 2 3\nintr 7\n").unwrap();
        assert_eq!(ticks, Ticks { busy: 36, idle: 340, total: 400 });
        // Kernels before 2.6.11 have no steal.
        assert_eq!(parse_ticks("cpu 1 1 1 1 1 1 1\n").unwrap().total, 7);
        for wrong in ["", "cpu0 1 2 3 4 5 6 7 8", "cpu 1 2 x 4 5 6 7", "cpu 1 2 3"] {
            assert!(parse_ticks(wrong).is_err(), "{wrong}");
        }
        assert!(ticks_grow());
    }

    fn ticks_grow() -> bool {
        let before = super::ticks().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        super::ticks().unwrap().total > before.total
    }

    #[test]
    fn shares_and_seconds() {
        let spent = Ticks { busy: 150, idle: 40, total: 200 } - Ticks { busy: 50, idle: 40, total: 0 };
        assert_eq!((spent.idle_share(), spent.busy_share()), (0.0, 0.5));
        // A tenth of 200 ticks would have been busy anyway.
        assert!((spent.busy_seconds_beyond(0.1, 100) - 0.8).abs() < 1e-9);
        assert_eq!(spent.busy_seconds_beyond(0.9, 100).to_bits(), 0.0f64.to_bits());
        assert_eq!((Ticks::default().idle_share(), Ticks::default().busy_share()), (1.0, 0.0));
    }

    #[test]
    fn fields_of_proc_files() {
        let status = "Name:\tcat\nVmHWM:\t    1234 kB\nThreads:\t1\n";
        assert_eq!(kilobytes(status, "VmHWM"), Some(1234 * 1024));
        assert_eq!((kilobytes(status, "VmPeak"), kilobytes(status, "Threads")), (None, None));
        assert_eq!(field("model name\t: Some CPU @ 2 GHz\n", "model name"), Some("Some CPU @ 2 GHz"));
        assert!(peak_memory(std::process::id()).unwrap() > 100_000);
        assert_eq!(peak_memory(u32::MAX), None);
    }

    #[test]
    fn groups_are_found_whatever_the_program_is_called() {
        assert_eq!(process_group("7 (a) b (c) S 1 42 42 0 -1"), Some(42));
        assert_eq!(process_group("7 (a"), None);
        let own = nix::unistd::getpgrp().as_raw();
        assert!(groups()[&u32::try_from(own).unwrap()].contains(&std::process::id()));
    }

    #[test]
    fn listening_sockets_are_found() {
        let table = "  sl  local_address rem_address   st\n   0: 00000000:1B58 00000000:0000 0A 0\n   1: \
                     0100007F:1B59 0100007F:9999 01 0\nrubbish\n";
        assert!(listens(table, 7000) && !listens(table, 7001) && !listens("", 7000));
        let listener =
            std::net::TcpListener::bind("[::1]:0").or_else(|_| std::net::TcpListener::bind("127.0.0.1:0"));
        assert!(listening(std::process::id(), listener.unwrap().local_addr().unwrap().port()));
    }
}
