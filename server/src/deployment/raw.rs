//! Where the content of `raw` partitions comes from: the golden machine's own partition of the same PARTUUID, or the file or
//! device that `--raw` names. All of it is looked at before a node is asked for anything, and once more when it is sent.

use anyhow::{Context, Result, bail, ensure};
use ka_cli::units::show_size;
use ka_layout::model::{Layout, TableKind};
use ka_layout::order::RawContent;
use ka_layout::size::{MIB, Size};
use rustix::fs::{Advice, OFlags, fadvise, major, minor};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes read at a time.
const BLOCK: usize = 1 << 20;

/// A partition's content and where it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawSource {
    /// What the nodes are told of it.
    pub content: RawContent,
    /// The file or block device.
    pub path: PathBuf,
}

/// The sources of all raw partitions of `layout`, in its order. `given` are the words of `--raw`; a `live` golden machine is
/// this running one.
///
/// # Errors
/// When a partition has no source, or one that cannot be read, that something may write to, or that is too big for what the
/// layout gives it; or when `given` names what is not raw.
pub fn sources(layout: &Layout, given: &[String], live: bool) -> Result<Vec<RawSource>> {
    let mut named = named(layout, given)?;
    let mut all = Vec::new();
    for (index, partition) in layout.raw_partitions() {
        let part = layout.partition_text(index);
        let path = match named.remove(&index) {
            Some(path) => path,
            None => golden_device(layout, index, live).with_context(|| part.clone())?,
        };
        let (_, bytes) = open(&path).with_context(|| format!("{part}: its content"))?;
        let most = match partition.size.parse() {
            Ok(Size::Exact(bytes) | Size::Range { max: Some(bytes), .. }) => bytes.next_multiple_of(MIB),
            _ => u64::MAX,
        };
        ensure!(
            bytes <= most,
            "{part}: its content in {} has {}, but the layout gives it {} at most: {} are missing",
            path.display(),
            show_size(bytes),
            show_size(most),
            show_size(bytes - most)
        );
        // Without it, names in the clone's fstab that it brings are not known there; the blocks are sent all the same.
        let facts = ka_layout::capture::probe(&path.to_string_lossy()).unwrap_or_else(|e| {
            log::warn!("{part}: what {} holds is not known: {e}", path.display());
            BTreeMap::new()
        });
        let fact = |key: &str| facts.get(key).filter(|value| !value.is_empty()).cloned();
        let content = RawContent { index, part, bytes, uuid: fact("UUID"), label: fact("LABEL") };
        all.push(RawSource { content, path });
    }
    Ok(all)
}

/// What `--raw` names a raw partition: its `id`, else its number.
fn key(layout: &Layout, index: usize) -> String {
    let number = || layout.number_of(index).map(|n| n.to_string());
    layout.partitions.get(index).and_then(|p| p.id.clone()).or_else(number).unwrap_or_default()
}

/// The paths that `--raw` gives, by index of the partition.
fn named(layout: &Layout, given: &[String]) -> Result<BTreeMap<usize, PathBuf>> {
    let mut named = BTreeMap::new();
    for word in given {
        let split = word.split_once('=').filter(|(id, path)| !id.is_empty() && !path.is_empty());
        let (id, path) = split.with_context(|| format!("--raw {word}: ID=FILE or ID=DEVICE is meant"))?;
        let fitting: Vec<usize> =
            layout.raw_partitions().map(|(i, _)| i).filter(|i| key(layout, *i) == id).collect();
        let index = match fitting[..] {
            [index] => index,
            [] => {
                let known: Vec<String> = layout.raw_partitions().map(|(i, _)| key(layout, i)).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                bail!("--raw {word}: the layout has no raw partition {id} (those that it has: {known})");
            }
            _ => bail!(
                "--raw {word}: the layout has several raw partitions {id}: give each an `id` of its own"
            ),
        };
        ensure!(named.insert(index, path.into()).is_none(), "--raw {word}: {id} was given before");
    }
    Ok(named)
}

/// The golden machine's partition that has the PARTUUID of the layout's.
fn golden_device(layout: &Layout, index: usize, live: bool) -> Result<PathBuf> {
    let say = format!("say where it is: --raw {}=FILE|DEVICE", key(layout, index));
    ensure!(live, "raw: the golden tree is not this running machine, so its content is not known; {say}");
    let partition = &layout.partitions[index];
    let disk = layout.disk_of(partition).map(|i| &layout.disks[i]);
    let uuid = match disk {
        Some(disk) if disk.table == TableKind::Mbr => disk
            .uuid
            .as_ref()
            .zip(layout.number_of(index))
            .map(|(uuid, number)| format!("{uuid}-{number:02x}")),
        _ => partition.uuid.clone(),
    };
    let Some(uuid) = uuid.map(|uuid| uuid.to_ascii_lowercase()) else {
        bail!("raw: the layout has no uuid by which the golden machine's partition would be found; {say}");
    };
    let link = Path::new("/dev/disk/by-partuuid").join(&uuid);
    link.canonicalize().with_context(|| {
        format!(
            "raw: finding the golden machine's partition with the PARTUUID {uuid} at {} ({say})",
            link.display()
        )
    })
}

