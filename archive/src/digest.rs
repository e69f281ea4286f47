//! The digest of a file's content, as the manifest holds it. Both forms say the same of the same bytes, wherever the file
//! system put holes: *whole* is the BLAKE3 of all bytes (what `b3sum` prints); *sparse*, for files that had holes when they
//! were packed, passes over blocks of zeros, so that a disk image of terabytes costs only what it really holds.
//!
//! Sparse: content is cut into blocks of 4096 bytes. Each run of blocks that are not all zeros gives its bytes, then its offset
//! and its length (8 bytes each, little-endian); the file's size ends it. Read from the end it has one meaning only.

use blake3::Hasher;

/// A BLAKE3 digest.
pub type Digest = [u8; 32];

const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Takes a file's content piece by piece, in ascending order; what lies between pieces is zeros.
pub(crate) struct Digester {
    hasher: Hasher,
    /// Where the next byte belongs.
    position: u64,
    sparse: Option<Sparse>,
}

#[derive(Default)]
struct Sparse {
    /// The block that is not full yet; it starts at a multiple of [`BLOCK`].
    partial: Vec<u8>,
    /// Where the run of blocks with data began that the last block belongs to.
    run: Option<u64>,
}

impl Digester {
    /// For content of the sparse form, or of the whole one.
    pub(crate) fn new(sparse: bool) -> Self {
        Self { hasher: Hasher::new(), position: 0, sparse: sparse.then(Sparse::default) }
    }

    /// The bytes at `offset`, which is never below the end of what came before.
    pub(crate) fn data(&mut self, offset: u64, bytes: &[u8]) {
        self.skip_to(offset);
        match &mut self.sparse {
            None => {
                self.hasher.update(bytes);
                self.position += bytes.len() as u64;
            }
            Some(_) => self.blocks(bytes),
        }
    }

    /// The digest of a file of `size` bytes.
    pub(crate) fn finish(mut self, size: u64) -> Digest {
        self.skip_to(size);
        if let Some(mut sparse) = self.sparse.take() {
            let start = self.position - sparse.partial.len() as u64;
            let last = std::mem::take(&mut sparse.partial);
            if !last.is_empty() {
                sparse.block(&mut self.hasher, start, &last);
            }
            sparse.end_run(&mut self.hasher, self.position);
            self.hasher.update(&size.to_le_bytes());
        }
        self.hasher.finalize().into()
    }

    fn skip_to(&mut self, offset: u64) {
        if self.sparse.is_some() {
            // Up to the end of this block, over whole ones, and into the last.
            let aligned = offset - offset % BLOCK as u64;
            if aligned > self.position {
                let over = self.position % BLOCK as u64;
                if over > 0 {
                    self.zeros(BLOCK as u64 - over);
                }
                if aligned > self.position
                    && let Some(sparse) = &mut self.sparse
                {
                    sparse.end_run(&mut self.hasher, self.position);
                    self.position = aligned;
                }
            }
        }
        self.zeros(offset.saturating_sub(self.position));
    }

    fn zeros(&mut self, mut count: u64) {
        while count > 0 {
            let part = usize::try_from(count).unwrap_or(BLOCK).min(BLOCK);
            match &self.sparse {
                None => {
                    self.hasher.update(&ZEROS[..part]);
                    self.position += part as u64;
                }
                Some(_) => self.blocks(&ZEROS[..part]),
            }
            count -= part as u64;
        }
    }

    fn blocks(&mut self, mut bytes: &[u8]) {
        let Some(sparse) = &mut self.sparse else { return };
        if !sparse.partial.is_empty() {
            let missing = BLOCK - sparse.partial.len();
            let (head, rest) = bytes.split_at(missing.min(bytes.len()));
            sparse.partial.extend_from_slice(head);
            self.position += head.len() as u64;
            bytes = rest;
            if sparse.partial.len() == BLOCK {
                let block = std::mem::take(&mut sparse.partial);
                sparse.block(&mut self.hasher, self.position - BLOCK as u64, &block);
                // Its memory serves the next.
                sparse.partial = block;
                sparse.partial.clear();
            }
        }
        let (whole, rest) = bytes.split_at(bytes.len() - bytes.len() % BLOCK);
        sparse.whole_blocks(&mut self.hasher, self.position, whole);
        sparse.partial.extend_from_slice(rest);
        self.position += bytes.len() as u64;
    }
}

