//! What a device name in a configuration file means: which volume of this node it stands for. Names are never taken
//! apart by guess. A name that the golden node's facts know means the golden file system, and so the node's volume of
//! the same mount path; any other stable name (UUID, label) means the volume that bears it.

use ka_layout::model::Fs;
use ka_layout::order::{Golden, GoldenFs, Layer, Volume};

/// A name by which configuration refers to a local block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    /// `UUID=` or `/dev/disk/by-uuid/`.
    Uuid(String),
    /// `LABEL=` or `/dev/disk/by-label/`.
    Label(String),
    /// `PARTUUID=` or `/dev/disk/by-partuuid/`.
    PartUuid(String),
    /// `PARTLABEL=` or `/dev/disk/by-partlabel/`.
    PartLabel(String),
    /// Any other path below `/dev`.
    Device(String),
}

impl Spec {
    /// Reads a name; none when it names no block device (a pseudo file system, a server, a file).
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_matches('"');
        if let Some((tag, value)) = text.split_once('=') {
            let value = value.trim_matches('"').to_owned();
            return match tag {
                "UUID" => Some(Self::Uuid(value)),
                "LABEL" => Some(Self::Label(value)),
                "PARTUUID" => Some(Self::PartUuid(value)),
                "PARTLABEL" => Some(Self::PartLabel(value)),
                // `ID=` is libmount's word for /dev/disk/by-id.
                "ID" => Some(Self::Device(format!("/dev/disk/by-id/{value}"))),
                _ => None,
            };
        }
        if let Some(rest) = text.strip_prefix("/dev/disk/")
            && let Some((kind, name)) = rest.split_once('/')
        {
            match kind {
                "by-uuid" => return Some(Self::Uuid(name.to_owned())),
                "by-label" => return Some(Self::Label(unescape_hex(name))),
                "by-partuuid" => return Some(Self::PartUuid(name.to_owned())),
                "by-partlabel" => return Some(Self::PartLabel(unescape_hex(name))),
                _ => {}
            }
        }
        let pseudo = ["/dev/shm", "/dev/pts", "/dev/hugepages", "/dev/mqueue", "/dev/fuse", "/dev/null"];
        (text.starts_with("/dev/") && !pseudo.contains(&text)).then(|| Self::Device(text.to_owned()))
    }

    /// Whether `volume` bears this name, whatever else may.
    pub fn names(&self, volume: &Volume) -> bool {
        match self {
            Self::Uuid(uuid) => {
                // crypttab names the container, not what is in it.
                let container = match &volume.layer {
                    Some(Layer::Luks { uuid, .. }) => Some(uuid),
                    _ => None,
                };
                same(volume.uuid.as_ref(), uuid) || same(container, uuid)
            }
            Self::PartUuid(uuid) => same(volume.partuuid.as_ref(), uuid),
            Self::Label(label) => volume.label.as_ref() == Some(label),
            Self::PartLabel(label) => volume.partlabel.as_ref() == Some(label),
            Self::Device(path) => *path == volume.device,
        }
    }

    fn names_golden(&self, fs: &GoldenFs) -> bool {
        match self {
            Self::Uuid(uuid) => same(fs.uuid.as_ref(), uuid),
            Self::PartUuid(uuid) => same(fs.partuuid.as_ref(), uuid),
            Self::Label(label) => fs.label.as_ref() == Some(label),
            Self::PartLabel(label) => fs.partlabel.as_ref() == Some(label),
            Self::Device(path) => *path == fs.device || fs.aliases.contains(path),
        }
    }

    /// Whether the name stays with its volume over reboots, unlike `/dev/sda1`.
    pub const fn is_stable(&self) -> bool {
        !matches!(self, Self::Device(_))
    }
}

