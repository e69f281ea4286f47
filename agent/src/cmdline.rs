//! The kernel command line: one table of the keys that the agent knows, read into typed [`Options`]. A key that begins
//! with `ka.` and is not in the table, or a value that makes no sense, is kept as an error for the log: the boot goes on,
//! but never silently.

use crate::init::mac::Mac;
use ka_chain::keys::{PublicKey, Token};
use log::LevelFilter;
use std::net::Ipv4Addr;
use std::time::Duration;

/// The steps of an installation, in order, as `ka.break=` names them.
pub const STEPS: [&str; 10] = [
    "boot",
    "network",
    "register",
    "disk",
    "format",
    "ready",
    "receive",
    "configure",
    "bootloader",
    "finish",
];

/// What the kernel command line orders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// `ka.server=HOST:PORT`: where the server listens.
    pub server: Option<String>,
    /// `ka.key=PUBKEY`: the key of the server that is trusted.
    pub key: Option<PublicKey>,
    /// `ka.token=TOKEN`: what lets this node in.
    pub token: Option<Token>,
    /// `ka.ip=ADDR/PREFIX[,GATEWAY][,IFACE-or-MAC]`: no DHCP.
    pub ip: Option<StaticIp>,
    /// `ka.on-failure=shell|reboot|poweroff|wait`.
    pub on_failure: OnFailure,
    /// `ka.on-success=reboot|poweroff|halt`.
    pub on_success: OnSuccess,
    /// `ka.break=STEP`: a shell before that step.
    pub break_at: Option<&'static str>,
    /// `ka.dry-run`: plan, show, write nothing.
    pub dry_run: bool,
    /// `ka.log=error|warn|info|debug|trace`.
    pub log: LevelFilter,
    /// `ka.pause=TIME`: how long a failure stands on the screen before the machine reboots or powers off.
    pub pause: Duration,
    /// `ka.device-wait=TIME`: how long to wait for disks and network interfaces to appear.
    pub device_wait: Duration,
    /// `BOOTIF=01-aa-bb-cc-dd-ee-ff`: the interface that the firmware booted from.
    pub bootif: Option<Mac>,
    /// The devices of `console=`, without their options, in order; the kernel's `/dev/console` is the last.
    pub consoles: Vec<String>,
    /// What was wrong, for the log.
    pub errors: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            server: None,
            key: None,
            token: None,
            ip: None,
            on_failure: OnFailure::Shell,
            on_success: OnSuccess::Reboot,
            break_at: None,
            dry_run: false,
            log: LevelFilter::Info,
            pause: Duration::from_secs(10),
            device_wait: Duration::from_secs(30),
            bootif: None,
            consoles: Vec::new(),
            errors: Vec::new(),
        }
    }
}

/// What happens after a failed installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFailure {
    /// A shell on the console; the machine reboots when it is left.
    Shell,
    /// Reboot after a pause.
    Reboot,
    /// Power off after a pause.
    PowerOff,
    /// Wait for ctrl-alt-del.
    Wait,
}

/// What happens after a good installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSuccess {
    /// Reboot at once.
    Reboot,
    /// Power off.
    PowerOff,
    /// Halt with the power on.
    Halt,
}

/// An address given by hand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticIp {
    /// The node's address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix, 1 to 32.
    pub prefix: u8,
    /// The default gateway.
    pub gateway: Option<Ipv4Addr>,
    /// The interface; else that of `BOOTIF`, else the first with a carrier.
    pub link: Option<LinkId>,
}

/// How an interface is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkId {
    /// By the kernel's name.
    Name(String),
    /// By its Ethernet address.
    Mac(Mac),
}

type Setter = fn(&mut Options, &str) -> Result<(), String>;

