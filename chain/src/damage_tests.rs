//! Somebody between two nodes of a chain damages, forges, repeats, exchanges or cuts off chunks: nobody consumes a wrong
//! byte, the copy is asked for once more, and who goes on giving bad ones is taken out, nobody else.

use super::*;
use crate::buffer::Pool;
use crate::chunk::{HEADER, Header, Sealed};

/// The chunk that it is done to.
const CHUNK_HIT: u64 = 20;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tampering {
    /// A bit of the sealed bytes falls over.
    Body,
    /// The header is none any more.
    Header,
    /// The header says that it is the beginning of a part.
    Kind,
    /// The chunk before comes again.
    Repeated,
    /// The next chunk comes first.
    Exchanged,
    /// The connection ends in the middle.
    Truncated,
    /// Sealed anew with the wave's key, which every node has, over other bytes.
    Forged,
}

fn read_chunk(from: &mut TcpStream) -> io::Result<(Header, Vec<u8>)> {
    let mut bytes = vec![0; HEADER];
    from.read_exact(&mut bytes)?;
    let header = Header::from_bytes(bytes[..].try_into().unwrap()).unwrap();
    bytes.resize(HEADER + header.sealed as usize, 0);
    from.read_exact(&mut bytes[HEADER..])?;
    Ok((header, bytes))
}

fn forged(wave: &Wave, header: &Header, bytes: &[u8]) -> Vec<u8> {
    let (pool, seal) = (Pool::new(0), Seal::new(wave));
    let sealed = pool.copy_of(&bytes[HEADER..]);
    let mut plain = seal.open(&Sealed { header: *header, bytes: sealed }, &pool).unwrap();
    plain[0] ^= 1;
    let len = plain.len();
    let made = seal.seal(header.kind, header.number, header.compressed, len, &plain, &pool).unwrap();
    [&made.header.to_bytes()[..], &made.bytes[..]].concat()
}

/// Passes a parent's chunks on, one of them as `what` says.
fn pass_chunks(from: &mut TcpStream, to: &mut TcpStream, wave: &Wave, what: Tampering) -> io::Result<()> {
    let mut before = Vec::new();
    loop {
        let (header, mut bytes) = read_chunk(from)?;
        if header.number == CHUNK_HIT {
            match what {
                Tampering::Body => bytes[HEADER + 1000] ^= 4,
                Tampering::Header => bytes[..HEADER].fill(0xff),
                Tampering::Kind => {
                    let other = Header { kind: crate::chunk::Kind::Part, ..header };
                    bytes[..HEADER].copy_from_slice(&other.to_bytes());
                }
                Tampering::Repeated => to.write_all(&before)?,
                Tampering::Exchanged => to.write_all(&read_chunk(from)?.1)?,
                Tampering::Truncated => {
                    to.write_all(&bytes[..bytes.len() / 2])?;
                    return Ok(());
                }
                Tampering::Forged => bytes = forged(wave, &header, &bytes),
            }
        }
        to.write_all(&bytes)?;
        before = bytes;
    }
}

/// Stands before `parent` and does it on the first connection, or on every one.
fn man_in_the_middle(parent: SocketAddr, wave: &Wave, what: Tampering, always: bool) -> SocketAddr {
    let (listener, address) = listener();
    let wave = wave.clone();
    std::thread::spawn(move || {
        for (number, child) in listener.incoming().enumerate() {
            let (mut child, mut up) = (child.unwrap(), TcpStream::connect(parent).unwrap());
            let (mut child_reads, mut up_writes) = (child.try_clone().unwrap(), up.try_clone().unwrap());
            std::thread::spawn(move || {
                // Either may be gone at any time.
                let _ = io::copy(&mut child_reads, &mut up_writes);
                let _ = up_writes.shutdown(std::net::Shutdown::Both);
            });
            let wave = wave.clone();
            std::thread::spawn(move || {
                let mut down = || {
                    if number > 0 && !always {
                        return io::copy(&mut up, &mut child).map(drop);
                    }
                    let mut len = [0; 2];
                    up.read_exact(&mut len)?;
                    let mut answer = vec![0; usize::from(u16::from_le_bytes(len))];
                    up.read_exact(&mut answer)?;
                    child.write_all(&[&len[..], &answer].concat())?;
                    pass_chunks(&mut up, &mut child, &wave, what)
                };
                let _ = down();
                let _ = child.shutdown(std::net::Shutdown::Both);
                let _ = up.shutdown(std::net::Shutdown::Both);
            });
        }
    });
    address
}

