//! What the tests of the pieces share: a small tree, the golden node's facts and the node's volumes.

use super::programs::Programs;
use super::{Context, Nic};
use ka_layout::model::{Fs, Mount};
use ka_layout::order::{Firmware, Golden, GoldenFs, Identity, InstallOrder, Policy, Volume};
use std::path::{Path, PathBuf};

pub const ROOT_UUID: &str = "0b5f4c1e-7d0a-4a44-9d0e-3b1f6f1f2a01";
pub const SWAP_UUID: &str = "5a1d9a3c-4c3c-4f51-8f6c-6f6d1c0a7b02";
pub const ESP_UUID: &str = "ABCD-1234";

pub struct Lab {
    _dir: tempfile::TempDir,
    pub target: PathBuf,
    pub order: InstallOrder,
    pub volumes: Vec<Volume>,
    pub firmware: Firmware,
    pub nic: Option<Nic>,
}

impl Lab {
    /// A golden machine on `/dev/sda` (ESP, swap, root), cloned to a node with `/dev/nvme0n1`, all UUIDs kept.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::fs::create_dir(&target).unwrap();
        let golden = Golden {
            hostname: "golden".into(),
            os_release: [("ID".to_owned(), "debian".to_owned())].into(),
            arch: "x86_64".into(),
            filesystems: vec![
                golden_fs(Some("/"), Fs::Ext4, 3, ROOT_UUID),
                golden_fs(Some("/boot/efi"), Fs::Vfat, 1, ESP_UUID),
                golden_fs(None, Fs::Swap, 2, SWAP_UUID),
            ],
            ..Golden::default()
        };
        let order = InstallOrder {
            deployment: "d1".into(),
            node: Identity {
                name: "node7".into(),
                index: 7,
                mac: Some("52:54:00:12:34:56".into()),
                group: Some("blue".into()),
            },
            layout: String::new(),
            golden,
            policy: Policy::default(),
            hooks: Vec::new(),
            keys: Default::default(),
        };
        let volumes = vec![
            volume(Some("/boot/efi"), "esp", Fs::Vfat, 1, ESP_UUID),
            volume(None, "swap", Fs::Swap, 2, SWAP_UUID),
            volume(Some("/"), "linux", Fs::Ext4, 3, ROOT_UUID),
        ];
        Self { _dir: dir, target, order, volumes, firmware: Firmware::Uefi, nic: None }
    }

    pub fn file(&self, path: &str, content: &str) -> &Self {
        let path = self.target.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    pub fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.target.join(path.trim_start_matches('/'))).unwrap()
    }

    pub fn exists(&self, path: &str) -> bool {
        self.target.join(path.trim_start_matches('/')).symlink_metadata().is_ok()
    }

    pub fn context(&self) -> Context<'_> {
        Context::new(Path::new(&self.target), &self.order, &self.volumes, self.firmware, self.nic.as_ref())
            .unwrap()
    }

    /// A context in which `answer` stands in for all programs of the clone: it gets a command line, and returns what the
    /// program writes.
    pub fn pretending(&self, answer: impl Fn(&str) -> anyhow::Result<String> + 'static) -> Context<'_> {
        let mut context = self.context();
        context.programs =
            Programs::Pretended { answer: Box::new(answer), ran: std::cell::RefCell::default() };
        context
    }

    /// Makes it a clone of another distribution: `ID` and `ID_LIKE` of its `/etc/os-release`.
    pub fn distribution(&mut self, id: &str, like: &str) {
        let release = &mut self.order.golden.os_release;
        release.insert("ID".into(), id.into());
        release.insert("ID_LIKE".into(), like.into());
    }

    /// Gives a volume another UUID than the golden one.
    pub fn renew(&mut self, number: u32, uuid: &str) {
        let volume = self.volumes.iter_mut().find(|v| v.number == number).unwrap();
        volume.uuid = Some(uuid.to_owned());
    }
}

fn golden_fs(path: Option<&str>, fs: Fs, number: u32, uuid: &str) -> GoldenFs {
    GoldenFs {
        path: path.map(str::to_owned),
        fs,
        device: format!("/dev/sda{number}"),
        aliases: vec![
            format!("/dev/disk/by-uuid/{uuid}"),
            format!("/dev/disk/by-id/ata-GOLDEN_1-part{number}"),
        ],
        disk_aliases: vec!["/dev/disk/by-id/ata-GOLDEN_1".into()],
        uuid: Some(uuid.into()),
        label: Some(format!("label{number}")),
        partuuid: Some(format!("aaaaaaaa-0000-4000-8000-00000000000{number}")),
        partlabel: None,
    }
}

fn volume(path: Option<&str>, kind: &str, fs: Fs, number: u32, uuid: &str) -> Volume {
    Volume {
        device: format!("/dev/nvme0n1p{number}"),
        disk: "/dev/nvme0n1".into(),
        number,
        kind: kind.into(),
        fs: Some(fs),
        uuid: Some(uuid.into()),
        label: Some(format!("label{number}")),
        partuuid: Some(format!("bbbbbbbb-0000-4000-8000-00000000000{number}")),
        partlabel: None,
        mount: path.map(|path| Mount { path: path.into(), options: None }),
        subvolume: None,
        layer: None,
        below: Vec::new(),
        more_disks: Vec::new(),
        preserved: false,
    }
}
