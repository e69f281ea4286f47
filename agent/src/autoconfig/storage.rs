//! What the clone must know of the volumes that were made on this node: `/etc/crypttab` for encrypted containers, whose
//! UUIDs are new on every node, and `mdadm.conf` for arrays. Its initramfs is built anew where it must find the root on them.

use super::initramfs_tools::Builder;
use super::{Change, Context, Piece, crypttab, mkinitcpio};
use anyhow::Result;
use ka_layout::model::Fs;
use ka_layout::order::Layer;
use std::collections::BTreeSet;

/// Debian's place, and everybody else's.
const MDADM: [&str; 2] = ["/etc/mdadm/mdadm.conf", "/etc/mdadm.conf"];
/// Options of crypttab that hold whatever opens the container; those that say by what (a key file's place, a token, a header
/// elsewhere, a random key) hold for the golden machine's.
const FOR_ANY_KEY: &[&str] = &[
    "-",
    "luks",
    "discard",
    "initramfs",
    "noauto",
    "nofail",
    "timeout",
    "readonly",
    "read-only",
    "same-cpu-crypt",
    "submit-from-crypt-cpus",
    "no-read-workqueue",
    "no-write-workqueue",
    "_netdev",
    "noearly",
    "loud",
    "quiet",
    "check",
    "checkargs",
];
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
    // The initramfs of Arch has a table of its own.
    let early: Vec<&str> = if mkinitcpio::has_sd_encrypt(context)? {
        mkinitcpio::early_containers(context).into_iter().map(|(name, _)| name).collect()
    } else {
        Vec::new()
    };
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
                let (new, lost) = set_right(&lines[at], &device, options);
                if new != lines[at] {
                    lines[at] = new;
                    done.push(Change::new("storage", *path, format!("{name} is now on {device}")));
                }
                if !lost.is_empty() {
                    let what = format!(
                        "{name} is a new container, which its key from the server opens, and not the golden machine's {}",
                        lost.join(", ")
                    );
                    done.push(Change::warning("storage", *path, what));
                }
            } else if (*path == crypttab::ARCH && early.contains(&name.as_str()))
                || (*path == crypttab::FILES[0] && !found.contains(name.as_str()))
            {
                found.insert(name);
                let line = format!("{name} {device} none {options}");
                done.push(Change::new("storage", *path, format!("added: {line}")));
                lines.push(line);
            }
        }
        changes.extend(written(context, path, &lines, done)?);
    }
    Ok(changes)
}

/// The line of crypttab with this device and without what opened the golden machine's container, which comes back beside
/// it: this one knows no key but the server's, and is asked for it. Options that the layout gives replace the line's.
fn set_right(line: &str, device: &str, given: &str) -> (String, Vec<String>) {
    let (mut new, mut lost, mut rest) = (String::new(), Vec::new(), line);
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    for (i, word) in words.iter().enumerate() {
        let at = rest.find(word).unwrap_or_default();
        new.push_str(&rest[..at]);
        rest = &rest[at + word.len()..];
        match i {
            1 => new.push_str(device),
            2 if !["none", "-"].contains(word) => {
                lost.push((*word).to_owned());
                new.push_str("none");
            }
            3 => {
                let is_good = |option: &&str| {
                    let name = option.split('=').next().unwrap_or_default();
                    FOR_ANY_KEY.contains(&name) || name.starts_with("x-") || name.starts_with("perf-")
                };
                let (good, bad): (Vec<&str>, Vec<&str>) = word.split(',').partition(is_good);
                let is_lost = |o: &&str| !o.is_empty() && !given.split(',').any(|own| own == *o);
                lost.extend(bad.into_iter().filter(is_lost).map(str::to_owned));
                let own = if good.is_empty() { given.to_owned() } else { good.join(",") };
                new.push_str(if given == "luks" { &own } else { given });
            }
            _ => new.push_str(word),
        }
    }
    new.push_str(rest);
    if given != "luks" && words.len() < 4 {
        new.push_str(if words.len() < 3 { " none " } else { " " });
        new.push_str(given);
    }
    (new, lost)
}

