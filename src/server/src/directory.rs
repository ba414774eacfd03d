//! A node's data directory: held by one process, and remembering who it was made for.
//!
//! Files of one line: `lock` (the process that holds it), `durability`, `identity`, `epoch`, `generation`. What cores keep lies in directories of their
//! own beside them and says itself whose it is.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config::Durability;

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Another process serves from it.
    #[error("{} is in use by the process with id {pid}; stop that one, or name another directory", .path.display())]
    Held {
        /// The directory.
        path: PathBuf,
        /// The process, as it wrote itself down.
        pid: String,
    },
    /// It cannot be written.
    #[error("{}: {error}; the user that runs the server must be able to write there, or set another data directory", .path.display())]
    NotWritable {
        /// The directory or the file in it.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It was made for another durability.
    #[error(
        "{} was made with durability = \"{}\", and \"{}\" is asked for; set it back, or name another data directory", .path.display(),
        .made.name(), .asked.name()
    )]
    Durability {
        /// The directory.
        path: PathBuf,
        /// What it was made with.
        made: Durability,
        /// What is configured.
        asked: Durability,
    },
    /// The durability's file holds something else.
    #[error("{}: `{text}` is neither sync nor memory; restore the file", .path.display())]
    UnknownDurability {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The identity's file holds something else.
    #[error("{}: `{text}` is not an identity of 32 hexadecimal digits; restore the file, or remove the whole directory", .path.display())]
    Identity {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The generation's file holds something else.
    #[error("{}: `{text}` is not a generation; restore the file, or remove it if this machine's clock was never set back", .path.display())]
    Generation {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The epoch's file holds something else.
    #[error("{}: `{text}` is not an epoch; restore the file, or remove it if no client has seen this node", .path.display())]
    Epoch {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
}

/// A data directory that this process holds. Let go when dropped, and by the system when the process dies.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    _lock: File,
}

impl DataDirectory {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory if it does not exist, and locks it.
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| DirectoryError::NotWritable { path, error }
        };
        fs::create_dir_all(path).map_err(at(path))?;
        let file = path.join("lock");
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&file)
            .map_err(at(&file))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = fs::read_to_string(&file).unwrap_or_default();
                let pid = pid.trim();
                let pid = if pid.is_empty() { "unknown" } else { pid }.to_owned();
                return Err(DirectoryError::Held {
                    path: path.to_owned(),
                    pid,
                });
            }
            Err(TryLockError::Error(error)) => return Err(at(&file)(error)),
        }
        lock.set_len(0).map_err(at(&file))?;
        writeln!(lock, "{}", std::process::id()).map_err(at(&file))?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Remembers what acknowledged means here, and refuses a directory that was made for something else: what lies in it would
    /// be passed over in silence, or taken for more than it is.
    pub fn made_for(&self, asked: Durability) -> Result<(), DirectoryError> {
        let path = self.path.join("durability");
        let Some(text) = read(&path)? else {
            return self.keep(&path, asked.name());
        };
        let known = [Durability::Sync, Durability::Memory];
        match known.into_iter().find(|durability| durability.name() == text) {
            Some(made) if made == asked => Ok(()),
            Some(made) => {
                let path = self.path.clone();
                Err(DirectoryError::Durability { path, made, asked })
            }
            None => Err(DirectoryError::UnknownDurability { path, text }),
        }
    }

    /// Takes the next epoch: larger than any before and at least `least`, durably. A node that keeps nothing begins with empty
    /// shards, and clients must not take its map for the one they know.
    pub fn next_epoch(&self, least: u32) -> Result<u32, DirectoryError> {
        let next = self.last_epoch()?.map_or(1, |last| last.saturating_add(1));
        let epoch = next.max(now_s()).max(least);
        self.keep(&self.path.join("epoch"), &epoch.to_string())?;
        Ok(epoch)
    }

    /// The epoch taken when the directory was made: of a node whose shards outlive it.
    pub fn first_epoch(&self) -> Result<u32, DirectoryError> {
        match self.last_epoch()? {
            Some(epoch) => Ok(epoch),
            None => self.next_epoch(1),
        }
    }

    fn last_epoch(&self) -> Result<Option<u32>, DirectoryError> {
        let path = self.path.join("epoch");
        let Some(text) = read(&path)? else {
            return Ok(None);
        };
        match text.parse() {
            Ok(epoch) => Ok(Some(epoch)),
            Err(_) => Err(DirectoryError::Epoch { path, text }),
        }
    }

    /// Takes the next generation: larger than any before, durably, and larger than the clock if that is right. A thousand are left free
    /// behind each, for what starts again within the process.
    pub fn next_generation(&self) -> Result<u64, DirectoryError> {
        let path = self.path.join("generation");
        let last = match read(&path)? {
            None => 0,
            Some(text) => match text.parse::<u64>() {
                Ok(last) => last,
                Err(_) => return Err(DirectoryError::Generation { path, text }),
            },
        };
        let generation = last.saturating_add(1_000).max(now_ms());
        self.keep(&path, &generation.to_string())?;
        Ok(generation)
    }

    /// The directory's own identity, drawn when it was made. Other nodes see by it that a node has lost what it had.
    pub fn identity(&self) -> Result<u128, DirectoryError> {
        let path = self.path.join("identity");
        if let Some(text) = read(&path)? {
            let identity = u128::from_str_radix(&text, 16).ok().filter(|_| text.len() == 32);
            return identity.ok_or(DirectoryError::Identity { path, text });
        }
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| DirectoryError::NotWritable {
            path: path.clone(),
            error: io::Error::other(error.to_string()),
        })?;
        let identity = u128::from_le_bytes(bytes);
        self.keep(&path, &format!("{identity:032x}"))?;
        Ok(identity)
    }

    /// Writes a file of one line durably, in place of the one before.
    fn keep(&self, path: &Path, line: &str) -> Result<(), DirectoryError> {
        let failure = |error| DirectoryError::NotWritable {
            path: path.to_owned(),
            error,
        };
        let mut file = tempfile::NamedTempFile::new_in(&self.path).map_err(failure)?;
        writeln!(file, "{line}").map_err(failure)?;
        file.as_file().sync_all().map_err(failure)?;
        file.persist(path).map_err(|error| failure(error.error))?;
        File::open(&self.path)
            .and_then(|directory| directory.sync_all())
            .map_err(failure)
    }
}

