//! `/etc/crypttab` of the clone. A clone's volumes are made without encryption, so a container whose file system was
//! cloned as a plain one is commented out, loudly; any other line must name a container of this node, a swap volume where
//! the line is for one, or a partition that nothing was made on. A kernel's name (`/dev/sda3`) is never taken for this
//! node's: it may lead to data here, and a line with a random key would write over it at each boot.

use super::fstab;
use super::names::Spec;
use super::{Change, Context, Piece};
use anyhow::{Result, bail};
use ka_layout::model::Fs;
use ka_layout::order::{Layer, Volume};

const PATH: &str = "/etc/crypttab";
/// The one that Arch puts into the initramfs.
pub const ARCH: &str = "/etc/crypttab.initramfs";
/// Both.
pub const FILES: &[&str] = &[PATH, ARCH];

/// The piece.
pub struct Crypttab;

/// A line of crypttab: the name that the opened container gets, its device, its options.
pub struct Line<'a> {
    pub name: &'a str,
    pub device: &'a str,
    options: &'a str,
}

impl<'a> Line<'a> {
    /// Reads a line; none when it is empty or a comment.
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let name = fields.next().filter(|n| !n.starts_with('#'))?;
        let device = fields.next()?;
        Some(Self { name, device, options: fields.nth(1).unwrap_or("") })
    }

    fn has(&self, word: &str) -> bool {
        self.options.split(',').any(|o| o == word)
    }

    /// Whether the machine boots without it.
    pub fn is_optional(&self) -> bool {
        self.has("noauto") || self.has("nofail")
    }

    /// Whether a swap space is made in it each time it is opened.
    fn is_swap(&self) -> bool {
        self.has("swap")
    }

    /// Whether what is in it is made each time it is opened.
    fn is_made_anew(&self) -> bool {
        self.is_swap() || self.options.split(',').any(|o| o == "tmp" || o.starts_with("tmp="))
    }
}

/// Whether a line of crypttab may stay, by its device.
#[derive(Debug, PartialEq, Eq)]
pub enum Device {
    /// It names no device, or one that may be opened.
    Fit,
    /// The node has no such device, or nobody can say which it is; the text tells.
    Missing(String),
    /// Opening it would lose what was made there; the text tells.
    Lost(String),
}

impl Device {
    /// What the device of `line` is on this node.
    ///
    /// # Errors
    /// When fstab cannot be read.
    pub fn of(context: &Context, line: &Line) -> Result<Self> {
        let Some(spec) = Spec::parse(line.device) else { return Ok(Self::Fit) };
        let Some(volume) = context.names().bearer(&spec) else {
            return Ok(Self::Missing(format!("{} does not exist on this node", line.device)));
        };
        if is_container(volume, &spec) {
            return Ok(Self::Fit);
        }
        Ok(match volume.fs {
            Some(Fs::Swap) if line.is_swap() && spec.is_stable() => {
                // What is written with a new key is no swap space to who looks at it without.
                let plain = |l: &fstab::Line| l.is_swap() && l.device().is_some_and(|s| s.names(volume));
                if in_fstab(context, &plain)? {
                    Self::Lost(format!("{} is swap without encryption in /etc/fstab", line.device))
                } else {
                    Self::Fit
                }
            }
            Some(fs) => Self::Lost(format!("{} has {} on this node", line.device, fs.name())),
            // It may be below an array, a group or a container, which is not told here.
            None if line.is_made_anew()
                && (volume.preserved || context.volumes.iter().any(|v| v.layer.is_some())) =>
            {
                Self::Lost(format!("{} may hold something on this node", line.device))
            }
            None if spec.is_stable() && volume.layer.is_none() => Self::Fit,
            None => Self::Missing(format!("{} is no lasting name of this node's", line.device)),
        })
    }
}

/// Whether `spec` means the encrypted container itself, and not what is in it.
fn is_container(volume: &Volume, spec: &Spec) -> bool {
    let Some(Layer::Luks { uuid: own, .. }) = &volume.layer else { return false };
    matches!(spec, Spec::Uuid(uuid) if own.eq_ignore_ascii_case(uuid))
}

