//! Writes a manifest while the tree is packed: into a file of another name, that gets its own when all is on the disk. An
//! error does not hold the packer up; it comes out at the end.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Entry, Header, ManifestError, VERSION, text};
use crate::Observer;

/// Lines are collected up to this size, in bytes, before they are compressed.
const BATCH: usize = 64 << 10;
/// Digests do not shrink, and the rest shrinks well at any level.
const LEVEL: i32 = 1;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Where.
    pub path: PathBuf,
    /// Entries.
    pub entries: u64,
    /// Size of the file.
    pub bytes: u64,
}

/// Writes one manifest. Dropped before [`Writer::finish`], it leaves nothing.
pub struct Writer {
    out: zstd::Encoder<'static, File>,
    path: PathBuf,
    unfinished: Option<PathBuf>,
    batch: Vec<u8>,
    entries: u64,
    fault: Option<io::Error>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Writer {
    /// Begins the manifest that shall stand at `path`, readable for its owner only: it tells every name of the tree.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path, header: &Header) -> Result<Self, ManifestError> {
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(".unfinished");
        let unfinished = PathBuf::from(unfinished);
        let making = |e| ManifestError::io(format!("making {}", unfinished.display()), e);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)
            .map_err(making)?;
        let mut out = zstd::Encoder::new(file, LEVEL).map_err(making)?;
        out.include_checksum(true).map_err(making)?;
        // Compressing is done beside the packer, not by it.
        out.multithread(1).map_err(making)?;
        Ok(Self {
            out,
            path: path.to_owned(),
            unfinished: Some(unfinished.clone()),
            batch: head(header),
            entries: 0,
            fault: None,
        })
    }

    /// Adds an entry. They come in the order of a walk, as the packer gives them.
    pub fn add(&mut self, entry: &Entry<'_>) {
        text::put(entry, &mut self.batch);
        self.entries += 1;
        if self.batch.len() >= BATCH {
            self.drain();
        }
    }

    fn drain(&mut self) {
        if self.fault.is_none() {
            self.fault = self.out.write_all(&self.batch).err();
        }
        self.batch.clear();
    }

    /// Ends the manifest, puts it on the disk and gives it its name.
    ///
    /// # Errors
    /// When anything could not be written; then there is no manifest.
    pub fn finish(mut self) -> Result<Written, ManifestError> {
        let end = format!("#end {}\n", self.entries);
        self.batch.extend_from_slice(end.as_bytes());
        self.drain();
        let path = self.path.clone();
        let writing = |e| ManifestError::io(format!("writing {}", path.display()), e);
        if let Some(fault) = self.fault.take() {
            return Err(writing(fault));
        }
        self.out.do_finish().map_err(writing)?;
        let file = self.out.get_ref();
        file.sync_all().map_err(writing)?;
        let bytes = file.metadata().map_err(writing)?.len();
        if let Some(unfinished) = &self.unfinished {
            std::fs::rename(unfinished, &path).map_err(writing)?;
        }
        self.unfinished = None;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(writing)?;
        Ok(Written { path, entries: self.entries, bytes })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(unfinished) = &self.unfinished {
            // A later one of the same name takes its place if it stays.
            let _ = std::fs::remove_file(unfinished);
        }
    }
}

impl Observer for Writer {
    fn wants_entries(&self) -> bool {
        true
    }

    fn packed(&mut self, entry: &Entry<'_>) {
        self.add(entry);
    }
}

fn head(header: &Header) -> Vec<u8> {
    let mut out = format!("#mtree\n#ka-manifest {VERSION}\n").into_bytes();
    let mut put = |key: &str, values: &[&[u8]]| {
        out.push(b'#');
        out.extend_from_slice(key.as_bytes());
        for value in values {
            out.push(b' ');
            text::escape(value, &mut out);
        }
        out.push(b'\n');
    };
    put("deployment", &[header.deployment.as_bytes()]);
    put("wave", &[header.wave.to_string().as_bytes()]);
    put("root", &[header.root.as_os_str().as_bytes()]);
    put("attributes", &[b"flags", b"projid"]);
    for mount in &header.mounts {
        put("mount", &[mount.as_bytes()]);
    }
    for glob in &header.excludes {
        put("exclude", &[glob.as_bytes()]);
    }
    for expected in &header.expected {
        let what = expected.allows.to_string();
        put("expect", &[what.as_bytes(), expected.glob.as_bytes(), expected.why.as_bytes()]);
    }
    out
}
