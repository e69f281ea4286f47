//! The control connection between a node and the server: who the node is, what it is told, how far it is. The messages
//! are here; how they travel is in [`crate::noise::control`].
//!
//! What an installation consists of travels as opaque bytes ([`ToNode::Order`]): the chain knows no disk.

use crate::Error;
use crate::core::waits::Waits;
use crate::core::{NodeId, Place};
use crate::link::LinkId;
use crate::seal::Wave;
use crate::sign::PublicKey;
use crate::stream::EndRecord;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

/// The server pings each node so often; a node that hears nothing for longer than the silence gives the server up.
pub const PING: Duration = Duration::from_secs(1);
/// How long a node endures a silent server.
pub const SILENCE: Duration = Duration::from_secs(60);

/// What a node wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// The whole installation.
    Install,
    /// The stream only, into a directory or a program.
    Receive,
}

/// What a node says of itself when it registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Version of the agent.
    pub version: String,
    /// What it wants.
    pub purpose: Purpose,
    /// The MAC address of the interface that it booted from.
    pub mac: Option<String>,
    /// A name that it would like, when the server knows no better.
    pub hostname: Option<String>,
    /// The port of its data listener.
    pub data_port: u16,
    /// Its addresses, without loopback and link-local ones.
    pub addresses: Vec<IpAddr>,
    /// Bytes of RAM.
    pub memory: u64,
    /// Facts for people: product, serial number, firmware, CPU, disks.
    pub facts: Vec<(String, String)>,
}

/// From a node to the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToServer {
    /// The first message.
    Register(Registration),
    /// A step began.
    Step(String),
    /// A line of the node's log.
    Log {
        /// 1 error, 2 warning, 3 information, 4 debug.
        level: u8,
        /// The line.
        text: String,
    },
    /// The disk is prepared; the node can take its place in the chain.
    Ready,
    /// How far it is; sent twice a second while the stream flows.
    Progress(Progress),
    /// Its link to its parent stands.
    Joined(LinkId),
    /// Its link to its parent was lost, or never came to stand.
    Lost {
        /// Which.
        link: LinkId,
        /// Why.
        why: String,
    },
    /// Its parent has the chunk that it wants next no more.
    Lacking {
        /// Over which link.
        link: LinkId,
        /// The oldest chunk that the parent has.
        oldest: u64,
    },
    /// A child of it was sent chunks over this link and has acknowledged nothing for too long.
    Silent {
        /// The child.
        child: NodeId,
        /// Which link.
        link: LinkId,
    },
    /// It holds the end record.
    Ended(EndRecord),
    /// A fact for the summary: fingerprints, changes made, differences seen.
    Fact {
        /// What it is about.
        name: String,
        /// The fact.
        value: String,
    },
    /// Everything is done; the node waits for its release.
    Done,
    /// The node failed; it stays as a relay until released.
    Failed {
        /// The step that failed.
        step: String,
        /// The whole chain of causes.
        error: String,
    },
    /// The answer to a ping.
    Pong(u64),
    /// A chunk that came over this link was refused.
    Damaged {
        /// Over which link.
        link: LinkId,
        /// The chunk.
        chunk: u64,
        /// Why.
        why: String,
    },
}

/// How far a node is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Chunks received.
    pub chunks: u64,
    /// Bytes received on the wire.
    pub wire: u64,
    /// Plain bytes received.
    pub plain: u64,
    /// Plain bytes consumed: written to the disk.
    pub consumed: u64,
    /// It holds every chunk before this one.
    pub held: u64,
    /// Its consumer has every chunk before this one.
    pub taken: u64,
    /// Its own consumer alone keeps its window full.
    pub stuck: bool,
    /// Generations of dead nodes below it that it could bridge.
    pub cover: u8,
    /// Wire bytes in the window.
    pub window: u64,
    /// Entries unpacked.
    pub entries: u64,
    /// The epoch of the last order that it obeyed: what `cover` speaks of.
    pub epoch: u64,
    /// What it has waited for.
    pub waits: Waits,
}

/// From the server to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToNode {
    /// The node is in: what it is to become, as opaque bytes. Empty for [`Purpose::Receive`].
    Order {
        /// The name by which the server knows the node.
        name: String,
        /// The installation.
        body: Vec<u8>,
    },
    /// The node is not let in.
    Refused(String),
    /// A wave begins: the node's place in the chain.
    Start(Box<Start>),
    /// The node's place has changed.
    Place {
        /// The new one.
        place: Place,
        /// Where the parent listens. No address means: at the server, where the control connection goes.
        addresses: Vec<SocketAddr>,
        /// Where the children dial from.
        children: Vec<IpAddr>,
    },
    /// The node has no place in this wave any more; it makes itself ready for the next.
    Out(String),
    /// The wave is over: sockets may close, the node may reboot.
    Release,
    /// The deployment is given up.
    Abort(String),
    /// To be answered with the same number.
    Ping(u64),
}

/// What a node is told when a wave begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The wave and its key.
    pub wave: Wave,
    /// The node's name in it.
    pub me: NodeId,
    /// How many nodes the wave has.
    pub nodes: u32,
    /// Deaths in a row that are survived.
    pub survive: u8,
    /// How long a child may be silent, in milliseconds.
    pub dead_after: u32,
    /// The key that signs the lists; none when the nodes trust each other.
    pub signer: Option<PublicKey>,
    /// The first place.
    pub place: Place,
    /// Where the parent listens. No address means: at the server, where the control connection goes.
    pub addresses: Vec<SocketAddr>,
    /// Where the children dial from.
    pub children: Vec<IpAddr>,
}

/// Connects to the server's control port; the session is opened over it by [`crate::noise::control::initiate`].
///
/// # Errors
/// [`Error::Io`] naming the address.
pub fn connect(address: SocketAddr, limit: Duration) -> Result<TcpStream, Error> {
    let to = || Error::io(format!("connecting to the server at {address}"));
    let stream = TcpStream::connect_timeout(&address, limit).map_err(to())?;
    stream.set_nodelay(true).map_err(to())?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = postcard::from_bytes::<ToServer>(&bytes);
            let _ = postcard::from_bytes::<ToNode>(&bytes);
        }
    }
}
