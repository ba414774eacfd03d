//! Waking a core that sleeps, from another core or thread, without a system call while it is awake.
//!
//! The protocol is Dekker's: the sleeper announces that it is about to sleep and then looks once more for work; the waker
//! publishes work and then looks whether the sleeper has announced itself. A sequentially consistent fence on both sides between
//! the two steps makes it impossible that both look too early.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

/// The bell of one core. Any thread may ring it; only the core itself sleeps on it.
#[derive(Debug)]
pub struct Bell {
    asleep: AtomicBool,
    event: OwnedFd,
}

impl Bell {
    /// A bell nobody has rung.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            asleep: AtomicBool::new(false),
            event,
        })
    }

    /// Wakes the core if it sleeps or is about to. Whatever the caller published before is seen by the core when it wakes.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel) {
            // The counter cannot overflow: it is cleared by the sleeper and rung once a sleep.
            let written = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
            debug_assert!(written.is_ok(), "an eventfd takes a write until its counter overflows");
        }
    }

    /// The core is about to sleep. It must look for work after this call and before it sleeps.
    pub fn before_sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The core is awake; ringing is cheap again. `readable` says whether the descriptor was seen ready.
    pub fn after_sleep(&self, readable: bool) {
        self.asleep.store(false, Ordering::Relaxed);
        if readable {
            // Nothing to read means that the ring came in between and will be seen as an early wake-up later.
            let _ = rustix::io::read(&self.event, &mut [0_u8; 8]);
        }
    }

    /// The descriptor that becomes readable when the bell is rung during a sleep.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtrb::{Consumer, RingBuffer};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    /// Takes the next message as a core does: looks, announces its sleep, looks again, sleeps.
    fn take(from: &mut Consumer<u64>, own: &Bell) -> u64 {
        // Far longer than any wake-up takes, and all that ends a sleep whose wake-up was lost.
        let forever = Timespec { tv_sec: 30, tv_nsec: 0 };
        loop {
            if let Ok(message) = from.pop() {
                return message;
            }
            own.before_sleep();
            let mut ready = 1;
            let mut rung = false;
            if from.is_empty() {
                let mut descriptors = [PollFd::from_borrowed_fd(own.descriptor(), PollFlags::IN)];
                ready = poll(&mut descriptors, Some(&forever)).unwrap();
                rung = true;
            }
            own.after_sleep(rung);
            assert_eq!(ready, 1, "a wake-up was lost");
        }
    }

    #[test]
    fn no_wake_up_is_lost_between_two_cores() {
        const COUNT: u64 = 100_000;
        let (a, b) = (Bell::new().unwrap(), Bell::new().unwrap());
        let (mut to_b, mut from_a) = RingBuffer::new(1);
        let (mut to_a, mut from_b) = RingBuffer::new(1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for expected in 0..COUNT {
                    assert_eq!(take(&mut from_a, &b), expected);
                    to_a.push(expected).unwrap();
                    a.ring();
                }
            });
            for message in 0..COUNT {
                to_b.push(message).unwrap();
                b.ring();
                assert_eq!(take(&mut from_b, &a), message);
            }
        });
    }
}
