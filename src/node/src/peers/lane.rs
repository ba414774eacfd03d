//! One lane: what waits to be written to its stream, and what of its stream was read and not yet understood.

use bytes::{Bytes, BytesMut};
use generation_proto::peer::{HEADER_LEN, MAX_PROMPT_LEN, PeerDecoder};
use generation_quic::{ConnectionKey, Driver, StreamError, StreamId};

/// The lane of short messages.
pub(super) const PROMPT: usize = 0;
/// The lane of long ones.
pub(super) const BULK: usize = 1;
/// Lanes of a connection.
pub(super) const LANES: usize = 2;

/// Payloads shorter than this are copied together, so that the messages of a turn are one piece to the transport. Longer ones
/// are handed over as they are.
const COPIED_BELOW: usize = 1024;

/// The lane a payload of `len` bytes takes.
pub(super) fn of(len: usize) -> usize {
    if len <= MAX_PROMPT_LEN { PROMPT } else { BULK }
}

/// Messages not yet taken by the transport, in order.
#[derive(Debug, Default)]
pub(super) struct Output {
    pieces: Vec<Bytes>,
    /// What comes after the pieces and may still grow.
    tail: BytesMut,
    /// Bytes ever appended.
    appended: u64,
    /// Bytes ever taken by the transport.
    taken: u64,
}

impl Output {
    /// Appends a message. Gives the bytes ever appended, this message included.
    pub(super) fn push(&mut self, header: &[u8; HEADER_LEN], payload: Bytes) -> u64 {
        self.append(header);
        if payload.len() < COPIED_BELOW {
            self.append(&payload);
        } else {
            self.appended += payload.len() as u64;
            self.seal();
            self.pieces.push(payload);
        }
        self.appended
    }

    /// Appends messages that are encoded already.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.appended += bytes.len() as u64;
        self.tail.extend_from_slice(bytes);
    }

    /// Bytes that wait.
    pub(super) fn waiting(&self) -> usize {
        (self.appended - self.taken) as usize
    }

    /// Bytes ever taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Hands over as much as the transport takes.
    fn write(&mut self, driver: &mut Driver, key: ConnectionKey, stream: StreamId) -> Result<(), StreamError> {
        self.seal();
        if self.pieces.is_empty() {
            return Ok(());
        }
        let written = driver.write(key, stream, &mut self.pieces)?;
        self.taken += written.bytes as u64;
        let left = self.pieces.iter().position(|piece| !piece.is_empty());
        self.pieces.drain(..left.unwrap_or(self.pieces.len()));
        Ok(())
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.pieces.push(self.tail.split().freeze());
        }
    }
}

/// One stream of a connection.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) stream: StreamId,
    pub(super) output: Output,
    pub(super) decoder: PeerDecoder,
    /// In the list of lanes to be read.
    pub(super) queued: bool,
    /// The other side's hello was read.
    pub(super) greeted: bool,
}

impl Lane {
    pub(super) fn new(stream: StreamId, message_bytes: usize) -> Self {
        Self {
            stream,
            output: Output::default(),
            decoder: PeerDecoder::new(message_bytes),
            queued: false,
            greeted: false,
        }
    }

    /// Hands over as much as the transport takes.
    pub(super) fn write(&mut self, driver: &mut Driver, key: ConnectionKey) -> Result<(), StreamError> {
        self.output.write(driver, key, self.stream)
    }
}
