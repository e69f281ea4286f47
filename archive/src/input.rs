//! The restorer's end of the stream: one large buffer that is read into once and written to files from directly. It
//! counts every byte, so that errors can say where in the stream they are.

use std::io::{self, Read};

use crate::header::BLOCK;
use crate::unpack::UnpackError;

const BUFFER: usize = 1 << 20;

pub(crate) struct Input<R> {
    source: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    consumed: u64,
}

impl<R: Read> Input<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, buffer: vec![0; BUFFER].into_boxed_slice(), start: 0, end: 0, consumed: 0 }
    }

    /// Bytes of the stream that were taken so far.
    pub(crate) fn position(&self) -> u64 {
        self.consumed
    }

    /// What is buffered and not taken yet; reads when there is nothing. Empty means the stream has ended.
    pub(crate) fn available(&mut self) -> Result<&[u8], UnpackError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.end = self.read_some()?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn read_some(&mut self) -> Result<usize, UnpackError> {
        loop {
            match self.source.read(&mut self.buffer[self.end..]) {
                Ok(count) => return Ok(count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(UnpackError::Read { at: self.consumed, source }),
            }
        }
    }

    /// Marks `count` bytes of what [`Input::available`] showed as taken.
    pub(crate) fn take(&mut self, count: usize) {
        self.start += count;
        self.consumed += count as u64;
    }

    fn truncated(&self) -> UnpackError {
        UnpackError::Truncated { at: self.consumed + (self.end - self.start) as u64 }
    }

    /// The next 512-byte block, or none when the stream ends exactly here.
    pub(crate) fn block(&mut self) -> Result<Option<[u8; BLOCK]>, UnpackError> {
        if self.available()?.is_empty() {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        self.exact(&mut block)?;
        Ok(Some(block))
    }

    /// Fills `out`; the stream ending before that is an error.
    pub(crate) fn exact(&mut self, mut out: &mut [u8]) -> Result<(), UnpackError> {
        while !out.is_empty() {
            let have = self.available()?;
            if have.is_empty() {
                return Err(self.truncated());
            }
            let count = have.len().min(out.len());
            out[..count].copy_from_slice(&have[..count]);
            self.take(count);
            out = &mut out[count..];
        }
        Ok(())
    }

    /// The next `count` bytes (the caller has checked that they may be so many) and the padding after them.
    pub(crate) fn padded(&mut self, count: usize) -> Result<Vec<u8>, UnpackError> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let have = self.available()?;
            if have.is_empty() {
                return Err(self.truncated());
            }
            let part = have.len().min(count - bytes.len());
            bytes.extend_from_slice(&have[..part]);
            self.take(part);
        }
        self.skip_padding(count as u64)?;
        Ok(bytes)
    }

    /// Skips what fills the last block of `size` bytes of content.
    pub(crate) fn skip_padding(&mut self, size: u64) -> Result<(), UnpackError> {
        let over = size % BLOCK as u64;
        if over > 0 { self.pieces(BLOCK as u64 - over, |_| Ok(())) } else { Ok(()) }
    }

    /// Hands the next `count` bytes to `use_piece`, in pieces of up to 1 MiB.
    pub(crate) fn pieces(
        &mut self,
        mut count: u64,
        mut use_piece: impl FnMut(&[u8]) -> Result<(), UnpackError>,
    ) -> Result<(), UnpackError> {
        while count > 0 {
            let have = self.available()?;
            if have.is_empty() {
                return Err(self.truncated());
            }
            let part = have.len().min(usize::try_from(count).unwrap_or(usize::MAX));
            use_piece(&have[..part])?;
            self.take(part);
            count -= part as u64;
        }
        Ok(())
    }
}
