//! What is asked of the target: which operations, on which keys, with values of which size.
//!
//! Owns the description of a workload ([`WorkloadSpec`]), the stream of operations drawn from it
//! ([`Workload`]) and the encoding of key numbers and values as bytes. The same seed gives every target
//! the same stream. Nothing here knows a protocol, a clock or a socket.

mod keys;
mod sizes;
mod trace;

use std::path::PathBuf;
use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

pub use keys::{KeyDistribution, KeySource};
pub use sizes::{MAX_VALUE_BYTES, SizeDistribution, SizeSource};
pub use trace::{Trace, TraceError, TraceFormat};

/// Kinds of operation, and the order in which reports list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Read one key.
    Get,
    /// Write one key unconditionally.
    Put,
    /// Read a key, then write it on condition that its version did not change: timed as one operation.
    Cas,
    /// Add one to a counter.
    Incr,
    /// Read several keys in one request.
    MultiGet,
    /// Write that follows a missed read (`refill`).
    Refill,
}

impl Class {
    /// Every class, in report order.
    pub const ALL: [Self; 6] = [
        Self::Get,
        Self::Put,
        Self::Cas,
        Self::Incr,
        Self::MultiGet,
        Self::Refill,
    ];

    /// Position in [`Class::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The name used on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Cas => "cas",
            Self::Incr => "incr",
            Self::MultiGet => "multiget",
            Self::Refill => "refill",
        }
    }
}

/// Relative weights of the operation classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix {
    /// Weights in the order of [`Class::ALL`]; `Refill` is always zero, since misses cause refills.
    pub weights: [u32; 6],
}

impl Mix {
    /// A mix of one class alone.
    pub const fn only(class: Class) -> Self {
        let mut weights = [0; 6];
        weights[class.index()] = 1;
        Self { weights }
    }

    fn total(self) -> u32 {
        self.weights.iter().sum()
    }

    /// Whether the class can be drawn.
    pub const fn has(self, class: Class) -> bool {
        self.weights[class.index()] > 0
    }
}

impl std::str::FromStr for Mix {
    type Err = String;

    /// Parses `get=90,put=10`, or a class alone: `get`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut weights = [0_u32; 6];
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let class = Class::ALL
                .into_iter()
                .find(|class| class.name() == name && *class != Class::Refill)
                .ok_or_else(|| format!("unknown operation {name:?}: use get, put, cas, incr or multiget"))?;
            let weight: u32 = weight
                .parse()
                .map_err(|_| format!("{weight:?} is not a weight: use get=90,put=10"))?;
            if weight > 1_000_000 {
                return Err(format!("the weight {weight} is above 1000000"));
            }
            weights[class.index()] += weight;
        }
        let mix = Self { weights };
        if mix.total() == 0 {
            Err("a mix needs at least one operation: get=90,put=10".to_owned())
        } else {
            Ok(mix)
        }
    }
}

impl std::fmt::Display for Mix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut first = true;
        for class in Class::ALL.into_iter().filter(|class| self.has(*class)) {
            write!(
                f,
                "{}{}={}",
                if first { "" } else { "," },
                class.name(),
                self.weights[class.index()]
            )?;
            first = false;
        }
        Ok(())
    }
}

/// A complete description of a workload; part of every report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkloadSpec {
    /// Which operations.
    pub mix: Mix,
    /// Number of distinct keys (ignored by a trace, which brings its own).
    pub keys: u64,
    /// How often each key is asked for.
    pub distribution: KeyDistribution,
    /// Length of a key in bytes.
    pub key_len: usize,
    /// Sizes of values in bytes.
    pub value_size: SizeDistribution,
    /// Time to live given to every write, in milliseconds; 0 = none.
    pub ttl_ms: u64,
    /// Keys in one multi-get.
    pub multiget_keys: usize,
    /// Whether a missed read is followed by a write of that key, as an application in front of a database does.
    pub refill: bool,
    /// A trace to replay instead of drawing keys.
    pub trace: Option<PathBuf>,
    /// Format of the trace; by its name when absent.
    pub trace_format: Option<TraceFormat>,
    /// Seed of every random choice.
    pub seed: u64,
}

impl Default for WorkloadSpec {
    fn default() -> Self {
        Self {
            mix: Mix::only(Class::Get),
            keys: 1_000_000,
            distribution: KeyDistribution::Uniform,
            key_len: 16,
            value_size: SizeDistribution::Fixed { bytes: 100 },
            ttl_ms: 0,
            multiget_keys: 16,
            refill: false,
            trace: None,
            trace_format: None,
            seed: 42,
        }
    }
}

