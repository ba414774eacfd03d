//! Node to node: calls, messages and signs of life between the cores of a cluster's nodes, over QUIC on the node's own port.
//!
//! What flows is opaque here: a message has a shard, a kind and a payload, and both are the replica layer's business.
//!
//! # For the replica layer
//! [`Peers`] is a handle (`Rc`) to one core's part. It is used from that core's executor only.
//!
//! ```text
//! peers.set_handler(handler)                        who answers; until then requests are refused as NotServed
//! peers.call(to, shard, kind, payload, deadline)    queues a request at once, in order; the future is only the wait for its
//!                                                   answer. Dropping it gives the answer up.
//! peers.send(to, shard, kind, payload)              queues a message without an answer; may be lost
//! peers.is_alive(node)                              whether the node was heard of lately, as core 0 of this node sees it
//! Handler::request(request)                         request.reply(payload) now or later, from any task of the core; a
//!                                                   request that is dropped is refused as Unanswered
//! Handler::message(..), Handler::liveness(..)       called within the reactor's turn: short, and never blocking
//! ```
//!
//! Whatever is queued before the reactor's next turn leaves in that turn, as one write a lane; queueing wakes the reactor
//! ([`Env::wake`]). Every call ends: with its answer, or at its deadline, or when the connection it went out on is lost, or at once
//! when nothing can be sent. [`PeerError::may_have_been_received`] says whether the other side may have seen it.
//!
//! # Connections
//! A pair of cores shares *one* connection for both directions. One for each direction would need no rule about who dials, but
//! under load a core has appends for a peer's followers and answers for its leaders in the same turn: shared, they are one train
//! of datagrams with one acknowledgement, and every packet not sent is saved on both nodes. The rule: whoever has something to
//! send dials, unless a connection is there. Where both did, both sides send on the one dialled by the node with the smaller id, and
//! the other is closed by whoever dialled it once nothing is under way on it. So a node that restarts is connected as soon as it
//! speaks, whatever its id.
//!
//! A connection has two lanes (streams): short messages never wait behind long ones, neither here nor, since the first lane
//! has priority, in the transport.
//!
//! # Bounds
//! [`PeerLimits`] bounds what waits for, and what is under way with, each core of each node separately, so that a slow one is
//! `Busy` and touches no other. A peer that floods is refused, one that takes no answers or breaks the protocol is disconnected.
//!
//! # Identity
//! TLS verifies both certificates against the cluster's authority, [`crate::Authorize`] reads who they name: a dialled node must
//! be exactly the one dialled, a dialling one a known node. The hello on each lane must agree with it.
//!
//! Not here: what messages mean, retries (the replica layer knows what may be repeated), membership (the configuration's).

mod calls;
mod config;
mod detector;
mod exchange;
mod lane;
mod link;
pub mod quiesce;
pub(crate) mod stats;

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use generation_proto::peer::Refusal;
use generation_quic::{ConnectionKey, Driver, Event};

pub use config::{PeerLimits, PeerNode, PeersConfig};
pub use stats::PeerStats;

use crate::config::CoreConfig;
use crate::env::{CoreId, Env};
use crate::mesh::PeerLiveness;
use exchange::{Delivery, Exchange};

/// The name a dialled node's certificate is asked about. Nodes are known by the URI in their certificates and verifiers pay no
/// heed to it; TLS wants one.
pub const SERVER_NAME: &str = "node.generation.internal";

/// A core of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId {
    /// The node's id.
    pub node: u64,
    /// Its core.
    pub core: CoreId,
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "core {} of node {}", self.core, self.node)
    }
}

/// Why a call has no answer, or a message was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No such core of no such node is configured. Nothing was sent.
    #[error("there is no such peer; the cluster's configuration lists the nodes and their cores")]
    Unknown,
    /// The payload is longer than a message may be. Nothing was sent.
    #[error("a payload of {0} bytes is longer than a message may be; send it in several")]
    TooLarge(usize),
    /// Too much is queued for, or under way with, that core. Nothing was sent; try again when answers have come.
    #[error("too much is under way with the peer; try again when answers have come")]
    Busy,
    /// There is no connection, and making one failed or is being put off after failures. Nothing was sent.
    #[error("the peer cannot be reached at present")]
    Unreachable,
    /// No answer by the deadline.
    #[error("no answer in time")]
    Timeout {
        /// Whether the request was handed to the network whole.
        maybe_received: bool,
    },
    /// The connection was lost before the answer came.
    #[error("the connection to the peer was lost before the answer came")]
    Lost {
        /// Whether the request was handed to the network whole.
        maybe_received: bool,
    },
    /// The other side says that it does not answer.
    #[error("the peer refused the request: {0:?}")]
    Refused(Refusal),
    /// This node is stopping. Nothing was sent.
    #[error("the node is stopping")]
    Stopped,
}

