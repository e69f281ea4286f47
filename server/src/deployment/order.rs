//! The topology file of `--order FILE`: which nodes share a switch or a chassis. The chain goes through one group after the
//! other, so that each link between switches is crossed once.
//!
//! One group a line, `PLACE: NODE...`; `#` begins a comment. A place may lie in another: `rack1/chassis2` is visited together
//! with the rest of `rack1`. A node is a name, a MAC address, an IP address, or a network (`10.0.3.0/24`) for all that
//! have an address in it. The order is that of the file; whoever stands in no group comes last, by address. The golden
//! node's own switch belongs first.

use crate::nodes::Mac;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

/// The largest file that is read, in bytes.
const LIMIT: u64 = 16 << 20;

/// What is wrong with a topology file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("reading {0}")]
    Read(String),
    /// A line of it is wrong.
    #[error("line {line}: {what}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong there.
        what: String,
    },
}

/// A topology file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// Where a name, a MAC address (in lower case) or an address stands.
    nodes: BTreeMap<String, Rank>,
    networks: Vec<(IpAddr, u8, Rank)>,
}

/// A node's position: that of each place on the way to it, then its own. Whoever has none comes last.
pub type Rank = Vec<usize>;

impl Topology {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, or a line is wrong.
    pub fn read(path: &Path) -> Result<Self, Error> {
        use std::io::Read;
        let reading = |e: std::io::Error| Error::Read(format!("{}: {e}", path.display()));
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(reading)?;
        file.take(LIMIT).read_to_string(&mut text).map_err(reading)?;
        Self::parse(&text)
    }

    /// Reads its text.
    ///
    /// # Errors
    /// Names the line.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut topology = Self::default();
        // Places in the order in which they are first named, each under the one that it lies in.
        let mut places: BTreeMap<Vec<&str>, usize> = BTreeMap::new();
        for (at, line) in text.lines().enumerate() {
            let wrong = |what: String| Error::Line { line: at + 1, what };
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            // The first colon that ends a word: MAC and IPv6 addresses have others.
            let (place, nodes) = line
                .split_once(": ")
                .or_else(|| line.strip_suffix(':').map(|place| (place, "")))
                .ok_or_else(|| wrong("a line is `PLACE: NODE...`".to_owned()))?;
            let names: Vec<&str> = place.split('/').map(str::trim).collect();
            if names.iter().any(|name| name.is_empty() || name.contains(char::is_whitespace)) {
                return Err(wrong(format!("`{place}` is not a place (examples: rack1, rack1/chassis2)")));
            }
            let mut rank = Rank::new();
            for depth in 1..=names.len() {
                let next = places.len();
                rank.push(*places.entry(names[..depth].to_vec()).or_insert(next));
            }
            for node in nodes.split_whitespace() {
                let mut rank = rank.clone();
                rank.push(topology.nodes.len() + topology.networks.len());
                topology.add(node, rank).map_err(wrong)?;
            }
        }
        Ok(topology)
    }

    fn add(&mut self, node: &str, rank: Rank) -> Result<(), String> {
        if let Some((address, bits)) = node.split_once('/') {
            let parsed = address.parse::<IpAddr>().ok().zip(bits.parse::<u8>().ok());
            let longest = |ip: IpAddr| if ip.is_ipv4() { 32 } else { 128 };
            let (ip, bits) = parsed
                .filter(|(ip, bits)| *bits <= longest(*ip))
                .ok_or_else(|| format!("`{node}` is not a network (example: 10.0.3.0/24)"))?;
            self.networks.push((ip, bits, rank));
            return Ok(());
        }
        let key = match (node.parse::<IpAddr>(), node.parse::<Mac>()) {
            (Ok(ip), _) => ip.to_canonical().to_string(),
            (_, Ok(mac)) => mac.to_string(),
            _ => node.to_owned(),
        };
        match self.nodes.insert(key, rank) {
            None => Ok(()),
            Some(_) => Err(format!("{node} stands here twice")),
        }
    }

    /// Where a node stands; sort by it.
    #[must_use]
    pub fn rank(&self, name: &str, mac: Option<&str>, address: IpAddr) -> (bool, Rank) {
        let address = address.to_canonical();
        let mac = mac.and_then(|mac| mac.parse::<Mac>().ok()).map(|mac| mac.to_string());
        let found = self
            .nodes
            .get(name)
            .or_else(|| self.nodes.get(&mac?))
            .or_else(|| self.nodes.get(&address.to_string()))
            .or_else(|| {
                let mut around = self.networks.iter().filter(|(ip, bits, _)| lies_in(address, *ip, *bits));
                around.next().map(|(.., rank)| rank)
            });
        (found.is_none(), found.cloned().unwrap_or_default())
    }
}

fn lies_in(address: IpAddr, network: IpAddr, bits: u8) -> bool {
    let (a, b) = match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()) << 96, u128::from(b.to_bits()) << 96),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits()),
        _ => return false,
    };
    bits == 0 || (a ^ b) >> (128 - u32::from(bits)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(file: &str, nodes: &[(&str, &str)]) -> String {
        let topology = Topology::parse(file).unwrap();
        let mut nodes = nodes.to_vec();
        let mac = |name: &str| (name == "m").then_some("52:54:00:AB:00:01");
        nodes.sort_by_cached_key(|(name, ip)| topology.rank(name, mac(name), ip.parse().unwrap()));
        nodes.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn groups_are_visited_one_after_the_other_and_places_in_a_place_together() {
        let file = "# the golden node's switch\nrack1/a: n1 n9 # two\nrack2: 10.0.2.0/24 n4\n\nrack1/b: n2 10.0.0.77 52:54:00:ab:00:01\nrack3:\n";
        let nodes = [
            ("n1", "10.0.0.1"),
            ("n2", "10.0.0.2"),
            ("x", "10.0.2.6"),
            ("n4", "10.0.0.4"),
            ("late", "10.9.0.1"),
            ("y", "::ffff:10.0.2.3"),
            ("n9", "10.0.0.9"),
            ("m", "10.0.2.99"),
            ("z", "10.0.0.77"),
        ];
        // Equal ranks keep the order that they had.
        assert_eq!(order(file, &nodes), "n1 n9 n2 z m x y n4 late");
    }

    #[test]
    fn mistakes_are_named_by_line() {
        for (text, expected) in [
            ("a: n1\nn2 n3\n", "line 2: a line is"),
            ("a b: n1", "line 1: `a b` is not a place"),
            ("a//b: n1", "line 1: `a//b` is not a place"),
            ("a: n1\nb: n2 n1", "line 2: n1 stands here twice"),
            ("a: 10.0.0.0/33", "line 1: `10.0.0.0/33` is not a network"),
        ] {
            let error = Topology::parse(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        assert!(matches!(Topology::read(Path::new("/nowhere/x")), Err(Error::Read(_))));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "([a-z/:. #0-9]{0,30}\n){0,4}", a: u32, bits in 0u8..=32) {
            if let Ok(topology) = Topology::parse(&text) {
                let (last, rank) = topology.rank("a", Some("x"), IpAddr::V4(a.into()));
                prop_assert_eq!(last, rank.is_empty());
            }
            prop_assert!(lies_in(IpAddr::V4(a.into()), IpAddr::V4(a.into()), bits));
        }
    }
}
