//! Programs with the libraries they need: the dynamic linker and every library, found the way the dynamic linker finds
//! them (run path, ld.so.conf, the usual directories), and put where it will find them without a cache.

use crate::Error;
use crate::elf::{self, Dynamic, ElfError};
use crate::root::Root;
use crate::tree::{Content, Part, Tree};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Directories that dynamic linkers know without being told.
const USUAL: [&str; 4] = ["/lib64", "/usr/lib64", "/lib", "/usr/lib"];
/// How deep ld.so.conf may include.
const MAX_DEPTH: usize = 8;

/// Adds programs and their libraries to an image.
#[derive(Debug)]
pub struct Libraries<'r> {
    root: &'r Root,
    directories: Vec<String>,
    /// Libraries placed: name and directory.
    placed: BTreeSet<(String, String)>,
}

impl<'r> Libraries<'r> {
    /// For the programs of `root`.
    ///
    /// # Errors
    /// When ld.so.conf cannot be read.
    pub fn new(root: &'r Root) -> Result<Self, Error> {
        let mut directories = Vec::new();
        read_conf(root, "/etc/ld.so.conf", 0, &mut directories)?;
        for base in ["/lib", "/usr/lib"] {
            let names = root.names(base)?.into_iter().filter(|n| n.ends_with("-linux-gnu"));
            directories.extend(names.map(|n| format!("{base}/{n}")));
        }
        directories.extend(USUAL.map(str::to_owned));
        Ok(Self { root, directories, placed: BTreeSet::new() })
    }

    /// Puts the program `from` (a path of the root) to `to`, with everything it needs; scripts come alone. Returns the
    /// kind of machine it is for.
    ///
    /// # Errors
    /// When it cannot be read, or a library is missing.
    pub fn add_program(
        &mut self,
        tree: &mut Tree,
        from: &str,
        to: &str,
        part: Part,
    ) -> Result<Option<(u16, bool)>, Error> {
        let path = self.root.resolve(from).map_err(Error::io("reading program", from))?;
        let bytes = fs::read(&path).map_err(Error::io("reading program", &path))?;
        tree.file(to, 0o755, Content::of_file(&path)?, part)?;
        match elf::dynamic(&bytes) {
            Ok(found) => {
                let machine = found.machine;
                self.add_needs(tree, from, &path, found)?;
                Ok(Some(machine))
            }
            Err(ElfError::NotElf) => Ok(None),
            Err(e) => Err(Error::bad(&path, e.to_string())),
        }
    }

    fn add_needs(&mut self, tree: &mut Tree, name: &str, path: &Path, first: Dynamic) -> Result<(), Error> {
        if let Some(interpreter) = &first.interpreter {
            let place = self
                .root
                .resolve(interpreter)
                .map_err(Error::io("reading the dynamic linker", interpreter))?;
            tree.file(interpreter, 0o755, Content::of_file(&place)?, Part::Libraries)?;
        }
        let mut open = vec![(name.to_owned(), path.to_path_buf(), first)];
        while let Some((wanted_by, path, found)) = open.pop() {
            for library in &found.needed {
                // The dynamic linker itself is often named; it is there already when it is the interpreter.
                let (directory, place, inner) =
                    self.find(library, &path, &found).ok_or_else(|| Error::Library {
                        wanted_by: wanted_by.clone(),
                        library: library.clone(),
                        root: self.root.path().to_path_buf(),
                    })?;
                if !self.placed.insert((library.clone(), directory.clone())) {
                    continue;
                }
                let to = format!("{directory}/{library}");
                tree.file(&to, 0o755, Content::of_file(&place)?, Part::Libraries)?;
                open.push((to, place, inner));
            }
        }
        Ok(())
    }

