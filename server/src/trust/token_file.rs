//! Tokens that outlive a program: shared and single ones made by `ka-server token`, and those that `ka-server boot` puts
//! into boot scripts for deployments to come. Several `ka-server`s may share the file; every change is made to what the
//! file holds at that moment, under a lock on a file beside it.

use super::tokens::{DeploymentId, Kind, Record, Refused, Tokens};
use super::{Pass, Tickets, now_ms, secret_file};
use crate::nodes::Mac;
use anyhow::{Context, Result, bail};
use ka_chain::keys::{Credential, CredentialId, PublicKey, Token, hex};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Its name in the folder of the state files.
pub const NAME: &str = "tokens.json";
/// The version of the file.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    tokens: Vec<StoredToken>,
}

#[derive(Serialize, Deserialize)]
struct StoredToken {
    token: String,
    kind: Kind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deployment: Option<String>,
    made_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spent_ms: Option<u64>,
}

type Stamp = (u64, u64, i64, i64);

/// The file.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    /// What it held when it was last read.
    seen: Mutex<Option<(Stamp, Tokens)>>,
}

impl TokenFile {
    /// The file in this folder; it need not be there.
    #[must_use]
    pub fn in_folder(folder: &Path) -> Self {
        Self { path: folder.join(NAME), seen: Mutex::default() }
    }

    /// The token behind an id, if it would be taken now.
    ///
    /// # Errors
    /// When the file cannot be read; inside, why the token is not taken.
    pub fn find(
        &self,
        id: &CredentialId,
        deployment: &DeploymentId,
        now: u64,
    ) -> Result<Result<(Credential, Kind), Refused>> {
        let stamp = match std::fs::metadata(&self.path) {
            Ok(m) => (m.ino(), m.size(), m.mtime(), m.mtime_nsec()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Err(Refused::Unknown)),
            Err(e) => return Err(e).with_context(|| format!("looking at {}", self.path.display())),
        };
        {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((known, tokens)) = &*seen
                && *known == stamp
            {
                return Ok(tokens.find(id, deployment, now));
            }
        }
        // Read without the lock; a file that changes meanwhile has another stamp and is read again.
        let tokens = self.read()?;
        let found = tokens.find(id, deployment, now);
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some((stamp, tokens));
        Ok(found)
    }

    /// Takes a token; see [`Tokens::spend`]. Of several programs that share the file one takes it.
    ///
    /// # Errors
    /// When the file cannot be read or written; inside, why the token is not taken.
    pub fn spend(
        &self,
        id: &CredentialId,
        deployment: &DeploymentId,
        mac: Option<Mac>,
        now: u64,
    ) -> Result<Result<(), Refused>> {
        self.change(|tokens| {
            let result = tokens.spend(id, deployment, mac, now);
            (result.map(drop), result == Ok(true))
        })
    }

    /// Makes a token that is good for any deployment.
    ///
    /// # Errors
    /// When the file cannot be read or written, or there are too many tokens.
    pub fn make(&self, kind: Kind, expires_ms: Option<u64>, now: u64) -> Result<Token> {
        let token = Token::generate().context("making a token")?;
        let record =
            Record { token: token.clone(), kind, deployment: None, made_ms: now, expires_ms, spent_ms: None };
        self.change(|tokens| (tokens.insert(record, now), true))??;
        Ok(token)
    }

    fn for_node(&self, mac: Mac, now: u64) -> Result<Token> {
        let fresh = Token::generate().context("making a token")?;
        let token = self.change(|tokens| match tokens.for_node(mac, None, fresh, now) {
            Ok((token, changed)) => (Ok(token), changed),
            Err(e) => (Err(e), false),
        })??;
        Ok(token)
    }

    /// Reads, changes and writes under the lock, which other programs wait for. `change` says whether to write.
    fn change<T>(&self, change: impl FnOnce(&mut Tokens) -> (T, bool)) -> Result<T> {
        let changing = || format!("changing {}", self.path.display());
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(changing)?;
        let lock = std::fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.path.with_extension("lock"))
            .with_context(changing)?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).with_context(changing)?;
        let mut tokens = self.read()?;
        let (result, changed) = change(&mut tokens);
        if changed {
            let stored = Stored { version: VERSION, tokens: tokens.records().map(store).collect() };
            let text = serde_json::to_string_pretty(&stored).with_context(changing)?;
            secret_file::write(&self.path, &(text + "\n"), true)?;
        }
        Ok(result)
    }

    fn read(&self) -> Result<Tokens> {
        let Some(text) = secret_file::read(&self.path)? else { return Ok(Tokens::default()) };
        parse(&text).with_context(|| format!("reading {}", self.path.display()))
    }
}

fn store(record: &Record) -> StoredToken {
    StoredToken {
        token: record.token.to_word(),
        kind: record.kind,
        deployment: record.deployment.map(|id| hex(&id)),
        made_ms: record.made_ms,
        expires_ms: record.expires_ms,
        spent_ms: record.spent_ms,
    }
}

