//! The agent's log: to the kernel's log (/dev/kmsg), to every console that the kernel knows, to memory (the end of it
//! goes into failure reports) and, once the server is reached, to a bounded channel. Consoles are written by a thread of
//! their own: a serial line takes 11 KB/s, and an installation must not wait for it.

use log::{Level, LevelFilter, Log, Metadata, Record};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of log text that are kept in memory.
const KEPT: usize = 128 << 10;
/// Lines that may wait for the consoles.
const CONSOLE_QUEUE: usize = 1024;
/// Bytes of one line; what is longer is cut.
const LINE_LIMIT: usize = 8 << 10;
/// Bytes that the kernel takes in one record (its limit is 1024 with the prefix).
const KMSG_LIMIT: usize = 900;

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Time since the kernel started.
    pub time: Duration,
    /// How grave it is.
    pub level: Level,
    /// The step of the installation during which it was written; empty outside of any.
    pub step: &'static str,
    /// The text, without a newline.
    pub text: String,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = match self.level {
            Level::Error => "ERROR: ",
            Level::Warn => "WARNING: ",
            Level::Info | Level::Debug | Level::Trace => "",
        };
        write!(f, "[{:>9.3}] ", self.time.as_secs_f64())?;
        if self.step.is_empty() {
            write!(f, "{mark}{}", self.text)
        } else {
            write!(f, "{}: {mark}{}", self.step, self.text)
        }
    }
}

#[derive(Default)]
struct State {
    step: &'static str,
    kept: VecDeque<Line>,
    kept_bytes: usize,
    sink: Option<SyncSender<Line>>,
    sink_dropped: u64,
}

#[derive(Default)]
struct Logger {
    state: Mutex<State>,
    kmsg: OnceLock<File>,
    console: OnceLock<SyncSender<String>>,
    console_sent: AtomicU64,
    console_written: AtomicU64,
    console_dropped: AtomicU64,
}

static LOGGER: OnceLock<Logger> = OnceLock::new();

fn logger() -> &'static Logger {
    LOGGER.get_or_init(Logger::default)
}

/// Makes this the program's log, writing to standard error until [`open_consoles`]. Calling it again only sets the level.
pub fn install(level: LevelFilter) {
    if log::set_logger(logger()).is_err() {
        // It is installed already (ours, or a test's); only the level is new.
    }
    log::set_max_level(level);
}

/// From now on writes to the kernel's log and to all consoles: those that are active in the kernel, else `named` ones.
/// Needs /dev, /proc and /sys.
pub fn open_consoles(named: &[String]) {
    let log = logger();
    // By default the kernel throws away what a program writes to kmsg at more than a few lines a second.
    if let Err(e) = std::fs::write("/proc/sys/kernel/printk_devkmsg", "on\n") {
        log::debug!("lifting the limit of /dev/kmsg: {e}");
    }
    match OpenOptions::new().write(true).open("/dev/kmsg") {
        // Set once; a second call keeps the first file.
        Ok(file) => drop(log.kmsg.set(file)),
        Err(e) => log::warn!("opening /dev/kmsg: {e}"),
    }
    let mut files = Vec::new();
    for path in console_paths(named) {
        match OpenOptions::new().write(true).custom_flags(nix::libc::O_NOCTTY).open(&path) {
            Ok(file) => files.push(file),
            Err(e) => log::warn!("opening {path}: {e}"),
        }
    }
    if files.is_empty() || log.console.get().is_some() {
        return;
    }
    let (sender, receiver) = sync_channel(CONSOLE_QUEUE);
    let started = std::thread::Builder::new()
        .name("console".into())
        .spawn(move || write_consoles(&receiver, &mut files, &logger().console_written));
    match started {
        Ok(_) => drop(log.console.set(sender)),
        Err(e) => log::warn!("starting the console thread: {e}"),
    }
}

