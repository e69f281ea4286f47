//! The iPXE scripts: the first one that every machine gets, and the node's own. They know nothing of the network but the
//! one address that they are given, they retry a bounded number of times, and they end in something that does no harm:
//! a restart for a node that is to be installed, the disk for one that is not.

use super::nodes::ScriptKind;
use super::query::Platform;
use crate::nodes::Mac;
use crate::trust::Pass;
use std::fmt::Write;
use std::net::SocketAddrV4;

/// How often a step is tried before the script gives up.
const TRIES: u32 = 6;
/// Seconds between two tries.
const PAUSE: u32 = 5;
/// Seconds between two questions of a node that waits for the operator.
const HOLD: u32 = 20;
/// The longest line of additional kernel arguments, in bytes (the kernel itself takes 2048 in all on x86, and ours need
/// 250).
const APPEND_LIMIT: usize = 1500;

/// What is the same in the scripts of all nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Where the HTTP server listens.
    pub http: SocketAddrV4,
    /// What `ka.server=` says: `HOST:PORT`.
    pub server: String,
    /// Further kernel arguments.
    pub append: String,
}

/// Checks additional kernel arguments: one line of printable ASCII with nothing that iPXE's shell would act upon.
///
/// # Errors
/// What is wrong, in words.
pub fn check_append(append: &str) -> Result<(), String> {
    if append.len() > APPEND_LIMIT {
        return Err(format!("the kernel arguments are longer than {APPEND_LIMIT} bytes"));
    }
    if let Some(c) = append.chars().find(|c| !matches!(c, ' '..='~')) {
        return Err(format!("the kernel arguments hold {c:?}, which is not printable ASCII"));
    }
    if append.contains("${") {
        return Err("the kernel arguments hold `${`, which iPXE would replace".to_owned());
    }
    match append.split(' ').find(|word| matches!(*word, "||" | "&&" | ";") || word.starts_with('#')) {
        Some(word) => Err(format!("the kernel arguments hold `{word}`, which iPXE would act upon")),
        None => Ok(()),
    }
}

/// The first script: asks for the node's own, naming the card that was really used. A machine that gets no answer goes
/// on to its next boot device.
#[must_use]
pub fn first(site: &Site) -> String {
    let http = site.http;
    format!(
        "#!ipxe\n\
         # Ka: ask what is to become of this machine. netX is the card that iPXE used last.\n\
         set ka-mac ${{netX/mac}}\n\
         isset ${{ka-mac}} || set ka-mac ${{net0/mac}}\n\
         set ka-try:int32 0\n\
         :ask\n\
         chain --replace http://{http}/node.ipxe?mac=${{ka-mac}}&platform=${{platform}}&uuid=${{uuid}}\
         &serial=${{serial:uristring}} ||\n\
         inc ka-try\n\
         iseq ${{ka-try}} {TRIES} && goto leave ||\n\
         echo Ka: no answer from {http}, asking again in {PAUSE} s (${{ka-try}}/{TRIES})\n\
         sleep {PAUSE}\n\
         goto ask\n\
         :leave\n\
         echo Ka: no answer from {http}, going on to the next boot device\n\
         exit 1\n"
    )
}

/// The node's own script. `title` says who it is and why it gets this script; it stands on the node's screen. `pass` is
/// needed to install; a node without one waits.
#[must_use]
pub fn node(
    site: &Site,
    kind: ScriptKind,
    pass: Option<&Pass>,
    platform: Platform,
    mac: Mac,
    title: &str,
) -> String {
    let mut script = String::from("#!ipxe\n");
    let title: String = title
        .chars()
        .map(|c| if matches!(c, ' '..='~') && !matches!(c, '$' | '|' | '&' | ';') { c } else { '?' })
        .collect();
    // Writing to a String cannot fail.
    let _ = writeln!(script, "echo Ka: {title}");
    script.push_str(&match (kind, pass) {
        (ScriptKind::Install, Some(pass)) => install(site, pass, mac),
        (ScriptKind::LocalBoot, _) => local_boot(site, platform),
        (ScriptKind::Hold, _) | (ScriptKind::Install, None) => hold(site, mac, platform),
    });
    script
}

/// What the kernel is told.
fn arguments(site: &Site, pass: &Pass, mac: Mac) -> String {
    let Site { server, append, .. } = site;
    let space = if append.is_empty() { "" } else { " " };
    let (bootif, key, token) = (mac.bootif(), pass.key, pass.token.to_word());
    format!(
        "initrd=initrd.img BOOTIF={bootif} ka.server={server} ka.key={key} ka.token={token}{space}{append}"
    )
}

