//! The firmware's boot entries, as `efibootmgr` shows them: reading its list, and what follows from it for the clone's
//! own entry, for old ones of the same name and for the boot order.

use ka_layout::order::EfiBoot;
use std::collections::BTreeSet;

/// The firmware's boot entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootEntries {
    /// The number of the entry that this boot came from.
    pub current: Option<String>,
    /// The order in which they are tried.
    pub order: Vec<String>,
    /// The entries.
    pub entries: Vec<Entry>,
}

/// One boot entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Four hexadecimal digits.
    pub number: String,
    /// What the firmware's menu shows.
    pub label: String,
    /// GUID of the partition that it boots from, in lower case.
    pub partuuid: Option<String>,
    /// The file there, `\EFI\debian\shimx64.efi`.
    pub file: Option<String>,
}

/// Reads the output of `efibootmgr -v`, of versions 17 (`File(\EFI\x)`) and 18 (`/\EFI\x`) alike.
pub fn parse(text: &str) -> BootEntries {
    let mut found = BootEntries::default();
    for line in text.lines() {
        if let Some(number) = line.strip_prefix("BootCurrent: ") {
            found.current = Some(number.trim().to_owned());
        } else if let Some(order) = line.strip_prefix("BootOrder: ") {
            found.order = order.split(',').map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect();
        } else if let Some(rest) = line.strip_prefix("Boot")
            && let Some(number) = rest.get(..4).filter(|n| n.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            let rest = rest[4..].strip_prefix('*').unwrap_or(&rest[4..]);
            let (label, path) = rest.split_once('\t').unwrap_or((rest, ""));
            found.entries.push(Entry {
                number: number.to_owned(),
                label: label.trim().to_owned(),
                partuuid: partuuid(path),
                file: file(path),
            });
        }
    }
    found
}

fn partuuid(path: &str) -> Option<String> {
    let hd = &path[path.find("HD(")? + 3..];
    let mut fields = hd[..hd.find(')')?].split(',');
    let kind = fields.nth(1)?;
    let id = fields.next()?.to_ascii_lowercase();
    if kind.eq_ignore_ascii_case("GPT") {
        return Some(id);
    }
    // MBR: the disk's signature; the kernel writes it with the partition's number behind it.
    let number: u32 = hd.split(',').next()?.parse().ok()?;
    Some(format!("{:0>8}-{number:02x}", id.trim_start_matches("0x")))
}

fn file(path: &str) -> Option<String> {
    let path = &path[path.find('\\')?..];
    let end = path.find(|c: char| c == ')' || c.is_ascii_whitespace()).unwrap_or(path.len());
    // Version 17 prints optional data straight behind the name; loaders end in .efi.
    let end = path[..end].to_ascii_lowercase().rfind(".efi").map_or(end, |at| at + 4);
    Some(path[..end].to_owned())
}

/// What is known of the clone's own entry.
#[derive(Debug, Clone, Copy)]
pub struct Here<'a> {
    /// What the entry is called.
    pub label: &'a str,
    /// The file that it boots, where that is known: `\EFI\rocky\shimx64.efi`.
    pub file: Option<&'a str>,
    /// GUID of the partition that it boots from.
    pub partuuid: Option<&'a str>,
    /// GUIDs of all partitions of this machine, in lower case, where they are known.
    pub present: Option<&'a BTreeSet<String>>,
}

/// What is to be done with the entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Numbers to delete: older entries of the same label, and of the same file on partitions that are gone.
    pub delete: Vec<String>,
    /// The boot order to set; none when it is right.
    pub order: Option<Vec<String>>,
    /// The entry to boot next, once.
    pub next: Option<String>,
    /// Why the network could not be put first, if it should be.
    pub problem: Option<String>,
}

