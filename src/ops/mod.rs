//! Differentiable primitives; knows tensors, not models.
//!
//! An operation is one file: a reference composed of candle tensor operations, which runs on any candle device, and a fused CPU path
//! over the slice kernels of [`cpu`]; forward and backward side by side. Everything accumulates in f32 (losses and statistics in f64).

pub mod attention;
pub mod cpu;
pub mod cross_entropy;
pub mod cuda;
pub mod embedding;
pub mod frozen;
pub mod gated;
pub mod host;
pub mod linear;
pub mod low_rank;
pub mod norm;
pub mod rng;
pub mod rope;
pub mod ternary;
#[cfg(test)]
pub(crate) mod testing;
