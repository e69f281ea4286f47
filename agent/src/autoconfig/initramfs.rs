//! The clone's initramfs. It is built anew only when it must be, for that takes minutes on slow machines: when a driver
//! of the node's disks is missing from it, when something baked into it changed, or when policy says so.

use super::initramfs_tools::{Builder, Kernel, kernels};
use super::names::Spec;
use super::{Change, Context, Piece, entries, uki};
use anyhow::{Context as _, Result, bail};
use ka_layout::order::{self, Layer};
use std::collections::BTreeSet;
use std::path::Path;

/// Modules whose absence says nothing: they drive no disk.
const IRRELEVANT: &[&str] = &["pcieport", "shpchp", "pci_hotplug"];

/// The piece.
pub struct Initramfs;

impl Piece for Initramfs {
    fn name(&self) -> &'static str {
        "initramfs"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let policy = context.order.policy.initramfs;
        let mut reasons = context.stale_initramfs.borrow().clone();
        let disks: BTreeSet<&str> = context
            .volumes
            .iter()
            .flat_map(|v| v.more_disks.iter().chain([&v.disk]))
            .map(String::as_str)
            .collect();
        let needed = needed_modules(Path::new("/sys"), &disks, context);
        log::debug!("the node's disks need {needed:?}");
        let mut changes = Vec::new();
        let kernels = kernels(context)?;
        check_kernels(context, &kernels, &needed, &mut changes)?;
        let builder = Builder::find(context);
        if policy == order::Initramfs::Auto
            && let Some(builder) = builder
        {
            reasons.extend(missing_drivers(context, builder, &kernels, &needed)?);
        }
        if builder == Some(Builder::Dracut) {
            reasons.extend(baked_root(context));
        }
        // A unified image has its command line inside.
        for (file, options) in uki::images(context)? {
            let entry = entries::BootEntry { options, ..entries::BootEntry::default() };
            reasons.extend(entries::problems(context, &file, "/", &entry));
        }
        let reason = match policy {
            order::Initramfs::Always => "by policy".to_owned(),
            _ if reasons.is_empty() => return Ok(changes),
            order::Initramfs::Never => {
                let what = format!("not built anew, by policy, although {}", reasons.join(", "));
                changes.push(Change::warning("initramfs", "/boot", what));
                return Ok(changes);
            }
            order::Initramfs::Auto => reasons.join(", "),
        };
        let Some(builder) = builder else {
            bail!(
                "building the initramfs ({reason}): the clone has no update-initramfs, dracut or mkinitcpio; install one \
                 there"
            );
        };
        log::info!("building the initramfs anew: {reason}");
        builder.build(context, &kernels).with_context(|| format!("building the initramfs ({reason})"))?;
        let problems = if context.is_dry() { Vec::new() } else { unable(context, builder)? };
        if !problems.is_empty() {
            bail!("looking at the initramfs that was built: {}", problems.join("; "));
        }
        changes.push(Change::new("initramfs", "/boot", format!("built anew: {reason}")));
        Ok(changes)
    }
}

/// A module's name as the kernel has it: files write `-` or `_` as they like.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a path such as `kernel/drivers/nvme/host/nvme.ko.xz`.
fn module_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    Some(plain(&file[..file.find(".ko")?]))
}

/// The modules that drive the disks and their controllers, found by walking up from each disk in sysfs, and those of the
/// file systems that the clone needs to boot.
fn needed_modules(sysfs: &Path, disks: &BTreeSet<&str>, context: &Context) -> BTreeSet<String> {
    let mut needed = BTreeSet::new();
    for disk in disks {
        let Ok(mut device) = sysfs.join("class/block").join(disk.trim_start_matches("/dev/")).canonicalize()
        else {
            continue;
        };
        while device.starts_with(sysfs) && device.pop() {
            let module = device.join("driver/module").canonicalize().ok();
            if let Some(name) = module.as_deref().and_then(Path::file_name).and_then(|n| n.to_str()) {
                needed.insert(plain(name));
            }
        }
    }
    needed.extend(root_modules(context));
    needed.retain(|name| !IRRELEVANT.contains(&name.as_str()));
    needed
}

