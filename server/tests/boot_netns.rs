//! The PXE service as it is: the real dnsmasq, real sockets, real clients (busybox' udhcpc, curl) in network namespaces of
//! their own. Needs root, iproute2, dnsmasq, busybox and curl.

// The helpers of a test fail by panicking, as the tests themselves do.
#![allow(clippy::unwrap_used)]

use ka_server::boot::dhcp::Dhcp;
use ka_server::boot::events::{BootEvent, Client};
use ka_server::boot::nodes::{NodeState, NodeStates, Policy, ScriptKind};
use ka_server::boot::{BootConfig, BootService, OtherDhcpServer};
use ka_server::nodes::{Mac, Nodes, Pattern};
use ka_server::trust::{Pass, Tickets};
use ka_sys::process::run;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

fn sh(script: &str) -> String {
    run(Command::new("sh").args(["-ec", script]), LIMIT).unwrap().text()
}

fn tools_are_there() -> bool {
    let mut missing = Vec::new();
    if !rustix::process::geteuid().is_root() {
        missing.push("root");
    }
    for tool in ["ip", "busybox", "curl", "dnsmasq"] {
        let found = Command::new("sh")
            .args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin command -v {tool}")])
            .output();
        if !found.is_ok_and(|output| output.status.success()) {
            missing.push(tool);
        }
    }
    if !missing.is_empty() {
        println!("SKIPPED: needs {}", missing.join(", "));
    }
    missing.is_empty()
}

/// A server's namespace and a client's, joined by a virtual cable; both go when this is dropped.
struct Net {
    server: String,
    client: String,
}

impl Net {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("kabt{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let net = Self { server: format!("{id}s"), client: format!("{id}c") };
        let (s, c) = (&net.server, &net.client);
        sh(&format!(
            "ip netns add {s}; ip netns add {c}
             ip -n {s} link set lo up; ip -n {c} link set lo up
             ip link add srv netns {s} type veth peer name cli netns {c}
             ip -n {c} link set cli address 52:54:00:00:00:01
             ip -n {s} addr add 10.91.0.1/24 dev srv
             ip -n {s} link set srv up; ip -n {c} link set cli up"
        ));
        net
    }

    /// Runs `work` on a thread inside the server's namespace. The threads that it starts are inside too.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        Self::inside_of(&self.server, work)
    }

    fn inside_of<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{name}");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let namespace = std::fs::File::open(path).unwrap();
                rustix::thread::move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(&namespace),
                    Some(rustix::thread::LinkNameSpaceType::Network),
                )
                .unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    fn client(&self, command: &str) -> String {
        sh(&format!("ip netns exec {} {command}", self.client))
    }

    fn give_client_an_address(&self) {
        sh(&format!("ip -n {} addr add 10.91.0.9/24 dev cli", self.client));
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        sh(&format!("ip netns del {}; ip netns del {}", self.server, self.client));
    }
}

fn boot_files(directory: &Path) {
    for name in ["vmlinuz", "initrd.img", "undionly.kpxe", "snponly.efi", "localboot.efi"] {
        std::fs::write(directory.join(name), format!("this is {name}")).unwrap();
    }
    // Large enough that it does not fit into the buffers of a socket.
    std::fs::write(directory.join("initrd.img"), vec![7; 24 << 20]).unwrap();
}

fn config(directory: &Path, dhcp: Dhcp) -> BootConfig {
    BootConfig { dhcp, boot_dir: directory.to_path_buf(), ..BootConfig::new("srv") }
}

/// Every machine gets the same token here.
struct OneToken;

impl Tickets for OneToken {
    fn pass(&self, _mac: Mac) -> anyhow::Result<Pass> {
        Ok(Pass { key: "11".repeat(32).parse()?, token: "2a".repeat(32).parse()? })
    }
}

fn tickets() -> Arc<dyn Tickets> {
    Arc::new(OneToken)
}

fn everyone() -> Arc<NodeStates> {
    Arc::new(NodeStates::new(Nodes::unlisted(Pattern::default()), Policy::Everyone))
}

fn node() -> Mac {
    "52:54:00:00:00:01".parse().unwrap()
}

