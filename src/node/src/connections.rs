//! The connections of one core: who they are, how long they may keep silent, reading requests off their streams, writing
//! replies to them, and closing them in good order.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use generation_proto::{ALPN_CLIENT, FrameError, close_code};
use generation_quic::{ConnectionKey, Driver, Event, Read, StreamError, StreamId};

use crate::config::{CoreConfig, Identity, Role};
use crate::dispatch::{Closing, Incoming, Source};
use crate::replies::{Origin, Replies};
use crate::stats::NodeStats;
use crate::streams::{HEAVY, Stream, StreamRef, Streams};

/// Bytes a peer must send within the node's patience for an unfinished frame to be waited for.
const LEAST_PROGRESS: u64 = 1024;

/// Requests put off that are tried again in one turn.
const RETRIED: usize = 64;

/// What a turn works with.
pub(crate) struct Context<'a> {
    pub(crate) now: Instant,
    pub(crate) driver: &'a mut Driver,
    pub(crate) streams: &'a mut Streams,
    pub(crate) replies: &'a mut Replies,
    pub(crate) stats: &'a mut NodeStats,
}

/// An established connection.
#[derive(Debug)]
struct Connection {
    key: ConnectionKey,
    identity: Identity,
    /// What it counts for.
    address: IpAddr,
    streams: Vec<u32>,
    /// No more is read; it is closed once its replies are acknowledged.
    closing: bool,
}

/// What a peer is given time for.
#[derive(Debug, Clone, Copy)]
enum Watch {
    /// To say `Hello`.
    Hello(ConnectionKey),
    /// To begin a request on a stream it opened.
    Silent(StreamRef),
    /// To go on with a frame of which this much of the stream's bytes had arrived.
    Partial(StreamRef, u64),
}

#[derive(Debug)]
pub(crate) struct Connections {
    slots: Vec<Option<Connection>>,
    /// How many connections each address has.
    per_address: BTreeMap<IpAddr, u32>,
    /// Streams that may have something to read.
    readable: VecDeque<u32>,
    /// Runs out in order: the patience is the same for all.
    watches: VecDeque<(Instant, Watch)>,
    /// Connections to be closed when their replies are acknowledged, or at a time.
    leaving: Vec<(Instant, Closing)>,
    /// Connections to be put on that list at the end of the turn.
    pub(crate) closing: Vec<Closing>,
    touched: Vec<u32>,
    config: CoreConfig,
}

impl Connections {
    pub(crate) fn new(config: CoreConfig) -> Self {
        Self {
            slots: Vec::new(),
            per_address: BTreeMap::new(),
            readable: VecDeque::new(),
            watches: VecDeque::new(),
            leaving: Vec::new(),
            closing: Vec::new(),
            touched: Vec::new(),
            config,
        }
    }

    /// Takes in one event of the driver's.
    pub(crate) fn event(&mut self, cx: &mut Context<'_>, key: ConnectionKey, event: &Event) {
        match *event {
            Event::Connected => self.connected(cx, key),
            Event::Opened(id) => {
                let max_frame_len = self.config.limits.max_frame_len();
                match self.connection(key) {
                    Some(connection) if !connection.closing => {
                        let stream = cx.streams.insert(key, id, max_frame_len);
                        connection.streams.push(stream.index);
                        let until = cx.now + self.config.node_limits.patience;
                        self.watches.push_back((until, Watch::Silent(stream)));
                        self.queue(cx, stream.index);
                    }
                    _ => {
                        cx.driver.stop(key, id, close_code::NONE);
                        cx.driver.reset(key, id, close_code::NONE);
                    }
                }
            }
            Event::Readable(id) => {
                if let Some(index) = self.find(cx, key, id) {
                    self.queue(cx, index);
                }
            }
            Event::Writable(id) => {
                if let Some(index) = self.find(cx, key, id) {
                    cx.streams.touch(index);
                }
            }
            Event::Stopped(id, _) => {
                if let Some(index) = self.find(cx, key, id) {
                    // A peer that takes no replies is asked no more questions.
                    self.abandon(cx, index);
                }
            }
            Event::Closed(ref reason) => {
                if let Some(connection) = self.take(key.slot()) {
                    tracing::debug!(peer = connection.identity.name, %reason, "connection ended");
                    for index in connection.streams {
                        cx.streams.remove(index);
                    }
                } else {
                    tracing::debug!(%reason, "connection not established");
                }
            }
            Event::Finished(_) | Event::Available => {}
        }
    }

