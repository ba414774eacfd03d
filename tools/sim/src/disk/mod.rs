//! A node's disk, simulated: [`Disk`] and [`File`] on virtual time.
//!
//! Operations take a time drawn from the node's [`DiskWeather`], so those under way complete in any order. What each leaves
//! behind is [`storage`]'s matter; when the node crashes, unsynced bytes and names are kept, lost or torn as the seed says.

mod content;
pub(crate) mod storage;
mod weather;

use std::cell::RefCell;
use std::io::{Error, ErrorKind, Result};
use std::rc::Rc;
use std::time::Duration;

use generation_node::env::disk::{BLOCK_BYTES, Disk, File, Open};
use generation_node::raft::runtime::pass;

use self::storage::{Inode, Storage};
pub use self::weather::DiskWeather;
use crate::dice::Dice;
use crate::env::until;
use crate::world::World;

/// A copy of a disk: what a node that starts would find.
#[derive(Debug, Clone, Default)]
pub struct DiskImage(pub(crate) Storage);

impl DiskImage {
    /// The paths of all files, in order.
    pub fn paths(&self) -> Vec<String> {
        self.0.paths().map(str::to_owned).collect()
    }

    /// The bytes of a file.
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        let content = self.0.content(path)?;
        Some(content.read(0, content.len() as usize))
    }

    /// What would be left if the power went now, by these dice.
    #[must_use]
    pub fn crashed(&self, weather: &DiskWeather, dice: &mut Dice) -> Self {
        let mut storage = self.0.clone();
        storage.crash(weather, dice);
        Self(storage)
    }

    /// Flips a bit of a file.
    pub fn flip(&mut self, path: &str, offset: u64, bit: u8) {
        self.0.flip(path, offset, bit);
    }
}

/// One core's directory on the disk of its node.
#[derive(Clone)]
pub struct SimDisk {
    world: Rc<RefCell<World>>,
    node: usize,
    /// With `/` at its end.
    root: String,
    generation: u64,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDisk")
            .field("node", &self.node)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

/// Which of a disk's speeds an operation has.
#[derive(Debug, Clone, Copy)]
enum Speed {
    Read,
    Write,
    Sync,
}

impl SimDisk {
    pub(crate) fn new(world: &Rc<RefCell<World>>, node: usize, directory: &str) -> Self {
        let storage = &mut world.borrow_mut().nodes[node].storage;
        storage.create_directory(directory);
        Self {
            world: Rc::clone(world),
            node,
            root: format!("{directory}/"),
            generation: storage.generation,
        }
    }

    /// The path within the node's disk.
    fn path(&self, path: &str) -> Result<String> {
        if path
            .split('/')
            .any(|part| part.is_empty() || part == "." || part == "..")
        {
            let message = format!("`{path}` is not a path below the core's directory");
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(format!("{}{path}", self.root))
    }

    fn directory(&self, directory: &str) -> Result<String> {
        if directory.is_empty() {
            return Ok(self.root.trim_end_matches('/').to_owned());
        }
        self.path(directory)
    }

    /// Lets the time of an operation pass.
    async fn takes(&self, speed: Speed) -> Result<()> {
        let at = {
            let mut world = self.world.borrow_mut();
            let world = &mut *world;
            let weather = &world.nodes[self.node].disk;
            let shortest = match speed {
                Speed::Read => weather.read,
                Speed::Write => weather.write,
                Speed::Sync => weather.sync,
            };
            let latency = weather.latency(shortest, &mut world.dice);
            world.note(&[self.node as u64, speed as u64, latency.as_nanos() as u64]);
            world.now + latency.max(Duration::from_nanos(1))
        };
        until(&self.world, self.node, at).await;
        self.check()
    }

    fn check(&self) -> Result<()> {
        if self.world.borrow().nodes[self.node].storage.generation == self.generation {
            return Ok(());
        }
        Err(Error::other("the node of this handle has crashed"))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Storage, &DiskWeather, &mut Dice) -> T) -> T {
        let mut world = self.world.borrow_mut();
        let world = &mut *world;
        let node = &mut world.nodes[self.node];
        act(&mut node.storage, &node.disk, &mut world.dice)
    }
}

impl Disk for SimDisk {
    type File = SimFile;

