//! Network configuration that names the golden node's interface or MAC address. The clone's own udev is asked what it
//! will call the node's interfaces (the initramfs has no udev, so there it is still `eth0`); a name or MAC address that
//! no interface of the node has becomes that of the interface over which it was installed. What is not certain is left
//! alone and reported.

use super::{Change, Context, Nic, Piece, entries, grub_cfg, ifcfg, kernel_cmdline};
use anyhow::Result;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(30);
const IFUPDOWN: &str = "/etc/network/interfaces";

/// The piece.
pub struct Interfaces;

/// Who wrote a file of network configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ifupdown,
    Netplan,
    Networkd,
    NetworkManager,
    /// RHEL's network scripts and SUSE's wicked.
    Ifcfg,
    /// Arch's netctl.
    Netctl,
}

impl Piece for Interfaces {
    fn name(&self) -> &'static str {
        "interfaces"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let files = files(context)?;
        let mut changes = Vec::new();
        for (path, kind, text) in &files {
            if let Some(line) = static_address(*kind, text) {
                let what = format!(
                    "the golden node's own address is cloned: {line}; a hook can give each node its own"
                );
                changes.push(Change::warning("interfaces", path.to_string_lossy(), what));
            }
        }
        let Some(nic) = context.network else { return Ok(changes) };
        let mut edits = Edits::default();
        edits.rename(context, nic, &files, &mut changes);
        edits.readdress(Path::new("/sys/class/net"), nic, &files, &mut changes);
        for (path, _, text) in &files {
            let new = edits.apply(text);
            if context.root.write_text(path, &new, 0o644)? {
                changes.push(Change::new("interfaces", path.to_string_lossy(), edits.describe(text)));
            }
        }
        if let Some((old, new)) = &edits.name {
            for (path, name) in ifcfg::rename_files(&context.root, old, new)? {
                changes.push(Change::new("interfaces", path.to_string_lossy(), format!("is now {name}")));
            }
        }
        Ok(changes)
    }
}

fn files(context: &Context) -> Result<Vec<(PathBuf, Kind, String)>> {
    let root = &context.root;
    let mut found = vec![(PathBuf::from(IFUPDOWN), Kind::Ifupdown)];
    let sets = [
        ("/etc/network/interfaces.d", "", Kind::Ifupdown),
        ("/etc/netplan", ".yaml", Kind::Netplan),
        ("/etc/systemd/network", ".network", Kind::Networkd),
        ("/etc/NetworkManager/system-connections", "", Kind::NetworkManager),
        (ifcfg::NETCTL, "", Kind::Netctl),
    ];
    for (dir, suffix, kind) in sets {
        found.extend(root.matching(dir, "", suffix)?.into_iter().map(|path| (path, kind)));
    }
    for dir in ifcfg::DIRS {
        let own = root.matching(dir, "", "")?.into_iter().filter(|path| ifcfg::interface_of(path).is_some());
        found.extend(own.map(|path| (path, Kind::Ifcfg)));
    }
    let mut files = Vec::new();
    for (path, kind) in found {
        // A link to /dev/null disables a file; a directory is no configuration.
        if let Ok(Some(text)) = root.read_text(&path) {
            files.push((path, kind, text));
        }
    }
    Ok(files)
}

/// Old words and their new ones.
#[derive(Debug, Default)]
struct Edits {
    words: Vec<(String, String)>,
    /// The interface among them, after which files may be called.
    name: Option<(String, String)>,
}

impl Edits {
    /// Finds the one configured name that the node does not have.
    fn rename(
        &mut self,
        context: &Context,
        nic: &Nic,
        files: &[(PathBuf, Kind, String)],
        changes: &mut Vec<Change>,
    ) {
        let configured: BTreeSet<String> =
            files.iter().flat_map(|(path, kind, text)| configured_names(*kind, path, text)).collect();
        if configured.is_empty() {
            return;
        }
        let Some(own) = clone_name(context, &nic.interface) else {
            let what = format!(
                "the clone's name for {} is not known; {configured:?} are left as they are",
                nic.interface
            );
            changes.push(Change::warning("interfaces", "names", what));
            return;
        };
        let mut here: BTreeSet<String> = physical_interfaces(Path::new("/sys/class/net"))
            .iter()
            .filter_map(|i| clone_name(context, i))
            .collect();
        here.insert(own.clone());
        let lost: Vec<&String> = configured.difference(&here).collect();
        match lost[..] {
            [] => {}
            [old] if !configured.contains(&own) => {
                self.words.push((old.clone(), own.clone()));
                self.name = Some((old.clone(), own));
            }
            _ => {
                let what =
                    format!("{lost:?} are configured and this node has {here:?} only; left as they are");
                changes.push(Change::warning("interfaces", "names", what));
            }
        }
    }

