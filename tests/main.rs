//! Tests across modules, one binary.

mod cli;
mod formats;
mod golden;
mod layering;
mod parity;
#[cfg(feature = "mpi")]
mod ranks;
mod resume;
mod support;
