//! Which names are one file: the groups of hard links in the tree must be those of the manifest. Only files with several names
//! in the tree, or in the manifest, are remembered, each until all of them were seen.

use std::collections::HashMap;

use crate::manifest::{Content, Entry, Kind};
use crate::shown;
use crate::walk::{Item, inode};

/// What the golden tree calls the first name of an inode, and how many of its names are still to come.
struct Group {
    golden: Box<[u8]>,
    left: u32,
}

/// What a file of the manifest with several names is, for those names that turn out to be files of their own.
#[derive(Clone, Copy)]
pub(super) struct Leader {
    pub kind: Kind,
    pub content: Option<Content>,
    /// Names still to come, at most.
    left: u32,
}

#[derive(Default)]
pub(super) struct Links {
    groups: HashMap<(u32, u32, u64), Group>,
    leaders: HashMap<Box<[u8]>, Leader>,
}

impl Links {
    /// Remembers an entry of the manifest that has more names.
    pub(super) fn remember(&mut self, entry: &Entry<'_>) {
        if entry.links > 1 && !matches!(entry.kind, Kind::HardLink | Kind::Directory) {
            // What changed while it was packed is judged by its first name.
            let content = entry.content.filter(|_| !entry.changed);
            let leader = Leader { kind: entry.kind, content, left: entry.links - 1 };
            self.leaders.insert(entry.path.as_ref().into(), leader);
        }
    }

    /// What the further name `entry` is in the golden tree; none when the manifest does not say.
    pub(super) fn leader(&mut self, entry: &Entry<'_>) -> Option<Leader> {
        let leader = self.leaders.get_mut(&entry.link[..])?;
        leader.left = leader.left.saturating_sub(1);
        let found = *leader;
        if found.left == 0 {
            self.leaders.remove(&entry.link[..]);
        }
        Some(found)
    }

    /// Looks at a thing that is no directory, whose file's first name in the golden tree is `golden`. Says what is wrong.
    pub(super) fn look(&mut self, item: &Item<'_>, golden: &[u8]) -> Option<String> {
        let (key, names) = (inode(&item.stat), item.stat.stx_nlink);
        if names <= 1 {
            return (item.path != golden).then(|| "a file of its own".to_owned());
        }
        let Some(group) = self.groups.get_mut(&key) else {
            self.groups.insert(key, Group { golden: golden.into(), left: names - 1 });
            return (item.path != golden).then(|| format!("not the file at {}", shown(golden)));
        };
        let wrong = (*group.golden != *golden).then(|| format!("another name of {}", shown(&group.golden)));
        group.left = group.left.saturating_sub(1);
        if group.left == 0 {
            self.groups.remove(&key);
        }
        wrong
    }
}