/// Longest key a workload may ask for, in bytes (contract: 1 to 65,535).
pub const MAX_KEY_LEN: usize = 65_535;
/// Shortest key: enough decimal digits for any key number.
pub const MIN_KEY_LEN: usize = 8;
/// Most keys in one multi-get.
pub const MAX_MULTIGET_KEYS: usize = 4_096;

/// A workload that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// A number outside its bounds.
    #[error("{0}")]
    Invalid(String),
    /// The trace could not be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

impl WorkloadSpec {
    /// Checks every bound, so that drawing operations cannot fail.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        let fail = |message: String| Err(WorkloadError::Invalid(message));
        if self.keys == 0 {
            return fail("a workload needs at least one key (--keys)".to_owned());
        }
        if !(MIN_KEY_LEN..=MAX_KEY_LEN).contains(&self.key_len) {
            return fail(format!(
                "--key-len must be {MIN_KEY_LEN} to {MAX_KEY_LEN} bytes, not {}",
                self.key_len
            ));
        }
        if !(1..=MAX_MULTIGET_KEYS).contains(&self.multiget_keys) {
            return fail(format!(
                "--multiget-keys must be 1 to {MAX_MULTIGET_KEYS}, not {}",
                self.multiget_keys
            ));
        }
        if self.key_len < 20 && self.keys > 10_u64.pow(self.key_len as u32 - 1) {
            return fail(format!(
                "{} keys do not fit into {} bytes (--key-len)",
                self.keys, self.key_len
            ));
        }
        self.distribution.validate().map_err(WorkloadError::Invalid)?;
        self.value_size.validate().map_err(WorkloadError::Invalid)
    }

    /// Reads the trace the workload names, if any. Shared by all generator threads.
    pub fn load_trace(&self) -> Result<Option<Arc<Trace>>, WorkloadError> {
        let Some(path) = &self.trace else { return Ok(None) };
        let format = self.trace_format.map_or_else(|| TraceFormat::of(path), Ok)?;
        Ok(Some(Arc::new(Trace::read(path, format)?)))
    }

    /// Distinct keys to load before measuring: the trace's, when there is one.
    pub fn key_count(&self, trace: Option<&Trace>) -> u64 {
        trace.map_or(self.keys, Trace::distinct)
    }
}

/// One operation to send; the key is a number until it is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What to do.
    pub class: Class,
    /// Number of the key.
    pub key: u64,
    /// Length of the value a write carries.
    pub value_len: u32,
}

/// The stream of operations of one generator thread.
#[derive(Debug)]
pub struct Workload {
    classes: Vec<(u32, Class)>,
    total: u32,
    keys: KeySource,
    sizes: SizeSource,
    rng: SmallRng,
    trace: Option<(Arc<Trace>, usize, usize)>,
}

