//! What every Ka command line shares: argh with the habits that people expect (`--name=value`, `-h`, `--version`, usage
//! errors that exit 2, help on standard output), the exit codes, and sizes and times as people write them.

pub mod args;
pub mod exit;
pub mod units;
