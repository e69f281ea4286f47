//! What the operator allows autoconfig to do, read from the options of `ka-server deploy`. Names that mean nothing are
//! refused here, before a node is touched.

use super::command::DeployArgs;
use anyhow::{Result, bail};
use ka_layout::order::{EfiBoot, Initramfs, Policy, SshKeys};
use ka_layout::pieces::{PIECES, WIPES};

/// Reads the policy.
///
/// # Errors
/// When an option has a value that means nothing.
pub fn policy(args: &DeployArgs) -> Result<Policy> {
    let mut skip = known("--skip", &args.skip, PIECES)?;
    let (paths, pieces): (Vec<String>, Vec<String>) =
        args.keep.iter().cloned().partition(|k| k.starts_with('/'));
    skip.extend(known("--keep", &pieces, PIECES)?);
    if let Some(path) =
        paths.iter().find(|p| p.trim_matches('/').is_empty() || p.split('/').any(|part| part == ".."))
    {
        bail!("--keep {path}: not a file or directory of the clone");
    }
    let only = known("--only", &args.only, PIECES)?;
    if let Some(both) = only.iter().find(|piece| skip.contains(piece)) {
        bail!("--only {both}: it is also to be skipped or kept");
    }
    Ok(Policy {
        skip,
        only,
        keep: paths,
        wipe: known("--wipe", &args.wipe, WIPES)?,
        ssh_keys: match args.ssh_keys.as_str() {
            "generate" => SshKeys::Generate,
            "keep" => SshKeys::Keep,
            other => bail!("--ssh-keys {other}: generate or keep"),
        },
        drop_fstab: args.drop_fstab.clone(),
        efi_boot: match args.efi_boot.as_str() {
            "disk-first" => EfiBoot::DiskFirst,
            "pxe-first" => EfiBoot::PxeFirst,
            "bootnext" => EfiBoot::BootNext,
            other => bail!("--efi-boot {other}: disk-first, pxe-first or bootnext"),
        },
        initramfs: match args.initramfs.as_str() {
            "auto" => Initramfs::Auto,
            "always" => Initramfs::Always,
            "never" => Initramfs::Never,
            other => bail!("--initramfs {other}: auto, always or never"),
        },
    })
}

fn known(option: &str, names: &[String], all: &[&str]) -> Result<Vec<String>> {
    if let Some(name) = names.iter().find(|name| !all.contains(&name.as_str())) {
        bail!("{option} {name}: one of {}", all.join(", "));
    }
    Ok(names.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(change: impl FnOnce(&mut DeployArgs)) -> Result<Policy> {
        let mut args = DeployArgs {
            ssh_keys: "generate".into(),
            efi_boot: "disk-first".into(),
            initramfs: "auto".into(),
            ..DeployArgs::default()
        };
        change(&mut args);
        policy(&args)
    }

    #[test]
    fn pieces_paths_and_wipes_are_told_apart() {
        let policy = args(|a| {
            a.skip = vec!["hostname".into()];
            a.keep = vec!["machine-id".into(), "/etc/lvm".into()];
            a.wipe = vec!["logs".into()];
            a.efi_boot = "bootnext".into();
        })
        .unwrap();
        assert_eq!(policy.skip, ["hostname", "machine-id"]);
        assert_eq!(
            (&policy.keep[..], &policy.wipe[..]),
            (&["/etc/lvm".to_owned()][..], &["logs".to_owned()][..])
        );
        assert_eq!(policy.efi_boot, EfiBoot::BootNext);
        assert_eq!(args(|a| a.only = vec!["fstab".into()]).unwrap().only, ["fstab"]);
    }

    #[test]
    fn names_that_mean_nothing_are_refused() {
        let refused = |change: fn(&mut DeployArgs), wanted: &str| {
            let error = args(change).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        };
        refused(|a| a.skip = vec!["hostnames".into()], "--skip hostnames: one of fstab, ");
        refused(|a| a.only = vec!["x".into()], "--only x");
        refused(|a| a.keep = vec!["etc/x".into()], "--keep etc/x");
        refused(|a| a.keep = vec!["/".into()], "--keep /");
        refused(|a| a.keep = vec!["/etc/../x".into()], "--keep /etc/../x");
        refused(|a| a.wipe = vec!["everything".into()], "--wipe everything: one of logs, ");
        refused(|a| a.efi_boot = "x".into(), "bootnext");
        refused(
            |a| {
                a.only = vec!["fstab".into()];
                a.keep = vec!["fstab".into()];
            },
            "--only fstab",
        );
    }
}
