//! The session of a control connection: Noise NKpsk0. The node knows the server's public key, the server knows the
//! node's credential, which comes from its token the first time and was given by the server for every later time.
//!
//! The node says [`HELLO`] and the credential's id in clear and begins the handshake; the prologue is both of them. The
//! server's answer carries the credential for the node's next connection. The node's first message can be repeated by
//! somebody who heard it, but not what follows: a token counts as spent when the first frame *after* the handshake opens.
//!
//! A server that refuses says why in clear (34 bytes) and closes. Nobody vouches for that: it is for people only.
//!
//! Messages are postcard after their length (4 bytes, little endian), cut into frames; a message begins with a frame.

use super::{
    Bounded, KEY, Opener, PLAIN, Sealer, TAG, handshake_message, handshake_payload, read_handshake, split,
};
use crate::Error;
use crate::keys::{Credential, CredentialId, PublicKey, SecretKey};
use serde::Serialize;
use serde::de::DeserializeOwned;
use snow::Builder;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

/// First bytes of a control connection, from the node. The digits are the protocol's version.
pub const HELLO: [u8; 8] = *b"KACTRL03";
/// The Noise protocol of control connections.
const PATTERN: &str = "Noise_NKpsk0_25519_AESGCM_BLAKE2s";
/// The longest message: an order with the operator's hooks in it.
pub const LONGEST: usize = 32 << 20;
/// The node's handshake message: a key and a tag.
const FIRST: usize = KEY + TAG;
/// The server's: with a credential for the next connection.
const ANSWER: usize = KEY + Credential::LEN + TAG;
/// A refusal: the reason and the server's public key. No handshake message has this length.
const REFUSAL: usize = 1 + KEY;

/// Why a server refuses a node before there is a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The credential's id is not known: never given out, spent, or expired.
    Credential = 1,
    /// The handshake does not open: it was made for another server's key, or with another secret.
    Key = 2,
}

fn prologue(id: &CredentialId) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&HELLO);
    bytes[8..].copy_from_slice(id);
    bytes
}

fn preparing(e: &snow::Error) -> Error {
    Error::Malformed(format!("preparing the handshake with the server: {e}"))
}

/// A session, as two halves for two threads.
#[derive(Debug)]
pub struct Session<R, W> {
    /// What the other side says.
    pub reader: Reader<R>,
    /// What is said to the other side.
    pub writer: Writer<W>,
}

/// The reading half.
#[derive(Debug)]
pub struct Reader<R> {
    stream: R,
    opener: Opener,
    frame: Vec<u8>,
    plain: Vec<u8>,
}

/// The writing half.
#[derive(Debug)]
pub struct Writer<W> {
    stream: W,
    sealer: Sealer,
}

fn clones(stream: &TcpStream) -> Result<(TcpStream, TcpStream), Error> {
    let clone = || stream.try_clone().map_err(Error::io("cloning the control socket"));
    Ok((clone()?, clone()?))
}

/// The node's part of the handshake, until `end`. Returns the session and the credential for the next connection. The
/// socket's time limits are to be set anew afterwards.
///
/// # Errors
/// [`Error::Handshake`] when the server refuses, or cannot prove that it holds the key; [`Error::Io`].
pub fn initiate(
    stream: &TcpStream,
    server: &PublicKey,
    credential: &Credential,
    end: Instant,
) -> Result<(Session<TcpStream, TcpStream>, Credential), Error> {
    let names = prologue(&credential.id);
    let mut state = PATTERN
        .parse()
        .and_then(|pattern| {
            Builder::new(pattern)
                .prologue(&names)?
                .remote_public_key(&server.0)?
                .psk(0, &credential.psk)?
                .build_initiator()
        })
        .map_err(|e| preparing(&e))?;
    let mut first = names.to_vec();
    first.extend(handshake_message(&mut state, &[])?);
    let mut bounded = Bounded::new(stream, end);
    bounded.write_all(&first).map_err(Error::io("greeting the server"))?;
    let answer = read_handshake(&mut bounded, ANSWER)?;
    if answer.len() == REFUSAL {
        return Err(refused(&answer, server));
    }
    let given = handshake_payload(&mut state, &answer)
        .and_then(|payload| <[u8; Credential::LEN]>::try_from(payload).ok())
        .ok_or_else(|| {
            Error::Handshake(format!(
                "whoever answers as the server cannot prove that it holds the key {server} and knows this node's token"
            ))
        })?;
    let (sealer, opener) = split(state)?;
    let (read, write) = clones(stream)?;
    let session = Session { reader: Reader::new(read, opener), writer: Writer { stream: write, sealer } };
    Ok((session, Credential::from_bytes(&given)))
}

