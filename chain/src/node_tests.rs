//! A server and several nodes over loopback sockets, with the real decisions and no control connections: reports go to a
//! thread that asks [`core::wave`] and hands out its orders.

use super::*;
use crate::core::Place;
use crate::core::wave::{self, Action};
use crate::feed::{Compression, Feeder};
use crate::sign::Signer;
use crate::stream::{Part, PartKind};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

#[path = "damage_tests.rs"]
mod damage;

enum Event {
    Report(NodeId, Report),
    Gone(NodeId),
    Stop,
}

struct Lab {
    feeder: Feeder,
    head: Node,
    nodes: Vec<Option<Node>>,
    addresses: Vec<SocketAddr>,
    events: Sender<Event>,
    server: Option<JoinHandle<Vec<String>>>,
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A server with `count` nodes, `arity` children each, small windows, and no history.
fn lab(count: u32, arity: usize) -> Lab {
    lab_with(count, arity, |_, _| BTreeMap::new())
}

/// By parent and child: where the child dials in the parent's place.
type Detours = BTreeMap<(u32, u32), SocketAddr>;

/// The same, with something in between; the nodes' addresses are known by then.
fn lab_with(count: u32, arity: usize, detours: impl FnOnce(&Wave, &[SocketAddr]) -> Detours) -> Lab {
    let key = Wave::new([9; 16], 1).unwrap();
    let signer = Signer::new(&key).unwrap();
    let dead_after = Duration::from_secs(8);
    let config = |me: u32| Config {
        wave: key.clone(),
        me: NodeId(me),
        limits: Limits { survive: 2, window: 3 << 20, history: 0 },
        dead_after,
        signer: Some(signer.public()),
    };
    let (events, queue) = channel();
    let reporter = |me: u32| -> Reporter {
        let events = events.clone();
        Box::new(move |report| drop(events.send(Event::Report(NodeId(me), report))))
    };
    let head = Node::head(config(0), reporter(0)).unwrap();
    let (socket, server_address) = listener();
    std::thread::spawn({
        let head = head.handle();
        move || accept_loop(&socket, &head)
    });
    let (sockets, addresses): (Vec<_>, Vec<_>) = (0..count).map(|_| listener()).unzip();
    let nodes: Vec<Option<Node>> = sockets
        .into_iter()
        .zip(1..)
        .map(|(socket, n)| {
            let pools = Pools::of_node(config(n).limits.window);
            Some(Node::start(config(n), pools, socket, reporter(n)).unwrap())
        })
        .collect();
    let mut handles: BTreeMap<NodeId, Handle> = BTreeMap::from([(HEAD, head.handle())]);
    for (node, n) in nodes.iter().flatten().zip(1..) {
        handles.insert(NodeId(n), node.handle());
    }
    let settings = wave::Settings { arity, survive: 2, dead_after, stall: Duration::from_secs(60) };
    let known = addresses.clone();
    let detours = detours(&key, &addresses);
    let server = std::thread::spawn(move || {
        let mut wave = wave::Wave::new(settings, count, [5; 32], Duration::ZERO);
        let mut said = Vec::new();
        let mut actions = wave.begin();
        loop {
            for action in actions.drain(..) {
                match action {
                    Action::Order(node, place) => {
                        let addresses = match place.parent {
                            Some((HEAD, _)) => vec![server_address],
                            Some((NodeId(n), _)) => {
                                vec![*detours.get(&(n, node.0)).unwrap_or(&known[n as usize - 1])]
                            }
                            None => Vec::new(),
                        };
                        handles[&node].place(place, addresses);
                    }
                    other => said.push(format!("{other:?}")),
                }
            }
            let now = Duration::ZERO;
            actions = match queue.recv_timeout(Duration::from_millis(50)) {
                Ok(Event::Report(node, Report::Joined(link))) => {
                    wave.joined(node, &link, now);
                    Vec::new()
                }
                Ok(Event::Report(node, Report::Lost(link, _))) => wave.lost(node, &link, now),
                Ok(Event::Report(node, Report::Lacking(link, oldest))) => {
                    wave.lacking(node, &link, oldest, now)
                }
                Ok(Event::Report(node, Report::Damaged(link, chunk, why))) => {
                    said.push(format!("{node} refused chunk {chunk}: {why}"));
                    wave.damaged(node, &link, chunk, now)
                }
                Ok(Event::Report(_, Report::Silent(child, link))) => wave.silent_link(child, &link, now),
                Ok(Event::Gone(node)) => wave.gone(node, "it was killed"),
                Ok(Event::Stop) => return said,
                Err(_) => {
                    let mut actions = wave.tick(now);
                    for (node, handle) in handles.iter().filter(|(node, _)| **node != HEAD) {
                        actions.extend(wave.status(*node, handle.standing().status, now));
                    }
                    actions
                }
            };
        }
    });
    let (store, signer) = (Arc::clone(head.store()), Some(Arc::new(signer)));
    let feeder = Feeder::new(&key, store, Pools::of_head(0), signer, Compression::Off, 2);
    Lab { feeder, head, nodes, addresses, events, server: Some(server) }
}

impl Lab {
    fn kill(&mut self, n: u32) {
        self.nodes[n as usize - 1] = None;
        self.events.send(Event::Gone(NodeId(n))).unwrap();
    }

