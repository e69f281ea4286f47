//! The names by which an operator picks what autoconfig does on a node: the pieces, and what can be wiped. The server
//! refuses any other name before a node is touched; the agent's tests hold both lists against what it really does.

/// Every piece of the steps `configure` and `bootloader`, in the order in which they run, and the check at the end.
pub const PIECES: &[&str] = &[
    "fstab",
    "crypttab",
    "storage",
    "hostname",
    "machine-id",
    "ssh-keys",
    "leftovers",
    "wipe",
    "interfaces",
    "connections",
    "host-ids",
    "clock",
    "resume",
    "kernel-cmdline",
    "boot-entries",
    "grub-devices",
    "debconf",
    "initramfs",
    "hooks",
    "selinux",
    "bootloader",
    "verify",
];

/// What a clone keeps unless the operator asks for its removal by name.
pub const WIPES: &[&str] = &[
    "logs",
    "journal",
    "histories",
    "tmp",
    "crash",
    "package-cache",
    "mail",
    "cloud-init",
    "subscription",
    "popcon",
    "puppet",
    "salt",
    "chef",
    "krb5",
    "directory",
    "docker",
    "kubernetes",
    "tailscale",
    "zabbix",
    "abrt",
];
