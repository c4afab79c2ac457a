//! One sequence on an engine: its cache, and the three ways on: many tokens, one token, back.

use super::engine::{Engine, Work};
use super::kv::{Format, Store};
use crate::error::{Error, Result};
use crate::ops::cpu::rope::RotaryTable;

/// Tokens that pass through the blocks together: enough for the matrix products, little enough for the caches of the processor.
const CHUNK: usize = 512;

/// A sequence in progress.
pub struct Session<'e> {
    engine: &'e Engine,
    rope: RotaryTable,
    stores: Vec<Box<dyn Store>>,
    work: Work,
    length: usize,
    capacity: usize,
}

impl<'e> Session<'e> {
    /// An empty sequence of at most `capacity` tokens, which the model's context must cover.
    pub fn new(engine: &'e Engine, format: Format, capacity: usize) -> Result<Self> {
        let spec = engine.spec();
        if capacity > spec.context {
            return Err(Error::input("context", format!("{capacity} tokens are more than the {} the model was made for", spec.context))
                .fix(format!("ask for at most {}", spec.context)));
        }
        Ok(Self {
            engine,
            rope: RotaryTable::from_frequencies(&spec.rotary_frequencies(), capacity),
            stores: (0..spec.layers).map(|_| format.store(spec.kv_heads, spec.head_dim)).collect(),
            work: Work::default(),
            length: 0,
            capacity,
        })
    }

    /// The engine it runs on.
    pub fn engine(&self) -> &'e Engine {
        self.engine
    }

    /// Tokens seen.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Goes back to the first `length` tokens; their keys and values stay.
    pub fn truncate(&mut self, length: usize) {
        if length < self.length {
            self.stores.iter_mut().for_each(|store| store.truncate(length));
            self.length = length;
        }
    }

    /// Appends `ids` and returns what the head reads at each of them, `[ids, dim]`; [`Engine::logits`] turns rows of it into logits.
    ///
    /// # Errors
    /// When the sequence would outgrow its capacity or an id is beyond the vocabulary; the sequence then stays as it was.
    pub fn hidden(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let mut hidden = Vec::with_capacity(ids.len() * self.engine.spec().dim);
        on_pool(|| self.run(ids, |rows| hidden.extend_from_slice(rows)))?;
        Ok(hidden)
    }

    /// Appends `ids`, at least one, and returns the logits after the last of them, `[vocab]`.
    ///
    /// # Errors
    /// As [`Session::hidden`], and when `ids` is empty.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        if ids.is_empty() {
            return Err(Error::input("prompt", "has no tokens").fix("give at least one"));
        }
        let engine = self.engine;
        on_pool(|| {
            let mut last = vec![];
            self.run(ids, |rows| {
                last.clear();
                last.extend_from_slice(&rows[rows.len() - engine.spec().dim..]);
            })?;
            Ok(engine.logits(&last))
        })
    }

    /// Appends `ids` and returns the logits after each of them, `[ids, vocab]`; for sequences whose logits fit in memory.
    ///
    /// # Errors
    /// As [`Session::hidden`].
    pub fn prefill_all(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let hidden = self.hidden(ids)?;
        Ok(self.engine.logits(&hidden))
    }

    /// Appends one token and returns the logits after it, `[vocab]`.
    ///
    /// # Errors
    /// As [`Session::hidden`].
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>> {
        self.prefill(&[id])
    }

    fn run(&mut self, ids: &[u32], mut take: impl FnMut(&[f32])) -> Result<()> {
        self.check(ids)?;
        for chunk in ids.chunks(CHUNK) {
            self.engine.forward(chunk, self.length, &self.rope, &mut self.stores, &mut self.work)?;
            self.length += chunk.len();
            take(&self.work.normalized);
        }
        Ok(())
    }

    fn check(&self, ids: &[u32]) -> Result<()> {
        if ids.len() > self.capacity - self.length {
            let cause = format!("{} tokens after {} are more than the {} that fit", ids.len(), self.length, self.capacity);
            return Err(Error::input("context", cause).fix("shorten the text, or ask for a longer context if the model allows it"));
        }
        let vocab = self.engine.spec().vocab;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(Error::input("token", format!("id {id} is beyond the vocabulary of {vocab}"))
                .fix("use the tokenizer that the model was trained with")),
            None => Ok(()),
        }
    }
}

/// Runs `work` on a thread of the pool: a parallel kernel called from there starts at once, while one called from any other thread would
/// put that thread to sleep and wake it again, for each of a token's many products.
fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

#[cfg(test)]
mod tests;