/// Whether fstab, as it stands, has such a line.
fn in_fstab(context: &Context, is_such: &dyn Fn(&fstab::Line) -> bool) -> Result<bool> {
    let text = context.root.read_text(fstab::PATH)?.unwrap_or_default();
    Ok(text.lines().filter_map(fstab::Line::parse).any(|line| is_such(&line)))
}

impl Piece for Crypttab {
    fn name(&self) -> &'static str {
        "crypttab"
    }

    fn apply(&self, context: &Context) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for path in FILES {
            changes.extend(file(context, path)?);
        }
        Ok(changes)
    }
}

fn file(context: &Context, path: &str) -> Result<Vec<Change>> {
    let Some(old) = context.root.read_text(path)? else { return Ok(Vec::new()) };
    let mut changes = Vec::new();
    let mut new = String::new();
    for line in old.lines() {
        if let Some(reason) = Line::parse(line).map_or(Ok(None), |fields| unusable(context, path, &fields))? {
            changes.push(Change::warning("crypttab", path, format!("commented out, {reason}: {line}")));
            new.push_str(&format!("# ka: {reason}:\n#"));
        }
        new.push_str(line);
        new.push('\n');
    }
    if !changes.is_empty() {
        if !context.root.write_text(path, &new, 0o644)? {
            return Ok(vec![Change::warning(
                "crypttab",
                path,
                "kept by policy, with lines that this node cannot use",
            )]);
        }
        context.initramfs_is_stale(format!("{path} changed"));
    }
    Ok(changes)
}

/// Whether fstab, which was set right before, still mounts what is in the container, or on a volume that may lie in it.
fn is_needed(context: &Context, line: &Line) -> Result<bool> {
    in_fstab(context, &|entry| match entry.device() {
        Some(Spec::Device(path)) if !entry.is_optional() => {
            path == format!("/dev/mapper/{}", line.name)
                || context.names().bearer(&Spec::Device(path)).is_none()
        }
        _ => false,
    })
}

