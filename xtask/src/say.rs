//! What the person in front of the terminal sees: one line an event, each with the time since the start.

use std::sync::OnceLock;
use std::time::Instant;

static START: OnceLock<Instant> = OnceLock::new();

/// The moment at which the program started (or first asked).
pub fn start() -> Instant {
    *START.get_or_init(Instant::now)
}

/// Prints a line with the time since [`start`].
pub fn line(who: &str, text: &str) {
    println!("[{:6.1}] {who:<8} {text}", start().elapsed().as_secs_f64());
}

/// `say!("who", "format {}", args)` prints a line with the time since the start.
#[macro_export]
macro_rules! say {
    ($who:expr, $($arg:tt)*) => { $crate::say::line($who, &format!($($arg)*)) };
}
