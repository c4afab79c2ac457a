//! The training loop.

pub mod metrics;
