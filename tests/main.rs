//! Tests across modules, one binary.

mod chat;
mod cli;
mod finetune;
mod formats;
mod golden;
mod hub;
mod layering;
mod parity;
#[cfg(feature = "mpi")]
mod ranks;
mod resume;
mod support;
