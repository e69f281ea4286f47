//! Receivers that were killed and come again, with a session that is new or not: whose name they get, and whether the waves
//! that they were in are counted on. Names and decisions together, without sockets.

use super::tests::{Lab, record, registration, settings};
use super::*;
use crate::boot::nodes::{NodeStates, Policy};
use crate::deployment::pxe::Pxe;
use crate::nodes::{Nodes, Pattern};

/// The names, beside a deployment.
struct Returning {
    lab: Lab,
    pxe: Pxe,
}

impl Returning {
    /// Three receivers on one machine each, in their first wave: `n1`, `n2`, `n3`, over connections and with sessions of these
    /// numbers.
    fn started(tries: u32) -> Self {
        let states = NodeStates::new(Nodes::unlisted(Pattern::default()), Policy::Everyone);
        let pxe = Pxe::new(Arc::new(states), false, None);
        let mut all = Self { lab: Lab::new(Settings { tries, ..settings(3) }), pxe };
        for n in 1..=3 {
            assert_eq!(all.comes(n, n, n as u8).0, format!("n{n}"));
            all.lab.says(n, ToServer::Ready);
        }
        all.lab.d.tick(all.lab.now);
        assert_eq!(all.lab.d.waves, 1);
        all
    }

    /// The receiver on machine `n` comes over a new connection: its name, and what follows.
    fn comes(&mut self, n: u64, connection: u64, session: u8) -> (String, Vec<Action>) {
        let asks =
            Registration { purpose: Purpose::Receive, hostname: Some(format!("n{n}")), ..registration(1000) };
        let address = format!("10.0.0.{n}");
        let d = &self.lab.d;
        let identity = self
            .pxe
            .identity(None, &asks, address.parse().unwrap(), [session; 16], |name| d.is_gone(name))
            .unwrap();
        let actions = self.lab.comes(connection, &identity.name, &address, session);
        (identity.name, actions)
    }

    /// These have the whole stream of the wave that runs, and it is released.
    fn done(&mut self, connections: &[u64]) {
        for connection in connections {
            self.lab.says(*connection, ToServer::Ended(record()));
            self.lab.says(*connection, ToServer::Done);
        }
        self.lab.d.fed(Ok(record()));
        self.lab.d.tick(self.lab.now);
    }

    /// The second receiver is killed in the first wave and comes again as another one: with a new session, the tenth.
    fn killed_and_back(tries: u32) -> Self {
        let mut all = Self::started(tries);
        all.lab.d.closed(2, "killed", all.lab.now);
        assert_eq!(all.comes(2, 10, 10).0, "n2", "it takes its old name back");
        assert_eq!(all.lab.d.nodes["n2"].tries, 1);
        all
    }

    fn tries(&self) -> u32 {
        self.lab.d.nodes["n2"].tries
    }

    /// Nobody else is there, and the deployment is over with so many done and failed.
    fn over(&mut self, done: usize, failed: usize) {
        self.lab.pass(RETURN, &[]);
        assert_eq!(self.lab.d.nodes.keys().collect::<Vec<_>>(), ["n1", "n2", "n3"]);
        assert!(self.lab.d.is_over());
        assert_eq!(self.lab.d.counts(), (done, failed));
    }
}

/// Whether the server has heard that the connection broke, or finds its old end whole.
const HEARS: [bool; 2] = [true, false];

#[test]
fn one_that_took_its_name_back_keeps_it_when_its_connection_breaks_before_its_wave() {
    for (hears, ready) in HEARS.iter().flat_map(|hears| HEARS.map(|ready| (*hears, ready))) {
        let mut all = Returning::killed_and_back(2);
        if ready {
            all.lab.says(10, ToServer::Ready);
        }
        if hears {
            all.lab.d.closed(10, "broken", all.lab.now);
        }
        let (name, actions) = all.comes(2, 11, 10);
        assert_eq!(name, "n2");
        assert!(!actions.iter().any(|a| matches!(a, Action::Send(_, ToNode::Refused(_)))), "{actions:?}");
        assert_eq!(all.tries(), 1, "heard {hears}, ready {ready}");
        all.done(&[1, 3]);
        all.lab.says(11, ToServer::Ready);
        all.lab.d.tick(all.lab.now);
        assert_eq!((all.lab.d.waves, all.tries()), (2, 2));
        all.done(&[11]);
        all.over(3, 0);
    }
}

#[test]
fn one_that_took_its_name_back_keeps_it_when_its_connection_breaks_in_its_wave() {
    for hears in HEARS {
        let again = |tries| {
            let mut all = Returning::killed_and_back(tries);
            all.lab.says(10, ToServer::Ready);
            all.done(&[1, 3]);
            all.lab.d.tick(all.lab.now);
            assert_eq!((all.lab.d.waves, all.tries()), (2, 2));
            if hears {
                all.lab.d.closed(10, "broken", all.lab.now);
            }
            let (name, actions) = all.comes(2, 11, 10);
            assert_eq!((&name[..], all.tries()), ("n2", 2), "heard {hears}");
            let refused = actions.iter().any(|a| matches!(a, Action::Send(11, ToNode::Refused(_))));
            (all, refused)
        };
        let (mut all, refused) = again(2);
        assert!(refused, "it was in both of its waves");
        all.lab.d.tick(all.lab.now);
        all.over(2, 1);

        let (mut all, refused) = again(3);
        assert!(!refused);
        all.lab.d.fed(Ok(record()));
        all.lab.says(11, ToServer::Ready);
        // The wave that it was lost from ends, and the next begins.
        all.lab.pass(Duration::from_secs(1), &[]);
        assert_eq!((all.lab.d.waves, all.tries()), (3, 3));
        all.done(&[11]);
        all.over(3, 0);
    }
}

/// It was in a wave: a summary without it would look like a success.
#[test]
fn one_that_was_in_a_wave_and_leaves_before_its_next_has_failed() {
    let mut all = Returning::killed_and_back(2);
    all.lab.says(10, ToServer::Ready);
    all.lab.d.closed(10, "killed again", all.lab.now);
    all.done(&[1, 3]);
    assert!(!all.lab.d.is_over(), "it may come again");
    all.over(2, 1);
    assert!(
        matches!(all.lab.status("n2"), Status::Failed { step, error } if step == "ready" && error.contains("killed again"))
    );
}
