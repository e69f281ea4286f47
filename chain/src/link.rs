//! One TCP connection from a parent to its child. The child dials, names the link and says which chunk it wants next; the
//! parent answers; then whole chunks flow down and acknowledgements up. Chunks are sealed already: the link only moves
//! them. That both ends are who the server meant is shown by a Noise session with the link's secret ([`mod@noise`]).
//!
//! In clear go `KADATA03` and the id of the link (16 bytes), then the handshake: its first message holds the chunk that is
//! wanted next (8 bytes, little endian), the answer one byte, 0 welcome or 1 that chunk has left, and the oldest chunk
//! held (8 bytes). Acknowledgements are frames of the session. The first message can be repeated by somebody who heard it,
//! so nothing changes at the parent before the child's first acknowledgement has opened.

use crate::Error;
use crate::core::relay::Answer;
use crate::core::{Acknowledgement, Link, NodeId};
use crate::noise::link::{LinkSecret, LinkSession};
use crate::noise::{self, Bounded};
use crate::seal::Wave;
use rustix::net::sockopt;
use socket2::{Domain, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A handshake that takes longer is dropped.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
/// First bytes of a data connection, from the child.
pub const HELLO: [u8; 8] = *b"KADATA03";
/// Send and receive buffers of data sockets; 1 MiB fixed was measured best.
const SOCKET_BUFFER: usize = 1 << 20;
/// Between the attempts to reach a parent at its several addresses.
const STAGGER: Duration = Duration::from_millis(250);

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
    sockopt::set_socket_keepalive(stream, true).map_err(|e| option()(e.into()))?;
    if let Err(e) = sockopt::set_tcp_congestion(stream, "cubic") {
        log::debug!("cubic congestion control is not to be had ({e}); the kernel's default stays");
    }
    Ok(())
}

/// Connects a data socket. Its receive buffer has its size before the handshake, since what it is then limits the window
/// that is ever offered.
fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.connect_timeout(&address.into(), HANDSHAKE)?;
    Ok(socket.into())
}

/// Both ends of a link, the same at both: what the session is bound to.
#[must_use]
pub fn prologue(wave: &Wave, link: &LinkId, parent: NodeId, child: NodeId) -> Vec<u8> {
    let mut text = HELLO.to_vec();
    text.extend_from_slice(&wave.deployment);
    text.extend_from_slice(&wave.number.to_le_bytes());
    text.extend_from_slice(link);
    text.extend_from_slice(&parent.0.to_le_bytes());
    text.extend_from_slice(&child.0.to_le_bytes());
    text
}

/// What came of dialling.
#[derive(Debug)]
pub enum Dialled {
    /// The parent sends from the chunk on that was wanted.
    Open(TcpStream, Box<LinkSession>),
    /// That chunk has left its window; this is the oldest one there.
    Lacking(u64),
}

/// Dials a parent: its addresses are tried one after the other, a quarter of a second apart, and the first handshake that
/// completes wins. Ends at the latest after [`HANDSHAKE`] and the stagger.
///
/// # Errors
/// [`Error::Io`] naming the last failure.
pub fn dial(addresses: &[SocketAddr], link: &Link, prologue: &[u8], want: u64) -> Result<Dialled, Error> {
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
                let _ = sender.send((address, connect(address)));
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
                    .and_then(|stream| greet(stream, address, link, prologue, want, end));
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
    link: &Link,
    prologue: &[u8],
    want: u64,
    end: Instant,
) -> Result<Dialled, Error> {
    let mut hello = HELLO.to_vec();
    hello.extend_from_slice(&link.id);
    Bounded::new(&stream, end)
        .write_all(&hello)
        .map_err(Error::io(format!("greeting the parent at {address}")))?;
    let secret = LinkSecret(link.secret);
    let (session, answer) = LinkSession::initiate(&mut stream, &secret, prologue, &want.to_le_bytes(), end)
        .map_err(|e| Error::Malformed(format!("the parent at {address}: {e}")))?;
    match <[u8; 9]>::try_from(answer) {
        Ok([0, ..]) => {
            prepare(&stream)?;
            Ok(Dialled::Open(stream, Box::new(session)))
        }
        Ok([1, oldest @ ..]) => Ok(Dialled::Lacking(u64::from_le_bytes(oldest))),
        _ => Err(Error::Malformed(format!("the parent at {address} answers in another way than it may"))),
    }
}

