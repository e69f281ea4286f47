//! Who is trusted: the server's key, the tokens that let nodes in, and the gate at which they are shown. [`tokens`]
//! decides, without clock or files; [`token_file`] keeps those that outlive a deployment; [`gate`] stands at the port.

pub mod commands;
pub mod gate;
pub mod key_file;
pub mod luks_keys;
pub mod secret_file;
pub mod token_file;
pub mod tokens;

use crate::nodes::Mac;
use anyhow::Result;
use ka_chain::keys::{PublicKey, Token};
use std::time::{SystemTime, UNIX_EPOCH};

/// What a node that boots is given so that it trusts the right server and is let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// The server's key.
    pub key: PublicKey,
    /// The node's own token.
    pub token: Token,
}

/// Hands out passes; the boot service asks it for each node.
pub trait Tickets: Send + Sync {
    /// A pass for the machine with this address; the same one again when it asks again soon.
    ///
    /// # Errors
    /// When there are too many, or it cannot be remembered.
    fn pass(&self, mac: Mac) -> Result<Pass>;
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
