//! Ka's own programs, built static for musl: they run inside golden machines of any C library, and in the initramfs.

use crate::setup::MUSL;
use crate::{run, say};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(1500);
/// What the agent may weigh: every node loads it over TFTP or HTTP.
const AGENT_LIMIT: u64 = 4 << 20;

/// The programs of one build.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// `ka-agent`.
    pub agent: PathBuf,
    /// `ka-server`.
    pub server: PathBuf,
    /// `ka-image`.
    pub image: PathBuf,
}

#[derive(Deserialize)]
struct Metadata {
    target_directory: PathBuf,
    workspace_root: PathBuf,
}

fn metadata() -> Result<Metadata> {
    let text = run::output(&cargo(), &["metadata", "--format-version", "1", "--no-deps"])
        .context("asking cargo for the workspace")?;
    serde_json::from_str(&text).context("parsing what cargo said")
}

/// The cargo that runs us, else the one on the path.
#[must_use]
pub fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// Where builds go.
///
/// # Errors
/// When cargo does not say.
pub fn target_dir() -> Result<PathBuf> {
    metadata().map(|m| m.target_directory)
}

/// The workspace's folder.
///
/// # Errors
/// When cargo does not say.
pub fn workspace() -> Result<PathBuf> {
    metadata().map(|m| m.workspace_root)
}

/// For the lab: nearly as fast as what is shipped, much quicker to link.
const PROFILE: &str = "lab";

/// Builds all three.
///
/// # Errors
/// When cargo fails, or the agent is not what it must be.
pub fn build(log: &Path) -> Result<Binaries> {
    if let Some(folder) = std::env::var_os("KA_LAB_BINARIES").map(PathBuf::from) {
        say!("build", "nothing is built: programs of {} (KA_LAB_BINARIES)", folder.display());
        return checked(&folder);
    }
    let Metadata { target_directory, workspace_root } = metadata()?;
    say!("build", "ka-agent, ka-server and ka-image, profile {}, static for musl", PROFILE);
    let time = run::logged(
        Command::new(cargo())
            .current_dir(&workspace_root)
            .args(["build", "--locked", "--target", MUSL, "--profile", PROFILE])
            .args(["-p", "ka-agent", "-p", "ka-server", "-p", "ka-image", "--bins"]),
        log,
        LIMIT,
    )
    .context("building Ka")?;
    let folder = target_directory.join(MUSL).join(PROFILE);
    let binaries = checked(&folder)?;
    let size = std::fs::metadata(&binaries.agent).context("looking at ka-agent")?.len();
    say!("build", "built in {:.0} s; ka-agent has {}", time.as_secs_f64(), ka_cli::units::show_size(size));
    Ok(binaries)
}

fn checked(folder: &Path) -> Result<Binaries> {
    let binaries = Binaries {
        agent: folder.join("ka-agent"),
        server: folder.join("ka-server"),
        image: folder.join("ka-image"),
    };
    for program in [&binaries.agent, &binaries.server, &binaries.image] {
        check_static(program)?;
    }
    Ok(binaries)
}

/// Builds `ka-agent` as it is shipped and checks its size.
///
/// # Errors
/// When cargo fails, or it is not what it must be.
pub fn build_agent(log: &Path) -> Result<PathBuf> {
    let Metadata { target_directory, workspace_root } = metadata()?;
    let words = ["build", "--locked", "--release", "--target", MUSL, "-p", "ka-agent"];
    run::logged(Command::new(cargo()).current_dir(workspace_root).args(words), log, LIMIT)?;
    let agent = target_directory.join(MUSL).join("release/ka-agent");
    check_static(&agent)?;
    let size = std::fs::metadata(&agent).context("looking at ka-agent")?.len();
    say!("build", "ka-agent as it is shipped: static-pie, {}", ka_cli::units::show_size(size));
    if size >= AGENT_LIMIT {
        bail!("ka-agent has {size} bytes, the limit is {AGENT_LIMIT}");
    }
    Ok(agent)
}

