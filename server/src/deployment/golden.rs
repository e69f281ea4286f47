//! The golden node as the deployment sees it: its layout, what its tree needs, what it calls itself, the operator's
//! hooks.

use super::command::DeployArgs;
use super::raw::{self, RawSource};
use super::{expected, fstab, withheld};
use anyhow::{Context, Result, bail};
use ka_archive::PackOptions;
use ka_layout::model::Layout;
use ka_layout::order::{Golden, Hook, HookPlace, Policy, Used};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Hooks are sent to every node over control; more than this in all is a mistake.
const HOOKS_LIMIT: u64 = 16 << 20;

/// What a deployment sends and orders.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The layout, checked.
    pub layout: Layout,
    /// Its text.
    pub layout_text: String,
    /// The golden node.
    pub golden: Golden,
    /// What is packed.
    pub pack: PackOptions,
    /// What autoconfig may do.
    pub policy: Policy,
    /// The hooks.
    pub hooks: Vec<Hook>,
    /// What comes into raw partitions.
    pub raw: Vec<RawSource>,
    /// Things that the operator should know.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Looks at the golden node.
    ///
    /// # Errors
    /// Names what is wrong with the options, the layout or the tree.
    pub fn make(args: &DeployArgs) -> Result<Self> {
        let root =
            args.root.canonicalize().with_context(|| format!("opening --root {}", args.root.display()))?;
        let live = root == Path::new("/");
        let mut warnings = Vec::new();
        let mut filesystems = Vec::new();
        let (layout_text, captured) = match &args.layout {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("reading the layout file {}", path.display()))?;
                (Some(text), live)
            }
            None if live => (None, true),
            None => bail!(
                "--root {} is not this running machine: its layout must be given by --layout",
                root.display()
            ),
        };
        let mut text = layout_text.unwrap_or_default();
        if captured {
            match ka_layout::capture::capture(None) {
                Ok(captured) => {
                    filesystems = captured.golden_filesystems;
                    if args.layout.is_none() {
                        warnings.extend(captured.warnings.iter().cloned());
                        text = ka_layout::write::to_toml(&captured.layout, &captured.warnings);
                    }
                }
                // With a layout file the capture only adds facts (old names of devices); without them names are
                // resolved less well, which autoconfig says where it matters.
                Err(e) if args.layout.is_some() => {
                    warnings.push(format!("the running layout is not known: {e:#}"));
                }
                Err(e) => {
                    return Err(e).context("capturing the layout of this machine (or give one by --layout)");
                }
            }
        }
        let layout = ka_layout::parse::parse(&text).with_context(|| match &args.layout {
            Some(path) => format!("the layout file {}", path.display()),
            None => "the captured layout".to_owned(),
        })?;
        let mounts: Vec<String> = layout.mount_paths().collect();
        if args.sends_tree() && !mounts.iter().any(|m| m == "/") {
            bail!("the layout mounts nothing at /");
        }
        let raw = raw_sources(args, &layout, live)?;
        let mut pack = pack_options(args, &root, &mounts)?;
        pack.excludes.extend(not_sent(&layout, args.sends_tree())?);
        let used = if args.sends_tree() { measure(&pack)? } else { BTreeMap::new() };
        let os_release = os_release(&root);
        let hostname = first_line(&root.join("etc/hostname")).unwrap_or_default();
        let golden = Golden {
            hostname,
            os_release,
            arch: std::env::consts::ARCH.to_owned(),
            filesystems,
            used,
            raw: raw.iter().map(|source| source.content.clone()).collect(),
        };
        let hooks = hooks(args)?;
        if args.sends_tree() {
            match std::fs::read_to_string(root.join("etc/fstab")) {
                Ok(text) => {
                    let named =
                        |key: &str, value: &Option<String>| value.as_ref().map(|v| format!("{key}={v}"));
                    let names =
                        golden.raw.iter().flat_map(|r| [named("UUID", &r.uuid), named("LABEL", &r.label)]);
                    let brought: Vec<String> = names.flatten().collect();
                    let mounts = mounts.into_iter().collect();
                    warnings.extend(fstab::warnings(&text, &mounts, &args.drop_fstab, &brought));
                }
                // The clone gets the layout's lines.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => warnings.push(format!("reading /etc/fstab of the golden tree: {e}")),
            }
        }
        Ok(Self {
            layout,
            layout_text: text,
            golden,
            pack,
            policy: super::policy::policy(args)?,
            hooks,
            raw,
            warnings,
        })
    }

    /// Plain bytes that are about to be sent, for the display.
    #[must_use]
    pub fn total(&self) -> u64 {
        let raw = self.golden.raw.iter().map(|r| r.bytes);
        self.golden.used.values().map(|u| u.bytes).chain(raw).sum()
    }
}

/// What is sent block for block behind the tree.
///
/// # Errors
/// As [`raw::sources`], and when the stream is not made here.
fn raw_sources(args: &DeployArgs, layout: &Layout, live: bool) -> Result<Vec<RawSource>> {
    if !args.sends_tree()
        && let Some((index, _)) = layout.raw_partitions().next()
    {
        bail!(
            "{} is raw, but a command or file gives one tar stream and no blocks: send a tree",
            layout.partition_text(index)
        );
    }
    raw::sources(layout, &args.raw, live)
}

/// Patterns for what preserved partitions hold: it belongs to the node.
///
/// # Errors
/// When the stream is not made here: it would be unpacked over that.
fn not_sent(layout: &Layout, sends_tree: bool) -> Result<Vec<String>> {
    let kept: Vec<&str> = layout.preserved_paths().collect();
    if !sends_tree && !kept.is_empty() {
        bail!(
            "the layout preserves what is mounted at {}, and nobody knows whether the stream of a command or file would be \
             unpacked over it; send a tree, or preserve it without a mount",
            kept.join(", ")
        );
    }
    Ok(kept.into_iter().map(|path| format!("{}/*", expected::escaped(path))).collect())
}

