//! The programs that come along: the golden machine's own mkfs tools (so that what they make is what its boot loader and
//! kernel understand), the tools that look at disks, and a shell for the operator.

use crate::libraries::Libraries;
use crate::root::Root;
use crate::tree::{Content, Node, Part, Tree};
use crate::{Error, elf};
use std::collections::BTreeSet;
use std::fs;

/// A program that is looked for.
struct Wanted {
    /// Its name; it is put into `/sbin`.
    name: &'static str,
    /// The Debian package that has it.
    package: &'static str,
    /// What it is good for: a file system of a layout, or every node.
    need: Need,
    /// Other names for it.
    links: &'static [&'static str],
}

#[derive(Clone, Copy)]
enum Need {
    /// No node can be installed without it.
    Always,
    /// Needed when the root uses this kind of file system.
    For(&'static str),
    /// Nodes cannot be given these volumes without it.
    Volumes(&'static str),
    /// Good to have.
    Comfort,
}

const PROGRAMS: &[Wanted] = &[
    Wanted {
        name: "mke2fs",
        package: "e2fsprogs",
        need: Need::Always,
        links: &["mkfs.ext2", "mkfs.ext3", "mkfs.ext4"],
    },
    Wanted { name: "mkswap", package: "util-linux", need: Need::Always, links: &[] },
    Wanted { name: "wipefs", package: "util-linux", need: Need::Always, links: &[] },
    Wanted { name: "blkid", package: "util-linux", need: Need::Always, links: &[] },
    Wanted { name: "mkfs.xfs", package: "xfsprogs", need: Need::For("xfs"), links: &[] },
    Wanted { name: "mkfs.btrfs", package: "btrfs-progs", need: Need::For("btrfs"), links: &[] },
    Wanted { name: "mkfs.vfat", package: "dosfstools", need: Need::For("vfat"), links: &["mkfs.fat"] },
    // It makes subvolumes.
    Wanted { name: "btrfs", package: "btrfs-progs", need: Need::For("btrfs"), links: &[] },
    Wanted { name: "lvm", package: "lvm2", need: Need::Volumes("LVM volumes"), links: &[] },
    Wanted {
        name: "dmsetup",
        package: "dmsetup",
        need: Need::Volumes("disks that hold LVM in use"),
        links: &[],
    },
    Wanted { name: "mdadm", package: "mdadm", need: Need::Volumes("RAID arrays"), links: &[] },
    Wanted {
        name: "cryptsetup",
        package: "cryptsetup-bin",
        need: Need::Volumes("encrypted volumes"),
        links: &[],
    },
    Wanted { name: "e2fsck", package: "e2fsprogs", need: Need::Comfort, links: &[] },
];

/// Where programs are looked for.
const PLACES: [&str; 6] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin", "/usr/local/bin"];

/// What busybox is linked as, unless a real tool of that name is there. Not `modprobe`: that is the agent's.
const APPLETS: &[&str] = &[
    "sh",
    "ash",
    "awk",
    "base64",
    "basename",
    "cat",
    "chmod",
    "chown",
    "chroot",
    "clear",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "diff",
    "dirname",
    "dmesg",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "fdisk",
    "find",
    "free",
    "ftpget",
    "grep",
    "gunzip",
    "gzip",
    "halt",
    "head",
    "hexdump",
    "hostname",
    "id",
    "ifconfig",
    "insmod",
    "ip",
    "kill",
    "killall",
    "less",
    "ln",
    "ls",
    "lsmod",
    "lspci",
    "lsusb",
    "md5sum",
    "mkdir",
    "mkfifo",
    "mknod",
    "mktemp",
    "modinfo",
    "more",
    "mount",
    "mountpoint",
    "mv",
    "nc",
    "netstat",
    "nslookup",
    "od",
    "pgrep",
    "pidof",
    "ping",
    "poweroff",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "realpath",
    "reboot",
    "reset",
    "rm",
    "rmdir",
    "rmmod",
    "route",
    "sed",
    "seq",
    "setsid",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "strings",
    "stty",
    "switch_root",
    "sync",
    "tail",
    "tar",
    "tee",
    "telnet",
    "test",
    "time",
    "timeout",
    "top",
    "touch",
    "tr",
    "true",
    "truncate",
    "umount",
    "uname",
    "uniq",
    "uptime",
    "vi",
    "watch",
    "wc",
    "wget",
    "which",
    "xargs",
    "xxd",
    "yes",
    "zcat",
];
/// Applets that belong into `/sbin`.
const SYSTEM_APPLETS: [&str; 2] = ["insmod", "rmmod"];

/// What came of it.
#[derive(Debug, Default)]
pub struct Programs {
    /// Paths in the image.
    pub taken: Vec<String>,
    /// What is missing, and what that means.
    pub warnings: Vec<String>,
    /// The kind of machine they are for.
    pub machine: Option<(u16, bool)>,
}

/// Puts the programs and their libraries into `tree`.
///
/// # Errors
/// When a program that is needed is missing, with its Debian package; when a library is missing.
pub fn place(tree: &mut Tree, root: &Root) -> Result<Programs, Error> {
    let mut libraries = Libraries::new(root)?;
    let mut programs = Programs::default();
    let kinds = kinds_in_use(root)?;
    let mut missing = Vec::new();
    for wanted in PROGRAMS {
        let Wanted { name, package, need, links } = wanted;
        let Some(from) = find(root, name) else {
            match need {
                Need::For(kind) if !kinds.contains(*kind) => programs.warnings.push(format!(
                    "{name} (package {package}) is not installed: nodes cannot be given {kind} file systems"
                )),
                Need::Volumes(what) => programs.warnings.push(format!(
                    "{name} (package {package}) is not installed: nodes cannot be given {what}"
                )),
                Need::Comfort => {
                    programs.warnings.push(format!("{name} (package {package}) is not installed"));
                }
                Need::Always => missing.push(format!("{name} (package {package})")),
                Need::For(kind) => {
                    missing.push(format!("{name} (package {package}; this machine uses {kind})"));
                }
            }
            continue;
        };
        let to = format!("/sbin/{name}");
        programs.machine = libraries.add_program(tree, &from, &to, Part::Programs)?.or(programs.machine);
        for link in *links {
            tree.symlink(&format!("/sbin/{link}"), name, Part::Programs)?;
        }
        programs.taken.push(to);
    }
    if !missing.is_empty() {
        return Err(Error::Programs { root: root.path().to_path_buf(), list: missing.join(", ") });
    }
    shell(tree, root, &mut libraries, &mut programs)?;
    libraries.finish(tree)?;
    Ok(programs)
}

fn find(root: &Root, name: &str) -> Option<String> {
    PLACES.iter().map(|place| format!("{place}/{name}")).find(|path| root.file(path).is_some())
}

fn shell(
    tree: &mut Tree,
    root: &Root,
    libraries: &mut Libraries<'_>,
    programs: &mut Programs,
) -> Result<(), Error> {
    let Some(from) = find(root, "busybox") else {
        let Some(from) = find(root, "dash").or_else(|| find(root, "sh")) else {
            programs
                .warnings
                .push("there is neither busybox nor sh: no shell on a node that failed".to_owned());
            return Ok(());
        };
        programs.warnings.push(
            "busybox (package busybox-static) is not installed: the shell of a node has no tools beside it"
                .to_owned(),
        );
        libraries.add_program(tree, &from, "/bin/sh", Part::Shell)?;
        programs.taken.push("/bin/sh".to_owned());
        return Ok(());
    };
    libraries.add_program(tree, &from, "/bin/busybox", Part::Shell)?;
    programs.taken.push("/bin/busybox".to_owned());
    let bytes = root.read(&from)?;
    let names: BTreeSet<&[u8]> = bytes.split(|b| *b == 0).collect();
    for applet in APPLETS {
        // The names of its applets stand in it as a list; running it to ask would need a machine of the same kind.
        let known = names.contains(applet.as_bytes());
        let real = ["bin", "sbin"].iter().any(|dir| tree.get(&format!("/{dir}/{applet}")).is_some());
        if known && !real {
            let dir = if SYSTEM_APPLETS.contains(applet) { "sbin" } else { "bin" };
            tree.symlink(&format!("/{dir}/{applet}"), "/bin/busybox", Part::Shell)?;
        }
    }
    Ok(())
}

/// The kinds of file systems that the root uses, by its fstab, and by what is mounted when it is the running machine.
fn kinds_in_use(root: &Root) -> Result<BTreeSet<String>, Error> {
    let mut text = root.read_text("/etc/fstab")?.unwrap_or_default();
    if root.is_running_machine() {
        let mounts =
            fs::read_to_string("/proc/self/mounts").map_err(Error::io("reading", "/proc/self/mounts"))?;
        // Only what stands on a disk: an image mounted from a file says nothing of this machine's layout.
        for line in mounts.lines().filter(|l| l.starts_with("/dev/") && !l.starts_with("/dev/loop")) {
            text.push('\n');
            text.push_str(line);
        }
    }
    let kinds = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let kinds = kinds.filter_map(|line| line.split_whitespace().nth(2)).flat_map(|kinds| kinds.split(','));
    Ok(kinds.map(|kind| if kind == "msdos" { "vfat" } else { kind }.to_owned()).collect())
}

/// Puts the agent into `tree` as `/init`, `/bin/ka-agent` and `/sbin/modprobe`.
///
/// # Errors
/// When it is not a static program, or for another kind of machine than `machine`.
pub fn place_agent(
    tree: &mut Tree,
    path: &std::path::Path,
    machine: Option<(u16, bool)>,
) -> Result<(), Error> {
    let bytes = fs::read(path).map_err(Error::io("reading the agent", path))?;
    let found = elf::dynamic(&bytes).map_err(|e| Error::bad(path, e.to_string()))?;
    if found.interpreter.is_some() || !found.needed.is_empty() {
        return Err(Error::bad(
            path,
            "not a static program; ka-agent is built for x86_64-unknown-linux-musl",
        ));
    }
    if machine.is_some_and(|machine| machine != found.machine) {
        return Err(Error::bad(path, "is for another kind of machine than the programs of the root"));
    }
    tree.file("/init", 0o755, Content::of_file(path)?, Part::Agent)?;
    // The kernel itself calls modprobe when a file system or a checksum is a module; the agent is one under that name.
    tree.symlink("/sbin/modprobe", "/init", Part::Agent)?;
    tree.symlink("/bin/ka-agent", "/init", Part::Agent)
}

/// Whether the image has a shell.
#[must_use]
pub fn has_shell(tree: &Tree) -> bool {
    tree.get("/bin/sh").is_some_and(|entry| !matches!(entry.node, Node::Directory))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::elf::tests::program;
    use std::path::Path;

    /// Puts small stand-ins for the programs `names` into the root `top`.
    pub fn fake_programs(top: &Path, names: &[&str]) {
        fs::create_dir_all(top.join("usr/sbin")).unwrap();
        for name in names {
            fs::write(top.join("usr/sbin").join(name), program(None, &[], None)).unwrap();
        }
    }

    const NEEDED: [&str; 4] = ["mke2fs", "mkswap", "wipefs", "blkid"];

    #[test]
    fn missing_programs_are_errors_or_warnings() {
        let dir = tempfile::tempdir().unwrap();
        fake_programs(dir.path(), &["mke2fs", "mkswap"]);
        let error = place(&mut Tree::new(), &Root::new(dir.path())).unwrap_err().to_string();
        assert!(error.ends_with("wipefs (package util-linux), blkid (package util-linux)"), "{error}");
        fake_programs(dir.path(), &NEEDED);
        let got = place(&mut Tree::new(), &Root::new(dir.path())).unwrap();
        assert_eq!(got.taken.len(), 4);
        assert!(
            got.warnings.iter().any(|w| w.contains("mkfs.btrfs (package btrfs-progs)")),
            "{:?}",
            got.warnings
        );
        // What the machine's own fstab uses is no matter of taste.
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        fs::write(dir.path().join("etc/fstab"), "# x xfs xfs\nUUID=1 / ext4 defaults\nUUID=2 /d btrfs\n")
            .unwrap();
        let error = place(&mut Tree::new(), &Root::new(dir.path())).unwrap_err().to_string();
        assert!(error.ends_with("btrfs (package btrfs-progs; this machine uses btrfs)"), "{error}");
    }

    #[test]
    fn busybox_shadows_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fake_programs(dir.path(), &NEEDED);
        let mut busybox = program(None, &[], None);
        busybox.extend(b"\0sh\0ls\0blkid\0wipefs\0insmod\0");
        fs::write(dir.path().join("usr/sbin/busybox"), busybox).unwrap();
        let mut tree = Tree::new();
        place(&mut tree, &Root::new(dir.path())).unwrap();
        let link = Node::Symlink("/bin/busybox".into());
        assert_eq!(tree.get("/bin/sh").unwrap().node, link);
        assert_eq!(tree.get("/sbin/insmod").unwrap().node, link);
        assert!(tree.get("/bin/vi").is_none(), "this busybox has no vi");
        assert!(matches!(tree.get("/sbin/blkid").unwrap().node, Node::File(_)));
        assert!(tree.get("/bin/blkid").is_none());
        assert_eq!(tree.get("/sbin/mkfs.ext4").unwrap().node, Node::Symlink("mke2fs".into()));
        assert!(has_shell(&tree));
    }

    #[test]
    fn the_agent_must_be_static_and_of_this_machine() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ka-agent");
        let mut tree = Tree::new();
        fs::write(&path, program(Some("/lib/ld.so"), &["libc.so"], None)).unwrap();
        assert!(
            place_agent(&mut tree, &path, None).unwrap_err().to_string().contains("not a static program")
        );
        fs::write(&path, "#!/bin/sh\n").unwrap();
        assert!(place_agent(&mut tree, &path, None).is_err());
        fs::write(&path, program(None, &[], None)).unwrap();
        assert!(place_agent(&mut tree, &path, Some((183, true))).is_err());
        place_agent(&mut tree, &path, Some((62, true))).unwrap();
        assert_eq!(tree.get("/init").unwrap().mode, 0o755);
    }
}
