//! The configuration of the dnsmasq that serves the install network: DHCP or proxy-DHCP, and TFTP. Nothing of the
//! machine's own dnsmasq is read or touched, so several can run side by side, each on its interface.
//!
//! Who asks is told apart by what it says: iPXE sends option 175, a PXE ROM its architecture in option 93 (0 is a BIOS,
//! 7 and 9 are x86-64 UEFI), UEFI's HTTP boot architecture 16. iPXE gets the address of the first script, the others
//! get an iPXE of their kind; so the chain of iPXE starting iPXE ends after one step.

use super::dhcp::Plan;
use crate::nodes::Mac;
use ka_sys::ifaddr::Ipv4Net;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// What the configuration is made from.
#[derive(Debug, Clone)]
pub struct Settings<'a> {
    /// The interface that is served.
    pub interface: &'a str,
    /// Our address on it.
    pub net: Ipv4Net,
    /// What is done about DHCP.
    pub plan: Plan,
    /// The router that full DHCP tells the nodes; none by default, as the nodes need none and we do not route.
    pub router: Option<Ipv4Addr>,
    /// Which card gets which address with full DHCP.
    pub reserved: &'a [(Mac, Ipv4Addr)],
    /// The port of the HTTP server on our address.
    pub http_port: u16,
    /// The directory with the files for TFTP and nothing else.
    pub tftp_root: &'a Path,
    /// The directory that dnsmasq watches for further reservations.
    pub pins: &'a Path,
    /// The directory for leases.
    pub state: &'a Path,
}

/// The text of dnsmasq's configuration file.
#[must_use]
pub fn configuration(settings: &Settings) -> String {
    let Settings { interface, net, plan, http_port, .. } = settings;
    let script = format!("http://{}:{http_port}/boot.ipxe", net.address);
    // Without group=root dnsmasq changes its group, and a process that does is no longer killed when its parent dies.
    let mut text = format!(
        "# Written by ka-server for the install network on {interface}; gone when it ends.\n\
         port=0\n\
         user=root\n\
         group=root\n\
         interface={interface}\n\
         bind-interfaces\n\
         except-interface=lo\n\
         pid-file=\n\
         log-facility=-\n\
         log-dhcp\n\
         no-resolv\n\
         no-hosts\n\
         enable-tftp={interface}\n\
         tftp-root={}\n\
         tftp-max=256\n",
        settings.tftp_root.display()
    );
    // Writing to a String cannot fail.
    match plan {
        Plan::Off => {}
        Plan::Full(first, last) => {
            let _ = write!(
                text,
                "dhcp-leasefile={}\n\
                 dhcp-authoritative\n\
                 no-ping\n\
                 dhcp-hostsdir={}\n\
                 dhcp-range={first},{last},{},1h\n\
                 {}\n\
                 dhcp-option=option:dns-server\n\
                 dhcp-match=set:ipxe,175\n\
                 dhcp-match=set:bios,option:client-arch,0\n\
                 dhcp-match=set:efi64,option:client-arch,7\n\
                 dhcp-match=set:efi64,option:client-arch,9\n\
                 dhcp-match=set:http64,option:client-arch,16\n\
                 dhcp-option=tag:ipxe,encap:175,176,1b\n\
                 dhcp-boot=tag:ipxe,{script}\n\
                 dhcp-boot=tag:!ipxe,tag:bios,undionly.kpxe\n\
                 dhcp-boot=tag:!ipxe,tag:efi64,snponly.efi\n\
                 dhcp-option-force=tag:!ipxe,tag:http64,60,HTTPClient\n\
                 dhcp-boot=tag:!ipxe,tag:http64,http://{}:{http_port}/snponly.efi\n",
                settings.state.join("leases").display(),
                settings.pins.display(),
                net.netmask(),
                match settings.router {
                    Some(router) => format!("dhcp-option=option:router,{router}"),
                    None => "dhcp-option=option:router".to_owned(),
                },
                net.address
            );
            for (mac, address) in settings.reserved {
                let _ = writeln!(text, "dhcp-host={mac},{address}");
            }
        }
        Plan::Proxy => {
            // A dhcp-boot line would do for UEFI, but the BIOS iPXE asks the boot server port, which only pxe-service
            // answers.
            let _ = write!(
                text,
                "dhcp-leasefile={}\n\
                 dhcp-range={},proxy,{}\n\
                 dhcp-match=set:ipxe,175\n",
                settings.state.join("leases").display(),
                net.network(),
                net.netmask()
            );
            for (tag, files) in [("!ipxe", ["undionly.kpxe", "snponly.efi"]), ("ipxe", [script.as_str(); 2])]
            {
                for (csa, file) in [("x86PC", files[0]), ("X86-64_EFI", files[1]), ("BC_EFI", files[1])] {
                    let _ = writeln!(text, "pxe-service=tag:{tag},{csa},\"Ka\",{file}");
                }
            }
        }
    }
    text
}

/// Finds the dnsmasq program: in `PATH`, else in the directories of system programs, which an ordinary user's `PATH`
/// leaves out.
///
/// # Errors
/// When it is not installed: what to do about it.
pub fn find() -> Result<PathBuf, String> {
    find_in(&std::env::var_os("PATH").unwrap_or_default())
}