/// Every key that the agent knows. A key that is given twice counts by its last value, as with the kernel; `console=`
/// collects. `_` and `-` mean the same in `ka.` keys, as with the kernel.
const KEYS: &[(&str, Setter)] = &[
    ("ka.server", |o, v| parse_server(v).map(|s| o.server = Some(s))),
    ("ka.key", |o, v| v.parse().map(|k| o.key = Some(k)).map_err(|e| format!("{e}"))),
    // The error does not show the word.
    ("ka.token", |o, v| v.parse().map(|t| o.token = Some(t)).map_err(|e| format!("{e}"))),
    ("ka.ip", |o, v| parse_static_ip(v).map(|ip| o.ip = Some(ip))),
    ("ka.on-failure", |o, v| {
        o.on_failure = choose(
            v,
            &[
                ("shell", OnFailure::Shell),
                ("reboot", OnFailure::Reboot),
                ("poweroff", OnFailure::PowerOff),
                ("wait", OnFailure::Wait),
            ],
        )?;
        Ok(())
    }),
    ("ka.on-success", |o, v| {
        o.on_success = choose(
            v,
            &[("reboot", OnSuccess::Reboot), ("poweroff", OnSuccess::PowerOff), ("halt", OnSuccess::Halt)],
        )?;
        Ok(())
    }),
    ("ka.break", |o, v| choose(v, &STEPS.map(|s| (s, s))).map(|s| o.break_at = Some(s))),
    ("ka.dry-run", |o, v| {
        o.dry_run = choose(v, &[("", true), ("1", true), ("yes", true), ("0", false), ("no", false)])
            .map_err(|e| {
                // A word that is not understood must not turn a rehearsal into a real installation.
                o.dry_run = true;
                format!("{e}; taken as yes")
            })?;
        Ok(())
    }),
    ("ka.log", |o, v| v.parse().map(|l| o.log = l).map_err(|_| format!("`{v}` is not a log level"))),
    ("ka.pause", |o, v| ka_cli::units::parse_time(v).map(|t| o.pause = t).map_err(|e| e.to_string())),
    ("ka.device-wait", |o, v| {
        ka_cli::units::parse_time(v).map(|t| o.device_wait = t).map_err(|e| e.to_string())
    }),
    ("BOOTIF", |o, v| Mac::from_bootif(v).map(|m| o.bootif = Some(m))),
    ("console", |o, v| {
        let device = v.split(',').next().unwrap_or_default().trim_start_matches("/dev/");
        if !device.is_empty() && !device.contains('/') {
            o.consoles.push(device.to_owned());
        }
        Ok(())
    }),
];

impl Options {
    /// Reads a kernel command line.
    #[must_use]
    pub fn from_text(text: &str) -> Self {
        let mut options = Self::default();
        for (key, value) in words(text) {
            let ours = key.starts_with("ka.");
            let name = if ours { key.replace('_', "-") } else { key.clone() };
            match KEYS.iter().find(|(known, _)| *known == name) {
                Some((_, set)) => {
                    if let Err(cause) = set(&mut options, value.as_deref().unwrap_or_default()) {
                        options.errors.push(format!("kernel command line: {key}: {cause}"));
                    }
                }
                None if ours => options.errors.push(format!("kernel command line: {key}: no such key")),
                None => {}
            }
        }
        options
    }

    /// Reads the running kernel's command line; when that cannot be read, the defaults with the error noted.
    #[must_use]
    pub fn from_proc() -> Self {
        match std::fs::read("/proc/cmdline") {
            Ok(bytes) => Self::from_text(&String::from_utf8_lossy(&bytes)),
            Err(e) => Self {
                errors: vec![format!("reading /proc/cmdline: {e}; using defaults")],
                ..Self::default()
            },
        }
    }
}

