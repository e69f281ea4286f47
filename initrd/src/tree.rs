//! The files of an initramfs before they are written. Names are kept sorted and without symbolic links in their middle,
//! parents come by themselves, and `/bin`, `/sbin`, `/lib`, `/lib64` lead into `/usr` as on every system of today.

use crate::Error;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How many symbolic links one path may pass.
const MAX_LINKS: usize = 40;
/// The longest name that the kernel's unpacker takes, with its NUL.
const MAX_NAME: usize = 4096;

/// What an entry belongs to; for the table of what takes space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// `ka-agent`.
    Agent,
    /// mkfs and the like.
    Programs,
    /// busybox, or another shell.
    Shell,
    /// Shared libraries and the dynamic linker.
    Libraries,
    /// Modules of disks and their controllers.
    DiskModules,
    /// Modules of network cards.
    NetworkModules,
    /// Modules of file systems.
    FileSystemModules,
    /// Modules that others need, keyboards, and what was asked for by name.
    OtherModules,
    /// modules.dep and the like.
    ModuleLists,
    /// Firmware files.
    Firmware,
    /// Directories, device nodes, small files of /etc.
    Base,
    /// What the operator added.
    Included,
}

impl Part {
    /// What it is called in the table.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Agent => "ka-agent",
            Self::Programs => "programs",
            Self::Shell => "shell",
            Self::Libraries => "libraries",
            Self::DiskModules => "modules: disks",
            Self::NetworkModules => "modules: network",
            Self::FileSystemModules => "modules: file systems",
            Self::OtherModules => "modules: needed by others",
            Self::ModuleLists => "module lists",
            Self::Firmware => "firmware",
            Self::Base => "base",
            Self::Included => "included",
        }
    }
}

/// Where the bytes of a file come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// They are here.
    Bytes(Vec<u8>),
    /// They stand in a file of the building machine and are read when the archive is written.
    File {
        /// The file.
        path: PathBuf,
        /// Its size in bytes, which must not change meanwhile.
        size: u64,
    },
}

impl Content {
    /// The file at `path`, to be read later.
    ///
    /// # Errors
    /// When it is not a regular file.
    pub fn of_file(path: &Path) -> Result<Self, Error> {
        let meta = fs::metadata(path).map_err(Error::io("looking at", path))?;
        if !meta.is_file() {
            return Err(Error::bad(path, "not a regular file"));
        }
        Ok(Self::File { path: path.to_path_buf(), size: meta.len() })
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { size, .. } => *size,
        }
    }
}

/// What stands at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A regular file.
    File(Content),
    /// A symbolic link to this target.
    Symlink(String),
    /// A character device with these numbers.
    Device(u32, u32),
}

/// An entry of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub node: Node,
    /// Permission bits.
    pub mode: u32,
    /// What it belongs to.
    pub part: Part,
}

