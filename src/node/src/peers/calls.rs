//! Calls under way: who waits for which answer, and until when.

use std::task::{Poll, Waker};
use std::time::Instant;

use bytes::Bytes;
use generation_quic::ConnectionKey;
use slab::Slab;

use super::PeerError;

/// Where a call's message is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed {
    pub(super) connection: ConnectionKey,
    pub(super) lane: usize,
    /// Bytes of the lane's output up to the end of the message: when fewer have been taken, it cannot have arrived whole.
    pub(super) end: u64,
}

#[derive(Debug)]
struct Call {
    serial: u32,
    link: usize,
    deadline: Instant,
    /// `None` until a connection takes it.
    placed: Option<Placed>,
    outcome: Option<Result<Bytes, PeerError>>,
    waker: Option<Waker>,
}

/// All calls of a core. An id holds the call's place, which is used again, and a serial number, which is not (before 2^32 calls):
/// an answer that comes after its call was given up finds nobody.
#[derive(Debug, Default)]
pub(super) struct Calls {
    slab: Slab<Call>,
    serial: u32,
    /// No call without an outcome has an earlier deadline. It may be too early, since answered calls do not move it.
    earliest: Option<Instant>,
    /// Of those whose calls have ended. A waker may run code of others' when it is woken or dropped, code that calls.
    pub(super) wakers: Vec<Waker>,
}

impl Calls {
    pub(super) fn insert(&mut self, link: usize, deadline: Instant) -> u64 {
        self.serial = self.serial.wrapping_add(1);
        self.earliest = Some(self.earliest.map_or(deadline, |earliest| earliest.min(deadline)));
        let index = self.slab.insert(Call {
            serial: self.serial,
            link,
            deadline,
            placed: None,
            outcome: None,
            waker: None,
        });
        u64::from(self.serial) << 32 | index as u64
    }

    /// Says where the call's message went.
    pub(super) fn place(&mut self, id: u64, placed: Placed) {
        if let Some(call) = get(&mut self.slab, id) {
            call.placed = Some(placed);
        }
    }

    /// Whether somebody still waits for the answer.
    pub(super) fn is_waiting(&mut self, id: u64) -> bool {
        get(&mut self.slab, id).is_some_and(|call| call.outcome.is_none())
    }

    /// The link of a call that waits for its answer gets it; `false`: nobody waits for it (any more).
    pub(super) fn complete(&mut self, id: u64, link: usize, outcome: Result<Bytes, PeerError>) -> bool {
        let Some(call) = get(&mut self.slab, id).filter(|call| call.link == link && call.outcome.is_none()) else {
            return false;
        };
        end(call, outcome, &mut self.wakers);
        true
    }

    /// The outcome, once there is one; then the call is forgotten.
    pub(super) fn poll(&mut self, id: u64, waker: &Waker) -> Poll<Result<Bytes, PeerError>> {
        let Some(call) = get(&mut self.slab, id) else {
            return Poll::Pending;
        };
        if let Some(outcome) = call.outcome.take() {
            self.slab.remove(index(id));
            return Poll::Ready(outcome);
        }
        match &mut call.waker {
            Some(known) => known.clone_from(waker),
            None => call.waker = Some(waker.clone()),
        }
        Poll::Pending
    }

    /// Nobody waits any more. Gives the link if the call had no outcome yet.
    pub(super) fn forget(&mut self, id: u64) -> Option<usize> {
        get(&mut self.slab, id)?;
        let call = self.slab.remove(index(id));
        call.outcome.is_none().then_some(call.link)
    }

    /// When [`expire`](Self::expire) is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.earliest
    }

    /// Ends every call whose time is over, and tells `ended` their links. `is_taken` says whether the transport took a message.
    pub(super) fn expire(&mut self, now: Instant, is_taken: impl Fn(&Placed) -> bool, mut ended: impl FnMut(usize)) {
        if self.earliest.is_none_or(|earliest| earliest > now) {
            return;
        }
        self.earliest = None;
        for (_, call) in self.slab.iter_mut().filter(|(_, call)| call.outcome.is_none()) {
            if call.deadline <= now {
                let maybe_received = call.placed.as_ref().is_some_and(&is_taken);
                ended(call.link);
                end(call, Err(PeerError::Timeout { maybe_received }), &mut self.wakers);
            } else {
                let deadline = call.deadline;
                self.earliest = Some(self.earliest.map_or(deadline, |earliest| earliest.min(deadline)));
            }
        }
    }

    /// Ends every call for which `outcome` gives an error, and tells `ended` their links.
    pub(super) fn fail(
        &mut self,
        outcome: impl Fn(usize, Option<&Placed>) -> Option<PeerError>,
        mut ended: impl FnMut(usize),
    ) {
        for (_, call) in self.slab.iter_mut().filter(|(_, call)| call.outcome.is_none()) {
            if let Some(error) = outcome(call.link, call.placed.as_ref()) {
                ended(call.link);
                end(call, Err(error), &mut self.wakers);
            }
        }
    }

    /// Whether some call waits on this connection.
    pub(super) fn any_on(&self, connection: ConnectionKey) -> bool {
        let mut waiting = self.slab.iter().filter(|(_, call)| call.outcome.is_none());
        waiting.any(|(_, call)| call.placed.is_some_and(|placed| placed.connection == connection))
    }
}

fn get(slab: &mut Slab<Call>, id: u64) -> Option<&mut Call> {
    slab.get_mut(index(id))
        .filter(|call| u64::from(call.serial) == id >> 32)
}

fn index(id: u64) -> usize {
    (id & u64::from(u32::MAX)) as usize
}

fn end(call: &mut Call, outcome: Result<Bytes, PeerError>, wakers: &mut Vec<Waker>) {
    call.outcome = Some(outcome);
    wakers.extend(call.waker.take());
}
