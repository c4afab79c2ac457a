//! Checkpoint to the files other engines load, and back.

pub mod aside;
pub mod config;
pub mod fold;
pub mod gguf;
pub mod parameter;
pub mod safetensors_dir;

#[cfg(test)]
mod testing;

use std::collections::BTreeMap;

use candle_core::Tensor;

/// Parameters by Hugging Face name (`Spec::parameters`): f32, on the CPU, matrices `[out, in]`.
pub type Weights = BTreeMap<String, Tensor>;
