//! Who should lead the shards of this core, and handing over those that another node should.
//!
//! Every node computes the same from what it knows of the others: a shard is led by its founder where that node is fit, and the
//! shards of founders that are not are dealt out to the fit nodes in turn, to whoever leads fewest by then. So leaders are spread evenly,
//! and return when a node does. A node is fit that lives and whose clock is right.
//!
//! # What holds
//! - Nothing is handed over before what is known of the nodes has been the same for [`SETTLED`], and the shard been led from here for as
//!   long: a node that stops hands over what it leads while everybody still knows it alive, and must not be given it back.
//! - Leadership goes only to a replica with a vote that has the log, as good as, while the group's members are not changing; at most
//!   [`AT_ONCE`] shards of a core are handed over at a time.
//! - **Nothing goes back and forth**: a shard that was handed over, or could not be, is left alone for a time that doubles.
//! - A node whose clock is wrong does not campaign, and hands over to anybody fit where the one that should lead cannot.
//!
//! Not here: how writes are held back meanwhile (`group`), what clocks are wrong (`clocks`).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::clocks::Clocks;
use crate::env::disk::Disk;
use crate::group::Replica;
use crate::raft::types::ReplicaId;

/// How long what is known of the nodes must have been the same.
const SETTLED: Duration = Duration::from_secs(5);

/// Shards of a core handed over at a time.
const AT_ONCE: usize = 2;

/// How long a shard is left alone after the first time.
const REST: Duration = Duration::from_secs(10);

/// How often that doubles: five minutes and some.
const MOST_DOUBLINGS: u32 = 5;

/// A shard that was handed over, or was to be.
#[derive(Debug, Clone, Copy)]
struct Tried {
    not_before: Instant,
    times: u32,
}

/// The leaderships of one core's groups.
#[derive(Debug)]
pub(crate) struct Leadership {
    node: u64,
    /// All nodes, in order.
    nodes: Vec<u64>,
    shards: u16,
    clocks: RefCell<Clocks>,
    /// Whether this node may campaign.
    may_lead: Rc<Cell<bool>>,
    /// The nodes that are fit, and since when.
    fit: RefCell<(Vec<u64>, Instant)>,
    tried: RefCell<BTreeMap<u16, Tried>>,
    /// In which term a shard is led from here, and since when.
    led: RefCell<BTreeMap<u16, (u64, Instant)>>,
    under_way: Rc<Cell<usize>>,
}

