//! Which environment the code that runs now belongs to.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use crate::env::Env;

/// What openraft needs of an [`Env`], without its type.
pub trait Ambient {
    /// As [`Env::now`].
    fn now(&self) -> Instant;

    /// A moment of this core's past that does not change.
    fn origin(&self) -> Instant;

    /// As [`Env::fill_random`].
    fn fill_random(&self, bytes: &mut [u8]);

    /// As [`Env::spawn`].
    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>);

    /// As [`Env::sleep_until`].
    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Future<Output = ()>>>;

    /// As [`Env::point`].
    fn point(&self, _point: &'static str) {}
}

struct Of<E> {
    env: E,
    origin: Instant,
}

impl<E: Env + Clone> Ambient for Of<E> {
    fn now(&self) -> Instant {
        self.env.now()
    }

    fn origin(&self) -> Instant {
        self.origin
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        self.env.fill_random(bytes);
    }

    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>) {
        self.env.spawn(task);
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Future<Output = ()>>> {
        let env = self.env.clone();
        Box::pin(async move { env.sleep_until(deadline).await })
    }

    fn point(&self, point: &'static str) {
        self.env.point(point);
    }
}

/// An environment as openraft sees it.
pub fn ambient<E: Env + Clone>(env: E) -> Rc<dyn Ambient> {
    let origin = env.now();
    Rc::new(Of { env, origin })
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<dyn Ambient>>> = const { RefCell::new(None) };
    static DRIVER: RefCell<Option<Rc<dyn Driver>>> = const { RefCell::new(None) };
}

/// The environment of the task that runs.
///
/// # Panics
/// Outside [`within`].
pub fn current() -> Rc<dyn Ambient> {
    let current = CURRENT.with_borrow(Clone::clone);
    current.expect("invariant: what reaches openraft runs within an environment")
}

/// Passes a point of the environment of the task that runs, if it has one. For disks that have something happen there.
pub fn pass(point: &'static str) {
    if let Some(current) = CURRENT.with_borrow(Clone::clone) {
        current.point(point);
    }
}

/// Makes an environment current while it lives.
struct Entered {
    before: Option<Rc<dyn Ambient>>,
}

impl Entered {
    fn new(ambient: &Rc<dyn Ambient>) -> Self {
        let before = CURRENT.replace(Some(Rc::clone(ambient)));
        Self { before }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.before.take());
    }
}

/// A future that is polled and dropped with an environment current.
pub struct Within<F> {
    ambient: Rc<dyn Ambient>,
    /// `None` once it has ended.
    future: Option<Pin<Box<F>>>,
}

/// Runs `future` with an environment current.
pub fn within<F: Future>(ambient: Rc<dyn Ambient>, future: F) -> Within<F> {
    let future = Some(Box::pin(future));
    Within { ambient, future }
}

impl<F: Future> Future for Within<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Self { ambient, future } = &mut *self;
        let _entered = Entered::new(ambient);
        let running = future.as_mut().expect("a future is not polled after its end");
        let poll = running.as_mut().poll(context);
        if poll.is_ready() {
            *future = None;
        }
        poll
    }
}

impl<F> Drop for Within<F> {
    fn drop(&mut self) {
        let _entered = Entered::new(&self.ambient);
        self.future = None;
    }
}

impl<F> fmt::Debug for Within<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Within").finish_non_exhaustive()
    }
}

/// Runs futures to their end for those who block, which are conformance suites.
pub trait Driver {
    /// Runs `future` to its end, within an environment of the driver's.
    fn drive(&self, future: Pin<&mut dyn Future<Output = ()>>);
}

/// Runs `run` with a driver for whatever blocks in it on this thread.
pub fn with_driver<T>(driver: Rc<dyn Driver>, run: impl FnOnce() -> T) -> T {
    struct Restore(Option<Rc<dyn Driver>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            DRIVER.set(self.0.take());
        }
    }
    let _restore = Restore(DRIVER.replace(Some(driver)));
    run()
}

pub(super) fn drive(future: Pin<&mut dyn Future<Output = ()>>) {
    let driver = DRIVER.with_borrow(Clone::clone);
    driver
        .expect("a node never blocks on a future; a conformance suite brings a driver")
        .drive(future);
}
