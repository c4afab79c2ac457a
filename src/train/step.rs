//! One optimizer step: accumulate gradients over micro-batches, weighted by tokens, then clip and update.

use super::dist::{Buckets, Ranks, Reducing};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::{Decoder, GradientBuffers, Inputs, Parameters, Role};
use crate::ops::cross_entropy::Targets;
use crate::ops::host;
use crate::optim::{Movement, Optimizer, ParameterInfo, ParameterSlice, StepReport};
use crate::tape::{Gradients, Tape};
use candle_core::Tensor;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

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

/// A forward and backward pass: everything but the batches and where the gradients go.
pub struct Pass<'a> {
    pub decoder: &'a Decoder,
    pub parameters: &'a Parameters,
    pub z_loss: f32,
    /// Take the reference path of every operation.
    pub reference: bool,
    pub ranks: &'a Ranks,
    pub buckets: &'a Buckets,
}

/// What all ranks learn from a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learned {
    /// Mean over the tokens of all ranks, in nats.
    pub loss: f64,
    /// Whether some rank was told to stop.
    pub stop: bool,
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
    let (ranks, buckets) = (&Ranks::alone(), &Buckets::new(parameters));
    Ok(Pass { decoder, parameters, z_loss, reference, ranks, buckets }.run(batches, false, gradients)?.loss)
}

impl Pass<'_> {
    /// The same over the batches of all ranks, weighted by their tokens; every rank ends with the same gradients and the same loss. `stop`
    /// is whether this rank was told to stop.
    pub fn run(&self, batches: &[Arc<Batch>], stop: bool, gradients: &mut GradientBuffers) -> Result<Learned> {
        // On a thread of the pool, so that no kernel call has to wake another thread and put this one to sleep.
        rayon::scope(|_| self.accumulate(batches, stop, gradients))
    }

    fn accumulate(&self, batches: &[Arc<Batch>], stop: bool, gradients: &mut GradientBuffers) -> Result<Learned> {
        gradients.reset();
        let mut total = [weight(batches)];
        self.ranks.sum("number of tokens", &mut total)?;
        let [total] = total;
        if total == 0.0 {
            return Err(Error::input("data", "a whole step has no token to learn from").fix("look at `osprey data RECIPE`"));
        }
        let mut sum = 0.0;
        let Some((last, others)) = batches.split_last() else { return Err(Error::input("data", "a step without batches")) };
        for batch in others {
            sum += self.one(batch, total, gradients)?;
        }
        if self.ranks.is_alone() {
            sum += self.one(last, total, gradients)?;
            gradients.settle()?;
            return Ok(Learned { loss: sum / total, stop });
        }
        let mut reducing = Reducing::new(self.ranks, self.buckets, gradients);
        sum += self.one(last, total, &mut reducing)?;
        reducing.finish()?;
        let mut told = [sum, f64::from(u8::from(stop))];
        self.ranks.sum("loss", &mut told)?;
        Ok(Learned { loss: told[0] / total, stop: told[1] > 0.0 })
    }

    fn one(&self, batch: &Batch, total: f64, gradients: &mut dyn Gradients) -> Result<f64> {
        let began = Instant::now();
        let tape = if self.reference { Tape::new().reference() } else { Tape::new() };
        let targets = Targets { ids: &batch.targets, weights: &batch.weights, scale: (1.0 / total) as f32, z_loss: self.z_loss };
        let loss = self.decoder.loss(&tape, self.parameters, &inputs(batch), targets)?;
        self.ranks.tick();
        self.ranks.trace("forward", began);
        let began = Instant::now();
        let seed = Tensor::ones((), candle_core::DType::F32, self.parameters.flat().device())?;
        tape.backward(&loss.root, seed, gradients)?;
        self.ranks.trace("backward", began);
        Ok(loss.weighted_nll)
    }
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

/// [`update`] of the pieces that this rank owns, which it then gives to the others and gets from them.
pub fn update_on(
    ranks: &Ranks,
    optimizer: &mut Optimizer,
    step: u64,
    parameters: &Parameters,
    gradients: &GradientBuffers,
    measure: bool,
) -> Result<StepReport> {
    let began = Instant::now();
    let updated = update(optimizer, step, parameters, gradients, measure);
    if ranks.is_alone() {
        return updated;
    }
    ranks.trace("update", began);
    let movements = updated.as_ref().map_or_else(|_| vec![Movement::default(); parameters.list().len()], |report| report.movements.clone());
    let mut told = vec![f64::from(u8::from(updated.is_err()))];
    told.extend(movements.iter().filter(|_| measure).flat_map(|moved| [moved.change, moved.size]));
    ranks.sum("outcome of the update", &mut told)?;
    let mut report = updated?;
    if told[0] > 0.0 {
        return Err(Error::input("the update", format!("of step {} failed on another rank", step + 1)));
    }
    report.movements = told[1..].chunks_exact(2).map(|sums| Movement { change: sums[0], size: sums[1] }).collect();
    let mut pending = vec![];
    for (owner, range) in owned(optimizer, parameters) {
        // SAFETY: values are next read in the pass that follows, and `finish_all` comes before.
        pending.extend(unsafe { ranks.start_broadcast("updated weights", owner, parameters.flat(), range)? });
    }
    ranks.finish_all(pending)?;
    Ok(report)
}

/// Stretches of the flat buffer with the rank that updates them, in order, neighbours of one owner joined.
fn owned(optimizer: &Optimizer, parameters: &Parameters) -> Vec<(usize, Range<usize>)> {
    let place = |piece: &crate::optim::shard::Piece| {
        let offset = parameters.list()[piece.parameter].offset;
        (piece.owner, offset + piece.range.start..offset + piece.range.end)
    };
    let mut all: Vec<_> = optimizer.pieces().iter().map(place).collect();
    all.sort_by_key(|(_, range)| range.start);
    let mut joined: Vec<(usize, Range<usize>)> = vec![];
    for (owner, range) in all {
        match joined.last_mut() {
            Some((last, before)) if *last == owner && before.end == range.start => before.end = range.end,
            _ => joined.push((owner, range)),
        }
    }
    joined
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
