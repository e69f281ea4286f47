//! The golden `/etc/fstab` against the layout, before anything is sent. A line for a device that no node has makes autoconfig
//! fail on every one of them, after the whole tree was sent; here the operator learns it at once. It is a warning and no
//! error: a node may have such a device on a disk that the layout does not touch.

use std::collections::BTreeSet;

/// What names a device of the machine itself.
const LOCAL: [&str; 5] = ["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL=", "/dev/"];
/// Drives of removable media, which autoconfig leaves alone.
const REMOVABLE: [&str; 6] = ["/dev/sr", "/dev/scd", "/dev/cdrom", "/dev/dvd", "/dev/fd0", "/dev/floppy"];
/// A machine starts without these: autoconfig comments them out.
const ESP: [&str; 2] = ["/boot/efi", "/efi"];

/// A warning for each line of `fstab` that nodes of a layout with these `mounts` may not be able to follow. Lines with a
/// word of `dropped`, as a field or an option, go anyway; `brought` is what the content of raw partitions is called
/// (`UUID=...`, `LABEL=...`).
pub fn warnings(
    fstab: &str,
    mounts: &BTreeSet<String>,
    dropped: &[String],
    brought: &[String],
) -> Vec<String> {
    fstab.lines().filter_map(|line| warning(line, mounts, dropped, brought)).collect()
}

fn warning(line: &str, mounts: &BTreeSet<String>, dropped: &[String], brought: &[String]) -> Option<String> {
    let mut fields = line.split_ascii_whitespace();
    let spec = fields.next().filter(|spec| !spec.starts_with('#'))?;
    let (dir, kind) = (fields.next()?, fields.next()?);
    let options: Vec<&str> = fields.next().unwrap_or("defaults").split(',').collect();
    let local = LOCAL.iter().any(|p| spec.starts_with(p)) && !REMOVABLE.iter().any(|p| spec.starts_with(p));
    let path = match dir.trim_end_matches('/') {
        "" => "/",
        path => path,
    };
    let goes = |word: &String| [spec, dir, kind].contains(&word.as_str()) || options.contains(&word.as_str());
    let dispensable = kind == "swap"
        || (kind == "vfat" && ESP.contains(&path))
        || options.iter().any(|o| ["noauto", "nofail", "bind", "rbind"].contains(o));
    let comes = brought.iter().any(|name| name == spec);
    if !local || dispensable || comes || mounts.contains(path) || dropped.iter().any(goes) {
        return None;
    }
    Some(format!(
        "/etc/fstab mounts {spec} at {dir}, which the layout does not make: a node that has no such device will fail; give the \
         layout a partition for it, mark the line nofail, or drop it (--drop-fstab {dir})"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mounts() -> BTreeSet<String> {
        ["/", "/home"].map(str::to_owned).into()
    }

    #[test]
    fn what_the_layout_does_not_make_is_told() {
        let fstab = "# UUID=0 /comment ext4 defaults 0 0\n\
            UUID=1 / ext4 errors=remount-ro 0 1\n\
            UUID=2 /home/ xfs defaults 0 0\n\
            LABEL=data /data ext4 defaults 0 2\n\
            /dev/mapper/vg-srv /srv ext4 noatime,x 0 2\n\
            UUID=3 none swap sw 0 0\n\
            UUID=4 /boot/efi vfat umask=0077 0 1\n\
            UUID=5 /backup ext4 nofail 0 2\n\
            UUID=6 /old ext4 defaults 0 2\n\
            UUID=8 /windows ntfs defaults 0 0\n\
            /dev/sr0 /media/cdrom0 udf,iso9660 user 0 0\n\
            server:/x /x nfs4 _netdev 0 0\n\
            /srv/a /srv/b none bind 0 0\n\
            tmpfs /tmp tmpfs size=1G 0 0\n\
            UUID=7\n";
        let found = warnings(fstab, &mounts(), &["/old".to_owned()], &["UUID=8".to_owned()]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("LABEL=data at /data"), "{found:?}");
        assert!(found[1].contains("/dev/mapper/vg-srv at /srv"), "{found:?}");
        assert_eq!(
            warnings(fstab, &mounts(), &["ext4".to_owned(), "ntfs".to_owned()], &[]),
            Vec::<String>::new()
        );
    }

    proptest! {
        #[test]
        fn no_text_breaks_it(text in "(UUID=|/dev/|#|\\\\040|/| |\t|\n|[ -~é]){0,60}") {
            let _ = warnings(&text, &mounts(), &[], &[]);
        }
    }
}
