//! Reading a layout file: TOML, then sense. Every error carries line and column.

use crate::check::{Place, check};
use crate::model::Layout;
use crate::stack::Base;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::fmt;
use toml::Spanned;

/// The longest layout file that is read, in bytes.
const LIMIT: usize = 1 << 20;

/// Something wrong at a place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

/// Why a layout file cannot be used: one or more faults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// All that was found, in the order of the checks; never empty.
    pub faults: Vec<Fault>,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.faults.iter().enumerate() {
            let end = if i + 1 < self.faults.len() { "\n" } else { "" };
            write!(f, "layout line {}, column {}: {}{end}", fault.line, fault.column, fault.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ParseError {}

/// Where the tables of the file begin.
#[derive(Deserialize)]
struct Places {
    #[serde(default)]
    disk: Vec<Spanned<IgnoredAny>>,
    #[serde(default)]
    partition: Vec<Spanned<IgnoredAny>>,
    #[serde(default)]
    raid: Vec<Spanned<IgnoredAny>>,
    #[serde(default)]
    luks: Vec<Spanned<IgnoredAny>>,
    #[serde(default)]
    vg: Vec<Spanned<IgnoredAny>>,
    #[serde(default)]
    lv: Vec<Spanned<IgnoredAny>>,
}

/// Reads and checks a layout.
///
/// # Errors
/// All faults with their lines: one when it is not TOML or has unknown keys, else everything that makes no sense.
pub fn parse(text: &str) -> Result<Layout, ParseError> {
    let fault = |offset: usize, message: String| {
        let (line, column) = position(text, offset);
        Fault { line, column, message }
    };
    if text.len() > LIMIT {
        return Err(ParseError { faults: vec![fault(0, format!("it is longer than {LIMIT} bytes"))] });
    }
    let layout: Layout = toml::from_str(text).map_err(|e| ParseError {
        faults: vec![fault(e.span().map_or(0, |s| s.start), e.message().trim().replace('\n', " "))],
    })?;
    let problems = check(&layout);
    if problems.is_empty() {
        return Ok(layout);
    }
    let places: Option<Places> = toml::from_str(text).ok();
    let start = |place: Place| {
        let places = places.as_ref()?;
        let span = match place {
            Place::File => return Some(0),
            Place::Disk(i) => places.disk.get(i)?.span(),
            Place::Partition(i) | Place::Volume(Base::Partition(i)) => places.partition.get(i)?.span(),
            Place::Volume(Base::Raid(i)) => places.raid.get(i)?.span(),
            Place::Volume(Base::Luks(i)) => places.luks.get(i)?.span(),
            Place::Volume(Base::Vg(i)) => places.vg.get(i)?.span(),
            Place::Volume(Base::Lv(i)) => places.lv.get(i)?.span(),
        };
        Some(span.start)
    };
    let faults = problems.into_iter().map(|p| fault(start(p.place).unwrap_or(0), p.message)).collect();
    Err(ParseError { faults })
}

/// Line and column, both from 1, of a byte offset.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"version = 1
[[disk]]
name = "system"
match = { size = "8G-", transport = ["sata", "nvme"] }
table = "gpt"
[[partition]]
type = "esp"
size = "512M"
format = { fs = "vfat", uuid = "ABCD-1234" }
mount = { path = "/boot/efi", options = "umask=0077" }
[[partition]]
type = "linux"
size = "fill"
format = { fs = "ext4" }
mount = { path = "/" }
"#;

    fn error(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_good_one_is_read() {
        let layout = parse(GOOD).unwrap();
        assert_eq!(layout.partitions.len(), 2);
        assert_eq!(layout.disks[0].matching.size.as_deref(), Some("8G-"));
    }

    #[test]
    fn an_unknown_key_is_an_error_with_its_place() {
        assert_eq!(
            error(&GOOD.replace("size = \"fill\"", "size = \"fill\"\nsise = \"fill\"")),
            "layout line 14, column 1: unknown field `sise`, expected one of `disk`, `id`, `number`, `type`, `size`, `start`, \
             `weight`, `name`, `uuid`, `bootable`, `format`, `subvolumes`, `mount`, `preserve`, `raw`"
        );
        let nested = error(&GOOD.replace("uuid = \"ABCD-1234\"", "uid = \"ABCD-1234\""));
        assert!(nested.starts_with("layout line 9, column 25: unknown field `uid`"), "{nested}");
        let top = error(&format!("{GOOD}[other]\nx = 1\n"));
        assert!(top.starts_with("layout line 16, column 2: unknown field `other`"), "{top}");
    }

    #[test]
    fn broken_toml_is_an_error_with_its_place() {
        let text = error(&GOOD.replace("table = \"gpt\"", "table = \"gtp\""));
        assert!(text.starts_with("layout line 5, column 9: unknown variant `gtp`"), "{text}");
        let text = error(&GOOD.replace("size = \"fill\"", "size = \"fill"));
        assert!(text.starts_with("layout line 13, column "), "{text}");
    }

    #[test]
    fn nonsense_is_found_all_at_once() {
        assert_eq!(
            error(&GOOD.replace("\"512M\"", "\"much\"").replace("\"/\"", "\"/boot/efi\"")),
            "layout line 6, column 1: [[partition]] #1 (/boot/efi): size: `much` is not a size (examples: 512M, 4G-20G, \
             4G-, 10%, fill)\n\
             layout line 11, column 1: [[partition]] #2 (/boot/efi): mount.path: /boot/efi is used twice"
        );
    }

    #[test]
    fn partitions_that_overlap_are_an_error() {
        assert_eq!(
            error(&GOOD.replace("size = \"fill\"", "size = \"fill\"\nstart = \"100M\"")),
            "layout line 2, column 1: [[disk]] `system`: [[partition]] #2 (/) starts at 100M, but [[partition]] #1 \
             (/boot/efi) before it reaches to 513M: they overlap"
        );
        assert_eq!(
            error(&GOOD.replace("size = \"fill\"", "size = \"60%\"").replace("\"512M\"", "\"50%\"")),
            "layout line 2, column 1: [[disk]] `system`: its partitions ask for 110 % of it: they overlap"
        );
        assert_eq!(
            error(&GOOD.replace("type =", "number = 1\ntype =")),
            "layout line 12, column 1: [[partition]] #2 (/): number 1 is used twice on disk `system`"
        );
    }

    #[test]
    fn the_examples_are_sound() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../initrd/layouts");
        let mut read = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let layout = parse(&std::fs::read_to_string(&path).unwrap());
            let layout = layout.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let disk = crate::Geometry { bytes: 3 << 30, sector: 512 };
            crate::fit(&layout, 0, disk).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            read += 1;
        }
        assert_eq!(read, 2);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in "\\PC{0,200}") {
            if let Err(e) = parse(&text) {
                prop_assert!(!e.faults.is_empty());
            }
        }

        #[test]
        fn a_damaged_layout_is_read_without_panic(at in 0..GOOD.len(), with in "\\PC{0,3}", cut in 0_usize..8) {
            let end = (at + cut).min(GOOD.len());
            if let Err(e) = parse(&format!("{}{with}{}", &GOOD[..at], &GOOD[end..])) {
                prop_assert!(e.faults.iter().all(|f| f.line >= 1 && f.line <= 20));
            }
        }
    }
}
