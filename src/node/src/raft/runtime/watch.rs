//! A value that many look at, and are told of when it changes.

use std::cell::{Cell, Ref, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use openraft_rt::RecvError;
use openraft_rt::watch::SendError;

/// [`openraft_rt::Watch`] of one thread.
#[derive(Debug)]
pub struct LocalWatch;

#[derive(Debug)]
struct Channel<T> {
    value: RefCell<T>,
    version: Cell<u64>,
    senders: Cell<usize>,
    receivers: Cell<usize>,
    /// Receivers that wait, in the order in which they came. Woken in that order.
    waiting: RefCell<Vec<(u64, Waker)>>,
    next_receiver: Cell<u64>,
}

impl<T> Channel<T> {
    fn changed(&self) {
        self.version.set(self.version.get() + 1);
        self.wake();
    }

    fn wake(&self) {
        for (_, waker) in self.waiting.take() {
            waker.wake();
        }
    }

    fn receiver(self: &Rc<Self>, seen: u64) -> WatchReceiver<T> {
        let id = self.next_receiver.get();
        self.next_receiver.set(id + 1);
        self.receivers.set(self.receivers.get() + 1);
        WatchReceiver {
            channel: Rc::clone(self),
            id,
            seen,
        }
    }
}

/// A sending end.
#[derive(Debug)]
pub struct WatchSender<T>(Rc<Channel<T>>);

/// A receiving end.
#[derive(Debug)]
pub struct WatchReceiver<T> {
    channel: Rc<Channel<T>>,
    id: u64,
    seen: u64,
}

impl openraft_rt::Watch for LocalWatch {
    type Sender<T> = WatchSender<T>;
    type Receiver<T> = WatchReceiver<T>;
    type Ref<'a, T: 'a> = Ref<'a, T>;

    fn channel<T>(value: T) -> (Self::Sender<T>, Self::Receiver<T>) {
        let channel = Rc::new(Channel {
            value: RefCell::new(value),
            version: Cell::new(0),
            senders: Cell::new(1),
            receivers: Cell::new(0),
            waiting: RefCell::default(),
            next_receiver: Cell::new(0),
        });
        let receiver = channel.receiver(0);
        (WatchSender(channel), receiver)
    }
}

impl<T> openraft_rt::WatchSender<LocalWatch, T> for WatchSender<T> {
    fn send(&self, value: T) -> Result<(), SendError<T>> {
        if self.0.receivers.get() == 0 {
            return Err(SendError(value));
        }
        self.0.value.replace(value);
        self.0.changed();
        Ok(())
    }

    fn send_if_modified<F>(&self, modify: F) -> bool
    where
        F: FnOnce(&mut T) -> bool,
    {
        let modified = modify(&mut self.0.value.borrow_mut());
        if modified {
            self.0.changed();
        }
        modified
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.0.value.borrow()
    }

    fn subscribe(&self) -> WatchReceiver<T> {
        self.0.receiver(self.0.version.get())
    }
}

impl<T> openraft_rt::WatchReceiver<LocalWatch, T> for WatchReceiver<T> {
    async fn changed(&mut self) -> Result<(), RecvError> {
        poll_fn(|context| {
            let version = self.channel.version.get();
            if self.seen != version {
                self.seen = version;
                return Poll::Ready(Ok(()));
            }
            if self.channel.senders.get() == 0 {
                return Poll::Ready(Err(RecvError(())));
            }
            let mut waiting = self.channel.waiting.borrow_mut();
            let waker = context.waker().clone();
            match waiting.iter_mut().find(|(id, _)| *id == self.id) {
                Some((_, known)) => *known = waker,
                None => waiting.push((self.id, waker)),
            }
            Poll::Pending
        })
        .await
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.channel.value.borrow()
    }

    fn borrow_and_update(&mut self) -> Ref<'_, T> {
        self.seen = self.channel.version.get();
        self.channel.value.borrow()
    }
}

impl<T> Clone for WatchSender<T> {
    fn clone(&self) -> Self {
        self.0.senders.set(self.0.senders.get() + 1);
        Self(Rc::clone(&self.0))
    }
}

impl<T> Drop for WatchSender<T> {
    fn drop(&mut self) {
        self.0.senders.set(self.0.senders.get() - 1);
        if self.0.senders.get() == 0 {
            self.0.wake();
        }
    }
}

impl<T> WatchReceiver<T> {
    /// Whether nobody can send any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.channel.senders.get() == 0
    }
}

impl<T> Clone for WatchReceiver<T> {
    fn clone(&self) -> Self {
        self.channel.receiver(self.seen)
    }
}

impl<T> Drop for WatchReceiver<T> {
    fn drop(&mut self) {
        self.channel.receivers.set(self.channel.receivers.get() - 1);
        self.channel.waiting.borrow_mut().retain(|(id, _)| *id != self.id);
    }
}
