//! The host name, wherever the system itself keeps it: `/etc/hostname`, the node's own lines in `/etc/hosts`, and where
//! they bear the golden name `/etc/mailname`, postfix's `myhostname` and the pretty name in `/etc/machine-info`.

use super::{Change, Context, Piece, ifcfg};
use anyhow::{Result, bail};
use std::path::PathBuf;

const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";
const MAILNAME: &str = "/etc/mailname";
const POSTFIX: &str = "/etc/postfix/main.cf";
const SUSE: &str = "/etc/HOSTNAME";
const MACHINE_INFO: &str = "/etc/machine-info";

/// The piece.
pub struct Hostname;

/// A host name in its short and its full form.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    short: String,
    domain: Option<String>,
}

impl Name {
    fn new(text: &str) -> Self {
        match text.split_once('.') {
            Some((short, domain)) => Self { short: short.to_owned(), domain: Some(domain.to_owned()) },
            None => Self { short: text.to_owned(), domain: None },
        }
    }

    fn full(&self) -> String {
        self.domain.as_ref().map_or_else(|| self.short.clone(), |d| format!("{}.{d}", self.short))
    }
}

/// Whether a machine may be called so: labels of letters, digits and hyphens, separated by dots.
pub fn is_valid(name: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label) && name.split('.').next().is_some_and(|l| l.len() <= 63)
}

impl Piece for Hostname {
    fn name(&self) -> &'static str {
        "hostname"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let wanted = &context.order.node.name;
        if !is_valid(wanted) {
            bail!("setting the host name: {wanted:?} is no valid host name");
        }
        let root = &context.root;
        let mut changes = Vec::new();
        let hostname = root.read_text(HOSTNAME)?.unwrap_or_default();
        let written = hostname.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with('#'));
        let written = written.unwrap_or(&context.order.golden.hostname).to_owned();
        let hosts = root.read_text(HOSTS)?;
        let old = old_name(&written, hosts.as_deref());
        let mut new = Name::new(wanted);
        if new.domain.is_none() {
            new.domain.clone_from(&old.domain);
        }

        // The file keeps the form that the golden node's has: Debian's is short, some sites write the full name.
        let text = if written.contains('.') { new.full() } else { new.short.clone() };
        if root.write_text(HOSTNAME, &format!("{text}\n"), 0o644)? {
            changes.push(Change::new("hostname", HOSTNAME, format!("{text} (was {written:?})")));
        }
        let hosts = hosts
            .unwrap_or_else(|| "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".into());
        if root.write_text(HOSTS, &new_hosts(&hosts, &old, &new), 0o644)? {
            changes.push(Change::new("hostname", HOSTS, format!("this machine is {}", new.full())));
        }
        if let Some(text) = root.read_text(MAILNAME)? {
            let mail = text.trim();
            if let Some(name) = renamed(mail, &old, &new)
                && root.write_text(MAILNAME, &text.replace(mail, &name), 0o644)?
            {
                changes.push(Change::new("hostname", MAILNAME, name));
            }
        }
        // SUSE's, where it is not the same file; its form is the full name.
        if let Some(text) = root.read_text(SUSE)?
            && root.link(SUSE).is_none()
        {
            let name = if text.contains('.') { new.full() } else { new.short.clone() };
            if root.write_text(SUSE, &format!("{name}\n"), 0o644)? {
                changes.push(Change::new("hostname", SUSE, name));
            }
        }
        changes.extend(sysconfig(context, &old, &new)?);
        if let Some(text) = root.read_text(POSTFIX)? {
            let text_new = new_postfix(&text, &old, &new);
            if root.write_text(POSTFIX, &text_new, 0o644)? {
                changes.push(Change::new("hostname", POSTFIX, "myhostname and mydestination"));
            }
        }
        if let Some(text) = root.read_text(MACHINE_INFO)? {
            let pretty = |l: &str| {
                let named = l.trim_start().starts_with("PRETTY_HOSTNAME=");
                if named { format!("PRETTY_HOSTNAME=\"{}\"", new.short) } else { l.to_owned() }
            };
            if root.write_text(MACHINE_INFO, &map_lines(&text, pretty), 0o644)? {
                changes.push(Change::new("hostname", MACHINE_INFO, "pretty name"));
            }
        }
        Ok(changes)
    }
}

