//! What is baked into the initramfs so that nodes trust one server only, and are let in by it: its key, and perhaps a
//! shared token. The key is no secret; with the token in it the initramfs is one.

use anyhow::{Context, Result};
use ka_chain::keys::{PublicKey, Token};
use ka_initrd::tree::{Content, Part, Tree};
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Where the agent looks for the key.
const KEY: &str = "/etc/ka/server.pub";
/// Where the agent looks for the token.
const TOKEN: &str = "/etc/ka/token";
/// The longest token file that is looked at, in bytes.
const LIMIT: u64 = 4096;

/// A key, a token, both or none.
#[derive(Debug, Default)]
pub struct Baked {
    key: Option<PublicKey>,
    token: Option<Token>,
}

impl Baked {
    /// From the command line's words; an error is a usage error.
    pub fn read(key: Option<&str>, token_file: Option<&str>) -> Result<Self> {
        let token = token_file.map(|path| {
            let mut text = String::new();
            if path == "-" {
                std::io::stdin().take(LIMIT).read_to_string(&mut text).context("reading standard input")?;
            } else {
                let file = fs::File::open(path).with_context(|| format!("opening {path}"))?;
                file.take(LIMIT).read_to_string(&mut text).with_context(|| format!("reading {path}"))?;
            }
            Ok::<_, anyhow::Error>(text.parse()?)
        });
        Ok(Self {
            key: key.map(str::parse).transpose().context("--key")?,
            token: token.transpose().context("--token-file")?,
        })
    }

    /// Puts them where the agent looks.
    pub fn place(&self, tree: &mut Tree) -> Result<()> {
        if let Some(key) = self.key {
            tree.text(KEY, &format!("{key}\n"), Part::Included)?;
        }
        if let Some(token) = &self.token {
            let bytes = (token.to_word() + "\n").into_bytes();
            tree.file(TOKEN, 0o600, Content::Bytes(bytes), Part::Included)?;
        }
        Ok(())
    }

    /// What the operator must know.
    pub fn warning(&self) -> Option<String> {
        self.token.is_some().then(|| {
            "initrd.img holds a token: whoever can read it can register as a node. Put it on media that are kept in a \
             safe; the PXE service would hand it to everybody on its network"
                .to_owned()
        })
    }

    /// Keeps an initramfs with a token in it to its owner.
    pub fn protect(&self, initrd: &Path) -> Result<()> {
        if self.token.is_none() {
            return Ok(());
        }
        fs::set_permissions(initrd, PermissionsExt::from_mode(0o600))
            .with_context(|| format!("setting the mode of {}", initrd.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ka_initrd::tree::Node;

    #[test]
    fn they_stand_where_the_agent_looks() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let (key, token) = ("1a".repeat(32), "2b".repeat(32));
        fs::write(&file, format!("{token}\n")).unwrap();
        let baked = Baked::read(Some(&key), file.to_str()).unwrap();
        let mut tree = Tree::new();
        baked.place(&mut tree).unwrap();
        for (path, word, mode) in [(KEY, key, 0o644), (TOKEN, token, 0o600)] {
            let entry = tree.get(path).unwrap();
            assert_eq!(
                (entry.mode, &entry.node),
                (mode, &Node::File(Content::Bytes((word + "\n").into_bytes())))
            );
        }
        fs::write(dir.path().join("initrd"), "").unwrap();
        baked.protect(&dir.path().join("initrd")).unwrap();
        let mode = fs::metadata(dir.path().join("initrd")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(baked.warning().unwrap().contains("holds a token") && !format!("{baked:?}").contains("2b2b"));
        assert!(Baked::default().warning().is_none());
    }

    #[test]
    fn wrong_words_are_named_and_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        fs::write(&file, "half-a-secret").unwrap();
        let error = |key, token| format!("{:#}", Baked::read(key, token).unwrap_err());
        assert!(error(Some("x"), None).contains("--key"));
        assert!(error(None, Some("/nowhere")).contains("--token-file"));
        let text = error(None, file.to_str());
        assert!(text.contains("--token-file") && !text.contains("half-a-secret"), "{text}");
    }
}