    /// The verdicts that were spoken.
    fn verdicts(&mut self) -> Vec<String> {
        self.events.send(Event::Stop).unwrap();
        self.server.take().unwrap().join().unwrap()
    }
}

fn noise(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 37) as u8).collect()
}

fn part() -> Part {
    Part { name: "/".to_owned(), kind: PartKind::Tar }
}

fn consume(node: &mut Node) -> JoinHandle<io::Result<Vec<u8>>> {
    let mut reader = node.reader().unwrap();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        while reader.next_part()?.is_some() {
            reader.read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    })
}

fn readers(lab: &mut Lab) -> Vec<JoinHandle<io::Result<Vec<u8>>>> {
    lab.nodes.iter_mut().flatten().map(consume).collect()
}

#[test]
fn chains_and_trees_deliver_the_same_bytes_to_everybody() {
    for (count, arity) in [(1, 1), (5, 1), (7, 2), (4, 4)] {
        let mut lab = lab(count, arity);
        let readers = readers(&mut lab);
        let bytes = noise(20 << 20);
        lab.feeder.begin_part(&part()).unwrap();
        lab.feeder.write_all(&bytes).unwrap();
        let verdicts = lab.events.clone();
        let sent = lab.feeder.finish().unwrap();
        for (reader, node) in readers.into_iter().zip(lab.nodes.iter().flatten()) {
            assert!(reader.join().unwrap().unwrap() == bytes);
            assert_eq!(node.wait_end().unwrap(), sent);
        }
        let end = Instant::now() + Duration::from_secs(5);
        while !lab.head.standing().drained {
            assert!(Instant::now() < end, "everybody has acknowledged everything");
            std::thread::sleep(Duration::from_millis(10));
        }
        verdicts.send(Event::Stop).unwrap();
        assert_eq!(lab.server.take().unwrap().join().unwrap(), Vec::<String>::new());
    }
}

#[test]
fn survivors_of_deaths_anywhere_get_every_byte() {
    for dead in [&[1][..], &[3], &[6], &[2, 3], &[1, 2, 4, 5]] {
        let mut lab = lab(6, 1);
        let mut readers: Vec<Option<_>> = readers(&mut lab).into_iter().map(Some).collect();
        let bytes = noise(30 << 20);
        lab.feeder.begin_part(&part()).unwrap();
        lab.feeder.write_all(&bytes[..12 << 20]).unwrap();
        for n in dead {
            lab.kill(*n);
            // It fails in its own time.
            drop(readers[*n as usize - 1].take());
        }
        lab.feeder.write_all(&bytes[12 << 20..]).unwrap();
        let Lab { feeder, .. } = &mut lab;
        let feeder = std::mem::replace(feeder, spare());
        let sent = feeder.finish().unwrap();
        for (n, reader) in readers.into_iter().enumerate() {
            let Some(reader) = reader else { continue };
            assert!(reader.join().unwrap().unwrap() == bytes, "node {} of {dead:?}", n + 1);
            assert_eq!(lab.nodes[n].as_ref().unwrap().wait_end().unwrap(), sent);
        }
        let verdicts = lab.verdicts();
        assert_eq!(verdicts.len(), dead.len(), "{verdicts:?}");
    }
}

/// A feeder of nothing.
fn spare() -> Feeder {
    let wave = Wave::new([0; 16], 1).unwrap();
    Feeder::new(&wave, Store::new().unwrap(), Pools::of_head(0), None, Compression::Off, 1)
}

