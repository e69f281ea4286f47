//! Who the nodes are: Ethernet addresses, the nodes file that gives them names, and the pattern that names the others.
//! A node keeps its name for as long as this object lives; names that earlier deployments gave can be adopted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// How many nodes that are in no file are named; whoever floods the net with invented addresses gets no further.
const UNLISTED_LIMIT: usize = 16_384;
/// The largest nodes file that is read, in bytes.
const FILE_LIMIT: u64 = 16 << 20;
/// Linux' own limit for a host name.
const NAME_LIMIT: usize = 64;

/// An Ethernet address of one machine (never a group address, never zero).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac([u8; 6]);

/// What is wrong with an Ethernet address, a name, a pattern or a nodes file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not an address.
    #[error("`{0}` is not an Ethernet address (example: 52:54:00:12:34:56)")]
    Mac(String),
    /// An address that no single machine can have.
    #[error("{0} is not the address of one machine")]
    GroupMac(String),
    /// Not a host name.
    #[error(
        "`{0}` is not a host name (letters, digits and hyphens, labels separated by dots, at most 64 in all)"
    )]
    Name(String),
    /// Not a name pattern.
    #[error("`{0}` is not a name pattern: it must hold {{n}} or {{n:03}} once, and give a host name")]
    Pattern(String),
    /// A line of a nodes file is wrong.
    #[error("line {line}: {what}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
    /// The file cannot be read.
    #[error("{0}")]
    Read(String),
    /// Too many nodes that are in no file.
    #[error("no name for {0}: {UNLISTED_LIMIT} nodes that are in no nodes file have been seen already")]
    TooMany(Mac),
}

impl Mac {
    /// The address of these bytes.
    ///
    /// # Errors
    /// When it is zero or a group address (multicast, broadcast).
    pub fn new(bytes: [u8; 6]) -> Result<Self, Error> {
        let mac = Self(bytes);
        if bytes == [0; 6] || bytes[0] & 1 == 1 { Err(Error::GroupMac(mac.to_string())) } else { Ok(mac) }
    }

    /// Its six bytes.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// As PXELINUX and the kernel's BOOTIF write it: `01-52-54-00-12-34-56`.
    #[must_use]
    pub fn bootif(self) -> String {
        let [a, b, c, d, e, g] = self.0;
        format!("01-{a:02x}-{b:02x}-{c:02x}-{d:02x}-{e:02x}-{g:02x}")
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = Error;

    /// Reads `52:54:00:12:34:56`, `52-54-00-12-34-56`, `5254.0012.3456` or `525400123456`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::Mac(text.chars().take(64).collect());
        let group = match text.len() {
            17 => 2,
            14 => 4,
            12 => 12,
            _ => return Err(wrong()),
        };
        let separators: &[char] = match group {
            2 => &[':', '-'],
            4 => &['.'],
            _ => &[],
        };
        let mut digits = String::with_capacity(12);
        for (at, c) in text.chars().enumerate() {
            let here = at % (group + 1) == group;
            if here && separators.contains(&c) {
                continue;
            }
            if here || !c.is_ascii_hexdigit() {
                return Err(wrong());
            }
            digits.push(c);
        }
        let number = u64::from_str_radix(&digits, 16).map_err(|_| wrong())?;
        let [_, _, bytes @ ..] = number.to_be_bytes();
        if digits.len() == 12 { Self::new(bytes) } else { Err(wrong()) }
    }
}

impl serde::Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a node is called.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// Its host name.
    pub name: String,
    /// Its number, from 1: the place in the nodes file, or what the pattern was filled with.
    pub index: u32,
    /// The group that the nodes file puts it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// How nodes that are in no file are named: `node{n}`, `rack2-{n:03}.example`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    before: String,
    width: usize,
    after: String,
}

impl Default for Pattern {
    /// `node{n}`.
    fn default() -> Self {
        Self { before: "node".to_owned(), width: 1, after: String::new() }
    }
}

