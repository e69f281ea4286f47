//! The network of a benchmark: a namespace for each node (the head is node 0), joined by virtual cables to a bridge in a
//! namespace of its own; rates by `tbf` at both ends of each cable, cubic everywhere, and the ways in which a cable fails.
//! Everything is gone when this is dropped, and what a killed run left is removed by the next.

use crate::lab::net::{PREFIX, remove, remove_leftovers};
use crate::{interrupt, run, say};
use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The kernel's list of algorithms that a namespace may choose; of the whole machine.
const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
/// What every namespace uses.
const CUBIC: &str = "cubic";
/// How long the cables may take to come up.
const UP: Duration = Duration::from_secs(20);
/// Most nodes, the head included: one /24.
pub const MOST: usize = 254;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Namespaces with a bridge between them.
#[derive(Debug)]
pub struct Net {
    bridge: String,
    nodes: Vec<String>,
    /// Dropped last: the namespaces keep what they were given.
    _cubic: CubicAllowed,
}

impl Net {
    /// Makes a head and `receivers` nodes; each cable carries `megabits` per second in each direction, or all it can.
    ///
    /// # Errors
    /// When there are too many, or the kernel, `ip` or `tc` refuses.
    pub fn new(receivers: usize, megabits: Option<u32>) -> Result<Self> {
        if receivers == 0 || receivers >= MOST {
            bail!("{receivers} receivers: from 1 to {}", MOST - 1);
        }
        remove_leftovers()?;
        let cubic = CubicAllowed::new()?;
        let bridge = format!("{PREFIX}{}-b{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let nodes: Vec<String> = (0..=receivers).map(|n| format!("{bridge}-{n}")).collect();
        let names = std::iter::once(&bridge).chain(&nodes).map(|name| format!("netns add {name}\n"));
        let net = Self { bridge: bridge.clone(), nodes: nodes.clone(), _cubic: cubic };
        batch("ip", None, &names.collect::<String>())?;
        batch("ip", Some(&bridge), &bridge_script(&nodes))?;
        if let Some(megabits) = megabits {
            let all: String = (0..nodes.len()).map(|n| shape(&port(n), megabits)).collect();
            batch("tc", Some(&bridge), &all)?;
        }
        for (n, node) in nodes.iter().enumerate() {
            batch("ip", Some(node), &node_script(n))?;
            if let Some(megabits) = megabits {
                batch("tc", Some(node), &shape(CABLE, megabits))?;
            }
            use_cubic(node)?;
        }
        net.wait_up()?;
        Ok(net)
    }

    /// The kernel notices that a cable is plugged in up to a second later.
    fn wait_up(&self) -> Result<()> {
        let up = interrupt::poll(UP, || {
            let ports = run::output("ip", &["-n", &self.bridge, "-o", "link", "show", "master", "br0"])?;
            Ok((ports.matches(" state UP ").count() == self.nodes.len()).then_some(()))
        })?;
        up.context("the benchmark's virtual cables do not come up")
    }

    /// How many nodes receive.
    #[must_use]
    pub fn receivers(&self) -> usize {
        self.nodes.len() - 1
    }

    /// A command that runs at a node; its process id is the program's.
    #[must_use]
    pub fn command(&self, node: usize, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.nodes[node]]).arg(program);
        command
    }

    /// Pulls the cable of a node.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn pull(&self, node: usize) -> Result<()> {
        batch("ip", Some(&self.bridge), &format!("link set {} down\n", port(node)))
    }

    /// Nothing reaches the node any more; what it sends still arrives.
    ///
    /// # Errors
    /// When `tc` refuses.
    pub fn deafen(&self, node: usize) -> Result<()> {
        batch("tc", Some(&self.bridge), &drop_all(&port(node)))
    }

    /// Nothing that the node sends arrives any more; it still hears the others.
    ///
    /// # Errors
    /// When `tc` refuses.
    pub fn mute(&self, node: usize) -> Result<()> {
        batch("tc", Some(&self.nodes[node]), &drop_all(CABLE))
    }

    /// What `node` sends to `other` no longer leaves it; everything else does.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn estrange(&self, node: usize, other: usize) -> Result<()> {
        let script = format!("route add blackhole {}/32\n", address(other));
        batch("ip", Some(&self.nodes[node]), &script)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in self.nodes.iter().chain([&self.bridge]) {
            // A name that is not there was never made: the network could not be finished.
            if std::path::Path::new("/run/netns").join(name).exists()
                && let Err(e) = remove(name)
            {
                say!("bench", "cannot remove the network namespace {name}: {e:#}");
            }
        }
    }
}

/// A node's end of its cable.
const CABLE: &str = "eth0";

