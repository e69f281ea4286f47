//! `/etc/crypttab` of the clone. A clone's volumes are made without encryption, so a container whose file system was
//! cloned as a plain one is commented out, loudly; any other line must name a device that this node has.

use super::names::Spec;
use super::{Change, Context, Piece};
use anyhow::{Result, bail};
use ka_layout::order::{Layer, Volume};

const PATH: &str = "/etc/crypttab";
/// The one that Arch puts into the initramfs.
const ARCH: &str = "/etc/crypttab.initramfs";
/// Both.
pub const FILES: &[&str] = &[PATH, ARCH];

/// The piece.
pub struct Crypttab;

/// A line of crypttab: the name that the opened container gets, its device, its options.
pub struct Line<'a> {
    pub name: &'a str,
    pub device: &'a str,
    options: &'a str,
}

impl<'a> Line<'a> {
    /// Reads a line; none when it is empty or a comment.
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let name = fields.next().filter(|n| !n.starts_with('#'))?;
        let device = fields.next()?;
        Some(Self { name, device, options: fields.nth(1).unwrap_or("") })
    }

    /// Whether the machine boots without it.
    pub fn is_optional(&self) -> bool {
        self.options.split(',').any(|o| o == "noauto" || o == "nofail")
    }
}

impl Piece for Crypttab {
    fn name(&self) -> &'static str {
        "crypttab"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for path in FILES {
            changes.extend(file(context, path)?);
        }
        Ok(changes)
    }
}

fn file(context: &Context, path: &str) -> Result<Vec<Change>> {
    let Some(old) = context.root.read_text(path)? else { return Ok(Vec::new()) };
    let mut changes = Vec::new();
    let mut new = String::new();
    for line in old.lines() {
        if let Some(reason) = Line::parse(line).map_or(Ok(None), |fields| unusable(context, path, &fields))? {
            changes.push(Change::warning("crypttab", path, format!("commented out, {reason}: {line}")));
            new.push_str(&format!("# ka: {reason}:\n#"));
        }
        new.push_str(line);
        new.push('\n');
    }
    if !changes.is_empty() {
        if !context.root.write_text(path, &new, 0o644)? {
            return Ok(vec![Change::warning(
                "crypttab",
                path,
                "kept by policy, with lines that this node cannot use",
            )]);
        }
        context.initramfs_is_stale(format!("{path} changed"));
    }
    Ok(changes)
}

/// Why a line cannot stay; none when it can.
fn unusable(context: &Context, path: &str, line: &Line) -> Result<Option<String>> {
    let Some(spec) = Spec::parse(line.device) else { return Ok(None) };
    // The piece storage sets the lines of this node's own containers right.
    let own = |v: &Volume| matches!(&v.layer, Some(Layer::Luks { name, .. }) if *name == line.name);
    if context.volumes.iter().any(own) {
        return Ok(None);
    }
    let mapped = format!("/dev/mapper/{}", line.name);
    let golden = &context.order.golden.filesystems;
    if golden.iter().any(|fs| fs.device == mapped || fs.aliases.contains(&mapped)) {
        return Ok(Some(format!(
            "{mapped} was an encrypted container on the golden node and is a plain file system here"
        )));
    }
    if context.names().bearer(&spec).is_some() {
        return Ok(None);
    }
    if line.is_optional() {
        return Ok(Some(format!("{} does not exist on this node", line.device)));
    }
    bail!(
        "checking {path} of the clone: {} ({}) does not exist on this node and the line is not nofail",
        line.device,
        line.name
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, SWAP_UUID};
    use super::*;

    #[test]
    fn lines_are_judged() {
        let mut lab = Lab::new();
        lab.order.golden.filesystems[0].aliases.push("/dev/mapper/root_crypt".into());
        let keep =
            format!("# name device\nswap_crypt UUID={SWAP_UUID} /dev/urandom swap\nx /srv/x.img none luks\n");
        lab.file(PATH, &keep);
        assert!(Crypttab.apply(&lab.context()).unwrap().is_empty());
        assert_eq!(lab.read(PATH), keep);

        lab.file(PATH, "root_crypt UUID=1 none luks\nb UUID=2 none luks,nofail\n");
        let context = lab.context();
        let changes = Crypttab.apply(&context).unwrap();
        assert!(changes.len() == 2 && changes.iter().all(|c| c.warning), "{changes:?}");
        assert!(lab.read(PATH).lines().all(|l| l.starts_with('#')));
        assert_eq!(context.stale_initramfs.borrow().len(), 1);

        lab.file(PATH, "").file(ARCH, "c UUID=3 none luks,nofail\n");
        assert!(
            Crypttab.apply(&lab.context()).unwrap()[0].file == ARCH && lab.read(ARCH).starts_with("# ka: ")
        );

        lab.file(PATH, "b UUID=2 none luks\n");
        let error = Crypttab.apply(&lab.context()).unwrap_err().to_string();
        assert!(error.contains("UUID=2 (b)"), "{error}");
    }
}
