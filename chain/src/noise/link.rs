//! The session of a data link: Noise NNpsk0 with the link's secret, which the server told both ends and nobody else. The
//! prologue names what the link is (deployment, wave, link, both nodes); when the two ends do not mean the same, the
//! handshake does not open. After it small frames go in either direction: acknowledgements, and what the parent says.
//! Chunks do not pass through it: they are sealed by the server.
//!
//! The child begins. Its first message can be repeated by somebody who heard it, up to the answer: what a parent does
//! with the payload must do no harm twice, and only the first frame that opens proves that the child is there now.
//!
//! Everything is bytes in, bytes out; [`LinkSession::initiate`] and [`LinkSession::respond`] add a socket that blocks.

use super::{Bounded, FRAME, KEY, Opener, Sealer, TAG};
use super::{handshake_message, handshake_payload, read_handshake, split};
use crate::Error;
use snow::{Builder, HandshakeState};
use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

/// The Noise protocol of data links.
const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_BLAKE2s";
/// The most bytes that go with a handshake message.
pub const PAYLOAD: usize = FRAME - KEY - TAG;

/// The secret of one link; told by the server to both ends and to nobody else.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LinkSecret(pub [u8; 32]);

impl LinkSecret {
    /// A new one.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn generate() -> Result<Self, Error> {
        crate::seal::random().map(Self)
    }
}

impl std::fmt::Debug for LinkSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LinkSecret(secret)")
    }
}

fn builder<'a>(secret: &'a LinkSecret, prologue: &'a [u8]) -> Result<Builder<'a>, snow::Error> {
    Builder::new(PATTERN.parse()?).prologue(prologue)?.psk(0, &secret.0)
}

fn preparing(e: &snow::Error) -> Error {
    Error::Malformed(format!("preparing the handshake of a link: {e}"))
}

/// A handshake that the child has begun.
#[derive(Debug)]
pub struct Begun(Box<HandshakeState>);

impl Begun {
    /// The child's beginning: the message to send, its length in front, with `payload` in it.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the payload is longer than [`PAYLOAD`].
    pub fn new(secret: &LinkSecret, prologue: &[u8], payload: &[u8]) -> Result<(Self, Vec<u8>), Error> {
        let mut state =
            builder(secret, prologue).and_then(Builder::build_initiator).map_err(|e| preparing(&e))?;
        let message = handshake_message(&mut state, payload)?;
        Ok((Self(Box::new(state)), message))
    }

    /// The child's end: takes the parent's answer (without its length); the session and what the parent said.
    ///
    /// # Errors
    /// [`Error::Handshake`] when it is not that of the other end of this link.
    pub fn finish(mut self, answer: &[u8]) -> Result<(LinkSession, Vec<u8>), Error> {
        let payload = handshake_payload(&mut self.0, answer).ok_or_else(refused)?;
        Ok((LinkSession::new(*self.0)?, payload))
    }
}

fn refused() -> Error {
    Error::Handshake("the other end does not know this link's secret, or means another link".to_owned())
}

/// An open session of a data link.
#[derive(Debug)]
pub struct LinkSession {
    sealer: Sealer,
    opener: Opener,
}

impl LinkSession {
    fn new(state: HandshakeState) -> Result<Self, Error> {
        let (sealer, opener) = split(state)?;
        Ok(Self { sealer, opener })
    }

    /// The parent's part: takes the child's message (without its length), lets `say` answer its payload, and gives the
    /// message to send, its length in front.
    ///
    /// # Errors
    /// [`Error::Handshake`] when it is not that of the other end of this link; what `say` refuses.
    pub fn answer(
        secret: &LinkSecret,
        prologue: &[u8],
        message: &[u8],
        say: impl FnOnce(&[u8]) -> Result<Vec<u8>, Error>,
    ) -> Result<(Self, Vec<u8>), Error> {
        let mut state =
            builder(secret, prologue).and_then(Builder::build_responder).map_err(|e| preparing(&e))?;
        let payload = handshake_payload(&mut state, message).ok_or_else(refused)?;
        let answer = handshake_message(&mut state, &say(&payload)?)?;
        Ok((Self::new(state)?, answer))
    }

