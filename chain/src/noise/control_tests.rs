//! Tests of the control session: over real sockets for the handshake, over bytes for the frames.

use super::*;
use crate::control::{Progress, ToNode, ToServer};
use crate::keys::Token;
use proptest::prelude::*;
use std::net::{Shutdown, TcpListener};
use std::time::Duration;

type Pair = Session<TcpStream, TcpStream>;
/// A session and the credential for the next one, or why there is none.
type Opened<E> = Result<(Pair, Credential), E>;

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

/// The server's side as its hub does it.
fn serve(
    stream: &TcpStream,
    key: &SecretKey,
    known: Option<Credential>,
    end: Instant,
) -> Result<(Pair, Credential), Denied> {
    let mut hello = [0; 8];
    Bounded::new(stream, end).read_exact(&mut hello).map_err(Error::io("hello"))?;
    assert_eq!(hello, HELLO);
    let next = Credential::generate()?;
    let find = |id: &CredentialId| known.filter(|k| k.id == *id).map(|k| (k, next.clone()));
    respond(stream, key, find, end).map(|session| (session, next))
}

fn open(
    key: &SecretKey,
    known: Option<&Credential>,
    trusted: &PublicKey,
    used: &Credential,
) -> (Opened<Error>, Opened<Denied>) {
    let (near, far) = sockets();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let result = serve(&far, key, known.cloned(), soon());
            // As the hub does: a connection that is refused is closed.
            drop(far);
            result
        });
        let node = initiate(&near, trusted, used, soon());
        (node, server.join().unwrap())
    })
}

fn pair() -> (Pair, Pair) {
    let key = SecretKey::generate().unwrap();
    let credential = Token::generate().unwrap().credential();
    let (node, server) = open(&key, Some(&credential), &key.public(), &credential);
    (node.unwrap().0, server.unwrap().0)
}

/// What the node would send for these messages.
fn recorded(node: Pair, messages: &[ToServer]) -> Vec<u8> {
    let mut writer = Writer { stream: Vec::new(), sealer: node.writer.sealer };
    for message in messages {
        writer.send(message).unwrap();
    }
    writer.stream
}

fn reader(server: Pair, bytes: &[u8]) -> Reader<&[u8]> {
    Reader::new(bytes, server.reader.opener)
}

fn step(text: &str) -> ToServer {
    ToServer::Step(text.to_owned())
}

#[test]
fn both_sides_know_each_other_and_agree_on_the_next_credential() {
    let key = SecretKey::generate().unwrap();
    let token = Token::generate().unwrap();
    let (node, server) = open(&key, Some(&token.credential()), &key.public(), &token.credential());
    let ((mut node, next), (mut server, given)) = (node.unwrap(), server.unwrap());
    assert_eq!(next, given);
    node.writer.send(&step("disk")).unwrap();
    assert_eq!(server.reader.first(100, soon()).unwrap(), Some(step("disk")));
    // Longer than a frame, in the other direction.
    let order = ToNode::Order { name: "n1".into(), body: vec![7; 300_000] };
    let sent = order.clone();
    let writing = std::thread::spawn(move || {
        server.writer.send(&sent).unwrap();
        server.writer.send(&ToNode::Ping(3)).unwrap();
        server.writer.stream().shutdown(Shutdown::Write).unwrap();
        server
    });
    assert_eq!(node.reader.receive().unwrap(), Some(order));
    assert_eq!(node.reader.receive().unwrap(), Some(ToNode::Ping(3)));
    assert_eq!(node.reader.receive::<ToNode>().unwrap(), None);
    drop(writing.join().unwrap());
    // The next connection, with what was given.
    let (node, server) = open(&key, Some(&given), &key.public(), &next);
    assert!(node.is_ok() && server.is_ok());
}

