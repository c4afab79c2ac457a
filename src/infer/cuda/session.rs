//! One sequence on a device: its cache, and the three ways on: many tokens, one token, back.

use super::attend::Attention;
use super::engine::{CudaEngine, Work};
use crate::error::{Error, Result};
use crate::infer::cache::{Counters, Options};
use crate::ops::cpu::rope::RotaryTable;
use crate::ops::cuda::Device;
use crate::ops::cuda::rope::DeviceTable;

/// Tokens that pass through the blocks together.
const CHUNK: usize = 512;

/// A sequence in progress.
pub struct CudaSession<'e, D: Device> {
    engine: &'e CudaEngine<D>,
    table: DeviceTable<D>,
    attention: Attention<D>,
    work: Work<D>,
    length: usize,
    capacity: usize,
}

impl<'e, D: Device> CudaSession<'e, D> {
    /// An empty sequence of at most `capacity` tokens, which the model's context must cover. `options` may be a bare
    /// [`Format`](crate::infer::kv::Format); all memory is taken now.
    ///
    /// # Errors
    /// When the context or the device's memory is too small, or the options ask for what the kernels do not have.
    pub fn new(engine: &'e CudaEngine<D>, options: impl Into<Options>, capacity: usize) -> Result<Self> {
        let (spec, device) = (engine.spec(), &engine.device);
        if capacity > spec.context {
            return Err(Error::input("context", format!("{capacity} tokens are more than the {} the model was made for", spec.context))
                .fix(format!("ask for at most {}", spec.context)));
        }
        let pass = CHUNK.min(capacity).max(1);
        Ok(Self {
            table: DeviceTable::new(device, &RotaryTable::new(spec.head_dim, spec.rope_theta, capacity.max(1)))?,
            attention: Attention::new(device, spec, &options.into(), capacity, pass)?,
            work: Work::new(device, spec, pass)?,
            engine,
            length: 0,
            capacity,
        })
    }

    /// The engine it runs on.
    pub fn engine(&self) -> &'e CudaEngine<D> {
        self.engine
    }

    /// How it keeps and reads keys and values.
    pub fn options(&self) -> &Options {
        &self.attention.options
    }

    /// What its attention did since it began, truncated parts included.
    pub fn counters(&self) -> Counters {
        self.attention.counters
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
    ///
    /// # Errors
    /// When the device fails.
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        if length < self.length {
            self.attention.cache.truncate(&self.engine.device, length)?;
            self.length = length;
        }
        Ok(())
    }

    /// Appends `ids` and returns what the head reads at each of them, `[ids, dim]`; [`CudaEngine::logits`] turns rows of it into logits.
    ///
    /// # Errors
    /// When the sequence would outgrow its capacity or an id is beyond the vocabulary; the sequence then stays as it was. When the device
    /// fails.
    pub fn hidden(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let dim = self.engine.spec().dim;
        let mut hidden = Vec::with_capacity(ids.len() * dim);
        self.check(ids)?;
        for chunk in ids.chunks(CHUNK) {
            self.pass(chunk)?;
            let first = hidden.len();
            hidden.resize(first + chunk.len() * dim, 0.0);
            self.engine.device.read(&self.work.normalized, 0, &mut hidden[first..])?;
        }
        Ok(hidden)
    }

    /// Appends `ids`, at least one, and returns the logits after the last of them, `[vocab]`.
    ///
    /// # Errors
    /// As [`CudaSession::hidden`], and when `ids` is empty.
    pub fn prefill(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.check(ids)?;
        let mut last = 0;
        for chunk in ids.chunks(CHUNK) {
            self.pass(chunk)?;
            last = chunk.len();
        }
        if last == 0 {
            return Err(Error::input("prompt", "has no tokens").fix("give at least one"));
        }
        self.engine.last_logits(last, &mut self.work)
    }

    /// Appends `ids` and returns the logits after each of them, `[ids, vocab]`; for sequences whose logits fit in memory.
    ///
    /// # Errors
    /// As [`CudaSession::hidden`].
    pub fn prefill_all(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let hidden = self.hidden(ids)?;
        self.engine.logits(&hidden)
    }

    /// Appends one token and returns the logits after it, `[vocab]`.
    ///
    /// # Errors
    /// As [`CudaSession::hidden`].
    pub fn step(&mut self, id: u32) -> Result<Vec<f32>> {
        self.prefill(&[id])
    }

    fn pass(&mut self, ids: &[u32]) -> Result<()> {
        self.engine.forward(ids, self.length, &self.table, &mut self.attention, &mut self.work)?;
        self.length += ids.len();
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
