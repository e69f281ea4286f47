//! What of the server's own is not sent: keys and tokens; from a live golden node or a tree that holds them states, logs and
//! boot files, too. A clone that holds the keys could pose as the server, or open other nodes' disks.

use super::command::DeployArgs;
use super::expected;
use crate::trust::{key_file, token_file};
use anyhow::{Context, Result, bail};
use std::path::{Component, Path, PathBuf};

/// The server's own folder, where its state and keys are unless options say otherwise.
const OWN: &str = "/var/lib/ka";

/// Globs of what is left out below `root`; those of directories leave the directories themselves, empty.
///
/// # Errors
/// When a path cannot be looked up, is no UTF-8, or would leave out everything.
pub fn patterns(args: &DeployArgs, root: &Path) -> Result<Vec<String>> {
    let beside = |name: &str| args.state.with_file_name(name);
    let mut secrets = vec![Path::new(key_file::FOLDER).join(key_file::SECRET)];
    secrets.extend([beside(key_file::SECRET), beside(token_file::NAME)]);
    secrets.extend(args.key_file.clone());
    let others = [args.state.clone(), args.state.with_extension("lock"), args.state.with_extension("sock")];
    let folders = [("luks-keys", &args.luks_keys), ("log-dir", &args.log_dir), ("boot-dir", &args.boot_dir)];

    // Also what earlier deployments with other options left there: keys of nodes, tokens.
    let own = globs(Path::new(OWN), root, true).with_context(|| format!("leaving out {OWN}"))?;
    let mut found: Vec<String> = own.into_iter().map(|glob| format!("{glob}/*")).collect();
    for (option, folder) in folders {
        let secret = option == "luks-keys";
        let globs =
            globs(folder, root, secret).with_context(|| format!("--{option} {}", folder.display()))?;
        if globs.iter().any(String::is_empty) {
            bail!("--{option} {}: the whole machine would be left out", folder.display());
        }
        found.extend(globs.into_iter().map(|glob| format!("{glob}/*")));
    }
    for (file, secret) in
        secrets.iter().map(|file| (file, true)).chain(others.iter().map(|file| (file, false)))
    {
        found.extend(globs(file, root, secret).with_context(|| format!("leaving out {}", file.display()))?);
    }
    Ok(found)
}

/// The globs of what lies at `path` of this machine, if that is below `root`. A `secret` is left out at the same path in any
/// tree, too: it may be a snapshot of this machine.
fn globs(path: &Path, root: &Path, secret: bool) -> Result<Vec<String>> {
    let mut places = vec![real(path)?];
    if secret && root != Path::new("/") {
        places.push(std::path::absolute(path).context("finding the working directory")?);
    }
    let mut found = Vec::new();
    for place in places {
        let below = place.strip_prefix(root).map(|below| Path::new("/").join(below));
        match below {
            Ok(below) => found.push(pattern(&below)?),
            Err(_) if secret => found.push(pattern(&place)?),
            Err(_) => {}
        }
    }
    Ok(found)
}

/// The glob of an absolute path as the walk meets it, without a slash at its end. Empty for `/`.
fn pattern(path: &Path) -> Result<String> {
    let plain: PathBuf = path.components().collect();
    let text = plain.to_str().context("the path is no UTF-8")?;
    Ok(expected::escaped(text.trim_end_matches('/')))
}

