//! The rest of a small system: directories, the two device nodes that are needed before /dev is mounted, and a few files
//! of /etc.

use crate::Error;
use crate::root::Root;
use crate::tree::{Part, Tree};

const DIRECTORIES: &[(&str, u32)] = &[
    ("/dev", 0o755),
    ("/etc", 0o755),
    ("/mnt", 0o755),
    ("/proc", 0o555),
    ("/root", 0o700),
    ("/run", 0o755),
    ("/sys", 0o555),
    ("/target", 0o755),
    ("/tmp", 0o1777),
    ("/var", 0o755),
];

/// What mke2fs reads; without it every file system would be ext2 without extents.
const MKE2FS_CONF: &str = "/etc/mke2fs.conf";

/// Puts them into `tree`.
///
/// # Errors
/// When mke2fs.conf of the root cannot be read.
pub fn place(tree: &mut Tree, root: &Root, warnings: &mut Vec<String>) -> Result<(), Error> {
    for (path, mode) in DIRECTORIES {
        tree.directory(path, *mode, Part::Base)?;
    }
    tree.device("/dev/console", 0o600, 5, 1)?;
    tree.device("/dev/null", 0o666, 1, 3)?;
    tree.symlink("/var/run", "/run", Part::Base)?;
    tree.symlink("/etc/mtab", "/proc/self/mounts", Part::Base)?;
    tree.text("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", Part::Base)?;
    tree.text("/etc/group", "root:x:0:\n", Part::Base)?;
    match root.read_text(MKE2FS_CONF)? {
        Some(text) => tree.text(MKE2FS_CONF, &text, Part::Base)?,
        None => warnings.push(format!("{MKE2FS_CONF} is missing: mke2fs will use what was compiled in")),
    }
    Ok(())
}
