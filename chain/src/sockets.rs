//! The sockets of the relaying thread, none of which ever blocks: the one to the parent, from which whole chunks are put
//! together, and those to the children, to which whole chunks are sent.
//!
//! A child's socket is given the pages of a sealed chunk, through a pipe ([`Conduit`]), and sends from them without a copy. So
//! these pages must hold that chunk until the child has read it. While the link stands they do: a chunk leaves the window
//! only when those below hold it. When a link is given up before, its socket is reset, which makes the kernel forget what it
//! had still to send; else a child that lives could be sent the next chunk of that buffer in the place of the first, and take it for
//! damage. It could never be sent more than sealed bytes: plain ones have buffers of their own.

use crate::buffer::{Buffer, Pools};
use crate::chunk::{HEADER, Header, Sealed, TAG};
use crate::core::{Acknowledgement, NodeId, Time};
use crate::link::{self, LinkId};
use crate::noise::link::LinkSession;
use crate::seal::{Opening, PIECE, Seal};
use crate::sign::{Hash, Hashing};
use crate::{CHUNK, Error};
use ka_sys::pages::{self, Giver};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};
use rustix::pipe::{SpliceFlags, splice};
use rustix::time::Timespec;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// What has come is opened in multiples of these bytes, which BLAKE3 hashes side by side.
const STRIDE: usize = 16 << 10;

/// What whole chunks are made with.
pub(crate) struct Workshop {
    pub seal: Arc<Seal>,
    pub pools: Pools,
    /// Whether chunks are to be hashed.
    pub hashes: bool,
}

/// A chunk that has come whole.
pub(crate) struct Arrived {
    pub chunk: Sealed,
    /// Its plain payload, or why there is none.
    pub opened: Result<Buffer, Error>,
    pub hash: Option<Hash>,
}

/// A chunk that is coming. What has come of it is opened and hashed piece by piece, each while it is in the cache. (It is read
/// as it comes: to read it in pieces, too, costs more than the warmer cache gives back.)
struct Body {
    header: Header,
    bytes: Buffer,
    opening: Opening,
    hashing: Option<Hashing>,
    /// Bytes that were opened and hashed.
    done: usize,
}

impl Body {
    fn new(header: Header, workshop: &Workshop) -> Self {
        let bytes = workshop.pools.sealed.take_sized(header.sealed as usize);
        let opening = workshop.seal.begin(&header, &workshop.pools.plain);
        Self { header, bytes, opening, hashing: workshop.hashes.then(Hashing::default), done: 0 }
    }

    /// So many bytes have come.
    fn came(&mut self, got: usize) -> Result<(), Error> {
        let sealed = self.bytes.len() - TAG;
        let ready = if got < sealed { got / STRIDE * STRIDE } else { sealed };
        if ready > self.done {
            for piece in self.bytes[self.done..ready].chunks(PIECE) {
                self.opening.update(piece)?;
                if let Some(hashing) = &mut self.hashing {
                    hashing.update(piece);
                }
            }
            self.done = ready;
        }
        Ok(())
    }

    fn finish(self) -> Arrived {
        let Self { header, bytes, opening, mut hashing, .. } = self;
        let tag = bytes.last_chunk::<TAG>();
        let opened = tag.ok_or(Error::Seal(header.number)).and_then(|tag| opening.finish(tag));
        if let (Some(tag), Some(hashing)) = (tag, &mut hashing) {
            hashing.update(tag);
        }
        let hash = hashing.map(|hashing| hashing.finish(&header));
        Arrived { chunk: Sealed { header, bytes }, opened, hash }
    }
}

