//! Sealing: AEGIS-128L (draft-irtf-cfrg-aegis-aead, tags of 16 bytes) under a key that is fresh for every wave. The nonce is
//! the chunk's number, which never repeats under one key; the associated data names everything else that must not be
//! exchanged: format version, deployment, wave and the whole header.
//!
//! It seals and opens from one buffer into another, so that neither side copies first, and with the processor's AES
//! instructions alone it is two to three times as quick as AES-256-GCM with VAES (docs/speed.md). Without them it is done in
//! software.

use crate::Error;
use crate::buffer::{Buffer, Pool};
use crate::chunk::{HEADER, Header, Kind, Sealed, TAG};
use aegis::aegis128l::{Aegis128L, Decryptor};
use ring::rand::{SecureRandom, SystemRandom};
use self_cell::{MutBorrow, self_cell};
use serde::{Deserialize, Serialize};

/// Version of the stream's format; part of the associated data.
const FORMAT: u32 = 2;
/// Bytes of the associated data.
const ASSOCIATED: usize = CONTEXT + HEADER;
/// Those that are the same for all chunks of a wave.
const CONTEXT: usize = 24;
/// Bytes that are sealed or opened at once: whoever hashes them finds them in the cache. A multiple of what BLAKE3 hashes side
/// by side (16 KiB).
pub(crate) const PIECE: usize = 32 << 10;

/// Names a wave and holds its key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wave {
    /// The deployment's id.
    pub deployment: [u8; 16],
    /// The wave's number, from 1.
    pub number: u32,
    /// The key; random, used for this wave only.
    key: [u8; 16],
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
pub struct Seal {
    key: [u8; 16],
    context: [u8; CONTEXT],
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of every log.
        f.debug_struct("Seal").finish_non_exhaustive()
    }
}

impl Seal {
    /// The seal of `wave`.
    #[must_use]
    pub fn new(wave: &Wave) -> Self {
        let mut context = [0; CONTEXT];
        context[..4].copy_from_slice(&FORMAT.to_le_bytes());
        context[4..20].copy_from_slice(&wave.deployment);
        context[20..].copy_from_slice(&wave.number.to_le_bytes());
        Self { key: wave.key, context }
    }

    fn parameters(&self, header: &Header) -> (Aegis128L<TAG>, [u8; ASSOCIATED]) {
        let mut nonce = [0; 16];
        nonce[8..].copy_from_slice(&header.number.to_be_bytes());
        let mut data = [0; ASSOCIATED];
        data[..CONTEXT].copy_from_slice(&self.context);
        data[CONTEXT..].copy_from_slice(&header.to_bytes());
        (Aegis128L::new(&self.key, &nonce), data)
    }

    /// Seals `payload`, into a buffer of `pool`: `plain` bytes, compressed or not.
    ///
    /// # Errors
    /// When `payload` is longer than a chunk may be.
    pub fn seal(
        &self,
        kind: Kind,
        number: u64,
        compressed: bool,
        plain: usize,
        payload: &[u8],
        pool: &Pool,
    ) -> Result<Sealed, Error> {
        self.seal_pieces(Header::new(kind, number, compressed, plain, payload.len())?, payload, pool, |_| {})
    }

    /// Seals the `payload` of `header`, into a buffer of `pool`, and shows the sealed bytes piece by piece, each while it is
    /// in the cache.
    ///
    /// # Errors
    /// When `payload` is not as long as `header` says.
    pub fn seal_pieces(
        &self,
        header: Header,
        payload: &[u8],
        pool: &Pool,
        mut show: impl FnMut(&[u8]),
    ) -> Result<Sealed, Error> {
        if payload.len() + TAG != header.sealed as usize {
            let (number, len) = (header.number, payload.len());
            return Err(Error::Malformed(format!("the header of chunk {number} is not one for {len} bytes")));
        }
        let (cipher, data) = self.parameters(&header);
        let mut bytes = pool.take_sized(payload.len() + TAG);
        let (sealed, tag) = bytes.split_at_mut(payload.len());
        let mut encryptor = cipher.encryptor(&data);
        for (plain, sealed) in payload.chunks(PIECE).zip(sealed.chunks_mut(PIECE)) {
            encryptor.update(plain, sealed);
            show(sealed);
        }
        tag.copy_from_slice(&encryptor.finalize());
        show(tag);
        Ok(Sealed { header, bytes })
    }

