//! [`GlommioEnv`]: one core's world, over glommio and one UDP socket.
//!
//! # How a core waits
//! Everything a task of a core can wait for is looked at by the core itself, between its turns: its socket, its mesh rings, its
//! timers ([`timers`]), its files' completions ([`ring`]). glommio gives the core its thread and runs its tasks; its own reactor, and
//! the three rings that has, are never visited. When there is nothing to do and no task can run ([`tasks`]), [`Env::park`] first
//! spins if that pays ([`spin`]), then blocks the thread in one `ppoll` on the socket, the core's bell and the ring's descriptor, with
//! the first timer as its time-out. Nothing can become runnable that this would hold up.
//!
//! # A defect of glommio, avoided here
//! Its `run_task_queues` reports "nothing ran" when the preemption timer fires before the first queue has run, and the executor
//! then sleeps, although a task is runnable, until anything else completes. So that timer never fires ([`crate::executors`]), and
//! the executor never sleeps of its own: the core's own task is always runnable, or blocks the thread where it knows that it may.

mod disk;
mod mesh;
mod ring;
mod spin;
mod tasks;
mod timers;
mod wake;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use generation_node::env::{CoreId, Datagram, Env, Transmit};
use generation_node::mesh::MeshMessage;
use glommio::TaskQueueHandle;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

pub use disk::{RingDisk, RingFile};
pub use mesh::{MeshEnd, mesh};
pub use wake::Bell;

use crate::net::port::CoreSocket;
use ring::Ring;
use spin::Spin;
use tasks::Runnable;
use timers::Timers;

/// Messages each ring of the mesh holds. With requests of a few kilobytes a full ring is some megabytes.
pub const MESH_CAPACITY: usize = 1024;
/// Rounds the core's tasks get in a row before the core looks at its socket again.
const ROUNDS: usize = 8;
/// How soon the kernel is offered again what it did not take.
const OFFER_AGAIN: Duration = Duration::from_millis(1);

/// What the cores of a node share: the request to stop, and everybody's bell.
#[derive(Debug)]
pub struct Shared {
    stopping: AtomicBool,
    bells: Vec<Bell>,
    /// By core: something that is no datagram and no message waits for it.
    notified: Vec<AtomicBool>,
}

impl Shared {
    /// For a node of `cores` cores.
    pub fn new(cores: CoreId) -> io::Result<Arc<Self>> {
        let bells = (0..cores).map(|_| Bell::new()).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self {
            stopping: AtomicBool::new(false),
            bells,
            notified: (0..cores).map(|_| AtomicBool::new(false)).collect(),
        }))
    }

    /// Ends the park under way of a core, or if there is none the next one. May be called from any thread, which has put down before
    /// what the core is to find.
    pub fn notify(&self, core: CoreId) {
        let core = usize::from(core);
        if !self.notified[core].swap(true, Ordering::AcqRel) {
            self.bells[core].ring();
        }
    }

    /// Asks all cores to stop gracefully. May be called from any thread, more than once.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for bell in &self.bells {
            bell.ring();
        }
    }
}

/// What one core is made from. It is moved to the core's thread and becomes a [`GlommioEnv`] there.
pub struct CoreParts {
    /// Which core.
    pub core: CoreId,
    /// Its socket, one of a [`crate::net::port::Port`].
    pub socket: UdpSocket,
    /// Its end of the mesh.
    pub mesh: MeshEnd<MeshMessage>,
    /// What it shares with the others.
    pub shared: Arc<Shared>,
    /// Its own directory.
    pub directory: PathBuf,
}

/// One core's world. A handle: clones are the same core.
#[derive(Clone)]
pub struct GlommioEnv {
    core: Rc<Core>,
}

struct Core {
    id: CoreId,
    socket: CoreSocket,
    mesh: MeshEnd<MeshMessage>,
    shared: Arc<Shared>,
    disk: RingDisk,
    ring: Ring,
    timers: Rc<Timers>,
    runnable: Runnable,
    /// Spawned tasks that have not ended.
    under_way: Cell<usize>,
    /// Whether the request to stop was reported; before that it ends every park.
    stop_seen: Cell<bool>,
    /// A task of this core asked for the end of a park.
    woken: Cell<bool>,
    /// Arrivals since the last park.
    arrivals: Cell<usize>,
    spin: RefCell<Spin>,
}

