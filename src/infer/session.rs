//! One sequence on an engine: its cache, and the three ways on: many tokens, one token, back.

use super::cache::{Counters, Options, Times};
use super::engine::Engine;
use super::model::Sequence;
use crate::error::{Error, Result};

/// A sequence in progress.
pub struct Session<'e> {
    engine: &'e Engine,
    options: Options,
    sequence: Box<dyn Sequence + 'e>,
    length: usize,
    capacity: usize,
}

impl<'e> Session<'e> {
    /// An empty sequence of at most `capacity` tokens, which the model's context must cover. `options` may be a bare
    /// [`Format`](super::kv::Format).
    ///
    /// # Errors
    /// When the context or the machine's memory is too small, or the options do not fit the model, the device or each other.
    pub fn new(engine: &'e Engine, options: impl Into<Options>, capacity: usize) -> Result<Self> {
        let options = options.into();
        let spec = engine.spec();
        if capacity > spec.context {
            return Err(Error::input("context", format!("{capacity} tokens are more than the {} the model was made for", spec.context))
                .fix(format!("ask for at most {}", spec.context)));
        }
        Self::beyond(engine, options, capacity)
    }

    /// [`Session::new`] whatever the model's context, for benchmarks.
    pub(super) fn beyond(engine: &'e Engine, options: Options, capacity: usize) -> Result<Self> {
        Ok(Self { engine, sequence: engine.model().sequence(&options, capacity)?, options, length: 0, capacity })
    }

    /// Runs `ids` and appends their keys and values `copies` times to the empty sequence, for benchmarks.
    pub(super) fn repeat(&mut self, ids: &[u32], copies: usize) -> Result<()> {
        assert!(self.is_empty() && ids.len() * copies <= self.capacity, "room for copies");
        self.check(ids)?;
        self.sequence.repeat(ids, copies)?;
        self.length = ids.len() * copies;
        Ok(())
    }

    /// Where the time went since the session began.
    pub(super) fn times(&self) -> Times {
        self.sequence.times()
    }

    /// The engine it runs on.
    pub fn engine(&self) -> &'e Engine {
        self.engine
    }

    /// How it keeps and reads keys and values.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What its attention did since it began, truncated parts included.
    pub fn counters(&self) -> Counters {
        self.sequence.counters()
    }

    /// Bytes per token that attention reads when it reads every page, over all layers.
    ///
    /// # Errors
    /// None once the session exists.
    pub fn kv_bytes_per_token(&self) -> Result<f64> {
        let spec = self.engine.spec();
        Ok(spec.layers as f64 * self.options.format.bytes_per_token(spec.kv_heads, spec.head_dim)?)
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
            self.sequence.truncate(length);
            self.length = length;
        }
    }

    /// Appends `ids` and returns what the head reads at each of them, `[ids, dim]`; [`Engine::logits`] turns rows of it into logits.
    ///
    /// # Errors
    /// When the sequence would outgrow its capacity or an id is beyond the vocabulary; the sequence then stays as it was. When a device fails.
    pub fn hidden(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.append(ids, |sequence, first| sequence.hidden(ids, first))
    }

    /// Appends `ids`, at least one, and returns the logits after the last of them, `[vocab]`.
    ///
    /// # Errors
    /// As [`Session::hidden`], and when `ids` is empty.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        if ids.is_empty() {
            return Err(Error::input("prompt", "has no tokens").fix("give at least one"));
        }
        self.append(ids, |sequence, first| sequence.logits_after(ids, first))
    }

    /// Appends `ids` and returns the logits after each of them, `[ids, vocab]`; for sequences whose logits fit in memory.
    ///
    /// # Errors
    /// As [`Session::hidden`].
    pub fn prefill_all(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let hidden = self.hidden(ids)?;
        self.engine.logits(&hidden)
    }

    /// Appends one token and returns the logits after it, `[vocab]`.
    ///
    /// # Errors
    /// As [`Session::hidden`].
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>> {
        self.prefill(&[id])
    }

    fn append<T>(&mut self, ids: &[u32], run: impl FnOnce(&mut dyn Sequence, usize) -> Result<T>) -> Result<T> {
        self.check(ids)?;
        let found = run(&mut *self.sequence, self.length);
        match found {
            Ok(_) => self.length += ids.len(),
            Err(_) => self.sequence.truncate(self.length),
        }
        found
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

#[cfg(test)]
mod tests;