/// /dev/console is the last active console; the others are written to by name.
fn console_paths(named: &[String]) -> Vec<String> {
    let active = std::fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let mut names: Vec<&str> = active.split_whitespace().collect();
    if names.is_empty() {
        names = named.iter().map(String::as_str).collect();
    }
    names.pop();
    let others = names.iter().filter(|n| **n != "tty").map(|n| format!("/dev/{n}"));
    std::iter::once("/dev/console".to_owned()).chain(others).collect()
}

fn write_consoles(lines: &Receiver<String>, files: &mut Vec<File>, written: &AtomicU64) {
    for line in lines {
        // A console that fails (unplugged) is given up; the kernel's log still has everything.
        files.retain_mut(|file| file.write_all(line.as_bytes()).is_ok());
        written.fetch_add(1, Ordering::Release);
    }
}

/// Names the step of the installation that begins now; every later line carries it.
pub fn set_step(step: &'static str) {
    state().step = step;
}

/// Attaches a reader, in place of an earlier one: it first gets what is kept in memory, then every new line. When
/// `capacity` lines wait, new ones are dropped and counted; the count is told in a line of its own.
#[must_use]
pub fn attach(capacity: usize) -> Receiver<Line> {
    let (sender, receiver) = sync_channel(capacity);
    let mut state = state();
    let skip = state.kept.len().saturating_sub(capacity);
    for line in state.kept.iter().skip(skip) {
        // There is room: no more than `capacity` are sent, and the receiver is ours.
        let _ = sender.try_send(line.clone());
    }
    state.sink = Some(sender);
    state.sink_dropped = skip as u64;
    receiver
}

/// The end of the log: whole lines, at most `bytes` of them.
#[must_use]
pub fn tail(bytes: usize) -> String {
    let lines: Vec<String> = state().kept.iter().map(ToString::to_string).collect();
    let mut size = 0;
    let fits = lines.iter().rev().take_while(|line| {
        size += line.len() + 1;
        size <= bytes
    });
    let count = fits.count();
    lines[lines.len() - count..].join("\n")
}

/// Waits until the consoles have shown everything, at most `limit`. To be called before the machine stops.
pub fn flush(limit: Duration) {
    let log = logger();
    let end = Instant::now() + limit;
    while log.console_written.load(Ordering::Acquire) < log.console_sent.load(Ordering::Acquire)
        && Instant::now() < end
    {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Time since the kernel started.
#[must_use]
pub fn uptime() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or_default(),
        u32::try_from(now.tv_nsec).unwrap_or_default(),
    )
}

fn state() -> MutexGuard<'static, State> {
    // The state is consistent after every statement, so a panic while it was held does no harm.
    logger().state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn keep(&mut self, line: Line) {
        self.kept_bytes += line.text.len();
        self.kept.push_back(line);
        while self.kept_bytes > KEPT || self.kept.len() > KEPT / 32 {
            let Some(oldest) = self.kept.pop_front() else { break };
            self.kept_bytes -= oldest.text.len();
        }
    }

    fn pass_on(&mut self, line: &Line) {
        let Some(sink) = &self.sink else { return };
        if self.sink_dropped > 0 {
            let text = format!(
                "{} log lines were dropped here: they came faster than they could be sent",
                self.sink_dropped
            );
            if sink.try_send(Line { text, level: Level::Warn, ..line.clone() }).is_ok() {
                self.sink_dropped = 0;
            }
        }
        match sink.try_send(line.clone()) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.sink_dropped += 1,
            Err(TrySendError::Disconnected(_)) => self.sink = None,
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        // Libraries speak only when something is wrong: neli traces every byte.
        let ours = metadata.target().starts_with("ka");
        metadata.level() <= if ours { log::max_level() } else { LevelFilter::Warn.min(log::max_level()) }
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut text = record.args().to_string();
        if text.len() > LINE_LIMIT {
            text.truncate(cut(&text, LINE_LIMIT).len());
            text.push_str(" [cut]");
        }
        for part in text.lines().filter(|part| !part.trim().is_empty()) {
            // Control characters from outside (a name on the network) must not reach a terminal.
            let text = part.replace(|c: char| c.is_control() && c != '\t', "?");
            let line = {
                let mut state = state();
                let line = Line { time: uptime(), level: record.level(), step: state.step, text };
                state.keep(line.clone());
                state.pass_on(&line);
                line
            };
            self.write(&line);
        }
    }

    fn flush(&self) {
        flush(Duration::from_secs(2));
    }
}