impl GlommioEnv {
    /// Makes the environment of a core. Must be called on the executor that will use it.
    pub fn new(parts: CoreParts) -> io::Result<Self> {
        let socket = CoreSocket::new(parts.socket)?;
        let ring = Ring::new()?;
        Ok(Self {
            core: Rc::new(Core {
                id: parts.core,
                socket,
                mesh: parts.mesh,
                shared: parts.shared,
                disk: RingDisk::new(ring.clone(), parts.directory)?,
                ring,
                timers: Rc::default(),
                runnable: Runnable::default(),
                under_way: Cell::new(0),
                stop_seen: Cell::new(false),
                woken: Cell::new(false),
                arrivals: Cell::new(0),
                spin: RefCell::new(Spin::default()),
            }),
        })
    }

    /// Runs a future of this core's to its end. Everything that can wait in this environment is run inside this.
    ///
    /// # Panics
    /// If the future does.
    pub async fn drive<F: Future>(&self, future: F) -> F::Output {
        let core = &*self.core;
        let mut output = None;
        let mut task = core.runnable.track(async { output = Some(future.await) });
        let mut polled = async || {
            let mut task = Pin::new(&mut task);
            poll_fn(|context| Poll::Ready(task.as_mut().poll(context).is_ready())).await
        };
        while !polled().await {
            let behind = core.advance();
            if core.runnable.any() {
                pass().await;
            } else {
                core.sleep_without_socket(behind);
            }
        }
        drop(task);
        output.expect("invariant: a task that has ended has its output")
    }

    /// Whether the kernel may fragment what is sent, in which case a path's MTU cannot be probed.
    pub fn may_fragment(&self) -> bool {
        self.core.socket.may_fragment()
    }
}

/// Counts one task for as long as it lives.
struct UnderWay(Rc<Core>);

impl UnderWay {
    fn new(core: &Rc<Core>) -> Self {
        core.under_way.set(core.under_way.get() + 1);
        Self(Rc::clone(core))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.set(self.0.under_way.get() - 1);
    }
}

impl Env for GlommioEnv {
    type Disk = RingDisk;

    fn disk(&self) -> RingDisk {
        self.core.disk.clone()
    }

    fn core(&self) -> CoreId {
        self.core.id
    }

    fn cores(&self) -> CoreId {
        self.core.shared.bells.len() as CoreId
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn unix_ms(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64)
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        getrandom::fill(bytes)
            .expect("the kernel's random generator, which has no way to fail once the machine has booted");
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let under_way = UnderWay::new(&self.core);
        let task = self.core.runnable.track(async move {
            task.await;
            drop(under_way);
        });
        // Into a queue by name: otherwise glommio would poll it within this call.
        let spawned = glommio::spawn_local_into(task, TaskQueueHandle::default());
        spawned.expect("invariant: an executor has its default queue").detach();
    }

    async fn sleep_until(&self, deadline: Instant) {
        self.core.timers.sleep(deadline).await;
    }

    async fn yield_now(&self) {
        let core = &*self.core;
        if core.under_way.get() > 0 {
            core.advance();
            pass().await;
        }
    }

    fn receive(&self, limit: usize, datagrams: &mut Vec<Datagram>) -> usize {
        self.core.arrived(self.core.socket.receive(limit, datagrams))
    }

    fn transmit(&self, transmit: &Transmit, payload: &[u8]) -> bool {
        self.core.socket.transmit(transmit, payload)
    }

    fn mesh_send(&self, to: CoreId, message: MeshMessage) -> Result<(), MeshMessage> {
        self.core.mesh.send(to, message)?;
        self.core.shared.bells[usize::from(to)].ring();
        Ok(())
    }

    fn mesh_receive(&self, limit: usize, messages: &mut Vec<(CoreId, MeshMessage)>) -> usize {
        self.core.arrived(self.core.mesh.receive(limit, messages))
    }

