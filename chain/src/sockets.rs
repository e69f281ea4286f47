//! The sockets of the relaying thread, none of which ever blocks: the one to the parent, from which whole chunks are put
//! together, and those to the children, to which whole chunks are sent.

use crate::Error;
use crate::buffer::{Buffer, Pool};
use crate::chunk::{HEADER, Header, Sealed};
use crate::core::{Acknowledgement, NodeId, Time};
use crate::link::{self, LinkId};
use crate::noise::link::LinkSession;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

/// The connection to the parent.
pub(crate) struct Parent {
    pub link: LinkId,
    pub stream: TcpStream,
    header: [u8; HEADER],
    /// Bytes of the header, then of the body, that have come.
    got: usize,
    body: Option<(Header, Buffer)>,
    session: Box<LinkSession>,
    out: Vec<u8>,
}

fn closed() -> Error {
    Error::Malformed("the other end closed the connection".to_owned())
}

impl Parent {
    pub(crate) fn new(link: LinkId, stream: TcpStream, session: Box<LinkSession>) -> Self {
        Self { link, stream, header: [0; HEADER], got: 0, body: None, session, out: Vec::new() }
    }

    /// The next whole chunk; none when the rest of it has not come yet.
    pub(crate) fn read(&mut self, pool: &Pool) -> Result<Option<(Header, Buffer)>, Error> {
        loop {
            let read = match &mut self.body {
                None => (&self.stream).read(&mut self.header[self.got..]),
                // The next header comes with the body, for one system call less; `got` goes on into it.
                Some((_, body)) => {
                    let rest = &mut body[self.got..];
                    let slices = &mut [IoSliceMut::new(rest), IoSliceMut::new(&mut self.header)];
                    (&self.stream).read_vectored(slices)
                }
            };
            match read {
                Ok(0) if self.got > 0 || self.body.is_some() => return Err(Error::Truncated),
                Ok(0) => return Err(closed()),
                Ok(n) => self.got += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::io("reading from the parent")(e)),
            }
            let whole = match &self.body {
                Some((_, body)) if self.got >= body.len() => self.body.take(),
                _ => None,
            };
            if let Some((header, body)) = whole {
                self.got -= body.len();
                self.begin_body(pool)?;
                return Ok(Some((header, body)));
            }
            self.begin_body(pool)?;
        }
    }

    /// When a header is whole, its body is next.
    fn begin_body(&mut self, pool: &Pool) -> Result<(), Error> {
        if self.body.is_none() && self.got == HEADER {
            let header = Header::from_bytes(&self.header).map_err(|e| Error::Header(e.to_string()))?;
            self.body = Some((header, pool.take_sized(header.sealed as usize)));
            self.got = 0;
        }
        Ok(())
    }

    /// Queues what the parent is to be told. When it takes nothing for so long that much waits, later words are left out:
    /// everything is said again each second.
    pub(crate) fn queue(&mut self, said: &Acknowledgement) {
        if self.out.len() <= link::INBOX
            && let Err(e) = link::write_acknowledgement(&mut self.session, said, &mut self.out)
        {
            log::error!("{e}");
        }
    }

    pub(crate) fn has_queued(&self) -> bool {
        !self.out.is_empty()
    }

    /// Writes what is queued, as far as it goes.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        while !self.out.is_empty() {
            match (&self.stream).write(&self.out) {
                Ok(0) => return Err(closed()),
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("acknowledging to the parent")(e)),
            }
        }
        Ok(())
    }
}

/// What came of sending.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The kernel has all of this chunk.
    Chunk(u64),
    /// The socket takes no more now.
    Blocked,
}

/// The connection to a child.
pub(crate) struct Child {
    pub node: NodeId,
    pub link: LinkId,
    pub stream: TcpStream,
    sending: Option<Sending>,
    blocked: bool,
    /// It took something since the last look, and when that was.
    moved: bool,
    looked: Time,
    session: LinkSession,
    inbox: Vec<u8>,
}

struct Sending {
    chunk: Arc<Sealed>,
    header: [u8; HEADER],
    at: usize,
}

impl Child {
    pub(crate) fn new(node: NodeId, link: LinkId, stream: TcpStream, session: LinkSession) -> Self {
        Self {
            node,
            link,
            stream,
            sending: None,
            blocked: false,
            moved: false,
            looked: Time::ZERO,
            session,
            inbox: Vec::new(),
        }
    }

    /// Whether the next chunk may be begun.
    pub(crate) fn is_idle(&self) -> bool {
        self.sending.is_none()
    }

    /// Whether the socket is to be waited for.
    pub(crate) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// The chunk that is being sent.
    pub(crate) fn sending(&self) -> Option<u64> {
        self.sending.as_ref().map(|sending| sending.chunk.header.number)
    }

    /// For how long the socket has taken nothing, as far as these looks saw.
    pub(crate) fn still_for(&mut self, now: Time) -> Time {
        if std::mem::take(&mut self.moved) {
            self.looked = now;
        }
        now.saturating_sub(self.looked)
    }

    /// Begins a chunk.
    pub(crate) fn begin(&mut self, chunk: Arc<Sealed>) {
        let header = chunk.header.to_bytes();
        self.sending = Some(Sending { chunk, header, at: 0 });
    }

    /// Sends the chunk that was begun, as far as it goes. Whole chunks follow each other: fragments would multiply at each
    /// hop.
    pub(crate) fn send(&mut self) -> Result<Sent, Error> {
        let Some(sending) = &mut self.sending else { return Ok(Sent::Blocked) };
        loop {
            let body = sending.at.saturating_sub(HEADER);
            let result = if sending.at < HEADER {
                let slices =
                    [IoSlice::new(&sending.header[sending.at..]), IoSlice::new(&sending.chunk.bytes)];
                (&self.stream).write_vectored(&slices)
            } else {
                (&self.stream).write(&sending.chunk.bytes[body..])
            };
            match result {
                Ok(0) => return Err(closed()),
                Ok(n) => {
                    sending.at += n;
                    self.moved = true;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Ok(Sent::Blocked);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("sending to the child")(e)),
            }
            if sending.at == sending.chunk.wire_len() {
                let number = sending.chunk.header.number;
                self.sending = None;
                self.blocked = false;
                return Ok(Sent::Chunk(number));
            }
        }
    }

    /// The acknowledgements that have come.
    pub(crate) fn read(&mut self) -> Result<Vec<Acknowledgement>, Error> {
        let mut said = Vec::new();
        let mut piece = [0; 4096];
        loop {
            match (&self.stream).read(&mut piece) {
                Ok(0) => return Err(closed()),
                Ok(n) => self.inbox.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(said),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::io("reading from the child")(e)),
            }
            while let Some(one) = link::read_acknowledgement(&mut self.session, &mut self.inbox)? {
                said.push(one);
            }
            if self.inbox.len() > link::INBOX || said.len() > 64 {
                // The rest is read when others had their turn.
                return Ok(said);
            }
        }
    }
}