fn install(site: &Site, pass: &Pass, mac: Mac) -> String {
    let http = site.http;
    let arguments = arguments(site, pass, mac);
    format!(
        "set ka-try:int32 0\n\
         :load\n\
         imgfree\n\
         kernel http://{http}/vmlinuz {arguments} || goto failed\n\
         initrd http://{http}/initrd.img || goto failed\n\
         boot || goto failed\n\
         :failed\n\
         inc ka-try\n\
         iseq ${{ka-try}} {TRIES} && goto restart ||\n\
         echo Ka: cannot start the installer (with Secure Boot on, firmware refuses an unsigned kernel)\n\
         echo Ka: trying again in {PAUSE} s (${{ka-try}}/{TRIES})\n\
         sleep {PAUSE}\n\
         goto load\n\
         :restart\n\
         echo Ka: giving up, this machine restarts\n\
         sleep {PAUSE}\n\
         reboot\n"
    )
}

fn local_boot(site: &Site, platform: Platform) -> String {
    match platform {
        Platform::Bios => "echo Ka: booting from the first disk\n\
             sanboot --no-describe --drive 0x80 ||\n\
             echo Ka: the first disk does not boot, going on to the next boot device\n\
             exit\n"
            .to_owned(),
        // iPXE cannot start a file of a local disk on UEFI; a small GRUB that looks for the disk's own loader can. Leaving
        // with success would end in the firmware's menu, leaving with an error goes on to the next boot device.
        Platform::Efi => format!(
            "echo Ka: booting from the disk\n\
             imgfree\n\
             chain http://{}/localboot.efi ||\n\
             echo Ka: no loader found on the disks, going on to the next boot device\n\
             exit 1\n",
            site.http
        ),
    }
}