    /// [`Begun`] over a socket that blocks, until `end`. The socket's time limits are to be set anew afterwards.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Handshake`], [`Error::Malformed`].
    pub fn initiate(
        stream: &mut TcpStream,
        secret: &LinkSecret,
        prologue: &[u8],
        payload: &[u8],
        end: Instant,
    ) -> Result<(Self, Vec<u8>), Error> {
        let (begun, message) = Begun::new(secret, prologue, payload)?;
        let mut stream = Bounded::new(stream, end);
        stream.write_all(&message).map_err(Error::io("sending the handshake of a link"))?;
        begun.finish(&read_handshake(&mut stream, FRAME)?)
    }

    /// [`LinkSession::answer`] over a socket that blocks, until `end`. The socket's time limits are to be set anew
    /// afterwards.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Handshake`], [`Error::Malformed`].
    pub fn respond(
        stream: &mut TcpStream,
        secret: &LinkSecret,
        prologue: &[u8],
        end: Instant,
        say: impl FnOnce(&[u8]) -> Result<Vec<u8>, Error>,
    ) -> Result<Self, Error> {
        let mut stream = Bounded::new(stream, end);
        let message = read_handshake(&mut stream, FRAME)?;
        let (session, answer) = Self::answer(secret, prologue, &message, say)?;
        stream.write_all(&answer).map_err(Error::io("answering the handshake of a link"))?;
        Ok(session)
    }

    /// Appends `plain` to `out` as one frame, its length in front.
    ///
    /// # Errors
    /// As [`Sealer::seal`].
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        self.sealer.seal(plain, out)
    }

    /// Opens the next frame (without its length; [`super::first_frame`] finds it).
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub fn open(&mut self, frame: &[u8]) -> Result<Vec<u8>, Error> {
        let mut plain = Vec::new();
        self.opener.open(frame, &mut plain)?;
        Ok(plain)
    }

    /// The two directions, for two threads.
    #[must_use]
    pub fn into_halves(self) -> (Sealer, Opener) {
        (self.sealer, self.opener)
    }
}

#[cfg(test)]
mod tests {
    use super::super::first_frame;
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;
    use std::time::Duration;

    fn pair() -> (LinkSession, LinkSession) {
        let secret = LinkSecret::generate().unwrap();
        let (begun, first) = Begun::new(&secret, b"link 7", b"from chunk 9").unwrap();
        let (parent, second) = LinkSession::answer(&secret, b"link 7", &first[2..], |said| {
            assert_eq!(said, b"from chunk 9");
            Ok(b"welcome".to_vec())
        })
        .unwrap();
        let (child, said) = begun.finish(&second[2..]).unwrap();
        assert_eq!(said, b"welcome");
        (child, parent)
    }

    fn sealed(session: &mut LinkSession, plain: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        session.seal(plain, &mut out).unwrap();
        let (frame, used) = first_frame(&out).unwrap();
        assert_eq!(used, out.len());
        frame.to_vec()
    }

    #[test]
    fn frames_go_both_ways() {
        let (mut child, mut parent) = pair();
        for n in 0..100u8 {
            let frame = sealed(&mut child, &[n; 20]);
            assert_eq!(parent.open(&frame).unwrap(), [n; 20]);
            let frame = sealed(&mut parent, &[]);
            assert_eq!(child.open(&frame).unwrap(), []);
        }
        let long = vec![7; super::super::PLAIN];
        let frame = sealed(&mut child, &long);
        assert_eq!(parent.open(&frame).unwrap(), long);
        assert!(child.seal(&vec![7; super::super::PLAIN + 1], &mut Vec::new()).is_err());
    }