/// What a refusal means, in words.
fn refused(answer: &[u8], trusted: &PublicKey) -> Error {
    let theirs = answer[1..].try_into().map(PublicKey::from_bytes);
    Error::Handshake(match (answer[0], theirs) {
        (_, Ok(theirs)) if theirs != *trusted => {
            format!("the server says that its key is {theirs}, but this node trusts only {trusted}")
        }
        (1, _) => {
            "the server does not take this node's token: it is unknown there, spent, or expired".to_owned()
        }
        (2, _) => "the server does not take this node's token: it is not the one with that id".to_owned(),
        (reason, _) => format!("the server refuses this node (reason {reason})"),
    })
}

/// Why a node gets no session.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    /// Its credential is unknown, spent or expired.
    #[error("its token is unknown, spent or expired")]
    Credential,
    /// Its handshake does not open.
    #[error("its handshake does not open: it was made for another server's key, or with a wrong token")]
    Key,
    /// It did not come to a handshake.
    #[error(transparent)]
    Other(#[from] Error),
}

/// The server's part of the handshake, after [`HELLO`] was read, until `end`: reads the credential's id and asks `known`
/// for the credential and for the one that the node is given for its later connections. The socket's time limits are to
/// be set anew afterwards.
///
/// # Errors
/// [`Denied`]; the node was told, if it listens.
pub fn respond(
    stream: &TcpStream,
    key: &SecretKey,
    known: impl FnOnce(&CredentialId) -> Option<(Credential, Credential)>,
    end: Instant,
) -> Result<Session<TcpStream, TcpStream>, Denied> {
    let mut bounded = Bounded::new(stream, end);
    let mut id = [0; 16];
    bounded.read_exact(&mut id).map_err(Error::io("reading a node's greeting"))?;
    // The whole of it is read before anything is refused: closing with unread bytes would throw the refusal away.
    let first = read_handshake(&mut bounded, FIRST)?;
    let Some((credential, next)) = known(&id) else {
        refuse(&mut bounded, Reason::Credential, key);
        return Err(Denied::Credential);
    };
    let names = prologue(&id);
    let mut state = PATTERN
        .parse()
        .and_then(|pattern| {
            Builder::new(pattern)
                .prologue(&names)?
                .local_private_key(&key.secret)?
                .psk(0, &credential.psk)?
                .build_responder()
        })
        .map_err(|e| preparing(&e))?;
    if handshake_payload(&mut state, &first).is_none_or(|payload| !payload.is_empty()) {
        refuse(&mut bounded, Reason::Key, key);
        return Err(Denied::Key);
    }
    let answer = handshake_message(&mut state, &next.to_bytes())?;
    bounded.write_all(&answer).map_err(Error::io("answering a node's greeting"))?;
    let (sealer, opener) = split(state)?;
    let (read, write) = clones(stream)?;
    Ok(Session { reader: Reader::new(read, opener), writer: Writer { stream: write, sealer } })
}

fn refuse(stream: &mut impl Write, reason: Reason, key: &SecretKey) {
    let mut bytes = Vec::with_capacity(2 + REFUSAL);
    bytes.extend_from_slice(&u16::try_from(REFUSAL).unwrap_or(0).to_le_bytes());
    bytes.push(reason as u8);
    bytes.extend_from_slice(&key.public().0);
    // Who does not listen does without.
    if let Err(e) = stream.write_all(&bytes) {
        log::debug!("telling a node why it is refused: {e}");
    }
}