/// What a name stands for on this node.
#[derive(Debug, PartialEq, Eq)]
pub enum Meaning<'a> {
    /// The volume, which bears this very name: nothing need change.
    Kept(&'a Volume),
    /// The volume, which has another name on this node.
    Renamed(&'a Volume),
    /// A file system of the golden node that this node does not have.
    NotHere(&'a GoldenFs),
    /// Nothing that the golden node's facts or the node's volumes know.
    Unknown,
}

/// The golden node's file systems and this node's volumes.
pub struct Names<'a> {
    golden: &'a Golden,
    volumes: &'a [Volume],
}

impl<'a> Names<'a> {
    pub const fn new(golden: &'a Golden, volumes: &'a [Volume]) -> Self {
        Self { golden, volumes }
    }

    /// What `spec`, written on the golden node, stands for on this one.
    pub fn meaning(&self, spec: &Spec) -> Meaning<'a> {
        // The golden facts first: the golden node's /dev/sda1 need not be this node's.
        if let Some(golden) = self.golden.filesystems.iter().find(|fs| spec.names_golden(fs)) {
            return match self.counterpart(golden) {
                Some(volume) if spec.is_stable() && spec.names(volume) => Meaning::Kept(volume),
                Some(volume) => Meaning::Renamed(volume),
                None => Meaning::NotHere(golden),
            };
        }
        if spec.is_stable()
            && let Some(volume) = self.bearer(spec)
        {
            return Meaning::Kept(volume);
        }
        Meaning::Unknown
    }

    /// The one volume of this node that bears the name; none when none or several do. The mounted subvolumes of one btrfs
    /// are one.
    pub fn bearer(&self, spec: &Spec) -> Option<&'a Volume> {
        let mut bearers = self.volumes.iter().filter(|v| spec.names(v));
        bearers.next().filter(|first| bearers.all(|v| v.device == first.device))
    }

    /// The node's volume that stands for a golden file system: that of the same mount path, or the one that its
    /// blocks were sent to; for swap that of the same UUID
    /// or label, else the only one where both have one swap.
    fn counterpart(&self, golden: &GoldenFs) -> Option<&'a Volume> {
        if let Some(path) = &golden.path {
            let mounted = self.volumes.iter().find(|v| v.mount.as_ref().is_some_and(|m| m.path == *path));
            // What was sent block for block is the golden file system itself.
            let sent = |v: &&Volume| v.fs.is_none() && v.uuid.is_some() && v.uuid == golden.uuid;
            return mounted.or_else(|| self.volumes.iter().find(sent));
        }
        let swaps: Vec<_> = self.swaps().collect();
        let by_uuid = swaps.iter().find(|v| golden.uuid.is_some() && v.uuid == golden.uuid);
        let by_label = swaps.iter().find(|v| golden.label.is_some() && v.label == golden.label);
        let goldens = self.golden.filesystems.iter().filter(|fs| fs.fs == Fs::Swap).count();
        let only = (goldens == 1 && swaps.len() == 1).then(|| &swaps[0]);
        by_uuid.or(by_label).or(only).copied()
    }

    /// The node's swap volumes.
    pub fn swaps(&self) -> impl Iterator<Item = &'a Volume> {
        self.volumes.iter().filter(|v| v.fs == Some(Fs::Swap))
    }
}

/// A stable name for the volume, of the kind that `like` is where the volume has one, else its UUID.
pub fn name_like(volume: &Volume, like: &str) -> Option<String> {
    let by = |dir: &str, value: &Option<String>| value.as_ref().map(|v| format!("/dev/disk/{dir}/{v}"));
    let tag = |tag: &str, value: &Option<String>| value.as_ref().map(|v| format!("{tag}={v}"));
    let plain = |value: &Option<String>| {
        value.clone().filter(|v| v.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)))
    };
    let same_kind = match like {
        _ if like.starts_with("/dev/disk/by-uuid/") => by("by-uuid", &volume.uuid),
        _ if like.starts_with("/dev/disk/by-partuuid/") => by("by-partuuid", &volume.partuuid),
        _ if like.starts_with("/dev/disk/by-label/") => by("by-label", &plain(&volume.label)),
        _ if like.starts_with("/dev/disk/by-partlabel/") => by("by-partlabel", &plain(&volume.partlabel)),
        _ if like.starts_with("PARTUUID=") => tag("PARTUUID", &volume.partuuid),
        _ if like.starts_with("LABEL=") => tag("LABEL", &plain(&volume.label)),
        _ if like.starts_with("PARTLABEL=") => tag("PARTLABEL", &plain(&volume.partlabel)),
        _ => None,
    };
    same_kind.or_else(|| tag("UUID", &volume.uuid)).or_else(|| tag("PARTUUID", &volume.partuuid))
}

