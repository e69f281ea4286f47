//! Which names are one file: the groups of hard links in the tree must be those of the manifest. Only files with several names
//! in the tree are remembered, each until all of them were seen.

use std::collections::HashMap;

use crate::shown;
use crate::walk::{Item, inode};

/// What the golden tree calls the first name of an inode, and how many of its names are still to come.
struct Group {
    golden: Box<[u8]>,
    left: u32,
}

#[derive(Default)]
pub(super) struct Links {
    groups: HashMap<(u32, u32, u64), Group>,
}

impl Links {
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