    /// Finds the one MAC address that the node does not have.
    fn readdress(
        &mut self,
        class_net: &Path,
        nic: &Nic,
        files: &[(PathBuf, Kind, String)],
        changes: &mut Vec<Change>,
    ) {
        let mut here: BTreeSet<String> = physical_interfaces(class_net)
            .iter()
            .filter_map(|i| std::fs::read_to_string(class_net.join(i).join("address")).ok())
            .map(|mac| mac.trim().to_ascii_lowercase())
            .collect();
        here.insert(nic.mac.to_ascii_lowercase());
        let named: BTreeSet<String> =
            files.iter().flat_map(|(_, kind, text)| matched_macs(*kind, text)).collect();
        let lost: Vec<&String> = named.iter().filter(|m| !here.contains(&m.to_ascii_lowercase())).collect();
        match lost[..] {
            [] => {}
            [old] => self.words.push((old.clone(), nic.mac.clone())),
            _ => {
                let what = format!(
                    "{lost:?} are configured and no interface of this node has them; left as they are"
                );
                changes.push(Change::warning("interfaces", "MAC addresses", what));
            }
        }
    }

    fn apply(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for line in text.split_inclusive('\n') {
            if line.trim_start().starts_with('#') {
                out.push_str(line);
            } else {
                out.push_str(
                    &self
                        .words
                        .iter()
                        .fold(line.to_owned(), |line, (old, new)| replace_word(&line, old, new)),
                );
            }
        }
        out
    }

    fn describe(&self, text: &str) -> String {
        let used = self.words.iter().filter(|(old, _)| text.contains(old.as_str()));
        used.map(|(old, new)| format!("{old} is now {new}")).collect::<Vec<_>>().join(", ")
    }
}

/// Replaces `old` where it stands as a word: `eth0` in `eth0.5` and `eth0:1`, not in `veth0`.
fn replace_word(line: &str, old: &str, new: &str) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find(old) {
        let (before, after) = (&rest[..at], &rest[at + old.len()..]);
        let joined_before = before.ends_with(is_word) || (before.is_empty() && out.ends_with(is_word));
        let whole = !joined_before && !after.starts_with(is_word);
        out.push_str(before);
        out.push_str(if whole { new } else { old });
        rest = after;
    }
    out + rest
}

