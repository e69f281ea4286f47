//! `cargo xtask`: the demonstration, the tests, and the virtual lab that they share.

mod bench;
mod binaries;
mod compare;
mod demo;
mod fleet;
mod golden;
mod interrupt;
mod lab;
mod matrix;
mod node;
mod run;
mod say;
mod server;
mod setup;
mod test;

use anyhow::{Context, Result};
use argh::FromArgs;
use ka_cli::exit::Exit;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Shows and tests Ka, on virtual machines where that is needed.
#[derive(FromArgs, Debug)]
struct Args {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, Debug)]
#[argh(subcommand)]
enum Command {
    Bench(bench::Bench),
    Demo(Demo),
    Lab(Lab),
    Test(Test),
}

/// Clones a Debian machine onto three virtual nodes by PXE and checks them.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "demo")]
struct Demo {}

/// Runs all tests, those in virtual machines too.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "test")]
struct Test {
    /// leave the virtual machines out
    #[argh(switch)]
    quick: bool,
    /// 100,000 schedules in the simulator of the chain (normally 2,000)
    #[argh(switch)]
    nightly: bool,
    /// only this test with virtual machines (repeatable): three-boards,
    /// second-generation, wrong-inputs, matrix
    #[argh(option, arg_name = "TEST")]
    only: Vec<String>,
    /// with --only second-generation: the disk of an earlier run's clone-sata,
    /// instead of making it again
    #[argh(option, arg_name = "DISK")]
    first: Option<PathBuf>,
}

/// Parts of the lab by themselves, for trying things by hand.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "lab")]
struct Lab {
    #[argh(subcommand)]
    command: LabCommand,
}

#[derive(FromArgs, Debug)]
#[argh(subcommand)]
enum LabCommand {
    Boot(lab::boot::Boot),
    Golden(LabGolden),
    Login(LabLogin),
    Matrix(matrix::Matrix),
    Setup(LabSetup),
}

/// Makes the golden machine's tree and says where it is.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "golden")]
struct LabGolden {}

/// Boots the golden tree itself, without Ka, to its login prompt: proves the
/// tree and the emulator.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "login")]
struct LabLogin {}

/// Installs what the lab needs.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "setup")]
struct LabSetup {}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let Some(result) = bench::programs::run(&words) {
        return match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("{}: {e:#}", words.join(" "));
                ExitCode::FAILURE
            }
        };
    }
    let args: Args = ka_cli::args::parse("cargo xtask", env!("CARGO_PKG_VERSION"));
    say::start();
    let result = interrupt::install().and_then(|()| run_command(args.command));
    match result {
        Ok(exit) => exit.into(),
        Err(e) => {
            eprintln!("xtask: {e:#}");
            exit_of(&e).into()
        }
    }
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if error.is::<interrupt::Interrupted>() || interrupt::interrupted() {
        Exit::Interrupted
    } else if error.is::<setup::Missing>() {
        Exit::Refused
    } else {
        Exit::Failed
    }
}

fn run_command(command: Command) -> Result<Exit> {
    match command {
        Command::Bench(bench) => Ok(if bench::run(&bench)? { Exit::Done } else { Exit::Failed }),
        Command::Demo(_) => {
            demo::run(&run_dir("demo")?)?;
            Ok(Exit::Done)
        }
        Command::Test(Test { quick, nightly, only, first }) => {
            let options = test::Options { quick, nightly, only, first };
            let passed = test::run(&options, &run_dir("test")?)?;
            Ok(if passed { Exit::Done } else { Exit::Failed })
        }
        Command::Lab(Lab { command: LabCommand::Login(_) }) => {
            lab::login::run(&run_dir("login")?)?;
            Ok(Exit::Done)
        }
        Command::Lab(Lab { command: LabCommand::Boot(boot) }) => {
            lab::boot::run(&boot, &run_dir("boot")?)?;
            Ok(Exit::Done)
        }
        Command::Lab(Lab { command: LabCommand::Matrix(matrix) }) => {
            let passed = matrix::run(&matrix, &run_dir("matrix")?)?;
            Ok(if passed { Exit::Done } else { Exit::Failed })
        }
        Command::Lab(Lab { command: LabCommand::Setup(_) }) => {
            setup::ensure(setup::Scope::Lab, &run_dir("setup")?.join("setup.log"))?;
            Ok(Exit::Done)
        }
        Command::Lab(Lab { command: LabCommand::Golden(_) }) => {
            let dir = run_dir("golden")?;
            setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
            let golden = golden::get(&dir.join("golden.log"))?;
            println!("{}", golden.tree.display());
            Ok(Exit::Done)
        }
    }
}

/// A new folder for the logs and disks of this run, under the target folder.
fn run_dir(kind: &str) -> Result<PathBuf> {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .context("the clock stands before 1970")?
        .as_secs();
    let dir = binaries::target_dir()?.join("ka-lab").join(format!("{kind}-{now}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    link_latest(&dir, kind)?;
    Ok(dir)
}

/// `target/ka-lab/KIND-latest` leads to the newest folder.
fn link_latest(dir: &Path, kind: &str) -> Result<()> {
    let link = dir.with_file_name(format!("{kind}-latest"));
    match std::fs::remove_file(&link) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("removing {}", link.display()));
        }
        _ => {}
    }
    std::os::unix::fs::symlink(dir, &link).with_context(|| format!("making {}", link.display()))
}
