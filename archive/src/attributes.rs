//! What `chattr` and `lsattr` show (the flags of an inode) and project ids, of files and directories on file systems that
//! have them. In the stream, flags stand as words in `SCHILY.fflags`, as star and bsdtar know them, and a project id in
//! `KA.projid`. Flags that say how the file system keeps the file (extents, inline data, ...) are its own and not carried;
//! nor are verity, encryption and case folding, which are no mere flags.

use rustix::fd::BorrowedFd;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;

/// `FS_NOCOMP_FL`.
pub(crate) const NOCOMP: IFlags = IFlags::from_bits_retain(0x400);

/// The flags that are carried, by the names that star and libarchive have given them.
const NAMES: [(IFlags, &str); 15] = [
    (IFlags::APPEND, "sappnd"),
    (IFlags::IMMUTABLE, "schg"),
    (IFlags::NODUMP, "nodump"),
    (IFlags::NOATIME, "noatime"),
    (IFlags::SYNC, "sync"),
    (IFlags::DIRSYNC, "dirsync"),
    (IFlags::COMPRESSED, "compress"),
    (NOCOMP, "nocompress"),
    (IFlags::NOCOW, "nocow"),
    (IFlags::JOURNALING, "journal-data"),
    (IFlags::NOTAIL, "notail"),
    (IFlags::SECURE_REMOVAL, "secdel"),
    (IFlags::UNRM, "undel"),
    (IFlags::TOPDIR, "topdir"),
    (IFlags::PROJECT_INHERIT, "projinherit"),
];

/// Flags and project id of an inode; the default is none of either.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Bits of [`IFlags`].
    flags: u32,
    /// The project id; 0 is none.
    pub project: u32,
}

/// A file system that has no such thing, as opposed to one that fails.
fn lacks(errno: Errno) -> bool {
    [Errno::NOTTY, Errno::OPNOTSUPP, Errno::INVAL, Errno::NOSYS].contains(&errno)
}

fn carried() -> IFlags {
    NAMES.iter().fold(IFlags::empty(), |all, (flag, _)| all | *flag)
}

/// Flags that forbid what is still to be done to what has them.
fn sealing() -> IFlags {
    IFlags::APPEND | IFlags::IMMUTABLE
}

impl Attributes {
    /// Those of an open file or directory; none of either where the file system has no such thing.
    ///
    /// # Errors
    /// What else the kernel says.
    pub fn read(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let flags = match ioctl_getflags(fd) {
            Ok(flags) => (flags & carried()).bits(),
            Err(e) if lacks(e) => return Ok(Self::default()),
            Err(e) => return Err(e),
        };
        let project = match ka_sys::fileattr::project(fd) {
            Ok(project) => project,
            Err(e) => match Errno::from_io_error(&e) {
                Some(errno) if !lacks(errno) => return Err(errno),
                _ => 0,
            },
        };
        Ok(Self { flags, project })
    }

    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Of the flags only some.
    pub(crate) fn only(self, some: IFlags) -> Self {
        Self { flags: self.flags & some.bits(), ..self }
    }

    /// The words of `SCHILY.fflags`; empty without flags.
    #[must_use]
    pub fn words(self) -> String {
        if self.flags == 0 {
            return String::new();
        }
        let flags = IFlags::from_bits_retain(self.flags);
        let words: Vec<&str> =
            NAMES.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name).collect();
        words.join(",")
    }

    /// Takes the words of `SCHILY.fflags`; false when some of them mean nothing here.
    pub(crate) fn take_words(&mut self, words: &[u8]) -> bool {
        self.flags = 0;
        let mut known = true;
        for word in words.split(|&b| b == b',').filter(|word| !word.is_empty()) {
            // Names that others use for the same.
            let word: &[u8] = match word {
                b"sappend" | b"uappnd" | b"uappend" => b"sappnd",
                b"schange" | b"simmutable" | b"uchg" | b"uchange" | b"uimmutable" => b"schg",
                other => other,
            };
            match NAMES.iter().find(|(_, name)| name.as_bytes() == word) {
                Some((flag, _)) => self.flags |= flag.bits(),
                None => known = false,
            }
        }
        known
    }

    /// What can be set while work goes on.
    #[must_use]
    pub fn open(self) -> Self {
        Self { flags: (IFlags::from_bits_retain(self.flags) - sealing()).bits(), ..self }
    }

    /// What can be set only when nothing is to be done any more; none when there is no such thing.
    #[must_use]
    pub fn seal(self) -> Option<Self> {
        IFlags::from_bits_retain(self.flags).intersects(sealing()).then_some(self)
    }

    /// Gives them to an open file or directory; flags that it has beside are taken from it.
    ///
    /// # Errors
    /// What the kernel says, also when it has set all but some that the file system lacks.
    pub fn set(self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let mut lacking = Ok(());
        if self.project != 0
            && let Err(e) = ka_sys::fileattr::set_project(fd, self.project)
        {
            match Errno::from_io_error(&e) {
                Some(errno) if lacks(errno) => lacking = Err(errno),
                other => return Err(other.unwrap_or(Errno::IO)),
            }
        }
        let now = ioctl_getflags(fd)?;
        let base = now - carried();
        let wanted = base | IFlags::from_bits_retain(self.flags);
        if wanted == now {
            return lacking;
        }
        match ioctl_setflags(fd, wanted) {
            Ok(()) => return lacking,
            Err(e) if lacks(e) => {}
            Err(e) => return Err(e),
        }
        // One flag that the file system lacks keeps none of the others from it.
        let mut held = base;
        for flag in wanted.difference(base).iter() {
            match ioctl_setflags(fd, held | flag) {
                Ok(()) => held |= flag,
                Err(e) => lacking = Err(e),
            }
        }
        lacking
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lead_back_and_others_are_told() {
        for (flag, name) in NAMES {
            let mut attributes = Attributes::default();
            assert!(attributes.take_words(name.as_bytes()), "{name}");
            assert_eq!((attributes.flags, attributes.words().as_str()), (flag.bits(), name));
        }
        let mut attributes = Attributes::default();
        assert!(attributes.take_words(b"uchg,nodump"));
        assert_eq!(attributes.words(), "schg,nodump");
        assert_eq!(attributes.open().words(), "nodump");
        assert!(attributes.seal().is_some() && attributes.open().seal().is_none());
        assert!(!attributes.take_words(b"nodump,hidden"));
        assert_eq!(attributes.words(), "nodump");
    }
}
