//! `ka-verify`: whether this machine, or a clone that is mounted here, is what was sent; see `verify_command`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args = ka_cli::args::parse("ka-verify", env!("CARGO_PKG_VERSION"));
    let result = ka_agent::verify_command::run(&args);
    result
        .unwrap_or_else(|e| {
            eprintln!("ka-verify: {e:#}");
            ka_cli::exit::Exit::Failed
        })
        .into()
}
