//! Where answers go: to a stream of this core, into the results of a request with several keys, or back to the core that asked.
//!
//! Invariants:
//! - A ticket lives from the moment a request is forwarded until its last answer, which the other core always sends.
//! - A request with several keys is answered when its last result is there, with the results in the order of its keys.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::BytesMut;
use generation_proto::limits::FRAME_OVERHEAD;
use generation_proto::reply::{MultiResult, ReplyTemplate, ReplyWriter};
use generation_proto::{Frame, Opcode, Reply, ReplyMeta, ReplyOptions, Status};
use slab::Slab;

use crate::config::CoreConfig;
use crate::env::{CoreId, Env};
use crate::mesh::{ForwardedReplies, ForwardedReply, ForwardedRequest, MeshMessage};
use crate::stats::{self, NodeStats};
use crate::streams::{Room, StreamRef, Streams};

/// Who gets the answer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    /// A request of a stream of this core.
    Stream { stream: StreamRef, id: u64, opcode: u8 },
    /// One key of a request of a stream of this core.
    Gather { gather: u32, position: u32 },
    /// A request of another core.
    Mesh {
        core: CoreId,
        ticket: u32,
        id: u64,
        opcode: u8,
    },
    /// One key of a request of another core.
    MeshGather { core: CoreId, ticket: u32, position: u32 },
}

/// Results of a request with several keys, until all are there.
#[derive(Debug)]
struct Gather {
    stream: StreamRef,
    id: u64,
    opcode: u8,
    left: u32,
    /// Bytes of values that still fit the reply.
    room: usize,
    /// Encoded results in the order they came, and where each key's is.
    bytes: BytesMut,
    places: Vec<(u32, u32)>,
}

/// A forwarded request, until it is answered.
#[derive(Debug)]
enum Ticket {
    Whole {
        stream: StreamRef,
        id: u64,
        opcode: u8,
    },
    Parts {
        gather: u32,
        positions: Vec<u32>,
        left: u32,
    },
}

/// What goes to one other core.
#[derive(Debug, Default)]
struct Link {
    requests: Vec<ForwardedRequest>,
    /// Requests forwarded and not answered.
    outstanding: usize,
    replies: BytesMut,
    answers: Vec<ForwardedReply>,
    /// Messages that must not be lost, while the other core's queue is full. Bounded by what that core may have forwarded here.
    outbox: VecDeque<MeshMessage>,
}

/// All that is on its way to being answered.
#[derive(Debug)]
pub(crate) struct Replies {
    gathers: Slab<Gather>,
    tickets: Slab<Ticket>,
    links: Vec<Link>,
    /// Bytes of values and results in one reply of several.
    reply_bytes: usize,
    stream_reply_bytes: usize,
    forwarded_reply_bytes: usize,
    retry_after_ms: u32,
    /// What every reply of this turn says.
    pub(crate) server_time_ms: u64,
    pub(crate) map_epoch: u32,
}

impl Replies {
    pub(crate) fn new(cores: CoreId, config: &CoreConfig) -> Self {
        let limits = &config.node_limits;
        Self {
            gathers: Slab::new(),
            tickets: Slab::new(),
            links: (0..cores).map(|_| Link::default()).collect(),
            reply_bytes: config.limits.max_frame_len() - FRAME_OVERHEAD,
            stream_reply_bytes: limits.stream_reply_bytes,
            forwarded_reply_bytes: limits.forwarded_reply_bytes,
            retry_after_ms: u32::try_from(limits.retry_after.as_millis()).unwrap_or(u32::MAX),
            server_time_ms: 0,
            map_epoch: config.epoch,
        }
    }

    /// The fixed part of a reply of no shard.
    pub(crate) fn meta(&self, status: Status) -> ReplyMeta {
        ReplyMeta {
            server_time_ms: self.server_time_ms,
            map_epoch: self.map_epoch,
            status: status.code(),
            ..ReplyMeta::default()
        }
    }

