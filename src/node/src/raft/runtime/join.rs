//! Waiting for a task's result.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// A task ended without a result: its executor went away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the task was dropped before it had ended")]
pub struct TaskLost;

#[derive(Debug)]
struct Slot<T> {
    /// `None` while it runs, or once the result was taken.
    result: Option<Result<T, TaskLost>>,
    waker: Option<Waker>,
}

/// Gives a task's result. Dropping it does not end the task.
#[derive(Debug)]
pub struct JoinHandle<T>(Rc<RefCell<Slot<T>>>);

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, TaskLost>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self.0.borrow_mut();
        if let Some(result) = slot.result.take() {
            return Poll::Ready(result);
        }
        slot.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

/// Fills the slot, at the latest when it is dropped.
struct Finish<T>(Rc<RefCell<Slot<T>>>, bool);

impl<T> Finish<T> {
    fn fill(&mut self, result: Result<T, TaskLost>) {
        self.1 = true;
        let mut slot = self.0.borrow_mut();
        slot.result = Some(result);
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
    }
}

impl<T> Drop for Finish<T> {
    fn drop(&mut self) {
        if !self.1 {
            self.fill(Err(TaskLost));
        }
    }
}

/// A task to be spawned, and the handle to its result.
pub(super) fn task<F: Future>(future: F) -> (impl Future<Output = ()>, JoinHandle<F::Output>) {
    let slot = Rc::new(RefCell::new(Slot {
        result: None,
        waker: None,
    }));
    let mut finish = Finish(Rc::clone(&slot), false);
    let task = async move {
        let output = future.await;
        finish.fill(Ok(output));
    };
    (task, JoinHandle(slot))
}
