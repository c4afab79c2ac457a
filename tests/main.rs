//! Tests across modules, one binary.

mod cli;
mod finetune;
mod formats;
mod golden;
mod layering;
mod parity;
mod resume;
mod support;
