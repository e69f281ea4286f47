//! The chain and nothing else: how a stream of bytes goes from the server through every node. It knows no disk, no tar
//! and no PID 1. To the server the chain is a `Write` ([`feed::Feeder`]), to a node a `Read` ([`node::Node`]).
//!
//! From the outside in: [`control`] has the messages between a node and the server, [`topology`] says who feeds whom,
//! [`link`] moves chunks over one TCP connection, [`window`] holds them between links, [`seal`] protects them, and
//! [`chunk`] is their form on the wire. [`noise`] is how both ends of a connection know each other, by [`keys`].

// Test data is made by cutting numbers down to bytes.
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod buffer;
pub mod chunk;
pub mod control;
pub mod feed;
pub mod keys;
pub mod link;
pub mod node;
pub mod noise;
pub mod seal;
pub mod stream;
pub mod topology;
pub mod window;

mod error;
pub use error::Error;

/// The most plain bytes that one chunk carries. 256 KiB keeps the store-and-forward delay of a chain of 60 nodes at
/// 100 Mbit/s below a second and the working set of a relay in its cache.
pub const CHUNK: usize = 256 << 10;