/// Opens a source for reading; its length in bytes comes with it. A block device that nobody uses stays ours while it is open:
/// nobody can mount it meanwhile.
fn open(path: &Path) -> Result<(File, u64)> {
    let opening = || format!("opening {}", path.display());
    let kind = fs::metadata(path).with_context(opening)?;
    let (file, bytes) = if kind.file_type().is_block_device() {
        let file = open_device(path, kind.rdev())?;
        let bytes =
            ka_sys::block::size(&file).with_context(|| format!("asking {} for its size", path.display()))?;
        (file, bytes)
    } else {
        ensure!(kind.is_file(), "{}: neither a file nor a block device", path.display());
        check_loops(path)?;
        let file = File::open(path).with_context(opening)?;
        let bytes = file.metadata().with_context(opening)?.len();
        (file, bytes)
    };
    ensure!(bytes > 0, "{} is empty", path.display());
    Ok((file, bytes))
}

fn open_device(path: &Path, number: u64) -> Result<File> {
    let opening = || format!("opening {}", path.display());
    let exclusive = OFlags::EXCL.bits().cast_signed();
    let busy = |e: &io::Error| e.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error());
    match File::options().read(true).custom_flags(exclusive).open(path) {
        Err(e) if busy(&e) => {
            let mounts = mounts_of(number).context("looking for what is mounted")?;
            check_read_only(path, &mounts)?;
            ensure!(
                !mounts.is_empty(),
                "{} is in use (as swap, or by md, LVM or LUKS on it): its content could change while it is read",
                path.display()
            );
            File::open(path).with_context(opening)
        }
        other => other.with_context(opening),
    }
}

/// A file that a loop device shows must not be mounted by it.
fn check_loops(path: &Path) -> Result<()> {
    let file = path.canonicalize().with_context(|| format!("finding {}", path.display()))?;
    // A machine without sysfs has no loop devices that anybody could know of.
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if Path::new(backing.trim_end()) == file
            && let Some(number) = device_number(&entry.path())
        {
            check_read_only(path, &mounts_of(number).context("looking for what is mounted")?)?;
        }
    }
    Ok(())
}

fn check_read_only(path: &Path, mounts: &[Mounted]) -> Result<()> {
    match mounts.iter().find(|m| m.writable) {
        Some(mount) => bail!(
            "{} is mounted at {} and can be written there while it is read: unmount it, or mount it read-only",
            path.display(),
            mount.place
        ),
        None => Ok(()),
    }
}

/// Where something is mounted.
#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    place: String,
    /// Whether the file system can be written, through this place or another.
    writable: bool,
}

/// What is mounted of the block device with this number, and of its partitions.
fn mounts_of(number: u64) -> Result<Vec<Mounted>> {
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    let partitions = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let partitions =
        partitions.filter(|path| path.join("partition").exists()).filter_map(|path| device_number(&path));
    let numbers: Vec<u64> = std::iter::once(number).chain(partitions).collect();
    let text = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    // btrfs has a number of its own, but names a device.
    let names_it = |source: &str| {
        fs::metadata(source).is_ok_and(|m| m.file_type().is_block_device() && numbers.contains(&m.rdev()))
    };
    Ok(mounted(&text, |device, source| numbers.contains(&device) || names_it(source)))
}

/// The mounts in mountinfo whose device number or source is `wanted`.
fn mounted(mountinfo: &str, wanted: impl Fn(u64, &str) -> bool) -> Vec<Mounted> {
    let one = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let device = parse_number(left.get(2)?)?;
        wanted(device, right.get(1)?).then_some(())?;
        let place = ka_layout::facts::unescape(left.get(4)?);
        Some(Mounted {
            place: String::from_utf8_lossy(&place).into_owned(),
            // Of the file system; a mount may be read-only beside another that is not.
            writable: right.get(2)?.split(',').any(|option| option == "rw"),
        })
    };
    mountinfo.lines().filter_map(one).collect()
}

