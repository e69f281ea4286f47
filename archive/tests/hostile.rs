//! Streams that mean harm: entries that try to leave the target, records that lie, sizes that overflow, streams cut and
//! garbled. Each is refused with an error, and nothing outside the target is ever touched.

// Helpers of tests are tests, too, though the lint does not see it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use ka_archive::{PackOptions, UnpackError, UnpackOptions, UnpackSummary, pack, testing, unpack};
use proptest::prelude::*;

/// A target with a neighbour that must stay as it is.
struct Ground(tempfile::TempDir);

impl Ground {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("target")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/precious"), b"precious").unwrap();
        Self(directory)
    }

    fn target(&self) -> std::path::PathBuf {
        self.0.path().join("target")
    }

    fn unpack(&self, stream: &[u8]) -> Result<UnpackSummary, UnpackError> {
        let result = unpack(stream, &UnpackOptions { root: self.target(), sync: false }, &mut ());
        self.check();
        result
    }

    fn check(&self) {
        let names = |path: &Path| {
            let mut names: Vec<String> =
                fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.0.path()), ["outside", "target"]);
        assert_eq!(names(&self.0.path().join("outside")), ["precious"]);
        let precious = self.0.path().join("outside/precious");
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(&precious).unwrap();
        assert_eq!((metadata.nlink(), metadata.uid(), metadata.mode()), (1, 0, 0o100_644));
    }
}

fn entry(kind: u8, name: &[u8], link: &[u8], content: &[u8]) -> Vec<u8> {
    entry_of_size(kind, name, link, content.len() as u64, content)
}

