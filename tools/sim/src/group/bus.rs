//! Calls between machines: a question, what answers it over there, and the answer, over the simulated network.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_node::env::Env;
use generation_node::raft::network::{CallError, Transport};
use generation_node::raft::replica::Replica;
use generation_node::raft::runtime::{ambient, within};

use super::node::Replicas;
use crate::disk::SimDisk;
use crate::env::{SimEnv, until};
use crate::network::Host;

/// How long what is told may be on its way.
const TOLD: Duration = Duration::from_secs(1);

/// A refusal, as replicas spell it: there is no such replica.
const NO_REPLICA: &[u8] = &[0];

/// Holds one value until it is fetched.
pub(super) struct Slot<T>(Rc<RefCell<(Option<T>, Option<Waker>)>>);

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T> Slot<T> {
    fn new() -> Self {
        Self(Rc::new(RefCell::new((None, None))))
    }

    pub(super) fn put(&self, value: T) {
        let waker = {
            let mut slot = self.0.borrow_mut();
            slot.0 = Some(value);
            slot.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Waits for the value.
    pub(super) async fn fetch(self) -> T {
        std::future::poll_fn(|context| self.take(context.waker()).map_or(Poll::Pending, Poll::Ready)).await
    }

    fn take(&self, waker: &Waker) -> Option<T> {
        let mut slot = self.0.borrow_mut();
        let value = slot.0.take();
        if value.is_none() {
            slot.1 = Some(waker.clone());
        }
        value
    }
}

/// A slot and its other end.
pub(super) fn slot<T>() -> (Slot<T>, Slot<T>) {
    let slot = Slot::new();
    (slot.clone(), slot)
}

/// Where replicas are found.
#[derive(Default)]
pub(super) struct Hosts(RefCell<BTreeMap<usize, Weak<Replicas>>>);

impl Hosts {
    pub(super) fn register(&self, node: usize, replicas: &Rc<Replicas>) {
        self.0.borrow_mut().insert(node, Rc::downgrade(replicas));
    }

    /// What a node serves, if it does.
    pub(super) fn replicas(&self, node: usize) -> Option<Rc<Replicas>> {
        self.0.borrow().get(&node)?.upgrade()
    }

    fn replica(&self, node: usize, shard: u16) -> Option<Replica<SimDisk, Bus>> {
        self.replicas(node)?.shards.get(usize::from(shard)).cloned()
    }
}

/// Runs `serve` on machine `to` when the question has got there, and gives its answer once that has got back; `None` when
/// `deadline` comes first, on the asker's clock.
pub(super) async fn ask<T: 'static, F: Future<Output = T> + 'static>(
    env: &SimEnv,
    to: usize,
    deadline: Instant,
    serve: impl FnOnce(SimEnv) -> F + 'static,
) -> Option<T> {
    let slot = Slot::new();
    let from = env.node;
    let over_there = SimEnv {
        node: to,
        core: 0,
        ..env.clone()
    };
    if let Some(at) = travel(env, from, to) {
        let (answer, home) = (slot.clone(), env.clone());
        let task = async move {
            until(&over_there.world, to, at).await;
            let value = serve(over_there.clone()).await;
            if let Some(at) = travel(&over_there, to, from) {
                let task = async move {
                    until(&home.world, from, at).await;
                    answer.put(value);
                };
                over_there.world.borrow_mut().spawned.push((from, Box::pin(task)));
            }
        };
        let over_there = SimEnv {
            node: to,
            core: 0,
            ..env.clone()
        };
        let task = within(ambient(over_there), task);
        env.world.borrow_mut().spawned.push((to, Box::pin(task)));
    }
    let mut late = pin!(env.sleep_until(deadline));
    std::future::poll_fn(|context| {
        if let Some(value) = slot.take(context.waker()) {
            return Poll::Ready(Some(value));
        }
        late.as_mut().poll(context).map(|()| None)
    })
    .await
}

/// When something sent now gets there, if it does.
fn travel(env: &SimEnv, from: usize, to: usize) -> Option<Instant> {
    let mut world = env.world.borrow_mut();
    let world = &mut *world;
    world.counters.sent += 1;
    world.note(&[from as u64, to as u64]);
    let (from, host) = (Host::Node(from), Host::Node(to));
    let [time, _] = world.links.fate(&world.weather, &mut world.dice, from, Some(host));
    if time.is_none() || !world.nodes[to].up {
        world.counters.lost += 1;
        return None;
    }
    time.map(|time| world.now + time)
}

/// What carries calls between replicas.
#[derive(Clone)]
pub(super) struct Bus {
    pub(super) env: SimEnv,
    pub(super) hosts: Rc<Hosts>,
}

impl Transport for Bus {
    async fn call(
        &self,
        node: u64,
        shard: u16,
        kind: u8,
        payload: Bytes,
        deadline: Instant,
    ) -> Result<Bytes, CallError> {
        let to = (node - 1) as usize;
        let hosts = Rc::clone(&self.hosts);
        let serve = move |_| async move {
            match hosts.replica(to, shard) {
                Some(replica) => replica.handle(kind, payload).await,
                None => Bytes::from_static(NO_REPLICA),
            }
        };
        ask(&self.env, to, deadline, serve).await.ok_or(CallError::Timeout)
    }

    fn tell(&self, node: u64, shard: u16, kind: u8, payload: Bytes) {
        let (bus, deadline) = (self.clone(), self.env.now() + TOLD);
        self.env.spawn(async move {
            // It may be lost.
            let _ = bus.call(node, shard, kind, payload, deadline).await;
        });
    }

    fn is_alive(&self, _: u64) -> bool {
        // Nobody looks after nodes here.
        true
    }
}
