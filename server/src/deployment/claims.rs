//! A second claim to the place of a node that is here. The one that is here is asked, by a ping of its own: when it
//! answers, the claim is refused and the operator hears an alarm; when it is silent until it counts as gone, the new one
//! takes its place. Without sockets or clock; [`super::state`] asks and obeys.

use super::state::ConnectionId;
use ka_chain::control::Registration;
use ka_chain::keys::CredentialId;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Pings of claims are numbered from here on, those of every second from 1.
const FIRST: u64 = 1 << 63;

/// A node that has proved to hold a token or a session, and registered.
#[derive(Debug, Clone)]
pub struct Newcomer {
    /// Its control connection.
    pub connection: ConnectionId,
    /// The name that it is to have.
    pub name: String,
    /// Where it connected from.
    pub address: IpAddr,
    /// What it said of itself.
    pub registration: Registration,
    /// What it is to become.
    pub order: Vec<u8>,
    /// Its session: whoever comes with the same one is the same node.
    pub session: CredentialId,
}

/// The claims that are not decided; one for each name.
#[derive(Debug, Default)]
pub struct Claims {
    waiting: BTreeMap<String, (u64, Newcomer)>,
    made: u64,
}

impl Claims {
    /// Takes a claim. The holder is to be pinged with the number; none when somebody claims the name already, and the new
    /// claim is not taken.
    pub fn make(&mut self, newcomer: Newcomer) -> Option<u64> {
        if self.waiting.contains_key(&newcomer.name) {
            return None;
        }
        let number = FIRST | self.made;
        self.made += 1;
        self.waiting.insert(newcomer.name.clone(), (number, newcomer));
        Some(number)
    }

    /// The holder of `name` answered a ping: the claim that is refused, if that was its ping.
    pub fn answered(&mut self, name: &str, number: u64) -> Option<Newcomer> {
        let (asked, _) = self.waiting.get(name)?;
        if *asked == number { self.waiting.remove(name).map(|(_, claim)| claim) } else { None }
    }

    /// A connection ended; whether it was that of a claim.
    pub fn closed(&mut self, connection: ConnectionId) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|_, (_, claim)| claim.connection != connection);
        self.waiting.len() < before
    }

    /// Takes out the claims whose holder is gone.
    pub fn freed(&mut self, is_held: impl Fn(&str) -> bool) -> Vec<Newcomer> {
        let free: Vec<String> = self.waiting.keys().filter(|name| !is_held(name)).cloned().collect();
        free.iter().filter_map(|name| self.waiting.remove(name)).map(|(_, claim)| claim).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ka_chain::control::Purpose;

    fn newcomer(connection: ConnectionId, name: &str) -> Newcomer {
        Newcomer {
            connection,
            name: name.to_owned(),
            address: [10, 0, 0, 1].into(),
            registration: Registration {
                version: String::new(),
                purpose: Purpose::Install,
                mac: None,
                hostname: None,
                data_port: 1,
                addresses: Vec::new(),
                memory: 1,
                facts: Vec::new(),
            },
            order: Vec::new(),
            session: [0; 16],
        }
    }

    #[test]
    fn only_the_answer_to_its_own_ping_decides_a_claim() {
        let mut claims = Claims::default();
        let first = claims.make(newcomer(1, "a")).unwrap();
        assert_eq!(claims.make(newcomer(2, "a")), None, "one at a time");
        let second = claims.make(newcomer(3, "b")).unwrap();
        assert!(first != second && first >= FIRST);
        assert!(claims.answered("a", second).is_none() && claims.answered("a", 7).is_none());
        assert_eq!(claims.answered("a", first).unwrap().connection, 1);
        assert!(claims.answered("a", first).is_none());
        assert!(claims.freed(|_| true).is_empty());
        assert_eq!(claims.freed(|name| name != "b")[0].connection, 3);
        claims.make(newcomer(4, "c")).unwrap();
        assert!(claims.closed(4) && !claims.closed(4) && claims.freed(|_| false).is_empty());
    }
}
