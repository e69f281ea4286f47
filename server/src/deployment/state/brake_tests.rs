//! The brake's name and what `--min-rate` does, driven without sockets.

use super::super::tests::{Lab, settings};
use super::super::{Settings, Status};
use super::*;
use ka_chain::control::{ToNode, ToServer};
use ka_chain::feed::Compression;

/// Seconds of `--slow-grace` here.
const GRACE: u64 = 10;

/// A wave of so many nodes, and what each place waits for.
struct Slowed {
    lab: Lab,
    waits: Vec<Waits>,
    orders: Vec<u64>,
    bytes: u64,
    time: Duration,
    /// What the compressing threads were told.
    levels: Vec<Level>,
}

impl Slowed {
    fn new(nodes: u64, limit: Option<SlowLimit>, tries: u32) -> Self {
        Self::of(nodes, Settings { slow: limit, tries, ..settings(nodes as u32) })
    }

    fn of(nodes: u64, settings: Settings) -> Self {
        let mut lab = Lab::new(settings);
        for n in 1..=nodes {
            lab.register(n, &format!("10.0.0.{n}"));
            lab.says(n, ToServer::Ready);
        }
        let size = nodes as usize + 1;
        let mut slowed = Self {
            lab,
            waits: vec![Waits::default(); size],
            orders: vec![0; size],
            bytes: 0,
            time: Duration::ZERO,
            levels: Vec::new(),
        };
        let actions = slowed.lab.d.tick(slowed.lab.now);
        slowed.obey(&actions);
        slowed
    }

    /// Everybody obeys at once, and the links stand.
    fn obey(&mut self, actions: &[Action]) {
        for action in actions {
            if let Action::Compress(level) = action {
                self.levels.push(*level);
            }
            let (n, place) = match action {
                Action::Head(place) => (0, place),
                Action::Send(n, ToNode::Place { place, .. }) => (*n, place),
                Action::Send(n, ToNode::Start(start)) => (*n, &start.place),
                _ => continue,
            };
            self.orders[n as usize] = place.epoch;
            if let Some((_, link)) = &place.parent {
                self.lab.says(n, ToServer::Joined(link.id));
            }
        }
    }

    /// So many seconds at this rate; `wait` says what places wait for in each half second. Who goes out, and when.
    fn pass(&mut self, seconds: u64, rate: u64, wait: impl Fn(u64, &mut Waits)) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        for half in 1..=seconds * 2 {
            self.time += Duration::from_millis(500);
            self.bytes += rate / 2;
            for n in 0..self.waits.len() {
                self.waits[n].at(self.time);
                wait(n as u64, &mut self.waits[n]);
                let (waits, epoch) = (self.waits[n].clone(), self.orders[n]);
                if n == 0 {
                    let status = wave::Status { epoch, cover: 3, ..wave::Status::default() };
                    self.lab.d.head_progress(status, waits, self.lab.now);
                    continue;
                }
                let (plain, consumed) = (self.bytes, self.bytes);
                let progress = Progress { epoch, waits, plain, consumed, cover: 3, ..Progress::default() };
                let actions = self.lab.says(n as u64, ToServer::Progress(progress));
                self.obey(&actions);
            }
            for _ in 0..5 {
                let actions = self.lab.pass(Duration::from_millis(100), &[]);
                let gone = actions.iter().filter_map(|a| match a {
                    Action::Send(n, ToNode::Out(_)) => Some((half / 2, *n)),
                    _ => None,
                });
                out.extend(gone);
                self.obey(&actions);
            }
        }
        out
    }
}

fn disk_of(slow: u64) -> impl Fn(u64, &mut Waits) {
    move |n, waits| {
        let half = Duration::from_millis(490);
        let below = (n < slow).then_some(NodeId(n as u32 + 1));
        waits.waited(half, n == slow, n > slow, below.into_iter());
    }
}

fn from_source(n: u64, waits: &mut Waits) {
    waits.waited(Duration::from_millis(490), n == 2, n != 2, std::iter::empty());
}

fn limit() -> Option<SlowLimit> {
    Some(SlowLimit { rate: 1000, grace: Duration::from_secs(GRACE) })
}

#[test]
fn the_brake_is_named_while_it_brakes_and_added_up() {
    let mut slowed = Slowed::new(4, None, 2);
    assert_eq!(slowed.lab.d.brake(), None);
    assert!(slowed.pass(10, 10, disk_of(2)).is_empty(), "--min-rate is off");
    assert_eq!(slowed.lab.d.brake().unwrap().to_string(), "disk of n2");
    slowed.pass(10, 10, from_source);
    assert_eq!(slowed.lab.d.brake(), Some(Held::Server));
    slowed.pass(10, 10, |n, waits| {
        let half = Duration::from_millis(490);
        waits.waited(half, false, n > 0, (n == 0).then_some(NodeId(1)).into_iter());
        // A head that is blocked does not wait for its source.
    });
    let link = Held::Link("the server".to_owned(), "n1".to_owned());
    assert_eq!(slowed.lab.d.brake(), Some(link.clone()));
    let held = &slowed.lab.d.held_up;
    assert_eq!(held.keys().cloned().collect::<Vec<_>>(), [Held::Server, Held::Disk("n2".to_owned()), link]);
    assert!(held.values().all(|time| (5..=11).contains(&time.as_secs())), "{held:?}");
}

