//! What feeds the chain: the golden tree, or a command of the operator. Whatever fails here gives the stream up, so that
//! no node can take half of it for all.

use super::raw::RawSource;
use anyhow::{Context, Result, bail};
use ka_archive::manifest::{ManifestError, Writer, Written};
use ka_archive::{Observer, PackOptions, PackSummary, pack};
use ka_chain::feed::Feeder;
use ka_chain::stream::{EndRecord, Part, PartKind};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// Where the stream comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A directory tree, and behind it the content of raw partitions.
    Tree(PackOptions, Vec<RawSource>),
    /// What this command writes, run by `sh -c`.
    Command(String),
    /// The bytes of this file.
    File(PathBuf),
    /// The bytes of standard input.
    Input(Input),
}

/// Standard input, as it was when the first wave began to read it: another wave gets the same bytes, or an error. (At its
/// end it would give an empty stream, which is a stream as good as any.)
#[derive(Debug, Clone, Default)]
pub struct Input(Arc<Mutex<Option<Begin>>>);

/// Where a descriptor's bytes begin.
#[derive(Debug, Clone, Copy)]
enum Begin {
    /// At this offset of a file.
    At(u64),
    /// Nowhere: a pipe is read once.
    Gone,
}

impl Input {
    /// Reads `file` from where it was when this was called for the first time. The first wave moves the offset that all its
    /// descriptors share, as every reader does; later ones read at offsets of their own, since the feeding thread of a wave
    /// that was given up may still be reading.
    fn reader(&self, mut file: File) -> Result<Box<dyn Read>> {
        let mut begin = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match *begin {
            None => {
                *begin = Some(file.stream_position().map_or(Begin::Gone, Begin::At));
                Ok(Box::new(file))
            }
            Some(Begin::At(offset)) => Ok(Box::new(At { file, offset })),
            Some(Begin::Gone) => {
                bail!(
                    "a wave before this one has read it, and a pipe is read once; give a file, or --source-cmd"
                )
            }
        }
    }
}

/// A file read at offsets of its own.
struct At {
    file: File,
    offset: u64,
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
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
        Source::Input(input) => {
            feeder.begin_part(&Part { name: "/".to_owned(), kind: PartKind::Tar })?;
            // Through its descriptor: the buffer of the standard library's own would be one more copy.
            let file = io::stdin().as_fd().try_clone_to_owned().context("opening standard input")?;
            copy_input(input, File::from(file), &mut feeder)?;
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

/// What a source is read into.
trait Space {
    /// Where its next bytes go; never empty.
    fn space(&mut self) -> &mut [u8];
    /// So many of them have come.
    fn filled(&mut self, n: usize) -> Result<()>;
}

impl Space for Feeder {
    fn space(&mut self) -> &mut [u8] {
        self.space()
    }
    fn filled(&mut self, n: usize) -> Result<()> {
        self.filled(n).context("writing to the chain")
    }
}

fn copy_file(path: &Path, out: &mut impl Space) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    copy(&mut file, out).with_context(|| format!("sending {}", path.display()))
}

fn copy_input(input: &Input, file: File, out: &mut impl Space) -> Result<()> {
    input.reader(file).and_then(|mut reader| copy(&mut reader, out)).context("sending standard input")
}

/// Reads to the end.
fn copy(from: &mut impl Read, to: &mut impl Space) -> Result<()> {
    loop {
        match from.read(to.space()) {
            Ok(0) => return Ok(()),
            Ok(n) => to.filled(n)?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("reading"),
        }
    }
}

fn copy_command(command: &str, out: &mut impl Space) -> Result<()> {
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
    use std::io::{SeekFrom, Write};

    /// Takes a few bytes at a time.
    #[derive(Default)]
    struct Out {
        space: [u8; 32],
        bytes: Vec<u8>,
    }

    impl Space for Out {
        fn space(&mut self) -> &mut [u8] {
            &mut self.space
        }
        fn filled(&mut self, n: usize) -> Result<()> {
            self.bytes.extend_from_slice(&self.space[..n]);
            Ok(())
        }
    }

    #[test]
    fn another_wave_gets_standard_input_from_where_the_first_began() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"what others have readthe stream").unwrap();
        file.seek(SeekFrom::Start(21)).unwrap();
        let input = Input::default();
        for wave in 1..=3 {
            let mut out = Out::default();
            // Each wave has a descriptor of its own, and all share one offset.
            copy_input(&input.clone(), file.try_clone().unwrap(), &mut out).unwrap();
            assert_eq!(out.bytes, b"the stream", "wave {wave}");
        }
    }

    #[test]
    fn a_wave_that_still_reads_standard_input_takes_nothing_from_the_next() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"head: the stream").unwrap();
        file.seek(SeekFrom::Start(6)).unwrap();
        let input = Input::default();
        let mut readers = [(); 3].map(|()| input.reader(file.try_clone().unwrap()).unwrap());
        let (mut seen, mut piece) = ([const { Vec::new() }; 3], [0; 3]);
        for _ in 0..5 {
            for (reader, seen) in readers.iter_mut().zip(&mut seen) {
                let n = reader.read(&mut piece).unwrap();
                seen.extend_from_slice(&piece[..n]);
            }
        }
        assert_eq!(seen, [b"the stream"; 3]);
    }

    #[test]
    fn a_pipe_that_was_read_is_no_empty_stream() {
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"the stream").unwrap();
        drop(writer);
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        let (input, mut out) = (Input::default(), Out::default());
        copy_input(&input, file.try_clone().unwrap(), &mut out).unwrap();
        assert_eq!(out.bytes, b"the stream");
        let error = format!("{:#}", copy_input(&input, file, &mut out).unwrap_err());
        assert!(error.starts_with("sending standard input: a wave before this one has read it"), "{error}");
        assert_eq!(out.bytes.len(), 10);
    }

    #[test]
    fn a_command_that_fails_after_its_output_is_a_failure() {
        let mut out = Out::default();
        let error = copy_command("echo data; exit 3", &mut out).unwrap_err().to_string();
        assert_eq!(error, "the source command `echo data; exit 3` ended with exit status 3");
        assert_eq!(out.bytes, b"data\n");
        let error = copy_command("echo data; kill -9 $$", &mut Out::default()).unwrap_err().to_string();
        assert!(error.ends_with("ended with signal 9"), "{error}");
        copy_command("echo data", &mut Out::default()).unwrap();
    }

    #[test]
    fn a_file_is_sent_as_it_is_and_a_missing_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stream");
        let bytes: Vec<u8> = (0..600_000u32).map(|n| n.to_le_bytes()[1]).collect();
        std::fs::write(&path, &bytes).unwrap();
        let mut out = Out::default();
        copy_file(&path, &mut out).unwrap();
        assert!(out.bytes == bytes);
        let error = copy_file(&folder.path().join("none"), &mut out).unwrap_err();
        assert!(format!("{error:#}").contains("none: No such file"), "{error:#}");
    }
}
