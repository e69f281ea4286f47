//! `ka-image` as it is called: exit codes, what it writes, what it leaves alone.

// Clippy lets #[test] functions unwrap, but not the functions that they share; a panic is how a test fails.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A static program to stand in for every program of a root.
const BUSYBOX: &str = "/usr/bin/busybox";

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    /// A small root with a kernel of one module; none (and a line that says why) without a static busybox.
    fn new() -> Option<Self> {
        let bytes = match fs::read(BUSYBOX) {
            Ok(bytes) => bytes,
            Err(e) => {
                println!("SKIPPED: {BUSYBOX}: {e}");
                return None;
            }
        };
        if ka_initrd::elf::dynamic(&bytes).unwrap().interpreter.is_some() {
            println!("SKIPPED: {BUSYBOX} is not static (package busybox-static)");
            return None;
        }
        let lab = Self { dir: tempfile::tempdir().unwrap() };
        lab.write("root/boot/vmlinuz-6.1", b"kernel");
        lab.write("root/boot/config-6.1", b"CONFIG_RD_ZSTD=y\n");
        lab.write("root/lib/modules/6.1/modules.dep", b"kernel/drivers/net/virtio_net.ko:\n");
        // Any ELF file without a section .modinfo will do for a module that names no firmware.
        lab.write("root/lib/modules/6.1/kernel/drivers/net/virtio_net.ko", &bytes);
        for name in ["mke2fs", "mkswap", "wipefs", "blkid", "mkfs.vfat", "mkfs.xfs", "mkfs.btrfs", "e2fsck"] {
            lab.write(&format!("root/usr/sbin/{name}"), &bytes);
        }
        lab.write("root/usr/bin/busybox", &bytes);
        lab.write("root/etc/mke2fs.conf", b"[defaults]\n");
        lab.write("tools/undionly.kpxe", b"our own");
        Some(lab)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn run(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_ka-image"))
            .arg("build")
            .arg("--output")
            .arg(self.path("out"))
            .arg("--root")
            .arg(self.path("root"))
            .args(if words.contains(&"--agent") { &[][..] } else { &["--agent", BUSYBOX] })
            .args(["--level", "3", "--boot-tools"])
            .arg(self.path("tools"))
            .args(words)
            .output()
            .unwrap()
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_image_is_written_whole_and_again_the_same() {
    let Some(lab) = Lab::new() else { return };
    let output = lab.run(&["--append", "console=ttyS0 quiet"]);
    assert!(output.status.success(), "{}", text(&output));
    let out = lab.path("out");
    let manifest: ka_initrd::manifest::Manifest =
        serde_json::from_slice(&fs::read(out.join("image.json")).unwrap()).unwrap();
    assert_eq!((manifest.kernel.as_str(), manifest.module_count), ("6.1", 1));
    assert_eq!(manifest.append, "console=ttyS0 quiet");
    assert_eq!(manifest.compress, "zstd -3");
    let mut expected: Vec<String> = manifest.files.keys().cloned().collect();
    expected.push("image.json".to_owned());
    expected.sort();
    assert_eq!(names(&out), expected, "nothing else is left in the directory");
    for (name, info) in &manifest.files {
        let sum = Command::new("sha256sum").arg(out.join(name)).output().unwrap();
        assert!(text(&sum).starts_with(&info.sha256), "{name}: {info:?}");
        assert_eq!(fs::metadata(out.join(name)).unwrap().len(), info.size);
    }
    assert_eq!(fs::read(out.join("undionly.kpxe")).unwrap(), b"our own");
    assert_eq!(fs::read(out.join("vmlinuz")).unwrap(), b"kernel");

    let before = fs::read(out.join("initrd.img")).unwrap();
    // Files of the operator stay, boot files that this build does not have go.
    fs::write(out.join("notes.txt"), "mine").unwrap();
    if !manifest.files.contains_key("ipxe.efi") {
        fs::write(out.join("ipxe.efi"), "old").unwrap();
    }
    assert!(lab.run(&["--append", "console=ttyS0 quiet"]).status.success());
    assert!(before == fs::read(out.join("initrd.img")).unwrap(), "two builds differ");
    assert!(out.join("notes.txt").exists());
    assert_eq!(out.join("ipxe.efi").exists(), manifest.files.contains_key("ipxe.efi"));
}

#[test]
fn failures_name_their_cause_and_leave_the_old_image() {
    let Some(lab) = Lab::new() else { return };
    assert!(lab.run(&[]).status.success());
    let out = lab.path("out");
    let before = fs::read(out.join("image.json")).unwrap();
    let files = names(&out);
    for (words, cause) in [
        (&["--kernel", "9.9"][..], "there is no /lib/modules/9.9"),
        (&["--modules", "auto,nosuch"], "this kernel has no module `nosuch`"),
        (&["--agent", "/usr/bin/env"], "not a static program"),
        (&["--agent", "/nowhere"], "--agent /nowhere: there is no such file"),
        (&["--include", "/nowhere/at/all"], "listing /nowhere/at/all: No such file or directory"),
    ] {
        let output = lab.run(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {}", text(&output));
        assert!(text(&output).contains(cause), "{words:?}: {}", text(&output));
    }
    fs::remove_file(lab.path("root/usr/sbin/mke2fs")).unwrap();
    let output = lab.run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("mke2fs (package e2fsprogs)"), "{}", text(&output));
    assert_eq!(names(&out), files);
    assert!(before == fs::read(out.join("image.json")).unwrap());
}

#[test]
fn usage_errors_exit_2() {
    for words in [&["build"][..], &["build", "--output=/x", "--compress=xz"], &["nonsense"], &[]] {
        let output = Command::new(env!("CARGO_BIN_EXE_ka-image")).args(words).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {}", text(&output));
    }
}