/// The address of a node.
#[must_use]
pub fn address(node: usize) -> Ipv4Addr {
    // At most `MOST` nodes, so it always fits.
    Ipv4Addr::new(10, 92, 0, u8::try_from(node + 1).unwrap_or(u8::MAX))
}

/// The bridge's end of a node's cable.
fn port(node: usize) -> String {
    format!("p{node}")
}

fn bridge_script(nodes: &[String]) -> String {
    // Without snooping multicast goes to all, as through a plain switch.
    let mut script =
        "link set lo up\nlink add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
                      link set br0 up\n"
            .to_owned();
    for (n, node) in nodes.iter().enumerate() {
        let port = port(n);
        script.push_str(&format!(
            "link add {port} type veth peer name {CABLE} netns {node}\nlink set {port} master br0 up\n"
        ));
    }
    script
}

fn node_script(node: usize) -> String {
    format!(
        "link set lo up\naddr add {}/24 brd + dev {CABLE}\nlink set {CABLE} up\nroute add 224.0.0.0/4 dev {CABLE}\n",
        address(node)
    )
}

/// A burst of 128 KiB holds the biggest packet that the kernel sends in one piece; a smaller one makes `tbf` cut it up,
/// which costs the machine far more than the chain itself.
fn shape(device: &str, megabits: u32) -> String {
    format!("qdisc replace dev {device} root tbf rate {megabits}mbit burst 128k latency 50ms\n")
}

/// No packet is as small as this bucket, so all are dropped. (`netem` and the classifiers are not in every kernel, `tbf`
/// is needed anyway.)
fn drop_all(device: &str) -> String {
    format!("qdisc replace dev {device} root tbf rate 8bit burst 1 limit 1\n")
}

/// Runs a batch of `ip` or `tc`, inside `namespace` if one is given.
fn batch(program: &str, namespace: Option<&str>, script: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.args(namespace.map(|name| ["-n", name]).iter().flatten()).args(["-batch", "-"]);
    ka_sys::process::run_with_input(&mut command, script.as_bytes(), run::SHORT)
        .with_context(|| format!("setting the benchmark's network up, with\n{script}"))?;
    Ok(())
}

/// Sets the congestion control of new sockets in `namespace`, from a thread that goes inside.
fn use_cubic(namespace: &str) -> Result<()> {
    let path = format!("/run/netns/{namespace}");
    let set = || -> Result<()> {
        let namespace = std::fs::File::open(&path).with_context(|| format!("opening {path}"))?;
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind))
            .with_context(|| format!("entering {path}"))?;
        std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", CUBIC)
            .context("setting the congestion control of a namespace to cubic")
    };
    std::thread::scope(|scope| match scope.spawn(set).join() {
        Ok(result) => result,
        Err(_) => bail!("the thread in {path} ended badly"),
    })
}

/// Lets namespaces choose cubic, which the kernel may reserve for the machine itself; what was allowed before is restored
/// when this is dropped.
#[derive(Debug)]
struct CubicAllowed {
    before: Option<String>,
}

impl CubicAllowed {
    fn new() -> Result<Self> {
        let before = std::fs::read_to_string(ALLOWED).with_context(|| format!("reading {ALLOWED}"))?;
        let Some(wanted) = with_cubic(&before) else { return Ok(Self { before: None }) };
        std::fs::write(ALLOWED, wanted)
            .context("allowing cubic in network namespaces (has this kernel cubic?)")?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for CubicAllowed {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(e) = std::fs::write(ALLOWED, before)
        {
            say!("bench", "cannot restore {ALLOWED} to `{}`: {e}", before.trim());
        }
    }
}

/// The list with cubic in it; nothing when it is there already.
fn with_cubic(list: &str) -> Option<String> {
    let listed = list.split_whitespace().any(|word| word == CUBIC);
    (!listed).then(|| format!("{} {CUBIC}", list.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cubic_is_added_once() {
        assert_eq!(with_cubic("reno bbr\n").as_deref(), Some("reno bbr cubic"));
        assert_eq!(with_cubic("reno cubic\n"), None);
    }

    #[test]
    fn addresses_follow_the_order_of_the_chain() {
        assert_eq!(address(0).to_string(), "10.92.0.1");
        assert!((0..MOST - 1).all(|n| address(n) < address(n + 1)));
    }

    #[test]
    fn every_node_gets_a_cable() {
        let script = bridge_script(&["a".to_owned(), "b".to_owned()]);
        assert!(script.contains("link add p1 type veth peer name eth0 netns b\nlink set p1 master br0 up\n"));
        assert!(shape("p1", 100).contains("rate 100mbit burst 128k"));
    }
}
