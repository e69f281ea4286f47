//! Everything that a fresh Debian machine lacks: packages by apt-get, the musl target by rustup or from Debian's
//! rust-src. What is there already is found without a network.

mod apt;
mod musl;

pub use apt::debian_mirror;

use crate::say;
use anyhow::{Context, Result, bail};
use std::path::Path;

/// The Rust target of everything that runs on a node or inside a golden machine.
pub const MUSL: &str = "x86_64-unknown-linux-musl";

/// What is wanted of a machine: a Debian package, and the file that shows that it is there already.
struct Need {
    package: &'static str,
    file: &'static str,
}

const fn need(package: &'static str, file: &'static str) -> Need {
    Need { package, file }
}

/// For building.
const BUILD: [Need; 3] = [
    need("gcc", "/usr/bin/gcc"),
    need("libc6-dev", "/usr/include/stdio.h"),
    need("musl-tools", "/usr/bin/musl-gcc"),
];

/// For the tests that need no virtual machine.
const TEST: [Need; 16] = [
    need("e2fsprogs", "/usr/sbin/mke2fs"),
    need("dosfstools", "/usr/sbin/mkfs.vfat"),
    need("xfsprogs", "/usr/sbin/mkfs.xfs"),
    need("btrfs-progs", "/usr/bin/btrfs"),
    need("gdisk", "/usr/sbin/sgdisk"),
    need("fdisk", "/usr/sbin/sfdisk"),
    need("libarchive-tools", "/usr/bin/bsdtar"),
    need("acl", "/usr/bin/setfacl"),
    need("attr", "/usr/bin/setfattr"),
    need("libcap2-bin", "/usr/sbin/setcap"),
    need("busybox-static", "/usr/bin/busybox"),
    need("cpio", "/usr/bin/cpio"),
    need("iproute2", "/usr/bin/ip"),
    need("dnsmasq-base", "/usr/sbin/dnsmasq"),
    need("tcpdump", "/usr/bin/tcpdump"),
    need("python3-minimal", "/usr/bin/python3"),
];

/// For the virtual machines.
const LAB: [Need; 11] = [
    need("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    need("ovmf", "/usr/share/OVMF/OVMF_CODE_4M.fd"),
    need("ipxe", "/usr/lib/ipxe/undionly.kpxe"),
    need("grub-common", "/usr/bin/grub-mkimage"),
    need("grub-efi-amd64-bin", "/usr/lib/grub/x86_64-efi/normal.mod"),
    need("debootstrap", "/usr/sbin/debootstrap"),
    need("rsync", "/usr/bin/rsync"),
    need("mtools", "/usr/bin/mdir"),
    need("openssh-client", "/usr/bin/ssh-keygen"),
    need("kmod", "/usr/bin/kmod"),
    need("zstd", "/usr/bin/zstd"),
];

/// For benchmarks: the peers.
const BENCH: [Need; 3] = [
    need("mbuffer", "/usr/bin/mbuffer"),
    need("netcat-openbsd", "/usr/bin/nc.openbsd"),
    need("udpcast", "/usr/bin/udp-sender"),
];

/// How much is to be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Building and the tests without virtual machines.
    Tests,
    /// The tests, and the virtual machines.
    Lab,
    /// The tests, and the peers with whom Ka is compared.
    Bench,
}

/// Makes this machine able to do what `scope` says, installing what is missing.
///
/// # Errors
/// Without root when something is missing: the error names the commands. With root when installing fails.
pub fn ensure(scope: Scope, log: &Path) -> Result<()> {
    let more: &[Need] = match scope {
        Scope::Tests => &[],
        Scope::Lab => &LAB,
        Scope::Bench => &BENCH,
    };
    let wanted = BUILD.iter().chain(&TEST).chain(more);
    let packages: Vec<&str> = wanted.filter(|need| !is_there(need.file)).map(|need| need.package).collect();
    let root = rustix::process::geteuid().is_root();
    if !root && (!packages.is_empty() || scope != Scope::Tests) {
        bail!(Missing(advice(&packages)));
    }
    if packages.is_empty() {
        say!("setup", "every package that is needed is there");
    } else {
        apt::install(&packages, log)?;
    }
    musl::ensure(log)
}

/// Refuses to begin when the file system of `dir` has less than `bytes` free: a lab that runs full fails an hour later, for
/// reasons that look like anything else.
///
/// # Errors
/// As said, and when the file system cannot be asked.
pub fn room(dir: &Path, bytes: u64) -> Result<()> {
    let space =
        rustix::fs::statvfs(dir).with_context(|| format!("asking for the space in {}", dir.display()))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free < bytes {
        let (free, bytes) = (ka_cli::units::show_size(free), ka_cli::units::show_size(bytes));
        bail!("{}: {free} are free there, builds and virtual disks need {bytes}", dir.display());
    }
    Ok(())
}

/// Files move between /bin and /usr/bin from one Debian to the next: both count.
fn is_there(file: &str) -> bool {
    Path::new(file).exists() || file.strip_prefix("/usr").is_some_and(|short| Path::new(short).exists())
}

/// Something must be installed by somebody who may.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Missing(String);

fn advice(packages: &[&str]) -> String {
    let mut text =
        "this needs root (network namespaces, loop devices, chroot); run it again as root".to_owned();
    if !packages.is_empty() {
        text.push_str(
            "\nwhat is missing can also be installed by hand:\n  apt-get install --no-install-recommends ",
        );
        text.push_str(&packages.join(" "));
        text.push_str(&format!("\n  rustup target add {MUSL}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_refused_at_once() {
        room(Path::new("/"), 1).unwrap();
        let error = room(Path::new("/"), u64::MAX).unwrap_err().to_string();
        assert!(error.contains("are free there"), "{error}");
        assert!(room(Path::new("/nowhere"), 1).is_err());
    }

    #[test]
    fn advice_names_the_commands() {
        let text = advice(&["ovmf", "ipxe"]);
        assert!(text.contains("apt-get install --no-install-recommends ovmf ipxe\n"), "{text}");
        assert!(!advice(&[]).contains("apt-get"));
    }

    #[test]
    fn both_places_of_a_program_count() {
        assert!(is_there("/usr/bin/sh") && !is_there("/usr/bin/no-such-program"));
    }
}
