//! What the cache did while the documents went through it.

use super::compare::Options;
use crate::infer::cache::{Certificate, Counters};
use crate::infer::kv::Format;
use serde::Serialize;

/// How head-steps were accepted: shares of all that were certified.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Classes {
    pub hard: f64,
    pub metered: f64,
    pub recovered: f64,
    pub dense: f64,
}

/// Figures of the cache. Those of certificates are absent where nothing is certified: f32, and dense attention over f16.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CacheReport {
    /// The policy, with its setting.
    pub attention: String,
    pub epsilon: Option<f32>,
    /// What had to be within epsilon.
    pub certificate: Option<Certificate>,
    /// Outputs whose error against the FP16 cache was beyond their bound.
    pub certificate_violations: Option<u64>,
    /// Share of the pages before each token, its own among them, of which originals had to be read.
    pub pages_promoted: Option<f64>,
    /// Share of pages that the policy let attention read.
    pub pages_read: Option<f64>,
    pub classes: Option<Classes>,
    /// Bytes that attention read per token, and originals moved on top.
    pub bytes_read_per_token: Option<f64>,
    pub bytes_moved_per_token: Option<f64>,
    /// Means over head-steps, relative to the output's norm: bound, root-mean-square estimate, true error.
    pub bound_mean: Option<f64>,
    pub meter_mean: Option<f64>,
    pub error_mean: Option<f64>,
    /// Median over head-steps of bound over true error, to within a fifth.
    pub bound_over_error: Option<f64>,
    pub bound_max: Option<f64>,
    pub error_max: Option<f64>,
    /// Share of head-steps whose error was beyond twice the estimate.
    pub meter_exceeded: Option<f64>,
}

impl CacheReport {
    pub(super) fn new(options: &Options, counters: &Counters, tokens: usize) -> Self {
        let cache = &options.cache;
        let certified = counters.head_steps() > 0;
        // Nothing to certify: dense attention over f16 is what the others are compared with.
        let exact = *cache == Format::F16.into();
        let share = |part: u64, of: u64| part as f64 / of.max(1) as f64;
        let head_steps = counters.head_steps();
        let mean = |sum: f64, of: u64| sum / of.max(1) as f64;
        let per_token = |bytes: u64| bytes as f64 / tokens.max(1) as f64;
        Self {
            attention: cache.attention.to_string(),
            epsilon: cache.epsilon,
            certificate: cache.epsilon.map(|_| cache.certificate),
            certificate_violations: (certified || exact).then_some(counters.violations),
            pages_promoted: (certified || exact).then(|| share(counters.pages_promoted, counters.pages_seen)),
            pages_read: (counters.pages_seen > 0).then(|| share(counters.pages_read, counters.pages_seen)),
            classes: cache.epsilon.filter(|_| certified).map(|_| Classes {
                hard: share(counters.hard, head_steps),
                metered: share(counters.metered, head_steps),
                recovered: share(counters.recovered, head_steps),
                dense: share(counters.dense, head_steps),
            }),
            bytes_read_per_token: (counters.bytes_read > 0).then(|| per_token(counters.bytes_read)),
            bytes_moved_per_token: certified.then(|| per_token(counters.bytes_moved)),
            bound_mean: certified.then(|| mean(counters.bound_sum, head_steps)),
            meter_mean: certified.then(|| mean(counters.meter_sum, head_steps)),
            error_mean: certified.then(|| mean(counters.error_sum, counters.checked)),
            bound_over_error: counters.median_looseness().filter(|_| certified),
            bound_max: certified.then_some(counters.bound_max),
            error_max: certified.then_some(counters.error_max),
            meter_exceeded: certified.then(|| share(counters.meter_exceeded, counters.checked)),
        }
    }
}
