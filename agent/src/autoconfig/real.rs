//! The pieces together on the real thing: a Debian tree (`KA_DEBIAN_TREE` names it) copied to a partitioned loop device,
//! made a clone with another swap UUID, given its boot loader for BIOS, verified, unmounted and checked.

use super::testing::{Lab, ROOT_UUID, SWAP_UUID};
use super::{Change, Nic, bootloader, configure, verify};
use ka_layout::model::Fs;
use ka_layout::order::{Firmware, Hook, HookPlace};
use std::path::{Path, PathBuf};
use std::process::Command;

const NEW_SWAP: &str = "77777777-0000-4000-8000-000000000007";

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-euc", script]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A loop device with a BIOS boot partition, swap and a mounted root; all of it goes when dropped.
struct Disk {
    device: String,
    target: PathBuf,
    image: PathBuf,
}

impl Disk {
    fn make(dir: &Path) -> Self {
        // Where a run of this test is to be looked at afterwards, its disk image can be kept.
        let image = std::env::var_os("KA_KEEP_IMAGE").map_or_else(|| dir.join("disk.img"), PathBuf::from);
        let path = image.display();
        let table = "label: gpt\n start=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649\n \
                     size=64MiB, type=S\n type=L\n";
        sh(&format!("rm -f {path}; truncate -s 3G {path}; printf '{table}' | sfdisk -q {path}"));
        // The kernel may know no partition tables; it is told of each partition (BLKPG).
        let device = sh(&format!("losetup -P --find --show {path}"));
        let add = "sfdisk -d $D | sed -n 's/.*start= *\\([0-9]*\\), size= *\\([0-9]*\\),.*/\\1 \\2/p'";
        sh(&format!(
            "D={device}; n=0; {add} | while read s l; do n=$((n+1)); [ -e ${{D}}p$n ] || addpart $D $n $s $l; done"
        ));
        let target = dir.join("mounted");
        sh(&format!(
            "mkswap -q -U {NEW_SWAP} {device}p2; mkfs.ext4 -q -U {ROOT_UUID} {device}p3; mkdir {t}; mount {device}p3 {t}",
            t = target.display()
        ));
        Self { device, target, image }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let (device, target) = (&self.device, self.target.display());
        let script = format!(
            "mountpoint -q {target} && umount {target}; for n in 1 2 3; do delpart {device} $n; done; losetup -d {device}"
        );
        // A test that failed may have left any part of it undone.
        let _ = Command::new("sh").args(["-c", &script]).status();
        if std::env::var_os("KA_KEEP_IMAGE").is_none() {
            let _ = std::fs::remove_file(&self.image);
        }
    }
}

fn said(changes: &[Change], piece: &str, words: &str) {
    assert!(
        changes.iter().any(|c| c.piece == piece && c.to_string().contains(words)),
        "{piece}: {words}: {changes:#?}"
    );
}