/// Why a line cannot stay; none when it can.
fn unusable(context: &Context, path: &str, line: &Line) -> Result<Option<String>> {
    // The piece storage sets the lines of this node's own containers right.
    let own = |v: &Volume| matches!(&v.layer, Some(Layer::Luks { name, .. }) if *name == line.name);
    if context.volumes.iter().any(own) {
        return Ok(None);
    }
    let mapped = format!("/dev/mapper/{}", line.name);
    let golden = &context.order.golden.filesystems;
    if golden.iter().any(|fs| fs.device == mapped || fs.aliases.contains(&mapped)) {
        return Ok(Some(format!(
            "{mapped} was an encrypted container on the golden node and is a plain file system here"
        )));
    }
    let reason = match Device::of(context, line)? {
        Device::Fit => return Ok(None),
        Device::Missing(reason) | Device::Lost(reason) => reason,
    };
    if line.is_swap() {
        return Ok(Some(format!("{reason} (this node's swap is what its layout says)")));
    }
    if line.is_optional() || !is_needed(context, line)? {
        return Ok(Some(reason));
    }
    bail!(
        "checking {path} of the clone: {reason}, the line of {} is not nofail, and /etc/fstab needs it",
        line.name
    );
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID, SWAP_UUID};
    use super::*;

    #[test]
    fn lines_are_judged() {
        let mut lab = Lab::new();
        lab.order.golden.filesystems[0].aliases.push("/dev/mapper/root_crypt".into());
        let keep =
            format!("# name device\nswap_crypt UUID={SWAP_UUID} /dev/urandom swap\nx /srv/x.img none luks\n");
        lab.file(PATH, &keep);
        assert!(Crypttab.apply(&lab.context()).unwrap().is_empty());
        assert_eq!(lab.read(PATH), keep);

        lab.file(PATH, "root_crypt UUID=1 none luks\nb UUID=2 none luks,nofail\n");
        let context = lab.context();
        let changes = Crypttab.apply(&context).unwrap();
        assert!(changes.len() == 2 && changes.iter().all(|c| c.warning), "{changes:?}");
        assert!(lab.read(PATH).lines().all(|l| l.starts_with('#')));
        assert_eq!(context.stale_initramfs.borrow().len(), 1);

        lab.file(PATH, "").file(ARCH, "c UUID=3 none luks,nofail\n");
        assert!(
            Crypttab.apply(&lab.context()).unwrap()[0].file == ARCH && lab.read(ARCH).starts_with("# ka: ")
        );

        // The golden machine was encrypted, and its facts do not say so: nothing here needs the line.
        let line = "b UUID=2 none luks\n";
        lab.file(PATH, line)
            .file(fstab::PATH, "LABEL=label3 / ext4 defaults 0 1\n/dev/nvme0n1p1 /efi vfat defaults 0 1\n");
        assert!(Crypttab.apply(&lab.context()).unwrap()[0].warning);
        assert!(lab.read(PATH).ends_with(&format!("\n#{line}")), "{}", lab.read(PATH));

        for device in ["/dev/mapper/b", "/dev/vg0/srv"] {
            lab.file(PATH, line).file(fstab::PATH, &format!("{device} /srv ext4 defaults 0 2\n"));
            let error = Crypttab.apply(&lab.context()).unwrap_err().to_string();
            assert!(error.contains("UUID=2 does not exist") && error.contains("line of b "), "{error}");
        }
        lab.file(fstab::PATH, "/dev/mapper/b /srv ext4 nofail 0 2\n");
        assert!(Crypttab.apply(&lab.context()).unwrap()[0].warning);
    }

    #[test]
    fn nothing_opens_what_was_made_on_this_node() {
        let mut lab = Lab::new();
        // The golden machine's /dev/sda3 was swap with a random key; on the node it is /home.
        lab.volumes[2].device = "/dev/sda3".into();
        let part = format!("PARTUUID={}", lab.volumes[2].partuuid.clone().unwrap());
        for device in ["/dev/sda3", &format!("UUID={ROOT_UUID}"), &part] {
            for options in ["swap,cipher=aes-xts-plain64", "luks,nofail"] {
                let line = format!("sda3_crypt {device} /dev/urandom {options}");
                lab.file(PATH, &format!("{line}\n"));
                let fields = Line::parse(&line).unwrap();
                let found = Device::of(&lab.context(), &fields).unwrap();
                assert_eq!(found, Device::Lost(format!("{device} has ext4 on this node")));
                let changes = Crypttab.apply(&lab.context()).unwrap();
                assert!(changes.len() == 1 && changes[0].warning, "{changes:?}");
                assert!(lab.read(PATH).lines().all(|l| l.starts_with('#')), "{}", lab.read(PATH));
            }
        }
        // fstab uses the swap as it is.
        let line = format!("s UUID={SWAP_UUID} /dev/urandom swap\n");
        lab.file(fstab::PATH, &format!("UUID={SWAP_UUID} none swap sw 0 0\n")).file(PATH, &line);
        assert!(Crypttab.apply(&lab.context()).unwrap()[0].what.contains("swap without encryption"));
        // A partition that the layout leaves empty may be opened by a lasting name only.
        lab.volumes[2].fs = None;
        for (device, fits) in [(part.as_str(), true), ("/dev/sda3", false)] {
            let line = format!("x {device} none luks");
            let found = Device::of(&lab.context(), &Line::parse(&line).unwrap()).unwrap();
            assert_eq!(found == Device::Fit, fits, "{found:?}");
        }
        // But one that may be below something else is not written over.
        let line = format!("x {part} /dev/urandom tmp=ext4");
        let line = Line::parse(&line).unwrap();
        assert_eq!(Device::of(&lab.context(), &line).unwrap(), Device::Fit);
        lab.volumes[1].layer = Some(Layer::Lvm { group: "g".into(), name: "l".into() });
        assert!(matches!(Device::of(&lab.context(), &line).unwrap(), Device::Lost(_)));
    }
}
