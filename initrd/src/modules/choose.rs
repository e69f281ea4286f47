//! Choosing modules. `auto` is a table of what nodes boot from and install to: every disk controller, the file systems
//! that Ka makes, every wired network card that sits on a bus of its own, USB so that keyboards and USB network adapters
//! work, and the little that virtual machines need. What these depend on, and what they wish for, comes along.

use super::index::{Index, normal};
use crate::Error;
use crate::tree::Part;
use std::collections::{BTreeMap, BTreeSet};

/// A line of the table of `auto`.
struct Class {
    part: Part,
    /// Directories below `kernel/` (with `/` at the end) and names of modules.
    take: &'static [&'static str],
    /// What is left out of those: directories, names, or endings of names (`*_cs`).
    leave: &'static [&'static str],
}

const AUTO: &[Class] = &[
    Class {
        part: Part::DiskModules,
        take: &[
            "drivers/ata/",
            "drivers/nvme/host/",
            "drivers/scsi/",
            "drivers/message/fusion/",
            "drivers/block/mtip32xx/",
            "drivers/mmc/",
            "drivers/ufs/",
            "drivers/usb/storage/",
            "drivers/usb/host/",
            "drivers/virtio/",
            "virtio_blk",
            "xen_blkfront",
            "hv_vmbus",
            "pci_hyperv",
            // NVMe disks behind Intel's Volume Management Device are seen only with it.
            "vmd",
        ],
        leave: &[
            // Software targets and initiators (iSCSI, FCoE): Ka installs on disks, not over a storage network of Ethernet.
            "drivers/scsi/be2iscsi/",
            "drivers/scsi/bnx2fc/",
            "drivers/scsi/bnx2i/",
            "drivers/scsi/cxgbi/",
            "drivers/scsi/fcoe/",
            "drivers/scsi/libfc/",
            "drivers/scsi/qedf/",
            "drivers/scsi/qedi/",
            "drivers/scsi/pcmcia/",
            "drivers/scsi/device_handler/",
            "fnic",
            "iscsi_tcp",
            "iscsi_boot_sysfs",
            "libiscsi_tcp",
            "qla4xxx",
            "csiostor",
            "libiscsi",
            "scsi_transport_iscsi",
            "scsi_transport_srp",
            // What makes a machine a SCSI target, and Fibre Channel cards that were last sold in 2010.
            "tcm_qla2xxx",
            "efct",
            "bfa",
            // Tapes, changers, enclosures, tests.
            "ch",
            "osst",
            "scsi_debug",
            "ses",
            "st",
            // Fabrics.
            "nvme_fc",
            "nvme_rdma",
            "nvme_tcp",
            "pata_pcmcia",
            "mptctl",
            "mptlan",
            "virtio_balloon",
            "virtio_mem",
            "virtio_input",
            "sdio_uart",
            "*_cs",
        ],
    },
    Class {
        part: Part::FileSystemModules,
        take: &[
            "fs/ext4/",
            "fs/xfs/",
            "fs/btrfs/",
            "fs/fat/",
            "fs/efivarfs/",
            "nls_cp437",
            "nls_ascii",
            "nls_iso8859_1",
            "nls_utf8",
            // What file systems ask the kernel for by an alias, and the quick variants of it.
            "crc32c_generic",
            "crc32c_intel",
            "crc32_pclmul",
            "crct10dif_pclmul",
            "sha256_ssse3",
        ],
        leave: &[],
    },
    Class {
        // Arrays, LVM and encrypted volumes, with the ciphers that cryptsetup uses.
        part: Part::DiskModules,
        take: &[
            "dm_mod",
            "dm_crypt",
            "md_mod",
            "raid1",
            "aes_generic",
            "aesni_intel",
            "xts",
            "cbc",
            "essiv",
            "cryptd",
            "sha256_generic",
            "sha512_generic",
            "algif_skcipher",
            "algif_hash",
            "af_alg",
        ],
        leave: &[],
    },
    Class {
        part: Part::NetworkModules,
        take: &[
            "drivers/net/ethernet/",
            "drivers/net/hyperv/",
            "drivers/net/vmxnet3/",
            "drivers/net/phy/",
            "drivers/net/mdio/",
            "drivers/net/pcs/",
            "virtio_net",
            "xen_netfront",
            "af_packet",
            "ipv6",
            "unix",
            "aqc111",
            "asix",
            "ax88179_178a",
            "cdc_ether",
            "cdc_ncm",
            "lan78xx",
            "r8152",
            "r8153_ecm",
            "smsc75xx",
            "smsc95xx",
        ],
        leave: &["*_cs", "ch_ktls", "chcr", "drivers/net/ethernet/chelsio/inline_crypto/", "mlxsw_core"],
    },
    Class {
        part: Part::OtherModules,
        take: &[
            "hid",
            "hid_generic",
            "hid_hyperv",
            "usbhid",
            "hyperv_keyboard",
            "atkbd",
            "i8042",
            "virtio_rng",
            "evdev",
        ],
        leave: &[],
    },
];

