//! The encoding is what it was: every kind of message against its bytes in `golden/`.
//!
//! The files are written once. When a test here fails, the encoding has changed, and clients of the same major version can no
//! longer be understood: mend the code, not the file. A new message gets a new file.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use generation_proto::map::Map;
use generation_proto::peer::{Message, PeerDecoder, PeerHello, Ping, Quiesce};
use generation_proto::reply::{HelloReply, META_LEN, MultiResult, Page, Stat};
use generation_proto::request::Opcode;
use generation_proto::{Decoder, Frame, Limits, Reply, Request, Side};

mod vectors;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// The bytes in a file of hexadecimal digits, white space and comments from `#` to the end of the line.
fn golden(name: &str) -> Option<Vec<u8>> {
    let text = std::fs::read_to_string(directory().join(name)).ok()?;
    let digits: String = text
        .lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(|code| code.chars().filter(|c| !c.is_whitespace()))
        .collect();
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    Some((0..digits.len()).step_by(2).map(byte).collect())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn assert_golden(name: &str, encoded: &[u8]) {
    let encoded = hex(encoded);
    let golden = golden(name).unwrap_or_else(|| panic!("golden/{name} is missing; the encoding is now {encoded}"));
    assert_eq!(encoded, hex(&golden), "the encoding of {name} has changed");
}

fn whole_frame(side: Side, bytes: &[u8]) -> Option<Frame> {
    let mut decoder = Decoder::new(side, Limits::default().max_frame_len());
    decoder.feed(Bytes::copy_from_slice(bytes));
    let frame = decoder.next_frame().ok()??;
    decoder.finish().ok()?;
    Some(frame)
}

#[test]
fn requests_encode_to_their_vectors_and_back() {
    vectors::each_request(|name, request| {
        let name = format!("{name}.request.hex");
        let mut encoded = BytesMut::new();
        request.encode(&mut encoded);
        assert_golden(&name, &encoded);
        let frame = whole_frame(Side::Server, &golden(&name).unwrap()).unwrap();
        assert_eq!(
            Request::decode(&frame, &Limits::default()).as_ref(),
            Ok(request),
            "{name}"
        );
    });
}

#[test]
fn replies_encode_to_their_vectors_and_back() {
    vectors::each_reply(|name, reply| {
        let name = format!("{name}.reply.hex");
        let mut encoded = BytesMut::new();
        reply.encode(&mut encoded);
        assert_golden(&name, &encoded);
        let frame = whole_frame(Side::Client, &golden(&name).unwrap()).unwrap();
        assert_eq!(Reply::decode(&frame).as_ref(), Ok(reply), "{name}");
    });
}

/// The bodies of replies, as values: what a byte of them may not change unseen.
fn body_of(reply: &Reply<'_>) -> String {
    let body = reply.body;
    match reply.operation() {
        Some(Opcode::Hello) => format!("{:?}", HelloReply::decode(body)),
        Some(Opcode::Map) => format!("{:?}", Map::decode(body)),
        Some(Opcode::Stats) => format!("{:?}", Stat::decode_all(body).collect::<Vec<_>>()),
        Some(Opcode::Incr) => format!("{:?}", reply.counter()),
        Some(Opcode::MultiGet | Opcode::MultiPut | Opcode::MultiDelete) => {
            format!("{:?}", MultiResult::decode_all(body).collect::<Vec<_>>())
        }
        Some(Opcode::Keys | Opcode::Entries) => match Page::decode(body) {
            Ok((page, entries)) => format!("{page:?} {:?}", entries.collect::<Vec<_>>()),
            Err(error) => format!("{error:?}"),
        },
        _ => format!("{body:?}"),
    }
}

#[test]
fn every_byte_of_a_request_matters() {
    vectors::each_request(|name, request| {
        let mut encoded = BytesMut::new();
        request.encode(&mut encoded);
        for at in 0..encoded.len() {
            for flip in [0x01, 0x80] {
                let mut changed = encoded.clone();
                changed[at] ^= flip;
                let same = whole_frame(Side::Server, &changed)
                    .is_some_and(|frame| Request::decode(&frame, &Limits::default()).as_ref() == Ok(request));
                // The reserved field of Hello is the one a receiver ignores: Hello is readable across versions.
                let ignored = name == "hello" && (22..24).contains(&at);
                assert_eq!(same, ignored, "{name}: byte {at} flipped by {flip:#x}");
            }
        }
    });
}

#[test]
fn every_byte_of_a_reply_matters_but_the_reserved_ones() {
    vectors::each_reply(|name, reply| {
        let mut encoded = BytesMut::new();
        reply.encode(&mut encoded);
        let body = encoded.len() - reply.body.len();
        let mut ignored = BTreeSet::new();
        for at in 0..encoded.len() {
            let mut changed = encoded.clone();
            changed[at] ^= 0x01;
            let same = whole_frame(Side::Client, &changed).is_some_and(|frame| match Reply::decode(&frame) {
                Ok(changed) => {
                    changed.meta == reply.meta
                        && (changed.id, changed.opcode, changed.options) == (reply.id, reply.opcode, reply.options)
                        && body_of(&changed) == body_of(reply)
                }
                Err(_) => false,
            });
            if same {
                ignored.insert(at);
            }
        }
        let reserved: BTreeSet<usize> = match name {
            // Reserved fields of the map's head, its three nodes, two ranges, two shards and two replicas.
            "map" => [
                12..16,
                49..52,
                81..84,
                113..116,
                122..124,
                130..132,
                154..156,
                174..180,
                198..204,
                226..228,
            ]
            .into_iter()
            .flatten()
            .map(|at| at + body)
            .collect(),
            "keys" => [13..16, 38..40].into_iter().flatten().map(|at| at + body).collect(),
            "entries" => [13..16, 38..40, 71..73]
                .into_iter()
                .flatten()
                .map(|at| at + body)
                .collect(),
            _ => BTreeSet::new(),
        };
        assert_eq!(
            ignored, reserved,
            "{name}: bytes that may change unseen (the body starts at {body})"
        );
        assert!(body >= 16 + META_LEN);
    });
}

#[test]
fn every_file_is_a_vector() {
    let mut expected = BTreeSet::new();
    vectors::each_request(|name, _| {
        assert!(
            expected.insert(format!("{name}.request.hex")),
            "two vectors named {name}"
        );
    });
    vectors::each_reply(|name, _| assert!(expected.insert(format!("{name}.reply.hex")), "two vectors named {name}"));
    vectors::each_peer_message(|name, _| {
        assert!(expected.insert(format!("{name}.peer.hex")), "two vectors named {name}");
    });
    let files: BTreeSet<String> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(files, expected);
}

#[test]
fn every_operation_has_vectors() {
    let (mut requested, mut replied) = (BTreeSet::new(), BTreeSet::new());
    vectors::each_request(|_, request| _ = requested.insert(request.operation.opcode().code()));
    vectors::each_reply(|_, reply| _ = replied.insert(reply.opcode));
    let all: BTreeSet<u8> = Opcode::ALL.iter().map(|opcode| opcode.code()).collect();
    assert_eq!((&requested, &replied), (&all, &all));
}

fn whole_message(bytes: &[u8]) -> Option<Message> {
    let mut decoder = PeerDecoder::new(1 << 20);
    decoder.feed(Bytes::copy_from_slice(bytes));
    let message = decoder.next_message().ok()??;
    decoder.finish().ok()?;
    Some(message)
}

#[test]
fn peer_messages_encode_to_their_vectors_and_back() {
    vectors::each_peer_message(|name, encoded| {
        let file = format!("{name}.peer.hex");
        assert_golden(&file, encoded);
        let message = whole_message(&golden(&file).unwrap()).unwrap();
        let mut again = BytesMut::new();
        message.encode(&mut again);
        assert_eq!(again, encoded, "{name}");
        match name {
            "hello" => assert_eq!(PeerHello::decode(&message.payload), Some(vectors::PEER_HELLO)),
            "ping" | "pong" => assert_eq!(Ping::decode(&message.payload), Some(vectors::PING)),
            "quiesce" => assert_eq!(Quiesce::decode(&message.payload), Some(vectors::QUIESCE)),
            _ => {}
        }
    });
}

#[test]
fn every_byte_of_a_peer_message_matters() {
    vectors::each_peer_message(|name, encoded| {
        let message = whole_message(encoded).unwrap();
        for at in 0..encoded.len() {
            for flip in [0x01, 0x80] {
                let mut changed = encoded.to_vec();
                changed[at] ^= flip;
                assert_ne!(
                    whole_message(&changed).as_ref(),
                    Some(&message),
                    "{name}: byte {at} flipped by {flip:#x}"
                );
            }
        }
        for at in 0..message.payload.len() {
            let mut changed = message.payload.to_vec();
            changed[at] ^= 0x01;
            match name {
                "hello" => assert_ne!(PeerHello::decode(&changed), Some(vectors::PEER_HELLO)),
                "ping" | "pong" => assert_ne!(Ping::decode(&changed), Some(vectors::PING)),
                "quiesce" => assert_ne!(Quiesce::decode(&changed), Some(vectors::QUIESCE)),
                _ => {}
            }
        }
    });
}
