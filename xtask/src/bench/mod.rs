//! `cargo xtask bench`: how fast the chain is, and what failures cost it, in network namespaces on this machine; how fast
//! the archive is. Everything that a benchmark makes outside of its own folder goes when it ends; every wait has a limit.

mod archive;
mod chain;
mod contender;
pub mod facts;
mod figures;
mod ka;
mod machine;
mod net;
mod process;
pub mod programs;
mod repair;
mod report;
mod source;
mod table;
mod trial;

use crate::{binaries, run_dir, setup};
use anyhow::{Context, Result, bail};
use argh::FromArgs;
use contender::Contender;
use ka_cli::units::parse_size;
use std::path::{Path, PathBuf};

/// Measures the chain and the archive on this machine.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "bench")]
pub struct Bench {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs, Debug)]
#[argh(subcommand)]
enum Command {
    Archive(Archive),
    Chain(Chain),
    Repair(Repair),
}

/// Ka's archive, GNU tar and bsdtar pack and unpack the same trees, with hot
/// and cold caches; the report goes to docs/bench-archive.json and .md.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "archive")]
struct Archive {
    /// only these, of: ka, tar, bsdtar
    #[argh(option, arg_name = "NAME,..")]
    only: Option<String>,
    /// only these trees, of: debian, small, large
    #[argh(option, arg_name = "TREE,..")]
    trees: Option<String>,
    /// runs of each (default 3)
    #[argh(option, arg_name = "N", default = "3")]
    rounds: usize,
    /// files in the tree of small ones (default 1000000)
    #[argh(option, arg_name = "N", default = "1_000_000")]
    files: u64,
    /// of the tree of large files (default 2G)
    #[argh(option, arg_name = "SIZE", default = "String::from(\"2G\")")]
    size: String,
    /// where the report goes (default: docs)
    #[argh(option, arg_name = "DIR")]
    output: Option<PathBuf>,
}

/// Ka, its peers and a bare relay clone one stream to many receivers; the
/// report goes to docs/bench-chain.json and .md.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "chain")]
struct Chain {
    /// only these, of: relay, ka, ka-trust-nodes, mbuffer, nc-tee, udpcast,
    /// tcp
    #[argh(option, arg_name = "NAME,..")]
    only: Option<String>,
    /// only these cases, of: unshaped, 1g, 100m, 100m-root
    #[argh(option, arg_name = "CASE,..")]
    cases: Option<String>,
    /// so many receivers in every case (default: 1,4,8 unshaped, 8 at
    /// 1 Gbit/s, 1,8,60 at 100 Mbit/s)
    #[argh(option, arg_name = "N,..")]
    receivers: Option<String>,
    /// runs of each contender in each case (default 3)
    #[argh(option, arg_name = "N", default = "3")]
    rounds: usize,
    /// of the incompressible stream (default 1G)
    #[argh(option, arg_name = "SIZE", default = "String::from(\"1G\")")]
    size: String,
    /// where the report goes (default: docs)
    #[argh(option, arg_name = "DIR")]
    output: Option<PathBuf>,
}

/// What each kind of failure costs the survivors, at 1 Gbit/s; the report goes
/// to docs/bench-repair.json and .md.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "repair")]
struct Repair {
    /// only these failures, of: killed, frozen, hiccup, cut, deaf, mute,
    /// estranged, off
    #[argh(option, arg_name = "NAME,..")]
    only: Option<String>,
    /// only these places, of: first, middle, last
    #[argh(option, arg_name = "PLACE,..")]
    places: Option<String>,
    /// so many receivers (default 4,8)
    #[argh(option, arg_name = "N,..", default = "String::from(\"4,8\")")]
    receivers: String,
    /// runs of each failure at each place (default 1)
    #[argh(option, arg_name = "N", default = "1")]
    rounds: usize,
    /// of the stream (default 512M)
    #[argh(option, arg_name = "SIZE", default = "String::from(\"512M\")")]
    size: String,
    /// where the report goes (default: docs)
    #[argh(option, arg_name = "DIR")]
    output: Option<PathBuf>,
}

/// What every benchmark needs.
#[derive(Debug)]
struct Prepared {
    ka: ka::Ka,
    server: PathBuf,
    /// Our own program: it is the bare relay and the sink, too.
    xtask: PathBuf,
}