/// What a deployment runs, as it is shipped.
#[derive(Debug, Clone)]
pub struct Shipped {
    /// `ka-agent`.
    pub agent: PathBuf,
    /// `ka-server`.
    pub server: PathBuf,
}

/// Builds agent and server as they are shipped.
///
/// # Errors
/// When cargo fails, or they are not what they must be.
pub fn build_shipped(log: &Path) -> Result<Shipped> {
    let folder = match std::env::var_os("KA_LAB_BINARIES").map(PathBuf::from) {
        Some(folder) => {
            say!("build", "nothing is built: programs of {} (KA_LAB_BINARIES)", folder.display());
            folder
        }
        None => {
            let Metadata { target_directory, workspace_root } = metadata()?;
            say!("build", "ka-agent and ka-server as they are shipped");
            let words = ["build", "--locked", "--release", "--target", MUSL, "--bins"];
            run::logged(
                Command::new(cargo()).current_dir(workspace_root).args(words).args([
                    "-p",
                    "ka-agent",
                    "-p",
                    "ka-server",
                ]),
                log,
                LIMIT,
            )
            .context("building Ka")?;
            target_directory.join(MUSL).join("release")
        }
    };
    let shipped = Shipped { agent: folder.join("ka-agent"), server: folder.join("ka-server") };
    check_static(&shipped.agent)?;
    check_static(&shipped.server)?;
    Ok(shipped)
}

/// Builds the archive's own program, optimized and linked as what is shipped.
///
/// # Errors
/// When cargo fails, or it is not what it must be.
pub fn build_archiver(log: &Path) -> Result<PathBuf> {
    if let Some(program) = std::env::var_os("KA_BENCH_ARCHIVER").map(PathBuf::from) {
        say!("build", "nothing is built: {} (KA_BENCH_ARCHIVER)", program.display());
        return Ok(program);
    }
    let Metadata { target_directory, workspace_root } = metadata()?;
    say!("build", "ka-archiver, the archive in a program of its own");
    let words =
        ["build", "--locked", "--release", "--target", MUSL, "-p", "ka-archive", "--example", "ka-archiver"];
    run::logged(Command::new(cargo()).current_dir(workspace_root).args(words), log, LIMIT)?;
    let program = target_directory.join(MUSL).join("release/examples/ka-archiver");
    check_static(&program)?;
    Ok(program)
}

/// Static and position-independent: `ET_DYN` without an interpreter.
fn check_static(program: &Path) -> Result<()> {
    let bytes = std::fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    if is_static_pie(&bytes) { Ok(()) } else { bail!("{} is not a static-pie program", program.display()) }
}

fn is_static_pie(elf: &[u8]) -> bool {
    let half = |at: usize| elf.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let long = |at: usize| {
        let bytes = elf.get(at..at.checked_add(8)?)?;
        usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    const INTERPRETER: [u8; 4] = [3, 0, 0, 0];
    let (Some(kind), Some(table), Some(size), Some(count)) = (half(16), long(32), half(54), half(56)) else {
        return false;
    };
    let entry = |i: usize| {
        let at = table.checked_add(i.checked_mul(size.into())?)?;
        elf.get(at..at.checked_add(4)?)
    };
    elf.starts_with(b"\x7fELF\x02\x01")
        && kind == 3
        && (0..count.into()).all(|i| entry(i).is_some_and(|kind| kind != INTERPRETER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_an_interpreter_is_not_static() {
        assert!(!is_static_pie(&std::fs::read("/bin/sh").unwrap()));
        assert!(!is_static_pie(b"#!/bin/sh\n"));
        assert!(!is_static_pie(b"\x7fELF\x02\x01"));
    }

    #[test]
    fn damaged_headers_are_no_panic() {
        let mut elf = std::fs::read("/bin/sh").unwrap();
        elf.truncate(4096);
        for at in 0..64 {
            let mut damaged = elf.clone();
            damaged[at] = 0xff;
            // Only that it returns counts here.
            let _ = is_static_pie(&damaged);
        }
    }
}
