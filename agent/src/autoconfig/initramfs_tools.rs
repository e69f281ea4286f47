//! The programs by which distributions build an initramfs, what their images are called, and how to look into one.

use super::Context;
use anyhow::{Context as _, Result, bail};
use std::path::PathBuf;
use std::time::Duration;

/// Building for all kernels; 280 s were measured on a loaded virtual machine.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);
const LIST_LIMIT: Duration = Duration::from_secs(300);
const BINS: &[&str] = &["/usr/sbin", "/usr/bin", "/sbin"];

/// A builder of initramfs images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Builder {
    /// Debian, Ubuntu.
    InitramfsTools,
    /// Arch.
    Mkinitcpio,
    /// Fedora, RHEL, openSUSE, SLE, and others where it is installed.
    Dracut,
}

/// A kernel that can boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its version, as its modules' directory is called.
    pub version: String,
    /// Its initramfs, where it was found.
    pub image: Option<String>,
}

impl Builder {
    /// The clone's; none when it has none.
    pub fn find(context: &Context) -> Option<Self> {
        let all = [
            (Self::InitramfsTools, "update-initramfs"),
            (Self::Mkinitcpio, "mkinitcpio"),
            (Self::Dracut, "dracut"),
        ];
        let is_there = |(builder, name): &(Self, &str)| {
            installed(context, name).is_some()
                && (*builder != Self::InitramfsTools || has_initramfs_tools(context))
        };
        all.into_iter().find(is_there).map(|(builder, _)| builder)
    }

    /// The program that lists what is in an image.
    const fn lister(self) -> &'static str {
        match self {
            Self::InitramfsTools => "lsinitramfs",
            Self::Mkinitcpio => "lsinitcpio",
            Self::Dracut => "lsinitrd",
        }
    }

    /// What is in `image`, one path at the end of each line; none when the clone cannot tell.
    ///
    /// # Errors
    /// When the program fails.
    pub fn list(self, context: &Context, image: &str) -> Result<Option<String>> {
        let lister = self.lister();
        if !context.root.exists(image) || installed(context, lister).is_none() {
            return Ok(None);
        }
        let output = context.ask(lister, &[image], LIST_LIMIT).with_context(|| format!("listing {image}"))?;
        Ok(Some(output.text()))
    }

    /// Builds the images of all kernels anew.
    ///
    /// # Errors
    /// When the program fails.
    pub fn build(self, context: &Context, kernels: &[Kernel]) -> Result<()> {
        match self {
            Self::InitramfsTools => {
                context.run("update-initramfs", &["-u", "-k", "all"], BUILD_LIMIT)?;
            }
            Self::Mkinitcpio => {
                context.run("mkinitcpio", &["-P"], BUILD_LIMIT)?;
            }
            Self::Dracut => {
                if kernels.is_empty() {
                    bail!("the clone has no kernel with modules to build one for");
                }
                for kernel in kernels {
                    // Not for this host only: nothing here has udev's database, from which dracut learns what the host needs.
                    let mut words = vec!["--force", "--no-hostonly", "--kver", kernel.version.as_str()];
                    words.extend(kernel.image.as_deref());
                    if kernel.image.is_some() {
                        // `dracut [options] IMAGE VERSION`
                        words = vec!["--force", "--no-hostonly", words[4], kernel.version.as_str()];
                    }
                    context.run("dracut", &words, BUILD_LIMIT)?;
                }
            }
        }
        Ok(())
    }
}

/// Where the clone has the program.
fn installed(context: &Context, name: &str) -> Option<String> {
    BINS.iter().map(|dir| format!("{dir}/{name}")).find(|path| context.root.exists(path))
}

/// Whether `update-initramfs` is that of initramfs-tools: Debian's and Ubuntu's dracut brings one too, which calls dracut, and
/// `mkinitramfs` may be left from before.
fn has_initramfs_tools(context: &Context) -> bool {
    let calls_it = || {
        let script = installed(context, "update-initramfs").map(|path| context.root.read_text(path));
        matches!(script, Some(Ok(Some(text))) if text.contains("mkinitramfs"))
    };
    installed(context, "mkinitramfs").is_some() && (installed(context, "dracut").is_none() || calls_it())
}

/// The clone's kernels with their images. Rescue kernels are left out: their images are made once for any machine.
///
/// # Errors
/// When a directory cannot be listed.
pub fn kernels(context: &Context) -> Result<Vec<Kernel>> {
    let root = &context.root;
    let mut found: Vec<Kernel> = Vec::new();
    for path in root.matching("/boot", "vmlinuz-", "")? {
        let Some(name) = name_after(&path, "vmlinuz-").filter(|n| !n.contains("rescue")) else { continue };
        let version = version_of(context, &name)?;
        let names = [format!("initrd.img-{name}"), format!("initramfs-{name}.img"), format!("initrd-{name}")];
        let image = names.into_iter().map(|n| format!("/boot/{n}")).find(|path| root.exists(path));
        found.push(Kernel { version, image });
    }
    // Where `kernel-install` puts them: /boot/<machine id>/<version>/linux.
    for dir in super::entries::boot_dirs(context) {
        for token in
            root.list(&dir)?.iter().filter_map(|n| n.to_str()).filter(|n| super::machine_id::is_valid(n))
        {
            for version in root.list(format!("{dir}/{token}"))?.iter().filter_map(|n| n.to_str()) {
                let at = format!("{dir}/{token}/{version}");
                if root.exists(format!("{at}/linux")) && !version.contains("rescue") {
                    let image = Some(format!("{at}/initrd")).filter(|path| root.exists(path));
                    found.push(Kernel { version: version.to_owned(), image });
                }
            }
        }
    }
    Ok(found)
}