impl Prepared {
    fn new(dir: &Path) -> Result<Self> {
        setup::ensure(setup::Scope::Bench, &dir.join("setup.log"))?;
        let binaries::Shipped { agent, server } = binaries::build_shipped(&dir.join("build.log"))?;
        Ok(Self {
            ka: ka::Ka::new(&agent, &server, dir)?,
            server,
            xtask: std::env::current_exe().context("asking for our own program")?,
        })
    }

    fn facts(&self) -> Result<facts::Facts> {
        facts::Facts::gather(&self.server, &facts::PEERS)
    }
}

/// Runs a benchmark; whether Ka did what it must.
///
/// # Errors
/// When it cannot be run at all.
pub fn run(bench: &Bench) -> Result<bool> {
    let output = |given: &Option<PathBuf>| match given {
        Some(dir) => Ok(dir.clone()),
        None => binaries::workspace().map(|workspace| workspace.join("docs")),
    };
    match &bench.command {
        Command::Archive(args) => {
            let options = archive::Options {
                only: list("--only", args.only.as_deref(), archive::Archiver::named)?,
                trees: list("--trees", args.trees.as_deref(), archive::Kind::named)?,
                rounds: args.rounds.max(1),
                files: args.files,
                large: parse_size(&args.size).context("--size")?,
                output: output(&args.output)?,
            };
            let dir = run_dir("bench-archive")?;
            setup::ensure(setup::Scope::Lab, &dir.join("setup.log"))?;
            let program = binaries::build_archiver(&dir.join("build.log"))?;
            let facts = facts::Facts::gather(&program, &["tar", "libarchive-tools"])?;
            archive::run(&options, &program, facts, &dir)
        }
        Command::Chain(args) => {
            let options = chain::Options {
                only: list("--only", args.only.as_deref(), Contender::named)?,
                cases: list("--cases", args.cases.as_deref(), chain::Family::named)?,
                receivers: list("--receivers", args.receivers.as_deref(), receivers)?,
                rounds: args.rounds.max(1),
                size: parse_size(&args.size).context("--size")?,
                output: output(&args.output)?,
            };
            let dir = run_dir("bench-chain")?;
            chain::run(&options, &Prepared::new(&dir)?, &dir)
        }
        Command::Repair(args) => {
            let options = repair::Options {
                only: list("--only", args.only.as_deref(), repair::Fault::named)?,
                places: list("--places", args.places.as_deref(), repair::Place::named)?,
                receivers: list("--receivers", Some(&args.receivers), receivers)?,
                rounds: args.rounds.max(1),
                size: parse_size(&args.size).context("--size")?,
                output: output(&args.output)?,
            };
            let dir = run_dir("bench-repair")?;
            repair::run(&options, &Prepared::new(&dir)?, &dir)
        }
    }
}

fn receivers(word: &str) -> Option<usize> {
    word.parse().ok().filter(|n| (1..net::MOST).contains(n))
}

/// A list with commas; none is empty.
fn list<T>(option: &str, text: Option<&str>, read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>> {
    let words =
        text.into_iter().flat_map(|text| text.split(',')).map(str::trim).filter(|word| !word.is_empty());
    words
        .map(|word| match read(word) {
            Some(value) => Ok(value),
            None => bail!("{option}: `{word}` is not one of them; see --help"),
        })
        .collect()
}

/// Writes a report as JSON and Markdown, each in one step.
fn write_both(dir: &Path, name: &str, report: &impl serde::Serialize, markdown: &str) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let json = serde_json::to_string_pretty(report).context("writing the report as JSON")? + "\n";
    for (ending, text) in [("json", json.as_str()), ("md", markdown)] {
        let path = dir.join(format!("{name}.{ending}"));
        let fresh = dir.join(format!(".{name}.{ending}.new"));
        std::fs::write(&fresh, text).with_context(|| format!("writing {}", fresh.display()))?;
        std::fs::rename(&fresh, &path).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_wrong_words_named() {
        assert_eq!(list("--receivers", Some("1, 4,8"), receivers).unwrap(), [1, 4, 8]);
        assert!(list("--receivers", None, receivers).unwrap().is_empty());
        for wrong in ["0", "254", "many"] {
            let error = list("--receivers", Some(wrong), receivers).unwrap_err().to_string();
            assert!(error.contains(wrong), "{error}");
        }
        assert_eq!(
            list("--only", Some("ka,relay"), Contender::named).unwrap(),
            [Contender::Ka, Contender::Relay]
        );
    }
}
