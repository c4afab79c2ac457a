//! One optimizer step: accumulate gradients over micro-batches, weighted by tokens, then clip and update.

use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::{Decoder, GradientBuffers, Inputs, Parameters, Role};
use crate::ops::cross_entropy::Targets;
use crate::ops::host;
use crate::optim::{Optimizer, ParameterInfo, ParameterSlice, StepReport};
use crate::tape::Tape;
use candle_core::Tensor;
use std::sync::Arc;

/// What the decoder reads of a batch.
pub fn inputs(batch: &Batch) -> Inputs {
    Inputs {
        batch: batch.rows,
        tokens: batch.context,
        ids: Arc::new(batch.inputs.clone()),
        positions: Arc::new(batch.positions.clone()),
        document_starts: Some(Arc::new(batch.document_starts.clone())),
    }
}

/// Sum of the weights of all targets.
pub fn weight(batches: &[Arc<Batch>]) -> f64 {
    batches.iter().flat_map(|b| &b.weights).map(|&w| f64::from(w)).sum()
}

/// Adds the gradient of the mean loss over all `batches` into `gradients` (which is reset first) and returns that mean, in nats.
pub fn gradients(
    decoder: &Decoder,
    parameters: &Parameters,
    batches: &[Arc<Batch>],
    z_loss: f32,
    reference: bool,
    gradients: &mut GradientBuffers,
) -> Result<f64> {
    // On a thread of the pool, so that no kernel call has to wake another thread and put this one to sleep.
    rayon::scope(|_| accumulate(decoder, parameters, batches, z_loss, reference, gradients))
}

fn accumulate(
    decoder: &Decoder,
    parameters: &Parameters,
    batches: &[Arc<Batch>],
    z_loss: f32,
    reference: bool,
    gradients: &mut GradientBuffers,
) -> Result<f64> {
    gradients.reset();
    let total = weight(batches);
    if total == 0.0 {
        return Err(Error::input("data", "a whole step has no token to learn from").fix("look at `osprey data RECIPE`"));
    }
    let mut sum = 0.0;
    for batch in batches {
        let tape = if reference { Tape::new().reference() } else { Tape::new() };
        let targets = Targets { ids: &batch.targets, weights: &batch.weights, scale: (1.0 / total) as f32, z_loss };
        let loss = decoder.loss(&tape, parameters, &inputs(batch), targets)?;
        sum += loss.weighted_nll;
        let seed = Tensor::ones((), candle_core::DType::F32, parameters.flat().device())?;
        tape.backward(&loss.root, seed, gradients)?;
    }
    gradients.settle()?;
    Ok(sum / total)
}

/// The optimizer's view of the parameters, in the order of the registry.
pub fn parameter_infos(parameters: &Parameters, heads: usize, kv_heads: usize) -> Vec<ParameterInfo> {
    let describe = |p: &crate::model::Parameter| {
        let role = match p.role {
            Role::Hidden | Role::Adapter => crate::optim::Role::HiddenMatrix,
            Role::Embedding => crate::optim::Role::Embedding,
            Role::Head => crate::optim::Role::Head,
            Role::Gain => crate::optim::Role::Gain,
        };
        let blocks = match p.name.rsplit('.').nth(1) {
            Some("q_proj") => heads,
            Some("k_proj" | "v_proj") => kv_heads,
            _ => 1,
        };
        let part = p.name.match_indices('.').rev().nth(1).map_or("", |(at, _)| &p.name[at + 1..]);
        let rate = parameters.adapter().map_or(1.0, |adapter| adapter.rate(part));
        ParameterInfo::new(p.name.clone(), p.shape.clone(), role).with_blocks(blocks).with_rate(rate)
    };
    parameters.list().iter().map(describe).collect()
}

/// Clips, updates, and reports. With `measure` the report says how far each parameter moved.
pub fn update(
    optimizer: &mut Optimizer,
    step: u64,
    parameters: &Parameters,
    gradients: &GradientBuffers,
    measure: bool,
) -> Result<StepReport> {
    if !host::is_host(parameters.flat()) {
        return update_through_host(optimizer, step, parameters, gradients, measure);
    }
    let mut report = None;
    host::write(parameters.flat(), |values| {
        // A failure of the inner write would be a bug that the `expect` below reports.
        let _ = host::write(gradients.flat(), |slopes| report = Some(run(optimizer, step, parameters, values, slopes, measure)));
    })?;
    report.expect("gradients live where parameters live")
}

/// The same for tensors on a device: state and update stay in main memory.
fn update_through_host(
    optimizer: &mut Optimizer,
    step: u64,
    parameters: &Parameters,
    gradients: &GradientBuffers,
    measure: bool,
) -> Result<StepReport> {
    let mut values = parameters.flat().to_vec1::<f32>()?;
    let mut slopes = gradients.flat().to_vec1::<f32>()?;
    let report = run(optimizer, step, parameters, &mut values, &mut slopes, measure)?;
    let device = parameters.flat().device();
    parameters.flat().slice_set(&Tensor::from_vec(values, parameters.total(), device)?, 0, 0)?;
    Ok(report)
}

fn run(
    optimizer: &mut Optimizer,
    step: u64,
    parameters: &Parameters,
    values: &mut [f32],
    slopes: &mut [f32],
    measure: bool,
) -> Result<StepReport> {
    let mut slices = slices(parameters, values, slopes);
    rayon::scope(|_| if measure { optimizer.step_measured(step, &mut slices) } else { optimizer.step(step, &mut slices) })
}

/// Cuts the flat buffers at the parameters' offsets; the result is in the order of the registry.
fn slices<'a>(parameters: &'a Parameters, values: &'a mut [f32], slopes: &'a mut [f32]) -> Vec<ParameterSlice<'a>> {
    let list = parameters.list();
    let mut order: Vec<usize> = (0..list.len()).collect();
    order.sort_by_key(|&i| list[i].offset);
    let (mut values, mut slopes) = (values, slopes);
    let mut cut: Vec<(usize, ParameterSlice<'a>)> = Vec::with_capacity(list.len());
    for index in order {
        let (data, later) = values.split_at_mut(list[index].len());
        let (gradient, later_slopes) = slopes.split_at_mut(list[index].len());
        (values, slopes) = (later, later_slopes);
        cut.push((index, ParameterSlice { name: &list[index].name, data, gradient }));
    }
    cut.sort_by_key(|(index, _)| *index);
    cut.into_iter().map(|(_, slice)| slice).collect()
}
