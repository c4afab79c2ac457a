//! Text to batches: sources, tokenizers, shards, packing, mixing, prefetch.

pub mod random;
pub mod tokenizer;

#[cfg(test)]
pub(crate) mod testing;
