//! Fused CPU kernels on plain slices.

pub mod gemm;
pub mod isa;
mod scratch;