    /// Opens `chunk` into a buffer of `pool`, so that the sealed original can be passed on untouched. What comes back is
    /// still compressed when the header says so.
    ///
    /// # Errors
    /// [`Error::Seal`] when the chunk was altered, or belongs to another place, wave or deployment.
    pub fn open(&self, chunk: &Sealed, pool: &Pool) -> Result<Buffer, Error> {
        let refused = || Error::Seal(chunk.header.number);
        let (sealed, tag) = chunk.bytes.split_last_chunk::<TAG>().ok_or_else(refused)?;
        let mut opening = self.begin(&chunk.header, pool);
        opening.update(sealed)?;
        opening.finish(tag)
    }

    /// Begins to open a chunk that has not come whole yet.
    #[must_use]
    pub fn begin(&self, header: &Header, pool: &Pool) -> Opening {
        let (cipher, data) = self.parameters(header);
        let plain = pool.take_sized((header.sealed as usize).saturating_sub(TAG));
        let cell =
            Cell::new(MutBorrow::new(plain), |plain| Some(cipher.decryptor(&data, plain.borrow_mut())));
        Opening { number: header.number, cell }
    }
}

type Deciphering<'a> = Option<Decryptor<'a, TAG>>;

self_cell! {
    /// The plain bytes, and what writes them and gives them out only when the tag is right.
    struct Cell {
        owner: MutBorrow<Buffer>,
        #[not_covariant]
        dependent: Deciphering,
    }
}

/// A chunk that is opened piece by piece, each while it is in the cache.
pub struct Opening {
    number: u64,
    cell: Cell,
}

impl std::fmt::Debug for Opening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The content stays out of every log.
        f.debug_struct("Opening").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Opening {
    /// Takes the sealed bytes that come next, without the tag.
    ///
    /// # Errors
    /// [`Error::Seal`] when they are more than the header said.
    pub fn update(&mut self, sealed: &[u8]) -> Result<(), Error> {
        let number = self.number;
        self.cell.with_dependent_mut(|_, decryptor| {
            let taken = decryptor.as_mut().map(|decryptor| decryptor.update(sealed));
            taken.and_then(Result::ok).ok_or(Error::Seal(number))
        })
    }

    /// The plain bytes. What comes back is still compressed when the header says so.
    ///
    /// # Errors
    /// [`Error::Seal`], as for [`Seal::open`].
    pub fn finish(mut self, tag: &[u8; TAG]) -> Result<Buffer, Error> {
        self.cell.with_dependent_mut(|_, decryptor| {
            let finished = decryptor.take().map(|decryptor| decryptor.finalize(tag).map(drop));
            finished.and_then(Result::ok).ok_or(Error::Seal(self.number))
        })?;
        Ok(self.cell.into_owner().into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed(seal: &Seal, number: u64, bytes: &[u8]) -> Sealed {
        seal.seal(Kind::Data, number, false, bytes.len(), bytes, &Pool::new(0)).unwrap()
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

    proptest! {
        #[test]
        fn what_comes_in_pieces_opens_and_with_one_too_few_or_too_many_does_not(
            bytes in proptest::collection::vec(any::<u8>(), 1..4000), size in 1usize..1500, less: bool
        ) {
            let seal = Seal::new(&Wave::new([1; 16], 1).unwrap());
            let pool = Pool::new(1 << 20);
            let chunk = self::sealed(&seal, 7, &bytes);
            let (sealed, tag) = chunk.bytes.split_last_chunk::<TAG>().unwrap();
            let open = |sealed: &[u8]| {
                let mut opening = seal.begin(&chunk.header, &pool);
                sealed.chunks(size).try_for_each(|piece| opening.update(piece))?;
                opening.finish(tag)
            };
            prop_assert_eq!(&open(sealed).unwrap()[..], &bytes[..]);
            let other = if less { sealed[1..].to_vec() } else { [sealed, &[0]].concat() };
            prop_assert!(matches!(open(&other), Err(Error::Seal(7))));
        }
    }

    #[test]
    fn what_is_shown_while_sealing_is_what_was_sealed() {
        let seal = Seal::new(&Wave::new([1; 16], 1).unwrap());
        let payload: Vec<u8> = (0..PIECE * 2 + 5).map(|n| (n / 7) as u8).collect();
        let header = Header::new(Kind::Data, 3, false, payload.len(), payload.len()).unwrap();
        let mut shown = Vec::new();
        let chunk = seal
            .seal_pieces(header, &payload, &Pool::new(0), |piece| shown.extend_from_slice(piece))
            .unwrap();
        assert!(shown == chunk.bytes[..]);
        assert!(seal.open(&chunk, &Pool::new(0)).unwrap()[..] == payload);
        assert!(seal.seal_pieces(header, &payload[1..], &Pool::new(0), |_| {}).is_err());
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
        let wave = Wave { deployment: [0; 16], number: 1, key: [0xab; 16] };
        assert!(!format!("{wave:?}").contains("171") && !format!("{wave:?}").contains("ab"));
    }
}
