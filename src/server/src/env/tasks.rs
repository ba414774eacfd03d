//! How a core knows whether a task of it can run: before it blocks its thread, nobody may be left who could.
//!
//! glommio does not say. So each task is wrapped ([`Tracked`]): it counts as runnable from the moment it is woken to the moment it is
//! polled.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Tasks of a core that have been woken and not polled since.
#[derive(Debug, Clone, Default)]
pub(super) struct Runnable(Arc<AtomicUsize>);

impl Runnable {
    /// Whether there are any.
    pub(super) fn any(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }

    /// Wraps a task, which counts at once.
    pub(super) fn track<F: Future<Output = ()>>(&self, task: F) -> Tracked<F> {
        let tracker = Arc::new(Tracker {
            runnable: Arc::clone(&self.0),
            state: AtomicU8::new(WAITING),
            inner: AtomicWaker::new(),
        });
        tracker.wake_by_ref();
        Tracked {
            waker: Waker::from(Arc::clone(&tracker)),
            tracker,
            task: Box::pin(task),
        }
    }
}

/// It waits for a wake.
const WAITING: u8 = 0;
/// It was woken, and counts.
const WOKEN: u8 = 1;
/// It will not run any more.
const ENDED: u8 = 2;

struct Tracker {
    runnable: Arc<AtomicUsize>,
    state: AtomicU8,
    /// Who is to be told: glommio, once the task was polled.
    inner: AtomicWaker,
}

impl Tracker {
    /// It is about to run, or will never: it counts no more.
    fn settle(&self, state: u8) {
        if self.state.swap(state, Ordering::AcqRel) == WOKEN {
            self.runnable.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Wake for Tracker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let order = (Ordering::AcqRel, Ordering::Relaxed);
        let woken = self.state.compare_exchange(WAITING, WOKEN, order.0, order.1);
        if woken.is_ok() {
            self.runnable.fetch_add(1, Ordering::AcqRel);
            self.inner.wake();
        }
    }
}

/// A task that is counted while it can run.
pub(super) struct Tracked<F> {
    tracker: Arc<Tracker>,
    waker: Waker,
    task: Pin<Box<F>>,
}

impl<F: Future<Output = ()>> Future for Tracked<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        self.tracker.inner.register(context.waker());
        self.tracker.settle(WAITING);
        let this = &mut *self;
        this.task.as_mut().poll(&mut Context::from_waker(&this.waker))
    }
}

impl<F> Drop for Tracked<F> {
    fn drop(&mut self) {
        self.tracker.settle(ENDED);
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn};

    use super::*;

    #[test]
    fn a_task_counts_from_its_wake_to_its_poll() {
        let runnable = Runnable::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut stored = None;
        let mut task = Box::pin(runnable.track(async {
            poll_fn(|context| {
                let first = stored.is_none();
                stored = Some(context.waker().clone());
                if first { Poll::Pending } else { Poll::Ready(()) }
            })
            .await;
        }));
        assert!(runnable.any());
        assert!(task.as_mut().poll(&mut context).is_pending());
        assert!(!runnable.any());
        // Woken twice it counts once.
        task.waker.wake_by_ref();
        task.waker.wake_by_ref();
        assert!(runnable.any());
        assert!(task.as_mut().poll(&mut context).is_ready());
        assert!(!runnable.any());
        drop(task);
        assert!(!runnable.any());
    }

    #[test]
    fn a_task_that_is_dropped_counts_no_more() {
        let runnable = Runnable::default();
        let task = runnable.track(pending());
        assert!(runnable.any());
        let waker = task.waker.clone();
        drop(task);
        assert!(!runnable.any());
        // Whoever kept the waker may still use it; nobody runs for it.
        waker.wake();
        assert!(!runnable.any());
    }
}
