//! A server and several nodes over loopback sockets.

use super::*;
use crate::chunk::{HEADER, Header, Kind};
use crate::feed::{Compression, Feeder};
use crate::seal::random;
use crate::stream::{Part, PartKind};
use crate::topology::{Parent, children, parents};
use std::io::Write;

struct Lab {
    feeder: Feeder,
    head: Arc<Children>,
    nodes: Vec<Node>,
    addresses: Vec<SocketAddr>,
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A server with `count` nodes, `arity` children each.
fn lab(count: usize, arity: usize) -> Lab {
    let wave = Wave::new([9; 16], 1).unwrap();
    let parents = parents(count, arity);
    let links: Vec<LinkId> = (0..count).map(|_| random().unwrap()).collect();
    let below = children(&parents);
    let window = Window::new(2 << 20);
    let first: Vec<LinkId> =
        parents.iter().zip(&links).filter(|(p, _)| **p == Parent::Server).map(|(_, l)| *l).collect();
    let head = Children::new(&window, &first);
    let (server, server_address) = listener();
    std::thread::spawn({
        let head = Arc::clone(&head);
        move || accept_loop(&server, &head)
    });
    let feeder = Feeder::new(&wave, window, Compression::Level(1), 2);
    let (sockets, addresses): (Vec<_>, Vec<_>) = (0..count).map(|_| listener()).unzip();
    let nodes = sockets
        .into_iter()
        .enumerate()
        .map(|(n, socket)| {
            let parent = match parents[n] {
                Parent::Server => server_address,
                Parent::Node(p) => addresses[p],
            };
            let children = below[n].iter().map(|c| links[*c]).collect();
            let place =
                Place { wave: wave.clone(), parent: vec![parent], link: links[n], children, window: 2 << 20 };
            Node::start(place, socket).unwrap()
        })
        .collect();
    Lab { feeder, head, nodes, addresses }
}

fn noise(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 37) as u8).collect()
}

fn part() -> Part {
    Part { name: "/".to_owned(), kind: PartKind::Tar }
}

fn consume(node: &mut Node) -> std::thread::JoinHandle<io::Result<Vec<u8>>> {
    let mut reader = node.reader().unwrap();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        while reader.next_part()?.is_some() {
            reader.read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    })
}

use std::io;

#[test]
fn chains_and_trees_deliver_the_same_bytes_to_everybody() {
    for (count, arity) in [(1, 1), (5, 1), (7, 2), (5, 4)] {
        let mut lab = lab(count, arity);
        let bytes = noise(9_000_001);
        let consumers: Vec<_> = lab.nodes.iter_mut().map(consume).collect();
        lab.feeder.begin_part(&part()).unwrap();
        lab.feeder.write_all(&bytes).unwrap();
        let record = lab.feeder.finish().unwrap();
        for consumer in consumers {
            assert!(consumer.join().unwrap().unwrap() == bytes);
        }
        for node in &lab.nodes {
            assert_eq!(node.wait_end(), Ok(record));
        }
        lab.head.close();
    }
}

#[test]
fn strays_and_garbage_disturb_nobody() {
    let mut lab = lab(2, 1);
    let mut strays: Vec<TcpStream> = Vec::new();
    for address in &lab.addresses {
        for garbage in [&b""[..], b"GET / HTTP/1.0\r\n\r\n", b"KADATA01 but no link"] {
            let mut stray = TcpStream::connect(address).unwrap();
            stray.write_all(garbage).unwrap();
            strays.push(stray);
        }
    }
    let consumers: Vec<_> = lab.nodes.iter_mut().map(consume).collect();
    lab.feeder.begin_part(&part()).unwrap();
    lab.feeder.write_all(&noise(3_000_000)).unwrap();
    lab.feeder.finish().unwrap();
    for consumer in consumers {
        assert_eq!(consumer.join().unwrap().unwrap().len(), 3_000_000);
    }
    let dropped: u64 = lab.nodes.iter().map(|n| n.children.strays.load(Ordering::Relaxed)).sum();
    assert!(dropped >= 2, "{dropped}");
}

#[test]
fn a_consumer_that_fails_leaves_a_relay() {
    let mut lab = lab(3, 1);
    let bytes = noise(20_000_000);
    let mut broken = lab.nodes[0].reader().unwrap();
    let consumers: Vec<_> = lab.nodes[1..].iter_mut().map(consume).collect();
    let failing = std::thread::spawn(move || {
        broken.next_part().unwrap();
        broken.read_exact(&mut [0; 100_000]).unwrap();
    });
    lab.feeder.begin_part(&part()).unwrap();
    lab.feeder.write_all(&bytes).unwrap();
    let record = lab.feeder.finish().unwrap();
    failing.join().unwrap();
    for consumer in consumers {
        assert!(consumer.join().unwrap().unwrap() == bytes);
    }
    assert_eq!(lab.nodes[0].wait_end(), Ok(record));
}

