//! Gathering an initramfs: everything together, in order.

use crate::firmware::{self, Firmware};
use crate::modules::{self, Choice, Index};
use crate::root::Root;
use crate::tree::{Part, Tree};
use crate::{Error, base, include, programs};
use std::path::PathBuf;

/// What is to be in it.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where kernel, modules, firmware and programs are taken from.
    pub root: Root,
    /// The kernel, as `uname -r` says.
    pub kernel: String,
    /// Which modules.
    pub modules: Choice,
    /// `ka-agent`, a static program of the building machine.
    pub agent: PathBuf,
    /// Directories to lay over it.
    pub include: Vec<PathBuf>,
    /// Bytes of firmware, at most.
    pub firmware_budget: u64,
}

/// What is in it.
#[derive(Debug)]
pub struct Assembled {
    /// The files.
    pub tree: Tree,
    /// How many modules.
    pub module_count: usize,
    /// How many modules the kernel has.
    pub modules_of_kernel: usize,
    /// Paths of programs.
    pub programs: Vec<String>,
    /// What became of firmware.
    pub firmware: Firmware,
    /// What is missing and can be lived with.
    pub warnings: Vec<String>,
}

/// Gathers the files of an initramfs.
///
/// # Errors
/// When a file cannot be read, a needed program or library is missing, or things clash.
pub fn assemble(plan: &Plan) -> Result<Assembled, Error> {
    let mut tree = Tree::new();
    let mut warnings = Vec::new();
    base::place(&mut tree, &plan.root, &mut warnings)?;
    let index = Index::read(&plan.root, &plan.kernel)?;
    let chosen = modules::choose::choose(&index, &plan.modules)?;
    let names = modules::place::place(&mut tree, &plan.root, &plan.kernel, &index, &chosen)?;
    let firmware = firmware::place(&mut tree, &plan.root, &plan.kernel, &names, plan.firmware_budget)?;
    if !firmware.left_out.is_empty() {
        warnings.push(format!("firmware left out for its size: {}", firmware.left_out.join(", ")));
    }
    let found = programs::place(&mut tree, &plan.root)?;
    warnings.extend(found.warnings);
    programs::place_agent(&mut tree, &plan.agent, found.machine)?;
    for dir in &plan.include {
        include::place(&mut tree, dir)?;
    }
    if !has_network(&tree) {
        warnings.push("there is no module of a network card: nodes will reach nobody".to_owned());
    }
    Ok(Assembled {
        module_count: chosen.modules.len(),
        modules_of_kernel: index.modules.len(),
        programs: found.taken,
        firmware,
        warnings,
        tree,
    })
}

fn has_network(tree: &Tree) -> bool {
    tree.entries().any(|(name, entry)| entry.part == Part::NetworkModules && name.contains("/drivers/net/"))
        || tree.entries().any(|(name, _)| name.contains("/drivers/net/") && name.ends_with(".ko"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{Compression, write_file};
    use crate::elf::tests::{module, program};
    use crate::programs::tests::fake_programs;
    use crate::tree::{Content, Node};
    use std::fs;
    use std::io::Write;
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    /// A small machine. `backwards` makes it in another order and with other times.
    fn machine(top: &Path, backwards: bool) -> Plan {
        let packed = |bytes: &[u8]| {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            out.write_all(bytes).unwrap();
            out.finish().unwrap()
        };
        let virtio = module(&["license=GPL", "firmware=net/virtio.bin"]);
        let failover = packed(&module(&["license=GPL"]));
        let mut files: Vec<(&str, Vec<u8>)> = vec![
            ("boot/vmlinuz-6.1", b"kernel".to_vec()),
            (
                "lib/modules/6.1/modules.dep",
                b"kernel/drivers/net/virtio_net.ko: kernel/net/core/failover.ko.gz\n\
                kernel/net/core/failover.ko.gz:\nkernel/sound/snd.ko:\n"
                    .to_vec(),
            ),
            ("lib/modules/6.1/modules.alias", b"alias virtio:d1 virtio_net\nalias snd:1 snd\n".to_vec()),
            ("lib/modules/6.1/modules.builtin", b"kernel/fs/ext4/ext4.ko\n".to_vec()),
            ("lib/modules/6.1/kernel/drivers/net/virtio_net.ko", virtio),
            ("lib/modules/6.1/kernel/net/core/failover.ko.gz", failover),
            ("lib/modules/6.1/kernel/sound/snd.ko", module(&[])),
            ("lib/firmware/net/virtio.bin", b"fw".to_vec()),
            ("etc/mke2fs.conf", b"[defaults]\n".to_vec()),
            ("agent", program(None, &[], None)),
            ("include/etc/ka/hooks.d/1", b"#!/bin/sh\n".to_vec()),
            ("include/etc/ka/hooks.d/2", b"#!/bin/sh\n".to_vec()),
        ];
        if backwards {
            files.reverse();
        }
        for (i, (name, bytes)) in files.iter().enumerate() {
            let path = top.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 * (i as u64 + 1));
            fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        }
        let mut programs = vec!["mke2fs", "mkswap", "wipefs", "blkid", "busybox", "mkfs.vfat"];
        if backwards {
            programs.reverse();
        }
        fake_programs(top, &programs);
        Plan {
            root: Root::new(top),
            kernel: "6.1".to_owned(),
            modules: Choice::parse("auto").unwrap(),
            agent: top.join("agent"),
            include: vec![top.join("include")],
            firmware_budget: 1 << 20,
        }
    }

    #[test]
    fn everything_stands_where_the_agent_looks() {
        let dir = tempfile::tempdir().unwrap();
        let built = assemble(&machine(dir.path(), false)).unwrap();
        assert_eq!((built.module_count, built.modules_of_kernel), (2, 3));
        for path in [
            "/init",
            "/sbin/mke2fs",
            "/sbin/mkfs.ext4",
            "/etc/mke2fs.conf",
            "/lib/modules/6.1/kernel/drivers/net/virtio_net.ko",
            "/lib/modules/6.1/modules.alias",
            "/lib/modules/6.1/modules.softdep",
            "/lib/firmware/net/virtio.bin",
            "/etc/ka/hooks.d/2",
            "/target",
        ] {
            assert!(built.tree.get(path).is_some(), "{path}");
        }
        let packed = built.tree.get("/lib/modules/6.1/kernel/net/core/failover.ko").unwrap();
        assert_eq!(packed.node, Node::File(Content::Bytes(module(&["license=GPL"]))));
        assert!(built.tree.get("/lib/modules/6.1/kernel/sound/snd.ko").is_none());
        assert!(built.warnings.iter().any(|w| w.contains("xfs")), "{:?}", built.warnings);
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        for how in [Compression::Zstd(3), Compression::Gzip(9)] {
            let mut images = Vec::new();
            for backwards in [false, true] {
                let dir = tempfile::tempdir().unwrap();
                let built = assemble(&machine(dir.path(), backwards)).unwrap();
                let path = dir.path().join("initrd.img");
                write_file(&built.tree, &path, how).unwrap();
                images.push(fs::read(path).unwrap());
            }
            assert!(images[0] == images[1], "{how:?}: two builds differ");
        }
    }

    #[test]
    fn without_depmod_the_error_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let plan = machine(dir.path(), false);
        fs::remove_file(dir.path().join("lib/modules/6.1/modules.dep")).unwrap();
        let error = assemble(&plan).unwrap_err().to_string();
        assert!(error.contains("`depmod -b") && error.ends_with("6.1` makes it"), "{error}");
    }
}
