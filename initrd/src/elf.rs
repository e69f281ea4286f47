//! As much of ELF as is needed: which interpreter and which libraries a program wants, and what a kernel module says of
//! itself in `.modinfo`. Both byte orders and both word sizes; every offset of the file is checked before it is used.

/// Why a file is not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// It does not begin as ELF files do.
    #[error("not an ELF file")]
    NotElf,
    /// Something in it points outside of it, or makes no sense.
    #[error("damaged ELF file: {0}")]
    Damaged(&'static str),
}

/// What a program or a library says of what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dynamic {
    /// The kind of machine and word (`e_machine`, 64-bit): libraries must match.
    pub machine: (u16, bool),
    /// The dynamic linker, when it has one; a static program has none.
    pub interpreter: Option<String>,
    /// The names of the libraries.
    pub needed: Vec<String>,
    /// Directories to look in first (DT_RUNPATH or DT_RPATH).
    pub run_path: Vec<String>,
}

const PT_LOAD: u64 = 1;
const PT_DYNAMIC: u64 = 2;
const PT_INTERP: u64 = 3;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;
/// More libraries than any program names.
const MAX_NEEDED: usize = 4096;

/// The bytes of a file, with its word size and byte order.
struct Reader<'a> {
    bytes: &'a [u8],
    wide: bool,
    big: bool,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, ElfError> {
        let ident = bytes.get(..16).filter(|b| b.starts_with(b"\x7fELF")).ok_or(ElfError::NotElf)?;
        let wide = match ident[4] {
            1 => false,
            2 => true,
            _ => return Err(ElfError::Damaged("word size")),
        };
        let big = match ident[5] {
            1 => false,
            2 => true,
            _ => return Err(ElfError::Damaged("byte order")),
        };
        Ok(Self { bytes, wide, big })
    }

    fn slice(&self, at: u64, len: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(at).ok()?;
        let end = usize::try_from(at.checked_add(len)?).ok()?;
        self.bytes.get(start..end)
    }

    fn uint(&self, at: u64, len: u64) -> Result<u64, ElfError> {
        let bytes = self.slice(at, len).ok_or(ElfError::Damaged("a field lies outside of the file"))?;
        let join = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        Ok(if self.big { bytes.iter().fold(0, join) } else { bytes.iter().rev().fold(0, join) })
    }

    /// A word: 8 bytes at `wide` in 64-bit files, 4 at `narrow` in others, both counted from `base`.
    fn word(&self, base: u64, wide: u64, narrow: u64) -> Result<u64, ElfError> {
        let (offset, len) = if self.wide { (wide, 8) } else { (narrow, 4) };
        self.uint(base.checked_add(offset).ok_or(ElfError::Damaged("an offset overflows"))?, len)
    }

    /// The half word at one of two places.
    fn half(&self, wide: u64, narrow: u64) -> Result<u64, ElfError> {
        self.uint(if self.wide { wide } else { narrow }, 2)
    }

    /// The offsets of the entries of a table.
    fn table(&self, start: u64, step: u64, count: u64, least: u64) -> Result<Vec<u64>, ElfError> {
        if count > 0 && step < least {
            return Err(ElfError::Damaged("table entries are too short"));
        }
        let wrong = ElfError::Damaged("a table lies outside of the file");
        self.slice(start, step.checked_mul(count).ok_or(wrong)?).ok_or(wrong)?;
        Ok((0..count).map(|i| start + i * step).collect())
    }
}

/// The text at `at` in `bytes`, up to its NUL.
fn text(bytes: &[u8], at: u64) -> Result<String, ElfError> {
    let wrong = ElfError::Damaged("a name lies outside of its table");
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).ok_or(wrong)?;
    let end = rest.iter().position(|b| *b == 0).ok_or(wrong)?;
    String::from_utf8(rest[..end].to_vec()).map_err(|_| ElfError::Damaged("a name is not UTF-8"))
}

