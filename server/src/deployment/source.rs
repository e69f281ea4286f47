//! What feeds the chain: the golden tree, or a command of the operator. Whatever fails here gives the stream up, so that
//! no node can take half of it for all.

use super::raw::RawSource;
use anyhow::{Context, Result, bail};
use ka_archive::manifest::{ManifestError, Writer, Written};
use ka_archive::{Observer, PackOptions, PackSummary, pack};
use ka_chain::feed::Feeder;
use ka_chain::stream::{EndRecord, Part, PartKind};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes read at a time from a command or a file: a chunk's worth.
const COPY: usize = 256 << 10;

/// Where the stream comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A directory tree, and behind it the content of raw partitions.
    Tree(PackOptions, Vec<RawSource>),
    /// What this command writes, run by `sh -c`.
    Command(String),
    /// The bytes of this file; `-` is standard input.
    File(PathBuf),
}

/// What was sent.
#[derive(Debug)]
pub struct Sent {
    /// The end record.
    pub record: EndRecord,
    /// What the walker saw; none for a command or a file.
    pub summary: Option<PackSummary>,
    /// The manifest of the tree, where one was to be made.
    pub manifest: Option<Result<Written, ManifestError>>,
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

/// Feeds `source` into the chain, and what a tree holds into `manifest`.
///
/// # Errors
/// Names what failed; the nodes were told the same. A manifest that cannot be written is no failure.
pub fn feed(source: &Source, mut feeder: Feeder, current: Current, manifest: Option<Writer>) -> Result<Sent> {
    let mut observer = (current, manifest);
    let fed = (|| match source {
        Source::Tree(options, raw) => {
            feeder.begin_part(&Part { name: "/".to_owned(), kind: PartKind::Tar })?;
            let summary = pack(options, &mut feeder, &mut observer)?;
            for source in raw {
                let name = source.content.part.clone();
                observer.0.entry(name.as_bytes());
                let sending = format!("sending {name}");
                feeder.begin_part(&Part { name, kind: PartKind::Raw })?;
                source.send(&mut feeder).context(sending)?;
            }
            Ok(Some(summary))
        }
        Source::Command(command) => {
            feeder.begin_part(&Part { name: "/".to_owned(), kind: PartKind::Tar })?;
            copy_command(command, &mut feeder)?;
            Ok(None)
        }
        Source::File(path) => {
            feeder.begin_part(&Part { name: "/".to_owned(), kind: PartKind::Tar })?;
            copy_file(path, &mut feeder)?;
            Ok(None)
        }
    })();
    match fed {
        Ok(summary) => {
            let record = feeder.finish().context("ending the stream")?;
            // Only now: a stream that did not end is nobody's golden tree.
            let manifest = observer.1.take().filter(|_| summary.is_some()).map(Writer::finish);
            Ok(Sent { record, summary, manifest })
        }
        Err(e) => {
            let e: anyhow::Error = e;
            feeder.give_up(&format!("{e:#}"));
            Err(e)
        }
    }
}

fn copy_file(path: &Path, out: &mut impl Write) -> Result<()> {
    let sending = || format!("sending {}", path.display());
    if path == Path::new("-") {
        // Through its descriptor: the buffer of the standard library's own would be one more copy.
        let input = io::stdin().as_fd().try_clone_to_owned().context("opening standard input")?;
        copy(&mut File::from(input), out).with_context(sending)
    } else {
        let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        copy(&mut file, out).with_context(sending)
    }
}

/// Copies to the end through one buffer that stays in the cache.
fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut buffer = vec![0; COPY];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(&buffer[..n]).context("writing to the chain")?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("reading"),
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
    let copied =
        copy(&mut pipe, out).with_context(|| format!("sending what the source command `{command}` writes"));
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

    #[test]
    fn a_file_is_sent_as_it_is_and_a_missing_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stream");
        let bytes: Vec<u8> = (0..600_000u32).map(|n| n.to_le_bytes()[1]).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mut out = Vec::new();
        copy_file(&path, &mut out).unwrap();
        assert!(out == bytes);
        let error = copy_file(&folder.path().join("none"), &mut out).unwrap_err();
        assert!(format!("{error:#}").contains("none: No such file"), "{error:#}");
    }
}
