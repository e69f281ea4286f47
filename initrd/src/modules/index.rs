//! What depmod wrote about a kernel's modules: `modules.dep`, `modules.alias`, `modules.softdep`, `modules.builtin`,
//! `modules.order`. Names are compared the way modprobe does: `-` and `_` are one letter.

use crate::unpack;
use crate::{Error, root::Root};
use std::collections::{BTreeMap, BTreeSet};

/// A module that can be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its file, relative to the directory of the kernel's modules (`kernel/drivers/net/virtio_net.ko.xz`).
    pub path: String,
    /// The modules it needs, all of them, as in modules.dep: the last one is loaded first.
    pub needs: Vec<String>,
}

impl Module {
    /// Its path without the ending of a compressor.
    #[must_use]
    pub fn plain_path(&self) -> &str {
        unpack::plain_name(&self.path).0
    }
}

/// Everything that is known of a kernel's modules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Index {
    /// By name.
    pub modules: BTreeMap<String, Module>,
    /// Alias pattern and module, in the order of the file.
    pub aliases: Vec<(String, String)>,
    /// Lines of modules.softdep: module, and everything it would like to have loaded before or after it.
    pub wishes: Vec<(String, Vec<String>)>,
    /// The lines of modules.softdep by themselves, with the module each is about.
    pub wish_lines: Vec<(String, String)>,
    /// Modules that are part of the kernel.
    pub builtin: BTreeSet<String>,
    /// modules.builtin as it is.
    pub builtin_text: String,
    /// Paths of modules.order.
    pub order: Vec<String>,
}

/// The name of the module in the file `path`.
#[must_use]
pub fn name_of(path: &str) -> String {
    let file = unpack::plain_name(path.rsplit('/').next().unwrap_or(path)).0;
    normal(file.strip_suffix(".ko").unwrap_or(file))
}

/// `name` with `-` as `_`.
#[must_use]
pub fn normal(name: &str) -> String {
    name.replace('-', "_")
}

impl Index {
    /// Reads the lists of the kernel `version` in `root`.
    ///
    /// # Errors
    /// When modules.dep is missing (depmod never ran) or a file cannot be read.
    pub fn read(root: &Root, version: &str) -> Result<Self, Error> {
        let dir = format!("/lib/modules/{version}");
        let text = |name: &str| root.read_text(&format!("{dir}/{name}"));
        let Some(dep) = text("modules.dep")? else {
            return Err(Error::Kernel(format!(
                "there is no {dir}/modules.dep in {}; `depmod -b {} {version}` makes it",
                root.path().display(),
                root.path().display(),
            )));
        };
        let mut index = Self { modules: parse_dep(&dep), ..Self::default() };
        index.aliases = parse_aliases(&text("modules.alias")?.unwrap_or_default());
        index.set_wishes(&text("modules.softdep")?.unwrap_or_default());
        index.builtin_text = text("modules.builtin")?.unwrap_or_default();
        index.builtin = index.builtin_text.lines().map(|line| name_of(line.trim())).collect();
        index.order =
            text("modules.order")?.unwrap_or_default().lines().map(|l| l.trim().to_owned()).collect();
        Ok(index)
    }

    fn set_wishes(&mut self, text: &str) {
        for line in text.lines() {
            if let Some((module, wishes)) = parse_wish(line) {
                self.wish_lines.push((module.clone(), line.trim().to_owned()));
                self.wishes.push((module, wishes));
            }
        }
    }

    /// The modules that `name` stands for: a module, or those that have it as an alias.
    #[must_use]
    pub fn find(&self, name: &str) -> Vec<String> {
        let name = normal(name);
        if self.modules.contains_key(&name) {
            return vec![name];
        }
        // modprobe matches patterns here; what modules wish for are plain names, so equality is enough.
        self.aliases.iter().filter(|(alias, _)| normal(alias) == name).map(|(_, m)| m.clone()).collect()
    }
}

