//! Frames a hostile peer sends, one test for each row of the table "Malformed input" that the codec decides, and what they may
//! cost.

use bytes::{Bytes, BytesMut};
use generation_proto::limits::{MAX_BATCH, MAX_KEY_LEN, MIN_FRAME_LIMIT, SESSION_WINDOW};
use generation_proto::request::KeyList;
use generation_proto::{
    Decoder, Frame, FrameError, Limits, Opcode, Operation, Request, RequestError, RequestOptions, Side, Status,
};

const LIMIT: usize = 10_000;

/// A header by hand.
fn header(len: u32, opcode: u8, flags: u8, options_len: u16) -> Vec<u8> {
    let mut bytes = len.to_le_bytes().to_vec();
    bytes.extend([opcode, flags]);
    bytes.extend(options_len.to_le_bytes());
    bytes.extend(77_u64.to_le_bytes());
    bytes
}

/// The error a stream of `bytes` ends with, which must come at the header, before any payload.
fn refused(side: Side, bytes: &[u8]) -> FrameError {
    let mut decoder = Decoder::new(side, LIMIT);
    decoder.feed(Bytes::copy_from_slice(&bytes[..15]));
    assert_eq!(decoder.next_frame(), Ok(None), "nothing can be said of 15 bytes");
    decoder.feed(Bytes::copy_from_slice(&bytes[15..]));
    let error = decoder.next_frame().unwrap_err();
    assert_eq!(decoder.next_frame(), Err(error));
    assert_eq!(error.request_id(), Some(77));
    error
}

#[test]
fn reserved_flags_are_refused() {
    for bit in 1..8 {
        for reply in 0..=1 {
            let flags = 1 << bit | reply;
            let error = refused(Side::Server, &header(0, 0x10, flags, 0));
            assert_eq!(error, FrameError::ReservedFlags { flags, request_id: 77 });
            assert_eq!(error.status(), Status::Malformed);
        }
    }
}

#[test]
fn frames_in_the_wrong_direction_are_refused() {
    let wrong = FrameError::WrongDirection { request_id: 77 };
    assert_eq!(refused(Side::Server, &header(32, 0x10, 1, 0)), wrong);
    assert_eq!(refused(Side::Client, &header(32, 0x10, 0, 0)), wrong);
}

#[test]
fn a_frame_over_the_limit_is_refused_and_one_at_it_is_not() {
    let error = refused(Side::Server, &header(LIMIT as u32 + 1, 0x10, 0, 0));
    assert_eq!(error.status(), Status::FrameTooLarge);
    assert_eq!(
        refused(Side::Server, &header(u32::MAX, 0x10, 0, 0)).status(),
        Status::FrameTooLarge
    );

    let mut decoder = Decoder::new(Side::Server, LIMIT);
    decoder.feed(header(LIMIT as u32, 0x10, 0, 0).into());
    assert_eq!(decoder.next_frame(), Ok(None));
    decoder.feed(vec![0; LIMIT].into());
    assert_eq!(decoder.next_frame().unwrap().unwrap().payload.len(), LIMIT);
}

#[test]
fn options_that_overlap_the_end_are_refused() {
    let overrun = |len, needed| FrameError::Overrun {
        len,
        needed,
        request_id: 77,
    };
    assert_eq!(refused(Side::Server, &header(9, 0x10, 0, 10)), overrun(9, 10));
    assert_eq!(refused(Side::Client, &header(31, 0x10, 1, 0)), overrun(31, 32));
    assert_eq!(refused(Side::Client, &header(40, 0x10, 1, 9)), overrun(40, 41));
    assert_eq!(refused(Side::Client, &header(0, 0x10, 1, u16::MAX)), overrun(0, 65_567));
}

#[test]
fn a_stream_that_ends_inside_a_frame_is_truncated() {
    let mut bytes = header(3, 0x10, 0, 0);
    bytes.extend(b"ke");
    for end in 1..bytes.len() {
        let mut decoder = Decoder::new(Side::Server, LIMIT);
        decoder.feed(Bytes::copy_from_slice(&bytes[..end]));
        assert_eq!(decoder.next_frame(), Ok(None));
        assert_eq!(decoder.finish(), Err(FrameError::Truncated { received: end }));
    }
    assert_eq!(Decoder::new(Side::Server, LIMIT).finish(), Ok(()));
}

#[test]
fn an_announced_frame_costs_what_has_arrived_of_it() {
    let announced = 8 << 20;
    let mut bytes = header(announced, 0x11, 0, 0);
    bytes.extend(vec![0; 100]);
    let mut decoder = Decoder::new(Side::Server, announced as usize);
    let before = allocated();
    for byte in bytes {
        decoder.feed(Bytes::from(vec![byte]));
        assert_eq!(decoder.next_frame(), Ok(None));
    }
    let grown = allocated() - before;
    assert!(grown <= 8 << 10, "{grown} bytes allocated in all for 116 that arrived");
}

