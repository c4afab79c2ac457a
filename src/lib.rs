//! Osprey trains language models that stay good when they are quantized, and proves it.
//!
//! Data flows `recipe -> data -> model (ops on the tape) -> optim -> train -> checkpoint -> quant -> export -> infer -> validate`;
//! code imports only leftwards in the order `error | ops, tape | data | model | optim | checkpoint | quant | export | train | infer |
//! validate | recipe | cli` (`tests/layering.rs` checks it).

pub mod checkpoint;
pub mod cli;
pub mod data;
pub mod error;
pub mod export;
pub mod infer;
pub mod model;
pub mod ops;
pub mod optim;
pub mod quant;
pub mod recipe;
pub mod tape;
pub mod train;
pub mod validate;
