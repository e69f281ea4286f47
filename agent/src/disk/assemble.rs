//! Making arrays, encrypted containers and LVM with the golden machine's own `mdadm`, `cryptsetup` and `lvm`, and closing
//! them again. No udev is needed: `lvm` and `cryptsetup` make their device nodes themselves. `lvm` sees nothing but what
//! the plan lies on, so that a group of the same name on another disk is no matter.

use super::stack::{Kind, VolumePlan, raid_uuid};
use super::tool;
use anyhow::{Context, Result, bail, ensure};
use ka_layout::order::Secret;
use ka_layout::stack::{Base, EXTENT, luks_offset};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Time for one call of a tool: luksFormat measures how fast the machine is, and an array that synchronizes slows it down.
const LIMIT: Duration = Duration::from_secs(1200);
/// How long device nodes may take to appear, and an array to stop.
const PATIENCE: Duration = Duration::from_secs(20);

/// The keys of encrypted containers, by name.
pub type Keys = BTreeMap<String, Secret>;

/// What was made, in order; closed in reverse when it is dropped without [`Assembled::close`].
#[derive(Default)]
pub struct Assembled {
    open: Vec<Made>,
    /// The device node of every volume.
    pub devices: BTreeMap<Base, PathBuf>,
}

enum Made {
    Raid(PathBuf),
    Luks(String),
    Group { name: String, config: String },
}

impl Drop for Assembled {
    fn drop(&mut self) {
        while let Some(made) = self.open.pop() {
            if let Err(e) = close(&made) {
                log::error!("{e:#}");
            }
        }
    }
}

/// The programs and keys that the volumes need must be there before a disk is touched.
///
/// # Errors
/// When one is missing.
pub fn check(volumes: &[VolumePlan], keys: &Keys) -> Result<()> {
    for volume in volumes {
        let program = match &volume.kind {
            Kind::Raid { .. } => "mdadm",
            Kind::Luks { .. } => "cryptsetup",
            Kind::Group { .. } | Kind::Logical { .. } => "lvm",
        };
        tool::need(program).with_context(|| format!("making {} is not possible", volume.text))?;
        if let Kind::Luks { name, .. } = &volume.kind {
            let key =
                keys.get(name).with_context(|| format!("the server sent no key for {}", volume.text))?;
            ensure!(!key.bytes().is_empty(), "the key that the server sent for {} is empty", volume.text);
        }
    }
    Ok(())
}

fn run(program: &str, words: &[&str], input: &[u8]) -> Result<String> {
    let mut command = Command::new(tool::need(program)?);
    command.args(words).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    let output = ka_sys::process::run_with_input(&mut command, input, LIMIT)?;
    Ok(output.text())
}

/// Loads a module if there is a modprobe; whether the kernel can do it is seen when it is asked to.
pub fn load(module: &str) {
    if tool::find("modprobe").is_some()
        && let Err(e) = run("modprobe", &[module], &[])
    {
        log::debug!("{e:#}");
    }
}

/// Makes all volumes. `partitions` has the device nodes of the partitions, by index.
///
/// # Errors
/// When a tool fails, with its last words; what was made before is closed again.
pub fn make(volumes: &[VolumePlan], partitions: BTreeMap<usize, PathBuf>, keys: &Keys) -> Result<Assembled> {
    let mut made = Assembled::default();
    made.devices.extend(partitions.into_iter().map(|(i, device)| (Base::Partition(i), device)));
    for volume in volumes {
        log::info!("making {}", volume.text);
        make_one(&mut made, volumes, volume, keys).with_context(|| format!("making {}", volume.text))?;
    }
    Ok(made)
}