/// The beginning of `text`, at most `limit` bytes, no character cut in two.
fn cut(text: &str, limit: usize) -> &str {
    let mut end = limit.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Logger {
    fn write(&self, line: &Line) {
        if let Some(mut kmsg) = self.kmsg.get() {
            // Always with priority 7 (debug), so that the kernel does not show on the consoles what we show there.
            let text = line.to_string();
            let text = text.split_once("] ").map_or(text.as_str(), |(_, rest)| rest);
            // The kernel's log is one of several places; where it fails there is nowhere to say so.
            let _ = kmsg.write_all(format!("<15>ka: {}", cut(text, KMSG_LIMIT)).as_bytes());
        }
        match self.console.get() {
            None => eprintln!("{line}"),
            Some(console) => {
                let dropped = self.console_dropped.swap(0, Ordering::Relaxed);
                let note = if dropped > 0 { format!("({dropped} lines not shown)\n") } else { String::new() };
                if console.try_send(format!("{note}{line}\n")).is_ok() {
                    self.console_sent.fetch_add(1, Ordering::Release);
                } else {
                    self.console_dropped.fetch_add(dropped + 1, Ordering::Relaxed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Line {
        Line { time: Duration::from_millis(1234), level: Level::Info, step: "boot", text: text.into() }
    }

    #[test]
    fn lines_show_time_step_and_gravity() {
        assert_eq!(line("hello").to_string(), "[    1.234] boot: hello");
        let bad = Line { level: Level::Error, step: "", ..line("gone") };
        assert_eq!(bad.to_string(), "[    1.234] ERROR: gone");
    }

    #[test]
    fn cutting_leaves_whole_characters() {
        assert_eq!((cut("abc", 5), cut("abc", 2), cut("aé", 2), cut("é", 0)), ("abc", "ab", "a", ""));
    }

    #[test]
    fn memory_is_bounded_and_keeps_the_end() {
        let mut state = State::default();
        for i in 0..100_000 {
            state.keep(line(&format!("line {i} {}", "x".repeat(i % 200))));
        }
        assert!(state.kept_bytes <= KEPT && state.kept.len() <= KEPT / 32);
        assert_eq!(state.kept_bytes, state.kept.iter().map(|l| l.text.len()).sum::<usize>());
        assert!(state.kept.back().unwrap().text.starts_with("line 99999"));
    }

    #[test]
    fn a_full_sink_drops_and_says_how_many() {
        let (sender, receiver) = sync_channel(2);
        let mut state = State { sink: Some(sender), ..State::default() };
        for i in 0..5 {
            state.pass_on(&line(&i.to_string()));
        }
        let texts = || receiver.try_iter().map(|l| l.text).collect::<Vec<_>>();
        assert_eq!(texts(), ["0", "1"]);
        state.pass_on(&line("after"));
        let got = texts();
        assert!(got[0].starts_with("3 log lines were dropped"), "{got:?}");
        assert_eq!(got[1], "after");
        drop(receiver);
        state.pass_on(&line("nobody reads"));
        assert!(state.sink.is_none());
    }

    #[test]
    fn the_log_reaches_memory_and_sink_without_control_characters() {
        install(LevelFilter::Info);
        let before = attach(1000);
        log::warn!("odd\u{1b}[31m name\nsecond line");
        let texts: Vec<_> = before.try_iter().map(|l| l.text).collect();
        assert!(texts.contains(&"odd?[31m name".to_owned()), "{texts:?}");
        assert!(texts.contains(&"second line".to_owned()));
        assert!(tail(10_000).contains("WARNING: odd?[31m name"));
        assert_eq!(tail(5), "");
    }
}
