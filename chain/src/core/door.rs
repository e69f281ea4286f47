//! Who may stand at a port with his handshake under way. Connections come and end, out comes who is let in and who has to
//! leave for it: at most [`EACH`] at once from one address and [`ALL`] together, and the oldest of the busiest address goes
//! first. The addresses of nodes that are known have places that no stranger can take. Without sockets or clock, so that
//! it can be tried with more strangers than any laboratory has; [`crate::entrance`] has the sockets.
//!
//! [`Quiet`] decides which refusals are written down, so that whoever connects a thousand times a second fills no log.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// Handshakes under way from one address; for a known address so many for each node there.
pub const EACH: usize = 4;
/// Handshakes under way in all.
pub const ALL: usize = 256;
/// Of them kept for known addresses, while there are any.
pub const RESERVED: usize = 64;
/// Those that were told to leave and have not left yet may be so many. Beyond that nobody is let in.
pub const LEAVING: usize = 256;

/// Names one connection at a door; counted up, never used twice.
pub type GuestId = u64;

/// A connection that may go on with its handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entered {
    /// Its name.
    pub id: GuestId,
    /// Who has to leave for it.
    pub displaced: Option<GuestId>,
}

/// The connections at a port whose handshake is under way.
#[derive(Debug, Default)]
pub struct Door {
    /// Older ones have smaller names.
    guests: BTreeMap<GuestId, IpAddr>,
    counts: BTreeMap<IpAddr, usize>,
    /// Nodes at each known address.
    known: BTreeMap<IpAddr, usize>,
    leaving: BTreeSet<GuestId>,
    next: GuestId,
}

impl Door {
    /// From now on these addresses are known, with so many nodes at each.
    pub fn know(&mut self, addresses: impl IntoIterator<Item = (IpAddr, usize)>) {
        self.known.clear();
        for (address, nodes) in addresses {
            *self.known.entry(address.to_canonical()).or_default() += nodes;
        }
    }

    fn is_known(&self, address: &IpAddr) -> bool {
        self.known.contains_key(address)
    }

    fn strangers(&self) -> usize {
        self.counts.iter().filter(|(address, _)| !self.is_known(address)).map(|(_, count)| count).sum()
    }

    /// A connection came. None: it is turned away.
    pub fn arrive(&mut self, address: IpAddr) -> Option<Entered> {
        let address = address.to_canonical();
        if self.leaving.len() >= LEAVING {
            return None;
        }
        let known = self.is_known(&address);
        let each = EACH * self.known.get(&address).copied().unwrap_or(1).max(1);
        let full = self.guests.len() >= ALL;
        let displaced = if self.counts.get(&address).is_some_and(|count| *count >= each) {
            self.oldest_of(&address)
        } else if known && full {
            self.oldest_of_busiest(false).or_else(|| self.oldest_of_busiest(true))
        } else if !known && (full || self.strangers() >= self.places_for_strangers()) {
            // When known nodes have every place, nobody has to leave for a stranger.
            Some(self.oldest_of_busiest(false)?)
        } else {
            None
        };
        if let Some(id) = displaced {
            self.remove(id);
            self.leaving.insert(id);
        }
        let id = self.next;
        self.next += 1;
        self.guests.insert(id, address);
        *self.counts.entry(address).or_default() += 1;
        Some(Entered { id, displaced })
    }

    /// A connection's handshake is over, well or not, or the connection has left.
    pub fn left(&mut self, id: GuestId) {
        self.remove(id);
        self.leaving.remove(&id);
    }