/// The kind of machine (`e_machine`) and whether it is 64-bit.
///
/// # Errors
/// When it is no ELF file.
pub fn machine(bytes: &[u8]) -> Result<(u16, bool), ElfError> {
    let reader = Reader::new(bytes)?;
    let machine = u16::try_from(reader.uint(18, 2)?).map_err(|_| ElfError::Damaged("machine"))?;
    Ok((machine, reader.wide))
}

/// What the program or library `bytes` needs.
///
/// # Errors
/// [`ElfError`].
pub fn dynamic(bytes: &[u8]) -> Result<Dynamic, ElfError> {
    let reader = Reader::new(bytes)?;
    let least = if reader.wide { 56 } else { 32 };
    let headers = reader.table(reader.word(0, 32, 28)?, reader.half(54, 42)?, reader.half(56, 44)?, least)?;
    let mut found =
        Dynamic { machine: machine(bytes)?, interpreter: None, needed: Vec::new(), run_path: Vec::new() };
    let mut loads = Vec::new();
    let mut table = None;
    for header in headers {
        let kind = reader.uint(header, 4)?;
        let (offset, size) = (reader.word(header, 8, 4)?, reader.word(header, 32, 16)?);
        match kind {
            PT_LOAD => loads.push((reader.word(header, 16, 8)?, offset, size)),
            PT_DYNAMIC => table = Some((offset, size)),
            PT_INTERP => {
                let wrong = ElfError::Damaged("the interpreter lies outside of the file");
                let name = reader.slice(offset, size).ok_or(wrong)?;
                found.interpreter = Some(text(name, 0)?);
            }
            _ => {}
        }
    }
    let Some((start, size)) = table else { return Ok(found) };
    let step = if reader.wide { 16 } else { 8 };
    let mut entries = Vec::new();
    for entry in reader.table(start, step, size / step, step)? {
        let (tag, value) = (reader.word(entry, 0, 0)?, reader.word(entry, 8, 4)?);
        if tag == DT_NULL {
            break;
        }
        entries.push((tag, value));
    }
    let Some(address) = entries.iter().find(|(tag, _)| *tag == DT_STRTAB).map(|e| e.1) else {
        return Ok(found);
    };
    let strings = loads
        .iter()
        .find(|(start, _, size)| address.checked_sub(*start).is_some_and(|d| d < *size))
        .and_then(|(start, offset, size)| {
            let skip = address - start;
            reader.slice(offset.checked_add(skip)?, size - skip)
        })
        .ok_or(ElfError::Damaged("the names lie outside of the file"))?;
    for (tag, value) in entries {
        match tag {
            DT_NEEDED if found.needed.len() < MAX_NEEDED => found.needed.push(text(strings, value)?),
            DT_RPATH | DT_RUNPATH => {
                found.run_path.extend(text(strings, value)?.split(':').map(str::to_owned));
            }
            _ => {}
        }
    }
    Ok(found)
}

