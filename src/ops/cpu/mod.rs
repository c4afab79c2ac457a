//! Fused CPU kernels on plain slices.

pub mod isa;
