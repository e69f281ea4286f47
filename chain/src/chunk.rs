//! A chunk's form on the wire: a header of 20 bytes, then the sealed bytes.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 1 | kind: 0 data, 1 part, 2 end, 3 given up, 4 list |
//! | 1 | 1 | flags: bit 0 = the plain bytes were compressed (zstd) before sealing |
//! | 2 | 2 | zero |
//! | 4 | 8 | number, from 0, little endian |
//! | 12 | 4 | length of the plain bytes, little endian |
//! | 16 | 4 | length of the sealed bytes, little endian |

use crate::buffer::Buffer;
use crate::{CHUNK, Error};

/// Bytes of a header.
pub const HEADER: usize = 20;
/// Bytes that sealing adds (the tag).
pub const TAG: usize = 16;
const COMPRESSED: u8 = 1;

/// What a chunk carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of the current part.
    Data = 0,
    /// The beginning of a part: its name and kind.
    Part = 1,
    /// The end record.
    End = 2,
    /// The server gave up; the text says why.
    GivenUp = 3,
    /// The hashes of the chunks that follow, signed by the server.
    List = 4,
}

/// A chunk's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it carries.
    pub kind: Kind,
    /// Whether the plain bytes were compressed before they were sealed.
    pub compressed: bool,
    /// Its number in the wave, from 0.
    pub number: u64,
    /// Length of the plain bytes.
    pub plain: u32,
    /// Length of the sealed bytes, tag included.
    pub sealed: u32,
}

impl Header {
    /// The header of a chunk of `plain` bytes, sealed as `payload` bytes and a tag.
    ///
    /// # Errors
    /// [`Error::Malformed`] when a chunk may not be so long.
    pub fn new(
        kind: Kind,
        number: u64,
        compressed: bool,
        plain: usize,
        payload: usize,
    ) -> Result<Self, Error> {
        let too_long = || Error::Malformed(format!("chunk {number} is too long"));
        if plain > CHUNK || payload > CHUNK {
            return Err(too_long());
        }
        let length = |n: usize| u32::try_from(n).map_err(|_| too_long());
        Ok(Self { kind, compressed, number, plain: length(plain)?, sealed: length(payload + TAG)? })
    }

    /// Its form on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.kind as u8;
        bytes[1] = if self.compressed { COMPRESSED } else { 0 };
        bytes[4..12].copy_from_slice(&self.number.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.plain.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.sealed.to_le_bytes());
        bytes
    }

    /// Reads and checks a header: lengths are within bounds and agree with each other.
    ///
    /// # Errors
    /// [`Error::Malformed`].
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Result<Self, Error> {
        let kind = match bytes[0] {
            0 => Kind::Data,
            1 => Kind::Part,
            2 => Kind::End,
            3 => Kind::GivenUp,
            4 => Kind::List,
            k => return Err(Error::Malformed(format!("a chunk of unknown kind {k}"))),
        };
        if bytes[1] & !COMPRESSED != 0 || bytes[2..4] != [0, 0] {
            return Err(Error::Malformed("a chunk with unknown flags".to_owned()));
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let header = Self {
            kind,
            compressed: bytes[1] & COMPRESSED != 0,
            number: u64::from(word(4)) | u64::from(word(8)) << 32,
            plain: word(12),
            sealed: word(16),
        };
        let (plain, sealed) = (header.plain as usize, header.sealed as usize);
        let fits = if header.compressed { sealed < plain + TAG } else { sealed == plain + TAG };
        if plain > CHUNK || sealed < TAG || !fits {
            let text = format!("chunk {} claims {plain} plain and {sealed} sealed bytes", header.number);
            return Err(Error::Malformed(text));
        }
        Ok(header)
    }
}

/// A chunk as it travels: sealed once, by the server.
#[derive(Debug)]
pub struct Sealed {
    /// Its header.
    pub header: Header,
    /// Ciphertext and tag.
    pub bytes: Buffer,
}

impl Sealed {
    /// Bytes that it takes on the wire.
    #[must_use]
    pub fn wire_len(&self) -> usize {
        HEADER + self.bytes.len()
    }

    /// The tag, which stands for the whole content.
    #[must_use]
    pub fn tag(&self) -> &[u8] {
        &self.bytes[self.bytes.len().saturating_sub(TAG)..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_and_what_is_read_is_written_back(bytes: [u8; HEADER]) {
            if let Ok(header) = Header::from_bytes(&bytes) {
                prop_assert_eq!(header.to_bytes(), bytes);
                prop_assert!(header.sealed as usize <= CHUNK + TAG);
            }
        }
    }

    #[test]
    fn lengths_out_of_bounds_are_refused() {
        let good = Header { kind: Kind::Data, compressed: false, number: 1 << 40, plain: 9, sealed: 25 };
        assert_eq!(Header::from_bytes(&good.to_bytes()).unwrap(), good);
        for bad in [
            Header { plain: 8, ..good },
            Header { plain: CHUNK as u32 + 1, sealed: CHUNK as u32 + 17, ..good },
            Header { compressed: true, ..good },
            Header { compressed: true, sealed: 15, ..good },
        ] {
            assert!(Header::from_bytes(&bad.to_bytes()).is_err(), "{bad:?}");
        }
    }
}
