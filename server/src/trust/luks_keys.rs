//! Keys of the nodes' encrypted volumes, kept on the server. An operator gives one for a volume of all nodes
//! (`DIR/VOLUME.key`) or of one node (`DIR/NODE/VOLUME.key`); where there is none, a new passphrase is made for the node and
//! written there before the node hears of it, so that no volume exists that nobody can open.

use super::secret_file;
use anyhow::{Context, Result, bail, ensure};
use ka_layout::order::Secret;
use std::collections::BTreeMap;
use std::path::Path;

/// Letters that are not mistaken for each other; 5 bits each.
const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// 150 bits.
const LENGTH: usize = 30;

/// The keys of `volumes` on `node`.
///
/// # Errors
/// When a file cannot be read or written, is empty, or others than its owner can read it.
pub fn for_node<'a>(
    folder: &Path,
    node: &str,
    volumes: impl Iterator<Item = &'a str>,
) -> Result<BTreeMap<String, Secret>> {
    let mut keys = BTreeMap::new();
    for volume in volumes {
        let key = key(folder, node, volume).with_context(|| format!("the key of {volume} on {node}"))?;
        keys.insert(volume.to_owned(), key);
    }
    Ok(keys)
}

fn key(folder: &Path, node: &str, volume: &str) -> Result<Secret> {
    for name in [node, volume] {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            bail!("`{}` cannot be a file name", name.escape_debug());
        }
    }
    let file = format!("{volume}.key");
    let own = folder.join(node).join(&file);
    for path in [&own, &folder.join(&file)] {
        if let Some(text) = secret_file::read(path)? {
            // What is typed at a prompt ends without a newline.
            let text = text.strip_suffix('\n').unwrap_or(&text);
            ensure!(!text.is_empty(), "{} is empty", path.display());
            return Ok(Secret::new(text.as_bytes().to_vec()));
        }
    }
    let text = passphrase()?;
    secret_file::write(&own, &format!("{text}\n"), false)?;
    log::info!("made a key for {volume} on {node}: {}", own.display());
    Ok(Secret::new(text.into_bytes()))
}

fn passphrase() -> Result<String> {
    let random = ka_chain::seal::random::<LENGTH>().context("making a passphrase")?;
    let letters: Vec<char> = random.iter().map(|b| char::from(LETTERS[usize::from(b % 32)])).collect();
    Ok(letters.chunks(5).map(|five| five.iter().collect::<String>()).collect::<Vec<_>>().join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(folder: &Path, node: &str) -> Result<String> {
        let keys = for_node(folder, node, ["crypt"].into_iter())?;
        Ok(String::from_utf8(keys["crypt"].bytes().to_vec()).unwrap())
    }

    #[test]
    fn each_node_gets_its_own_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = only(dir.path(), "n1").unwrap();
        assert_eq!(first.len(), LENGTH + 5);
        assert_ne!(only(dir.path(), "n2").unwrap(), first);
        assert_eq!(only(dir.path(), "n1").unwrap(), first);
        let written = std::fs::read_to_string(dir.path().join("n1/crypt.key")).unwrap();
        assert_eq!(written, format!("{first}\n"));
        let keys = for_node(dir.path(), "n1", ["crypt"].into_iter()).unwrap();
        assert!(!format!("{keys:?}").contains(&first), "no log may show it");
    }

    #[test]
    fn what_the_operator_gives_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        secret_file::write(&dir.path().join("crypt.key"), "for all\n", false).unwrap();
        assert_eq!(only(dir.path(), "n1").unwrap(), "for all");
        secret_file::write(&dir.path().join("n1/crypt.key"), "for one", false).unwrap();
        assert_eq!(only(dir.path(), "n1").unwrap(), "for one");
        assert_eq!(only(dir.path(), "n2").unwrap(), "for all");
        secret_file::write(&dir.path().join("n3/crypt.key"), "\n", false).unwrap();
        assert!(format!("{:#}", only(dir.path(), "n3").unwrap_err()).ends_with("n3/crypt.key is empty"));
        secret_file::write_public(&dir.path().join("n4/crypt.key"), "x", false).unwrap();
        assert!(only(dir.path(), "n4").is_err(), "others can read it");
        assert!(only(dir.path(), "../n1").is_err());
    }
}
