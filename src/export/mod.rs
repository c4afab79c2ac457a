//! Checkpoint to the files other engines load, and back: fold, plan, write aside, re-read and compare, rename.

pub mod adapter;
pub mod aside;
pub mod config;
pub mod fold;
pub mod gguf;
mod gguf_model;
mod hf_model;
pub mod import;
pub mod names;
pub mod parameter;
pub mod peft;
pub mod plan;
mod report;
pub mod safetensors_dir;
mod target;
mod ternary;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod tokenizer_gguf;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;

pub use report::{MergeCost, Report, TensorReport};
pub use target::Target;
pub use ternary::TernaryWeights;

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Spec;

/// Parameters by Hugging Face name (`Spec::parameters`): f32, on the CPU, matrices `[out, in]`.
pub type Weights = BTreeMap<String, Tensor>;

/// What is to be exported.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub spec: &'a Spec,
    pub weights: &'a Weights,
    pub tokenizer: Option<&'a Tokenizer>,
    /// What the values of ternary matrices are.
    pub ternary: TernaryWeights,
    /// `general.name` of GGUF files.
    pub name: &'a str,
}

/// Writes the artifact `target` at `out`: a file for GGUF, a directory otherwise. It appears under its name only after it has been read back
/// and every tensor found to be, bit for bit, what was planned.
///
/// # Errors
/// When no stock engine could run the artifact, the weights are not those of the spec or not finite, or the system refuses.
pub fn export(source: &Source, target: Target, out: &Path) -> Result<Report> {
    let plan = plan::plan(source.spec, target)?;
    check_weights(source)?;
    let (_, folded) = fold::fold(source.spec, source.weights)?;
    let (tensors, more_notes) = match target.matrix_format() {
        Some(_) => gguf_model::write(source, &folded, &plan, out)?,
        None => hf_model::write(source, &folded, &plan, out)?,
    };
    Ok(Report {
        format: target.name(),
        path: out.to_owned(),
        architecture: plan.architecture,
        artifact_bytes: size_on_disk(out)?,
        parameters: tensors.iter().map(|tensor| tensor.weights).sum(),
        bits_per_weight: report::bits_per_weight(&tensors, false),
        block_bits_per_weight: report::bits_per_weight(&tensors, true),
        tensors,
        notes: [plan.notes, more_notes].concat(),
        merge: None,
    })
}

/// Names, shapes and finiteness.
fn check_weights(source: &Source) -> Result<()> {
    for (name, shape) in source.spec.parameters() {
        let tensor = source.weights.get(&name).ok_or_else(|| Error::input(&name, "is missing from the weights"))?;
        if tensor.dims() != shape {
            return Err(Error::input(&name, format!("has the shape {:?} instead of {shape:?}", tensor.dims())));
        }
        if !tensor.flatten_all()?.to_vec1::<f32>()?.iter().all(|value| value.is_finite()) {
            return Err(Error::input(&name, "holds values that are not finite").fix("export an earlier checkpoint"));
        }
    }
    Ok(())
}

fn size_on_disk(path: &Path) -> Result<u64> {
    let length = |path: &Path| fs::metadata(path).map(|about| about.len()).map_err(Error::io("inspect", path));
    if !path.is_dir() {
        return length(path);
    }
    let mut total = 0;
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        total += length(&entry.map_err(Error::io("list", path))?.path())?;
    }
    Ok(total)
}