/// Splits a command line as the kernel does: at white space outside double quotes; quotes around the whole word or
/// around the value are taken off, others stay.
pub(crate) fn words(text: &str) -> Vec<(String, Option<String>)> {
    let mut found = Vec::new();
    let mut rest = text.trim_matches(is_space);
    while !rest.is_empty() {
        let mut quoted = false;
        let end = rest
            .find(|c| {
                quoted ^= c == '"';
                !quoted && is_space(c)
            })
            .unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        rest = tail.trim_start_matches(is_space);
        let word = match word.strip_prefix('"') {
            Some(inner) => inner.strip_suffix('"').unwrap_or(inner),
            None => word,
        };
        found.push(match word.split_once('=') {
            None => (word.to_owned(), None),
            Some((key, value)) => {
                let value = match value.strip_prefix('"') {
                    Some(inner) => inner.strip_suffix('"').unwrap_or(inner),
                    None => value,
                };
                (key.to_owned(), Some(value.to_owned()))
            }
        });
    }
    found
}

fn is_space(c: char) -> bool {
    c.is_ascii_whitespace() || c == '\u{b}' || c == '\0'
}

fn choose<T: Copy>(value: &str, choices: &[(&str, T)]) -> Result<T, String> {
    choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).filter(|n| !n.is_empty()).collect();
        format!("`{value}` is none of {}", names.join(", "))
    })
}

fn parse_server(value: &str) -> Result<String, String> {
    let wrong = || format!("`{value}` is not HOST:PORT (example: 10.0.0.1:7400)");
    let (host, port) = value.rsplit_once(':').ok_or_else(wrong)?;
    let bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty() || (host.contains(':') && !bracketed) || host.contains(is_space) {
        return Err(wrong());
    }
    port.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(wrong)?;
    Ok(value.to_owned())
}

fn parse_static_ip(value: &str) -> Result<StaticIp, String> {
    let wrong = || {
        format!("`{value}` is not ADDR/PREFIX[,GATEWAY][,IFACE-or-MAC] (example: 10.0.0.7/24,10.0.0.1,eth0)")
    };
    let mut parts = value.split(',');
    let (address, prefix) = parts.next().and_then(|p| p.split_once('/')).ok_or_else(wrong)?;
    let mut ip = StaticIp {
        address: address.parse().map_err(|_| wrong())?,
        prefix: prefix.parse().ok().filter(|p| (1..=32).contains(p)).ok_or_else(wrong)?,
        gateway: None,
        link: None,
    };
    if ip.address.is_unspecified() || ip.address.is_multicast() || ip.address.is_broadcast() {
        return Err(format!("{} cannot be a node's address", ip.address));
    }
    let mut rest: Vec<&str> = parts.collect();
    if let Some(first) = rest.first() {
        // An empty place is an absent gateway: `10.0.0.7/24,,eth0`.
        if let Ok(gateway) = first.parse() {
            ip.gateway = Some(gateway);
            rest.remove(0);
        } else if first.is_empty() {
            rest.remove(0);
        }
    }
    match rest[..] {
        [] => {}
        [name] if name.parse::<Mac>().is_ok() => ip.link = Some(LinkId::Mac(name.parse()?)),
        [name] if is_interface_name(name) => ip.link = Some(LinkId::Name(name.to_owned())),
        _ => return Err(wrong()),
    }
    Ok(ip)
}