    /// Handshakes under way, and connections that were told to leave and have not left.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        (self.guests.len(), self.leaving.len())
    }

    fn places_for_strangers(&self) -> usize {
        if self.known.is_empty() { ALL } else { ALL - RESERVED }
    }

    fn remove(&mut self, id: GuestId) {
        let Some(address) = self.guests.remove(&id) else { return };
        if let Some(count) = self.counts.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&address);
            }
        }
    }

    fn oldest_of(&self, address: &IpAddr) -> Option<GuestId> {
        self.guests.iter().find(|(_, from)| *from == address).map(|(id, _)| *id)
    }

    /// Of two addresses that are equally busy, the one with the older guest.
    fn oldest_of_busiest(&self, known: bool) -> Option<GuestId> {
        let mut busiest: Option<(usize, GuestId)> = None;
        for (id, address) in self.guests.iter().filter(|(_, address)| self.is_known(address) == known) {
            let count = self.counts.get(address).copied().unwrap_or_default();
            if busiest.is_none_or(|(most, _)| count > most) {
                busiest = Some((count, *id));
            }
        }
        busiest.map(|(_, id)| id)
    }
}

/// Lines that may follow each other without a pause.
const BURST: u32 = 20;
/// After that one line in so long.
const EVERY: Duration = Duration::from_secs(5);

/// Lets a few lines through and counts the rest.
#[derive(Debug, Default)]
pub struct Quiet {
    /// Lines said that time has not made good yet, and up to when it has.
    said: u32,
    since: Duration,
    kept: u64,
}

