//! Which key an operation touches: uniform, zipf or hotspot.
//!
//! Ranks are scattered over the key space by a multiplier coprime to its size, so that popular keys are
//! not neighbours in the order in which the data set was loaded.

use rand::RngExt;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, Zipf};
use serde::{Deserialize, Serialize};

/// How often each key is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum KeyDistribution {
    /// Every key alike.
    Uniform,
    /// The i-th most popular key in proportion to `i^-theta`.
    Zipf {
        /// Skew; YCSB uses 0.99.
        theta: f64,
    },
    /// A few keys get most of the operations.
    Hotspot {
        /// Share of the keys that is hot, 0 to 1.
        keys: f64,
        /// Share of the operations that goes to them, 0 to 1.
        operations: f64,
    },
    /// Each key once, in order, then again: a scan.
    Sequential,
}

impl KeyDistribution {
    /// Checks the parameters.
    pub fn validate(&self) -> Result<(), String> {
        match *self {
            Self::Zipf { theta } if !(theta.is_finite() && theta > 0.0 && theta <= 10.0) => {
                Err(format!("the skew of zipf must be above 0 and at most 10, not {theta}"))
            }
            Self::Hotspot { keys, operations } if !(keys > 0.0 && keys <= 1.0 && (0.0..=1.0).contains(&operations)) => {
                Err(format!(
                    "the shares of hotspot:{keys}:{operations} must lie between 0 and 1"
                ))
            }
            _ => Ok(()),
        }
    }
}

impl std::str::FromStr for KeyDistribution {
    type Err = String;

    /// Parses `uniform`, `zipf[:0.99]`, `hotspot[:0.1:0.9]` (share of keys, share of operations) or `sequential`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let mut number = |default: f64| {
            parts.next().map_or(Ok(default), |part| {
                part.parse().map_err(|_| format!("{part:?} is not a number"))
            })
        };
        let distribution = match name {
            "uniform" => Self::Uniform,
            "zipf" => Self::Zipf { theta: number(0.99)? },
            "hotspot" => Self::Hotspot {
                keys: number(0.1)?,
                operations: number(0.9)?,
            },
            "sequential" => Self::Sequential,
            _ => {
                return Err(format!(
                    "unknown distribution {text:?}: use uniform, zipf:0.99, hotspot:0.1:0.9 or sequential"
                ));
            }
        };
        if parts.next().is_some() {
            return Err(format!("too many parameters in {text:?}"));
        }
        distribution.validate()?;
        Ok(distribution)
    }
}

impl std::fmt::Display for KeyDistribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Zipf { theta } => write!(f, "zipf:{theta}"),
            Self::Hotspot { keys, operations } => write!(f, "hotspot:{keys}:{operations}"),
            Self::Sequential => f.write_str("sequential"),
        }
    }
}

#[derive(Debug)]
enum Draw {
    Uniform,
    Zipf(Zipf<f64>),
    Hotspot { hot: u64, operations: f64 },
    Sequential { next: u64 },
}

/// Draws key numbers below the number of keys.
#[derive(Debug)]
pub struct KeySource {
    draw: Draw,
    count: u64,
    multiplier: u64,
}

impl KeySource {
    /// A source over `count` keys.
    ///
    /// # Panics
    /// If the distribution was not validated.
    #[allow(clippy::cast_sign_loss, reason = "shares are validated to lie between 0 and 1")]
    pub fn new(distribution: &KeyDistribution, count: u64) -> Self {
        let draw = match *distribution {
            KeyDistribution::Uniform => Draw::Uniform,
            KeyDistribution::Zipf { theta } => {
                Draw::Zipf(Zipf::new(count as f64, theta).expect("invariant: the skew was validated"))
            }
            KeyDistribution::Hotspot { keys, operations } => Draw::Hotspot {
                hot: ((count as f64 * keys) as u64).clamp(1, count),
                operations,
            },
            KeyDistribution::Sequential => Draw::Sequential { next: 0 },
        };
        Self {
            draw,
            count,
            multiplier: coprime_multiplier(count),
        }
    }

