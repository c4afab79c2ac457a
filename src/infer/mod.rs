//! Runs exported files: an engine on the CPU over the bits a file stores, never over trained tensors.

mod dense;
mod linear;
pub mod sampler;

pub use dense::DenseMatrix;
pub use linear::Linear;
