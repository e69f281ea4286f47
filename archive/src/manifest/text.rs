//! A manifest's lines: words between single blanks, as in mtree(5). Every byte of a path or value that is not a plain letter,
//! digit or one of a few signs stands as three octal digits, so that any name the kernel allows comes back whole.

use std::borrow::Cow;
use std::ffi::CString;
use std::io::Write as _;

use super::{Attributes, Content, Entry};
use crate::digest::Digest;
use crate::entry::{Kind, MAX_PATH};

/// Longest line, in bytes: all attributes that the packer sends of one entry, each byte escaped, and the paths.
pub(super) const MAX_LINE: usize = 4 * (crate::pax::MAX_EXTENDED + 2 * MAX_PATH) + 4096;

/// Most words of a line that are no attributes; none has so many.
const MAX_WORDS: usize = 16;

pub(crate) fn escape(bytes: &[u8], out: &mut Vec<u8>) {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_.,/:+@%~".contains(&byte) {
            out.push(byte);
        } else {
            let digit = |shift: u8| b'0' + (byte >> shift & 7);
            out.extend_from_slice(&[b'\\', digit(6), digit(3), digit(0)]);
        }
    }
}

/// What [`escape`] wrote. Only that is taken: each byte has one form.
pub(crate) fn unescape(word: &[u8]) -> Result<Vec<u8>, String> {
    let wrong = || format!("`{}` is not escaped as it should be", word.escape_ascii());
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'\\' {
            out.push(first);
            rest = tail;
            continue;
        }
        let code = tail.get(..3).ok_or_else(wrong)?;
        if !code.iter().all(|d| (b'0'..=b'7').contains(d)) || code[0] > b'3' {
            return Err(wrong());
        }
        out.push((code[0] - b'0') << 6 | (code[1] - b'0') << 3 | (code[2] - b'0'));
        rest = &tail[3..];
    }
    let mut again = Vec::with_capacity(word.len());
    escape(&out, &mut again);
    if again == word { Ok(out) } else { Err(wrong()) }
}

fn put_path(path: &[u8], out: &mut Vec<u8>) {
    out.push(b'.');
    if !path.is_empty() {
        out.push(b'/');
        escape(path, out);
    }
}

fn path(word: &[u8]) -> Result<Vec<u8>, String> {
    let wrong = |what: &str| Err(format!("{what}: `{}`", word.escape_ascii()));
    if word == b"." {
        return Ok(Vec::new());
    }
    let Some(rest) = word.strip_prefix(b"./") else { return wrong("not a path below the root") };
    let path = unescape(rest)?;
    let odd = |part: &[u8]| part.is_empty() || part == b"." || part == b"..";
    if path.len() > 1 << 20 || path.contains(&0) || path.split(|&b| b == b'/').any(odd) {
        return wrong("not a path that a walk comes upon");
    }
    Ok(path)
}

/// Writes an entry, its newline included.
pub(super) fn put(entry: &Entry<'_>, out: &mut Vec<u8>) {
    put_path(&entry.path, out);
    let name = match entry.kind {
        Kind::HardLink => {
            out.extend_from_slice(b" hardlink=");
            put_path(&entry.link, out);
            out.push(b'\n');
            return;
        }
        Kind::File => "file",
        Kind::Symlink => "link",
        Kind::Char => "char",
        Kind::Block => "block",
        Kind::Fifo => "fifo",
        Kind::Directory => "dir",
    };
    let (seconds, nanos) = entry.mtime;
    // Writing to a Vec cannot fail.
    let _ = write!(
        out,
        " type={name} mode={:04o} uid={} gid={} time={seconds}.{nanos:09}",
        entry.mode, entry.uid, entry.gid
    );
    if entry.links > 1 && entry.kind != Kind::Directory {
        let _ = write!(out, " nlink={}", entry.links);
    }
    match entry.kind {
        Kind::Symlink => {
            out.extend_from_slice(b" link=");
            escape(&entry.link, out);
        }
        Kind::Char | Kind::Block => {
            let _ = write!(out, " device=linux,{},{}", entry.device.0, entry.device.1);
        }
        _ => {}
    }
    if let Some(content) = &entry.content {
        let form = if content.sparse { "blake3-sparse" } else { "blake3" };
        let _ = write!(out, " size={} {form}=", content.size);
        put_hex(&content.digest, out);
    }
    let words = entry.attributes.words();
    if !words.is_empty() {
        let _ = write!(out, " flags={words}");
    }
    if entry.attributes.project != 0 {
        let _ = write!(out, " projid={}", entry.attributes.project);
    }
    if entry.changed {
        out.extend_from_slice(b" changed");
    }
    for (name, value) in entry.xattrs.iter() {
        out.extend_from_slice(b" xattr.");
        escape(name.as_bytes(), out);
        out.push(b'=');
        escape(value, out);
    }
    out.push(b'\n');
}

