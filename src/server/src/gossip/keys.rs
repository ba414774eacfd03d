//! The cluster's gossip keys: a file of lines `id: key`, and the ring of keys made of it.
//!
//! The first key seals, all of them open, so keys are exchanged while every node runs: add the new key behind the old one on every node,
//! then put it in front on every node, then remove the old one on every node. The file is looked at once a second and read again when it
//! has changed; one that cannot be used leaves the keys in use as they are.
//!
//! ```text
//! # A comment. The id is a number from 1 to 65535, the key 64 hexadecimal digits (32 random bytes).
//! 2: 6f0a…
//! 1: 93bc…
//! ```

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use ring::hkdf::{HKDF_SHA256, Prk, Salt};

use crate::tls::load::KEY_EXPOSED;

/// Bytes of a key.
pub const KEY_BYTES: usize = 32;

/// Most keys of a file. An exchange needs two.
pub const MAX_KEYS: usize = 16;

/// Longest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// What keys are extracted with (RFC 5869 section 2.2), so that a key used elsewhere too gives other keys here.
const EXTRACTION_SALT: &[u8] = b"generation gossip, format 1";

/// Why a key file cannot be used. The keys in use stay in use.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It is not there.
    #[error("{}: there is no such file; `generation certs gossip-key` makes one, or name another as `gossip.key_file`", .0.display())]
    Missing(PathBuf),
    /// It cannot be read.
    #[error("{}: {error}; the user that runs the server must be able to read it", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is open to others.
    #[error("{}: mode {mode:03o} lets others at the gossip keys; run `chmod 600 {}`", .path.display(), .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A line is wrong.
    #[error("{}:{line}: {reason}", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what would be right. Never a part of a key.
        reason: String,
    },
    /// It holds no key.
    #[error("{}: it holds no key; `generation certs gossip-key` makes one", .0.display())]
    Empty(PathBuf),
    /// It is too long to be one.
    #[error("{}: it has {bytes} bytes, and a file of gossip keys has some lines of `id: key`; name the right file", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
}

/// A key of the ring.
struct Key {
    id: u16,
    /// What is derived from.
    extracted: Prk,
}

/// The keys in use: the first seals, all open.
pub struct KeyRing {
    /// At least one.
    keys: Vec<Key>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Ids only.
        f.debug_list().entries(self.ids()).finish()
    }
}

impl KeyRing {
    /// Parses the text of the file at `path`, which is only named in errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self, KeyFileError> {
        let mut keys: Vec<Key> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |reason: String| KeyFileError::Line {
                path: path.to_owned(),
                line: number,
                reason,
            };
            // The text is not repeated in the error: it may hold a key.
            let (id, key) = line.split_once(':').ok_or_else(|| {
                wrong("it is not of the form `id: key`, such as `1: ` and 64 hexadecimal digits".into())
            })?;
            let id = id.trim().parse::<u16>().ok().filter(|id| *id > 0);
            let id = id.ok_or_else(|| wrong("the id must be a number from 1 to 65535".into()))?;
            let bytes = parse_hex(key.trim()).ok_or_else(|| {
                let length = key.trim().len();
                wrong(format!(
                    "the key must be 64 hexadecimal digits, and these are {length} characters; `openssl rand -hex 32` draws one"
                ))
            })?;
            if bytes == [0; KEY_BYTES] {
                return Err(wrong(
                    "a key of zeros protects nothing; `openssl rand -hex 32` draws one".into(),
                ));
            }
            if keys.iter().any(|key| key.id == id) {
                return Err(wrong(format!(
                    "key {id} is there already; give each key an id of its own"
                )));
            }
            if keys.len() == MAX_KEYS {
                return Err(wrong(format!(
                    "there are more than {MAX_KEYS} keys; remove those that no node seals with any more"
                )));
            }
            let extracted = Salt::new(HKDF_SHA256, EXTRACTION_SALT).extract(&bytes);
            keys.push(Key { id, extracted });
        }
        if keys.is_empty() {
            return Err(KeyFileError::Empty(path.to_owned()));
        }
        Ok(Self { keys })
    }

    /// Reads and checks the file at `path`.
    pub fn load(path: &Path) -> Result<Self, KeyFileError> {
        let (text, _) = read(path)?;
        Self::parse(path, &text)
    }

    /// The id of the key that seals, and what is derived from for it.
    pub(super) fn sealing(&self) -> (u16, &Prk) {
        let first = self.keys.first().expect("invariant: a ring has a key");
        (first.id, &first.extracted)
    }

    /// What is derived from for the key `id`.
    pub(super) fn opening(&self, id: u16) -> Option<&Prk> {
        let key = self.keys.iter().find(|key| key.id == id)?;
        Some(&key.extracted)
    }

    /// The ids, that of the key that seals first.
    pub fn ids(&self) -> Vec<u16> {
        self.keys.iter().map(|key| key.id).collect()
    }
}

fn parse_hex(text: &str) -> Option<[u8; KEY_BYTES]> {
    let mut bytes = [0; KEY_BYTES];
    if text.len() != 2 * KEY_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).ok()?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(bytes)
}

/// What changes when a file is written or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    inode: u64,
    length: u64,
    modified_ns: (i64, i64),
    changed_ns: (i64, i64),
}