/// What the operator asked for: `auto`, `all`, or a list of names, directories and these two words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    words: Vec<String>,
}

impl Choice {
    /// Reads `auto`, `all`, `virtio_net,ext4`, `auto,drivers/infiniband/`.
    ///
    /// # Errors
    /// When nothing is asked for.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let words: Vec<String> =
            text.split([',', ' ']).map(str::trim).filter(|w| !w.is_empty()).map(str::to_owned).collect();
        if words.is_empty() {
            return Err(Error::Module(
                "no modules asked for; `auto`, `all` or a list is expected".to_owned(),
            ));
        }
        Ok(Self { words })
    }

    /// As it was written.
    #[must_use]
    pub fn text(&self) -> String {
        self.words.join(",")
    }
}

/// What was chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    /// The modules, with what each is for.
    pub modules: BTreeMap<String, Part>,
}

/// The modules of `index` that `choice` means, with all that they need and wish for.
///
/// # Errors
/// When a name in it is no module of this kernel.
pub fn choose(index: &Index, choice: &Choice) -> Result<Chosen, Error> {
    let mut chosen = BTreeMap::new();
    for word in &choice.words {
        match word.as_str() {
            "auto" => {
                for (name, part) in auto(index) {
                    chosen.entry(name).or_insert(part);
                }
            }
            "all" => {
                let classes: BTreeMap<String, Part> = auto(index).collect();
                for name in index.modules.keys() {
                    let part = classes.get(name).copied().unwrap_or(Part::OtherModules);
                    chosen.entry(name.clone()).or_insert(part);
                }
            }
            _ => {
                let names: Vec<String> = if word.ends_with('/') {
                    let names = index.modules.iter().filter(|(_, m)| in_directory(&m.path, word));
                    names.map(|(name, _)| name.clone()).collect()
                } else {
                    index.find(word)
                };
                if names.is_empty() && !index.builtin.contains(&normal(word)) {
                    return Err(Error::Module(format!("this kernel has no module `{word}`")));
                }
                for name in names {
                    chosen.entry(name).or_insert(Part::OtherModules);
                }
            }
        }
    }
    let mut open: Vec<(String, Part)> = chosen.iter().map(|(n, p)| (n.clone(), *p)).collect();
    while let Some((name, part)) = open.pop() {
        let needs = index.modules.get(&name).into_iter().flat_map(|m| m.needs.clone());
        let wishes = index.wishes.iter().filter(|(module, _)| *module == name).flat_map(|(_, wishes)| wishes);
        // A wish for what does not exist (or is built in) is granted by nothing, as in modprobe.
        let wishes = wishes.flat_map(|wish| index.find(wish));
        for wanted in needs.chain(wishes).collect::<BTreeSet<_>>() {
            if index.modules.contains_key(&wanted) && !chosen.contains_key(&wanted) {
                chosen.insert(wanted.clone(), part);
                open.push((wanted, part));
            }
        }
    }
    Ok(Chosen { modules: chosen })
}

