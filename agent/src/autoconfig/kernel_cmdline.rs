//! What the kernel and the initramfs are told on the command line about the golden node's devices, where it is
//! configured: `/etc/default/grub` and its `grub.d`, `/etc/kernel/cmdline` and the like, dracut's configuration. Boot
//! entries are rewritten by the same rules; `grub.cfg` itself is made anew when it names what is not here.

use super::names::{Meaning, Spec, name_like};
use super::{Change, Context, Piece, subvolumes};
use anyhow::Result;
use ka_layout::order::Layer;

/// The piece.
pub struct KernelCmdline;

/// The files in which kernel command lines are configured.
pub fn files(context: &Context) -> Result<Vec<String>> {
    let mut files: Vec<String> = [
        "/etc/default/grub",
        "/etc/kernel/cmdline",
        "/etc/dracut.conf",
        "/etc/default/u-boot",
        "/etc/default/extlinux",
    ]
    .map(str::to_owned)
    .into();
    let sets =
        [("/etc/default/grub.d", ".cfg"), ("/etc/cmdline.d", ".conf"), ("/etc/dracut.conf.d", ".conf")];
    for (dir, suffix) in sets {
        let parts = context.root.matching(dir, "", suffix)?;
        files.extend(parts.iter().map(|p| p.to_string_lossy().into_owned()));
    }
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
            let new = rewrite_text(context, &old, &mut done)?;
            if context.root.write_text(&file, &new, 0o644)? {
                if file.starts_with("/etc/dracut") || file.starts_with("/etc/cmdline.d") {
                    // These end up in the initramfs, or in the image that is kernel and initramfs in one.
                    context.initramfs_is_stale(format!("{file} changed"));
                }
                changes.push(Change::new("kernel-cmdline", file, done.join(", ")));
            }
        }
        Ok(changes)
    }
}

/// Rewrites the lines of a file that are no comments; what was done to each word is added to `done`.
///
/// # Errors
/// When the clone has no root file system.
pub fn rewrite_text(context: &Context, text: &str, done: &mut Vec<String>) -> Result<String> {
    let mut new = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        if line.trim_start().starts_with('#') {
            new.push_str(line);
        } else {
            new.push_str(&rewrite(context, line, done)?);
        }
    }
    Ok(new)
}

