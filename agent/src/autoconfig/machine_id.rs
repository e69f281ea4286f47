//! The machine id: a new, valid one. An empty or missing one would make systemd think of a first boot and reset which
//! services are enabled; a shared one gives two machines the same DHCP lease.

use super::{Change, Context, Piece};
use anyhow::Result;

const PATH: &str = "/etc/machine-id";
const DBUS: &str = "/var/lib/dbus/machine-id";

/// The piece.
pub struct MachineId;

/// Whether it is a machine id: 32 hexadecimal digits.
pub fn is_valid(id: &str) -> bool {
    id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Piece for MachineId {
    fn name(&self) -> &'static str {
        "machine-id"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        let old = root.read_text(PATH)?.unwrap_or_default().trim_end().to_owned();
        // systemd makes its ids the same way: a random UUID without hyphens.
        let id = format!("{}\n", uuid::Uuid::new_v4().simple());
        if context.root.link(PATH).is_some() && !root.exists(PATH) {
            // A link to nowhere (a first boot that never ended): a file takes its place.
            root.remove(PATH)?;
        }
        if !root.write(PATH, id.as_bytes(), 0o444)? {
            return Ok(vec![Change::warning("machine-id", PATH, "the golden node's is kept, by policy")]);
        }
        if is_valid(&old) {
            context.machine_ids.replace(Some((old, id.trim_end().to_owned())));
        }
        let mut changes = vec![Change::new("machine-id", PATH, format!("new: {}", id.trim_end()))];
        let linked = root.read(DBUS)?.is_some_and(|text| text == id.as_bytes());
        if !linked && (root.exists(DBUS) || root.link(DBUS).is_some()) {
            if !root.exists(DBUS) {
                root.remove(DBUS)?;
            }
            root.write(DBUS, id.as_bytes(), 0o644)?;
            changes.push(Change::new("machine-id", DBUS, "the same"));
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn valid(id: &str) -> bool {
        id.len() == 33
            && id.ends_with('\n')
            && id[..32].bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    }

    #[test]
    fn a_new_id_is_written_and_the_dbus_link_stays() {
        let lab = Lab::new();
        lab.file(PATH, "0123456789abcdef0123456789abcdef\n");
        std::fs::create_dir_all(lab.target.join("var/lib/dbus")).unwrap();
        symlink("/etc/machine-id", lab.target.join("var/lib/dbus/machine-id")).unwrap();
        assert_eq!(MachineId.apply(&lab.context()).unwrap().len(), 1);
        let id = lab.read(PATH);
        assert!(valid(&id) && !id.starts_with("0123456789abcdef"), "{id}");
        assert!(lab.target.join("var/lib/dbus/machine-id").is_symlink());
        MachineId.apply(&lab.context()).unwrap();
        assert_ne!(lab.read(PATH), id, "every node has its own");
    }

    #[test]
    fn missing_empty_and_copied_ids_are_filled() {
        let lab = Lab::new();
        lab.file("/etc/hostname", "").file(DBUS, "0123456789abcdef0123456789abcdef\n");
        MachineId.apply(&lab.context()).unwrap();
        assert!(valid(&lab.read(PATH)));
        assert_eq!(lab.read(DBUS), lab.read(PATH));
        let mode = std::fs::metadata(lab.target.join("etc/machine-id")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o444);
        lab.file(PATH, "");
        MachineId.apply(&lab.context()).unwrap();
        assert!(valid(&lab.read(PATH)));
    }

    #[test]
    fn links_to_nowhere_become_files() {
        let lab = Lab::new();
        lab.file("/etc/hostname", "");
        symlink("/run/no/such", lab.target.join("etc/machine-id")).unwrap();
        std::fs::create_dir_all(lab.target.join("var/lib/dbus")).unwrap();
        symlink("/no/such", lab.target.join("var/lib/dbus/machine-id")).unwrap();
        MachineId.apply(&lab.context()).unwrap();
        assert!(valid(&lab.read(PATH)));
        assert_eq!(lab.read(DBUS), lab.read(PATH));
    }
}
