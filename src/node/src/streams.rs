//! The streams of a core's connections: what has been read and not yet understood, what has been answered and not yet taken.
//!
//! A stream is a lane: requests one way, replies the other, in any order. Replies of one turn gather in the stream's output and
//! go to the transport in one write. Output buffers come from a pool, so that a core with many idle streams holds none.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};
use generation_proto::{Decoder, Frame, Opcode, Side};
use generation_quic::{ConnectionKey, StreamId};
use slab::Slab;

/// Buffers the pool keeps, and the largest it keeps.
const POOL: usize = 256;
const POOL_BUFFER: usize = 64 << 10;

/// Output of these sizes is handed to the transport with its memory. Less is copied, so that its buffer stays in the pool; more may
/// be taken in many pieces, and what is not taken has to be copied back.
const HANDED_OVER: std::ops::RangeInclusive<usize> = 2 << 10..=64 << 10;

/// Requests of one stream with large replies that are executed at a time.
pub(crate) const HEAVY: u32 = 4;

/// Whether the reply to an operation may be of several entries.
#[inline]
pub(crate) fn is_heavy(opcode: u8) -> bool {
    const MULTI_GET: u8 = Opcode::MultiGet.code();
    const KEYS: u8 = Opcode::Keys.code();
    const ENTRIES: u8 = Opcode::Entries.code();
    matches!(opcode, MULTI_GET | KEYS | ENTRIES)
}

/// Where an answer can be encoded.
pub(crate) enum Room<'a> {
    /// Here.
    Here(&'a mut BytesMut),
    /// Nowhere at present: too much of what was answered before is waiting to be taken.
    Full,
    /// The stream is gone.
    Gone,
}

/// Names a stream for ever: indices are reused, serials are not (before 2^32 streams).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamRef {
    pub(crate) index: u32,
    pub(crate) serial: u32,
}

/// A request put off until the replies before it are taken, with when it arrived.
pub(crate) type Deferred = (Frame, Instant);

/// A stream being served.
#[allow(
    clippy::struct_excessive_bools,
    reason = "membership in lists and conditions that hold independently of each other"
)]
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) serial: u32,
    pub(crate) connection: ConnectionKey,
    pub(crate) id: StreamId,
    pub(crate) decoder: Decoder,
    /// Encoded replies the transport has not taken.
    pub(crate) output: BytesMut,
    /// The size of the next output, if it is likely to be handed over; otherwise 0.
    expected: usize,
    /// Requests read and not answered.
    pub(crate) in_flight: u32,
    /// Of them, those whose reply may be large ([`is_heavy`]).
    pub(crate) heavy: u32,
    /// Requests put off because `output` was full or too many large replies are being made.
    pub(crate) deferred: VecDeque<Deferred>,
    /// Bytes received so far.
    pub(crate) received: u64,
    /// Bytes of an unfinished frame, as counted in the sum over all streams.
    unfinished: usize,
    /// Whether a watch on an unfinished frame is set.
    pub(crate) watched: bool,
    /// Since when something received may be waiting to be read.
    pub(crate) backlog_since: Option<Instant>,
    /// In the list of streams to be read.
    pub(crate) queued: bool,
    /// In the list of streams to be written.
    pub(crate) touched: bool,
    /// Left unread because too many of its replies wait to be taken.
    pub(crate) paused: bool,
    /// The peer will send no more.
    pub(crate) input_done: bool,
}

impl Stream {
    /// Gives the stream memory for its output.
    #[cold]
    fn take_buffer(&mut self, pool: &mut Vec<BytesMut>) {
        if self.expected > 0 {
            self.output.reserve(self.expected);
        } else if let Some(buffer) = pool.pop() {
            self.output = buffer;
        }
    }
}

/// What a connection may do.
#[derive(Debug, Clone, Copy, Default)]
struct Standing {
    /// It has said `Hello`.
    hello: bool,
    /// It is an administrator's.
    admin: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Streams {
    slab: Slab<Stream>,
    serial: u32,
    /// Bytes of unfinished frames of all streams.
    unfinished: usize,
    touched: Vec<u32>,
    pool: Vec<BytesMut>,
    /// Connections, by their slots.
    connections: Vec<Standing>,
}

impl Streams {
    pub(crate) fn len(&self) -> usize {
        self.slab.len()
    }

    pub(crate) fn insert(&mut self, connection: ConnectionKey, id: StreamId, max_frame_len: usize) -> StreamRef {
        self.serial = self.serial.wrapping_add(1);
        let index = self.slab.insert(Stream {
            serial: self.serial,
            connection,
            id,
            decoder: Decoder::new(Side::Server, max_frame_len),
            output: BytesMut::new(),
            expected: 0,
            in_flight: 0,
            heavy: 0,
            deferred: VecDeque::new(),
            received: 0,
            unfinished: 0,
            watched: false,
            backlog_since: None,
            queued: false,
            touched: false,
            paused: false,
            input_done: false,
        });
        StreamRef {
            index: index as u32,
            serial: self.serial,
        }
    }

    pub(crate) fn remove(&mut self, index: u32) {
        let stream = self.slab.remove(index as usize);
        self.unfinished -= stream.unfinished;
        self.recycle(stream.output);
    }