#[test]
fn a_consumer_that_gives_up_leaves_a_relay_and_a_slow_one_slows_everybody() {
    let mut lab = lab(3, 1);
    drop(lab.nodes[0].as_mut().unwrap().reader());
    let mut slow = lab.nodes[2].as_mut().unwrap().reader().unwrap();
    let other = consume(lab.nodes[1].as_mut().unwrap());
    let bytes = noise(40 << 20);
    let expected = bytes.clone();
    let mut feeder = std::mem::replace(&mut lab.feeder, spare());
    let writing = std::thread::spawn(move || {
        feeder.begin_part(&part()).unwrap();
        feeder.write_all(&bytes).unwrap();
        feeder.finish().unwrap()
    });
    std::thread::sleep(Duration::from_millis(700));
    assert!(!writing.is_finished(), "windows are bounded");
    for node in lab.nodes.iter().flatten() {
        assert!(node.standing().fill <= 3 << 20, "{:?}", node.standing());
    }
    assert!(lab.nodes[2].as_ref().unwrap().standing().status.stuck);
    let mut read = Vec::new();
    while slow.next_part().unwrap().is_some() {
        slow.read_to_end(&mut read).unwrap();
    }
    assert!(read == expected && other.join().unwrap().unwrap() == expected);
    writing.join().unwrap();
    assert!(lab.nodes[0].as_ref().unwrap().wait_end().is_ok(), "failed is not dead");
}

#[test]
fn a_stream_that_is_given_up_reaches_everybody_as_a_failure() {
    let mut lab = lab(3, 1);
    let readers = readers(&mut lab);
    lab.feeder.begin_part(&part()).unwrap();
    lab.feeder.write_all(&noise(3 << 20)).unwrap();
    std::mem::replace(&mut lab.feeder, spare()).give_up("tar ended with exit status 2");
    for (reader, node) in readers.into_iter().zip(lab.nodes.iter().flatten()) {
        let error = reader.join().unwrap().unwrap_err().to_string();
        assert_eq!(error, "the server gave up: tar ended with exit status 2");
        assert_eq!(node.wait_end().unwrap_err(), error);
    }
}

#[test]
fn strays_disturb_nobody_and_a_slow_greeting_ends() {
    let mut lab = lab(2, 1);
    let readers = readers(&mut lab);
    let mut garbage = TcpStream::connect(lab.addresses[0]).unwrap();
    garbage.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut unknown = TcpStream::connect(lab.addresses[0]).unwrap();
    unknown.write_all(&HELLO).unwrap();
    unknown.write_all(&[7; 24]).unwrap();
    let address = lab.addresses[0];
    let slow = std::thread::spawn(move || {
        let mut slow = TcpStream::connect(address).unwrap();
        let start = Instant::now();
        for byte in HELLO.iter().chain(&[1; 24]) {
            if slow.write_all(&[*byte]).is_err() || slow.read(&mut [0]).is_ok_and(|n| n == 0) {
                break;
            }
            slow.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
        }
        start.elapsed()
    });
    let bytes = noise(5 << 20);
    lab.feeder.begin_part(&part()).unwrap();
    lab.feeder.write_all(&bytes).unwrap();
    std::mem::replace(&mut lab.feeder, spare()).finish().unwrap();
    for reader in readers {
        assert!(reader.join().unwrap().unwrap() == bytes);
    }
    let end = Instant::now() + Duration::from_secs(12);
    let entrance = Arc::clone(lab.nodes[0].as_ref().unwrap().entrance());
    while entrance.refusals.total() < 3 {
        assert!(Instant::now() < end, "{}", entrance.refusals.text());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(slow.join().unwrap() < Duration::from_secs(8));
    let reasons = [Refusal::Garbled, Refusal::Unexpected, Refusal::Late];
    assert_eq!(reasons.map(|reason| entrance.refusals.of(reason)), [1, 1, 1], "{}", entrance.refusals.text());
}

#[test]
fn a_place_names_no_secret_in_its_text() {
    let link = crate::core::Link { id: [1; 16], secret: [0xab; 32] };
    let place = Place { epoch: 1, parent: Some((HEAD, link)), children: Vec::new(), family: Vec::new() };
    let text = format!("{place:?}");
    assert!(!text.contains("171") && !text.contains("ab"), "{text}");
}