/// The connection to the parent.
pub(crate) struct Parent {
    pub link: LinkId,
    pub stream: TcpStream,
    header: [u8; HEADER],
    /// Bytes of the header, then of the body, that have come.
    got: usize,
    body: Option<Body>,
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
    pub(crate) fn read(&mut self, workshop: &Workshop) -> Result<Option<Arrived>, Error> {
        loop {
            let read = match &mut self.body {
                None => (&self.stream).read(&mut self.header[self.got..]),
                // The next header comes with the body, for one system call less; `got` goes on into it.
                Some(body) => {
                    let rest = &mut body.bytes[self.got..];
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
            if let Some(body) = &mut self.body {
                body.came(self.got)?;
            }
            if let Some(body) = self.body.take_if(|body| self.got >= body.bytes.len()) {
                self.got -= body.bytes.len();
                let arrived = body.finish();
                self.begin_body(workshop)?;
                return Ok(Some(arrived));
            }
            self.begin_body(workshop)?;
        }
    }

    /// When a header is whole, its body is next.
    fn begin_body(&mut self, workshop: &Workshop) -> Result<(), Error> {
        if self.body.is_none() && self.got == HEADER {
            let header = Header::from_bytes(&self.header).map_err(|e| Error::Header(e.to_string()))?;
            self.body = Some(Body::new(header, workshop));
            self.got = 0;
        }
        Ok(())
    }

    /// Whether the parent has given this connection up by a reset. What came over it then proves nothing: its last bytes
    /// may be of buffers that the parent uses again, when both are on one machine and share their pages.
    pub(crate) fn is_reset(&self) -> bool {
        // An error of the socket itself was taken by the read that failed; a reset connection also hangs up on both sides.
        let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
        let polled = poll(&mut fds, Some(&Timespec::default()));
        let ends = PollFlags::HUP | PollFlags::ERR;
        polled.is_err() || fds.iter().any(|fd| fd.revents().intersects(ends))
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
    /// None where the kernel refuses it: chunks are copied to the socket then.
    conduit: Option<Conduit>,
    /// The socket may have pages of buffers that are to be used again.
    lends: bool,
}

/// A pipe of which only this thread has both ends: what brings pages to a socket.
struct Conduit {
    read: OwnedFd,
    write: Giver,
    /// Bytes in the pipe.
    held: usize,
}

impl Conduit {
    /// Room for a whole chunk that begins anywhere in a page.
    const SIZE: usize = 2 * CHUNK;

    fn new() -> io::Result<Self> {
        let (read, write) = pages::pipe()?;
        if let Err(e) = write.set_room(Self::SIZE) {
            // A user's pipes together may not be too large. It then takes several turns for a chunk.
            log::debug!("enlarging a pipe: {e}");
        }
        Ok(Self { read, write, held: 0 })
    }

    /// Sends what of `bytes` the socket takes now. What the pipe was given and the socket did not take is the beginning of
    /// `bytes` at the next call.
    fn send(&mut self, bytes: &[u8], to: &TcpStream) -> io::Result<usize> {
        if self.held == 0 {
            self.held = self.write.give(bytes)?;
        }
        let moved = splice(&self.read, None, to, None, self.held, SpliceFlags::NONBLOCK)?;
        self.held -= moved;
        Ok(moved)
    }
}

struct Sending {
    chunk: Arc<Sealed>,
    header: [u8; HEADER],
    /// Bytes of the header, then of the chunk, that the socket has.
    at: usize,
}

impl Sending {
    fn send_pages(&self, conduit: &mut Conduit, to: &TcpStream) -> io::Result<usize> {
        match self.header.get(self.at..).filter(|header| !header.is_empty()) {
            // The rest follows at once: no packet of its own.
            Some(header) => Ok(send(to, header, SendFlags::MORE | SendFlags::NOSIGNAL)?),
            None => conduit.send(&self.chunk.bytes[self.at - HEADER..], to),
        }
    }

    fn send_copy(&self, mut to: &TcpStream) -> io::Result<usize> {
        match self.header.get(self.at..).filter(|header| !header.is_empty()) {
            Some(header) => to.write_vectored(&[IoSlice::new(header), IoSlice::new(&self.chunk.bytes)]),
            None => to.write(&self.chunk.bytes[self.at - HEADER..]),
        }
    }
}

/// Whether this is how a kernel or a sandbox says that it does not do this at all.
fn refuses(e: &io::Error) -> bool {
    let refusals = [Errno::INVAL, Errno::NOSYS, Errno::PERM, Errno::OPNOTSUPP, Errno::NOMEM];
    Errno::from_io_error(e).is_some_and(|e| refusals.contains(&e))
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.lends
            && let Err(e) = sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO))
        {
            log::warn!(
                "resetting the connection to {}: {e}; the end of what it is sent may be wrong",
                self.node
            );
        }
    }
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
            conduit: Conduit::new()
                .inspect_err(|e| log::debug!("no pipe for {node}: {e}; chunks are copied"))
                .ok(),
            lends: false,
        }
    }

    /// Closes the connection; what was sent before still goes out. Only for when no sealed buffer is used again.
    pub(crate) fn leave(mut self) {
        self.lends = false;
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
            let result = match &mut self.conduit {
                Some(conduit) => {
                    let sent = sending.send_pages(conduit, &self.stream);
                    self.lends = true;
                    if let Err(e) = &sent
                        && refuses(e)
                    {
                        // Nothing is lost: what the pipe holds does not count as sent.
                        log::debug!("the kernel takes no pages for {}: {e}; chunks are copied", self.node);
                        self.conduit = None;
                        continue;
                    }
                    sent
                }
                None => sending.send_copy(&self.stream),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Pool;
    use crate::chunk::Kind;
    use crate::noise::link::{Begun, LinkSecret};
    use std::net::TcpListener;

    /// A child and the far end of its connection, whose buffers hold less than a chunk.
    fn child() -> (Child, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        sockopt::set_socket_recv_buffer_size(&listener, 16 << 10).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        near.set_nonblocking(true).unwrap();
        sockopt::set_socket_send_buffer_size(&near, 64 << 10).unwrap();
        let secret = LinkSecret([9; 32]);
        let (_, first) = Begun::new(&secret, b"x", &[]).unwrap();
        let (session, _) = LinkSession::answer(&secret, b"x", &first[2..], |_| Ok(Vec::new())).unwrap();
        (Child::new(NodeId(1), [3; 16], near, session), far)
    }

    fn chunk(pool: &Pool, number: u64) -> Arc<Sealed> {
        let mut bytes = pool.take_sized(CHUNK);
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = (at as u64 * 7 / 3 + number) as u8;
        }
        let len = CHUNK as u32;
        let header = Header { kind: Kind::Data, compressed: false, number, plain: len - 16, sealed: len };
        Arc::new(Sealed { header, bytes })
    }

    /// Sends these chunks to somebody who reads slowly, and compares what comes.
    fn passes(child: &mut Child, mut far: TcpStream) {
        let pool = Pool::new(1 << 20);
        let chunks: Vec<_> = (0..5).map(|number| chunk(&pool, number)).collect();
        let wanted: Vec<u8> =
            chunks.iter().flat_map(|c| [&c.header.to_bytes()[..], &c.bytes[..]].concat()).collect();
        let len = wanted.len();
        let reader = std::thread::spawn(move || {
            let (mut got, mut piece) = (Vec::new(), [0; 5000]);
            while got.len() < len {
                let n = far.read(&mut piece).unwrap();
                got.extend_from_slice(&piece[..n]);
            }
            got
        });
        for chunk in &chunks {
            child.begin(Arc::clone(chunk));
            while child.send().unwrap() != Sent::Chunk(chunk.header.number) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(reader.join().unwrap() == wanted, "what came is not what was sent");
    }

    #[test]
    fn chunks_come_whole_from_pages_from_small_pipes_and_from_copies() {
        let (mut child, far) = child();
        passes(&mut child, far);
        assert!(child.conduit.is_some() && child.lends, "this kernel takes no pages");

        let (mut child, far) = self::child();
        child.conduit.as_ref().unwrap().write.set_room(pages::PAGE).unwrap();
        passes(&mut child, far);
        assert!(child.conduit.is_some());

        let (mut child, far) = self::child();
        child.conduit = None;
        passes(&mut child, far);
        assert!(!child.lends);
    }

    #[test]
    fn where_pages_are_refused_they_are_copied_and_nothing_is_lost() {
        let (mut child, far) = child();
        // From what is no pipe nothing can be spliced; the pipe's other end was given a chunk before that shows.
        let other = std::fs::File::open("/dev/null").unwrap().into();
        let _read = std::mem::replace(&mut child.conduit.as_mut().unwrap().read, other);
        passes(&mut child, far);
        assert!(child.conduit.is_none());
    }

    /// Gives a child up in the middle of a chunk and then writes to the chunk's buffer: how many bytes the kernel had taken,
    /// what comes of them, what should, and how it ends.
    fn after(give_up: impl FnOnce(Child)) -> (usize, Vec<u8>, Vec<u8>, io::Result<usize>) {
        let (mut child, mut far) = child();
        let mut sealed = chunk(&Pool::new(0), 0);
        child.begin(Arc::clone(&sealed));
        while child.send().unwrap() != Sent::Blocked {}
        let sending = child.sending.as_ref().unwrap();
        let (taken, wanted) = (sending.at, [&sending.header[..], &sealed.bytes].concat());
        give_up(child);
        Arc::get_mut(&mut sealed).unwrap().bytes.fill(0xee);
        let mut got = Vec::new();
        let end = far.read_to_end(&mut got);
        (taken, got, wanted, end)
    }

    #[test]
    fn what_a_link_that_is_given_up_had_still_to_send_is_never_sent() {
        // What had come to the far end before stays there; on one machine it has the very same pages (see `Parent::is_reset`).
        let (taken, got, _, end) = after(drop);
        assert!(got.len() < taken, "all {taken} bytes were sent");
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        // Without the reset all are sent, as the buffer is by then.
        let (taken, got, wanted, end) = after(Child::leave);
        assert!(end.is_ok() && got.len() == taken && !wanted.starts_with(&got));
    }

    #[test]
    fn a_parent_that_was_reset_shows_and_one_that_stands_does_not() {
        let (child, far) = child();
        let secret = LinkSecret([9; 32]);
        let (begun, first) = Begun::new(&secret, b"x", &[]).unwrap();
        let (_, second) = LinkSession::answer(&secret, b"x", &first[2..], |_| Ok(Vec::new())).unwrap();
        let parent = Parent::new([3; 16], far, Box::new(begun.finish(&second[2..]).unwrap().0));
        (&child.stream).write_all(b"words that were not read yet").unwrap();
        assert!(!parent.is_reset());
        sockopt::set_socket_linger(&child.stream, Some(Duration::ZERO)).unwrap();
        drop(child);
        assert!(parent.is_reset());
    }
}
