//! What is not sent: globs on the absolute path inside the root. `*` stops at a slash, `**` does not. A directory that
//! matches is sent empty, with its own mode, owner and xattrs; a pattern that ends in `/*` or `/**` means the content of
//! the directory only, and so does one that ends in a slash; anything else that matches is left out. A pattern without a
//! leading slash matches at any depth.
//! What else globs can say stands in [`crate::glob`].

use std::io;

use crate::glob::{GlobError, Patterns, alternatives, escape};

/// What the exclude patterns say of one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Keep,
    /// A directory that is sent empty.
    Empty,
    LeaveOut,
}

pub(crate) struct Excludes {
    all: Patterns,
    content: Patterns,
}

impl Excludes {
    pub(crate) fn new(patterns: &[String]) -> Result<Self, GlobError> {
        let (mut all, mut content) = (Patterns::default(), Patterns::default());
        for (number, glob) in patterns.iter().enumerate() {
            for one in alternatives(glob)? {
                let rooted = if one.is_empty() || one.starts_with('/') { one } else { format!("/**/{one}") };
                let plain = rooted.trim_end_matches('/');
                let directory = if plain.len() < rooted.len() {
                    Some(plain)
                } else {
                    plain.strip_suffix("/**").or_else(|| plain.strip_suffix("/*"))
                };
                match directory {
                    // The content of the root itself.
                    Some("") => content.add(number, "/")?,
                    Some(directory) => content.add(number, directory)?,
                    None => all.add(number, plain)?,
                }
            }
        }
        Ok(Self { all, content })
    }

    /// The verdict on `path`, relative to the root and without a leading slash.
    pub(crate) fn verdict(&self, path: &[u8], directory: bool) -> Verdict {
        match directory {
            true if self.all.any(path) || self.content.any(path) => Verdict::Empty,
            false if self.all.any(path) => Verdict::LeaveOut,
            _ => Verdict::Keep,
        }
    }
}

/// What a deployment leaves out unless it is told otherwise: what lives in memory only, what the file systems make for
/// themselves (`lost+found` at the top of each of `mounts`, absolute paths), swap files under their usual names, and Ka's own state.
#[must_use]
pub fn default_excludes(mounts: &[String]) -> Vec<String> {
    let mut patterns: Vec<String> = [
        "/proc/*",
        "/sys/*",
        "/dev/*",
        "/run/*",
        "/tmp/*",
        "/var/tmp/*",
        "/var/lib/nfs/rpc_pipefs/*",
        "/swapfile",
        "/swap.img",
        "/var/lib/ka/*",
        "/var/log/ka/*",
    ]
    .map(str::to_owned)
    .into();
    patterns.push("/lost+found/*".to_owned());
    for mount in mounts {
        let mount = mount.trim_matches('/');
        if !mount.is_empty() {
            patterns.push(format!("/{}/lost+found/*", escape(mount)));
        }
    }
    patterns
}

/// The swap files in use on this machine (not the partitions), as exclude patterns.
///
/// # Errors
/// When `/proc/swaps` exists and cannot be read.
pub fn active_swap_files() -> io::Result<Vec<String>> {
    match std::fs::read_to_string("/proc/swaps") {
        Ok(text) => Ok(swap_files(&text)),
        // A kernel without swap.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

fn swap_files(proc_swaps: &str) -> Vec<String> {
    proc_swaps
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (path, kind) = (words.next()?, words.next()?);
            // A deleted swap file has no path any more.
            (kind == "file" && path.starts_with('/') && !line.contains("\\040(deleted)"))
                .then(|| escape(&String::from_utf8_lossy(&unescape(path.as_bytes()))))
        })
        .collect()
}

/// The kernel writes blanks and newlines in paths as `\040` and the like.
pub(crate) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let code = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match code {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let patterns =
            ["/tmp/*", "/cache", "/a/*.log", "*.bak", "/deep/**", "/x/**/y", "/usr/", "old///", "/opt/*/"]
                .map(str::to_owned);
        let excludes = Excludes::new(&patterns).unwrap();
        for (path, directory, verdict) in [
            ("tmp", true, Verdict::Empty),
            ("tmp", false, Verdict::Keep),
            ("tmpx", true, Verdict::Keep),
            ("cache", true, Verdict::Empty),
            ("cache", false, Verdict::LeaveOut),
            ("var/cache", true, Verdict::Keep),
            ("a/b.log", false, Verdict::LeaveOut),
            ("a/b/c.log", false, Verdict::Keep),
            ("q/w/e.bak", false, Verdict::LeaveOut),
            ("e.bak", false, Verdict::LeaveOut),
            ("deep", true, Verdict::Empty),
            ("x/1/2/y", false, Verdict::LeaveOut),
            ("usr", true, Verdict::Empty),
            ("usr", false, Verdict::Keep),
            ("srv/old", true, Verdict::Empty),
            ("srv/old", false, Verdict::Keep),
            ("opt", true, Verdict::Keep),
            ("opt/a", true, Verdict::Empty),
            ("opt/a", false, Verdict::Keep),
            ("", true, Verdict::Keep),
        ] {
            assert_eq!(excludes.verdict(path.as_bytes(), directory), verdict, "{path}");
        }
        let odd = Excludes::new(&["/od\u{64}*".to_owned()]).unwrap();
        assert_eq!(odd.verdict(b"odd\xff\xfe", false), Verdict::LeaveOut);
        for wrong in ["/a[", "", "/a//b", "/a/../b", "./a"] {
            assert!(Excludes::new(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn defaults_name_lost_and_found_of_each_mount_only() {
        let excludes = Excludes::new(&default_excludes(&["/".into(), "/srv/[x]".into()])).unwrap();
        for (path, verdict) in [
            ("lost+found", Verdict::Empty),
            ("srv/[x]/lost+found", Verdict::Empty),
            ("home/lost+found", Verdict::Keep),
            ("proc", Verdict::Empty),
            ("var/tmp", Verdict::Empty),
        ] {
            assert_eq!(excludes.verdict(path.as_bytes(), true), verdict, "{path}");
        }
        assert_eq!(excludes.verdict(b"swapfile", false), Verdict::LeaveOut);
    }

    #[test]
    fn swap_files_and_not_partitions() {
        let text = "Filename\t\tType\t\tSize\t\tUsed\t\tPriority\n\
            /dev/sda2                               partition\t1000\t0\t-2\n\
            /my\\040swap                            file\t1000\t0\t-3\n\
            /gone\\040(deleted)                     file\t1000\t0\t-4\n";
        assert_eq!(swap_files(text), ["/my swap"]);
    }
}
