//! Files that only their owner may read: written as a whole or not at all, and refused when others can read them.

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// No file here is longer, in bytes.
const LIMIT: u64 = 64 << 20;

/// Writes `text` to `path`, readable by its owner only. Without `replace`, a file that is there stays.
///
/// # Errors
/// When it cannot be written, or it is there and must stay.
pub fn write(path: &Path, text: &str, replace: bool) -> Result<()> {
    write_with_mode(path, text, replace, 0o600)
}

/// [`write`] for what everybody may read.
///
/// # Errors
/// As [`write`].
pub fn write_public(path: &Path, text: &str, replace: bool) -> Result<()> {
    write_with_mode(path, text, replace, 0o644)
}

fn write_with_mode(path: &Path, text: &str, replace: bool, mode: u32) -> Result<()> {
    let writing = || format!("writing {}", path.display());
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).with_context(writing)?;
    // Made readable by its owner only, whatever the umask says.
    let mut new = tempfile::NamedTempFile::new_in(directory).with_context(writing)?;
    new.write_all(text.as_bytes()).with_context(writing)?;
    new.as_file().set_permissions(PermissionsExt::from_mode(mode)).with_context(writing)?;
    new.as_file().sync_all().with_context(writing)?;
    if replace {
        new.persist(path).with_context(writing)?;
    } else {
        new.persist_noclobber(path).with_context(writing)?;
    }
    std::fs::File::open(directory).and_then(|d| d.sync_all()).with_context(writing)
}

/// Reads what [`write`] wrote; `None` when it is not there.
///
/// # Errors
/// When it cannot be read, or others than its owner can read it.
pub fn read(path: &Path) -> Result<Option<String>> {
    let reading = || format!("reading {}", path.display());
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(reading),
    };
    let metadata = file.metadata().with_context(reading)?;
    if metadata.mode() & 0o077 != 0 {
        bail!(
            "{} holds a secret and others than its owner can use it (mode {:o}): chmod 600 it, and make a new one if \
             others had access",
            path.display(),
            metadata.mode() & 0o7777
        );
    }
    if metadata.size() > LIMIT {
        bail!("{}: {} bytes are too many", reading(), metadata.size());
    }
    std::io::read_to_string(file).map(Some).with_context(reading)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_for_their_owner_and_stay_unless_they_may_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/secret");
        assert_eq!(read(&path).unwrap(), None);
        write(&path, "one", false).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(write(&path, "two", false).is_err());
        assert_eq!(read(&path).unwrap().unwrap(), "one");
        write(&path, "two", true).unwrap();
        assert_eq!(read(&path).unwrap().unwrap(), "two");
        assert_eq!(std::fs::read_dir(folder.path().join("sub")).unwrap().count(), 1);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("mode 640"));
    }
}