/// Rewrites the words of a line that name a device of the golden node; all else stays as it is.
pub fn rewrite(context: &Context, line: &str, done: &mut Vec<String>) -> Result<String> {
    let is_gap = |c: char| c.is_ascii_whitespace() || c == '"' || c == '\'';
    let mut out = String::with_capacity(line.len());
    // A root that lies in a subvolume now, and did not before.
    let mut flags = subvolumes::root_choice(context).filter(|_| !line.contains("rootflags="));
    for piece in line.split_inclusive(is_gap) {
        let word = piece.trim_end_matches(is_gap);
        let mut end = &piece[word.len()..];
        let with_flags = word.strip_prefix("root=").and_then(|_| flags.take()).map(|choice| {
            let whole = format!(" rootflags={choice}{end}");
            done.push(format!("rootflags={choice} added"));
            whole
        });
        end = with_flags.as_deref().unwrap_or(end);
        match replacement(context, word)? {
            Replacement::Keep => out.extend([word, end]),
            Replacement::Drop => {
                done.push(format!("{word} dropped"));
                // The blank before it goes when a quote or the line's end follows, else the one behind it.
                if end.starts_with(['"', '\'', '\n']) {
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
    let dropped_if = |lost: bool| if lost { Replacement::Drop } else { Replacement::Keep };
    match key {
        "root" | "resume" => {}
        "rootflags" | "rootfstype" => {
            return Ok(match subvolumes::root_words(context, key, value) {
                Some(words) if words == value => Replacement::Keep,
                Some(words) => Replacement::With(format!("{before}{key}={words}")),
                None => Replacement::Drop,
            });
        }
        // Where to find a file in a swap space is worth nothing in another one.
        "resume_offset" => return Ok(dropped_if(context.names().swaps().next().is_none())),
        // What dracut and mkinitcpio are to assemble before the root can be mounted; they wait for it.
        "rd.lvm.lv" => return Ok(dropped_if(!has_logical_volume(context, value))),
        "rd.lvm.vg" => {
            return Ok(dropped_if(!has_device(context, &format!("/dev/{value}/")) && !is_mapped(context)));
        }
        "rd.md.uuid" => return Ok(dropped_if(!has_array(context, value))),
        "rd.luks.uuid" | "rd.luks.name" | "cryptdevice" => {
            return Ok(match opened(context, key, value) {
                Some(words) if words == setting => Replacement::Keep,
                Some(words) => Replacement::With(format!("{before}{words}")),
                None => Replacement::Drop,
            });
        }
        _ => return Ok(Replacement::Keep),
    }
    let Some(spec) = Spec::parse(value) else { return Ok(Replacement::Keep) };
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

fn has_device(context: &Context, prefix: &str) -> bool {
    context.volumes.iter().any(|v| v.device.starts_with(prefix) || v.disk.starts_with(prefix))
}

/// Whether any volume lies on the device mapper, whose names may be of any kind.
fn is_mapped(context: &Context) -> bool {
    has_device(context, "/dev/mapper/") || has_device(context, "/dev/dm-")
}

/// Whether the node has the logical volume `group/volume`.
fn has_logical_volume(context: &Context, name: &str) -> bool {
    let Some((group, volume)) = name.split_once('/') else { return is_mapped(context) };
    let mapped = format!("/dev/mapper/{}-{}", group.replace('-', "--"), volume.replace('-', "--"));
    has_device(context, &format!("/dev/{name}"))
        || has_device(context, &mapped)
        || has_device(context, "/dev/dm-")
}

/// Whether the node has the array of this UUID; without that word all arrays are assembled.
fn has_array(context: &Context, value: &str) -> bool {
    let plain = |uuid: &str| uuid.replace([':', '-'], "").to_ascii_lowercase();
    let mut layers = context.volumes.iter().filter_map(|v| v.layer.as_ref());
    layers.any(|l| matches!(l, Layer::Raid { uuid, .. } if plain(uuid) == plain(value)))
        || (!knows_layers(context) && has_device(context, "/dev/md"))
}

/// Whether this node's volumes say what they lie on.
fn knows_layers(context: &Context) -> bool {
    context.volumes.iter().any(|v| v.layer.is_some())
}

/// What `rd.luks.uuid=luks-UUID`, `rd.luks.name=UUID=name` or `cryptdevice=UUID=uuid:name` become where containers have
/// new UUIDs: the node's container of that name, or its only one; `rd.luks.uuid`, which has no name, all of them. None
/// where the node has no such container.
fn opened(context: &Context, key: &str, value: &str) -> Option<String> {
    let device = value.split(':').next().unwrap_or_default();
    let uuid = device.strip_prefix("UUID=").unwrap_or(device);
    let bare = uuid.strip_prefix("luks-").unwrap_or(uuid).split('=').next().unwrap_or_default();
    let is_here = context.names().bearer(&Spec::Uuid(bare.to_owned())).is_some();
    if is_here || (!knows_layers(context) && is_mapped(context)) {
        return Some(format!("{key}={value}"));
    }
    let mut containers: Vec<(&str, &str)> = Vec::new();
    for volume in context.volumes {
        if let Some(Layer::Luks { name, uuid, .. }) = &volume.layer
            && !containers.contains(&(name, uuid))
        {
            containers.push((name, uuid));
        }
    }
    let named = |name: &str| {
        let only = (containers.len() == 1).then(|| containers[0]);
        containers.iter().find(|(own, _)| *own == name).copied().or(only)
    };
    match key {
        "rd.luks.uuid" => {
            let prefix = if uuid.starts_with("luks-") { "luks-" } else { "" };
            let words = containers.iter().map(|(_, uuid)| format!("rd.luks.uuid={prefix}{uuid}"));
            Some(words.collect::<Vec<_>>().join(" ")).filter(|words| !words.is_empty())
        }
        "rd.luks.name" => {
            let (name, uuid) = named(value.split_once('=')?.1)?;
            Some(format!("rd.luks.name={uuid}={name}"))
        }
        _ => {
            let mut fields = value.splitn(3, ':').skip(1);
            let (name, uuid) = named(fields.next().unwrap_or_default())?;
            let rest = fields.next().map(|options| format!(":{options}")).unwrap_or_default();
            Some(format!("{key}=UUID={uuid}:{name}{rest}"))
        }
    }
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
    fn what_is_not_to_be_assembled_here_goes() {
        let mut lab = Lab::new();
        let line = "GRUB_CMDLINE_LINUX=\"crashkernel=auto resume=/dev/mapper/rhel-swap rd.lvm.lv=rhel/root rd.lvm.lv=rhel/swap \
                    rd.md.uuid=1:2:3:4 rd.luks.uuid=luks-11111111-2222 rhgb quiet\"\n";
        lab.file(FILE, line)
            .file("/etc/dracut.conf.d/cmdline.conf", "kernel_cmdline=\"rd.luks.name=1=root ro\"\n");
        let context = lab.context();
        assert_eq!(KernelCmdline.apply(&context).unwrap().len(), 2);
        assert_eq!(context.stale_initramfs.borrow().len(), 1);
        drop(context);
        let wanted = format!("GRUB_CMDLINE_LINUX=\"crashkernel=auto resume=UUID={SWAP_UUID} rhgb quiet\"\n");
        assert_eq!(lab.read(FILE), wanted);
        assert_eq!(lab.read("/etc/dracut.conf.d/cmdline.conf"), "kernel_cmdline=\"ro\"\n");
        // On a node that has the same logical volumes they stay.
        lab.volumes[2].device = "/dev/mapper/my--vg-root".into();
        let words = "rd.lvm.lv=my-vg/root rd.luks.uuid=luks-1 ro\n";
        lab.file("/etc/kernel/cmdline", words);
        assert!(KernelCmdline.apply(&lab.context()).unwrap().is_empty());
        assert_eq!(lab.read("/etc/kernel/cmdline"), words);
    }

    #[test]
    fn containers_and_arrays_of_this_node_have_their_own_uuids() {
        let mut lab = Lab::new();
        let luks = |name: &str, uuid: &str| {
            Some(Layer::Luks { name: name.into(), uuid: uuid.into(), options: "luks".into() })
        };
        let becomes = |lab: &Lab, words: &str| {
            let mut done = Vec::new();
            let new = rewrite_text(&lab.context(), words, &mut done).unwrap();
            assert_eq!(
                rewrite_text(&lab.context(), &new, &mut Vec::new()).unwrap(),
                new,
                "a second run changes nothing"
            );
            new
        };
        lab.volumes[2].layer = luks("crypt", "1111");
        assert_eq!(
            becomes(
                &lab,
                "rd.luks.uuid=luks-dead rd.luks.name=dead=root cryptdevice=UUID=dead:root:discard rd.md.uuid=1:2 ro"
            ),
            "rd.luks.uuid=luks-1111 rd.luks.name=1111=crypt cryptdevice=UUID=1111:crypt:discard ro"
        );
        lab.volumes[1].layer = luks("swap", "2222");
        assert_eq!(becomes(&lab, "rd.luks.uuid=dead ro"), "rd.luks.uuid=2222 rd.luks.uuid=1111 ro");
        assert_eq!(
            becomes(&lab, "rd.luks.name=dead=crypt rd.luks.name=dead=other ro"),
            "rd.luks.name=1111=crypt ro"
        );
        let raid = |uuid: &str| Layer::Raid { name: "md0".into(), uuid: uuid.into(), metadata: "1.2".into() };
        (lab.volumes[1].layer, lab.volumes[2].layer) =
            (None, Some(raid("aaaaaaaa:bbbbbbbb:cccccccc:dddddddd")));
        lab.volumes[2].device = "/dev/md0".into();
        assert_eq!(
            becomes(
                &lab,
                "rd.md.uuid=1:2:3:4 rd.md.uuid=AAAAAAAA:bbbbbbbb:cccccccc:dddddddd rd.luks.uuid=luks-dead ro"
            ),
            "rd.md.uuid=AAAAAAAA:bbbbbbbb:cccccccc:dddddddd ro",
            "an old array would be waited for"
        );
    }

    #[test]
    fn the_root_is_mounted_by_its_own_subvolume() {
        let mut lab = Lab::new();
        let becomes = |lab: &Lab, words: &str| {
            let new = rewrite_text(&lab.context(), words, &mut Vec::new()).unwrap();
            let again = rewrite_text(&lab.context(), &new, &mut Vec::new()).unwrap();
            assert_eq!(again, new, "a second run changes nothing");
            new
        };
        assert_eq!(becomes(&lab, "root=LABEL=label3 rootflags=subvol=root ro"), "root=LABEL=label3 ro");
        assert_eq!(
            becomes(&lab, "rootfstype=ext4 rootflags=data=journal"),
            "rootfstype=ext4 rootflags=data=journal"
        );
        lab.volumes[2].fs = Some(Fs::Btrfs);
        let subvolume = |default| ka_layout::model::Subvolume {
            name: "@".into(),
            path: Some("/".into()),
            options: None,
            default,
        };
        lab.volumes[2].subvolume = Some(subvolume(false));
        assert_eq!(
            becomes(&lab, "root=LABEL=label3\nrootfstype=ext4 rootflags=data=journal\n"),
            "root=LABEL=label3 rootflags=subvol=@\nrootfstype=btrfs rootflags=subvol=@\n"
        );
        assert_eq!(
            becomes(&lab, "A=\"root=LABEL=label3\"\n"),
            "A=\"root=LABEL=label3 rootflags=subvol=@\"\n"
        );
        lab.order.golden.filesystems[0].fs = Fs::Btrfs;
        let mut check = |default, words: &str, wanted: &str| {
            lab.volumes[2].subvolume = Some(subvolume(default));
            assert_eq!(becomes(&lab, words), wanted);
        };
        check(
            false,
            "root=LABEL=label3 rootflags=subvol=/@,ssd",
            "root=LABEL=label3 rootflags=subvol=/@,ssd",
        );
        check(
            false,
            "root=LABEL=label3 rootflags=ssd,subvolid=256",
            "root=LABEL=label3 rootflags=ssd,subvol=@",
        );
        check(true, "root=LABEL=label3 rootflags=subvol=root ro", "root=LABEL=label3 ro");
        check(true, "root=LABEL=label3 ro", "root=LABEL=label3 ro");
    }

    #[test]
    fn cryptdevice_of_arch_goes_with_its_container() {
        let lab = Lab::new();
        lab.file("/etc/kernel/cmdline", "cryptdevice=UUID=dead:root root=/dev/mapper/root rw\n");
        KernelCmdline.apply(&lab.context()).unwrap();
        assert_eq!(lab.read("/etc/kernel/cmdline"), format!("root=UUID={ROOT_UUID} rw\n"));
    }

    #[test]
    fn resume_goes_with_the_swap() {
        let mut lab = Lab::new();
        lab.volumes.retain(|v| v.fs != Some(Fs::Swap));
        lab.file("/etc/kernel/cmdline", "root=LABEL=label3 resume=UUID=1\nquiet\n");
        lab.file(FILE, "A=\"quiet resume=UUID=1\"\nB=\"resume=UUID=1 quiet\"\nC=\"resume=UUID=1\"\n");
        KernelCmdline.apply(&lab.context()).unwrap();
        assert_eq!(lab.read(FILE), "A=\"quiet\"\nB=\"quiet\"\nC=\"\"\n");
        assert_eq!(lab.read("/etc/kernel/cmdline"), "root=LABEL=label3\nquiet\n", "lines stay lines");
    }
}