    /// The next key number.
    #[inline]
    #[allow(clippy::cast_sign_loss, reason = "zipf draws ranks from 1 on")]
    pub fn draw(&mut self, rng: &mut SmallRng) -> u64 {
        match &mut self.draw {
            Draw::Uniform => rng.random_range(0..self.count),
            Draw::Zipf(zipf) => {
                let rank = (zipf.sample(rng) as u64).clamp(1, self.count) - 1;
                scatter(rank, self.multiplier, self.count)
            }
            Draw::Hotspot { hot, operations } => {
                let rank = if *hot == self.count || rng.random::<f64>() < *operations {
                    rng.random_range(0..*hot)
                } else {
                    rng.random_range(*hot..self.count)
                };
                scatter(rank, self.multiplier, self.count)
            }
            Draw::Sequential { next } => {
                let key = *next;
                *next = if key + 1 == self.count { 0 } else { key + 1 };
                key
            }
        }
    }
}

#[inline]
fn scatter(rank: u64, multiplier: u64, count: u64) -> u64 {
    (u128::from(rank) * u128::from(multiplier) % u128::from(count)) as u64
}

/// A multiplier near the golden section of `count` that shares no divisor with it: a permutation of the key space.
fn coprime_multiplier(count: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let start = (u128::from(count) * 618_033_988_749 / 1_000_000_000_000) as u64;
    (start.max(1)..=count.max(1))
        .find(|candidate| gcd(*candidate, count) == 1)
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::SeedableRng;

    use super::*;

    fn counts(distribution: &KeyDistribution, keys: u64, draws: usize) -> HashMap<u64, u64> {
        let mut source = KeySource::new(distribution, keys);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = HashMap::new();
        for _ in 0..draws {
            let key = source.draw(&mut rng);
            assert!(key < keys);
            *counts.entry(key).or_default() += 1;
        }
        counts
    }

    #[test]
    fn scattering_is_a_permutation() {
        for count in [1, 2, 3, 10, 4_096, 9_973, 10_000] {
            let multiplier = coprime_multiplier(count);
            let seen: std::collections::HashSet<_> = (0..count).map(|rank| scatter(rank, multiplier, count)).collect();
            assert_eq!(seen.len() as u64, count);
        }
    }

    #[test]
    fn zipf_gives_the_first_rank_its_share() {
        let counts = counts(&KeyDistribution::Zipf { theta: 1.0 }, 1_000, 200_000);
        let harmonic: f64 = (1..=1_000).map(|i| 1.0 / f64::from(i)).sum();
        let top = *counts.values().max().unwrap() as f64 / 200_000.0;
        assert!((top * harmonic - 1.0).abs() < 0.03, "{top}");
    }

    #[test]
    fn hotspot_sends_its_share_to_the_hot_keys() {
        let counts = counts(
            &KeyDistribution::Hotspot {
                keys: 0.1,
                operations: 0.9,
            },
            1_000,
            100_000,
        );
        let mut sorted: Vec<_> = counts.values().copied().collect();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let hot: u64 = sorted.iter().take(100).sum();
        assert!((89_000..91_000).contains(&hot), "{hot}");
    }

    #[test]
    fn a_scan_visits_each_key_once_a_round() {
        let counts = counts(&KeyDistribution::Sequential, 100, 200);
        assert!(counts.len() == 100 && counts.values().all(|count| *count == 2));
    }

    #[test]
    fn distributions_read_as_they_print_and_nonsense_is_refused() {
        for text in ["uniform", "zipf:0.99", "hotspot:0.1:0.9", "sequential"] {
            assert_eq!(text.parse::<KeyDistribution>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "zipf:x",
            "zipf:-1",
            "zipf:NaN",
            "hotspot:2:0.5",
            "uniform:1",
            "zipf:1:1",
        ] {
            assert!(text.parse::<KeyDistribution>().is_err(), "{text}");
        }
    }
}
