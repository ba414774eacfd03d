//! The disk as one core of a node sees it: a directory of its own, files written in whole blocks, and what makes them durable.
//!
//! Nothing is durable before [`File::sync_data`] has returned `Ok` for its bytes and [`Disk::sync_directory`] for its name. After
//! an error of a write or a sync nothing may be assumed of that file's unsynced bytes, and a later successful sync proves nothing
//! about them: the caller gives the file up.
//!
//! Paths are relative to the core's directory, with `/` between their parts, and never leave it.

use std::future::Future;
use std::io;

/// Offsets and lengths of writes are multiples of this, so that they can bypass the page cache.
pub const BLOCK_BYTES: usize = 4096;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// An existing file, to be read.
    Read,
    /// An existing file, to be read and written.
    Write,
    /// A new file, to be read and written; an existing one of that name is an error.
    CreateNew,
}

/// A core's directory.
pub trait Disk: Clone + 'static {
    /// A file of it.
    type File: File;

    /// The names in a directory, without order. A directory that does not exist is empty.
    fn list(&self, directory: &str) -> impl Future<Output = io::Result<Vec<String>>>;

    /// Makes a directory and those above it, durably. That it exists already is no error.
    fn create_directory(&self, directory: &str) -> impl Future<Output = io::Result<()>>;

    /// Opens a file.
    fn open(&self, path: &str, how: Open) -> impl Future<Output = io::Result<Self::File>>;

    /// Gives a file another name, taking the place of a file of that name.
    fn rename(&self, from: &str, to: &str) -> impl Future<Output = io::Result<()>>;

    /// Removes a file. Its bytes may come back after a crash until the directory is synced.
    fn remove(&self, path: &str) -> impl Future<Output = io::Result<()>>;

    /// Makes the names of a directory durable.
    fn sync_directory(&self, directory: &str) -> impl Future<Output = io::Result<()>>;

    /// Bytes that can still be allocated.
    fn available_bytes(&self) -> io::Result<u64>;

    /// As [`Env::point`](super::Env::point), of the environment that is current, for whoever knows only its disk.
    #[inline]
    fn point(_point: &'static str) {}
}

/// An open file. Several operations may be under way at once; they complete in any order.
#[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
pub trait File: 'static {
    /// Its length in bytes.
    fn len(&self) -> impl Future<Output = io::Result<u64>>;

    /// Allocates space up to `len` bytes and makes it the file's length. What was not written reads as zeros.
    fn allocate(&self, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Reads `len` bytes, fewer only where the file ends. Any offset and length will do.
    fn read_at(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<Vec<u8>>>;

    /// Writes all of `bytes`. Offset and length are multiples of [`BLOCK_BYTES`].
    fn write_at(&self, offset: u64, bytes: &[u8]) -> impl Future<Output = io::Result<()>>;

    /// Makes everything durable whose write had completed when this was called.
    fn sync_data(&self) -> impl Future<Output = io::Result<()>>;

    /// Closes the file. Dropping does too, without saying when.
    fn close(self) -> impl Future<Output = io::Result<()>>;
}