fn find_in(path: &std::ffi::OsStr) -> Result<PathBuf, String> {
    use std::os::unix::fs::PermissionsExt;
    let system = ["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(path)
        .filter(|directory| directory.is_absolute())
        .chain(system)
        .map(|directory| directory.join("dnsmasq"))
        .find(|file| file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
        .ok_or_else(|| {
            "dnsmasq is not installed: install Debian's package dnsmasq-base (dnsmasq elsewhere)".to_owned()
        })
}

/// Whether `name` can be an interface and stand in a configuration file as it is.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'@'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(plan: Plan) -> Settings<'static> {
        Settings {
            interface: "br0",
            net: Ipv4Net { address: Ipv4Addr::new(10, 91, 0, 1), prefix: 24 },
            plan,
            router: None,
            reserved: &[],
            http_port: 8067,
            tftp_root: Path::new("/run/ka/tftp"),
            pins: Path::new("/run/ka/pins"),
            state: Path::new("/run/ka"),
        }
    }

    const COMMON: &str = "\
# Written by ka-server for the install network on br0; gone when it ends.
port=0
user=root
group=root
interface=br0
bind-interfaces
except-interface=lo
pid-file=
log-facility=-
log-dhcp
no-resolv
no-hosts
enable-tftp=br0
tftp-root=/run/ka/tftp
tftp-max=256
";

    #[test]
    fn full_dhcp() {
        let range = Plan::Full(Ipv4Addr::new(10, 91, 0, 50), Ipv4Addr::new(10, 91, 0, 200));
        let expected = "\
dhcp-leasefile=/run/ka/leases
dhcp-authoritative
no-ping
dhcp-hostsdir=/run/ka/pins
dhcp-range=10.91.0.50,10.91.0.200,255.255.255.0,1h
dhcp-option=option:router
dhcp-option=option:dns-server
dhcp-match=set:ipxe,175
dhcp-match=set:bios,option:client-arch,0
dhcp-match=set:efi64,option:client-arch,7
dhcp-match=set:efi64,option:client-arch,9
dhcp-match=set:http64,option:client-arch,16
dhcp-option=tag:ipxe,encap:175,176,1b
dhcp-boot=tag:ipxe,http://10.91.0.1:8067/boot.ipxe
dhcp-boot=tag:!ipxe,tag:bios,undionly.kpxe
dhcp-boot=tag:!ipxe,tag:efi64,snponly.efi
dhcp-option-force=tag:!ipxe,tag:http64,60,HTTPClient
dhcp-boot=tag:!ipxe,tag:http64,http://10.91.0.1:8067/snponly.efi
";
        assert_eq!(configuration(&settings(range)), format!("{COMMON}{expected}"));
        let reserved = [("52:54:00:00:00:01".parse().unwrap(), Ipv4Addr::new(10, 91, 0, 50))];
        let reserving = Settings { reserved: &reserved, ..settings(range) };
        assert!(configuration(&reserving).ends_with("\ndhcp-host=52:54:00:00:00:01,10.91.0.50\n"));
        let routed = Settings { router: Some(Ipv4Addr::new(10, 91, 0, 254)), ..settings(range) };
        assert!(configuration(&routed).contains("\ndhcp-option=option:router,10.91.0.254\n"));
    }

    #[test]
    fn proxy_dhcp() {
        let expected = "\
dhcp-leasefile=/run/ka/leases
dhcp-range=10.91.0.0,proxy,255.255.255.0
dhcp-match=set:ipxe,175
pxe-service=tag:!ipxe,x86PC,\"Ka\",undionly.kpxe
pxe-service=tag:!ipxe,X86-64_EFI,\"Ka\",snponly.efi
pxe-service=tag:!ipxe,BC_EFI,\"Ka\",snponly.efi
pxe-service=tag:ipxe,x86PC,\"Ka\",http://10.91.0.1:8067/boot.ipxe
pxe-service=tag:ipxe,X86-64_EFI,\"Ka\",http://10.91.0.1:8067/boot.ipxe
pxe-service=tag:ipxe,BC_EFI,\"Ka\",http://10.91.0.1:8067/boot.ipxe
";
        assert_eq!(configuration(&settings(Plan::Proxy)), format!("{COMMON}{expected}"));
    }

    #[test]
    fn no_dhcp() {
        assert_eq!(configuration(&settings(Plan::Off)), COMMON);
    }

    #[test]
    fn dnsmasq_takes_every_configuration() {
        let Ok(program) = find() else {
            println!("SKIPPED: dnsmasq is not installed");
            return;
        };
        let directory = tempfile::tempdir().unwrap();
        let tftp = directory.path();
        for plan in
            [Plan::Off, Plan::Proxy, Plan::Full(Ipv4Addr::new(10, 91, 0, 50), Ipv4Addr::new(10, 91, 0, 200))]
        {
            let path = directory.path().join("conf");
            let text =
                configuration(&Settings { tftp_root: tftp, pins: tftp, state: tftp, ..settings(plan) });
            std::fs::write(&path, text).unwrap();
            let mut command = std::process::Command::new(&program);
            command.arg("--test").arg(format!("--conf-file={}", path.display()));
            ka_sys::process::run(&mut command, std::time::Duration::from_secs(10)).unwrap();
        }
    }

    #[test]
    fn a_missing_dnsmasq_names_the_package() {
        // Only the system directories can still have it.
        match find_in(std::ffi::OsStr::new("/no/such:relative")) {
            Ok(path) => assert!(path.is_absolute() && path.is_file()),
            Err(text) => assert!(text.contains("dnsmasq-base"), "{text}"),
        }
    }

    #[test]
    fn interface_names_are_checked() {
        for name in ["eth0", "br-lan", "enp3s0f1.100", "a@b"] {
            assert!(is_interface_name(name), "{name}");
        }
        for name in ["", ".", "..", "a b", "a\nb", "a,b", "a/b", "sixteen-letters!", "0123456789abcdef"] {
            assert!(!is_interface_name(name), "{name:?}");
        }
    }
}