/// Writes what was `done`; says so when the policy keeps the file as it is.
fn written(context: &Context, path: &str, lines: &[String], done: Vec<Change>) -> Result<Vec<Change>> {
    if done.is_empty() || context.root.write_text(path, &format!("{}\n", lines.join("\n")), 0o644)? {
        return Ok(done);
    }
    let wanted: Vec<&str> = done.iter().map(|c| c.what.as_str()).collect();
    Ok(vec![Change::warning("storage", path, format!("kept by policy; else: {}", wanted.join("; ")))])
}

/// dracut assembles nothing that its command line does not name: what `/`, `/usr` and swap lie on goes into its configuration.
fn dracut(context: &Context) -> Result<Vec<Change>> {
    let has_dracut = Builder::find(context) == Some(Builder::Dracut);
    let swaps = context.volumes.iter().filter(|v| v.fs == Some(Fs::Swap));
    let needed = context.early_volumes().chain(swaps);
    let mut words: Vec<String> = Vec::new();
    for layer in needed.flat_map(|v| v.layer.iter().chain(&v.below)).filter(|_| has_dracut) {
        let word = match layer {
            Layer::Raid { uuid, .. } => format!("rd.md.uuid={uuid}"),
            // Without systemd the first opens it and the second names it; with systemd, which reads neither here, dracut
            // waits for the first.
            Layer::Luks { name, uuid, .. } => format!("rd.luks.uuid={uuid} rd.luks.name={uuid}={name}"),
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
    let mut text =
        format!("# Written by ka: what the root file system lies on.\nkernel_cmdline+=\" {words} \"\n");
    if words.contains("rd.luks.") && context.root.exists(crypttab::FILES[0]) {
        // An image that is not for this host only has none, and systemd in it opens what stands there, by that name.
        text.push_str(&format!("install_items+=\" {} \"\n", crypttab::FILES[0]));
    }
    if context.root.read_text(DRACUT)?.as_deref() == Some(&text) {
        return Ok(Vec::new());
    }
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    context.root.make_dir("/etc/dracut.conf.d")?;
    written(context, DRACUT, &lines, vec![Change::new("storage", DRACUT, format!("now: {words}"))])
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
    let own = if context.root.is_dir("/etc/mdadm") { MDADM[0] } else { MDADM[1] };
    let Some(path) = path.or((!wanted.is_empty()).then_some(own)) else { return Ok(Vec::new()) };
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
    use ka_layout::model::Mount;
    use ka_layout::order::Volume;

    const CRYPTTAB: &str = crypttab::FILES[0];
    const ARCH: &str = crypttab::FILES[1];

    fn luks(name: &str, uuid: &str) -> Layer {
        Layer::Luks { name: name.into(), uuid: uuid.into(), options: "luks".into() }
    }

    #[test]
    fn containers_are_found_by_their_new_uuids() {
        let mut lab = Lab::new();
        lab.volumes[2].layer = Some(luks("a", "1111"));
        lab.volumes[1].layer = Some(luks("b", "2222"));
        lab.file(CRYPTTAB, "# x\na   UUID=aaaa  none luks\nother /dev/sda9 none nofail\n");
        let context = lab.context();
        assert_eq!(Storage.apply(&context).unwrap().len(), 2);
        assert_eq!(
            lab.read(CRYPTTAB),
            "# x\na   UUID=1111  none luks\nother /dev/sda9 none nofail\nb UUID=2222 none luks\n"
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
    fn a_new_container_is_not_opened_by_the_golden_key() {
        let cases = [
            ("/etc/keys/root.key luks,discard", "none luks,discard", "/etc/keys/root.key"),
            ("none  luks,keyscript=/bin/k,initramfs", "none  luks,initramfs", "keyscript=/bin/k"),
            ("- tpm2-device=auto,x-initrd.attach", "- x-initrd.attach", "tpm2-device=auto"),
            ("- pkcs11-uri=auto", "- luks", "pkcs11-uri=auto"),
            ("/dev/urandom swap,cipher=aes-xts-plain64", "none luks", "/dev/urandom, swap, cipher="),
            ("none luks,header=/h,tries=1,key-slot=1,timeout=9", "none luks,timeout=9", "header=/h, tries=1"),
            ("none luks,", "none luks", ""),
        ];
        for (old, wanted, told) in cases {
            let mut lab = Lab::new();
            lab.volumes[2].layer = Some(luks("a", "1111"));
            lab.file(CRYPTTAB, &format!("a\tUUID=aaaa {old}\n"));
            let changes = Storage.apply(&lab.context()).unwrap();
            assert_eq!(lab.read(CRYPTTAB), format!("a\tUUID=1111 {wanted}\n"));
            let warned = changes.iter().any(|c| c.warning && c.what.contains(told));
            assert_eq!(warned, !told.is_empty(), "{changes:?}");
            assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
        }
        // What the layout says of it goes before what the golden machine said.
        let mut lab = Lab::new();
        let options = "luks,tpm2-device=auto".to_owned();
        lab.volumes[2].layer = Some(Layer::Luks { name: "a".into(), uuid: "1111".into(), options });
        for old in ["a UUID=aaaa", "a UUID=aaaa none", "a UUID=aaaa /k luks,discard"] {
            lab.file(CRYPTTAB, &format!("{old}\n"));
            Storage.apply(&lab.context()).unwrap();
            assert_eq!(lab.read(CRYPTTAB), "a UUID=1111 none luks,tpm2-device=auto\n");
        }
        assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
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
    fn mdadms_file_is_made_where_the_distribution_has_it() {
        for (debian, path) in [(true, MDADM[0]), (false, MDADM[1])] {
            let mut lab = Lab::new();
            lab.volumes[2].layer =
                Some(Layer::Raid { name: "root".into(), uuid: "1:2:3:4".into(), metadata: "1.2".into() });
            lab.file("/etc/fstab", "");
            if debian {
                std::fs::create_dir(lab.target.join("etc/mdadm")).unwrap();
            }
            Storage.apply(&lab.context()).unwrap();
            assert_eq!(lab.read(path), "ARRAY /dev/md/root metadata=1.2 UUID=1:2:3:4\n");
        }
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
        let luks = "rd.luks.uuid=1111 rd.luks.name=1111=crypt";
        assert!(
            now.ends_with(&format!(
                "\nkernel_cmdline+=\" rd.lvm.lv=vg0/root {luks} rd.md.uuid=1:2:3:4 \"\ninstall_items+=\" /etc/crypttab \"\n"
            )),
            "{now}"
        );
        assert!(Storage.apply(&lab.context()).unwrap().is_empty(), "a second run changes nothing");
        let cmdline = &super::super::kernel_cmdline::KernelCmdline;
        assert!(cmdline.apply(&lab.context()).unwrap().is_empty(), "all of it is on this node");
        // The initramfs mounts /usr too.
        let mut usr = lab.volumes[2].clone();
        usr.mount = Some(Mount { path: "/usr".into(), options: None });
        usr.layer = Some(Layer::Lvm { group: "vg0".into(), name: "usr".into() });
        lab.volumes.push(usr);
        Storage.apply(&lab.context()).unwrap();
        assert!(lab.read(DRACUT).contains(" rd.lvm.lv=vg0/usr "), "{}", lab.read(DRACUT));
        // Without a container there is no need of crypttab.
        lab.volumes.truncate(3);
        lab.volumes[2].below.clear();
        Storage.apply(&lab.context()).unwrap();
        assert!(
            lab.read(DRACUT).ends_with("kernel_cmdline+=\" rd.lvm.lv=vg0/root \"\n"),
            "{}",
            lab.read(DRACUT)
        );
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