/// The files of an image, by name without a leading slash.
#[derive(Debug, Clone)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// An empty image: `/usr` and the links into it.
    #[must_use]
    pub fn new() -> Self {
        let mut entries = BTreeMap::new();
        let mut put = |name: &str, node, mode| {
            entries.insert(name.to_owned(), Entry { node, mode, part: Part::Base });
        };
        put("usr", Node::Directory, 0o755);
        for name in ["bin", "sbin", "lib", "lib64"] {
            put(&format!("usr/{name}"), Node::Directory, 0o755);
            put(name, Node::Symlink(format!("usr/{name}")), 0o777);
        }
        Self { entries }
    }

    /// Every entry, sorted by name; a directory stands before what is in it.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// What stands at `path`, symbolic links in its middle followed.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Entry> {
        self.canonical(path).ok().and_then(|name| self.entries.get(&name))
    }

    /// Puts a file at `path`; what stands there already gives way unless it is a directory.
    ///
    /// # Errors
    /// When something of another kind stands there.
    pub fn file(&mut self, path: &str, mode: u32, content: Content, part: Part) -> Result<(), Error> {
        self.put(path, Entry { node: Node::File(content), mode: mode & 0o7777, part })
    }

    /// Puts a small text file at `path`.
    ///
    /// # Errors
    /// As [`Tree::file`].
    pub fn text(&mut self, path: &str, text: &str, part: Part) -> Result<(), Error> {
        self.file(path, 0o644, Content::Bytes(text.as_bytes().to_vec()), part)
    }

    /// Puts a directory at `path`, with its parents.
    ///
    /// # Errors
    /// When something else stands there.
    pub fn directory(&mut self, path: &str, mode: u32, part: Part) -> Result<(), Error> {
        self.put(path, Entry { node: Node::Directory, mode: mode & 0o7777, part })
    }

    /// Puts a symbolic link to `target` at `path`.
    ///
    /// # Errors
    /// As [`Tree::file`].
    pub fn symlink(&mut self, path: &str, target: &str, part: Part) -> Result<(), Error> {
        self.put(path, Entry { node: Node::Symlink(target.to_owned()), mode: 0o777, part })
    }

    /// Puts a character device at `path`.
    ///
    /// # Errors
    /// As [`Tree::file`].
    pub fn device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<(), Error> {
        self.put(path, Entry { node: Node::Device(major, minor), mode: mode & 0o7777, part: Part::Base })
    }

    /// Bytes of file content, by what they belong to, with the number of files.
    #[must_use]
    pub fn sizes(&self) -> BTreeMap<Part, (usize, u64)> {
        let mut sizes = BTreeMap::new();
        for entry in self.entries.values() {
            if let Node::File(content) = &entry.node {
                let (count, bytes) = sizes.entry(entry.part).or_insert((0, 0));
                *count += 1;
                *bytes += content.size();
            }
        }
        sizes
    }

    fn put(&mut self, path: &str, entry: Entry) -> Result<(), Error> {
        let mut name = self.canonical(path)?;
        if entry.node == Node::Directory {
            // A directory that is named through a link (`lib`) is the one that the link leads to.
            for _ in 0..MAX_LINKS {
                let Some(Node::Symlink(target)) = self.entries.get(&name).map(|e| &e.node) else { break };
                name = self.canonical(&beside(&name, target))?;
            }
        }
        if name.is_empty() {
            return if entry.node == Node::Directory { Ok(()) } else { Err(conflict(path, "is the root")) };
        }
        match (self.entries.get(&name).map(|e| &e.node), &entry.node) {
            (Some(Node::Directory), Node::Directory) | (None, _) => {}
            (Some(Node::Directory), _) => return Err(conflict(&name, "a directory stands there already")),
            (Some(_), Node::Directory) => {
                return Err(conflict(&name, "something stands where a directory is to be"));
            }
            (Some(_), _) => {}
        }
        self.parents(&name)?;
        self.entries.insert(name, entry);
        Ok(())
    }

    fn parents(&mut self, name: &str) -> Result<(), Error> {
        for (slash, _) in name.match_indices('/') {
            let parent = &name[..slash];
            match self.entries.get(parent).map(|e| &e.node) {
                Some(Node::Directory) => {}
                Some(_) => return Err(conflict(parent, "is no directory, and is to hold something")),
                None => {
                    let entry = Entry { node: Node::Directory, mode: 0o755, part: Part::Base };
                    self.entries.insert(parent.to_owned(), entry);
                }
            }
        }
        Ok(())
    }

    /// `path` without `.`, empty parts, and symbolic links in its middle. The last part is kept as it is.
    fn canonical(&self, path: &str) -> Result<String, Error> {
        let mut left: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
        let mut done = String::new();
        let mut links = 0;
        while let Some(part) = left.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    done.truncate(done.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let before = done.len();
            if before > 0 {
                done.push('/');
            }
            done.push_str(&part);
            if left.iter().all(|p| p.is_empty() || p == ".") {
                break;
            }
            if let Some(Node::Symlink(target)) = self.entries.get(&done).map(|e| &e.node) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(conflict(path, "passes too many symbolic links"));
                }
                done.truncate(if target.starts_with('/') { 0 } else { before });
                left.extend(target.rsplit('/').map(str::to_owned));
            }
        }
        if done.len() + 1 > MAX_NAME || done.contains('\0') {
            return Err(conflict(path, "is no name that the kernel would unpack"));
        }
        Ok(done)
    }
}

