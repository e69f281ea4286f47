//! What the clone must know of the volumes that were made on this node: `/etc/crypttab` for encrypted containers, whose
//! UUIDs are new on every node, and `mdadm.conf` for arrays. Its initramfs is built anew where it must find the root on them.

use super::{Change, Context, Piece, crypttab};
use anyhow::Result;
use ka_layout::order::Layer;

const CRYPTTAB: &str = "/etc/crypttab";
/// Debian's place, and everybody else's.
const MDADM: [&str; 2] = ["/etc/mdadm/mdadm.conf", "/etc/mdadm.conf"];

/// The piece.
pub struct Storage;

impl Piece for Storage {
    fn name(&self) -> &'static str {
        "storage"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let mut layers: Vec<&Layer> = Vec::new();
        for layer in context.volumes.iter().filter_map(|v| v.layer.as_ref()) {
            if !layers.contains(&layer) {
                layers.push(layer);
            }
        }
        let mut changes = encrypted(context, &layers)?;
        changes.extend(arrays(context, &layers)?);
        if !changes.is_empty() {
            context.initramfs_is_stale("the volumes of this node are new".into());
        } else if layers.iter().any(|l| matches!(l, Layer::Lvm { .. })) && !golden_has_lvm(context) {
            context.initramfs_is_stale("the golden node used no LVM".into());
        }
        Ok(changes)
    }
}

fn golden_has_lvm(context: &Context) -> bool {
    context.order.golden.filesystems.iter().any(|fs| fs.device.starts_with("/dev/mapper/"))
}

/// Lines of crypttab: those of this node's containers are set right or added.
fn encrypted(context: &Context, layers: &[&Layer]) -> Result<Vec<Change>> {
    let old = context.root.read_text(CRYPTTAB)?.unwrap_or_default();
    let mut lines: Vec<String> = old.lines().map(str::to_owned).collect();
    let mut changes = Vec::new();
    for layer in layers {
        let Layer::Luks { name, uuid, options } = layer else { continue };
        let device = format!("UUID={uuid}");
        let at = lines.iter().position(|l| crypttab::Line::parse(l).is_some_and(|l| l.name == *name));
        match at {
            Some(at) => {
                let found =
                    crypttab::Line::parse(&lines[at]).map(|l| l.device.to_owned()).unwrap_or_default();
                if found != device {
                    // The name may occur in the device's: the second field is sought behind the first.
                    let from = lines[at].find(name.as_str()).unwrap_or_default() + name.len();
                    if let Some(start) = lines[at][from..].find(&found).map(|n| from + n) {
                        lines[at].replace_range(start..start + found.len(), &device);
                        changes.push(Change::new("storage", CRYPTTAB, format!("{name} is now on {device}")));
                    }
                }
            }
            None => {
                let line = format!("{name} {device} none {options}");
                changes.push(Change::new("storage", CRYPTTAB, format!("added: {line}")));
                lines.push(line);
            }
        }
    }
    if !changes.is_empty() {
        context.root.write_text(CRYPTTAB, &format!("{}\n", lines.join("\n")), 0o644)?;
    }
    Ok(changes)
}

/// `ARRAY` lines of mdadm.conf: the golden node's arrays are not this node's.
fn arrays(context: &Context, layers: &[&Layer]) -> Result<Vec<Change>> {
    let wanted: Vec<String> = layers
        .iter()
        .filter_map(|layer| match layer {
            Layer::Raid { name, uuid, metadata } => {
                Some(format!("ARRAY /dev/md/{name} metadata={metadata} UUID={uuid}"))
            }
            _ => None,
        })
        .collect();
    let path = MDADM.into_iter().find(|p| context.root.exists(p));
    let Some(path) = path.or((!wanted.is_empty()).then_some(MDADM[0])) else { return Ok(Vec::new()) };
    let old = context.root.read_text(path)?.unwrap_or_default();
    let is_array =
        |l: &&str| l.split_ascii_whitespace().next().is_some_and(|w| w.eq_ignore_ascii_case("ARRAY"));
    let present: Vec<&str> = old.lines().filter(is_array).collect();
    if present == wanted {
        return Ok(Vec::new());
    }
    let kept = old.lines().filter(|l| !is_array(l)).map(str::to_owned);
    let lines: Vec<String> = kept.chain(wanted.iter().cloned()).collect();
    context.root.write_text(path, &format!("{}\n", lines.join("\n")), 0o644)?;
    let what = match &wanted[..] {
        [] => format!("{} arrays of the golden node are not on this one", present.len()),
        wanted => format!("now: {}", wanted.join("; ")),
    };
    Ok(vec![Change::new("storage", path, what)])
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    fn luks(name: &str, uuid: &str) -> Layer {
        Layer::Luks { name: name.into(), uuid: uuid.into(), options: "luks,discard".into() }
    }

    #[test]
    fn containers_are_found_by_their_new_uuids() {
        let mut lab = Lab::new();
        lab.volumes[2].layer = Some(luks("a", "1111"));
        lab.volumes[1].layer = Some(luks("b", "2222"));
        lab.file(CRYPTTAB, "# x\na   UUID=aaaa  /etc/a.key luks\nother /dev/sda9 none nofail\n");
        let context = lab.context();
        assert_eq!(Storage.apply(&context).unwrap().len(), 2);
        assert_eq!(
            lab.read(CRYPTTAB),
            "# x\na   UUID=1111  /etc/a.key luks\nother /dev/sda9 none nofail\nb UUID=2222 none luks,discard\n"
        );
        assert_eq!(context.stale_initramfs.borrow().len(), 1);
        assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
        let spec = crate::autoconfig::names::Spec::Uuid("2222".into());
        assert!(
            lab.context().names().bearer(&spec).is_some(),
            "the check of the finished clone finds the container"
        );
        // A line of this node's own is no business of the other piece, whatever the golden device was.
        lab.file(CRYPTTAB, "a UUID=aaaa none luks\n");
        assert!(crypttab::Crypttab.apply(&lab.context()).unwrap().is_empty());
    }

    #[test]
    fn arrays_are_this_nodes_own() {
        let mut lab = Lab::new();
        let conf = MDADM[0];
        lab.file(
            conf,
            "HOMEHOST <system>\nARRAY /dev/md/0 metadata=1.2 UUID=a:b:c:d name=golden:0\nMAILADDR root\n",
        );
        assert_eq!(Storage.apply(&lab.context()).unwrap().len(), 1);
        assert_eq!(lab.read(conf), "HOMEHOST <system>\nMAILADDR root\n");
        lab.volumes[2].layer =
            Some(Layer::Raid { name: "root".into(), uuid: "1:2:3:4".into(), metadata: "1.2".into() });
        Storage.apply(&lab.context()).unwrap();
        assert_eq!(
            lab.read(conf),
            "HOMEHOST <system>\nMAILADDR root\nARRAY /dev/md/root metadata=1.2 UUID=1:2:3:4\n"
        );
        assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
    }

    #[test]
    fn a_plain_clone_is_left_alone() {
        let lab = Lab::new();
        assert!(Storage.apply(&lab.context()).unwrap().is_empty());
        assert!(!lab.exists(CRYPTTAB) && !lab.exists(MDADM[0]));
    }
}