impl Workload {
    /// The stream of thread `thread` of `threads`; a trace is dealt out to the threads in turn.
    pub fn new(spec: &WorkloadSpec, trace: Option<Arc<Trace>>, thread: usize, threads: usize) -> Self {
        let mut total = 0;
        let mut classes = Vec::new();
        for class in Class::ALL.into_iter().filter(|class| spec.mix.has(*class)) {
            total += spec.mix.weights[class.index()];
            classes.push((total, class));
        }
        Self {
            classes,
            total,
            keys: KeySource::new(&spec.distribution, spec.keys),
            sizes: SizeSource::new(&spec.value_size),
            rng: SmallRng::seed_from_u64(spec.seed ^ (thread as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            trace: trace.map(|trace| (trace, thread, threads)),
        }
    }

    /// The next operation. A trace starts again at its end.
    #[inline]
    pub fn next_operation(&mut self) -> Operation {
        let class = if let [(_, class)] = self.classes[..] {
            class
        } else {
            let at = self.rng.random_range(0..self.total);
            self.classes
                .iter()
                .find(|(below, _)| at < *below)
                .map_or(Class::Get, |(_, class)| *class)
        };
        if let Some((trace, position, step)) = &mut self.trace {
            let access = trace.access(*position % trace.len());
            *position += *step;
            let value_len = access.size.unwrap_or_else(|| self.sizes.draw(&mut self.rng));
            return Operation {
                class,
                key: access.key,
                value_len,
            };
        }
        Operation {
            class,
            key: self.keys.draw(&mut self.rng),
            value_len: self.sizes.draw(&mut self.rng),
        }
    }

    /// One more key from the same distribution, for requests of several keys.
    #[inline]
    pub fn next_key(&mut self) -> u64 {
        if self.trace.is_some() {
            self.next_operation().key
        } else {
            self.keys.draw(&mut self.rng)
        }
    }

    /// A value length from the same distribution, for loading the data set.
    #[inline]
    pub fn next_value_len(&mut self) -> u32 {
        self.sizes.draw(&mut self.rng)
    }
}

/// Encodes key numbers as zero-padded decimal text of one length, into a buffer it reuses.
#[derive(Debug)]
pub struct KeyBuffer {
    len: usize,
    bytes: Vec<u8>,
}

impl KeyBuffer {
    /// A buffer for up to `capacity` keys of `len` bytes.
    pub fn new(len: usize, capacity: usize) -> Self {
        Self {
            len,
            bytes: Vec::with_capacity(len * capacity),
        }
    }

    /// Forgets the keys encoded so far.
    #[inline]
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Appends the key of a counter: counters have names of their own, since the values of other keys are
    /// not numbers.
    #[inline]
    pub fn push_counter(&mut self, key: u64) {
        let start = self.bytes.len();
        self.push(key);
        self.bytes[start] = b'c';
    }

    /// Appends one key.
    #[inline]
    pub fn push(&mut self, key: u64) {
        let start = self.bytes.len();
        self.bytes.resize(start + self.len, b'0');
        let slot = &mut self.bytes[start..];
        slot[0] = b'k';
        let mut rest = key;
        for digit in slot[1..].iter_mut().rev() {
            if rest == 0 {
                break;
            }
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
    }

    /// The keys, one after the other.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Incompressible bytes that values are cut from.
#[derive(Debug)]
pub struct ValuePool {
    bytes: Vec<u8>,
}

impl ValuePool {
    /// A pool for values of up to `max_len` bytes.
    pub fn new(max_len: usize, seed: u64) -> Self {
        let mut bytes = vec![0; max_len + 4_096];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        Self { bytes }
    }

    /// A value of `len` bytes for `key`; the same key and length give the same value.
    #[inline]
    pub fn value(&self, key: u64, len: u32) -> &[u8] {
        let len = (len as usize).min(self.bytes.len());
        let start = (key as usize).wrapping_mul(64) % (self.bytes.len() - len).clamp(1, 4_096);
        &self.bytes[start..start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_reads_as_it_prints() {
        let mix: Mix = "get=90,put=10".parse().unwrap();
        assert_eq!(mix.to_string(), "get=90,put=10");
        assert_eq!("get".parse::<Mix>().unwrap(), Mix::only(Class::Get));
        assert!("".parse::<Mix>().is_err());
        assert!("get=0".parse::<Mix>().is_err());
        assert!("refill=1".parse::<Mix>().is_err());
        assert!("get=x".parse::<Mix>().is_err());
        assert!("get=4294967295,put=4294967295".parse::<Mix>().is_err());
    }

    #[test]
    fn the_same_seed_gives_the_same_stream_and_the_mix_is_kept() {
        let spec = WorkloadSpec {
            mix: "get=90,put=10".parse().unwrap(),
            keys: 1_000,
            ..WorkloadSpec::default()
        };
        let draw = || {
            let mut workload = Workload::new(&spec, None, 0, 1);
            (0..10_000).map(|_| workload.next_operation()).collect::<Vec<_>>()
        };
        let operations = draw();
        assert_eq!(operations, draw());
        let puts = operations
            .iter()
            .filter(|operation| operation.class == Class::Put)
            .count();
        assert!((850..1_150).contains(&puts), "{puts}");
        assert!(
            operations
                .iter()
                .all(|operation| operation.key < 1_000 && operation.value_len == 100)
        );
    }

    #[test]
    fn keys_are_distinct_and_of_one_length() {
        let mut keys = KeyBuffer::new(16, 2);
        keys.push(0);
        keys.push(9_876_543);
        assert_eq!(keys.as_bytes(), b"k000000000000000k000000009876543");
    }

    #[test]
    fn values_are_stable_and_never_out_of_bounds() {
        let pool = ValuePool::new(100, 1);
        for key in 0..10_000 {
            assert_eq!(pool.value(key, 100).len(), 100);
            assert_eq!(pool.value(key, 0).len(), 0);
        }
        assert_eq!(pool.value(5, 64), pool.value(5, 64));
        assert_eq!(pool.value(5, u32::MAX).len(), 4_196);
    }

    #[test]
    fn numbers_outside_their_bounds_are_refused() {
        let spec = WorkloadSpec::default();
        assert!(
            WorkloadSpec {
                keys: 0,
                ..spec.clone()
            }
            .validate()
            .is_err()
        );
        assert!(
            WorkloadSpec {
                key_len: 7,
                ..spec.clone()
            }
            .validate()
            .is_err()
        );
        assert!(
            WorkloadSpec {
                key_len: 8,
                keys: 10_000_001,
                ..spec.clone()
            }
            .validate()
            .is_err()
        );
        assert!(
            WorkloadSpec {
                multiget_keys: 0,
                ..spec.clone()
            }
            .validate()
            .is_err()
        );
        assert!(spec.validate().is_ok());
    }
}
