//! The `ifcfg` files of RHEL's network scripts (up to 8, and NetworkManager's older form) and of SUSE's wicked, and Arch's
//! netctl profiles. wicked and the scripts know an interface by the name of its file, so files are renamed with it.

use super::root::Root;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Where RHEL and SUSE keep them.
pub const DIRS: &[&str] = &["/etc/sysconfig/network-scripts", "/etc/sysconfig/network"];
/// Arch's.
pub const NETCTL: &str = "/etc/netctl";
/// What names of files that belong to one interface begin with.
const PREFIXES: &[&str] = &["ifcfg-", "route-", "route6-", "rule-", "rule6-", "ifroute-", "ifrule-", "keys-"];

/// The interface that the name of a file stands for: `ifcfg-eth0`, `ifroute-eth0.5`.
pub fn interface_of(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix))
}

/// The value of a line `KEY=value` of a shell file, unquoted.
pub fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let rest = line.trim().strip_prefix(key)?.strip_prefix('=')?;
    Some(rest.trim().trim_matches(['"', '\'']))
}

/// Renames the files of the interface `old`, and of its VLANs and aliases; what was renamed comes back.
///
/// # Errors
/// When a directory cannot be listed, or a file cannot be renamed.
pub fn rename_files(root: &Root, old: &str, new: &str) -> Result<Vec<(PathBuf, String)>> {
    let mut renamed = Vec::new();
    for dir in DIRS {
        for path in root.matching(dir, "", "")? {
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            let Some(interface) = interface_of(&path) else { continue };
            let rest = interface.strip_prefix(old).filter(|r| r.is_empty() || r.starts_with(['.', ':']));
            let Some(rest) = rest else { continue };
            let prefix = &name[..name.len() - interface.len()];
            let to = format!("{prefix}{new}{rest}");
            if root.rename(&path, &to)? {
                renamed.push((path, to));
            }
        }
    }
    Ok(renamed)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn files_are_renamed_with_their_interface() {
        let lab = Lab::new();
        for name in ["ifcfg-eth0", "ifroute-eth0", "ifcfg-eth0.5", "ifcfg-eth01", "ifcfg-lo", "config"] {
            lab.file(&format!("/etc/sysconfig/network/{name}"), name);
        }
        assert_eq!(rename_files(&lab.context().root, "eth0", "ens3").unwrap().len(), 3);
        for (name, was) in
            [("ifcfg-ens3", "ifcfg-eth0"), ("ifroute-ens3", "ifroute-eth0"), ("ifcfg-ens3.5", "ifcfg-eth0.5")]
        {
            assert_eq!(lab.read(&format!("/etc/sysconfig/network/{name}")), was);
        }
        assert!(
            lab.exists("/etc/sysconfig/network/ifcfg-eth01") && lab.exists("/etc/sysconfig/network/ifcfg-lo")
        );
    }

    #[test]
    fn values_are_read_with_and_without_quotes() {
        assert_eq!(value("HWADDR=\"52:54:00:00:00:01\"", "HWADDR"), Some("52:54:00:00:00:01"));
        assert_eq!(value("DEVICE=eth0", "DEVICE"), Some("eth0"));
        assert_eq!(value("DEVICES=eth0", "DEVICE"), None);
    }
}
