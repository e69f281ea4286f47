//! One TCP connection from a parent to its child. The child dials and names the link; the parent answers; then whole
//! chunks flow. What is sent here is sealed already: the link only moves it.

use crate::Error;
use crate::buffer::Pool;
use crate::chunk::{HEADER, Header, Kind, Sealed};
use crate::seal::Seal;
use crate::stream::{EndRecord, Tally, check_end};
use crate::window::{Cursor, Window};
use rustix::net::sockopt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A handshake that takes longer is dropped.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
/// First bytes of a data connection, from the child.
pub const HELLO: [u8; 8] = *b"KADATA01";
/// The parent's answer.
const WELCOME: [u8; 8] = *b"KADATAOK";
/// Send and receive buffers of data sockets; 1 MiB fixed was measured best.
const SOCKET_BUFFER: usize = 1 << 20;

/// Names one link of one wave; random, told by the server to both ends and to nobody else.
pub type LinkId = [u8; 16];

/// Prepares a data socket. The congestion control is set to cubic where the kernel has it, because bbr was measured at
/// three times the CPU and a third of the speed on a local chain.
///
/// # Errors
/// When the socket refuses an option that every kernel has.
pub fn prepare(stream: &TcpStream) -> Result<(), Error> {
    let option = || Error::io("setting a data socket's options");
    stream.set_nodelay(true).map_err(option())?;
    stream.set_read_timeout(None).map_err(option())?;
    stream.set_write_timeout(None).map_err(option())?;
    sockopt::set_socket_send_buffer_size(stream, SOCKET_BUFFER).map_err(|e| option()(e.into()))?;
    sockopt::set_socket_recv_buffer_size(stream, SOCKET_BUFFER).map_err(|e| option()(e.into()))?;
    sockopt::set_socket_keepalive(stream, true).map_err(|e| option()(e.into()))?;
    if let Err(e) = sockopt::set_tcp_congestion(stream, "cubic") {
        log::debug!("cubic congestion control is not to be had ({e}); the kernel's default stays");
    }
    Ok(())
}