/// The modules of the file systems that the initramfs mounts, and of what they lie on.
fn root_modules(context: &Context) -> BTreeSet<String> {
    let kinds = context.early_volumes().filter_map(|v| v.fs).map(|fs| match fs.name() {
        "ext2" | "ext3" => "ext4",
        other => other,
    });
    let layers = root_layers(context).map(|layer| match layer {
        Layer::Raid { .. } => "raid1",
        Layer::Luks { .. } => "dm_crypt",
        Layer::Lvm { .. } => "dm_mod",
    });
    kinds.chain(layers).map(str::to_owned).collect()
}

/// What the root file system lies on, and `/usr`.
fn root_layers<'c>(context: &'c Context<'_>) -> impl Iterator<Item = &'c Layer> {
    context.early_volumes().flat_map(|v| v.layer.iter().chain(&v.below))
}

/// What an initramfs needs to open a layer: the names of programs one of which must be there, and what brings them.
const fn opener(layer: &Layer) -> (&'static [&'static str], &'static str) {
    match layer {
        Layer::Raid { .. } => (&["mdadm"], "mdadm, and for mkinitcpio its hook mdadm_udev"),
        Layer::Luks { .. } => (
            &["cryptsetup", "systemd-cryptsetup"],
            "cryptsetup, on Debian cryptsetup-initramfs, and for mkinitcpio its hook encrypt or sd-encrypt",
        ),
        Layer::Lvm { .. } => (&["lvm"], "lvm2, and for mkinitcpio its hook lvm2"),
    }
}

/// What an initramfs that was just built lacks to mount `/`. Where the root file system lies on a plain partition and
/// Debian's default puts every driver in, nobody looks: that would cost an unpacking of each.
fn unable(context: &Context, builder: Builder) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    if root_layers(context).next().is_none() && holds_all_drivers(context, builder)? {
        return Ok(problems);
    }
    for Kernel { version, image } in kernels(context)? {
        let Some(image) = image else { continue };
        let list = match builder.list(context, &image) {
            Ok(Some(list)) => list,
            Ok(None) => continue,
            Err(e) => {
                log::warn!("what is in the initramfs cannot be told: {e:#}");
                continue;
            }
        };
        let names: BTreeSet<&str> =
            list.split_ascii_whitespace().filter_map(|word| word.rsplit('/').next()).collect();
        for layer in root_layers(context) {
            let (programs, source) = opener(layer);
            if !programs.iter().any(|p| names.contains(p)) {
                problems.push(format!(
                    "{image} has no {}, and / or /usr lies on what it opens: the golden node needs {source}",
                    programs[0]
                ));
            }
        }
        let missing = absent(context, &version, &list, &root_modules(context))?;
        if !missing.is_empty() {
            problems.push(format!(
                "{image} lacks {}, without which / or /usr cannot be mounted",
                missing.join(", ")
            ));
        }
    }
    problems.dedup();
    Ok(problems)
}

/// Which of the modules `wanted` the kernel has, but neither built in nor in the image of which `list` says what it holds.
fn absent(context: &Context, version: &str, list: &str, wanted: &BTreeSet<String>) -> Result<Vec<String>> {
    let Some(provided) = provides(context, version)? else { return Ok(Vec::new()) };
    let builtin =
        context.root.read_text(format!("/lib/modules/{version}/modules.builtin"))?.unwrap_or_default();
    let inside: BTreeSet<String> = list.lines().chain(builtin.lines()).filter_map(module_of).collect();
    // What the kernel does not have at all was judged before.
    Ok(wanted.difference(&inside).filter(|m| provided.contains(*m)).cloned().collect())
}

/// Whether the clone's kernel has a module, built in or not; none when its modules are not listed.
fn provides(context: &Context, kernel: &str) -> Result<Option<BTreeSet<String>>> {
    let mut provided = BTreeSet::new();
    for file in ["modules.builtin", "modules.dep"] {
        let Some(text) = context.root.read_text(format!("/lib/modules/{kernel}/{file}"))? else {
            return Ok(None);
        };
        provided.extend(text.lines().filter_map(|l| module_of(l.split(':').next()?)));
    }
    Ok(Some(provided))
}

/// A kernel without a driver for the node's disk cannot boot from it, whatever its initramfs holds.
fn check_kernels(
    context: &Context,
    kernels: &[Kernel],
    needed: &BTreeSet<String>,
    changes: &mut Vec<Change>,
) -> Result<()> {
    let mut able = 0;
    let mut lacking = Vec::new();
    for kernel in kernels.iter().map(|k| k.version.as_str()) {
        let Some(provided) = provides(context, kernel)? else {
            able += 1;
            continue;
        };
        let missing: Vec<&str> = needed.difference(&provided).map(String::as_str).collect();
        if missing.is_empty() {
            able += 1;
        } else {
            lacking
                .push(format!("kernel {kernel} has no driver {} for this node's disk", missing.join(", ")));
        }
    }
    if able == 0 && !lacking.is_empty() {
        bail!(
            "checking the clone's kernels: {}; install a generic kernel on the golden node",
            lacking.join("; ")
        );
    }
    changes.extend(lacking.into_iter().map(|what| Change::warning("initramfs", "/lib/modules", what)));
    Ok(())
}

