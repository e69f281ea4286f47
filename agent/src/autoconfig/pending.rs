//! What a dry run would have written: changes are kept here in place of the clone's files, and are read back from here, so
//! that pieces see what pieces before them did.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What became of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It has this content.
    Content(Vec<u8>),
    /// It is gone.
    Gone,
    /// It is what lies at this path on the disk.
    Moved(PathBuf),
}

/// Changes that were not made, by the real path of each file.
#[derive(Debug, Default)]
pub struct Pending(RefCell<BTreeMap<PathBuf, Fate>>);

impl Pending {
    /// What became of `path`; none when nothing did.
    pub fn fate(&self, path: &Path) -> Option<Fate> {
        let map = self.0.borrow();
        if let Some(fate) = map.get(path) {
            return Some(fate.clone());
        }
        // Below a directory that was moved, or moved away.
        path.ancestors().skip(1).find_map(|above| match map.get(above)? {
            Fate::Gone => Some(Fate::Gone),
            Fate::Moved(from) => Some(Fate::Moved(from.join(path.strip_prefix(above).ok()?))),
            Fate::Content(_) => None,
        })
    }

    /// Notes what becomes of `path`; with a directory that goes, what was noted of its files goes too.
    pub fn set(&self, path: PathBuf, fate: Fate) {
        let mut map = self.0.borrow_mut();
        if fate == Fate::Gone {
            map.retain(|below, _| !below.starts_with(&path));
        }
        map.insert(path, fate);
    }

    /// Notes that `from` is called `to` from now on, with all that was noted of files below it.
    pub fn rename(&self, from: &Path, to: &Path) {
        let fate = self.fate(from).unwrap_or_else(|| Fate::Moved(from.to_owned()));
        let mut map = self.0.borrow_mut();
        let below: Vec<PathBuf> = map.keys().filter(|p| *p != from && p.starts_with(from)).cloned().collect();
        for path in below {
            if let (Some(fate), Ok(rest)) = (map.remove(&path), path.strip_prefix(from)) {
                map.insert(to.join(rest), fate);
            }
        }
        map.insert(from.to_owned(), Fate::Gone);
        map.insert(to.to_owned(), fate);
    }

    /// The names in the directory `dir`, where `names` are those on the disk.
    pub fn names(&self, dir: &Path, names: &mut Vec<OsString>) {
        for (path, fate) in self.0.borrow().iter().filter(|(path, _)| path.parent() == Some(dir)) {
            let Some(name) = path.file_name() else { continue };
            names.retain(|n| n != name);
            if *fate != Fate::Gone {
                names.push(name.to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moved_directories_take_what_is_in_them_along() {
        let pending = Pending::default();
        pending.set("/t/old/changed".into(), Fate::Content(b"x".to_vec()));
        pending.rename(Path::new("/t/old"), Path::new("/t/new"));
        assert_eq!(pending.fate(Path::new("/t/old/a")), Some(Fate::Gone));
        assert_eq!(pending.fate(Path::new("/t/new/a/b")), Some(Fate::Moved("/t/old/a/b".into())));
        assert_eq!(pending.fate(Path::new("/t/new/changed")), Some(Fate::Content(b"x".to_vec())));
        assert_eq!(pending.fate(Path::new("/t/other")), None);
        let mut names = vec!["old".into(), "stays".into()];
        pending.names(Path::new("/t"), &mut names);
        assert_eq!(names, ["stays", "new"].map(OsString::from));
        pending.set("/t/new".into(), Fate::Gone);
        assert_eq!(pending.fate(Path::new("/t/new/changed")), Some(Fate::Gone));
    }
}
