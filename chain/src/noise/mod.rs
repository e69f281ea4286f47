//! Encrypted sessions over TCP, by the Noise protocol. [`control`] is the session between a node and the server, [`link`]
//! the one between a child and its parent; here is what both share: frames, the sealing and opening of them, and a
//! handshake that is bounded in time.
//!
//! A frame is a length (2 bytes, little endian) and as many bytes of ciphertext, 65535 at most. Each direction numbers
//! its frames; a frame that is altered, repeated, left out or exchanged does not open, and the session is over.

pub mod control;
pub mod link;

use crate::Error;
use snow::{HandshakeState, StatelessTransportState};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest frame without its length.
pub const FRAME: usize = 65_535;
/// Bytes that sealing adds.
pub const TAG: usize = 16;
/// The most plain bytes of one frame.
pub const PLAIN: usize = FRAME - TAG;
/// Bytes of a public key at the beginning of a handshake message.
const KEY: usize = 32;

/// Seals frames in one direction.
pub struct Sealer {
    state: Arc<StatelessTransportState>,
    next: u64,
}

/// Opens frames of one direction, each once and in order.
pub struct Opener {
    state: Arc<StatelessTransportState>,
    next: u64,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("next", &self.next).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Sealer {
    /// Appends `plain` to `out` as one frame, its length in front.
    ///
    /// # Errors
    /// [`Error::Malformed`] when it is longer than [`PLAIN`].
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        let len = u16::try_from(plain.len() + TAG)
            .map_err(|_| Error::Malformed(format!("{} bytes do not fit into a frame", plain.len())))?;
        let start = out.len();
        out.extend_from_slice(&len.to_le_bytes());
        out.resize(start + 2 + usize::from(len), 0);
        self.state
            .write_message(self.next, plain, &mut out[start + 2..])
            .map_err(|e| Error::Malformed(format!("sealing a frame: {e}")))?;
        self.next += 1;
        Ok(())
    }
}

impl Opener {
    /// Opens a frame (without its length) into `plain`, which is overwritten.
    ///
    /// # Errors
    /// [`Error::Frame`] when it is not the next frame as the other side sealed it. The session is over then: nothing
    /// that comes after it can be trusted to be in its place.
    pub fn open(&mut self, frame: &[u8], plain: &mut Vec<u8>) -> Result<(), Error> {
        let number = self.next;
        if !(TAG..=FRAME).contains(&frame.len()) {
            return Err(Error::Frame(number));
        }
        // As long as the ciphertext: then it is opened in place, without another copy.
        plain.clear();
        plain.resize(frame.len(), 0);
        let len = self.state.read_message(number, frame, plain).map_err(|_| Error::Frame(number))?;
        plain.truncate(len);
        self.next += 1;
        Ok(())
    }
}

/// The two directions after a handshake.
fn split(state: HandshakeState) -> Result<(Sealer, Opener), Error> {
    let state = state
        .into_stateless_transport_mode()
        .map_err(|e| Error::Malformed(format!("ending the handshake: {e}")))?;
    let state = Arc::new(state);
    Ok((Sealer { state: Arc::clone(&state), next: 0 }, Opener { state, next: 0 }))
}

/// The first frame in `bytes` without its length, and how many bytes it takes with it; `None` when it is not whole yet.
#[must_use]
pub fn first_frame(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let len = usize::from(u16::from_le_bytes([*bytes.first()?, *bytes.get(1)?]));
    bytes.get(2..2 + len).map(|frame| (frame, 2 + len))
}

/// Writes the next message of a handshake, with its length in front.
fn handshake_message(state: &mut HandshakeState, payload: &[u8]) -> Result<Vec<u8>, Error> {
    // Both patterns send one public key with each message.
    let mut message = vec![0; 2 + KEY + payload.len() + TAG];
    let len = state
        .write_message(payload, &mut message[2..])
        .map_err(|e| Error::Malformed(format!("writing a handshake: {e}")))?;
    message.truncate(2 + len);
    let len = u16::try_from(len).map_err(|_| Error::Malformed("a handshake that is too long".to_owned()))?;
    message[..2].copy_from_slice(&len.to_le_bytes());
    Ok(message)
}

/// Reads a message of a handshake; `None` when it does not open under our keys.
fn handshake_payload(state: &mut HandshakeState, message: &[u8]) -> Option<Vec<u8>> {
    let mut payload = vec![0; message.len()];
    let len = state.read_message(message, &mut payload).ok()?;
    payload.truncate(len);
    Some(payload)
}

/// A socket with a deadline for everything that is read and written, not for each call: whoever sends a byte now and
/// then gains nothing by it.
#[derive(Debug)]
pub struct Bounded<'a> {
    stream: &'a TcpStream,
    end: Instant,
}

impl<'a> Bounded<'a> {
    /// `stream` until `end`. The socket's time limits are set anew at every call and are left as they are at the last.
    #[must_use]
    pub const fn new(stream: &'a TcpStream, end: Instant) -> Self {
        Self { stream, end }
    }

    fn left(&self) -> io::Result<Duration> {
        match self.end.checked_duration_since(Instant::now()) {
            // The kernel counts in milliseconds or coarser; none would mean no limit at all.
            Some(left) if !left.is_zero() => Ok(left.max(Duration::from_millis(1))),
            _ => Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")),
        }
    }
}

/// The kernel says "try again" when a socket's time is over.
fn timed(result: io::Result<usize>) -> io::Result<usize> {
    result.map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long"),
        _ => e,
    })
}

impl Read for Bounded<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        let mut stream = self.stream;
        timed(stream.read(buf))
    }
}

impl Write for Bounded<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        let mut stream = self.stream;
        timed(stream.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a frame of a handshake, `longest` bytes at most.
fn read_handshake(stream: &mut impl Read, longest: usize) -> Result<Vec<u8>, Error> {
    let failed = || Error::io("reading the other side's handshake");
    let mut len = [0; 2];
    stream.read_exact(&mut len).map_err(failed())?;
    let len = usize::from(u16::from_le_bytes(len));
    if len > longest {
        return Err(Error::Malformed(format!("a handshake message claims {len} bytes")));
    }
    let mut message = vec![0; len];
    stream.read_exact(&mut message).map_err(failed())?;
    Ok(message)
}
