//! From the chain to the disk: takes the node's place, gives the stream to whoever consumes it, and tells the server how
//! far it is. The node keeps relaying while and after its own consumer fails.

use crate::disk::raw::{Filling, RawPlace};
use crate::session::{Session, Verdict};
use anyhow::{Context, Result, bail, ensure};
use ka_archive::{Observer, UnpackOptions, UnpackSummary, unpack};
use ka_chain::buffer::Pools;
use ka_chain::control::Progress;
use ka_chain::core::relay::Limits;
use ka_chain::node::{Config, Handle, Node, window_for};
use ka_chain::stream::{EndRecord, PartKind, StreamReader};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, BufRead, Write};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How often progress is told.
const REPORT: Duration = Duration::from_millis(500);

/// What the stream goes into.
#[derive(Debug)]
pub enum Sink<'a> {
    /// The tree is unpacked into this directory, and each part with blocks goes to its partition.
    Directory {
        /// The directory.
        target: &'a Path,
        /// The partitions.
        raw: &'a [RawPlace],
    },
    /// Given to a command (`sh -c`) on its standard input.
    Command(&'a str),
    /// Verified and dropped: nothing is written. For measuring the chain without a disk.
    Discard,
}

/// What came out of a reception.
#[derive(Debug)]
pub struct Reception {
    /// The end record that this node verified.
    pub record: EndRecord,
    /// What was unpacked; none when the stream went elsewhere than into a directory.
    pub unpacked: Option<UnpackSummary>,
    /// Stays in the chain for those below, until it is dropped.
    pub relay: Relay,
}

/// A place in the chain that is kept until this is dropped; meanwhile the server is told how far it is.
#[derive(Debug)]
pub struct Relay {
    // In this order: the node is stopped first.
    _node: Node,
    over: Arc<AtomicBool>,
    session: Arc<Session>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        self.session.set_relay(None);
    }
}

/// The node has no place in the wave any more; it may take one in the next.
#[derive(Debug, thiserror::Error)]
#[error("out of the wave: {0}")]
pub struct NextWave(pub String);

#[derive(Debug, Default)]
struct Counters {
    consumed: AtomicU64,
    entries: AtomicU64,
}

impl Observer for &Counters {
    fn entry(&mut self, _path: &[u8]) {
        self.entries.fetch_add(1, Ordering::Relaxed);
    }
    fn bytes(&mut self, count: u64) {
        self.consumed.fetch_add(count, Ordering::Relaxed);
    }
}

/// A reception that failed, with the place in the chain that is still to be kept for those below.
#[derive(Debug)]
pub struct Broken {
    /// Why.
    pub error: anyhow::Error,
    /// The place, if the node ever took it.
    pub relay: Option<Box<Relay>>,
}

impl From<anyhow::Error> for Broken {
    fn from(error: anyhow::Error) -> Self {
        Self { error, relay: None }
    }
}

/// Waits for the node's place, takes it, and consumes the stream to its end. `on_start` is called when the place is
/// known.
///
/// # Errors
/// [`Broken`], with the relay that goes on for the nodes below.
pub fn receive(
    session: &Arc<Session>,
    listener: TcpListener,
    memory: u64,
    sink: &Sink,
    on_start: impl FnOnce(),
) -> Result<Reception, Broken> {
    let window = window_for(memory);
    let pools = Pools::of_node(window);
    // Meanwhile other nodes are waited for.
    pools.fill();
    let start = session.wait_start().context("waiting for the wave to begin")?;
    on_start();
    log::info!("wave of {} nodes: this one is number {}", start.nodes, start.me.0);
    let config = Config {
        wave: start.wave,
        me: start.me,
        limits: Limits { survive: start.survive, window, history: 0 },
        dead_after: Duration::from_millis(u64::from(start.dead_after)),
        signer: start.signer,
    };
    let reporting = Arc::clone(session);
    let mut node = Node::start(config, pools, listener, Box::new(move |report| reporting.report(report)))
        .context("taking the place in the chain")?;
    let addresses = if start.addresses.is_empty() { vec![session.server] } else { start.addresses };
    node.know(&start.children);
    node.place(start.place, addresses);
    session.set_relay(Some(node.handle()));
    let Some(mut reader) = node.reader() else {
        return Err(anyhow::anyhow!("the stream has a reader already").into());
    };
    let counters = Arc::new(Counters::default());
    let handle = node.handle();
    let over = Arc::new(AtomicBool::new(false));
    let relay = Relay { _node: node, over: Arc::clone(&over), session: Arc::clone(session) };
    std::thread::spawn({
        let (session, handle, counters) = (Arc::clone(session), handle.clone(), Arc::clone(&counters));
        move || report(&session, &handle, &counters, &over)
    });
    let wanted = || !matches!(session.verdict(), Some(Verdict::Out(_) | Verdict::Lost(_)));
    let consumed = consume(&mut reader, sink, &counters, &wanted);
    if consumed.is_err() {
        // The window must not wait for a consumer that is gone; the relay goes on.
        drop(reader);
    }
    let outcome = match consumed {
        Ok(unpacked) => {
            handle.wait_end().map(|record| (record, unpacked)).map_err(|e| anyhow::anyhow!("{e}"))
        }
        // When the stream itself ended early, that is the cause, and what the consumer says is its effect.
        Err(e) => Err(match handle.ended() {
            Some(Err(cause)) if !format!("{e:#}").contains(&cause) => e.context(cause),
            _ => e,
        }),
    };
    session.progress(progress(&handle, &counters));
    match outcome {
        Ok((record, unpacked)) => {
            // It may have been told before, but not too late: that the node is done must come after it.
            session.ended(record);
            Ok(Reception { record, unpacked, relay })
        }
        Err(error) => {
            let error = match session.verdict() {
                Some(Verdict::Out(why)) => NextWave(why).into(),
                _ => error,
            };
            Err(Broken { error, relay: Some(Box::new(relay)) })
        }
    }
}

