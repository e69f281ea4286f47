//! The chain and nothing else: how a stream of bytes goes from the server through every node. It knows no disk, no tar
//! and no PID 1. To the server the chain is a `Write` ([`feed::Feeder`]), to a node a `Read` ([`node::Node`]).
//!
//! [`mod@core`] decides: who feeds whom, what is kept, who is dead. Around it are sockets and threads: [`control`] has the
//! messages between a node and the server, [`link`] the connection between parent and child, [`node`] a place in the
//! chain, [`store`] the chunks that are held there. [`seal`] and [`sign`] protect the chunks, [`chunk`] is their form on
//! the wire. [`entrance`] keeps strangers from crowding a port. [`noise`] is how both ends of a connection know each other, by [`keys`].

// Test data is made by cutting numbers down to bytes.
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

mod ahead;
pub mod buffer;
pub mod chunk;
pub mod control;
pub mod core;
mod engine;
pub mod entrance;
pub mod feed;
pub mod keys;
pub mod link;
pub mod node;
pub mod noise;
pub mod seal;
pub mod sign;
mod sockets;
pub mod store;
pub mod stream;
pub mod topology;

mod error;
pub use error::Error;

/// The most plain bytes that one chunk carries. 256 KiB keeps the store-and-forward delay of a chain of 60 nodes at
/// 100 Mbit/s below a second and the working set of a relay in its cache.
pub const CHUNK: usize = 256 << 10;
