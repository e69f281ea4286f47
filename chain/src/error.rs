//! What can go wrong in the chain.

use std::io;

/// An error of the chain. Texts are lower case and name the thing and the cause.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing a socket failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, and to whom.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Bytes from outside do not have the form that they must have.
    #[error("{0}")]
    Malformed(String),
    /// A chunk did not open under the wave's key: it was damaged or forged.
    #[error("chunk {0} is damaged or forged: it does not open under the wave's key")]
    Seal(u64),
    /// What should be the header of a chunk is none.
    #[error("the header of a chunk is damaged: {0}")]
    Header(String),
    /// The connection ended inside a chunk.
    #[error("the connection ended inside a chunk")]
    Truncated,
    /// A chunk opens, but is not the one that the server signed.
    #[error("chunk {0} is forged: it is not the one that the server signed")]
    Forged(u64),
    /// The parent's connection ended before the end record.
    #[error("the stream broke off after {0} chunks: {1}")]
    Cut(u64, String),
    /// The server gave the stream up and says why.
    #[error("the server gave up: {0}")]
    GivenUp(String),
    /// The end record does not agree with what came before it.
    #[error("the end record does not agree with the stream: {0}")]
    End(String),
    /// The other end of a connection could not prove who it is, or refused us.
    #[error("the handshake failed: {0}")]
    Handshake(String),
    /// A frame of a session did not open.
    #[error("frame {0} of the session was altered, repeated or exchanged: it does not open")]
    Frame(u64),
    /// The chain was stopped from this side.
    #[error("stopped: {0}")]
    Stopped(String),
}

impl Error {
    /// For `map_err`: an I/O error and what was being done.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { source, .. } => source.kind(),
            Error::Cut(..) => io::ErrorKind::UnexpectedEof,
            Error::Stopped(_) => io::ErrorKind::ConnectionAborted,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}
