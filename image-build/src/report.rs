//! What an image consists of: digests of its files, and a table of what takes space.

use anyhow::{Context, Result};
use ka_cli::units::show_size;
use ka_initrd::archive::Written;
use ka_initrd::manifest::{FileInfo, Manifest};
use ka_initrd::tree::Part;
use ring::digest::{Context as Digest, SHA256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// Size and SHA-256 of every file in `dir`.
pub fn digests(dir: &Path) -> Result<BTreeMap<String, FileInfo>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
        let path = entry.with_context(|| format!("listing {}", dir.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let info = digest(&path).with_context(|| format!("reading {}", path.display()))?;
        files.insert(name, info);
    }
    Ok(files)
}

fn digest(path: &Path) -> std::io::Result<FileInfo> {
    let mut file = File::open(path)?;
    let mut digest = Digest::new(&SHA256);
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        size += n as u64;
        digest.update(&buffer[..n]);
    }
    let mut sha256 = String::with_capacity(64);
    for byte in digest.finish().as_ref() {
        // Writing to a String cannot fail.
        let _ = write!(sha256, "{byte:02x}");
    }
    Ok(FileInfo { size, sha256 })
}

/// The table of what takes space in the initramfs, and the files beside it.
pub fn table(sizes: &BTreeMap<Part, (usize, u64)>, written: Written, manifest: &Manifest) -> String {
    let mut rows: Vec<_> = sizes.iter().collect();
    rows.sort_by_key(|(_, (_, bytes))| std::cmp::Reverse(*bytes));
    let mut out = format!("\n{:<28}{:>8}{:>12}\n", "in the initramfs, unpacked", "files", "size");
    // Writing to a String cannot fail.
    for (part, (count, bytes)) in rows {
        let _ = writeln!(out, "{:<28}{count:>8}{:>12}", part.name(), show_size(*bytes));
    }
    let files: usize = sizes.values().map(|(count, _)| count).sum();
    let _ = writeln!(out, "{:<28}{files:>8}{:>12}\n", "all", show_size(written.plain));
    for (name, info) in &manifest.files {
        let _ = writeln!(out, "{name:<28}{:>20}", show_size(info.size));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x"), "abc").unwrap();
        let got = &digests(dir.path()).unwrap()["x"];
        assert_eq!(got.size, 3);
        assert_eq!(got.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