/// The number of the device that a folder of sysfs is about.
fn device_number(folder: &Path) -> Option<u64> {
    parse_number(fs::read_to_string(folder.join("dev")).ok()?.trim())
}

/// `8:3` as a number.
fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

impl RawSource {
    /// A line for people.
    #[must_use]
    pub fn text(&self) -> String {
        format!(
            "{}: {} block for block from {}",
            self.content.part,
            show_size(self.content.bytes),
            self.path.display()
        )
    }

    /// Sends the content, all of it and nothing else.
    ///
    /// # Errors
    /// When it cannot be read to its end, is longer or shorter than was announced, or a file was changed meanwhile.
    pub fn send(&self, out: &mut impl Write) -> Result<()> {
        let (mut file, bytes) = open(&self.path)?;
        let announced = self.content.bytes;
        ensure!(
            bytes == announced,
            "{} has {bytes} bytes, but had {announced} when the deployment began",
            self.path.display()
        );
        // Reading works without it.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let state = |file: &File| file.metadata().map(|m| (m.mtime(), m.mtime_nsec(), m.len()));
        let before = state(&file).context("looking at it")?;
        copy(&mut file, out, bytes).with_context(|| format!("reading {}", self.path.display()))?;
        let same = state(&file).context("looking at it")? == before;
        // What writes to a block device shows in no time of its node.
        ensure!(same || !file.metadata()?.is_file(), "{} was changed while it was read", self.path.display());
        Ok(())
    }
}

