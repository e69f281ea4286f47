//! Pieces by name, and the dry run.

use super::testing::{ESP_UUID, Lab, ROOT_UUID, SWAP_UUID};
use super::{LAST, LOADERS, PIECES, apply_all, dry_run, hooks};
use ka_layout::order::{Hook, HookPlace};
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn the_names_are_those_that_the_server_takes() {
    let mut names: Vec<&str> = PIECES.iter().map(|p| p.name()).collect();
    names.push(hooks::NAME);
    names.extend(LAST.iter().map(|p| p.name()));
    names.extend(LOADERS.iter().map(|p| p.name()).filter(|name| *name != "selinux"));
    names.push("verify");
    assert_eq!(names, ka_layout::pieces::PIECES);
}

#[test]
fn pieces_are_picked_and_left_out_by_name() {
    let lab = Lab::new();
    assert!(!lab.context().skips("fstab") && !lab.context().skips("verify"));
    let mut lab = Lab::new();
    lab.order.policy.only = vec!["hostname".into()];
    assert!(lab.context().skips("fstab") && !lab.context().skips("hostname"));
    assert!(!lab.context().skips("verify"), "a check changes nothing, so it always runs");
    lab.order.policy.skip = vec!["hostname".into(), "verify".into()];
    assert!(lab.context().skips("hostname") && lab.context().skips("verify"));

    let mut lab = Lab::new();
    lab.order.policy.only = vec!["hostname".into()];
    lab.file("/etc/hostname", "golden\n").file("/etc/machine-id", "0123456789abcdef0123456789abcdef\n");
    let changes = apply_all(&lab.context(), PIECES).unwrap();
    assert!(
        changes.iter().all(|c| c.piece == "hostname") && lab.read("/etc/hostname") == "node7\n",
        "{changes:?}"
    );
    assert!(lab.read("/etc/machine-id").starts_with("0123"));
}

#[test]
fn a_kept_file_is_changed_by_no_piece_and_every_change_names_its_file() {
    let mut lab = golden();
    lab.order.policy.keep = vec!["/etc/machine-id".into(), "/etc/fstab".into()];
    lab.order.policy.skip = vec!["ssh-keys".into()];
    let context = lab.pretending(|_| Ok(String::new()));
    let changes = apply_all(&context, PIECES).unwrap();
    assert_eq!(lab.read("/etc/machine-id"), "0123456789abcdef0123456789abcdef\n");
    assert!(lab.read("/etc/fstab").starts_with("/dev/sda3 "), "{}", lab.read("/etc/fstab"));
    assert!(
        changes.iter().any(|c| c.warning && c.what.starts_with("kept by policy; else: /dev/sda3 is now ")),
        "{changes:?}"
    );
    assert!(changes.iter().any(
        |c| c.to_string() == "warning: machine-id: /etc/machine-id: the golden node's is kept, by policy"
    ));
    assert!(
        !changes.is_empty() && changes.iter().all(|c| !c.file.is_empty() && !c.what.is_empty()),
        "{changes:?}"
    );
}

#[test]
fn what_a_preserved_partition_holds_is_no_pieces_business() {
    let mut lab = Lab::new();
    let random = ["/srv/lib/systemd/random-seed", "/boot/efi/loader/random-seed", "/efi/loader/random-seed"];
    random.iter().for_each(|file| {
        lab.file(file, "x");
    });
    lab.file("/srv/lib/docker/swarm/x", "x")
        .file("/srv/lib/docker/swarm/own/mine", "x")
        .file("/boot/efi/EFI/debian/y", "x")
        .file("/var/log/x.log", "x");
    std::os::unix::fs::symlink("../srv/lib", lab.target.join("var/lib")).unwrap();
    for (volume, path) in [(0, "/boot/efi"), (1, "/srv/lib/systemd"), (2, "/srv/lib/docker/swarm/own")] {
        let volume = &mut lab.volumes[volume];
        volume.mount = Some(ka_layout::model::Mount { path: path.into(), options: None });
        volume.preserved = true;
    }
    lab.order.policy.only = vec!["leftovers".into(), "wipe".into()];
    lab.order.policy.wipe = vec!["docker".into()];
    apply_all(&lab.context(), PIECES).unwrap();
    assert!(lab.exists(random[0]) && lab.exists(random[1]) && !lab.exists(random[2]));
    assert!(lab.exists("/srv/lib/docker/swarm/own/mine") && !lab.exists("/srv/lib/docker/swarm/x"));
    // The boot loader's directory on the ESP is not kept.
    assert!(lab.context().root.write("/boot/efi/EFI/debian/x", b"x", 0o644).unwrap());
    lab.volumes.iter_mut().for_each(|v| v.preserved = false);
    apply_all(&lab.context(), PIECES).unwrap();
    assert!(!lab.exists(random[0]) && !lab.exists(random[1]) && !lab.exists("/srv/lib/docker/swarm"));
}