fn events_until(
    receiver: &std::sync::mpsc::Receiver<BootEvent>,
    wanted: impl Fn(&BootEvent) -> bool,
) -> Vec<BootEvent> {
    let mut seen = Vec::new();
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if let Ok(event) = receiver.recv_timeout(Duration::from_millis(100)) {
            let found = wanted(&event);
            seen.push(event);
            if found {
                return seen;
            }
        }
    }
    panic!("the event did not come; these did: {seen:?}");
}

#[test]
fn full_dhcp_tftp_and_http() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    let script = files.path().join("lease");
    std::fs::write(
        &script,
        "#!/bin/sh\n[ $1 = bound ] && echo \"$ip router=$router dns=$dns file=$boot_file\" || true\n",
    )
    .unwrap();
    sh(&format!("chmod +x {}", script.display()));
    let states = everyone();
    net.inside(|| {
        let mut service = BootService::start(&config(files.path(), Dhcp::Auto), Arc::clone(&states), tickets()).unwrap();
        let events = service.events().unwrap();
        let pid = service.dnsmasq_pid();

        // A client that says that it is a BIOS' PXE ROM (option 93 = 0), then one that says that it is iPXE (option 175).
        let udhcpc = format!("busybox udhcpc -i cli -n -q -f -t 8 -s {} -V PXEClient:Arch:00000:UNDI:002001", script.display());
        let lease = net.client(&format!("{udhcpc} -x 0x5d:0000"));
        assert!(lease.contains("router= dns= file=undionly.kpxe"), "{lease}");
        let seen = events_until(&events, |event| matches!(event, BootEvent::Address { .. }));
        assert!(seen.contains(&BootEvent::Seen { mac: node(), client: Client::Pxe(0) }), "{seen:?}");
        let lease = net.client(&format!("{udhcpc} -x 0xaf:010203"));
        assert!(lease.contains("file=http://10.91.0.1:8067/boot.ipxe"), "{lease}");
        assert!(lease.starts_with("10.91.0."), "{lease}");

        net.give_client_an_address();
        assert_eq!(net.client("curl -sS tftp://10.91.0.1/snponly.efi"), "this is snponly.efi");
        events_until(&events, |event| matches!(event, BootEvent::Tftp { file, .. } if file == "snponly.efi"));
        // Nothing but the two loaders goes out by TFTP.
        for name in ["vmlinuz", "../leases", "/etc/hostname", "../dnsmasq.conf"] {
            let command = format!("ip netns exec {} curl -sS --path-as-is tftp://10.91.0.1/{name}", net.client);
            assert!(run(Command::new("sh").args(["-ec", &command]), LIMIT).is_err(), "{name}");
        }

        let http = "http://10.91.0.1:8067";
        assert!(net.client(&format!("curl -sS {http}/boot.ipxe")).starts_with("#!ipxe\n"));
        assert_eq!(net.client(&format!("curl -sS {http}/vmlinuz")), "this is vmlinuz");
        let head = net.client(&format!("curl -sSI {http}/initrd.img")).to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 200") && head.contains("content-length: 25165824"), "{head}");
        assert_eq!(net.client(&format!("curl -sS -r 8-10 {http}/snponly.efi")), "snp");
        let status = "-o /dev/null -w %{http_code}";
        assert_eq!(net.client(&format!("curl -sS {status} -r 900- {http}/vmlinuz")), "416");
        assert_eq!(net.client(&format!("curl -sS {status} -r 0-2 {http}/vmlinuz")), "206");
        assert_eq!(net.client(&format!("curl -sS {status} {http}/image.json")), "404");
        assert_eq!(net.client(&format!("curl -sS {status} -d x {http}/vmlinuz")), "405");
        assert_eq!(net.client(&format!("curl -sS {status} '{http}/node.ipxe?mac=x&platform=efi'")), "400");
        let sum = net.client(&format!("curl -sS {http}/initrd.img | wc -c"));
        assert_eq!(sum.trim(), "25165824");

        // Its script follows its state.
        let ask = format!("curl -sS '{http}/node.ipxe?mac={}&platform=efi'", node());
        assert!(net.client(&ask).contains("\nkernel http://10.91.0.1:8067/vmlinuz initrd=initrd.img BOOTIF=01-52-54-00-00-00-01 ka.server=10.91.0.1:5757 ka.key="));
        let script = net.client(&ask);
        let token = script.split("ka.token=").nth(1).unwrap().split(' ').next().unwrap();
        assert_eq!(token, "2a".repeat(32));
        // It stands in the script and nowhere else that others can see.
        let words = std::fs::read(format!("/proc/{}/cmdline", service.dnsmasq_pid())).unwrap();
        assert!(!String::from_utf8_lossy(&words).contains("2a2a"));
        events_until(&events, |event| {
            matches!(event, BootEvent::Script { kind: ScriptKind::Install, mac, .. } if *mac == node())
        });
        states.set(node(), NodeState::Installed);
        assert!(net.client(&ask).contains("\nchain http://10.91.0.1:8067/localboot.efi ||"));
        events_until(&events, |event| matches!(event, BootEvent::LocalBoot { mac, .. } if *mac == node()));

        service.stop();
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "dnsmasq is gone");
    });
}