/// Copies just `bytes` bytes, behind which `from` must end.
fn copy(from: &mut impl Read, to: &mut impl Write, bytes: u64) -> Result<()> {
    let mut buffer = vec![0; BLOCK];
    let mut left = bytes;
    loop {
        // At the end one byte more is asked for than there may be.
        let want = usize::try_from(left).unwrap_or(BLOCK).clamp(1, BLOCK);
        match from.read(&mut buffer[..want]) {
            Ok(0) if left == 0 => return Ok(()),
            Ok(0) => bail!("it ends {left} bytes before its {bytes}"),
            Ok(_) if left == 0 => bail!("it goes on behind its {bytes} bytes"),
            Ok(n) => {
                to.write_all(&buffer[..n]).context("writing to the chain")?;
                left -= n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).with_context(|| format!("at byte {}", bytes - left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUT: &str = "version = 1\n[[disk]]\nname = 'd'\ntable = 'gpt'\n\
        [[partition]]\ntype = 'linux'\nsize = '1G'\nformat = { fs = 'ext4' }\nmount = { path = '/' }\n\
        [[partition]]\nid = 'win'\ntype = 'data'\nsize = '4M'\nraw = true\n\
        [[partition]]\nnumber = 7\ntype = 'prep'\nsize = 'fill'\nname = 'loader'\nraw = true\n\
        uuid = '66666666-2222-4333-8444-555555555555'\n";

    fn layout() -> Layout {
        ka_layout::parse::parse(LAYOUT).unwrap()
    }

    fn given(words: &[&str], live: bool) -> Result<Vec<RawSource>, String> {
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        sources(&layout(), &words, live).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn sources_are_named_by_id_or_number_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(path("a"), vec![7; 5000]).unwrap();
        fs::write(path("empty"), "").unwrap();
        File::create(path("big")).unwrap().set_len((4 << 20) + 1).unwrap();
        let (win, loader) = (format!("win={}", path("a")), format!("7={}", path("a")));
        let (win, loader) = (win.as_str(), loader.as_str());
        let found = given(&[loader, win], false).unwrap();
        let seen: Vec<(usize, &str, u64)> =
            found.iter().map(|f| (f.content.index, f.content.part.as_str(), f.content.bytes)).collect();
        assert_eq!(seen, [(1, "[[partition]] #2 (data)", 5000), (2, "[[partition]] #3 (loader)", 5000)]);
        assert!(found[0].text().contains("block for block from /"), "{}", found[0].text());
        let big = format!("win={}", path("big"));
        let empty = format!("win={}", path("empty"));
        let lost = format!("win={}", path("lost"));
        let dir = format!("win={}", folder.path().display());
        let (big, empty, lost, dir) = (big.as_str(), empty.as_str(), lost.as_str(), dir.as_str());
        for (words, live, expected) in [
            (
                &[win][..],
                false,
                "[[partition]] #3 (loader): raw: the golden tree is not this running machine",
            ),
            (
                &[win],
                true,
                "#3 (loader): raw: finding the golden machine's partition with the PARTUUID 66666666-",
            ),
            (&[loader], true, "#2 (data): raw: the layout has no uuid by which"),
            (
                &[loader, big],
                false,
                "has 4.00 MiB, but the layout gives it 4.00 MiB at most: 1 B are missing",
            ),
            (&[loader, empty], false, "empty is empty"),
            (&[loader, lost], false, "lost: No such file"),
            (&[loader, dir], false, "neither a file nor a block device"),
            (&[loader, win, win], false, "win was given before"),
            (&[loader, "3=x"], false, "no raw partition 3 (those that it has: win, 7)"),
            (&["2=x"], false, "no raw partition 2"),
            (&["win"], false, "--raw win: ID=FILE or ID=DEVICE is meant"),
        ] {
            let error = given(words, live).unwrap_err();
            assert!(error.contains(expected), "{words:?}: {error}");
        }
        let none = ka_layout::parse::parse(&LAYOUT.replace("raw = true\n", "")).unwrap();
        assert_eq!(sources(&none, &[], false).unwrap(), []);
        assert!(
            sources(&none, &["7=x".to_owned()], false)
                .unwrap_err()
                .to_string()
                .ends_with("(those that it has: none)")
        );
    }

    #[test]
    fn what_changes_between_two_waves_or_while_it_is_read_fails_the_wave() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, vec![7; 5000]).unwrap();
        let mut found = sources(
            &ka_layout::parse::parse(&LAYOUT.replace("raw = true\nuuid", "uuid")).unwrap(),
            &[format!("win={}", path.display())],
            false,
        )
        .unwrap();
        let source = found.remove(0);
        let mut sent = Vec::new();
        source.send(&mut sent).unwrap();
        assert_eq!(sent, vec![7; 5000]);
        /// Writes to the file that is being read.
        struct Meddler<'a>(&'a Path);
        impl Write for Meddler<'_> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                std::thread::sleep(std::time::Duration::from_millis(20));
                fs::write(self.0, vec![8; 5000])?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let error = source.send(&mut Meddler(&path)).unwrap_err().to_string();
        assert!(error.ends_with("a was changed while it was read"), "{error}");
        fs::write(&path, vec![7; 4999]).unwrap();
        let error = source.send(&mut io::sink()).unwrap_err().to_string();
        assert!(error.ends_with("has 4999 bytes, but had 5000 when the deployment began"), "{error}");
    }

    /// Gives these pieces, then fails or ends.
    struct Pieces(Vec<Vec<u8>>, bool);

    impl Read for Pieces {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let Some(first) = self.0.first_mut() else {
                return if self.1 { Err(io::Error::other("bad sector")) } else { Ok(0) };
            };
            let n = out.len().min(first.len());
            out[..n].copy_from_slice(&first[..n]);
            first.drain(..n);
            if first.is_empty() {
                self.0.remove(0);
            }
            Ok(n)
        }
    }

    proptest! {
        #[test]
        fn all_bytes_or_an_error(sizes in proptest::collection::vec(1usize..3000, 0..6), off in -3i64..4, fails: bool) {
            let pieces: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, n)| vec![i as u8; *n]).collect();
            let all: Vec<u8> = pieces.concat();
            let Some(said) = (all.len() as u64).checked_add_signed(off) else { return Ok(()) };
            let mut out = Vec::new();
            let copied = copy(&mut Pieces(pieces, fails), &mut out, said);
            prop_assert_eq!(copied.is_ok(), off == 0 && !fails, "{:?}", copied);
            prop_assert!(out.len() as u64 <= said && all.starts_with(&out));
            prop_assert!(copied.is_err() || out == all);
        }

        #[test]
        fn no_mountinfo_panics(text in "([0-9]{1,3} [0-9]{1,3} [0-9]{1,9}:[0-9]{0,9} / /[a-z\\\\0-9]{0,5} rw( - )?[a-z ]{0,9}\n?){0,3}") {
            let _ = mounted(&text, |_, _| true);
        }
    }

    #[test]
    fn the_file_system_counts_and_not_the_mount() {
        let text = "36 35 8:3 / /a\\040b ro,noatime shared:1 - ext4 /dev/sda3 rw,errors=continue\n\
            37 35 8:3 /x /c rw - ext4 /dev/sda3 ro\n38 35 0:40 /@ /d rw - btrfs /dev/sdb1 rw,subvol=/@\n39 35 8:4 / /e rw - ext4 /dev/sda4 rw\n";
        let sda3 = rustix::fs::makedev(8, 3);
        let found = mounted(text, |device, source| device == sda3 || source == "/dev/sdb1");
        let expected = [("/a b", true), ("/c", false), ("/d", true)];
        assert_eq!(found.iter().map(|m| (m.place.as_str(), m.writable)).collect::<Vec<_>>(), expected);
    }
}