/// A chain of four with somebody between nodes 2 and 3. What was said, and how many copies node 3 refused; all but
/// `lost` have every byte.
fn run(what: Tampering, always: bool, lost: &[usize]) -> (Vec<String>, u64) {
    let mut lab = lab_with(4, 1, |wave, addresses| {
        Detours::from([((2, 3), man_in_the_middle(addresses[1], wave, what, always))])
    });
    let readers = readers(&mut lab);
    let bytes = noise(20 << 20);
    lab.feeder.begin_part(&part()).unwrap();
    lab.feeder.write_all(&bytes).unwrap();
    let sent = std::mem::replace(&mut lab.feeder, spare()).finish().unwrap();
    for (n, reader) in readers.into_iter().enumerate() {
        if !lost.contains(&(n + 1)) {
            assert!(reader.join().unwrap().unwrap() == bytes, "node {} {what:?}", n + 1);
            assert_eq!(lab.nodes[n].as_ref().unwrap().wait_end().unwrap(), sent);
        }
    }
    if !lost.is_empty() {
        // The verdict follows on what the nodes say of themselves.
        std::thread::sleep(Duration::from_millis(500));
    }
    let refused = |n: usize| lab.nodes[n].as_ref().unwrap().received().refused.load(Ordering::Relaxed);
    assert_eq!([0, 1, 3].map(refused), [0; 3], "{what:?}: nobody else was given it");
    let count = refused(2);
    (lab.verdicts(), count)
}

/// A header may come with the body before it, and is looked at first.
fn refused_by_3(said: &str, what: Tampering) -> bool {
    let before =
        what == Tampering::Header && said.starts_with(&format!("node 3 refused chunk {}: ", CHUNK_HIT - 1));
    before || said.starts_with(&format!("node 3 refused chunk {CHUNK_HIT}: "))
}

#[test]
fn a_copy_that_is_bad_once_is_asked_for_once_more_and_nobody_is_blamed() {
    use Tampering::{Body, Exchanged, Forged, Header, Kind, Repeated, Truncated};
    for (what, text) in [
        (Body, "chunk 20 is damaged or forged: it does not open"),
        (Kind, "chunk 20 is damaged or forged: it does not open"),
        (Header, "the header of a chunk is damaged"),
        (Repeated, "chunk 19 where 20 was next"),
        (Exchanged, "chunk 21 where 20 was next"),
        (Forged, "chunk 20 is forged: it is not the one that the server signed"),
    ] {
        let (said, refused) = run(what, false, &[]);
        assert_eq!((said.len(), refused), (1, 1), "{what:?}: {said:?}");
        assert!(refused_by_3(&said[0], what) && said[0].contains(text), "{what:?}: {said:?}");
    }
    assert_eq!(run(Truncated, false, &[]), (Vec::new(), 1), "it is dialled once more");
}

#[test]
fn who_goes_on_giving_bad_copies_is_taken_out_and_nobody_else() {
    for what in [Tampering::Body, Tampering::Header, Tampering::Forged] {
        let (said, refused) = run(what, true, &[2]);
        assert_eq!(refused, 2, "{what:?}: {said:?}");
        assert!(said[..2].iter().all(|s| refused_by_3(s, what)), "{what:?}: {said:?}");
        let out: Vec<&String> =
            said.iter().filter(|s| s.starts_with("Out(") || s.starts_with("Dead(")).collect();
        assert_eq!(out.len(), 1, "{what:?}: {said:?}");
        assert!(out[0].contains("NodeId(2)") && out[0].contains("on damaged"), "{said:?}");
    }
}