/// The modules of modules.dep. A line without a colon is no module and is left out; the first line of a name wins.
#[must_use]
pub fn parse_dep(text: &str) -> BTreeMap<String, Module> {
    let mut modules = BTreeMap::new();
    for line in text.lines() {
        let Some((path, needs)) = line.split_once(':') else { continue };
        let path = path.trim();
        if path.is_empty() || path.starts_with('/') || path.split('/').any(|part| part == "..") {
            continue;
        }
        let needs = needs.split_whitespace().map(name_of).collect();
        modules.entry(name_of(path)).or_insert(Module { path: path.to_owned(), needs });
    }
    modules
}

/// The pairs of modules.alias. A pattern has no spaces, a module name neither.
#[must_use]
pub fn parse_aliases(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| {
            let rest = line.trim().strip_prefix("alias ")?;
            let (pattern, module) = rest.trim().rsplit_once(' ')?;
            Some((pattern.trim().to_owned(), normal(module)))
        })
        .collect()
}

/// A line of modules.softdep: the module and what it wishes for. Words before `pre:` or `post:` count for nothing, as in
/// modprobe.
fn parse_wish(line: &str) -> Option<(String, Vec<String>)> {
    let mut words = line.split_whitespace();
    if words.next() != Some("softdep") {
        return None;
    }
    let module = normal(words.next()?);
    let mut counts = false;
    let mut wishes = Vec::new();
    for word in words {
        match word {
            "pre:" | "post:" => counts = true,
            _ if counts => wishes.push(word.to_owned()),
            _ => {}
        }
    }
    Some((module, wishes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEP: &str = "kernel/fs/ext4/ext4.ko.xz: kernel/fs/mbcache.ko.xz kernel/fs/jbd2/jbd2.ko.xz\n\
                       kernel/fs/mbcache.ko.xz:\nkernel/fs/jbd2/jbd2.ko.xz:\nupdates/a-b.ko: \nnonsense\n/etc/x.ko:\n\
                       ../x.ko:\n";

    #[test]
    fn modules_dep_is_read() {
        let modules = parse_dep(DEP);
        assert_eq!(modules.keys().collect::<Vec<_>>(), ["a_b", "ext4", "jbd2", "mbcache"]);
        assert_eq!(modules["ext4"].needs, ["mbcache", "jbd2"]);
        assert_eq!(modules["ext4"].plain_path(), "kernel/fs/ext4/ext4.ko");
    }

    #[test]
    fn aliases_and_wishes_are_read() {
        let aliases =
            parse_aliases("# c\nalias pci:v*d* virtio-pci\nalias crypto-crc32c crc32c_generic\nalias x\n");
        assert_eq!(aliases[0], ("pci:v*d*".into(), "virtio_pci".into()));
        assert_eq!(aliases.len(), 2);
        let mut index = Index { aliases, modules: parse_dep(DEP), ..Index::default() };
        index.set_wishes("softdep ext4 pre: crypto-crc32c post: a b\nsoftdep cifs gcm\nodd\nsoftdep\n");
        assert_eq!(index.wishes[0], ("ext4".into(), vec!["crypto-crc32c".into(), "a".into(), "b".into()]));
        assert_eq!(index.wishes[1].1, Vec::<String>::new());
        assert_eq!(index.find("crypto-crc32c"), ["crc32c_generic"]);
        assert_eq!(index.find("a-b"), ["a_b"]);
        assert!(index.find("nothing").is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "(?s).{0,400}") {
            let _ = parse_dep(&text);
            let _ = parse_aliases(&text);
            for line in text.lines() {
                let _ = parse_wish(line);
            }
        }

        #[test]
        fn what_depmod_writes_is_read_back(
            modules in prop::collection::btree_map("[a-z][a-z0-9_]{0,8}", prop::collection::vec("[a-z][a-z0-9_]{0,8}", 0..4), 0..20)
        ) {
            let text: String = modules
                .iter()
                .map(|(name, needs)| {
                    let needs: Vec<String> = needs.iter().map(|n| format!(" kernel/d/{n}.ko.zst")).collect();
                    format!("kernel/d/{name}.ko.zst:{}\n", needs.concat())
                })
                .collect();
            let read = parse_dep(&text);
            prop_assert_eq!(read.len(), modules.len());
            for (name, needs) in modules {
                prop_assert_eq!(&read[&name].needs, &needs);
                let path = format!("kernel/d/{name}.ko.zst");
                prop_assert_eq!(&read[&name].path, &path);
            }
        }
    }
}
