//! Which of the file systems mounted in the tree belong to it: those of which the manifest has content. A clone may have other
//! partitions than its golden node.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::exclude::unescape;
use crate::manifest::{ManifestError, Reader};
use crate::verify::VerifyError;

/// Reads the manifest to its end; mount points below `root`, relative to it, that are directories with content there.
pub(super) fn with_content(root: &Path, mut reader: Reader<'_>) -> Result<Vec<String>, VerifyError> {
    let mut found: HashMap<Vec<u8>, bool> = mounted(root)?.into_iter().map(|path| (path, false)).collect();
    let mut parent: Vec<u8> = Vec::new();
    while let Some(entry) = next(&mut reader)? {
        let directory = entry.iter().rposition(|&b| b == b'/').map_or(&b""[..], |at| &entry[..at]);
        if found.is_empty() || directory == parent {
            continue;
        }
        parent.clear();
        parent.extend_from_slice(directory);
        for end in (0..=directory.len()).filter(|&at| at == directory.len() || directory[at] == b'/') {
            if let Some(seen) = found.get_mut(&directory[..end]) {
                *seen = true;
            }
        }
    }
    // The walk takes text only; what is below another mount point counts as missing.
    Ok(found
        .into_iter()
        .filter(|(_, seen)| *seen)
        .filter_map(|(path, _)| String::from_utf8(path).ok())
        .collect())
}

fn next(reader: &mut Reader<'_>) -> Result<Option<Vec<u8>>, ManifestError> {
    Ok(reader.next_entry()?.map(|entry| entry.path.into_owned()))
}

fn mounted(root: &Path) -> Result<Vec<Vec<u8>>, VerifyError> {
    // A root that is not there is told by the walk.
    let Ok(root) = root.canonicalize() else { return Ok(Vec::new()) };
    let text = std::fs::read("/proc/self/mountinfo").map_err(VerifyError::Mounts)?;
    Ok(below(&text, &root))
}

fn below(mountinfo: &[u8], root: &Path) -> Vec<Vec<u8>> {
    mountinfo
        .split(|&b| b == b'\n')
        .filter_map(|line| line.split(|&b| b == b' ').nth(4))
        .map(unescape)
        .filter_map(|path| {
            let path = Path::new(std::ffi::OsStr::from_bytes(&path)).strip_prefix(root).ok()?;
            let path = path.as_os_str().as_bytes().to_vec();
            (!path.is_empty()).then_some(path)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_below_the_root_and_none_beside() {
        let text = b"1 2 8:1 / / rw - ext4 /dev/sda1 rw\n\
            2 1 8:2 / /mnt/a rw - ext4 /dev/sda2 rw\n\
            3 1 8:3 / /mnt/a/b\\040c rw shared:1 - ext4 /dev/sda3 rw\n\
            4 1 8:4 / /mnt/ab rw - ext4 /dev/sda4 rw\nodd\n";
        assert_eq!(below(text, Path::new("/mnt/a")), [b"b c".to_vec()]);
        assert_eq!(below(text, Path::new("/")).len(), 3);
    }
}
