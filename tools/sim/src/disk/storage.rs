//! What a disk holds, what of it is durable, and what a crash leaves. No time and no tasks here.
//!
//! Every file has two contents: the live one, which the node reads, and the durable one. A completed write changes the live
//! one at once and waits, in order, for a sync to reach the durable one; a write under way is neither. Names work alike, with
//! a directory's sync. A crash applies any part of what waits or is under way, sector by sector, and forgets the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Error, ErrorKind, Result};
use std::rc::Rc;

use generation_node::env::disk::BLOCK_BYTES;

use super::content::{Content, SECTOR_BYTES};
use super::weather::DiskWeather;
use crate::dice::Dice;

/// Names a file by what it is, not by its path.
pub(crate) type Inode = u64;

/// A write or a change of length.
#[derive(Debug, Clone)]
struct Change {
    sequence: u64,
    kind: ChangeKind,
}

#[derive(Debug, Clone)]
enum ChangeKind {
    Write { offset: u64, bytes: Rc<[u8]> },
    Len(u64),
}

impl ChangeKind {
    fn apply(&self, content: &mut Content) {
        match self {
            Self::Write { offset, bytes } => content.write(*offset, bytes),
            Self::Len(len) => content.set_len(*len),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct File {
    live: Content,
    durable: Content,
    /// Completed and not yet durable, in order of completion.
    waiting: Vec<Change>,
    /// Begun and not completed.
    flying: BTreeMap<u64, ChangeKind>,
    handles: usize,
}

/// A change of names.
#[derive(Debug, Clone)]
enum Renaming {
    Create { path: String, inode: Inode },
    Rename { from: String, to: String, inode: Inode },
    Remove { path: String },
}

impl Renaming {
    fn touches(&self, directory: &str) -> bool {
        match self {
            Self::Create { path, .. } | Self::Remove { path } => parent(path) == directory,
            Self::Rename { from, to, .. } => parent(from) == directory || parent(to) == directory,
        }
    }

    fn apply(&self, names: &mut BTreeMap<String, Inode>) {
        match self {
            Self::Create { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            Self::Rename { from, to, inode } => {
                names.remove(from);
                names.insert(to.clone(), *inode);
            }
            Self::Remove { path } => {
                names.remove(path);
            }
        }
    }
}

/// What a crash does to what was not durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// All of it is lost.
    All,
    /// None of it is.
    None,
    /// Each change is lost or not.
    Whole,
    /// Each block of each change is.
    Blocks,
    /// Each sector is.
    Sectors,
}

/// The state of one node's disk.
#[derive(Debug, Clone, Default)]
pub(crate) struct Storage {
    files: BTreeMap<Inode, File>,
    names: BTreeMap<String, Inode>,
    durable_names: BTreeMap<String, Inode>,
    renamings: Vec<(u64, Renaming)>,
    directories: BTreeSet<String>,
    sequence: u64,
    /// Counts crashes, so that a handle of before is known.
    pub(crate) generation: u64,
    /// Syncs that will fail, whatever the weather.
    pub(crate) failing_syncs: u64,
}

impl Storage {
    fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn file(&mut self, inode: Inode) -> &mut File {
        self.files.get_mut(&inode).expect("invariant: an open file is kept")
    }

    /// The names in a directory.
    pub(crate) fn list(&self, directory: &str) -> Vec<String> {
        let inside = |path: &String| (parent(path) == directory).then(|| name(path).to_owned());
        let files = self.names.keys().filter_map(inside);
        let directories = self
            .directories
            .iter()
            .filter(|path| !path.is_empty())
            .filter_map(inside);
        files.chain(directories).collect()
    }

    /// Makes a directory and those above it.
    pub(crate) fn create_directory(&mut self, directory: &str) {
        let mut path = directory;
        while !path.is_empty() {
            self.directories.insert(path.to_owned());
            path = parent(path);
        }
    }

    /// Opens an existing file.
    pub(crate) fn open(&mut self, path: &str) -> Result<Inode> {
        let inode = *self.names.get(path).ok_or_else(|| missing(path))?;
        self.file(inode).handles += 1;
        Ok(inode)
    }

    /// Makes a file and opens it.
    pub(crate) fn create(&mut self, path: &str) -> Result<Inode> {
        if self.names.contains_key(path) {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("{path} exists")));
        }
        self.check_directory(path)?;
        let inode = self.next();
        self.files.insert(
            inode,
            File {
                handles: 1,
                ..File::default()
            },
        );
        let path = path.to_owned();
        self.rename_with(Renaming::Create { path, inode });
        Ok(inode)
    }

    /// A handle is gone.
    pub(crate) fn close(&mut self, inode: Inode) {
        self.file(inode).handles -= 1;
        self.forget_nameless();
    }

    /// Gives a file another name.
    pub(crate) fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        let inode = *self.names.get(from).ok_or_else(|| missing(from))?;
        self.check_directory(to)?;
        let (from, to) = (from.to_owned(), to.to_owned());
        self.rename_with(Renaming::Rename { from, to, inode });
        self.forget_nameless();
        Ok(())
    }

