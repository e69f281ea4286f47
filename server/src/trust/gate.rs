//! The gate of a deployment: who comes in with which credential. A node's first connection shows a token; later ones show
//! the session that it was given. Tokens of boot scripts live here as long as the deployment; shared and single ones are
//! in the token file. No lock is held while that file is read.

use super::token_file::TokenFile;
use super::tokens::{DeploymentId, Kind, Refused, Tokens};
use super::{Pass, Tickets, now_ms};
use crate::nodes::Mac;
use anyhow::{Context, Result};
use ka_chain::keys::{Credential, CredentialId, SecretKey, Token};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many sessions there are at most.
const SESSIONS: usize = 65_536;

/// Where a credential is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Session,
    Script,
    File,
}

/// A credential that would be taken.
#[derive(Debug, Clone)]
pub struct Known {
    /// What the node showed.
    pub used: Credential,
    /// What it is given for its later connections.
    pub next: Credential,
    origin: Origin,
}

#[derive(Debug)]
struct Session {
    credential: Credential,
    /// The machine to which it belongs; none for those that only receive.
    mac: Option<Mac>,
}

#[derive(Debug, Default)]
struct Inner {
    scripts: Tokens,
    sessions: BTreeMap<CredentialId, Session>,
}

/// The gate.
#[derive(Debug)]
pub struct Gate {
    key: SecretKey,
    deployment: DeploymentId,
    file: TokenFile,
    inner: Mutex<Inner>,
    /// Nodes that were refused because of their token.
    pub refused_tokens: AtomicU64,
    /// Handshakes that did not open: another server's key, a wrong secret, damage, malice.
    pub refused_handshakes: AtomicU64,
}

impl Gate {
    /// The gate of a deployment.
    #[must_use]
    pub fn new(key: SecretKey, deployment: DeploymentId, file: TokenFile) -> Self {
        Self {
            key,
            deployment,
            file,
            inner: Mutex::default(),
            refused_tokens: AtomicU64::new(0),
            refused_handshakes: AtomicU64::new(0),
        }
    }