fn name_after(path: &std::path::Path, prefix: &str) -> Option<String> {
    path.file_name()?.to_str()?.strip_prefix(prefix).map(str::to_owned)
}

/// The version of a kernel file: Arch names it after the package (`vmlinuz-linux`), which stands beside its modules.
fn version_of(context: &Context, name: &str) -> Result<String> {
    for dir in ["/usr/lib/modules", "/lib/modules"] {
        for version in context.root.list(dir)? {
            let package = PathBuf::from(dir).join(&version).join("pkgbase");
            if context.root.read_text(&package)?.is_some_and(|text| text.trim() == name)
                && let Some(version) = version.to_str()
            {
                return Ok(version.to_owned());
            }
        }
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::testing::Lab;
    use super::*;

    fn found(lab: &Lab) -> Vec<(String, Option<String>)> {
        kernels(&lab.context()).unwrap().into_iter().map(|k| (k.version, k.image)).collect()
    }

    #[test]
    fn every_distributions_images_are_found() {
        let cases = [
            ("6.1.0-18-amd64", "/boot/initrd.img-6.1.0-18-amd64"),
            ("5.14.0-362.el9.x86_64", "/boot/initramfs-5.14.0-362.el9.x86_64.img"),
            ("6.4.0-150600.21-default", "/boot/initrd-6.4.0-150600.21-default"),
        ];
        for (version, image) in cases {
            let lab = Lab::new();
            lab.file(&format!("/boot/vmlinuz-{version}"), "k")
                .file(image, "i")
                .file("/boot/vmlinuz-0-rescue-0123", "k");
            assert_eq!(found(&lab), [(version.to_owned(), Some(image.to_owned()))]);
        }
        let arch = Lab::new();
        arch.file("/boot/vmlinuz-linux", "k").file("/boot/initramfs-linux.img", "i");
        arch.file("/usr/lib/modules/6.9.1-arch1-1/pkgbase", "linux\n")
            .file("/usr/lib/modules/6.6.30-1-lts/pkgbase", "linux-lts\n");
        assert_eq!(
            found(&arch),
            [("6.9.1-arch1-1".to_owned(), Some("/boot/initramfs-linux.img".to_owned()))]
        );
        let fedora = Lab::new();
        let at = "/boot/efi/0123456789abcdef0123456789abcdef/6.9.1-200.fc40.x86_64";
        fedora.file(&format!("{at}/linux"), "k").file(&format!("{at}/initrd"), "i");
        assert_eq!(found(&fedora), [("6.9.1-200.fc40.x86_64".to_owned(), Some(format!("{at}/initrd")))]);
    }

    #[test]
    fn each_builder_is_called_as_its_distribution_calls_it() {
        let kernel = Kernel { version: "5.14".into(), image: Some("/boot/initramfs-5.14.img".into()) };
        let none = Kernel { version: "5.15".into(), image: None };
        let cases = [
            ("/usr/sbin/update-initramfs", vec!["update-initramfs -u -k all"]),
            ("/usr/bin/mkinitcpio", vec!["mkinitcpio -P"]),
            (
                "/usr/bin/dracut",
                vec![
                    "dracut --force --no-hostonly /boot/initramfs-5.14.img 5.14",
                    "dracut --force --no-hostonly --kver 5.15",
                ],
            ),
        ];
        for (program, wanted) in cases {
            let lab = Lab::new();
            lab.file(program, "");
            if program.ends_with("update-initramfs") {
                lab.file("/usr/sbin/mkinitramfs", "");
            }
            let context = lab.pretending(|_| Ok(String::new()));
            Builder::find(&context).unwrap().build(&context, &[kernel.clone(), none.clone()]).unwrap();
            assert_eq!(context.ran(), wanted);
        }
        assert_eq!(Builder::find(&Lab::new().context()), None);
        let lab = Lab::new();
        assert!(Builder::Dracut.build(&lab.pretending(|_| Ok(String::new())), &[]).is_err());
    }

    #[test]
    fn dracuts_own_update_initramfs_is_dracut() {
        let wrapper = "#!/bin/sh\nexec dracut --force\n";
        let script = "#!/bin/sh\nmkinitramfs -o \"$1\"\n";
        let cases = [
            (wrapper, true, false, Some(Builder::Dracut)),
            (wrapper, true, true, Some(Builder::Dracut)),
            (script, true, true, Some(Builder::InitramfsTools)),
            (script, false, true, Some(Builder::InitramfsTools)),
            (script, false, false, None),
        ];
        for (text, dracut, mkinitramfs, wanted) in cases {
            let lab = Lab::new();
            lab.file("/usr/sbin/update-initramfs", text);
            for (path, is_there) in [("/usr/bin/dracut", dracut), ("/usr/sbin/mkinitramfs", mkinitramfs)] {
                if is_there {
                    lab.file(path, "");
                }
            }
            assert_eq!(Builder::find(&lab.context()), wanted, "{text} {dracut} {mkinitramfs}");
        }
    }

    #[test]
    fn an_image_that_cannot_be_listed_says_nothing() {
        let lab = Lab::new();
        lab.file("/boot/i", "x");
        let context =
            lab.pretending(|_| Ok("drwxr-xr-x  2 root root 0 usr/lib/modules/x/nvme.ko.xz\n".into()));
        assert_eq!(Builder::Dracut.list(&context, "/boot/i").unwrap(), None);
        lab.file("/usr/bin/lsinitrd", "");
        assert!(Builder::Dracut.list(&context, "/boot/i").unwrap().unwrap().contains("nvme"));
        assert_eq!(Builder::Dracut.list(&context, "/boot/none").unwrap(), None);
    }
}