#[test]
fn a_link_is_named_with_the_speeds_of_the_interfaces_at_its_ends() {
    let mut slowed = Slowed::new(2, None, 2);
    let d = &mut slowed.lab.d;
    let link = |from: &str, to: &str| Held::Link(from.to_owned(), to.to_owned());
    assert_eq!(d.describe(&link("n1", "n2")), "link from n1 to n2");
    let fact = |interface: &str, megabits| Speed { interface: interface.to_owned(), megabits }.fact();
    let facts = |d: &mut Deployment, name: &str, facts: Vec<(String, String)>| {
        d.nodes.get_mut(name).unwrap().registration.facts = facts;
    };
    facts(d, "n2", vec![("serial".to_owned(), "7".to_owned()), fact("eth0", 100)]);
    d.speeds = vec![Speed { interface: "eno1".to_owned(), megabits: 25_000 }];
    assert_eq!(d.describe(&link("n1", "n2")), "link from n1 to n2 (n2's eth0: 100 Mbit/s)");
    facts(d, "n1", vec![fact("eth0", 1000), fact("eth1", 10_000)]);
    assert_eq!(
        d.describe(&link("n1", "n2")),
        "link from n1 to n2 (n1's eth0: 1000 Mbit/s, n1's eth1: 10000 Mbit/s, n2's eth0: 100 Mbit/s)"
    );
    let first = link("the server", "n2");
    assert_eq!(
        d.describe(&first),
        "link from the server to n2 (the server's eno1: 25000 Mbit/s, n2's eth0: 100 Mbit/s)"
    );
    assert_eq!(
        d.describe_json(&first),
        json!({"kind": "link", "from": "the server", "to": "n2", "speeds": [
            {"node": "the server", "interface": "eno1", "mbit_per_s": 25_000},
            {"node": "n2", "interface": "eth0", "mbit_per_s": 100},
        ]})
    );
    // Others have none.
    let disk = Held::Disk("n2".to_owned());
    assert_eq!((d.describe(&disk), d.describe_json(&disk)), ("disk of n2".to_owned(), disk.to_json()));
    // A node may say what it likes, but not for pages.
    facts(d, "n2", (0..900).map(|n| fact(&format!("e{n}"), 10)).collect());
    assert_eq!(d.describe(&first).matches("n2's ").count(), INTERFACES);
}

#[test]
fn a_slow_disk_is_moved_to_the_next_wave_after_the_grace() {
    let mut slowed = Slowed::new(4, limit(), 2);
    let out = slowed.pass(40, 999, disk_of(2));
    assert_eq!(out.len(), 1, "{out:?}");
    let (at, node) = out[0];
    assert!(node == 2 && (GRACE..GRACE + 5).contains(&at), "{out:?}");
    assert_eq!(*slowed.lab.status("n2"), Status::Preparing);
    // A quarter of four: the next one stays.
    assert!(slowed.pass(40, 10, disk_of(3)).is_empty());
}

#[test]
fn nobody_is_moved_when_the_server_brakes_or_the_rate_is_reached_or_no_try_is_left() {
    assert!(Slowed::new(4, limit(), 2).pass(40, 10, from_source).is_empty());
    assert!(Slowed::new(4, limit(), 2).pass(40, 1001, disk_of(2)).is_empty());
    assert!(Slowed::new(4, limit(), 1).pass(40, 10, disk_of(2)).is_empty());
    assert!(Slowed::new(3, limit(), 2).pass(40, 10, disk_of(2)).is_empty(), "a quarter of three is nobody");
}

/// Seconds of the same, of which the two compressing threads work so many thousandths; the levels they are told.
fn compress(slowed: &mut Slowed, seconds: u64, busy: u64, wait: impl Fn(u64, &mut Waits)) -> Vec<Level> {
    for _ in 0..seconds {
        let mut work = slowed.lab.d.current.as_ref().unwrap().braking.work;
        work.threads = 2;
        work.time += Duration::from_millis(2 * busy);
        work.plain += 100;
        work.packed += 30;
        slowed.lab.d.compressed(work);
        slowed.pass(1, 10, &wait);
    }
    std::mem::take(&mut slowed.levels)
}

#[test]
fn the_level_follows_the_brake() {
    use Level::{Plain, Zstd};
    let mut slowed = Slowed::of(4, Settings { compression: Compression::Auto, ..settings(4) });
    assert_eq!(slowed.lab.d.levels, Some(Used::new(Zstd(3))));
    assert_eq!(compress(&mut slowed, 10, 100, disk_of(2)), []);
    assert_eq!(compress(&mut slowed, 10, 100, from_source), [], "the source is slow, not the compressing");
    let seen = compress(&mut slowed, 20, 900, from_source);
    assert_eq!(seen, [Zstd(1), Zstd(-5), Plain]);
    // The head is blocked and nothing is clear: whatever it is, the wire is worth more.
    let blocked = |n: u64, waits: &mut Waits| {
        let below = (n == 0).then_some(NodeId(1)).into_iter();
        waits.waited(Duration::from_millis(490), false, false, below);
    };
    assert_eq!(compress(&mut slowed, 60, 100, blocked), [Zstd(-5), Zstd(1), Zstd(3), Zstd(6), Zstd(9)]);
    let used = slowed.lab.d.levels.unwrap();
    assert_eq!(used.to_string(), "levels off to 9, last 9");
    let json = serde_json::to_value(used).unwrap();
    assert_eq!(json, json!({"level": 9, "lowest": null, "highest": 9}));

    let mut fixed = Slowed::new(4, None, 2);
    assert_eq!(compress(&mut fixed, 20, 900, from_source), []);
    assert_eq!(fixed.lab.d.levels, None);
}
