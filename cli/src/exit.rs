//! The exit codes of every Ka program, in one place.

use std::process::ExitCode;

/// How a Ka program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything was done.
    Done = 0,
    /// The work failed.
    Failed = 1,
    /// The command line or a configuration file is wrong.
    Usage = 2,
    /// Some nodes failed, others are done.
    SomeNodesFailed = 3,
    /// The time given was not enough.
    TimedOut = 4,
    /// Refused, because going on could destroy something.
    Refused = 5,
    /// Two trees were compared and differ.
    Differs = 6,
    /// Interrupted by a signal.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    /// The number that the shell sees.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}