    /// Counts what a stream has left unfinished; the sum over all streams.
    pub(crate) fn count_unfinished(&mut self, index: u32) -> usize {
        if let Some(stream) = self.slab.get_mut(index as usize) {
            let now = stream.decoder.buffered_len();
            self.unfinished = self.unfinished + now - stream.unfinished;
            stream.unfinished = now;
        }
        self.unfinished
    }

    pub(crate) fn get(&mut self, stream: StreamRef) -> Option<&mut Stream> {
        self.slab
            .get_mut(stream.index as usize)
            .filter(|found| found.serial == stream.serial)
    }

    pub(crate) fn at(&mut self, index: u32) -> Option<&mut Stream> {
        self.slab.get_mut(index as usize)
    }

    pub(crate) fn reference(&self, index: u32) -> Option<StreamRef> {
        Some(StreamRef {
            index,
            serial: self.slab.get(index as usize)?.serial,
        })
    }

    /// Notes a new connection, which has not said `Hello`, and whether it is an administrator's.
    pub(crate) fn connected(&mut self, connection: ConnectionKey, admin: bool) {
        if self.connections.len() <= connection.slot() {
            self.connections.resize(connection.slot() + 1, Standing::default());
        }
        self.connections[connection.slot()] = Standing { hello: false, admin };
    }

    /// Notes that a connection has said `Hello`.
    pub(crate) fn said_hello(&mut self, connection: ConnectionKey) {
        if let Some(standing) = self.connections.get_mut(connection.slot()) {
            standing.hello = true;
        }
    }

    pub(crate) fn has_said_hello(&self, connection: ConnectionKey) -> bool {
        self.connections
            .get(connection.slot())
            .is_some_and(|standing| standing.hello)
    }

    pub(crate) fn is_admin(&self, connection: ConnectionKey) -> bool {
        self.connections
            .get(connection.slot())
            .is_some_and(|standing| standing.admin)
    }

    /// Where one reply to a request of this stream is encoded; `None` when the stream is gone. Counts the request as answered.
    pub(crate) fn answer(&mut self, stream: StreamRef, opcode: u8) -> Option<&mut BytesMut> {
        match self.answer_within(stream, opcode, usize::MAX) {
            Room::Here(output) => Some(output),
            Room::Full | Room::Gone => None,
        }
    }

    /// As [`answer`](Self::answer), unless more than `limit` bytes are waiting already.
    #[inline]
    pub(crate) fn answer_within(&mut self, stream: StreamRef, opcode: u8, limit: usize) -> Room<'_> {
        let found = match self.slab.get_mut(stream.index as usize) {
            Some(found) if found.serial == stream.serial => found,
            _ => return Room::Gone,
        };
        if found.output.len() > limit {
            return Room::Full;
        }
        debug_assert!(found.in_flight > 0, "an answer without a request");
        found.in_flight = found.in_flight.saturating_sub(1);
        if is_heavy(opcode) {
            found.heavy = found.heavy.saturating_sub(1);
        }
        if !found.touched {
            found.touched = true;
            self.touched.push(stream.index);
        }
        if found.output.capacity() == 0 {
            found.take_buffer(&mut self.pool);
        }
        Room::Here(&mut found.output)
    }

    /// Has the stream written (or finished) at the end of the turn.
    pub(crate) fn touch(&mut self, index: u32) {
        if let Some(stream) = self.slab.get_mut(index as usize)
            && !stream.touched
        {
            stream.touched = true;
            self.touched.push(index);
        }
    }

    /// The streams to be written, each with its mark taken off.
    pub(crate) fn take_touched(&mut self, into: &mut Vec<u32>) {
        into.clear();
        std::mem::swap(into, &mut self.touched);
        for &index in &*into {
            if let Some(stream) = self.slab.get_mut(index as usize) {
                stream.touched = false;
            }
        }
    }

    /// Takes a stream's output, if it is to be handed over with its memory: if its size is right and it fills that memory half at
    /// least, because all of it is held until the peer has acknowledged it.
    pub(crate) fn hand_over(&mut self, index: u32) -> Option<Bytes> {
        let stream = self.slab.get_mut(index as usize)?;
        let len = stream.output.len();
        let fit = HANDED_OVER.contains(&len);
        stream.expected = if fit { len } else { 0 };
        (fit && len >= stream.output.capacity() / 2).then(|| std::mem::take(&mut stream.output).freeze())
    }

    /// Gives back what the transport did not take of an output that was handed over.
    pub(crate) fn give_back(&mut self, index: u32, rest: &[u8]) {
        if let Some(stream) = self.slab.get_mut(index as usize) {
            debug_assert!(stream.output.is_empty(), "an output was handed over whole");
            stream.output.extend_from_slice(rest);
        }
    }

    /// Notes that the transport took `bytes` of a stream's output.
    pub(crate) fn taken(&mut self, index: u32, bytes: usize) {
        let Some(stream) = self.slab.get_mut(index as usize) else {
            return;
        };
        if bytes == stream.output.len() {
            let output = std::mem::take(&mut stream.output);
            self.recycle(output);
        } else {
            stream.output.advance(bytes);
        }
    }

    fn recycle(&mut self, mut buffer: BytesMut) {
        if buffer.capacity() > 0 && buffer.capacity() <= POOL_BUFFER && self.pool.len() < POOL {
            buffer.clear();
            self.pool.push(buffer);
        }
    }
}
