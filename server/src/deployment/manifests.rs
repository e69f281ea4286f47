//! Manifests of golden trees (see `docs/verify.md`): one for each wave, beside the logs of its deployment, made while the
//! tree is packed. A manifest that cannot be written holds no deployment up; the operator is told.

use super::expected;
use super::golden::Plan;
use anyhow::{Context, Result, bail};
use ka_archive::manifest::{Header, ManifestError, Writer};
use std::path::{Path, PathBuf};

const PREFIX: &str = "manifest-";
const SUFFIX: &str = ".mtree.zst";

/// Begins the manifest of a wave in the deployment's folder.
///
/// # Errors
/// When the file cannot be made.
pub fn begin(folder: &Path, deployment: &str, wave: u32, plan: &Plan) -> Result<Writer, ManifestError> {
    let header = Header {
        deployment: deployment.to_owned(),
        wave,
        root: plan.pack.root.clone(),
        mounts: plan.pack.mounts.clone().unwrap_or_default(),
        excludes: plan.pack.excludes.clone(),
        expected: expected::of_a_clone(&plan.layout, &plan.policy),
    };
    Writer::create(&folder.join(format!("{PREFIX}{wave}{SUFFIX}")), &header)
}

/// A manifest that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The deployment's name.
    pub deployment: String,
    /// The wave, from 1.
    pub wave: u32,
    /// The file.
    pub path: PathBuf,
}

/// All manifests below the log folder `base`, the oldest first: names of deployments begin with their time.
///
/// # Errors
/// When the folder cannot be read.
pub fn list(base: &Path) -> Result<Vec<Found>> {
    let mut all = Vec::new();
    for folder in entries(base)? {
        if !folder.is_dir() {
            continue;
        }
        let deployment = name(&folder);
        for path in entries(&folder)? {
            let file = name(&path);
            let number = file.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
            if let Some(wave) = number.and_then(|text| text.parse().ok()) {
                all.push(Found { deployment: deployment.clone(), wave, path });
            }
        }
    }
    all.sort_by(|a, b| (&a.deployment, a.wave).cmp(&(&b.deployment, b.wave)));
    Ok(all)
}

/// The last manifest, or the one of this deployment and this wave, as far as they are given.
///
/// # Errors
/// When there is none.
pub fn find(base: &Path, deployment: Option<&str>, wave: Option<u32>) -> Result<Found> {
    let all = list(base)?;
    let fits = |f: &&Found| deployment.is_none_or(|d| f.deployment == d) && wave.is_none_or(|w| f.wave == w);
    if let Some(found) = all.iter().rfind(fits) {
        return Ok(found.clone());
    }
    let of = deployment.map(|d| format!(" of deployment {d}")).unwrap_or_default();
    let wave = wave.map(|w| format!(" of wave {w}")).unwrap_or_default();
    bail!("there is no manifest{of}{wave} in {} (`ka-server verify --list` shows what is)", base.display())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let reading = || format!("reading {}", folder.display());
    let entries = std::fs::read_dir(folder).with_context(reading)?;
    entries.map(|entry| Ok(entry.with_context(reading)?.path())).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_manifest_or_the_one_that_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for (deployment, file) in [
            ("20260102-000000-aaaaaa", "manifest-1.mtree.zst"),
            ("20260102-000000-aaaaaa", "manifest-2.mtree.zst"),
            ("20260102-000000-aaaaaa", "manifest-10.mtree.zst"),
            ("20260102-000000-aaaaaa", "manifest-11.mtree.zst.unfinished"),
            ("20260102-000000-aaaaaa", "n1.log"),
            ("20260101-000000-bbbbbb", "manifest-7.mtree.zst"),
            ("20260103-000000-cccccc", "n1.log"),
        ] {
            std::fs::create_dir_all(folder.path().join(deployment)).unwrap();
            std::fs::write(folder.path().join(deployment).join(file), b"").unwrap();
        }
        std::fs::write(folder.path().join("a file"), b"").unwrap();
        let find = |deployment, wave| find(folder.path(), deployment, wave);
        let last = find(None, None).unwrap();
        assert_eq!((&last.deployment[..], last.wave), ("20260102-000000-aaaaaa", 10));
        assert!(last.path.ends_with("20260102-000000-aaaaaa/manifest-10.mtree.zst"));
        assert_eq!(find(None, Some(2)).unwrap().wave, 2);
        assert_eq!(find(Some("20260101-000000-bbbbbb"), None).unwrap().wave, 7);
        let error = find(Some("20260103-000000-cccccc"), Some(1)).unwrap_err().to_string();
        assert!(
            error.starts_with("there is no manifest of deployment 20260103-000000-cccccc of wave 1"),
            "{error}"
        );
        assert!(format!("{:#}", list(&folder.path().join("none")).unwrap_err()).contains("No such file"));
    }
}
