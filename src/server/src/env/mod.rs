//! [`GlommioEnv`]: one core's world, over glommio and one UDP socket.
//!
//! # How a core waits
//! The data plane polls its socket and its mesh rings at each turn, so glommio is not asked about either while the core is busy.
//! When there is nothing to do, [`Env::park`] first spins if that pays ([`spin`]), then sleeps, in one of two ways:
//!
//! - *Nothing else is under way on this core* (no spawned task, no sleeper): one `ppoll` on the socket and the core's bell, which
//!   blocks the thread inside the task. Nothing can become runnable that this would hold up, because whatever a task can wait for
//!   comes through this `Env`, which counts it. It costs two system calls where a round through the reactor's three rings costs ten.
//! - *Otherwise*: through glommio's reactor, with the same two descriptors behind one epoll descriptor, so that tasks, timers and
//!   file completions go on.
//!
//! # A defect of glommio, avoided here
//! Its `run_task_queues` reports "nothing ran" when the preemption timer fires before the first queue has run, and the executor
//! then sleeps, although a task is runnable, until anything else completes. So that timer never fires
//! ([`crate::executors`]); and since it is also what makes a busy executor look at timers and file completions, [`Env::yield_now`]
//! sends the core through the reactor every [`REACTOR_INTERVAL`] by way of an operation that completes at once. As a second line, a
//! timer of [`WATCHDOG`] is armed while the reactor sleeps with tasks under way.

mod disk;
mod mesh;
mod spin;
mod wake;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use generation_node::env::{CoreId, Datagram, Env, Transmit};
use generation_node::mesh::MeshMessage;
use glommio::io::PollableFd;
use glommio::timer::Timer;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

pub use disk::{GlommioDisk, GlommioFile};
pub use mesh::{MeshEnd, mesh};
pub use wake::Bell;

use crate::net::port::CoreSocket;
use spin::Spin;

/// Messages each ring of the mesh holds. With requests of a few kilobytes a full ring is some megabytes.
pub const MESH_CAPACITY: usize = 1024;
/// Longest sleep in the reactor while tasks are under way; see the module's documentation.
const WATCHDOG: Duration = Duration::from_millis(100);
/// Longest time a busy core with tasks under way goes without a look at timers and completions.
const REACTOR_INTERVAL: Duration = Duration::from_micros(500);
/// How long to wait in the reactor for room in the send buffer, which drains in microseconds.
const SEND_RETRY: Duration = Duration::from_millis(1);

/// What the cores of a node share: the request to stop, and everybody's bell.
#[derive(Debug)]
pub struct Shared {
    stopping: AtomicBool,
    bells: Vec<Bell>,
}

impl Shared {
    /// For a node of `cores` cores.
    pub fn new(cores: CoreId) -> io::Result<Arc<Self>> {
        let bells = (0..cores).map(|_| Bell::new()).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self {
            stopping: AtomicBool::new(false),
            bells,
        }))
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
    disk: GlommioDisk,
    /// Spawned tasks and sleepers that have not ended: as long as there are any, the reactor must run.
    under_way: Cell<usize>,
    /// Whether the request to stop was reported; before that it ends every park.
    stop_seen: Cell<bool>,
    /// A task of this core asked for the end of a park, and who is to be told if one is under way.
    woken: Cell<bool>,
    parked: RefCell<Option<Waker>>,
    /// Arrivals since the last park.
    arrivals: Cell<usize>,
    spin: RefCell<Spin>,
    /// When the reactor was last visited.
    visited: Cell<Instant>,
    /// A descriptor that is always readable: waiting for that takes one round through the reactor.
    ready: PollableFd<OwnedFd>,
    /// Socket and bell behind one descriptor, for the reactor.
    both: PollableFd<OwnedFd>,
}

/// How a sleep ended.
enum Awoke {
    Arrival,
    Otherwise,
}

impl GlommioEnv {
    /// Makes the environment of a core. Must be called on the executor that will use it.
    pub fn new(parts: CoreParts) -> io::Result<Self> {
        let socket = CoreSocket::new(parts.socket)?;
        let bell = &parts.shared.bells[usize::from(parts.core)];
        let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for descriptor in [socket.descriptor(), bell.descriptor()] {
            let data = epoll::EventData::new_u64(0);
            epoll::add(&both, descriptor, data, epoll::EventFlags::IN)?;
        }
        let both = PollableFd::new(both).map_err(io::Error::other)?;
        let ready = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ready = PollableFd::new(ready).map_err(io::Error::other)?;
        Ok(Self {
            core: Rc::new(Core {
                id: parts.core,
                socket,
                mesh: parts.mesh,
                shared: parts.shared,
                disk: GlommioDisk::new(parts.directory)?,
                under_way: Cell::new(0),
                stop_seen: Cell::new(false),
                woken: Cell::new(false),
                parked: RefCell::new(None),
                arrivals: Cell::new(0),
                spin: RefCell::new(Spin::default()),
                visited: Cell::new(Instant::now()),
                ready,
                both,
            }),
        })
    }

