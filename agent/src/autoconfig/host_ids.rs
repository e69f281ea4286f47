//! Identifiers by which storage knows a machine: the host id of ZFS and of old programs, the NVMe-over-Fabrics host
//! name, the iSCSI initiator name. Where the golden node has one, the clone gets its own.

use super::{Change, Context, Piece};
use anyhow::Result;
use uuid::Uuid;

const HOSTID: &str = "/etc/hostid";
const NQN: &str = "/etc/nvme/hostnqn";
const NVME_ID: &str = "/etc/nvme/hostid";
const ISCSI: &str = "/etc/iscsi/initiatorname.iscsi";

/// The piece.
pub struct HostIds;

impl Piece for HostIds {
    fn name(&self) -> &'static str {
        "host-ids"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        let mut changes = Vec::new();
        let mut new = |path: &str, what: String| changes.push(Change::new("host-ids", path, what));
        if root.read(HOSTID)?.is_some_and(|id| id.len() == 4) {
            // The last bytes of a random UUID are all random. Zero means "none".
            let mut id = Uuid::new_v4().as_bytes()[12..].to_vec();
            id[0] |= 1;
            if root.write(HOSTID, &id, 0o644)? {
                new(HOSTID, "new".into());
            }
        }
        // The two belong together: the name holds the id.
        let id = Uuid::new_v4();
        if root.exists(NQN) {
            let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:{id}");
            if root.write_text(NQN, &format!("{nqn}\n"), 0o644)? {
                new(NQN, format!("new: {nqn}"));
            }
        }
        if root.exists(NVME_ID) && root.write_text(NVME_ID, &format!("{id}\n"), 0o644)? {
            new(NVME_ID, format!("new: {id}"));
        }
        if let Some(text) = root.read_text(ISCSI)? {
            let random = &Uuid::new_v4().simple().to_string()[20..];
            let lines: Vec<String> = text.lines().map(|l| new_initiator(l, random)).collect();
            if root.write_text(ISCSI, &(lines.join("\n") + "\n"), 0o600)? {
                new(ISCSI, "new initiator name".into());
            }
        }
        Ok(changes)
    }
}

/// Keeps the naming authority of an initiator name (`iqn.1993-08.org.debian:01:`) and replaces what follows it.
fn new_initiator(line: &str, random: &str) -> String {
    let name = line.strip_prefix("InitiatorName=").map(str::trim);
    match name.and_then(|n| n.rsplit_once(':')) {
        Some((authority, _)) => format!("InitiatorName={authority}:{random}"),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn ids_that_are_there_become_new() {
        let lab = Lab::new();
        lab.file(HOSTID, "abcd")
            .file(NQN, "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-000000000001\n")
            .file(NVME_ID, "00000000-0000-0000-0000-000000000001\n")
            .file(ISCSI, "## DO NOT EDIT\nInitiatorName=iqn.1993-08.org.debian:01:1234567890ab\n");
        assert_eq!(HostIds.apply(&lab.context()).unwrap().len(), 4);
        let id = lab.read(NVME_ID);
        assert_eq!(id.len(), 37);
        assert!(lab.read(NQN).ends_with(&id) && !id.starts_with("00000000"));
        let name = lab.read(ISCSI);
        let new = name.strip_prefix("## DO NOT EDIT\nInitiatorName=iqn.1993-08.org.debian:01:").unwrap();
        assert!(new.len() == 13 && new != "1234567890ab\n", "{new}");
        let hostid = std::fs::read(lab.target.join("etc/hostid")).unwrap();
        assert!(hostid.len() == 4 && hostid != b"abcd");
    }

    #[test]
    fn none_is_made_where_none_was() {
        let lab = Lab::new();
        lab.file("/etc/hostname", "x");
        assert!(HostIds.apply(&lab.context()).unwrap().is_empty());
        assert!(!lab.exists(HOSTID) && !lab.exists(NQN));
    }
}
