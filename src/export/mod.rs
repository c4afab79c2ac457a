//! Checkpoint to the files other engines load, and back.

pub mod aside;
pub mod config;
pub mod fold;
pub mod gguf;
pub mod names;
pub mod parameter;
pub mod plan;
pub mod safetensors_dir;
mod target;

#[cfg(test)]
mod testing;

use std::collections::BTreeMap;

use candle_core::Tensor;

pub use target::Target;

/// Parameters by Hugging Face name (`Spec::parameters`): f32, on the CPU, matrices `[out, in]`.
pub type Weights = BTreeMap<String, Tensor>;
