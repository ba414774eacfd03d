//! The core's timers. The core looks at them between its turns and does not sleep past the first.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

/// The sleepers of a core, by deadline and, among equals, in the order of asking.
#[derive(Debug, Default)]
pub(super) struct Timers {
    waiting: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next: Cell<u64>,
}

impl Timers {
    /// When the first sleeper is to be woken.
    pub(super) fn first(&self) -> Option<Instant> {
        self.waiting
            .borrow()
            .first_key_value()
            .map(|((deadline, _), _)| *deadline)
    }

    /// Wakes whose deadline has come.
    pub(super) fn fire(&self, now: Instant) {
        loop {
            let mut waiting = self.waiting.borrow_mut();
            let Some(first) = waiting.first_entry().filter(|first| first.key().0 <= now) else {
                return;
            };
            let waker = first.remove();
            drop(waiting);
            waker.wake();
        }
    }

    /// Sleeps until `deadline`.
    pub(super) fn sleep(self: &Rc<Self>, deadline: Instant) -> Sleep {
        let number = self.next.replace(self.next.get() + 1);
        Sleep {
            timers: Rc::clone(self),
            key: (deadline, number),
        }
    }
}

/// The wait for a deadline.
#[derive(Debug)]
pub(super) struct Sleep {
    timers: Rc<Timers>,
    key: (Instant, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.key.0 <= Instant::now() {
            return Poll::Ready(());
        }
        self.timers
            .waiting
            .borrow_mut()
            .insert(self.key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let waker = self.timers.waiting.borrow_mut().remove(&self.key);
        drop(waker);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::time::Duration;

    use super::*;

    #[test]
    fn sleepers_are_woken_at_their_deadlines_and_forgotten_when_dropped() {
        let timers = Rc::new(Timers::default());
        let now = Instant::now();
        let mut context = Context::from_waker(Waker::noop());
        let mut past = pin!(timers.sleep(now));
        assert!(past.as_mut().poll(&mut context).is_ready());
        let deadline = now + Duration::from_hours(1);
        {
            let (mut one, mut two) = (pin!(timers.sleep(deadline)), pin!(timers.sleep(deadline)));
            assert!(one.as_mut().poll(&mut context).is_pending());
            assert!(two.as_mut().poll(&mut context).is_pending());
            assert_eq!(timers.first(), Some(deadline));
            timers.fire(now);
            assert_eq!(timers.waiting.borrow().len(), 2);
            timers.fire(deadline);
            assert_eq!(timers.first(), None);
            assert!(one.as_mut().poll(&mut context).is_pending());
            assert_eq!(timers.first(), Some(deadline));
        }
        assert_eq!(timers.first(), None);
    }
}
