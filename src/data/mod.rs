//! Text to batches: sources, tokenizers, shards, packing, mixing, prefetch.
//!
//! [`Config`] names sources; [`Dataset::open`] tokenizes them into memory-mapped shards that are reused while content and tokenizer
//! stay the same; [`Loader`] deals rows to batches in an order that is a pure function of (data, seed, row); [`report()`] shows what a
//! batch contains. Everything random comes from counters ([`random`]), so nothing depends on threads or on what ran before.

pub mod bins;
pub mod builtin;
pub mod chat;
pub mod chat_report;
pub mod config;
pub mod dataset;
pub mod hub;
pub mod loader;
pub mod mix;
pub mod pack;
pub mod random;
pub mod report;
pub mod shard;
pub mod source;
pub mod tokenizer;
mod whole;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use builtin::{Probe, Skill, long_probes, skill_probes};
pub use config::Config;
pub use dataset::{Dataset, Part};
pub use loader::{Cursor, Loader, Shape};
pub use pack::Batch;
pub use report::{Report, report};
pub use tokenizer::Tokenizer;