impl PeerError {
    /// Whether the other side may have acted on the request. If not, repeating it is harmless whatever it is.
    pub const fn may_have_been_received(&self) -> bool {
        match self {
            Self::Timeout { maybe_received } | Self::Lost { maybe_received } => *maybe_received,
            Self::Refused(refusal) => matches!(refusal, Refusal::Unanswered),
            Self::Unknown | Self::TooLarge(_) | Self::Busy | Self::Unreachable | Self::Stopped => false,
        }
    }
}

/// A change of what is known of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Liveness {
    /// It was heard of, for the first time or after a silence.
    Up,
    /// It has been silent for too long, or said that it goes.
    Down,
    /// It has restarted: what it had in memory is lost, its clocks and roles with it. It is up.
    Restarted,
}

/// Who answers a core's peers. Methods are called within the reactor's turn, one at a time.
pub trait Handler {
    /// A request has arrived.
    fn request(&self, request: Request);

    /// A message without an answer has arrived. The payload is a slice of what was received: to keep it for long, copy it.
    fn message(&self, from: PeerId, shard: u16, kind: u8, payload: Bytes);

    /// What is known of a node has changed.
    fn liveness(&self, node: u64, change: Liveness);
}

/// A request of a peer's, to be answered once. Dropping it refuses it as [`Refusal::Unanswered`].
pub struct Request {
    /// Who asks.
    pub from: PeerId,
    /// The shard it is about.
    pub shard: u16,
    /// What the payload means.
    pub kind: u8,
    /// The payload: a slice of what was received, so to keep it for long, copy it.
    pub payload: Bytes,
    answer: Answer,
}

impl Request {
    /// Answers it. An answer longer than a message may be becomes a refusal.
    pub fn reply(self, payload: Bytes) {
        self.answer.reply(payload);
    }

    /// The answer apart from the request, for who lets the payload go before it answers.
    pub fn into_answer(self) -> (Bytes, Answer) {
        (self.payload, self.answer)
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("from", &self.from)
            .field("shard", &self.shard)
            .field("kind", &self.kind)
            .field("len", &self.payload.len())
            .finish_non_exhaustive()
    }
}

/// The right to answer one request, once. Dropping it refuses the request as [`Refusal::Unanswered`].
pub struct Answer {
    peers: Peers,
    to: Option<exchange::Asked>,
}

impl Answer {
    /// Answers the request.
    pub fn reply(mut self, payload: Bytes) {
        if let Some(asked) = self.to.take() {
            self.peers.answer(&asked, Ok(payload));
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(asked) = self.to.take() {
            self.peers.answer(&asked, Err(Refusal::Unanswered));
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").finish_non_exhaustive()
    }
}

/// Whose an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Routed {
    /// A peer's.
    Peer,
    /// Somebody's who asked for the peer protocol and was turned away.
    Refused,
    /// Not a peer's.
    Other,
}

struct Shared {
    exchange: RefCell<Exchange>,
    handler: RefCell<Option<Rc<dyn Handler>>>,
    wake: Box<dyn Fn()>,
    clock: Box<dyn Fn() -> Instant>,
}

/// One core's peers. A handle: clones are the same.
#[derive(Clone)]
pub struct Peers {
    shared: Rc<Shared>,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers").finish_non_exhaustive()
    }
}

impl Peers {
    /// The peers of the core `env` is of. They come to life in [`crate::run_with_peers`].
    ///
    /// # Panics
    /// When the configuration names this node or no node (id 0) among the others, one of them twice, or one without cores or with
    /// more than 256.
    pub fn new<E: Env>(env: &E, config: &CoreConfig) -> Self {
        let mut seed = [0; 8];
        env.fill_random(&mut seed);
        let exchange = Exchange::new(config, env.core(), env.cores(), u64::from_le_bytes(seed), env.now());
        let (clock, bell) = (env.clone(), env.clone());
        Self {
            shared: Rc::new(Shared {
                exchange: RefCell::new(exchange),
                handler: RefCell::new(None),
                wake: Box::new(move || bell.wake()),
                clock: Box::new(move || clock.now()),
            }),
        }
    }

