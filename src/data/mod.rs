//! Text to batches: sources, tokenizers, shards, packing, mixing, prefetch.

pub mod builtin;
pub mod random;
pub mod source;
pub mod tokenizer;

#[cfg(test)]
pub(crate) mod testing;