#[test]
fn proxy_dhcp_beside_another_server_and_full_dhcp_refused() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    sh(&format!("ip -n {} addr add 10.91.0.2/24 dev cli", net.client));
    let conf = files.path().join("udhcpd.conf");
    let leases = files.path().join("leases");
    std::fs::write(&leases, "").unwrap();
    std::fs::write(
        &conf,
        format!(
            "start 10.91.0.50\nend 10.91.0.60\ninterface cli\nlease_file {}\npidfile {}\n",
            leases.display(),
            files.path().join("pid").display()
        ),
    )
    .unwrap();
    let mut other = Command::new("ip")
        .args(["netns", "exec", &net.client, "busybox", "udhcpd", "-f"])
        .arg(&conf)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        net.inside(|| {
            let error =
                BootService::start(&config(files.path(), Dhcp::Auto), everyone(), tickets()).err().unwrap();
            let refusal = error.downcast_ref::<OtherDhcpServer>().unwrap_or_else(|| panic!("{error:#}"));
            assert_eq!(refusal.server, Ipv4Addr::new(10, 91, 0, 2));
            let service =
                BootService::start(&config(files.path(), Dhcp::Proxy), everyone(), tickets()).unwrap();
            // Proxy-DHCP hands out no address: a plain client gets nothing from us, only the other server's lease.
            let ask = format!("ip netns exec {} curl -sS http://10.91.0.1:8067/boot.ipxe", net.client);
            assert!(sh(&ask).starts_with("#!ipxe"));
            drop(service);
        });
    }));
    other.kill().unwrap();
    other.wait().unwrap();
    result.unwrap();
}

#[test]
fn addresses_that_are_held_are_not_given_away() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    // A neighbour holds one of the two addresses of the range, and answers no ping; a second card is the node.
    sh(&format!(
        "ip -n {c} addr add 10.91.0.50/24 dev cli
         ip netns exec {c} sh -c 'echo 1 > /proc/sys/net/ipv4/icmp_echo_ignore_all'
         ip -n {c} link add link cli name node address 52:54:00:00:00:02 type macvlan mode bridge
         ip -n {c} link set node up",
        c = net.client
    ));
    let range = "10.91.0.50-10.91.0.51".parse().unwrap();
    let script = files.path().join("lease");
    std::fs::write(&script, "#!/bin/sh\n[ $1 = bound ] && echo $ip || true\n").unwrap();
    sh(&format!("chmod +x {}", script.display()));
    let nodes =
        Nodes::parse("52:54:00:00:00:07 other\n52:54:00:00:00:02 this\n", Pattern::default()).unwrap();
    net.inside(|| {
        let ask = format!("busybox udhcpc -i node -n -q -f -t 5 -s {}", script.display());
        let service = BootService::start(&config(files.path(), range), everyone(), tickets()).unwrap();
        assert_eq!(net.client(&ask).trim(), "10.91.0.51");
        drop(service);
        // dnsmasq told the kernel where the address is; a new service would leave it there.
        sh(&format!("ip -n {} neigh flush dev srv", net.server));
        // Nodes of the nodes file have their addresses: the only free one is the first node's, the second gets none.
        let states = Arc::new(NodeStates::new(nodes, Policy::ListedOnly));
        let service = BootService::start(&config(files.path(), range), states, tickets()).unwrap();
        let ask = format!("ip netns exec {} {ask} -t 2 -T 1", net.client);
        assert!(run(Command::new("sh").args(["-ec", &ask]), LIMIT).is_err());
        drop(service);
    });
}

