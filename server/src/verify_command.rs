//! `ka-server verify`: compares the golden tree, or a clone that is mounted here, with the manifest of a deployment; or
//! shows where manifests are.

use crate::deployment::manifests;
use anyhow::{Context, Result};
use argh::FromArgs;
use ka_archive::manifest::Reader;
use ka_archive::verify::command::{Outcome, Request, run as compare};
use ka_cli::exit::Exit;
use std::fs::File;
use std::path::PathBuf;

/// compare the golden tree, or a clone that is mounted here, with a deployment's manifest
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "verify")]
pub struct VerifyArgs {
    /// the deployment's name (default: the last)
    #[argh(positional)]
    pub deployment: Option<String>,
    /// the manifest of this wave (default: the last); each wave reads the golden tree anew
    #[argh(option, arg_name = "N")]
    pub wave: Option<u32>,
    /// this manifest instead
    #[argh(option, arg_name = "FILE")]
    pub manifest: Option<PathBuf>,
    /// a clone, mounted here (default: the golden tree itself, where it was packed)
    #[argh(option, arg_name = "DIR")]
    pub root: Option<PathBuf>,
    /// the clone has run: what a running machine changes is expected, too (always so for /)
    #[argh(switch)]
    pub running: bool,
    /// what matches may differ in anything; WHAT:GLOB limits it to content, extra, missing, label (repeatable)
    #[argh(option, arg_name = "GLOB")]
    pub expect: Vec<String>,
    /// show expected differences, too
    #[argh(switch)]
    pub all: bool,
    /// print JSON lines instead of text
    #[argh(switch)]
    pub json: bool,
    /// show all manifests instead
    #[argh(switch)]
    pub list: bool,
    /// where deployments have their logs (default /var/log/ka)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(\"/var/log/ka\")")]
    pub log_dir: PathBuf,
}

/// Runs it.
///
/// # Errors
/// When there is no manifest, or nothing can be compared.
pub fn run(args: &VerifyArgs) -> Result<Exit> {
    if args.list {
        for found in manifests::list(&args.log_dir)? {
            println!("{} wave {}: {}", found.deployment, found.wave, found.path.display());
        }
        return Ok(Exit::Done);
    }
    let path = match &args.manifest {
        Some(path) => path.clone(),
        None => manifests::find(&args.log_dir, args.deployment.as_deref(), args.wave)?.path,
    };
    let manifest = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let golden = Reader::new(&manifest).with_context(|| path.display().to_string())?.header().root.clone();
    let root = args.root.clone().unwrap_or(golden);
    log::info!("comparing {} with {}", root.display(), path.display());
    let request = Request {
        root,
        clone: args.root.is_some(),
        running: args.running,
        expect: args.expect.clone(),
        all: args.all,
        json: args.json,
    };
    let outcome = compare(&manifest, &request, std::io::stdout().lock())
        .with_context(|| format!("comparing {} with {}", request.root.display(), path.display()))?;
    Ok(match outcome {
        Outcome::Clean => Exit::Done,
        Outcome::Differs => Exit::Differs,
        Outcome::Usage(what) => {
            eprintln!("ka-server: {what}");
            Exit::Usage
        }
    })
}