fn auto(index: &Index) -> impl Iterator<Item = (String, Part)> {
    index.modules.iter().filter_map(|(name, module)| {
        let class = AUTO.iter().find(|class| {
            class.take.iter().any(|rule| matches(rule, name, &module.path))
                && !class.leave.iter().any(|rule| matches(rule, name, &module.path))
        })?;
        Some((name.clone(), class.part))
    })
}

fn matches(rule: &str, name: &str, path: &str) -> bool {
    match rule.strip_prefix('*') {
        Some(ending) => name.ends_with(ending),
        None if rule.ends_with('/') => in_directory(path, rule),
        None => name == rule,
    }
}

/// Whether `path` lies in `directory`, which may be written with or without `kernel/` before it.
fn in_directory(path: &str, directory: &str) -> bool {
    let strip = |p: &str| p.trim_start_matches('/').trim_start_matches("kernel/").to_owned();
    strip(path).starts_with(&strip(directory))
}

#[cfg(test)]
mod tests {
    use super::super::index::{parse_aliases, parse_dep};
    use super::*;

    fn index() -> Index {
        let dep = "kernel/drivers/ata/ahci.ko: kernel/drivers/ata/libahci.ko kernel/drivers/ata/libata.ko\n\
            kernel/drivers/ata/libahci.ko: kernel/drivers/ata/libata.ko\n\
            kernel/drivers/ata/libata.ko: kernel/drivers/scsi/scsi_mod.ko\n\
            kernel/drivers/ata/pata_pcmcia.ko: kernel/drivers/pcmcia/pcmcia.ko\n\
            kernel/drivers/pcmcia/pcmcia.ko:\nkernel/drivers/scsi/scsi_mod.ko:\nkernel/drivers/scsi/scsi_debug.ko:\n\
            kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko\nkernel/fs/jbd2/jbd2.ko:\n\
            kernel/crypto/crc32c_generic.ko:\nkernel/crypto/odd.ko:\n\
            kernel/drivers/net/ethernet/intel/e1000/e1000.ko:\nkernel/drivers/net/ethernet/8390/pcnet_cs.ko:\n\
            kernel/sound/snd.ko:\nkernel/drivers/net/virtio_net.ko:\nkernel/fs/cifs/cifs.ko:\n";
        Index {
            modules: parse_dep(dep),
            aliases: parse_aliases("alias crypto-odd odd\n"),
            wishes: vec![("jbd2".into(), vec!["crypto-odd".into(), "nowhere".into()])],
            builtin: ["nvme".to_owned()].into(),
            ..Index::default()
        }
    }

    fn names(choice: &str) -> Vec<String> {
        choose(&index(), &Choice::parse(choice).unwrap()).unwrap().modules.into_keys().collect()
    }

    #[test]
    fn auto_takes_disks_file_systems_and_networks_with_what_they_need_and_wish() {
        let names = names("auto");
        for name in
            ["ahci", "libata", "scsi_mod", "ext4", "jbd2", "odd", "e1000", "virtio_net", "crc32c_generic"]
        {
            assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
        }
        for name in ["snd", "cifs", "pata_pcmcia", "pcmcia", "pcnet_cs", "scsi_debug"] {
            assert!(!names.iter().any(|n| n == name), "{name} in {names:?}");
        }
    }

    #[test]
    fn lists_all_and_directories() {
        assert_eq!(names("virtio-net"), ["virtio_net"]);
        assert_eq!(names("ahci, nvme"), ["ahci", "libahci", "libata", "scsi_mod"]);
        assert_eq!(names("kernel/fs/"), ["cifs", "ext4", "jbd2", "odd"]);
        assert_eq!(names("all").len(), index().modules.len());
        assert!(names("auto,snd").contains(&"snd".to_owned()));
        let error = choose(&index(), &Choice::parse("nosuch").unwrap()).unwrap_err().to_string();
        assert_eq!(error, "this kernel has no module `nosuch`");
        assert!(Choice::parse(" , ").is_err());
    }
}
