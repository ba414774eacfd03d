//! What a leader changes about its group's members by itself: it takes the votes of replicas that are to be elsewhere, and ends a change
//! that another leader began.
//!
//! # What holds
//! - **One change of a group at a time** begins on this node, and only where none is under way.
//! - A vote is taken only when every node that is to have a replica has one with a vote.
//! - A leader that is to be elsewhere leaves its own vote to the next leader (`leadership` hands over).
//!
//! Not here: how replicas come (`joining`).

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use openraft::ChangeMembers;
use openraft_rt::Instant as _;

use super::joining::Placed;
use super::network::Transport;
use super::replica::{Members, Replica};
use super::runtime::CoreInstant;
use super::shards::Shards;
use super::types::ReplicaId;
use crate::env::disk::Disk;
use crate::view::View;

/// How long a group may be between two sets of voters before its leader takes it that whoever began the change is gone.
const BETWEEN: Duration = Duration::from_secs(1);

/// A change of a group's members, from the look at who they are to its end.
pub(super) struct Change<D: Disk, T: Transport> {
    shards: Shards<D, T>,
    shard: u16,
}

impl<D: Disk, T: Transport> Drop for Change<D, T> {
    fn drop(&mut self) {
        self.shards.0.changes.borrow_mut().remove(&self.shard);
    }
}

impl<D: Disk, T: Transport> Shards<D, T> {
    /// Begins a change of the members, unless one is under way: what the next looks at would not be what it changes.
    pub(super) fn begin_change(&self, shard: u16, replica: &Replica<D, T>) -> Option<Change<D, T>> {
        let free = !replica.members().changing;
        if free { self.change(shard) } else { None }
    }

    fn change(&self, shard: u16) -> Option<Change<D, T>> {
        let free = self.0.changes.borrow_mut().insert(shard);
        free.then(|| Change {
            shards: self.clone(),
            shard,
        })
    }

    fn with_view<R>(&self, shard: u16, look: impl FnOnce(&View) -> R) -> Option<R> {
        let placed = self.0.placed.borrow();
        let placed = placed.get(&shard)?;
        Some(placed.placement.views.with(look))
    }

    /// Whether a node is to have a replica of a shard.
    pub(super) fn is_target(&self, shard: u16, node: u64) -> bool {
        let is = self.with_view(shard, |view| view.targets(shard).contains(&node));
        is == Some(true)
    }

    /// Those of `voters` that are to stay, if some are to go and may.
    pub(super) fn trimmed(
        &self,
        shard: u16,
        members: &Members,
        voters: &BTreeSet<ReplicaId>,
    ) -> Option<BTreeSet<ReplicaId>> {
        let at = |id: &ReplicaId| members.all.get(id).map(|place| place.node);
        self.with_view(shard, |view| {
            let targets = view.targets(shard);
            let stay = voters
                .iter()
                .filter(|id| at(id).is_some_and(|node| targets.contains(&node)));
            let stay: BTreeSet<ReplicaId> = stay.copied().collect();
            let served = |node: &u64| stay.iter().any(|id| at(id) == Some(*node));
            let may = !targets.is_empty() && targets.iter().all(served);
            (may && stay.len() < voters.len()).then_some(stay)
        })?
    }

    /// Changes what a leader finds amiss about its group's members, in the background.
    pub(super) fn trim(&self, shard: u16, placed: &Rc<Placed>, replica: &Replica<D, T>) {
        let leads = replica.leads();
        let between = leads && replica.is_between();
        if !between {
            placed.between.set(None);
        }
        if !leads {
            return;
        }
        if between {
            let now = CoreInstant::now();
            let since = placed.between.get().unwrap_or(now);
            placed.between.set(Some(since));
            if now >= since + BETWEEN
                && let Some(change) = self.change(shard)
            {
                placed.between.set(None);
                let nobody = ChangeMembers::AddVoterIds(BTreeSet::new());
                self.have_changed(
                    shard,
                    replica,
                    change,
                    nobody,
                    "a change that another leader began is ended",
                );
            }
            return;
        }
        let members = replica.members();
        if members.changing {
            return;
        }
        let own = replica.config().id;
        let change = match self.trimmed(shard, &members, &members.voters) {
            Some(stay) if !stay.contains(&own) => return,
            Some(stay) => ChangeMembers::ReplaceAllVoters(stay),
            None => {
                let strays = members
                    .all
                    .iter()
                    .filter(|(id, place)| !members.voters.contains(id) && !self.is_target(shard, place.node));
                let strays: BTreeSet<ReplicaId> = strays.map(|(id, _)| *id).collect();
                if strays.is_empty() {
                    return;
                }
                ChangeMembers::RemoveNodes(strays)
            }
        };
        if let Some(begun) = self.begin_change(shard, replica) {
            self.have_changed(
                shard,
                replica,
                begun,
                change,
                "replicas that are to be elsewhere leave the group",
            );
        }
    }

    fn have_changed(
        &self,
        shard: u16,
        replica: &Replica<D, T>,
        begun: Change<D, T>,
        change: ChangeMembers<ReplicaId, super::types::Place>,
        what: &'static str,
    ) {
        let replica = replica.clone();
        self.spawn(async move {
            let _begun = begun;
            match replica.raft().change_membership(change, false).await {
                Ok(_) => tracing::info!(shard, "{what}"),
                // It is found amiss again.
                Err(error) => tracing::debug!(shard, %error, "the members were not changed"),
            }
        });
    }
}