    /// Answers `origin`.
    pub(crate) fn reply(
        &mut self,
        streams: &mut Streams,
        origin: Origin,
        meta: &ReplyMeta,
        options: &ReplyOptions<'_>,
        body: &[u8],
    ) {
        match origin {
            Origin::Stream { stream, id, opcode } => {
                if let Some(out) = streams.answer(stream, opcode) {
                    Reply {
                        id,
                        opcode,
                        meta: *meta,
                        options: *options,
                        body,
                    }
                    .encode(out);
                }
            }
            Origin::Mesh {
                core,
                ticket,
                id,
                opcode,
            } => {
                let link = &mut self.links[usize::from(core)];
                let start = link.replies.len();
                Reply {
                    id,
                    opcode,
                    meta: *meta,
                    options: *options,
                    body,
                }
                .encode(&mut link.replies);
                let len = (link.replies.len() - start) as u32;
                link.answers.push(ForwardedReply {
                    ticket,
                    position: None,
                    len,
                });
            }
            Origin::Gather { gather, position } => {
                let result = result(meta, options, body);
                self.result(streams, gather, position, body.len(), |out, fits| {
                    if fits {
                        result.encode(out);
                    } else {
                        refused(&result, out);
                    }
                });
            }
            Origin::MeshGather { core, ticket, position } => {
                let link = &mut self.links[usize::from(core)];
                let start = link.replies.len();
                result(meta, options, body).encode(&mut link.replies);
                let len = (link.replies.len() - start) as u32;
                link.answers.push(ForwardedReply {
                    ticket,
                    position: Some(position),
                    len,
                });
            }
        }
    }

    /// Answers a read, unless too much that was answered before is waiting to be taken: then it is `false`, nothing was done, and
    /// the request is to be executed again later.
    #[inline]
    pub(crate) fn reply_read(
        &mut self,
        streams: &mut Streams,
        origin: Origin,
        meta: &ReplyMeta,
        options: &ReplyOptions<'_>,
        value: &[u8],
    ) -> bool {
        match origin {
            Origin::Stream { stream, id, opcode } => {
                match streams.answer_within(stream, opcode, self.stream_reply_bytes) {
                    Room::Here(out) => Reply {
                        id,
                        opcode,
                        meta: *meta,
                        options: *options,
                        body: value,
                    }
                    .encode(out),
                    Room::Full => return false,
                    Room::Gone => {}
                }
            }
            Origin::Mesh { core, .. } | Origin::MeshGather { core, .. }
                if self.links[usize::from(core)].replies.len() > self.forwarded_reply_bytes =>
            {
                self.refuse(streams, origin, Status::Busy, "too much is being read for another core");
            }
            _ => self.reply(streams, origin, meta, options, value),
        }
        true
    }

    /// As [`reply_read`](Self::reply_read), of a reply without options to a request of a stream of this core.
    #[inline]
    pub(crate) fn reply_plainly(
        &self,
        streams: &mut Streams,
        (stream, id, opcode): (StreamRef, u64, u8),
        template: &mut ReplyTemplate,
        (status, version): (Status, u64),
        value: &[u8],
    ) -> bool {
        match streams.answer_within(stream, opcode, self.stream_reply_bytes) {
            Room::Here(out) => template.append(out, id, opcode, status.code(), version, value),
            Room::Full => return false,
            Room::Gone => {}
        }
        true
    }

    /// Answers a request of another core that every core answers a part of.
    pub(crate) fn reply_part(&mut self, streams: &mut Streams, origin: Origin, part: &[u8]) {
        match origin {
            Origin::Gather { gather, position } => {
                self.result(streams, gather, position, 0, |out, _| out.extend_from_slice(part));
            }
            Origin::MeshGather { core, ticket, position } => {
                let link = &mut self.links[usize::from(core)];
                link.replies.extend_from_slice(part);
                link.answers.push(ForwardedReply {
                    ticket,
                    position: Some(position),
                    len: part.len() as u32,
                });
            }
            Origin::Stream { .. } | Origin::Mesh { .. } => {}
        }
    }

    /// Answers `origin` with a refusal that says why.
    pub(crate) fn refuse(&mut self, streams: &mut Streams, origin: Origin, status: Status, message: &str) {
        let mut options = ReplyOptions::message(message);
        if matches!(status, Status::Busy) {
            options.retry_after_ms = Some(self.retry_after_ms);
        }
        self.reply(streams, origin, &self.meta(status), &options, &[]);
    }