    async fn park(&self, deadline: Option<Instant>) {
        let core = &*self.core;
        let arrivals = core.arrivals.take();
        let before = Instant::now();
        for _ in 0..ROUNDS {
            let behind = core.advance();
            if core.woken.take() || core.has_work() {
                core.take_notice();
                // Work without end must not keep the core's tasks from theirs.
                self.yield_now().await;
                return;
            }
            if core.runnable.any() {
                pass().await;
                continue;
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| deadline <= now) {
                return;
            }
            if core.under_way.get() == 0 && core.spin(before, deadline) {
                core.take_notice();
                core.spin.borrow_mut().record(before.elapsed(), arrivals);
                return;
            }
            let bell = &core.shared.bells[usize::from(core.id)];
            bell.before_sleep();
            if core.has_work() {
                bell.after_sleep(false);
                core.take_notice();
                return;
            }
            let offer = behind.then(|| now + OFFER_AGAIN);
            let until = [deadline, core.timers.first(), offer].into_iter().flatten().min();
            let (arrived, rung) = core.sleep(until);
            bell.after_sleep(rung);
            if arrived {
                core.take_notice();
                core.spin.borrow_mut().record(before.elapsed(), arrivals);
                return;
            }
        }
    }

    fn wake(&self) {
        // Only tasks of this core call this, and none of them runs while the thread is blocked.
        self.core.woken.set(true);
    }

    fn stopping(&self) -> bool {
        let stopping = self.core.shared.stopping.load(Ordering::Acquire);
        if stopping {
            self.core.stop_seen.set(true);
        }
        stopping
    }
}

impl Core {
    fn arrived(&self, count: usize) -> usize {
        self.arrivals.set(self.arrivals.get() + count);
        count
    }

    /// Wakes the tasks that what they wait for has come to. `true`: the kernel is to be offered operations again soon.
    fn advance(&self) -> bool {
        if let Some(first) = self.timers.first() {
            let now = Instant::now();
            if first <= now {
                self.timers.fire(now);
            }
        }
        self.ring.advance()
    }

    /// Whether there is anything to do that needs no look at the socket.
    fn has_work(&self) -> bool {
        self.mesh.has_ready()
            || self.socket.has_ready()
            || self.shared.notified[usize::from(self.id)].load(Ordering::Relaxed)
            || (!self.stop_seen.get() && self.shared.stopping.load(Ordering::Acquire))
    }

    /// What was to be seen is seen by the turn that follows.
    fn take_notice(&self) {
        let notified = &self.shared.notified[usize::from(self.id)];
        if notified.load(Ordering::Relaxed) {
            notified.swap(false, Ordering::AcqRel);
        }
    }

    /// Spins for a while if that pays; whether something arrived.
    fn spin(&self, start: Instant, deadline: Option<Instant>) -> bool {
        let mut spin = self.spin.borrow_mut();
        let mut end = start + spin.budget(start);
        if let Some(deadline) = deadline {
            end = end.min(deadline);
        }
        let mut before = start;
        while before < end {
            if self.socket.fill_ready() || self.has_work() {
                return true;
            }
            std::hint::spin_loop();
            let after = Instant::now();
            if !spin.step(before, after) {
                break;
            }
            before = after;
        }
        false
    }

    /// Blocks the thread until an operation of the ring completes or the first timer is due.
    fn sleep_without_socket(&self, behind: bool) {
        let now = Instant::now();
        let offer = behind.then(|| now + OFFER_AGAIN);
        let until = self.timers.first().into_iter().chain(offer).min();
        let timeout = until.map(|until| timespec(until.saturating_duration_since(now)));
        // An error (a signal came) is an early return.
        let _ = poll(&mut [self.ring.poll_fd()], timeout.as_ref());
    }

    /// Blocks the thread until the socket is readable (or writable, if that is waited for), the bell rings, an operation of the ring
    /// completes or the deadline comes. Says whether it was one of the first two, and whether it was the bell.
    fn sleep(&self, deadline: Option<Instant>) -> (bool, bool) {
        let bell = &self.shared.bells[usize::from(self.id)];
        let mut interest = PollFlags::IN;
        if self.socket.send_blocked() {
            interest |= PollFlags::OUT;
        }
        let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        let mut descriptors = [
            PollFd::from_borrowed_fd(self.socket.descriptor(), interest),
            PollFd::from_borrowed_fd(bell.descriptor(), PollFlags::IN),
            self.ring.poll_fd(),
        ];
        // An error (a signal came) is an early return.
        let _ = poll(&mut descriptors, timeout.as_ref());
        let ready = |index: usize| !descriptors[index].revents().is_empty();
        (ready(0) || ready(1), ready(1))
    }
}

/// Lets the other tasks of the core that can run do so once.
async fn pass() {
    let mut passed = false;
    poll_fn(|context| {
        if std::mem::replace(&mut passed, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