    /// Sets who answers this core's peers, in place of whoever did before.
    pub fn set_handler(&self, handler: Rc<dyn Handler>) {
        let old = self.shared.handler.replace(Some(handler));
        // Its drop may use these peers.
        drop(old);
    }

    /// Sends a request; the future is the wait for its answer. It is queued when this returns, behind everything queued for that
    /// core before (of the same lane: payloads over [`generation_proto::peer::MAX_PROMPT_LEN`] have their own), and ends by
    /// `deadline`. Dropping the future gives the answer up, not the request.
    pub fn call(&self, to: PeerId, shard: u16, kind: u8, payload: Bytes, deadline: Instant) -> Call {
        let now = (self.shared.clock)();
        let mut exchange = self.shared.exchange.borrow_mut();
        let state = match exchange.call(to, shard, kind, payload, deadline, now) {
            Ok(id) => State::Waiting(id),
            Err(error) => State::Failed(error),
        };
        drop(exchange);
        self.wake();
        Call {
            peers: self.clone(),
            state,
        }
    }

    /// Sends a message without an answer. It may be lost without anybody hearing of it.
    pub fn send(&self, to: PeerId, shard: u16, kind: u8, payload: Bytes) -> Result<(), PeerError> {
        let now = (self.shared.clock)();
        let mut exchange = self.shared.exchange.borrow_mut();
        let sent = exchange.send(to, shard, kind, payload, false, now);
        drop(exchange);
        self.wake();
        sent
    }

    /// As [`Peers::send`], for what is in no hurry: it leaves with what is said to that core next, or in a few milliseconds; where
    /// nothing else happens on this core, when its reactor next takes a turn.
    pub fn send_along(&self, to: PeerId, shard: u16, kind: u8, payload: Bytes) -> Result<(), PeerError> {
        let now = (self.shared.clock)();
        let mut exchange = self.shared.exchange.borrow_mut();
        exchange.send(to, shard, kind, payload, true, now)
    }

    /// Has these be the other nodes from now on: connections to those that were and are not listed are closed in the reactor's next turn,
    /// and whoever waits for an answer of theirs is told that it is lost.
    ///
    /// # Panics
    /// As [`Peers::new`].
    pub fn set_nodes(&self, nodes: &[PeerNode]) {
        let now = (self.shared.clock)();
        self.shared.exchange.borrow_mut().set_nodes(nodes, now);
        self.wake();
    }

    /// Whether a node was heard of lately, as core 0 of this node sees it. Of an unknown node: no.
    pub fn is_alive(&self, node: u64) -> bool {
        self.shared.exchange.borrow().is_alive(node)
    }

    /// How many milliseconds the wall clock of a node is ahead of this one's (negative: behind), give or take half a round trip,
    /// as the last pong of it to core 0 said.
    pub fn clock_offset_ms(&self, node: u64) -> Option<i64> {
        self.shared.exchange.borrow().clock_offset_ms(node)
    }

    /// The same of all nodes that live and have said it lately, as core 0 sees them.
    pub(crate) fn clock_offsets(&self, now: Instant) -> Vec<(u64, i64)> {
        self.shared.exchange.borrow().clock_offsets(now)
    }

    /// Identity of the node's data directory, once a connection has told it.
    pub fn directory(&self, node: u64) -> Option<u128> {
        self.shared.exchange.borrow().directory(node)
    }

    /// Counters of what this core and a node have had to do with each other.
    pub fn stats(&self, node: u64) -> Option<PeerStats> {
        self.shared.exchange.borrow().stats(node)
    }

    /// Takes in an event of the driver's, if it is of a peer's connection.
    pub(crate) fn event(&self, now: Instant, driver: &mut Driver, key: ConnectionKey, event: &Event) -> Routed {
        self.with(|exchange| exchange.event(now, driver, key, event))
    }

    /// Takes in what core 0 says of a node.
    pub(crate) fn liveness(&self, now: Instant, driver: &mut Driver, liveness: PeerLiveness) {
        self.with(|exchange| exchange.told(now, driver, liveness));
    }