impl FromStr for Pattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::Pattern(text.to_owned());
        let (before, rest) = text.split_once('{').ok_or_else(wrong)?;
        let (hole, after) = rest.split_once('}').ok_or_else(wrong)?;
        let width = match hole.strip_prefix('n').ok_or_else(wrong)? {
            "" => 1,
            width => match width.strip_prefix(":0").map(str::as_bytes) {
                Some([digit @ b'1'..=b'9']) => usize::from(digit - b'0'),
                _ => return Err(wrong()),
            },
        };
        let pattern = Self { before: before.to_owned(), width, after: after.to_owned() };
        // Every number must give a host name, also the longest.
        let fits = is_host_name(&pattern.name(1)) && is_host_name(&pattern.name(u32::MAX));
        if fits { Ok(pattern) } else { Err(wrong()) }
    }
}

impl Pattern {
    fn name(&self, n: u32) -> String {
        format!("{}{n:0width$}{}", self.before, self.after, width = self.width)
    }
}

/// The nodes by address: those of the nodes file, and those that were named as they came.
#[derive(Debug, Clone, Default)]
pub struct Nodes {
    known: BTreeMap<Mac, Identity>,
    listed: BTreeSet<Mac>,
    names: BTreeSet<String>,
    pattern: Pattern,
    next: u32,
}

impl Nodes {
    /// No node listed; all are named by `pattern` in the order of their coming.
    #[must_use]
    pub fn unlisted(pattern: Pattern) -> Self {
        Self { pattern, next: 1, ..Self::default() }
    }

