//! The archivers, and their command lines: each with everything that it can carry of a file.

use serde::Serialize;
use std::ffi::OsString;
use std::path::Path;

/// A program that packs and unpacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Archiver {
    /// Ka's archive, in a program of its own.
    Ka,
    /// GNU tar.
    Tar,
    /// libarchive's.
    Bsdtar,
}

impl Archiver {
    /// All.
    pub const ALL: [Self; 3] = [Self::Ka, Self::Tar, Self::Bsdtar];

    /// Its name on command lines and in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ka => "ka",
            Self::Tar => "tar",
            Self::Bsdtar => "bsdtar",
        }
    }

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|archiver| archiver.name() == name)
    }

    /// Whether it has the file system put all on the disk by itself.
    #[must_use]
    pub fn syncs(self) -> bool {
        self == Self::Ka
    }

    /// Packs `tree` into `stream`; `ka` is Ka's program.
    #[must_use]
    pub fn pack(self, ka: &Path, tree: &Path, stream: &Path) -> Vec<OsString> {
        match self {
            Self::Ka => vec![ka.into(), "pack".into(), tree.into(), stream.into()],
            Self::Tar => {
                words("tar --numeric-owner --xattrs --acls --sparse -cf", &[stream], "-C", tree, ".")
            }
            Self::Bsdtar => words("bsdtar --numeric-owner --xattrs --acls -cf", &[stream], "-C", tree, "."),
        }
    }

    /// Unpacks `stream` into `target`.
    #[must_use]
    pub fn unpack(self, ka: &Path, stream: &Path, target: &Path) -> Vec<OsString> {
        match self {
            Self::Ka => vec![ka.into(), "unpack".into(), stream.into(), target.into()],
            Self::Tar => words(
                "tar --numeric-owner --xattrs --xattrs-include=* --acls --sparse --warning=no-timestamp -xpf",
                &[stream],
                "-C",
                target,
                "",
            ),
            Self::Bsdtar => words("bsdtar --numeric-owner --xattrs --acls -xpf", &[stream], "-C", target, ""),
        }
    }
}

fn words(start: &str, paths: &[&Path], option: &str, path: &Path, end: &str) -> Vec<OsString> {
    let mut words: Vec<OsString> = start.split(' ').map(OsString::from).collect();
    words.extend(paths.iter().map(OsString::from));
    words.extend([option.into(), path.into()]);
    if !end.is_empty() {
        words.push(end.into());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_command_lines_are_whole() {
        assert!(Archiver::ALL.into_iter().all(|archiver| Archiver::named(archiver.name()) == Some(archiver)));
        let line = |words: Vec<OsString>| {
            words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        let (ka, a, b) = (Path::new("/ka"), Path::new("/a"), Path::new("/b"));
        assert_eq!(line(Archiver::Ka.pack(ka, a, b)), "/ka pack /a /b");
        assert_eq!(
            line(Archiver::Tar.pack(ka, a, b)),
            "tar --numeric-owner --xattrs --acls --sparse -cf /b -C /a ."
        );
        assert!(line(Archiver::Tar.unpack(ka, a, b)).ends_with("-xpf /a -C /b"));
    }
}