/// Reads the rest of a child's greeting, after [`HELLO`]: the link.
///
/// # Errors
/// [`Error::Io`] when it does not come in time.
pub fn read_link(stream: &TcpStream, end: Instant) -> Result<LinkId, Error> {
    let mut link = [0; 16];
    Bounded::new(stream, end).read_exact(&mut link).map_err(Error::io("reading a child's greeting"))?;
    Ok(link)
}

/// The parent's part of the handshake: `say` gives the answer for the chunk that the child wants. The session, and that
/// chunk.
///
/// # Errors
/// [`Error::Handshake`] when the child does not hold the link's secret; [`Error::Io`]; what `say` refuses.
pub fn respond(
    stream: &mut TcpStream,
    link: &Link,
    prologue: &[u8],
    end: Instant,
    say: impl FnOnce(u64) -> Result<Answer, Error>,
) -> Result<(LinkSession, u64, Answer), Error> {
    let mut said = None;
    let secret = LinkSecret(link.secret);
    let session = LinkSession::respond(stream, &secret, prologue, end, |payload| {
        let want = payload
            .try_into()
            .map(u64::from_le_bytes)
            .map_err(|_| Error::Malformed("a child that says something else than a chunk".to_owned()))?;
        let answer = say(want)?;
        said = Some((want, answer));
        let (code, oldest) = match answer {
            Answer::Welcome => (0, 0),
            Answer::Lacking(oldest) => (1, oldest),
            Answer::Unknown => return Err(Error::Malformed("it names no link that is expected".to_owned())),
        };
        Ok([&[code], &oldest.to_le_bytes()[..]].concat())
    })?;
    let (want, answer) = said.ok_or_else(|| Error::Malformed("a handshake without a question".to_owned()))?;
    Ok((session, want, answer))
}

/// Waits for the child's first acknowledgement, which proves that it is there now.
///
/// # Errors
/// [`Error::Io`], [`Error::Frame`], [`Error::Malformed`].
pub fn first_acknowledgement(
    stream: &TcpStream,
    session: &mut LinkSession,
    end: Instant,
) -> Result<Acknowledgement, Error> {
    let mut stream = Bounded::new(stream, end);
    let what = || Error::io("reading a child's first acknowledgement");
    let mut len = [0; 2];
    stream.read_exact(&mut len).map_err(what())?;
    let mut frame = vec![0; usize::from(u16::from_le_bytes(len))];
    stream.read_exact(&mut frame).map_err(what())?;
    parse(&session.open(&frame)?)
}

fn parse(plain: &[u8]) -> Result<Acknowledgement, Error> {
    postcard::from_bytes(plain)
        .map_err(|e| Error::Malformed(format!("an acknowledgement that cannot be read: {e}")))
}

/// Appends an acknowledgement to `out`: a frame of the session, postcard inside.
///
/// # Errors
/// [`Error::Malformed`] when it is too long.
pub fn write_acknowledgement(
    session: &mut LinkSession,
    said: &Acknowledgement,
    out: &mut Vec<u8>,
) -> Result<(), Error> {
    let body = postcard::to_stdvec(said)
        .map_err(|e| Error::Malformed(format!("writing an acknowledgement: {e}")))?;
    session.seal(&body, out)
}

/// Takes the first whole acknowledgement out of what a child has sent so far.
///
/// # Errors
/// [`Error::Frame`], [`Error::Malformed`].
pub fn read_acknowledgement(
    session: &mut LinkSession,
    inbox: &mut Vec<u8>,
) -> Result<Option<Acknowledgement>, Error> {
    let Some((frame, used)) = noise::first_frame(inbox) else { return Ok(None) };
    let said = parse(&session.open(frame)?)?;
    inbox.drain(..used);
    Ok(Some(said))
}

