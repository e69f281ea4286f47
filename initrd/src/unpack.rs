//! Unpacking of modules and firmware that a distribution ships compressed, so that a node needs no decoder.

use crate::Error;
use std::io::Read;
use std::path::Path;

/// No module and no firmware file of a kernel is larger than this, unpacked.
const LIMIT: u64 = 512 << 20;
/// The endings that are understood.
const SUFFIXES: [&str; 3] = [".xz", ".zst", ".gz"];

/// `name` without the ending of a compressor; whether there was one.
#[must_use]
pub fn plain_name(name: &str) -> (&str, bool) {
    SUFFIXES.iter().find_map(|s| name.strip_suffix(s)).map_or((name, false), |plain| (plain, true))
}

/// The plain bytes of the compressed `bytes` of the file `path`, whose ending says how.
///
/// # Errors
/// When they are damaged, or larger than any module or firmware file is.
pub fn unpack(path: &Path, bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let failed = || Error::io("unpacking", path);
    let mut reader: Box<dyn Read + '_> = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => Box::new(lzma_rust2::XzReader::new(bytes, true)),
        Some("zst") => Box::new(zstd::Decoder::new(bytes).map_err(failed())?),
        // Not GzDecoder: it stops after the first member of several and says nothing.
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(bytes)),
        _ => return Ok(bytes.to_vec()),
    };
    let mut plain = Vec::new();
    reader.by_ref().take(LIMIT + 1).read_to_end(&mut plain).map_err(failed())?;
    if plain.len() as u64 > LIMIT {
        return Err(Error::bad(path, format!("more than {} MiB when unpacked", LIMIT >> 20)));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::XzOptions::with_preset(1);
        let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn zst(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 1).unwrap()
    }

    #[test]
    fn names_lose_their_endings() {
        assert_eq!(plain_name("a/b.ko.xz"), ("a/b.ko", true));
        assert_eq!(plain_name("a/b.ko"), ("a/b.ko", false));
    }

    #[test]
    fn concatenated_gzip_members_are_all_read() {
        let mut both = gzip(b"one ");
        both.extend(gzip(b"two"));
        // The trap that is avoided: the plain decoder stops after the first member without an error.
        let mut first = Vec::new();
        flate2::read::GzDecoder::new(&both[..]).read_to_end(&mut first).unwrap();
        assert_eq!(first, b"one ");
        assert_eq!(unpack(Path::new("x.ko.gz"), &both).unwrap(), b"one two");
    }

    #[test]
    fn concatenated_xz_and_zstd_are_all_read() {
        for (name, pack) in [("x.xz", xz as fn(&[u8]) -> Vec<u8>), ("x.zst", zst)] {
            let both = [pack(b"one "), pack(b"two")].concat();
            assert_eq!(unpack(Path::new(name), &both).unwrap(), b"one two", "{name}");
        }
    }

    #[test]
    fn the_xz_and_zstd_programs_agree() {
        let text: Vec<u8> = (0..200_000_u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        for (tool, name) in [("xz", "x.xz"), ("zstd", "x.zst"), ("gzip", "x.gz")] {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("x");
            std::fs::write(&file, &text).unwrap();
            match std::process::Command::new(tool).arg("-c").arg(&file).output() {
                Ok(out) => {
                    assert!(out.status.success());
                    assert_eq!(unpack(Path::new(name), &out.stdout).unwrap(), text, "{tool}");
                }
                Err(e) => println!("SKIPPED: {tool}: {e}"),
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_back_and_damage_never_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..5000),
            hit in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            for (name, mut packed) in [("x.gz", gzip(&bytes)), ("x.xz", xz(&bytes)), ("x.zst", zst(&bytes))] {
                prop_assert_eq!(&unpack(Path::new(name), &packed).unwrap(), &bytes);
                let at = hit.index(packed.len());
                packed[at] ^= flip;
                let _ = unpack(Path::new(name), &packed);
                let _ = unpack(Path::new(name), &packed[..at]);
            }
        }
    }
}
