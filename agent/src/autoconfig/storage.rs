//! What the clone must know of the volumes that were made on this node: `/etc/crypttab` for encrypted containers, whose
//! UUIDs are new on every node, and `mdadm.conf` for arrays. Its initramfs is built anew where it must find the root on them.

use super::initramfs_tools::Builder;
use super::{Change, Context, Piece, crypttab};
use anyhow::Result;
use ka_layout::model::Fs;
use ka_layout::order::{Layer, Volume};
use std::collections::BTreeSet;

/// Debian's place, and everybody else's.
const MDADM: [&str; 2] = ["/etc/mdadm/mdadm.conf", "/etc/mdadm.conf"];
/// Ka's own file, on a clone with dracut.
const DRACUT: &str = "/etc/dracut.conf.d/ka-storage.conf";

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
        changes.extend(dracut(context)?);
        if changes.iter().any(|c| !c.warning) {
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

/// Lines of crypttab: those of this node's containers are set right, or added where no file has one.
fn encrypted(context: &Context, layers: &[&Layer]) -> Result<Vec<Change>> {
    let mut found: BTreeSet<&str> = BTreeSet::new();
    let mut changes = Vec::new();
    // The first file is the one that lines are added to, so it comes last.
    for path in crypttab::FILES.iter().rev() {
        let old = context.root.read_text(path)?;
        let mut lines: Vec<String> = old.iter().flat_map(|text| text.lines()).map(str::to_owned).collect();
        let mut done = Vec::new();
        for layer in layers {
            let Layer::Luks { name, uuid, options } = layer else { continue };
            let device = format!("UUID={uuid}");
            let at = lines.iter().position(|l| crypttab::Line::parse(l).is_some_and(|l| l.name == *name));
            if let Some(at) = at {
                found.insert(name);
                if let Some(new) = with_device(&lines[at], &device) {
                    lines[at] = new;
                    done.push(Change::new("storage", *path, format!("{name} is now on {device}")));
                }
            } else if *path == crypttab::FILES[0] && !found.contains(name.as_str()) {
                let line = format!("{name} {device} none {options}");
                done.push(Change::new("storage", *path, format!("added: {line}")));
                lines.push(line);
            }
        }
        changes.extend(written(context, path, &lines, done)?);
    }
    Ok(changes)
}

/// The line of crypttab with another device, its second field; none when it has that already.
fn with_device(line: &str, device: &str) -> Option<String> {
    let fields = crypttab::Line::parse(line)?;
    // The name may occur in the device's: the second field is sought behind the first.
    let from = line.find(fields.name)? + fields.name.len();
    let start = from + line[from..].find(fields.device)?;
    let new = format!("{}{device}{}", &line[..start], &line[start + fields.device.len()..]);
    (fields.device != device).then_some(new)
}

/// Writes what was `done`; says so when the policy keeps the file as it is.
fn written(context: &Context, path: &str, lines: &[String], done: Vec<Change>) -> Result<Vec<Change>> {
    if done.is_empty() || context.root.write_text(path, &format!("{}\n", lines.join("\n")), 0o644)? {
        return Ok(done);
    }
    let wanted: Vec<&str> = done.iter().map(|c| c.what.as_str()).collect();
    Ok(vec![Change::warning("storage", path, format!("kept by policy; else: {}", wanted.join("; ")))])
}

/// dracut assembles nothing that its command line does not name: what `/` and swap lie on goes into its configuration.
fn dracut(context: &Context) -> Result<Vec<Change>> {
    let has_dracut = Builder::find(context) == Some(Builder::Dracut);
    let needed = context.volumes.iter().filter(|v| is_root(v) || v.fs == Some(Fs::Swap));
    let mut words: Vec<String> = Vec::new();
    for layer in needed.flat_map(|v| v.layer.iter().chain(&v.below)).filter(|_| has_dracut) {
        let word = match layer {
            Layer::Raid { uuid, .. } => format!("rd.md.uuid={uuid}"),
            Layer::Luks { uuid, .. } => format!("rd.luks.uuid={uuid}"),
            Layer::Lvm { group, name } => format!("rd.lvm.lv={group}/{name}"),
        };
        if !words.contains(&word) {
            words.push(word);
        }
    }
    if words.is_empty() {
        let what = "what the golden node's root lay on is not on this one";
        let removed = context.root.exists(DRACUT) && context.root.remove(DRACUT)?;
        return Ok(removed.then(|| Change::new("storage", DRACUT, what)).into_iter().collect());
    }
    let words = words.join(" ");
    let text =
        format!("# Written by ka: what the root file system lies on.\nkernel_cmdline+=\" {words} \"\n");
    if context.root.read_text(DRACUT)?.as_deref() == Some(&text) {
        return Ok(Vec::new());
    }
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    context.root.make_dir("/etc/dracut.conf.d")?;
    written(context, DRACUT, &lines, vec![Change::new("storage", DRACUT, format!("now: {words}"))])
}

fn is_root(volume: &Volume) -> bool {
    volume.mount.as_ref().is_some_and(|m| m.path == "/")
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
    let what = match &wanted[..] {
        [] => format!("{} arrays of the golden node are not on this one", present.len()),
        wanted => format!("now: {}", wanted.join("; ")),
    };
    written(context, path, &lines, vec![Change::new("storage", path, what)])
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    const CRYPTTAB: &str = crypttab::FILES[0];
    const ARCH: &str = crypttab::FILES[1];

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
        drop(context);
        assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
        let spec = crate::autoconfig::names::Spec::Uuid("2222".into());
        assert!(
            lab.context().names().bearer(&spec).is_some(),
            "the check of the finished clone finds the container"
        );
        // Arch's file for the initramfs may have it instead.
        lab.file(ARCH, "b UUID=bbbb none luks\n").file(CRYPTTAB, "a UUID=1111 none luks\n");
        assert_eq!(Storage.apply(&lab.context()).unwrap().len(), 1);
        assert_eq!(
            (lab.read(ARCH).as_str(), lab.read(CRYPTTAB).as_str()),
            ("b UUID=2222 none luks\n", "a UUID=1111 none luks\n")
        );
        // What the policy keeps is not said to be changed.
        lab.order.policy.keep = vec![CRYPTTAB.into()];
        lab.file(CRYPTTAB, "a UUID=aaaa none luks\n");
        let context = lab.context();
        let changes = Storage.apply(&context).unwrap();
        assert!(changes.len() == 1 && changes[0].warning && context.stale_initramfs.borrow().is_empty());
        drop(context);
        lab.order.policy.keep.clear();
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
    fn dracut_is_told_what_to_assemble() {
        let mut lab = Lab::new();
        lab.volumes[2].layer = Some(Layer::Lvm { group: "vg0".into(), name: "root".into() });
        lab.volumes[2].device = "/dev/mapper/vg0-root".into();
        let raid = Layer::Raid { name: "md0".into(), uuid: "1:2:3:4".into(), metadata: "1.2".into() };
        lab.volumes[2].below = vec![luks("crypt", "1111"), raid.clone()];
        // As on a real node, each of them is a volume too.
        for layer in lab.volumes[2].below.clone() {
            let volume = Volume { layer: Some(layer), ..lab.volumes[1].clone() };
            lab.volumes.push(Volume { fs: None, uuid: None, below: vec![raid.clone()], ..volume });
        }
        lab.volumes[4].below.clear();
        lab.file(CRYPTTAB, "").file(MDADM[1], "");
        Storage.apply(&lab.context()).unwrap();
        assert!(!lab.exists(DRACUT), "there is no dracut");
        lab.file("/usr/bin/dracut", "");
        let context = lab.context();
        assert_eq!(Storage.apply(&context).unwrap().len(), 1);
        assert_eq!(context.stale_initramfs.borrow().len(), 1);
        drop(context);
        let now = lab.read(DRACUT);
        assert!(
            now.ends_with("kernel_cmdline+=\" rd.lvm.lv=vg0/root rd.luks.uuid=1111 rd.md.uuid=1:2:3:4 \"\n"),
            "{now}"
        );
        assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
        let cmdline = &super::super::kernel_cmdline::KernelCmdline;
        assert!(cmdline.apply(&lab.context()).unwrap().is_empty(), "all of it is on this node");
        // The next generation may lie on a plain partition.
        lab.volumes.truncate(3);
        (lab.volumes[2].layer, lab.volumes[2].below) = (None, Vec::new());
        Storage.apply(&lab.context()).unwrap();
        assert!(!lab.exists(DRACUT));
    }

    #[test]
    fn a_plain_clone_is_left_alone() {
        let lab = Lab::new();
        assert!(Storage.apply(&lab.context()).unwrap().is_empty());
        assert!(!lab.exists(CRYPTTAB) && !lab.exists(MDADM[0]));
    }
}
