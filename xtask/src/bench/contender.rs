//! Who takes part in a benchmark of the chain, and the command lines of all but Ka. Each gets the same stream on the
//! standard input of its head (`< FILE`), and drops it at every node.

use crate::bench::net::address;
use crate::bench::programs;
use std::ffi::OsString;
use std::path::Path;

/// TCP port of the peers' nodes.
pub const PORT: u16 = 7000;
/// First of udpcast's two UDP ports; it must be even.
const UDP_PORT: u16 = 9000;

/// A program, or way of using one, that clones a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// Ka as it is shipped.
    Ka,
    /// Ka without the signed lists of digests.
    KaTrustNodes,
    /// A chain of mbuffer, each with a network input and two outputs.
    Mbuffer,
    /// `nc -l | tee | nc` at each node.
    Nc,
    /// Multicast by udpcast.
    Udpcast,
    /// One program per node that reads and writes: the limit.
    Relay,
    /// One plain TCP stream to one receiver: the yardstick of a shaped link.
    Tcp,
}

impl Contender {
    /// All.
    pub const ALL: [Self; 7] =
        [Self::Relay, Self::Ka, Self::KaTrustNodes, Self::Mbuffer, Self::Nc, Self::Udpcast, Self::Tcp];

    /// Its name on command lines and in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ka => "ka",
            Self::KaTrustNodes => "ka-trust-nodes",
            Self::Mbuffer => "mbuffer",
            Self::Nc => "nc-tee",
            Self::Udpcast => "udpcast",
            Self::Relay => "relay",
            Self::Tcp => "tcp",
        }
    }

    /// What it is, for the report.
    #[must_use]
    pub fn about(self) -> &'static str {
        match self {
            Self::Ka => "Ka, sealed and verified, signed lists when this version has them",
            Self::KaTrustNodes => "Ka with `--trust-nodes`",
            Self::Mbuffer => {
                "`mbuffer -I PORT -O NEXT:PORT -o -` at each node, blocks of 256 KiB, 32 MiB of memory"
            }
            Self::Nc => "`nc -l PORT | tee /dev/fd/3 3>&1 >/dev/null | nc -N NEXT PORT` at each node",
            Self::Udpcast => "udp-sender and udp-receiver, multicast, `--min-receivers N`, else its defaults",
            Self::Relay => "bare read/write relay, one process per node, one buffer of 256 KiB: the limit",
            Self::Tcp => "bare relay to one receiver: one plain TCP stream",
        }
    }

    /// By name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|contender| contender.name() == name)
    }

    /// Whether it is Ka.
    #[must_use]
    pub fn is_ka(self) -> bool {
        matches!(self, Self::Ka | Self::KaTrustNodes)
    }

    /// How many of `receivers` take part.
    #[must_use]
    pub fn receivers(self, receivers: usize) -> usize {
        if self == Self::Tcp { 1 } else { receivers }
    }

    /// The port on which its nodes listen before the head may start, if they do.
    #[must_use]
    pub fn listens(self) -> Option<u16> {
        (self != Self::Udpcast).then_some(PORT)
    }

    /// Command line of a node (0 is the head) of a chain of `receivers` receivers. Ka's stand elsewhere.
    #[must_use]
    pub fn command(self, node: usize, receivers: usize, xtask: &Path) -> Vec<OsString> {
        let next = (node < receivers).then(|| address(node + 1));
        let to = |separator: &str| next.map(|next| format!("{next}{separator}{PORT}"));
        let words: Vec<String> = match self {
            Self::Ka | Self::KaTrustNodes => Vec::new(),
            Self::Relay | Self::Tcp => {
                let mut words = vec![programs::RELAY.to_owned()];
                if node > 0 {
                    words.extend(["--listen".to_owned(), PORT.to_string()]);
                }
                words.extend(to(":").into_iter().flat_map(|to| ["--to".to_owned(), to]));
                return std::iter::once(xtask.into()).chain(words.into_iter().map(Into::into)).collect();
            }
            Self::Mbuffer => {
                let mut words = text("mbuffer -q -s 256k -m 32M");
                if node > 0 {
                    words.extend(["-I".to_owned(), PORT.to_string()]);
                }
                words.extend(to(":").into_iter().flat_map(|to| ["-O".to_owned(), to]));
                if node > 0 {
                    // Standard output is the null device.
                    words.extend(text("-o -"));
                }
                words
            }
            Self::Nc => {
                let script = match (node, to(" ")) {
                    (0, Some(to)) => format!("exec nc -N {to}"),
                    (_, Some(to)) => {
                        format!("nc -l {PORT} | tee /dev/fd/3 3>&1 >/dev/null | nc -N {to}")
                    }
                    (_, None) => format!("exec nc -l {PORT}"),
                };
                vec!["sh".to_owned(), "-c".to_owned(), script]
            }
            Self::Udpcast if node == 0 => text(&format!(
                "udp-sender --nokbd --no-progress --interface eth0 --portbase {UDP_PORT} --min-receivers {receivers} \
                 --rexmit-hello-interval 200"
            )),
            Self::Udpcast => {
                text(&format!("udp-receiver --nokbd --no-progress --interface eth0 --portbase {UDP_PORT}"))
            }
        };
        words.into_iter().map(Into::into).collect()
    }
}

fn text(words: &str) -> Vec<String> {
    words.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(contender: Contender, node: usize) -> String {
        let words = contender.command(node, 2, Path::new("/x"));
        words.iter().map(|w| w.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn names_are_unique() {
        for contender in Contender::ALL {
            assert_eq!(Contender::named(contender.name()), Some(contender));
        }
        assert_eq!(Contender::named("rsync"), None);
    }

    #[test]
    fn heads_send_middles_pass_on_and_the_last_drops() {
        assert_eq!(line(Contender::Relay, 0), "/x bench-relay --to 10.92.0.2:7000");
        assert_eq!(line(Contender::Relay, 1), "/x bench-relay --listen 7000 --to 10.92.0.3:7000");
        assert_eq!(line(Contender::Relay, 2), "/x bench-relay --listen 7000");
        assert_eq!(line(Contender::Mbuffer, 0), "mbuffer -q -s 256k -m 32M -O 10.92.0.2:7000");
        assert!(line(Contender::Mbuffer, 1).ends_with("-I 7000 -O 10.92.0.3:7000 -o -"));
        assert!(line(Contender::Mbuffer, 2).ends_with("-I 7000 -o -"));
        assert_eq!(line(Contender::Nc, 0), "sh -c exec nc -N 10.92.0.2 7000");
        assert_eq!(line(Contender::Nc, 2), "sh -c exec nc -l 7000");
        assert!(line(Contender::Nc, 1).contains("tee"));
        assert!(line(Contender::Udpcast, 0).contains("--min-receivers 2"));
    }

    #[test]
    fn the_yardstick_has_one_receiver() {
        assert_eq!((Contender::Tcp.receivers(60), Contender::Ka.receivers(60)), (1, 60));
    }
}