/// A hand-over under way; it ends with this value.
#[derive(Debug)]
pub(crate) struct Ticket(Rc<Cell<usize>>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Leadership {
    pub(crate) fn new(node: u64, others: &[u64], shards: u16, now: Instant) -> Self {
        let mut nodes = others.to_vec();
        nodes.push(node);
        nodes.sort_unstable();
        Self {
            node,
            nodes,
            shards,
            clocks: RefCell::default(),
            may_lead: Rc::new(Cell::new(true)),
            fit: RefCell::new((Vec::new(), now)),
            tried: RefCell::default(),
            led: RefCell::default(),
            under_way: Rc::default(),
        }
    }

    /// Whether this node may campaign, for whoever has its replicas do so.
    pub(crate) fn may_lead(&self) -> Rc<Cell<bool>> {
        Rc::clone(&self.may_lead)
    }

    /// What is known of the clocks.
    pub(crate) fn clocks(&self) -> Clocks {
        self.clocks.borrow().clone()
    }

    /// Takes in what was found out about the clocks.
    pub(crate) fn set_clocks(&self, clocks: Clocks) {
        let is_right = !clocks.wrong.contains(&self.node);
        if self.may_lead.replace(is_right) != is_right {
            let skew_ms = clocks.skew_ms;
            if is_right {
                tracing::info!(skew_ms, "this node's clock is right again, and it may lead");
            } else {
                tracing::error!(
                    skew_ms,
                    "this node's clock is wrong, and it leads nothing: check its time synchronisation"
                );
            }
        }
        self.clocks.replace(clocks);
    }

    /// Looks at the nodes. To be called now and then, before [`Leadership::heir`].
    pub(crate) fn look(&self, now: Instant, is_alive: impl Fn(u64) -> bool) {
        let clocks = self.clocks.borrow();
        let fit = self.nodes.iter().copied().filter(|node| {
            let lives = *node == self.node || is_alive(*node);
            lives && !clocks.wrong.contains(node)
        });
        let found: Vec<u64> = fit.collect();
        let mut fit = self.fit.borrow_mut();
        if fit.0 != found {
            *fit = (found, now);
            // What failed for what the nodes were then may go well now.
            self.tried.borrow_mut().clear();
        }
    }

    /// The replica to hand a shard of this core to, if another should lead it and one may be handed over now.
    pub(crate) fn heir<D: Disk>(&self, shard: u16, replica: &Replica<D>, now: Instant) -> Option<(ReplicaId, Ticket)> {
        if !replica.leads() {
            return None;
        }
        let (mut led, term) = (self.led.borrow_mut(), replica.term());
        let since = led.entry(shard).or_insert((term, now));
        if since.0 != term {
            *since = (term, now);
        }
        if now.saturating_duration_since(since.1) < SETTLED || self.under_way.get() >= AT_ONCE {
            return None;
        }
        let fit = self.fit.borrow();
        let home = home(shard, self.shards, &self.nodes, &fit.0)?;
        if home == self.node || now.saturating_duration_since(fit.1) < SETTLED {
            return None;
        }
        let mut tried = self.tried.borrow_mut();
        if tried.get(&shard).is_some_and(|tried| now < tried.not_before) || replica.members().changing {
            return None;
        }
        let mut heir = replica.heir(|place| place.node == home);
        if heir.is_none() && !self.may_lead.get() {
            heir = replica.heir(|place| fit.0.contains(&place.node));
        }
        let heir = heir?;
        let times = tried.get(&shard).map_or(0, |tried| tried.times);
        let not_before = now + REST * (1 << times.min(MOST_DOUBLINGS));
        let times = times + 1;
        tried.insert(shard, Tried { not_before, times });
        self.under_way.set(self.under_way.get() + 1);
        Some((heir, Ticket(Rc::clone(&self.under_way))))
    }
}

/// The node that should lead a shard; `None` where no node is fit.
fn home(shard: u16, shards: u16, nodes: &[u64], fit: &[u64]) -> Option<u64> {
    let founder = |shard: u16| nodes[usize::from(shard) % nodes.len()];
    let own = founder(shard);
    if fit.contains(&own) {
        return Some(own);
    }
    let mut led: Vec<(u64, usize)> = fit.iter().map(|node| (*node, 0)).collect();
    for other in 0..shards {
        if let Some((_, count)) = led.iter_mut().find(|(node, _)| *node == founder(other)) {
            *count += 1;
        }
    }
    let mut orphans = (0..shards).filter(|other| !fit.contains(&founder(*other)));
    loop {
        let orphan = orphans.next()?;
        let (node, count) = led.iter_mut().min_by_key(|(node, count)| (*count, *node))?;
        *count += 1;
        if orphan == shard {
            return Some(*node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaders_are_even_whoever_is_fit() {
        for nodes in [1_u64, 3, 5] {
            let nodes: Vec<u64> = (1..=nodes).collect();
            for shards in [1_u16, 2, 4, 16, 64] {
                for set in 1..1_u32 << nodes.len() {
                    let fit = nodes.iter().copied().filter(|node| set >> (node - 1) & 1 == 1);
                    let fit: Vec<u64> = fit.collect();
                    let mut led: BTreeMap<u64, u16> = fit.iter().map(|node| (*node, 0)).collect();
                    for shard in 0..shards {
                        let home = home(shard, shards, &nodes, &fit).unwrap();
                        *led.get_mut(&home).expect("a fit one") += 1;
                        let founder = nodes[usize::from(shard) % nodes.len()];
                        assert!(home == founder || !fit.contains(&founder), "the others keep theirs");
                    }
                    let (least, most) = (led.values().min().unwrap(), led.values().max().unwrap());
                    assert!(most - least <= 1, "{shards} shards on {fit:?} of {nodes:?}: {led:?}");
                }
            }
        }
        assert_eq!(home(0, 4, &[1, 2, 3], &[]), None);
    }
}