    /// Removes a name.
    pub(crate) fn remove(&mut self, path: &str) -> Result<()> {
        if !self.names.contains_key(path) {
            return Err(missing(path));
        }
        let path = path.to_owned();
        self.rename_with(Renaming::Remove { path });
        self.forget_nameless();
        Ok(())
    }

    fn rename_with(&mut self, renaming: Renaming) {
        renaming.apply(&mut self.names);
        let sequence = self.next();
        self.renamings.push((sequence, renaming));
    }

    /// What a sync that begins now will make durable.
    pub(crate) fn mark(&self) -> u64 {
        self.sequence
    }

    /// A directory's sync has come to its end.
    pub(crate) fn sync_directory(&mut self, directory: &str, mark: u64) {
        let names = &mut self.durable_names;
        self.renamings.retain(|(sequence, renaming)| {
            let durable = *sequence <= mark && renaming.touches(directory);
            if durable {
                renaming.apply(names);
            }
            !durable
        });
        self.forget_nameless();
    }

    /// Length of a file.
    pub(crate) fn len(&mut self, inode: Inode) -> u64 {
        self.file(inode).live.len()
    }

    /// Bytes of a file as the node sees them.
    pub(crate) fn read(&mut self, inode: Inode, offset: u64, len: usize) -> Vec<u8> {
        self.file(inode).live.read(offset, len)
    }

    /// Bytes that can still be allocated.
    pub(crate) fn available(&self, weather: &DiskWeather) -> u64 {
        // A removed file is kept for a crash that undoes its removal, but its space counts as free.
        let named: BTreeSet<_> = self.names.values().collect();
        let held: u64 = self
            .files
            .iter()
            .filter(|(inode, file)| file.handles > 0 || named.contains(inode))
            .map(|(_, file)| file.live.len().next_multiple_of(BLOCK_BYTES as u64))
            .sum();
        weather.capacity_bytes.saturating_sub(held)
    }

    /// Sets a file's length.
    pub(crate) fn allocate(&mut self, weather: &DiskWeather, inode: Inode, len: u64) -> Result<()> {
        self.check_room(weather, inode, len)?;
        let change = ChangeKind::Len(len);
        self.complete(inode, change);
        Ok(())
    }

    /// A write begins. From now on a crash may leave any part of it.
    pub(crate) fn begin_write(&mut self, inode: Inode, offset: u64, bytes: &[u8]) -> u64 {
        let id = self.next();
        let bytes = Rc::from(bytes);
        self.file(inode).flying.insert(id, ChangeKind::Write { offset, bytes });
        id
    }

