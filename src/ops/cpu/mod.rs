//! Fused CPU kernels on plain slices.

pub mod attention;
pub mod bench;
pub mod cross_entropy;
pub mod elementwise;
pub mod gated;
pub mod gemm;
pub mod isa;
pub mod math;
pub mod norm;
pub(crate) mod prefetch;
pub mod reduce;
pub mod rope;
pub(crate) mod scratch;
pub mod ternary;
#[cfg(test)]
pub(crate) mod testing;