/// Dials a parent at the first of `addresses` that answers, trying them in turn until `deadline`.
///
/// # Errors
/// [`Error::Io`] naming the last failure.
pub fn dial(addresses: &[SocketAddr], link: &LinkId, deadline: Instant) -> Result<TcpStream, Error> {
    let mut last = Error::Malformed("the parent has no address".to_owned());
    let mut pause = Duration::from_millis(50);
    loop {
        for address in addresses {
            match dial_one(*address, link) {
                Ok(stream) => return Ok(stream),
                Err(e) => {
                    log::debug!("{e}");
                    last = e;
                }
            }
        }
        if Instant::now() + pause >= deadline || addresses.is_empty() {
            return Err(last);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

fn dial_one(address: SocketAddr, link: &LinkId) -> Result<TcpStream, Error> {
    let to = |what: &str| Error::io(format!("{what} the parent at {address}"));
    let mut stream = TcpStream::connect_timeout(&address, HANDSHAKE).map_err(to("connecting to"))?;
    stream.set_read_timeout(Some(HANDSHAKE)).map_err(to("preparing the socket to"))?;
    stream.set_write_timeout(Some(HANDSHAKE)).map_err(to("preparing the socket to"))?;
    let mut hello = [0; 24];
    hello[..8].copy_from_slice(&HELLO);
    hello[8..].copy_from_slice(link);
    stream.write_all(&hello).map_err(to("greeting"))?;
    let mut welcome = [0; 8];
    stream.read_exact(&mut welcome).map_err(to("waiting for an answer of"))?;
    if welcome != WELCOME {
        return Err(Error::Malformed(format!("{address} answers, but not as a parent of the chain")));
    }
    prepare(&stream)?;
    Ok(stream)
}

/// Reads the rest of a child's greeting, after [`HELLO`]: the link that it names.
///
/// # Errors
/// [`Error::Io`] when it does not come within [`HANDSHAKE`].
pub fn read_link(stream: &mut TcpStream) -> Result<LinkId, Error> {
    let mut link = [0; 16];
    stream.read_exact(&mut link).map_err(Error::io("reading a child's greeting"))?;
    Ok(link)
}

/// Answers a child whose link is known.
///
/// # Errors
/// [`Error::Io`].
pub fn welcome(stream: &mut TcpStream) -> Result<(), Error> {
    stream.write_all(&WELCOME).map_err(Error::io("answering a child"))?;
    prepare(stream)
}

/// Sends every chunk that `cursor` gives, to the last. Whole chunks only: fragments would multiply at each hop.
///
/// # Errors
/// [`Error::Io`] when the child's connection failed, [`Error::Stopped`] when the window was stopped.
pub fn send_chunks(stream: &mut TcpStream, mut cursor: Cursor, sent: &AtomicU64) -> Result<(), Error> {
    while let Some(chunk) = cursor.next_chunk()? {
        let header = chunk.header.to_bytes();
        let mut slices = [IoSlice::new(&header), IoSlice::new(&chunk.bytes)];
        write_all_vectored(stream, &mut slices).map_err(Error::io("sending to the child"))?;
        sent.store(chunk.header.number + 1, Ordering::Relaxed);
    }
    Ok(())
}

fn write_all_vectored(out: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !slices.is_empty() {
        match out.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut slices, n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Counters that others read while a link receives.
#[derive(Debug, Default)]
pub struct Received {
    /// Chunks that came in and opened.
    pub chunks: AtomicU64,
    /// Bytes on the wire.
    pub wire: AtomicU64,
    /// Plain bytes of the data chunks.
    pub plain: AtomicU64,
}

/// Receives chunks into `window` until the end record. Each is opened before it is held or passed on, so a damaged one
/// goes no further.
///
/// # Errors
/// [`Error::Cut`] when the connection ends early, [`Error::Seal`], [`Error::Malformed`], [`Error::End`];
/// [`Error::GivenUp`] after the server's reason was passed on.
pub fn receive_chunks(
    stream: &mut TcpStream,
    seal: &Seal,
    window: &Window,
    pool: &Pool,
    received: &Received,
) -> Result<EndRecord, Error> {
    let mut tally = Tally::default();
    let mut next = 0;
    loop {
        let cut = |e: io::Error| {
            let why = if e.kind() == io::ErrorKind::UnexpectedEof {
                "the parent closed the connection".to_owned()
            } else {
                e.to_string()
            };
            Error::Cut(next, why)
        };
        let mut header = [0; HEADER];
        stream.read_exact(&mut header).map_err(cut)?;
        let header = Header::from_bytes(&header)?;
        if header.number != next {
            return Err(Error::Malformed(format!("chunk {} where {next} was next", header.number)));
        }
        let mut bytes = pool.take();
        bytes.resize(header.sealed as usize, 0);
        stream.read_exact(&mut bytes).map_err(cut)?;
        let chunk = Sealed { header, bytes };
        let opened = seal.open(&chunk, pool)?;
        next += 1;
        received.wire.fetch_add(chunk.wire_len() as u64, Ordering::Relaxed);
        match header.kind {
            Kind::Data | Kind::Part => {
                tally.add(&chunk);
                if header.kind == Kind::Data {
                    received.plain.fetch_add(u64::from(header.plain), Ordering::Relaxed);
                }
                window.push(chunk, Some(opened))?;
                received.chunks.store(next, Ordering::Relaxed);
            }
            Kind::End => {
                let record = check_end(&opened, &tally)?;
                window.push(chunk, Some(opened))?;
                received.chunks.store(next, Ordering::Relaxed);
                window.end();
                return Ok(record);
            }
            Kind::GivenUp => {
                let reason = String::from_utf8_lossy(&opened).into_owned();
                window.push(chunk, Some(opened))?;
                window.end();
                return Err(Error::GivenUp(reason));
            }
        }
    }
}
