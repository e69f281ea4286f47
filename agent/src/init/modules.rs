//! Loading the modules that this machine needs: by the `modalias` of every device, again and again while new devices
//! appear (a bus shows its devices only when its own driver is there), and by name. The same binary also serves the
//! kernel as `/sbin/modprobe`.

use super::modindex::{Index, Load};
use anyhow::{Context, Result};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Modules that are loaded without a device asking for them; those that the image lacks are passed over. File systems and
/// their code pages are not among them: the kernel asks for those itself when something is mounted (see [`modprobe`]),
/// and most nodes need one of them only.
const BY_NAME: &[&str] = &["sd_mod", "nvme", "af_packet"];
/// The same, on machines with UEFI firmware.
const BY_NAME_UEFI: &[&str] = &["efivarfs"];

/// The modules of the running kernel, and what was done with them.
pub struct Modules {
    dir: PathBuf,
    index: Index,
    /// Module names that were loaded, or tried in vain: nothing is tried twice.
    tried: HashSet<String>,
    /// Aliases that were looked up.
    seen: HashSet<String>,
}

impl Modules {
    /// Reads the index of the running kernel's modules.
    ///
    /// # Errors
    /// When `modules.dep` is there and cannot be read. Without one (everything built in), the index is empty.
    pub fn open() -> Result<Self> {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Self::open_in(Path::new("/lib/modules").join(release), Path::new("/etc/modprobe.d"))
    }

    fn open_in(dir: PathBuf, config: &Path) -> Result<Self> {
        let mut index = Index::default();
        index.add_dep(&read_if_there(&dir.join("modules.dep"))?);
        index.add_builtin(&read_if_there(&dir.join("modules.builtin"))?);
        index.add_config(&read_if_there(&dir.join("modules.alias"))?);
        index.add_config(&read_if_there(&dir.join("modules.softdep"))?);
        let mut files: Vec<PathBuf> = match fs::read_dir(config) {
            Ok(entries) => entries.filter_map(|e| e.ok().map(|e| e.path())).collect(),
            Err(_) => Vec::new(),
        };
        files.retain(|f| f.extension().is_some_and(|e| e == "conf"));
        files.sort();
        for file in files {
            index.add_config(&read_if_there(&file)?);
        }
        index.add_config(&config_of_cmdline(&read_if_there(Path::new("/proc/cmdline"))?));
        Ok(Self { dir, index, tried: HashSet::new(), seen: HashSet::new() })
    }

    /// How many modules the image brings.
    #[must_use]
    pub fn known(&self) -> usize {
        self.index.len()
    }

    /// Loads what every device that has appeared since the last call asks for, until nothing new appears. Returns how
    /// many modules were loaded.
    pub fn coldplug(&mut self) -> usize {
        let mut total = 0;
        // Each round needs a new alias to go on, so it ends; the bound is for a device that renames itself for ever.
        for _ in 0..20 {
            let mut aliases = Vec::new();
            collect_aliases(Path::new("/sys/devices"), 0, &mut aliases);
            aliases.retain(|alias| !self.seen.contains(alias));
            aliases.sort();
            aliases.dedup();
            if aliases.is_empty() {
                break;
            }
            for alias in aliases {
                let modules: Vec<String> =
                    self.index.for_alias(&alias).into_iter().map(ToOwned::to_owned).collect();
                for module in modules {
                    total += self.load_logged(&module, &alias);
                }
                self.seen.insert(alias);
            }
        }
        total
    }

    /// Loads the modules that no device asks for.
    pub fn load_by_name(&mut self) -> usize {
        let uefi = if Path::new("/sys/firmware/efi").exists() { BY_NAME_UEFI } else { &[] };
        BY_NAME
            .iter()
            .chain(uefi)
            .map(|name| {
                if self.index.plan(name).is_some() {
                    self.load_logged(name, "by name")
                } else {
                    log::debug!("module {name}: not in this image");
                    0
                }
            })
            .sum()
    }

    fn load_logged(&mut self, module: &str, reason: &str) -> usize {
        match self.load(module) {
            Ok(0) => 0,
            Ok(count) => {
                log::debug!("module {module}: loaded ({reason})");
                count
            }
            Err(e) => {
                log::warn!("module {module} ({reason}): {e:#}");
                0
            }
        }
    }