fn put_hex(digest: &Digest, out: &mut Vec<u8>) {
    for byte in digest {
        for nibble in [byte >> 4, byte & 15] {
            out.push(b"0123456789abcdef"[usize::from(nibble)]);
        }
    }
}

fn hex(text: &str) -> Option<Digest> {
    let bytes = text.as_bytes();
    if bytes.len() != 64 {
        return None;
    }
    let mut digest = Digest::default();
    for (byte, pair) in digest.iter_mut().zip(bytes.chunks_exact(2)) {
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(digest)
}

/// The words of a line, each at most once.
#[derive(Default)]
struct Words<'l> {
    plain: Vec<(&'l str, &'l str)>,
    xattrs: Vec<(CString, Vec<u8>)>,
    changed: bool,
}

impl<'l> Words<'l> {
    fn new(words: impl Iterator<Item = &'l [u8]>) -> Result<Self, String> {
        let mut all = Self::default();
        for word in words {
            if word == b"changed" && !all.changed {
                all.changed = true;
                continue;
            }
            let text = std::str::from_utf8(word).map_err(|_| "a word that is no ASCII".to_owned())?;
            let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is no KEY=VALUE"))?;
            if let Some(name) = key.strip_prefix("xattr.") {
                let name = CString::new(unescape(name.as_bytes())?)
                    .map_err(|_| "a NUL in an attribute's name".to_owned())?;
                if name.is_empty() || all.xattrs.last().is_some_and(|(last, _)| *last >= name) {
                    return Err(format!("the attribute {name:?} is out of order"));
                }
                all.xattrs.push((name, unescape(value.as_bytes())?));
            } else if all.plain.iter().any(|(known, _)| *known == key) {
                return Err(format!("`{key}` stands there twice"));
            } else if all.plain.len() >= MAX_WORDS {
                return Err("more words than an entry has".to_owned());
            } else {
                all.plain.push((key, value));
            }
        }
        Ok(all)
    }

    fn take(&mut self, key: &str) -> Option<&'l str> {
        let at = self.plain.iter().position(|(known, _)| *known == key)?;
        Some(self.plain.swap_remove(at).1)
    }

    fn need(&mut self, key: &str) -> Result<&'l str, String> {
        self.take(key).ok_or_else(|| format!("`{key}` is missing"))
    }

    fn number<T: std::str::FromStr>(&mut self, key: &str) -> Result<T, String> {
        let text = self.need(key)?;
        number(text).ok_or_else(|| format!("`{key}={text}` is no number that it can be"))
    }
}

/// A number in its one decimal form.
pub(super) fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if plain && text != "-0" { text.parse().ok() } else { None }
}

fn time(text: &str) -> Option<(i64, u32)> {
    let (seconds, nanos) = text.split_once('.')?;
    if nanos.len() != 9 || !nanos.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((number(seconds)?, nanos.parse().ok()?))
}

