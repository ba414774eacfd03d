//! The core's own io_uring, for its files.
//!
//! Whoever waits for an operation is a task of the core; the core looks for completions between its turns and sleeps on the
//! ring's descriptor beside its socket, so that nothing else has to be waited for elsewhere.
//!
//! # What holds
//! - **What the kernel reads and writes outlives the operation.** Buffers, paths and files belong to the operation's slot until its
//!   completion was seen, even if nobody waits any more; a ring that is dropped with operations under way leaks them.
//! - An operation is submitted when it is asked for. One that completes at once, as on a file system in memory, has completed when
//!   it is first polled.
//!
//! Not here: paths and their meaning, alignment.

use std::cell::RefCell;
use std::ffi::CString;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::rc::Rc;
use std::task::{Poll, Waker};

use generation_node::env::disk::BLOCK_BYTES;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{PollFd, PollFlags};
use slab::Slab;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Operations submitted and not completed that the kernel takes without waiting.
const ENTRIES: u32 = 128;

/// Buffers kept for the next operations.
const SPARE_BUFFERS: usize = 4;

/// Buffers longer than this are not kept, in blocks.
const SPARE_BLOCKS: usize = 64;

/// Memory as an operation past the page cache wants it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Block([u8; BLOCK_BYTES]);

/// A buffer of whole blocks.
#[derive(Default)]
pub(super) struct Buffer(Vec<Block>);

impl Buffer {
    /// Its bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_slice().as_bytes()
    }

    /// Its bytes, to be changed.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().as_mut_bytes()
    }
}

/// What an operation has in the kernel's hands.
#[derive(Default)]
#[expect(
    dead_code,
    reason = "files and paths are the kernel's to look at; they are only kept here"
)]
struct Held {
    /// The file, which must not be closed meanwhile: its number could be another's.
    file: Option<Rc<OwnedFd>>,
    buffer: Buffer,
    paths: Vec<CString>,
}

impl Held {
    fn of(file: &Rc<OwnedFd>) -> Self {
        Self {
            file: Some(Rc::clone(file)),
            ..Self::default()
        }
    }
}

enum State {
    Waiting(Option<Waker>),
    Done(i32),
    /// Nobody waits.
    Abandoned,
}

struct Operation {
    state: State,
    held: Held,
}

struct Inner {
    ring: IoUring,
    operations: Slab<Operation>,
    spare: Vec<Buffer>,
    /// Of whom something has completed, and who has not been woken yet.
    woken: Vec<Waker>,
}

/// See the module's documentation. A handle: clones are the same ring.
#[derive(Clone)]
pub(super) struct Ring {
    inner: Rc<RefCell<Inner>>,
    /// The ring's descriptor once more, to be polled.
    descriptor: Rc<OwnedFd>,
}