/// Asks for an address for the card 52:54:00:91:01:`last` and returns the one that is offered.
fn offered(last: u8) -> Ipv4Addr {
    let socket = ka_sys::net::udp_on("cli", SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut packet = vec![0; 236];
    packet[..8].copy_from_slice(&[1, 1, 6, 0, 7, 7, 7, last]);
    packet[10] = 0x80;
    packet[28..34].copy_from_slice(&[0x52, 0x54, 0, 0x91, 1, last]);
    packet.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    packet.resize(300, 0);
    for _ in 0..10 {
        socket.send_to(&packet, (Ipv4Addr::BROADCAST, 67)).unwrap();
        let mut answer = [0; 1500];
        if let Ok(length) = socket.recv(&mut answer)
            && length > 240
            && answer[4..8] == [7, 7, 7, last]
        {
            return Ipv4Addr::new(answer[16], answer[17], answer[18], answer[19]);
        }
    }
    panic!("no offer");
}

#[test]
fn an_address_that_was_offered_is_offered_to_nobody_else() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    net.inside(|| {
        let range = "10.91.0.100-10.91.0.103".parse().unwrap();
        let service = BootService::start(&config(files.path(), range), everyone(), tickets()).unwrap();
        // dnsmasq' hash is the same for these three. None of them asks for what it is offered, as UEFI does for seconds.
        let all: std::collections::BTreeSet<Ipv4Addr> = [0, 4, 8]
            .map(|last| {
                let address = Net::inside_of(&net.client, || offered(last));
                std::thread::sleep(Duration::from_millis(500));
                address
            })
            .into();
        assert_eq!(all.len(), 3, "{all:?}");
        drop(service);
    });
}

#[test]
fn two_services_side_by_side() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    sh(&format!(
        "ip -n {s} link add br9 type bridge; ip -n {s} addr add 10.92.0.1/24 dev br9; ip -n {s} link set br9 up",
        s = net.server
    ));
    net.inside(|| {
        let first = BootService::start(&config(files.path(), Dhcp::Auto), everyone(), tickets()).unwrap();
        let config = BootConfig { interface: "br9".into(), ..config(files.path(), Dhcp::Auto) };
        let second = BootService::start(&config, everyone(), tickets()).unwrap();
        assert_ne!(first.http(), second.http());
        // A second one on the same interface finds the port taken.
        let error = format!("{:#}", BootService::start(&config, everyone(), tickets()).err().unwrap());
        assert!(
            error.contains("binding the HTTP server to 10.92.0.1:8067: Address already in use")
                || error.contains("DHCP server"),
            "{error}"
        );
    });
}

