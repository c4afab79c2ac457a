//! When a step goes wrong: keep the weights and the batches that did it, and run just them again on request.

use super::Setup;
use super::state::{State, read_weights};
use super::step;
use crate::checkpoint::{self, Payload};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::GradientBuffers;
use crate::ops::host::host;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;

const BATCHES: &str = "batches.json";

/// What is needed to run a failed step again, beside the weights.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    cause: String,
    batches: Vec<Batch>,
}

/// Saves the step that `state` was about to take into `RUN/failed/` and returns the error, now saying where.
pub(super) fn keep(setup: &Setup, state: &State, batches: &[Arc<Batch>], error: Error) -> Result<Error> {
    let kept = Kept { cause: error.to_string(), batches: batches.iter().map(|batch| Batch::clone(batch)).collect() };
    let folder = setup.run_dir.join("failed");
    let json = serde_json::to_vec(&kept).map_err(|e| Error::file(&folder, e))?;
    let saved = state.write(setup, &folder, None, vec![(BATCHES.to_owned(), Payload::Bytes(json.into()))])?;
    let advice = format!("no weight was changed; run just this step again with `osprey train RECIPE --replay {}`", saved.display());
    Ok(Error::input(format!("step {}", state.step + 1), error).fix(advice))
}

/// What a replayed step does: the loss and, for every parameter, the norm of its gradient.
#[derive(Clone, Debug, Serialize)]
pub struct Replay {
    /// The optimizer step that failed, counted from 1.
    pub step: u64,
    /// Why it failed then.
    pub cause: String,
    pub loss: f64,
    /// In name order.
    pub gradient_norms: Vec<(String, f64)>,
}

/// Runs the step kept in `path` (the folder or a file in it), without updating anything.
pub fn replay(setup: &Setup, path: &Path) -> Result<Replay> {
    let folder = if path.is_file() { path.parent().unwrap_or(path) } else { path };
    let saved = checkpoint::open(folder)?;
    let kept: Kept = saved.json(BATCHES)?;
    let batches: Vec<Arc<Batch>> = kept.batches.into_iter().map(Arc::new).collect();
    if !batches.iter().all(|batch| is_sound(batch, setup)) {
        return Err(
            Error::file(&folder.join(BATCHES), "does not fit the recipe's model").fix("replay with the recipe of the run that failed")
        );
    }
    let parameters = read_weights(setup, &saved)?;
    let decoder = setup.decoder().blended(setup.blend(saved.step()));
    let mut gradients = GradientBuffers::new(&parameters)?;
    let loss = step::gradients(&decoder, &parameters, &batches, setup.train.z_loss, setup.reference, &mut gradients)?;
    let norm = |index: usize| -> Result<f64> {
        let gradient = gradients.view(index).to_device(&candle_core::Device::Cpu)?;
        Ok(host(&gradient)?.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt())
    };
    let names = parameters.list().iter().enumerate();
    let gradient_norms = names.map(|(index, p)| Ok((p.name.clone(), norm(index)?))).collect::<Result<_>>()?;
    Ok(Replay { step: saved.step() + 1, cause: kept.cause, loss, gradient_norms })
}

fn is_sound(batch: &Batch, setup: &Setup) -> bool {
    let tokens = batch.rows.saturating_mul(batch.context);
    let lengths = [batch.inputs.len(), batch.targets.len(), batch.weights.len(), batch.positions.len(), batch.document_starts.len()];
    let known = |ids: &[u32]| ids.iter().all(|&id| (id as usize) < setup.spec.vocab);
    let in_row = |values: &[u32]| values.iter().all(|&at| (at as usize) < batch.context);
    lengths == [tokens; 5]
        && batch.context <= setup.row_tokens
        && known(&batch.inputs)
        && known(&batch.targets)
        && in_row(&batch.positions)
        && in_row(&batch.document_starts)
}
