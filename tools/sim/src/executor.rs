//! The tasks of all nodes, polled one at a time in an order that follows from the seed.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use crate::dice::Dice;

/// A task.
pub(crate) type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What a task unwinds with when its node dies under it. Not an error: no panic hook runs.
pub(crate) struct Crashed;

/// Tasks that are ready, in the order they became so.
type Ready = Arc<Mutex<VecDeque<Arc<Flag>>>>;

/// One task's waker.
struct Flag {
    slot: usize,
    queued: AtomicBool,
    ready: Ready,
}

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            let ready = Arc::clone(&self.ready);
            ready
                .lock()
                .expect("invariant: nothing panics with the lock")
                .push_back(self);
        }
    }
}

struct Entry {
    node: usize,
    flag: Arc<Flag>,
    task: Task,
}

/// All tasks.
#[derive(Default)]
pub(crate) struct Executor {
    slots: Vec<Option<Entry>>,
    free: Vec<usize>,
    ready: Ready,
    /// Ready tasks of frozen nodes, by node.
    frozen: BTreeMap<usize, Vec<Arc<Flag>>>,
    /// Takes ready tasks in random order, if there is one, instead of their own.
    pub(crate) shuffle: Option<Dice>,
}

impl Executor {
    /// Adds a task of a node. It is ready.
    pub(crate) fn spawn(&mut self, node: usize, task: Task) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let flag = Arc::new(Flag {
            slot,
            queued: AtomicBool::new(false),
            ready: Arc::clone(&self.ready),
        });
        Arc::clone(&flag).wake();
        self.slots[slot] = Some(Entry { node, flag, task });
    }

    /// Takes the next ready task that is not frozen, and says whose it is.
    fn next(&mut self) -> Option<(usize, usize)> {
        loop {
            let flag = {
                let mut ready = self.ready.lock().expect("invariant: nothing panics with the lock");
                if let Some(dice) = &mut self.shuffle
                    && ready.len() > 1
                {
                    let other = dice.below(ready.len() as u64) as usize;
                    ready.swap(0, other);
                }
                ready.pop_front()?
            };
            // A waker may outlive its task, and the slot may have another by now.
            let Some(entry) = self.slots[flag.slot]
                .as_ref()
                .filter(|entry| Arc::ptr_eq(&entry.flag, &flag))
            else {
                continue;
            };
            let (slot, node) = (flag.slot, entry.node);
            if let Some(frozen) = self.frozen.get_mut(&node) {
                frozen.push(flag);
                continue;
            }
            flag.queued.store(false, Ordering::Relaxed);
            return Some((slot, node));
        }
    }

    /// Polls the next ready task, if there is one. `Err`: its node died under it; the caller buries the node.
    pub(crate) fn poll_one(&mut self) -> Result<bool, usize> {
        let Some((slot, node)) = self.next() else {
            return Ok(false);
        };
        let entry = self.slots[slot].as_mut().expect("invariant: a ready task is there");
        let waker = Waker::from(Arc::clone(&entry.flag));
        let mut context = Context::from_waker(&waker);
        match catch_unwind(AssertUnwindSafe(|| entry.task.as_mut().poll(&mut context))) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(())) => self.remove(slot),
            Err(cause) if cause.is::<Crashed>() => return Err(node),
            Err(cause) => resume_unwind(cause),
        }
        Ok(true)
    }

    /// Drops every task of a node.
    pub(crate) fn kill(&mut self, node: usize) {
        self.frozen.remove(&node);
        for slot in 0..self.slots.len() {
            if self.slots[slot].as_ref().is_some_and(|entry| entry.node == node) {
                self.remove(slot);
            }
        }
    }

    /// Polls no task of a node until [`Executor::thaw`].
    pub(crate) fn freeze(&mut self, node: usize) {
        self.frozen.entry(node).or_default();
    }

    /// Lets a node's tasks go on.
    pub(crate) fn thaw(&mut self, node: usize) {
        let stalled = self.frozen.remove(&node).unwrap_or_default();
        let mut ready = self.ready.lock().expect("invariant: nothing panics with the lock");
        ready.extend(stalled);
    }

    fn remove(&mut self, slot: usize) {
        // Freed before the task is dropped: what it drops may wake others, none of which is this one.
        let entry = self.slots[slot].take();
        self.free.push(slot);
        drop(entry);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    type Log = Rc<RefCell<Vec<u32>>>;

    /// A task that notes its number and yields, `times` times.
    fn noting(log: &Log, number: u32, times: u32) -> Task {
        let (log, mut left) = (Rc::clone(log), times);
        Box::pin(std::future::poll_fn(move |context| {
            log.borrow_mut().push(number);
            left -= 1;
            if left == 0 {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        }))
    }

    fn run(executor: &mut Executor) {
        while executor.poll_one() == Ok(true) {}
    }

    #[test]
    fn tasks_take_turns_and_a_seed_shuffles_them() {
        let order = |seed: Option<u64>| {
            let log = Log::default();
            let mut executor = Executor {
                shuffle: seed.map(Dice::new),
                ..Executor::default()
            };
            for number in 0..4 {
                executor.spawn(0, noting(&log, number, 3));
            }
            run(&mut executor);
            log.take()
        };
        assert_eq!(order(None), [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]);
        assert_eq!(order(Some(5)), order(Some(5)));
        assert_ne!(order(Some(5)), order(Some(6)));
    }

    #[test]
    fn frozen_tasks_wait_and_killed_ones_are_gone() {
        let log = Log::default();
        let mut executor = Executor::default();
        executor.spawn(0, noting(&log, 0, 2));
        executor.spawn(1, noting(&log, 1, 2));
        executor.spawn(2, noting(&log, 2, 2));
        executor.freeze(1);
        executor.kill(2);
        run(&mut executor);
        assert_eq!(log.take(), [0, 0]);
        executor.thaw(1);
        run(&mut executor);
        assert_eq!(log.take(), [1, 1]);
    }

    #[test]
    fn a_crash_names_the_node_and_a_panic_goes_on() {
        let mut executor = Executor::default();
        executor.spawn(3, Box::pin(async { resume_unwind(Box::new(Crashed)) }));
        assert_eq!(executor.poll_one(), Err(3));
        executor.kill(3);
        executor.spawn(4, Box::pin(async { resume_unwind(Box::new("a bug")) }));
        let caught = catch_unwind(AssertUnwindSafe(|| executor.poll_one()));
        assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "a bug");
    }
}