    /// Begins to gather the results of `keys` keys.
    pub(crate) fn gather(&mut self, stream: StreamRef, id: u64, opcode: u8, keys: usize) -> u32 {
        let gather = Gather {
            stream,
            id,
            opcode,
            left: keys as u32,
            room: self.reply_bytes.saturating_sub(keys * MultiResult::OVERHEAD),
            bytes: BytesMut::new(),
            places: vec![(0, 0); keys],
        };
        self.gathers.insert(gather) as u32
    }

    /// Whether `core` may be sent another request.
    pub(crate) fn may_forward(&self, core: CoreId, limit: usize) -> bool {
        self.links[usize::from(core)].outstanding < limit
    }

    /// Forwards a request with one key, or one about a shard.
    pub(crate) fn forward(&mut self, core: CoreId, stream: StreamRef, frame: &Frame, deadline: Option<Instant>) {
        let ticket = Ticket::Whole {
            stream,
            id: frame.request_id,
            opcode: frame.opcode,
        };
        self.send(core, ticket, frame, deadline);
    }

    /// Forwards the keys at `positions` of a request whose results are gathered here.
    pub(crate) fn forward_parts(
        &mut self,
        core: CoreId,
        gather: u32,
        positions: Vec<u32>,
        frame: &Frame,
        deadline: Option<Instant>,
    ) {
        let left = positions.len() as u32;
        self.send(
            core,
            Ticket::Parts {
                gather,
                positions,
                left,
            },
            frame,
            deadline,
        );
    }

    fn send(&mut self, core: CoreId, ticket: Ticket, frame: &Frame, deadline: Option<Instant>) {
        let ticket = self.tickets.insert(ticket) as u32;
        let link = &mut self.links[usize::from(core)];
        link.outstanding += 1;
        link.requests.push(ForwardedRequest {
            ticket,
            deadline,
            frame: frame.clone(),
        });
    }

    /// Takes in the answers of `core`.
    pub(crate) fn answered(&mut self, streams: &mut Streams, core: CoreId, replies: ForwardedReplies) {
        let ForwardedReplies { mut bytes, answers } = replies;
        for answer in answers {
            let encoded = bytes.split_to((answer.len as usize).min(bytes.len()));
            let key = answer.ticket as usize;
            match (self.tickets.get_mut(key), answer.position) {
                (Some(&mut Ticket::Whole { stream, opcode, .. }), None) => {
                    self.close_ticket(core, key);
                    if let Some(out) = streams.answer(stream, opcode) {
                        out.extend_from_slice(&encoded);
                    }
                }
                (Some(Ticket::Parts { gather, left, .. }), Some(position)) => {
                    let gather = *gather;
                    *left -= 1;
                    if *left == 0 {
                        self.close_ticket(core, key);
                    }
                    let value_len = encoded.len().saturating_sub(MultiResult::OVERHEAD);
                    self.result(streams, gather, position, value_len, |out, fits| {
                        if fits {
                            out.extend_from_slice(&encoded);
                        } else if let Some(Ok(result)) = MultiResult::decode_all(&encoded).next() {
                            refused(&result, out);
                        }
                    });
                }
                _ => tracing::error!(
                    core,
                    ticket = answer.ticket,
                    "another core answered what it was not asked"
                ),
            }
        }
    }

    /// Sends what this turn made for other cores.
    pub(crate) fn flush<E: Env>(&mut self, env: &E, streams: &mut Streams, stats: &mut NodeStats) {
        for core in 0..self.links.len() as CoreId {
            let link = &mut self.links[usize::from(core)];
            if !link.answers.is_empty() {
                let bytes = std::mem::take(&mut link.replies).freeze();
                let answers = std::mem::take(&mut link.answers);
                link.outbox
                    .push_back(MeshMessage::Replies(ForwardedReplies { bytes, answers }));
            }
            while let Some(message) = link.outbox.pop_front() {
                if let Err(message) = env.mesh_send(core, message) {
                    link.outbox.push_front(message);
                    break;
                }
            }
            if link.requests.is_empty() {
                continue;
            }
            let requests = std::mem::take(&mut link.requests);
            stats.requests_forwarded += requests.len() as u64;
            if let Err(MeshMessage::Requests(requests)) = env.mesh_send(core, MeshMessage::Requests(requests)) {
                stats.requests_forwarded -= requests.len() as u64;
                self.not_forwarded(streams, core, requests, stats);
            }
        }
    }