fn make_one(made: &mut Assembled, volumes: &[VolumePlan], volume: &VolumePlan, keys: &Keys) -> Result<()> {
    let device_of = |base: &Base| made.devices.get(base).map(|d| d.display().to_string());
    let below: Vec<String> = volume.below.iter().filter_map(device_of).collect();
    let below: Vec<&str> = below.iter().map(String::as_str).collect();
    match &volume.kind {
        Kind::Raid { name, uuid, metadata } => {
            let device = make_raid(volume, name, &raid_uuid(*uuid), metadata, &below)?;
            made.open.push(Made::Raid(device.clone()));
            wait_for(&device)?;
            made.devices.insert(volume.base, device);
        }
        Kind::Luks { name, uuid, version, options, .. } => {
            load("dm_crypt");
            let key = keys.get(name).context("there is no key for it")?.bytes();
            let on = below.first().context("it lies on nothing")?;
            let (kind, uuid) = (format!("luks{version}"), uuid.to_string());
            let offset = (luks_offset(*version) / 512).to_string();
            let mut words =
                vec!["luksFormat", "--batch-mode", "--type", &kind, "--uuid", &uuid, "--offset", &offset];
            words.extend(options.iter().map(String::as_str));
            words.extend(["--key-file", "-", on]);
            run("cryptsetup", &words, key)?;
            let found = run("cryptsetup", &["luksUUID", on], &[])?;
            ensure!(found.trim() == uuid, "its UUID reads back as {}, not {uuid}", found.trim());
            run("cryptsetup", &["open", "--type", "luks", "--key-file", "-", on, name], key)
                .context("opening it")?;
            made.open.push(Made::Luks(name.clone()));
            let device = Path::new("/dev/mapper").join(name);
            wait_for(&device)?;
            made.devices.insert(volume.base, device);
        }
        Kind::Group { name } => {
            load("dm_mod");
            tidy(&Path::new("/dev").join(name))?;
            let config = lvm_config(&below);
            let mut words = vec!["pvcreate", "--config", &config, "-ff", "-y", "--dataalignment", "1m"];
            words.extend(&below);
            run("lvm", &words, &[])?;
            let mut words = vec!["vgcreate", "--config", &config, "-y", "--physicalextentsize", "4m", name];
            words.extend(&below);
            run("lvm", &words, &[])?;
            made.open.push(Made::Group { name: name.clone(), config });
        }
        Kind::Logical { group, name } => {
            let on = volume.below.first().and_then(|b| volumes.iter().find(|v| v.base == *b));
            let physical: Vec<String> = on.iter().flat_map(|v| &v.below).filter_map(device_of).collect();
            let config = lvm_config(&physical.iter().map(String::as_str).collect::<Vec<_>>());
            let extents = (volume.bytes / EXTENT).to_string();
            let words = [
                "lvcreate",
                "--config",
                &config,
                "-y",
                "-Zy",
                "-Wy",
                "--extents",
                &extents,
                "--name",
                name,
                group,
            ];
            run("lvm", &words, &[])?;
            let device = Path::new("/dev/mapper").join(mapper_name(group, name));
            wait_for(&device)?;
            made.devices.insert(volume.base, device);
        }
    }
    let Some(device) = made.devices.get(&volume.base) else { return Ok(()) };
    let file = File::open(device).with_context(|| format!("opening {}", device.display()))?;
    let bytes = ka_sys::block::size(&file).context("asking for its size")?;
    ensure!(bytes >= volume.bytes, "it has {bytes} bytes, {} were planned", volume.bytes);
    Ok(())
}

/// Arrays from this size get a record of what is being written, so that a power cut does not mean to read both disks whole:
/// older mdadm adds one by itself from here on, newer asks.
const BITMAP_FROM: u64 = 100 << 30;

fn make_raid(
    volume: &VolumePlan,
    name: &str,
    uuid: &str,
    metadata: &str,
    members: &[&str],
) -> Result<PathBuf> {
    load("md_mod");
    load("raid1");
    let device = (0..128)
        .map(|n| PathBuf::from(format!("/dev/md{n}")))
        .find(|d| d.file_name().is_some_and(|n| !Path::new("/sys/block").join(n).exists()))
        .context("there is no free number for an array")?;
    let (node, count) = (device.display().to_string(), members.len().to_string());
    let size = (volume.bytes / 1024).to_string();
    let mut words =
        vec!["--create", &node, "--run", "--level=1", "--raid-devices", &count, "--metadata", metadata];
    // Found under the same name on whatever host it is.
    words.extend(["--homehost=any", "--name", name, "--uuid", uuid, "--size", &size]);
    if volume.bytes >= BITMAP_FROM {
        words.push("--bitmap=internal");
    }
    words.extend(members);
    run("mdadm", &words, &[])?;
    Ok(device)
}

