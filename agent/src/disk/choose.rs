//! Which disk a rule means. Never a guess: no match, or more than one, is an error that lists every disk with the reasons.

use super::discover::Disk;
use anyhow::{Context, Result, bail};
use ka_cli::units::show_size;
use ka_layout::glob;
use ka_layout::model::{DiskRule, Layout, Match, Pick};
use ka_layout::size::Bounds;
use std::fmt::Write;
use std::path::Path;

/// Why `disk` is not what `rule` means; empty when it is.
#[must_use]
pub fn reasons(rule: &DiskRule, disk: &Disk) -> Vec<String> {
    let wanted = &rule.matching;
    let mut why = Vec::new();
    if let Some(size) = &wanted.size
        && !size.parse::<Bounds>().is_ok_and(|b| b.holds(disk.bytes))
    {
        why.push(format!("its size {} is not in {size}", show_size(disk.bytes)));
    }
    if let Some(transports) = &wanted.transport
        && !transports.contains(&disk.transport)
    {
        why.push(format!("its transport {} is not one of {}", disk.transport, transports.join(", ")));
    }
    let mut string = |what: &str, pattern: &Option<String>, value: &Option<String>| {
        if let Some(pattern) = pattern
            && !value.as_ref().is_some_and(|v| glob::matches(pattern, v))
        {
            why.push(match value {
                Some(value) => format!("its {what} {value} is not {pattern}"),
                None => format!("it reports no {what}"),
            });
        }
    };
    string("model", &wanted.model, &disk.model);
    string("serial number", &wanted.serial, &disk.serial);
    if let Some(wwn) = &wanted.wwn
        && !disk.wwn.as_ref().is_some_and(|own| same_wwn(own, wwn))
    {
        why.push(match &disk.wwn {
            Some(own) => format!("its wwn {own} is not {wwn}"),
            None => "it reports no wwn".into(),
        });
    }
    if let Some(path) = &wanted.path {
        let own = disk.device.to_string_lossy().into_owned();
        let short = |p: &String| p.trim_start_matches("/dev/disk/by-path/").to_owned();
        let fits = |p: &String| glob::matches(path, p) || glob::matches(path, &short(p));
        if !glob::matches(path, &own) && !disk.paths.iter().any(fits) {
            let names: Vec<String> = disk.paths.iter().map(short).collect();
            let known = if names.is_empty() { own } else { format!("{own} ({})", names.join(", ")) };
            why.push(format!("its path {known} is not {path}"));
        }
    }
    if let Some(rotational) = wanted.rotational
        && rotational != disk.rotational
    {
        why.push(if disk.rotational { "it rotates".into() } else { "it does not rotate".into() });
    }
    if wanted.removable == Some(true) && !disk.removable {
        why.push("it is not removable".into());
    }
    // Never without being named, and a pattern with a wildcard names nothing.
    let exact = |pattern: &Option<String>| pattern.as_ref().is_some_and(|p| !p.contains(['*', '?']));
    let named = exact(&wanted.path) || exact(&wanted.serial) || wanted.wwn.is_some();
    if !named {
        if disk.removable && wanted.removable != Some(true) {
            why.push("it is removable".into());
        }
        if disk.transport == "usb" && !wanted.transport.as_ref().is_some_and(|t| t.iter().any(|t| t == "usb"))
        {
            why.push("it is on USB".into());
        }
        if disk.transport == "loop" {
            why.push("it is a loop device".into());
        }
        if disk.read_only {
            why.push("it is read-only".into());
        }
        if !disk.in_use.is_empty() {
            why.push(format!("it is in use: {}", disk.in_use.join(", ")));
        }
    } else if wanted.removable == Some(false) && disk.removable {
        why.push("it is removable".into());
    }
    why
}

/// World-wide names are written with and without `0x`, `naa.` and `eui.`.
fn same_wwn(a: &str, b: &str) -> bool {
    let plain = |text: &str| {
        let lower = text.trim().to_lowercase();
        let cut = ["0x", "naa.", "eui.", "wwn-0x", "nvme-"].iter().find_map(|p| lower.strip_prefix(p));
        cut.map_or_else(|| lower.clone(), str::to_owned)
    };
    plain(a) == plain(b)
}

/// The list of all disks with what `rule` makes of each, one a line.
#[must_use]
pub fn verdicts(rule: &DiskRule, disks: &[Disk]) -> String {
    let mut text = String::new();
    for disk in disks {
        let why = reasons(rule, disk);
        let verdict = if why.is_empty() { "matches".to_owned() } else { why.join("; ") };
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {disk}: {verdict}");
    }
    if disks.is_empty() {
        text.push_str("\n  this machine shows no disk at all: is the driver of its controller missing?");
    }
    text
}