impl Ring {
    /// A ring without operations.
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        // SAFETY: the ring is open, and is not moved or closed before its descriptor has been copied.
        let borrowed = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        let descriptor = rustix::io::fcntl_dupfd_cloexec(borrowed, 0)?;
        Ok(Self {
            inner: Rc::new(RefCell::new(Inner {
                ring,
                operations: Slab::new(),
                spare: Vec::new(),
                woken: Vec::new(),
            })),
            descriptor: Rc::new(descriptor),
        })
    }

    /// What to poll for completions nobody has seen.
    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        PollFd::from_borrowed_fd(self.descriptor.as_fd(), PollFlags::IN)
    }

    /// Takes completions in and wakes who waits for them. `true`: the kernel has not taken everything it was given, and is to be
    /// asked again soon.
    pub(super) fn advance(&self) -> bool {
        let mut inner = self.inner.borrow_mut();
        let behind = inner.is_behind();
        if behind {
            // Whoever submits next hears of it.
            let _ = inner.flush();
        }
        inner.reap();
        if !inner.woken.is_empty() {
            // A waker may be the last to hold a task, whose operations come here when it is dropped.
            let mut woken = std::mem::take(&mut inner.woken);
            drop(inner);
            woken.drain(..).for_each(Waker::wake);
            let mut inner = self.inner.borrow_mut();
            if inner.woken.is_empty() {
                // The memory is used again.
                inner.woken = woken;
            }
        }
        behind
    }

    /// A buffer of `len` bytes, rounded up to whole blocks. What is in it is anything.
    pub(super) fn buffer(&self, len: usize) -> Buffer {
        let mut buffer = self.inner.borrow_mut().spare.pop().unwrap_or_default();
        buffer.0.resize_with(len.div_ceil(BLOCK_BYTES), Block::new_zeroed);
        buffer
    }

    /// Takes a buffer back.
    pub(super) fn recycle(&self, buffer: Buffer) {
        let spare = &mut self.inner.borrow_mut().spare;
        if spare.len() < SPARE_BUFFERS && buffer.0.len() <= SPARE_BLOCKS {
            spare.push(buffer);
        }
    }

    /// Reads into a buffer. Returns how many bytes.
    pub(super) async fn read(
        &self,
        file: &Rc<OwnedFd>,
        mut buffer: Buffer,
        offset: u64,
    ) -> io::Result<(usize, Buffer)> {
        let bytes = buffer.bytes_mut();
        let (at, len) = (bytes.as_mut_ptr(), bytes.len() as u32);
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), at, len).offset(offset);
        let held = Held {
            buffer,
            ..Held::of(file)
        };
        let (count, held) = self.run(&entry.build(), held).await?;
        Ok((count.cast_unsigned() as usize, held.buffer))
    }

    /// Writes a buffer. Returns how many bytes.
    pub(super) async fn write(&self, file: &Rc<OwnedFd>, buffer: Buffer, offset: u64) -> io::Result<usize> {
        let bytes = buffer.bytes();
        let (at, len) = (bytes.as_ptr(), bytes.len() as u32);
        let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), at, len).offset(offset);
        let held = Held {
            buffer,
            ..Held::of(file)
        };
        let (count, held) = self.run(&entry.build(), held).await?;
        self.recycle(held.buffer);
        Ok(count.cast_unsigned() as usize)
    }

    /// Makes the bytes of a file durable, with what is needed to find them, or everything about it.
    pub(super) async fn sync(&self, file: &Rc<OwnedFd>, data_only: bool) -> io::Result<()> {
        let flags = if data_only {
            types::FsyncFlags::DATASYNC
        } else {
            types::FsyncFlags::empty()
        };
        let entry = opcode::Fsync::new(types::Fd(file.as_raw_fd())).flags(flags);
        self.run(&entry.build(), Held::of(file)).await.map(drop)
    }

    /// Allocates the first `len` bytes of a file, and makes it that long.
    pub(super) async fn allocate(&self, file: &Rc<OwnedFd>, len: u64) -> io::Result<()> {
        let entry = opcode::Fallocate::new(types::Fd(file.as_raw_fd()), len);
        self.run(&entry.build(), Held::of(file)).await.map(drop)
    }

    /// Opens a file; `flags` as of `open(2)`.
    pub(super) async fn open(&self, path: CString, flags: i32) -> io::Result<OwnedFd> {
        let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr())
            .flags(flags | libc::O_CLOEXEC)
            .mode(0o600);
        let held = Held {
            paths: vec![path],
            ..Held::default()
        };
        let (number, _) = self.run(&entry.build(), held).await?;
        // SAFETY: the kernel has just opened it for this operation, and nobody else knows its number.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    /// Gives a file another name.
    pub(super) async fn rename(&self, from: CString, to: CString) -> io::Result<()> {
        let here = types::Fd(libc::AT_FDCWD);
        let entry = opcode::RenameAt::new(here, from.as_ptr(), here, to.as_ptr());
        let held = Held {
            paths: vec![from, to],
            ..Held::default()
        };
        self.run(&entry.build(), held).await.map(drop)
    }

    /// Removes a file.
    pub(super) async fn remove(&self, path: CString) -> io::Result<()> {
        let entry = opcode::UnlinkAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr());
        let held = Held {
            paths: vec![path],
            ..Held::default()
        };
        self.run(&entry.build(), held).await.map(drop)
    }

    /// Runs an operation to its end. What it points to must be in `held`.
    fn run(&self, entry: &squeue::Entry, held: Held) -> impl Future<Output = io::Result<(i32, Held)>> {
        let submitted = self.inner.borrow_mut().submit(entry, held);
        let mut waiting = submitted.map(|key| Waiting {
            ring: self.clone(),
            key: Some(key),
        });
        poll_fn(move |context| match &mut waiting {
            Ok(waiting) => waiting.poll(context.waker()),
            Err(error) => Poll::Ready(Err(io::Error::new(error.kind(), error.to_string()))),
        })
    }
}

impl Inner {
    fn submit(&mut self, entry: &squeue::Entry, held: Held) -> io::Result<usize> {
        let state = State::Waiting(None);
        let key = self.operations.insert(Operation { state, held });
        let entry = entry.clone().user_data(key as u64);
        // SAFETY: buffers and paths the entry points to lie on the heap and belong to `held`, as the file does; all stay in the slab,
        // where nothing moves or changes them, until the entry's completion was seen, or for ever.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.flush()?;
            self.reap();
        }
        if let Err(error) = self.flush() {
            self.operations[key].state = State::Abandoned;
            return Err(error);
        }
        self.reap();
        Ok(key)
    }

    /// Hands the kernel what it was not given yet. What it does not take now it is offered again.
    fn flush(&mut self) -> io::Result<()> {
        match self.ring.submit() {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Err(error),
            _ => Ok(()),
        }
    }

    fn is_behind(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    fn reap(&mut self) {
        for completion in self.ring.completion() {
            let key = completion.user_data() as usize;
            let Some(operation) = self.operations.get_mut(key) else {
                debug_assert!(false, "a completion of nobody's");
                continue;
            };
            match std::mem::replace(&mut operation.state, State::Done(completion.result())) {
                State::Waiting(waker) => self.woken.extend(waker),
                State::Abandoned | State::Done(_) => {
                    self.operations.remove(key);
                }
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self
            .operations
            .iter()
            .any(|(_, operation)| !matches!(operation.state, State::Done(_)))
        {
            // The kernel may still read and write what they hold.
            std::mem::forget(std::mem::take(&mut self.operations));
        }
    }
}

/// The wait for one operation.
struct Waiting {
    ring: Ring,
    key: Option<usize>,
}

impl Waiting {
    fn poll(&mut self, waker: &Waker) -> Poll<io::Result<(i32, Held)>> {
        let key = self
            .key
            .expect("invariant: an operation is not polled after it has ended");
        let mut inner = self.ring.inner.borrow_mut();
        let operation = &mut inner.operations[key];
        let State::Done(result) = operation.state else {
            let before = std::mem::replace(&mut operation.state, State::Waiting(Some(waker.clone())));
            drop(inner);
            drop(before);
            return Poll::Pending;
        };
        self.key = None;
        let operation = inner.operations.remove(key);
        Poll::Ready(if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            Ok((result, operation.held))
        })
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut inner = self.ring.inner.borrow_mut();
        let operation = &mut inner.operations[key];
        let before = std::mem::replace(&mut operation.state, State::Abandoned);
        if matches!(before, State::Done(_)) {
            inner.operations.remove(key);
        }
        drop(inner);
        drop(before);
    }
}
