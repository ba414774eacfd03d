//! What is queued for the lanes, and handed to the transport.

use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_proto::close_code;
use generation_proto::peer::{Class, HEADER_LEN, Message, Ping};
use generation_quic::{ConnectionKey, Driver};

use super::Exchange;
use crate::peers::PeerError;
use crate::peers::calls::Placed;
use crate::peers::lane::{self, BULK, PROMPT};
use crate::peers::link::Pending;

/// How long what is in no hurry waits for company.
const ALONG: Duration = Duration::from_millis(5);

impl Exchange {
    /// Queues a message on a connection, or has it wait for the one being made.
    pub(super) fn submit(&mut self, index: usize, message: Pending, now: Instant) -> Result<(), PeerError> {
        if self.stopped {
            return Err(PeerError::Stopped);
        }
        let len = message.payload.len();
        if len > self.config.limits.message_bytes {
            return Err(PeerError::TooLarge(len));
        }
        let lane = lane::of(len);
        let preferred = self.preferred(index);
        let link = &self.links[index];
        let waiting = match preferred {
            Some(key) => self
                .place(key)
                .and_then(|place| self.connections[place].lanes[lane].as_ref()),
            None => None,
        };
        let waiting = waiting.map_or(0, |lane| lane.output.waiting()) + link.pending_bytes[lane];
        if let Err(busy) = link.check_room(len, waiting, &self.config.limits) {
            self.nodes[link.node].stats.busy += 1;
            return Err(busy);
        }
        if let Some(key) = preferred {
            self.transfer(key, message);
            return Ok(());
        }
        let link = &mut self.links[index];
        if link.dialled.is_none() {
            if self.config.crypto.is_none() || !link.may_dial(now) {
                return Err(PeerError::Unreachable);
            }
            if !std::mem::replace(&mut link.wanted, true) {
                self.wanted.push(index);
            }
        }
        link.postpone(message);
        Ok(())
    }

    /// Queues on a link's connection what waited for it.
    pub(super) fn send_pending(&mut self, index: usize) {
        let Some(key) = self.preferred(index) else { return };
        for message in self.links[index].take_pending() {
            if message.class != Class::Request || self.calls.is_waiting(message.id) {
                self.transfer(key, message);
            }
        }
    }

    pub(super) fn transfer(&mut self, key: ConnectionKey, message: Pending) {
        let Pending {
            class,
            kind,
            shard,
            id,
            payload,
            along,
        } = message;
        let placed = if along {
            self.along.push(key);
            self.along_until.get_or_insert(self.now + ALONG);
            self.append(key, class, kind, shard, id, payload)
        } else {
            self.enqueue(key, class, kind, shard, id, payload)
        };
        if class == Class::Request
            && let Some(placed) = placed
        {
            self.calls.place(id, placed);
        }
    }

    /// The connection messages to a link go out on, if there is one: of two, the one dialled by the node with the smaller id.
    pub(super) fn preferred(&self, index: usize) -> Option<ConnectionKey> {
        let link = &self.links[index];
        let is_open = |key: &ConnectionKey| self.place(*key).is_some_and(|place| self.connections[place].open);
        let dialled = link.dialled.filter(is_open);
        if self.own.node < link.peer.node {
            dialled.or(link.accepted)
        } else {
            link.accepted.or(dialled)
        }
    }

    /// Appends a message to a connection's output, which is written in this turn or the next.
    pub(super) fn enqueue(
        &mut self,
        key: ConnectionKey,
        class: Class,
        kind: u8,
        shard: u16,
        id: u64,
        payload: Bytes,
    ) -> Option<Placed> {
        let placed = self.append(key, class, kind, shard, id, payload)?;
        let place = self.place(key)?;
        self.mark_dirty(place);
        Some(placed)
    }

    /// Appends a message to a connection's output.
    fn append(
        &mut self,
        key: ConnectionKey,
        class: Class,
        kind: u8,
        shard: u16,
        id: u64,
        payload: Bytes,
    ) -> Option<Placed> {
        let place = self.place(key)?;
        let unread = self.config.limits.unread_bytes;
        let len = payload.len();
        let connection = &mut self.connections[place];
        let mut lane = lane::of(len);
        if connection.lanes[lane].is_none() {
            // The other side has opened the first lane, asked, and not opened the second.
            lane = PROMPT;
        }
        let output = &mut connection.lanes[lane].as_mut()?.output;
        let end = output.push(&Message::header(class, kind, shard, id, len), payload);
        connection.flooded |= output.waiting() > unread;
        connection.last_used = self.now;
        let node = connection.node;
        let stats = &mut self.nodes[node].stats;
        stats.messages_sent += 1;
        stats.sent_bytes += (HEADER_LEN + len) as u64;
        if class != Class::Control
            && let Some(detector) = &mut self.detector
        {
            detector.spoken(node);
        }
        Some(Placed {
            connection: key,
            lane,
            end,
        })
    }

    /// Has what waits for company written, if it has waited long enough.
    pub(super) fn send_along(&mut self) {
        if self.along_until.is_some_and(|until| until <= self.now) {
            self.along_until = None;
            for key in std::mem::take(&mut self.along) {
                if let Some(place) = self.place(key) {
                    self.mark_dirty(place);
                }
            }
        }
    }

    /// Says a ping or a pong.
    pub(super) fn say(&mut self, key: ConnectionKey, kind: u8, ping: Ping) {
        let payload = Bytes::copy_from_slice(&ping.to_bytes());
        self.enqueue(key, Class::Control, kind, 0, 0, payload);
    }

    pub(super) fn write(&mut self, driver: &mut Driver, key: ConnectionKey) {
        let Some(place) = self.place(key) else { return };
        let connection = &mut self.connections[place];
        connection.dirty = false;
        let mut failed = false;
        for lane in [PROMPT, BULK] {
            if let Some(lane) = &mut connection.lanes[lane] {
                failed |= lane.write(driver, key).is_err();
            }
        }
        if failed {
            self.violation(driver, key, close_code::PROTOCOL, "a lane was ended");
        } else if connection.flooded {
            let waiting = connection.lanes.iter().flatten().map(|lane| lane.output.waiting());
            if waiting.max().unwrap_or(0) > self.config.limits.unread_bytes {
                self.violation(
                    driver,
                    key,
                    close_code::UNREAD,
                    "too many bytes of answers are left unread",
                );
            } else {
                connection.flooded = false;
            }
        }
    }
}