impl Quiet {
    /// Whether a line may be written now (running time since any moment), and how many were not since the last.
    pub fn may_say(&mut self, now: Duration) -> Option<u64> {
        let passed = now.saturating_sub(self.since).as_nanos() / EVERY.as_nanos();
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        if passed >= self.said {
            self.said = 0;
            self.since = now;
        } else {
            self.said -= passed;
            self.since += EVERY * passed;
        }
        if self.said >= BURST {
            self.kept += 1;
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn address(n: u16) -> IpAddr {
        let [a, b] = n.to_be_bytes();
        Ipv4Addr::new(10, 0, a, b).into()
    }

    #[test]
    fn one_address_displaces_its_own_oldest_and_nobody_else() {
        let mut door = Door::default();
        let first = door.arrive(address(1)).unwrap();
        for _ in 0..4 {
            assert_eq!(door.arrive(address(2)).unwrap().displaced, None);
        }
        assert_eq!(door.arrive(address(2)).unwrap().displaced, Some(first.id + 1));
        // The same one over IPv6 sockets.
        let mapped: IpAddr = Ipv4Addr::new(10, 0, 0, 2).to_ipv6_mapped().into();
        assert_eq!(door.arrive(mapped).unwrap().displaced, Some(first.id + 2));
        assert_eq!(door.count(), (5, 2));
    }

    #[test]
    fn several_nodes_at_one_known_address_have_four_places_each() {
        let mut door = Door::default();
        door.know([(address(1), 60)]);
        for _ in 0..4 * 60 {
            assert_eq!(door.arrive(address(1)).unwrap().displaced, None);
        }
        assert!(door.arrive(address(1)).unwrap().displaced.is_some());
    }

    #[test]
    fn a_flood_from_everywhere_leaves_room_for_the_wave_s_own_nodes() {
        let mut door = Door::default();
        door.know((0..RESERVED as u16).map(|n| (address(n), 1)));
        for n in 0..5000 {
            // Those that are told to leave do.
            if let Some(displaced) = door.arrive(address(1000 + n)).unwrap().displaced {
                door.left(displaced);
            }
        }
        for n in 0..RESERVED as u16 {
            assert_eq!(door.arrive(address(n)).unwrap().displaced, None);
        }
        assert_eq!(door.count(), (ALL, 0));
        // Beyond that they take the strangers' places.
        let more = door.arrive(address(0)).unwrap().displaced.unwrap();
        assert!(more < 5000);
    }

    #[test]
    fn guests_that_do_not_leave_close_the_door() {
        let mut door = Door::default();
        let mut entered = 0;
        while door.arrive(address(1)).is_some() {
            entered += 1;
        }
        assert_eq!((entered, door.count()), (EACH + LEAVING, (EACH, LEAVING)));
        door.left(0);
        assert!(door.arrive(address(1)).is_some());
    }

    #[test]
    fn a_flood_of_refusals_writes_few_lines() {
        let mut quiet = Quiet::default();
        let said: Vec<u64> = (0..60_000).filter_map(|ms| quiet.may_say(Duration::from_millis(ms))).collect();
        assert_eq!(said.len(), BURST as usize + 60 / 5 - 1);
        // 20 at once, then 5 s of silence.
        assert_eq!(said[BURST as usize], 5000 - u64::from(BURST));
        assert_eq!(quiet.may_say(Duration::from_secs(1000)), Some(4999));
    }

    #[derive(Debug, Clone)]
    enum Event {
        Arrive(u16),
        Leave(prop::sample::Index),
        Know(Vec<u16>),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let event = prop_oneof![
            // Few addresses, so that some are busy, and many, so that all places are taken.
            60 => prop_oneof![0u16..6, 0u16..400].prop_map(Event::Arrive),
            8 => any::<prop::sample::Index>().prop_map(Event::Leave),
            1 => proptest::collection::vec(0u16..400, 0..90).prop_map(Event::Know),
        ];
        proptest::collection::vec(event, 0..900)
    }

    proptest! {
        #[test]
        fn the_limits_hold_whoever_comes_and_goes(events in events()) {
            let mut door = Door::default();
            let mut here: BTreeMap<GuestId, IpAddr> = BTreeMap::new();
            let mut told: Vec<GuestId> = Vec::new();
            for event in events {
                match event {
                    Event::Know(known) => door.know(known.into_iter().map(|n| (address(n), 1))),
                    Event::Leave(which) => {
                        let all: Vec<GuestId> = here.keys().chain(&told).copied().collect();
                        if !all.is_empty() {
                            let id = all[which.index(all.len())];
                            door.left(id);
                            here.remove(&id);
                            told.retain(|t| *t != id);
                        }
                    }
                    Event::Arrive(n) => {
                        let from = address(n);
                        let known = door.is_known(&from);
                        let Some(Entered { id, displaced }) = door.arrive(from) else {
                            let strangers = here.values().any(|a| !door.is_known(a));
                            prop_assert!(told.len() >= LEAVING || (!known && !strangers));
                            continue;
                        };
                        if let Some(gone) = displaced {
                            let theirs = here.remove(&gone);
                            prop_assert!(theirs.is_some(), "somebody who is here leaves");
                            let theirs = theirs.unwrap();
                            if door.is_known(&theirs) && theirs != from {
                                prop_assert!(known, "a stranger displaced a known node");
                                prop_assert!(here.values().all(|a| door.is_known(a)));
                            }
                            prop_assert!(here.iter().all(|(id, a)| *a != theirs || *id > gone), "the oldest goes");
                            told.push(gone);
                        }
                        here.insert(id, from);
                        let of = |a: &IpAddr| here.values().filter(|b| *b == a).count();
                        // Repeated names in a list of known addresses count as several nodes.
                        let limit = EACH * door.known.get(&from).copied().unwrap_or(1);
                        prop_assert!(of(&from) <= limit.max(EACH) || displaced.is_some());
                    }
                }
                prop_assert_eq!(door.count(), (here.len(), told.len()));
                prop_assert!(here.len() <= ALL && told.len() <= LEAVING);
            }
        }

        #[test]
        fn at_most_one_line_in_five_seconds_in_the_long_run(steps in proptest::collection::vec(0u64..2000, 1..300)) {
            let mut quiet = Quiet::default();
            let (mut now, mut said, mut kept) = (Duration::ZERO, 0u64, 0u64);
            for step in &steps {
                now += Duration::from_millis(*step);
                if let Some(before) = quiet.may_say(now) {
                    said += 1;
                    kept += before;
                }
            }
            prop_assert!(said <= u64::from(BURST) + now.as_secs() / 5 + 1);
            prop_assert!(said + kept <= steps.len() as u64, "nothing is counted twice");
        }
    }
}