/// A path without links, as far as it is there; the rest may be made later.
fn real(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).context("finding the working directory")?;
    for there in path.ancestors() {
        match std::fs::canonicalize(there) {
            Ok(real) => {
                let rest = path.strip_prefix(there).unwrap_or(Path::new(""));
                if rest.components().any(|part| part == Component::ParentDir) {
                    bail!("`..` stands in a part of the path that is not there");
                }
                // Joining nothing would add a slash.
                return Ok(if rest.as_os_str().is_empty() { real } else { real.join(rest) });
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("looking up {}", there.display())),
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use argh::FromArgs as _;
    use ka_archive::PackOptions;
    use std::fs;

    /// What of the tree below `root` is sent, of the files in it.
    fn sent(root: &Path, excludes: Vec<String>) -> u64 {
        let pack = PackOptions { root: root.to_path_buf(), excludes, ..PackOptions::default() };
        ka_archive::measure(&pack).unwrap().values().map(|used| used.inodes).sum()
    }

    #[test]
    fn however_a_path_is_written_what_lies_there_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("srv/keys[1]/n01")).unwrap();
        fs::write(root.join("srv/keys[1]/n01/crypt.key"), "secret").unwrap();
        std::os::unix::fs::symlink("srv/keys[1]", root.join("link")).unwrap();
        let relative = |path: &str| {
            let up = "../".repeat(std::env::current_dir().unwrap().components().count());
            format!("{up}{}", root.join(path).display())
        };
        let ways = [
            root.join("srv/keys[1]/").display().to_string(),
            root.join("srv//keys[1]").display().to_string(),
            root.join("srv/../srv/keys[1]").display().to_string(),
            root.join("link").display().to_string(),
            root.join("link/").display().to_string(),
            relative("srv/keys[1]"),
        ];
        for way in ways {
            let found = globs(Path::new(&way), &root, false).unwrap();
            assert_eq!(found, ["/srv/keys[[]1[]]"], "{way}");
            // The root, the link, srv and the directory of the keys.
            assert_eq!(sent(&root, vec![format!("{}/*", found[0])]), 4, "{way}");
        }
        assert_eq!(globs(&root.join("srv/later/x"), &root, false).unwrap(), ["/srv/later/x"]);
        assert!(globs(&root.join("none/../x"), &root, false).is_err());
        assert_eq!(globs(Path::new("//"), Path::new("/"), true).unwrap(), [""]);
    }

    #[test]
    fn a_snapshot_of_this_machine_holds_its_secrets_too() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let args = DeployArgs::from_args(&["ka-server"], &["--boot-dir", "/opt"]).unwrap();
        let found = patterns(&args, &root).unwrap();
        for glob in [
            "/etc/ka/server.key",
            "/var/lib/ka/server.key",
            "/var/lib/ka/tokens.json",
            "/var/lib/ka/luks-keys/*",
        ] {
            assert!(found.iter().any(|f| f == glob), "{glob}: {found:?}");
        }
        // Keys of earlier deployments are left out, whatever this one is told.
        let other =
            DeployArgs::from_args(&["ka-server"], &["--luks-keys", "/k", "--state", "/s/n.json"]).unwrap();
        for root in [root.as_path(), Path::new("/")] {
            assert!(patterns(&other, root).unwrap().contains(&"/var/lib/ka/*".to_owned()));
        }
        // What is no secret may be something else in another tree.
        assert!(found.iter().all(|glob| !glob.starts_with("/opt")), "{found:?}");
        let live = patterns(&args, Path::new("/")).unwrap();
        assert!(live.contains(&"/opt/*".to_owned()) && live.contains(&"/var/lib/ka/nodes.json".to_owned()));
    }

    #[test]
    fn a_state_file_in_the_working_directory_hides_itself_and_no_more() {
        let args = DeployArgs::from_args(&["ka-server"], &["--state", "nodes.json"]).unwrap();
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        let found = patterns(&args, Path::new("/")).unwrap();
        for name in ["nodes.json", "nodes.lock", "nodes.sock", "server.key", "tokens.json"] {
            assert!(found.contains(&here.join(name).display().to_string()), "{name}: {found:?}");
        }
        assert!(found.iter().all(|glob| !glob.starts_with("/*") && !glob.starts_with("*")), "{found:?}");
        let args = DeployArgs::from_args(&["ka-server"], &["--luks-keys", "/"]).unwrap();
        assert!(patterns(&args, Path::new("/")).unwrap_err().to_string().contains("the whole machine"));
    }
}