/// The golden name in RHEL's `HOSTNAME=` (up to 6) and in the name that DHCP clients send, `DHCP_HOSTNAME=` and SUSE's
/// `DHCLIENT_HOSTNAME_OPTION=`.
fn sysconfig(context: &Context, old: &Name, new: &Name) -> Result<Vec<Change>> {
    let root = &context.root;
    let mut files =
        vec![PathBuf::from("/etc/sysconfig/network"), PathBuf::from("/etc/sysconfig/network/dhcp")];
    for dir in ifcfg::DIRS {
        files.extend(root.matching(dir, "ifcfg-", "")?);
    }
    let mut changes = Vec::new();
    for file in files {
        if root.is_dir(&file) {
            continue;
        }
        let Some(text) = root.read_text(&file)? else { continue };
        let keys = ["HOSTNAME", "DHCP_HOSTNAME", "DHCLIENT_HOSTNAME_OPTION"];
        let change = |line: &str| {
            let value = keys.iter().find_map(|key| ifcfg::value(line, key));
            let name = value.and_then(|value| Some((value, renamed(value, old, new)?)));
            name.map_or_else(|| line.to_owned(), |(value, name)| line.replacen(value, &name, 1))
        };
        if root.write_text(&file, &map_lines(&text, change), 0o644)? {
            changes.push(Change::new("hostname", file.to_string_lossy(), new.full()));
        }
    }
    Ok(changes)
}

/// The golden name; its domain may stand in `/etc/hosts` only.
fn old_name(written: &str, hosts: Option<&str>) -> Name {
    let mut old = Name::new(written);
    if old.domain.is_none() {
        let own = hosts.unwrap_or_default().lines().filter_map(host_line).filter(|(ip, _)| is_own(ip));
        let full =
            own.flat_map(|(_, names)| names).find(|n| Name::new(n).short == old.short && n.contains('.'));
        old.domain = full.and_then(|n| Name::new(n).domain);
    }
    old
}

/// What a name of the golden machine is on this one; none when it is none of its names.
fn renamed(word: &str, old: &Name, new: &Name) -> Option<String> {
    if old.short.is_empty() {
        return None;
    }
    if word == old.short {
        return Some(new.short.clone());
    }
    (word == old.full()).then(|| new.full())
}

/// Address and names of a line of `/etc/hosts`.
fn host_line(line: &str) -> Option<(&str, Vec<&str>)> {
    let mut words = line.split('#').next()?.split_ascii_whitespace();
    Some((words.next()?, words.collect()))
}

/// Whether the address is the machine itself; lines of other addresses describe the cluster and stay.
fn is_own(address: &str) -> bool {
    address.starts_with("127.") || address == "::1"
}

fn new_hosts(text: &str, old: &Name, new: &Name) -> String {
    let mut lines = Vec::new();
    let mut named = false;
    for line in text.lines() {
        let Some((address, names)) = host_line(line).filter(|(a, _)| is_own(a)) else {
            named |= host_line(line).is_some_and(|(_, names)| names.contains(&new.short.as_str()));
            lines.push(line.to_owned());
            continue;
        };
        if address == "127.0.1.1" {
            // Debian's line for the machine's own name; aliases that are not the machine's name stay behind it.
            let mut words = vec![new.full()];
            words.extend(new.domain.is_some().then(|| new.short.clone()));
            for name in names {
                if renamed(name, old, new).is_none()
                    && !words.iter().any(|w| w == name)
                    && !named_like(name, old)
                {
                    words.push(name.to_owned());
                }
            }
            let comment = line.find('#').map_or(String::new(), |at| format!(" {}", &line[at..]));
            lines.push(format!("127.0.1.1\t{}{comment}", words.join(" ")));
            named = true;
        } else {
            let (line, replaced) = replace_words(line, |word| renamed(word, old, new));
            named |= replaced || names.contains(&new.short.as_str());
            lines.push(line);
        }
    }
    if !named {
        let own = if new.domain.is_some() { format!("{} {}", new.full(), new.short) } else { new.full() };
        let after = lines.iter().position(|l| host_line(l).is_some_and(|(ip, _)| ip == "127.0.0.1"));
        lines.insert(after.map_or(0, |at| at + 1), format!("127.0.1.1\t{own}"));
    }
    lines.join("\n") + "\n"
}

/// Whether `name` is the golden machine under some domain.
fn named_like(name: &str, old: &Name) -> bool {
    !old.short.is_empty() && Name::new(name).short == old.short
}

fn new_postfix(text: &str, old: &Name, new: &Name) -> String {
    map_lines(text, |line| {
        let key = line.split('=').next().unwrap_or_default().trim();
        if key == "myhostname" || key == "mydestination" {
            replace_words(line, |word| renamed(word, old, new)).0
        } else {
            line.to_owned()
        }
    })
}

/// Replaces words (separated by blanks, commas or `=`), and keeps all that stands between them.
fn replace_words(line: &str, replacement: impl Fn(&str) -> Option<String>) -> (String, bool) {
    let mut out = String::with_capacity(line.len());
    let mut replaced = false;
    let is_gap = |c: char| c.is_ascii_whitespace() || c == ',' || c == '=';
    for piece in line.split_inclusive(is_gap) {
        let word = piece.trim_end_matches(is_gap);
        if let Some(new) = replacement(word) {
            replaced = true;
            out.push_str(&new);
        } else {
            out.push_str(word);
        }
        out.push_str(&piece[word.len()..]);
    }
    (out, replaced)
}

