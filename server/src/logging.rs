//! The server's own log: lines on standard error, at the level of `KA_LOG` (error, warn, info, debug).

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        // Libraries below ours talk too much.
        if record.target().starts_with("ka_") || record.level() <= log::Level::Warn {
            eprintln!("        {}: {}", record.level().as_str().to_ascii_lowercase(), record.args());
        }
    }

    fn flush(&self) {}
}

/// Starts logging.
pub fn start() {
    let level = std::env::var("KA_LOG").ok().and_then(|l| l.parse().ok()).unwrap_or(LevelFilter::Info);
    // It can only be set once, and is: by `main`.
    let _ = log::set_logger(&Stderr);
    log::set_max_level(level);
}