    /// Whether the kernel may fragment what is sent, in which case a path's MTU cannot be probed.
    pub fn may_fragment(&self) -> bool {
        self.core.socket.may_fragment()
    }
}

/// Counts one task or sleeper for as long as it lives.
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
    type Disk = GlommioDisk;

    fn disk(&self) -> GlommioDisk {
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
        glommio::spawn_local(async move {
            task.await;
            drop(under_way);
        })
        .detach();
    }

    async fn sleep_until(&self, deadline: Instant) {
        let _under_way = UnderWay::new(&self.core);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            Timer::new(left).await;
        }
    }

    async fn yield_now(&self) {
        let core = &*self.core;
        if core.under_way.get() == 0 {
            return;
        }
        if core.visited.get().elapsed() >= REACTOR_INTERVAL {
            // It can only fail with the ring, and then the next wait does too.
            let _ = core.ready.readable().await;
            core.visited.set(Instant::now());
        } else {
            let mut yielded = false;
            poll_fn(|context| {
                if std::mem::replace(&mut yielded, true) {
                    return Poll::Ready(());
                }
                context.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
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
        if core.woken.take() || core.has_work() {
            // Work without end must not keep the core's tasks from theirs.
            self.yield_now().await;
            return;
        }
        let before = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= before) {
            return;
        }
        if core.under_way.get() == 0 && core.spin(before, deadline) {
            core.spin.borrow_mut().record(before.elapsed(), arrivals);
            return;
        }
        let bell = &core.shared.bells[usize::from(core.id)];
        bell.before_sleep();
        if core.has_work() {
            bell.after_sleep(false);
            return;
        }
        let (awoke, rung) = if core.under_way.get() == 0 {
            core.sleep_in_poll(deadline)
        } else {
            core.sleep_in_reactor(deadline).await
        };
        bell.after_sleep(rung);
        if matches!(awoke, Awoke::Arrival) {
            core.spin.borrow_mut().record(before.elapsed(), arrivals);
        }
    }

    fn wake(&self) {
        // Only tasks of this core call this, so no park is under way but in the reactor.
        self.core.woken.set(true);
        if let Some(waker) = self.core.parked.borrow_mut().take() {
            waker.wake();
        }
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

    /// Whether there is anything to do that needs no look at the socket.
    fn has_work(&self) -> bool {
        self.mesh.has_ready()
            || self.socket.has_ready()
            || (!self.stop_seen.get() && self.shared.stopping.load(Ordering::Acquire))
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

    /// Blocks the thread until the socket is readable (or writable, if that is waited for), the bell rings or the deadline comes.
    fn sleep_in_poll(&self, deadline: Option<Instant>) -> (Awoke, bool) {
        let bell = &self.shared.bells[usize::from(self.id)];
        let mut interest = PollFlags::IN;
        if self.socket.send_blocked() {
            interest |= PollFlags::OUT;
        }
        let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(Instant::now())));
        let socket = self.socket.descriptor();
        let bell = bell.descriptor();
        let mut descriptors = [
            PollFd::from_borrowed_fd(socket, interest),
            PollFd::from_borrowed_fd(bell, PollFlags::IN),
        ];
        // An error (a signal came) is an early return.
        let ready = poll(&mut descriptors, timeout.as_ref()).unwrap_or(0);
        let rung = !descriptors[1].revents().is_empty();
        (if ready > 0 { Awoke::Arrival } else { Awoke::Otherwise }, rung)
    }

    /// Waits for the same in glommio's reactor, so that this core's tasks go on meanwhile.
    async fn sleep_in_reactor(&self, deadline: Option<Instant>) -> (Awoke, bool) {
        let mut limit = WATCHDOG;
        if self.socket.send_blocked() {
            limit = SEND_RETRY;
        }
        if let Some(deadline) = deadline {
            limit = limit.min(deadline.saturating_duration_since(Instant::now()));
        }
        let mut timer = pin!(Timer::new(limit));
        let mut readable = pin!(self.both.readable());
        let awoke = poll_fn(|context| {
            if self.woken.take() {
                return Poll::Ready(Awoke::Otherwise);
            }
            *self.parked.borrow_mut() = Some(context.waker().clone());
            // A failed poll is an early return too: the turn that follows looks at the socket itself.
            if readable.as_mut().poll(context).is_ready() {
                return Poll::Ready(Awoke::Arrival);
            }
            timer.as_mut().poll(context).map(|_| Awoke::Otherwise)
        })
        .await;
        *self.parked.borrow_mut() = None;
        self.visited.set(Instant::now());
        // Which of the two it was costs a system call to know; reading a bell nobody rang costs the same.
        let rung = matches!(awoke, Awoke::Arrival);
        (awoke, rung)
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
