//! The Rust standard library for musl: already there, else by rustup, else built from Debian's rust-src.

use super::{MUSL, apt};
use crate::{run, say};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const SCRIPT: &str = include_str!("musl-target.sh");

/// rustup tries for minutes when its server cannot be reached.
const RUSTUP_LIMIT: Duration = Duration::from_secs(90);
const SCRIPT_LIMIT: Duration = Duration::from_secs(900);

/// Installs the target if it is missing.
///
/// # Errors
/// When no way works; the error says what each said.
pub fn ensure(log: &Path) -> Result<()> {
    if is_there()? {
        return Ok(());
    }
    say!("setup", "the Rust target {MUSL} is missing: trying rustup");
    let by_rustup = run::logged(Command::new("rustup").args(["target", "add", MUSL]), log, RUSTUP_LIMIT);
    if by_rustup.is_ok() && is_there()? {
        return Ok(());
    }
    say!("setup", "rustup could not; building it from Debian's rust-src (about a minute)");
    let by_source = from_source(log);
    match by_source {
        Ok(()) if is_there()? => Ok(()),
        by_source => bail!(
            "the Rust target {MUSL} cannot be installed.\nrustup: {}\nrust-src: {}\n\
             Install it by hand: `rustup target add {MUSL}`, or a rustc package that comes with it.",
            outcome(&by_rustup),
            outcome(&by_source)
        ),
    }
}

fn outcome<T>(result: &Result<T>) -> String {
    match result {
        Ok(_) => "ended well, but the target is still not there".to_owned(),
        Err(e) => format!("{e:#}"),
    }
}

/// Asking rustup would miss a target that was built from source: the library itself decides.
fn is_there() -> Result<bool> {
    let sysroot = run::output("rustc", &["--print", "sysroot"]).context("asking rustc for its sysroot")?;
    let lib = PathBuf::from(sysroot).join("lib/rustlib").join(MUSL).join("lib");
    let Ok(entries) = std::fs::read_dir(&lib) else { return Ok(false) };
    for entry in entries {
        let name = entry.with_context(|| format!("reading {}", lib.display()))?.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("libstd") && name.ends_with(".rlib") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn from_source(log: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("needs root");
    }
    let mirror = apt::debian_mirror()?;
    run::logged(Command::new("bash").args(["-c", SCRIPT, "musl-target", &mirror]), log, SCRIPT_LIMIT)?;
    Ok(())
}
