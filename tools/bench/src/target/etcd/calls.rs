//! Requests and replies of etcd as bytes: gRPC messages of its API v3, and what its errors mean.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

use crate::target::{Failure, Outcome, Request};

/// Length of the head of a gRPC message: compressed flag and length.
const HEAD_LEN: usize = 5;

/// Messages of `rpc.proto`, reduced to the fields that are read or written here.
mod messages {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RangeRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub key: Vec<u8>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct KeyValue {
        #[prost(int64, tag = "3")]
        pub mod_revision: i64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RangeResponse {
        #[prost(message, repeated, tag = "2")]
        pub kvs: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct PutRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub key: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub value: Vec<u8>,
    }

    /// `target` 2 is MOD, `result` 0 is EQUAL.
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Compare {
        #[prost(int32, tag = "1")]
        pub result: i32,
        #[prost(int32, tag = "2")]
        pub target: i32,
        #[prost(bytes = "vec", tag = "3")]
        pub key: Vec<u8>,
        #[prost(int64, optional, tag = "6")]
        pub mod_revision: Option<i64>,
    }

    /// A `oneof` of the original; here exactly one field is set.
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RequestOp {
        #[prost(message, optional, tag = "1")]
        pub range: Option<RangeRequest>,
        #[prost(message, optional, tag = "2")]
        pub put: Option<PutRequest>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct TxnRequest {
        #[prost(message, repeated, tag = "1")]
        pub compare: Vec<Compare>,
        #[prost(message, repeated, tag = "2")]
        pub success: Vec<RequestOp>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ResponseOp {
        #[prost(message, optional, tag = "1")]
        pub range: Option<RangeResponse>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct TxnResponse {
        #[prost(bool, tag = "2")]
        pub succeeded: bool,
        #[prost(message, repeated, tag = "3")]
        pub responses: Vec<ResponseOp>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct StatusRequest {}

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ResponseHeader {
        #[prost(uint64, tag = "2")]
        pub member_id: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub header: Option<ResponseHeader>,
        #[prost(uint64, tag = "4")]
        pub leader: u64,
    }
}

use messages::{
    Compare, PutRequest, RangeRequest, RangeResponse, RequestOp, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
};

/// What a call asks, and so how its reply is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Get,
    Put,
    Swap,
    MultiGet,
    Status,
}

impl Call {
    pub(super) const ALL: [Self; 5] = [Self::Get, Self::Put, Self::Swap, Self::MultiGet, Self::Status];

    pub(super) const fn path(self) -> &'static str {
        match self {
            Self::Get => "/etcdserverpb.KV/Range",
            Self::Put => "/etcdserverpb.KV/Put",
            Self::Swap | Self::MultiGet => "/etcdserverpb.KV/Txn",
            Self::Status => "/etcdserverpb.Maintenance/Status",
        }
    }

    pub(super) const fn writes(self) -> bool {
        matches!(self, Self::Put | Self::Swap)
    }
}

/// Encodes a request as one gRPC message.
///
/// # Errors
/// The name of an operation that etcd does not have.
pub(super) fn encode(request: &Request<'_>) -> Result<(Call, Bytes), &'static str> {
    let range = |key: &[u8]| RangeRequest { key: key.to_vec() };
    let put = |key: &[u8], value: &[u8]| PutRequest {
        key: key.to_vec(),
        value: value.to_vec(),
    };
    Ok(match *request {
        Request::Get { key, .. } => (Call::Get, frame(&range(key))),
        Request::Put { key, value, ttl_ms: 0 } => (Call::Put, frame(&put(key, value))),
        Request::Put { .. } => return Err("time to live without a lease"),
        Request::PutIfVersion { key, value, version } => {
            let compare = Compare {
                result: 0,
                target: 2,
                key: key.to_vec(),
                mod_revision: Some(version.cast_signed()),
            };
            let success = RequestOp {
                range: None,
                put: Some(put(key, value)),
            };
            let request = TxnRequest {
                compare: vec![compare],
                success: vec![success],
            };
            (Call::Swap, frame(&request))
        }
        Request::Incr { .. } => return Err("counter"),
        Request::MultiGet { keys, key_len } => {
            let success = keys.chunks_exact(key_len).map(|key| RequestOp {
                range: Some(range(key)),
                put: None,
            });
            let request = TxnRequest {
                compare: Vec::new(),
                success: success.collect(),
            };
            (Call::MultiGet, frame(&request))
        }
    })
}

fn frame(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(HEAD_LEN + len);
    out.put_u8(0);
    out.put_u32(len as u32);
    message
        .encode(&mut out)
        .expect("invariant: a BytesMut grows to what is written into it");
    out.freeze()
}

/// Asks a member for its status.
pub(super) fn status_request() -> Bytes {
    frame(&StatusRequest {})
}

/// The message in a gRPC body.
fn unframe(body: &[u8]) -> Result<&[u8], String> {
    let Some((head, message)) = body.split_at_checked(HEAD_LEN) else {
        return Err(format!("a reply of {} bytes", body.len()));
    };
    let announced = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if head[0] != 0 || announced != message.len() {
        return Err("a reply that is compressed or not one message".to_owned());
    }
    Ok(message)
}

/// The outcome of a call that came back with status 0.
pub(super) fn outcome(call: Call, body: &[u8]) -> Result<Outcome, String> {
    let message = unframe(body)?;
    let wrong = |error: prost::DecodeError| error.to_string();
    Ok(match call {
        Call::Get => match RangeResponse::decode(message).map_err(wrong)?.kvs.first() {
            Some(entry) => Outcome::Hit {
                version: entry.mod_revision.cast_unsigned(),
            },
            None => Outcome::Miss,
        },
        Call::Put => Outcome::Stored,
        Call::Swap => {
            if TxnResponse::decode(message).map_err(wrong)?.succeeded {
                Outcome::Stored
            } else {
                Outcome::Conflict
            }
        }
        Call::MultiGet => {
            let responses = TxnResponse::decode(message).map_err(wrong)?.responses;
            let found = |range: &RangeResponse| !range.kvs.is_empty();
            let hits = responses
                .iter()
                .filter(|op| op.range.as_ref().is_some_and(found))
                .count() as u32;
            Outcome::Multi {
                hits,
                misses: responses.len() as u32 - hits,
            }
        }
        Call::Status => Outcome::Hit {
            version: u64::from(is_leader(&StatusResponse::decode(message).map_err(wrong)?)),
        },
    })
}

fn is_leader(status: &StatusResponse) -> bool {
    let member = status.header.as_ref().map_or(0, |header| header.member_id);
    member != 0 && member == status.leader
}

/// Sorts a gRPC status other than 0 (codes of the gRPC specification, texts of etcd's `rpctypes`).
///
/// # Errors
/// The status itself, when it means that the other end is no etcd.
pub(super) fn failure(call: Call, code: u32, message: &str) -> Result<Failure, String> {
    Ok(match code {
        // "request timed out" and "leader changed" come after the proposal, "no leader" before it.
        4 | 14 if call.writes() && !message.contains("no leader") => Failure::InDoubt,
        4 | 14 => Failure::Unavailable,
        8 if message.contains("space exceeded") => Failure::OutOfMemory,
        8 => Failure::Busy,
        12 => return Err(format!("gRPC status 12: {message}")),
        _ => Failure::Rejected,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_bytes_of_the_published_interface() {
        let (call, bytes) = encode(&Request::Get {
            key: b"k",
            version: false,
        })
        .unwrap();
        assert_eq!((call, &bytes[..]), (Call::Get, &b"\0\0\0\0\x03\x0a\x01k"[..]));
        let (call, bytes) = encode(&Request::Put {
            key: b"k",
            value: b"vv",
            ttl_ms: 0,
        })
        .unwrap();
        assert_eq!((call, &bytes[..]), (Call::Put, &b"\0\0\0\0\x07\x0a\x01k\x12\x02vv"[..]));
        let (call, bytes) = encode(&Request::PutIfVersion {
            key: b"k",
            value: b"v",
            version: 7,
        })
        .unwrap();
        // compare { target: MOD, key: "k", mod_revision: 7 }, success { request_put { key, value } }
        let txn = b"\x0a\x07\x10\x02\x1a\x01k\x30\x07\x12\x08\x12\x06\x0a\x01k\x12\x01v";
        assert_eq!((call, &bytes[HEAD_LEN..]), (Call::Swap, &txn[..]));
        assert!(encode(&Request::Incr { key: b"k" }).is_err());
        assert!(
            encode(&Request::Put {
                key: b"k",
                value: b"v",
                ttl_ms: 1
            })
            .is_err()
        );
    }

    #[test]
    fn replies_are_sorted() {
        let body = |message: &[u8]| {
            let mut body = vec![0, 0, 0, 0, message.len() as u8];
            body.extend_from_slice(message);
            body
        };
        // kvs { key: "k", mod_revision: 9, value: "v" }; the fields that nobody reads are passed over.
        let hit = body(b"\x12\x08\x0a\x01k\x18\x09\x2a\x01v");
        assert_eq!(outcome(Call::Get, &hit), Ok(Outcome::Hit { version: 9 }));
        assert_eq!(outcome(Call::Get, &body(b"")), Ok(Outcome::Miss));
        assert_eq!(outcome(Call::Swap, &body(b"\x10\x01")), Ok(Outcome::Stored));
        assert_eq!(outcome(Call::Swap, &body(b"")), Ok(Outcome::Conflict));
        // responses { response_range { kvs { } } }, responses { response_range { } }
        let several = body(b"\x1a\x04\x0a\x02\x12\x00\x1a\x02\x0a\x00");
        assert_eq!(
            outcome(Call::MultiGet, &several),
            Ok(Outcome::Multi { hits: 1, misses: 1 })
        );
        for garbage in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0\x05abc",
            b"\x01\0\0\0\0",
            b"\0\0\0\0\x01\xff",
        ] {
            assert!(outcome(Call::Get, garbage).is_err(), "{garbage:?}");
        }
    }

    #[test]
    fn a_write_that_may_have_been_proposed_is_in_doubt() {
        let timed_out = "etcdserver: request timed out, possibly due to previous leader failure";
        assert_eq!(failure(Call::Put, 14, timed_out), Ok(Failure::InDoubt));
        assert_eq!(failure(Call::Get, 14, timed_out), Ok(Failure::Unavailable));
        assert_eq!(
            failure(Call::Put, 14, "etcdserver: no leader"),
            Ok(Failure::Unavailable)
        );
        assert_eq!(
            failure(Call::Put, 8, "etcdserver: mvcc: database space exceeded"),
            Ok(Failure::OutOfMemory)
        );
        assert_eq!(
            failure(Call::Put, 8, "etcdserver: too many requests"),
            Ok(Failure::Busy)
        );
        assert!(failure(Call::Get, 12, "unknown service").is_err());
    }
}