    /// Reads what has arrived, bounded, and has it handled. `true`: there is more.
    pub(crate) fn receive(&self, now: Instant, now_ms: u64, driver: &mut Driver) -> bool {
        let (more, mut deliveries) = self.with(|exchange| {
            let more = exchange.receive(now, now_ms, driver);
            (more, std::mem::take(&mut exchange.deliveries))
        });
        if deliveries.is_empty() {
            return more;
        }
        let handler = self.shared.handler.borrow().clone();
        for delivery in deliveries.drain(..) {
            match (delivery, &handler) {
                (Delivery::Request(head, payload), Some(handler)) => handler.request(Request {
                    from: head.from,
                    shard: head.asked.shard,
                    kind: head.asked.kind,
                    payload,
                    answer: Answer {
                        peers: self.clone(),
                        to: Some(head.asked),
                    },
                }),
                (Delivery::Request(head, _), None) => self.answer(&head.asked, Err(Refusal::NotServed)),
                (Delivery::Message(from, shard, kind, payload), Some(handler)) => {
                    handler.message(from, shard, kind, payload);
                }
                (Delivery::Liveness(node, change), Some(handler)) => handler.liveness(node, change),
                (Delivery::Message(..) | Delivery::Liveness(..), None) => {}
            }
        }
        self.shared.exchange.borrow_mut().recycle(deliveries);
        more
    }

    /// Does what is due, and hands everything queued to the transport. What the other cores are to be told goes to `tell`. `true`:
    /// there is more to do at once.
    pub(crate) fn flush(&self, now: Instant, now_ms: u64, driver: &mut Driver, tell: impl FnMut(PeerLiveness)) -> bool {
        self.with(|exchange| exchange.flush(now, now_ms, driver, tell))
    }

    /// When [`flush`](Self::flush) is due, at the latest.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.shared.exchange.borrow().next_deadline()
    }

    /// Ends every call and closes every connection. No new ones are made.
    pub(crate) fn shut_down(&self, now: Instant, driver: &mut Driver) {
        self.with(|exchange| exchange.shut_down(now, driver));
        // What it holds may hold these peers.
        let handler = self.shared.handler.borrow_mut().take();
        drop(handler);
    }

    /// Appends the counters of every node.
    pub(crate) fn encode_stats(&self, core: CoreId, out: &mut BytesMut) {
        self.shared.exchange.borrow().encode_stats(core, out);
    }

    /// Works with the exchange, and wakes whose calls have ended meanwhile.
    fn with<T>(&self, work: impl FnOnce(&mut Exchange) -> T) -> T {
        let mut exchange = self.shared.exchange.borrow_mut();
        let result = work(&mut exchange);
        if exchange.calls.wakers.is_empty() {
            return result;
        }
        let mut wakers = std::mem::take(&mut exchange.calls.wakers);
        drop(exchange);
        wakers.drain(..).for_each(std::task::Waker::wake);
        let mut exchange = self.shared.exchange.borrow_mut();
        if exchange.calls.wakers.is_empty() {
            // The memory is used again.
            exchange.calls.wakers = wakers;
        }
        result
    }

    fn answer(&self, asked: &exchange::Asked, outcome: Result<Bytes, Refusal>) {
        self.shared.exchange.borrow_mut().answer(asked, outcome);
        self.wake();
    }

    /// Sees to it that the reactor takes a turn, if what was queued asks for one.
    fn wake(&self) {
        if self.shared.exchange.borrow_mut().needs_wake() {
            (self.shared.wake)();
        }
    }
}

enum State {
    Waiting(u64),
    Failed(PeerError),
    Done,
}

/// The wait for a call's answer.
#[must_use = "the answer is lost unless it is waited for"]
pub struct Call {
    peers: Peers,
    state: State,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").finish_non_exhaustive()
    }
}

impl Future for Call {
    type Output = Result<Bytes, PeerError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = match self.state {
            State::Waiting(id) => {
                let mut exchange = self.peers.shared.exchange.borrow_mut();
                match exchange.calls.poll(id, context.waker()) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(outcome) => outcome,
                }
            }
            State::Failed(error) => Err(error),
            State::Done => return Poll::Pending,
        };
        self.state = State::Done;
        Poll::Ready(outcome)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let State::Waiting(id) = self.state {
            self.peers.shared.exchange.borrow_mut().forget(id);
        }
    }
}
