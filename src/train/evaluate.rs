//! Loss on held-out tokens, plain and quantized as deployed, with outlier statistics from the same pass.

use super::step;
use crate::data::Batch;
use crate::error::Result;
use crate::export::fold::fold;
use crate::model::statistics::Statistics;
use crate::model::{Decoder, LinearKind, Observer, Parameters, Spec};
use crate::ops::cpu::ternary::PackedTernary;
use crate::ops::cross_entropy::{Targets, linear_cross_entropy};
use crate::ops::host::host;
use crate::quant::simulate::{RoundActivations, Scheme, round_weights};
use crate::tape::Tape;
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// Losses in nats per token.
#[derive(Clone, Debug)]
pub struct Evaluation {
    pub loss: f64,
    /// Adapters: the loss itself, since they stay beside their base. Ternary faces: the deployed arithmetic, with EmbProj folded and embedding and head rounded to f16. Dense faces: W4A4KV4.
    pub loss_quantized: f64,
    /// W4A4, for dense faces.
    pub loss_w4a4: Option<f64>,
    pub statistics: Statistics,
    /// Share of zero codes in all ternary matrices.
    pub zero_fraction: Option<f64>,
}

/// Evaluates on `batches`.
pub fn evaluate(decoder: &Decoder, parameters: &Parameters, batches: &[Arc<Batch>]) -> Result<Evaluation> {
    let statistics = Statistics::default();
    let loss = mean_loss(decoder, parameters, batches, Some(&statistics))?;
    let spec = decoder.spec();
    if parameters.adapter().is_some() {
        // An adapter is deployed as it was trained: beside its base, in whatever bits that is.
        return Ok(Evaluation { loss, loss_quantized: loss, loss_w4a4: None, statistics, zero_fraction: None });
    }
    if spec.linear == LinearKind::Ternary {
        let (deployed, folded) = deployed(spec, parameters)?;
        let loss_quantized = mean_loss(&Decoder::new(deployed, false), &folded, batches, None)?;
        return Ok(Evaluation { loss, loss_quantized, loss_w4a4: None, statistics, zero_fraction: Some(zero_fraction(parameters)?) });
    }
    let rounded = round_weights(parameters)?;
    let under = |scheme| mean_loss(decoder, &rounded, batches, Some(&RoundActivations::new(spec, scheme)));
    Ok(Evaluation { loss, loss_quantized: under(Scheme::W4A4Kv4)?, loss_w4a4: Some(under(Scheme::W4A4)?), statistics, zero_fraction: None })
}

/// The model as a file holds it: folded, embedding and head in f16. Block matrices keep their latent values: the forward pass rounds them
/// to the very codes that the file stores.
fn deployed(spec: &Spec, parameters: &Parameters) -> Result<(Spec, Parameters)> {
    let (spec, mut tensors) = fold(spec, &parameters.tensors())?;
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        if let Some(tensor) = tensors.get_mut(name) {
            *tensor = tensor.to_dtype(DType::F16)?.to_dtype(DType::F32)?;
        }
    }
    let folded = Parameters::from_tensors(&spec, &tensors, parameters.flat().device())?;
    Ok((spec, folded))
}

fn zero_fraction(parameters: &Parameters) -> Result<f64> {
    let (mut zeros, mut total) = (0.0, 0.0);
    for parameter in parameters.list() {
        if !parameter.name.ends_with("_proj.weight") {
            continue;
        }
        let value = parameter.value().to_device(&candle_core::Device::Cpu)?;
        let packed = PackedTernary::from_weights(&host(&value)?, parameter.shape[0], parameter.shape[1]);
        zeros += packed.zero_fraction() * parameter.len() as f64;
        total += parameter.len() as f64;
    }
    Ok(zeros / total)
}

fn mean_loss(decoder: &Decoder, parameters: &Parameters, batches: &[Arc<Batch>], observer: Option<&dyn Observer>) -> Result<f64> {
    let mut sum = 0.0;
    for batch in batches {
        let tape = Tape::evaluate();
        let hidden = decoder.hidden(&tape, parameters, &step::inputs(batch), observer)?;
        let targets = Targets { ids: &batch.targets, weights: &batch.weights, scale: 1.0, z_loss: 0.0 };
        sum += linear_cross_entropy(&tape, &hidden, &decoder.head(parameters)?, targets)?.weighted_nll;
    }
    Ok(sum / step::weight(batches))
}

/// The parameters' values as host tensors, for writing.
pub fn host_tensors(parameters: &Parameters) -> Result<std::collections::BTreeMap<String, Tensor>> {
    parameters.tensors().into_iter().map(|(name, tensor)| Ok((name, tensor.to_device(&candle_core::Device::Cpu)?))).collect()
}