/// Reads an entry from a line without its newline.
pub(super) fn parse(line: &[u8]) -> Result<Entry<'static>, String> {
    let mut words = line.split(|&b| b == b' ');
    let path_word = words.next().unwrap_or_default();
    let entry_path = path(path_word)?;
    let mut words = Words::new(words)?;
    let mut entry = Entry {
        path: Cow::Owned(entry_path),
        kind: Kind::HardLink,
        mode: 0,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        device: (0, 0),
        links: 1,
        link: Cow::Owned(Vec::new()),
        xattrs: Cow::Owned(Vec::new()),
        attributes: Attributes::default(),
        content: None,
        changed: words.changed,
    };
    if let Some(first) = words.take("hardlink") {
        entry.link = Cow::Owned(path(first.as_bytes())?);
        if entry.changed || !words.xattrs.is_empty() {
            return Err("a hard link with more than its target".to_owned());
        }
    } else {
        metadata(&mut entry, &mut words)?;
    }
    match words.plain.first() {
        Some((key, _)) => Err(format!("`{key}` means nothing here")),
        None => Ok(entry),
    }
}

fn metadata(entry: &mut Entry<'static>, words: &mut Words<'_>) -> Result<(), String> {
    entry.kind = match words.need("type")? {
        "file" => Kind::File,
        "link" => Kind::Symlink,
        "char" => Kind::Char,
        "block" => Kind::Block,
        "fifo" => Kind::Fifo,
        "dir" => Kind::Directory,
        other => return Err(format!("the unknown type `{other}`")),
    };
    let mode = words.need("mode")?;
    entry.mode = match (mode.len(), mode.bytes().all(|b| (b'0'..=b'7').contains(&b))) {
        (4, true) => u32::from_str_radix(mode, 8).map_err(|e| e.to_string())?,
        _ => return Err(format!("`mode={mode}` is not four octal digits")),
    };
    entry.uid = words.number("uid")?;
    entry.gid = words.number("gid")?;
    let mtime = words.need("time")?;
    entry.mtime = time(mtime).ok_or_else(|| format!("`time={mtime}` is no time"))?;
    if let Some(links) = words.take("nlink") {
        entry.links = number(links)
            .filter(|n| *n > 1 && entry.kind != Kind::Directory)
            .ok_or_else(|| format!("`nlink={links}` cannot be"))?;
    }
    match entry.kind {
        Kind::Symlink => entry.link = Cow::Owned(unescape(words.need("link")?.as_bytes())?),
        Kind::Char | Kind::Block => {
            let text = words.need("device")?;
            let numbers = text.strip_prefix("linux,").and_then(|rest| rest.split_once(','));
            entry.device = numbers
                .and_then(|(major, minor)| number(major).zip(number(minor)))
                .ok_or_else(|| format!("`device={text}` is no device"))?;
        }
        Kind::File => {
            let size = words.number("size")?;
            let (sparse, text) = match words.take("blake3") {
                Some(text) => (false, text),
                None => (true, words.need("blake3-sparse")?),
            };
            let digest = hex(text).ok_or_else(|| format!("`{text}` is no digest"))?;
            entry.content = Some(Content { size, sparse, digest });
        }
        _ => {}
    }
    if matches!(entry.kind, Kind::File | Kind::Directory) {
        entry.attributes = attributes(words)?;
    }
    if entry.changed && entry.kind != Kind::File {
        return Err("`changed` means nothing here".to_owned());
    }
    entry.xattrs = Cow::Owned(std::mem::take(&mut words.xattrs));
    Ok(())
}

