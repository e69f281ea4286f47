//! Wrong command lines and files that the server refuses before any node is asked: exit codes and messages.

use super::{Lab, Tally};
use crate::golden;
use crate::run;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// Runs them.
///
/// # Errors
/// Only when we are interrupted.
pub fn run(lab: &Lab, tally: &mut Tally) -> Result<()> {
    let root = lab.tree.display().to_string();
    let unknown = golden::LAYOUT.replace("table = \"gpt\"", "table = \"gpt\"\ncolour = \"red\"");
    let twice = golden::LAYOUT.replace("path = \"/boot/efi\"", "path = \"/\"");
    let same_number = golden::LAYOUT
        .replace("type = \"bios-boot\"", "type = \"bios-boot\"\nnumber = 2")
        .replacen("type   = \"esp\"", "type   = \"esp\"\nnumber = 2", 1);
    for (name, layout, status, words) in [
        ("layout-unknown-key", unknown.as_str(), 2, &["colour", "line 7"][..]),
        ("layout-mounted-twice", twice.as_str(), 2, &["/"]),
        ("layout-same-number", same_number.as_str(), 2, &["2"]),
        ("layout-no-toml", "version = = 1", 2, &["line 1"]),
    ] {
        tally.test(name, || {
            let path = lab.dir.join(format!("{name}.toml"));
            std::fs::write(&path, layout).with_context(|| format!("writing {}", path.display()))?;
            let layout = path.display().to_string();
            refused(lab, &["deploy", "--dry-run", "--root", &root, "--layout", &layout], status, words)
        })?;
    }
    tally.test("layout-missing-for-root", || {
        refused(lab, &["deploy", "--dry-run", "--root", &root], 2, &["--layout"])
    })?;
    tally.test("unknown-option", || refused(lab, &["deploy", "--nonsense"], 2, &["--nonsense"]))?;
    tally.test("agent-outside-pid-1", || {
        let output = Command::new(&lab.binaries.agent)
            .args(["receive", "--server", "127.0.0.1:1", "--target", "/nonexistent-ka"])
            .args(["--key", &"11".repeat(32), "--token-file", "/dev/null"])
            .output()
            .context("running ka-agent")?;
        if output.status.success() {
            bail!("ka-agent receive into a folder that is not there ended well");
        }
        Ok(())
    })
}

fn refused(lab: &Lab, args: &[&str], status: i32, words: &[&str]) -> Result<()> {
    let output = Command::new(&lab.binaries.server).args(args).output().context("running ka-server")?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.code() != Some(status) {
        bail!("ended with {}, {status} was expected:\n{text}", output.status);
    }
    for word in words {
        if !text.contains(word) {
            bail!("the message does not say `{word}`:\n{text}");
        }
    }
    let log = lab.dir.join("programs.log");
    std::io::Write::write_all(&mut run::append(&log)?, text.as_bytes())
        .with_context(|| format!("writing {}", log.display()))
}
