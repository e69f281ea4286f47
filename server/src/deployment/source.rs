//! What feeds the chain: the golden tree, or a command of the operator. Whatever fails here gives the stream up, so that
//! no node can take half of it for all.

use anyhow::{Context, Result, bail};
use ka_archive::{Observer, PackOptions, PackSummary, pack};
use ka_chain::feed::Feeder;
use ka_chain::stream::{EndRecord, Part, PartKind};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// Where the stream comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A directory tree.
    Tree(PackOptions),
    /// What this command writes, run by `sh -c`.
    Command(String),
}

/// What was sent.
#[derive(Debug)]
pub struct Sent {
    /// The end record.
    pub record: EndRecord,
    /// What the walker saw; none for a command.
    pub summary: Option<PackSummary>,
}

/// The path being read, for the display.
#[derive(Debug, Clone, Default)]
pub struct Current(Arc<Mutex<String>>);

impl Current {
    /// The path.
    #[must_use]
    pub fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Observer for Current {
    fn entry(&mut self, path: &[u8]) {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.clear();
        text.push_str(&String::from_utf8_lossy(path));
    }
}

/// Feeds `source` into the chain.
///
/// # Errors
/// Names what failed; the nodes were told the same.
pub fn feed(source: &Source, mut feeder: Feeder, mut current: Current) -> Result<Sent> {
    let fed = (|| match source {
        Source::Tree(options) => {
            feeder.begin_part(&Part { name: "/".to_owned(), kind: PartKind::Tar })?;
            Ok(Some(pack(options, &mut feeder, &mut current)?))
        }
        Source::Command(command) => {
            feeder.begin_part(&Part { name: "/".to_owned(), kind: PartKind::Tar })?;
            copy_command(command, &mut feeder)?;
            Ok(None)
        }
    })();
    match fed {
        Ok(summary) => {
            let record = feeder.finish().context("ending the stream")?;
            Ok(Sent { record, summary })
        }
        Err(e) => {
            let e: anyhow::Error = e;
            feeder.give_up(&format!("{e:#}"));
            Err(e)
        }
    }
}

fn copy_command(command: &str, out: &mut impl Write) -> Result<()> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("running the source command `{command}`"))?;
    let mut pipe = child.stdout.take().context("the source command has no output")?;
    let mut buffer = vec![0; 1 << 20];
    let copied = loop {
        match pipe.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(n) => {
                if let Err(e) = out.write_all(&buffer[..n]) {
                    break Err(e).context("sending what the source command writes");
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => break Err(e).with_context(|| format!("reading from the source command `{command}`")),
        }
    };
    drop(pipe);
    if copied.is_err() {
        // It writes to a closed pipe now and would end by itself; kill makes that sure. It may be gone already.
        let _ = child.kill();
    }
    let status = child.wait().with_context(|| format!("waiting for the source command `{command}`"))?;
    copied?;
    if !status.success() {
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        };
        bail!("the source command `{command}` ended with {how}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_after_its_output_is_a_failure() {
        let mut out = Vec::new();
        let error = copy_command("echo data; exit 3", &mut out).unwrap_err().to_string();
        assert_eq!(error, "the source command `echo data; exit 3` ended with exit status 3");
        assert_eq!(out, b"data\n");
        let error = copy_command("echo data; kill -9 $$", &mut Vec::new()).unwrap_err().to_string();
        assert!(error.ends_with("ended with signal 9"), "{error}");
        copy_command("echo data", &mut Vec::new()).unwrap();
    }
}