impl<W: Write> Writer<W> {
    /// Sends one message.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Malformed`] when it is too long. After an error the session is over.
    pub fn send<M: Serialize>(&mut self, message: &M) -> Result<(), Error> {
        // The length is put in front afterwards, so that the message is not copied once more.
        let mut bytes = postcard::to_extend(message, vec![0; 4])
            .map_err(|e| Error::Malformed(format!("writing a message: {e}")))?;
        let body = bytes.len() - 4;
        let len = u32::try_from(body)
            .ok()
            .filter(|n| *n as usize <= LONGEST)
            .ok_or_else(|| Error::Malformed(format!("a control message of {body} bytes is too long")))?;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        let mut frame = Vec::with_capacity(2 + TAG + bytes.len().min(PLAIN));
        for part in bytes.chunks(PLAIN) {
            frame.clear();
            self.sealer.seal(part, &mut frame)?;
            // One write, so that small segments do not wait for each other.
            self.stream.write_all(&frame).map_err(Error::io("sending over control"))?;
        }
        Ok(())
    }

    /// The socket.
    pub const fn stream(&self) -> &W {
        &self.stream
    }
}

impl<R: Read> Reader<R> {
    fn new(stream: R, opener: Opener) -> Self {
        Self { stream, opener, frame: Vec::new(), plain: Vec::new() }
    }

    /// The socket.
    pub const fn stream(&self) -> &R {
        &self.stream
    }

    /// Reads one message; `None` when the other side closed between messages.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Frame`], [`Error::Malformed`]. After an error the session is over.
    pub fn receive<M: DeserializeOwned>(&mut self) -> Result<Option<M>, Error> {
        receive_from(&mut self.stream, &mut self.opener, &mut self.frame, &mut self.plain, LONGEST)
    }
}

impl Reader<TcpStream> {
    /// Reads the first message, until `end` and of `longest` bytes at most: it is what proves that the node is there.
    ///
    /// # Errors
    /// As [`Reader::receive`].
    pub fn first<M: DeserializeOwned>(&mut self, longest: usize, end: Instant) -> Result<Option<M>, Error> {
        let mut bounded = Bounded::new(&self.stream, end);
        receive_from(&mut bounded, &mut self.opener, &mut self.frame, &mut self.plain, longest)
    }
}

fn receive_from<M: DeserializeOwned>(
    stream: &mut impl Read,
    opener: &mut Opener,
    frame: &mut Vec<u8>,
    plain: &mut Vec<u8>,
    longest: usize,
) -> Result<Option<M>, Error> {
    if !read_frame(stream, opener, frame, plain)? {
        return Ok(None);
    }
    let Some((len, rest)) = plain.split_first_chunk::<4>() else {
        return Err(Error::Malformed("a control message without a length".to_owned()));
    };
    let len = u32::from_le_bytes(*len) as usize;
    if len > longest {
        return Err(Error::Malformed(format!("a control message claims {len} bytes")));
    }
    // Grows as it comes, so that a claimed length alone costs no memory.
    let mut body = rest.to_vec();
    while body.len() < len {
        if !read_frame(stream, opener, frame, plain)? || plain.is_empty() {
            return Err(Error::Malformed("control ended inside a message".to_owned()));
        }
        body.extend_from_slice(plain);
    }
    if body.len() > len {
        return Err(Error::Malformed("a control message with a tail".to_owned()));
    }
    let (message, rest) = postcard::take_from_bytes(&body)
        .map_err(|e| Error::Malformed(format!("a control message that cannot be read: {e}")))?;
    // One long message must not keep its memory for the rest of the session.
    if frame.capacity() > 4096 {
        (*frame, *plain) = (Vec::new(), Vec::new());
    }
    if rest.is_empty() {
        Ok(Some(message))
    } else {
        Err(Error::Malformed("a control message with a tail".to_owned()))
    }
}

/// Reads and opens one frame into `plain`; false when the other side closed before it.
fn read_frame(
    stream: &mut impl Read,
    opener: &mut Opener,
    frame: &mut Vec<u8>,
    plain: &mut Vec<u8>,
) -> Result<bool, Error> {
    let cut = |e: io::Error| {
        if e.kind() == io::ErrorKind::UnexpectedEof {
            Error::Malformed("control ended inside a message".to_owned())
        } else {
            Error::io("reading control")(e)
        }
    };
    let mut len = [0; 2];
    loop {
        match stream.read(&mut len[..1]) {
            Ok(0) => return Ok(false),
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(cut(e)),
        }
    }
    stream.read_exact(&mut len[1..]).map_err(cut)?;
    frame.clear();
    frame.resize(usize::from(u16::from_le_bytes(len)), 0);
    stream.read_exact(frame).map_err(cut)?;
    opener.open(frame, plain)?;
    Ok(true)
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