/// Reads a file of one line; `None` if there is none.
fn read(path: &Path) -> Result<Option<String>, DirectoryError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DirectoryError::NotWritable {
            path: path.to_owned(),
            error,
        }),
    }
}

/// Seconds since the Unix epoch: a floor for epochs, so that a directory that was thrown away and made again does not start over.
fn now_s() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| u32::try_from(since.as_secs()).unwrap_or(u32::MAX - 1))
}

/// Milliseconds since the Unix epoch: a floor for generations.
fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_grow_though_the_clock_is_set_back() {
        let directory = tempfile::tempdir().unwrap();
        let held = DataDirectory::open(directory.path()).unwrap();
        let before = now_ms();
        let first = held.next_generation().unwrap();
        assert!(first >= before);
        assert!(held.next_generation().unwrap() >= first + 1_000);
        let ahead = first + (1 << 40);
        fs::write(directory.path().join("generation"), ahead.to_string()).unwrap();
        assert_eq!(held.next_generation().unwrap(), ahead + 1_000);
        fs::write(directory.path().join("generation"), "x").unwrap();
        assert!(matches!(held.next_generation(), Err(DirectoryError::Generation { .. })));
    }

    #[test]
    fn a_directory_is_held_by_one_and_its_epochs_grow() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new");
        let held = DataDirectory::open(&path).unwrap();
        let epochs: Vec<u32> = (0..3).map(|_| held.next_epoch(0).unwrap()).collect();
        assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
        let error = DataDirectory::open(&path).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(held);
        let held = DataDirectory::open(&path).unwrap();
        assert!(held.next_epoch(0).unwrap() > epochs[2]);
        let last = held.first_epoch().unwrap();
        assert_eq!(held.first_epoch().unwrap(), last);
        assert_eq!(held.next_epoch(last + 1000).unwrap(), last + 1000);
        let identity = held.identity().unwrap();
        assert_eq!(held.identity().unwrap(), identity);
        let other = DataDirectory::open(&directory.path().join("other")).unwrap();
        assert_ne!(other.identity().unwrap(), identity);
        fs::write(path.join("identity"), "12").unwrap();
        assert!(matches!(held.identity(), Err(DirectoryError::Identity { .. })));
        fs::write(path.join("epoch"), "x").unwrap();
        assert!(matches!(held.next_epoch(0), Err(DirectoryError::Epoch { .. })));
    }

    #[test]
    fn a_directory_serves_the_durability_it_was_made_for() {
        let directory = tempfile::tempdir().unwrap();
        let held = DataDirectory::open(directory.path()).unwrap();
        held.made_for(Durability::Sync).unwrap();
        held.made_for(Durability::Sync).unwrap();
        let error = held.made_for(Durability::Memory).unwrap_err().to_string();
        assert!(error.contains("durability = \"sync\", and \"memory\""), "{error}");
        fs::write(directory.path().join("durability"), "tape").unwrap();
        let error = held.made_for(Durability::Sync).unwrap_err().to_string();
        assert!(error.contains("`tape`"), "{error}");
    }
}
