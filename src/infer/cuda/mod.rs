//! The engine on a device: the same models, sequences and cache options as on the CPU, run by the kernels of [`ops::cuda`](crate::ops::cuda).
//!
//! Dense weights are f16 there, so results are near the CPU's and not equal to them; ternary matrices keep their integers. Everything is
//! written against [`Device`](crate::ops::cuda::Device), so that tests run whole models through emulated kernels.

mod attend;
mod cache;
mod linear;
mod model;
mod recovery;
mod select;
mod sequence;
#[cfg(test)]
mod tests;

pub(super) use model::CudaModel;