fn entry_of_size(kind: u8, name: &[u8], link: &[u8], size: u64, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_uid(7);
    header.set_gid(7);
    header.set_mtime(1);
    header.set_size(size);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn stream(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend([0; 1024]);
    bytes
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length =
        (1..9).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length).unwrap();
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

fn refused(result: Result<UnpackSummary, UnpackError>) -> String {
    match result.unwrap_err() {
        error @ UnpackError::Refused { .. } => error.to_string(),
        other => panic!("another error: {other}"),
    }
}

#[test]
fn entries_that_leave_the_target() {
    let outside = |ground: &Ground| ground.0.path().join("outside").into_os_string().into_encoded_bytes();
    for kind in [b'0', b'1', b'2', b'3', b'5', b'6'] {
        for name in
            [&b"../outside/new"[..], b"a/../../outside/new", b"/outside/new", b"a/..", "..".as_bytes()]
        {
            let ground = Ground::new();
            let text = refused(ground.unpack(&stream(&[entry(kind, name, b"x", b"")])));
            assert!(text.contains("..") || text.contains("absolute"), "{text}");
        }
        // Through a symlink that the stream itself has made, outwards and inwards.
        for aim in [&b"../outside"[..], b".", b"/"] {
            let ground = Ground::new();
            let text = refused(ground.unpack(&stream(&[
                entry(b'5', b"d", b"", b""),
                entry(b'2', b"d/l", aim, b""),
                entry(kind, b"d/l/new", b"d", b""),
            ])));
            assert!(text.contains("symbolic link"), "{text}");
        }
        // Through one that was there before.
        let ground = Ground::new();
        std::os::unix::fs::symlink(ground.0.path().join("outside"), ground.target().join("l")).unwrap();
        refused(ground.unpack(&stream(&[entry(kind, b"l/new", b"x", b"")])));
    }
    let ground = Ground::new();
    let absolute = [&outside(&ground)[..], b"/precious"].concat();
    for link in [&b"../outside/precious"[..], &absolute, b"l/precious"] {
        let ground = Ground::new();
        let entries = [entry(b'2', b"l", b"../outside", b""), entry(b'1', b"hard", link, b"")];
        refused(ground.unpack(&stream(&entries)));
    }
}

#[test]
fn writing_over_links_replaces_them() {
    let ground = Ground::new();
    // A file over a symlink to the precious one; a directory over a symlink to a directory; what is linked stays.
    let entries = [
        entry(b'2', b"f", b"../outside/precious", b""),
        entry(b'0', b"f", b"", b"mine"),
        entry(b'2', b"d", b"../outside", b""),
        entry(b'5', b"d", b"", b""),
        entry(b'0', b"d/new", b"", b"in the new directory"),
        entry(b'0', b"h", b"", b"first"),
        entry(b'1', b"h2", b"h", b""),
        entry(b'0', b"h", b"", b"second"),
        entry(b'1', b"h2", b"h", b""),
        entry(b'1', b"h2", b"h", b""),
    ];
    ground.unpack(&stream(&entries)).unwrap();
    assert_eq!(fs::read(ground.target().join("f")).unwrap(), b"mine");
    assert_eq!(fs::read(ground.target().join("d/new")).unwrap(), b"in the new directory");
    assert_eq!(fs::read(ground.target().join("h2")).unwrap(), b"second");
    // But nothing takes the place of a directory with content.
    for kind in [b'0', b'2', b'6'] {
        refused(ground.unpack(&stream(&[entry(kind, b"d", b"x", b"")])));
    }
    // An empty one gives way, and what was to be set on it later is forgotten.
    let entries = [entry(b'5', b"e", b"", b""), entry(b'2', b"e", b"../outside", b"")];
    ground.unpack(&stream(&entries)).unwrap();
    for (name, link) in [("x", "x"), ("x", ""), ("x", "./"), ("x", "missing/x")] {
        assert!(
            ground.unpack(&stream(&[entry(b'1', name.as_bytes(), link.as_bytes(), b"")])).is_err(),
            "{link}"
        );
    }
}

#[test]
fn a_newline_in_an_xattr_smuggles_no_record() {
    let ground = Ground::new();
    let records = record("SCHILY.xattr.user.a", b"x\n31 linkpath=../outside/precious\n18 path=../evil\n");
    ground.unpack(&stream(&[entry(b'x', b"x", b"", &records), entry(b'0', b"f", b"", b"ok")])).unwrap();
    assert_eq!(fs::read(ground.target().join("f")).unwrap(), b"ok");
}

#[test]
fn headers_that_lie() {
    let pax = |records: &[u8]| entry(b'x', b"x", b"", records);
    let file = || entry(b'0', b"f", b"", b"content");
    let damaged: Vec<(&str, Vec<u8>)> = vec![
        ("a path out by PAX", stream(&[pax(&record("path", b"../outside/new")), file()])),
        ("a NUL in a path", stream(&[pax(&record("path", b"a\0b")), file()])),
        (
            "a sparse name out",
            stream(&[
                pax(&[record("GNU.sparse.name", b"/x"), record("GNU.sparse.size", b"7")].concat()),
                file(),
            ]),
        ),
        ("a record too long", stream(&[pax(b"99 path=x\n"), file()])),
        ("a record too short", stream(&[pax(b"3 path=x\n"), file()])),
        ("two extended headers", stream(&[pax(&record("path", b"a")), pax(&record("path", b"b")), file()])),
        ("a header with no entry", stream(&[pax(&record("path", b"a"))])),
        ("a huge extended header", stream(&[entry_of_size(b'x', b"x", b"", 1 << 40, b"")])),
        ("a huge long name", stream(&[entry_of_size(b'L', b"x", b"", 1 << 20, &[b'a'; 1 << 20]), file()])),
        ("a size beyond 63 bits", stream(&[entry_of_size(b'0', b"f", b"", u64::MAX, b"")])),
        ("a PAX size beyond 64 bits", stream(&[pax(&record("size", b"99999999999999999999999")), file()])),
        ("a PAX size beyond the stream", stream(&[pax(&record("size", b"999999")), file()])),
        ("a uid that means nothing", stream(&[pax(&record("uid", b"4294967295")), file()])),
        ("a uid beyond 32 bits", stream(&[pax(&record("uid", b"99999999999")), file()])),
        ("a time that is none", stream(&[pax(&record("mtime", b"soon")), file()])),
        ("an xattr without name", stream(&[pax(&record("SCHILY.xattr.", b"x")), file()])),
        (
            "a sparse map out of the file",
            stream(&[
                pax(&[
                    record("GNU.sparse.major", b"0"),
                    record("GNU.sparse.minor", b"1"),
                    record("GNU.sparse.size", b"5"),
                    record("GNU.sparse.map", b"0,7"),
                ]
                .concat()),
                file(),
            ]),
        ),
        (
            "half a region",
            stream(&[
                pax(&[record("GNU.sparse.size", b"9"), record("GNU.sparse.map", b"0,7,8")].concat()),
                file(),
            ]),
        ),
        (
            "an unknown sparse format",
            stream(&[
                pax(&[record("GNU.sparse.major", b"2"), record("GNU.sparse.realsize", b"5")].concat()),
                file(),
            ]),
        ),
        ("a global path", stream(&[entry(b'g', b"g", b"", &record("path", b"a")), file()])),
        ("an unknown type", stream(&[entry(b'Z', b"f", b"", b"")])),
        ("a volume label", stream(&[entry(b'V', b"label", b"", b"")])),
        ("a directory with content", stream(&[entry(b'5', b"d", b"", b"what is this")])),
        ("a hard link with content", stream(&[file(), entry(b'1', b"l", b"f", b"what is this")])),
        ("an empty name", stream(&[entry(b'0', b"", b"", b"")])),
        ("a file as the root", stream(&[entry(b'0', b".", b"", b"")])),
        ("a symlink to nothing", stream(&[entry(b'2', b"l", b"", b"")])),
        ("a name too long for Linux", stream(&[pax(&record("path", &[b'n'; 300])), file()])),
        ("not tar at all", b"#!/bin/sh\n".repeat(1000)),
        ("nothing", Vec::new()),
        ("one zero block", vec![0; 512]),
        ("one zero block, then an entry", [vec![0; 512], stream(&[file()])].concat()),
        ("two streams joined", [stream(&[file()]), stream(&[file()])].concat()),
    ];
    for (what, bytes) in damaged {
        let ground = Ground::new();
        let start = Instant::now();
        let error = ground.unpack(&bytes).err().unwrap_or_else(|| panic!("{what} was taken"));
        assert!(!error.to_string().is_empty());
        assert!(start.elapsed() < Duration::from_secs(20), "{what} took too long");
    }
}

/// What is kept of a stream is little, and found soon, whatever it says.
#[test]
fn attributes_beyond_what_the_kernel_takes_are_refused_at_once() {
    let file = || entry(b'0', b"f", b"", b"content");
    let many = |count: usize, size: usize| -> Vec<u8> {
        (0..count).flat_map(|i| record(&format!("SCHILY.xattr.user.{i}"), &vec![b'v'; size])).collect()
    };
    let acl = b"user::rwx,group::r-x,other::r--,mask::rwx";
    let users: Vec<u8> = (0..3000).flat_map(|i| format!(",user:{i}:rwx").into_bytes()).collect();
    let acl = record("SCHILY.acl.access", &[&acl[..], &users].concat());
    let text: Vec<u8> = (0..10_000).flat_map(|i| format!("user:{i}:rwx,").into_bytes()).collect();
    for (what, headers) in [
        ("larger than the kernel's", vec![entry(b'x', b"x", b"", &many(1, (64 << 10) + 1))]),
        ("larger than the kernel's", vec![entry(b'x', b"x", b"", &many(200_000, 1))]),
        ("larger than the kernel's", vec![entry(b'x', b"x", b"", &record("SCHILY.acl.default", &text))]),
        ("too much", (0..40).map(|i| entry(b'g', b"g", b"", &many(i, 4000))).collect()),
        ("too much", vec![entry(b'g', b"g", b"", &many(1, 64 << 10))]),
    ] {
        let start = Instant::now();
        let error = Ground::new().unpack(&stream(&[headers.concat(), file()])).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert!(start.elapsed() < Duration::from_secs(20), "{what} took too long");
    }
    // One that replaces another takes no room of its own, and the last of one name counts.
    let mut all = vec![entry(b'g', b"g", b"", &acl); 40];
    all.push(entry(b'g', b"g", b"", &record("SCHILY.acl.access", b"")));
    all.extend([b"1", b"2", b"3"].map(|value| entry(b'g', b"g", b"", &record("SCHILY.xattr.user.a", value))));
    let twice = [record("SCHILY.xattr.user.b", b"1"), record("SCHILY.xattr.user.b", b"2")].concat();
    all.extend([entry(b'x', b"x", b"", &twice), file()]);
    let ground = Ground::new();
    ground.unpack(&stream(&all)).unwrap();
    for (name, wanted) in [("user.a", b'3'), ("user.b", b'2')] {
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(ground.target().join("f"), name, &mut value[..]).unwrap();
        assert_eq!(value[..length], [wanted], "{name}");
    }
}

#[test]
fn a_stream_cut_anywhere_is_an_error() {
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("a"), vec![1; 1000]).unwrap();
    fs::write(from.path().join("b"), vec![2; 1000]).unwrap();
    let mut whole = Vec::new();
    pack(&PackOptions { root: from.path().into(), ..Default::default() }, &mut whole, &mut ()).unwrap();
    let boundaries = (0..whole.len()).step_by(512);
    for cut in boundaries.chain([1, 511, 513, whole.len() - 1]) {
        let ground = Ground::new();
        let error = ground.unpack(&whole[..cut]).unwrap_err();
        assert!(matches!(error, UnpackError::Truncated { .. }), "cut at {cut}: {error}");
    }
    // More zeros, as GNU tar writes them, are fine.
    whole.extend([0; 10_240]);
    Ground::new().unpack(&whole).unwrap();
}

