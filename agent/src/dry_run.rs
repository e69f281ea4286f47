//! `ka-agent autoconfig --dry-run`: what autoconfig would change in a clone of this machine, without changing anything. The
//! tree is this machine's own (or another one that is mounted here), the facts are those of its disks, and the node is
//! thought to have the same disks.

use crate::autoconfig::{self, Context as Autoconfig, Nic};
use crate::init::facts;
use anyhow::{Context, Result};
use argh::FromArgs;
use ka_cli::exit::Exit;
use ka_layout::Stacked;
use ka_layout::model::{Fs, Layout, Mount};
use ka_layout::order::{Golden, GoldenFs, Identity, InstallOrder, Policy, Volume};
use ka_layout::pieces::{PIECES, WIPES};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// show what would be changed in a clone of this machine, and change nothing
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "autoconfig")]
pub struct Args {
    /// the golden tree, whose file systems are mounted here (default /)
    #[argh(option, arg_name = "DIR", default = "PathBuf::from(\"/\")")]
    root: PathBuf,
    /// what the node would be called
    #[argh(option, arg_name = "NAME")]
    name: String,
    /// change nothing; without it nothing is done at all, for only `ka-agent deploy` may
    #[argh(switch)]
    dry_run: bool,
    /// as if the node's file systems had UUIDs of their own
    #[argh(switch)]
    new_uuids: bool,
    /// leave this piece out (repeatable)
    #[argh(option, arg_name = "PIECE")]
    skip: Vec<String>,
    /// run this piece and only those named so (repeatable)
    #[argh(option, arg_name = "PIECE")]
    only: Vec<String>,
    /// no piece changes this file or directory (repeatable)
    #[argh(option, arg_name = "PATH")]
    keep: Vec<String>,
    /// remove this as well: logs, histories, ... (repeatable)
    #[argh(option, arg_name = "WHAT")]
    wipe: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// When this machine's disks cannot be read, or a piece fails as it would on a node.
pub fn run(args: &Args) -> Result<Exit> {
    if !args.dry_run {
        eprintln!("ka-agent: refused: say --dry-run; only `ka-agent deploy` changes anything");
        return Ok(Exit::Refused);
    }
    for (option, names, known) in
        [("--skip", &args.skip, PIECES), ("--only", &args.only, PIECES), ("--wipe", &args.wipe, WIPES)]
    {
        if let Some(name) = names.iter().find(|n| !known.contains(&n.as_str())) {
            eprintln!("ka-agent: {option} {name}: one of {}", known.join(", "));
            return Ok(Exit::Usage);
        }
    }
    let root = args.root.canonicalize().with_context(|| format!("opening --root {}", args.root.display()))?;
    let captured = ka_layout::capture::capture(Some(&root)).context("reading this machine's disks")?;
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let golden = Golden {
        hostname: read("etc/hostname").trim().to_owned(),
        os_release: os_release(&(read("etc/os-release"))),
        arch: std::env::consts::ARCH.to_owned(),
        filesystems: captured.golden_filesystems,
        used: BTreeMap::new(),
        raw: Vec::new(),
    };
    let volumes = golden
        .filesystems
        .iter()
        .map(|fs| {
            let stacked = captured.stacked.get(&fs.device);
            volume(fs, Path::new("/sys/class/block"), args.new_uuids, &captured.layout, stacked)
        })
        .collect::<Result<Vec<_>>>()?;
    let order = InstallOrder {
        deployment: "dry-run".into(),
        node: Identity { name: args.name.clone(), index: 1, mac: None, group: None },
        layout: String::new(),
        golden,
        policy: Policy {
            skip: args.skip.clone(),
            only: args.only.clone(),
            keep: args.keep.clone(),
            wipe: args.wipe.clone(),
            ..Policy::default()
        },
        hooks: Vec::new(),
        keys: BTreeMap::new(),
    };
    let nic: Option<&Nic> = None;
    let context = Autoconfig::new(&root, &order, &volumes, facts::firmware(), nic)?.dry();
    for change in autoconfig::dry_run(&context)? {
        println!("{change}");
    }
    Ok(Exit::Done)
}

/// The node's volume that a golden file system becomes.
fn volume(
    fs: &GoldenFs,
    class_block: &Path,
    new_uuids: bool,
    layout: &Layout,
    stacked: Option<&Stacked>,
) -> Result<Volume> {
    let (disks, number) = match stacked {
        Some(stacked) => (stacked.disks.clone(), String::new()),
        None => {
            let name = fs.device.trim_start_matches("/dev/");
            let sysfs = class_block.join(name);
            let place = sysfs.canonicalize().with_context(|| format!("finding {} in sysfs", fs.device))?;
            let disk = place.parent().and_then(Path::file_name).and_then(|n| n.to_str());
            let disk = disk.with_context(|| {
                format!("finding the disk of {}: {} says none", fs.device, place.display())
            })?;
            let number = std::fs::read_to_string(sysfs.join("partition")).unwrap_or_default();
            (vec![format!("/dev/{disk}")], number)
        }
    };
    let mut disks = disks.into_iter();
    let mut layers = stacked.map(|s| s.layers.clone()).unwrap_or_default().into_iter();
    let is_esp =
        fs.fs == Fs::Vfat && fs.path.as_deref().is_some_and(|p| ["/boot/efi", "/efi", "/boot"].contains(&p));
    let uuid = if new_uuids {
        let new = uuid::Uuid::new_v4().to_string();
        Some(if fs.fs == Fs::Vfat { new[..9].to_uppercase() } else { new })
    } else {
        fs.uuid.clone()
    };
    let mut subvolumes = layout.contents().flat_map(|c| c.subvolumes);
    let mut mounts = layout.contents().filter(|_| fs.fs == Fs::Btrfs).flat_map(|c| c.mounts());
    Ok(Volume {
        device: fs.device.clone(),
        disk: disks.next().with_context(|| format!("finding the disk of {}: there is none", fs.device))?,
        number: number.trim().parse().unwrap_or(1),
        kind: if is_esp { "esp" } else { "linux" }.to_owned(),
        fs: Some(fs.fs),
        uuid,
        label: fs.label.clone(),
        partuuid: fs.partuuid.clone(),
        partlabel: fs.partlabel.clone(),
        mount: fs
            .path
            .clone()
            .map(|path| Mount { options: mounts.find(|m| m.path == path).and_then(|m| m.options), path }),
        subvolume: subvolumes.find(|s| s.path.is_some() && s.path == fs.path).cloned(),
        layer: layers.next(),
        below: layers.collect(),
        more_disks: disks.collect(),
        preserved: false,
    })
}

/// The keys of `/etc/os-release`, unquoted.
fn os_release(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter(|l| !l.trim_start().starts_with('#')).filter_map(|l| l.split_once('='));
    pairs
        .map(|(key, value)| (key.trim().to_owned(), value.trim().trim_matches(['"', '\'']).to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ka_layout::order::Layer;

    #[test]
    fn a_volume_is_found_in_sysfs() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("devices/nvme0n1/nvme0n1p2");
        std::fs::create_dir_all(&part).unwrap();
        std::fs::write(part.join("partition"), "2\n").unwrap();
        let class = dir.path().join("class");
        std::fs::create_dir(&class).unwrap();
        std::os::unix::fs::symlink(&part, class.join("nvme0n1p2")).unwrap();
        let fs = GoldenFs {
            path: Some("/boot/efi".into()),
            fs: Fs::Vfat,
            device: "/dev/nvme0n1p2".into(),
            aliases: Vec::new(),
            disk_aliases: Vec::new(),
            uuid: Some("ABCD-1234".into()),
            label: None,
            partuuid: None,
            partlabel: None,
        };
        let mut layout = Layout::default();
        let found = volume(&fs, &class, false, &layout, None).unwrap();
        assert_eq!((found.disk.as_str(), found.number, found.kind.as_str()), ("/dev/nvme0n1", 2, "esp"));
        assert_eq!(found.uuid.as_deref(), Some("ABCD-1234"));
        let renewed = volume(&fs, &class, true, &layout, None).unwrap().uuid.unwrap();
        assert!(renewed.len() == 9 && renewed != "ABCD-1234", "{renewed}");
        assert!(
            volume(&GoldenFs { device: "/dev/none".into(), ..fs.clone() }, &class, false, &layout, None)
                .is_err()
        );
        // A subvolume that was captured is the node's too.
        let text = "version = 1\n[[disk]]\nname = 'd'\ntable = 'gpt'\n[[partition]]\ntype = 'linux'\nsize = 'fill'\n\
            format = { fs = 'btrfs' }\nsubvolumes = [{ name = '@', path = '/' }]\n";
        layout = ka_layout::parse::parse(text).unwrap();
        let fs = GoldenFs { path: Some("/".into()), fs: Fs::Btrfs, ..fs };
        let found = volume(&fs, &class, false, &layout, None).unwrap();
        assert_eq!(found.subvolume.unwrap().name, "@");
        assert_eq!(found.mount.unwrap().options.as_deref(), Some("subvol=@"));
        // What lies on a stack is no partition of any disk.
        let lvm = Layer::Lvm { group: "vg".into(), name: "root".into() };
        let raid = Layer::Raid { name: "0".into(), uuid: "1:2:3:4".into(), metadata: "1.2".into() };
        let stacked = Stacked {
            layers: vec![lvm.clone(), raid.clone()],
            disks: vec!["/dev/vda".into(), "/dev/vdb".into()],
        };
        let fs = GoldenFs { device: "/dev/mapper/vg-root".into(), ..fs };
        let found = volume(&fs, &class, false, &layout, Some(&stacked)).unwrap();
        assert_eq!((found.layer, found.below), (Some(lvm), vec![raid]));
        assert_eq!((found.disk.as_str(), found.more_disks), ("/dev/vda", vec!["/dev/vdb".to_owned()]));
    }

    #[test]
    fn os_release_is_read_unquoted() {
        let found = os_release("# x=y\nID=\"rocky\"\nID_LIKE='rhel centos'\nVERSION_ID=9.3\n");
        assert_eq!(
            (found["ID"].as_str(), found["ID_LIKE"].as_str(), found.len()),
            ("rocky", "rhel centos", 3)
        );
    }
}
