//! A channel for one value.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// [`openraft_rt::Oneshot`] of one thread.
#[derive(Debug)]
pub struct LocalOneshot;

/// The sender went away without sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sender is gone")]
pub struct SenderLost;

#[derive(Debug)]
struct Channel<T> {
    value: Option<T>,
    sender: bool,
    receiver: bool,
    waker: Option<Waker>,
}

impl<T> Channel<T> {
    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// The sending end.
#[derive(Debug)]
pub struct OneshotSender<T>(Rc<RefCell<Channel<T>>>);

/// The receiving end.
#[derive(Debug)]
pub struct OneshotReceiver<T>(Rc<RefCell<Channel<T>>>);

impl openraft_rt::Oneshot for LocalOneshot {
    type Sender<T> = OneshotSender<T>;
    type Receiver<T> = OneshotReceiver<T>;
    type ReceiverError = SenderLost;

    fn channel<T>() -> (Self::Sender<T>, Self::Receiver<T>) {
        let channel = Rc::new(RefCell::new(Channel {
            value: None,
            sender: true,
            receiver: true,
            waker: None,
        }));
        (OneshotSender(Rc::clone(&channel)), OneshotReceiver(channel))
    }
}

impl<T> openraft_rt::OneshotSender<T> for OneshotSender<T> {
    fn send(self, value: T) -> Result<(), T> {
        let mut channel = self.0.borrow_mut();
        if !channel.receiver {
            return Err(value);
        }
        channel.value = Some(value);
        channel.wake();
        Ok(())
    }
}

impl<T> Drop for OneshotSender<T> {
    fn drop(&mut self) {
        let mut channel = self.0.borrow_mut();
        channel.sender = false;
        channel.wake();
    }
}

impl<T> Future for OneshotReceiver<T> {
    type Output = Result<T, SenderLost>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut channel = self.0.borrow_mut();
        if let Some(value) = channel.value.take() {
            return Poll::Ready(Ok(value));
        }
        if !channel.sender {
            return Poll::Ready(Err(SenderLost));
        }
        channel.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl<T> Drop for OneshotReceiver<T> {
    fn drop(&mut self) {
        let mut channel = self.0.borrow_mut();
        channel.receiver = false;
        let value = channel.value.take();
        drop(channel);
        drop(value);
    }
}
