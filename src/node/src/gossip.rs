//! What nodes tell each other by gossip, and the seam to whatever carries it.
//!
//! Gossip carries hints, never an authority: whatever comes out of here may be late, lost or wrong, and costs a redirect or a look at the
//! cluster's records, nothing else. No vote, no lease and no acknowledgement rests on it.
//!
//! # What holds
//! - Of each node only the latest of each kind is kept, on both sides, so nothing here grows with time: a reader that comes late
//!   finds the last word, not the history.
//! - What is told of a node belongs to one **generation** of it (one of its starts). A higher one voids all hints of lower ones, and of a
//!   lower one nothing is told any more.
//!
//! Production carries it over UDP (`generation-server`); [`Board`] is the same within one process, for tests.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::env::CoreId;

/// Most shards a core tells that it leads. A hint that is left out costs a redirect.
pub const MAX_LEADS_PER_CORE: usize = 1_024;

/// A shard that the teller leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderHint {
    /// The shard.
    pub shard: u16,
    /// Epoch of the shard's placement.
    pub epoch: u32,
    /// The term it leads in. Hints are ordered by (epoch, term).
    pub term: u64,
}

/// How busy a node is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// The busiest core's time spent working, in thousandths.
    pub busy_permille: u16,
    /// Used part of the memory budget, in thousandths.
    pub memory_permille: u16,
    /// Clients' connections.
    pub connections: u32,
}

/// Where a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Where clients and other nodes reach it. (Not where it gossips.)
    pub addr: SocketAddr,
    /// The zone whose failure it shares with others; empty where there are none.
    pub zone: String,
}

/// Something a node tells of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// The shards that one of its cores leads, all of them: what is not among them the core does not lead.
    Leaders {
        /// The core.
        core: CoreId,
        /// What it leads, by shard; [`MAX_LEADS_PER_CORE`] at most are told.
        leads: Vec<LeaderHint>,
    },
    /// The version of the cluster's records that it knows.
    RecordsVersion(u64),
    /// How busy it is.
    Load(Load),
    /// Where it is.
    Place(Place),
    /// Its release.
    Release(String),
}

/// What this node gives to its gossip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// To be told to everybody, in place of what was told of the same kind before.
    Tell(Fact),
    /// Gossip addresses of nodes that ought to be heard of, all of them: who is not heard of is looked for there.
    Seeds(Vec<SocketAddr>),
}

/// What was heard of another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Whether it is taken to be alive. A start is not before this has said so, whatever it has told.
    Liveness(bool),
    /// What it tells of itself.
    Told(Fact),
}

/// A change of what is known of another node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The node.
    pub node: u64,
    /// Its start that this is about; grows with each.
    pub generation: u64,
    /// What has changed.
    pub change: Change,
}

/// A node's gossip. Any core may publish; one core polls. Neither waits for anybody.
pub trait Gossip: Send + Sync {
    /// Gives it something to tell.
    fn publish(&self, update: Update);

    /// Appends what has changed since the last call: of each kind and node the last only. Cheap where nothing has.
    fn poll(&self, events: &mut Vec<Event>);
}

/// Changes nobody has asked for yet: of each kind and node the last.
#[derive(Debug, Default)]
pub struct Changes {
    nodes: BTreeMap<u64, Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    generation: u64,
    alive: Option<bool>,
    leaders: BTreeMap<CoreId, Vec<LeaderHint>>,
    records_version: Option<u64>,
    load: Option<Load>,
    place: Option<Place>,
    release: Option<String>,
}

