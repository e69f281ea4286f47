//! In what a clone may differ from its golden tree: globs on the absolute path inside the root, each with what it allows and
//! why; [`crate::glob`] says what they mean. The time of a directory that may hold such a path may differ, too. A glob that
//! ends in `/**` means what is below, not the directory itself.

use std::fmt;
use std::str::FromStr;

use crate::glob::{GlobError, Patterns, alternatives, parent};
use crate::verify::What;

/// What a glob allows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allows {
    /// Other content, size and time of modification; the mode, owner and attributes stay.
    pub content: bool,
    /// That it is there though the golden tree has it not.
    pub extra: bool,
    /// That it is missing.
    pub missing: bool,
    /// Another SELinux label, or none.
    pub label: bool,
    /// Anything.
    pub all: bool,
}

impl Allows {
    /// Anything.
    pub const ALL: Self = Self { all: true, content: false, extra: false, missing: false, label: false };

    fn difference(self, what: What) -> bool {
        match what {
            _ if self.all => true,
            What::Content | What::Size | What::Mtime => self.content,
            What::Extra => self.extra,
            What::Missing => self.missing,
            _ => false,
        }
    }
}

impl fmt::Display for Allows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            ("all", self.all),
            ("content", self.content),
            ("extra", self.extra),
            ("missing", self.missing),
            ("label", self.label),
        ];
        let words: Vec<&str> = all.iter().filter(|(_, set)| *set).map(|(word, _)| *word).collect();
        f.write_str(&words.join(","))
    }
}

impl FromStr for Allows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut allows = Self::default();
        for word in text.split(',') {
            let slot = match word {
                "all" => &mut allows.all,
                "content" => &mut allows.content,
                "extra" => &mut allows.extra,
                "missing" => &mut allows.missing,
                "label" => &mut allows.label,
                other => return Err(format!("`{other}` is nothing that can be expected")),
            };
            *slot = true;
        }
        Ok(allows)
    }
}

/// Paths that may differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// In what.
    pub allows: Allows,
    /// Which; begins with a slash. Without one it means a name at any depth.
    pub glob: String,
    /// Why, for people.
    pub why: String,
}

impl Expected {
    /// One that lives in code; `allows` is as in [`Allows::from_str`], and nothing is allowed where it is wrong.
    #[must_use]
    pub fn new(allows: &str, glob: impl Into<String>, why: impl Into<String>) -> Self {
        Self { allows: allows.parse().unwrap_or_default(), glob: glob.into(), why: why.into() }
    }
}

/// A list of expected differences, ready for use.
pub(crate) struct Expectations {
    list: Vec<Expected>,
    paths: Patterns,
    /// Directories that may hold what globs mean.
    parents: Patterns,
}

impl Expectations {
    pub(crate) fn new(list: Vec<Expected>) -> Result<Self, GlobError> {
        let (mut paths, mut parents) = (Patterns::default(), Patterns::default());
        for (number, expected) in list.iter().enumerate() {
            for one in alternatives(&expected.glob)? {
                // One at the end only says that it is a directory.
                let one = if one == "/" { &one } else { one.trim_end_matches('/') };
                paths.add(number, one)?;
                // Without a slash at its start, every directory would be one.
                let Some(parent) = parent(one)? else { continue };
                parents.add(number, parent)?;
                if one.ends_with("/**") {
                    parents.add(number, one)?;
                }
            }
        }
        Ok(Self { list, paths, parents })
    }

    /// Why another SELinux label was to be expected; none when it was not.
    pub(crate) fn label(&self, path: &[u8]) -> Option<&str> {
        let allows = |i: &usize| self.list[*i].allows.label || self.list[*i].allows.all;
        self.paths.all(path).find(allows).map(|i| self.list[i].why.as_str())
    }

    /// Why a difference was to be expected; none when it was not.
    pub(crate) fn reason(&self, path: &[u8], what: What, directory: bool) -> Option<&str> {
        let allowed = self.paths.all(path).find(|&i| self.list[i].allows.difference(what));
        // What may hold new or lost things has another time.
        let holds = || self.parents.all(path).next().filter(|_| directory && what == What::Mtime);
        allowed.or_else(holds).map(|i| self.list[i].why.as_str())
    }
}