#[test]
fn a_wrong_token_and_a_wrong_key_are_refused_with_words() {
    let key = SecretKey::generate().unwrap();
    let impostor = SecretKey::generate().unwrap();
    let credential = Token::generate().unwrap().credential();
    let (node, server) = open(&key, None, &key.public(), &credential);
    assert!(matches!(server, Err(Denied::Credential)));
    assert!(node.unwrap_err().to_string().contains("unknown there, spent, or expired"));
    // Right id, wrong secret.
    let wrong = Credential { psk: [1; 32], ..credential.clone() };
    let (node, server) = open(&key, Some(&credential), &key.public(), &wrong);
    assert!(matches!(server, Err(Denied::Key)));
    assert!(node.unwrap_err().to_string().contains("not the one with that id"));
    // The node trusts another key than the server's.
    let (node, server) = open(&impostor, Some(&credential), &key.public(), &credential);
    assert!(matches!(server, Err(Denied::Key)));
    let error = node.unwrap_err().to_string();
    assert!(
        error.contains(&key.public().to_string()) && error.contains(&impostor.public().to_string()),
        "{error}"
    );
}

#[test]
fn an_impostor_without_the_key_or_the_token_cannot_answer() {
    let key = SecretKey::generate().unwrap();
    let credential = Token::generate().unwrap().credential();
    for answer in [vec![0; ANSWER], vec![9; ANSWER - 1], vec![], vec![1; REFUSAL]] {
        let (near, mut far) = sockets();
        let mut bytes = u16::try_from(answer.len()).unwrap().to_le_bytes().to_vec();
        bytes.extend(&answer);
        far.write_all(&bytes).unwrap();
        let error = initiate(&near, &key.public(), &credential, soon()).unwrap_err().to_string();
        assert!(error.contains("handshake failed"), "{error}");
    }
    let (near, mut far) = sockets();
    far.write_all(&[0xff, 0xff]).unwrap();
    assert!(matches!(initiate(&near, &key.public(), &credential, soon()), Err(Error::Malformed(_))));
}

#[test]
fn a_repeated_beginning_gets_an_answer_that_its_sender_cannot_use() {
    let key = SecretKey::generate().unwrap();
    let credential = Token::generate().unwrap().credential();
    // A node speaks; somebody listens.
    let (near, mut far) = sockets();
    let heard = std::thread::scope(|scope| {
        scope.spawn(|| {
            initiate(&near, &key.public(), &credential, Instant::now() + Duration::from_millis(200))
        });
        let mut heard = vec![0; 24 + 2 + FIRST];
        far.read_exact(&mut heard).unwrap();
        heard
    });
    let (mut near, far) = sockets();
    near.write_all(&heard).unwrap();
    // The handshake as such is answered, so it must not spend the token ...
    let (mut server, _) = serve(&far, &key, Some(credential), soon()).unwrap();
    let mut answer = [0; 2 + ANSWER];
    near.read_exact(&mut answer).unwrap();
    // ... and without the node's ephemeral key nothing after it opens.
    near.write_all(&[40, 0]).unwrap();
    near.write_all(&[7; 40]).unwrap();
    assert!(matches!(server.reader.first::<ToServer>(1000, soon()), Err(Error::Frame(0))));
}

#[test]
fn a_slow_handshake_ends_in_time() {
    let key = SecretKey::generate().unwrap();
    let (mut near, far) = sockets();
    let start = Instant::now();
    let server = std::thread::spawn(move || {
        let result = serve(&far, &key, None, Instant::now() + Duration::from_millis(500));
        (result.unwrap_err().to_string(), start.elapsed())
    });
    for byte in HELLO.iter().chain(&[7; 20]) {
        let _ = near.write_all(&[*byte]);
        std::thread::sleep(Duration::from_millis(30));
    }
    let (error, took) = server.join().unwrap();
    assert!(error.contains("took too long") && took < Duration::from_millis(800), "{error} {took:?}");
}