    #[test]
    fn altered_repeated_exchanged_and_missing_frames_are_refused() {
        let (mut child, mut parent) = pair();
        let frames: Vec<_> = (0..4u8).map(|n| sealed(&mut child, &[n; 8])).collect();
        for at in 0..frames[0].len() {
            let mut altered = frames[0].clone();
            altered[at] ^= 1;
            assert!(matches!(parent.open(&altered), Err(Error::Frame(0))));
        }
        assert!(parent.open(&frames[0][1..]).is_err());
        assert!(parent.open(&frames[1]).is_err(), "out of order");
        parent.open(&frames[0]).unwrap();
        assert!(parent.open(&frames[0]).is_err(), "repeated");
        assert!(parent.open(&frames[2]).is_err(), "one is missing");
        // Back to its sender.
        assert!(child.open(&frames[1]).is_err());
        parent.open(&frames[1]).unwrap();
    }

    #[test]
    fn another_secret_or_another_link_is_refused() {
        let secret = LinkSecret::generate().unwrap();
        let (_, first) = Begun::new(&secret, b"link 7", b"").unwrap();
        let other = LinkSecret::generate().unwrap();
        for (secret, prologue) in [(&other, &b"link 7"[..]), (&secret, b"link 8")] {
            let answer = LinkSession::answer(secret, prologue, &first[2..], |_| Ok(Vec::new()));
            assert!(matches!(answer, Err(Error::Handshake(_))));
        }
        // An answer to another beginning of the same link.
        let (one, _) = Begun::new(&secret, b"link 7", b"").unwrap();
        let (_, answer) = LinkSession::answer(&secret, b"link 7", &first[2..], |_| Ok(Vec::new())).unwrap();
        assert!(matches!(one.finish(&answer[2..]), Err(Error::Handshake(_))));
    }

    #[test]
    fn it_works_over_sockets_and_ends_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let secret = LinkSecret::generate().unwrap();
        let theirs = secret.clone();
        let end = || Instant::now() + Duration::from_millis(400);
        let parent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let session = LinkSession::respond(&mut stream, &theirs, b"l", end(), |p| Ok(p.to_vec()));
            let (mut silent, _) = listener.accept().unwrap();
            let start = Instant::now();
            let refused = LinkSession::respond(&mut silent, &theirs, b"l", end(), |p| Ok(p.to_vec()));
            (session.is_ok(), refused.is_err(), start.elapsed())
        });
        let mut stream = TcpStream::connect(address).unwrap();
        let (_, said) = LinkSession::initiate(&mut stream, &secret, b"l", b"echo", end()).unwrap();
        assert_eq!(said, b"echo");
        let mut slow = TcpStream::connect(address).unwrap();
        // A byte now and then, which would reset a limit for each read.
        for _ in 0..6 {
            let _ = slow.write_all(&[9]);
            std::thread::sleep(Duration::from_millis(100));
        }
        let (session, refused, took) = parent.join().unwrap();
        assert!(session && refused && took < Duration::from_millis(700), "{took:?}");
    }

    #[test]
    fn no_debug_text_holds_the_secret() {
        let secret = LinkSecret([0xab; 32]);
        let (begun, _) = Begun::new(&secret, b"", b"").unwrap();
        let (child, _) = pair();
        let text = format!("{secret:?} {begun:?} {child:?}");
        assert!(!text.contains("171") && !text.contains("abab"), "{text}");
    }

    proptest! {
        #[test]
        fn any_handshake_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let secret = LinkSecret([1; 32]);
            prop_assert!(LinkSession::answer(&secret, b"", &bytes, |_| Ok(Vec::new())).is_err());
            let (begun, _) = Begun::new(&secret, b"", b"").unwrap();
            prop_assert!(begun.finish(&bytes).is_err());
            let (mut child, _) = pair();
            prop_assert!(child.open(&bytes).is_err());
            let _ = first_frame(&bytes);
        }

        #[test]
        fn no_part_of_a_handshake_passes_for_it(cut in 0usize..60) {
            let secret = LinkSecret([1; 32]);
            let (_, first) = Begun::new(&secret, b"", b"payload").unwrap();
            prop_assume!(cut < first.len() - 2);
            prop_assert!(LinkSession::answer(&secret, b"", &first[2..2 + cut], |_| Ok(Vec::new())).is_err());
            let mut longer = first[2..].to_vec();
            longer.push(0);
            prop_assert!(LinkSession::answer(&secret, b"", &longer, |_| Ok(Vec::new())).is_err());
        }
    }
}
