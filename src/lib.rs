//! Osprey trains language models that stay good when they are quantized, and proves it.
//!
//! Data flows `recipe -> data -> model (ops on the tape) -> optim -> train -> checkpoint -> quant -> export -> infer -> validate`;
//! code imports only leftwards in the order of the modules below (`tests/layering.rs` checks it).

pub mod error;
pub mod ops;
pub mod tape;
pub mod data;
pub mod model;
pub mod optim;
pub mod checkpoint;
pub mod quant;
pub mod export;
pub mod train;
pub mod infer;
pub mod validate;
pub mod recipe;
pub mod cli;