#[test]
fn cuts_are_errors_but_between_messages() {
    let messages = [step("disk"), step(&"x".repeat(150_000))];
    let (node, server) = pair();
    let bytes = recorded(node, &messages);
    let opener = server.reader.opener;
    let whole = bytes.len();
    let mut first = Reader::new(&bytes[..], opener);
    assert_eq!(first.receive().unwrap(), Some(messages[0].clone()));
    assert_eq!(first.receive().unwrap(), Some(messages[1].clone()));
    assert_eq!(first.receive::<ToServer>().unwrap(), None);
    let mut opener = first.opener;
    for cut in [1, 2, 3, 20, 26, 27, 1000, 70_000, whole - 1] {
        opener.next = 0;
        let mut reader = Reader::new(&bytes[..cut], opener);
        let end = loop {
            match reader.receive::<ToServer>() {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        // The first message ends after 2 + 16 + 4 + 6 bytes or so: nowhere where it is cut here.
        assert!(end.is_err(), "cut after {cut}: {end:?}");
        opener = reader.opener;
    }
}

#[test]
fn claims_and_tails_are_refused() {
    // Too long for a first message; a length that the message does not have; a tail.
    for (body, word) in [
        (&[0xff, 0xff, 0xff, 0x02, 0][..], "claims"),
        (&[9, 0, 0], "without a length"),
        (&[200, 0, 0, 0, 1], "ended inside"),
        (&[1, 0, 0, 0, 3, 3], "with a tail"),
        (&[2, 0, 0, 0, 3, 3], "with a tail"),
        (&[1, 0, 0, 0, 200], "cannot be read"),
    ] {
        let (mut node, server) = pair();
        let mut bytes = Vec::new();
        node.writer.sealer.seal(body, &mut bytes).unwrap();
        let error = reader(server, &bytes).receive::<ToServer>().unwrap_err().to_string();
        assert!(error.contains(word), "{body:?}: {error}");
    }
    let (node, mut server) = pair();
    let mut node = node;
    node.writer.send(&step(&"x".repeat(2000))).unwrap();
    assert!(server.reader.first::<ToServer>(1000, soon()).is_err());
    let long = ToServer::Step("x".repeat(LONGEST + 1));
    assert!(node.writer.send(&long).is_err());
    // An empty frame inside a message would let its sender go on for ever.
    let (mut node, server) = pair();
    let mut bytes = Vec::new();
    node.writer.sealer.seal(&[9, 0, 0, 0], &mut bytes).unwrap();
    node.writer.sealer.seal(&[], &mut bytes).unwrap();
    assert!(reader(server, &bytes).receive::<ToServer>().is_err());
}

#[test]
fn no_debug_text_holds_a_secret() {
    let (node, _) = pair();
    let text = format!("{node:?}");
    assert!(text.len() < 700 && text.contains("Sealer { next: 0, .. }"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_and_truncated_greetings_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..120), cut in 0usize..74) {
        let key = SecretKey::generate().unwrap();
        let credential = Token::generate().unwrap().credential();
        // Half of a right one as well: id and all.
        let (near, mut far) = sockets();
        let right = std::thread::scope(|scope| {
            scope.spawn(|| initiate(&near, &key.public(), &credential, Instant::now() + Duration::from_millis(20)));
            let mut heard = vec![0; 24 + 2 + FIRST];
            far.read_exact(&mut heard).unwrap();
            heard
        });
        let mut named = right[..24].to_vec();
        named.extend(&bytes);
        let mut garbage = HELLO.to_vec();
        garbage.extend(&bytes);
        for greeting in [&right[..cut.max(8)], &named, &garbage] {
            let (mut near, far) = sockets();
            near.write_all(greeting).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
            prop_assert!(serve(&far, &key, Some(credential.clone()), soon()).is_err());
        }
    }

    #[test]
    fn a_stream_that_is_altered_anywhere_delivers_a_true_beginning_only(at in 0usize..300, bit in 0u8..8) {
        let messages: Vec<_> = (0..6).map(|n| ToServer::Progress(Progress { chunks: n, ..Progress::default() })).collect();
        let (node, server) = pair();
        let mut bytes = recorded(node, &messages);
        prop_assume!(at < bytes.len());
        bytes[at] ^= 1 << bit;
        let mut reader = reader(server, &bytes);
        let mut got = Vec::new();
        while let Ok(Some(message)) = reader.receive::<ToServer>() {
            got.push(message);
        }
        prop_assert!(got.len() < messages.len() && got[..] == messages[..got.len()]);
    }

    #[test]
    fn any_frames_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (mut node, server) = pair();
        let mut framed = Vec::new();
        node.writer.sealer.seal(&bytes, &mut framed).unwrap();
        let mut reader = reader(server, &framed);
        let _ = reader.receive::<ToServer>();
        let (_, server) = pair();
        prop_assert!(!matches!(self::reader(server, &bytes).receive::<ToServer>(), Ok(Some(_))));
    }
}
