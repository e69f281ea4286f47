//! The stream as its reader sees it: named parts one after the other, each a run of bytes, then a checked end record.
//! There is no success without that record: a stream that merely stops is an error.

use crate::ahead::{self, Ahead};
use crate::buffer::{Buffer, Pool};
use crate::chunk::{Kind, Sealed};
use crate::seal::Seal;
use crate::store::Cursor;
use crate::{CHUNK, Error};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Read};
use std::sync::Arc;

/// What a part holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartKind {
    /// A tar stream of the golden tree.
    Tar,
    /// The blocks of a partition.
    Raw,
}

/// The beginning of a part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is a copy of: `/` for the tree, a partition's name for blocks.
    pub name: String,
    /// What it holds.
    pub kind: PartKind,
}

/// The end record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord {
    /// Parts sent.
    pub parts: u32,
    /// Chunks before the one that holds this record, without lists.
    pub chunks: u64,
    /// Plain bytes of all data chunks.
    pub bytes: u64,
    /// BLAKE3 over header and tag of each of them: it stands for the whole stream.
    pub digest: [u8; 32],
}

/// What both ends count, so that they can compare it at the end.
#[derive(Debug, Default)]
pub struct Tally {
    parts: u32,
    chunks: u64,
    bytes: u64,
    digest: blake3::Hasher,
}

impl Tally {
    /// Counts one chunk, not the one with the end record. Lists are left out: the last one names the chunk of the record.
    pub fn add(&mut self, chunk: &Sealed) {
        if chunk.header.kind == Kind::List {
            return;
        }
        self.parts += u32::from(chunk.header.kind == Kind::Part);
        self.chunks += 1;
        if chunk.header.kind == Kind::Data {
            self.bytes += u64::from(chunk.header.plain);
        }
        self.digest.update(&chunk.header.to_bytes());
        self.digest.update(chunk.tag());
    }

    /// The record that a stream of just these chunks ends with.
    #[must_use]
    pub fn record(&self) -> EndRecord {
        let digest = *self.digest.finalize().as_bytes();
        EndRecord { parts: self.parts, chunks: self.chunks, bytes: self.bytes, digest }
    }
}

/// Reads an end record and compares it with what was counted.
///
/// # Errors
/// [`Error::End`] with both sides' figures.
pub fn check_end(bytes: &[u8], tally: &Tally) -> Result<EndRecord, Error> {
    let said: EndRecord =
        postcard::from_bytes(bytes).map_err(|e| Error::Malformed(format!("reading the end record: {e}")))?;
    let seen = tally.record();
    if said == seen {
        return Ok(said);
    }
    Err(Error::End(format!(
        "it says {} parts, {} chunks, {} bytes; seen were {}, {}, {}{}",
        said.parts,
        said.chunks,
        said.bytes,
        seen.parts,
        seen.chunks,
        seen.bytes,
        if said.digest == seen.digest { "" } else { "; the digests differ" }
    )))
}

/// The local consumer's side of a node: parts and their bytes, decompressed.
pub struct StreamReader {
    ahead: Ahead,
    /// Plain bytes of the current data chunk, read up to `at`.
    plain: Buffer,
    at: usize,
    /// A part that began while the one before it was being read.
    pending: Option<Part>,
    bytes: u64,
    ended: bool,
}

impl std::fmt::Debug for StreamReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamReader")
            .field("bytes", &self.bytes)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

impl StreamReader {
    /// A reader over what `cursor` gives, which decompresses on as many threads as there are processors, 4 at most.
    ///
    /// # Errors
    /// When zstd cannot be set up.
    pub fn new(cursor: Cursor, seal: Arc<Seal>, pool: Pool) -> Result<Self, Error> {
        Self::with_threads(cursor, seal, pool, ahead::threads())
    }

    /// The same on so many threads, the reader's own among them: 1 to 4.
    ///
    /// # Errors
    /// As [`StreamReader::new`].
    pub fn with_threads(cursor: Cursor, seal: Arc<Seal>, pool: Pool, threads: usize) -> Result<Self, Error> {
        let plain = pool.take(0);
        let ahead = Ahead::new(cursor, seal, pool, threads)?;
        Ok(Self { ahead, plain, at: 0, pending: None, bytes: 0, ended: false })
    }

    /// Goes to the next part, over what is left of this one. `None` at the end of the stream, after the end record.
    ///
    /// # Errors
    /// When the stream broke off or was given up.
    pub fn next_part(&mut self) -> Result<Option<Part>, Error> {
        while self.pending.is_none() && self.fill()? {}
        self.plain.truncate(0);
        self.at = 0;
        Ok(self.pending.take())
    }

    /// Plain bytes read so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Goes on by one chunk, which may hold no data; false at the end of the part.
    fn fill(&mut self) -> Result<bool, Error> {
        if self.pending.is_some() || self.ended {
            return Ok(false);
        }
        let Some((header, payload)) = self.ahead.next()? else {
            return Err(Error::Cut(self.bytes / CHUNK as u64, "no end record".to_owned()));
        };
        match header.kind {
            Kind::Data => {
                self.at = 0;
                self.bytes += payload.len() as u64;
                self.plain = payload;
                Ok(true)
            }
            Kind::Part => {
                let part = postcard::from_bytes(&payload)
                    .map_err(|e| Error::Malformed(format!("reading the beginning of a part: {e}")))?;
                self.pending = Some(part);
                Ok(false)
            }
            Kind::End => {
                self.ended = true;
                Ok(false)
            }
            Kind::GivenUp => Err(Error::GivenUp(String::from_utf8_lossy(&payload).into_owned())),
            // Checked when it came in.
            Kind::List => Ok(true),
        }
    }
}

impl BufRead for StreamReader {
    /// The bytes of the current chunk that were not read yet, without a copy; none at the end of the part.
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at == self.plain.len() && self.fill()? {}
        Ok(&self.plain[self.at..])
    }

    fn consume(&mut self, n: usize) {
        self.at = (self.at + n).min(self.plain.len());
    }
}

impl Read for StreamReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        let bytes = self.fill_buf()?;
        let n = out.len().min(bytes.len());
        out[..n].copy_from_slice(&bytes[..n]);
        self.consume(n);
        Ok(n)
    }
}
