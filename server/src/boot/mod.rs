//! The PXE service: dnsmasq for DHCP or proxy-DHCP and TFTP, HTTP for kernel, initramfs and a boot script per node, and
//! the states that decide which script a node gets. `deploy --pxe` and `ka-server boot` use it alike.

pub mod child;
pub mod command;
pub mod dhcp;
pub mod dhcplog;
pub mod dnsmasq;
pub mod events;
pub mod files;
pub mod http;
pub mod listener;
pub mod nodes;
pub mod pins;
pub mod probe;
pub mod query;
pub mod range;
pub mod router;
pub mod scan;
pub mod script;

use crate::nodes::Mac;
use crate::trust::Tickets;
use anyhow::{Context, Result, anyhow, bail};
use dhcp::{Dhcp, Plan};
use events::BootEvent;
use ka_sys::ifaddr::{self, Ipv4Net};
use nodes::NodeStates;
use std::net::{Ipv4Addr, SocketAddrV4, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// The HTTP port unless told otherwise.
pub const HTTP_PORT: u16 = 8067;
/// The port at which agents expect the deployment unless told otherwise.
pub const SERVER_PORT: u16 = 5757;

/// How the PXE service is to be run.
#[derive(Debug, Clone)]
pub struct BootConfig {
    /// The interface of the install network.
    pub interface: String,
    /// What is done about DHCP there.
    pub dhcp: Dhcp,
    /// The router that full DHCP tells the nodes.
    pub router: Option<Ipv4Addr>,
    /// Where the boot files are.
    pub boot_dir: PathBuf,
    /// The HTTP port; 0 takes any free one.
    pub http_port: u16,
    /// Where agents find the deployment: `HOST:PORT`. By default our address on the interface and [`SERVER_PORT`].
    pub server: Option<String>,
    /// Further kernel arguments.
    pub append: String,
    /// Whether full DHCP is started although another DHCP server answers.
    pub force: bool,
}

impl BootConfig {
    /// The defaults on `interface`: proxy-DHCP, the usual ports and directory.
    #[must_use]
    pub fn new(interface: &str) -> Self {
        Self {
            interface: interface.to_owned(),
            dhcp: Dhcp::Proxy,
            router: None,
            boot_dir: PathBuf::from(files::BOOT_DIR),
            http_port: HTTP_PORT,
            server: None,
            append: String::new(),
            force: false,
        }
    }
}

/// Another DHCP server answers where ours was to be started.
#[derive(Debug, thiserror::Error)]
#[error(
    "the DHCP server {server} answers on {interface}, and two on one network quarrel: leave out --dhcp (proxy-DHCP \
     works beside it), or say --force"
)]
pub struct OtherDhcpServer {
    /// Its address.
    pub server: Ipv4Addr,
    /// Where.
    pub interface: String,
}

/// The PXE service while it runs; dropping it stops it.
pub struct BootService {
    // The order matters: dropped from the top. dnsmasq goes first, so that nobody is sent to an HTTP server that is gone,
    // and the directory last.
    dnsmasq: child::Dnsmasq,
    _router: Option<router::RouterAnswers>,
    _http: http::HttpServer,
    _directory: tempfile::TempDir,
    states: Arc<NodeStates>,
    events: Option<Receiver<BootEvent>>,
    http: SocketAddrV4,
    plan: Plan,
    site: script::Site,
    interface: String,
}

