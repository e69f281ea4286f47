//! One TCP connection from a parent to its child. The child dials, names the link and says which chunk it wants next; the
//! parent answers; then whole chunks flow down and acknowledgements up. Chunks are sealed already: the link only moves
//! them.
//!
//! | greeting of the child | bytes | answer of the parent | bytes |
//! |---|---|---|---|
//! | `KADATA02` | 8 | `KADATAOK` | 8 |
//! | id of the link | 16 | 0 welcome, 1 that chunk has left | 1 |
//! | the chunk wanted next, little endian | 8 | the oldest chunk held, little endian | 8 |

use crate::Error;
use crate::core::Acknowledgement;
use crate::core::relay::Answer;
use rustix::net::sockopt;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A handshake that takes longer is dropped.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
/// First bytes of a data connection, from the child.
pub const HELLO: [u8; 8] = *b"KADATA02";
/// The parent's answer.
const WELCOME: [u8; 8] = *b"KADATAOK";
/// Send and receive buffers of data sockets; 1 MiB fixed was measured best.
const SOCKET_BUFFER: usize = 1 << 20;
/// Between the attempts to reach a parent at its several addresses.
const STAGGER: Duration = Duration::from_millis(250);
/// The longest acknowledgement on the wire.
const LONGEST: usize = u16::MAX as usize;

/// Names one link of one wave; random, told by the server to both ends and to nobody else.
pub type LinkId = [u8; 16];

/// Prepares a data socket after its handshake: from now on it does not block. The congestion control is set to cubic where
/// the kernel has it, because bbr was measured at three times the CPU and a third of the speed on a local chain.
///
/// # Errors
/// When the socket refuses an option that every kernel has.
pub fn prepare(stream: &TcpStream) -> Result<(), Error> {
    let option = || Error::io("setting a data socket's options");
    stream.set_nodelay(true).map_err(option())?;
    stream.set_nonblocking(true).map_err(option())?;
    sockopt::set_socket_send_buffer_size(stream, SOCKET_BUFFER).map_err(|e| option()(e.into()))?;
    sockopt::set_socket_recv_buffer_size(stream, SOCKET_BUFFER).map_err(|e| option()(e.into()))?;
    sockopt::set_socket_keepalive(stream, true).map_err(|e| option()(e.into()))?;
    if let Err(e) = sockopt::set_tcp_congestion(stream, "cubic") {
        log::debug!("cubic congestion control is not to be had ({e}); the kernel's default stays");
    }
    Ok(())
}

/// What came of dialling.
#[derive(Debug)]
pub enum Dialled {
    /// The parent sends from the chunk on that was wanted.
    Open(TcpStream),
    /// That chunk has left its window; this is the oldest one there.
    Lacking(u64),
}

/// Dials a parent: its addresses are tried one after the other, a quarter of a second apart, and the first handshake that
/// completes wins. Ends at the latest after [`HANDSHAKE`] and the stagger.
///
/// # Errors
/// [`Error::Io`] naming the last failure.
pub fn dial(addresses: &[SocketAddr], link: &LinkId, want: u64) -> Result<Dialled, Error> {
    let end = Instant::now() + HANDSHAKE;
    let mut last = Error::Malformed("the parent has no address".to_owned());
    let (sender, connected) = channel();
    let mut waiting = addresses.iter();
    let mut under_way = 0;
    let mut next = Instant::now();
    loop {
        if Instant::now() >= next
            && let Some(address) = waiting.next()
        {
            let (address, sender) = (*address, sender.clone());
            std::thread::spawn(move || {
                // Nobody waits any more when another address was quicker.
                let _ = sender.send((address, TcpStream::connect_timeout(&address, HANDSHAKE)));
            });
            under_way += 1;
            next = Instant::now() + STAGGER;
        }
        if under_way == 0 && waiting.len() == 0 {
            return Err(last);
        }
        let pause = if waiting.len() == 0 { end } else { next.min(end) };
        match connected.recv_timeout(pause.saturating_duration_since(Instant::now())) {
            Ok((address, result)) => {
                under_way -= 1;
                let answer = result
                    .map_err(Error::io(format!("connecting to the parent at {address}")))
                    .and_then(|stream| greet(stream, address, link, want, end));
                match answer {
                    Ok(dialled) => return Ok(dialled),
                    Err(e) => {
                        log::debug!("{e}");
                        last = e;
                        // A refusal needs no waiting for the next address.
                        next = Instant::now();
                    }
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) if Instant::now() >= end => {
                return Err(Error::Malformed(format!("no handshake with the parent in time; last: {last}")));
            }
            Err(_) => {}
        }
    }
}

fn greet(
    mut stream: TcpStream,
    address: SocketAddr,
    link: &LinkId,
    want: u64,
    end: Instant,
) -> Result<Dialled, Error> {
    let to = |what: &str| Error::io(format!("{what} the parent at {address}"));
    stream.set_write_timeout(Some(HANDSHAKE)).map_err(to("preparing the socket to"))?;
    let mut hello = [0; 32];
    hello[..8].copy_from_slice(&HELLO);
    hello[8..24].copy_from_slice(link);
    hello[24..].copy_from_slice(&want.to_le_bytes());
    stream.write_all(&hello).map_err(to("greeting"))?;
    let mut answer = [0; 17];
    Until(&stream, end).read_exact(&mut answer).map_err(to("waiting for an answer of"))?;
    if answer[..8] != WELCOME {
        return Err(Error::Malformed(format!("{address} answers, but not as a parent of the chain")));
    }
    let mut oldest = [0; 8];
    oldest.copy_from_slice(&answer[9..]);
    match answer[8] {
        0 => {
            prepare(&stream)?;
            Ok(Dialled::Open(stream))
        }
        1 => Ok(Dialled::Lacking(u64::from_le_bytes(oldest))),
        other => Err(Error::Malformed(format!("the parent at {address} answers with {other}"))),
    }
}

/// Reads from a socket until a moment that holds for the whole of what is read: a peer that sends a byte now and then must
/// not hold a handshake open.
#[derive(Debug)]
pub struct Until<'a>(pub &'a TcpStream, pub Instant);