/// dracut writes the host's root into the image, unless it is told not to.
fn baked_root(context: &Context) -> Option<String> {
    let root = context.order.golden.filesystems.iter().find(|fs| fs.path.as_deref() == Some("/"))?;
    let uuid = root.uuid.as_ref()?;
    let is_here = context.names().bearer(&Spec::Uuid(uuid.clone())).is_some();
    (!is_here).then(|| format!("the golden node's root {uuid} is not on this node"))
}

/// Whether the images hold every driver, as Debian's default has it; looking would cost an unpacking of each. The others
/// put in what the golden node needed.
fn holds_all_drivers(context: &Context, builder: Builder) -> Result<bool> {
    Ok(builder == Builder::InitramfsTools
        && setting(context, "MODULES")?.as_deref().unwrap_or("most") == "most")
}

/// For each initramfs the drivers that it lacks, as reasons to build it anew.
fn missing_drivers(
    context: &Context,
    builder: Builder,
    kernels: &[Kernel],
    needed: &BTreeSet<String>,
) -> Result<Vec<String>> {
    let mut reasons = Vec::new();
    if holds_all_drivers(context, builder)? {
        return Ok(reasons);
    }
    for Kernel { version, image } in kernels {
        let Some(image) = image else { continue };
        let list = match builder.list(context, image) {
            Ok(Some(list)) => list,
            Ok(None) => continue,
            Err(e) => {
                reasons.push(format!("{e:#}"));
                continue;
            }
        };
        let missing = absent(context, version, &list, needed)?;
        if !missing.is_empty() {
            reasons.push(format!("{image} lacks {}", missing.join(", ")));
        }
    }
    Ok(reasons)
}

