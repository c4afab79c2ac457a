//! Differentiable primitives; knows tensors, not models.

pub mod cpu;