/// Names as udev or the kernel give to wired interfaces of real hardware.
fn is_physical(name: &str) -> bool {
    let rest = name.strip_prefix("eth").or_else(|| name.strip_prefix("en"));
    rest.is_some_and(|r| {
        r.contains(|c: char| c.is_ascii_digit()) && r.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

/// The physical interfaces that a file configures by name.
fn configured_names(kind: Kind, path: &Path, text: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    // Netplan gives `set-name` interfaces the name itself, by their MAC address.
    if kind == Kind::Netplan && text.contains("set-name:") {
        return names;
    }
    if kind == Kind::Ifcfg {
        let named = ifcfg::interface_of(path).map(|n| n.split(['.', ':']).next().unwrap_or_default());
        names.extend(named.filter(|n| is_physical(n)).map(str::to_owned));
    }
    for line in text.lines().map(str::trim).filter(|l| !l.starts_with('#')) {
        let mut words: Vec<&str> = Vec::new();
        match kind {
            Kind::Ifupdown => {
                let mut split = line.split_ascii_whitespace();
                let command = split.next().unwrap_or_default();
                if command == "auto" || command.starts_with("allow-") || command == "iface" {
                    words.extend(split);
                }
            }
            Kind::Netplan => words.extend(line.strip_suffix(':')),
            Kind::Networkd => {
                words.extend(line.strip_prefix("Name=").into_iter().flat_map(str::split_ascii_whitespace));
            }
            Kind::NetworkManager => words.extend(line.strip_prefix("interface-name=")),
            Kind::Ifcfg => {
                words.extend(["DEVICE", "ETHERDEVICE", "PHYSDEV"].iter().find_map(|k| ifcfg::value(line, k)));
            }
            Kind::Netctl => words.extend(ifcfg::value(line, "Interface")),
        }
        let bases = words.iter().map(|w| w.split(['.', ':']).next().unwrap_or_default());
        names.extend(bases.filter(|n| is_physical(n)).map(str::to_owned));
    }
    names
}

/// The MAC addresses by which a file picks interfaces (not those that it gives them).
fn matched_macs(kind: Kind, text: &str) -> BTreeSet<String> {
    let mut macs = BTreeSet::new();
    let mut section = "";
    let mut match_indent = None;
    for raw in text.lines() {
        let line = raw.trim();
        if line.starts_with('#') || line.is_empty() {
            continue;
        }
        if line.starts_with('[') {
            section = line;
        }
        let indent = raw.len() - raw.trim_start().len();
        if kind == Kind::Netplan {
            if match_indent.is_some_and(|i| indent <= i) {
                match_indent = None;
            }
            if line == "match:" {
                match_indent = Some(indent);
            }
        }
        let value = match kind {
            Kind::Ifupdown => None,
            Kind::Netplan => line.strip_prefix("macaddress:").filter(|_| match_indent.is_some()),
            Kind::Networkd => line
                .strip_prefix("MACAddress=")
                .or_else(|| line.strip_prefix("PermanentMACAddress="))
                .filter(|_| section == "[Match]"),
            Kind::NetworkManager => line.strip_prefix("mac-address="),
            Kind::Ifcfg => ifcfg::value(line, "HWADDR"),
            Kind::Netctl => None,
        };
        let words =
            value.into_iter().flat_map(str::split_ascii_whitespace).map(|v| v.trim_matches(['"', '\'']));
        macs.extend(words.filter(|w| is_mac(w)).map(str::to_owned));
    }
    macs
}

fn is_mac(word: &str) -> bool {
    word.len() == 17
        && word.split(':').count() == 6
        && word.split(':').all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// A line that gives an interface a fixed address, which all clones would share.
fn static_address(kind: Kind, text: &str) -> Option<String> {
    let mut lines = text.lines().map(str::trim).filter(|l| !l.starts_with('#'));
    let found = match kind {
        Kind::Ifupdown => lines.find(|l| l.split_ascii_whitespace().next() == Some("address")),
        Kind::Netplan => {
            // An `addresses:` of name servers stands deeper, below `nameservers:`.
            let mut in_nameservers = false;
            lines.find(|l| {
                let found = l.starts_with("addresses:") && !in_nameservers;
                in_nameservers = *l == "nameservers:" || (in_nameservers && !l.ends_with(':'));
                found
            })
        }
        Kind::Networkd => lines.find(|l| l.starts_with("Address=")),
        Kind::NetworkManager => lines.find(|l| l.starts_with("address1=")),
        Kind::Ifcfg => lines.find(|l| {
            let key = l.split('=').next().unwrap_or_default();
            let own = key
                .strip_prefix("IPADDR")
                .is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit() || b == b'_'));
            own && ifcfg::value(l, key).is_some_and(|v| !v.is_empty() && !v.starts_with("127."))
        }),
        Kind::Netctl => lines.find(|l| l.starts_with("Address=")),
    };
    found.filter(|l| !l.contains("127.0.0.1")).map(str::to_owned)
}

/// Interfaces of hardware, by the kernel's names.
fn physical_interfaces(class_net: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(class_net) else { return Vec::new() };
    let with_device = entries.flatten().filter(|e| e.path().join("device").exists());
    with_device.filter_map(|e| e.file_name().into_string().ok()).collect()
}

/// What the clone will call the interface that is called `interface` here; none when that cannot be told.
fn clone_name(context: &Context, interface: &str) -> Option<String> {
    let root = &context.root;
    let default = "99-default.link";
    let masked =
        root.link(format!("/etc/systemd/network/{default}")).is_some_and(|l| l == Path::new("/dev/null"));
    if masked || has_kernel_names(context) {
        return Some(interface.to_owned());
    }
    // A rule of the administrator's may name it anything.
    let own_rules = root.matching("/etc/systemd/network", "", ".link").ok()?;
    let names = own_rules.iter().filter_map(|p| root.read_text(p).ok()?);
    if names.into_iter().any(|text| text.lines().any(|l| l.trim_start().starts_with("Name"))) {
        return None;
    }
    let path = format!("/sys/class/net/{interface}");
    let output = context.ask("udevadm", &["test-builtin", "net_id", &path], LIMIT);
    match output {
        Ok(output) => Some(predicted(&output.text()).unwrap_or_else(|| interface.to_owned())),
        Err(e) => {
            log::debug!("asking the clone's udev for the name of {interface}: {e}");
            None
        }
    }
}

/// The name that systemd's default policy (onboard, slot, path) takes from what `net_id` found.
fn predicted(output: &str) -> Option<String> {
    let value = |key: &str| output.lines().find_map(|l| l.trim().strip_prefix(key)?.strip_prefix('='));
    ["ID_NET_NAME_ONBOARD", "ID_NET_NAME_SLOT", "ID_NET_NAME_PATH"]
        .iter()
        .find_map(|k| value(k))
        .map(str::to_owned)
}

/// Whether the clone boots with `net.ifnames=0`.
fn has_kernel_names(context: &Context) -> bool {
    let mut files = kernel_cmdline::files(context).unwrap_or_default();
    files.extend(grub_cfg::path(context).ok());
    files.extend(
        entries::bls_files(context)
            .unwrap_or_default()
            .into_iter()
            .map(|(_, f)| f.to_string_lossy().into_owned()),
    );
    let texts = files.iter().filter_map(|f| context.root.read_text(f).ok()?);
    texts
        .into_iter()
        .any(|text| text.lines().any(|l| !l.trim_start().starts_with('#') && l.contains("net.ifnames=0")))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    fn lab() -> Lab {
        let mut lab = Lab::new();
        lab.nic = Some(Nic { interface: "eth9".into(), mac: "52:54:00:00:00:99".into(), address: None });
        // So that no udev is needed to know the name.
        lab.file("/etc/default/grub", "GRUB_CMDLINE_LINUX=\"net.ifnames=0\"\n");
        lab
    }

    #[test]
    fn ifcfg_files_of_rhel_and_suse_and_netctl_follow_the_node() {
        let lab = lab();
        let rhel = "TYPE=Ethernet\nBOOTPROTO=dhcp\nNAME=eth7\nDEVICE=eth7\nHWADDR=\"52:54:00:AA:BB:CC\"\nONBOOT=yes\n";
        lab.file("/etc/sysconfig/network-scripts/ifcfg-eth7", rhel)
            .file("/etc/sysconfig/network-scripts/ifcfg-lo", "DEVICE=lo\nIPADDR=127.0.0.1\n")
            .file("/etc/sysconfig/network/ifcfg-eth7", "BOOTPROTO='dhcp'\nSTARTMODE='auto'\n")
            .file("/etc/sysconfig/network/ifcfg-eth7.5", "ETHERDEVICE='eth7'\nIPADDR='10.5.0.7/24'\n")
            .file("/etc/netctl/lan", "Interface=eth7\nConnection=ethernet\nIP=dhcp\n");
        let changes = Interfaces.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read("/etc/sysconfig/network-scripts/ifcfg-eth9"),
            rhel.replace("eth7", "eth9").replace("52:54:00:AA:BB:CC", "52:54:00:00:00:99")
        );
        assert_eq!(lab.read("/etc/sysconfig/network/ifcfg-eth9"), "BOOTPROTO='dhcp'\nSTARTMODE='auto'\n");
        assert!(lab.read("/etc/sysconfig/network/ifcfg-eth9.5").starts_with("ETHERDEVICE='eth9'"));
        assert!(lab.read("/etc/netctl/lan").starts_with("Interface=eth9\n"));
        let warnings: Vec<_> = changes.iter().filter(|c| c.warning).collect();
        assert!(warnings.len() == 1 && warnings[0].what.contains("IPADDR='10.5.0.7/24'"), "{changes:#?}");
    }

    #[test]
    fn a_keyfile_names_the_nodes_card_and_keeps_its_mode() {
        use std::os::unix::fs::PermissionsExt;
        let lab = lab();
        let file = "/etc/NetworkManager/system-connections/lan.nmconnection";
        lab.file(file, "[connection]\nid=lan\ntype=ethernet\ninterface-name=eth7\n[ethernet]\nmac-address=52:54:00:AA:BB:CC\n[ipv4]\nmethod=auto\n");
        let path = lab.target.join(file.trim_start_matches('/'));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        Interfaces.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read(file),
            "[connection]\nid=lan\ntype=ethernet\ninterface-name=eth9\n[ethernet]\nmac-address=52:54:00:00:00:99\n[ipv4]\nmethod=auto\n"
        );
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_one_name_that_is_not_here_is_rewritten() {
        let lab = lab();
        lab.file(
            IFUPDOWN,
            "auto lo eth7\niface lo inet loopback\n# eth7 is the LAN\nallow-hotplug eth7\niface eth7 inet dhcp\n\
             auto eth7.5\niface eth7.5 inet dhcp\n  vlan-raw-device eth7\niface veth7 inet manual\n",
        );
        Interfaces.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read(IFUPDOWN),
            "auto lo eth9\niface lo inet loopback\n# eth7 is the LAN\nallow-hotplug eth9\niface eth9 inet dhcp\n\
             auto eth9.5\niface eth9.5 inet dhcp\n  vlan-raw-device eth9\niface veth7 inet manual\n"
        );
    }

    #[test]
    fn two_lost_names_are_reported_and_left() {
        let lab = lab();
        let text = "auto eth7\niface eth7 inet dhcp\nauto eth8\niface eth8 inet dhcp\n";
        lab.file(IFUPDOWN, text);
        let changes = Interfaces.apply(&lab.context()).unwrap();
        assert!(changes.len() == 1 && changes[0].warning, "{changes:?}");
        assert_eq!(lab.read(IFUPDOWN), text);
    }

    #[test]
    fn macs_of_matches_are_rewritten_and_given_ones_are_not() {
        let lab = lab();
        lab.file(
            "/etc/netplan/50-cloud-init.yaml",
            "network:\n  ethernets:\n    lan:\n      match:\n        macaddress: \"52:54:00:aa:aa:aa\"\n      \
             set-name: ens3\n      dhcp4: true\n",
        );
        lab.file(
            "/etc/systemd/network/a.network",
            "[Match]\nMACAddress=52:54:00:aa:aa:aa\n[Link]\nMACAddress=02:00:00:00:00:01\n",
        );
        Interfaces.apply(&lab.context()).unwrap();
        assert!(lab.read("/etc/netplan/50-cloud-init.yaml").contains("\"52:54:00:00:00:99\""));
        assert_eq!(
            lab.read("/etc/systemd/network/a.network"),
            "[Match]\nMACAddress=52:54:00:00:00:99\n[Link]\nMACAddress=02:00:00:00:00:01\n"
        );
    }

    #[test]
    fn globs_and_dhcp_on_all_are_left_alone() {
        let lab = lab();
        let text = "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n";
        lab.file("/etc/systemd/network/all.network", text);
        assert!(Interfaces.apply(&lab.context()).unwrap().is_empty());
        assert_eq!(lab.read("/etc/systemd/network/all.network"), text);
    }

    #[test]
    fn fixed_addresses_are_reported() {
        let lab = lab();
        lab.file(IFUPDOWN, "auto eth9\niface eth9 inet static\n  address 10.0.0.1/24\n");
        let changes = Interfaces.apply(&lab.context()).unwrap();
        assert!(changes.len() == 1 && changes[0].what.contains("address 10.0.0.1/24"), "{changes:?}");
        let dns = "nameservers:\n  addresses: [1.1.1.1]\n";
        assert_eq!(static_address(Kind::Netplan, dns), None);
        assert!(static_address(Kind::Netplan, &format!("addresses:\n  - 10.0.0.1/24\n{dns}")).is_some());
    }

    #[test]
    fn the_policy_of_udev_is_followed() {
        let text = "Using default interface naming scheme 'v252'.\nID_NET_NAME_MAC=enx525400123456\nID_NET_NAME_PATH=enp0s3\nID_NET_NAME_SLOT=ens3\n";
        assert_eq!(predicted(text).unwrap(), "ens3");
        assert_eq!(predicted("ID_NET_NAME_MAC=enx525400123456\n"), None);
        assert!(is_physical("enp0s3") && is_physical("eth0") && is_physical("enx525400123456"));
        assert!(!is_physical("en*") && !is_physical("br0") && !is_physical("ens") && !is_physical("veth0"));
    }
}