    /// The server's key.
    #[must_use]
    pub const fn key(&self) -> &SecretKey {
        &self.key
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is one insertion or one assignment.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a credential's id. Nothing is spent by asking.
    ///
    /// # Errors
    /// Why it would not be taken.
    pub fn find(&self, id: &CredentialId) -> Result<Known> {
        self.find_at(id, now_ms())
    }

    fn find_at(&self, id: &CredentialId, now: u64) -> Result<Known> {
        let script = {
            let inner = self.lock();
            if let Some(session) = inner.sessions.get(id) {
                // The same again: when an answer is lost, both sides still know it.
                let used = session.credential.clone();
                return Ok(Known { next: used.clone(), used, origin: Origin::Session });
            }
            inner.scripts.find(id, &self.deployment, now)
        };
        let (used, origin) = match script {
            Ok((used, _)) => (used, Origin::Script),
            Err(Refused::Unknown) => {
                let (used, _) = self.file.find(id, &self.deployment, now)??;
                (used, Origin::File)
            }
            Err(e) => return Err(e.into()),
        };
        let next = Credential::generate().context("making a session's key")?;
        Ok(Known { used, next, origin })
    }

    /// Lets a node in that has proved to hold `known`: its token is spent, and the session that it was given is good from
    /// now on, for the machine `mac` alone.
    ///
    /// # Errors
    /// Why it is not let in.
    pub fn admit(&self, known: &Known, mac: Option<Mac>) -> Result<()> {
        self.admit_at(known, mac, now_ms())
    }

    fn admit_at(&self, known: &Known, mac: Option<Mac>, now: u64) -> Result<()> {
        let id = &known.used.id;
        {
            let mut inner = self.lock();
            match known.origin {
                Origin::Session => {
                    return match inner.sessions.get(id) {
                        Some(session) if session.mac == mac => Ok(()),
                        Some(_) => Err(Refused::OtherMachine.into()),
                        None => Err(Refused::Unknown.into()),
                    };
                }
                _ if inner.sessions.len() >= SESSIONS => return Err(Refused::Full.into()),
                Origin::Script => {
                    inner.scripts.spend(id, &self.deployment, mac, now)?;
                }
                Origin::File => {}
            }
        }
        if known.origin == Origin::File {
            self.file.spend(id, &self.deployment, mac, now)??;
        }
        let session = Session { credential: known.next.clone(), mac };
        self.lock().sessions.insert(known.next.id, session);
        Ok(())
    }

    /// Counts a node that was refused because of its token.
    pub fn count_token(&self) {
        self.refused_tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a handshake that did not open.
    pub fn count_handshake(&self) {
        self.refused_handshakes.fetch_add(1, Ordering::Relaxed);
    }
}

impl Tickets for Gate {
    fn pass(&self, mac: Mac) -> Result<Pass> {
        let fresh = Token::generate().context("making a token")?;
        let (token, _) = self.lock().scripts.for_node(mac, Some(self.deployment), fresh, now_ms())?;
        Ok(Pass { key: self.key.public(), token })
    }
}

/// The kinds of tokens that can be made for people, by name.
#[must_use]
pub const fn kind(shared: bool) -> Kind {
    if shared { Kind::Shared } else { Kind::Single }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(last: u8) -> Option<Mac> {
        Some(Mac::new([0x52, 0x54, 0, 0, 0, last]).unwrap())
    }

    fn gate(folder: &std::path::Path) -> Gate {
        Gate::new(SecretKey::generate().unwrap(), [7; 16], TokenFile::in_folder(folder))
    }

    #[test]
    fn a_script_s_token_lets_its_machine_in_once_and_the_session_does_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let gate = gate(folder.path());
        let pass = gate.pass(mac(1).unwrap()).unwrap();
        assert_eq!(gate.pass(mac(1).unwrap()).unwrap(), pass);
        assert_eq!(pass.key, gate.key().public());
        let id = pass.token.credential().id;
        let known = gate.find(&id).unwrap();
        // Nobody has proved anything yet: the session is not good, the token is.
        assert!(gate.find(&known.next.id).is_err());
        assert!(gate.admit(&known, mac(2)).unwrap_err().to_string().contains("another machine"));
        // Two handshakes at once with one token: the second to speak is refused.
        let rival = gate.find(&id).unwrap();
        gate.admit(&known, mac(1)).unwrap();
        assert_eq!(gate.admit(&rival, mac(1)).unwrap_err().to_string(), "its token is spent");
        assert!(gate.find(&rival.next.id).is_err());
        assert_eq!(gate.find(&id).unwrap_err().to_string(), "its token is spent");
        for _ in 0..3 {
            let again = gate.find(&known.next.id).unwrap();
            assert_eq!(again.next, known.next);
            gate.admit(&again, mac(1)).unwrap();
            assert!(gate.admit(&again, mac(2)).is_err());
            assert!(gate.admit(&again, None).is_err());
        }
        // The next script has a new one.
        assert_ne!(gate.pass(mac(1).unwrap()).unwrap().token, pass.token);
        // And another deployment knows none of it.
        let other = Gate::new(gate.key().clone(), [8; 16], TokenFile::in_folder(folder.path()));
        for id in [id, known.next.id] {
            assert_eq!(other.find(&id).unwrap_err().to_string(), "its token is unknown");
        }
    }

    #[test]
    fn tokens_of_the_file_count_too() {
        let folder = tempfile::tempdir().unwrap();
        let gate = gate(folder.path());
        let file = TokenFile::in_folder(folder.path());
        assert!(gate.find(&[0; 16]).is_err());
        let shared = file.make(Kind::Shared, None, now_ms()).unwrap().credential();
        let single = file.make(Kind::Single, None, now_ms()).unwrap().credential();
        for n in 0..3 {
            let known = gate.find(&shared.id).unwrap();
            gate.admit(&known, mac(n)).unwrap();
            assert!(gate.find(&known.next.id).is_ok());
        }
        let (known, rival) = (gate.find(&single.id).unwrap(), gate.find(&single.id).unwrap());
        gate.admit(&known, None).unwrap();
        assert!(gate.admit(&rival, None).is_err());
        assert_eq!(gate.find(&single.id).unwrap_err().to_string(), "its token is spent");
    }

    #[test]
    fn no_debug_text_holds_a_secret() {
        let folder = tempfile::tempdir().unwrap();
        let gate = gate(folder.path());
        let pass = gate.pass(mac(1).unwrap()).unwrap();
        let known = gate.find(&pass.token.credential().id).unwrap();
        gate.admit(&known, mac(1)).unwrap();
        let text = format!("{gate:?} {pass:?} {known:?}");
        for hidden in [pass.token.to_word(), gate.key().to_word()] {
            assert!(!text.contains(&hidden[..8]), "{text}");
        }
        assert!(!text.contains("psk"), "{text}");
    }
}
