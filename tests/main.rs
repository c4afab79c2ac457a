//! Tests across modules, one binary.

mod chat;
mod cli;
mod finetune;
mod formats;
mod golden;
mod layering;
mod parity;
mod resume;
mod support;
