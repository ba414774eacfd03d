//! Messages between nodes: properties over arbitrary messages and pieces, and what a hostile node sends.

use bytes::{Bytes, BytesMut};
use generation_proto::peer::{
    Class, MAX_PAYLOAD_LEN, Message, MessageError, PeerDecoder, PeerHello, Ping, Quiesce, Refusal, control,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

const LIMIT: usize = 5_000;

/// A header by hand.
fn header(len: u32, kind: u8, class: u8, id: u64) -> Vec<u8> {
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend([kind, class]);
    bytes.extend(3_u16.to_le_bytes());
    bytes.extend(id.to_le_bytes());
    bytes
}

/// The error a stream of `bytes` ends with, which must come with the header, before any payload.
fn refused(bytes: &[u8]) -> MessageError {
    let mut decoder = PeerDecoder::new(LIMIT);
    decoder.feed(Bytes::copy_from_slice(&bytes[..15]));
    assert_eq!(decoder.next_message(), Ok(None), "nothing can be said of 15 bytes");
    decoder.feed(Bytes::copy_from_slice(&bytes[15..]));
    let error = decoder.next_message().unwrap_err();
    decoder.feed(Bytes::from_static(b"more"));
    assert_eq!(
        (decoder.next_message(), decoder.finish(), decoder.buffered_len()),
        (Err(error), Err(error), 0)
    );
    error
}

#[test]
fn an_unknown_class_is_refused() {
    for class in 5..=u8::MAX {
        assert_eq!(refused(&header(0, 1, class, 0)), MessageError::UnknownClass(class));
    }
}

#[test]
fn an_id_where_none_belongs_is_refused() {
    for class in [Class::OneWay, Class::Control] {
        assert_eq!(refused(&header(0, 1, class.code(), 9)), MessageError::Id(9));
    }
}

#[test]
fn a_message_over_the_limit_is_refused_and_one_at_it_is_not() {
    for len in [LIMIT as u32 + 1, u32::MAX] {
        let limit = LIMIT as u32;
        assert_eq!(refused(&header(len, 1, 0, 9)), MessageError::TooLarge { len, limit });
    }
    let mut decoder = PeerDecoder::new(LIMIT);
    decoder.feed(header(LIMIT as u32, 1, 0, 9).into());
    assert_eq!(decoder.next_message(), Ok(None));
    decoder.feed(vec![0; LIMIT].into());
    assert_eq!(decoder.next_message().unwrap().unwrap().payload.len(), LIMIT);
    const { assert!(MAX_PAYLOAD_LEN <= u32::MAX as usize) }
}

#[test]
fn fixed_messages_have_their_length() {
    let hello = [0, 39, PeerHello::MAX_LEN as u32 + 1];
    let others = [0, 15, 17];
    let wrong = [
        (Class::Refusal, 1, &[0, 2][..]),
        (Class::Control, control::HELLO, &hello),
    ];
    let pings = [control::PING, control::PONG].map(|kind| (Class::Control, kind, &others[..]));
    for (class, kind, lens) in wrong.into_iter().chain(pings) {
        for &len in lens {
            let class = class.code();
            assert_eq!(
                refused(&header(len, kind, class, 0)),
                MessageError::Malformed { class, kind, len }
            );
        }
    }
    // A kind of a later version is passed over, up to a bound.
    let mut decoder = PeerDecoder::new(LIMIT);
    decoder.feed(header(0, 77, Class::Control.code(), 0).into());
    assert_eq!(decoder.next_message().unwrap().unwrap().kind, 77);
    assert!(matches!(
        refused(&header(1025, 77, Class::Control.code(), 0)),
        MessageError::Malformed { .. }
    ));
}

#[test]
fn a_hello_that_cannot_be_read_is_none() {
    let hello = PeerHello {
        version: 1,
        core: 0,
        cores: 1,
        node: 2,
        directory: 3,
        incarnation: 4,
        cluster: "sim",
    };
    let mut out = BytesMut::new();
    hello.encode(&mut out);
    let payload = &out[16..];
    for len in 0..payload.len() {
        assert_eq!(PeerHello::decode(&payload[..len]), None, "{len} bytes");
    }
    let longer = [payload, b"of a later version"].concat();
    assert_eq!(PeerHello::decode(&longer), Some(hello));
    let mut changed = payload.to_vec();
    changed[40] = 0xff;
    assert_eq!(PeerHello::decode(&changed), None, "not UTF-8");
    let mut changed = [payload, &[b'x'; 300]].concat();
    changed[2..4].copy_from_slice(&256_u16.to_le_bytes());
    assert_eq!(PeerHello::decode(&changed), None, "a name too long");
}

/// What `bytes` are read as, fed in pieces that end at `cuts` and drained after each or only at the end.
fn decode(bytes: &[u8], cuts: &[usize], eager: bool) -> (Vec<Message>, Result<(), MessageError>) {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    ends.extend([0, bytes.len()]);
    ends.sort_unstable();
    let mut decoder = PeerDecoder::new(LIMIT);
    let mut messages = Vec::new();
    let drain = |decoder: &mut PeerDecoder, messages: &mut Vec<Message>| {
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        }
    };
    for piece in ends.windows(2) {
        decoder.feed(Bytes::copy_from_slice(&bytes[piece[0]..piece[1]]));
        if eager && let Err(error) = drain(&mut decoder, &mut messages) {
            return (messages, Err(error));
        }
    }
    let end = drain(&mut decoder, &mut messages).and_then(|()| decoder.finish());
    (messages, end)
}