/// Makes the layout's only `[[disk]]` mean exactly `device` (a path, symlinks are followed), as `--disk DEV` asks.
///
/// # Errors
/// When the layout has several disks or the device does not exist.
pub fn name_disk(layout: &mut Layout, device: &Path) -> Result<()> {
    let [rule] = &mut layout.disks[..] else {
        bail!("the layout has {} disks: name them in its match rules", layout.disks.len())
    };
    let real = std::fs::canonicalize(device).with_context(|| format!("finding {}", device.display()))?;
    rule.matching = Match { path: Some(real.to_string_lossy().into_owned()), ..Match::default() };
    Ok(())
}

/// The disk of each `[[disk]]` of the layout, as indices into `disks`.
///
/// # Errors
/// When a rule matches no disk, more than it may, or one that another rule has taken; all disks are listed.
pub fn choose(layout: &Layout, disks: &[Disk]) -> Result<Vec<usize>> {
    let mut chosen: Vec<usize> = Vec::new();
    for (i, rule) in layout.disks.iter().enumerate() {
        let index = choose_one(rule, disks)?;
        if let Some(other) = chosen.iter().position(|c| *c == index) {
            bail!(
                "[[disk]] `{}` and `{}` both mean {}",
                layout.disks[other].name,
                layout.disks[i].name,
                disks[index]
            );
        }
        chosen.push(index);
    }
    Ok(chosen)
}

