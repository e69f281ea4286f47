//! What the operator adds: a directory whose content is laid over the image as it is (hooks, layouts, tools of their own).

use crate::Error;
use crate::tree::{Content, Part, Tree};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// No directory is nested deeper than this.
const MAX_DEPTH: usize = 64;

/// Lays the content of `dir` over `tree`: directories, files and symbolic links, with their permission bits, owned by
/// root. A file of the image that stands there gives way.
///
/// # Errors
/// When something is neither of the three, has a name that is not UTF-8, or stands where the image has a directory.
pub fn place(tree: &mut Tree, dir: &Path) -> Result<usize, Error> {
    copy(tree, dir, "", 0)
}

fn copy(tree: &mut Tree, dir: &Path, prefix: &str, depth: usize) -> Result<usize, Error> {
    if depth > MAX_DEPTH {
        return Err(Error::bad(dir, "nested too deeply"));
    }
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("listing", dir))? {
        paths.push(entry.map_err(Error::io("listing", dir))?.path());
    }
    paths.sort();
    let mut count = 0;
    for path in paths {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
            return Err(Error::bad(&path, "has a name that is not UTF-8"));
        };
        let to = format!("{prefix}/{name}");
        let meta = fs::symlink_metadata(&path).map_err(Error::io("looking at", &path))?;
        let mode = meta.permissions().mode();
        if meta.is_dir() {
            tree.directory(&to, mode, Part::Included)?;
            count += copy(tree, &path, &to, depth + 1)?;
        } else if meta.is_file() {
            tree.file(&to, mode, Content::of_file(&path)?, Part::Included)?;
            count += 1;
        } else if meta.is_symlink() {
            let target = fs::read_link(&path).map_err(Error::io("reading link", &path))?;
            let target =
                target.to_str().ok_or_else(|| Error::bad(&path, "links to a name that is not UTF-8"))?;
            tree.symlink(&to, target, Part::Included)?;
            count += 1;
        } else {
            return Err(Error::bad(&path, "is neither file, directory nor symbolic link"));
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Node;
    use std::os::unix::fs::symlink;

    #[test]
    fn files_are_laid_over_with_their_modes() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("etc/ka/hooks.d")).unwrap();
        fs::create_dir_all(dir.path().join("lib")).unwrap();
        let hook = dir.path().join("etc/ka/hooks.d/50-x");
        fs::write(&hook, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o750)).unwrap();
        fs::write(dir.path().join("lib/x"), "x").unwrap();
        symlink("x", dir.path().join("lib/y")).unwrap();
        let mut tree = Tree::new();
        assert_eq!(place(&mut tree, dir.path()).unwrap(), 3);
        assert_eq!(tree.get("/etc/ka/hooks.d/50-x").unwrap().mode, 0o750);
        assert!(tree.entries().any(|(name, _)| name == "usr/lib/x"));
        assert_eq!(tree.get("/usr/lib/y").unwrap().node, Node::Symlink("x".into()));
        symlink("x", dir.path().join("usr")).unwrap();
        let error = place(&mut tree, dir.path()).unwrap_err().to_string();
        assert_eq!(error, "/usr in the image: a directory stands there already");
    }

    #[test]
    fn special_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(place(&mut Tree::new(), dir.path()).unwrap_err().to_string().contains("is neither file"));
    }
}