impl Sparse {
    /// Blocks from `position` on: runs of data go to the hasher in one piece.
    fn whole_blocks(&mut self, hasher: &mut Hasher, position: u64, bytes: &[u8]) {
        let mut pending = 0..0;
        for (number, block) in bytes.chunks_exact(BLOCK).enumerate() {
            let start = number * BLOCK;
            if block == ZEROS {
                hasher.update(&bytes[pending.clone()]);
                self.end_run(hasher, position + start as u64);
                pending = start + BLOCK..start + BLOCK;
            } else {
                self.run.get_or_insert(position + start as u64);
                pending.end = start + BLOCK;
            }
        }
        hasher.update(&bytes[pending]);
    }

    /// One block, of which the last of a file may be short.
    fn block(&mut self, hasher: &mut Hasher, start: u64, block: &[u8]) {
        if block == &ZEROS[..block.len()] {
            self.end_run(hasher, start);
        } else {
            self.run.get_or_insert(start);
            hasher.update(block);
        }
    }

    fn end_run(&mut self, hasher: &mut Hasher, end: u64) {
        if let Some(start) = self.run.take() {
            hasher.update(&start.to_le_bytes());
            hasher.update(&(end - start).to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The sparse form, as the head of this file says, in the simplest way.
    fn sparse_by_the_book(content: &[u8]) -> Digest {
        let mut text: Vec<u8> = Vec::new();
        let mut run: Option<u64> = None;
        let mut position = 0u64;
        for block in content.chunks(BLOCK) {
            let zeros = block.iter().all(|b| *b == 0);
            if zeros && let Some(start) = run.take() {
                text.extend(start.to_le_bytes());
                text.extend((position - start).to_le_bytes());
            } else if !zeros {
                run.get_or_insert(position);
                text.extend(block);
            }
            position += block.len() as u64;
        }
        if let Some(start) = run {
            text.extend(start.to_le_bytes());
            text.extend((position - start).to_le_bytes());
        }
        text.extend((content.len() as u64).to_le_bytes());
        *blake3::hash(&text).as_bytes()
    }

    /// Feeds `content` in pieces cut at `cuts`; a piece of zeros is passed over where `holes` says so.
    fn fed(content: &[u8], sparse: bool, cuts: &[usize], holes: &[bool]) -> Digest {
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c % (content.len() + 1)).collect();
        cuts.sort_unstable();
        cuts.push(content.len());
        let mut digester = Digester::new(sparse);
        let mut from = 0;
        for (number, to) in cuts.into_iter().enumerate() {
            let piece = &content[from..to];
            let hole = holes[number % holes.len()] && piece.iter().all(|b| *b == 0);
            if !hole {
                digester.data(from as u64, piece);
            }
            from = to;
        }
        digester.finish(content.len() as u64)
    }

    #[test]
    fn sparse_digests_of_different_content_differ() {
        let size = 3 * BLOCK as u64;
        let of = |pieces: &[(u64, &[u8])], size| {
            let mut digester = Digester::new(true);
            for (offset, bytes) in pieces {
                digester.data(*offset, bytes);
            }
            digester.finish(size)
        };
        let all = [
            of(&[], 0),
            of(&[], size),
            of(&[], size + 1),
            of(&[(0, b"x")], size),
            of(&[(1, b"x")], size),
            of(&[(BLOCK as u64, b"x")], size),
            of(&[(size - 1, b"x")], size),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all.iter().skip(i + 1).all(|b| a != b), "{i}");
        }
        assert_eq!(of(&[], 1 << 50), of(&[(5, &[0; 9000])], 1 << 50));
    }

    #[test]
    fn the_whole_form_is_plain_blake3() {
        assert_eq!(Digester::new(false).finish(0), *blake3::hash(b"").as_bytes());
        assert_eq!(fed(b"abc", false, &[1], &[false]), *blake3::hash(b"abc").as_bytes());
    }

    proptest! {
        #[test]
        fn neither_pieces_nor_holes_matter(
            parts in proptest::collection::vec((any::<bool>(), 0usize..9000), 0..8),
            cuts in proptest::collection::vec(any::<usize>(), 0..12),
            holes in proptest::collection::vec(any::<bool>(), 1..12),
        ) {
            let mut content = Vec::new();
            for (data, length) in parts {
                content.extend(std::iter::repeat_n(u8::from(data) * 7, length));
            }
            prop_assert_eq!(fed(&content, true, &cuts, &holes), sparse_by_the_book(&content));
            prop_assert_eq!(fed(&content, false, &cuts, &holes), *blake3::hash(&content).as_bytes());
        }
    }
}
