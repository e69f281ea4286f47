//! Which kernel the nodes boot, and how its initramfs may be compressed.

use crate::Error;
use crate::root::Root;
use std::cmp::Ordering;

/// A kernel of a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// As `uname -r` would say.
    pub version: String,
    /// Path of its image in the root.
    pub image: String,
}

/// The kernel `wanted`, or the newest that has both an image and modules. One made for clouds is only taken when there is
/// no other: it lacks the drivers of real machines (ahci, e1000e, igb, r8169).
///
/// # Errors
/// When there is none.
pub fn find(root: &Root, wanted: Option<&str>) -> Result<Kernel, Error> {
    let mut versions = root.names("/lib/modules")?;
    versions.sort_by(|a, b| compare(a, b));
    let with_image =
        |version: &String| image_of(root, version).map(|image| Kernel { version: version.clone(), image });
    if let Some(wanted) = wanted {
        if !versions.iter().any(|v| v == wanted) {
            return Err(Error::Kernel(format!(
                "there is no /lib/modules/{wanted} in {}; there is {}",
                root.path().display(),
                if versions.is_empty() { "none".to_owned() } else { versions.join(", ") },
            )));
        }
        return with_image(&wanted.to_owned()).ok_or_else(|| {
            Error::Kernel(format!("there is no /boot/vmlinuz-{wanted} in {}", root.path().display()))
        });
    }
    let usable: Vec<Kernel> = versions.iter().filter_map(with_image).collect();
    let best = usable.iter().rev().find(|k| !is_cloud(&k.version)).or(usable.last());
    best.cloned().ok_or_else(|| {
        Error::Kernel(format!(
            "no kernel with both /boot/vmlinuz-* and /lib/modules/* in {} (Debian: package linux-image-amd64)",
            root.path().display()
        ))
    })
}

/// Whether it is made for clouds and lacks the drivers of real machines.
#[must_use]
pub fn is_cloud(version: &str) -> bool {
    ["cloud", "-aws", "-azure", "-gcp", "-kvm"].iter().any(|word| version.contains(word))
}

fn image_of(root: &Root, version: &str) -> Option<String> {
    [
        format!("/boot/vmlinuz-{version}"),
        format!("/lib/modules/{version}/vmlinuz"),
        format!("/boot/vmlinux-{version}"),
    ]
    .into_iter()
    .find(|path| root.file(path).is_some())
}

/// Whether the kernel unpacks zstd; none when its configuration is not there to ask.
///
/// # Errors
/// When the configuration cannot be read.
pub fn unpacks_zstd(root: &Root, version: &str) -> Result<Option<bool>, Error> {
    for path in [format!("/boot/config-{version}"), format!("/lib/modules/{version}/config")] {
        if let Some(text) = root.read_text(&path)? {
            return Ok(Some(text.lines().any(|line| line.trim() == "CONFIG_RD_ZSTD=y")));
        }
    }
    Ok(None)
}

/// Versions as people order them: numbers as numbers, the rest as text.
fn compare(a: &str, b: &str) -> Ordering {
    let parts = |text: &str| {
        let mut parts: Vec<(u64, String)> = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let number = rest[..digits].parse().unwrap_or(u64::MAX);
            rest = &rest[digits..];
            let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            parts.push((if digits == 0 { 0 } else { number }, rest[..letters].to_owned()));
            rest = &rest[letters..];
        }
        parts
    };
    parts(a).cmp(&parts(b)).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_newest_usable_kernel_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        assert!(find(&root, None).unwrap_err().to_string().contains("linux-image-amd64"));
        fs::create_dir_all(dir.path().join("boot")).unwrap();
        for (version, image) in [
            ("6.1.0-9-amd64", true),
            ("6.1.0-56-amd64", true),
            ("6.9.0-1-cloud-amd64", true),
            ("7.0.0", false),
        ] {
            fs::create_dir_all(dir.path().join("lib/modules").join(version)).unwrap();
            if image {
                fs::write(dir.path().join(format!("boot/vmlinuz-{version}")), "x").unwrap();
            }
        }
        assert_eq!(find(&root, None).unwrap().version, "6.1.0-56-amd64");
        assert_eq!(find(&root, Some("6.1.0-9-amd64")).unwrap().image, "/boot/vmlinuz-6.1.0-9-amd64");
        assert!(find(&root, Some("7.0.0")).unwrap_err().to_string().contains("no /boot/vmlinuz-7.0.0"));
        assert!(find(&root, Some("5")).unwrap_err().to_string().contains("there is 6.1.0-9-amd64, 6.1.0-56"));
    }

    #[test]
    fn the_configuration_is_asked_about_zstd() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("boot")).unwrap();
        let root = Root::new(dir.path());
        assert_eq!(unpacks_zstd(&root, "1").unwrap(), None);
        fs::write(dir.path().join("boot/config-1"), "CONFIG_A=y\nCONFIG_RD_ZSTD=y\n").unwrap();
        fs::write(dir.path().join("boot/config-2"), "# CONFIG_RD_ZSTD is not set\n").unwrap();
        assert_eq!(unpacks_zstd(&root, "1").unwrap(), Some(true));
        assert_eq!(unpacks_zstd(&root, "2").unwrap(), Some(false));
    }
}