fn hold(site: &Site, mac: Mac, platform: Platform) -> String {
    let Site { http, .. } = site;
    let platform_name = match platform {
        Platform::Bios => "pcbios",
        Platform::Efi => "efi",
    };
    let leave = local_boot(site, platform);
    format!(
        "set ka-try:int32 0\n\
         :hold\n\
         echo Ka: waiting for the operator, asking again in {HOLD} s\n\
         sleep {HOLD}\n\
         chain --replace http://{http}/node.ipxe?mac={mac}&platform={platform_name} ||\n\
         inc ka-try\n\
         iseq ${{ka-try}} {TRIES} || goto hold\n\
         echo Ka: no answer from {http}\n\
         {leave}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn site(append: &str) -> Site {
        Site {
            http: SocketAddrV4::new(Ipv4Addr::new(10, 91, 0, 1), 8067),
            server: "10.91.0.1:5757".into(),
            append: append.into(),
        }
    }

    fn pass() -> Pass {
        Pass { key: "11".repeat(32).parse().unwrap(), token: "2a".repeat(32).parse().unwrap() }
    }

    fn mac() -> Mac {
        "52:54:00:12:34:56".parse().unwrap()
    }

    #[test]
    fn the_first_script() {
        assert_eq!(
            first(&site("")),
            "#!ipxe\n\
             # Ka: ask what is to become of this machine. netX is the card that iPXE used last.\n\
             set ka-mac ${netX/mac}\n\
             isset ${ka-mac} || set ka-mac ${net0/mac}\n\
             set ka-try:int32 0\n\
             :ask\n\
             chain --replace http://10.91.0.1:8067/node.ipxe?mac=${ka-mac}&platform=${platform}&uuid=${uuid}&serial=${serial:uristring} ||\n\
             inc ka-try\n\
             iseq ${ka-try} 6 && goto leave ||\n\
             echo Ka: no answer from 10.91.0.1:8067, asking again in 5 s (${ka-try}/6)\n\
             sleep 5\n\
             goto ask\n\
             :leave\n\
             echo Ka: no answer from 10.91.0.1:8067, going on to the next boot device\n\
             exit 1\n"
        );
    }

    #[test]
    fn the_script_that_installs() {
        assert_eq!(
            node(
                &site("console=ttyS0 quiet"),
                ScriptKind::Install,
                Some(&pass()),
                Platform::Bios,
                mac(),
                "node1: it is to be installed"
            ),
            "#!ipxe\n\
             echo Ka: node1: it is to be installed\n\
             set ka-try:int32 0\n\
             :load\n\
             imgfree\n\
             kernel http://10.91.0.1:8067/vmlinuz initrd=initrd.img BOOTIF=01-52-54-00-12-34-56 ka.server=10.91.0.1:5757 \
             ka.key=1111111111111111111111111111111111111111111111111111111111111111 \
             ka.token=2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a console=ttyS0 quiet || goto failed\n\
             initrd http://10.91.0.1:8067/initrd.img || goto failed\n\
             boot || goto failed\n\
             :failed\n\
             inc ka-try\n\
             iseq ${ka-try} 6 && goto restart ||\n\
             echo Ka: cannot start the installer (with Secure Boot on, firmware refuses an unsigned kernel)\n\
             echo Ka: trying again in 5 s (${ka-try}/6)\n\
             sleep 5\n\
             goto load\n\
             :restart\n\
             echo Ka: giving up, this machine restarts\n\
             sleep 5\n\
             reboot\n"
        );
        let plain = node(&site(""), ScriptKind::Install, Some(&pass()), Platform::Efi, mac(), "x");
        assert!(plain.contains("2a2a || goto failed"), "{plain}");
        let without = node(&site(""), ScriptKind::Install, None, Platform::Efi, mac(), "x");
        assert_eq!(without, node(&site(""), ScriptKind::Hold, None, Platform::Efi, mac(), "x"));
    }

    #[test]
    fn the_longest_arguments_fit_the_kernel_s_command_line() {
        let longest = Site { server: "255.255.255.255:65535".into(), ..site(&"a".repeat(APPEND_LIMIT)) };
        let arguments = arguments(&longest, &pass(), mac());
        // The kernel's limit on x86 is 2048 with the closing zero; the firmware's loader adds little.
        assert!(arguments.len() < 1800, "{}", arguments.len());
    }

    #[test]
    fn the_scripts_that_boot_the_disk() {
        assert_eq!(
            node(&site(""), ScriptKind::LocalBoot, None, Platform::Bios, mac(), "node1: it is installed"),
            "#!ipxe\n\
             echo Ka: node1: it is installed\n\
             echo Ka: booting from the first disk\n\
             sanboot --no-describe --drive 0x80 ||\n\
             echo Ka: the first disk does not boot, going on to the next boot device\n\
             exit\n"
        );
        assert_eq!(
            node(&site(""), ScriptKind::LocalBoot, None, Platform::Efi, mac(), "node1: it is installed"),
            "#!ipxe\n\
             echo Ka: node1: it is installed\n\
             echo Ka: booting from the disk\n\
             imgfree\n\
             chain http://10.91.0.1:8067/localboot.efi ||\n\
             echo Ka: no loader found on the disks, going on to the next boot device\n\
             exit 1\n"
        );
    }

    #[test]
    fn the_script_that_waits() {
        assert_eq!(
            node(&site(""), ScriptKind::Hold, None, Platform::Bios, mac(), "node1: its installation failed"),
            "#!ipxe\n\
             echo Ka: node1: its installation failed\n\
             set ka-try:int32 0\n\
             :hold\n\
             echo Ka: waiting for the operator, asking again in 20 s\n\
             sleep 20\n\
             chain --replace http://10.91.0.1:8067/node.ipxe?mac=52:54:00:12:34:56&platform=pcbios ||\n\
             inc ka-try\n\
             iseq ${ka-try} 6 || goto hold\n\
             echo Ka: no answer from 10.91.0.1:8067\n\
             echo Ka: booting from the first disk\n\
             sanboot --no-describe --drive 0x80 ||\n\
             echo Ka: the first disk does not boot, going on to the next boot device\n\
             exit\n"
        );
    }

    #[test]
    fn kernel_arguments_that_ipxe_would_act_upon_are_refused() {
        for good in ["", "console=ttyS0,115200 ka.log=debug", "a=b;c x=$y x=#1"] {
            assert_eq!(check_append(good), Ok(()), "{good}");
        }
        for bad in ["a\nb", "a\tb", "x=${mac}", "a || b", "a && b", "a ; b", "#a", "é", &"a".repeat(1501)] {
            assert!(check_append(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_title_adds_a_line_or_a_command(title in ".{0,60}") {
            let script = node(&site(""), ScriptKind::Install, Some(&pass()), Platform::Bios, mac(), &title);
            prop_assert_eq!(script.lines().count(), 19);
            prop_assert!(!script.lines().nth(1).unwrap().contains(['$', '|', '&', ';']));
        }

        #[test]
        fn accepted_arguments_stay_on_their_line(append in "[ -~\\n]{0,40}") {
            if check_append(&append).is_ok() {
                let script = node(&site(&append), ScriptKind::Install, Some(&pass()), Platform::Bios, mac(), "x");
                prop_assert_eq!(script.lines().count(), 19);
                prop_assert!(script.contains(&append));
            }
        }
    }
}
