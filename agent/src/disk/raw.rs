//! Content that is sent block for block goes into its partition as it comes, zeros and all: what stood there before must not
//! show through. The partition is ours alone meanwhile, and nothing is written behind what was announced.

use anyhow::{Context, Result, bail, ensure};
use ka_archive::Observer;
use std::fs::File;
use std::io::{self, BufRead};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

/// Bytes that may wait in memory for the disk: a sync of more could look like a disk that takes nothing.
const UNSYNCED: u64 = 64 << 20;

/// Where a part of the stream goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawPlace {
    /// The part's name.
    pub part: String,
    /// The partition.
    pub device: PathBuf,
    /// The content's length in bytes.
    pub bytes: u64,
}

impl RawPlace {
    /// Writes what `from` holds to the partition, and syncs it.
    ///
    /// # Errors
    /// When somebody else uses the partition, it is too small or cannot be written, or `from` holds more or less than was
    /// announced.
    pub fn fill(&self, from: &mut impl BufRead, observer: &mut impl Observer) -> Result<()> {
        let writing = || format!("writing {} to {}", self.part, self.device.display());
        let exclusive = nix::libc::O_EXCL | nix::libc::O_CLOEXEC;
        let file = File::options().write(true).custom_flags(exclusive).open(&self.device);
        let file = file.with_context(writing)?;
        let room = ka_sys::block::size(&file).with_context(writing)?;
        ensure!(room >= self.bytes, "{}: {} bytes do not fit into its {room}", writing(), self.bytes);
        copy(from, &file, self.bytes, observer).with_context(writing)
    }
}

/// Which places have had their content.
#[derive(Debug)]
pub struct Filling<'a> {
    places: &'a [RawPlace],
    filled: Vec<&'a str>,
}

impl<'a> Filling<'a> {
    /// None yet.
    #[must_use]
    pub const fn new(places: &'a [RawPlace]) -> Self {
        Self { places, filled: Vec::new() }
    }

    /// The place of the part that begins.
    ///
    /// # Errors
    /// When there is none, or it was filled before.
    pub fn next(&mut self, part: &str) -> Result<&'a RawPlace> {
        let place = self.places.iter().find(|place| place.part == part);
        let place =
            place.with_context(|| format!("the stream has blocks for {part}, which have no place here"))?;
        ensure!(!self.filled.contains(&part), "the stream has the blocks for {part} twice");
        self.filled.push(&place.part);
        Ok(place)
    }

    /// To be called at the end of the stream.
    ///
    /// # Errors
    /// When a place got nothing.
    pub fn end(self) -> Result<()> {
        match self.places.iter().find(|place| !self.filled.contains(&place.part.as_str())) {
            Some(missing) => bail!("the stream ended without the blocks for {}", missing.part),
            None => Ok(()),
        }
    }
}

/// Writes just `bytes` bytes to the beginning of `to`, in the pieces in which the chain gives them: whole chunks, so aligned.
fn copy(from: &mut impl BufRead, to: &File, bytes: u64, observer: &mut impl Observer) -> Result<()> {
    let (mut at, mut synced) = (0, 0);
    loop {
        let piece = match from.fill_buf() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other.context("receiving the stream")?,
        };
        let n = piece.len();
        if n == 0 {
            break;
        }
        ensure!(n as u64 <= bytes - at, "the stream holds more than the {bytes} bytes that were announced");
        to.write_all_at(piece, at).with_context(|| format!("at byte {at}"))?;
        from.consume(n);
        observer.bytes(n as u64);
        at += n as u64;
        if at - synced >= UNSYNCED {
            to.sync_data().context("syncing")?;
            synced = at;
        }
    }
    ensure!(at == bytes, "the stream ended after {at} of the {bytes} bytes that were announced");
    to.sync_all().context("syncing")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::io::{BufReader, Read};

    /// Gives so many bytes at a time, and breaks off in the end or ends.
    struct Pieces<'a>(&'a [u8], usize, bool);

    impl Read for Pieces<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            if self.0.is_empty() && self.2 {
                return Err(io::Error::other("cut"));
            }
            let n = out.len().min(self.1).min(self.0.len());
            out[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    proptest! {
        // Each case syncs.
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Over a file that is full of something else, as an old disk is.
        #[test]
        fn what_was_announced_and_nothing_else_is_written(
            content in proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..5000), piece in 1usize..700,
            off in -3i64..4, cut: bool, behind in 0usize..100,
        ) {
            let Some(announced) = (content.len() as u64).checked_add_signed(off) else { return Ok(()) };
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("disk");
            let dirty = vec![0xa5; usize::try_from(announced).unwrap() + behind];
            fs::write(&path, &dirty).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            let mut from = BufReader::with_capacity(512, Pieces(&content, piece, cut));
            let copied = copy(&mut from, &file, announced, &mut ());
            prop_assert_eq!(copied.is_ok(), off == 0 && !cut, "{:?}", copied);
            let now = fs::read(&path).unwrap();
            prop_assert_eq!(now.len(), dirty.len());
            prop_assert_eq!(&now[usize::try_from(announced).unwrap()..], &dirty[..behind], "beyond");
            if copied.is_ok() {
                prop_assert!(now[..content.len()] == content);
            }
        }
    }

    #[test]
    fn each_part_has_its_place_and_each_place_its_part() {
        let place = |part: &str| RawPlace { part: part.into(), device: part.into(), bytes: 1 };
        let places = [place("a"), place("b")];
        let mut filling = Filling::new(&places);
        assert_eq!(filling.next("b").unwrap(), &places[1]);
        assert_eq!(filling.next("b").unwrap_err().to_string(), "the stream has the blocks for b twice");
        let error = filling.next("c").unwrap_err().to_string();
        assert_eq!(error, "the stream has blocks for c, which have no place here");
        filling.next("a").unwrap();
        filling.end().unwrap();
        let mut filling = Filling::new(&places);
        filling.next("b").unwrap();
        assert_eq!(filling.end().unwrap_err().to_string(), "the stream ended without the blocks for a");
        Filling::new(&[]).end().unwrap();
    }

    #[test]
    fn errors_say_what_and_where() {
        let file = tempfile::tempfile().unwrap();
        let error =
            |content: &[u8], bytes| format!("{:#}", copy(&mut &*content, &file, bytes, &mut ()).unwrap_err());
        assert_eq!(error(&[1; 5], 4), "the stream holds more than the 4 bytes that were announced");
        assert_eq!(error(&[1; 5], 6), "the stream ended after 5 of the 6 bytes that were announced");
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = format!("{:#}", copy(&mut &[1; 5][..], &full, 5, &mut ()).unwrap_err());
        assert!(error.starts_with("at byte 0: No space left"), "{error}");
        let place = RawPlace { part: "#2".into(), device: "/no/such/disk".into(), bytes: 1 };
        let error = format!("{:#}", place.fill(&mut &[][..], &mut ()).unwrap_err());
        assert!(error.starts_with("writing #2 to /no/such/disk: No such file"), "{error}");
    }
}
