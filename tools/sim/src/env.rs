//! The node's environment, made of memory.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use generation_node::env::{CoreId, Datagram, Env, Transmit};
use generation_node::mesh::MeshMessage;

use crate::sim::{Endpoint, World};

/// What the world holds for one core.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) datagrams: VecDeque<Datagram>,
    pub(crate) messages: VecDeque<(CoreId, MeshMessage)>,
    pub(crate) stop_seen: bool,
    /// A task of the core wants it to take a turn.
    pub(crate) woken: bool,
    pub(crate) waker: Option<Waker>,
}

impl Inbox {
    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// The environment of one core of one simulated node.
#[derive(Debug, Clone)]
pub struct SimEnv {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) node: usize,
    pub(crate) core: CoreId,
}

impl Env for SimEnv {
    fn core(&self) -> CoreId {
        self.core
    }

    fn cores(&self) -> CoreId {
        self.world.borrow().nodes[self.node].cores.len() as CoreId
    }

    fn now(&self) -> Instant {
        self.world.borrow().now
    }

    fn unix_ms(&self) -> u64 {
        self.world.borrow().unix_ms()
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        self.world.borrow_mut().dice.fill(bytes);
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world.borrow_mut().spawned.push((self.node, Box::pin(task)));
    }

    fn sleep_until(&self, deadline: Instant) -> impl Future<Output = ()> {
        Sleep {
            world: Rc::clone(&self.world),
            deadline,
        }
    }

    fn yield_now(&self) -> impl Future<Output = ()> {
        let mut yielded = false;
        std::future::poll_fn(move |context| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }

    fn receive(&self, limit: usize, datagrams: &mut Vec<Datagram>) -> usize {
        let mut world = self.world.borrow_mut();
        let inbox = &mut world.nodes[self.node].cores[usize::from(self.core)];
        let count = limit.min(inbox.datagrams.len());
        datagrams.extend(inbox.datagrams.drain(..count));
        count
    }

    fn transmit(&self, transmit: &Transmit, payload: &[u8]) -> bool {
        let mut world = self.world.borrow_mut();
        let from = world.nodes[self.node].addr;
        let size = transmit.segment_size.unwrap_or(payload.len()).max(1);
        for datagram in payload.chunks(size) {
            world.send(from, Endpoint::Node(self.node), transmit.remote, datagram);
        }
        true
    }

    fn mesh_send(&self, to: CoreId, message: MeshMessage) -> Result<(), MeshMessage> {
        let mut world = self.world.borrow_mut();
        let capacity = world.weather.mesh_capacity;
        world.trace_mesh(self.core, to, &message);
        let inbox = &mut world.nodes[self.node].cores[usize::from(to)];
        if inbox.messages.len() >= capacity {
            return Err(message);
        }
        inbox.messages.push_back((self.core, message));
        inbox.wake();
        Ok(())
    }

    fn mesh_receive(&self, limit: usize, messages: &mut Vec<(CoreId, MeshMessage)>) -> usize {
        let mut world = self.world.borrow_mut();
        let inbox = &mut world.nodes[self.node].cores[usize::from(self.core)];
        let count = limit.min(inbox.messages.len());
        messages.extend(inbox.messages.drain(..count));
        count
    }

    fn park(&self, deadline: Option<Instant>) -> impl Future<Output = ()> {
        Park {
            env: self.clone(),
            deadline,
        }
    }

    fn wake(&self) {
        let mut world = self.world.borrow_mut();
        let inbox = &mut world.nodes[self.node].cores[usize::from(self.core)];
        inbox.woken = true;
        inbox.wake();
    }

    fn stopping(&self) -> bool {
        self.world.borrow().nodes[self.node].stopping
    }
}

struct Sleep {
    world: Rc<RefCell<World>>,
    deadline: Instant,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut world = self.world.borrow_mut();
        if world.now >= self.deadline {
            return Poll::Ready(());
        }
        world.wake_at(self.deadline, context.waker().clone());
        Poll::Pending
    }
}

struct Park {
    env: SimEnv,
    deadline: Option<Instant>,
}

impl Future for Park {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut world = self.env.world.borrow_mut();
        let now = world.now;
        let node = &mut world.nodes[self.env.node];
        let inbox = &mut node.cores[usize::from(self.env.core)];
        let stop = node.stopping && !std::mem::replace(&mut inbox.stop_seen, node.stopping);
        let due = self.deadline.is_some_and(|deadline| deadline <= now);
        let woken = std::mem::take(&mut inbox.woken);
        if stop || due || woken || !inbox.datagrams.is_empty() || !inbox.messages.is_empty() {
            return Poll::Ready(());
        }
        inbox.waker = Some(context.waker().clone());
        if let Some(deadline) = self.deadline {
            // Timers of real executors are late by some microseconds, never early.
            world.wake_at(deadline + Duration::from_micros(50), context.waker().clone());
        }
        Poll::Pending
    }
}