/// What the kernel accepts as an interface's name, without the dots-and-digits that would be a mistyped address.
fn is_interface_name(name: &str) -> bool {
    (1..16).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_key_is_read() {
        let o = Options::from_text(
            "BOOT_IMAGE=/vmlinuz quiet ka.server=10.0.0.1:7400 \
             ka.key=0101010101010101010101010101010101010101010101010101010101010101 \
             ka.token=abababababababababababababababababababababababababababababababab ka.ip=10.0.0.7/24,10.0.0.1,eth0 ka.on_failure=wait \
             ka.on-success=halt ka.break=disk ka.dry-run ka.log=debug ka.pause=3s ka.device-wait=1m \
             BOOTIF=01-52-54-00-12-34-56 console=tty0 console=ttyS0,115200n8\n",
        );
        let expected = Options {
            server: Some("10.0.0.1:7400".into()),
            key: Some("01".repeat(32).parse().unwrap()),
            token: Some("ab".repeat(32).parse().unwrap()),
            ip: Some(StaticIp {
                address: Ipv4Addr::new(10, 0, 0, 7),
                prefix: 24,
                gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
                link: Some(LinkId::Name("eth0".into())),
            }),
            on_failure: OnFailure::Wait,
            on_success: OnSuccess::Halt,
            break_at: Some("disk"),
            dry_run: true,
            log: LevelFilter::Debug,
            pause: Duration::from_secs(3),
            device_wait: Duration::from_secs(60),
            bootif: Some(Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56])),
            consoles: vec!["tty0".into(), "ttyS0".into()],
            errors: vec![],
        };
        assert_eq!(o, expected);
        assert!(!format!("{o:?}").contains("abab"), "{o:?}");
        let wrong = Options::from_text("ka.token=half-a-secret").errors;
        assert!(wrong[0].contains("ka.token") && !wrong[0].contains("secret"), "{wrong:?}");
    }

    #[test]
    fn unknown_keys_and_bad_values_are_errors_that_name_the_key() {
        let o = Options::from_text(
            "ka.sever=1.2.3.4:5 ka.on-failure=explode ka.ip=1.2.3 ka.break=lunch BOOTIF=zz ka.server=host other=1",
        );
        assert_eq!(o.errors.len(), 6, "{:?}", o.errors);
        for (error, key) in o.errors.iter().zip(["sever", "on-failure", "ip", "break", "BOOTIF", "server"]) {
            assert!(error.contains(key), "{error} should name {key}");
        }
        let unchanged = Options { errors: vec![], ..o };
        assert_eq!(unchanged, Options::default());
    }

    #[test]
    fn a_doubtful_dry_run_stays_a_dry_run() {
        assert!(Options::from_text("ka.dry-run=ture").dry_run);
        assert!(!Options::from_text("ka.dry-run=no").dry_run);
    }

    #[test]
    fn quotes_are_handled_as_the_kernel_does() {
        let pair = |k: &str, v: &str| (k.to_owned(), Some(v.to_owned()));
        assert_eq!(
            words(r#" a="b c" "d=e f"  g=h"i j"k "l" m= "#),
            [
                pair("a", "b c"),
                pair("d", "e f"),
                pair("g", "h\"i j\"k"),
                ("l".to_owned(), None),
                pair("m", "")
            ]
        );
        assert_eq!(words("a=\"never closed b"), [pair("a", "never closed b")]);
    }

    #[test]
    fn addresses_by_hand() {
        let link =
            |text: &str| Options::from_text(&format!("ka.ip={text}")).ip.map(|ip| (ip.gateway, ip.link));
        let gateway = Some(Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(link("10.0.0.7/24"), Some((None, None)));
        assert_eq!(link("10.0.0.7/24,10.0.0.1"), Some((gateway, None)));
        assert_eq!(link("10.0.0.7/24,,eth1"), Some((None, Some(LinkId::Name("eth1".into())))));
        assert_eq!(
            link("10.0.0.7/24,52:54:00:00:00:01"),
            Some((None, Some(LinkId::Mac(Mac([0x52, 0x54, 0, 0, 0, 1])))))
        );
        for bad in
            ["10.0.0.7", "10.0.0.7/0", "10.0.0.7/33", "0.0.0.0/8", "10.0.0.7/24,10.0.0.300", "1.2.3.4/8,a,b"]
        {
            assert_eq!(link(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = Options::from_text(&text);
        }

        #[test]
        fn values_pass_through_quotes(value in "[a-z =,.:/-]{0,30}", key in "[a-z.]{1,10}") {
            prop_assert_eq!(words(&format!("x {key}=\"{value}\" y"))[1].clone(), (key, Some(value)));
        }

        #[test]
        fn keys_near_ours_are_never_swallowed(key in "[a-z_-]{1,12}") {
            let known = KEYS.iter().any(|(k, _)| *k == format!("ka.{key}").replace('_', "-"));
            let o = Options::from_text(&format!("ka.{key}=\u{1}"));
            prop_assert!(known || !o.errors.is_empty());
        }
    }
}
