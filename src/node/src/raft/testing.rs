//! For the unit tests of this module: an executor on virtual time, and a disk in memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use super::runtime::{Ambient, Driver, within};
use crate::env::disk::{BLOCK_BYTES, Disk, File, Open};

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Flag {
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(true)))
    }
}

struct World {
    now: Instant,
    start: Instant,
    dice: u64,
    spawned: Vec<Task>,
    sequence: u64,
    timers: BTreeMap<(Instant, u64), Waker>,
}

#[cfg(test)]
mod clock {
    use std::time::Instant;

    /// Any moment will do.
    #[expect(clippy::disallowed_methods, reason = "there is no other way to come by an Instant")]
    pub(super) fn start() -> Instant {
        Instant::now()
    }
}

/// A core without a node.
#[derive(Clone)]
pub(crate) struct Bench(Rc<RefCell<World>>);

impl Bench {
    pub(crate) fn new() -> Self {
        let start = clock::start();
        Self(Rc::new(RefCell::new(World {
            now: start,
            start,
            dice: 1,
            spawned: Vec::new(),
            sequence: 0,
            timers: BTreeMap::new(),
        })))
    }

    pub(crate) fn ambient(&self) -> Rc<dyn Ambient> {
        Rc::new(self.clone())
    }

    /// Time passes while whoever runs works.
    pub(crate) fn pass(&self, time: Duration) {
        self.0.borrow_mut().now += time;
    }

    /// Runs a future, and whatever it spawns, until it ends.
    pub(crate) fn run<T>(&self, future: impl Future<Output = T>) -> T {
        let mut output = None;
        {
            let mut future = std::pin::pin!(async { output = Some(future.await) });
            self.drive(future.as_mut());
        }
        output.unwrap()
    }
}

impl Ambient for Bench {
    fn now(&self) -> Instant {
        self.0.borrow().now
    }

    fn origin(&self) -> Instant {
        self.0.borrow().start
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        let mut world = self.0.borrow_mut();
        for byte in bytes {
            world.dice = world
                .dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            *byte = (world.dice >> 56) as u8;
        }
    }

    fn spawn(&self, task: Task) {
        self.0.borrow_mut().spawned.push(task);
    }

    fn sleep_until(&self, deadline: Instant) -> Task {
        let bench = self.clone();
        Box::pin(std::future::poll_fn(move |context| {
            let mut world = bench.0.borrow_mut();
            if world.now >= deadline {
                return Poll::Ready(());
            }
            world.sequence += 1;
            let key = (deadline, world.sequence);
            world.timers.insert(key, context.waker().clone());
            Poll::Pending
        }))
    }
}

impl Driver for Bench {
    fn drive(&self, future: Pin<&mut dyn Future<Output = ()>>) {
        let mut future = within(self.ambient(), future);
        let mut future = Pin::new(&mut future);
        let main = Flag::new();
        let mut tasks: Vec<Option<(Arc<Flag>, Task)>> = Vec::new();
        loop {
            let mut progress = false;
            if main.0.swap(false, Ordering::Relaxed) {
                progress = true;
                let waker = Waker::from(Arc::clone(&main));
                if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                    return;
                }
            }
            let spawned = std::mem::take(&mut self.0.borrow_mut().spawned);
            tasks.extend(spawned.into_iter().map(|task| Some((Flag::new(), task))));
            for slot in &mut tasks {
                let Some((flag, task)) = slot else { continue };
                if flag.0.swap(false, Ordering::Relaxed) {
                    progress = true;
                    let waker = Waker::from(Arc::clone(flag));
                    if task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                        *slot = None;
                    }
                }
            }
            if progress || !self.0.borrow().spawned.is_empty() {
                continue;
            }
            let mut world = self.0.borrow_mut();
            let ((at, _), waker) = world.timers.pop_first().expect("nothing is left to happen");
            world.now = world.now.max(at);
            waker.wake();
        }
    }
}

/// What is on the disk, and how it fails.
#[derive(Default)]
struct Files {
    by_path: BTreeMap<String, Rc<RefCell<Vec<u8>>>>,
    syncs: u64,
    fails: bool,
    fails_at: Option<&'static str>,
}

/// A disk that keeps everything at once.
#[derive(Clone, Default)]
pub(crate) struct MemoryDisk(Rc<RefCell<Files>>, Option<Bench>);

