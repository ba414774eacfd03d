//! The cluster as records, and the rules of its controller: who has a replica of what, who leads, and what to change next.
//!
//! The controller is Raft group 0, a group like any shard's whose entries are **records** ([`records`]): one key, one value,
//! changed only by compare-and-swap on the entry's version. Membership is *desired state* in records. A shard's record names the
//! nodes that are to have a replica (its targets), and the shard's own leader drives the actual members there; the
//! [`planner`] on group 0's leader changes nothing but records.
//!
//! Every node keeps a copy of all records, a [`Cluster`], and computes from it alone what must be the same everywhere: routing's
//! [`Cluster::epoch`] and [`leaders`].
//!
//! # What holds
//! - Everything here is a function of its arguments: the same records and the same observations give the same answer on every
//!   node and in every release that shares the format.
//! - **Records are never deleted.** A node that is gone keeps its record, so its id is never another's, and a copy is brought up
//!   to date by "all records with a version above mine" alone.
//! - **Liveness is no record.** It is observed, differently by different nodes, and only an argument.
//!
//! Not here: storing records, asking for them, observing nodes, changing a group's members.

mod leaders;
mod observed;
pub mod placement;
pub mod planner;
pub mod preflight;
pub mod records;
mod rendezvous;
mod shares;
mod step;
mod view;

pub use leaders::{leaders, load_step};
pub use observed::{GroupSeen, NodeSeen, Observed};
pub use step::Step;
pub use view::{ApplyError, Changed, Cluster, DeltaError};
