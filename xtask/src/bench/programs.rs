//! Two small programs inside xtask that benchmarks start as processes of their own: the bare relay, which is the limit of
//! what a chain that copies through user space can reach, and a sink that digests what it gets. They are no commands of
//! `cargo xtask`: nothing but a benchmark has a use for them.

use anyhow::{Context, Result, bail};
use rustix::net::sockopt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// First word of the relay's command line.
pub const RELAY: &str = "bench-relay";
/// First word of the sink's command line.
pub const SINK: &str = "bench-sink";

/// The one buffer of a relay: hot in the cache, and one of Ka's chunks long.
const BUFFER: usize = 256 << 10;
/// Where the buffer begins. On some processors copies into one that malloc has placed, 16 bytes behind a page, take more
/// than twice the time (see `chain/src/buffer.rs`), and the limit is to be the limit.
const PAGE: usize = 4096;
/// Send and receive buffers of the relay's sockets, as Ka's data sockets have them.
const SOCKET_BUFFER: usize = 1 << 20;
/// How long a relay tries to reach the next one.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs one of the programs if `words` (without the program's own name) call for it.
#[must_use]
pub fn run(words: &[String]) -> Option<Result<()>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [RELAY, rest @ ..] => Some(parse(rest).and_then(|relay| relay.run())),
        [SINK, file] => Some(sink(&mut stdin()?, Path::new(file))),
        [SINK, ..] => Some(Err(anyhow::anyhow!("usage: {SINK} FILE"))),
        _ => None,
    }
}

/// Standard input without the standard library's buffer.
fn stdin() -> Option<File> {
    io::stdin().as_fd().try_clone_to_owned().ok().map(File::from)
}

/// One node of the bare chain.
#[derive(Debug, PartialEq, Eq)]
struct Relay {
    /// Where the parent connects; the head reads standard input instead.
    listen: Option<u16>,
    /// `ADDRESS:PORT` of the child; the last one drops what it reads.
    to: Option<String>,
}

fn parse(words: &[&str]) -> Result<Relay> {
    let mut relay = Relay { listen: None, to: None };
    let mut words = words.iter();
    while let Some(word) = words.next() {
        match (*word, words.next()) {
            ("--listen", Some(port)) => relay.listen = Some(port.parse().context("--listen")?),
            ("--to", Some(to)) => relay.to = Some((*to).to_owned()),
            _ => bail!("usage: {RELAY} [--listen PORT] [--to ADDRESS:PORT]"),
        }
    }
    Ok(relay)
}

impl Relay {
    fn run(&self) -> Result<()> {
        let listener = self
            .listen
            .map(|port| {
                TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("listening on port {port}"))
            })
            .transpose()?;
        // Who is reached listens already; a connection to the child stands before the first byte comes.
        let mut to = self.to.as_deref().map(dial).transpose()?;
        let mut room = vec![0; BUFFER + PAGE];
        let start = room.as_ptr().align_offset(PAGE).min(PAGE);
        let buffer = &mut room[start..start + BUFFER];
        match listener {
            Some(listener) => {
                let (mut from, _) = listener.accept().context("waiting for the parent")?;
                prepare(&from)?;
                pass(&mut from, to.as_mut(), buffer)
            }
            None => pass(&mut stdin().context("opening standard input")?, to.as_mut(), buffer),
        }
    }
}

fn dial(address: &str) -> Result<TcpStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => {
                prepare(&stream)?;
                return Ok(stream);
            }
            Err(e) if Instant::now() >= deadline => {
                return Err(e).with_context(|| format!("connecting to {address}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The same options as Ka's data sockets.
fn prepare(stream: &TcpStream) -> Result<()> {
    let setting = "setting a socket's options";
    stream.set_nodelay(true).context(setting)?;
    sockopt::set_socket_send_buffer_size(stream, SOCKET_BUFFER).context(setting)?;
    sockopt::set_socket_recv_buffer_size(stream, SOCKET_BUFFER).context(setting)?;
    sockopt::set_tcp_congestion(stream, "cubic").context(setting)
}

fn pass(from: &mut impl Read, mut to: Option<&mut impl Write>, buffer: &mut [u8]) -> Result<()> {
    loop {
        let n = match from.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e).context("reading"),
        };
        if let Some(to) = &mut to {
            to.write_all(&buffer[..n]).context("writing to the child")?;
        }
    }
}

/// Reads to the end, then writes `BYTES DIGEST` (BLAKE3) to `file` in one step, so that a file that is there is whole.
fn sink(from: &mut impl Read, file: &Path) -> Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER];
    let mut bytes = 0u64;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => {
                hasher.update(&buffer[..n]);
                bytes += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("reading"),
        }
    }
    let fresh = file.with_extension("new");
    std::fs::write(&fresh, format!("{bytes} {}\n", hasher.finalize().to_hex()))
        .with_context(|| format!("writing {}", fresh.display()))?;
    std::fs::rename(&fresh, file).with_context(|| format!("writing {}", file.display()))
}

/// What [`SINK`] writes about a file of these contents.
///
/// # Errors
/// When it cannot be read.
pub fn digest(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let mut hasher = blake3::Hasher::new();
    let bytes = io::copy(&mut file, &mut hasher).with_context(|| format!("reading {}", path.display()))?;
    Ok(format!("{bytes} {}", hasher.finalize().to_hex()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_relay_is_no_command_of_others() {
        assert!(run(&["demo".to_owned()]).is_none() && run(&[]).is_none());
        assert!(run(&[RELAY.to_owned(), "--to".to_owned()]).unwrap().is_err());
        assert!(run(&[SINK.to_owned()]).unwrap().is_err());
        let relay = parse(&["--listen", "7", "--to", "a:1"]).unwrap();
        assert_eq!(relay, Relay { listen: Some(7), to: Some("a:1".to_owned()) });
        assert!(parse(&["--listen", "many"]).is_err());
    }

    #[test]
    fn a_relay_passes_all_on_and_the_sink_digests_it() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..700_000u32).flat_map(u32::to_le_bytes).collect();
        let mut out = Vec::new();
        pass(&mut &bytes[..], Some(&mut out), &mut [0; 4096]).unwrap();
        assert!(out == bytes);
        let (input, result) = (folder.path().join("input"), folder.path().join("result"));
        std::fs::write(&input, &bytes).unwrap();
        sink(&mut &out[..], &result).unwrap();
        assert_eq!(std::fs::read_to_string(&result).unwrap().trim(), digest(&input).unwrap());
    }

    #[test]
    fn relays_connect_over_tcp() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let last = Relay { listen: Some(port), to: None };
        std::thread::scope(|scope| {
            let running = scope.spawn(move || last.run());
            let mut stream = dial(&format!("127.0.0.1:{port}")).unwrap();
            stream.write_all(&[1; 100_000]).unwrap();
            drop(stream);
            running.join().unwrap().unwrap();
        });
    }
}
