//! What the golden machine remembers of itself and no other machine may inherit: DHCP leases and their identifiers,
//! interface names tied to its MAC addresses, random seeds, LVM's and udev's memory of its disks. All of it is deleted;
//! the system makes it anew.

use super::{Change, Context, Piece};
use anyhow::Result;

/// Single files that go.
const FILES: &[&str] = &[
    "/etc/udev/rules.d/70-persistent-net.rules",
    "/etc/udev/rules.d/70-persistent-cd.rules",
    "/var/lib/systemd/random-seed",
    "/var/lib/urandom/random-seed",
    "/var/lib/systemd/credential.secret",
    "/boot/efi/loader/random-seed",
    "/efi/loader/random-seed",
    "/boot/loader/random-seed",
    "/var/lib/NetworkManager/secret_key",
    "/var/lib/NetworkManager/timestamps",
    "/var/lib/NetworkManager/seen-bssids",
    "/var/lib/dhcpcd/duid",
    "/var/lib/dhcpcd/secret",
    "/etc/dhcpcd.duid",
    "/etc/dhcpcd.secret",
    "/etc/lvm/devices/system.devices",
    "/etc/multipath/wwids",
    "/etc/multipath/bindings",
    "/etc/zfs/zpool.cache",
    "/etc/blkid.tab",
    "/etc/blkid/blkid.tab",
    "/var/cache/blkid.tab",
    "/var/lib/wicked/duid.xml",
    "/var/lib/wicked/iaid.xml",
];

/// Directories whose files go: directory, prefix, suffix.
const SETS: &[(&str, &str, &str)] = &[
    ("/var/lib/dhcp", "", ".leases"),
    ("/var/lib/dhcp", "", ".leases~"),
    ("/var/lib/dhclient", "", ".leases"),
    ("/var/lib/dhcpcd", "", ".lease"),
    ("/var/lib/dhcpcd", "", ".lease6"),
    ("/var/lib/NetworkManager", "", ".lease"),
    ("/var/lib/NetworkManager", "dhclient-", ".conf"),
    ("/var/lib/systemd/network", "", ""),
    ("/etc/lvm/archive", "", ".vg"),
    ("/etc/lvm/backup", "", ""),
    ("/etc/lvm/cache", "", ""),
    ("/var/lib/wicked", "lease-", ".xml"),
    // smartd's memory of the golden node's disks, by their serial numbers.
    ("/var/lib/smartmontools", "smartd.", ".state"),
    ("/var/lib/smartmontools", "attrlog.", ".csv"),
    // The initramfs of the crash kernel is made for the host; its service makes it anew.
    ("/boot", "initramfs-", "kdump.img"),
    ("/boot", "initrd-", "-kdump"),
    ("/var/lib/kdump", "initramfs-", "kdump.img"),
];

/// The piece.
pub struct Leftovers;

impl Piece for Leftovers {
    fn name(&self) -> &'static str {
        "leftovers"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        let mut changes = Vec::new();
        let mut gone = |path: &str, what: &str| changes.push(Change::new("leftovers", path, what));
        for path in FILES {
            if root.remove(path)? {
                gone(path, "deleted");
            }
        }
        for (dir, prefix, suffix) in SETS {
            for path in root.matching(dir, prefix, suffix)? {
                if root.remove(&path)? {
                    gone(&path.to_string_lossy(), "deleted");
                }
            }
        }
        for path in root.matching("/etc/systemd/network", "", ".link")? {
            let text = root.read_text(&path).unwrap_or_default().unwrap_or_default();
            if names_a_mac(&text) && root.remove(&path)? {
                gone(
                    &path.to_string_lossy(),
                    "deleted: it names an interface of the golden node by its MAC address",
                );
            }
        }
        Ok(changes)
    }
}

/// Whether a `.link` file applies to interfaces of given MAC addresses.
fn names_a_mac(text: &str) -> bool {
    let mut in_match = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            in_match = line == "[Match]";
        }
        let key = line.split('=').next().unwrap_or_default().trim();
        if in_match && (key == "MACAddress" || key == "PermanentMACAddress") {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn memories_go_and_configuration_stays() {
        let lab = Lab::new();
        let go = [
            "/etc/udev/rules.d/70-persistent-net.rules",
            "/var/lib/systemd/random-seed",
            "/boot/efi/loader/random-seed",
            "/var/lib/dhcp/dhclient.eth0.leases",
            "/var/lib/NetworkManager/internal-x-eth0.lease",
            "/var/lib/systemd/network/lease",
            "/etc/lvm/archive/vg_00001-1.vg",
            "/etc/lvm/devices/system.devices",
            "/var/lib/wicked/lease-eth0-dhcp-ipv4.xml",
            "/var/lib/wicked/duid.xml",
            "/var/lib/dhcpcd/duid",
            "/var/lib/smartmontools/smartd.SAMSUNG-S1.ata.state",
            "/boot/initramfs-5.14.0-362.el9.x86_64kdump.img",
            "/boot/initrd-6.4.0-default-kdump",
            "/etc/multipath/bindings",
            "/etc/zfs/zpool.cache",
        ];
        let stay = [
            "/etc/udev/rules.d/99-mine.rules",
            "/etc/lvm/lvm.conf",
            "/var/lib/NetworkManager/NetworkManager.state",
            "/var/log/journal/x/system.journal",
            "/boot/initramfs-5.14.0-362.el9.x86_64.img",
            "/var/lib/wicked/nanny.xml",
        ];
        for path in go.iter().chain(&stay) {
            lab.file(path, "x");
        }
        lab.file(
            "/etc/systemd/network/10-lan.link",
            "[Match]\nMACAddress=52:54:00:00:00:01\n[Link]\nName=lan0\n",
        );
        lab.file(
            "/etc/systemd/network/99-wol.link",
            "[Match]\nDriver=e1000\n[Link]\nMACAddress=1:2:3:4:5:6\n",
        );
        let changes = Leftovers.apply(&lab.context()).unwrap();
        assert_eq!(changes.len(), go.len() + 1, "{changes:?}");
        assert!(go.iter().all(|p| !lab.exists(p)));
        assert!(stay.iter().all(|p| lab.exists(p)));
        assert!(
            !lab.exists("/etc/systemd/network/10-lan.link") && lab.exists("/etc/systemd/network/99-wol.link")
        );
        assert!(lab.target.join("var/lib/dhcp").is_dir());
    }
}
