//! How boot loaders name files: from the top of the file system that holds them, which need not be the clone's root, and
//! for a btrfs lies above its subvolumes. A menu of the golden node names them rightly only where the clone's file systems
//! are cut as the golden node's: `/boot/vmlinuz` in one tree with `/` is `/vmlinuz` where `/boot` is a file system of its own.

use super::Context;
use ka_layout::order::Volume;

/// The file of the clone that `path` on `volume` means; none when it is not there, is empty, or another file system is
/// mounted over it. `from_default`: paths begin at a btrfs's default subvolume.
pub fn on_volume(context: &Context, volume: &Volume, path: &str, from_default: bool) -> Option<String> {
    let mount = volume.mount.as_ref()?.path.as_str();
    let below = match prefix(volume, from_default) {
        Some(prefix) => path.strip_prefix(prefix.as_str()).filter(|rest| rest.starts_with('/'))?,
        None => path,
    };
    there(context, &format!("{mount}/{below}"), mount)
}

/// How a boot loader names the clone's `file` on `volume`, which holds it.
pub fn named(volume: &Volume, file: &str, from_default: bool) -> Option<String> {
    let mount = volume.mount.as_ref()?.path.trim_end_matches('/');
    let below = file.strip_prefix(mount).filter(|rest| rest.starts_with('/'))?;
    Some(prefix(volume, from_default).unwrap_or_default() + below)
}

/// Where the subvolume begins, seen from the top.
fn prefix(volume: &Volume, from_default: bool) -> Option<String> {
    let subvolume = volume.subvolume.as_ref().filter(|s| !(s.default && from_default))?;
    Some(format!("/{}", subvolume.name.trim_matches('/')))
}

/// `path` without `.` and `..`, if it is a file with content on the file system that is mounted at `mount`.
pub fn there(context: &Context, path: &str, mount: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    let path = format!("/{}", parts.join("/"));
    let has_content = context.root.size(&path).is_some_and(|size| size > 0);
    (has_content && mount_of(context, &path) == mount).then_some(path)
}

/// Where the file system is mounted that holds `path`.
pub fn mount_of<'a>(context: &'a Context, path: &str) -> &'a str {
    let mounts = context.volumes.iter().filter_map(|v| v.mount.as_ref()).map(|m| m.path.as_str());
    let holds = |mount: &&str| {
        let rest = path.strip_prefix(mount.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    mounts.filter(holds).max_by_key(|mount| mount.len()).unwrap_or("/")
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;
    use ka_layout::model::{Mount, Subvolume};
    use proptest::prelude::*;

    #[test]
    fn a_path_begins_at_the_top_of_its_file_system() {
        let mut lab = Lab::new();
        lab.file("/boot/k", "k").file("/boot/efi/e", "e").file("/boot/empty", "");
        let on = |lab: &Lab, number: usize, path: &str| {
            on_volume(&lab.context(), &lab.volumes[number], path, false).unwrap_or_default()
        };
        assert_eq!(on(&lab, 2, "/boot/k"), "/boot/k");
        assert_eq!(on(&lab, 2, "/boot/grub/../k"), "/boot/k");
        assert_eq!([on(&lab, 2, "/k"), on(&lab, 2, "/boot/empty"), on(&lab, 1, "/boot/k")], [""; 3]);
        // What is mounted there hides it.
        assert_eq!([on(&lab, 2, "/boot/efi/e"), on(&lab, 0, "/e")], ["", "/boot/efi/e"]);
        assert_eq!(named(&lab.volumes[2], "/boot/k", false).unwrap(), "/boot/k");
        assert_eq!(named(&lab.volumes[0], "/boot/efi/e", false).unwrap(), "/e");
        assert_eq!(named(&lab.volumes[0], "/boot/efix", false), None);
        let mut boot = lab.volumes[2].clone();
        boot.mount = Some(Mount { path: "/boot".into(), options: None });
        lab.volumes.push(boot);
        assert_eq!([on(&lab, 2, "/boot/k"), on(&lab, 3, "/k"), on(&lab, 3, "/boot/k")], ["", "/boot/k", ""]);
    }

    #[test]
    fn a_subvolume_stands_before_it() {
        let mut lab = Lab::new();
        lab.file("/boot/k", "k");
        let subvolume = Subvolume { name: "@".into(), path: Some("/".into()), options: None, default: true };
        lab.volumes[2].subvolume = Some(subvolume);
        let on = |path: &str, from_default: bool| {
            on_volume(&lab.context(), &lab.volumes[2], path, from_default).is_some()
        };
        assert!(on("/@/boot/k", false) && on("/boot/k", true));
        assert!(!on("/boot/k", false) && !on("/@/boot/k", true) && !on("/@boot/k", false));
        assert_eq!(named(&lab.volumes[2], "/boot/k", false).unwrap(), "/@/boot/k");
        assert_eq!(named(&lab.volumes[2], "/boot/k", true).unwrap(), "/boot/k");
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_clone(path in "(\\.\\./|/|boot/|k|é|[ -~]){0,20}") {
            let lab = Lab::new();
            lab.file("/boot/k", "k");
            let found = on_volume(&lab.context(), &lab.volumes[2], &path, false);
            prop_assert!(found.is_none_or(|file| file == "/boot/k"));
        }
    }
}
