//! What the kernel's modules are called, which devices they drive, what they need and how they are to be loaded: the
//! files that depmod writes (`modules.dep`, `modules.alias`, `modules.softdep`, `modules.builtin`) and `/etc/modprobe.d`.
//! Pure text processing; nothing is loaded here.

use super::alias;
use std::collections::{HashMap, HashSet};

/// The index of one kernel's modules.
#[derive(Debug, Default)]
pub struct Index {
    /// Module name to its file (relative to the modules' directory) and the files that it needs.
    modules: HashMap<String, Module>,
    builtin: HashSet<String>,
    /// Aliases by what stands before their first `:`, as patterns with their module; those whose beginning is itself a
    /// pattern stand under the empty word.
    aliases: HashMap<String, Vec<(String, String)>>,
    soft: HashMap<String, Soft>,
    options: HashMap<String, Vec<String>>,
    blacklist: HashSet<String>,
    forbidden: HashSet<String>,
}

#[derive(Debug, Default)]
struct Module {
    path: String,
    needs: Vec<String>,
}

#[derive(Debug, Default)]
struct Soft {
    before: Vec<String>,
    after: Vec<String>,
}

/// A module that is to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    /// Its name.
    pub name: String,
    /// Its file, relative to the modules' directory.
    pub path: String,
    /// Its options.
    pub options: String,
    /// Whether others do without it (a soft dependency): its failure is no failure of what comes after.
    pub optional: bool,
}

/// A name as the kernel shows it: `_` for `-`.
#[must_use]
pub fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The module's name of a file `kernel/drivers/ata/ahci.ko` (also with `.xz`, `.zst`, `.gz`).
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split_once(".ko").map_or(file, |(stem, _)| stem))
}

impl Index {
    /// Reads `modules.dep`.
    pub fn add_dep(&mut self, text: &str) {
        for line in lines(text) {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let needs = needs.split_whitespace().map(name_of).collect();
            self.modules.insert(name_of(path), Module { path: path.trim().to_owned(), needs });
        }
    }

    /// Reads `modules.builtin`.
    pub fn add_builtin(&mut self, text: &str) {
        self.builtin.extend(lines(text).map(name_of));
    }