/// What makes `lvm` see `devices` only, and do without udev and without files of its own.
fn lvm_config(devices: &[&str]) -> String {
    // Names may hold `.` and `+`, which mean something in a pattern.
    let literal = |device: &str| device.replace('.', "[.]").replace('+', "[+]");
    let accepted: String = devices.iter().map(|d| format!("\"a|^{}$|\",", literal(d))).collect();
    format!(
        "devices {{ global_filter=[{accepted}\"r|.*|\"] use_devicesfile=0 obtain_device_list_from_udev=0 \
         external_device_info_source=\"none\" }} activation {{ udev_sync=0 udev_rules=0 monitoring=0 }} \
         backup {{ backup=0 archive=0 }} global {{ use_lvmpolld=0 use_lvmlockd=0 }}"
    )
}

/// Takes away the directory of a former group of the same name, in which links lead nowhere: whoever closed its volumes
/// without `lvm` and without udev left it, and `vgcreate` refuses a name that is taken in `/dev`.
fn tidy(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("listing {}", dir.display())),
    };
    for entry in entries {
        let path = entry.with_context(|| format!("listing {}", dir.display()))?.path();
        if path.is_symlink() && !path.exists() {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    fs::remove_dir(dir)
        .with_context(|| format!("removing {}, which a group of that name left", dir.display()))
}

/// The name of a logical volume below `/dev/mapper`: dashes are doubled.
fn mapper_name(group: &str, name: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), name.replace('-', "--"))
}

fn wait_for(device: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while File::open(device).is_err() {
        if Instant::now() > deadline {
            bail!("the device node {} did not appear", device.display());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn close(made: &Made) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let done = match made {
            Made::Raid(device) => run("mdadm", &["--stop", &device.display().to_string()], &[]),
            Made::Luks(name) => run("cryptsetup", &["close", name], &[]),
            Made::Group { name, config } => run("lvm", &["vgchange", "--config", config, "-an", name], &[]),
        };
        match done {
            Ok(_) => return Ok(()),
            // Whoever looked at it a moment ago lets go of it.
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(250)),
            Err(e) => {
                return Err(e).with_context(|| match made {
                    Made::Raid(device) => format!("stopping the array {}", device.display()),
                    Made::Luks(name) => format!("closing the encrypted container {name}"),
                    Made::Group { name, .. } => format!("deactivating the volume group {name}"),
                });
            }
        }
    }
}

impl Assembled {
    /// Closes everything, the last first.
    ///
    /// # Errors
    /// When something is still in use.
    pub fn close(&mut self) -> Result<()> {
        while let Some(made) = self.open.last() {
            close(made)?;
            self.open.pop();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lvm_sees_the_planned_devices_only() {
        let config = lvm_config(&["/dev/sda2", "/dev/md0"]);
        assert!(
            config.contains("global_filter=[\"a|^/dev/sda2$|\",\"a|^/dev/md0$|\",\"r|.*|\"]"),
            "{config}"
        );
        assert!(lvm_config(&["/dev/mapper/a.b+c"]).contains("a|^/dev/mapper/a[.]b[+]c$|"));
        assert_eq!(mapper_name("my-vg", "a-b"), "my--vg-a--b");
    }

    #[test]
    fn what_a_former_group_left_in_dev_goes() {
        let dev = tempfile::tempdir().unwrap();
        let group = dev.path().join("vg0");
        tidy(&group).unwrap();
        fs::create_dir(&group).unwrap();
        std::os::unix::fs::symlink("/no/such/mapper/vg0-root", group.join("root")).unwrap();
        tidy(&group).unwrap();
        assert!(!group.exists());
        // What is in use, or no group's at all, stays.
        fs::create_dir(&group).unwrap();
        fs::write(group.join("node"), "").unwrap();
        let error = format!("{:#}", tidy(&group).unwrap_err());
        assert!(error.contains("vg0, which a group of that name left"), "{error}");
        assert!(group.join("node").exists());
    }
}