#[test]
fn undrained_pieces_are_copied_a_bounded_number_of_times() {
    let mut stream = BytesMut::new();
    let key = [7; 100];
    for id in 0..2_000 {
        let operation = Operation::Get { key: &key };
        let options = RequestOptions::default();
        Request { id, options, operation }.encode(&mut stream);
    }
    let stream = stream.freeze();
    let mut decoder = Decoder::new(Side::Server, LIMIT);
    let before = allocated();
    for at in 0..stream.len() {
        decoder.feed(stream.slice(at..=at));
    }
    let grown = allocated() - before;
    assert!(
        grown <= 4 * stream.len(),
        "{grown} bytes allocated for {} that arrived",
        stream.len()
    );
    let mut count = 0;
    while let Some(frame) = decoder.next_frame().unwrap() {
        assert_eq!((frame.request_id, &frame.payload[..]), (count, &key[..]));
        count += 1;
    }
    assert_eq!((count, decoder.finish()), (2_000, Ok(())));
}

#[test]
fn a_decoder_in_error_keeps_nothing() {
    let mut decoder = Decoder::new(Side::Server, LIMIT);
    decoder.feed(header(0, 0x10, 0xff, 0).into());
    assert!(decoder.next_frame().is_err());
    for _ in 0..100 {
        decoder.feed(vec![0; 10_000].into());
    }
    assert_eq!(decoder.buffered_len(), 0);
}

fn request(opcode: Opcode, options: &[u8], body: &[u8]) -> Result<(), RequestError> {
    let limits = Limits {
        max_key_len: 8,
        max_value_len: 10,
    };
    let frame = Frame {
        opcode: opcode.code(),
        options_len: options.len() as u16,
        request_id: 1,
        payload: [options, body].concat().into(),
    };
    Request::decode(&frame, &limits).map(|_| ())
}

#[test]
fn keys_and_values_over_the_limits_are_refused_with_their_own_status() {
    let status = |opcode, body: &[u8]| request(opcode, &[], body).unwrap_err().status();
    assert_eq!(request(Opcode::Get, &[], b"12345678"), Ok(()));
    assert_eq!(status(Opcode::Get, b"123456789"), Status::KeyTooLarge);
    assert_eq!(status(Opcode::Get, b""), Status::InvalidArgument);
    assert_eq!(request(Opcode::Put, &[], b"\x01\x00k0123456789"), Ok(()));
    assert_eq!(status(Opcode::Put, b"\x01\x00k0123456789a"), Status::ValueTooLarge);
    assert_eq!(status(Opcode::Put, b"\x09\x00123456789v"), Status::KeyTooLarge);
    assert_eq!(status(Opcode::Put, b"\x00\x00v"), Status::InvalidArgument);
    assert_eq!(status(Opcode::Put, b"\x05\x00key"), Status::Malformed);
    assert_eq!(status(Opcode::Put, b"\x05"), Status::Malformed);
}

#[test]
fn bodies_that_do_not_add_up_are_malformed() {
    for opcode in Opcode::ALL {
        let accepted: Vec<usize> = (0..40)
            .filter(|&len| request(*opcode, &[], &vec![1; len]).is_ok())
            .collect();
        let expected: Vec<usize> = match opcode {
            Opcode::Ping => (0..40).collect(),
            Opcode::Map | Opcode::Stats => vec![0],
            Opcode::Get | Opcode::Delete | Opcode::Touch => (1..=8).collect(),
            Opcode::Incr => (9..=16).collect(),
            Opcode::OpenSession | Opcode::CloseSession => vec![18],
            Opcode::TakeSnapshot => vec![2],
            Opcode::Cluster => (1..40).collect(),
            // Bytes of one are lengths, counts and limits far beyond what is there.
            _ => vec![],
        };
        assert_eq!(accepted, expected, "{opcode:?}");
    }
    let one_key = b"\x01\x00\x00\x00\x01\x00k";
    assert_eq!(request(Opcode::MultiGet, &[], one_key), Ok(()));
    let longer = [&one_key[..], b"x"].concat();
    assert_eq!(
        request(Opcode::MultiGet, &[], &longer).unwrap_err().status(),
        Status::Malformed
    );
    assert_eq!(
        request(Opcode::MultiGet, &[], &one_key[..6]).unwrap_err().status(),
        Status::Malformed
    );
}

