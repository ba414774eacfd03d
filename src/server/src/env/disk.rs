//! A core's directory over its [`Ring`]: files are opened with `O_DIRECT` where the file system knows it, so what was written never
//! sits in a page cache that a failed sync could lose behind our back.
//!
//! Listing a directory, making one, its length and asking for free space block for microseconds; all happen at the start, or seldom.

use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use generation_node::env::disk::{BLOCK_BYTES, Disk, File, Open};
use rustix::fs::{OFlags, fcntl_setfl, fstat, statvfs};

use super::ring::Ring;

/// Longest read or write in one piece, in bytes.
const PIECE_BYTES: usize = 4 << 20;

/// A directory of the core's own.
#[derive(Clone)]
pub struct RingDisk {
    ring: Ring,
    root: Rc<Path>,
}

impl std::fmt::Debug for RingDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingDisk")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl RingDisk {
    /// Of this directory, which is made if it does not exist.
    pub(super) fn new(ring: Ring, root: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&root)?;
        // Whatever becomes of the process's own directory.
        let root = std::path::absolute(root)?;
        Ok(Self {
            ring,
            root: root.into(),
        })
    }

    /// A directory in this one, as another disk over the same ring.
    pub fn inner(&self, directory: &str) -> io::Result<Self> {
        Self::new(self.ring.clone(), self.path(directory)?)
    }

    fn path(&self, path: &str) -> io::Result<PathBuf> {
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            let message = format!("`{path}` does not lie in the core's directory");
            return Err(io::Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(self.root.join(path))
    }

    /// As [`RingDisk::path`]; empty is the root.
    fn directory(&self, directory: &str) -> io::Result<PathBuf> {
        match directory {
            "" => Ok(self.root.to_path_buf()),
            _ => self.path(directory),
        }
    }
}

/// A path as the kernel takes it.
fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

impl RingDisk {
    async fn sync(&self, directory: &Path) -> io::Result<()> {
        let opened = self.ring.open(c_string(directory)?, libc::O_RDONLY | libc::O_DIRECTORY);
        let directory = Rc::new(opened.await?);
        self.ring.sync(&directory, false).await
    }
}

impl Disk for RingDisk {
    type File = RingFile;

    async fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.directory(directory)?) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        // Names that are no UTF-8 are nobody's we know.
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(io::Result::transpose).collect()
    }

    async fn create_directory(&self, directory: &str) -> io::Result<()> {
        let path = self.directory(directory)?;
        fs::create_dir_all(&path)?;
        let mut made = path.as_path();
        while let Some(parent) = made.parent().filter(|_| made != &*self.root) {
            self.sync(parent).await?;
            made = parent;
        }
        match self.root.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.sync(parent).await,
            _ => Ok(()),
        }
    }

    async fn open(&self, path: &str, how: Open) -> io::Result<RingFile> {
        let flags = match how {
            Open::Read => libc::O_RDONLY,
            Open::Write => libc::O_RDWR,
            Open::CreateNew => libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
        };
        let file = self.ring.open(c_string(&self.path(path)?)?, flags).await?;
        // A file system in memory has no way past the cache, and says so.
        let _ = fcntl_setfl(&file, OFlags::DIRECT);
        Ok(RingFile {
            ring: self.ring.clone(),
            file: Rc::new(file),
        })
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (c_string(&self.path(from)?)?, c_string(&self.path(to)?)?);
        self.ring.rename(from, to).await
    }

    async fn remove(&self, path: &str) -> io::Result<()> {
        self.ring.remove(c_string(&self.path(path)?)?).await
    }

    async fn sync_directory(&self, directory: &str) -> io::Result<()> {
        self.sync(&self.directory(directory)?).await
    }

    fn available_bytes(&self) -> io::Result<u64> {
        let stat = statvfs(&*self.root)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}

/// A file that is read and written past the page cache, where that can be.
pub struct RingFile {
    ring: Ring,
    file: Rc<OwnedFd>,
}

impl std::fmt::Debug for RingFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingFile")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl File for RingFile {
    async fn len(&self) -> io::Result<u64> {
        Ok(fstat(&*self.file)?.st_size.cast_unsigned())
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        self.ring.allocate(&self.file, len).await
    }

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            // Whole blocks are read, whatever is wanted of them.
            let at = offset + bytes.len() as u64;
            let skipped = (at % BLOCK_BYTES as u64) as usize;
            let buffer = self.ring.buffer((skipped + len - bytes.len()).min(PIECE_BYTES));
            let (count, buffer) = self.ring.read(&self.file, buffer, at - skipped as u64).await?;
            let wanted = count.min(skipped + len - bytes.len());
            let read = buffer.bytes().get(skipped..wanted).unwrap_or_default();
            bytes.extend_from_slice(read);
            let ended = read.is_empty();
            self.ring.recycle(buffer);
            if ended {
                break;
            }
        }
        Ok(bytes)
    }

    async fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !offset.is_multiple_of(BLOCK_BYTES as u64) || !bytes.len().is_multiple_of(BLOCK_BYTES) {
            let message = format!("{} bytes at {offset} are not whole blocks", bytes.len());
            return Err(io::Error::new(ErrorKind::InvalidInput, message));
        }
        let mut written = 0;
        while written < bytes.len() {
            let left = &bytes[written..];
            let piece = &left[..left.len().min(PIECE_BYTES)];
            let mut buffer = self.ring.buffer(piece.len());
            buffer.bytes_mut()[..piece.len()].copy_from_slice(piece);
            let count = self.ring.write(&self.file, buffer, offset + written as u64).await?;
            // What goes on from the middle of a block cannot bypass the page cache.
            if count == 0 || (count < piece.len() && !count.is_multiple_of(BLOCK_BYTES)) {
                return Err(ErrorKind::WriteZero.into());
            }
            written += count;
        }
        Ok(())
    }

    async fn sync_data(&self) -> io::Result<()> {
        self.ring.sync(&self.file, true).await
    }

    async fn close(self) -> io::Result<()> {
        // Everything that matters was synced.
        Ok(())
    }
}