/// A small Debian with something for most pieces to do.
fn golden() -> Lab {
    let lab = Lab::new();
    lab.file("/etc/hostname", "golden\n")
        .file("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
        .file("/etc/fstab", &format!("/dev/sda3 / ext4 defaults 0 1\nUUID={ESP_UUID} /boot/efi vfat defaults 0 1\nUUID={SWAP_UUID} none swap sw 0 0\n"))
        .file("/etc/ssh/ssh_host_rsa_key", "golden").file("/usr/sbin/sshd", "").file("/usr/bin/ssh-keygen", "")
        .file("/var/lib/systemd/random-seed", "golden")
        .file("/etc/default/grub", "GRUB_CMDLINE_LINUX=\"resume=/dev/sda2\"\n")
        .file("/etc/dracut.conf.d/x.conf", "kernel_cmdline=\"resume=/dev/sda2\"\n")
        .file("/boot/vmlinuz-6.1", "k").file("/boot/initramfs-6.1.img", "i").file("/usr/bin/dracut", "")
        .file("/boot/loader/entries/0123456789abcdef0123456789abcdef-6.1.conf", &format!("linux /vmlinuz-6.1\noptions root=UUID={ROOT_UUID}\n"))
        .file("/usr/sbin/grub-install", "").file("/usr/sbin/grub-mkconfig", "").file("/usr/lib/grub/x86_64-efi/x", "");
    lab
}

/// Every file below a directory, with its content and its time.
fn tree(dir: &Path, found: &mut BTreeMap<String, (Vec<u8>, std::time::SystemTime)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            tree(&path, found);
        } else {
            let time = path.symlink_metadata().unwrap().modified().unwrap();
            found.insert(path.display().to_string(), (std::fs::read(&path).unwrap_or_default(), time));
        }
    }
}

#[test]
fn a_dry_run_says_everything_and_changes_nothing() {
    let mut lab = golden();
    lab.order.hooks.push(Hook {
        name: "10-x".into(),
        program: b"#!/bin/sh\n".to_vec(),
        place: HookPlace::Target,
    });
    let mut before = BTreeMap::new();
    tree(&lab.target, &mut before);
    let changes = dry_run(&lab.context().dry()).unwrap();
    let mut after = BTreeMap::new();
    tree(&lab.target, &mut after);
    assert_eq!(before, after);
    let text: Vec<String> = changes.iter().map(ToString::to_string).collect();
    for wanted in [
        "fstab: /etc/fstab: /dev/sda3 is now UUID=",
        "hostname: /etc/hostname: node7 (was \"golden\")",
        "machine-id: /etc/machine-id: new: ",
        "ssh-keys: /etc/ssh/ssh_host_rsa_key: ",
        "ssh-keys: program: to be run: ssh-keygen -A",
        "leftovers: /var/lib/systemd/random-seed: deleted",
        "kernel-cmdline: /etc/default/grub: resume=/dev/sda2 is now ",
        "boot-entries: /boot/loader/entries/0123456789abcdef0123456789abcdef-6.1.conf: is now ",
        "initramfs: program: to be run: dracut --force --no-hostonly /boot/initramfs-6.1.img 6.1",
        "hooks: 10-x: to be run",
        "bootloader: program: to be run: grub-install --target=x86_64-efi --efi-directory=/boot/efi",
        "bootloader: program: to be run: grub-mkconfig -o /boot/grub/grub.cfg",
    ] {
        assert!(text.iter().any(|line| line.starts_with(wanted)), "{wanted}: {text:#?}");
    }
}