#[test]
fn counts_out_of_range_are_refused_before_the_list_is_read() {
    for count in [0, MAX_BATCH as u32 + 1, u32::MAX] {
        for opcode in [Opcode::MultiGet, Opcode::MultiPut, Opcode::MultiDelete] {
            let error = request(opcode, &[], &count.to_le_bytes()).unwrap_err();
            assert_eq!(error.status(), Status::InvalidArgument, "{opcode:?} of {count}");
        }
    }
    // A count in range that the body does not have.
    let error = request(Opcode::MultiGet, &[], &(MAX_BATCH as u32).to_le_bytes()).unwrap_err();
    assert_eq!(error.status(), Status::Malformed);
}

#[test]
fn keys_of_a_session_need_numbers_within_its_window() {
    let numbers = |seq: u64| [&1_u128.to_le_bytes()[..], &seq.to_le_bytes(), &1_u64.to_le_bytes()].concat();
    let deleted = |keys: usize, seq: u64| {
        let mut buffer = BytesMut::new();
        KeyList::build((0..keys).map(|_| &b"k"[..]), &mut buffer);
        let option = [&b"\x06\x20"[..], &numbers(seq)].concat();
        let body = [&(keys as u32).to_le_bytes()[..], &buffer].concat();
        request(Opcode::MultiDelete, &option, &body)
    };
    let window = SESSION_WINDOW as usize;
    assert_eq!(deleted(window, 1), Ok(()));
    assert_eq!(deleted(window + 1, 1).unwrap_err().status(), Status::InvalidArgument);
    assert_eq!(deleted(2, u64::MAX - 1), Ok(()));
    assert_eq!(deleted(2, u64::MAX), Err(RequestError::SequenceOverflow));
    assert_eq!(RequestError::SequenceOverflow.status(), Status::InvalidArgument);
}

#[test]
fn a_session_has_an_id_and_a_shard_that_can_be() {
    let opened = |id: u128, shard: u16| {
        let body = [&id.to_le_bytes()[..], &shard.to_le_bytes()].concat();
        request(Opcode::OpenSession, &[], &body)
    };
    assert_eq!(opened(1, 4095), Ok(()));
    assert_eq!(opened(0, 0), Err(RequestError::NoSession));
    assert_eq!(RequestError::NoSession.status(), Status::InvalidArgument);
    assert_eq!(opened(1, 4096).unwrap_err().status(), Status::InvalidArgument);
}

#[test]
fn a_snapshot_is_of_a_shard_that_can_be() {
    let taken = |shard: u16| request(Opcode::TakeSnapshot, &[], &shard.to_le_bytes());
    assert_eq!(taken(4095), Ok(()));
    assert_eq!(taken(4096).unwrap_err().status(), Status::InvalidArgument);
    assert!(Opcode::TakeSnapshot.is_administrative() && !Opcode::TakeSnapshot.is_write());
}

#[test]
fn what_is_asked_about_the_cluster_is_for_administrators_and_may_be_asked_again() {
    assert!(Opcode::Cluster.is_administrative() && !Opcode::Cluster.is_write());
    let unknown = request(Opcode::Cluster, &[], &[200]).unwrap_err();
    assert_eq!(unknown, RequestError::UnknownVerb(200));
    assert_eq!(unknown.status(), Status::UnknownOperation);
}

#[test]
fn options_that_are_wrong_are_refused() {
    let status = |opcode, options: &[u8]| match request(opcode, options, b"k") {
        Ok(()) => Status::Ok,
        Err(error) => error.status(),
    };
    let deadline = b"\x05\x04\x01\x00\x00\x00";
    assert_eq!(status(Opcode::Get, deadline), Status::Ok);
    assert_eq!(status(Opcode::Get, &deadline[..5]), Status::Malformed);
    assert_eq!(status(Opcode::Get, b"\x05"), Status::Malformed);
    assert_eq!(status(Opcode::Get, b"\x05\x03\x01\x00\x00"), Status::Malformed);
    assert_eq!(
        status(Opcode::Get, &[&deadline[..], deadline].concat()),
        Status::Malformed
    );
    assert_eq!(status(Opcode::Get, b"\x02\x00"), Status::UnsupportedOption);
    assert_eq!(status(Opcode::Get, b"\x7f\x00"), Status::UnsupportedOption);
    assert_eq!(status(Opcode::Get, b"\x80\x00\xff\x01\x00"), Status::Ok);
    assert_eq!(status(Opcode::Get, b"\x04\x00"), Status::Malformed);
    assert_eq!(status(Opcode::Get, b"\x04\x01\x01"), Status::Malformed);
    assert_eq!(status(Opcode::Get, b"\x04\x01\x09"), Status::InvalidArgument);
    assert_eq!(
        status(Opcode::Touch, b"\x01\x08\x00\x00\x00\x00\x00\x00\x00\x00"),
        Status::InvalidArgument
    );
    assert_eq!(
        status(Opcode::Delete, b"\x03\x08\x00\x00\x00\x00\x00\x00\x00\x00"),
        Status::InvalidArgument
    );
    assert_eq!(status(Opcode::Delete, b"\x02\x00"), Status::UnsupportedOption);
    let if_version = b"\x03\x08\x01\x00\x00\x00\x00\x00\x00\x00";
    let both = [&if_version[..], b"\x02\x00"].concat();
    let error = request(Opcode::Put, &both, b"\x01\x00kv").unwrap_err();
    assert_eq!(error, RequestError::TwoConditions);
    assert_eq!(error.status(), Status::InvalidArgument);
    for (id, seq, first_unacked, expected) in [
        (1_u128, 5_u64, 5_u64, Status::Ok),
        (0, 5, 5, Status::InvalidArgument),
        (1, 0, 0, Status::InvalidArgument),
        (1, 5, 0, Status::InvalidArgument),
        (1, 5, 6, Status::InvalidArgument),
    ] {
        let option = [
            &b"\x06\x20"[..],
            &id.to_le_bytes(),
            &seq.to_le_bytes(),
            &first_unacked.to_le_bytes(),
        ]
        .concat();
        assert_eq!(
            status(Opcode::Delete, &option),
            expected,
            "session {id}, {seq}, {first_unacked}"
        );
    }
}