    /// The directory (a path of the root), the file and the content of `library` as wanted by the file `path`.
    fn find(
        &self,
        library: &str,
        path: &Path,
        wanted_by: &Dynamic,
    ) -> Option<(String, std::path::PathBuf, Dynamic)> {
        let (base, library) = match library.rsplit_once('/') {
            Some((directory, name)) => (Some(directory.to_owned()), name),
            None => (None, library),
        };
        let run_path = wanted_by.run_path.iter().filter_map(|entry| self.expand(entry, path));
        let all: Vec<String> = match base {
            Some(directory) => vec![directory],
            None => run_path.chain(self.directories.iter().cloned()).collect(),
        };
        all.into_iter().find_map(|directory| {
            let place = self.root.file(&format!("{directory}/{library}"))?;
            // Like the dynamic linker, pass by what is for another machine or is no library at all.
            let found = elf::dynamic(&fs::read(&place).ok()?).ok()?;
            (found.machine == wanted_by.machine).then_some((directory, place, found))
        })
    }

    /// A run path entry with `$ORIGIN` replaced; none when it is relative or uses what is not known here.
    fn expand(&self, entry: &str, path: &Path) -> Option<String> {
        let inside = Path::new("/").join(path.strip_prefix(self.root.path()).unwrap_or(path));
        let origin = inside.parent()?.to_str()?;
        let entry = entry.replace("${ORIGIN}", origin).replace("$ORIGIN", origin);
        if !entry.starts_with('/') || entry.contains('$') {
            return None;
        }
        let mut parts: Vec<&str> = Vec::new();
        for part in entry.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                _ => parts.push(part),
            }
        }
        Some(format!("/{}", parts.join("/")))
    }

    /// Ends the work: adds what the C library loads by itself, and links to libraries in directories that the dynamic
    /// linker does not know by itself (there is no ld.so.cache in the image).
    ///
    /// # Errors
    /// When something stands in the way in `tree`.
    pub fn finish(mut self, tree: &mut Tree) -> Result<(), Error> {
        let home = self.placed.iter().find(|(name, _)| name == "libc.so.6").map(|(_, dir)| dir.clone());
        let Some(home) = home else { return Ok(()) };
        let libc = self.root.resolve(&format!("{home}/libc.so.6")).ok();
        let libc = libc.and_then(|place| Some((elf::dynamic(&fs::read(&place).ok()?).ok()?, place)));
        if let Some((mut wish, place)) = libc {
            // Threads that are cancelled or end early make glibc load it by name.
            wish.needed = vec!["libgcc_s.so.1".to_owned()];
            wish.interpreter = None;
            if self.find("libgcc_s.so.1", &place, &wish).is_some() {
                self.add_needs(tree, "libc.so.6", &place, wish)?;
            }
        }
        let known = |directory: &str| directory == home || USUAL.contains(&directory);
        let strip = |directory: &str| directory.strip_prefix("/usr").unwrap_or(directory).to_owned();
        let mut links = BTreeMap::new();
        for (name, directory) in &self.placed {
            if !known(directory) && strip(directory) != strip(&home) {
                links.insert(format!("{home}/{name}"), format!("{directory}/{name}"));
            }
        }
        for (link, target) in links {
            if tree.get(&link).is_none() {
                tree.symlink(&link, &target, Part::Libraries)?;
            }
        }
        Ok(())
    }
}