fn parse(text: &str) -> Result<Tokens> {
    let stored: Stored = match serde_json::from_str(text) {
        Ok(stored) => stored,
        // What serde says may show a part of the text.
        Err(e) => bail!("line {} column {} is not as it must be", e.line(), e.column()),
    };
    if stored.version != VERSION {
        bail!("version {} is not known here (only {VERSION})", stored.version);
    }
    let mut tokens = Tokens::default();
    for entry in stored.tokens {
        let deployment = entry.deployment.as_deref().map(deployment_id).transpose()?;
        let record = Record {
            token: entry.token.parse()?,
            kind: entry.kind,
            deployment,
            made_ms: entry.made_ms,
            expires_ms: entry.expires_ms,
            spent_ms: entry.spent_ms,
        };
        // Nothing is forgotten while the file is read.
        tokens.insert(record, 0)?;
    }
    Ok(tokens)
}

fn deployment_id(text: &str) -> Result<DeploymentId> {
    let id = u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32);
    id.map(u128::to_be_bytes).context("a deployment's id has 32 hexadecimal digits")
}

/// The tickets of `ka-server boot`: tokens for whichever deployment the node finds.
#[derive(Debug)]
pub struct FileTickets {
    /// The server's key.
    pub key: PublicKey,
    /// Where the tokens are kept.
    pub file: TokenFile,
}

impl Tickets for FileTickets {
    fn pass(&self, mac: Mac) -> Result<Pass> {
        Ok(Pass { key: self.key, token: self.file.for_node(mac, now_ms())? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HERE: DeploymentId = [1; 16];

    #[test]
    fn tokens_are_known_to_every_program_and_spent_once() {
        let folder = tempfile::tempdir().unwrap();
        let boot = TokenFile::in_folder(folder.path());
        let deploy = TokenFile::in_folder(folder.path());
        let (single, shared) = (
            boot.make(Kind::Single, Some(1000), 1).unwrap().credential(),
            boot.make(Kind::Shared, None, 1).unwrap().credential(),
        );
        assert_eq!(deploy.find(&single.id, &HERE, 2).unwrap(), Ok((single.clone(), Kind::Single)));
        assert_eq!(deploy.find(&[0; 16], &HERE, 2).unwrap(), Err(Refused::Unknown));
        assert_eq!(deploy.find(&single.id, &HERE, 1000).unwrap(), Err(Refused::Expired));
        let results: Vec<_> = [&boot, &deploy]
            .map(|file| file.spend(&single.id, &HERE, None, 2).unwrap())
            .into_iter()
            .collect();
        assert_eq!(results, [Ok(()), Err(Refused::Spent)]);
        assert_eq!(deploy.find(&single.id, &HERE, 3).unwrap(), Err(Refused::Spent));
        for file in [&boot, &deploy, &boot] {
            assert_eq!(file.spend(&shared.id, &HERE, None, 2).unwrap(), Ok(()));
        }
        // Made after the file was read first.
        let mac = "52:54:00:00:00:01".parse().unwrap();
        let node = boot.for_node(mac, 5).unwrap();
        assert_eq!(boot.for_node(mac, 6).unwrap(), node);
        assert!(deploy.find(&node.credential().id, &HERE, 7).unwrap().is_ok());
        let mode = std::fs::metadata(folder.path().join(NAME)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_broken_file_is_an_error_that_shows_no_token() {
        let folder = tempfile::tempdir().unwrap();
        let file = TokenFile::in_folder(folder.path());
        let word = file.make(Kind::Shared, None, 1).unwrap().to_word();
        let path = folder.path().join(NAME);
        let good = std::fs::read_to_string(&path).unwrap();
        for bad in [
            good.replace(&word, &word[1..]),
            good.replace("\"version\": 1", "\"version\": 2"),
            good.replace("\"shared\"", &format!("\"{word}\"")),
            good[..good.len() / 2].to_owned(),
        ] {
            secret_file::write(&path, &bad, true).unwrap();
            let error = format!("{:#}", file.find(&[0; 16], &HERE, 2).unwrap_err());
            assert!(error.contains(NAME) && !error.contains(&word[2..20]), "{error}");
            assert!(file.make(Kind::Shared, None, 1).is_err());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), bad, "it stays as it is");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[{}\\[\\]\":,0-9a-z]{0,80}") {
            let _ = parse(&text);
        }

        #[test]
        fn every_record_survives(deployment: Option<[u8; 16]>, made_ms: u64, expires_ms: Option<u64>, spent_ms: Option<u64>) {
            let token = Token::generate().unwrap();
            let record = Record { token, kind: Kind::Single, deployment, made_ms, expires_ms, spent_ms };
            let stored = Stored { version: VERSION, tokens: vec![store(&record)] };
            let tokens = parse(&serde_json::to_string(&stored).unwrap()).unwrap();
            prop_assert_eq!(tokens.records().next(), Some(&record));
        }
    }
}
