//! How a session keeps and reads its keys and values, and what that did.

use super::attention::Attention;
use super::kv::Format;
use crate::error::{Error, Result};
use crate::ops::cpu::attention::TILE;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What a session's cache stores, which pages a query reads, and what is promised about the result.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    /// How pages are stored near.
    pub format: Format,
    /// Which pages a query reads.
    pub attention: Attention,
    /// Largest error of a head's output against the FP16 cache, relative to the output's norm. Outputs whose certificate is larger are
    /// recomputed from the FP16 originals. Without it nothing is certified; infinite, bounds are computed and nothing is recomputed.
    pub epsilon: Option<f32>,
    /// Which certificate has to be within `epsilon`.
    pub certificate: Certificate,
    /// Compares every output with the FP16 cache and counts violations of its bound; as slow as it sounds.
    pub check: bool,
}

impl From<Format> for Options {
    fn from(format: Format) -> Self {
        Self { format, ..Self::default() }
    }
}

impl Options {
    /// # Errors
    /// When the settings contradict each other.
    pub fn check(&self) -> Result<()> {
        if self.epsilon.is_some_and(|epsilon| epsilon.is_nan() || epsilon < 0.0) {
            return Err(Error::input("epsilon", "is not a positive number or zero").fix("give a relative error such as 0.05"));
        }
        if self.format == Format::F32 && (self.attention != Attention::Dense || self.certifies()) {
            return Err(Error::input("kv", "f32 has the bits of training, neither pages nor certificates")
                .fix("choose f16 or a smaller format for sparse or certified attention"));
        }
        Ok(())
    }

    /// Whether bounds are computed.
    pub(super) fn certifies(&self) -> bool {
        self.epsilon.is_some() || self.check
    }

    /// The error allowed, relative to an output's norm.
    pub(super) fn tolerance(&self) -> f64 {
        self.epsilon.map_or(f64::INFINITY, f64::from)
    }
}

/// Bytes that a cache of `tokens` takes in memory over `layers`, originals included.
pub(super) fn bytes(options: &Options, tokens: usize, layers: usize, kv_heads: usize, head_dim: usize) -> Result<f64> {
    let format = options.format;
    let token = format.bytes_per_token(kv_heads, head_dim)? + format.far_bytes_per_token(kv_heads, head_dim);
    // Tiles are allocated whole.
    Ok(tokens.next_multiple_of(TILE) as f64 * layers as f64 * token)
}

/// Refuses a cache that the machine cannot hold; `available` bytes, where the system tells.
pub(super) fn check_memory(needed: f64, available: Option<f64>) -> Result<()> {
    const GIB: f64 = (1u64 << 30) as f64;
    match available {
        Some(available) if needed > available => {
            let cause = format!("the cache takes {:.1} GiB, and {:.1} GiB of memory are free", needed / GIB, available / GIB);
            Err(Error::input("context", cause).fix("ask for a shorter context or a smaller cache format"))
        }
        _ => Ok(()),
    }
}

/// Bytes of memory that can be had without swapping.
pub(super) fn available_memory() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0)
}

/// What has to hold for an output to be accepted without reading originals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Certificate {
    /// The bound that no input can break.
    #[default]
    Hard,
    /// That bound, or else twice the root-mean-square meter: calibrated, no guarantee.
    Metered,
}

impl Certificate {
    /// Every certificate.
    pub const ALL: [Self; 2] = [Self::Hard, Self::Metered];

    /// As options spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hard => "hard",
            Self::Metered => "metered",
        }
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Certificate {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|certificate| certificate.name() == name).ok_or_else(|| {
            Error::input("certificate", format!("there is no certificate {name:?}"))
                .fix(format!("choose one of {}", Self::ALL.map(Self::name).join(", ")))
        })
    }
}

/// Where a sequence's time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// In attention, the cache's own work included.
    pub attention: Duration,
    /// Of that, in deciding which pages are read.
    pub choosing: Duration,
}

/// What a session's attention did so far. A head-step is one head's output at one token of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Counters {
    /// Head-steps whose hard bound was within epsilon at once.
    pub hard: u64,
    /// Head-steps accepted by the meter.
    pub metered: u64,
    /// Head-steps accepted after some originals had been read.
    pub recovered: u64,
    /// Head-steps computed from the FP16 originals altogether.
    pub dense: u64,
    /// Pages read, per key-value head and token, before any recovery.
    pub pages_read: u64,
    /// Pages that dense attention would have read.
    pub pages_seen: u64,
    /// Pages of which originals were read in recovery: the keys, the values or both. Dense head-steps count every page before their own.
    pub pages_promoted: u64,
    /// Bytes of pages read, before any recovery.
    pub bytes_read: u64,
    /// Bytes of originals read in recovery.
    pub bytes_moved: u64,
    /// Sum over certified head-steps of the final hard bound, relative to the output's norm; those computed densely count 0.
    pub bound_sum: f64,
    /// The largest of them.
    pub bound_max: f64,
    /// Sum over certified head-steps of the final root-mean-square estimate, relative to the output's norm.
    pub meter_sum: f64,
    /// Head-steps compared with the FP16 cache.
    pub checked: u64,
    /// Of those, errors beyond the hard bound: a defect when not 0.
    pub violations: u64,
    /// Of those, errors beyond twice the root-mean-square estimate.
    pub meter_exceeded: u64,
    /// Sum over the compared of the true error relative to the output's norm.
    pub error_sum: f64,
    /// The largest of them.
    pub error_max: f64,
    /// How often the hard bound was so many times the true error: the first entry counts factors below 2^(1/2), each next one factors
    /// 2^(1/2) larger, the last all beyond. Outputs without any error are left out.
    pub looseness: [u64; 32],
}

