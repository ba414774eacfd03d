//! What a node tells by gossip of what it leads and of the records it knows, and what it makes of what others tell: hints.
//!
//! Not here: liveness. Who is alive is found out between the nodes themselves (`peers`), and decided on by nobody who has only heard of it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::Controller;
use super::report::Led;
use crate::env::CoreId;
use crate::env::disk::Disk;
use crate::gossip::{Change, Event, Fact, Gossip, LeaderHint, Update};
use crate::view::CONTROLLER;

/// What is led by each core.
type Leads = BTreeMap<CoreId, Vec<LeaderHint>>;

/// What another node has told.
#[derive(Debug, Default)]
struct Told {
    generation: u64,
    leads: Leads,
    records: u64,
}

/// A node's part in the gossip, if it takes one.
pub(super) struct Gossiping {
    gossip: Option<Arc<dyn Gossip>>,
    /// What was told last.
    told: RefCell<(Leads, u64)>,
    heard: RefCell<BTreeMap<u64, Told>>,
    events: RefCell<Vec<Event>>,
}

impl Gossiping {
    pub(super) fn new(gossip: Option<Arc<dyn Gossip>>) -> Self {
        Self {
            gossip,
            told: RefCell::default(),
            heard: RefCell::default(),
            events: RefCell::default(),
        }
    }

    pub(super) const fn is_on(&self) -> bool {
        self.gossip.is_some()
    }

    /// Tells what this node leads and which records it knows, where that has changed.
    fn tell(&self, led: &[Led], cores: CoreId, epoch: u32, records: u64) {
        let Some(gossip) = &self.gossip else { return };
        let mut leads: Leads = (0..cores).map(|core| (core, Vec::new())).collect();
        for led in led.iter().filter(|led| led.shard != CONTROLLER) {
            let hint = LeaderHint {
                shard: led.shard,
                epoch,
                term: led.term,
            };
            leads.entry(led.shard % cores).or_default().push(hint);
        }
        let mut told = self.told.borrow_mut();
        for (core, leads) in &leads {
            if told.0.get(core) != Some(leads) {
                let fact = Fact::Leaders {
                    core: *core,
                    leads: leads.clone(),
                };
                gossip.publish(Update::Tell(fact));
            }
        }
        if told.1 != records {
            gossip.publish(Update::Tell(Fact::RecordsVersion(records)));
        }
        *told = (leads, records);
    }

    fn listen(&self) {
        let Some(gossip) = &self.gossip else { return };
        let mut events = self.events.borrow_mut();
        gossip.poll(&mut events);
        let mut heard = self.heard.borrow_mut();
        for Event {
            node,
            generation,
            change,
        } in events.drain(..)
        {
            let told = heard.entry(node).or_default();
            if told.generation != generation {
                *told = Told {
                    generation,
                    ..Told::default()
                };
            }
            match change {
                Change::Told(Fact::Leaders { core, leads }) => {
                    told.leads.insert(core, leads);
                }
                Change::Told(Fact::RecordsVersion(version)) => told.records = version,
                Change::Told(_) | Change::Liveness(_) => {}
            }
        }
    }

    /// The highest version of records that anybody has told of.
    pub(super) fn newest_records(&self) -> u64 {
        self.heard.borrow().values().map(|told| told.records).max().unwrap_or(0)
    }

    /// Appends who leads what, as they have told: shard, term, node.
    pub(super) fn hints(&self, hints: &mut Vec<(u16, u64, u64)>) {
        for (node, told) in self.heard.borrow().iter() {
            let leads = told.leads.values().flatten();
            hints.extend(leads.map(|hint| (hint.shard, hint.term, *node)));
        }
    }
}

impl<D: Disk> Controller<D> {
    pub(super) fn gossip(&self) {
        if !self.gossiping.is_on() {
            return;
        }
        let led = self.led.borrow();
        self.gossiping
            .tell(&led, self.own.info.cores, self.own.epoch, self.told.get());
        self.gossiping.listen();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::gossip::Board;

    fn led(shard: u16, term: u64) -> Led {
        Led {
            shard,
            term,
            bytes: 0,
            changing: false,
            voters: BTreeSet::new(),
            learners: BTreeSet::new(),
        }
    }

    #[test]
    fn who_leads_what_reaches_the_others_and_is_taken_back() {
        let board = Board::default();
        let member = |node| Gossiping::new(Some(Arc::new(board.join(node, 1))));
        let (first, second) = (member(1), member(2));
        board.set_alive(1, true);
        first.tell(&[led(0, 3), led(5, 4), led(CONTROLLER, 1)], 2, 1, 7 << 16);
        second.listen();
        let hints = |of: &Gossiping| {
            let mut hints = Vec::new();
            of.hints(&mut hints);
            hints
        };
        assert_eq!(hints(&second), [(0, 3, 1), (5, 4, 1)]);
        assert_eq!(second.newest_records(), 7 << 16);
        first.tell(&[led(5, 4)], 2, 1, 7 << 16);
        second.listen();
        assert_eq!(hints(&second), [(5, 4, 1)]);
        // What an earlier start has told is nothing.
        let again = Gossiping::new(Some(Arc::new(board.join(1, 2))));
        board.set_alive(1, true);
        again.tell(&[led(2, 9)], 2, 1, 8 << 16);
        second.listen();
        assert_eq!(hints(&second), [(2, 9, 1)]);
    }

    #[test]
    fn who_does_not_gossip_hears_nothing() {
        let silent = Gossiping::new(None);
        silent.tell(&[led(0, 1)], 1, 1, 1);
        silent.listen();
        assert!(!silent.is_on() && silent.newest_records() == 0);
    }
}
