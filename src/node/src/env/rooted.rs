//! A directory of a disk as a disk of its own.

use std::io;
use std::rc::Rc;

use super::disk::{Disk, Open};

/// What lies in one directory of a core's.
#[derive(Debug, Clone)]
pub struct Rooted<D> {
    disk: D,
    root: Rc<str>,
}

impl<D: Disk> Rooted<D> {
    /// The directory `root` of `disk`, which is made if it does not exist.
    pub async fn open(disk: D, root: &str) -> io::Result<Self> {
        disk.create_directory(root).await?;
        let root = root.into();
        Ok(Self { disk, root })
    }

    fn at(&self, path: &str) -> String {
        format!("{}/{path}", self.root)
    }
}

impl<D: Disk> Disk for Rooted<D> {
    type File = D::File;

    async fn list(&self, directory: &str) -> io::Result<Vec<String>> {
        self.disk.list(&self.at(directory)).await
    }

    async fn create_directory(&self, directory: &str) -> io::Result<()> {
        self.disk.create_directory(&self.at(directory)).await
    }

    async fn open(&self, path: &str, how: Open) -> io::Result<Self::File> {
        self.disk.open(&self.at(path), how).await
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(&self.at(from), &self.at(to)).await
    }

    async fn remove(&self, path: &str) -> io::Result<()> {
        self.disk.remove(&self.at(path)).await
    }

    async fn sync_directory(&self, directory: &str) -> io::Result<()> {
        self.disk.sync_directory(&self.at(directory)).await
    }

    fn available_bytes(&self) -> io::Result<u64> {
        self.disk.available_bytes()
    }

    #[inline]
    fn point(point: &'static str) {
        D::point(point);
    }
}
