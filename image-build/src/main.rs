//! `ka-image`: builds what a node boots over the network (kernel, initramfs, boot loaders) from a machine's own packages.

mod boot_files;
mod build;
mod report;
mod trust;

use argh::FromArgs;
use ka_cli::exit::Exit;
use std::process::ExitCode;

/// Builds the kernel, initramfs and boot files that Ka's nodes boot.
#[derive(FromArgs, Debug)]
struct Arguments {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, Debug)]
#[argh(subcommand)]
enum Command {
    Build(build::Build),
}

fn main() -> ExitCode {
    let arguments: Arguments = ka_cli::args::parse("ka-image", env!("CARGO_PKG_VERSION"));
    let Command::Build(command) = arguments.command;
    let result = match command.check() {
        Ok(checked) => build::run(&checked).map_err(|e| (Exit::Failed, e)),
        Err(e) => Err((Exit::Usage, e)),
    };
    match result {
        Ok(()) => Exit::Done.into(),
        Err((exit, error)) => {
            eprintln!("ka-image: {error:#}");
            exit.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    #[test]
    fn help_fits_a_terminal() {
        for words in [&["--help"][..], &["build", "--help"]] {
            let words = words.iter().map(OsString::from);
            let early = ka_cli::args::parse_from::<Arguments>("ka-image", "0", words).unwrap_err();
            assert!(!early.error);
            for line in early.text.lines() {
                assert!(line.len() <= 80, "{} columns: {line}", line.len());
            }
        }
    }
}