    async fn list(&self, directory: &str) -> Result<Vec<String>> {
        let directory = self.directory(directory)?;
        self.takes(Speed::Read).await?;
        Ok(self.with(|storage, _, _| storage.list(&directory)))
    }

    async fn create_directory(&self, directory: &str) -> Result<()> {
        let directory = self.directory(directory)?;
        self.takes(Speed::Sync).await?;
        self.with(|storage, _, _| storage.create_directory(&directory));
        Ok(())
    }

    async fn open(&self, path: &str, how: Open) -> Result<SimFile> {
        let path = self.path(path)?;
        self.takes(Speed::Read).await?;
        let inode = self.with(|storage, _, _| match how {
            Open::Read | Open::Write => storage.open(&path),
            Open::CreateNew => storage.create(&path),
        })?;
        let disk = self.clone();
        Ok(SimFile {
            disk,
            inode,
            writable: how != Open::Read,
        })
    }

    async fn rename(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (self.path(from)?, self.path(to)?);
        self.takes(Speed::Read).await?;
        self.with(|storage, _, _| storage.rename(&from, &to))
    }

    async fn remove(&self, path: &str) -> Result<()> {
        let path = self.path(path)?;
        self.takes(Speed::Read).await?;
        self.with(|storage, _, _| storage.remove(&path))
    }

    async fn sync_directory(&self, directory: &str) -> Result<()> {
        let directory = self.directory(directory)?;
        let mark = self.with(|storage, _, _| storage.mark());
        self.takes(Speed::Sync).await?;
        self.with(|storage, _, _| storage.sync_directory(&directory, mark));
        Ok(())
    }

    fn point(point: &'static str) {
        pass(point);
    }

    fn available_bytes(&self) -> Result<u64> {
        self.check()?;
        Ok(self.with(|storage, weather, _| storage.available(weather)))
    }
}

/// An open file of a simulated disk.
#[derive(Debug)]
pub struct SimFile {
    disk: SimDisk,
    inode: Inode,
    writable: bool,
}

impl SimFile {
    fn check_writable(&self) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::PermissionDenied,
            "the file was opened for reading",
        ))
    }
}

/// A write under way. Dropped before its end, it ends by itself.
struct Flying<'a> {
    file: &'a SimFile,
    id: Option<u64>,
}

impl Drop for Flying<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id
            && self.file.disk.check().is_ok()
        {
            self.file
                .disk
                .with(|storage, _, _| storage.abandon_write(self.file.inode, id));
        }
    }
}

impl File for SimFile {
    async fn len(&self) -> Result<u64> {
        self.disk.takes(Speed::Read).await?;
        Ok(self.disk.with(|storage, _, _| storage.len(self.inode)))
    }

    async fn allocate(&self, len: u64) -> Result<()> {
        self.check_writable()?;
        self.disk.takes(Speed::Write).await?;
        self.disk
            .with(|storage, weather, _| storage.allocate(weather, self.inode, len))
    }

    async fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.disk.takes(Speed::Read).await?;
        Ok(self.disk.with(|storage, _, _| storage.read(self.inode, offset, len)))
    }

    async fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_writable()?;
        self.disk.check()?;
        if !offset.is_multiple_of(BLOCK_BYTES as u64) || !bytes.len().is_multiple_of(BLOCK_BYTES) {
            let message = format!(
                "a write of {} bytes at {offset} is not made of whole blocks",
                bytes.len()
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        let id = self
            .disk
            .with(|storage, _, _| storage.begin_write(self.inode, offset, bytes));
        let mut flying = Flying {
            file: self,
            id: Some(id),
        };
        self.disk.takes(Speed::Write).await?;
        flying.id = None;
        self.disk
            .with(|storage, weather, dice| storage.finish_write(weather, dice, self.inode, id))
    }

    async fn sync_data(&self) -> Result<()> {
        let mark = self.disk.with(|storage, _, _| storage.mark());
        self.disk.takes(Speed::Sync).await?;
        self.disk
            .with(|storage, weather, dice| storage.finish_sync(weather, dice, self.inode, mark))
    }

    async fn close(self) -> Result<()> {
        self.disk.takes(Speed::Read).await
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        if self.disk.check().is_ok() {
            self.disk.with(|storage, _, _| storage.close(self.inode));
        }
    }
}