/// What a running machine changes by itself, or as people use it.
#[must_use]
pub fn running_machine() -> Vec<Expected> {
    [
        ("all", "/var/log/**", "logs go on"),
        ("all", "/var/lib/systemd/**", "systemd's memory"),
        ("all", "/var/lib/private/**", "services' memory"),
        ("all", "/var/cache/**", "caches"),
        // systemd's ldconfig.service at the first boot after an update of /usr.
        ("content", "/etc/ld.so.cache", "caches"),
        ("all", "/{tmp,var/tmp}/**", "temporary files"),
        ("all", "/var/spool/**", "jobs and mail come and go"),
        ("all", "/var/backups/**", "cron's backups"),
        (
            "all",
            "/var/lib/{apt,logrotate,chrony,ntp,ntpsec,fwupd,upower,sss,plymouth}/**",
            "services' memory",
        ),
        ("all", "/var/lib/{dhcp,dhclient,dhcpcd,NetworkManager}/**", "leases"),
        ("content,extra", "/etc/dhcpcd.{duid,secret}", "leases"),
        ("content,extra", "/etc/adjtime", "the hardware clock"),
        ("all", "/etc/resolv.conf", "name servers as the network says"),
        ("content,extra", "/{etc,var}/.updated", "systemd's memory"),
        ("content,extra", "/var/lib/urandom/random-seed", "random seeds"),
        ("content,extra", "/{boot/efi,efi,boot}/loader/random-seed", "random seeds"),
        ("content", "/boot/grub/grubenv", "written at each boot"),
        ("all", "/etc/lvm/{archive,backup,cache,devices}/**", "LVM's memory"),
        (
            "content,extra",
            "/{root,home/*}/.{bash_history,lesshst,viminfo,wget-hsts,sudo_as_admin_successful}",
            "people at work",
        ),
        ("all", "/{root,home/*}/.{cache,ssh/agent}/**", "people at work"),
    ]
    .into_iter()
    .map(|(allows, glob, why)| Expected::new(allows, glob, why))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed_and_what_not() {
        let list = vec![
            Expected::new("content,extra", "/etc/hostname", "name"),
            Expected::new("all", "/boot/grub/**", "grub"),
            Expected::new("missing", "/etc/x/*.{link,rules}", "gone"),
            Expected::new("all", "*.swp", "editors"),
            Expected::new("extra", "/lost+found", "mkfs"),
            Expected::new("content", "/opt/{a,b/c}.{x,y}", "both"),
            Expected::new("content", "/odd[{]/{a,{b,c}}", "nested"),
            Expected::new("content", "/key{,.pub}", "keys"),
            Expected::new("all", "/site/", "site"),
            Expected::new("missing", "/etc/ssh/*_key{,.pub}", "keys"),
        ];
        let expectations = Expectations::new(list).unwrap();
        for (path, what, directory, reason) in [
            ("etc/ssh/host_key", What::Missing, false, Some("keys")),
            ("etc/ssh/host_key.pub", What::Missing, false, Some("keys")),
            ("etc/hostname", What::Content, false, Some("name")),
            ("etc/hostname", What::Extra, false, Some("name")),
            ("etc/hostname", What::Mode, false, None),
            ("etc/hostname", What::Missing, false, None),
            ("etc/hostname.old", What::Content, false, None),
            ("etc", What::Mtime, true, Some("name")),
            ("etc", What::Mode, true, None),
            ("etc", What::Mtime, false, None),
            ("etc/y", What::Mtime, true, None),
            ("boot/grub", What::Mtime, true, Some("grub")),
            ("boot/grub", What::Owner, true, None),
            ("boot/grub/a/b", What::Owner, true, Some("grub")),
            ("boot", What::Mtime, true, None),
            ("etc/x/1.link", What::Missing, false, Some("gone")),
            ("etc/x/y/1.link", What::Missing, false, None),
            ("etc/x", What::Mtime, true, Some("gone")),
            ("srv/a.swp", What::Extra, false, Some("editors")),
            ("srv", What::Mtime, true, None),
            ("", What::Mtime, true, Some("mkfs")),
            ("opt/b/c.y", What::Size, false, Some("both")),
            ("opt/b", What::Mtime, true, Some("both")),
            ("opt", What::Mtime, true, Some("both")),
            ("opt/a", What::Mtime, true, None),
            ("odd{/c", What::Content, false, Some("nested")),
            ("key", What::Content, false, Some("keys")),
            ("key.pub", What::Content, false, Some("keys")),
            ("key.old", What::Content, false, None),
            ("site", What::Owner, true, Some("site")),
            ("site/a", What::Owner, false, None),
        ] {
            assert_eq!(expectations.reason(path.as_bytes(), what, directory), reason, "{path} {what:?}");
        }
    }

    #[test]
    fn lists_in_code_are_right() {
        for expected in running_machine() {
            assert_ne!(expected.allows, Allows::default(), "{}", expected.glob);
            assert!(expected.glob.starts_with('/'), "{}", expected.glob);
        }
        let expectations = Expectations::new(running_machine()).unwrap();
        assert!(expectations.reason(b"var/log/journal/x", What::Extra, false).is_some());
        assert!(expectations.reason(b"var/log", What::Mtime, true).is_some());
        assert!(expectations.reason(b"root/.bash_history", What::Content, false).is_some());
        assert!(expectations.reason(b"var/tmp", What::Mtime, true).is_some());
        assert!(expectations.reason(b"etc/ld.so.cache", What::Mtime, false).is_some());
        assert!(expectations.reason(b"etc/ld.so.cache", What::Mode, false).is_none());
        assert!(expectations.reason(b"usr/bin/ls", What::Content, false).is_none());
        assert!(expectations.reason(b"usr", What::Mtime, true).is_none());
    }

    #[test]
    fn words_come_back() {
        for text in ["all", "content", "content,extra,missing,label"] {
            assert_eq!(text.parse::<Allows>().unwrap().to_string(), text);
        }
        assert!("".parse::<Allows>().is_err() && "content,".parse::<Allows>().is_err());
    }
}
