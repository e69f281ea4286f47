//! Packing and unpacking hold few files open at once, whatever the tree and however slowly the stream goes. All in one test,
//! because the limit is the whole process's. Should be root.

// Helpers of tests are tests, too, though the lint does not see it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use ka_archive::{Observer, PackError, PackOptions, UnpackOptions, pack, unpack};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

fn limit(soft: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum }).unwrap();
}

fn open_files() -> u64 {
    fs::read_dir("/proc/self/fd").unwrap().count() as u64
}

/// Waits at the first thing in the root until nothing is done any more that could be done ahead.
struct Slow(bool);

impl Observer for Slow {
    fn entry(&mut self, path: &[u8]) {
        if !path.is_empty() && std::mem::take(&mut self.0) {
            std::thread::sleep(Duration::from_secs(2));
        }
    }
}

fn packed(root: &Path, out: impl Write, slow: bool, skip_unreadable: bool) -> Result<(), PackError> {
    let options = PackOptions { root: root.into(), skip_unreadable, ..PackOptions::default() };
    let summary = pack(&options, out, &mut Slow(slow))?;
    assert_eq!(summary.unreadable.total, 0, "{:?}", summary.unreadable);
    Ok(())
}

#[test]
fn few_files_are_open_at_once() {
    let trees = tempfile::tempdir().unwrap();
    let tree = |name: &str, count: usize, make: &dyn Fn(&Path)| {
        let root = trees.path().join(name);
        for i in 0..count {
            fs::create_dir_all(&root).unwrap();
            make(&root.join(format!("{i:04}")));
        }
        root
    };
    let large = tree("large", 600, &|path| {
        let file = fs::File::create(path).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, 300_000).unwrap();
    });
    let empty = tree("empty", 2500, &|path| fs::create_dir(path).unwrap());
    let single = tree("single", 2500, &|path| {
        fs::create_dir(path).unwrap();
        fs::write(path.join("file"), b"x").unwrap();
    });
    // On the way back up each directory is opened again.
    let deep = trees.path().join("deep");
    let mut path = deep.clone();
    for _ in 0..600 {
        fs::create_dir(&path).unwrap();
        fs::write(path.join("z"), b"x").unwrap();
        path.push("d");
    }
    let mut stream = Vec::new();
    packed(&single, &mut stream, false, false).unwrap();
    limit(open_files() + 400);
    for root in [&large, &empty, &single, &deep] {
        packed(root, io::sink(), true, false).unwrap();
    }
    let to = trees.path().join("to");
    fs::create_dir(&to).unwrap();
    // Four threads at most, with four batches each.
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    limit(open_files() + 50 + 64 * threads as u64);
    let summary = unpack(&stream[..], &UnpackOptions { root: to, sync: false }, &mut ()).unwrap();
    assert_eq!(summary.files, 2500);
    // That too many are open is never the tree's fault.
    limit(open_files() + 12);
    for root in [&single, &large] {
        let error = packed(root, io::sink(), true, true).unwrap_err().to_string();
        assert!(error.contains("Too many open files"), "{error}");
    }
    limit(getrlimit(Resource::Nofile).maximum.unwrap_or(4096).min(4096));
}