#[test]
fn a_stream_given_up_fails_everybody_with_the_reason() {
    let mut lab = lab(3, 1);
    let consumers: Vec<_> = lab.nodes.iter_mut().map(consume).collect();
    lab.feeder.begin_part(&part()).unwrap();
    lab.feeder.write_all(&noise(5_000_000)).unwrap();
    lab.feeder.give_up("reading /etc/shadow: Input/output error");
    for consumer in consumers {
        let error = consumer.join().unwrap().unwrap_err().to_string();
        assert_eq!(error, "the server gave up: reading /etc/shadow: Input/output error");
    }
    for node in &lab.nodes {
        assert!(node.wait_end().is_err());
    }
}

#[test]
fn a_server_that_goes_away_in_the_middle_is_a_failure_everywhere() {
    let mut lab = lab(3, 1);
    let consumers: Vec<_> = lab.nodes.iter_mut().map(consume).collect();
    lab.feeder.begin_part(&part()).unwrap();
    lab.feeder.write_all(&noise(5_000_000)).unwrap();
    // Not before the stream has reached the last one: a parent that was never reached is another failure.
    let end = Instant::now() + Duration::from_secs(60);
    while lab.nodes[2].received().chunks.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < end, "the stream never came");
        std::thread::sleep(Duration::from_millis(5));
    }
    lab.head.window().stop("killed");
    lab.head.close();
    // The first node's window stops; nobody tells the second but the first's closed sockets.
    for (node, consumer) in lab.nodes.iter().zip(consumers) {
        let error = node.wait_end().unwrap_err();
        assert!(error.contains("broke off"), "{error}");
        assert!(consumer.join().unwrap().is_err());
        node.stop("the parent was lost");
    }
}

/// A parent that sends what it is told to, for tests of what a child does with bad bytes.
fn child_of(bytes: impl FnOnce(&Wave) -> Vec<u8>) -> Result<EndRecord, String> {
    let wave = Wave::new([9; 16], 1).unwrap();
    let (parent, address) = listener();
    let (socket, _) = listener();
    let place = Place {
        wave: wave.clone(),
        parent: vec![address],
        link: [7; 16],
        children: Vec::new(),
        window: 1 << 20,
    };
    let node = Node::start(place, socket).unwrap();
    let (mut stream, _) = parent.accept().unwrap();
    let mut hello = [0; 24];
    stream.read_exact(&mut hello).unwrap();
    assert_eq!(hello[8..], [7; 16]);
    link::welcome(&mut stream).unwrap();
    stream.write_all(&bytes(&wave)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    node.wait_end()
}

/// A whole valid stream of one part.
fn stream(wave: &Wave) -> Vec<Vec<u8>> {
    let window = Window::new(64 << 20);
    let mut cursor = window.cursor();
    let mut feeder = Feeder::new(wave, Arc::clone(&window), Compression::Off, 1);
    feeder.begin_part(&part()).unwrap();
    feeder.write_all(&noise(3 * CHUNK)).unwrap();
    feeder.finish().unwrap();
    let mut chunks = Vec::new();
    while let Some(chunk) = cursor.next_chunk().unwrap() {
        chunks.push([&chunk.header.to_bytes()[..], &chunk.bytes[..]].concat());
    }
    chunks
}

#[test]
fn bad_streams_are_refused() {
    assert!(child_of(|wave| stream(wave).concat()).is_ok());
    let cut = child_of(|wave| stream(wave)[..3].concat()).unwrap_err();
    assert_eq!(cut, "the stream broke off after 3 chunks: the parent closed the connection");
    let inside = child_of(|wave| {
        let bytes = stream(wave).concat();
        bytes[..bytes.len() - 1].to_vec()
    });
    assert!(inside.unwrap_err().starts_with("the stream broke off after 4 chunks"));
    let swapped = child_of(|wave| {
        let mut chunks = stream(wave);
        chunks.swap(1, 2);
        chunks.concat()
    });
    assert_eq!(swapped.unwrap_err(), "chunk 2 where 1 was next");
    let renumbered = child_of(|wave| {
        let mut chunks = stream(wave);
        chunks.swap(1, 2);
        for (n, chunk) in chunks.iter_mut().enumerate() {
            chunk[4] = n as u8;
        }
        chunks.concat()
    });
    assert_eq!(renumbered.unwrap_err(), Error::Seal(1).to_string());
    let dropped = child_of(|wave| {
        let mut chunks = stream(wave);
        chunks.remove(2);
        chunks.concat()
    });
    assert_eq!(dropped.unwrap_err(), "chunk 3 where 2 was next");
    let altered = child_of(|wave| {
        let mut bytes = stream(wave).concat();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        bytes
    });
    assert!(altered.unwrap_err().contains("damaged or forged"));
    let foreign = child_of(|_| stream(&Wave::new([9; 16], 1).unwrap()).concat());
    assert_eq!(foreign.unwrap_err(), Error::Seal(0).to_string());
    let oversized = child_of(|_| {
        let header =
            Header { kind: Kind::Data, compressed: false, number: 0, plain: u32::MAX - 16, sealed: u32::MAX };
        let bytes: [u8; HEADER] = header.to_bytes();
        bytes.to_vec()
    });
    assert!(oversized.unwrap_err().contains("claims"));
}