/// Plans for the clone's own entry; none when there is no such entry.
pub fn plan(found: &BootEntries, here: &Here, policy: EfiBoot) -> Option<(String, Plan)> {
    let partuuid = here.partuuid.map(str::to_ascii_lowercase);
    let is_file =
        |e: &Entry| e.file.as_deref().zip(here.file).is_some_and(|(a, b)| a.eq_ignore_ascii_case(b));
    let rank = |e: &Entry| found.order.iter().position(|n| *n == e.number).unwrap_or(usize::MAX);
    let on_disk = |e: &Entry| partuuid.is_none() || e.partuuid.is_none() || e.partuuid == partuuid;
    let own = found
        .entries
        .iter()
        .filter(|e| e.label == here.label && on_disk(e))
        // Where several fit, the one with the right file.
        .min_by_key(|e| (here.file.is_some() && !is_file(e), rank(e)))?;
    let is_gone = |e: &Entry| {
        e.partuuid
            .as_ref()
            .zip(here.present)
            .is_some_and(|(uuid, present)| uuid.len() == 36 && !present.contains(uuid))
    };
    let stale = |e: &&Entry| e.number != own.number && (e.label == here.label || (is_file(e) && is_gone(e)));
    let mut plan = Plan {
        delete: found.entries.iter().filter(stale).map(|e| e.number.clone()).collect(),
        ..Plan::default()
    };
    let mut order: Vec<String> = found.order.iter().filter(|n| !plan.delete.contains(n)).cloned().collect();
    let first = match policy {
        EfiBoot::DiskFirst => Some(own.number.clone()),
        EfiBoot::PxeFirst => match &found.current {
            Some(current) if *current != own.number && !plan.delete.contains(current) => {
                if !order.contains(&own.number) {
                    order.insert(0, own.number.clone());
                }
                Some(current.clone())
            }
            _ => {
                plan.problem = Some("the firmware does not say which entry booted this node".into());
                Some(own.number.clone())
            }
        },
        EfiBoot::BootNext => {
            // A new entry was put first when it was made.
            order.retain(|n| *n != own.number);
            order.push(own.number.clone());
            plan.next = Some(own.number.clone());
            None
        }
    };
    if let Some(first) = first {
        order.retain(|n| *n != first);
        order.insert(0, first);
    }
    let now: Vec<&String> = found.order.iter().filter(|n| !plan.delete.contains(n)).collect();
    if now != order.iter().collect::<Vec<_>>() {
        plan.order = Some(order);
    }
    Some((own.number.clone(), plan))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V17: &str = "BootCurrent: 0003\nTimeout: 0 seconds\nBootOrder: 0007,0003,0000,0005\n\
        Boot0000* UiApp\tFvVol(7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1)/FvFile(462caa21-7614-4503-836e-8ab6f4662331)\n\
        Boot0003* UEFI PXEv4 (MAC:525400123456)\tPciRoot(0x0)/Pci(0x3,0x0)/MAC(525400123456,1)/IPv4(0.0.0.00.0.0.0,0,0)N.....YM....R,Y.\n\
        Boot0005* debian\tHD(1,GPT,11111111-1111-4111-8111-111111111111,0x800,0x40000)/File(\\EFI\\debian\\shimx64.efi)\n\
        Boot0007* debian\tHD(1,GPT,AAAAAAAA-0000-4000-8000-000000000001,0x800,0x40000)/File(\\EFI\\debian\\grubx64.efi)..BO\n";
    const OWN: &str = "aaaaaaaa-0000-4000-8000-000000000001";

    fn here<'a>(label: &'a str, partuuid: &'a str) -> Here<'a> {
        Here { label, file: None, partuuid: Some(partuuid), present: None }
    }

    #[test]
    fn an_entry_for_the_same_file_goes_when_its_partition_is_gone() {
        let text = V17.replace("Boot0005* debian", "Boot0005* Debian 11");
        let present: BTreeSet<String> = [OWN.to_owned()].into();
        let with =
            |present| Here { file: Some("\\EFI\\debian\\shimx64.efi"), present, ..here("debian", OWN) };
        let (_, planned) = plan(&parse(&text), &with(Some(&present)), EfiBoot::DiskFirst).unwrap();
        assert_eq!(planned.delete, ["0005"]);
        let both: BTreeSet<String> =
            [OWN.to_owned(), "11111111-1111-4111-8111-111111111111".to_owned()].into();
        for known in [None, Some(&both)] {
            let (_, planned) = plan(&parse(&text), &with(known), EfiBoot::DiskFirst).unwrap();
            assert_eq!(planned.delete, [""; 0], "its partition may be there");
        }
    }

    #[test]
    fn only_the_next_boot_goes_to_the_disk() {
        let (own, planned) = plan(&parse(V17), &here("debian", OWN), EfiBoot::BootNext).unwrap();
        assert_eq!(planned.next.as_ref(), Some(&own));
        assert_eq!(planned.order.unwrap(), ["0003", "0000", "0007"]);
    }

    #[test]
    fn both_forms_are_read() {
        let found = parse(V17);
        assert_eq!(found.current.as_deref(), Some("0003"));
        assert_eq!(found.order, ["0007", "0003", "0000", "0005"]);
        let own = &found.entries[3];
        assert_eq!((own.number.as_str(), own.label.as_str()), ("0007", "debian"));
        assert_eq!(own.partuuid.as_deref(), Some(OWN));
        assert_eq!(own.file.as_deref(), Some("\\EFI\\debian\\grubx64.efi"));
        let v18 = parse("Boot0001* debian\tHD(2,MBR,0xa2b3c4d,0x800,0x40000)/\\EFI\\debian\\shimx64.efi\n");
        assert_eq!(v18.entries[0].file.as_deref(), Some("\\EFI\\debian\\shimx64.efi"));
        assert_eq!(v18.entries[0].partuuid.as_deref(), Some("0a2b3c4d-02"));
        assert_eq!(parse("Boot0001 off\n").entries[0].label, "off");
    }

    #[test]
    fn disk_first_deletes_the_stale_one_only() {
        let (own, plan) = plan(&parse(V17), &here("debian", OWN), EfiBoot::DiskFirst).unwrap();
        assert_eq!(own, "0007");
        assert_eq!(plan.delete, ["0005"]);
        assert_eq!(plan.order, None, "it is first already");
    }

    #[test]
    fn the_network_stays_first_by_policy() {
        let (_, planned) = plan(&parse(V17), &here("debian", OWN), EfiBoot::PxeFirst).unwrap();
        assert_eq!(planned.order.unwrap(), ["0003", "0007", "0000"]);
        let unknown = V17.replace("BootCurrent: 0003\n", "");
        let (_, planned) = plan(&parse(&unknown), &here("debian", OWN), EfiBoot::PxeFirst).unwrap();
        assert!(planned.problem.is_some() && planned.order.is_none());
    }

    #[test]
    fn an_entry_on_another_disk_is_not_ours() {
        assert_eq!(plan(&parse(V17), &here("debian", "other"), EfiBoot::DiskFirst), None);
        assert_eq!(plan(&parse(V17), &here("ubuntu", OWN), EfiBoot::DiskFirst), None);
    }

    proptest! {
        #[test]
        fn no_output_breaks_the_reader(text in "(Boot[0-9A-F*]{0,6}|BootOrder: |HD\\(|\\\\|é|,|\t|\n|\\)|[ -~]){0,60}") {
            let found = parse(&text);
            let _ = plan(&found, &here("debian", OWN), EfiBoot::PxeFirst);
        }
    }
}
