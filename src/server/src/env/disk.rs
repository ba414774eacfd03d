//! A core's directory over io_uring: files are opened with `O_DIRECT`, so what was written never sits in a page cache that a failed
//! sync could lose behind our back.
//!
//! Listing a directory and asking for free space block for microseconds; both happen at the start, or seldom.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use generation_node::env::disk::{BLOCK_BYTES, Disk, File, Open};
use glommio::io::{Directory, DmaFile, OpenOptions};
use rustix::fs::statvfs;

/// Longest read in one piece, in bytes: buffers are aligned memory of glommio's.
const PIECE_BYTES: usize = 4 << 20;

/// A directory of the core's own.
#[derive(Debug, Clone)]
pub struct GlommioDisk {
    root: Rc<Path>,
}

impl GlommioDisk {
    /// Of this directory, which is made if it does not exist.
    pub fn new(root: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&root)?;
        // The ring opens paths relative to a descriptor, and there is none.
        let root = std::path::absolute(root)?;
        Ok(Self { root: root.into() })
    }

    fn path(&self, path: &str) -> io::Result<PathBuf> {
        if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            let message = format!("`{path}` does not lie in the core's directory");
            return Err(io::Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(self.root.join(path))
    }

    /// As [`GlommioDisk::path`]; empty is the root.
    fn directory(&self, directory: &str) -> io::Result<PathBuf> {
        match directory {
            "" => Ok(self.root.to_path_buf()),
            _ => self.path(directory),
        }
    }
}

async fn sync(directory: &Path) -> io::Result<()> {
    let directory = Directory::open(directory).await?;
    directory.sync().await?;
    Ok(directory.close().await?)
}

impl Disk for GlommioDisk {
    type File = GlommioFile;

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
            sync(parent).await?;
            made = parent;
        }
        match self.root.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync(parent).await,
            _ => Ok(()),
        }
    }

    async fn open(&self, path: &str, how: Open) -> io::Result<GlommioFile> {
        let path = self.path(path)?;
        let mut options = OpenOptions::new();
        options.read(true);
        match how {
            Open::Read => {}
            Open::Write => {
                options.write(true);
            }
            Open::CreateNew => {
                options.write(true).create_new(true);
            }
        }
        let file = options.dma_open(path).await?;
        Ok(GlommioFile { file })
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(glommio::io::rename(self.path(from)?, self.path(to)?).await?)
    }

    async fn remove(&self, path: &str) -> io::Result<()> {
        Ok(glommio::io::remove(self.path(path)?).await?)
    }

    async fn sync_directory(&self, directory: &str) -> io::Result<()> {
        sync(&self.directory(directory)?).await
    }

    fn available_bytes(&self) -> io::Result<u64> {
        let stat = statvfs(&*self.root)?;
        Ok(stat.f_bavail * stat.f_frsize)
    }
}

/// A file opened with `O_DIRECT`, where the file system knows it.
#[derive(Debug)]
pub struct GlommioFile {
    file: DmaFile,
}

impl File for GlommioFile {
    async fn len(&self) -> io::Result<u64> {
        Ok(self.file.file_size().await?)
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        Ok(self.file.pre_allocate(len, false).await?)
    }

    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let piece = (len - bytes.len()).min(PIECE_BYTES);
            let read = self.file.read_at(offset + bytes.len() as u64, piece).await?;
            if read.is_empty() {
                break;
            }
            bytes.extend_from_slice(&read);
        }
        Ok(bytes)
    }

    async fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut written = 0;
        while written < bytes.len() {
            let left = &bytes[written..];
            let mut buffer = self.file.alloc_dma_buffer(left.len());
            buffer.as_bytes_mut().copy_from_slice(left);
            let count = self.file.write_at(buffer, offset + written as u64).await?;
            // What goes on from the middle of a block cannot bypass the page cache.
            if count == 0 || (count < left.len() && !count.is_multiple_of(BLOCK_BYTES)) {
                return Err(ErrorKind::WriteZero.into());
            }
            written += count;
        }
        Ok(())
    }

    async fn sync_data(&self) -> io::Result<()> {
        Ok(self.file.fdatasync().await?)
    }

    async fn close(self) -> io::Result<()> {
        Ok(self.file.close().await?)
    }
}
