//! The mesh between the cores of a node: for each ordered pair of cores a bounded single-producer, single-consumer ring.
//!
//! A ring that is full gives the message back; the sender decides (a request is answered `Busy`). Nothing here blocks and, while
//! the receiving core is awake, nothing enters the kernel.

use std::cell::{Cell, RefCell};

use generation_node::env::CoreId;
use rtrb::{Consumer, Producer, PushError, RingBuffer};

/// One core's end of the mesh.
pub struct MeshEnd<T> {
    /// By destination core; none to itself.
    to: Vec<Option<RefCell<Producer<T>>>>,
    /// By source core; none from itself.
    from: Vec<Option<RefCell<Consumer<T>>>>,
    /// The source looked at first next time, so that no core is always served last.
    first: Cell<usize>,
}

/// The ends of a mesh of `cores` cores, whose rings hold `capacity` messages each.
pub fn mesh<T>(cores: CoreId, capacity: usize) -> Vec<MeshEnd<T>> {
    let cores = usize::from(cores);
    let mut ends: Vec<MeshEnd<T>> = (0..cores)
        .map(|_| MeshEnd {
            to: (0..cores).map(|_| None).collect(),
            from: (0..cores).map(|_| None).collect(),
            first: Cell::new(0),
        })
        .collect();
    for source in 0..cores {
        for destination in (0..cores).filter(|destination| *destination != source) {
            let (producer, consumer) = RingBuffer::new(capacity);
            ends[source].to[destination] = Some(RefCell::new(producer));
            ends[destination].from[source] = Some(RefCell::new(consumer));
        }
    }
    ends
}

impl<T> MeshEnd<T> {
    /// Queues `message` for `destination`, or gives it back when that ring is full, or when there is no such core or it is this
    /// one.
    pub fn send(&self, destination: CoreId, message: T) -> Result<(), T> {
        match self.to.get(usize::from(destination)) {
            Some(Some(ring)) => ring
                .borrow_mut()
                .push(message)
                .map_err(|PushError::Full(message)| message),
            _ => Err(message),
        }
    }

    /// Whether any message waits here.
    pub fn has_ready(&self) -> bool {
        self.from.iter().flatten().any(|ring| !ring.borrow().is_empty())
    }

    /// Appends messages that have arrived, with their senders, at most `limit`; returns how many.
    pub fn receive(&self, limit: usize, messages: &mut Vec<(CoreId, T)>) -> usize {
        let before = messages.len();
        let cores = self.from.len();
        let first = self.first.get();
        for offset in 0..cores {
            let source = (first + offset) % cores;
            let Some(ring) = &self.from[source] else { continue };
            let mut ring = ring.borrow_mut();
            while messages.len() - before < limit {
                let Ok(message) = ring.pop() else { break };
                messages.push((source as CoreId, message));
            }
        }
        self.first.set((first + 1) % cores.max(1));
        messages.len() - before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_once_with_its_sender_and_in_order() {
        let ends = mesh::<u32>(3, 8);
        for message in 0..8 {
            ends[2].send(0, message).unwrap();
        }
        assert_eq!(ends[2].send(0, 8), Err(8), "a full ring gives the message back");
        ends[1].send(0, 100).unwrap();
        assert!(ends[0].has_ready() && !ends[1].has_ready() && !ends[2].has_ready());
        let mut messages = Vec::new();
        assert_eq!(ends[0].receive(5, &mut messages), 5);
        while ends[0].receive(5, &mut messages) > 0 {}
        let from_two: Vec<u32> = messages
            .iter()
            .filter(|(core, _)| *core == 2)
            .map(|(_, message)| *message)
            .collect();
        assert_eq!(from_two, (0..8).collect::<Vec<_>>());
        assert_eq!(messages.len(), 9);
        assert!(messages.contains(&(1, 100)));
        ends[2].send(0, 9).unwrap();
    }

    #[test]
    fn no_core_starves_the_others() {
        let ends = mesh::<u8>(3, 4);
        let mut seen = [0_u32; 3];
        let mut messages = Vec::new();
        for _ in 0..30 {
            for source in [1, 2] {
                while ends[source].send(0, 0).is_ok() {}
            }
            ends[0].receive(4, &mut messages);
            for (core, _) in messages.drain(..) {
                seen[usize::from(core)] += 1;
            }
        }
        assert!(seen[1] > 30 && seen[2] > 30, "{seen:?}");
    }

    #[test]
    fn there_is_no_ring_to_oneself_nor_beyond() {
        let ends = mesh::<u8>(2, 4);
        assert_eq!(ends[0].send(0, 1), Err(1));
        assert_eq!(ends[0].send(2, 1), Err(1));
    }
}