fn progress(node: &Handle, counters: &Counters) -> Progress {
    let received = node.received();
    let standing = node.standing();
    Progress {
        chunks: received.chunks.load(Ordering::Relaxed),
        wire: received.wire.load(Ordering::Relaxed),
        plain: received.plain.load(Ordering::Relaxed),
        consumed: counters.consumed.load(Ordering::Relaxed),
        held: standing.status.held,
        taken: standing.status.consumed,
        stuck: standing.status.stuck,
        cover: standing.status.cover,
        window: standing.fill as u64,
        entries: counters.entries.load(Ordering::Relaxed),
        epoch: standing.status.epoch,
        waits: node.waits(),
    }
}

/// Tells the server how far the node is, once that it holds the end (however slow its disk is from then on: nobody else
/// waits for that), and stops the node when the server is lost or wants it out.
fn report(session: &Session, node: &Handle, counters: &Counters, over: &AtomicBool) {
    let mut last = Progress::default();
    let mut quiet = Duration::ZERO;
    let mut told = false;
    while !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(50));
        if !told && let Some(Ok(record)) = node.ended() {
            told = true;
            session.ended(record);
        }
        match session.verdict() {
            Some(Verdict::Lost(why) | Verdict::Broken(why) | Verdict::Out(why)) => {
                node.stop(&why);
                return;
            }
            Some(Verdict::Released) | None => {}
        }
        quiet += Duration::from_millis(50);
        if quiet >= REPORT {
            quiet = Duration::ZERO;
            let now = progress(node, counters);
            if now != last {
                session.progress(now.clone());
                last = now;
            }
        }
    }
}

fn consume(
    reader: &mut StreamReader,
    sink: &Sink,
    mut counters: &Counters,
    wanted: &dyn Fn() -> bool,
) -> Result<Option<UnpackSummary>> {
    let mut unpacked = None;
    let mut filling = Filling::new(match sink {
        Sink::Directory { raw, .. } => raw,
        Sink::Command(_) | Sink::Discard => &[],
    });
    while let Some(part) = reader.next_part().context("receiving the stream")? {
        match (part.kind, sink) {
            (PartKind::Tar, Sink::Directory { target, .. }) => {
                if unpacked.is_some() {
                    bail!("the stream has more than one tree");
                }
                let options = UnpackOptions { root: target.to_path_buf(), sync: true };
                let summary = unpack(&mut *reader, &options, &mut counters)
                    .with_context(|| format!("unpacking into {}", target.display()))?;
                unpacked = Some(summary);
            }
            (PartKind::Tar | PartKind::Raw, Sink::Command(command)) => {
                pipe_to(reader, command, &mut counters, wanted)?;
            }
            (PartKind::Tar | PartKind::Raw, Sink::Discard) => discard(reader, &mut counters)?,
            (PartKind::Raw, Sink::Directory { .. }) => {
                let place = filling.next(&part.name)?;
                place.fill(reader, &mut counters)?;
                log::info!("wrote {} bytes of {} to {}", place.bytes, place.part, place.device.display());
            }
        }
    }
    ensure!(unpacked.is_some() || !matches!(sink, Sink::Directory { .. }), "the stream held no tree");
    filling.end()?;
    Ok(unpacked)
}

/// Takes a part to its end and drops it; the chain has verified it.
fn discard(reader: &mut impl BufRead, observer: &mut impl Observer) -> Result<()> {
    loop {
        match reader.fill_buf().map(<[u8]>::len) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                reader.consume(n);
                observer.bytes(n as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("receiving the stream"),
        }
    }
}

