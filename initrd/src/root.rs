//! A machine's root directory, seen from outside: paths are followed as they would be inside it, so that an absolute
//! symbolic link in a golden tree never leads out into the machine that builds the image.

use crate::Error;
use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// How many symbolic links one path may pass, as in the kernel.
const MAX_LINKS: usize = 40;

/// A root directory; `/` for the running machine.
#[derive(Debug, Clone)]
pub struct Root {
    path: PathBuf,
}

impl Root {
    /// The root at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf() }
    }

    /// Where it stands on this machine.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this is the running machine itself.
    #[must_use]
    pub fn is_running_machine(&self) -> bool {
        self.path.canonicalize().is_ok_and(|p| p == Path::new("/"))
    }

    /// The place on this machine of `inside`, a path of the root, with every symbolic link followed inside the root.
    ///
    /// # Errors
    /// `NotFound` when nothing stands there; what the system says otherwise.
    pub fn resolve(&self, inside: &str) -> io::Result<PathBuf> {
        let mut left: VecDeque<String> = inside.split('/').map(str::to_owned).collect();
        let mut done: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    done.pop();
                    continue;
                }
                _ => done.push(name),
            }
            let place = self.path.join(done.join("/"));
            if !fs::symlink_metadata(&place)?.file_type().is_symlink() {
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(io::Error::other("too many levels of symbolic links"));
            }
            let target = fs::read_link(&place)?;
            let target = target.to_str().ok_or_else(|| {
                io::Error::other(format!("symbolic link with a name that is not UTF-8: {}", target.display()))
            })?;
            done.pop();
            if target.starts_with('/') {
                done.clear();
            }
            for part in target.rsplit('/') {
                left.push_front(part.to_owned());
            }
        }
        Ok(self.path.join(done.join("/")))
    }

    /// Whether something stands at `inside`.
    #[must_use]
    pub fn has(&self, inside: &str) -> bool {
        self.resolve(inside).is_ok()
    }

    /// The place of the regular file at `inside`, or none when nothing (or something else) stands there.
    #[must_use]
    pub fn file(&self, inside: &str) -> Option<PathBuf> {
        self.resolve(inside).ok().filter(|p| p.is_file())
    }

    /// The content of the file at `inside`.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub fn read(&self, inside: &str) -> Result<Vec<u8>, Error> {
        let path = self.path.join(inside.trim_start_matches('/'));
        self.resolve(inside).and_then(fs::read).map_err(Error::io("reading", path))
    }

    /// The content of the text file at `inside`; bytes that are not UTF-8 are replaced. None when it does not exist.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_text(&self, inside: &str) -> Result<Option<String>, Error> {
        match self.resolve(inside).and_then(fs::read) {
            Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("reading", self.path.join(inside.trim_start_matches('/')))(e)),
        }
    }

    /// The names in the directory at `inside`, sorted; empty when there is no such directory.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn names(&self, inside: &str) -> Result<Vec<String>, Error> {
        let Ok(path) = self.resolve(inside) else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(Error::io("listing", &path))? {
            let entry = entry.map_err(Error::io("listing", &path))?;
            // A name that is not UTF-8 is none of those that we look for.
            names.extend(entry.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        fs::create_dir_all(top.join("usr/lib/deep")).unwrap();
        fs::write(top.join("usr/lib/deep/file"), "x").unwrap();
        symlink("usr/lib", top.join("lib")).unwrap();
        symlink("/lib/deep", top.join("usr/absolute")).unwrap();
        symlink("../../../../../lib/deep/file", top.join("usr/lib/up")).unwrap();
        symlink("loop", top.join("loop")).unwrap();
        let root = Root::new(top);
        let file = top.join("usr/lib/deep/file");
        for path in ["/lib/deep/file", "usr/absolute/file", "/usr/lib/up", "/../usr/./lib//deep/file"] {
            assert_eq!(root.resolve(path).unwrap(), file, "{path}");
        }
        assert!(root.resolve("/loop").is_err());
        assert!(!root.has("/usr/nothing"));
        assert_eq!(root.names("/usr").unwrap(), ["absolute", "lib"]);
        assert_eq!(root.read_text("/nothing").unwrap(), None);
        assert!(root.read("/nothing").unwrap_err().to_string().contains("reading"));
    }
}