#[test]
fn hello_is_readable_across_versions() {
    let body = b"\x07\x00\x2a\x00\x03\x00\xff\xffabcand more that a later version says";
    let frame = Frame {
        opcode: Opcode::Hello.code(),
        options_len: 0,
        request_id: 1,
        payload: Bytes::from_static(body),
    };
    let request = Request::decode(&frame, &Limits::default()).unwrap();
    let Operation::Hello(hello) = request.operation else {
        panic!("not a Hello: {request:?}");
    };
    assert_eq!((hello.major, hello.minor, hello.name), (7, 42, "abc"));
    let not_utf8 = request_status(Opcode::Hello, b"\x01\x00\x00\x00\x01\x00\x00\x00\xff");
    assert_eq!(not_utf8, Status::Malformed);
}

fn request_status(opcode: Opcode, body: &[u8]) -> Status {
    request(opcode, &[], body).unwrap_err().status()
}

#[test]
fn the_largest_batch_fits_under_the_smallest_limits() {
    let limits = Limits {
        max_key_len: 16,
        max_value_len: 0,
    };
    assert_eq!(limits.max_frame_len(), MIN_FRAME_LIMIT);
    let keys: Vec<[u8; 16]> = (0..MAX_BATCH as u128).map(u128::to_le_bytes).collect();
    let mut buffer = BytesMut::new();
    let list = KeyList::build(keys.iter().map(|key| &key[..]), &mut buffer);
    let mut wire = BytesMut::new();
    let operation = Operation::MultiGet(list);
    let options = RequestOptions::default();
    Request {
        id: 1,
        options,
        operation,
    }
    .encode(&mut wire);
    let mut decoder = Decoder::new(Side::Server, limits.max_frame_len());
    decoder.feed(wire.freeze());
    let frame = decoder.next_frame().unwrap().unwrap();
    assert_eq!(Request::decode(&frame, &limits).unwrap().operation, operation);
}

#[test]
#[should_panic(expected = "invariant")]
fn a_key_that_no_length_can_say_is_the_callers_bug() {
    let key = vec![0; MAX_KEY_LEN + 1];
    KeyList::build([&key[..]], &mut BytesMut::new());
}

/// Bytes allocated so far by the calling thread, freed ones included.
fn allocated() -> usize {
    allocator::ALLOCATED.with(std::cell::Cell::get)
}

#[allow(unsafe_code, reason = "counts what the system's allocator is asked for")]
mod allocator {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        pub(crate) static ALLOCATED: Cell<usize> = const { Cell::new(0) };
    }

    struct Counting;

    // SAFETY: every call goes to the system's allocator with its arguments unchanged; the counter allocates nothing.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            let _ = ALLOCATED.try_with(|count| count.set(count.get() + layout.size()));
            // SAFETY: the caller's promise about `layout` is passed on.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: the pointer came from `alloc` or `realloc` above with this layout.
            unsafe { System.dealloc(pointer, layout) }
        }

        unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
            let _ = ALLOCATED.try_with(|count| count.set(count.get() + new_size));
            // SAFETY: the pointer came from `alloc` or `realloc` above, and the caller vouches for the sizes.
            unsafe { System.realloc(pointer, layout, new_size) }
        }
    }

    #[global_allocator]
    static COUNTING: Counting = Counting;
}
