//! Reads a manifest, line by line. It may come from another machine: everything is bounded and checked, and one that breaks
//! off, or whose entries are out of order, is refused.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::text::{self, MAX_LINE};
use super::{Entry, Header, ManifestError, VERSION, order};
use crate::expected::{Allows, Expected};

/// Most lines in front of the entries.
const MAX_HEADER: usize = 100_000;
/// Most bytes in front of the entries; zstd makes any number of them of a few.
const MAX_HEADER_BYTES: usize = 16 << 20;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Reads one manifest; packed or not.
pub struct Reader<'r> {
    input: Box<dyn BufRead + 'r>,
    header: Header,
    line: Vec<u8>,
    /// Lines read.
    number: u64,
    entries: u64,
    /// The line that [`Reader::new`] read too far.
    first: bool,
    last: Option<Cow<'static, [u8]>>,
    ended: bool,
    attributes: bool,
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("line", &self.number).finish_non_exhaustive()
    }
}

impl<'r> Reader<'r> {
    /// Reads up to the first entry.
    ///
    /// # Errors
    /// When it cannot be read, or is no manifest of a version that is known.
    pub fn new<R: Read + 'r>(input: R) -> Result<Self, ManifestError> {
        let mut input = BufReader::with_capacity(64 << 10, input);
        let start = input.fill_buf().map_err(|e| ManifestError::io("reading the manifest", e))?;
        let packed = start.starts_with(&ZSTD_MAGIC);
        let input: Box<dyn BufRead + 'r> = if packed {
            let decoder = zstd::Decoder::with_buffer(input)
                .map_err(|e| ManifestError::io("unpacking the manifest", e))?;
            Box::new(BufReader::with_capacity(64 << 10, decoder))
        } else {
            Box::new(input)
        };
        let mut reader = Self {
            input,
            header: Header::default(),
            line: Vec::new(),
            number: 0,
            entries: 0,
            first: false,
            last: None,
            ended: false,
            attributes: false,
        };
        reader.head(packed)?;
        Ok(reader)
    }

    /// What stands in front of the entries.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Whether the entries tell of flags and project ids; manifests that were made before these were looked at do not.
    #[must_use]
    pub fn has_attributes(&self) -> bool {
        self.attributes
    }

    /// The next entry; none at the manifest's proper end.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn next_entry(&mut self) -> Result<Option<Entry<'static>>, ManifestError> {
        if self.ended {
            return Ok(None);
        }
        if !std::mem::take(&mut self.first) {
            self.read_line()?;
        }
        if self.line.first() == Some(&b'#') {
            self.end()?;
            return Ok(None);
        }
        let entry = text::parse(&self.line).map_err(|what| self.wrong(what))?;
        let last = self.last.as_deref().unwrap_or_default();
        match (self.entries, order(last, &entry.path)) {
            (0, _) if !entry.path.is_empty() => return Err(self.wrong("the first entry is not the root")),
            (1.., Ordering::Equal | Ordering::Greater) => {
                return Err(self.wrong("this entry is out of order"));
            }
            _ => {}
        }
        self.last = Some(entry.path.clone());
        self.entries += 1;
        Ok(Some(entry))
    }

    fn wrong(&self, what: impl Into<String>) -> ManifestError {
        ManifestError::Line { line: self.number, what: what.into() }
    }

    /// Reads a whole line, without its newline.
    fn read_line(&mut self) -> Result<(), ManifestError> {
        self.line.clear();
        // Where an entry was huge, its memory is not kept.
        self.line.shrink_to(1 << 20);
        let mut limited = (&mut self.input).take(MAX_LINE as u64);
        match limited.read_until(b'\n', &mut self.line) {
            Ok(_) if self.line.last() == Some(&b'\n') => {
                self.line.pop();
                self.number += 1;
                Ok(())
            }
            Ok(length) if length == MAX_LINE => {
                self.number += 1;
                Err(self.wrong("longer than any line may be"))
            }
            Ok(_) => Err(ManifestError::Truncated { line: self.number }),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(ManifestError::Truncated { line: self.number })
            }
            Err(e) => Err(ManifestError::io(format!("reading the manifest after line {}", self.number), e)),
        }
    }

    fn head(&mut self, packed: bool) -> Result<(), ManifestError> {
        // A short text may be anything; what zstd cannot unpack to its end breaks off.
        let foreign = |e| match e {
            ManifestError::Truncated { .. } if packed => e,
            ManifestError::Io { .. } => e,
            _ => ManifestError::Foreign,
        };
        self.read_line().map_err(foreign)?;
        if self.line != b"#mtree" {
            return Err(ManifestError::Foreign);
        }
        self.read_line().map_err(foreign)?;
        let version = self.line.strip_prefix(b"#ka-manifest ").ok_or(ManifestError::Foreign)?;
        if version != VERSION.to_string().as_bytes() {
            return Err(ManifestError::Version(version.escape_ascii().to_string()));
        }
        let mut bytes = 0;
        for _ in 0..MAX_HEADER {
            self.read_line()?;
            if self.line.first() != Some(&b'#') || self.line.starts_with(b"#end ") {
                self.first = true;
                return Ok(());
            }
            bytes += self.line.len();
            if bytes > MAX_HEADER_BYTES {
                return Err(self.wrong("too much before the first entry"));
            }
            let line = std::mem::take(&mut self.line);
            let result = self.header_line(&line[1..]);
            self.line = line;
            result.map_err(|what| self.wrong(what))?;
        }
        Err(self.wrong("too many lines before the first entry"))
    }

    fn header_line(&mut self, line: &[u8]) -> Result<(), String> {
        let mut words = line.split(|&b| b == b' ');
        let key = words.next().unwrap_or_default();
        let values = words.map(text::unescape).collect::<Result<Vec<_>, _>>()?;
        let utf8 =
            |value: &[u8]| String::from_utf8(value.to_vec()).map_err(|_| "text that is not UTF-8".to_owned());
        let header = &mut self.header;
        match (key, &values[..]) {
            (b"deployment", [name]) => header.deployment = utf8(name)?,
            (b"wave", [number]) => {
                let text = utf8(number)?;
                header.wave = text::number(&text).ok_or_else(|| format!("`{text}` is no wave"))?;
            }
            (b"root", [path]) => header.root = PathBuf::from(OsString::from_vec(path.clone())),
            (b"mount", [path]) => header.mounts.push(utf8(path)?),
            (b"attributes", [flags, project]) if flags == b"flags" && project == b"projid" => {
                self.attributes = true;
            }
            (b"exclude", [glob]) => header.excludes.push(utf8(glob)?),
            (b"expect", [what, glob, why]) => header.expected.push(Expected {
                allows: utf8(what)?.parse::<Allows>()?,
                glob: utf8(glob)?,
                why: utf8(why)?,
            }),
            _ => return Err(format!("`#{}` means nothing here", line.escape_ascii())),
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), ManifestError> {
        let count = self.line.strip_prefix(b"#end ").and_then(|c| std::str::from_utf8(c).ok());
        let count: u64 =
            count.and_then(text::number).ok_or_else(|| self.wrong("a comment between the entries"))?;
        if count != self.entries {
            return Err(self.wrong(format!("{count} entries should be there, but {} are", self.entries)));
        }
        let more = self.input.fill_buf().map_err(|e| ManifestError::io("reading the manifest's end", e))?;
        if !more.is_empty() {
            return Err(self.wrong("something follows the line that ends the manifest"));
        }
        self.ended = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Kind, Writer};
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            deployment: "20260101-000000-abcdef".to_owned(),
            wave: 2,
            root: PathBuf::from("/srv/with blank"),
            mounts: vec!["/".to_owned(), "/boot".to_owned()],
            excludes: vec!["/tmp/*".to_owned(), "*.b a k".to_owned()],
            expected: vec![Expected {
                allows: "content,extra".parse().unwrap(),
                glob: "/etc/{hostname,hosts}".to_owned(),
                why: "its own name".to_owned(),
            }],
        }
    }

    fn sorted(mut entries: Vec<Entry<'static>>) -> Vec<Entry<'static>> {
        entries.sort_by(|a, b| order(&a.path, &b.path));
        entries.dedup_by(|a, b| a.path == b.path);
        if entries.first().is_none_or(|e| !e.path.is_empty()) {
            let root = text::parse(b". type=dir mode=0755 uid=0 gid=0 time=0.000000000").unwrap();
            entries.insert(0, root);
        }
        entries
    }

    fn written(entries: &[Entry<'_>]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest");
        let mut writer = Writer::create(&path, &header()).unwrap();
        for entry in entries {
            writer.add(entry);
        }
        let done = writer.finish().unwrap();
        assert_eq!(done.entries, entries.len() as u64);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(done.bytes, bytes.len() as u64);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<(Header, Vec<Entry<'static>>), ManifestError> {
        let mut reader = Reader::new(bytes)?;
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_entry()? {
            entries.push(entry);
        }
        assert!(reader.next_entry()?.is_none());
        Ok((reader.header().clone(), entries))
    }

    fn plain(bytes: &[u8]) -> String {
        String::from_utf8(zstd::decode_all(bytes).unwrap()).unwrap()
    }

    #[test]
    fn a_writer_that_is_dropped_leaves_nothing_and_keeps_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("manifest");
        std::fs::write(&path, b"the one before").unwrap();
        drop(Writer::create(&path, &header()).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(std::fs::read(&path).unwrap(), b"the one before");
        let error = Writer::create(&folder.path().join("no/such"), &header()).unwrap_err().to_string();
        assert!(error.contains("no/such.unfinished: No such file"), "{error}");
    }

    #[test]
    fn a_disk_that_is_full_is_told_at_the_end() {
        // Everything is written to /dev/full, which the name links to.
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/full", folder.path().join("m.unfinished")).unwrap();
        let mut writer = Writer::create(&folder.path().join("m"), &header()).unwrap();
        let root = text::parse(b". type=dir mode=0755 uid=0 gid=0 time=0.000000000").unwrap();
        for _ in 0..100_000 {
            writer.add(&root);
        }
        let error = writer.finish().unwrap_err().to_string();
        assert!(error.contains("No space left"), "{error}");
        assert!(!folder.path().join("m").exists());
    }

    #[test]
    fn damage_and_strangers_are_named() {
        let root = text::parse(b". type=dir mode=0755 uid=0 gid=0 time=0.000000000").unwrap();
        let text = plain(&written(&sorted(vec![root])));
        let error = |text: &str| read(text.as_bytes()).unwrap_err().to_string();
        assert!(read(text.as_bytes()).is_ok());
        assert!(error("").contains("no manifest"));
        assert!(error("#mtree\n/set type=file\n").contains("no manifest"));
        assert!(read(&[0x7f; 5000]).unwrap_err().to_string().contains("no manifest"));
        assert!(error(&text.replace("#ka-manifest 1", "#ka-manifest 2")).contains("version 2"));
        assert!(error(&text.replace("#wave 2", "#wave 2 3")).contains("line 4: `#wave"));
        assert!(error(&text.replace("#end 1", "#end 2")).contains("2 entries should be there, but 1"));
        let more = format!("#exclude {}\n", "x".repeat(1 << 20)).repeat(17);
        assert!(
            error(&text.replace("#wave 2\n", &more)).contains("line 19: too much before the first entry")
        );
        assert!(error(&text.replace("#end 1\n", "")).contains("breaks off"));
        assert!(error(&format!("{text}more\n")).contains("something follows"));
        let line = text.lines().find(|l| l.starts_with(". ")).unwrap();
        assert!(error(&text.replace(line, &format!("{line}\n{line}"))).contains("out of order"));
        assert!(error(&text.replace(line, &line.replace(". ", "./x "))).contains("not the root"));
    }

    #[test]
    fn bsdtar_reads_it_as_an_mtree() {
        let lines = [
            ". type=dir mode=0755 uid=0 gid=0 time=1000000000.000000000",
            "./a\\012b type=link mode=0777 uid=1 gid=2 time=1000000000.000000001 link=to\\040there",
            "./dev type=char mode=0600 uid=0 gid=0 time=1000000000.000000000 device=linux,1,3",
            "./dir type=dir mode=0755 uid=0 gid=0 time=1000000000.000000000 flags=schg,nodump",
        ];
        let entries: Vec<Entry<'_>> = lines.iter().map(|l| text::parse(l.as_bytes()).unwrap()).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), written(&entries)).unwrap();
        let listed =
            crate::testing::run(std::process::Command::new("bsdtar").arg("-tvf").arg(file.path())).unwrap();
        let listed = String::from_utf8(listed).unwrap();
        let words: Vec<Vec<&str>> = listed.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(words.len(), 4, "{listed}");
        assert_eq!((words[0][0], words[1][0], words[2][0]), ("drwxr-xr-x", "lrwxrwxrwx", "crw-------"));
        assert!(listed.contains("./a\\nb -> to there") && listed.contains("1,3"), "{listed}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_written_is_read_and_half_of_it_is_refused(
            entries in proptest::collection::vec(text::tests::any_entry(), 0..20),
            at in any::<prop::sample::Index>(), bit in 0u32..8,
        ) {
            let entries = sorted(entries);
            let bytes = written(&entries);
            prop_assert_eq!(read(&bytes).unwrap(), (header(), entries.clone()));
            let text = plain(&bytes);
            prop_assert_eq!(read(text.as_bytes()).unwrap(), (header(), entries.clone()));
            prop_assert!(read(&bytes[..at.index(bytes.len())]).is_err());
            prop_assert!(read(&text.as_bytes()[..at.index(text.len())]).is_err());
            let mut damaged = bytes.clone();
            let at = at.index(bytes.len());
            damaged[at] ^= 1 << bit;
            // A flipped bit in zstd's own frame may mean nothing; what is read is what was written.
            if let Ok(read) = read(&damaged) {
                prop_assert_eq!(read, (header(), entries));
            }
        }

        #[test]
        fn noise_is_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..2000), packed in any::<bool>()) {
            if packed {
                bytes.splice(0..0, ZSTD_MAGIC);
            }
            prop_assert!(read(&bytes).is_err());
        }
    }

    #[test]
    fn kinds_are_told_apart() {
        let hard = text::parse(b"./b hardlink=./a").unwrap();
        assert_eq!((hard.kind, &hard.link[..]), (Kind::HardLink, &b"a"[..]));
    }
}