/// A setting of initramfs-tools; files in `conf.d` win.
fn setting(context: &Context, key: &str) -> Result<Option<String>> {
    let mut files = vec!["/etc/initramfs-tools/initramfs.conf".into()];
    files.extend(context.root.matching("/etc/initramfs-tools/conf.d", "", "")?);
    let mut value = None;
    for file in files {
        let text = context.root.read_text(&file)?.unwrap_or_default();
        let mut found = text.lines().filter_map(|l| l.trim().strip_prefix(key)?.strip_prefix('='));
        value = found.next_back().map(|v| v.trim_matches(['"', '\'']).to_owned()).or(value);
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;
    use std::os::unix::fs::symlink;

    fn lab_with_kernel(builtin: &str, dep: &str) -> Lab {
        let lab = Lab::new();
        lab.file("/boot/vmlinuz-6.1", "MZ")
            .file("/lib/modules/6.1/modules.builtin", builtin)
            .file("/lib/modules/6.1/modules.dep", dep);
        lab
    }

    #[test]
    fn drivers_are_found_up_the_device_tree() {
        let lab = Lab::new();
        let dir = lab.target.join("sys").canonicalize().unwrap_or_else(|_| lab.target.join("sys"));
        let controller = "/sys/devices/pci0000:00/0000:00:04.0";
        lab.file(&format!("{controller}/nvme/nvme0/nvme0n1/size"), "1");
        lab.file("/sys/module/nvme/x", "").file("/sys/bus/pci/drivers/nvme/x", "");
        lab.file("/sys/class/block/x", "");
        let at = |path: &str| lab.target.join(path.trim_start_matches('/'));
        symlink(at("/sys/module/nvme"), at("/sys/bus/pci/drivers/nvme/module")).unwrap();
        symlink(at("/sys/bus/pci/drivers/nvme"), at(&format!("{controller}/driver"))).unwrap();
        symlink(at(&format!("{controller}/nvme/nvme0/nvme0n1")), at("/sys/class/block/nvme0n1")).unwrap();
        let sys = dir.canonicalize().unwrap();
        let needed = needed_modules(&sys, &["/dev/nvme0n1", "/dev/none"].into(), &lab.context());
        assert_eq!(needed, ["ext4".to_owned(), "nvme".to_owned()].into());
    }

    #[test]
    fn a_kernel_without_the_driver_is_refused() {
        let needed = ["ahci".to_owned(), "ext4".to_owned()].into();
        let lab =
            lab_with_kernel("kernel/fs/ext4/ext4.ko\n", "kernel/drivers/nvme/host/nvme.ko.xz: kernel/x.ko\n");
        let context = lab.context();
        let mut changes = Vec::new();
        let versions = kernels(&context).unwrap();
        assert_eq!(versions[0].version, "6.1");
        let error = check_kernels(&context, &versions, &needed, &mut changes).unwrap_err().to_string();
        assert!(error.contains("kernel 6.1 has no driver ahci"), "{error}");

        lab.file("/boot/vmlinuz-6.2", "MZ")
            .file("/lib/modules/6.2/modules.builtin", "kernel/fs/ext4/ext4.ko\n")
            .file("/lib/modules/6.2/modules.dep", "kernel/drivers/ata/ahci.ko:\n");
        let versions = kernels(&context).unwrap();
        check_kernels(&context, &versions, &needed, &mut changes).unwrap();
        assert!(changes.len() == 1 && changes[0].warning, "{changes:?}");
    }

    #[test]
    fn an_image_made_for_the_golden_host_only_is_built_anew() {
        let builtin = "kernel/fs/ext4/ext4.ko\n";
        let dep = "kernel/drivers/nvme/host/nvme.ko.xz:\nkernel/drivers/block/virtio_blk.ko.xz:\n";
        let needed: BTreeSet<String> = ["nvme".to_owned(), "ext4".to_owned()].into();
        let lab = lab_with_kernel(builtin, dep);
        lab.file("/boot/initramfs-6.1.img", "i").file("/usr/bin/dracut", "").file("/usr/bin/lsinitrd", "");
        let list = "Image: /boot/initramfs-6.1.img: 30M\n-rw-r--r-- 1 root root 9 Jan 1 1970 usr/lib/modules/6.1/kernel/drivers/block/virtio_blk.ko.xz\n";
        let context = lab.pretending(move |_| Ok(list.to_owned()));
        let found = kernels(&context).unwrap();
        let reasons = missing_drivers(&context, Builder::Dracut, &found, &needed).unwrap();
        assert_eq!(reasons, ["/boot/initramfs-6.1.img lacks nvme"]);
        let needed = ["virtio_blk".to_owned()].into();
        assert_eq!(missing_drivers(&context, Builder::Dracut, &found, &needed).unwrap(), [""; 0]);
    }

    #[test]
    fn dracuts_image_of_another_root_is_built_anew() {
        let mut lab = lab_with_kernel("kernel/fs/ext4/ext4.ko\n", "");
        lab.file("/usr/bin/dracut", "");
        let context = lab.pretending(|_| Ok(String::new()));
        assert!(Initramfs.apply(&context).unwrap().is_empty() && context.ran().is_empty());
        drop(context);
        lab.renew(3, "11111111-2222-4333-8444-555555555555");
        let context = lab.pretending(|_| Ok(String::new()));
        assert!(Initramfs.apply(&context).unwrap()[0].what.contains("the golden node's root"));
        assert_eq!(context.ran(), ["dracut --force --no-hostonly --kver 6.1"]);
    }

    #[test]
    fn an_image_that_cannot_be_listed_is_built_anew() {
        let lab = lab_with_kernel("kernel/fs/ext4/ext4.ko\n", "");
        lab.file("/boot/initramfs-6.1.img", "torn").file("/usr/bin/dracut", "").file("/usr/bin/lsinitrd", "");
        let context = lab.pretending(|line| {
            if line.starts_with("lsinitrd") { anyhow::bail!("no cpio archive") } else { Ok(String::new()) }
        });
        assert!(Initramfs.apply(&context).unwrap()[0].what.contains("no cpio archive"));
        assert_eq!(context.ran().len(), 3, "listed, built, listed");
    }

    #[test]
    fn a_unified_image_that_names_another_root_is_built_anew() {
        let lab = lab_with_kernel("kernel/fs/ext4/ext4.ko\n", "");
        lab.file("/usr/bin/mkinitcpio", "").file("/boot/efi/EFI/Linux/x", "");
        std::fs::write(
            lab.target.join("boot/efi/EFI/Linux/arch.efi"),
            uki::image(".cmdline", "root=UUID=dead"),
        )
        .unwrap();
        let context = lab.pretending(|_| Ok(String::new()));
        let changes = Initramfs.apply(&context).unwrap();
        assert!(changes[0].what.contains("arch.efi has root="), "{changes:?}");
        assert_eq!(context.ran(), ["mkinitcpio -P"]);
    }

    #[test]
    fn an_image_that_cannot_open_the_root_is_no_success() {
        let mut lab = lab_with_kernel(
            "kernel/fs/ext4/ext4.ko\nkernel/drivers/md/dm-mod.ko\n",
            "kernel/drivers/md/dm-crypt.ko:\nkernel/drivers/md/raid1.ko:\n",
        );
        lab.file("/boot/initrd.img-6.1", "i")
            .file("/usr/sbin/update-initramfs", "")
            .file("/usr/sbin/mkinitramfs", "")
            .file("/usr/bin/lsinitramfs", "");
        lab.volumes[2].layer = Some(Layer::Lvm { group: "vg0".into(), name: "root".into() });
        let luks = Layer::Luks { name: "c".into(), uuid: "1".into(), options: "luks".into() };
        lab.volumes[2].below = vec![luks];
        let modules = "usr/lib/modules/6.1/kernel/drivers/md/dm-crypt.ko\n";
        let cases = [
            ("", "", Some("has no lvm")),
            (
                modules,
                "usr/sbin/lvm\n",
                Some("initrd.img-6.1 has no cryptsetup, and / or /usr lies on what it opens"),
            ),
            ("", "usr/sbin/lvm\nusr/sbin/cryptsetup\n", Some("initrd.img-6.1 lacks dm_crypt, without which")),
            (modules, "usr/sbin/lvm\nusr/sbin/cryptsetup\n", None),
        ];
        for (modules, programs, wanted) in cases {
            let list = format!("{modules}{programs}");
            let context = lab.pretending(move |_| Ok(list.clone()));
            context.initramfs_is_stale("the volumes of this node are new".into());
            match (Initramfs.apply(&context), wanted) {
                (Ok(changes), None) => assert_eq!(changes.len(), 1),
                (Err(e), Some(wanted)) => assert!(format!("{e:#}").contains(wanted), "{e:#}"),
                (other, wanted) => panic!("{other:?}, not {wanted:?}"),
            }
        }
        // So is one that cannot open /usr.
        let mut usr = lab.volumes[2].clone();
        usr.mount = Some(ka_layout::model::Mount { path: "/usr".into(), options: None });
        lab.volumes.push(usr);
        (lab.volumes[2].layer, lab.volumes[2].below) = (None, Vec::new());
        let context = lab.pretending(|_| Ok("usr/sbin/cryptsetup\n".into()));
        assert!(root_modules(&context).contains("dm_mod"));
        context.initramfs_is_stale("the volumes of this node are new".into());
        let error = format!("{:#}", Initramfs.apply(&context).unwrap_err());
        assert!(error.contains("has no lvm"), "{error}");
        drop(context);
        lab.volumes.pop();
        // On a plain partition nobody looks.
        (lab.volumes[2].layer, lab.volumes[2].below) = (None, Vec::new());
        let context = lab.pretending(|_| Ok(String::new()));
        context.initramfs_is_stale("the swap changed".into());
        Initramfs.apply(&context).unwrap();
        assert_eq!(context.ran(), ["update-initramfs -u -k all"]);
    }

    #[test]
    fn it_is_left_alone_unless_there_is_a_reason() {
        let mut lab = lab_with_kernel("kernel/fs/ext4/ext4.ko\n", "");
        lab.file("/etc/initramfs-tools/initramfs.conf", "MODULES=dep\n")
            .file("/etc/initramfs-tools/conf.d/driver-policy", "# x\nMODULES=most\n");
        assert_eq!(setting(&lab.context(), "MODULES").unwrap().unwrap(), "most");
        assert!(Initramfs.apply(&lab.context()).unwrap().is_empty());
        let context = lab.context();
        context.initramfs_is_stale("the swap changed".into());
        let error = Initramfs.apply(&context).unwrap_err().to_string();
        assert!(error.contains("(the swap changed)") && error.contains("no update-initramfs"), "{error}");
        drop(context);
        lab.order.policy.initramfs = order::Initramfs::Never;
        let context = lab.context();
        context.initramfs_is_stale("the swap changed".into());
        assert!(Initramfs.apply(&context).unwrap()[0].warning);
    }
}