fn attributes(words: &mut Words<'_>) -> Result<Attributes, String> {
    let mut attributes = Attributes::default();
    if let Some(text) = words.take("flags") {
        // Only in the one form in which they are written.
        if !attributes.take_words(text.as_bytes()) || attributes.words() != text || text.is_empty() {
            return Err(format!("`flags={text}` are no flags that are known"));
        }
    }
    if let Some(text) = words.take("projid") {
        attributes.project =
            number(text).filter(|n| *n != 0).ok_or_else(|| format!("`projid={text}` cannot be"))?;
    }
    Ok(attributes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_path() -> impl Strategy<Value = Vec<u8>> {
        let part = proptest::collection::vec(1u8.., 1..12)
            .prop_filter("a name", |p| !p.contains(&b'/') && p != b"." && p != b"..");
        proptest::collection::vec(part, 0..4).prop_map(|parts| parts.join(&b'/'))
    }

    pub(in crate::manifest) fn any_entry() -> impl Strategy<Value = Entry<'static>> {
        let xattrs = proptest::collection::btree_map(
            proptest::collection::vec(1u8.., 1..10),
            proptest::collection::vec(any::<u8>(), 0..20),
            0..3,
        );
        let owner = (0u32..0o10000, any::<u32>(), any::<u32>(), any::<i64>(), 0u32..1_000_000_000);
        let rest =
            (any::<(u32, u32)>(), 1u32..5, proptest::collection::vec(any::<u8>(), 0..30), any::<bool>());
        const NAMES: [&str; 5] = ["schg", "nodump", "nodump,nocow,projinherit", "sappnd,schg,noatime", ""];
        let attributes = (proptest::sample::select(&NAMES[..]), prop_oneof![Just(0), any::<u32>()]).prop_map(
            |(words, project)| {
                let mut attributes = Attributes::default();
                attributes.project = project;
                assert!(attributes.take_words(words.as_bytes()));
                attributes
            },
        );
        let content = (any::<u64>(), any::<bool>(), any::<Digest>(), attributes);
        (any_path(), 0usize..7, owner, rest, content, xattrs, any_path()).prop_map(
            |(
                path,
                kind,
                (mode, uid, gid, s, ns),
                (device, links, link, changed),
                content,
                xattrs,
                leader,
            )| {
                let kind = [
                    Kind::File,
                    Kind::Directory,
                    Kind::Symlink,
                    Kind::Char,
                    Kind::Block,
                    Kind::Fifo,
                    Kind::HardLink,
                ][kind];
                let hard = kind == Kind::HardLink;
                let only = |yes: bool, n: u32| if yes { n } else { 0 };
                let is_device = matches!(kind, Kind::Char | Kind::Block);
                Entry {
                    path: Cow::Owned(path),
                    kind,
                    mode: only(!hard, mode),
                    uid: only(!hard, uid),
                    gid: only(!hard, gid),
                    mtime: if hard { (0, 0) } else { (s, ns) },
                    device: if is_device { device } else { (0, 0) },
                    links: if hard || kind == Kind::Directory { 1 } else { links },
                    link: Cow::Owned(match kind {
                        Kind::HardLink => leader,
                        Kind::Symlink => link,
                        _ => Vec::new(),
                    }),
                    xattrs: Cow::Owned(if hard {
                        Vec::new()
                    } else {
                        xattrs.into_iter().map(|(n, v)| (CString::new(n).unwrap(), v)).collect()
                    }),
                    attributes: match kind {
                        Kind::File | Kind::Directory => content.3,
                        _ => Attributes::default(),
                    },
                    content: (kind == Kind::File).then_some(Content {
                        size: content.0,
                        sparse: content.1,
                        digest: content.2,
                    }),
                    changed: kind == Kind::File && changed,
                }
            },
        )
    }

    fn line(text: &str) -> Result<Entry<'static>, String> {
        parse(text.as_bytes())
    }

    #[test]
    fn a_line_is_as_the_documentation_says() {
        let digest = "00".repeat(32);
        let text = format!(
            "./a\\040b type=file mode=4755 uid=0 gid=7 time=-5.123456789 nlink=2 size=3 blake3={digest} \
             flags=schg,nodump projid=42 changed xattr.user.x=1\\0002"
        );
        let entry = line(&text).unwrap();
        assert_eq!((&entry.path[..], entry.mode, entry.mtime), (&b"a b"[..], 0o4755, (-5, 123_456_789)));
        assert_eq!((entry.attributes.words().as_str(), entry.attributes.project), ("schg,nodump", 42));
        assert_eq!(entry.xattrs[0], (c"user.x".to_owned(), b"1\x002".to_vec()));
        let mut out = Vec::new();
        put(&entry, &mut out);
        assert_eq!(String::from_utf8(out).unwrap().trim_end(), text);
    }

    #[test]
    fn wrong_lines_are_refused_with_the_reason() {
        let meta = "mode=0644 uid=0 gid=0 time=0.000000000";
        for (text, expected) in [
            (String::new(), "not a path"),
            (
                format!("./a type=dir {meta}{}", (0..20).map(|i| format!(" w{i}=")).collect::<String>()),
                "more words",
            ),
            ("etc type=dir".to_owned(), "not a path"),
            (format!("./a/../b type=dir {meta}"), "not a path"),
            (format!("./a//b type=dir {meta}"), "not a path"),
            (format!("./a\\000 type=dir {meta}"), "not a path"),
            (format!("./a\\9 type=dir {meta}"), "not escaped"),
            (format!("./a\\141 type=dir {meta}"), "not escaped"),
            (format!("./a type=dir {meta} size=3"), "`size` means nothing"),
            (format!("./a type=dir {meta} uid=0"), "twice"),
            (format!("./a type=dir  {meta}"), "no KEY=VALUE"),
            (format!("./a type=dir {meta} changed"), "`changed` means nothing"),
            (format!("./a type=file {meta} size=3"), "`blake3-sparse` is missing"),
            (format!("./a type=file {meta} size=-3 blake3=00"), "`size=-3`"),
            (format!("./a type=file {meta} size=3 blake3=00"), "no digest"),
            (format!("./a type=char {meta} device=1,2"), "no device"),
            (format!("./a type=dir {meta} flags=hidden"), "no flags that are known"),
            (format!("./a type=dir {meta} flags=nodump,schg"), "no flags that are known"),
            (format!("./a type=dir {meta} flags="), "no flags that are known"),
            (format!("./a type=dir {meta} projid=0"), "`projid=0`"),
            (format!("./a type=fifo {meta} flags=nodump"), "`flags` means nothing"),
            (format!("./a type=what {meta}"), "unknown type"),
            (format!("./a type=dir {meta} xattr.b=1 xattr.a=1"), "out of order"),
            (format!("./a hardlink=./b {meta}"), "means nothing here"),
            ("./a type=dir mode=644 uid=0 gid=0 time=0.0".to_owned(), "four octal digits"),
            ("./a type=dir mode=0644 uid=0 gid=0 time=0.0".to_owned(), "no time"),
            ("./a type=dir mode=0644 uid=00 gid=0 time=0.0".to_owned(), "`uid=00`"),
        ] {
            let error = line(&text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn entries_come_back_whole(entry in any_entry()) {
            let mut out = Vec::new();
            put(&entry, &mut out);
            prop_assert_eq!(out.iter().filter(|b| **b == b'\n').count(), 1);
            prop_assert!(out.is_ascii());
            prop_assert_eq!(parse(&out[..out.len() - 1]), Ok(entry));
        }

        #[test]
        fn no_line_panics_and_each_entry_has_one_form(
            entry in any_entry(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(),
        ) {
            let mut out = Vec::new();
            put(&entry, &mut out);
            out.pop();
            let at = at.index(out.len());
            if cut { out.truncate(at) } else { out[at] = byte }
            if let Ok(other) = parse(&out) {
                let mut again = Vec::new();
                put(&other, &mut again);
                // Words may come in another order; what they say may not differ.
                prop_assert_eq!(parse(&again[..again.len() - 1]), Ok(other));
            }
        }

        #[test]
        fn noise_is_refused_or_read(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }
    }
}
