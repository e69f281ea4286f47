//! SELinux labels of files that were made on the node: the kernel that installs has no policy, so nothing labels them by
//! itself. Files that were rewritten have kept their labels, new ones have got that of their directory; here the clone's
//! own `setfiles` gives them the labels of the clone's policy. Where it cannot, the clone relabels itself on its first
//! boot, which takes minutes and a second boot.

use super::{Change, Context, Piece, grub};
use anyhow::{Context as _, Result};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(600);
const CONFIG: &str = "/etc/selinux/config";
const FALLBACK: &str = "/.autorelabel";
/// Where the clone's own programs have made files: ssh host keys, initramfs images, menus.
const MADE_BY_PROGRAMS: &[&str] = &["/etc/ssh", "/boot"];

/// The piece.
pub struct Selinux;

impl Piece for Selinux {
    fn name(&self) -> &'static str {
        "selinux"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let root = &context.root;
        let made = root.take_made();
        let text = root.read_text(CONFIG)?.unwrap_or_default();
        let value = |key: &str| text.lines().rev().find_map(|l| l.trim().strip_prefix(key)).map(str::trim);
        let (Some(mode), Some(kind)) = (value("SELINUX="), value("SELINUXTYPE=")) else {
            return Ok(Vec::new());
        };
        if mode == "disabled" {
            return Ok(Vec::new());
        }
        let contexts = format!("/etc/selinux/{kind}/contexts/files/file_contexts");
        if !root.exists(&contexts) {
            return Ok(Vec::new());
        }
        if root.label("/etc").is_none() {
            return fall_back(context, "the golden tree carries no labels");
        }
        if context.first_of(&["/usr/sbin/setfiles", "/sbin/setfiles", "/usr/bin/setfiles"]).is_none() {
            return fall_back(context, "the clone has no setfiles");
        }
        let mut words = vec!["-m"];
        let mut paths: Vec<&str> = MADE_BY_PROGRAMS.iter().copied().filter(|p| root.exists(p)).collect();
        if let Ok((_, mount)) = grub::esp(context) {
            // vfat has no labels.
            words.extend(["-e", mount]);
            paths.extend(made.iter().map(String::as_str).filter(|p| !p.starts_with(&format!("{mount}/"))));
        } else {
            paths.extend(made.iter().map(String::as_str));
        }
        paths.retain(|p| root.exists(p));
        words.push(&contexts);
        words.extend(&paths);
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        match context.run("setfiles", &words, LIMIT) {
            Ok(_) => {
                Ok(vec![Change::new("selinux", paths.join(" "), "labelled as the clone's policy has it")])
            }
            Err(e) => fall_back(context, &format!("{e:#}")),
        }
    }
}

fn fall_back(context: &Context, why: &str) -> Result<Vec<Change>> {
    context.root.write(FALLBACK, b"", 0o644).context("asking for relabelling")?;
    if !context.is_dry() && !context.root.exists(FALLBACK) {
        return Ok(vec![Change::warning(
            "selinux",
            FALLBACK,
            format!("kept away by policy, although {why}"),
        )]);
    }
    Ok(vec![Change::warning(
        "selinux",
        FALLBACK,
        format!("made, so that the clone relabels itself at its first boot: {why}"),
    )])
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    const CONTEXTS: &str = "/etc/selinux/targeted/contexts/files/file_contexts";

    /// A tree with SELinux; none where this file system, or this user, cannot label files.
    fn labelled(mode: &str) -> Option<Lab> {
        let lab = Lab::new();
        lab.file(CONFIG, &format!("# comment\nSELINUX={mode}\nSELINUXTYPE=targeted\n")).file(CONTEXTS, "");
        let label = b"system_u:object_r:etc_t:s0\0";
        let done = rustix::fs::setxattr(
            lab.target.join("etc"),
            "security.selinux",
            label,
            rustix::fs::XattrFlags::empty(),
        );
        if done.is_err() {
            eprintln!("SKIPPED: labels: this user or file system cannot have them");
            return None;
        }
        Some(lab)
    }

    #[test]
    fn new_files_are_labelled_like_their_directory_and_then_by_the_policy() {
        let Some(lab) = labelled("enforcing") else { return };
        lab.file("/usr/sbin/setfiles", "").file("/etc/ssh/x", "");
        let context = lab.pretending(|_| Ok(String::new()));
        context.root.write("/etc/new", b"x", 0o644).unwrap();
        context.root.write("/boot/efi/new", b"x", 0o644).unwrap_err();
        lab.file("/boot/efi/x", "");
        context.root.write("/boot/efi/new", b"x", 0o644).unwrap();
        let mut value = [0; 64];
        let n = rustix::fs::getxattr(lab.target.join("etc/new"), "security.selinux", &mut value[..]).unwrap();
        assert_eq!(&value[..n], b"system_u:object_r:etc_t:s0\0");
        let changes = Selinux.apply(&context).unwrap();
        assert_eq!(context.ran(), [format!("setfiles -m -e /boot/efi {CONTEXTS} /etc/ssh /boot /etc/new")]);
        assert!(changes.len() == 1 && !changes[0].warning && !lab.exists(FALLBACK));
        // Rewriting keeps the label.
        context.root.write("/etc/new", b"y", 0o644).unwrap();
        let n = rustix::fs::getxattr(lab.target.join("etc/new"), "security.selinux", &mut value[..]).unwrap();
        assert_eq!(&value[..n], b"system_u:object_r:etc_t:s0\0");
    }

    #[test]
    fn where_nothing_can_label_the_clone_does_it_at_its_first_boot() {
        let lab = Lab::new();
        lab.file(CONFIG, "SELINUX=permissive\nSELINUXTYPE=targeted\n").file(CONTEXTS, "");
        let changes = Selinux.apply(&lab.context()).unwrap();
        assert!(changes[0].warning && changes[0].what.contains("carries no labels"), "{changes:?}");
        assert!(lab.exists(FALLBACK));
        let Some(lab) = labelled("enforcing") else { return };
        assert!(Selinux.apply(&lab.context()).unwrap()[0].what.contains("no setfiles"));
        let Some(lab) = labelled("enforcing") else { return };
        lab.file("/usr/sbin/setfiles", "").file("/boot/x", "");
        let context = lab.pretending(|_| anyhow::bail!("setfiles ended with exit status 255"));
        assert!(Selinux.apply(&context).unwrap()[0].what.contains("exit status 255"));
        assert!(lab.exists(FALLBACK));
    }

    #[test]
    fn without_selinux_nothing_is_done() {
        let lab = Lab::new();
        assert!(Selinux.apply(&lab.context()).unwrap().is_empty());
        lab.file(CONFIG, "SELINUX=disabled\nSELINUXTYPE=targeted\n").file(CONTEXTS, "");
        assert!(Selinux.apply(&lab.context()).unwrap().is_empty());
        assert!(!lab.exists(FALLBACK));
    }
}