/// A pipe to a program that may take nothing for ever: writing to it fails when the wave goes on without this node.
struct Pipe<'a> {
    pipe: ChildStdin,
    wanted: &'a dyn Fn() -> bool,
}

impl<'a> Pipe<'a> {
    fn new(pipe: ChildStdin, wanted: &'a dyn Fn() -> bool) -> io::Result<Self> {
        // Of this end only: the program's end is another open file.
        rustix::fs::fcntl_setfl(&pipe, rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { pipe, wanted })
    }
}

impl Write for Pipe<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.pipe.write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if !(self.wanted)() {
                return Err(io::Error::other("it takes nothing, and the wave goes on without this node"));
            }
            let mut fds = [PollFd::new(&self.pipe, PollFlags::OUT)];
            match poll(&mut fds, Some(&LOOK)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How often a pipe that takes nothing is looked at.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

fn pipe_to(
    reader: &mut impl BufRead,
    command: &str,
    observer: &mut impl Observer,
    wanted: &dyn Fn() -> bool,
) -> Result<()> {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("running the sink command `{command}`"))?;
    let pipe = child.stdin.take().context("the sink command has no input")?;
    let mut pipe = Pipe::new(pipe, wanted).context("preparing the sink command's input")?;
    let copied = loop {
        match reader.fill_buf() {
            Ok([]) => break Ok(()),
            Ok(bytes) => {
                let n = bytes.len();
                if let Err(e) = pipe.write_all(bytes) {
                    break Err(e).with_context(|| format!("writing to the sink command `{command}`"));
                }
                reader.consume(n);
                observer.bytes(n as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => break Err(e).context("receiving the stream"),
        }
    };
    if copied.is_err() {
        // Before its input ends: a program that was fed half a stream must not finish as if it were whole. It may be gone
        // already.
        let _ = child.kill();
    }
    drop(pipe);
    let status = loop {
        let status = child.try_wait().with_context(|| format!("waiting for the sink command `{command}`"))?;
        if let Some(status) = status {
            break status;
        }
        if !wanted() {
            let _ = child.kill();
            bail!("the sink command `{command}` does not end, and the wave goes on without this node");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // How it ended says more than the broken pipe that followed.
    if !status.success() && (copied.is_ok() || status.code().is_some()) {
        match (status.code(), status.signal()) {
            (Some(code), _) => bail!("the sink command `{command}` ended with exit status {code}"),
            (None, signal) => {
                bail!("the sink command `{command}` ended by signal {}", signal.unwrap_or_default())
            }
        }
    }
    copied
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_command_that_fails_is_a_failure_whether_it_reads_or_not() {
        let big = vec![7; 4 << 20];
        let mut counters = &Counters::default();
        for (command, expected) in [
            ("cat >/dev/null; exit 5", "the sink command `cat >/dev/null; exit 5` ended with exit status 5"),
            ("exit 6", "the sink command `exit 6` ended with exit status 6"),
        ] {
            let error = pipe_to(&mut &big[..], command, &mut counters, &|| true).unwrap_err();
            assert_eq!(format!("{error:#}"), expected);
        }
        pipe_to(&mut &big[..], "cat >/dev/null", &mut counters, &|| true).unwrap();
        pipe_to(&mut &big[..], "sleep 0.3; cat >/dev/null", &mut counters, &|| true).unwrap();
    }

    /// Also what the shell has started holds the pipe.
    #[test]
    fn a_sink_command_that_takes_nothing_does_not_hold_a_node_that_is_out_of_its_wave() {
        let start = std::time::Instant::now();
        let wanted = || start.elapsed() < Duration::from_millis(500);
        let error = pipe_to(&mut &vec![7; 4 << 20][..], "sleep 20; true", &mut &Counters::default(), &wanted);
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.ends_with("the wave goes on without this node"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_sink_command_that_does_not_end_does_not_hold_it_either() {
        let start = std::time::Instant::now();
        let wanted = || start.elapsed() < Duration::from_millis(500);
        let command = "cat >/dev/null; exec sleep 20";
        let error = pipe_to(&mut &vec![7; 1 << 20][..], command, &mut &Counters::default(), &wanted);
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("does not end, and the wave goes on without this node"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_is_discarded_is_counted_and_an_early_end_is_an_error() {
        let mut counters = &Counters::default();
        discard(&mut &vec![7; 200_000][..], &mut counters).unwrap();
        assert_eq!(counters.consumed.load(Ordering::Relaxed), 200_000);
        struct Broken;
        impl std::io::Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("cut"))
            }
        }
        assert!(
            format!("{:#}", discard(&mut io::BufReader::new(Broken), &mut counters).unwrap_err())
                .ends_with("cut")
        );
    }
}
