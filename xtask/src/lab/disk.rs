//! A machine's disk seen from outside: its partition table read by `sfdisk`, its Linux file systems mounted read-only
//! through a loop device with an offset (this needs no partition support in the host's kernel).

use crate::run;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A partition of a disk image.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
pub struct Partition {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub size: u64,
    /// Type, a GUID in capitals or two hexadecimal digits.
    #[serde(rename = "type")]
    pub kind: String,
}

#[derive(Debug, Deserialize)]
struct Dump {
    partitiontable: Table,
}

#[derive(Debug, Deserialize)]
struct Table {
    #[serde(default)]
    sectorsize: Option<u64>,
    #[serde(default)]
    partitions: Vec<Partition>,
}

/// The types that the lab's layouts use.
pub const LINUX: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";
/// See [`LINUX`].
pub const ESP: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";

/// The partitions of a disk image.
///
/// # Errors
/// When it has no table that sfdisk understands.
pub fn partitions(image: &Path) -> Result<Vec<Partition>> {
    let text = run::output("sfdisk", &["--json", &image.display().to_string()])
        .with_context(|| format!("reading the partition table of {}", image.display()))?;
    let dump: Dump = serde_json::from_str(&text).context("parsing what sfdisk said")?;
    if let Some(size) = dump.partitiontable.sectorsize.filter(|size| *size != 512) {
        bail!("{}: sectors of {size} bytes are not expected in an image", image.display());
    }
    Ok(dump.partitiontable.partitions)
}

/// Whether a BIOS or UEFI could boot anything from it: a boot signature, a GPT header at either end, or an active MBR.
///
/// # Errors
/// When it cannot be read.
pub fn can_boot(image: &Path) -> Result<bool> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(image).with_context(|| format!("opening {}", image.display()))?;
    let length = file.metadata()?.len();
    let mut start = vec![0; 1024];
    (&file).read_exact(&mut start).with_context(|| format!("reading {}", image.display()))?;
    let mut end = vec![0; 512];
    file.read_exact_at(&mut end, length - 512)?;
    Ok(start[510..512] == [0x55, 0xaa]
        || start[512..].starts_with(b"EFI PART")
        || end.starts_with(b"EFI PART"))
}

/// A file system of a disk image, mounted read-only as long as this lives.
#[derive(Debug)]
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Mounts a partition that holds `fs`. The journal is not replayed: what is not in place does not count.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new(image: &Path, partition: &Partition, fs: &str) -> Result<Self> {
        let dir =
            tempfile::Builder::new().prefix("ka-lab-disk-").tempdir().context("making a mount point")?;
        let norecovery = match fs {
            "ext4" => ",noload",
            "xfs" => ",norecovery,nouuid",
            _ => "",
        };
        let options = format!(
            "ro,loop,offset={},sizelimit={}{norecovery}",
            partition.start * 512,
            partition.size * 512
        );
        run::quiet(
            "mount",
            &["-t", fs, "-o", &options, &image.display().to_string(), &dir.path().display().to_string()],
        )
        .with_context(|| format!("mounting a partition of {}", image.display()))?;
        Ok(Self { dir })
    }

    /// Mounts the only Linux partition.
    ///
    /// # Errors
    /// When there is none, or several.
    pub fn root(image: &Path) -> Result<Self> {
        let found: Vec<Partition> = partitions(image)?.into_iter().filter(|p| p.kind == LINUX).collect();
        match found.as_slice() {
            [root] => Self::new(image, root, "ext4"),
            _ => bail!("{} has {} Linux partitions, one was expected", image.display(), found.len()),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.path().to_path_buf()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(e) = run::quiet("umount", &[&self.dir.path().display().to_string()]) {
            eprintln!("cannot unmount {}: {e:#}", self.dir.path().display());
        }
    }
}

/// The names of a folder in the EFI system partition, read without mounting (the host may lack vfat).
///
/// # Errors
/// When there is no such partition or folder.
pub fn esp_files(image: &Path, folder: &str) -> Result<String> {
    let all = partitions(image)?;
    let esp = all.iter().find(|p| p.kind == ESP).context("no EFI system partition")?;
    let at = format!("{}@@{}", image.display(), esp.start * 512);
    run::output("mdir", &["-b", "-i", &at, &format!("::{folder}")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_disk_cannot_boot_and_a_partitioned_one_can() {
        if !Path::new("/usr/sbin/sfdisk").exists() && !Path::new("/sbin/sfdisk").exists() {
            println!("SKIPPED: no sfdisk");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        crate::lab::vm::empty_disk(&image, 64 << 20).unwrap();
        assert!(!can_boot(&image).unwrap());
        let script = "label: gpt\nstart=1MiB,size=8MiB,type=U\ntype=L\n";
        ka_sys::process::run_with_input(
            std::process::Command::new("sfdisk").args(["-q"]).arg(&image),
            script.as_bytes(),
            run::SHORT,
        )
        .unwrap();
        assert!(can_boot(&image).unwrap());
        let found = partitions(&image).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].start, found[0].kind.as_str()), (2048, ESP));
        assert_eq!(found[1].kind, LINUX);
    }
}