/// UUIDs are compared without regard to case: GPT tools print them either way.
fn same(a: Option<&String>, b: &str) -> bool {
    a.is_some_and(|a| a.eq_ignore_ascii_case(b))
}

/// udev writes unusual characters of labels as `\x20`.
fn unescape_hex(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.find("\\x") {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 2..at + 4).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        if let Some(code) = code {
            out.push(char::from(code));
            rest = &rest[at + 4..];
        } else {
            out.push_str("\\x");
            rest = &rest[at + 2..];
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Lab, ROOT_UUID, SWAP_UUID};
    use super::*;

    fn spec(text: &str) -> Spec {
        Spec::parse(text).unwrap()
    }

    #[test]
    fn names_are_told_apart() {
        assert_eq!(spec("UUID=\"ab\""), Spec::Uuid("ab".into()));
        assert_eq!(spec("/dev/disk/by-uuid/ab"), Spec::Uuid("ab".into()));
        assert_eq!(spec("/dev/disk/by-label/a\\x20b\\xq"), Spec::Label("a b\\xq".into()));
        assert_eq!(spec("/dev/sda1"), Spec::Device("/dev/sda1".into()));
        for other in ["proc", "tmpfs", "server:/export", "//server/share", "/swapfile", "SIZE=1", "/dev/shm"]
        {
            assert_eq!(Spec::parse(other), None, "{other}");
        }
    }

    #[test]
    fn the_golden_facts_decide() {
        let mut lab = Lab::new();
        // The node has a /dev/sda1 too, and it is another volume than the golden one.
        lab.volumes[2].device = "/dev/sda1".into();
        let context = lab.context();
        let names = context.names();
        let root = context.root_volume().unwrap();
        assert_eq!(names.meaning(&spec(&format!("UUID={ROOT_UUID}"))), Meaning::Kept(root));
        assert_eq!(names.meaning(&spec("/dev/sda3")), Meaning::Renamed(root));
        assert_eq!(names.meaning(&spec("/dev/disk/by-id/ata-GOLDEN_1-part3")), Meaning::Renamed(root));
        let esp = context.mounted_at("/boot/efi").unwrap();
        assert_eq!(names.meaning(&spec("/dev/sda1")), Meaning::Renamed(esp));
        assert_eq!(names.meaning(&spec("/dev/sdb1")), Meaning::Unknown);
        assert_eq!(names.meaning(&spec("UUID=dead")), Meaning::Unknown);
    }

    #[test]
    fn a_new_uuid_is_a_rename_and_a_missing_volume_is_said() {
        let mut lab = Lab::new();
        lab.renew(3, "11111111-2222-4333-8444-555555555555");
        lab.volumes.retain(|v| v.fs != Some(Fs::Swap));
        let context = lab.context();
        let names = context.names();
        let root = context.root_volume().unwrap();
        assert_eq!(names.meaning(&spec(&format!("UUID={ROOT_UUID}"))), Meaning::Renamed(root));
        let gone = names.meaning(&spec(&format!("UUID={SWAP_UUID}")));
        assert!(matches!(gone, Meaning::NotHere(fs) if fs.fs == Fs::Swap), "{gone:?}");
    }

    #[test]
    fn a_new_name_is_of_the_same_kind() {
        let lab = Lab::new();
        let root = &lab.volumes[2];
        assert_eq!(name_like(root, "UUID=x").unwrap(), format!("UUID={ROOT_UUID}"));
        assert_eq!(name_like(root, "/dev/sda3").unwrap(), format!("UUID={ROOT_UUID}"));
        assert_eq!(name_like(root, "/dev/disk/by-uuid/x").unwrap(), format!("/dev/disk/by-uuid/{ROOT_UUID}"));
        assert_eq!(name_like(root, "LABEL=x").unwrap(), "LABEL=label3");
        assert_eq!(name_like(root, "PARTLABEL=x").unwrap(), format!("UUID={ROOT_UUID}"));
    }
}