fn choose_one(rule: &DiskRule, disks: &[Disk]) -> Result<usize> {
    let matching: Vec<usize> = (0..disks.len()).filter(|i| reasons(rule, &disks[*i]).is_empty()).collect();
    let name = &rule.name;
    if matching.is_empty() {
        bail!("no disk matches [[disk]] `{name}`:{}", verdicts(rule, disks));
    }
    let ends = match rule.pick {
        Pick::Only if matching.len() > 1 => {
            let count = matching.len();
            bail!("{count} disks match [[disk]] `{name}`, which wants only one:{}", verdicts(rule, disks))
        }
        Pick::Only => return Ok(matching[0]),
        Pick::Smallest => matching.iter().map(|i| disks[*i].bytes).min(),
        Pick::Largest => matching.iter().map(|i| disks[*i].bytes).max(),
    };
    let best: Vec<usize> = matching.into_iter().filter(|i| Some(disks[*i].bytes) == ends).collect();
    match best[..] {
        [one] => Ok(one),
        _ => {
            let count = best.len();
            let word = if rule.pick == Pick::Smallest { "smallest" } else { "largest" };
            bail!(
                "{count} disks are equally the {word} that match [[disk]] `{name}`:{}",
                verdicts(rule, disks)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, gib: u64) -> Disk {
        Disk {
            name: name.into(),
            device: format!("/dev/{name}").into(),
            bytes: gib << 30,
            sector: 512,
            transport: "sata".into(),
            ..Disk::default()
        }
    }

    fn layout(rules: &str) -> Layout {
        let text = format!("version = 1\n[[disk]]\nname = \"system\"\ntable = \"gpt\"\n{rules}");
        let layout: Layout = toml::from_str(&text).unwrap();
        assert_eq!(ka_layout::check::check(&layout), []);
        layout
    }

    fn error(rules: &str, disks: &[Disk]) -> String {
        choose(&layout(rules), disks).unwrap_err().to_string()
    }

    #[test]
    fn no_match_lists_every_disk_and_why() {
        let mut stick = disk("sdb", 64);
        stick.transport = "usb".into();
        stick.removable = true;
        stick.model = Some("Stick 3".into());
        let mut root = disk("nvme0n1", 500);
        root.transport = "nvme".into();
        root.in_use = vec!["nvme0n1p2 is mounted at /".into()];
        root.serial = Some("S1".into());
        assert_eq!(
            error("match = { size = \"30G-\" }", &[disk("sda", 20), stick, root]),
            "no disk matches [[disk]] `system`:\n  \
             /dev/sda (20.0 GiB, sata): its size 20.0 GiB is not in 30G-\n  \
             /dev/sdb (64.0 GiB, usb, model Stick 3): it is removable; it is on USB\n  \
             /dev/nvme0n1 (500 GiB, nvme, serial S1): it is in use: nvme0n1p2 is mounted at /"
        );
        assert_eq!(
            error("", &[]),
            "no disk matches [[disk]] `system`:\n  \
             this machine shows no disk at all: is the driver of its controller missing?"
        );
    }

    #[test]
    fn two_matches_are_refused() {
        assert_eq!(
            error("match = { transport = [\"sata\"] }", &[disk("sda", 20), disk("sdb", 40)]),
            "2 disks match [[disk]] `system`, which wants only one:\n  \
             /dev/sda (20.0 GiB, sata): matches\n  \
             /dev/sdb (40.0 GiB, sata): matches"
        );
        assert_eq!(
            error("pick = \"largest\"", &[disk("sda", 20), disk("sdb", 40), disk("sdc", 40)]),
            "3 disks".replace('3', "2")
                + " are equally the largest that match [[disk]] `system`:\n  \
             /dev/sda (20.0 GiB, sata): matches\n  \
             /dev/sdb (40.0 GiB, sata): matches\n  \
             /dev/sdc (40.0 GiB, sata): matches"
        );
    }

    #[test]
    fn a_disk_can_be_named_from_outside() {
        let mut one = layout("match = { size = \"1T-\" }");
        name_disk(&mut one, Path::new("/dev/../dev/null")).unwrap();
        assert_eq!(one.disks[0].matching.path.as_deref(), Some("/dev/null"));
        assert_eq!(one.disks[0].matching.size, None);
        let error = name_disk(&mut one, Path::new("/no/such/disk")).unwrap_err();
        assert_eq!(error.to_string(), "finding /no/such/disk");
        one.disks.push(one.disks[0].clone());
        let error = name_disk(&mut one, Path::new("/dev/null")).unwrap_err();
        assert_eq!(error.to_string(), "the layout has 2 disks: name them in its match rules");
    }

    #[test]
    fn pick_decides() {
        let disks = [disk("sda", 20), disk("sdb", 40), disk("sdc", 10)];
        assert_eq!(choose(&layout("pick = \"smallest\""), &disks).unwrap(), [2]);
        assert_eq!(choose(&layout("pick = \"largest\""), &disks).unwrap(), [1]);
    }

    #[test]
    fn two_rules_need_two_disks() {
        let text = "[[disk]]\nname = \"data\"\ntable = \"gpt\"\n";
        assert_eq!(
            error(text, &[disk("sda", 20)]),
            "[[disk]] `system` and `data` both mean /dev/sda (20.0 GiB, sata)"
        );
    }

    #[test]
    fn what_is_dangerous_must_be_named() {
        type Danger = (&'static str, fn(&mut Disk));
        let dangers: [Danger; 5] = [
            ("it is removable", |d| d.removable = true),
            ("it is on USB", |d| d.transport = "usb".into()),
            ("it is a loop device", |d| d.transport = "loop".into()),
            ("it is read-only", |d| d.read_only = true),
            ("it is in use: x", |d| d.in_use = vec!["x".into()]),
        ];
        for (reason, change) in dangers {
            let mut one = disk("sda", 20);
            one.serial = Some("ABC123".into());
            change(&mut one);
            assert_eq!(reasons(&layout("").disks[0], &one), [reason]);
            for wildcard in ["serial = \"abc*\"", "path = \"/dev/sd?\""] {
                let rule = layout(&format!("match = {{ {wildcard} }}"));
                assert_eq!(reasons(&rule.disks[0], &one), [reason], "{wildcard}");
            }
            for named in ["serial = \"abc123\"", "path = \"/dev/sda\""] {
                let rule = layout(&format!("match = {{ {named} }}"));
                assert_eq!(reasons(&rule.disks[0], &one), [""; 0], "{named} {reason}");
            }
        }
    }

    #[test]
    fn every_condition_is_looked_at() {
        let mut one = disk("sda", 20);
        one.model = Some("Samsung SSD 870".into());
        one.serial = Some("S5Y1".into());
        one.wwn = Some("naa.5002538F1234".into());
        one.paths = vec!["/dev/disk/by-path/pci-0000:00:1f.2-ata-1".into()];
        for good in [
            "size = \"10G-30G\"",
            "transport = [\"nvme\", \"sata\"]",
            "model = \"samsung*\"",
            "serial = \"S5Y1\"",
            "wwn = \"0x5002538f1234\"",
            "path = \"pci-*-ata-1\"",
            "path = \"/dev/disk/by-path/pci-0000:00:1f.2-ata-1\"",
            "path = \"/dev/sd?\"",
            "rotational = false",
            "removable = false",
        ] {
            let rule = layout(&format!("match = {{ {good} }}"));
            assert_eq!(reasons(&rule.disks[0], &one), [""; 0], "{good}");
        }
        for (bad, reason) in [
            ("transport = [\"nvme\"]", "its transport sata is not one of nvme"),
            ("model = \"WD*\"", "its model Samsung SSD 870 is not WD*"),
            ("serial = \"X\"", "its serial number S5Y1 is not X"),
            ("wwn = \"0x1\"", "its wwn naa.5002538F1234 is not 0x1"),
            ("path = \"/dev/sdb\"", "its path /dev/sda (pci-0000:00:1f.2-ata-1) is not /dev/sdb"),
            ("rotational = true", "it does not rotate"),
            ("removable = true", "it is not removable"),
        ] {
            let rule = layout(&format!("match = {{ {bad} }}"));
            assert_eq!(reasons(&rule.disks[0], &one), [reason], "{bad}");
        }
        let rule = layout("match = { model = \"*\", serial = \"*\" }");
        assert_eq!(
            reasons(&rule.disks[0], &disk("sdb", 1)),
            ["it reports no model", "it reports no serial number"]
        );
    }
}
