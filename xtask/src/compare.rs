//! Is a clone its golden tree? Judged by rsync, which is not ours: content by checksum, owners, modes, times, hard links,
//! ACLs and extended attributes, in both directions. What may differ is named entry by entry, with the reason.

use anyhow::{Context, Result, bail};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A path that may differ. `dir/**` means everything below `dir`; `*` inside a name stands for any characters.
#[derive(Debug, Clone, Copy)]
pub struct Allowed {
    /// The path, relative to the root, without a slash at its ends.
    pub path: &'static str,
    /// Whether only times of a directory may differ (something in it was replaced), not its owner or mode.
    pub times_only: bool,
    /// Why.
    pub why: &'static str,
}

const fn may(path: &'static str, why: &'static str) -> Allowed {
    Allowed { path, times_only: false, why }
}

const fn touched(path: &'static str) -> Allowed {
    Allowed { path, times_only: true, why: "holds something that autoconfig replaced" }
}

/// What autoconfig changes on a Debian clone of the lab: nothing else may differ from the golden tree.
pub const AUTOCONFIG: &[Allowed] = &[
    may("etc/hostname", "its own name"),
    may("etc/hosts", "its own name"),
    may("etc/machine-id", "its own id"),
    may("var/lib/dbus/machine-id", "its own id"),
    may("etc/ssh/ssh_host_*", "its own keys"),
    may("var/lib/systemd/random-seed", "no two machines may start from the same"),
    may("boot/grub/**", "grub-install and grub.cfg"),
    may("boot/efi/**", "grub-install"),
    may("var/cache/debconf/config.dat", "grub-pc/install_devices names the clone's disk"),
    may("var/cache/debconf/config.dat-old", "debconf's copy of it"),
    may("lost+found", "made by mkfs"),
    touched("etc"),
    touched("etc/ssh"),
    touched("boot"),
    touched("boot/grub"),
    touched("var/lib/dbus"),
    touched("var/lib/systemd"),
    touched("var/cache/debconf"),
    touched(""),
];

/// What is never sent, only the folder itself: the running system makes it anew.
pub const NOT_SENT: &[Allowed] = &[
    may("dev/**", "devices are made at boot"),
    may("run/**", "made at boot"),
    may("proc/**", "the kernel's"),
    may("sys/**", "the kernel's"),
    may("tmp/**", "temporary"),
    may("var/tmp/**", "temporary"),
];

/// One difference, as rsync itemizes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `>fcst......`, `*deleting`, ...: what differs.
    pub what: String,
    /// The path, relative to the root; the root itself is empty. Odd characters stand as `\#ooo`.
    pub path: String,
}