    /// Reads requests off the streams that have any, some `limit` at most, in turns.
    pub(crate) fn read(&mut self, cx: &mut Context<'_>, incoming: &mut Vec<Incoming>, limit: usize) {
        for _ in 0..self.readable.len() {
            if incoming.len() >= limit {
                break;
            }
            let Some(index) = self.readable.pop_front() else { break };
            if let Some(stream) = cx.streams.at(index)
                && std::mem::take(&mut stream.queued)
            {
                self.read_stream(cx, incoming, index);
            }
        }
    }

    /// Whether some stream is waiting to be read.
    pub(crate) fn has_readable(&self) -> bool {
        !self.readable.is_empty()
    }

    /// Hands this turn's replies to the transport.
    pub(crate) fn write(&mut self, cx: &mut Context<'_>) {
        let mut touched = std::mem::take(&mut self.touched);
        cx.streams.take_touched(&mut touched);
        for &index in &touched {
            self.write_stream(cx, index);
        }
        self.touched = touched;
    }

    /// Closes what has run out of time, and what has said its last word.
    pub(crate) fn tend(&mut self, cx: &mut Context<'_>) {
        while let Some(&(at, watch)) = self.watches.front() {
            if at > cx.now {
                break;
            }
            self.watches.pop_front();
            self.run_out(cx, watch);
        }
        for closing in std::mem::take(&mut self.closing) {
            self.leave(cx, closing);
        }
        let mut kept = Vec::new();
        for (at, closing) in std::mem::take(&mut self.leaving) {
            let closing = if cx.driver.is_flushed(closing.connection) {
                closing
            } else if at <= cx.now {
                closing.unfinished()
            } else {
                kept.push((at, closing));
                continue;
            };
            cx.driver
                .close(cx.now, closing.connection, closing.code, &closing.reason);
            self.forget(cx, closing.connection);
        }
        self.leaving = kept;
    }