    /// A write ends, well or not.
    pub(crate) fn finish_write(&mut self, weather: &DiskWeather, dice: &mut Dice, inode: Inode, id: u64) -> Result<()> {
        let change = self
            .file(inode)
            .flying
            .remove(&id)
            .expect("invariant: the write is under way");
        let ChangeKind::Write { offset, bytes } = &change else {
            unreachable!("invariant: only writes take time")
        };
        self.check_room(weather, inode, offset + bytes.len() as u64)?;
        if dice.chance(weather.write_error_per_mille) {
            for change in parts(&change, SECTOR_BYTES, dice) {
                self.complete(inode, change);
            }
            return Err(Error::other("input/output error (simulated)"));
        }
        if dice.chance(weather.misdirect_per_mille) {
            let blocks = self.file(inode).live.len().div_ceil(BLOCK_BYTES as u64);
            let offset = dice.below(blocks) * BLOCK_BYTES as u64;
            let bytes = Rc::clone(bytes);
            self.complete(inode, ChangeKind::Write { offset, bytes });
        } else {
            self.complete(inode, change);
        }
        Ok(())
    }

    /// Nobody waits for a write any more; it ends whenever it does.
    pub(crate) fn abandon_write(&mut self, inode: Inode, id: u64) {
        if let Some(change) = self.files.get_mut(&inode).and_then(|file| file.flying.remove(&id)) {
            self.complete(inode, change);
        }
    }

    fn complete(&mut self, inode: Inode, kind: ChangeKind) {
        let sequence = self.next();
        let file = self.file(inode);
        kind.apply(&mut file.live);
        file.waiting.push(Change { sequence, kind });
    }

    /// A sync that began at `mark` ends, well or not. After a failure what it should have saved counts as clean: part of it is
    /// durable, part of it is not and never will be, and of that part the node may or may not still read its own version.
    pub(crate) fn finish_sync(
        &mut self,
        weather: &DiskWeather,
        dice: &mut Dice,
        inode: Inode,
        mark: u64,
    ) -> Result<()> {
        let ordered = self.failing_syncs > 0;
        let fails = ordered || dice.chance(weather.sync_error_per_mille);
        self.failing_syncs -= u64::from(ordered);
        let file = self.file(inode);
        let count = file.waiting.partition_point(|change| change.sequence <= mark);
        let changes: Vec<_> = file.waiting.drain(..count).collect();
        if !fails {
            for change in changes {
                change.kind.apply(&mut file.durable);
            }
            return Ok(());
        }
        for change in changes {
            for part in parts(&change.kind, BLOCK_BYTES, dice) {
                part.apply(&mut file.durable);
            }
        }
        if dice.chance(500) {
            // The cache drops its pages: the node reads what the disk has.
            file.live = file.durable.clone();
            for change in &file.waiting {
                change.kind.apply(&mut file.live);
            }
        }
        Err(Error::other("input/output error on sync (simulated)"))
    }

    /// The power goes, and comes back.
    pub(crate) fn crash(&mut self, weather: &DiskWeather, dice: &mut Dice) {
        self.generation += 1;
        let loss = pick(dice);
        for (_, renaming) in std::mem::take(&mut self.renamings) {
            if keeps(loss, dice) {
                renaming.apply(&mut self.durable_names);
            }
        }
        for file in self.files.values_mut() {
            let loss = pick(dice);
            let mut flying: Vec<_> = std::mem::take(&mut file.flying).into_values().collect();
            for place in (1..flying.len()).rev() {
                flying.swap(place, dice.below(place as u64 + 1) as usize);
            }
            for change in file.waiting.drain(..).map(|change| change.kind).chain(flying) {
                match loss {
                    Loss::Blocks | Loss::Sectors => {
                        let unit = if loss == Loss::Blocks {
                            BLOCK_BYTES
                        } else {
                            SECTOR_BYTES
                        };
                        for part in parts(&change, unit, dice) {
                            part.apply(&mut file.durable);
                        }
                    }
                    _ if keeps(loss, dice) => change.apply(&mut file.durable),
                    _ => {}
                }
            }
            file.handles = 0;
            file.live = file.durable.clone();
        }
        self.names.clone_from(&self.durable_names);
        self.forget_nameless();
        for _ in 0..weather.flips_per_crash {
            let paths: Vec<_> = self.names.keys().cloned().collect();
            if let Some(path) = paths.get(dice.below(paths.len() as u64) as usize) {
                let len = self.content(path).map_or(0, Content::len);
                self.flip(path, dice.below(len.max(1)), dice.below(8) as u8);
            }
        }
    }