/// What the module `bytes` says of itself: the `key=value` lines of its section `.modinfo`.
///
/// # Errors
/// [`ElfError`]; a module without that section says nothing, which is no error.
pub fn modinfo(bytes: &[u8]) -> Result<Vec<(String, String)>, ElfError> {
    let reader = Reader::new(bytes)?;
    let least = if reader.wide { 64 } else { 40 };
    let sections =
        reader.table(reader.word(0, 40, 32)?, reader.half(58, 46)?, reader.half(60, 48)?, least)?;
    let content = |section: u64| -> Result<&[u8], ElfError> {
        let (offset, size) = (reader.word(section, 24, 16)?, reader.word(section, 32, 20)?);
        reader.slice(offset, size).ok_or(ElfError::Damaged("a section lies outside of the file"))
    };
    let index = usize::try_from(reader.half(62, 50)?).unwrap_or(usize::MAX);
    let Some(names) = sections.get(index) else { return Ok(Vec::new()) };
    let names = content(*names)?;
    for section in sections {
        if text(names, reader.uint(section, 4)?)? == ".modinfo" {
            return Ok(content(section)?
                .split(|b| *b == 0)
                .filter_map(|line| {
                    let line = String::from_utf8_lossy(line);
                    line.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()))
                })
                .collect());
        }
    }
    Ok(Vec::new())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small 64-bit ELF file that wants `needed` and, when given, an interpreter and a run path.
    pub fn program(interpreter: Option<&str>, needed: &[&str], run_path: Option<&str>) -> Vec<u8> {
        let mut strings = vec![0_u8];
        let mut place = |s: &str| {
            let at = strings.len() as u64;
            strings.extend(s.as_bytes());
            strings.push(0);
            at
        };
        let mut tags: Vec<(u64, u64)> = needed.iter().map(|n| (DT_NEEDED, place(n))).collect();
        tags.extend(run_path.map(|p| (DT_RUNPATH, place(p))));
        let interp_at = interpreter.map(|i| (place(i), i.len() as u64 + 1));
        let headers: u64 = 3;
        let dynamic_at = 64 + 56 * headers;
        let dynamic_len = 16 * (tags.len() as u64 + 2);
        let strings_at = dynamic_at + dynamic_len;
        let base = 0x10_0000;
        tags.push((DT_STRTAB, base + strings_at));
        tags.push((DT_NULL, 0));
        let total = strings_at + strings.len() as u64;
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(16, 0);
        let half = |out: &mut Vec<u8>, v: u64| out.extend(&v.to_le_bytes()[..2]);
        let word = |out: &mut Vec<u8>, v: u64| out.extend(v.to_le_bytes());
        half(&mut out, 3);
        half(&mut out, 62);
        out.extend([1, 0, 0, 0]);
        for v in [0, 64, 0] {
            word(&mut out, v);
        }
        out.extend([0; 4]);
        for v in [64, 56, headers, 64, 0, 0] {
            half(&mut out, v);
        }
        let (interp, interp_len) = interp_at.map_or((0, 0), |(at, len)| (strings_at + at, len));
        let kind = if interpreter.is_some() { PT_INTERP } else { 0 };
        for (kind, at, len) in
            [(PT_LOAD, 0, total), (PT_DYNAMIC, dynamic_at, dynamic_len), (kind, interp, interp_len)]
        {
            out.extend(&kind.to_le_bytes()[..4]);
            out.extend([0; 4]);
            for v in [at, base + at, base + at, len, len, 8] {
                word(&mut out, v);
            }
        }
        for (tag, value) in tags {
            word(&mut out, tag);
            word(&mut out, value);
        }
        out.extend(strings);
        out
    }

    /// A small 64-bit ELF file with a section `.modinfo` of these lines.
    pub fn module(lines: &[&str]) -> Vec<u8> {
        let info: Vec<u8> = lines.iter().flat_map(|l| l.bytes().chain([0])).collect();
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut out = program(None, &[], None);
        let info_at = out.len() as u64;
        out.extend(&info);
        let names_at = out.len() as u64;
        out.extend(names);
        let table = out.len() as u64;
        for (name, at, len) in
            [(0_u32, 0, 0), (1, info_at, info.len() as u64), (10, names_at, names.len() as u64)]
        {
            let mut section = [0_u8; 64];
            section[..4].copy_from_slice(&name.to_le_bytes());
            section[24..32].copy_from_slice(&at.to_le_bytes());
            section[32..40].copy_from_slice(&len.to_le_bytes());
            out.extend(section);
        }
        out[40..48].copy_from_slice(&table.to_le_bytes());
        for (at, value) in [(58, 64_u16), (60, 3), (62, 2)] {
            out[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        out
    }

    #[test]
    fn a_program_says_what_it_needs() {
        let bytes = program(Some("/lib/ld.so"), &["liba.so.1", "libb.so"], Some("$ORIGIN/../x:/opt"));
        let found = dynamic(&bytes).unwrap();
        assert_eq!(found.interpreter.as_deref(), Some("/lib/ld.so"));
        assert_eq!(found.needed, ["liba.so.1", "libb.so"]);
        assert_eq!(found.run_path, ["$ORIGIN/../x", "/opt"]);
        assert_eq!(found.machine, (62, true));
        assert_eq!(dynamic(&program(None, &[], None)).unwrap().interpreter, None);
    }

    #[test]
    fn a_module_names_its_firmware() {
        let bytes = module(&["license=GPL", "firmware=a/b.bin", "firmware=c.fw", "odd"]);
        let info = modinfo(&bytes).unwrap();
        let firmware: Vec<_> =
            info.iter().filter(|(k, _)| k == "firmware").map(|(_, v)| v.as_str()).collect();
        assert_eq!(firmware, ["a/b.bin", "c.fw"]);
        assert_eq!(modinfo(&program(None, &[], None)).unwrap(), []);
    }

    #[test]
    fn other_files_are_told_apart() {
        assert_eq!(dynamic(b"#!/bin/sh\n"), Err(ElfError::NotElf));
        assert_eq!(dynamic(b""), Err(ElfError::NotElf));
        assert!(matches!(dynamic(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"), Err(ElfError::Damaged(_))));
    }

    /// What `readelf` says of this machine's own programs is what we say.
    #[test]
    fn readelf_agrees_on_real_programs() {
        let mut judged = 0;
        for path in
            ["/usr/sbin/mke2fs", "/usr/sbin/mkfs.btrfs", "/usr/bin/bash", "/usr/bin/busybox", "/usr/bin/env"]
        {
            let Ok(bytes) = std::fs::read(path) else { continue };
            let out = match std::process::Command::new("readelf").args(["-dlW", path]).output() {
                Ok(out) => String::from_utf8_lossy(&out.stdout).into_owned(),
                Err(e) => {
                    println!("SKIPPED: readelf: {e}");
                    return;
                }
            };
            let between = |line: &str| {
                line.split_once('[').and_then(|(_, r)| r.split_once(']')).map(|(n, _)| n.to_owned())
            };
            let needed: Vec<String> =
                out.lines().filter(|l| l.contains("(NEEDED)")).filter_map(between).collect();
            let interpreter =
                out.lines().find(|l| l.contains("Requesting program interpreter")).and_then(between);
            let found = dynamic(&bytes).unwrap();
            assert_eq!(found.needed, needed, "{path}");
            assert_eq!(
                found.interpreter,
                interpreter.map(|i| i.replace("Requesting program interpreter: ", ""))
            );
            judged += 1;
        }
        assert!(judged > 0, "no program to judge by");
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = dynamic(&bytes);
            let _ = modinfo(&bytes);
            let mut elf = b"\x7fELF\x02\x01".to_vec();
            elf.extend(&bytes);
            let _ = dynamic(&elf);
            let _ = modinfo(&elf);
        }

        #[test]
        fn damaged_programs_never_panic(
            hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let good = [program(Some("/lib/ld.so"), &["liba.so.1"], Some("/x")), module(&["firmware=a"])];
            for mut bytes in good {
                for (at, value) in &hits {
                    let at = at.index(bytes.len());
                    bytes[at] = *value;
                }
                for part in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
                    let _ = dynamic(part);
                    let _ = modinfo(part);
                }
            }
        }

        #[test]
        fn names_come_back(
            needed in prop::collection::vec("[a-z][a-z0-9.+-]{0,30}", 0..20),
            interpreter in prop::option::of("/[a-z/]{1,20}"),
        ) {
            let names: Vec<&str> = needed.iter().map(String::as_str).collect();
            let found = dynamic(&program(interpreter.as_deref(), &names, None)).unwrap();
            prop_assert_eq!(found.needed, needed);
            prop_assert_eq!(found.interpreter, interpreter);
        }
    }
}
