//! `ka-server layout`: the layout of this machine, or a check of a layout file.

use anyhow::{Context, Result};
use argh::FromArgs;
use ka_cli::exit::Exit;
use std::path::PathBuf;

/// print the layout of this machine as a layout file, or check one
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "layout")]
pub struct LayoutArgs {
    /// check this file instead
    #[argh(option, arg_name = "FILE")]
    pub check: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// When the layout cannot be captured or the file cannot be read.
pub fn run(args: &LayoutArgs) -> Result<Exit> {
    if let Some(path) = &args.check {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        return match ka_layout::parse::parse(&text) {
            Ok(_) => {
                println!("{}: good", path.display());
                Ok(Exit::Done)
            }
            Err(e) => {
                eprintln!("{}: {e}", path.display());
                Ok(Exit::Usage)
            }
        };
    }
    let captured = ka_layout::capture::capture(None).context("capturing the layout of this machine")?;
    for warning in &captured.warnings {
        eprintln!("warning: {warning}");
    }
    print!("{}", ka_layout::write::to_toml(&captured.layout, &captured.warnings));
    Ok(Exit::Done)
}
