//! The golden machine of the lab: a Debian tree made once by `recipe.sh` and kept under `/var/cache/ka-lab`, under a name
//! that changes with the recipe.

use crate::{run, say, setup};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const RECIPE: &str = include_str!("recipe.sh");
const CACHE: &str = "/var/cache/ka-lab";
const LIMIT: Duration = Duration::from_secs(1200);

/// The golden machine's own name.
pub const HOSTNAME: &str = "golden";
/// Root's password on the golden machine and so on its clones.
pub const PASSWORD: &str = "lab";
/// The file systems that fstab and the layout name.
pub const ROOT_UUID: &str = "6b610000-1ab0-4000-8000-000000000001";
/// See [`ROOT_UUID`].
pub const SWAP_UUID: &str = "6b610000-1ab0-4000-8000-000000000002";
/// See [`ROOT_UUID`]; vfat has short ones.
pub const ESP_UUID: &str = "6B61-1AB0";

/// One layout for every kind of board: both boot loaders find their partition.
pub const LAYOUT: &str = r#"version = 1

[[disk]]
name  = "system"
match = { size = "2G-" }
table = "gpt"

[[partition]]
type = "bios-boot"
size = "1M"

[[partition]]
type   = "esp"
size   = "128M"
format = { fs = "vfat", uuid = "6B61-1AB0" }
mount  = { path = "/boot/efi", options = "umask=0077" }

[[partition]]
type   = "swap"
size   = "64M"
format = { fs = "swap", uuid = "6b610000-1ab0-4000-8000-000000000002" }

[[partition]]
type   = "linux"
size   = "fill"
format = { fs = "ext4", label = "golden", uuid = "6b610000-1ab0-4000-8000-000000000001" }
mount  = { path = "/", options = "errors=remount-ro" }
"#;

/// A kind of golden machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// For people.
    pub name: &'static str,
    suite: &'static str,
    /// Packages beyond those of every guest.
    packages: &'static str,
    /// Whether it has GRUB's menu already, as a machine has that booted by itself.
    menu: bool,
}

/// The golden machine of the demonstration and of most tests.
pub const PLAIN: Guest = Guest { name: "Debian 12", suite: "bookworm", packages: "", menu: false };
const STORAGE: &str = "lvm2 mdadm cryptsetup cryptsetup-initramfs";
/// One that can live on LVM, arrays and encrypted volumes.
pub const DEBIAN_12: Guest = Guest { packages: STORAGE, ..PLAIN };
/// See [`DEBIAN_12`].
pub const DEBIAN_13: Guest = Guest { name: "Debian 13", suite: "trixie", packages: STORAGE, menu: true };

/// A golden tree on this machine.
#[derive(Debug, Clone)]
pub struct Golden {
    /// Its root.
    pub tree: PathBuf,
    /// Its kernel's version.
    pub kernel: String,
}

impl Golden {
    /// The kernel's file.
    #[must_use]
    pub fn vmlinuz(&self) -> PathBuf {
        self.tree.join(format!("boot/vmlinuz-{}", self.kernel))
    }

    /// Its initramfs.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.tree.join(format!("boot/initrd.img-{}", self.kernel))
    }
}

/// The plain golden machine, from the cache or made now.
///
/// # Errors
/// When it cannot be made; the log says why.
pub fn get(log: &Path) -> Result<Golden> {
    get_guest(&PLAIN, log)
}

/// A golden machine, from the cache or made now.
///
/// # Errors
/// As [`get`].
pub fn get_guest(guest: &Guest, log: &Path) -> Result<Golden> {
    let tree = Path::new(CACHE).join(format!("golden-{:016x}", recipe_hash(guest)));
    if tree.exists() {
        say!("golden", "{} is there", tree.display());
    } else {
        make(guest, &tree, log)?;
    }
    let kernel = kernel_of(&tree)?;
    Ok(Golden { tree, kernel })
}

fn make(guest: &Guest, tree: &Path, log: &Path) -> Result<()> {
    let mirror = setup::debian_mirror()?;
    std::fs::create_dir_all(CACHE).with_context(|| format!("making {CACHE}"))?;
    let work = tempfile::Builder::new()
        .prefix("making-")
        .tempdir_in(CACHE)
        .with_context(|| format!("making a folder in {CACHE}"))?;
    let fresh = work.path().join("tree");
    std::fs::create_dir(&fresh).with_context(|| format!("making {}", fresh.display()))?;
    say!("golden", "making a {} machine by debootstrap (two to five minutes)", guest.name);
    let time = run::logged(
        Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"])
            .args(["bash", "-c", RECIPE, "recipe"])
            .arg(&fresh)
            .arg(&mirror)
            .env("KA_SUITE", guest.suite)
            .env("KA_PACKAGES", guest.packages)
            .env("KA_MENU", menu_word(guest))
            .env("KA_ROOT_UUID", ROOT_UUID)
            .env("KA_ESP_UUID", ESP_UUID)
            .env("KA_SWAP_UUID", SWAP_UUID)
            .env("KA_PASSWORD", PASSWORD)
            .env("KA_HOSTNAME", HOSTNAME),
        log,
        LIMIT,
    )
    .with_context(|| format!("making the golden machine, {}", guest.name))?;
    std::fs::rename(&fresh, tree).with_context(|| format!("moving it to {}", tree.display()))?;
    say!("golden", "made {} in {:.0} s", tree.display(), time.as_secs_f64());
    Ok(())
}

fn kernel_of(tree: &Path) -> Result<String> {
    let modules = tree.join("usr/lib/modules");
    let mut kernels = Vec::new();
    for entry in std::fs::read_dir(&modules).with_context(|| format!("reading {}", modules.display()))? {
        kernels.push(entry?.file_name().to_string_lossy().into_owned());
    }
    match kernels.as_slice() {
        [kernel] => Ok(kernel.clone()),
        _ => bail!("{} should hold one kernel's modules, it holds {kernels:?}", modules.display()),
    }
}

fn menu_word(guest: &Guest) -> &'static str {
    if guest.menu { "yes" } else { "no" }
}

/// FNV-1a: the same from one Rust to the next, which the standard library's hasher does not promise.
fn recipe_hash(guest: &Guest) -> u64 {
    let parts = [RECIPE, guest.suite, guest.packages, menu_word(guest), HOSTNAME, PASSWORD];
    parts
        .iter()
        .chain(&[ROOT_UUID, SWAP_UUID, ESP_UUID])
        .flat_map(|part| part.bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_kept_apart() {
        let names = [PLAIN, DEBIAN_12, DEBIAN_13].map(|guest| recipe_hash(&guest));
        assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2], "{names:?}");
    }

    #[test]
    fn layout_and_fstab_name_the_same_file_systems() {
        for uuid in [ROOT_UUID, SWAP_UUID, ESP_UUID] {
            assert!(LAYOUT.contains(uuid), "{uuid}");
        }
    }
}
