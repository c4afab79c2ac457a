//! Runs models from their files: an engine over the bits a file stores, never over trained tensors, on the CPU or on a GPU.
//!
//! [`Engine`] holds the weights, [`Session`] one sequence with its cache, [`sampler`] chooses tokens and [`generate`] streams text.

pub mod attention;
pub mod bench;
pub mod cache;
mod cuda;
mod decoder;
mod dense;
mod engine;
pub mod generate;
pub mod kv;
mod linear;
mod load;
mod model;
pub mod sampler;
mod session;
#[cfg(test)]
pub(crate) mod testing;

pub use engine::{Engine, Size};
pub use load::Processor;
pub use session::Session;
