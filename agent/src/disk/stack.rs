//! The part of a plan that lies on top of partitions: arrays, encrypted containers, LVM.

use super::plan::{ContentPlan, DiskPlan, Uuids};
use anyhow::{Context, Result, anyhow};
use ka_cli::units::show_size;
use ka_layout::model::{Layout, TableKind};
use ka_layout::order::Layer;
use ka_layout::stack::{self, Base};
use ka_layout::types;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// What will become of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePlan {
    /// Which one it is in the layout.
    pub base: Base,
    /// As messages call it.
    pub text: String,
    /// What it is, with its names.
    pub kind: Kind,
    /// What it lies on.
    pub below: Vec<Base>,
    /// Its size in bytes; of a group, what it gives out.
    pub bytes: u64,
    /// The disks from which a BIOS can boot what lies in it, as indices into the plan's: all below an array, else one.
    pub disks: Vec<usize>,
    /// What is made in it.
    pub content: ContentPlan,
}

/// The kinds of volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// An array of md, level 1.
    Raid {
        /// Its name.
        name: String,
        /// Its UUID.
        uuid: Uuid,
        /// The version of its superblock.
        metadata: String,
    },
    /// An encrypted container.
    Luks {
        /// Its name when it is open.
        name: String,
        /// Its UUID.
        uuid: Uuid,
        /// 1 or 2.
        version: u32,
        /// More words for luksFormat.
        options: Vec<String>,
        /// The fourth field of crypttab.
        crypttab: String,
    },
    /// A volume group.
    Group {
        /// Its name.
        name: String,
    },
    /// A logical volume.
    Logical {
        /// The name of its group.
        group: String,
        /// Its own.
        name: String,
    },
}

impl VolumePlan {
    /// What it is, for autoconfig; nothing of a group.
    #[must_use]
    pub fn layer(&self) -> Option<Layer> {
        Some(match &self.kind {
            Kind::Raid { name, uuid, metadata } => {
                Layer::Raid { name: name.clone(), uuid: raid_uuid(*uuid), metadata: metadata.clone() }
            }
            Kind::Luks { name, uuid, crypttab, .. } => {
                Layer::Luks { name: name.clone(), uuid: uuid.to_string(), options: crypttab.clone() }
            }
            Kind::Group { .. } => return None,
            Kind::Logical { group, name } => Layer::Lvm { group: group.clone(), name: name.clone() },
        })
    }

    /// A line of the plan.
    #[must_use]
    pub fn line(&self) -> String {
        let mut line = format!("  {:<28} {:>9}", self.text, show_size(self.bytes));
        line.push_str(&self.content.text());
        line
    }
}

/// The layers that `top` lies on, each once, what is nearer to it first.
pub(super) fn layers_below(volumes: &[VolumePlan], top: &VolumePlan) -> Vec<Layer> {
    let mut found: Vec<Layer> = Vec::new();
    let mut next: Vec<Base> = top.below.clone();
    // Nothing lies on itself, and each thing carries one other, so this ends.
    while !next.is_empty() {
        let plans: Vec<&VolumePlan> = volumes.iter().filter(|v| next.contains(&v.base)).collect();
        for layer in plans.iter().filter_map(|p| p.layer()) {
            if !found.contains(&layer) {
                found.push(layer);
            }
        }
        next = plans.iter().flat_map(|p| p.below.clone()).collect();
    }
    found
}

/// As mdadm writes the UUID of an array.
pub fn raid_uuid(uuid: Uuid) -> String {
    let text = uuid.simple().to_string();
    [&text[..8], &text[8..16], &text[16..24], &text[24..]].join(":")
}

/// Plans the volumes of `layout` on the partitions of `disks`, in the order in which they are made.
///
/// # Errors
/// When something does not fit, or a UUID cannot be kept.
pub(super) fn plan(layout: &Layout, disks: &[DiskPlan], uuids: &mut Uuids) -> Result<Vec<VolumePlan>> {
    if !layout.has_volumes() {
        return Ok(Vec::new());
    }
    let mut partitions = BTreeMap::new();
    let mut disks_of: BTreeMap<Base, BTreeSet<usize>> = BTreeMap::new();
    for (i, disk) in disks.iter().enumerate() {
        for p in &disk.partitions {
            partitions.insert(p.extent.index, disk.bytes(&p.extent));
            disks_of.insert(Base::Partition(p.extent.index), [i].into());
        }
    }
    let sizes = stack::sizes(layout, &partitions).map_err(|e| anyhow!("fitting the volumes: {e}"))?;
    let order = layout.volumes_in_order().map_err(|_| anyhow!("volumes lie on each other in a circle"))?;
    let mut mirrors: BTreeSet<Base> = BTreeSet::new();
    let mut plans = Vec::new();
    for base in order {
        let text = layout.base_text(base);
        let kind = match base {
            Base::Raid(i) => {
                let raid = &layout.raids[i];
                Kind::Raid { name: raid.name.clone(), uuid: Uuid::new_v4(), metadata: raid.metadata.clone() }
            }
            Base::Luks(i) => {
                let luks = &layout.luks[i];
                Kind::Luks {
                    name: luks.name.clone(),
                    uuid: Uuid::new_v4(),
                    version: luks.version,
                    options: luks.options.clone(),
                    crypttab: luks.crypttab.clone().unwrap_or_else(|| "luks".into()),
                }
            }
            Base::Vg(i) => Kind::Group { name: layout.vgs[i].name.clone() },
            Base::Lv(i) => {
                Kind::Logical { group: layout.lvs[i].vg.clone(), name: layout.lvs[i].name.clone() }
            }
            Base::Partition(_) => continue,
        };
        let below = layout.bases_of(base);
        let on: BTreeSet<usize> = below.iter().filter_map(|b| disks_of.get(b)).flatten().copied().collect();
        let mirrored = matches!(base, Base::Raid(_)) || below.iter().any(|b| mirrors.contains(b));
        // A group over several disks boots from the one that has room for GRUB.
        let embeds =
            |i: &&usize| disks[**i].partitions.iter().any(|p| types::is_bios_boot(&p.kind, TableKind::Gpt));
        let one = on.iter().find(embeds).or(on.first());
        let content = match layout.content_of(base) {
            Some(content) => uuids.content(content).with_context(|| text.clone())?,
            None => ContentPlan::default(),
        };
        plans.push(VolumePlan {
            base,
            text,
            kind,
            below,
            bytes: sizes.get(&base).copied().unwrap_or_default(),
            disks: if mirrored { on.iter().copied().collect() } else { one.copied().into_iter().collect() },
            content,
        });
        disks_of.insert(base, on);
        if mirrored {
            mirrors.insert(base);
        }
    }
    Ok(plans)
}