    /// Everything that was written becomes durable, as when a process dies and its machine does not.
    pub(crate) fn settle(&mut self) {
        self.generation += 1;
        for file in self.files.values_mut() {
            let flying = std::mem::take(&mut file.flying).into_values();
            for change in flying {
                change.apply(&mut file.live);
            }
            file.waiting.clear();
            file.handles = 0;
            file.durable = file.live.clone();
        }
        self.renamings.clear();
        self.durable_names.clone_from(&self.names);
        self.forget_nameless();
    }

    /// All paths.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// A file's bytes as the node sees them.
    pub(crate) fn content(&self, path: &str) -> Option<&Content> {
        self.names.get(path).map(|inode| &self.files[inode].live)
    }

    /// Flips a bit, in what is durable too.
    pub(crate) fn flip(&mut self, path: &str, offset: u64, bit: u8) {
        let Some(&inode) = self.names.get(path) else { return };
        let file = self.file(inode);
        for content in [&mut file.live, &mut file.durable] {
            if let [byte] = content.read(offset, 1)[..] {
                content.write(offset, &[byte ^ 1 << bit]);
            }
        }
    }

    /// Drops files that have neither a name nor a handle.
    fn forget_nameless(&mut self) {
        let named: BTreeSet<_> = self.names.values().chain(self.durable_names.values()).collect();
        let renamed: BTreeSet<_> = self
            .renamings
            .iter()
            .filter_map(|(_, renaming)| match renaming {
                Renaming::Create { inode, .. } | Renaming::Rename { inode, .. } => Some(inode),
                Renaming::Remove { .. } => None,
            })
            .collect();
        self.files
            .retain(|inode, file| file.handles > 0 || named.contains(inode) || renamed.contains(inode));
    }

    fn check_directory(&self, path: &str) -> Result<()> {
        let directory = parent(path);
        if directory.is_empty() || self.directories.contains(directory) {
            return Ok(());
        }
        Err(missing(directory))
    }

    fn check_room(&mut self, weather: &DiskWeather, inode: Inode, len: u64) -> Result<()> {
        let more = len
            .next_multiple_of(BLOCK_BYTES as u64)
            .saturating_sub(self.len(inode).next_multiple_of(BLOCK_BYTES as u64));
        if more > self.available(weather) {
            return Err(Error::new(
                ErrorKind::StorageFull,
                "no space left on device (simulated)",
            ));
        }
        Ok(())
    }
}

fn pick(dice: &mut Dice) -> Loss {
    [Loss::All, Loss::None, Loss::Whole, Loss::Blocks, Loss::Sectors][dice.below(5) as usize]
}

fn keeps(loss: Loss, dice: &mut Dice) -> bool {
    match loss {
        Loss::All => false,
        Loss::None => true,
        Loss::Whole | Loss::Blocks | Loss::Sectors => dice.chance(500),
    }
}

/// Some of the units a change is made of, in any number.
fn parts(change: &ChangeKind, unit: usize, dice: &mut Dice) -> Vec<ChangeKind> {
    match change {
        ChangeKind::Len(_) => dice.chance(500).then(|| change.clone()).into_iter().collect(),
        ChangeKind::Write { offset, bytes } => bytes
            .chunks(unit)
            .enumerate()
            .filter(|_| dice.chance(500))
            .map(|(number, part)| ChangeKind::Write {
                offset: offset + (number * unit) as u64,
                bytes: Rc::from(part),
            })
            .collect(),
    }
}

fn parent(path: &str) -> &str {
    path.rfind('/').map_or("", |slash| &path[..slash])
}

fn name(path: &str) -> &str {
    path.rfind('/').map_or(path, |slash| &path[slash + 1..])
}

fn missing(path: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("{path} does not exist"))
}
