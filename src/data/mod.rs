//! Text to batches: sources, tokenizers, shards, packing, mixing, prefetch.

pub mod builtin;
pub mod config;
pub mod mix;
pub mod pack;
pub mod random;
pub mod shard;
pub mod source;
pub mod tokenizer;

#[cfg(test)]
pub(crate) mod testing;
