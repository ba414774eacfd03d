//! Sizes of values: fixed, uniform between bounds, or log-normal.

use rand::RngExt;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, LogNormal};
use serde::{Deserialize, Serialize};

/// Largest value a workload may ask for, in bytes (the default limit of the server).
pub const MAX_VALUE_BYTES: u32 = 8 * 1024 * 1024;

/// How value sizes are distributed, in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum SizeDistribution {
    /// All alike.
    Fixed {
        /// Size in bytes.
        bytes: u32,
    },
    /// Evenly between two bounds, both included.
    Uniform {
        /// Smallest size in bytes.
        min: u32,
        /// Largest size in bytes.
        max: u32,
    },
    /// Log-normal: many small ones and a long tail, as in real caches (Atikoglu et al., SIGMETRICS '12).
    LogNormal {
        /// Median size in bytes.
        median: u32,
        /// Standard deviation of the logarithm.
        sigma: f64,
        /// Sizes are cut off here, in bytes.
        max: u32,
    },
}

impl SizeDistribution {
    /// Checks the parameters.
    pub fn validate(&self) -> Result<(), String> {
        if self.max_bytes() > MAX_VALUE_BYTES {
            return Err(format!("values may have at most {MAX_VALUE_BYTES} bytes"));
        }
        match *self {
            Self::Uniform { min, max } if min > max => Err(format!("the sizes {min} to {max} run backwards")),
            Self::LogNormal { median, sigma, .. } if median == 0 || !(0.0..=10.0).contains(&sigma) => {
                Err("a log-normal size needs a median above 0 and a sigma of 0 to 10".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The largest size that can be drawn, in bytes.
    pub fn max_bytes(&self) -> u32 {
        match *self {
            Self::Fixed { bytes } => bytes,
            Self::Uniform { max, .. } | Self::LogNormal { max, .. } => max,
        }
    }
}

impl std::str::FromStr for SizeDistribution {
    type Err = String;

    /// Parses `100`, `50-500` or `lognormal:300:1.2[:65536]` (median, sigma, cut-off).
    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = |text: &str| {
            text.trim()
                .parse::<u32>()
                .map_err(|_| format!("{text:?} is not a size in bytes"))
        };
        let sizes = if let Some(parameters) = text.strip_prefix("lognormal:") {
            let parts: Vec<_> = parameters.split(':').collect();
            let (median, sigma, max) = match parts[..] {
                [median, sigma] => (median, sigma, "65536"),
                [median, sigma, max] => (median, sigma, max),
                _ => return Err("write lognormal:MEDIAN:SIGMA[:MAX]".to_owned()),
            };
            let sigma = sigma.parse().map_err(|_| format!("{sigma:?} is not a number"))?;
            Self::LogNormal {
                median: bytes(median)?,
                sigma,
                max: bytes(max)?,
            }
        } else if let Some((min, max)) = text.split_once('-') {
            Self::Uniform {
                min: bytes(min)?,
                max: bytes(max)?,
            }
        } else {
            Self::Fixed { bytes: bytes(text)? }
        };
        sizes.validate()?;
        Ok(sizes)
    }
}

impl std::fmt::Display for SizeDistribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed { bytes } => write!(f, "{bytes}"),
            Self::Uniform { min, max } => write!(f, "{min}-{max}"),
            Self::LogNormal { median, sigma, max } => write!(f, "lognormal:{median}:{sigma}:{max}"),
        }
    }
}

/// Draws sizes.
#[derive(Debug)]
pub struct SizeSource {
    sizes: SizeDistribution,
    log_normal: Option<LogNormal<f64>>,
}

impl SizeSource {
    /// A source of a validated distribution.
    pub fn new(sizes: &SizeDistribution) -> Self {
        let log_normal = match *sizes {
            SizeDistribution::LogNormal { median, sigma, .. } => LogNormal::new(f64::from(median).ln(), sigma).ok(),
            _ => None,
        };
        Self {
            sizes: sizes.clone(),
            log_normal,
        }
    }

    /// The next size in bytes.
    #[inline]
    #[allow(clippy::cast_sign_loss, reason = "a log-normal variable is positive")]
    pub fn draw(&mut self, rng: &mut SmallRng) -> u32 {
        match self.sizes {
            SizeDistribution::Fixed { bytes } => bytes,
            SizeDistribution::Uniform { min, max } => rng.random_range(min..=max),
            SizeDistribution::LogNormal { median, max, .. } => self
                .log_normal
                .as_ref()
                .map_or(median, |law| (law.sample(rng) as u32).min(max)),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn sizes_read_as_they_print_and_nonsense_is_refused() {
        for text in ["100", "50-500", "lognormal:300:1.2:65536"] {
            assert_eq!(text.parse::<SizeDistribution>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "x",
            "5-1",
            "9999999999",
            "8388609",
            "lognormal:0:1",
            "lognormal:1",
            "-5",
        ] {
            assert!(text.parse::<SizeDistribution>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_median_of_a_log_normal_is_its_parameter() {
        let mut source = SizeSource::new(&"lognormal:300:1:65536".parse().unwrap());
        let mut rng = SmallRng::seed_from_u64(3);
        let mut sizes: Vec<_> = (0..20_001).map(|_| source.draw(&mut rng)).collect();
        sizes.sort_unstable();
        assert!((285..315).contains(&sizes[10_000]), "{}", sizes[10_000]);
        assert!(sizes[20_000] <= 65_536);
    }
}
