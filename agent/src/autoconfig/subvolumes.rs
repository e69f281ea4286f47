//! Which subvolume of a btrfs a line of fstab mounts: names hold on a clone, numbers (`subvolid=`) do not, and a line whose
//! mount point is another subvolume by the layout, or none, is set right.

use super::Context;
use super::fstab::Line;
use ka_layout::model::Fs;
use ka_layout::order::Volume;

fn chooses(word: &str) -> bool {
    word.starts_with("subvol=") || word.starts_with("subvolid=")
}

/// Whether both words choose the same subvolume: a slash before its name means nothing, and the top is number 5.
fn same(a: &str, b: &str) -> bool {
    fn plain(word: &str) -> &str {
        match word.strip_prefix("subvol=").map(|name| name.trim_start_matches('/')) {
            Some("") => "5",
            Some(name) => name,
            None => word.strip_prefix("subvolid=").unwrap_or(word),
        }
    }
    plain(a) == plain(b)
}

/// The options that the line must have; none when those that it has are right.
pub fn options(line: &Line, volume: &Volume) -> Option<String> {
    let chosen: Vec<&str> = line.options.split(',').filter(|w| chooses(w)).collect();
    let is_btrfs = volume.fs == Some(Fs::Btrfs);
    let wanted = volume.subvolume.as_ref().filter(|_| is_btrfs);
    let said = volume.mount.as_ref().and_then(|m| m.options.as_deref()).unwrap_or_default();
    // Subvolumes that were not made here, of what was preserved, are known by the layout's options only.
    let own = said.split(',').find(|w| chooses(w)).filter(|_| is_btrfs && wanted.is_none());
    let right = match (&chosen[..], wanted) {
        (words, None) if own.is_some() => matches!(words, [word] if same(word, own.unwrap_or_default())),
        ([], None) => true,
        // The top has the same number everywhere.
        ([word], None) => is_btrfs && ["subvolid=5", "subvol=/"].contains(word),
        // A mount without the word shows the default.
        ([], Some(wanted)) => wanted.default,
        ([word], Some(wanted)) => {
            word.strip_prefix("subvol=").is_some_and(|name| name.trim_start_matches('/') == wanted.name)
        }
        _ => false,
    };
    if right {
        return None;
    }
    let mut words: Vec<String> = line.options.split(',').filter(|w| !chooses(w)).map(str::to_owned).collect();
    match wanted {
        Some(wanted) if chosen.is_empty() || !wanted.default => words.push(format!("subvol={}", wanted.name)),
        None if own.is_some() => words.extend(own.map(str::to_owned)),
        // What a mount of it shows, only its node knows.
        None if volume.preserved => {}
        None if is_btrfs => words.push("subvolid=5".to_owned()),
        _ => {}
    }
    words.retain(|w| !w.is_empty());
    if words.is_empty() {
        words.push("defaults".into());
    }
    Some(words.join(","))
}

/// The option by which the root file system's subvolume is mounted; none where a mount without it shows what is wanted.
pub fn root_choice(context: &Context) -> Option<String> {
    let root = context.mounted_at("/").filter(|v| v.fs == Some(Fs::Btrfs))?;
    root.subvolume.as_ref().filter(|s| !s.default).map(|s| format!("subvol={}", s.name))
}

/// What the value of `rootflags=` or `rootfstype=` on a kernel command line must be; none when the word must go.
pub fn root_words(context: &Context, key: &str, value: &str) -> Option<String> {
    let Some(root) = context.mounted_at("/") else { return Some(value.to_owned()) };
    let golden = context.order.golden.filesystems.iter().find(|fs| fs.path.as_deref() == Some("/"));
    let is_other = golden.is_some_and(|golden| root.fs != Some(golden.fs));
    if key == "rootfstype" {
        return if is_other { root.fs.map(|fs| fs.name().to_owned()) } else { Some(value.to_owned()) };
    }
    let choice = root_choice(context);
    let names = root.subvolume.as_ref().map(|s| format!("subvol={}", s.name));
    // What another kind of file system was told means nothing to this one.
    let mut words: Vec<&str> = value.split(',').filter(|w| !is_other || chooses(w)).collect();
    let is_right = |w: &&str| names.as_ref().is_some_and(|name| same(w, name));
    let chosen: Vec<&str> = words.iter().copied().filter(|w| chooses(w)).collect();
    if chosen.len() != 1 || !chosen.iter().all(|w| is_right(w) && w.starts_with("subvol=")) {
        words.retain(|w| !chooses(w));
        words.extend(choice.as_deref());
    }
    words.retain(|w| !w.is_empty());
    Some(words.join(",")).filter(|words| !words.is_empty())
}

