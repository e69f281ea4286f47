//! In what a clone must differ from its golden tree: what `docs/autoconfig.md` lists, piece by piece, without the pieces that
//! this deployment leaves out. It goes into the manifest, so that whoever compares needs nothing else.

use ka_archive::Expected;
use ka_layout::model::Layout;
use ka_layout::order::{Policy, SshKeys};

/// Piece, what it may do, to which paths, why: every path of the table of the step `configure` in `docs/autoconfig.md`, as a
/// test sees to, and the boot loader.
const PIECES: &[(&str, &str, &str, &str)] = &[
    ("fstab", "content", "/etc/fstab", "its own disks"),
    ("crypttab", "content", "/etc/crypttab{,.initramfs}", "its own disks"),
    ("storage", "content,extra", "/etc/crypttab", "its own containers"),
    ("storage", "content,extra", "/etc/crypttab.initramfs", "its own containers"),
    ("storage", "content,extra", "/etc/{mdadm/mdadm.conf,mdadm.conf}", "its own arrays"),
    ("storage", "all", "/etc/dracut.conf.d/ka-storage.conf", "what its root lies on"),
    ("hostname", "content,extra", "/etc/{hostname,hosts}", "its own name"),
    ("hostname", "content", "/etc/{mailname,postfix/main.cf,machine-info}", "its own name"),
    ("hostname", "content", "/etc/{HOSTNAME,sysconfig/network}", "its own name"),
    ("machine-id", "content,extra", "/etc/machine-id", "its own id"),
    ("machine-id", "content,extra", "/var/lib/dbus/machine-id", "its own id"),
    ("ssh-keys", "all", "/etc/ssh/ssh_host_*_key{,.pub}", "its own keys"),
    ("leftovers", "missing", "/etc/udev/rules.d/70-persistent-{net,cd}.rules", "golden leftovers"),
    ("leftovers", "missing", "/etc/systemd/network/*.link", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/dhcp/*.leases{,~}", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/dhclient/*.leases", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/dhcpcd/{duid,secret,*.lease,*.lease6}", "golden leftovers"),
    ("leftovers", "missing", "/etc/dhcpcd.{duid,secret}", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/systemd/network/*", "golden leftovers"),
    (
        "leftovers",
        "missing",
        "/var/lib/NetworkManager/{secret_key,timestamps,seen-bssids,*.lease,dhclient-*.conf}",
        "golden leftovers",
    ),
    ("leftovers", "missing", "/var/lib/systemd/{random-seed,credential.secret}", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/urandom/random-seed", "golden leftovers"),
    ("leftovers", "missing", "/{boot/efi,efi,boot}/loader/random-seed", "golden leftovers"),
    (
        "leftovers",
        "missing",
        "/etc/lvm/{archive/*.vg,backup/*,cache/*,devices/system.devices}",
        "golden leftovers",
    ),
    ("leftovers", "missing", "/etc/multipath/{wwids,bindings}", "golden leftovers"),
    ("leftovers", "missing", "/etc/zfs/zpool.cache", "golden leftovers"),
    ("leftovers", "missing", "/etc/blkid.tab", "golden leftovers"),
    ("leftovers", "missing", "/{etc/blkid,var/cache}/blkid.tab", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/wicked/{duid,iaid,lease-*}.xml", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/smartmontools/{smartd.*.state,attrlog.*.csv}", "golden leftovers"),
    ("leftovers", "missing", "/boot/{initramfs-*kdump.img,initrd-*-kdump}", "golden leftovers"),
    ("leftovers", "missing", "/var/lib/kdump/initramfs-*kdump.img", "golden leftovers"),
    ("interfaces", "content", "/etc/network/interfaces{,.d/*}", "its own interfaces"),
    ("interfaces", "content", "/etc/netplan/*.yaml", "its own interfaces"),
    ("interfaces", "content", "/etc/systemd/network/*.network", "its own interfaces"),
    ("interfaces", "content", "/etc/NetworkManager/system-connections/*", "its own interfaces"),
    ("interfaces", "all", "/etc/sysconfig/{network-scripts,network}/*", "its own interfaces"),
    ("interfaces", "all", "/etc/netctl/*", "its own interfaces"),
    ("host-ids", "content", "/etc/hostid", "its own id"),
    ("host-ids", "content", "/etc/nvme/{hostnqn,hostid}", "its own id"),
    ("host-ids", "content", "/etc/iscsi/initiatorname.iscsi", "its own id"),
    ("clock", "content", "/etc/adjtime", "its own clock"),
    ("clock", "missing", "/var/lib/{chrony/drift,ntp/ntp.drift,ntpsec/ntp.drift}", "its own clock"),
    ("resume", "content", "/etc/initramfs-tools/conf.d/*", "its own swap"),
    ("resume", "content", "/etc/initramfs-tools/initramfs.conf", "its own swap"),
    ("kernel-cmdline", "content", "/etc/default/grub", "its own disks"),
    ("kernel-cmdline", "content", "/etc/default/grub.d/*.cfg", "its own disks"),
    ("kernel-cmdline", "content", "/etc/kernel/cmdline", "its own disks"),
    (
        "kernel-cmdline",
        "content",
        "/etc/{cmdline.d/*.conf,dracut.conf,dracut.conf.d/*.conf}",
        "its own disks",
    ),
    ("kernel-cmdline", "content", "/etc/default/{u-boot,extlinux}", "its own disks"),
    ("boot-entries", "all", "/{boot/efi,efi,boot}/loader/**", "its own boot entries"),
    ("boot-entries", "all", "/boot/{extlinux,syslinux}/*", "its own boot entries"),
    ("boot-entries", "content", "/etc/kernel/{entry-token,install.conf}", "its own id"),
    ("grub-devices", "content", "/etc/default/grub_installdevice", "its own disks"),
    ("debconf", "content,extra", "/var/cache/debconf/config.dat{,-old}", "its own disks"),
    ("initramfs", "content,extra", "/boot/initrd.img-*", "its own initramfs"),
    ("initramfs", "content,extra", "/boot/{initramfs-*.img,initrd-*}", "its own initramfs"),
    ("initramfs", "content,extra", "/var/lib/initramfs-tools/*", "its own initramfs"),
    ("selinux", "extra", "/.autorelabel", "labels are made at its first boot"),
    ("selinux", "label", "/{etc/ssh,boot}", "labelled by its own policy"),
    ("selinux", "label", "/{etc/ssh,boot}/**", "labelled by its own policy"),
    ("bootloader", "all", "/boot/{grub,grub2}/**", "its own boot loader"),
    ("bootloader", "extra", "/boot/{grub,grub2}", "its own boot loader"),
];

/// What a clone of this layout, made under this policy, may differ in.
#[must_use]
pub fn of_a_clone(layout: &Layout, policy: &Policy) -> Vec<Expected> {
    let done = |piece: &str| {
        let kept = piece == "ssh-keys" && policy.ssh_keys == SshKeys::Keep;
        let named = |list: &[String]| list.iter().any(|name| name == piece);
        !kept && !named(&policy.skip) && (policy.only.is_empty() || named(&policy.only))
    };
    let mut list: Vec<Expected> = PIECES
        .iter()
        .filter(|(piece, ..)| done(piece))
        .map(|(_, allows, glob, why)| Expected::new(allows, *glob, *why))
        .collect();
    if done("bootloader") {
        for esp in ["/boot/efi", "/efi", "/boot"] {
            list.push(Expected::new("all", format!("{esp}/EFI/**"), "its own boot loader"));
            list.push(Expected::new("extra", format!("{esp}/EFI"), "its own boot loader"));
        }
    }
    // Made where they are missing, for the programs that run in the clone.
    list.push(Expected::new("extra", "/{dev,proc,sys,run}", "mount points"));
    for mount in layout.mount_paths() {
        let path = escaped(mount.trim_end_matches('/'));
        list.push(Expected::new("extra", format!("{path}/lost+found"), "made by mkfs"));
        // Each folder on the way to a mount point.
        for (at, _) in path.match_indices('/').skip(1) {
            list.push(Expected::new("extra", &path[..at], "mount points"));
        }
        if !path.is_empty() {
            list.push(Expected::new("extra", path, "mount points"));
        }
    }
    list
}

/// A path as a glob that means it alone.
pub(super) fn escaped(path: &str) -> String {
    path.chars().fold(String::new(), |mut out, c| {
        match c {
            '*' | '?' | '[' | ']' | '{' | '}' | '\\' => out.extend(['[', c, ']']),
            _ => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The paths in backquotes in the column of files of the table of the step `configure` in docs/autoconfig.md.
    fn documented() -> BTreeSet<String> {
        let text = include_str!("../../../docs/autoconfig.md");
        let (_, step) = text.split_once("## Step `configure`").unwrap();
        let (step, _) = step.split_once("## Step `bootloader`").unwrap();
        let mut found = BTreeSet::new();
        for line in step.lines().filter(|line| line.starts_with('|')) {
            let files = line.split('|').nth(2).unwrap();
            found.extend(
                files.split('`').skip(1).step_by(2).filter(|path| path.starts_with('/')).map(str::to_owned),
            );
        }
        found
    }

    #[test]
    fn the_list_is_that_of_the_documentation() {
        let globs: BTreeSet<String> = PIECES.iter().flat_map(|(_, _, glob, _)| expanded(glob)).collect();
        // Folders in which something is said to lie.
        let places = ["/boot", "/boot/efi", "/efi", "/boot/grub", "/boot/grub2", "/etc/ssh"];
        let missing: Vec<String> = documented()
            .iter()
            .filter(|path| !places.contains(&path.as_str()))
            .flat_map(|path| expanded(path))
            .filter(|path| {
                let folder = format!("{path}/*");
                !globs.contains(path) && !globs.contains(&folder)
            })
            .collect();
        assert_eq!(missing, [""; 0], "docs/autoconfig.md has what PIECES lacks");
        assert!(documented().len() > 30, "{:?}", documented());
    }

    /// `a{b,c}d` as `abd` and `acd`.
    fn expanded(glob: &str) -> Vec<String> {
        match glob.split_once('{').and_then(|(start, rest)| Some((start, rest.split_once('}')?))) {
            None => vec![glob.to_owned()],
            Some((start, (choices, end))) => {
                choices.split(',').flat_map(|choice| expanded(&format!("{start}{choice}{end}"))).collect()
            }
        }
    }

    #[test]
    fn lists_follow_the_policy_and_the_layout() {
        let text = "version = 1\n[[disk]]\nname = 'd'\ntable = 'gpt'\n\
            [[partition]]\ndisk = 'd'\ntype = 'linux'\nsize = '1G'\nformat = { fs = 'ext4' }\nmount = { path = '/' }\n\
            [[partition]]\ndisk = 'd'\ntype = 'linux'\nsize = '1G'\nformat = { fs = 'ext4' }\nmount = { path = '/srv/d' }\n\
            [[partition]]\nid = 'p'\ntype = 'linux-lvm'\nsize = '1G'\n[[vg]]\nname = 'v'\non = ['p']\n\
            [[lv]]\nvg = 'v'\nname = 'b'\nsize = 'fill'\nformat = { fs = 'btrfs' }\n\
            subvolumes = [{ name = '@', path = '/var/sub' }]\n";
        let layout = ka_layout::parse::parse(text).unwrap();
        let globs = |policy: &Policy| -> Vec<String> {
            of_a_clone(&layout, policy).into_iter().map(|expected| expected.glob).collect()
        };
        let all = globs(&Policy::default());
        for glob in [
            "/etc/fstab",
            "/etc/ssh/ssh_host_*_key{,.pub}",
            "/etc/{mdadm/mdadm.conf,mdadm.conf}",
            "/lost+found",
            "/srv/d/lost+found",
            "/srv",
            "/srv/d",
            "/var/sub",
        ] {
            assert!(all.iter().any(|g| g == glob), "{glob}: {all:?}");
        }
        let policy = Policy { skip: vec!["fstab".to_owned()], ssh_keys: SshKeys::Keep, ..Policy::default() };
        let some = globs(&policy);
        assert!(!some.iter().any(|g| g == "/etc/fstab" || g.starts_with("/etc/ssh/")), "{some:?}");
        let policy = Policy { only: vec!["fstab".to_owned()], ..Policy::default() };
        let only = globs(&policy);
        assert!(
            only.iter().any(|g| g == "/etc/fstab") && only.iter().any(|g| g == "/lost+found"),
            "{only:?}"
        );
        assert!(!only.iter().any(|g| g == "/etc/machine-id" || g.starts_with("/boot")), "{only:?}");
        for expected in of_a_clone(&layout, &Policy::default()) {
            assert_ne!(expected.allows, ka_archive::Allows::default(), "{}", expected.glob);
        }
        assert_eq!(escaped("/a[1]*"), "/a[[]1[]][*]");
    }
}
