//! The UUIDs of NetworkManager's connections, in keyfiles and in `ifcfg` files: each clone gets its own, the same one
//! wherever connections refer to each other. Keyfiles keep their mode 0600, without which NetworkManager ignores them.

use super::{Change, Context, Piece, ifcfg};
use anyhow::Result;
use std::collections::BTreeMap;
use uuid::Uuid;

const KEYFILES: &str = "/etc/NetworkManager/system-connections";

/// The piece.
pub struct Connections;

impl Piece for Connections {
    fn name(&self) -> &'static str {
        "connections"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        let mut paths = root.matching(KEYFILES, "", "")?;
        for dir in ifcfg::DIRS {
            paths.extend(root.matching(dir, "ifcfg-", "")?);
        }
        let mut files = Vec::new();
        let mut new = BTreeMap::new();
        for path in paths {
            // A directory, or a link to /dev/null, is no connection.
            let Ok(Some(text)) = root.read_text(&path) else { continue };
            for id in text.lines().filter_map(own_id) {
                new.entry(id.to_owned()).or_insert_with(|| Uuid::new_v4().to_string());
            }
            files.push((path, text));
        }
        let mut changes = Vec::new();
        for (path, text) in files {
            let renewed = new.iter().fold(text, |text, (old, new)| text.replace(old, new));
            if root.write_text(&path, &renewed, 0o600)? {
                changes.push(Change::new("connections", path.to_string_lossy(), "new UUID"));
            }
        }
        Ok(changes)
    }
}

/// The UUID that a line gives its connection.
fn own_id(line: &str) -> Option<&str> {
    let id = ifcfg::value(line, "uuid").or_else(|| ifcfg::value(line, "UUID"))?;
    Uuid::parse_str(id).ok().map(|_| id)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const BOND: &str = "0f0f0f0f-1111-4222-8333-444444444444";

    #[test]
    fn every_connection_gets_its_own_uuid_and_stays_readable_by_root_only() {
        let lab = Lab::new();
        let bond = format!("{KEYFILES}/bond0.nmconnection");
        let port = format!("{KEYFILES}/port.nmconnection");
        lab.file(&bond, &format!("[connection]\nid=bond0\nuuid={BOND}\ntype=bond\ninterface-name=bond0\n"));
        lab.file(&port, &format!("[connection]\nid=port\nuuid=aaaaaaaa-1111-4222-8333-444444444444\ntype=ethernet\ncontroller={BOND}\nport-type=bond\n"));
        lab.file(
            "/etc/sysconfig/network-scripts/ifcfg-eth0",
            "TYPE=Ethernet\nUUID=\"bbbbbbbb-1111-4222-8333-444444444444\"\nDEVICE=eth0\n",
        );
        for path in [&bond, &port] {
            let path = lab.target.join(path.trim_start_matches('/'));
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        assert_eq!(Connections.apply(&lab.context()).unwrap().len(), 3);
        let text = lab.read(&bond);
        let id = text.lines().find_map(own_id).unwrap().to_owned();
        assert_ne!(id, BOND);
        assert!(lab.read(&port).contains(&format!("controller={id}\n")), "references follow");
        assert!(!lab.read("/etc/sysconfig/network-scripts/ifcfg-eth0").contains("bbbbbbbb"));
        let mode = lab.target.join(bond.trim_start_matches('/')).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn what_is_no_uuid_stays() {
        let lab = Lab::new();
        lab.file("/etc/sysconfig/network-scripts/ifcfg-lo", "DEVICE=lo\nUUID=none\n");
        assert!(Connections.apply(&lab.context()).unwrap().is_empty());
    }
}
