//! What an export reports.

use std::path::PathBuf;

use serde::Serialize;

use super::names::is_block_matrix;
use crate::error::{Error, Result};
use crate::quant::Format;

/// One stored tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The parameter's Hugging Face name.
    pub parameter: String,
    pub format: &'static str,
    pub weights: u64,
    pub bytes: u64,
    /// Root of the mean squared difference between stored and intended values, relative to the root mean square of the latter.
    pub relative_error: f64,
}

impl TensorReport {
    /// Decodes `bytes` and compares them with the values that were to be stored.
    ///
    /// # Errors
    /// When a stored value is not finite, which happens to weights beyond the range of f16.
    pub(super) fn compare(parameter: &str, format: &'static dyn Format, bytes: &[u8], intended: &[f32]) -> Result<Self> {
        let mut stored = vec![0.0; intended.len()];
        format.decode_row(bytes, &mut stored)?;
        if stored.iter().any(|value| !value.is_finite()) {
            return Err(Error::input(parameter, format!("has weights outside the range of {}", format.layout().name))
                .fix("export as gguf-bf16 or hf, and look at the training run: such weights are a sign of divergence"));
        }
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
        let difference = square(&mut stored.iter().zip(intended).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let size = square(&mut intended.iter().map(|value| f64::from(*value)));
        let relative_error = if difference == 0.0 { 0.0 } else { (difference / size).sqrt() };
        let (weights, bytes) = (intended.len() as u64, bytes.len() as u64);
        Ok(Self { parameter: parameter.to_owned(), format: format.layout().name, weights, bytes, relative_error })
    }
}

/// An artifact that was written, read back and found to be what was planned.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub format: &'static str,
    pub path: PathBuf,
    /// llama.cpp's architecture or the Hugging Face class.
    pub architecture: String,
    /// Size of the file, or of all files of the directory.
    pub artifact_bytes: u64,
    pub parameters: u64,
    /// Over all tensors.
    pub bits_per_weight: f64,
    /// Over the blocks' matrices, which is where the formats differ.
    pub block_bits_per_weight: f64,
    pub tensors: Vec<TensorReport>,
    /// What a user should know, one sentence each.
    pub notes: Vec<String>,
    /// What the merge of an adapter into a ternary base cost.
    pub merge: Option<MergeCost>,
}

/// An adapter merged into a ternary base: most of a change smaller than half a level is lost.
#[derive(Clone, Debug, Serialize)]
pub struct MergeCost {
    /// Nats per token with the adapter beside its base.
    pub nll_beside: f64,
    /// Nats per token of the merged model.
    pub nll_merged: f64,
    /// The most that the second may exceed the first by.
    pub limit: f64,
}

impl MergeCost {
    /// Nats per token.
    pub fn rise(&self) -> f64 {
        self.nll_merged - self.nll_beside
    }
}

impl std::fmt::Display for MergeCost {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (beside, merged, rise) = (self.nll_beside, self.nll_merged, self.rise());
        write!(
            formatter,
            "the merge into the ternary base costs {rise:+.4} nats per token ({beside:.4} beside, {merged:.4} merged; at most {})",
            self.limit
        )
    }
}

/// Bits per weight of the chosen tensors; 0 for none.
pub(super) fn bits_per_weight(tensors: &[TensorReport], blocks_only: bool) -> f64 {
    let chosen = || tensors.iter().filter(|tensor| !blocks_only || is_block_matrix(&tensor.parameter));
    let (weights, bytes) = chosen().fold((0, 0), |(weights, bytes), tensor| (weights + tensor.weights, bytes + tensor.bytes));
    if weights == 0 { 0.0 } else { bytes as f64 * 8.0 / weights as f64 }
}
