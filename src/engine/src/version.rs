//! Versions: where in the log an entry was last written.

use std::fmt;

/// The position in the log of the command that last wrote an entry: log index (48 bits) and position inside that log entry
/// (16 bits). Versions of one key only grow, so one serves as a compare-and-swap token and as a fencing token.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(u64);

impl Version {
    /// The version of a key that is not there.
    pub const ABSENT: Self = Self(0);

    /// The largest log index a version can hold.
    pub const MAX_INDEX: u64 = (1 << 48) - 1;

    /// The version of the command at `position` of the log entry `index`.
    ///
    /// # Panics
    /// If `index` is above [`Version::MAX_INDEX`]: at a million log entries a second that takes nine years.
    pub const fn new(index: u64, position: u16) -> Self {
        assert!(index <= Self::MAX_INDEX, "the log index has passed 48 bits");
        Self(index << 16 | position as u64)
    }

    /// The log index.
    pub const fn index(self) -> u64 {
        self.0 >> 16
    }

    /// The position inside the log entry.
    pub const fn position(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// The version as it travels on the wire.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether this is [`Version::ABSENT`].
    pub const fn is_absent(self) -> bool {
        self.0 == 0
    }
}

impl From<u64> for Version {
    fn from(raw: u64) -> Self {
        Self(raw)
    }
}

impl From<Version> for u64 {
    fn from(version: Version) -> Self {
        version.0
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({}.{})", self.index(), self.position())
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