impl Read for Until<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let left = self.1.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        self.0.set_read_timeout(Some(left))?;
        (&mut &*self.0).read(out)
    }
}

/// Reads the rest of a child's greeting, after [`HELLO`]: the link, and the chunk that it wants.
///
/// # Errors
/// [`Error::Io`] when it does not come in time.
pub fn read_greeting(stream: &mut impl Read) -> Result<(LinkId, u64), Error> {
    let (mut link, mut want) = ([0; 16], [0; 8]);
    let what = || Error::io("reading a child's greeting");
    stream.read_exact(&mut link).map_err(what())?;
    stream.read_exact(&mut want).map_err(what())?;
    Ok((link, u64::from_le_bytes(want)))
}

/// Answers a child.
///
/// # Errors
/// [`Error::Io`].
pub fn answer(stream: &mut impl Write, answer: Answer) -> Result<(), Error> {
    let (code, oldest) = match answer {
        Answer::Welcome => (0, 0),
        Answer::Lacking(oldest) => (1, oldest),
        Answer::Unknown => return Err(Error::Malformed("it names no link that is expected".to_owned())),
    };
    let mut bytes = [0; 17];
    bytes[..8].copy_from_slice(&WELCOME);
    bytes[8] = code;
    bytes[9..].copy_from_slice(&oldest.to_le_bytes());
    stream.write_all(&bytes).map_err(Error::io("answering a child"))
}

/// An acknowledgement on the wire: its length (2 bytes, little endian), then postcard.
///
/// # Errors
/// [`Error::Malformed`] when it is too long.
pub fn write_acknowledgement(said: &Acknowledgement, out: &mut Vec<u8>) -> Result<(), Error> {
    let body = postcard::to_stdvec(said)
        .map_err(|e| Error::Malformed(format!("writing an acknowledgement: {e}")))?;
    let len = u16::try_from(body.len())
        .map_err(|_| Error::Malformed(format!("an acknowledgement of {} bytes is too long", body.len())))?;
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&body);
    Ok(())
}

/// Takes the first whole acknowledgement out of what a child has sent so far.
///
/// # Errors
/// [`Error::Malformed`].
pub fn read_acknowledgement(inbox: &mut Vec<u8>) -> Result<Option<Acknowledgement>, Error> {
    let Some(len) = inbox.get(..2) else { return Ok(None) };
    let end = 2 + usize::from(u16::from_le_bytes([len[0], len[1]]));
    let Some(body) = inbox.get(2..end) else { return Ok(None) };
    let said = postcard::from_bytes(body)
        .map_err(|e| Error::Malformed(format!("an acknowledgement that cannot be read: {e}")))?;
    inbox.drain(..end);
    Ok(Some(said))
}

/// The most that may wait in an inbox before it holds a whole acknowledgement.
pub const INBOX: usize = LONGEST + 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::NodeId;
    use proptest::prelude::*;
    use std::net::TcpListener;

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut inbox = bytes.clone();
            while let Ok(Some(_)) = read_acknowledgement(&mut inbox) {}
            prop_assert!(inbox.len() <= bytes.len());
            let _ = read_greeting(&mut &bytes[..]);
        }

        #[test]
        fn acknowledgements_pass_however_they_are_cut(
            full: bool, held in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..40), cut: prop::sample::Index
        ) {
            let held = held.into_iter().map(|(n, p)| (NodeId(n), p)).collect();
            let said = Acknowledgement { full, held };
            let mut wire = Vec::new();
            write_acknowledgement(&said, &mut wire).unwrap();
            write_acknowledgement(&said, &mut wire).unwrap();
            let cut = cut.index(wire.len());
            let mut inbox = Vec::new();
            let mut seen = 0;
            for piece in [&wire[..cut], &wire[cut..]] {
                inbox.extend_from_slice(piece);
                while let Some(read) = read_acknowledgement(&mut inbox).unwrap() {
                    prop_assert_eq!(&read, &said);
                    seen += 1;
                }
            }
            prop_assert!(seen == 2 && inbox.is_empty());
        }
    }

    #[test]
    fn the_first_address_that_answers_wins_and_a_parent_that_nobody_is_fails_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = listener.local_addr().unwrap();
        let refused = {
            let gone = TcpListener::bind("127.0.0.1:0").unwrap();
            gone.local_addr().unwrap()
        };
        let parent = std::thread::spawn(move || {
            for reply in [Answer::Welcome, Answer::Lacking(7)] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut hello = [0; 8];
                stream.read_exact(&mut hello).unwrap();
                assert_eq!(hello, HELLO);
                assert_eq!(read_greeting(&mut stream).unwrap(), ([3; 16], 5));
                answer(&mut stream, reply).unwrap();
            }
        });
        assert!(matches!(dial(&[refused, good], &[3; 16], 5), Ok(Dialled::Open(_))));
        assert!(matches!(dial(&[good], &[3; 16], 5), Ok(Dialled::Lacking(7))));
        parent.join().unwrap();
        let start = Instant::now();
        assert!(dial(&[refused], &[3; 16], 5).is_err() && dial(&[], &[3; 16], 5).is_err());
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}
