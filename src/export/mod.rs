//! Checkpoint to the files other engines load, and back.

pub mod aside;
pub mod gguf;
