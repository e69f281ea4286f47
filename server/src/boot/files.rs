//! The boot directory that `ka-image build` makes, read into memory once: what nodes load does not change under them, and
//! a disk that is busy with the stream is not asked for it again and again.

use anyhow::{Context, Result, bail};
use axum::body::Bytes;
use std::io::Read;
use std::path::Path;

/// Where `ka-image build` puts its files unless told otherwise.
pub const BOOT_DIR: &str = "/var/lib/ka/boot";
/// Every file that nodes load.
pub const NAMES: [&str; 5] = ["vmlinuz", "initrd.img", "undionly.kpxe", "snponly.efi", "localboot.efi"];
/// The largest file that is read, in bytes.
const FILE_LIMIT: u64 = 1 << 30;

/// The files that nodes load.
#[derive(Debug, Clone)]
pub struct BootFiles {
    files: Vec<(&'static str, Bytes)>,
}

impl BootFiles {
    /// Reads all files of `directory`.
    ///
    /// # Errors
    /// When some are missing (all of them are named, with the command that makes them), empty, or cannot be read.
    pub fn read(directory: &Path) -> Result<Self> {
        let missing: Vec<&str> = NAMES.into_iter().filter(|name| !directory.join(name).exists()).collect();
        if !missing.is_empty() {
            bail!(
                "{} has no {}: make the boot files with `ka-image build --output {}`",
                directory.display(),
                missing.join(", "),
                directory.display()
            );
        }
        let mut files = Vec::new();
        for name in NAMES {
            let path = directory.join(name);
            let reading = || format!("reading the boot file {}", path.display());
            let file = std::fs::File::open(&path).with_context(reading)?;
            let length = file.metadata().with_context(reading)?.len();
            if length == 0 || length > FILE_LIMIT {
                bail!("{}: {length} bytes cannot be right", reading());
            }
            let mut bytes = Vec::new();
            file.take(FILE_LIMIT).read_to_end(&mut bytes).with_context(reading)?;
            files.push((name, Bytes::from(bytes)));
        }
        Ok(Self { files })
    }

    /// The file `name`, shared and not copied.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Bytes> {
        self.files.iter().find(|(known, _)| *known == name).map(|(_, bytes)| bytes.clone())
    }

    /// Writes the files that go out by TFTP into `directory`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write_tftp(&self, directory: &Path) -> Result<()> {
        for name in ["undionly.kpxe", "snponly.efi"] {
            let path = directory.join(name);
            let bytes = self.get(name).unwrap_or_default();
            std::fs::write(&path, &bytes).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_files_are_all_named_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["vmlinuz", "initrd.img", "snponly.efi"] {
            std::fs::write(directory.path().join(name), name).unwrap();
        }
        let error = BootFiles::read(directory.path()).unwrap_err().to_string();
        let path = directory.path().display();
        assert_eq!(
            error,
            format!(
                "{path} has no undionly.kpxe, localboot.efi: make the boot files with `ka-image build --output {path}`"
            )
        );
    }

    #[test]
    fn an_empty_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for name in NAMES {
            std::fs::write(directory.path().join(name), if name == "initrd.img" { "" } else { name })
                .unwrap();
        }
        let error = BootFiles::read(directory.path()).unwrap_err().to_string();
        assert!(error.ends_with("initrd.img: 0 bytes cannot be right"), "{error}");
        std::fs::write(directory.path().join("initrd.img"), "x").unwrap();
        let files = BootFiles::read(directory.path()).unwrap();
        assert_eq!(files.get("vmlinuz").unwrap(), "vmlinuz");
        assert_eq!(files.get("image.json"), None);
        let tftp = tempfile::tempdir().unwrap();
        files.write_tftp(tftp.path()).unwrap();
        assert_eq!(std::fs::read_dir(tftp.path()).unwrap().count(), 2);
    }
}
