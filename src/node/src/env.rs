//! The one seam between a node and the world: time, randomness, tasks, datagrams, disk, and the mesh between the cores of a node.
//!
//! Production implements it over glommio and io_uring (`generation-server`), tests over a deterministic simulator
//! (`generation-sim`). Nothing else in this crate reads a clock, opens a socket, spawns a thread or draws a random number.
//!
//! An `Env` belongs to one core. It is used from that core's executor only, so none of its methods needs `&mut self`, `Send` or
//! `Sync`; what crosses cores is [`MeshMessage`], by value.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use bytes::BytesMut;

use crate::mesh::MeshMessage;

pub mod disk;
pub mod rooted;

/// The index of a core within its node, from 0. Not the operating system's CPU number.
pub type CoreId = u16;

/// One received UDP payload: exactly one QUIC datagram, already split out of any GRO train.
#[derive(Debug)]
pub struct Datagram {
    /// Who sent it.
    pub remote: SocketAddr,
    /// The local address it arrived at, where the kernel tells.
    pub local_ip: Option<IpAddr>,
    /// The two ECN bits of the IP header.
    pub ecn: u8,
    /// The UDP payload. The driver takes it apart in place, so it is owned and mutable.
    pub payload: BytesMut,
}

/// Where and how a buffer of outgoing datagrams goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// Destination of every segment.
    pub remote: SocketAddr,
    /// The local address to send from, where it matters (a host with several).
    pub local_ip: Option<IpAddr>,
    /// The two ECN bits of the IP header.
    pub ecn: u8,
    /// `Some(n)`: the buffer is a train of datagrams of `n` bytes each (the last may be shorter), to be sent with GSO.
    pub segment_size: Option<usize>,
}

/// What one core of a node takes from the world. A handle: clones are the same core.
pub trait Env: Clone + 'static {
    /// The core's directory.
    type Disk: disk::Disk;

    /// This core.
    fn core(&self) -> CoreId;

    /// How many cores the node has, at least 1.
    fn cores(&self) -> CoreId;

    /// Monotonic time. All deadlines in this crate are on this clock.
    fn now(&self) -> Instant;

    /// Wall-clock time in milliseconds since the Unix epoch. It may jump, backwards too; shard time is made monotonic from it.
    fn unix_ms(&self) -> u64;

    /// Fills `bytes` with cryptographically secure random bytes (in the simulator: from the seed).
    fn fill_random(&self, bytes: &mut [u8]);

    /// The core's own directory.
    fn disk(&self) -> Self::Disk;

    /// Runs `task` on this core until it ends. It is not cancelled by the caller's going away, and not polled within this call: the
    /// caller may hold what the task will want.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    /// Completes at `deadline` or a little later, never before.
    fn sleep_until(&self, deadline: Instant) -> impl Future<Output = ()>;

    /// Lets every other runnable task of this core have a turn.
    fn yield_now(&self) -> impl Future<Output = ()>;

    /// Appends the datagrams that have arrived, without waiting, at most `limit` of them; returns how many.
    fn receive(&self, limit: usize, datagrams: &mut Vec<Datagram>) -> usize;

    /// Sends `payload` as `transmit` says. Returns `false` when the socket's buffer is full: the caller keeps the buffer and
    /// tries again on a later turn. Other failures (an unreachable host) count as a lost datagram, which QUIC repairs.
    fn transmit(&self, transmit: &Transmit, payload: &[u8]) -> bool;

    /// Queues `message` for another core of this node and makes sure that the core will see it. Gives the message back when that
    /// core's queue is full: the caller answers `Busy`.
    fn mesh_send(&self, to: CoreId, message: MeshMessage) -> Result<(), MeshMessage>;

    /// Appends the messages other cores have sent here, with their senders, at most `limit`; returns how many.
    fn mesh_receive(&self, limit: usize, messages: &mut Vec<(CoreId, MeshMessage)>) -> usize;

    /// Waits until a datagram or a mesh message may have arrived, a stop was asked for, the socket may have room again,
    /// [`wake`](Self::wake) was called, or `deadline` has come. It may return early for no reason; it must never miss one of those.
    fn park(&self, deadline: Option<Instant>) -> impl Future<Output = ()>;

    /// Ends the [`park`](Self::park) under way, or if there is none the next one. For tasks of this core that leave work for the
    /// one that parks.
    fn wake(&self);

    /// Whether the node was asked to stop. Once `true` it stays so.
    fn stopping(&self) -> bool;

    /// The node passes one of its [points](crate::points), at which a simulation may strike. Elsewhere this does nothing and leaves
    /// nothing in the program.
    #[inline]
    fn point(&self, _point: &'static str) {}
}