    /// Reads `modules.alias`, `modules.softdep` or a file of `/etc/modprobe.d`: they share one syntax.
    pub fn add_config(&mut self, text: &str) {
        // A backslash at the end of a line goes on with the next.
        for line in lines(&text.replace("\\\n", " ")) {
            let mut words = line.split_whitespace();
            let (Some(command), Some(name)) = (words.next(), words.next()) else { continue };
            match command {
                "alias" => {
                    let Some(module) = words.next() else { continue };
                    self.aliases
                        .entry(bucket(name).to_owned())
                        .or_default()
                        .push((name.to_owned(), normal(module)));
                }
                "options" => {
                    self.options.entry(normal(name)).or_default().extend(words.map(ToOwned::to_owned));
                }
                "blacklist" => {
                    self.blacklist.insert(normal(name));
                }
                // The usual way to say "never": `install NAME /bin/true`. Other programs are not run here.
                "install" if words.next().is_some_and(|w| w.ends_with("/true") || w.ends_with("/false")) => {
                    self.forbidden.insert(normal(name));
                }
                "softdep" => {
                    let soft = self.soft.entry(normal(name)).or_default();
                    let mut list = None;
                    for word in words {
                        match word {
                            "pre:" => list = Some(true),
                            "post:" => list = Some(false),
                            module => match list {
                                Some(true) => soft.before.push(normal(module)),
                                Some(false) => soft.after.push(normal(module)),
                                None => {}
                            },
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// The names of the modules that drive a device with this `modalias`, without the blacklisted ones.
    #[must_use]
    pub fn for_alias(&self, modalias: &str) -> Vec<&str> {
        let mut found = Vec::new();
        let near = self.aliases.get(bucket(modalias)).into_iter().flatten();
        // A pattern such as `acpi*:` stands under the empty word.
        let wide = if bucket(modalias).is_empty() { None } else { self.aliases.get("") };
        for (pattern, module) in near.chain(wide.into_iter().flatten()) {
            if !self.blacklist.contains(module)
                && !found.contains(&module.as_str())
                && alias::matches(pattern, modalias)
            {
                found.push(module.as_str());
            }
        }
        found
    }

    /// What to load, in order, to have the module `name` (a module's name or an alias such as `fs-ext4`): what it needs
    /// first. Empty when it is built in. None when there is no such module.
    #[must_use]
    pub fn plan(&self, name: &str) -> Option<Vec<Load>> {
        let wanted = normal(name);
        let mut loads = Vec::new();
        let mut seen = HashSet::new();
        if self.builtin.contains(&wanted) {
            return Some(loads);
        }
        if self.modules.contains_key(&wanted) {
            self.visit(&wanted, false, &mut seen, &mut loads);
            return Some(loads);
        }
        let by_alias = self.for_alias(name);
        for module in &by_alias {
            self.visit(module, false, &mut seen, &mut loads);
        }
        (!by_alias.is_empty()).then_some(loads)
    }

    /// Depth first; the set of those seen ends cycles, which soft dependencies may have.
    fn visit(&self, name: &str, optional: bool, seen: &mut HashSet<String>, loads: &mut Vec<Load>) {
        if self.builtin.contains(name) || self.forbidden.contains(name) || !seen.insert(name.to_owned()) {
            return;
        }
        let Some(module) = self.modules.get(name) else {
            // A soft dependency may be an alias (`crypto-crc32c`); one that is not there is not needed.
            if optional {
                for module in self.for_alias(name) {
                    self.visit(module, true, seen, loads);
                }
            }
            return;
        };
        let soft = self.soft.get(name);
        for before in soft.iter().flat_map(|s| &s.before) {
            self.visit(before, true, seen, loads);
        }
        // depmod lists what is needed with the deepest need last.
        for need in module.needs.iter().rev() {
            self.visit(need, optional, seen, loads);
        }
        loads.push(Load {
            name: name.to_owned(),
            path: module.path.clone(),
            options: self.options.get(name).map(|o| o.join(" ")).unwrap_or_default(),
            optional,
        });
        for after in soft.iter().flat_map(|s| &s.after) {
            self.visit(after, true, seen, loads);
        }
    }

    /// How many modules it knows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// Whether it knows none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Under which word an alias or pattern is kept.
fn bucket(alias: &str) -> &str {
    match alias.split_once(':') {
        Some((bus, _)) if !bus.contains(['*', '?', '[', '-', '_']) => bus,
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index() -> Index {
        let mut index = Index::default();
        index.add_dep(
            "kernel/drivers/ata/ahci.ko: kernel/drivers/ata/libahci.ko kernel/drivers/ata/libata.ko kernel/drivers/scsi/scsi_mod.ko\n\
             kernel/drivers/ata/libahci.ko: kernel/drivers/ata/libata.ko kernel/drivers/scsi/scsi_mod.ko\n\
             kernel/drivers/ata/libata.ko: kernel/drivers/scsi/scsi_mod.ko\n\
             kernel/drivers/scsi/scsi_mod.ko:\n\
             kernel/lib/libcrc32c.ko.xz:\nkernel/crypto/crc32c_generic.ko:\n\
             kernel/fs/xfs/xfs.ko: kernel/lib/libcrc32c.ko\nkernel/drivers/net/e1000.ko:\nkernel/bad.ko:\n",
        );
        index.add_builtin("kernel/net/packet/af_packet.ko\n");
        index.add_config(
            "# Aliases extracted from modules themselves.\nalias pci:v*d*sv*sd*bc01sc06i01* ahci\n\
             alias pci:v00008086d0000100Esv*sd*bc*sc*i* e1000\nalias pci:v00008086d* bad\nalias fs-xfs xfs\n\
             alias crypto-crc32c crc32c_generic\nalias acpi*:PNP01:* e1000\n",
        );
        index.add_config("softdep libcrc32c pre: crypto-crc32c nothing post: libcrc32c\n");
        index.add_config(
            "options e1000 debug=16 \\\n  InterruptThrottleRate=1\nblacklist bad\noptions e1000 copybreak=0",
        );
        index
    }

    fn names(loads: &[Load]) -> Vec<&str> {
        loads.iter().map(|l| l.name.as_str()).collect()
    }

    #[test]
    fn needs_come_first_once_each() {
        let plan = index().plan("ahci").unwrap();
        assert_eq!(names(&plan), ["scsi_mod", "libata", "libahci", "ahci"]);
        assert_eq!(plan[3].path, "kernel/drivers/ata/ahci.ko");
    }

    #[test]
    fn soft_dependencies_are_resolved_by_alias_and_optional() {
        let plan = index().plan("fs-xfs").unwrap();
        assert_eq!(names(&plan), ["crc32c_generic", "libcrc32c", "xfs"]);
        assert_eq!(plan.iter().map(|l| l.optional).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!(plan[1].path, "kernel/lib/libcrc32c.ko.xz");
    }

    #[test]
    fn devices_find_their_modules_but_not_blacklisted_ones() {
        let index = index();
        assert_eq!(index.for_alias("pci:v00008086d0000100Esv1sd2bc02sc00i00"), ["e1000"]);
        assert_eq!(index.for_alias("pci:v00008086d00002922sv1sd2bc01sc06i01"), ["ahci"]);
        assert_eq!(index.for_alias("acpi:PNP00:PNP01:"), ["e1000"]);
        assert!(index.for_alias("usb:v1").is_empty());
        // Blacklisting forbids only what comes by alias.
        assert_eq!(names(&index.plan("bad").unwrap()), ["bad"]);
    }

    #[test]
    fn options_add_up_and_builtins_need_nothing() {
        let index = index();
        assert_eq!(index.plan("e1000").unwrap()[0].options, "debug=16 InterruptThrottleRate=1 copybreak=0");
        assert_eq!(index.plan("af-packet"), Some(vec![]));
        assert_eq!(index.plan("nonsense"), None);
    }

    #[test]
    fn never_means_never() {
        let mut index = index();
        index.add_config("install e1000 /bin/false\n");
        assert_eq!(index.plan("e1000"), Some(vec![]));
    }

    proptest! {
        #[test]
        fn no_text_panics_and_every_plan_has_each_module_once(
            dep in "([a-d]\\.ko:( [a-d]\\.ko){0,3}\n){0,6}",
            config in "((softdep [a-d] pre: [a-e] post: [a-e]|alias [a-e] [a-d]|options [a-d] x|.{0,9})\n){0,8}",
        ) {
            let mut index = Index::default();
            index.add_dep(&dep);
            index.add_config(&config);
            index.add_builtin(&config);
            for name in ["a", "b", "c", "d", "e"] {
                let plan = index.plan(name).unwrap_or_default();
                let distinct: HashSet<_> = plan.iter().map(|l| &l.name).collect();
                prop_assert_eq!(distinct.len(), plan.len());
            }
        }
    }
}