    /// Loads a module and what it needs. Returns how many were new to the kernel; those tried before are left alone.
    ///
    /// # Errors
    /// When there is no such module, or the kernel refuses it or one that it needs.
    pub fn load(&mut self, name: &str) -> Result<usize> {
        let plan = self.index.plan(name).with_context(|| format!("no module {name} in this image"))?;
        let mut count = 0;
        for Load { name, path, options, optional } in plan {
            if !self.tried.insert(name.clone()) {
                continue;
            }
            match ka_sys::modules::load(&self.dir.join(&path), &options) {
                Ok(new) => count += usize::from(new),
                Err(e) if optional => log::debug!("module {name} (optional): {e}"),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(count)
    }
}

/// What the kernel command line says about modules, as modprobe reads it: `module.option=value` and
/// `modprobe.blacklist=a,b`, in the syntax of `/etc/modprobe.d`.
fn config_of_cmdline(text: &str) -> String {
    let mut config = String::new();
    for (key, value) in crate::cmdline::words(text) {
        let value = value.unwrap_or_default();
        match key.split_once('.') {
            Some(("modprobe", "blacklist")) => {
                for module in value.split(',') {
                    config.push_str(&format!("blacklist {module}\n"));
                }
            }
            // A value with spaces or backslashes cannot be written in this syntax; no module wants one.
            Some((module, option)) if module != "ka" && !value.contains([' ', '\\', '\n']) => {
                let equals = if value.is_empty() { "" } else { "=" };
                config.push_str(&format!("options {module} {option}{equals}{value}\n"));
            }
            _ => {}
        }
    }
    config
}

fn read_if_there(path: &Path) -> Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

/// Every `modalias` below a directory of sysfs. Devices may vanish meanwhile, so what cannot be read is passed over.
fn collect_aliases(dir: &Path, depth: u32, found: &mut Vec<String>) {
    // Deeper than any real chain of buses; links are not followed, so there are no cycles.
    if depth > 40 {
        return;
    }
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => collect_aliases(&entry.path(), depth + 1, found),
            Ok(kind) if kind.is_file() && entry.file_name() == "modalias" => {
                if let Ok(alias) = fs::read_to_string(entry.path()) {
                    let alias = alias.trim();
                    if !alias.is_empty() {
                        found.push(alias.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
}

/// Acts as `/sbin/modprobe`, which the kernel starts when it wants a module (`modprobe -q -- fs-ext4`). Returns the exit
/// code. Options are ignored: loading quietly is all that is ever asked.
#[must_use]
pub fn modprobe(args: impl Iterator<Item = String>) -> u8 {
    let mut modules = match Modules::open() {
        Ok(modules) => modules,
        Err(e) => {
            eprintln!("modprobe: {e:#}");
            return 1;
        }
    };
    let mut failed = false;
    for name in args.filter(|arg| !arg.starts_with('-')) {
        if let Err(e) = modules.load(&name) {
            eprintln!("modprobe: {name}: {e:#}");
            failed = true;
        }
    }
    u8::from(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_read_from_files_and_config_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("modprobe.d");
        fs::create_dir(&config).unwrap();
        fs::write(dir.path().join("modules.dep"), "a.ko: b.ko\nb.ko:\n").unwrap();
        fs::write(config.join("2.conf"), "options a second").unwrap();
        fs::write(config.join("1.conf"), "options a first").unwrap();
        fs::write(config.join("3.conf.bak"), "options a third").unwrap();
        let mut modules = Modules::open_in(dir.path().to_owned(), &config).unwrap();
        assert_eq!(modules.index.plan("a").unwrap()[1].options, "first second");
        let error = format!("{:#}", modules.load("a").unwrap_err());
        assert!(error.contains("b.ko") && error.contains("No such file"), "{error}");
        assert!(format!("{:#}", modules.load("zz").unwrap_err()).contains("no module zz"));
    }

    #[test]
    fn the_kernel_command_line_gives_options() {
        let config = config_of_cmdline(
            "quiet e1000.debug=16 modprobe.blacklist=floppy,a usbcore.nousb ka.log=debug x=1",
        );
        assert_eq!(config, "options e1000 debug=16\nblacklist floppy\nblacklist a\noptions usbcore nousb\n");
    }

    #[test]
    fn a_tree_without_modules_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let modules = Modules::open_in(dir.path().join("none"), &dir.path().join("none")).unwrap();
        assert_eq!(modules.known(), 0);
    }

    #[test]
    fn aliases_are_collected_without_following_links() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("pci0/dev1");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("modalias"), "pci:x\n").unwrap();
        fs::write(dir.path().join("pci0/modalias"), "\n").unwrap();
        std::os::unix::fs::symlink(dir.path(), device.join("loop")).unwrap();
        let mut found = Vec::new();
        collect_aliases(dir.path(), 0, &mut found);
        assert_eq!(found, ["pci:x"]);
    }
}