impl Fingerprint {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            length: metadata.len(),
            modified_ns: (metadata.mtime(), metadata.mtime_nsec()),
            // A `chmod` alone changes this one, and may be the remedy.
            changed_ns: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The text of the file, whose permissions are those of what is read: file and metadata are of one descriptor.
fn read(path: &Path) -> Result<(String, Fingerprint), KeyFileError> {
    let unreadable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing(path.to_owned()),
        _ => KeyFileError::Unreadable {
            path: path.to_owned(),
            error,
        },
    };
    let mut file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let mode = metadata.mode() & 0o777;
    if mode & KEY_EXPOSED != 0 {
        return Err(KeyFileError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(KeyFileError::TooLong {
            path: path.to_owned(),
            bytes: metadata.len(),
        });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(unreadable)?;
    Ok((text, Fingerprint::of(&metadata)))
}

/// A key file that is looked at from time to time.
#[derive(Debug)]
pub(super) struct KeyFile {
    path: PathBuf,
    /// Of what was read last, usable or not; `None` when there was nothing to read.
    seen: Option<Fingerprint>,
}

impl KeyFile {
    /// Reads the file for the first time.
    pub(super) fn open(path: &Path) -> Result<(Self, KeyRing), KeyFileError> {
        let (text, fingerprint) = read(path)?;
        let ring = KeyRing::parse(path, &text)?;
        let file = Self {
            path: path.to_owned(),
            seen: Some(fingerprint),
        };
        Ok((file, ring))
    }

    /// Reads it again if it has changed since. What is wrong with it is said once a change.
    pub(super) fn changed(&mut self) -> Option<Result<KeyRing, KeyFileError>> {
        let now = std::fs::metadata(&self.path).ok();
        let now = now.as_ref().map(Fingerprint::of);
        if now == self.seen {
            return None;
        }
        let read = read(&self.path);
        // Of the descriptor where it was read: what is written meanwhile is another change.
        self.seen = read.as_ref().map_or(now, |(_, fingerprint)| Some(*fingerprint));
        Some(read.and_then(|(text, _)| KeyRing::parse(&self.path, &text)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn hex(byte: u8) -> String {
        format!("{byte:02x}").repeat(KEY_BYTES)
    }

    fn parse(text: &str) -> Result<KeyRing, KeyFileError> {
        KeyRing::parse(Path::new("gossip.keys"), text)
    }

    fn write(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn the_first_key_seals_and_all_open() {
        let text = format!("# two keys\n\n 7 : {} \n1: {}\n", hex(7), hex(0xAB).to_uppercase());
        let ring = parse(&text).unwrap();
        assert_eq!(ring.ids(), [7, 1]);
        assert_eq!(ring.sealing().0, 7);
        assert!(ring.opening(1).is_some() && ring.opening(7).is_some() && ring.opening(2).is_none());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line_and_without_the_key() {
        let good = hex(1);
        let many: Vec<String> = (1..=17).map(|id| format!("{id}: {good}")).collect();
        let many = many.join("\n");
        for (text, line, wanted) in [
            (good.clone(), 1, "`id: key`"),
            (format!("# c\n0: {good}"), 2, "1 to 65535"),
            (format!("65536: {good}"), 1, "1 to 65535"),
            (format!("one: {good}"), 1, "1 to 65535"),
            (format!("1: {}", &good[1..]), 1, "63 characters"),
            (format!("1: {}g", &good[1..]), 1, "hexadecimal"),
            (format!("1: +{}", &good[1..]), 1, "hexadecimal"),
            (format!("1: {}", hex(0)), 1, "zeros"),
            (format!("1: {good}\n\n1: {}", hex(2)), 3, "of its own"),
            (many, 17, "more than 16"),
        ] {
            let message = parse(&text).unwrap_err().to_string();
            assert!(message.starts_with(&format!("gossip.keys:{line}: ")), "{message}");
            assert!(message.contains(wanted), "{message}");
            assert!(!message.contains(&good[8..24]), "{message}");
        }
        assert!(matches!(parse("# none\n"), Err(KeyFileError::Empty(_))));
        let shown = format!("{:?}", parse(&format!("3: {good}")).unwrap());
        assert_eq!(shown, "[3]");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gossip.keys");
        assert!(matches!(KeyRing::load(&path), Err(KeyFileError::Missing(_))));
        let text = format!("1: {}\n", hex(1));
        for mode in [0o644, 0o604, 0o620] {
            write(&path, &text, mode);
            let message = KeyRing::load(&path).unwrap_err().to_string();
            assert!(message.contains("chmod 600"), "{message}");
        }
        for mode in [0o600, 0o400, 0o640] {
            write(&path, &text, 0o600);
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            KeyRing::load(&path).unwrap();
        }
        write(&path, &"#\n".repeat(64 << 10), 0o600);
        assert!(matches!(KeyRing::load(&path), Err(KeyFileError::TooLong { .. })));
    }

    #[test]
    fn a_change_is_read_once_and_a_bad_one_is_said_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gossip.keys");
        let replace = |text: &str, mode: u32| {
            let new = directory.path().join("new");
            write(&new, text, mode);
            fs::rename(&new, &path).unwrap();
        };
        replace(&format!("1: {}\n", hex(1)), 0o600);
        let (mut file, ring) = KeyFile::open(&path).unwrap();
        assert_eq!(ring.ids(), [1]);
        assert!(file.changed().is_none());
        replace(&format!("1: {}\n2: {}\n", hex(1), hex(2)), 0o600);
        assert_eq!(file.changed().unwrap().unwrap().ids(), [1, 2]);
        assert!(file.changed().is_none());
        replace("nonsense", 0o600);
        assert!(matches!(file.changed(), Some(Err(KeyFileError::Line { .. }))));
        assert!(file.changed().is_none());
        fs::remove_file(&path).unwrap();
        assert!(matches!(file.changed(), Some(Err(KeyFileError::Missing(_)))));
        assert!(file.changed().is_none());
        replace(&format!("2: {}\n", hex(2)), 0o644);
        assert!(matches!(file.changed(), Some(Err(KeyFileError::Exposed { .. }))));
        assert!(file.changed().is_none());
        // The remedy that the error names is seen.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(file.changed().unwrap().unwrap().ids(), [2]);
    }
}
