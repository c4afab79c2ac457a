//! Fused CPU kernels on plain slices.

pub mod bench;
pub mod gemm;
pub mod isa;
mod scratch;
pub mod ternary;
