//! Text to batches: sources, tokenizers, shards, packing, mixing, prefetch.