impl BootService {
    /// Starts everything and returns when nodes can boot. `tickets` gives what goes into the boot scripts so that a node
    /// trusts the right server and is let in.
    ///
    /// # Errors
    /// When something is missing (interface, address, dnsmasq, boot files), does not fit, or cannot be started;
    /// [`OtherDhcpServer`] when starting could disturb the network.
    pub fn start(config: &BootConfig, states: Arc<NodeStates>, tickets: Arc<dyn Tickets>) -> Result<Self> {
        let interface = config.interface.as_str();
        // Everything that can be checked is checked before anything is started.
        let net = address_of(interface)?;
        let plan = config.dhcp.plan(net)?;
        let files = files::BootFiles::read(&config.boot_dir)?;
        let baked = append_of(&config.boot_dir)?;
        let append = format!("{} {}", baked.trim(), config.append.trim()).trim().to_owned();
        script::check_append(&append).map_err(|e| anyhow!(e))?;
        let program = dnsmasq::find().map_err(|e| anyhow!(e))?;
        look_around(interface, plan, config.force)?;
        let reserved = reserve(interface, net.address, plan, &states.listed());

        let bound = http::Bound::new(SocketAddrV4::new(net.address, config.http_port))?;
        let http = bound.address();
        let server = match &config.server {
            Some(server) => resolve(server)?.to_string(),
            None => SocketAddrV4::new(net.address, SERVER_PORT).to_string(),
        };
        let site = script::Site { http, server, append };

        let directory = tempfile::Builder::new()
            .prefix("ka-boot-")
            .tempdir()
            .context("making a directory for dnsmasq")?;
        let tftp_root = directory.path().join("tftp");
        std::fs::create_dir(&tftp_root).with_context(|| format!("making {}", tftp_root.display()))?;
        files.write_tftp(&tftp_root)?;
        let pin_directory = directory.path().join("pins");
        std::fs::create_dir(&pin_directory).with_context(|| format!("making {}", pin_directory.display()))?;
        let settings = dnsmasq::Settings {
            interface,
            net,
            plan,
            router: config.router,
            reserved: &reserved,
            http_port: http.port(),
            tftp_root: &tftp_root,
            pins: &pin_directory,
            state: directory.path(),
        };
        let file = directory.path().join("dnsmasq.conf");
        std::fs::write(&file, dnsmasq::configuration(&settings))
            .with_context(|| format!("writing {}", file.display()))?;

        let (sender, receiver) = events::queue();
        let content = http::Content {
            site: site.clone(),
            files,
            states: Arc::clone(&states),
            tickets,
            events: sender.clone(),
        };
        let http_server = http::HttpServer::start(bound, content, listener::Limits::default())?;
        let router = ifaddr::interface_index(interface)
            .map_err(anyhow::Error::from)
            .and_then(router::RouterAnswers::start)
            .inspect_err(|e| log::warn!("nodes will boot some seconds later than they could: {e:#}"))
            .ok();
        let pins = matches!(plan, Plan::Full(..)).then(|| pins::Pins::new(pin_directory, &reserved));
        let dnsmasq = child::Dnsmasq::start(&program, &file, pins, sender)?;
        Ok(Self {
            dnsmasq,
            _router: router,
            _http: http_server,
            _directory: directory,
            states,
            events: Some(receiver),
            http,
            plan,
            site,
            interface: interface.to_owned(),
        })
    }

    /// The states of the nodes.
    #[must_use]
    pub const fn states(&self) -> &Arc<NodeStates> {
        &self.states
    }

    /// What happens, from now on; can be taken once.
    pub const fn events(&mut self) -> Option<Receiver<BootEvent>> {
        self.events.take()
    }

    /// Where the HTTP server listens.
    #[must_use]
    pub const fn http(&self) -> SocketAddrV4 {
        self.http
    }

    /// The process id of dnsmasq.
    #[must_use]
    pub const fn dnsmasq_pid(&self) -> u32 {
        self.dnsmasq.pid()
    }

    /// What is served and which ports must be open, for people: one line each.
    #[must_use]
    pub fn description(&self) -> Vec<String> {
        let Self { interface, http, site, .. } = self;
        let dhcp = match self.plan {
            Plan::Proxy => "proxy-DHCP (another server hands out the addresses)".to_owned(),
            Plan::Full(first, last) => format!("DHCP for {first} to {last}"),
            Plan::Off => "no DHCP".to_owned(),
        };
        let udp = match self.plan {
            Plan::Proxy => "67, 69, 4011",
            Plan::Full(..) => "67, 69",
            Plan::Off => "69",
        };
        let mut tcp = vec![http.port().to_string()];
        if let Some((host, port)) = site.server.rsplit_once(':')
            && host == http.ip().to_string()
        {
            tcp.push(port.to_owned());
        }
        vec![
            format!(
                "PXE service on {interface}: {dhcp}, TFTP, HTTP at http://{http}/; agents call {}",
                site.server
            ),
            format!(
                "a firewall must let in on {interface}: UDP {udp}; TCP {}; ICMPv6 router solicitations. With nftables:",
                tcp.join(", ")
            ),
            format!("  nft insert rule inet filter input iifname {interface} udp dport '{{ {udp} }}' accept"),
            format!(
                "  nft insert rule inet filter input iifname {interface} tcp dport '{{ {} }}' accept",
                tcp.join(", ")
            ),
            format!(
                "  nft insert rule inet filter input iifname {interface} icmpv6 type nd-router-solicit accept"
            ),
        ]
    }

    /// Stops everything: dnsmasq first, then HTTP.
    pub fn stop(self) {
        drop(self);
    }
}

/// The address of `interface` that is used: its first one.
///
/// # Errors
/// When there is no such interface or it has no IPv4 address.
pub fn address_of(interface: &str) -> Result<Ipv4Net> {
    if !dnsmasq::is_interface_name(interface) {
        bail!("`{interface}` cannot be the name of an interface");
    }
    ifaddr::interface_index(interface).map_err(|_| {
        // Only for the message: what cannot be read is not listed.
        let known = ifaddr::interfaces().unwrap_or_default();
        anyhow!("there is no interface {interface} (there are: {})", known.join(", "))
    })?;
    let all = ifaddr::ipv4_of(interface).with_context(|| format!("reading the addresses of {interface}"))?;
    let net = *all.first().ok_or_else(|| {
        anyhow!("{interface} has no IPv4 address: give it one, for example with `ip addr add 10.91.0.1/24 dev {interface}`")
    })?;
    if all.len() > 1 {
        log::info!("{interface} has {} addresses; {net} is used", all.len());
    }
    Ok(net)
}

