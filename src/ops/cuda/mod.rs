//! CUDA kernels from Rust: memory, copies and launches, the same for a GPU and for the emulation that tests use.
//!
//! [`Device`] is what code that launches kernels is written against. [`Cuda`] is a GPU; without the feature `cuda` it cannot be opened.
//! In tests, `Emulated` compiles the same `kernels/*.cu` with the system's C++ compiler and runs them on the CPU, checked for races,
//! divergent barriers and accesses out of bounds. How kernels are written is told in `kernels/README.md`.

pub mod attention;
pub mod bench;
pub mod check;
pub mod dense;
mod device;
pub mod embedding;
#[cfg(test)]
pub(crate) mod emulated;
pub mod gated;
#[cfg(not(feature = "cuda"))]
#[path = "disabled.rs"]
mod gpu;
#[cfg(feature = "cuda")]
#[path = "enabled.rs"]
mod gpu;
pub mod norm;
pub mod rope;
mod stacked;
pub mod ternary;

pub use crate::arguments;
pub use device::{Arg, Buffer, Device, Element, Place, fits};
#[cfg(test)]
pub(crate) use emulated::{Emulated, Order};
pub use gpu::Cuda;