#[test]
fn a_debian_tree_becomes_a_clone() {
    let Some(tree) = std::env::var_os("KA_DEBIAN_TREE").map(PathBuf::from) else {
        eprintln!("SKIPPED: KA_DEBIAN_TREE names no Debian tree");
        return;
    };
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::make(dir.path());
    let mounted = disk.target.display();
    sh(&format!("cp -a {}/. {mounted}/", tree.display()));

    let mut lab = Lab::new();
    lab.target.clone_from(&disk.target);
    lab.firmware = Firmware::Bios;
    let physical =
        std::fs::read_dir("/sys/class/net").unwrap().flatten().find(|e| e.path().join("device").exists());
    let interface = physical.map(|e| e.file_name().into_string().unwrap());
    lab.nic = interface.map(|interface| Nic { interface, mac: "52:54:00:12:34:56".into(), address: None });
    lab.file(
        "/etc/network/interfaces",
        "auto lo\niface lo inet loopback\nallow-hotplug ens99\niface ens99 inet dhcp\n",
    );
    lab.renew(2, NEW_SWAP);
    lab.volumes.retain(|v| v.kind != "esp");
    lab.order.golden.filesystems.retain(|fs| fs.fs != Fs::Vfat);
    for volume in &mut lab.volumes {
        volume.device = format!("{}p{}", disk.device, volume.number);
        volume.disk.clone_from(&disk.device);
    }
    let hook = b"#!/bin/sh\nset -eu\ntest $KA_TARGET = /\ntest -e /proc/self\necho $KA_NODE > /etc/from-hook\nsleep 3000 &\n";
    lab.order.hooks.push(Hook { name: "10-x".into(), program: hook.to_vec(), place: HookPlace::Target });
    lab.file(
        "/etc/fstab",
        &format!("# golden\n/dev/sda3 / ext4 errors=remount-ro 0 1\nUUID={SWAP_UUID} none swap sw 0 0\n"),
    );
    lab.file("/etc/initramfs-tools/conf.d/resume", &format!("RESUME=UUID={SWAP_UUID}\n"));
    // So that a kept image can be booted and watched.
    lab.file("/etc/default/grub.d/serial.cfg", "GRUB_CMDLINE_LINUX=console=ttyS0\nGRUB_TIMEOUT=1\n");
    lab.file("/etc/hostname", "golden\n").file("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 golden\n");
    sh(&format!(
        "chroot {mounted} sh -c 'echo grub-pc grub-pc/install_devices multiselect /dev/disk/by-id/ata-GOLDEN | \
         debconf-set-selections'; mkdir -p {mounted}/etc/ssh; cp {mounted}/etc/ssh/ssh_host_ed25519_key {}/old-key",
        dir.path().display()
    ));

    let changes = configure(&lab.context()).unwrap();
    said(&changes, "fstab", &format!("is now UUID={NEW_SWAP}"));
    said(&changes, "hostname", "node7");
    said(&changes, "machine-id", "new");
    said(&changes, "ssh-keys", "SHA256:");
    said(&changes, "resume", NEW_SWAP);
    said(&changes, "initramfs", "built anew");
    said(&changes, "debconf", &disk.device);
    said(&changes, "hooks", "10-x");
    if lab.nic.is_some() {
        said(&changes, "interfaces", "ens99 is now e");
        assert!(!lab.read("/etc/network/interfaces").contains("ens99"));
    } else {
        eprintln!("SKIPPED: interface names: this machine has no network card");
    }
    assert_eq!(lab.read("/etc/from-hook"), "node7\n");
    let old_key = std::fs::read(dir.path().join("old-key")).unwrap();
    assert_ne!(std::fs::read(disk.target.join("etc/ssh/ssh_host_ed25519_key")).unwrap(), old_key);
    assert!(lab.read("/etc/ssh/ssh_host_ed25519_key.pub").ends_with(" root@node7\n"));
    let kept = sh(&format!("debconf_get() {{ chroot {mounted} debconf-show grub-pc; }}; debconf_get"));
    assert!(kept.contains(&format!("grub-pc/install_devices: {}", disk.device)), "{kept}");

    let problem = format!("{:#}", verify(&lab.context()).unwrap_err());
    assert!(
        problem.contains("grub.cfg does not exist") && problem.contains("core.img does not exist"),
        "{problem}"
    );
    let changes = bootloader(&lab.context()).unwrap();
    said(&changes, "bootloader", "GRUB for BIOS installed");
    said(&changes, "bootloader", "made anew: there was none");
    assert!(lab.read("/boot/grub/grub.cfg").contains(&format!("root=UUID={ROOT_UUID}")));
    verify(&lab.context()).unwrap();
    let changes = bootloader(&lab.context()).unwrap();
    assert_eq!(changes.len(), 1, "the menu is not made twice: {changes:?}");

    // A loader that is damaged, or a table that was cleared, is found out.
    sh(&format!(
        "dd if={d} of={b} bs=512 count=1 status=none; dd if=/dev/zero of={d} bs=440 count=1 conv=notrunc status=none",
        d = disk.device,
        b = dir.path().join("mbr").display()
    ));
    let problem = format!("{:#}", verify(&lab.context()).unwrap_err());
    assert!(problem.contains("not GRUB's"), "{problem}");
    sh(&format!(
        "dd if={b} of={d} bs=512 count=1 conv=notrunc status=none",
        d = disk.device,
        b = dir.path().join("mbr").display()
    ));
    verify(&lab.context()).unwrap();

    // Nothing is left mounted or running, and the file system is clean.
    sh(&format!("umount {mounted} && e2fsck -fn {}p3", disk.device));
    assert!(!Path::new("/dev/disk/by-uuid").join(ROOT_UUID).exists());
}
