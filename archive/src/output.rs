//! The packer's end of the stream: one large buffer that headers are copied into and file contents are read into
//! directly, so that content is copied once only and the sink sees few, large writes.

use std::io::{self, Write};

use crate::header::BLOCK;

const BUFFER: usize = 1 << 20;
/// So many bytes are not copied but written by themselves.
const DIRECT: usize = 64 << 10;

pub(crate) struct Output<W> {
    sink: W,
    buffer: Box<[u8]>,
    filled: usize,
    written: u64,
}

impl<W: Write> Output<W> {
    pub(crate) fn new(sink: W) -> Self {
        Self { sink, buffer: vec![0; BUFFER].into_boxed_slice(), filled: 0, written: 0 }
    }

    /// Bytes of the stream so far.
    pub(crate) fn position(&self) -> u64 {
        self.written + self.filled as u64
    }

    /// Free room in the buffer, never empty. What is put there counts once [`Output::advance`] is told of it.
    pub(crate) fn room(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.drain()?;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    pub(crate) fn advance(&mut self, count: usize) {
        self.filled += count;
    }

    pub(crate) fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if bytes.len() >= DIRECT {
            self.drain()?;
            self.sink.write_all(bytes)?;
            self.written += bytes.len() as u64;
            return Ok(());
        }
        while !bytes.is_empty() {
            let room = self.room()?;
            let count = room.len().min(bytes.len());
            room[..count].copy_from_slice(&bytes[..count]);
            self.advance(count);
            bytes = &bytes[count..];
        }
        Ok(())
    }

    pub(crate) fn zeros(&mut self, mut count: u64) -> io::Result<()> {
        while count > 0 {
            let room = self.room()?;
            let part = room.len().min(usize::try_from(count).unwrap_or(usize::MAX));
            room[..part].fill(0);
            self.advance(part);
            count -= part as u64;
        }
        Ok(())
    }

    /// Fills up to the next 512-byte block.
    pub(crate) fn pad(&mut self) -> io::Result<()> {
        let over = self.position() % BLOCK as u64;
        if over == 0 { Ok(()) } else { self.zeros(BLOCK as u64 - over) }
    }

    fn drain(&mut self) -> io::Result<()> {
        self.sink.write_all(&self.buffer[..self.filled])?;
        self.written += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Writes the two zero blocks that end a tar stream and hands everything to the sink; returns the stream's length.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.zeros(2 * BLOCK as u64)?;
        self.drain()?;
        self.sink.flush()?;
        Ok(self.written)
    }
}
