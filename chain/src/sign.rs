//! Every node of a wave holds the wave's key, so a chunk that opens may still have been forged by a node further up. Before
//! every [`GROUP`] chunks goes a list of their hashes, signed with the server's Ed25519 key of the wave, whose public half
//! every node has from its control session. The end record is in a group like any other chunk, so it is signed too.
//!
//! A list is the payload of a chunk of its own kind: 64 bytes of signature, then a hash (32 bytes) for each chunk that follows, up
//! to the next list: the BLAKE3 of its header and the BLAKE3 of its sealed bytes, which begin on a boundary of their
//! own that way, as BLAKE3 likes it. What is signed: `Ka list 2`, deployment, wave, number of the list's chunk (little
//! endian), hashes.

use crate::Error;
use crate::chunk::{Header, Kind};
use crate::seal::Wave;
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use std::collections::VecDeque;

/// Chunks of one list.
pub const GROUP: usize = 16;
const SIGNATURE: usize = 64;
const HASH: usize = 32;

/// The public half of a wave's signing key.
pub type PublicKey = [u8; 32];
/// Stands for one sealed chunk.
pub type Hash = [u8; HASH];

/// Hashes a chunk as it travels, piece by piece.
#[derive(Debug, Default)]
pub struct Hashing(blake3::Hasher);

impl Hashing {
    /// Takes the sealed bytes that come next, the tag at the end.
    pub fn update(&mut self, sealed: &[u8]) {
        self.0.update(sealed);
    }

    /// The hash of all of them and the header.
    #[must_use]
    pub fn finish(self, header: &Header) -> Hash {
        let sealed = self.0.finalize();
        *blake3::Hasher::new().update(&header.to_bytes()).update(sealed.as_bytes()).finalize().as_bytes()
    }
}

fn message(wave: &Wave, number: u64, hashes: &[u8]) -> Vec<u8> {
    let mut text = b"Ka list 2".to_vec();
    text.extend_from_slice(&wave.deployment);
    text.extend_from_slice(&wave.number.to_le_bytes());
    text.extend_from_slice(&number.to_le_bytes());
    text.extend_from_slice(hashes);
    text
}

/// The server's key of one wave.
pub struct Signer {
    key: Ed25519KeyPair,
    wave: Wave,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

impl PartialEq for Signer {
    fn eq(&self, other: &Self) -> bool {
        self.public() == other.public()
    }
}

impl Signer {
    /// A fresh key.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn new(wave: &Wave) -> Result<Self, Error> {
        let bad = || Error::Malformed("making a signing key failed".to_owned());
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| bad())?;
        let key = Ed25519KeyPair::from_pkcs8(document.as_ref()).map_err(|_| bad())?;
        Ok(Self { key, wave: wave.clone() })
    }

    /// Its public half.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        let mut public = [0; 32];
        public.copy_from_slice(self.key.public_key().as_ref());
        public
    }

    /// The payload of list number `number`.
    #[must_use]
    pub fn list(&self, number: u64, hashes: &[Hash]) -> Vec<u8> {
        let hashes = hashes.concat();
        let mut payload = self.key.sign(&message(&self.wave, number, &hashes)).as_ref().to_vec();
        payload.extend_from_slice(&hashes);
        payload
    }
}

/// Checks a stream's lists and the chunks that they name.
#[derive(Debug)]
pub struct Checker {
    key: PublicKey,
    wave: Wave,
    expected: VecDeque<Hash>,
}

impl Checker {
    /// A checker of the wave whose lists are signed by `key`.
    #[must_use]
    pub fn new(key: PublicKey, wave: &Wave) -> Self {
        Self { key, wave: wave.clone(), expected: VecDeque::new() }
    }

