//! How a node's disk behaves: how fast it is, how much it holds, and what it does wrong.

use std::time::Duration;

use crate::dice::Dice;

/// How a disk behaves.
#[derive(Debug, Clone)]
pub struct DiskWeather {
    /// Shortest time of a read, and of an operation on names.
    pub read: Duration,
    /// Shortest time of a write.
    pub write: Duration,
    /// Shortest time of a sync.
    pub sync: Duration,
    /// At most this many times longer, in percent; 0 makes operations complete in the order they began.
    pub jitter_percent: u64,
    /// Operations that stall, of 1,000.
    pub stall_per_mille: u64,
    /// How much longer an operation that stalls may take.
    pub stall: Duration,
    /// Bytes it can hold.
    pub capacity_bytes: u64,
    /// Writes that fail, of 1,000. Any part of one may have been written.
    pub write_error_per_mille: u64,
    /// Syncs that fail, of 1,000. What they should have made durable is lost in part, and the next sync succeeds nevertheless,
    /// as on Linux.
    pub sync_error_per_mille: u64,
    /// Writes that land at some other block of their file, of 1,000.
    pub misdirect_per_mille: u64,
    /// Bits that are flipped in durable files by each crash.
    pub flips_per_crash: u64,
}

impl Default for DiskWeather {
    fn default() -> Self {
        Self {
            read: Duration::from_micros(60),
            write: Duration::from_micros(20),
            sync: Duration::from_micros(100),
            jitter_percent: 100,
            stall_per_mille: 0,
            stall: Duration::ZERO,
            capacity_bytes: 1 << 40,
            write_error_per_mille: 0,
            sync_error_per_mille: 0,
            misdirect_per_mille: 0,
            flips_per_crash: 0,
        }
    }
}

impl DiskWeather {
    /// How long an operation whose shortest time is `shortest` takes.
    pub(crate) fn latency(&self, shortest: Duration, dice: &mut Dice) -> Duration {
        let jitter = dice.below(shortest.as_nanos() as u64 * self.jitter_percent / 100);
        let stall = if dice.chance(self.stall_per_mille) {
            dice.below(self.stall.as_nanos() as u64)
        } else {
            0
        };
        shortest + Duration::from_nanos(jitter + stall)
    }
}