#[test]
fn dnsmasq_that_is_killed_is_reported_and_none_is_left_behind() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    net.inside(|| {
        let mut service =
            BootService::start(&config(files.path(), Dhcp::Off), everyone(), tickets()).unwrap();
        let events = service.events().unwrap();
        let pid = rustix::process::Pid::from_raw(i32::try_from(service.dnsmasq_pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let seen = events_until(&events, |event| matches!(event, BootEvent::DnsmasqExited { .. }));
        let Some(BootEvent::DnsmasqExited { cause }) = seen.last() else { unreachable!() };
        assert!(cause.contains("signal: 9"), "{cause}");
    });
}

/// Where the process that is to be killed finds its boot files.
const KILLED: &str = "KA_TEST_BOOT_FILES";

#[test]
#[ignore = "runs in the process that dnsmasq_dies_with_a_server_that_is_killed starts and kills"]
fn service_that_is_killed() {
    let Some(files) = std::env::var_os(KILLED) else { return };
    let range = "10.91.0.100-10.91.0.103".parse().unwrap();
    let service = BootService::start(&config(Path::new(&files), range), everyone(), tickets()).unwrap();
    println!("dnsmasq={}", service.dnsmasq_pid());
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn dnsmasq_dies_with_a_server_that_is_killed() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    let mut server = net.inside(|| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "service_that_is_killed", "--ignored", "--nocapture"])
            .env(KILLED, files.path())
            // What it leaves behind goes with the boot files.
            .env("TMPDIR", files.path())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    });
    let lines = std::io::BufRead::lines(std::io::BufReader::new(server.stdout.take().unwrap()));
    let pid = lines
        .map_while(Result::ok)
        .find_map(|line| line.split_once("dnsmasq=").map(|(_, pid)| pid.to_owned()));
    server.kill().unwrap();
    server.wait().unwrap();
    let process = format!("/proc/{}", pid.expect("the service says which process dnsmasq is"));
    let deadline = Instant::now() + Duration::from_secs(5);
    while Path::new(&process).exists() {
        assert!(Instant::now() < deadline, "dnsmasq outlives the server");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn slow_and_greedy_clients_disturb_nobody() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    net.inside(|| {
        let service = BootService::start(&config(files.path(), Dhcp::Off), everyone(), tickets()).unwrap();
        let address = SocketAddrV4::new(Ipv4Addr::new(10, 91, 0, 1), service.http().port());
        // Forty connections from one address that say nothing: sixteen may stay.
        let greedy: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
        let closed = greedy
            .iter()
            .filter(|stream| {
                let mut stream: &TcpStream = stream;
                stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
                matches!(stream.read(&mut [0]), Ok(0))
                    || matches!(stream.read(&mut [0]), Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset)
            })
            .count();
        assert_eq!(closed, 24);
        // Another address is served at once.
        net.give_client_an_address();
        let start = Instant::now();
        assert_eq!(net.client("curl -sS http://10.91.0.1:8067/vmlinuz"), "this is vmlinuz");
        assert!(start.elapsed() < Duration::from_secs(3));
        // Rubbish gets an answer or a closed connection, and the service lives on.
        drop(greedy);
        std::thread::sleep(Duration::from_millis(300));
        for rubbish in [&b"\0\xff\0\xff\r\n\r\n"[..], b"GET", b"GET / HTTP/9.9\r\n\r\n", &[b'A'; 100_000]] {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            // It may be closed before it has taken everything.
            let _ = stream.write_all(rubbish);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        assert_eq!(net.client("curl -sS http://10.91.0.1:8067/vmlinuz"), "this is vmlinuz");
    });
}

#[test]
fn what_is_missing_is_said() {
    if !tools_are_there() {
        return;
    }
    let files = tempfile::tempdir().unwrap();
    boot_files(files.path());
    let net = Net::new();
    net.inside(|| {
        let start = |change: &dyn Fn(&mut BootConfig)| {
            let mut config = config(files.path(), Dhcp::Off);
            change(&mut config);
            format!("{:#}", BootService::start(&config, everyone(), tickets()).err().unwrap())
        };
        let error = start(&|c| c.interface = "eth7".into());
        assert_eq!(error, "there is no interface eth7 (there are: lo, srv)");
        let error = start(&|c| c.boot_dir = "/no/such".into());
        assert!(
            error.contains("/no/such has no vmlinuz, initrd.img") && error.contains("ka-image build"),
            "{error}"
        );
        let error = start(&|c| c.append = "a\nb".into());
        assert!(error.contains("not printable"), "{error}");
        let error = start(&|c| c.dhcp = "10.0.0.1-10.0.0.9".parse().unwrap());
        assert!(error.contains("is not within 10.91.0.1/24"), "{error}");
        let error = start(&|c| c.server = Some("10.91.0.1".into()));
        assert!(error.starts_with("resolving 10.91.0.1 (HOST:PORT)"), "{error}");
        sh(&format!("ip -n {} addr del 10.91.0.1/24 dev srv", net.server));
        let error = start(&|_| {});
        assert!(error.starts_with("srv has no IPv4 address"), "{error}");
    });
}