    /// Takes the stream's next chunk: its hash, and `opened`, its plain payload.
    ///
    /// # Errors
    /// [`Error::Forged`] when a list is not signed by the server, or the chunk is not the one that the list names.
    pub fn check(&mut self, header: &Header, hash: &Hash, opened: &[u8]) -> Result<(), Error> {
        let number = header.number;
        let forged = || Error::Forged(number);
        if header.kind == Kind::List {
            let (signature, hashes) = opened.split_at_checked(SIGNATURE).ok_or_else(forged)?;
            if !self.expected.is_empty()
                || hashes.is_empty()
                || !hashes.len().is_multiple_of(HASH)
                || hashes.len() > GROUP * HASH
            {
                return Err(forged());
            }
            UnparsedPublicKey::new(&ED25519, &self.key)
                .verify(&message(&self.wave, number, hashes), signature)
                .map_err(|_| forged())?;
            self.expected = hashes.as_chunks().0.iter().copied().collect();
            return Ok(());
        }
        match self.expected.front() {
            Some(expected) if expected == hash => {
                // Only what has passed is forgotten: the same chunk may come again over another link.
                self.expected.pop_front();
                Ok(())
            }
            _ => Err(forged()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Pool;
    use crate::chunk::Sealed;
    use crate::seal::Seal;

    fn chunk(seal: &Seal, kind: Kind, number: u64, bytes: &[u8]) -> Sealed {
        seal.seal(kind, number, false, bytes.len(), bytes, &Pool::new(0)).unwrap()
    }

    fn hash(chunk: &Sealed) -> Hash {
        let mut hashing = Hashing::default();
        hashing.update(&chunk.bytes);
        hashing.finish(&chunk.header)
    }

    fn check(checker: &mut Checker, chunk: &Sealed, opened: &[u8]) -> Result<(), Error> {
        checker.check(&chunk.header, &hash(chunk), opened)
    }

    #[test]
    fn a_hash_stands_for_the_header_and_the_bytes_however_they_come() {
        let header = Header::new(Kind::Data, 5, false, 70_000, 70_000).unwrap();
        let bytes: Vec<u8> = (0..70_016u32).map(|n| (n / 3) as u8).collect();
        let in_pieces = |size: usize, header: &Header, bytes: &[u8]| {
            let mut hashing = Hashing::default();
            bytes.chunks(size).for_each(|piece| hashing.update(piece));
            hashing.finish(header)
        };
        let whole = in_pieces(usize::MAX, &header, &bytes);
        assert!([1000, 1024, 16_384, 65_536].iter().all(|size| in_pieces(*size, &header, &bytes) == whole));
        assert_ne!(in_pieces(usize::MAX, &Header { number: 6, ..header }, &bytes), whole);
        let mut other = bytes;
        other[69_999] ^= 1;
        assert_ne!(in_pieces(usize::MAX, &header, &other), whole);
    }

    #[test]
    fn a_node_that_holds_the_key_cannot_forge_for_those_behind_it() {
        let wave = Wave::new([1; 16], 3).unwrap();
        let (seal, signer) = (Seal::new(&wave), Signer::new(&wave).unwrap());
        let chunks = [chunk(&seal, Kind::Data, 1, b"a"), chunk(&seal, Kind::End, 2, b"b")];
        let hashes: Vec<Hash> = chunks.iter().map(hash).collect();
        let payload = signer.list(0, &hashes);
        let list = chunk(&seal, Kind::List, 0, &payload);
        let mut checker = Checker::new(signer.public(), &wave);
        assert!(check(&mut checker, &chunks[0], b"a").is_err(), "no list yet");
        check(&mut checker, &list, &payload).unwrap();
        check(&mut checker, &chunks[0], b"a").unwrap();
        let forged = chunk(&seal, Kind::End, 2, b"x");
        assert!(matches!(check(&mut checker, &forged, b"x"), Err(Error::Forged(2))));
        check(&mut checker, &chunks[1], b"b").unwrap();
        // A list of one's own, a list of another place, a list that is cut.
        let own = Signer::new(&wave).unwrap().list(3, &hashes);
        for payload in [&own[..], &payload[..], &payload[..63], &payload[..64], &payload[..95], &[]] {
            let list = chunk(&seal, Kind::List, 3, payload);
            assert!(check(&mut checker, &list, payload).is_err());
        }
    }
}