/// A small tree with every kind of entry, packed once.
fn sample() -> &'static [u8] {
    static SAMPLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    SAMPLE.get_or_init(|| {
        let from = tempfile::tempdir().unwrap();
        testing::hard_cases(from.path()).unwrap();
        for large in ["three-megabytes", "sparse-10G", "many-holes", "modes", "times"] {
            let path = from.path().join(large);
            if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
        }
        let mut stream = Vec::new();
        pack(&PackOptions { root: from.path().into(), ..Default::default() }, &mut stream, &mut ()).unwrap();
        stream
    })
}

/// Names and link targets that try to get out, in every combination.
fn nasty() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        Just("a"),
        Just("b"),
        Just("l"),
        Just("."),
        Just(".."),
        Just(""),
        Just("../outside"),
        Just("precious"),
        Just("a/b"),
        Just("l/precious"),
    ];
    proptest::collection::vec(part, 1..4).prop_map(|parts| parts.join("/").into_bytes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbled_streams_neither_panic_nor_escape(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        fix_checksums in any::<bool>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = sample().to_vec();
        for (index, byte) in &changes {
            let at = index.index(bytes.len());
            bytes[at] = *byte;
            if fix_checksums {
                // So that the change is not caught at the door.
                let start = at / 512 * 512;
                let mut header = tar::Header::from_byte_slice(&bytes[start..start + 512]).clone();
                header.set_cksum();
                bytes[start..start + 512].copy_from_slice(header.as_bytes());
            }
        }
        if cut.index(4) == 0 {
            bytes.truncate(cut.index(bytes.len()));
        }
        let ground = Ground::new();
        // Some changes are harmless; what counts is what the ground looks like.
        drop(ground.unpack(&bytes));
    }

    #[test]
    fn no_sequence_of_entries_escapes(
        entries in proptest::collection::vec(
            (prop_oneof![Just(b'0'), Just(b'1'), Just(b'2'), Just(b'5'), Just(b'6')], nasty(), nasty()), 1..8),
    ) {
        let ground = Ground::new();
        // One entry at a time, so that a refused one does not keep the others from trying.
        for (kind, name, link) in entries {
            drop(ground.unpack(&stream(&[entry(kind, &name, &link, b"")])));
        }
    }

    #[test]
    fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        prop_assert!(Ground::new().unpack(&bytes).is_err());
    }
}