/// `line` with its options, the fourth field, replaced; all else stays in place.
pub fn replace_options(line: &str, new: &str) -> Option<String> {
    let mut fields = Vec::new();
    let mut at = 0;
    while fields.len() < 4 {
        let start = at + line[at..].find(|c: char| !c.is_ascii_whitespace())?;
        at = line[start..].find(|c: char| c.is_ascii_whitespace()).map_or(line.len(), |n| start + n);
        fields.push((start, at));
    }
    let (start, end) = fields[3];
    Some(format!("{}{new}{}", &line[..start], &line[end..]))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;
    use ka_layout::model::{Mount, Subvolume};

    fn volume(name: Option<&str>, default: bool) -> Volume {
        let mut volume = Lab::new().volumes[2].clone();
        volume.fs = Some(Fs::Btrfs);
        volume.subvolume =
            name.map(|name| Subvolume { name: name.into(), path: Some("/".into()), options: None, default });
        volume
    }

    #[test]
    fn names_stay_and_numbers_go() {
        let check = |options_now: &str, name: Option<&str>, default: bool| {
            let text = format!("UUID=x / btrfs {options_now} 0 0");
            options(&Line::parse(&text).unwrap(), &volume(name, default))
        };
        assert_eq!(check("noatime,subvol=@", Some("@"), false), None);
        assert_eq!(check("subvol=/@", Some("@"), false), None);
        assert_eq!(check("noatime,subvolid=256", Some("@"), false).unwrap(), "noatime,subvol=@");
        assert_eq!(check("subvol=@,subvolid=256,ro", Some("@"), false).unwrap(), "ro,subvol=@");
        assert_eq!(check("subvol=@old", Some("@"), false).unwrap(), "subvol=@");
        assert_eq!(check("defaults", Some("@"), false).unwrap(), "defaults,subvol=@");
        assert_eq!(check("defaults", Some("@"), true), None, "the default needs no word");
        assert_eq!(check("subvol=@", None, false).unwrap(), "subvolid=5");
        assert_eq!(check("noexec,subvolid=5", None, false), None, "the top");
        let mut kept = volume(None, false);
        kept.preserved = true;
        let line = |options| Line { spec: "UUID=x", dir: "/", kind: "btrfs", options };
        assert_eq!(
            options(&line("subvol=@golden"), &kept).unwrap(),
            "defaults",
            "as it is mounted meanwhile"
        );
        kept.mount = Some(Mount { path: "/".into(), options: Some("noatime,subvol=@home".into()) });
        assert_eq!(options(&line("noexec,subvol=/@home"), &kept), None);
        assert_eq!(options(&line("noexec,subvol=@golden"), &kept).unwrap(), "noexec,subvol=@home");
        assert_eq!(options(&line("defaults"), &kept).unwrap(), "defaults,subvol=@home");
        let mut plain = volume(None, false);
        plain.fs = Some(Fs::Ext4);
        let line = Line { spec: "UUID=x", dir: "/", kind: "ext4", options: "subvol=@" };
        assert_eq!(options(&line, &plain).unwrap(), "defaults");
        assert_eq!(check("defaults", None, false), None);
        assert!(
            same("subvol=/", "subvolid=5")
                && same("subvol=/@", "subvol=@")
                && !same("subvol=@", "subvolid=5")
        );
    }

    #[test]
    fn only_the_fourth_field_is_replaced() {
        assert_eq!(
            replace_options("UUID=a\t/a  btrfs   a 0 0 # a", "subvol=@").unwrap(),
            "UUID=a\t/a  btrfs   subvol=@ 0 0 # a"
        );
        assert_eq!(replace_options("x / btrfs a", "b").unwrap(), "x / btrfs b");
        assert_eq!(replace_options("x / btrfs", "b"), None);
    }
}
