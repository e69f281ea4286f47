//! `ka-server`: see the library beside this file.

use argh::FromArgs;
use ka_cli::exit::Exit;
use ka_server::{boot, deployment, layout_command, logging, settings, trust, verify_command};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// ka-server runs on the golden node: it feeds the chain that clones this machine onto others.
#[derive(FromArgs)]
struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
#[allow(clippy::large_enum_variant)] // there is one, made once
enum Command {
    Deploy(deployment::command::DeployArgs),
    Boot(boot::command::BootCommand),
    Layout(layout_command::LayoutArgs),
    Go(deployment::go::GoArgs),
    Init(trust::commands::InitArgs),
    Token(trust::commands::TokenArgs),
    Verify(verify_command::VerifyArgs),
}

fn main() -> ExitCode {
    let words = match settings::with_file(std::env::args_os().skip(1).collect()) {
        Ok(words) => words,
        Err(e) => {
            eprintln!("ka-server: {e:#}");
            return if e.is::<settings::Fault>() { Exit::Usage } else { Exit::Failed }.into();
        }
    };
    let args: Args = ka_cli::args::parse_words("ka-server", env!("CARGO_PKG_VERSION"), words.into_iter());
    logging::start();
    if let Err(e) = ka_sys::limits::raise_open_files() {
        log::warn!("raising the limit of open files: {e}");
    }
    let result = match &args.command {
        Command::Deploy(args) => deployment::run(args),
        Command::Boot(args) => ka_sys::signals::termination_flag()
            .map_err(Into::into)
            .and_then(|flag| boot::command::run_boot(args, || flag.load(Ordering::SeqCst))),
        Command::Layout(args) => layout_command::run(args),
        Command::Go(args) => deployment::go::run(args),
        Command::Init(args) => trust::commands::init(args),
        Command::Token(args) => trust::commands::token(args),
        Command::Verify(args) => verify_command::run(args),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(e) => {
            eprintln!("ka-server: {e:#}");
            exit_of(&e).into()
        }
    }
}

/// A layout file or a nodes file that is wrong counts as wrong usage, wherever it was found.
fn exit_of(error: &anyhow::Error) -> Exit {
    let usage = error.is::<ka_layout::parse::ParseError>() || error.is::<ka_server::nodes::Error>();
    if usage { Exit::Usage } else { Exit::Failed }
}
