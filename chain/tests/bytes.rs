//! What goes over the wire, byte for byte: the same on machines of either byte order and of 32 and 64 bits. The expected
//! bytes are written by hand from docs/protocol.md, not taken from a run.

#![allow(clippy::unwrap_used)] // a test ends at the first surprise

use ka_chain::chunk::{Header, Kind};
use ka_chain::control::ToServer;
use ka_chain::core::{Acknowledgement, Link, NodeId, Place};
use ka_chain::link::prologue;
use ka_chain::noise::first_frame;
use ka_chain::seal::Wave;

#[test]
fn numbers_are_little_endian_whatever_the_machine() {
    let header = Header {
        kind: Kind::End,
        compressed: false,
        number: 0x0102_0304_0506_0708,
        plain: 0x1_0203,
        sealed: 0x1_0213,
    };
    let bytes = [2, 0, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1, 3, 2, 1, 0, 0x13, 2, 1, 0];
    assert_eq!(header.to_bytes(), bytes);
    assert_eq!(Header::from_bytes(&bytes).unwrap(), header);
    // A frame's length: 3 bytes, not 768.
    assert_eq!(first_frame(&[3, 0, 7, 8, 9, 1]), Some((&[7, 8, 9][..], 5)));
    let mut wave = Wave::new([1; 16], 1).unwrap();
    wave.number = 0x0a0b_0c0d;
    let text = prologue(&wave, &[2; 16], NodeId(0x0102), NodeId(3));
    assert_eq!(text[24..28], [0x0d, 0x0c, 0x0b, 0x0a]);
    assert_eq!(text[44..], [2, 1, 0, 0, 3, 0, 0, 0]);
}

#[test]
fn messages_have_no_padding_no_machine_words_and_no_order_of_a_machine() {
    // Numbers are in groups of 7 bits, the lowest first; texts and lists have their length in front.
    let said = Acknowledgement { full: true, held: vec![(NodeId(1), 5), (NodeId(300), 1 << 35)] };
    let bytes = [1, 2, 1, 5, 0xac, 2, 0x80, 0x80, 0x80, 0x80, 0x80, 1];
    assert_eq!(postcard::to_stdvec(&said).unwrap(), bytes);
    assert_eq!(postcard::from_bytes::<Acknowledgement>(&bytes).unwrap(), said);
    let place = Place {
        epoch: 128,
        parent: Some((NodeId(2), Link { id: [9; 16], secret: [8; 32] })),
        children: Vec::new(),
        family: vec![(NodeId(4), 1)],
    };
    let bytes = [&[0x80, 1, 1, 2][..], &[9; 16], &[8; 32], &[0, 1, 4, 1]].concat();
    assert_eq!(postcard::to_stdvec(&place).unwrap(), bytes);
    let step = ToServer::Step("disk".to_owned());
    assert_eq!(postcard::to_stdvec(&step).unwrap(), b"\x01\x04disk");
}