/// Everything in which `clone` differs from `golden`.
///
/// # Errors
/// When rsync fails.
pub fn differences(golden: &Path, clone: &Path) -> Result<Vec<Difference>> {
    let mut from = golden.as_os_str().to_owned();
    from.push("/");
    let mut to = clone.as_os_str().to_owned();
    to.push("/");
    let output = ka_sys::process::run(
        Command::new("rsync")
            .env("LC_ALL", "C")
            .args(["-aHAX", "--dry-run", "--itemize-changes", "--checksum", "--delete", "--numeric-ids"])
            .args(["--modify-window=-1", "--out-format=%i %n"])
            .args([&from, &to]),
        Duration::from_secs(600),
    )
    .context("comparing by rsync")?;
    Ok(output.text().lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Difference> {
    let (what, path) = line.split_once(' ')?;
    let path = path.trim_start().trim_end_matches('/').trim_start_matches("./");
    let path = if path == "." { "" } else { path };
    Some(Difference { what: what.to_owned(), path: path.to_owned() })
}

/// Those differences that no list allows.
#[must_use]
pub fn unexplained(differences: &[Difference], lists: &[&[Allowed]]) -> Vec<Difference> {
    differences
        .iter()
        .filter(|d| !lists.iter().any(|list| list.iter().any(|a| allows(a, d))))
        .cloned()
        .collect()
}

fn allows(allowed: &Allowed, difference: &Difference) -> bool {
    // `.d..t......`: a directory of which the time differs, and nothing else.
    let is_time_of_dir = difference.what.starts_with(".d..t.");
    (!allowed.times_only || is_time_of_dir) && matches(allowed.path, &difference.path)
}

fn matches(pattern: &str, path: &str) -> bool {
    if let Some(dir) = pattern.strip_suffix("/**") {
        return path == dir || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/'));
    }
    match pattern.split_once('*') {
        None => pattern == path,
        Some((start, end)) => path
            .strip_prefix(start)
            .and_then(|rest| rest.strip_suffix(end))
            .is_some_and(|middle| !middle.contains('/')),
    }
}

/// Compares and fails with a list of what is not explained; the count of files otherwise.
///
/// # Errors
/// As said.
pub fn same_tree(golden: &Path, clone: &Path, lists: &[&[Allowed]]) -> Result<Compared> {
    let found = differences(golden, clone)?;
    let bad = unexplained(&found, lists);
    if !bad.is_empty() {
        let list: String = bad.iter().take(40).map(|d| format!("  {} {}\n", d.what, d.path)).collect();
        bail!(
            "{} of {} differences are on no list (`>` differs or is missing in the clone, `*deleting` is only there, \
             `c` content, s size, t time, p mode, o owner, g group, a ACL, x xattr):\n{list}",
            bad.len(),
            found.len()
        );
    }
    holes_are_kept(golden, clone)?;
    Ok(Compared { files: count(golden)?, allowed: found.len(), reasons: reasons(&found, lists) })
}

/// Why those that may differ do, each reason once.
fn reasons(found: &[Difference], lists: &[&[Allowed]]) -> Vec<&'static str> {
    let mut reasons: Vec<&'static str> = found
        .iter()
        .filter_map(|d| lists.iter().flat_map(|list| list.iter()).find(|a| allows(a, d)))
        .map(|a| a.why)
        .collect();
    reasons.sort_unstable();
    reasons.dedup();
    reasons
}

/// The result of a comparison that found nothing wrong.
#[derive(Debug, Clone)]
pub struct Compared {
    /// Files, directories and all else that were compared.
    pub files: usize,
    /// Differences that a list explains.
    pub allowed: usize,
    /// Why, each reason once.
    pub reasons: Vec<&'static str>,
}

/// rsync does not look at holes: the golden tree's sparse files may not have become heavy.
fn holes_are_kept(golden: &Path, clone: &Path) -> Result<()> {
    for name in ["srv/hard-cases/sparse", "srv/hard-cases/all-hole"] {
        let blocks = |root: &Path| -> Result<u64> {
            let path = root.join(name);
            Ok(std::fs::metadata(&path).with_context(|| format!("looking at {}", path.display()))?.blocks())
        };
        let (before, after) = (blocks(golden)?, blocks(clone)?);
        // File systems differ in how they round; a megabyte is far below the size of either file.
        if after > before + 2048 {
            bail!(
                "{name} takes {after} blocks of 512 bytes in the clone, {before} in the golden tree: holes were filled"
            );
        }
    }
    Ok(())
}

fn count(tree: &Path) -> Result<usize> {
    let mut count = 0;
    let mut folders = vec![tree.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let entry = entry.with_context(|| format!("reading {}", folder.display()))?;
            count += 1;
            if entry.file_type().with_context(|| format!("looking at {}", entry.path().display()))?.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn patterns() {
        for (pattern, path, expected) in [
            ("etc/hosts", "etc/hosts", true),
            ("etc/hosts", "etc/hosts.deny", false),
            ("etc/ssh/ssh_host_*", "etc/ssh/ssh_host_rsa_key.pub", true),
            ("etc/ssh/ssh_host_*", "etc/ssh/ssh_host_x/y", false),
            ("boot/grub/**", "boot/grub", true),
            ("boot/grub/**", "boot/grub/x/y", true),
            ("boot/grub/**", "boot/grub2", false),
            ("", "", true),
            ("", "etc", false),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn every_kind_of_damage_is_seen() {
        if !Path::new("/usr/bin/rsync").exists() {
            println!("SKIPPED: no rsync");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for root in [&a, &b] {
            fs::create_dir_all(root.join("etc")).unwrap();
            for (name, text) in [
                ("same", "1"),
                ("content", "1"),
                ("mode", "1"),
                ("gone", "1"),
                ("time", "1"),
                ("etc/hostname", "1"),
            ] {
                fs::write(root.join(name), text).unwrap();
                let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
                fs::File::options().write(true).open(root.join(name)).unwrap().set_modified(time).unwrap();
            }
            fs::hard_link(root.join("same"), root.join("link")).unwrap();
        }
        fs::write(b.join("content"), "2").unwrap();
        fs::write(b.join("etc/hostname"), "2").unwrap();
        fs::set_permissions(b.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
        fs::remove_file(b.join("gone")).unwrap();
        fs::write(b.join("more"), "").unwrap();
        let odd = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_000_000, 1);
        fs::File::options().write(true).open(b.join("time")).unwrap().set_modified(odd).unwrap();
        fs::remove_file(b.join("link")).unwrap();
        fs::copy(b.join("same"), b.join("link")).unwrap();

        let found = unexplained(&differences(&a, &b).unwrap(), &[AUTOCONFIG]);
        // A broken hard link is told of both names.
        let mut names: Vec<&str> = found.iter().map(|d| d.path.as_str()).filter(|p| !p.is_empty()).collect();
        names.sort_unstable();
        assert_eq!(names, ["content", "gone", "link", "mode", "more", "same", "time"], "{found:?}");
    }
}
