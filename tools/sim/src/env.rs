//! The node's environment, made of memory.

use std::cell::RefCell;
use std::future::Future;
use std::panic::resume_unwind;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use generation_node::env::{CoreId, Datagram, Env, Transmit};
use generation_node::mesh::MeshMessage;

use crate::disk::SimDisk;
use crate::executor::Crashed;
use crate::network::Host;
use crate::points::{Kill, Strike};
use crate::world::{TimerKey, World};

/// How much later than its deadline a park ends: timers of real executors are late by some microseconds, never early.
const PARK_OVERSHOOT: Duration = Duration::from_micros(50);

/// The environment of one core of one simulated node.
#[derive(Debug, Clone)]
pub struct SimEnv {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) node: usize,
    pub(crate) core: CoreId,
}

impl SimEnv {
    /// Ends the node, in the middle of whatever it does.
    pub(crate) fn die(&self) -> ! {
        self.world.borrow_mut().nodes[self.node].dying = Some(Kill::Process);
        resume_unwind(Box::new(Crashed))
    }
}

impl Env for SimEnv {
    type Disk = SimDisk;

    fn disk(&self) -> SimDisk {
        SimDisk::new(&self.world, self.node, &format!("core-{}", self.core))
    }

    fn core(&self) -> CoreId {
        self.core
    }

    fn cores(&self) -> CoreId {
        self.world.borrow().nodes[self.node].cores.len() as CoreId
    }

    fn now(&self) -> Instant {
        self.world.borrow().node_now(self.node)
    }

    fn unix_ms(&self) -> u64 {
        let world = self.world.borrow();
        world.nodes[self.node].clock.unix_ms(world.now)
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
            node: self.node,
            clock: Clock::Node,
            deadline,
            timer: None,
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
        let size = transmit.segment_size.unwrap_or(payload.len()).max(1);
        for datagram in payload.chunks(size) {
            world.send(Host::Node(self.node), transmit.remote, datagram);
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
            timer: None,
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

    fn point(&self, point: &'static str) {
        // A node that unwinds already is dead.
        if std::thread::panicking() {
            return;
        }
        let mut world = self.world.borrow_mut();
        let world = &mut *world;
        match world.ambushes.pass(&mut world.dice, self.node, point) {
            None => {}
            Some(Strike::Kill(how)) => {
                world.counters.ambushes += 1;
                world.nodes[self.node].dying = Some(how);
                resume_unwind(Box::new(Crashed));
            }
            Some(Strike::Freeze) => {
                world.freezing.push(self.node);
            }
        }
    }
}

/// Which clock a deadline is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clock {
    Node,
    World,
}

struct Sleep {
    world: Rc<RefCell<World>>,
    node: usize,
    clock: Clock,
    deadline: Instant,
    timer: Option<TimerKey>,
}

/// Waits until `at` on the world's clock, on behalf of a node.
pub(crate) fn until(world: &Rc<RefCell<World>>, node: usize, at: Instant) -> impl Future<Output = ()> {
    Sleep {
        world: Rc::clone(world),
        node,
        clock: Clock::World,
        deadline: at,
        timer: None,
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut world = this.world.borrow_mut();
        if let Some(timer) = this.timer.take() {
            world.cancel(timer);
        }
        let now = match this.clock {
            Clock::Node => world.node_now(this.node),
            Clock::World => world.now,
        };
        if now >= this.deadline {
            return Poll::Ready(());
        }
        let waker = context.waker().clone();
        this.timer = Some(match this.clock {
            Clock::Node => world.wake_at_node_time(this.node, this.deadline, waker),
            Clock::World => world.wake_at(Some(this.node), this.deadline, waker),
        });
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.world.borrow_mut().cancel(timer);
        }
    }
}

struct Park {
    env: SimEnv,
    deadline: Option<Instant>,
    timer: Option<TimerKey>,
}

impl Future for Park {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let (number, core) = (this.env.node, usize::from(this.env.core));
        let mut world = this.env.world.borrow_mut();
        if let Some(timer) = this.timer.take() {
            world.cancel(timer);
        }
        let now = world.node_now(number);
        let node = &mut world.nodes[number];
        let inbox = &mut node.cores[core];
        let stop = node.stopping && !std::mem::replace(&mut inbox.stop_seen, node.stopping);
        let due = this.deadline.is_some_and(|deadline| deadline <= now);
        let woken = std::mem::take(&mut inbox.woken);
        if stop || due || woken || !inbox.datagrams.is_empty() || !inbox.messages.is_empty() {
            return Poll::Ready(());
        }
        inbox.waker = Some(context.waker().clone());
        if let Some(deadline) = this.deadline {
            let waker = context.waker().clone();
            this.timer = Some(world.wake_at_node_time(number, deadline + PARK_OVERSHOOT, waker));
        }
        Poll::Pending
    }
}

impl Drop for Park {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.env.world.borrow_mut().cancel(timer);
        }
    }
}
