//! The gradient proof: before step 1 every trainable parameter must receive a finite, non-zero gradient.
//!
//! Parameters that start at zero can hide a broken connection behind them (or be hidden by one), so in the probe they are given small
//! random values; training then starts from the true initialization. Embedding rows whose token does not occur are no fault.

use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::{Decoder, GradientBuffers, Parameters};
use crate::ops::host::{self, host};
use crate::ops::rng::Stream;
use std::sync::Arc;

/// Runs one forward and backward pass over `batches` and checks every parameter's gradient.
///
/// # Errors
/// Names the first parameter whose gradient is missing, zero or not finite.
pub fn prove_gradients(decoder: &Decoder, parameters: &Parameters, batches: &[Arc<Batch>], reference: bool) -> Result<()> {
    let probe = perturbed(parameters)?;
    let mut gradients = GradientBuffers::new(&probe)?;
    super::step::gradients(decoder, &probe, batches, 0.0, reference, &mut gradients)?;
    let all = gradients.flat().to_device(&candle_core::Device::Cpu)?;
    let noise = NOISE * largest(&host(&all)?);
    for (index, parameter) in probe.list().iter().enumerate() {
        let gradient = gradients.view(index).to_device(&candle_core::Device::Cpu)?;
        if let Some(fault) = fault(&host(&gradient)?, noise) {
            let advice = "this is a defect of the model's wiring or of the recipe: no training was done";
            return Err(Error::input(&parameter.name, format!("its gradient {fault}")).fix(advice));
        }
    }
    Ok(())
}

/// A copy in which parameters that are zero everywhere hold small random values.
fn perturbed(parameters: &Parameters) -> Result<Parameters> {
    let copy = parameters.duplicate()?;
    for parameter in copy.list() {
        let value = parameter.value().to_device(&candle_core::Device::Cpu)?;
        if host(&value)?.iter().any(|&x| x != 0.0) {
            continue;
        }
        let mut stream = Stream::new(0, &parameter.name);
        host::write(&value, |elements| elements.iter_mut().for_each(|x| *x = 0.02 * stream.normal() as f32))?;
        if !host::is_host(parameter.value()) {
            parameter.value().slice_set(&value.to_device(parameter.value().device())?, 0, 0)?;
        }
    }
    Ok(copy)
}

/// What rounding leaves of a gradient that is zero by the mathematics, as a share of the largest gradient of the model.
const NOISE: f32 = 1e-7;

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, g| most.max(g.abs()))
}

fn fault(gradient: &[f32], noise: f32) -> Option<&'static str> {
    if gradient.iter().any(|g| !g.is_finite()) {
        return Some("is not finite");
    }
    (largest(gradient) <= noise).then_some("is zero: nothing that the loss depends on reads this parameter")
}
