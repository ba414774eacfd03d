//! openraft's runtime over [`Env`](crate::env::Env): tasks, timers and randomness of the core, channels of `Rc`s.
//!
//! openraft calls its runtime through functions without an argument, so they need to know on whose behalf they are called: the
//! *current* environment ([`Ambient`]). Every task that can reach openraft is polled and dropped inside [`within`], and what such a
//! task spawns inherits it. So in the simulator, where all nodes share a thread, each has its own clock and its own chance, and
//! neither executor needs to know about this.
//!
//! Invariants:
//! - Nothing here crosses threads, and nothing here wakes in an order that is not the order of asking: a seed replays.
//! - A panic in a task is a defect; it is not caught here, it ends the core.
//!
//! Not here: an executor. A conformance suite that wants to block on a future says on what with [`with_driver`].

mod ambient;
mod instant;
mod join;
mod mpsc;
mod mutex;
mod oneshot;
#[cfg(test)]
mod tests;
mod timeout;
mod watch;

pub use ambient::{Ambient, Driver, Within, ambient, current, pass, with_driver, within};
pub use instant::CoreInstant;
pub use join::{JoinHandle, TaskLost};
pub use mpsc::{LocalMpsc, MpscReceiver, MpscSender, MpscWeakSender};
pub use mutex::{LocalMutex, MutexGuard};
pub use oneshot::{LocalOneshot, OneshotReceiver, OneshotSender, SenderLost};
pub use timeout::{Elapsed, Sleep, Timeout};
pub use watch::{LocalWatch, WatchReceiver, WatchSender};

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use openraft_rt::{AsyncRuntime, OptionalSend};

/// The runtime. It has no state: what it acts on is the current environment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Runtime;

impl AsyncRuntime for Runtime {
    type JoinError = TaskLost;
    type JoinHandle<T: OptionalSend + 'static> = JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = CoreInstant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = Timeout<T>;
    type ThreadLocalRng = Chance;
    type Mpsc = LocalMpsc;
    type Watch = LocalWatch;
    type Oneshot = LocalOneshot;
    type Mutex<T: OptionalSend + 'static> = LocalMutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        let ambient = ambient::current();
        let (task, handle) = join::task(future);
        ambient.spawn(Box::pin(within(ambient.clone(), task)));
        handle
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        Sleep::until(ambient::current().now() + duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        Sleep::until(deadline.get())
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        Timeout::new(Self::sleep(duration), future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Self::Instant, future: F) -> Self::Timeout<R, F> {
        Timeout::new(Self::sleep_until(deadline), future)
    }

    fn is_panic(_: &Self::JoinError) -> bool {
        false
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        Chance
    }

    fn new(_threads: usize) -> Self {
        Self
    }

    /// # Panics
    /// Outside [`with_driver`]: a node never blocks on a future.
    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        let mut output = None;
        ambient::drive(pin!(async { output = Some(future.await) }));
        output.expect("a driver runs its future to the end")
    }
}

/// Lets whatever else is runnable have a turn.
pub(crate) async fn yield_now() {
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

/// Random numbers of the current environment.
#[derive(Debug, Clone, Copy)]
pub struct Chance;

impl rand::TryRng for Chance {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let mut bytes = [0; 4];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let mut bytes = [0; 8];
        self.try_fill_bytes(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        ambient::current().fill_random(bytes);
        Ok(())
    }
}