/// Each line anew; the last line's end stays as it was.
fn map_lines(text: &str, each: impl Fn(&str) -> String) -> String {
    let mut out = text.lines().map(each).collect::<Vec<_>>().join("\n");
    if text.ends_with('\n') {
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    #[test]
    fn suse_and_rhel_have_it_in_other_places_too() {
        let lab = Lab::new();
        lab.file(HOSTNAME, "golden\n")
            .file(SUSE, "golden.example.org\n")
            .file(HOSTS, "127.0.0.1 localhost\n127.0.0.2 golden.example.org golden\n")
            .file("/etc/sysconfig/network-scripts/ifcfg-eth0", "DEVICE=eth0\nDHCP_HOSTNAME=\"golden\"\n");
        Hostname.apply(&lab.context()).unwrap();
        assert_eq!(lab.read(SUSE), "node7.example.org\n");
        assert_eq!(
            lab.read("/etc/sysconfig/network-scripts/ifcfg-eth0"),
            "DEVICE=eth0\nDHCP_HOSTNAME=\"node7\"\n"
        );
        let old = Lab::new();
        old.file(HOSTNAME, "golden\n").file("/etc/sysconfig/network", "NETWORKING=yes\nHOSTNAME=golden\n");
        std::os::unix::fs::symlink("hostname", old.target.join("etc/HOSTNAME")).unwrap();
        Hostname.apply(&old.context()).unwrap();
        assert_eq!(old.read("/etc/sysconfig/network"), "NETWORKING=yes\nHOSTNAME=node7\n");
        assert!(old.target.join("etc/HOSTNAME").is_symlink() && old.read(SUSE) == "node7\n");
    }

    #[test]
    fn debians_files_are_renamed() {
        let lab = Lab::new();
        lab.file(HOSTNAME, "golden\n")
            .file(
                HOSTS,
                "127.0.0.1\tlocalhost\n127.0.1.1\tgolden.example.com\tgolden www # own\n\n# cluster\n10.0.0.1 golden.example.com golden\n",
            )
            .file(MAILNAME, "golden.example.com\n")
            .file(MACHINE_INFO, "CHASSIS=server\nPRETTY_HOSTNAME=\"The Golden One\"\n")
            .file(
                POSTFIX,
                "# golden\nmyhostname = golden.example.com\nmydestination = $myhostname, golden, localhost,golden.example.com\nrelayhost = golden\n",
            );
        let changes = Hostname.apply(&lab.context()).unwrap();
        assert_eq!(changes.len(), 5, "{changes:?}");
        assert_eq!(lab.read(HOSTNAME), "node7\n");
        assert_eq!(
            lab.read(HOSTS),
            "127.0.0.1\tlocalhost\n127.0.1.1\tnode7.example.com node7 www # own\n\n# cluster\n10.0.0.1 golden.example.com golden\n"
        );
        assert_eq!(lab.read(MAILNAME), "node7.example.com\n");
        assert_eq!(lab.read(MACHINE_INFO), "CHASSIS=server\nPRETTY_HOSTNAME=\"node7\"\n");
        assert_eq!(
            lab.read(POSTFIX),
            "# golden\nmyhostname = node7.example.com\nmydestination = $myhostname, node7, localhost,node7.example.com\nrelayhost = golden\n"
        );
        assert!(Hostname.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
    }

    #[test]
    fn a_full_name_stays_full_and_a_given_domain_wins() {
        let mut lab = Lab::new();
        lab.order.node.name = "node7.other.org".into();
        lab.file(HOSTNAME, "golden.example.com\n").file(HOSTS, "127.0.0.1 localhost golden\n");
        Hostname.apply(&lab.context()).unwrap();
        assert_eq!(lab.read(HOSTNAME), "node7.other.org\n");
        assert_eq!(lab.read(HOSTS), "127.0.0.1 localhost node7\n");
    }

    #[test]
    fn missing_files_are_made_and_a_cluster_wide_hosts_file_stays() {
        let lab = Lab::new();
        std::fs::create_dir(lab.target.join("etc")).unwrap();
        Hostname.apply(&lab.context()).unwrap();
        assert_eq!(lab.read(HOSTNAME), "node7\n");
        assert!(lab.read(HOSTS).starts_with("127.0.0.1\tlocalhost\n127.0.1.1\tnode7\n"));
        assert!(!lab.exists(MAILNAME));
        let cluster = "127.0.0.1 localhost\n10.0.0.1 golden\n10.0.0.7 node7.x node7\n";
        lab.file(HOSTS, cluster).file(HOSTNAME, "golden\n");
        Hostname.apply(&lab.context()).unwrap();
        assert_eq!(lab.read(HOSTS), cluster);
    }

    #[test]
    fn names_that_no_machine_can_have_are_refused() {
        for name in ["", "-a", "a b", "a..b", "a/b", "a\nb", &"x".repeat(64)] {
            let mut lab = Lab::new();
            lab.order.node.name = name.into();
            Hostname.apply(&lab.context()).unwrap_err();
        }
        assert!(is_valid("n-1.example.com"));
    }
}
