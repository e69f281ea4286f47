//! Whom this node trusts, and what lets it in: the server's key and a token. A program takes them from its command line, the
//! token from a file, so that no secret stands where `ps` shows it. PID 1 takes them from the kernel command line or from
//! what was baked into the initramfs; a key that is baked in cannot be overruled by the network that the node boots from.

use crate::cmdline::Options;
use anyhow::{Context, Result, anyhow, bail};
use ka_chain::keys::{Credential, PublicKey, Token};
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Where a server's key is baked into the initramfs.
pub const KEY: &str = "etc/ka/server.pub";
/// Where a token is baked into the initramfs.
pub const TOKEN: &str = "etc/ka/token";
/// The longest file that is looked at, in bytes.
const LIMIT: u64 = 4096;

/// The server's key, the node's token, and the session that the server gave for later connections.
#[derive(Debug)]
pub struct Trust {
    /// The server's key.
    pub key: PublicKey,
    token: Token,
    session: Mutex<Option<Credential>>,
}

impl Trust {
    /// Trusts the server with this key, and is let in by this token.
    #[must_use]
    pub fn new(key: PublicKey, token: Token) -> Self {
        Self { key, token, session: Mutex::default() }
    }

    /// From `--key` and `--token-file`; `-` is standard input.
    ///
    /// # Errors
    /// Names the option and what is wrong with it.
    pub fn from_args(key: &str, token_file: &str) -> Result<Self> {
        let key = key.parse().context("--key")?;
        let text = if token_file == "-" {
            read_limited(std::io::stdin()).context("reading the token from standard input")
        } else {
            std::fs::File::open(token_file)
                .and_then(read_limited)
                .with_context(|| format!("reading {token_file}"))
        };
        let token = text.and_then(|text| Ok(text.parse()?)).context("--token-file")?;
        Ok(Self::new(key, token))
    }

    /// As PID 1: what the kernel command line says and what is baked in below `root`.
    ///
    /// # Errors
    /// When the key or the token is missing, or the command line names another key than the one that is baked in.
    pub fn from_boot(options: &Options, root: &Path) -> Result<Self> {
        let baked: Option<PublicKey> = baked(root, KEY)?;
        let key = match (baked, options.key) {
            (Some(baked), Some(given)) if baked != given => bail!(
                "the kernel command line names the server's key {given}, but this initramfs was built for {baked} and \
                 trusts no other: whoever answered this machine's boot request is not the server, or the server has a \
                 new key and the initramfs must be built anew"
            ),
            (Some(key), _) | (None, Some(key)) => key,
            (None, None) => bail!(
                "this node knows no server's key: neither ka.key= on the kernel command line nor /{KEY} in the initramfs"
            ),
        };
        // The command line's is this node's own; a baked one is shared.
        let token = match &options.token {
            Some(token) => token.clone(),
            None => baked_token(root)?,
        };
        Ok(Self::new(key, token))
    }

    /// What to show the server: the session, once there is one. The flag says whether it is that.
    #[must_use]
    pub fn credential(&self) -> (Credential, bool) {
        match &*self.session.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(session) => (session.clone(), true),
            None => (self.token.credential(), false),
        }
    }

    /// Keeps the session that the server gave, or forgets one that it does not take any more.
    pub fn keep(&self, session: Option<Credential>) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = session;
    }
}

fn baked_token(root: &Path) -> Result<Token> {
    baked(root, TOKEN)?.ok_or_else(|| {
        anyhow!("this node has no token: neither ka.token= on the kernel command line nor /{TOKEN} in the initramfs")
    })
}

/// A word that is baked into the initramfs, if it is there.
fn baked<T>(root: &Path, path: &str) -> Result<Option<T>>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let reading = || format!("reading /{path} of the initramfs");
    match std::fs::File::open(root.join(path)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(reading),
        Ok(file) => {
            let text = read_limited(file).with_context(reading)?;
            text.parse().map(Some).with_context(reading)
        }
    }
}

fn read_limited(file: impl Read) -> std::io::Result<String> {
    let mut text = String::new();
    file.take(LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(byte: &str) -> String {
        byte.repeat(32)
    }

    fn options(words: &str) -> Options {
        let options = Options::from_text(words);
        assert!(options.errors.is_empty(), "{:?}", options.errors);
        options
    }

    fn initramfs(key: Option<&str>, token: Option<&str>) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("etc/ka")).unwrap();
        for (path, word) in [(KEY, key), (TOKEN, token)] {
            if let Some(word) = word {
                std::fs::write(root.path().join(path), format!("{word}\n")).unwrap();
            }
        }
        root
    }

    fn shown(trust: &Trust) -> Credential {
        trust.credential().0
    }

    #[test]
    fn the_command_line_and_the_initramfs_are_read() {
        let both = format!("ka.key={} ka.token={}", word("1a"), word("2b"));
        let bare = initramfs(None, None);
        let trust = Trust::from_boot(&options(&both), bare.path()).unwrap();
        assert_eq!(trust.key.to_string(), word("1a"));
        assert_eq!(shown(&trust), word("2b").parse::<Token>().unwrap().credential());
        let full = initramfs(Some(&word("1a")), Some(&word("3c")));
        let trust = Trust::from_boot(&options(""), full.path()).unwrap();
        assert_eq!(shown(&trust), word("3c").parse::<Token>().unwrap().credential());
        let trust = Trust::from_boot(&options(&both), full.path()).unwrap();
        assert_eq!(shown(&trust), word("2b").parse::<Token>().unwrap().credential());
    }

    #[test]
    fn what_is_missing_or_contradicts_is_named() {
        let bare = initramfs(None, None);
        let error = |words: &str, root: &tempfile::TempDir| {
            format!("{:#}", Trust::from_boot(&options(words), root.path()).unwrap_err())
        };
        assert!(error("", &bare).contains("ka.key= on the kernel command line"));
        assert!(error(&format!("ka.key={}", word("1a")), &bare).contains("ka.token="));
        let full = initramfs(Some(&word("1a")), None);
        let text = error(&format!("ka.key={} ka.token={}", word("4d"), word("2b")), &full);
        assert!(text.contains(&word("1a")) && text.contains(&word("4d")), "{text}");
        let broken = initramfs(Some("nonsense"), None);
        assert!(error("", &broken).contains("/etc/ka/server.pub"));
    }

    #[test]
    fn a_program_reads_its_token_from_a_file() {
        let folder = initramfs(None, Some(&word("2b")));
        let file = folder.path().join(TOKEN);
        let trust = Trust::from_args(&word("1a"), file.to_str().unwrap()).unwrap();
        assert_eq!(shown(&trust), word("2b").parse::<Token>().unwrap().credential());
        assert!(!format!("{trust:?}").contains("2b2b"), "{trust:?}");
        for (key, path, name) in
            [("x", file.to_str().unwrap(), "--key"), (&word("1a"), "/nowhere", "--token-file")]
        {
            assert!(format!("{:#}", Trust::from_args(key, path).unwrap_err()).contains(name));
        }
        std::fs::write(&file, "secret-word").unwrap();
        let error = format!("{:#}", Trust::from_args(&word("1a"), file.to_str().unwrap()).unwrap_err());
        assert!(error.contains("--token-file") && !error.contains("secret-word"), "{error}");
    }

    #[test]
    fn the_session_takes_the_token_s_place() {
        let trust = Trust::new(word("1a").parse().unwrap(), word("2b").parse().unwrap());
        let session = Credential::generate().unwrap();
        trust.keep(Some(session.clone()));
        assert_eq!(trust.credential(), (session, true));
        trust.keep(None);
        assert!(!trust.credential().1);
    }
}
