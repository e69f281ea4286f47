//! Where the initramfs looks for a hibernated system: a swap space that does not exist makes every boot wait for it.
//! Names that still hold stay; others are rewritten or, without swap, set to `none`, and the initramfs is built anew.

use super::names::{Meaning, Spec, name_like};
use super::{Change, Context, Piece};
use anyhow::Result;
use ka_layout::model::Fs;

/// The piece.
pub struct Resume;

impl Piece for Resume {
    fn name(&self) -> &'static str {
        "resume"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        let mut files = context.root.matching("/etc/initramfs-tools/conf.d", "", "")?;
        files.push("/etc/initramfs-tools/initramfs.conf".into());
        for file in files {
            let Some(old) = context.root.read_text(&file)? else { continue };
            let lines: Vec<String> = old.lines().map(|line| rewrite(context, line)).collect();
            let mut new = lines.join("\n");
            if old.ends_with('\n') {
                new.push('\n');
            }
            if context.root.write_text(&file, &new, 0o644)? {
                let name = file.to_string_lossy().into_owned();
                context.initramfs_is_stale(format!("{name} changed"));
                let value = lines.iter().rfind(|l| l.trim_start().starts_with("RESUME="));
                changes.push(Change::new("resume", name, value.cloned().unwrap_or_default()));
            }
        }
        // Without a setting, initramfs-tools chose a swap space itself and baked its UUID in.
        let swaps = context.order.golden.filesystems.iter().filter(|fs| fs.fs == Fs::Swap);
        for uuid in swaps.filter_map(|fs| fs.uuid.as_ref()) {
            if context.names().bearer(&Spec::Uuid(uuid.clone())).is_none() {
                context.initramfs_is_stale(format!("the golden node's swap {uuid} is not on this node"));
            }
        }
        Ok(changes)
    }
}

fn rewrite(context: &Context, line: &str) -> String {
    let Some(value) = line.trim_start().strip_prefix("RESUME=") else { return line.to_owned() };
    let value = value.trim().trim_matches(['"', '\'']);
    let Some(spec) = Spec::parse(value) else { return line.to_owned() };
    let names = context.names();
    let volume = match names.meaning(&spec) {
        Meaning::Kept(_) => return line.to_owned(),
        Meaning::Renamed(volume) => Some(volume),
        Meaning::NotHere(_) | Meaning::Unknown => names.swaps().next(),
    };
    volume
        .and_then(|v| name_like(v, value))
        .map_or_else(|| "RESUME=none".into(), |name| format!("RESUME={name}"))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, SWAP_UUID};
    use super::*;

    const FILE: &str = "/etc/initramfs-tools/conf.d/resume";

    #[test]
    fn a_kept_uuid_stays() {
        let lab = Lab::new();
        lab.file(FILE, &format!("RESUME=UUID={SWAP_UUID}\n"));
        let context = lab.context();
        assert!(Resume.apply(&context).unwrap().is_empty());
        assert!(context.stale_initramfs.borrow().is_empty());
    }

    #[test]
    fn a_new_uuid_is_written_and_the_initramfs_is_stale() {
        let mut lab = Lab::new();
        lab.renew(2, "99999999-0000-4000-8000-000000000009");
        lab.file(FILE, &format!("# swap\nRESUME=UUID={SWAP_UUID}\n"));
        let context = lab.context();
        Resume.apply(&context).unwrap();
        assert_eq!(lab.read(FILE), "# swap\nRESUME=UUID=99999999-0000-4000-8000-000000000009\n");
        assert_eq!(context.stale_initramfs.borrow().len(), 2);
    }

    #[test]
    fn without_swap_nothing_is_resumed() {
        let mut lab = Lab::new();
        lab.volumes.retain(|v| v.fs != Some(Fs::Swap));
        lab.file(FILE, "RESUME=/dev/sda2\n");
        lab.file("/etc/initramfs-tools/initramfs.conf", "MODULES=most\n# RESUME=\nRESUME=auto\n");
        Resume.apply(&lab.context()).unwrap();
        assert_eq!(lab.read(FILE), "RESUME=none\n");
        assert!(lab.read("/etc/initramfs-tools/initramfs.conf").contains("RESUME=auto"));
    }
}