/// Looks for another DHCP server: full DHCP must not have one beside it, proxy-DHCP must.
fn look_around(interface: &str, plan: Plan, force: bool) -> Result<()> {
    if plan == Plan::Off || (force && plan != Plan::Proxy) {
        return Ok(());
    }
    match (plan, probe::dhcp_server(interface, probe::WAIT)) {
        (Plan::Full(..), Ok(Some(server))) => {
            return Err(OtherDhcpServer { server, interface: interface.to_owned() }.into());
        }
        (Plan::Proxy, Ok(None)) => log::warn!(
            "no DHCP server answers on {interface}: nodes get no address and cannot boot; if this network has none, say \
             --dhcp auto"
        ),
        (Plan::Proxy, Ok(Some(server))) => {
            log::info!("the DHCP server {server} hands out addresses on {interface}");
        }
        (_, Err(e)) => log::warn!("cannot find out whether another DHCP server answers on {interface}: {e}"),
        _ => {}
    }
    Ok(())
}

/// Who gets which address with full DHCP, so that none is given to two.
fn reserve(interface: &str, own: Ipv4Addr, plan: Plan, listed: &[Mac]) -> Vec<(Mac, Ipv4Addr)> {
    let Plan::Full(first, last) = plan else { return Vec::new() };
    let held = scan::holders(interface, own, first, last).unwrap_or_else(|e| {
        log::warn!("cannot find out which addresses on {interface} are in use: {e}");
        Default::default()
    });
    if u32::from(last) - u32::from(first) >= scan::LIMIT {
        log::warn!(
            "only the first {} addresses of the range were looked at for others that use them",
            scan::LIMIT
        );
    }
    for (address, mac) in &held {
        log::info!("{address} is in use by {mac} and stays with it");
    }
    let room = u32::from(last) - u32::from(first) + 1;
    if usize::try_from(room).is_ok_and(|room| room < listed.len()) {
        log::warn!("the range has {room} addresses for the {} nodes of the nodes file", listed.len());
    }
    scan::reservations(first, last, &held, listed)
}

fn resolve(server: &str) -> Result<SocketAddrV4> {
    // Nodes have no name server while they boot, so names are resolved here.
    let found = server.to_socket_addrs().with_context(|| format!("resolving {server} (HOST:PORT)"))?;
    found
        .filter_map(|address| match address {
            std::net::SocketAddr::V4(address) => Some(address),
            std::net::SocketAddr::V6(_) => None,
        })
        .next()
        .ok_or_else(|| anyhow!("{server} has no IPv4 address"))
}

/// The kernel arguments that `ka-image build --append` left in the manifest; boot files that were put together by hand have
/// none.
fn append_of(boot_dir: &Path) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Manifest {
        append: String,
    }
    let path = boot_dir.join("image.json");
    match std::fs::read(&path) {
        Ok(text) => {
            let manifest: Manifest =
                serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))?;
            Ok(manifest.append)
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_the_image_are_read_and_a_broken_manifest_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(append_of(dir.path()).unwrap(), "");
        std::fs::write(dir.path().join("image.json"), "{\"format\": 1, \"append\": \"console=ttyS0\"}")
            .unwrap();
        assert_eq!(append_of(dir.path()).unwrap(), "console=ttyS0");
        std::fs::write(dir.path().join("image.json"), "{").unwrap();
        assert!(append_of(dir.path()).is_err());
    }

    #[test]
    fn a_missing_interface_is_named_with_those_that_there_are() {
        let error = address_of("no-such-if").unwrap_err().to_string();
        assert!(
            error.starts_with("there is no interface no-such-if (there are: ") && error.contains("lo"),
            "{error}"
        );
        assert!(address_of("a b").is_err());
        assert_eq!(address_of("lo").unwrap().address, Ipv4Addr::LOCALHOST);
    }

    #[test]
    fn the_server_is_an_address_and_a_port() {
        assert_eq!(resolve("10.0.0.1:80").unwrap(), "10.0.0.1:80".parse().unwrap());
        assert!(resolve("localhost:80").unwrap().ip().is_loopback());
        for wrong in ["10.0.0.1", "[::1]:80", ":80", "10.0.0.1:x"] {
            assert!(resolve(wrong).is_err(), "{wrong}");
        }
    }
}
