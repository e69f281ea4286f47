//! What kind of machine this is: small facts from sysfs and /proc that the server shows and the boot loader step needs.

use ka_layout::order::Firmware;
use std::fs;
use std::path::Path;

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// How its firmware booted.
    pub firmware: Firmware,
    /// Bytes of memory that the kernel has.
    pub memory: u64,
    /// Processors that are on.
    pub cpus: usize,
    /// The running kernel, as `uname -r` says.
    pub kernel: String,
    /// Who built the machine.
    pub vendor: Option<String>,
    /// What it is called.
    pub product: Option<String>,
    /// Its serial number.
    pub serial: Option<String>,
    /// Its UUID, which firmware and BMC show too.
    pub uuid: Option<String>,
}

impl Machine {
    /// Looks at this machine.
    #[must_use]
    pub fn detect() -> Self {
        Self {
            firmware: firmware(),
            memory: fs::read_to_string("/proc/meminfo").ok().and_then(|t| parse_memory(&t)).unwrap_or(0),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            vendor: dmi("sys_vendor"),
            product: dmi("product_name"),
            serial: dmi("product_serial"),
            uuid: dmi("product_uuid"),
        }
    }
}

/// How the firmware booted this machine.
#[must_use]
pub fn firmware() -> Firmware {
    if Path::new("/sys/firmware/efi").exists() { Firmware::Uefi } else { Firmware::Bios }
}

fn parse_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn dmi(name: &str) -> Option<String> {
    fs::read_to_string(Path::new("/sys/class/dmi/id").join(name)).ok().and_then(|text| useful(&text))
}

/// A value of the firmware, unless it is what boards are delivered with when nobody filled it in.
fn useful(text: &str) -> Option<String> {
    const FILLERS: [&str; 9] = [
        "to be filled by o.e.m.",
        "default string",
        "not specified",
        "not applicable",
        "system serial number",
        "system product name",
        "system manufacturer",
        "none",
        "0123456789",
    ];
    let text = text.trim();
    let plain = text.to_ascii_lowercase();
    (!text.is_empty()
        && !FILLERS.contains(&plain.as_str())
        && text.bytes().any(|b| !matches!(b, b'0' | b'-' | b'.')))
    .then(|| text.chars().filter(|c| !c.is_control()).take(128).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read() {
        assert_eq!(parse_memory("MemTotal:         501234 kB\nMemFree: 1 kB\n"), Some(501_234 << 10));
        assert_eq!(parse_memory("MemFree: 1 kB\n"), None);
        assert_eq!(parse_memory("MemTotal: 99999999999999999999 kB"), None);
    }

    #[test]
    fn fillers_are_no_facts() {
        assert_eq!(useful("R640-17\n"), Some("R640-17".into()));
        for text in
            ["", "  \n", "To Be Filled By O.E.M.", "Default string", "00000000-0000-0000-0000-000000000000"]
        {
            assert_eq!(useful(text), None, "{text}");
        }
    }

    #[test]
    fn this_machine_has_memory_and_a_kernel() {
        let machine = Machine::detect();
        assert!(machine.memory > 64 << 20 && machine.cpus > 0 && machine.kernel.contains('.'));
    }
}
