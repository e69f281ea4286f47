//! Firmware: files that the chosen modules name and that are installed, smallest first until the budget is spent, so that
//! one huge file does not push out twenty small ones. What is left out is listed.

use crate::root::Root;
use crate::tree::{Content, Part, Tree};
use crate::{Error, unpack};
use std::collections::BTreeSet;
use std::fs;

/// Where the kernel looks, in its order; `{}` is the kernel's version.
const PLACES: [&str; 4] =
    ["/lib/firmware/updates/{}", "/lib/firmware/updates", "/lib/firmware/{}", "/lib/firmware"];
/// How they may be packed.
const ENDINGS: [&str; 3] = ["", ".xz", ".zst"];

/// What became of the firmware that modules name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firmware {
    /// In the image.
    pub taken: Vec<String>,
    /// Installed, but over the budget.
    pub left_out: Vec<String>,
    /// Named by a module, but not installed.
    pub missing: Vec<String>,
}

/// Puts the firmware files `names` into `tree`, at most `budget` bytes of them.
///
/// # Errors
/// When one cannot be read or unpacked.
pub fn place(
    tree: &mut Tree,
    root: &Root,
    version: &str,
    names: &BTreeSet<String>,
    budget: u64,
) -> Result<Firmware, Error> {
    let mut found = Vec::new();
    let mut result = Firmware::default();
    for name in names {
        if name.split('/').any(|part| part == "..") {
            return Err(Error::bad(name, "a module names this as its firmware"));
        }
        let path = PLACES.iter().find_map(|place| {
            let place = place.replace("{}", version);
            ENDINGS.iter().find_map(|ending| root.file(&format!("{place}/{name}{ending}")))
        });
        let Some(path) = path else {
            result.missing.push(name.clone());
            continue;
        };
        let content = if unpack::plain_name(&path.to_string_lossy()).1 {
            let bytes = fs::read(&path).map_err(Error::io("reading firmware", &path))?;
            Content::Bytes(unpack::unpack(&path, &bytes)?)
        } else {
            Content::of_file(&path)?
        };
        found.push((content.size(), name.clone(), content));
    }
    found.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
    let mut used = 0;
    for (size, name, content) in found {
        if used + size > budget {
            result.left_out.push(name);
            continue;
        }
        used += size;
        tree.file(&format!("/lib/firmware/{name}"), 0o644, content, Part::Firmware)?;
        result.taken.push(name);
    }
    result.taken.sort();
    result.left_out.sort();
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ones_first_packed_ones_unpacked_and_the_rest_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        let fw = dir.path().join("lib/firmware");
        fs::create_dir_all(fw.join("sub")).unwrap();
        fs::create_dir_all(fw.join("updates/6.1")).unwrap();
        fs::write(fw.join("big.bin"), vec![0; 1000]).unwrap();
        fs::write(fw.join("sub/small.bin"), "small").unwrap();
        fs::write(fw.join("updates/6.1/small2.bin"), "s2").unwrap();
        fs::write(fw.join("packed.bin.zst"), zstd::encode_all(&b"plain"[..], 1).unwrap()).unwrap();
        let names = ["big.bin", "sub/small.bin", "small2.bin", "packed.bin", "absent.bin"];
        let names = names.iter().map(|n| (*n).to_owned()).collect();
        let mut tree = Tree::new();
        let got = place(&mut tree, &Root::new(dir.path()), "6.1", &names, 100).unwrap();
        assert_eq!(got.taken, ["packed.bin", "small2.bin", "sub/small.bin"]);
        assert_eq!(got.left_out, ["big.bin"]);
        assert_eq!(got.missing, ["absent.bin"]);
        let packed = tree.get("/lib/firmware/packed.bin").unwrap();
        assert_eq!(packed.node, crate::tree::Node::File(Content::Bytes(b"plain".to_vec())));
        assert!(place(&mut tree, &Root::new(dir.path()), "6.1", &["../x".to_owned()].into(), 100).is_err());
    }
}