    /// Reads the nodes file `path`.
    ///
    /// # Errors
    /// When it cannot be read or a line is wrong; the path is named.
    pub fn read(path: &Path, pattern: Pattern) -> Result<Self, Error> {
        let read =
            |e: &dyn fmt::Display| Error::Read(format!("reading the nodes file {}: {e}", path.display()));
        let length = std::fs::metadata(path).map_err(|e| read(&e))?.len();
        if length > FILE_LIMIT {
            return Err(read(&format_args!("{length} bytes are too many")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| read(&e))?;
        Self::parse(&text, pattern).map_err(|e| read(&e))
    }

    /// Reads the text of a nodes file: lines `MAC NAME [group=G]`; `#` begins a comment.
    ///
    /// # Errors
    /// When a line is wrong: its number and what is wrong there.
    pub fn parse(text: &str, pattern: Pattern) -> Result<Self, Error> {
        let mut nodes = Self::unlisted(pattern);
        for (at, line) in text.lines().enumerate() {
            let wrong = |what: String| Error::Line { line: at + 1, what };
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let Some(mac) = words.next() else { continue };
            let mac: Mac = mac.parse().map_err(|e: Error| wrong(e.to_string()))?;
            let name = words.next().ok_or_else(|| wrong(format!("no name after {mac}")))?;
            if !is_host_name(name) {
                return Err(wrong(Error::Name(name.to_owned()).to_string()));
            }
            let mut group = None;
            for word in words {
                match word.split_once('=') {
                    Some(("group", value)) if group.is_none() && is_group(value) => {
                        group = Some(value.to_owned());
                    }
                    Some(("group", _)) if group.is_some() => return Err(wrong("two groups".to_owned())),
                    Some(("group", value)) => return Err(wrong(format!("`{value}` is not a group name"))),
                    _ => return Err(wrong(format!("`{word}` is not known here (only group=NAME)"))),
                }
            }
            if let Some(other) = nodes.known.get(&mac) {
                return Err(wrong(format!("{mac} is {} already", other.name)));
            }
            if !nodes.names.insert(name.to_ascii_lowercase()) {
                return Err(wrong(format!("the name {name} is taken already")));
            }
            nodes.known.insert(mac, Identity { name: name.to_owned(), index: nodes.next, group });
            nodes.listed.insert(mac);
            nodes.next += 1;
        }
        Ok(nodes)
    }

    /// Whether the nodes file names `mac`.
    #[must_use]
    pub fn is_listed(&self, mac: Mac) -> bool {
        self.listed.contains(&mac)
    }

    /// The addresses that the nodes file names, in its order.
    #[must_use]
    pub fn listed(&self) -> Vec<Mac> {
        let mut all: Vec<Mac> = self.listed.iter().copied().collect();
        all.sort_by_key(|mac| self.known.get(mac).map(|identity| identity.index));
        all
    }

    /// What `mac` is called, if it has been named.
    #[must_use]
    pub fn get(&self, mac: Mac) -> Option<&Identity> {
        self.known.get(&mac)
    }

    /// What `mac` is called; one that has no name yet gets the pattern's next free one.
    ///
    /// # Errors
    /// When 16384 nodes that are in no file have been named already.
    pub fn assign(&mut self, mac: Mac) -> Result<Identity, Error> {
        if let Some(identity) = self.known.get(&mac) {
            return Ok(identity.clone());
        }
        if self.known.len() - self.listed.len() >= UNLISTED_LIMIT {
            return Err(Error::TooMany(mac));
        }
        loop {
            let index = self.next;
            self.next = index.checked_add(1).ok_or(Error::TooMany(mac))?;
            let name = self.pattern.name(index);
            if self.names.insert(name.to_ascii_lowercase()) {
                let identity = Identity { name, index, group: None };
                self.known.insert(mac, identity.clone());
                return Ok(identity);
            }
        }
    }

    /// Gives `mac` the name that it had in an earlier deployment, unless it has one or the name is another's by now.
    /// Returns whether it was taken over.
    pub fn adopt(&mut self, mac: Mac, identity: &Identity) -> bool {
        let room = self.known.len() - self.listed.len() < UNLISTED_LIMIT;
        if self.known.contains_key(&mac) || !room || !is_host_name(&identity.name) {
            return false;
        }
        if !self.names.insert(identity.name.to_ascii_lowercase()) {
            return false;
        }
        self.known.insert(mac, identity.clone());
        true
    }
}

/// Whether `name` can be a host name.
#[must_use]
pub fn is_host_name(name: &str) -> bool {
    name.len() <= NAME_LIMIT
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
        // All digits would be read as an address by many programs.
        && !name.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

fn is_group(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mac(last: u8) -> Mac {
        Mac::new([0x52, 0x54, 0, 0, 0, last]).unwrap()
    }

    #[test]
    fn addresses_are_read_in_every_common_form() {
        for text in ["52:54:00:aB:cd:0f", "52-54-00-ab-cd-0f", "5254.00ab.cd0f", "525400abcd0f"] {
            assert_eq!(text.parse::<Mac>().unwrap().to_string(), "52:54:00:ab:cd:0f", "{text}");
        }
        for text in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:",
            "52:54:00:ab:cd:0g",
            "5:254:00:ab:cd:0f",
            "525400abcd0f0",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
            "+2:54:00:ab:cd:0f",
            "5254.00abc.d0f",
            "52:54:00:ab:cd:é",
            "52540:0ab:cd:0f:",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        assert_eq!(mac(15).bootif(), "01-52-54-00-00-00-0f");
    }

    #[test]
    fn a_nodes_file_is_read() {
        let text =
            "# rack 1\n52:54:00:00:00:01 alpha group=gpu\n\n  52-54-00-00-00-02\tbeta.example # the second\n";
        let nodes = Nodes::parse(text, Pattern::default()).unwrap();
        assert_eq!(nodes.listed(), [mac(1), mac(2)]);
        let alpha = Identity { name: "alpha".into(), index: 1, group: Some("gpu".into()) };
        assert_eq!(nodes.get(mac(1)), Some(&alpha));
        assert_eq!(nodes.get(mac(2)).unwrap().name, "beta.example");
        assert!(nodes.is_listed(mac(2)) && !nodes.is_listed(mac(3)));
    }

    #[test]
    fn wrong_lines_are_named() {
        for (text, error) in [
            ("\n52:54:00:00:00:01\n", "line 2: no name after 52:54:00:00:00:01"),
            (
                "52:54:00:00:00 a\n",
                "line 1: `52:54:00:00:00` is not an Ethernet address (example: 52:54:00:12:34:56)",
            ),
            ("52:54:00:00:00:01 a\n525400000001 b\n", "line 2: 52:54:00:00:00:01 is a already"),
            ("52:54:00:00:00:01 a\n52:54:00:00:00:02 A\n", "line 2: the name A is taken already"),
            ("52:54:00:00:00:01 a rack=1\n", "line 1: `rack=1` is not known here (only group=NAME)"),
            ("52:54:00:00:00:01 a group=\n", "line 1: `` is not a group name"),
            ("52:54:00:00:00:01 a group=x group=y\n", "line 1: two groups"),
        ] {
            assert_eq!(Nodes::parse(text, Pattern::default()).unwrap_err().to_string(), error);
        }
        for name in ["-a", "a-", "a..b", "a_b", "10.0.0.1", "é", &"a".repeat(65)] {
            let text = format!("52:54:00:00:00:01 {name}\n");
            assert!(Nodes::parse(&text, Pattern::default()).is_err(), "{name}");
        }
        let missing = Nodes::read(Path::new("/no/such/nodes"), Pattern::default()).unwrap_err().to_string();
        assert!(missing.starts_with("reading the nodes file /no/such/nodes: "), "{missing}");
    }

    #[test]
    fn unlisted_nodes_are_named_by_the_pattern_and_keep_their_names() {
        let text = "52:54:00:00:00:01 n002\n";
        let mut nodes = Nodes::parse(text, "n{n:03}".parse().unwrap()).unwrap();
        // n002 is taken by the file, so the first free number is skipped over.
        assert_eq!(nodes.assign(mac(9)).unwrap(), Identity { name: "n003".into(), index: 3, group: None });
        assert_eq!(nodes.assign(mac(8)).unwrap().name, "n004");
        assert_eq!(nodes.assign(mac(9)).unwrap().name, "n003");
        assert_eq!(nodes.assign(mac(1)).unwrap().name, "n002");
    }

    #[test]
    fn earlier_names_are_adopted_unless_taken() {
        let mut nodes = Nodes::parse("52:54:00:00:00:01 node1\n", Pattern::default()).unwrap();
        let old = |name: &str| Identity { name: name.into(), index: 7, group: None };
        assert!(!nodes.adopt(mac(1), &old("node9")), "the file stands above");
        assert!(!nodes.adopt(mac(2), &old("node1")), "taken");
        assert!(!nodes.adopt(mac(2), &old("no name")), "not a host name");
        assert!(nodes.adopt(mac(2), &old("node2")));
        assert_eq!(nodes.assign(mac(2)).unwrap().name, "node2");
        assert_eq!(nodes.assign(mac(3)).unwrap().name, "node3");
    }

    #[test]
    fn strangers_without_end_are_bounded() {
        let mut nodes = Nodes::unlisted(Pattern::default());
        for n in 0..UNLISTED_LIMIT {
            let [a, b] = u16::try_from(n).unwrap().to_be_bytes();
            nodes.assign(Mac::new([2, 0, 0, 0, a, b]).unwrap()).unwrap();
        }
        assert!(matches!(nodes.assign(mac(1)), Err(Error::TooMany(_))));
    }

    #[test]
    fn patterns_are_checked() {
        for text in ["node{n}", "{n:03}-rack", "a{n:09}.example"] {
            assert!(text.parse::<Pattern>().is_ok(), "{text}");
        }
        for text in
            ["node", "node{m}", "node{n", "{n}{n}", "node{n:3}", "node{n:00}", "-{n}", "{n}", "a b{n}"]
        {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn addresses_survive_printing(bytes: [u8; 6]) {
            if let Ok(mac) = Mac::new(bytes) {
                prop_assert_eq!(mac.to_string().parse::<Mac>(), Ok(mac));
                prop_assert_eq!(mac.bootif()[3..].parse::<Mac>(), Ok(mac));
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,40}", line in "[0-9a-f:.\\- #=gr]{0,60}") {
            // Only that they return is asked here.
            let _ = text.parse::<Mac>();
            let _ = line.parse::<Mac>();
            let _ = text.parse::<Pattern>();
            let _ = Nodes::parse(&line, Pattern::default());
        }

        #[test]
        fn assigned_names_are_host_names_and_unique(macs in proptest::collection::btree_set(1u8.., 1..40)) {
            let mut nodes = Nodes::parse("52:54:00:00:00:01 node3\n", Pattern::default()).unwrap();
            let names: BTreeSet<String> = macs.iter().map(|m| nodes.assign(mac(*m)).unwrap().name).collect();
            prop_assert_eq!(names.len(), macs.len());
            prop_assert!(names.iter().all(|name| is_host_name(name)));
        }
    }
}
