//! Tests across modules, one binary.

mod layering;
mod parity;
