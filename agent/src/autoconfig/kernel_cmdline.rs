//! `root=` and `resume=` where the clone's kernel command line is configured: `/etc/default/grub` and its `grub.d`, and
//! `/etc/kernel/cmdline`. `grub.cfg` itself is made anew by the boot loader step when it names what is not here.

use super::names::{Meaning, Spec, name_like};
use super::{Change, Context, Piece};
use anyhow::Result;

/// The piece.
pub struct KernelCmdline;

/// The files in which kernel command lines are configured.
pub fn files(context: &Context) -> Result<Vec<String>> {
    let mut files = vec!["/etc/default/grub".to_owned(), "/etc/kernel/cmdline".to_owned()];
    let parts = context.root.matching("/etc/default/grub.d", "", ".cfg")?;
    files.extend(parts.iter().map(|p| p.to_string_lossy().into_owned()));
    Ok(files)
}

impl Piece for KernelCmdline {
    fn name(&self) -> &'static str {
        "kernel-cmdline"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for file in files(context)? {
            let Some(old) = context.root.read_text(&file)? else { continue };
            let mut done = Vec::new();
            let mut new = String::with_capacity(old.len());
            for line in old.split_inclusive('\n') {
                if line.trim_start().starts_with('#') {
                    new.push_str(line);
                } else {
                    new.push_str(&rewrite(context, line, &mut done)?);
                }
            }
            if context.root.write_text(&file, &new, 0o644)? {
                changes.push(Change::new("kernel-cmdline", file, done.join(", ")));
            }
        }
        Ok(changes)
    }
}

/// Rewrites the words of a line that name a device of the golden node; all else stays as it is.
fn rewrite(context: &Context, line: &str, done: &mut Vec<String>) -> Result<String> {
    let is_gap = |c: char| c.is_ascii_whitespace() || c == '"' || c == '\'';
    let mut out = String::with_capacity(line.len());
    for piece in line.split_inclusive(is_gap) {
        let word = piece.trim_end_matches(is_gap);
        let end = &piece[word.len()..];
        match replacement(context, word)? {
            Replacement::Keep => out.push_str(piece),
            Replacement::Drop => {
                done.push(format!("{word} dropped"));
                // The blank before it goes when a quote follows, else the one behind it.
                if end.starts_with(['"', '\'']) {
                    out.truncate(out.trim_end_matches(' ').len());
                    out.push_str(end);
                }
            }
            Replacement::With(new) => {
                done.push(format!("{word} is now {new}"));
                out.push_str(&new);
                out.push_str(end);
            }
        }
    }
    Ok(out)
}

enum Replacement {
    Keep,
    Drop,
    With(String),
}

fn replacement(context: &Context, word: &str) -> Result<Replacement> {
    // The first `=` may belong to a variable: GRUB_CMDLINE_LINUX=resume=UUID=...
    let (before, setting) = match word.split_once('=') {
        Some((variable, rest)) if variable.starts_with("GRUB_") => (format!("{variable}="), rest),
        _ => (String::new(), word),
    };
    let Some((key, value)) = setting.split_once('=') else { return Ok(Replacement::Keep) };
    let Some(spec) = Spec::parse(value).filter(|_| key == "root" || key == "resume") else {
        return Ok(Replacement::Keep);
    };
    let names = context.names();
    let volume = match names.meaning(&spec) {
        Meaning::Kept(_) => return Ok(Replacement::Keep),
        Meaning::Renamed(volume) => volume,
        Meaning::NotHere(_) | Meaning::Unknown if key == "root" => context.root_volume()?,
        Meaning::NotHere(_) | Meaning::Unknown => match names.swaps().next() {
            Some(swap) => swap,
            None => return Ok(Replacement::Drop),
        },
    };
    Ok(match name_like(volume, value) {
        Some(name) => Replacement::With(format!("{before}{key}={name}")),
        None => Replacement::Drop,
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID, SWAP_UUID};
    use super::*;
    use ka_layout::model::Fs;

    const FILE: &str = "/etc/default/grub";

    #[test]
    fn names_that_hold_stay() {
        let lab = Lab::new();
        let text = format!(
            "# resume=UUID=dead\nGRUB_CMDLINE_LINUX=\"quiet resume=UUID={SWAP_UUID} root=LABEL=label3\"\n"
        );
        lab.file(FILE, &text);
        assert!(KernelCmdline.apply(&lab.context()).unwrap().is_empty());
        assert_eq!(lab.read(FILE), text);
    }

    #[test]
    fn device_names_become_uuids() {
        let lab = Lab::new();
        lab.file(FILE, "GRUB_CMDLINE_LINUX=\"quiet  resume=/dev/sda2\"\nGRUB_CMDLINE_LINUX_DEFAULT='resume=/dev/sda2 x'\n");
        lab.file("/etc/kernel/cmdline", "root=/dev/vda1 ro\n");
        assert_eq!(KernelCmdline.apply(&lab.context()).unwrap().len(), 2);
        assert_eq!(
            lab.read(FILE),
            format!(
                "GRUB_CMDLINE_LINUX=\"quiet  resume=UUID={SWAP_UUID}\"\nGRUB_CMDLINE_LINUX_DEFAULT='resume=UUID={SWAP_UUID} x'\n"
            )
        );
        assert_eq!(lab.read("/etc/kernel/cmdline"), format!("root=UUID={ROOT_UUID} ro\n"));
    }

    #[test]
    fn resume_goes_with_the_swap() {
        let mut lab = Lab::new();
        lab.volumes.retain(|v| v.fs != Some(Fs::Swap));
        lab.file(FILE, "A=\"quiet resume=UUID=1\"\nB=\"resume=UUID=1 quiet\"\nC=\"resume=UUID=1\"\n");
        KernelCmdline.apply(&lab.context()).unwrap();
        assert_eq!(lab.read(FILE), "A=\"quiet\"\nB=\"quiet\"\nC=\"\"\n");
    }
}
