//! Fused CPU kernels on plain slices.
