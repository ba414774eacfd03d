//! What is read off the lanes, and what it is.

use bytes::Bytes;
use generation_proto::close_code;
use generation_proto::peer::{Class, HEADER_LEN, Message, PeerHello, Ping, Refusal, control};
use generation_quic::{ConnectionKey, Driver, Read, StreamError};

use super::{Asked, Delivery, Exchange, RequestHead};
use crate::peers::PeerError;

/// Milliseconds beyond which an answer says too little of another node's clock.
const MOST_ROUND_TRIP_MS: u64 = 500;

/// Most bytes of a hello: what a lane may have left unfinished before it has said one.
const HELLO_BYTES: usize = HEADER_LEN + PeerHello::MAX_LEN;

impl Exchange {
    pub(super) fn read(&mut self, now_ms: u64, driver: &mut Driver, place: usize, lane: usize) {
        let limit = self.config.limits.read_bytes;
        let connection = &mut self.connections[place];
        let (key, node) = (connection.key, connection.node);
        let Some(read) = &mut connection.lanes[lane] else {
            return;
        };
        read.queued = false;
        let mut messages = std::mem::take(&mut self.messages);
        let decoder = &mut read.decoder;
        let mut received = 0;
        let mut failure = None;
        let outcome = driver.read(key, read.stream, limit, |chunk| {
            if failure.is_some() {
                return;
            }
            received += chunk.len() as u64;
            decoder.feed(chunk);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(error) => {
                        failure = Some(error.to_string());
                        break;
                    }
                }
            }
        });
        if !read.greeted && messages.is_empty() && read.decoder.buffered_len() > HELLO_BYTES {
            failure.get_or_insert_with(|| "a lane begins with a hello".to_owned());
        }
        match outcome {
            Ok(Read::Blocked) => {}
            Ok(Read::Limit) => self.queue_read(place, lane),
            Ok(Read::Finished) | Err(StreamError::Peer(_) | StreamError::Closed) => {
                failure.get_or_insert_with(|| "a lane was ended".to_owned());
            }
            Err(StreamError::ConnectionClosed) => messages.clear(),
        }
        let stats = &mut self.nodes[node].stats;
        stats.received_bytes += received;
        stats.messages_received += messages.len() as u64;
        for message in messages.drain(..) {
            // A message may have closed the connection.
            if self.place(key) != Some(place) {
                break;
            }
            if let Err((code, reason)) = self.message(now_ms, driver, place, lane, message) {
                self.violation(driver, key, code, &reason);
            }
        }
        messages.clear();
        self.messages = messages;
        if let Some(reason) = failure {
            self.violation(driver, key, close_code::PROTOCOL, &reason);
        }
    }

    pub(super) fn message(
        &mut self,
        now_ms: u64,
        driver: &mut Driver,
        place: usize,
        lane: usize,
        message: Message,
    ) -> Result<(), (u32, String)> {
        let limits = &self.config.limits;
        let connection = &mut self.connections[place];
        let (key, node) = (connection.key, connection.node);
        let is_hello = message.class == Class::Control && message.kind == control::HELLO;
        let greeted = connection.lanes[lane].as_ref().is_some_and(|lane| lane.greeted);
        if is_hello == greeted {
            let reason = "a lane begins with one hello and has no other";
            return Err((close_code::PROTOCOL, reason.to_owned()));
        }
        if is_hello {
            self.greet(driver, place, lane, &message.payload)?;
            self.heard(driver, node, false);
            return Ok(());
        }
        connection.last_used = self.now;
        let link = connection.link.expect("invariant: a greeted connection has its link");
        let from = self.links[link].peer;
        let is_control = message.class == Class::Control;
        match message.class {
            Class::Request => {
                let len = message.payload.len();
                self.nodes[node].stats.requests += 1;
                if connection.incoming >= limits.incoming
                    || (connection.incoming > 0 && connection.incoming_bytes + len > limits.incoming_bytes)
                {
                    self.nodes[node].stats.requests_refused += 1;
                    let refusal = Bytes::copy_from_slice(&[Refusal::Busy.code()]);
                    self.enqueue(key, Class::Refusal, message.kind, message.shard, message.id, refusal);
                } else {
                    connection.incoming += 1;
                    connection.incoming_bytes += len;
                    let asked = Asked {
                        key,
                        shard: message.shard,
                        kind: message.kind,
                        id: message.id,
                        bytes: len,
                    };
                    self.deliveries
                        .push(Delivery::Request(RequestHead { from, asked }, message.payload));
                }
            }
            Class::Reply => {
                if self.calls.complete(message.id, link, Ok(message.payload)) {
                    self.links[link].calls -= 1;
                }
            }
            Class::Refusal => {
                let refusal = Refusal::from_code(message.payload[0]);
                if self.calls.complete(message.id, link, Err(PeerError::Refused(refusal))) {
                    self.links[link].calls -= 1;
                    self.nodes[node].stats.calls_refused += 1;
                }
            }
            Class::OneWay => {
                self.deliveries
                    .push(Delivery::Message(from, message.shard, message.kind, message.payload));
            }
            Class::Control => self.control(now_ms, key, node, message.kind, &message.payload),
        }
        self.heard(driver, node, !is_control);
        Ok(())
    }

    pub(super) fn control(&mut self, now_ms: u64, key: ConnectionKey, node: usize, kind: u8, payload: &[u8]) {
        let Some(ping) = Ping::decode(payload) else { return };
        match kind {
            control::PING => {
                let answer = Ping {
                    echo: ping.echo,
                    unix_ms: now_ms,
                };
                self.say(key, control::PONG, answer);
            }
            control::PONG => {
                let since_start = (self.now - self.start).as_nanos() as u64;
                let Some(round_trip) = since_start.checked_sub(ping.echo) else {
                    return;
                };
                let node = &mut self.nodes[node];
                node.stats.round_trip_us = round_trip / 1_000;
                let round_trip_ms = round_trip / 1_000_000;
                if round_trip_ms > MOST_ROUND_TRIP_MS {
                    // It would be wrong by up to half of that.
                    return;
                }
                let then = now_ms.saturating_sub(round_trip_ms / 2);
                let offset_ms = ping.unix_ms.wrapping_sub(then).cast_signed();
                node.clock_offset = Some((offset_ms, self.now));
            }
            _ => {}
        }
    }

    /// Something was heard of a node; `talk`: something other than a sign of life.
    pub(super) fn heard(&mut self, driver: &mut Driver, node: usize, talk: bool) {
        if self
            .detector
            .as_mut()
            .is_some_and(|detector| detector.heard(node, talk))
        {
            self.set_alive(driver, node, true);
        }
    }
}