/// The most that may wait in an inbox before it holds a whole acknowledgement.
pub const INBOX: usize = noise::FRAME + 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::NodeId;
    use proptest::prelude::*;
    use std::net::TcpListener;

    fn wave() -> Wave {
        Wave::new([1; 16], 1).unwrap()
    }

    fn secret_link() -> Link {
        Link { id: [3; 16], secret: [9; 32] }
    }

    fn sessions() -> (LinkSession, LinkSession) {
        let secret = LinkSecret([9; 32]);
        let (begun, first) = crate::noise::link::Begun::new(&secret, b"x", &[0; 8]).unwrap();
        let (parent, second) = LinkSession::answer(&secret, b"x", &first[2..], |_| Ok(vec![0; 9])).unwrap();
        (begun.finish(&second[2..]).unwrap().0, parent)
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let (_, mut parent) = sessions();
            let mut inbox = bytes.clone();
            while let Ok(Some(_)) = read_acknowledgement(&mut parent, &mut inbox) {
                prop_assert!(false, "nobody who holds the key sent this");
            }
            let _ = parse(&bytes);
        }

        #[test]
        fn acknowledgements_pass_however_they_are_cut(
            full: bool, held in proptest::collection::vec((any::<u32>(), any::<u64>()), 0..40), cut: prop::sample::Index
        ) {
            let (mut child, mut parent) = sessions();
            let held = held.into_iter().map(|(n, p)| (NodeId(n), p)).collect();
            let said = Acknowledgement { full, held };
            let mut wire = Vec::new();
            write_acknowledgement(&mut child, &said, &mut wire).unwrap();
            write_acknowledgement(&mut child, &said, &mut wire).unwrap();
            let cut = cut.index(wire.len());
            let mut inbox = Vec::new();
            let mut seen = 0;
            for piece in [&wire[..cut], &wire[cut..]] {
                inbox.extend_from_slice(piece);
                while let Some(read) = read_acknowledgement(&mut parent, &mut inbox).unwrap() {
                    prop_assert_eq!(&read, &said);
                    seen += 1;
                }
            }
            prop_assert!(seen == 2 && inbox.is_empty());
        }
    }

    /// A parent that answers like this, once for each.
    fn parent(answers: Vec<Answer>) -> (SocketAddr, std::thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let mut said = Vec::new();
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let end = Instant::now() + HANDSHAKE;
                let mut hello = [0; 8];
                Bounded::new(&stream, end).read_exact(&mut hello).unwrap();
                assert_eq!((hello, read_link(&stream, end).unwrap()), (HELLO, [3; 16]));
                let prologue = prologue(&wave(), &[3; 16], NodeId(1), NodeId(2));
                let result = respond(&mut stream, &secret_link(), &prologue, end, |want| {
                    assert_eq!(want, 5);
                    Ok(answer)
                });
                said.push(match result {
                    Ok(_) => "well".to_owned(),
                    Err(e) => e.to_string(),
                });
            }
            said
        });
        (address, thread)
    }

    #[test]
    fn the_first_address_that_answers_wins_and_a_parent_that_nobody_is_fails_at_once() {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = gone.local_addr().unwrap();
        drop(gone);
        let (good, thread) = parent(vec![Answer::Welcome, Answer::Lacking(7)]);
        let place = prologue(&wave(), &[3; 16], NodeId(1), NodeId(2));
        assert!(matches!(dial(&[refused, good], &secret_link(), &place, 5), Ok(Dialled::Open(..))));
        assert!(matches!(dial(&[good], &secret_link(), &place, 5), Ok(Dialled::Lacking(7))));
        assert_eq!(thread.join().unwrap(), ["well", "well"]);
        let start = Instant::now();
        assert!(dial(&[refused], &secret_link(), &place, 5).is_err());
        assert!(dial(&[], &secret_link(), &place, 5).is_err());
        assert!(start.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn without_the_secret_or_in_another_place_there_is_no_link() {
        let (address, thread) = parent(vec![Answer::Welcome, Answer::Welcome]);
        let place = prologue(&wave(), &[3; 16], NodeId(1), NodeId(2));
        let guessed = Link { secret: [8; 32], ..secret_link() };
        assert!(dial(&[address], &guessed, &place, 5).is_err());
        let elsewhere = prologue(&wave(), &[3; 16], NodeId(1), NodeId(3));
        assert!(dial(&[address], &secret_link(), &elsewhere, 5).is_err());
        for said in thread.join().unwrap() {
            assert!(said.contains("secret"), "{said}");
        }
    }
}