fn conflict(path: &str, what: &str) -> Error {
    Error::Conflict { path: path.trim_start_matches('/').to_owned(), what: what.to_owned() }
}

/// The path that the target of a symbolic link at `name` means.
fn beside(name: &str, target: &str) -> String {
    match name.rsplit_once('/') {
        _ if target.starts_with('/') => target.to_owned(),
        Some((parent, _)) => format!("{parent}/{target}"),
        None => target.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(tree: &Tree) -> Vec<&str> {
        tree.entries().map(|(name, _)| name).collect()
    }

    #[test]
    fn parents_come_by_themselves_and_links_are_followed() {
        let mut tree = Tree::new();
        tree.text("/lib/modules/6.1/modules.dep", "x", Part::ModuleLists).unwrap();
        tree.text("/sbin/mke2fs", "x", Part::Programs).unwrap();
        tree.symlink("/etc/mtab", "../proc/self/mounts", Part::Base).unwrap();
        let names = names(&tree);
        for name in
            ["usr/lib/modules", "usr/lib/modules/6.1/modules.dep", "usr/sbin/mke2fs", "etc", "etc/mtab"]
        {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        assert!(!names.contains(&"lib/modules"));
        assert!(tree.get("/lib/modules/6.1/modules.dep").is_some());
        // A directory named through a link is the link's target, and the link stays.
        tree.directory("/lib", 0o755, Part::Included).unwrap();
        assert!(matches!(tree.get("/lib").unwrap().node, Node::Symlink(_)));
    }

    #[test]
    fn clashes_are_errors() {
        let mut tree = Tree::new();
        tree.text("/etc/passwd", "x", Part::Base).unwrap();
        assert!(tree.text("/etc", "x", Part::Base).is_err());
        assert!(tree.text("/etc/passwd/x", "x", Part::Base).is_err());
        assert!(tree.directory("/etc/passwd", 0o755, Part::Base).is_err());
        assert!(tree.text("/", "x", Part::Base).is_err());
        tree.text("/etc/passwd", "y", Part::Included).unwrap();
        assert_eq!(tree.get("/etc/passwd").unwrap().part, Part::Included);
        tree.symlink("/a", "b", Part::Base).unwrap();
        tree.symlink("/b", "a", Part::Base).unwrap();
        assert!(tree.text("/a/x", "x", Part::Base).is_err());
        assert!(tree.directory("/a", 0o755, Part::Base).is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_put_in_parents_precede_and_are_directories(
            paths in prop::collection::vec("(/?(lib|sbin|a|b|\\.\\.|\\.|cc)){1,6}", 1..20)
        ) {
            let mut tree = Tree::new();
            for (i, path) in paths.iter().enumerate() {
                // A clash is an error, never a panic and never a broken tree.
                if i % 5 == 4 {
                    let _ = tree.symlink(path, "../a/b", Part::Base);
                } else {
                    let _ = tree.text(path, "x", Part::Base);
                }
            }
            let mut seen = std::collections::HashSet::new();
            for (name, entry) in tree.entries() {
                prop_assert!(!name.starts_with('/') && !name.split('/').any(|p| p.is_empty() || p == ".."));
                if let Some((parent, _)) = name.rsplit_once('/') {
                    prop_assert!(seen.contains(parent), "{} before {}", name, parent);
                }
                if entry.node == Node::Directory {
                    seen.insert(name.to_owned());
                }
            }
        }
    }
}
