//! Sealing: AES-256-GCM under a key that is fresh for every wave. The nonce is the chunk's number, which never repeats
//! under one key; the associated data names everything else that must not be exchanged: format version, deployment,
//! wave and the whole header.

use crate::buffer::{Buffer, Pool};
use crate::chunk::{HEADER, Header, Kind, Sealed, TAG};
use crate::{CHUNK, Error};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

/// Version of the stream's format; part of the associated data.
const FORMAT: u32 = 1;

/// Names a wave and holds its key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wave {
    /// The deployment's id.
    pub deployment: [u8; 16],
    /// The wave's number, from 1.
    pub number: u32,
    /// The key; random, used for this wave only.
    key: [u8; 32],
}

impl std::fmt::Debug for Wave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of every log.
        f.debug_struct("Wave").field("number", &self.number).finish_non_exhaustive()
    }
}

/// Random bytes from the kernel.
///
/// # Errors
/// When the kernel has none to give.
pub fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| Error::Malformed("the kernel gives no random numbers".to_owned()))?;
    Ok(bytes)
}

impl Wave {
    /// A wave with a fresh key.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn new(deployment: [u8; 16], number: u32) -> Result<Self, Error> {
        Ok(Self { deployment, number, key: random()? })
    }
}

/// Seals and opens the chunks of one wave.
#[derive(Debug)]
pub struct Seal {
    key: LessSafeKey,
    context: [u8; 24],
}

impl Seal {
    /// The seal of `wave`.
    #[must_use]
    pub fn new(wave: &Wave) -> Self {
        let mut context = [0; 24];
        context[..4].copy_from_slice(&FORMAT.to_le_bytes());
        context[4..20].copy_from_slice(&wave.deployment);
        context[20..].copy_from_slice(&wave.number.to_le_bytes());
        let key = UnboundKey::new(&AES_256_GCM, &wave.key).expect("an AES-256 key has 32 bytes");
        Self { key: LessSafeKey::new(key), context }
    }

    fn parameters(&self, header: &Header) -> (Nonce, Aad<[u8; 24 + HEADER]>) {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&header.number.to_be_bytes());
        let mut data = [0; 24 + HEADER];
        data[..24].copy_from_slice(&self.context);
        data[24..].copy_from_slice(&header.to_bytes());
        (Nonce::assume_unique_for_key(nonce), Aad::from(data))
    }

    /// Seals `payload` in place: `plain` bytes, compressed or not.
    ///
    /// # Errors
    /// When `payload` is longer than a chunk may be.
    pub fn seal(
        &self,
        kind: Kind,
        number: u64,
        compressed: bool,
        plain: usize,
        mut payload: Buffer,
    ) -> Result<Sealed, Error> {
        let too_long = |_| Error::Malformed(format!("chunk {number} is too long"));
        let header = Header {
            kind,
            compressed,
            number,
            plain: plain.try_into().map_err(too_long)?,
            sealed: (payload.len() + TAG).try_into().map_err(too_long)?,
        };
        if plain > CHUNK {
            return Err(Error::Malformed(format!("chunk {number} is too long")));
        }
        let (nonce, data) = self.parameters(&header);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, data, &mut payload)
            .map_err(|_| Error::Malformed(format!("sealing chunk {number} failed")))?;
        payload.extend_from_slice(tag.as_ref());
        Ok(Sealed { header, bytes: payload })
    }

    /// Opens a scratch copy of `chunk`, so that the sealed original can be passed on untouched. What comes back is still
    /// compressed when the header says so.
    ///
    /// # Errors
    /// [`Error::Seal`] when the chunk was altered, or belongs to another place, wave or deployment.
    pub fn open(&self, chunk: &Sealed, pool: &Pool) -> Result<Buffer, Error> {
        let mut scratch = pool.copy_of(&chunk.bytes);
        let (nonce, data) = self.parameters(&chunk.header);
        let len = self
            .key
            .open_in_place(nonce, data, &mut scratch)
            .map_err(|_| Error::Seal(chunk.header.number))?
            .len();
        scratch.truncate(len);
        Ok(scratch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed(seal: &Seal, number: u64, bytes: &[u8]) -> Sealed {
        seal.seal(Kind::Data, number, false, bytes.len(), Pool::new(0).copy_of(bytes)).unwrap()
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens_and_any_changed_bit_does_not(
            bytes in proptest::collection::vec(any::<u8>(), 0..600), flip: prop::sample::Index, bit in 0..8
        ) {
            let seal = Seal::new(&Wave::new([1; 16], 1).unwrap());
            let pool = Pool::new(1 << 20);
            let mut chunk = sealed(&seal, 7, &bytes);
            prop_assert_eq!(&seal.open(&chunk, &pool).unwrap()[..], &bytes[..]);
            let at = flip.index(chunk.bytes.len());
            chunk.bytes[at] ^= 1u8 << bit;
            prop_assert!(matches!(seal.open(&chunk, &pool), Err(Error::Seal(7))));
        }
    }

    #[test]
    fn another_place_kind_wave_or_deployment_does_not_open() {
        let wave = Wave::new([1; 16], 1).unwrap();
        let seal = Seal::new(&wave);
        let pool = Pool::new(1 << 20);
        let mut moved = sealed(&seal, 7, b"abc");
        moved.header.number = 8;
        assert!(seal.open(&moved, &pool).is_err());
        let mut other_kind = sealed(&seal, 7, b"abc");
        other_kind.header.kind = Kind::End;
        assert!(seal.open(&other_kind, &pool).is_err());
        let chunk = sealed(&seal, 7, b"abc");
        assert!(seal.open(&chunk, &pool).is_ok());
        assert!(Seal::new(&Wave { number: 2, ..wave.clone() }).open(&chunk, &pool).is_err());
        assert!(Seal::new(&Wave { deployment: [2; 16], ..wave }).open(&chunk, &pool).is_err());
    }

    #[test]
    fn the_key_is_not_in_the_debug_text() {
        let wave = Wave { deployment: [0; 16], number: 1, key: [0xab; 32] };
        assert!(!format!("{wave:?}").contains("171") && !format!("{wave:?}").contains("ab"));
    }
}
