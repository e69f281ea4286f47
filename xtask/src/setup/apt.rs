//! Debian packages: one `apt-get update`, one `apt-get install`, waiting while somebody else holds the lock; and the
//! Debian mirror that this machine's own apt configuration names, so that none is written down here.

use crate::{run, say};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Seconds that apt-get waits for the lock by itself.
const LOCK_WAIT: u32 = 300;
const LIMIT: Duration = Duration::from_secs(1200);

/// Installs packages without their recommendations.
///
/// # Errors
/// When apt-get fails.
pub fn install(packages: &[&str], log: &Path) -> Result<()> {
    say!("setup", "installing {}", packages.join(" "));
    // A list that could not be fetched (a foreign repository that is down) need not stop the installation.
    if let Err(e) = run::logged(apt_get().arg("update"), log, LIMIT) {
        say!("setup", "apt-get update had trouble, going on with what it has: {}", first_line(&e));
    }
    let time = run::logged(
        apt_get().args(["install", "--yes", "--no-install-recommends"]).args(packages),
        log,
        LIMIT,
    )
    .context("installing packages")?;
    say!("setup", "installed {} packages in {:.0} s", packages.len(), time.as_secs_f64());
    Ok(())
}

fn first_line(error: &anyhow::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .arg("-o")
        .arg(format!("DPkg::Lock::Timeout={LOCK_WAIT}"));
    command
}

/// The address of the Debian archive that this machine's apt uses. `KA_LAB_MIRROR` overrides it.
///
/// # Errors
/// When apt names no Debian archive.
pub fn debian_mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("KA_LAB_MIRROR") {
        return Ok(mirror);
    }
    // apt itself reads both of its file formats.
    let lines = run::output(
        "apt-get",
        &[
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)",
            "Created-By: Packages",
        ],
    )
    .context("asking apt for its archives")?;
    match pick_mirror(&lines) {
        Some(mirror) => Ok(mirror),
        None => bail!(
            "apt's configuration names no Debian archive; set KA_LAB_MIRROR to the address of one. apt said:\n{lines}"
        ),
    }
}

/// The archive of a plain release (no `-updates`, `-security`) with the component `main`; Debian's own before others'.
fn pick_mirror(lines: &str) -> Option<String> {
    let plain = |line: &&str| {
        let mut words = line.split_whitespace();
        let (uri, release, component) = (words.next(), words.next(), words.next());
        uri.is_some()
            && component == Some("main")
            && release.is_some_and(|r| !r.contains('-') && !r.contains('/'))
    };
    let candidates: Vec<&str> = lines.lines().filter(plain).collect();
    let debian = candidates.iter().find(|line| line.ends_with(" Debian"));
    let line = debian.or_else(|| candidates.iter().find(|line| line.contains("debian")))?;
    line.split_whitespace().next().map(|uri| uri.trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_a_plain_debian_release() {
        let lines = "http://mirror.example/other/ stable main Other\n\
                     http://mirror.example/debian-security/ bookworm-security main Debian\n\
                     http://mirror.example/debian/ bookworm-updates main Debian\n\
                     http://mirror.example/debian/ bookworm contrib Debian\n\
                     http://mirror.example/debian/ bookworm main Debian\n";
        assert_eq!(pick_mirror(lines).as_deref(), Some("http://mirror.example/debian"));
    }

    #[test]
    fn without_lists_the_name_decides() {
        assert_eq!(
            pick_mirror("http://m.example/debian/ trixie main").as_deref(),
            Some("http://m.example/debian")
        );
        assert_eq!(pick_mirror("http://m.example/fruit/ trixie main"), None);
        assert_eq!(pick_mirror(""), None);
    }
}