fn a_message() -> impl Strategy<Value = Message> {
    (
        select(Class::ALL),
        any::<u8>(),
        any::<u16>(),
        any::<u64>(),
        vec(any::<u8>(), 0..200),
    )
        .prop_map(|(class, kind, shard, id, mut payload)| {
            let mut kind = kind;
            let mut id = id;
            match class {
                Class::Refusal => payload = vec![Refusal::Busy.code()],
                Class::Control => {
                    kind |= 0x10;
                    id = 0;
                }
                Class::OneWay => id = 0,
                Class::Request | Class::Reply => {}
            }
            Message {
                class,
                kind,
                shard,
                id,
                payload: payload.into(),
            }
        })
}

proptest! {
    #[test]
    fn streams_read_the_same_however_they_are_cut(
        messages in vec(a_message(), 0..12),
        cuts in vec(any::<usize>(), 0..12),
        eager: bool,
        keep: Index,
        tail in vec(any::<u8>(), 0..40),
    ) {
        let mut stream = BytesMut::new();
        for message in &messages {
            message.encode(&mut stream);
        }
        prop_assert_eq!(decode(&stream, &cuts, eager), (messages, Ok(())));
        let cut_off = &stream[..keep.index(stream.len() + 1)];
        let (some, end) = decode(cut_off, &cuts, eager);
        let used: usize = some.iter().map(|message| 16 + message.payload.len()).sum();
        prop_assert_eq!(end.is_ok(), used == cut_off.len());
        // With rubbish behind it: the same whatever the boundaries.
        stream.extend_from_slice(&tail);
        prop_assert_eq!(decode(&stream, &cuts, eager), decode(&stream, &[], true));
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_understood(
        bytes in vec(prop_oneof![Just(0_u8), Just(1_u8), Just(4_u8), any::<u8>()], 0..200),
        cuts in vec(any::<usize>(), 0..10),
        eager: bool,
    ) {
        let whole = decode(&bytes, &[], true);
        prop_assert_eq!(&decode(&bytes, &cuts, eager), &whole);
        let mut again = BytesMut::new();
        for message in &whole.0 {
            message.encode(&mut again);
            let _ = PeerHello::decode(&message.payload);
            let _ = Ping::decode(&message.payload);
            let _ = Quiesce::decode(&message.payload);
        }
        prop_assert_eq!(&again[..], &bytes[..again.len()]);
    }

    #[test]
    fn hellos_read_as_they_were_written(
        numbers: (u16, u16, u16, u64, u128, u64),
        cluster in "[a-z\u{e9}]{0,100}",
    ) {
        let (version, core, cores, node, directory, incarnation) = numbers;
        let hello = PeerHello { version, core, cores, node, directory, incarnation, cluster: &cluster };
        let mut out = BytesMut::new();
        hello.encode(&mut out);
        let (messages, end) = decode(&out, &[], true);
        prop_assert_eq!(end, Ok(()));
        prop_assert_eq!(PeerHello::decode(&messages[0].payload), Some(hello));
    }

    #[test]
    fn arbitrary_payloads_never_panic(payload in vec(any::<u8>(), 0..120)) {
        if let Some(quiesce) = Quiesce::decode(&payload) {
            prop_assert_eq!(&quiesce.to_bytes()[..], &payload[..]);
        }
        if let Some(ping) = Ping::decode(&payload) {
            prop_assert_eq!(&ping.to_bytes()[..], &payload[..]);
        }
        let _ = PeerHello::decode(&payload);
    }
}
