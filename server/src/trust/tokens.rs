//! Tokens as a state machine without clock and files: what was given out, to whom, until when, and what is spent. Times are
//! milliseconds since 1970 and are passed in.

use crate::nodes::Mac;
use ka_chain::keys::{Credential, CredentialId, Token};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The same unspent token is given again to the same machine for so long: iPXE asks twice, machines are power-cycled.
pub const AGAIN_MS: u64 = 15 * 60 * 1000;
/// How long a token in a boot script is good.
pub const NODE_LIFE_MS: u64 = 60 * 60 * 1000;
/// Spent and expired tokens are remembered for so long, so that the refusal can say what they are.
const MEMORY_MS: u64 = 24 * 60 * 60 * 1000;
/// How many tokens are remembered.
const LIMIT: usize = 65_536;

/// The random id of a deployment.
pub type DeploymentId = [u8; 16];

/// Whom a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Any number of nodes, never spent: for boot media.
    Shared,
    /// One node, whichever comes first.
    Single,
    /// The machine with this address.
    Node(Mac),
}

/// What is known of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The token.
    pub token: Token,
    /// Whom it is for.
    pub kind: Kind,
    /// The only deployment for which it is good; any when there is none.
    pub deployment: Option<DeploymentId>,
    /// When it was made.
    pub made_ms: u64,
    /// When it is good no longer.
    pub expires_ms: Option<u64>,
    /// When it was spent.
    pub spent_ms: Option<u64>,
}

/// Why a token is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Never given out, or forgotten.
    #[error("its token is unknown")]
    Unknown,
    /// Too old.
    #[error("its token has expired")]
    Expired,
    /// Used before.
    #[error("its token is spent")]
    Spent,
    /// Made for another deployment.
    #[error("its token is for another deployment")]
    OtherDeployment,
    /// Used by another machine than the one that it was made for.
    #[error("its token is for another machine")]
    OtherMachine,
    /// There are too many already.
    #[error("there are too many tokens or sessions")]
    Full,
}

/// All tokens that one place knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    records: BTreeMap<CredentialId, Record>,
}

impl Tokens {
    /// Takes a token in.
    ///
    /// # Errors
    /// [`Refused::Full`].
    pub fn insert(&mut self, record: Record, now: u64) -> Result<(), Refused> {
        self.prune(now);
        if self.records.len() >= LIMIT {
            return Err(Refused::Full);
        }
        self.records.insert(record.token.credential().id, record);
        Ok(())
    }

    /// The token for the machine `mac`: the one that it was given before, when that is young and unspent, else `fresh`,
    /// which takes its place. Returns the token and whether it is the fresh one.
    ///
    /// # Errors
    /// [`Refused::Full`].
    pub fn for_node(
        &mut self,
        mac: Mac,
        deployment: Option<DeploymentId>,
        fresh: Token,
        now: u64,
    ) -> Result<(Token, bool), Refused> {
        let unspent =
            |r: &Record| r.kind == Kind::Node(mac) && r.deployment == deployment && r.spent_ms.is_none();
        let young = |r: &&Record| unspent(r) && now.saturating_sub(r.made_ms) < AGAIN_MS && !expired(r, now);
        if let Some(record) = self.records.values().find(young) {
            return Ok((record.token.clone(), false));
        }
        self.records.retain(|_, r| !unspent(r));
        let record = Record {
            token: fresh.clone(),
            kind: Kind::Node(mac),
            deployment,
            made_ms: now,
            expires_ms: Some(now.saturating_add(NODE_LIFE_MS)),
            spent_ms: None,
        };
        self.insert(record, now)?;
        Ok((fresh, true))
    }

    /// The token behind an id, if it would be taken now; nothing is changed.
    ///
    /// # Errors
    /// Why it is not taken.
    pub fn find(
        &self,
        id: &CredentialId,
        deployment: &DeploymentId,
        now: u64,
    ) -> Result<(Credential, Kind), Refused> {
        let record = self.records.get(id).ok_or(Refused::Unknown)?;
        if record.spent_ms.is_some() {
            return Err(Refused::Spent);
        }
        if expired(record, now) {
            return Err(Refused::Expired);
        }
        if record.deployment.is_some_and(|d| d != *deployment) {
            return Err(Refused::OtherDeployment);
        }
        Ok((record.token.credential(), record.kind))
    }

    /// Takes a token: the node with the address `mac` has proved that it holds it. From now on it is spent, unless it is
    /// a shared one. Returns whether it was changed.
    ///
    /// # Errors
    /// Why it is not taken; of two that claim the same one, the second. Then nothing is changed.
    pub fn spend(
        &mut self,
        id: &CredentialId,
        deployment: &DeploymentId,
        mac: Option<Mac>,
        now: u64,
    ) -> Result<bool, Refused> {
        let (_, kind) = self.find(id, deployment, now)?;
        match kind {
            Kind::Shared => return Ok(false),
            Kind::Node(owner) if mac != Some(owner) => return Err(Refused::OtherMachine),
            Kind::Node(_) | Kind::Single => {}
        }
        let record = self.records.get_mut(id).ok_or(Refused::Unknown)?;
        record.spent_ms = Some(now);
        Ok(true)
    }

    /// Forgets what nobody can use any more.
    fn prune(&mut self, now: u64) {
        self.records.retain(|_, r| {
            let over = [r.spent_ms, r.expires_ms].into_iter().flatten().min();
            over.is_none_or(|over| now < over.saturating_add(MEMORY_MS))
        });
    }

    /// Every token, in no order that means anything.
    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }
}

