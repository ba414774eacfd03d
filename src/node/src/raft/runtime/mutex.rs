//! A lock that is waited for. On one thread it only orders tasks across their waits.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::task::{Poll, Waker};

/// [`openraft_rt::Mutex`] of one thread.
#[derive(Debug)]
pub struct LocalMutex<T> {
    value: RefCell<T>,
    waiting: RefCell<VecDeque<Waker>>,
}

/// Holds the lock while it lives.
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    /// `None` only while it is dropped.
    value: Option<RefMut<'a, T>>,
    waiting: &'a RefCell<VecDeque<Waker>>,
}

impl<T: 'static> openraft_rt::Mutex<T> for LocalMutex<T> {
    type Guard<'a> = MutexGuard<'a, T>;

    fn new(value: T) -> Self {
        Self {
            value: RefCell::new(value),
            waiting: RefCell::default(),
        }
    }

    fn lock(&self) -> impl Future<Output = Self::Guard<'_>> {
        std::future::poll_fn(|context| {
            if let Ok(value) = self.value.try_borrow_mut() {
                return Poll::Ready(MutexGuard {
                    value: Some(value),
                    waiting: &self.waiting,
                });
            }
            self.waiting.borrow_mut().push_back(context.waker().clone());
            Poll::Pending
        })
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("invariant: a guard holds its lock")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("invariant: a guard holds its lock")
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.value = None;
        // All of them: one that has given up would swallow the only call.
        for waker in self.waiting.take() {
            waker.wake();
        }
    }
}
