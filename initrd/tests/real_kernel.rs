//! An initramfs of a real Debian system, judged by depmod and by running its programs in it. The system is the directory
//! `KA_TEST_ROOT`, or the golden tree that `cargo xtask demo` made, or this machine if it has a kernel installed.

// Clippy lets #[test] functions unwrap, but not the functions that they share; a panic is how a test fails.
#![allow(clippy::unwrap_used)]

use ka_initrd::archive::{Compression, write_file};
use ka_initrd::build::{Plan, assemble};
use ka_initrd::kernel;
use ka_initrd::modules::Choice;
use ka_initrd::root::Root;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A static program to stand in for the agent.
const AGENT: &str = "/usr/bin/busybox";

fn system() -> Option<Root> {
    let given = std::env::var_os("KA_TEST_ROOT").map(PathBuf::from);
    if let Some(given) = given {
        return Some(Root::new(&given));
    }
    let golden = fs::read_dir("/var/cache/ka-lab").into_iter().flatten().filter_map(|e| Some(e.ok()?.path()));
    let mut golden: Vec<PathBuf> = golden.filter(|p| p.to_string_lossy().contains("/golden-")).collect();
    golden.sort();
    golden.push(PathBuf::from("/"));
    golden.iter().map(|p| Root::new(p)).find(|root| kernel::find(root, None).is_ok())
}

fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-c", script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{script}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn a_real_system_gives_a_complete_initramfs() {
    let Some(root) = system() else {
        println!("SKIPPED: no system with a kernel (KA_TEST_ROOT, /var/cache/ka-lab/golden-*, /)");
        return;
    };
    if !Path::new(AGENT).exists() {
        println!("SKIPPED: no {AGENT} (package busybox-static)");
        return;
    }
    let version = kernel::find(&root, None).unwrap().version;
    let plan = Plan {
        root: root.clone(),
        kernel: version.clone(),
        modules: Choice::parse("auto").unwrap(),
        agent: AGENT.into(),
        include: Vec::new(),
        firmware_budget: 8 << 20,
    };
    let built = assemble(&plan).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("initrd.img");
    let written = write_file(&built.tree, &image, Compression::Zstd(3)).unwrap();
    println!("{}: kernel {version}, {} modules, {written:?}", root.path().display(), built.module_count);
    // 24 MiB of a plain Debian 12, 33 MiB of a Debian 13 with LVM, mdadm and cryptsetup.
    assert!(written.packed < 40 << 20, "{written:?}");

    let top = dir.path().join("x");
    fs::create_dir(&top).unwrap();
    let (image, x) = (image.display(), top.display());
    shell(&format!("cd {x} && zstd -dc {image} | cpio -id --quiet"));

    // Modules: those that every node may need are there, or part of the kernel.
    let lists = top.join("usr/lib/modules").join(&version);
    let dep = fs::read_to_string(lists.join("modules.dep")).unwrap();
    let builtin = fs::read_to_string(lists.join("modules.builtin")).unwrap();
    for name in [
        "virtio_pci",
        "virtio_net",
        "virtio_blk",
        "virtio_scsi",
        "e1000",
        "e1000e",
        "igb",
        "r8169",
        "tg3",
        "ahci",
        "ata_piix",
        "nvme",
        "sd_mod",
        "megaraid_sas",
        "mpt3sas",
        "usb-storage",
        "xhci-pci",
        "ext4",
        "xfs",
        "btrfs",
        "vfat",
        "nls_ascii",
        "efivarfs",
        "crc32c_generic",
        "vmxnet3",
        "hv_netvsc",
        "sdhci-pci",
    ] {
        let file = format!("/{name}.ko");
        assert!(dep.contains(&format!("{file}:")) || builtin.contains(&file), "{name}");
    }

    // depmod: no module wants a symbol that another module of the kernel has and that was left behind.
    let unknown = shell(&format!("depmod -n -e -E /dev/null -b {x} {version} 2>&1 >/dev/null"));
    let unknown: BTreeSet<&str> = unknown.lines().filter_map(|l| l.split("unknown symbol ").nth(1)).collect();
    assert!(unknown.len() > 100, "depmod names the symbols of the kernel proper; it named {}", unknown.len());
    let symbols = root.read_text(&format!("/lib/modules/{version}/modules.symbols")).unwrap().unwrap();
    let lost: Vec<&str> = symbols
        .lines()
        .filter_map(|l| l.strip_prefix("alias symbol:")?.split(' ').next())
        .filter(|s| unknown.contains(s))
        .collect();
    assert_eq!(lost, Vec::<&str>::new());

    // depmod again: the trimmed lists say what it would say of the trimmed tree.
    let fresh = shell(&format!("depmod -n -b {x} {version} 2>/dev/null"));
    let sorted = |text: &str, start: &str, but: &str| -> BTreeSet<String> {
        let lines = text.lines().filter(|l| l.starts_with(start) && !l.starts_with(but));
        lines
            .map(|l| {
                let mut w: Vec<&str> = l.split(' ').collect();
                w.sort_unstable();
                w.join(" ")
            })
            .collect()
    };
    assert_eq!(sorted(&fresh, "kernel/", "#"), sorted(&dep, "kernel/", "#"));
    let aliases = fs::read_to_string(lists.join("modules.alias")).unwrap();
    let devices = sorted(&aliases, "alias ", "alias devname:");
    assert!(
        devices.is_subset(&sorted(&fresh, "alias ", "alias symbol:")),
        "an alias that depmod does not know"
    );

    // Programs: each finds its libraries without a cache, in a root that has nothing else.
    if Command::new("chroot")
        .args([top.as_os_str(), "/bin/busybox".as_ref(), "true".as_ref()])
        .status()
        .is_ok_and(|s| s.success())
    {
        for program in &built.programs {
            let word = match program.as_str() {
                "/sbin/mke2fs" | "/sbin/mkfs.xfs" | "/sbin/e2fsck" => "-V",
                "/sbin/mkfs.vfat" | "/bin/busybox" => "--help",
                "/sbin/lvm" => "version",
                _ => "--version",
            };
            shell(&format!("chroot {x} {program} {word} </dev/null 2>&1"));
        }
    } else {
        println!("SKIPPED: running the programs in a chroot: not root, or no busybox in the system");
    }
}
