//! The DHCP client and the netlink code against a real dnsmasq, in two network namespaces joined by a cable. Packets over
//! such a cable come with their UDP checksum not filled in, as they do from a hypervisor to its guest.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

use ka_agent::init::dhcp::Answer;
use ka_agent::init::dhcp_client::{acquire, extend};
use ka_agent::init::links::{Link, Netlink};
use ka_agent::init::mac::Mac;
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 0x77]);

/// Two namespaces, removed at the end whatever happens.
struct Lab {
    server: String,
    client: String,
    dnsmasq: Option<Child>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop_dnsmasq();
        for ns in [&self.server, &self.client] {
            // The test is over; what cannot be removed is shown by `ip netns`.
            let _ = Command::new("ip").args(["netns", "del", ns]).status();
        }
    }
}

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

impl Lab {
    fn new(tag: &str) -> Self {
        let id = std::process::id();
        let lab = Self { server: format!("ka{tag}s{id}"), client: format!("ka{tag}c{id}"), dnsmasq: None };
        let (s, c) = (&lab.server, &lab.client);
        ip(&format!("netns add {s}"));
        ip(&format!("netns add {c}"));
        ip(&format!("-n {s} link add veth0 type veth peer name eth9 address {MAC} netns {c}"));
        ip(&format!("-n {s} link set veth0 up"));
        ip(&format!("-n {s} addr add 10.93.0.1/24 dev veth0"));
        lab
    }

    fn start_dnsmasq(&mut self) {
        let args = "dnsmasq --keep-in-foreground --conf-file=/dev/null --port=0 --interface=veth0 --bind-interfaces \
                    --leasefile-ro --no-ping --user=root --pid-file= --log-facility=- --domain=lab \
                    --dhcp-range=10.93.0.50,10.93.0.60,255.255.255.0,30m --dhcp-host=02:00:00:00:00:77,n07 \
                    --dhcp-option=3,10.93.0.1 --dhcp-option=6,10.93.0.1 --dhcp-option=26,1400";
        let child = Command::new("ip")
            .args(["netns", "exec", &self.server])
            .args(args.split_whitespace())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.dnsmasq = Some(child);
    }

    fn stop_dnsmasq(&mut self) {
        if let Some(mut child) = self.dnsmasq.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn link(&self) -> Link {
        let line = ip(&format!("-n {} -o link show eth9", self.client));
        let index = line.split(':').next().unwrap().parse().unwrap();
        Link { name: "eth9".into(), index, mac: MAC }
    }

    /// Runs `work` in a thread that lives in the client's namespace.
    fn in_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.client)).unwrap();
        std::thread::scope(|scope| {
            let run = || {
                setns(&namespace, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            };
            scope.spawn(run).join().unwrap()
        })
    }
}

fn can_run() -> bool {
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let root = rustix::process::geteuid().is_root();
    if root && there("dnsmasq") && Command::new("ip").arg("-V").output().is_ok() {
        return true;
    }
    println!("SKIPPED: needs root, ip and dnsmasq");
    false
}

#[test]
fn a_lease_is_got_set_up_and_renewed() {
    if !can_run() {
        return;
    }
    let mut lab = Lab::new("a");
    lab.start_dnsmasq();
    let link = lab.link();
    let lease = lab.in_client(|| {
        let netlink = Netlink::connect().unwrap();
        netlink.set_up(link.index, None).unwrap();
        let lease = acquire(&link, Duration::from_secs(60), &AtomicBool::new(false)).unwrap();
        netlink.set_up(link.index, lease.mtu).unwrap();
        netlink.add_address(link.index, lease.address, lease.prefix).unwrap();
        netlink.add_address(link.index, lease.address, lease.prefix).unwrap(); // the same again is no error
        netlink.add_route(link.index, Ipv4Addr::UNSPECIFIED, 0, Some(Ipv4Addr::new(10, 93, 0, 1))).unwrap();
        let odd = netlink.add_route(link.index, Ipv4Addr::UNSPECIFIED, 0, Some(Ipv4Addr::new(9, 9, 9, 9)));
        assert!(odd.is_err(), "a gateway that is on no network");
        lease
    });
    assert_eq!((lease.prefix, lease.server), (24, Ipv4Addr::new(10, 93, 0, 1)));
    assert_eq!(lease.routes, [(Ipv4Addr::UNSPECIFIED, 0, Some(Ipv4Addr::new(10, 93, 0, 1)))]);
    assert_eq!(lease.dns, [Ipv4Addr::new(10, 93, 0, 1)]);
    assert_eq!((lease.hostname.as_deref(), lease.domain.as_deref()), (Some("n07"), Some("lab")));
    assert_eq!((lease.mtu, lease.lifetime), (Some(1400), Some(Duration::from_secs(1800))));
    let shown = ip(&format!("-n {} addr show eth9", lab.client));
    let address = format!("inet {}/24 brd 10.93.0.255", lease.address);
    assert!(shown.contains(&address) && shown.contains("mtu 1400"), "{shown}");
    let routes = ip(&format!("-n {} route", lab.client));
    assert!(routes.contains("default via 10.93.0.1 dev eth9"), "{routes}");
    for anyone in [false, true] {
        let answer = lab.in_client(|| extend(&link, &lease, anyone).unwrap());
        assert!(matches!(answer, Answer::Ack(ref more) if more.address == lease.address), "{answer:?}");
    }
    lab.in_client(|| {
        Netlink::connect().unwrap().remove_address(link.index, lease.address, lease.prefix).unwrap();
    });
    assert!(!ip(&format!("-n {} addr show eth9", lab.client)).contains("10.93.0."));
}

#[test]
fn a_network_without_a_server_is_a_clear_error_in_time() {
    if !can_run() {
        return;
    }
    let lab = Lab::new("b");
    let link = lab.link();
    let start = std::time::Instant::now();
    let error = lab.in_client(|| {
        Netlink::connect().unwrap().set_up(link.index, None).unwrap();
        acquire(&link, Duration::from_secs(2), &AtomicBool::new(false)).unwrap_err().to_string()
    });
    assert_eq!(error, "no DHCP server answered on eth9 within 2 s");
    assert!(start.elapsed() < Duration::from_secs(30));
    let stopped =
        lab.in_client(|| acquire(&link, Duration::from_secs(60), &AtomicBool::new(true)).unwrap_err());
    assert!(stopped.to_string().contains("another interface"));
}