impl MemoryDisk {
    /// Whose operations take time.
    pub(crate) fn on(bench: &Bench) -> Self {
        Self(Rc::default(), Some(bench.clone()))
    }

    /// How often anything was synced.
    pub(crate) fn syncs(&self) -> u64 {
        self.0.borrow().syncs
    }

    /// Makes every write and sync fail from now on.
    pub(crate) fn fail(&self) {
        self.0.borrow_mut().fails = true;
    }

    /// Lets no file be made from now on whose path contains `part`; `None`: lets all.
    pub(crate) fn fail_at(&self, part: Option<&'static str>) {
        self.0.borrow_mut().fails_at = part;
    }

    /// The bytes of a file, to be changed behind the program's back.
    pub(crate) fn file(&self, path: &str) -> Rc<RefCell<Vec<u8>>> {
        Rc::clone(&self.0.borrow().by_path[path])
    }

    /// Removes a file behind the program's back.
    pub(crate) fn lose(&self, path: &str) {
        self.0.borrow_mut().by_path.remove(path);
    }

    pub(crate) fn paths(&self) -> Vec<String> {
        self.0.borrow().by_path.keys().cloned().collect()
    }

    async fn takes(&self, micros: u64) {
        if let Some(bench) = &self.1 {
            bench.sleep_until(bench.now() + Duration::from_micros(micros)).await;
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.0.borrow().fails {
            return Err(io::Error::other("injected"));
        }
        Ok(())
    }
}

impl Disk for MemoryDisk {
    type File = MemoryFile;

    async fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        let files = self.0.borrow();
        let inside = files
            .by_path
            .keys()
            .filter_map(|path| path.strip_prefix(directory)?.strip_prefix('/'));
        Ok(inside.map(str::to_owned).collect())
    }

    async fn create_directory(&self, _: &str) -> io::Result<()> {
        self.check()
    }

    async fn open(&self, path: &str, how: Open) -> io::Result<MemoryFile> {
        let mut files = self.0.borrow_mut();
        if how == Open::CreateNew && files.fails_at.is_some_and(|part| path.contains(part)) {
            return Err(io::Error::other("injected"));
        }
        let there = files.by_path.get(path).cloned();
        let content = match (there, how) {
            (Some(_), Open::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(content), _) => content,
            (None, Open::CreateNew) => Rc::default(),
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        files.by_path.insert(path.to_owned(), Rc::clone(&content));
        drop(files);
        Ok(MemoryFile {
            disk: self.clone(),
            content,
        })
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.check()?;
        let mut files = self.0.borrow_mut();
        let content = files.by_path.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.by_path.insert(to.to_owned(), content);
        Ok(())
    }

    async fn remove(&self, path: &str) -> io::Result<()> {
        self.check()?;
        let mut files = self.0.borrow_mut();
        files
            .by_path
            .remove(path)
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    async fn sync_directory(&self, _: &str) -> io::Result<()> {
        self.check()
    }

    fn available_bytes(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

pub(crate) struct MemoryFile {
    disk: MemoryDisk,
    content: Rc<RefCell<Vec<u8>>>,
}

impl File for MemoryFile {
    async fn len(&self) -> io::Result<u64> {
        Ok(self.content.borrow().len() as u64)
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        self.disk.check()?;
        self.content.borrow_mut().resize(len as usize, 0);
        Ok(())
    }

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.disk.takes(50).await;
        let content = self.content.borrow();
        let start = content.len().min(offset as usize);
        let end = content.len().min(start.saturating_add(len));
        Ok(content[start..end].to_vec())
    }

    async fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(BLOCK_BYTES as u64) && bytes.len().is_multiple_of(BLOCK_BYTES));
        self.disk.takes(20).await;
        self.disk.check()?;
        let mut content = self.content.borrow_mut();
        let end = offset as usize + bytes.len();
        if content.len() < end {
            content.resize(end, 0);
        }
        content[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    async fn sync_data(&self) -> io::Result<()> {
        self.disk.takes(150).await;
        self.disk.check()?;
        self.disk.0.borrow_mut().syncs += 1;
        Ok(())
    }

    async fn close(self) -> io::Result<()> {
        Ok(())
    }
}