    /// When [`tend`](Self::tend) is due, at the latest.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let watch = self.watches.front().map(|&(at, _)| at);
        self.leaving.iter().map(|&(at, _)| at).chain(watch).min()
    }

    /// Connections not yet closed.
    pub(crate) fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Whether every request read has been answered and every reply taken by the transport.
    pub(crate) fn is_quiet(&self, streams: &mut Streams) -> bool {
        let mut all = self.slots.iter().flatten().flat_map(|connection| &connection.streams);
        all.all(|&index| streams.at(index).is_none_or(|stream| is_settled(stream)))
    }

    /// Has every connection closed, each once its replies are acknowledged.
    pub(crate) fn close_all(&mut self, code: u32, reason: &str) {
        let open = self.slots.iter().flatten().filter(|connection| !connection.closing);
        self.closing.extend(open.map(|connection| Closing {
            connection: connection.key,
            code,
            reason: reason.to_owned(),
        }));
    }

    /// Closes what is left without waiting for anything.
    pub(crate) fn close_at_once(&mut self, cx: &mut Context<'_>) {
        for closing in self
            .leaving
            .drain(..)
            .map(|(_, closing)| closing)
            .chain(self.closing.drain(..))
        {
            let closing = closing.unfinished();
            cx.driver
                .close(cx.now, closing.connection, closing.code, &closing.reason);
        }
    }

    fn connected(&mut self, cx: &mut Context<'_>, key: ConnectionKey) {
        let verdict = if cx.driver.alpn(key).as_deref() == Some(ALPN_CLIENT) {
            (self.config.authorize)(&cx.driver.peer_certificates(key))
        } else {
            Err("this application protocol is not served".to_owned())
        };
        let address = cx
            .driver
            .remote(key)
            .map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |remote| counted(remote.ip()));
        match verdict {
            Ok(identity) => {
                let count = self.per_address.entry(address).or_default();
                if *count >= self.config.node_limits.connections_per_address {
                    let reason =
                        format!("{count} connections of {address}, as many as it may have to this core of the node");
                    cx.stats.connections_crowded += 1;
                    tracing::info!(peer = identity.name, reason, "connection refused");
                    return cx.driver.close(cx.now, key, close_code::CROWDED, &reason);
                }
                *count += 1;
                tracing::debug!(peer = identity.name, role = ?identity.role, "connection established");
                cx.streams.connected(key, identity.role == Role::Admin);
                if self.slots.len() <= key.slot() {
                    self.slots.resize_with(key.slot() + 1, || None);
                }
                self.slots[key.slot()] = Some(Connection {
                    key,
                    identity,
                    address,
                    streams: Vec::new(),
                    closing: false,
                });
                self.watches
                    .push_back((cx.now + self.config.node_limits.patience, Watch::Hello(key)));
            }
            Err(reason) => {
                cx.stats.connections_unauthorized += 1;
                tracing::info!(remote = ?cx.driver.remote(key), reason, "connection refused");
                cx.driver.close(cx.now, key, close_code::UNAUTHORIZED, &reason);
            }
        }
    }

    fn read_stream(&mut self, cx: &mut Context<'_>, incoming: &mut Vec<Incoming>, index: u32) {
        let Some(reference) = cx.streams.reference(index) else {
            return;
        };
        let limits = &self.config.node_limits;
        let Some(stream) = cx.streams.at(index) else { return };
        if stream.output.len() > limits.stream_reply_bytes || stream.heavy >= HEAVY {
            cx.stats.streams_paused += u64::from(!stream.paused);
            stream.paused = true;
            return;
        }
        let source = Source::Stream(reference);
        if !stream.deferred.is_empty() {
            // Their replies may fill the output again, so few are tried at a time and nothing newer is read in this turn.
            let count = stream.deferred.len().min(RETRIED);
            incoming.extend(stream.deferred.drain(..count).map(|(frame, arrival)| Incoming {
                source,
                arrival,
                deadline: None,
                frame,
            }));
            return self.queue(cx, index);
        }
        if stream.input_done {
            return;
        }
        let arrival = stream.backlog_since.unwrap_or(cx.now);
        let before = incoming.len();
        let (decoder, received) = (&mut stream.decoder, &mut stream.received);
        let mut failure = None;
        let outcome = cx
            .driver
            .read(stream.connection, stream.id, limits.stream_read_bytes, |chunk| {
                if failure.is_some() {
                    return;
                }
                *received += chunk.len() as u64;
                decoder.feed(chunk);
                loop {
                    match decoder.next_frame() {
                        Ok(Some(frame)) => incoming.push(Incoming {
                            source,
                            arrival,
                            deadline: None,
                            frame,
                        }),
                        Ok(None) => break,
                        Err(error) => {
                            failure = Some(error);
                            break;
                        }
                    }
                }
            });
        let read = incoming.len() - before;
        cx.stats.requests += read as u64;
        stream.in_flight += read as u32;
        match outcome {
            Ok(Read::Blocked) => stream.backlog_since = None,
            Ok(Read::Limit) => {
                stream.backlog_since.get_or_insert(cx.now);
                self.queue(cx, index);
            }
            Ok(Read::Finished) => {
                stream.input_done = true;
                if failure.is_none() {
                    failure = stream.decoder.finish().err();
                }
                cx.streams.touch(index);
            }
            // The peer gave the stream up: nobody waits for its cx.replies.
            Err(StreamError::Peer(_) | StreamError::Closed | StreamError::ConnectionClosed) => {
                return self.abandon(cx, index);
            }
        }
        if let Some(error) = failure {
            self.malformed(cx, reference, &error);
        } else {
            self.watch_partial(cx, reference);
            self.bound_unfinished(cx, index);
        }
    }

    /// Sees to it that what peers leave unfinished stays within bounds: past them whoever has left most has to go.
    fn bound_unfinished(&mut self, cx: &mut Context<'_>, index: u32) {
        if cx.streams.count_unfinished(index) <= self.config.node_limits.unfinished_bytes {
            return;
        }
        let unfinished = |cx: &mut Context<'_>, connection: &Connection| -> usize {
            let lens = connection
                .streams
                .iter()
                .map(|&index| cx.streams.at(index).map_or(0, |s| s.decoder.buffered_len()));
            lens.sum()
        };
        let open = self.slots.iter().flatten().filter(|connection| !connection.closing);
        if let Some(most) = open.max_by_key(|connection| unfinished(cx, connection)) {
            cx.stats.connections_overloading += 1;
            self.closing.push(Closing {
                connection: most.key,
                code: close_code::UNFINISHED,
                reason: "too many bytes of unfinished requests".to_owned(),
            });
        }
    }

    /// Sees to it that an unfinished frame gets on.
    fn watch_partial(&mut self, cx: &mut Context<'_>, reference: StreamRef) {
        let Some(stream) = cx.streams.get(reference) else {
            return;
        };
        if stream.decoder.buffered_len() > 0 && !stream.watched {
            stream.watched = true;
            let watch = Watch::Partial(reference, stream.received);
            self.watches
                .push_back((cx.now + self.config.node_limits.patience, watch));
        }
    }

    /// What follows cannot be trusted: says so, and closes the connection once that is out.
    fn malformed(&mut self, cx: &mut Context<'_>, reference: StreamRef, error: &FrameError) {
        cx.stats.connections_malformed += 1;
        let Some(stream) = cx.streams.get(reference) else {
            return;
        };
        let (connection, id) = (stream.connection, stream.id);
        stream.input_done = true;
        if let Some(request_id) = error.request_id() {
            stream.in_flight += 1;
            let origin = Origin::Stream {
                stream: reference,
                id: request_id,
                opcode: 0,
            };
            cx.replies
                .refuse(cx.streams, origin, error.status(), &error.to_string());
        }
        cx.driver.stop(connection, id, close_code::PROTOCOL);
        self.closing.push(Closing {
            connection,
            code: close_code::PROTOCOL,
            reason: error.to_string(),
        });
    }

    fn write_stream(&mut self, cx: &mut Context<'_>, index: u32) {
        let Some(stream) = cx.streams.at(index) else { return };
        let (key, id) = (stream.connection, stream.id);
        if let Some(output) = cx.streams.hand_over(index) {
            let mut rest = [output];
            match cx.driver.write(key, id, &mut rest) {
                Ok(written) if written.complete => {}
                Ok(_) => cx.streams.give_back(index, &rest[0]),
                Err(_) => return self.abandon(cx, index),
            }
        } else if let Some(stream) = cx.streams.at(index)
            && !stream.output.is_empty()
        {
            match cx.driver.write_slice(key, id, &stream.output) {
                Ok(written) => cx.streams.taken(index, written.bytes),
                Err(_) => return self.abandon(cx, index),
            }
        }
        let room = self.config.node_limits.stream_reply_bytes / 2;
        let Some(stream) = cx.streams.at(index) else { return };
        if stream.output.len() <= room && (stream.paused || !stream.deferred.is_empty()) {
            stream.paused = false;
            return self.queue(cx, index);
        }
        if stream.input_done && is_answered(stream) {
            // What is written arrives without us.
            let _ = cx.driver.finish(key, id);
            self.drop_stream(cx, index);
        }
    }

    fn run_out(&mut self, cx: &mut Context<'_>, watch: Watch) {
        match watch {
            Watch::Hello(key) => {
                if self.connection(key).is_some() && !cx.streams.has_said_hello(key) {
                    self.timed_out(cx, key, "no Hello in time");
                }
            }
            Watch::Silent(reference) => {
                if let Some(stream) = cx.streams.get(reference)
                    && stream.received == 0
                {
                    self.abandon(cx, reference.index);
                }
            }
            Watch::Partial(reference, then) => {
                let Some(stream) = cx.streams.get(reference) else {
                    return;
                };
                let (key, received) = (stream.connection, stream.received);
                if stream.decoder.buffered_len() == 0 {
                    stream.watched = false;
                } else if received >= then + LEAST_PROGRESS || stream.paused {
                    self.watches.push_back((
                        cx.now + self.config.node_limits.patience,
                        Watch::Partial(reference, received),
                    ));
                } else {
                    self.timed_out(cx, key, "a request begun was not finished in time");
                }
            }
        }
    }

    fn timed_out(&mut self, cx: &mut Context<'_>, connection: ConnectionKey, reason: &str) {
        cx.stats.connections_timed_out += 1;
        self.closing.push(Closing {
            connection,
            code: close_code::TIMEOUT,
            reason: reason.to_owned(),
        });
    }

    /// Ends every stream of a connection after what it has been answered, and closes it when that is acknowledged.
    fn leave(&mut self, cx: &mut Context<'_>, closing: Closing) {
        let drain = self.config.node_limits.drain;
        let Some(connection) = self.connection(closing.connection) else {
            return;
        };
        if std::mem::replace(&mut connection.closing, true) {
            return;
        }
        let indexes = connection.streams.clone();
        for &index in &indexes {
            self.write_stream(cx, index);
        }
        let settled = |&index: &u32| cx.streams.at(index).is_none_or(|stream| is_settled(stream));
        let closing = if indexes.iter().all(settled) {
            closing
        } else {
            closing.unfinished()
        };
        for index in indexes {
            if let Some(stream) = cx.streams.at(index) {
                let (key, id) = (stream.connection, stream.id);
                // A stream that ends in the middle of a reply must not look as if it had ended after it.
                if stream.output.is_empty() {
                    let _ = cx.driver.finish(key, id);
                } else {
                    cx.driver.reset(key, id, closing.code);
                }
                cx.driver.stop(key, id, closing.code);
                self.drop_stream(cx, index);
            }
        }
        self.leaving.push((cx.now + drain, closing));
    }

    /// Gives a stream up in both directions.
    fn abandon(&mut self, cx: &mut Context<'_>, index: u32) {
        let Some(stream) = cx.streams.at(index) else { return };
        let (key, id) = (stream.connection, stream.id);
        cx.driver.stop(key, id, close_code::TIMEOUT);
        cx.driver.reset(key, id, close_code::NONE);
        self.drop_stream(cx, index);
    }

    fn drop_stream(&mut self, cx: &mut Context<'_>, index: u32) {
        let Some(stream) = cx.streams.at(index) else { return };
        let key = stream.connection;
        if let Some(connection) = self.connection(key) {
            connection.streams.retain(|&other| other != index);
        }
        cx.streams.remove(index);
    }

    fn forget(&mut self, cx: &mut Context<'_>, key: ConnectionKey) {
        if self.connection(key).is_none() {
            return;
        }
        if let Some(connection) = self.take(key.slot()) {
            for index in connection.streams {
                cx.streams.remove(index);
            }
        }
    }

    /// Takes a connection out of its slot.
    fn take(&mut self, slot: usize) -> Option<Connection> {
        let connection = self.slots.get_mut(slot)?.take()?;
        if let Entry::Occupied(mut count) = self.per_address.entry(connection.address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        Some(connection)
    }

    fn queue(&mut self, cx: &mut Context<'_>, index: u32) {
        if let Some(stream) = cx.streams.at(index)
            && !stream.queued
        {
            stream.queued = true;
            self.readable.push_back(index);
        }
    }

    fn connection(&mut self, key: ConnectionKey) -> Option<&mut Connection> {
        self.slots
            .get_mut(key.slot())?
            .as_mut()
            .filter(|connection| connection.key == key)
    }

    fn find(&mut self, cx: &mut Context<'_>, key: ConnectionKey, id: StreamId) -> Option<u32> {
        let connection = self.connection(key)?;
        connection
            .streams
            .iter()
            .copied()
            .find(|&index| cx.streams.at(index).is_some_and(|stream| stream.id == id))
    }
}

/// The address that a connection counts for. Whoever has one of IPv6 has a network of 64 bits of them.
fn counted(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// Whether every request that may have been executed is answered, and the answer with the transport.
fn is_settled(stream: &Stream) -> bool {
    stream.in_flight == 0 && stream.output.is_empty()
}

/// Whether, beyond that, no request was put off: those are read and not executed.
fn is_answered(stream: &Stream) -> bool {
    is_settled(stream) && stream.deferred.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_64_bits_counts_as_one_address() {
        let of = |text: &str| counted(text.parse().unwrap()).to_string();
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
        assert_eq!(of("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }
}