impl Changes {
    /// Adds a change. One of a generation lower than what waits already is void.
    pub fn record(&mut self, event: Event) {
        let pending = self.nodes.entry(event.node).or_default();
        if event.generation < pending.generation {
            return;
        }
        if event.generation > pending.generation {
            *pending = Pending {
                generation: event.generation,
                ..Pending::default()
            };
        }
        match event.change {
            Change::Liveness(alive) => pending.alive = Some(alive),
            Change::Told(Fact::Leaders { core, leads }) => drop(pending.leaders.insert(core, leads)),
            Change::Told(Fact::RecordsVersion(version)) => pending.records_version = Some(version),
            Change::Told(Fact::Load(load)) => pending.load = Some(load),
            Change::Told(Fact::Place(place)) => pending.place = Some(place),
            Change::Told(Fact::Release(release)) => pending.release = Some(release),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Moves them to `events`, by node.
    pub fn drain(&mut self, events: &mut Vec<Event>) {
        for (node, pending) in std::mem::take(&mut self.nodes) {
            let Pending {
                generation,
                alive,
                leaders,
                records_version,
                load,
                place,
                release,
            } = pending;
            let leaders = leaders.into_iter().map(|(core, leads)| Fact::Leaders { core, leads });
            let facts = leaders
                .chain(records_version.map(Fact::RecordsVersion))
                .chain(load.map(Fact::Load))
                .chain(place.map(Fact::Place))
                .chain(release.map(Fact::Release));
            let changes = alive.map(Change::Liveness).into_iter().chain(facts.map(Change::Told));
            events.extend(changes.map(|change| Event {
                node,
                generation,
                change,
            }));
        }
    }
}

/// Gossip within one process: what one node tells the others hear at once, in one order. For tests.
#[derive(Debug, Clone, Default)]
pub struct Board {
    members: Arc<Mutex<BTreeMap<u64, Member>>>,
}

#[derive(Debug, Default)]
struct Member {
    generation: u64,
    alive: bool,
    told: Vec<Fact>,
    heard: Changes,
}

/// One node's gossip over a [`Board`].
#[derive(Debug)]
pub struct BoardMember {
    board: Board,
    node: u64,
    generation: u64,
}

impl Board {
    /// Lets a node take part from now on, under a generation larger than any it had. It hears what the others have told so far.
    pub fn join(&self, node: u64, generation: u64) -> BoardMember {
        let mut members = self.members();
        let mut own = Member {
            generation,
            alive: true,
            ..Member::default()
        };
        for (&other, member) in members.iter_mut().filter(|(other, _)| **other != node) {
            let told = |change| Event {
                node: other,
                generation: member.generation,
                change,
            };
            own.heard.record(told(Change::Liveness(member.alive)));
            for fact in &member.told {
                own.heard.record(told(Change::Told(fact.clone())));
            }
            member.heard.record(Event {
                node,
                generation,
                change: Change::Liveness(true),
            });
        }
        members.insert(node, own);
        drop(members);
        BoardMember {
            board: self.clone(),
            node,
            generation,
        }
    }

    /// Has every other node hear whether `node` is alive.
    pub fn set_alive(&self, node: u64, alive: bool) {
        let mut members = self.members();
        let Some(member) = members.get_mut(&node) else { return };
        member.alive = alive;
        let generation = member.generation;
        Self::tell(&mut members, node, generation, &Change::Liveness(alive));
    }

    fn tell(members: &mut BTreeMap<u64, Member>, node: u64, generation: u64, change: &Change) {
        for (_, other) in members.iter_mut().filter(|(other, _)| **other != node) {
            other.heard.record(Event {
                node,
                generation,
                change: change.clone(),
            });
        }
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<u64, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether two facts are of one kind, so that the later replaces the earlier.
fn same_kind(a: &Fact, b: &Fact) -> bool {
    match (a, b) {
        (Fact::Leaders { core: a, .. }, Fact::Leaders { core: b, .. }) => a == b,
        _ => std::mem::discriminant(a) == std::mem::discriminant(b),
    }
}

impl Gossip for BoardMember {
    fn publish(&self, update: Update) {
        // Everybody hears of everybody here.
        let Update::Tell(fact) = update else { return };
        let mut members = self.board.members();
        let Some(own) = members.get_mut(&self.node) else { return };
        // A start that another has followed is not heard any more.
        if own.generation != self.generation {
            return;
        }
        own.told.retain(|told| !same_kind(told, &fact));
        own.told.push(fact.clone());
        Board::tell(&mut members, self.node, self.generation, &Change::Told(fact));
    }

    fn poll(&self, events: &mut Vec<Event>) {
        if let Some(own) = self.board.members().get_mut(&self.node)
            && own.generation == self.generation
        {
            own.heard.drain(events);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leads(core: CoreId, term: u64) -> Fact {
        let hint = LeaderHint {
            shard: core,
            epoch: 1,
            term,
        };
        Fact::Leaders {
            core,
            leads: vec![hint],
        }
    }

    fn told(node: u64, generation: u64, fact: Fact) -> Event {
        Event {
            node,
            generation,
            change: Change::Told(fact),
        }
    }

    fn alive(node: u64, generation: u64, alive: bool) -> Event {
        Event {
            node,
            generation,
            change: Change::Liveness(alive),
        }
    }

    fn drained(changes: &mut Changes) -> Vec<Event> {
        let mut events = Vec::new();
        changes.drain(&mut events);
        assert!(changes.is_empty());
        events
    }

    fn polled(member: &BoardMember) -> Vec<Event> {
        let mut events = Vec::new();
        member.poll(&mut events);
        events
    }

    #[test]
    fn of_each_kind_the_last_change_is_kept() {
        let mut changes = Changes::default();
        changes.record(told(2, 5, leads(0, 1)));
        changes.record(told(2, 5, leads(1, 1)));
        changes.record(told(2, 5, Fact::RecordsVersion(7)));
        changes.record(alive(2, 5, true));
        changes.record(told(2, 5, leads(0, 3)));
        changes.record(told(1, 9, Fact::RecordsVersion(8)));
        changes.record(alive(2, 5, false));
        assert_eq!(
            drained(&mut changes),
            [
                told(1, 9, Fact::RecordsVersion(8)),
                alive(2, 5, false),
                told(2, 5, leads(0, 3)),
                told(2, 5, leads(1, 1)),
                told(2, 5, Fact::RecordsVersion(7)),
            ]
        );
    }

    #[test]
    fn a_higher_generation_voids_what_waits_of_a_lower_one() {
        let mut changes = Changes::default();
        changes.record(told(2, 5, leads(0, 1)));
        changes.record(told(2, 6, Fact::Load(Load::default())));
        changes.record(told(2, 5, leads(0, 2)));
        changes.record(alive(2, 5, true));
        assert_eq!(drained(&mut changes), [told(2, 6, Fact::Load(Load::default()))]);
    }

    #[test]
    fn on_a_board_everybody_hears_everybody_and_late_comers_the_last_word() {
        let board = Board::default();
        let one = board.join(1, 1);
        let two = board.join(2, 1);
        assert_eq!(polled(&one), [alive(2, 1, true)]);
        one.publish(Update::Tell(leads(0, 1)));
        one.publish(Update::Tell(leads(0, 2)));
        one.publish(Update::Seeds(Vec::new()));
        assert_eq!(polled(&two), [alive(1, 1, true), told(1, 1, leads(0, 2))]);
        assert_eq!(polled(&two), []);
        let three = board.join(3, 4);
        assert_eq!(
            polled(&three),
            [alive(1, 1, true), told(1, 1, leads(0, 2)), alive(2, 1, true)]
        );
        board.set_alive(1, false);
        assert_eq!(polled(&three), [alive(1, 1, false)]);
        // The node comes back; its former start is not heard any more.
        let again = board.join(1, 2);
        one.publish(Update::Tell(Fact::RecordsVersion(9)));
        again.publish(Update::Tell(Fact::RecordsVersion(10)));
        assert_eq!(
            polled(&three),
            [alive(1, 2, true), told(1, 2, Fact::RecordsVersion(10))]
        );
        assert_eq!(polled(&one), []);
    }
}