impl Counters {
    /// Head-steps that were certified.
    pub fn head_steps(&self) -> u64 {
        self.hard + self.metered + self.recovered + self.dense
    }

    /// Adds up two stretches of work.
    pub fn add(&mut self, other: &Self) {
        self.hard += other.hard;
        self.metered += other.metered;
        self.recovered += other.recovered;
        self.dense += other.dense;
        self.pages_read += other.pages_read;
        self.pages_seen += other.pages_seen;
        self.pages_promoted += other.pages_promoted;
        self.bytes_read += other.bytes_read;
        self.bytes_moved += other.bytes_moved;
        self.bound_sum += other.bound_sum;
        self.bound_max = self.bound_max.max(other.bound_max);
        self.meter_sum += other.meter_sum;
        self.checked += other.checked;
        self.violations += other.violations;
        self.meter_exceeded += other.meter_exceeded;
        self.error_sum += other.error_sum;
        self.error_max = self.error_max.max(other.error_max);
        self.looseness.iter_mut().zip(other.looseness).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// The work since `before`, for the counts that times are taken of: head-steps by class, pages and bytes.
    pub(super) fn since(&self, before: &Self) -> Self {
        Self {
            hard: self.hard - before.hard,
            metered: self.metered - before.metered,
            recovered: self.recovered - before.recovered,
            dense: self.dense - before.dense,
            pages_read: self.pages_read - before.pages_read,
            pages_seen: self.pages_seen - before.pages_seen,
            pages_promoted: self.pages_promoted - before.pages_promoted,
            bytes_read: self.bytes_read - before.bytes_read,
            bytes_moved: self.bytes_moved - before.bytes_moved,
            bound_sum: self.bound_sum - before.bound_sum,
            meter_sum: self.meter_sum - before.meter_sum,
            ..Self::default()
        }
    }

    /// Notes the factor between a bound and the error it bounds.
    pub(super) fn compare_bound(&mut self, bound: f64, error: f64) {
        if error > 0.0 {
            let half_octaves = (2.0 * (bound / error).log2()).clamp(0.0, (self.looseness.len() - 1) as f64);
            self.looseness[half_octaves as usize] += 1;
        }
    }

    /// The median factor between bound and error, to within 2^(1/4); nothing when no output had an error.
    pub fn median_looseness(&self) -> Option<f64> {
        let total: u64 = self.looseness.iter().sum();
        let mut left = total.checked_sub(1)? / 2;
        for (at, &count) in self.looseness.iter().enumerate() {
            if left < count {
                return Some(f64::exp2((at as f64 + 0.5) / 2.0));
            }
            left -= count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_factor_is_found_within_its_class() {
        let mut counters = Counters::default();
        assert_eq!(counters.median_looseness(), None);
        [1.0, 3.0, 3.1, 40.0, f64::INFINITY].iter().for_each(|factor| counters.compare_bound(*factor, 1.0));
        counters.compare_bound(1.0, 0.0);
        let median = counters.median_looseness().unwrap();
        assert!((median / 3.1).log2().abs() <= 0.25 && counters.looseness.iter().sum::<u64>() == 5, "{median}");
    }

    #[test]
    fn certificates_have_names() {
        assert!(Certificate::ALL.into_iter().all(|certificate| certificate.to_string().parse::<Certificate>().unwrap() == certificate));
        assert!("soft".parse::<Certificate>().is_err());
    }

    #[test]
    fn too_large_a_cache_is_refused() {
        let needed = bytes(&Format::F16.into(), 1 << 20, 32, 8, 128).unwrap();
        assert_eq!(needed, f64::from(1 << 20) * 32.0 * 8.0 * 512.0);
        assert!(check_memory(needed, Some(needed - 1.0)).unwrap_err().to_string().contains("128.0 GiB"));
        assert!(check_memory(needed, Some(needed)).is_ok() && check_memory(needed, None).is_ok());
        let coded = bytes(&Format::Coded("int8-int4").into(), 64, 1, 1, 128).unwrap();
        assert!(coded > 64.0 * 512.0 && coded <= 64.0 * (512.0 + 219.0));
    }

    #[test]
    fn counters_add_up() {
        let one = Counters { hard: 1, bound_max: 0.5, bound_sum: 0.5, ..Counters::default() };
        let mut sum = Counters { dense: 2, bound_max: 0.2, bound_sum: 0.2, ..Counters::default() };
        sum.add(&one);
        assert_eq!((sum.head_steps(), sum.bound_max, sum.bound_sum), (3, 0.5, 0.7));
    }
}
