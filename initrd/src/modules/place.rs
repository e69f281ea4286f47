//! Putting the chosen modules into the image: uncompressed under their usual paths, with modules.dep, modules.alias,
//! modules.softdep, modules.builtin and modules.order trimmed to what is there.

use super::choose::Chosen;
use super::index::{Index, Module, name_of};
use crate::elf;
use crate::root::Root;
use crate::tree::{Content, Part, Tree};
use crate::{Error, unpack};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;

/// Puts the modules and their lists into `tree`; returns the firmware files that they name.
///
/// # Errors
/// When a module cannot be read or unpacked, or is no ELF file.
pub fn place(
    tree: &mut Tree,
    root: &Root,
    version: &str,
    index: &Index,
    chosen: &Chosen,
) -> Result<BTreeSet<String>, Error> {
    let dir = format!("/lib/modules/{version}");
    let mut firmware = BTreeSet::new();
    for (name, part) in &chosen.modules {
        let Some(module) = index.modules.get(name) else { continue };
        let inside = format!("{dir}/{}", module.path);
        let path =
            root.resolve(&inside).map_err(Error::io("reading module", root.path().join(&inside[1..])))?;
        let bytes = fs::read(&path).map_err(Error::io("reading module", &path))?;
        let packed = unpack::plain_name(&module.path).1;
        let bytes = if packed { unpack::unpack(&path, &bytes)? } else { bytes };
        let info = elf::modinfo(&bytes).map_err(|e| Error::bad(&path, e.to_string()))?;
        firmware.extend(info.into_iter().filter(|(key, _)| key == "firmware").map(|(_, value)| value));
        // A plain module is read again when the archive is written, rather than held in memory until then.
        let content = if packed { Content::Bytes(bytes) } else { Content::of_file(&path)? };
        tree.file(&format!("{dir}/{}", module.plain_path()), 0o644, content, *part)?;
    }
    for (file, text) in lists(index, chosen) {
        tree.text(&format!("{dir}/{file}"), &text, Part::ModuleLists)?;
    }
    Ok(firmware)
}

/// The trimmed lists: file name and content.
fn lists(index: &Index, chosen: &Chosen) -> Vec<(&'static str, String)> {
    let has = |name: &str| chosen.modules.contains_key(name);
    let mut dep = String::new();
    for (name, module) in index.modules.iter().filter(|(name, _)| has(name)) {
        let needs: Vec<&str> =
            module.needs.iter().filter_map(|n| index.modules.get(n)).map(Module::plain_path).collect();
        debug_assert!(module.needs.iter().all(|n| has(n)), "{name} without what it needs");
        let space = if needs.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = writeln!(dep, "{}:{space}{}", module.plain_path(), needs.join(" "));
    }
    let aliases = index.aliases.iter().filter(|(_, module)| has(module));
    let aliases: String = aliases.map(|(pattern, module)| format!("alias {pattern} {module}\n")).collect();
    let wishes = index.wish_lines.iter().filter(|(module, _)| has(module));
    let wishes: String = wishes.map(|(_, line)| format!("{line}\n")).collect();
    let order = index.order.iter().filter(|path| has(&name_of(path)));
    let order: String = order.map(|path| format!("{}\n", unpack::plain_name(path).0)).collect();
    let builtin = index.builtin_text.clone();
    vec![
        ("modules.dep", dep),
        ("modules.alias", aliases),
        ("modules.softdep", wishes),
        ("modules.builtin", builtin),
        ("modules.order", order),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::index::{parse_aliases, parse_dep};
    use super::*;
    use crate::modules::choose::{Choice, choose};

    #[test]
    fn lists_name_what_is_there_and_nothing_else() {
        let index = Index {
            modules: parse_dep(
                "kernel/a.ko.xz: kernel/c.ko.xz kernel/b.ko.xz\nkernel/b.ko.xz:\nkernel/c.ko.xz: kernel/b.ko.xz\nkernel/d.ko.xz:\n",
            ),
            aliases: parse_aliases("alias pci:1 a\nalias pci:2 d\n"),
            wish_lines: vec![
                ("a".into(), "softdep a pre: c".into()),
                ("d".into(), "softdep d pre: a".into()),
            ],
            builtin_text: "kernel/e.ko\n".into(),
            order: vec!["kernel/d.ko".into(), "kernel/c.ko.xz".into()],
            ..Index::default()
        };
        let chosen = choose(&index, &Choice::parse("a").unwrap()).unwrap();
        let lists: std::collections::BTreeMap<_, _> = lists(&index, &chosen).into_iter().collect();
        assert_eq!(
            lists["modules.dep"],
            "kernel/a.ko: kernel/c.ko kernel/b.ko\nkernel/b.ko:\nkernel/c.ko: kernel/b.ko\n"
        );
        assert_eq!(lists["modules.alias"], "alias pci:1 a\n");
        assert_eq!(lists["modules.softdep"], "softdep a pre: c\n");
        assert_eq!(lists["modules.builtin"], "kernel/e.ko\n");
        assert_eq!(lists["modules.order"], "kernel/c.ko\n");
    }
}