/// Which file systems are sent, and what is left out: those of the layout that are mounted below the root now.
fn pack_options(args: &DeployArgs, root: &Path, mounts: &[String]) -> Result<PackOptions> {
    use std::os::unix::fs::MetadataExt;
    let mut sent = vec!["/".to_owned()];
    for mount in mounts.iter().filter(|m| *m != "/") {
        let path = root.join(mount.trim_start_matches('/'));
        let parent = path.parent().unwrap_or(root);
        // A separate file system in the layout may be a plain directory of the golden tree: then it is walked anyway.
        let separate = match (std::fs::metadata(&path), std::fs::metadata(parent)) {
            (Ok(a), Ok(b)) => a.dev() != b.dev(),
            _ => false,
        };
        if separate {
            sent.push(mount.clone());
        }
    }
    let mut excludes = ka_archive::default_excludes(&sent);
    if root == Path::new("/") {
        excludes.extend(ka_archive::active_swap_files().context("reading /proc/swaps")?);
    }
    excludes.extend(withheld::patterns(args, root)?);
    excludes.extend(args.exclude.iter().cloned());
    Ok(PackOptions {
        root: root.to_path_buf(),
        mounts: Some(sent),
        excludes,
        skip_unreadable: args.skip_unreadable,
    })
}

/// What the tree needs on each file system that is sent. A directory of the golden tree that the layout gives a file
/// system of its own still counts for the one that it lies on now.
fn measure(pack: &PackOptions) -> Result<BTreeMap<String, Used>> {
    let used = ka_archive::measure(pack).context("measuring the golden tree")?;
    Ok(used.into_iter().map(|(path, n)| (path, Used { bytes: n.bytes, inodes: n.inodes })).collect())
}

fn first_line(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().next().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty())
}

/// `/etc/os-release`, unquoted; empty when there is none.
fn os_release(root: &Path) -> BTreeMap<String, String> {
    let text = ["etc/os-release", "usr/lib/os-release"]
        .iter()
        .find_map(|p| std::fs::read_to_string(root.join(p)).ok())
        .unwrap_or_default();
    text.lines()
        .filter_map(|l| l.trim().split_once('='))
        .filter(|(key, _)| !key.starts_with('#'))
        .map(|(key, value)| (key.to_owned(), value.trim_matches(|c| c == '"' || c == '\'').to_owned()))
        .collect()
}

/// The hooks in name order: executable files whose names are made of letters, digits, `-`, `_` and `.`, as run-parts
/// takes them. Those ending in `.host` run in the initramfs.
fn hooks(args: &DeployArgs) -> Result<Vec<Hook>> {
    let default = Path::new("/etc/ka/hooks.d");
    let folder = match &args.hooks {
        Some(folder) => folder.as_path(),
        None if default.is_dir() => default,
        None => return Ok(Vec::new()),
    };
    let reading = || format!("reading the hooks in {}", folder.display());
    let mut hooks = Vec::new();
    let mut total = 0;
    for entry in std::fs::read_dir(folder).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        let metadata = std::fs::metadata(entry.path()).with_context(reading)?;
        if !plain
            || name.starts_with('.')
            || !metadata.is_file()
            || metadata.permissions().mode() & 0o111 == 0
        {
            log::info!("{} is no hook: not an executable file with a plain name", entry.path().display());
            continue;
        }
        total += metadata.len();
        if total > HOOKS_LIMIT {
            bail!("the hooks in {} have more than {} MiB", folder.display(), HOOKS_LIMIT >> 20);
        }
        let program = std::fs::read(entry.path()).with_context(reading)?;
        let place = if name.ends_with(".host") { HookPlace::Host } else { HookPlace::Target };
        hooks.push(Hook { name, program, place });
    }
    hooks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(hooks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_preserved_is_not_sent_over() {
        let text = "version = 1\n[[disk]]\nname = 'd'\ntable = 'gpt'\n\
            [[partition]]\ntype = 'linux'\nsize = '1G'\nformat = { fs = 'ext4' }\nmount = { path = '/' }\n\
            [[partition]]\nnumber = 5\ntype = 'linux'\nsize = 'fill'\npreserve = true\nmount = { path = '/srv/d[1]' }\n";
        let layout = ka_layout::parse::parse(text).unwrap();
        let patterns = not_sent(&layout, true).unwrap();
        assert_eq!(patterns, ["/srv/d[[]1[]]/*"]);
        let root = tempfile::tempdir().unwrap();
        for folder in ["srv/d[1]", "srv/d1"] {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
            std::fs::write(root.path().join(folder).join("mine"), "x").unwrap();
        }
        let pack = PackOptions {
            root: root.path().to_path_buf(),
            mounts: None,
            excludes: patterns,
            skip_unreadable: false,
        };
        // The three directories, /srv/d1/mine, and the root.
        let inodes: u64 = measure(&pack).unwrap().values().map(|u| u.inodes).sum();
        assert_eq!(inodes, 5);
        let error = not_sent(&layout, false).unwrap_err().to_string();
        assert!(error.contains("mounted at /srv/d[1],"), "{error}");
        let without = ka_layout::parse::parse(&text.replace("mount = { path = '/srv/d[1]' }\n", "")).unwrap();
        assert!(not_sent(&without, false).unwrap().is_empty());
    }
}
