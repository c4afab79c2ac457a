//! How much an artifact may lose before it falls short.
//!
//! | format | loss gap (nats) | mean KL (nats) | top-1 agreement | skill lost |
//! | --- | --- | --- | --- | --- |
//! | f32, f16, bf16, hf | 0.001 | 0.001 | 99.5% | 2% |
//! | tq1_0, tq2_0 | 0.001 | 0.001 | 98.5% | 5% |
//! | q8_0 | 0.01 | 0.01 | 97% | 5% |
//! | q6_k | 0.02 | 0.02 | 95% | 5% |
//! | q4_k | 0.10 | 0.10 | 85% | 15% |
//! | q4_0 | 0.15 | 0.15 | 80% | 20% |
//!
//! A cache adds its own, and so does attention that does not read every page:
//!
//! | cache | loss gap (nats) | mean KL (nats) | top-1 lost | skill lost |
//! | --- | --- | --- | --- | --- |
//! | f32, f16 | 0 | 0 | 0 | 0 |
//! | int8-int4, fp8 | 0.01 | 0.01 | 3% | 2% |
//! | turboquant-4 | 0.02 | 0.02 | 5% | 5% |
//! | turboquant-3.5, -3 | 0.05 | 0.05 | 10% | 10% |
//! | turboquant-2.5, -2, oscar-2 | 0.20 | 0.20 | 25% | 25% |
//! | sparse attention | 0.05 | 0.05 | 5% | 2% |
//!
//! A ternary file holds the very integers of the training forward, so only its embedding and head, in f16, may differ.

use crate::infer::attention::Attention;
use crate::infer::cache;
use serde::{Deserialize, Serialize};

/// Limits of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Most by which the loss per token may rise, in nats.
    pub nll_gap: f64,
    /// Largest mean divergence from the reference, in nats per token.
    pub kl_mean: f64,
    /// Smallest share of tokens on which both think the same next token likeliest.
    pub top1_agreement: f64,
    /// Most by which the share of solved probes of a skill may fall.
    pub skill_loss: f64,
}

impl Limits {
    /// For a ternary model written as dense weights: engines run those with unrounded activations, which training never saw.
    pub const DEQUANTIZED_TERNARY: Self = Self { nll_gap: 0.01, kl_mean: 0.005, top1_agreement: 0.97, skill_loss: 0.05 };

    /// Of the very same weights.
    pub const NONE: Self = Self { nll_gap: 0.0, kl_mean: 0.0, top1_agreement: 1.0, skill_loss: 0.0 };

    /// What a cache may lose beyond the weights.
    pub fn of_cache(options: &cache::Options) -> Self {
        let loss = |nll_gap, kl_mean, top1_lost, skill_loss| Self { nll_gap, kl_mean, top1_agreement: 1.0 - top1_lost, skill_loss };
        let format = match options.format.name() {
            "f32" | "f16" => loss(0.0, 0.0, 0.0, 0.0),
            "fp8" | "int8-int4" => loss(0.01, 0.01, 0.03, 0.02),
            "turboquant-4" => loss(0.02, 0.02, 0.05, 0.05),
            "turboquant-3.5" | "turboquant-3" => loss(0.05, 0.05, 0.10, 0.10),
            _ => loss(0.20, 0.20, 0.25, 0.25),
        };
        if options.attention == Attention::Dense { format } else { format.and(loss(0.05, 0.05, 0.05, 0.02)) }
    }

    /// Both losses together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            nll_gap: self.nll_gap + other.nll_gap,
            kl_mean: self.kl_mean + other.kl_mean,
            top1_agreement: (self.top1_agreement + other.top1_agreement - 1.0).max(0.0),
            skill_loss: self.skill_loss + other.skill_loss,
        }
    }

    /// The defaults for an artifact whose block matrices are stored as `format`.
    pub fn of(format: &str) -> Self {
        match format {
            "q8_0" => Self { nll_gap: 0.01, kl_mean: 0.01, top1_agreement: 0.97, skill_loss: 0.05 },
            "q6_k" => Self { nll_gap: 0.02, kl_mean: 0.02, top1_agreement: 0.95, skill_loss: 0.05 },
            "q4_k" => Self { nll_gap: 0.10, kl_mean: 0.10, top1_agreement: 0.85, skill_loss: 0.15 },
            "q4_0" => Self { nll_gap: 0.15, kl_mean: 0.15, top1_agreement: 0.80, skill_loss: 0.20 },
            "tq1_0" | "tq2_0" => Self { nll_gap: 0.001, kl_mean: 0.001, top1_agreement: 0.985, skill_loss: 0.05 },
            _ => Self { nll_gap: 0.001, kl_mean: 0.001, top1_agreement: 0.995, skill_loss: 0.02 },
        }
    }
}
