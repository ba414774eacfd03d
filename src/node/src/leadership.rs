//! Who should lead the shards of this core, and handing over those that another node should.
//!
//! Every node computes the same from what it knows of the others ([`crate::view::View::leaders`]): leaders are spread evenly over the nodes that are
//! fit, and return when a node does. A node is fit that lives, whose clock is right, and that is neither drained nor on its way out.
//!
//! # What holds
//! - Nothing is handed over before what is known of the nodes has been the same for [`SETTLED`], and the shard been led from here for as
//!   long: a node that stops hands over what it leads while everybody still knows it alive, and must not be given it back.
//!   A shard in its first term was handed over by nobody: [`FRESH`] is enough.
//! - A node that is to have no replica of a shard hands it over without waiting: its replica cannot leave before.
//! - Leadership goes only to a replica with a vote that has the log, as good as, while the group's members are not changing; at most
//!   [`AT_ONCE`] shards of a core are handed over at a time.
//! - **Nothing goes back and forth**: a shard that was handed over, or could not be, is left alone for a time that doubles.
//! - A node whose clock is wrong does not campaign, and hands over to anybody fit where the one that should lead cannot.
//!
//! Not here: how writes are held back meanwhile (`group`), what clocks are wrong (`clocks`).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::clocks::Clocks;
use crate::env::disk::Disk;
use crate::group::Replica;
use crate::raft::types::ReplicaId;
use crate::view::Views;

/// How long what is known of the nodes must have been the same.
const SETTLED: Duration = Duration::from_secs(5);

/// The same for a shard that is still led by its founder, in its first term.
const FRESH: Duration = Duration::from_millis(500);

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
    views: Views,
    clocks: RefCell<Clocks>,
    /// Whether this node may campaign.
    may_lead: Rc<Cell<bool>>,
    fit: RefCell<Fit>,
    tried: RefCell<BTreeMap<u16, Tried>>,
    /// In which term a shard is led from here, and since when.
    led: RefCell<BTreeMap<u16, (u64, Instant)>>,
    under_way: Rc<Cell<usize>>,
}

/// The nodes that are fit.
#[derive(Debug)]
struct Fit {
    nodes: BTreeSet<u64>,
    /// Since when they have been these, and the view this one.
    since: Instant,
    version: u64,
    /// By shard: the node that should lead it.
    leaders: Vec<Option<u64>>,
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
    pub(crate) fn new(node: u64, views: Views, now: Instant) -> Self {
        Self {
            node,
            views,
            clocks: RefCell::default(),
            may_lead: Rc::new(Cell::new(true)),
            fit: RefCell::new(Fit {
                nodes: BTreeSet::new(),
                since: now,
                version: 0,
                leaders: Vec::new(),
            }),
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
        let (view, clocks) = (self.views.get(), self.clocks.borrow());
        let fit = view.members.iter().filter(|(node, member)| {
            let lives = **node == self.node || is_alive(**node);
            lives && member.may_lead && !clocks.wrong.contains(node)
        });
        let found: BTreeSet<u64> = fit.map(|(node, _)| *node).collect();
        let mut fit = self.fit.borrow_mut();
        if fit.nodes != found || fit.version != view.version {
            *fit = Fit {
                leaders: view.leaders(&found),
                nodes: found,
                since: now,
                version: view.version,
            };
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
        let settled = match term {
            _ if !self.views.with(|view| view.targets(shard).contains(&self.node)) => Duration::ZERO,
            1 => FRESH,
            _ => SETTLED,
        };
        if now.saturating_duration_since(since.1) < settled || self.under_way.get() >= AT_ONCE {
            return None;
        }
        let fit = self.fit.borrow();
        let home = (*fit.leaders.get(usize::from(shard))?)?;
        if home == self.node || now.saturating_duration_since(fit.since) < settled {
            return None;
        }
        let mut tried = self.tried.borrow_mut();
        if tried.get(&shard).is_some_and(|tried| now < tried.not_before) || replica.members().changing {
            return None;
        }
        let mut heir = replica.heir(|place| place.node == home);
        if heir.is_none() && !self.may_lead.get() {
            heir = replica.heir(|place| fit.nodes.contains(&place.node));
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
