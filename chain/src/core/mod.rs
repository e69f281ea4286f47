//! The chain's decisions as plain state machines: what happened goes in, what is to be done comes out. No sockets, no
//! threads, no clock: time is given in, as the running time since the wave began. So a simulator can drive thousands
//! of them through failures that no laboratory has ([`crate::core::sim`] in the tests), and what it shows holds for the
//! real thing, which puts sockets around the very same code.
//!
//! [`relay`] is a node's part (and the server's, at the head): which chunks must stay, who is sent what, whether more may
//! be read. [`wave`] is the server's: who feeds whom, who is dead, who takes over the orphans. [`waits`] counts what a place
//! waits for, [`brake`] sees from that what holds the chain up, and [`level`] how hard to compress. [`door`] is every port's: whose handshake may be under way.

pub mod brake;
pub mod door;
pub mod level;
pub mod relay;
pub mod waits;
pub mod wave;

mod mutation;
#[cfg(test)]
mod sim;

use crate::link::LinkId;
use mutation::Mutation::PauseKills;
use mutation::is_planted;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Running time since the wave began.
pub type Time = Duration;

/// The running time: a pause of this machine (or of the program) counts as half a second, so that a server that was stopped
/// for a while does not find everybody silent when it wakes up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock {
    last: Duration,
    running: Time,
}

impl Clock {
    /// The longest step that counts.
    const STEP: Duration = Duration::from_millis(500);

    /// The running time, given the time that the machine's clock shows (since any point, never going back).
    pub fn advance(&mut self, shown: Duration) -> Time {
        let step = shown.saturating_sub(self.last);
        self.last = self.last.max(shown);
        self.running += if is_planted(PauseKills) { step } else { step.min(Self::STEP) };
        self.running
    }
}

/// Names a node within its wave; the server gives it. Facts about a node stay true wherever it stands in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u32);

/// The server itself, at the head of the chain.
pub const HEAD: NodeId = NodeId(0);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if *self == HEAD { f.write_str("the server") } else { write!(f, "node {}", self.0) }
    }
}

/// A link from a parent to a child.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its name, sent in clear.
    pub id: LinkId,
    /// What only the server and both ends know.
    pub secret: [u8; 32],
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The secret stays out of every log.
        write!(f, "Link({:02x}{:02x}{:02x}{:02x})", self.id[0], self.id[1], self.id[2], self.id[3])
    }
}

/// A node's place: the whole of it, so that an order that was overtaken can be left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Counted up with every order of the wave; an older one than the last obeyed is ignored.
    pub epoch: u64,
    /// Who feeds the node, over which link; nobody feeds the head.
    pub parent: Option<(NodeId, Link)>,
    /// Whom it feeds.
    pub children: Vec<(NodeId, Link)>,
    /// The living nodes below it and how many generations below (from 1), as deep as chunks are kept for them.
    pub family: Vec<(NodeId, u8)>,
}

/// What a child tells its parent: how far it and those below it are. Cumulative, and by name: it stays true when the chain
/// changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Acknowledgement {
    /// The child's window is full: it reads nothing, which is no fault of the link.
    pub full: bool,
    /// Each node holds every chunk before this one.
    pub held: Vec<(NodeId, u64)>,
}