fn expired(record: &Record, now: u64) -> bool {
    record.expires_ms.is_some_and(|end| now >= end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HERE: DeploymentId = [1; 16];
    const THERE: DeploymentId = [2; 16];

    fn mac(last: u8) -> Mac {
        Mac::new([0x52, 0x54, 0, 0, 0, last]).unwrap()
    }

    fn with(kind: Kind, deployment: Option<DeploymentId>, expires_ms: Option<u64>) -> (Tokens, CredentialId) {
        let token = Token::generate().unwrap();
        let id = token.credential().id;
        let mut tokens = Tokens::default();
        tokens.insert(Record { token, kind, deployment, made_ms: 0, expires_ms, spent_ms: None }, 0).unwrap();
        (tokens, id)
    }

    #[test]
    fn a_spent_token_is_refused_to_everybody() {
        for (kind, claimant) in [(Kind::Single, None), (Kind::Node(mac(1)), Some(mac(1)))] {
            let (mut tokens, id) = with(kind, Some(HERE), None);
            assert!(tokens.find(&id, &HERE, 5).is_ok(), "looking at it does not spend it");
            assert_eq!(tokens.spend(&id, &HERE, claimant, 5), Ok(true));
            assert_eq!(tokens.find(&id, &HERE, 6), Err(Refused::Spent), "replayed");
            assert_eq!(tokens.spend(&id, &HERE, claimant, 6), Err(Refused::Spent), "a second claim");
            assert_eq!(tokens.spend(&id, &HERE, Some(mac(2)), 6), Err(Refused::Spent));
        }
    }

    #[test]
    fn a_shared_token_is_never_spent() {
        let (mut tokens, id) = with(Kind::Shared, None, Some(100));
        for n in 0..9 {
            assert_eq!(tokens.spend(&id, &HERE, Some(mac(n)), 5), Ok(false));
            assert_eq!(tokens.spend(&id, &THERE, None, 5), Ok(false));
        }
        assert_eq!(tokens.spend(&id, &HERE, None, 100), Err(Refused::Expired));
    }

    #[test]
    fn expired_foreign_unknown_and_misused_tokens_are_refused() {
        let (mut tokens, id) = with(Kind::Node(mac(1)), Some(HERE), Some(50));
        assert_eq!(tokens.spend(&[0; 16], &HERE, Some(mac(1)), 5), Err(Refused::Unknown));
        assert_eq!(tokens.spend(&id, &THERE, Some(mac(1)), 5), Err(Refused::OtherDeployment));
        assert_eq!(tokens.spend(&id, &HERE, Some(mac(2)), 5), Err(Refused::OtherMachine));
        assert_eq!(tokens.spend(&id, &HERE, None, 5), Err(Refused::OtherMachine));
        assert_eq!(tokens.spend(&id, &HERE, Some(mac(1)), 50), Err(Refused::Expired));
        assert_eq!(tokens.spend(&id, &HERE, Some(mac(1)), 49), Ok(true));
    }

    #[test]
    fn the_same_machine_gets_the_same_token_for_a_while() {
        let mut tokens = Tokens::default();
        let mut ask =
            |who, now| tokens.for_node(mac(who), Some(HERE), Token::generate().unwrap(), now).unwrap();
        let (first, fresh) = ask(1, 1000);
        assert!(fresh);
        assert_eq!(ask(1, 1000 + AGAIN_MS - 1), (first.clone(), false));
        assert_ne!(ask(2, 1000).0, first);
        let (second, fresh) = ask(1, 1000 + AGAIN_MS);
        assert!(fresh && second != first);
        // The old one is gone: one unspent token for a machine.
        let now = 1000 + AGAIN_MS;
        assert_eq!(tokens.find(&first.credential().id, &HERE, now), Err(Refused::Unknown));
        let id = second.credential().id;
        tokens.spend(&id, &HERE, Some(mac(1)), now).unwrap();
        let (third, fresh) = tokens.for_node(mac(1), Some(HERE), Token::generate().unwrap(), now).unwrap();
        assert!(fresh && third != second, "a spent one is not given again");
        assert_eq!(tokens.find(&id, &HERE, now), Err(Refused::Spent));
    }

    #[test]
    fn what_is_over_is_forgotten_after_a_day() {
        let mut tokens = Tokens::default();
        for n in 0..20 {
            let fresh = Token::generate().unwrap();
            tokens.for_node(mac(n), None, fresh, 0).unwrap();
        }
        let later = NODE_LIFE_MS + MEMORY_MS;
        tokens.for_node(mac(99), None, Token::generate().unwrap(), later).unwrap();
        assert_eq!(tokens.records().count(), 1);
    }

    #[test]
    fn no_debug_text_holds_a_token() {
        let (tokens, _) = with(Kind::Shared, None, None);
        let text = format!("{tokens:?}");
        let word = tokens.records().next().unwrap().token.to_word();
        assert!(!text.contains(&word[..8]), "{text}");
    }

    proptest! {
        /// Whatever happens in whatever order: a token that is not shared is taken once at most, in time, by its
        /// deployment and its machine.
        #[test]
        fn a_token_is_taken_once(
            steps in proptest::collection::vec((0u64..200, any::<bool>(), 0u8..3), 1..40),
            single: bool,
            bound: bool,
        ) {
            let kind = if single { Kind::Single } else { Kind::Node(mac(1)) };
            let (mut tokens, id) = with(kind, bound.then_some(HERE), Some(100));
            let mut taken = 0;
            for (now, here, who) in steps {
                let result = tokens.spend(&id, if here { &HERE } else { &THERE }, Some(mac(who)), now);
                if result.is_ok() {
                    taken += 1;
                    prop_assert!(now < 100 && (here || !bound) && (single || who == 1));
                }
            }
            prop_assert!(taken <= 1);
        }
    }
}