    /// Whether anything is under way with other cores, or waits to be sent to them.
    pub(crate) fn is_idle(&self) -> bool {
        self.tickets.is_empty()
            && self
                .links
                .iter()
                .all(|link| link.outbox.is_empty() && link.answers.is_empty())
    }

    /// Queues a message that must reach `core`.
    pub(crate) fn post(&mut self, core: CoreId, message: MeshMessage) {
        self.links[usize::from(core)].outbox.push_back(message);
    }

    /// The other core's queue was full.
    fn not_forwarded(
        &mut self,
        streams: &mut Streams,
        core: CoreId,
        requests: Vec<ForwardedRequest>,
        stats: &mut NodeStats,
    ) {
        const FULL: &str = "the queue to the core that owns the shard is full";
        for request in requests {
            stats.requests_busy += 1;
            match self.close_ticket(core, request.ticket as usize) {
                Some(Ticket::Whole { stream, id, opcode }) => {
                    self.refuse(streams, Origin::Stream { stream, id, opcode }, Status::Busy, FULL);
                }
                Some(Ticket::Parts { gather, positions, .. }) => {
                    for position in positions {
                        self.refuse(streams, Origin::Gather { gather, position }, Status::Busy, FULL);
                    }
                }
                None => {}
            }
        }
    }

    fn close_ticket(&mut self, core: CoreId, key: usize) -> Option<Ticket> {
        let ticket = self.tickets.try_remove(key)?;
        self.links[usize::from(core)].outstanding -= 1;
        Some(ticket)
    }

    /// Adds one result; with the last one the request is answered.
    fn result(
        &mut self,
        streams: &mut Streams,
        key: u32,
        position: u32,
        value_len: usize,
        encode: impl FnOnce(&mut BytesMut, bool),
    ) {
        let Some(gather) = self.gathers.get_mut(key as usize) else {
            return;
        };
        let start = gather.bytes.len();
        let fits = value_len <= gather.room;
        if fits {
            gather.room -= value_len;
        }
        encode(&mut gather.bytes, fits);
        if let Some(place) = gather.places.get_mut(position as usize) {
            *place = (start as u32, (gather.bytes.len() - start) as u32);
        }
        gather.left -= 1;
        if gather.left > 0 {
            return;
        }
        let gather = self.gathers.remove(key as usize);
        let Some(out) = streams.answer(gather.stream, gather.opcode) else {
            return;
        };
        let meta = self.meta(Status::Ok);
        out.reserve(gather.bytes.len());
        let writer = ReplyWriter::begin(out, gather.opcode, gather.id, &meta, &ReplyOptions::default());
        if gather.opcode == Opcode::Stats.code() {
            stats::encode_totals(&gather.bytes, out);
        }
        for (start, len) in gather.places {
            out.extend_from_slice(&gather.bytes[start as usize..(start + len) as usize]);
        }
        writer.end(out);
    }
}

fn result<'a>(meta: &ReplyMeta, options: &ReplyOptions<'_>, value: &'a [u8]) -> MultiResult<'a> {
    MultiResult {
        status: meta.status,
        consistency: meta.consistency,
        shard: meta.shard,
        version: meta.version,
        index: meta.index,
        expires_at_ms: options.expires_at_ms.unwrap_or(0),
        value,
    }
}

/// A result that does not fit the reply any more: what was read is left out and has to be asked for again; what was written is
/// said as it is.
fn refused(result: &MultiResult<'_>, out: &mut BytesMut) {
    if result.value.is_empty() {
        result.encode(out);
    } else {
        MultiResult {
            status: Status::Busy.code(),
            value: &[],
            version: 0,
            expires_at_ms: 0,
            ..*result
        }
        .encode(out);
    }
}
