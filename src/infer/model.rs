//! What an engine asks of the place where its weights are: the CPU or a device.

use super::cache::{Counters, Options, Times};
use super::kv::Format;
use crate::error::{Error, Result};

/// Weights, ready to run.
pub(super) trait Model: Send + Sync {
    /// Logits of rows of hidden states (`[rows, dim]`), `[rows, vocab]`.
    fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>>;

    /// The most exact way it has to store keys and values.
    fn exact_cache(&self) -> Format;

    /// An empty sequence of at most `capacity` tokens, which the model's context covers.
    fn sequence<'m>(&'m self, options: &Options, capacity: usize) -> Result<Box<dyn Sequence + 'm>>;
}

/// A sequence in progress. Its callers have checked that `ids` are in the vocabulary and fit its capacity, and keep count of positions.
pub(super) trait Sequence: Send {
    /// Appends `ids` at positions from `first` on and returns what the head reads at each of them, `[ids, dim]`.
    fn hidden(&mut self, ids: &[u32], first: usize) -> Result<Vec<f32>>;

    /// Appends `ids`, at least one, at positions from `first` on and returns the logits after the last of them, `[vocab]`.
    fn logits_after(&mut self, ids: &[u32], first: usize) -> Result<Vec<f32>>;

    /// Forgets the positions from `positions` on.
    fn truncate(&mut self, positions: usize);

    /// What attention did since the sequence began, truncated parts included.
    fn counters(&self) -> Counters;

    /// For benchmarks: runs `ids` from the start and appends their keys and values `copies` times, so that a long cache of a model's own
    /// numbers is there without the cost of a long prompt. The sequence is empty before.
    fn repeat(&mut self, _ids: &[u32], _copies: usize) -> Result<()> {
        Err(Error::input("device", "fills no caches for benchmarks").fix("measure on the CPU"))
    }

    /// Where the time went since the sequence began.
    fn times(&self) -> Times {
        Times::default()
    }
}
