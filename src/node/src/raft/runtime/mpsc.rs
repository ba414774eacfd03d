//! A bounded queue with many senders.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use openraft_rt::{SendError, TryRecvError};

/// [`openraft_rt::Mpsc`] of one thread.
#[derive(Debug)]
pub struct LocalMpsc;

struct Channel<T> {
    queue: VecDeque<T>,
    capacity: usize,
    senders: usize,
    receiver: bool,
    receiving: Option<Waker>,
    /// Senders that wait for room, in the order in which they came.
    sending: VecDeque<(u64, Waker)>,
    next_ticket: u64,
}

impl<T> Channel<T> {
    fn wake_receiver(&mut self) {
        if let Some(waker) = self.receiving.take() {
            waker.wake();
        }
    }

    fn wake_sender(&mut self) {
        if self.queue.len() < self.capacity
            && let Some((_, waker)) = self.sending.pop_front()
        {
            waker.wake();
        }
    }

    fn pop(&mut self) -> Option<T> {
        let value = self.queue.pop_front()?;
        self.wake_sender();
        Some(value)
    }
}

/// A sending end.
pub struct MpscSender<T>(Rc<RefCell<Channel<T>>>);

/// A sending end that does not keep the queue open.
pub struct MpscWeakSender<T>(Weak<RefCell<Channel<T>>>);

/// The receiving end.
pub struct MpscReceiver<T>(Rc<RefCell<Channel<T>>>);

impl openraft_rt::Mpsc for LocalMpsc {
    type Sender<T> = MpscSender<T>;
    type Receiver<T> = MpscReceiver<T>;
    type WeakSender<T> = MpscWeakSender<T>;

    fn channel<T>(buffer: usize) -> (Self::Sender<T>, Self::Receiver<T>) {
        let channel = Rc::new(RefCell::new(Channel {
            queue: VecDeque::new(),
            capacity: buffer,
            senders: 1,
            receiver: true,
            receiving: None,
            sending: VecDeque::new(),
            next_ticket: 0,
        }));
        (MpscSender(Rc::clone(&channel)), MpscReceiver(channel))
    }
}

impl<T> openraft_rt::MpscSender<LocalMpsc, T> for MpscSender<T> {
    fn send(&self, message: T) -> impl Future<Output = Result<(), SendError<T>>> {
        Sending {
            channel: &self.0,
            message: Some(message),
            ticket: None,
        }
    }

    fn downgrade(&self) -> MpscWeakSender<T> {
        MpscWeakSender(Rc::downgrade(&self.0))
    }
}

/// A message on its way into the queue.
struct Sending<'c, T> {
    channel: &'c Rc<RefCell<Channel<T>>>,
    message: Option<T>,
    /// Its place among those that wait, once it has had to.
    ticket: Option<u64>,
}

// The message is moved, never pinned.
impl<T> Unpin for Sending<'_, T> {}

impl<T> Future for Sending<'_, T> {
    type Output = Result<(), SendError<T>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Self {
            channel,
            message,
            ticket,
        } = &mut *self;
        let mut channel = channel.borrow_mut();
        if !channel.receiver || channel.queue.len() < channel.capacity {
            let message = message.take().expect("a future is not polled after its end");
            if !channel.receiver {
                return Poll::Ready(Err(SendError(message)));
            }
            channel.queue.push_back(message);
            channel.wake_receiver();
            return Poll::Ready(Ok(()));
        }
        let waker = context.waker().clone();
        let place = ticket.and_then(|ticket| channel.sending.iter().position(|(other, _)| *other == ticket));
        if let Some(place) = place {
            channel.sending[place].1 = waker;
        } else {
            channel.next_ticket += 1;
            *ticket = Some(channel.next_ticket);
            let entry = (channel.next_ticket, waker);
            channel.sending.push_back(entry);
        }
        Poll::Pending
    }
}

impl<T> Drop for Sending<'_, T> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut channel = self.channel.borrow_mut();
        channel.sending.retain(|(other, _)| *other != ticket);
        // It may have been woken for room that it does not take, or takes only a part of.
        channel.wake_sender();
    }
}

impl<T> openraft_rt::MpscReceiver<T> for MpscReceiver<T> {
    async fn recv(&mut self) -> Option<T> {
        std::future::poll_fn(|context| {
            let mut channel = self.0.borrow_mut();
            if let Some(value) = channel.pop() {
                return Poll::Ready(Some(value));
            }
            if channel.senders == 0 {
                return Poll::Ready(None);
            }
            channel.receiving = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    fn try_recv(&mut self) -> Result<T, TryRecvError> {
        let mut channel = self.0.borrow_mut();
        match channel.pop() {
            Some(value) => Ok(value),
            None if channel.senders == 0 => Err(TryRecvError::Disconnected),
            None => Err(TryRecvError::Empty),
        }
    }
}

impl<T> openraft_rt::MpscWeakSender<LocalMpsc, T> for MpscWeakSender<T> {
    fn upgrade(&self) -> Option<MpscSender<T>> {
        let channel = self.0.upgrade()?;
        let mut state = channel.borrow_mut();
        if state.senders == 0 {
            return None;
        }
        state.senders += 1;
        drop(state);
        Some(MpscSender(channel))
    }
}

impl<T> Clone for MpscSender<T> {
    fn clone(&self) -> Self {
        self.0.borrow_mut().senders += 1;
        Self(Rc::clone(&self.0))
    }
}

impl<T> Clone for MpscWeakSender<T> {
    fn clone(&self) -> Self {
        Self(Weak::clone(&self.0))
    }
}

impl<T> Drop for MpscSender<T> {
    fn drop(&mut self) {
        let mut channel = self.0.borrow_mut();
        channel.senders -= 1;
        if channel.senders == 0 {
            channel.wake_receiver();
        }
    }
}

impl<T> Drop for MpscReceiver<T> {
    fn drop(&mut self) {
        let mut channel = self.0.borrow_mut();
        channel.receiver = false;
        let queue = std::mem::take(&mut channel.queue);
        let sending = std::mem::take(&mut channel.sending);
        drop(channel);
        for (_, waker) in sending {
            waker.wake();
        }
        // What was queued may hold senders of this queue.
        drop(queue);
    }
}

impl<T> fmt::Debug for MpscSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MpscSender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for MpscWeakSender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MpscWeakSender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for MpscReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MpscReceiver").finish_non_exhaustive()
    }
}