/// Adds the directories of a configuration file of the dynamic linker, and of those that it includes.
fn read_conf(root: &Root, path: &str, depth: usize, out: &mut Vec<String>) -> Result<(), Error> {
    let Some(text) = root.read_text(path)? else { return Ok(()) };
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        match line.strip_prefix("include").filter(|rest| rest.starts_with(char::is_whitespace)) {
            Some(patterns) if depth < MAX_DEPTH => {
                for pattern in patterns.split_whitespace() {
                    let here = path.rsplit_once('/').map_or("", |(dir, _)| dir);
                    let pattern = if pattern.starts_with('/') {
                        pattern.to_owned()
                    } else {
                        format!("{here}/{pattern}")
                    };
                    let Some((directory, glob)) = pattern.rsplit_once('/') else { continue };
                    let (head, tail) = glob.split_once('*').unwrap_or((glob, ""));
                    for name in root.names(directory)? {
                        let fits = if glob.contains('*') {
                            name.len() >= head.len() + tail.len()
                                && name.starts_with(head)
                                && name.ends_with(tail)
                        } else {
                            name == glob
                        };
                        if fits {
                            read_conf(root, &format!("{directory}/{name}"), depth + 1, out)?;
                        }
                    }
                }
            }
            Some(_) => return Err(Error::bad(path, "includes others too deeply")),
            None if line.starts_with('/') => out.push(line.trim_end_matches('/').to_owned()),
            None => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::program;
    use crate::tree::Node;
    use std::os::unix::fs::symlink;

    fn write(root: &Path, path: &str, bytes: &[u8]) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn everything_a_program_needs_comes_along() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        write(top, "usr/lib64/ld.so", &program(None, &[], None));
        write(top, "usr/lib/x86_64-linux-gnu/libc.so.6", &program(None, &["ld.so"], None));
        write(top, "usr/lib/x86_64-linux-gnu/libgcc_s.so.1", &program(None, &["libc.so.6"], None));
        write(top, "usr/lib/x86_64-linux-gnu/liba.so.1.2", &program(None, &["libb.so", "libc.so.6"], None));
        symlink("liba.so.1.2", top.join("usr/lib/x86_64-linux-gnu/liba.so.1")).unwrap();
        write(top, "opt/x/libb.so", &program(None, &["libc.so.6"], None));
        write(top, "usr/tool/lib/libo.so", &program(None, &[], None));
        // Of another machine: to be passed by.
        let mut foreign = program(None, &[], None);
        foreign[18] = 3;
        write(top, "usr/local/lib/liba.so.1", &foreign);
        write(top, "etc/ld.so.conf", b"include /etc/ld.so.conf.d/*.conf\n");
        write(top, "etc/ld.so.conf.d/x.conf", b"# c\n/usr/local/lib\n/opt/x/\n");
        write(top, "etc/ld.so.conf.d/x.other", b"/nowhere\n");
        for (link, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
            symlink(target, top.join(link)).unwrap();
        }
        write(
            top,
            "usr/tool/bin/mke2fs",
            &program(Some("/lib64/ld.so"), &["liba.so.1", "libo.so", "libc.so.6"], Some("$ORIGIN/../lib")),
        );
        let root = Root::new(top);
        let mut tree = Tree::new();
        let mut libraries = Libraries::new(&root).unwrap();
        libraries.add_program(&mut tree, "/usr/tool/bin/mke2fs", "/sbin/mke2fs", Part::Programs).unwrap();
        libraries.finish(&mut tree).unwrap();
        for path in [
            "/lib64/ld.so",
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib/x86_64-linux-gnu/libgcc_s.so.1",
            "/opt/x/libb.so",
        ] {
            assert!(matches!(tree.get(path).map(|e| &e.node), Some(Node::File(_))), "{path}");
        }
        let content = &tree.get("/usr/lib/x86_64-linux-gnu/liba.so.1").unwrap().node;
        let wanted = top.join("usr/lib/x86_64-linux-gnu/liba.so.1.2");
        assert!(matches!(content, Node::File(Content::File { path, .. }) if *path == wanted), "{content:?}");
        // Libraries from odd directories are linked to where the dynamic linker looks without a cache.
        let link = &tree.get("/lib/x86_64-linux-gnu/libb.so").unwrap().node;
        assert_eq!(*link, Node::Symlink("/opt/x/libb.so".into()));
        let link = &tree.get("/lib/x86_64-linux-gnu/libo.so").unwrap().node;
        assert_eq!(*link, Node::Symlink("/usr/tool/lib/libo.so".into()));
    }

    #[test]
    fn a_missing_library_is_named_with_who_wants_it() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "bin/x", &program(None, &["libno.so.7"], None));
        let root = Root::new(dir.path());
        let mut libraries = Libraries::new(&root).unwrap();
        let error = libraries.add_program(&mut Tree::new(), "/bin/x", "/bin/x", Part::Programs).unwrap_err();
        assert!(
            error.to_string().starts_with("/bin/x needs the library libno.so.7, which is nowhere in"),
            "{error}"
        );
    }
}
