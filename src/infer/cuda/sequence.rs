//! One sequence on a device.

use super::attend::Attention;
use super::model::{CudaModel, Work};
use crate::error::Result;
use crate::infer::cache::{Counters, Options};
use crate::infer::model::Sequence;
use crate::ops::cpu::rope::RotaryTable;
use crate::ops::cuda::Device;
use crate::ops::cuda::rope::DeviceTable;

/// Tokens that pass through the blocks together.
const CHUNK: usize = 512;

/// A sequence in progress.
pub(super) struct CudaSequence<'m, D: Device> {
    model: &'m CudaModel<D>,
    table: DeviceTable<D>,
    attention: Attention<D>,
    work: Work<D>,
}

impl<'m, D: Device> CudaSequence<'m, D> {
    /// An empty sequence. All memory is taken now.
    ///
    /// # Errors
    /// When the device's memory is too small, or the options ask for what the kernels do not have.
    pub(super) fn new(model: &'m CudaModel<D>, options: &Options, capacity: usize) -> Result<Self> {
        let (spec, device, pass) = (&model.spec, &model.device, CHUNK.min(capacity).max(1));
        let table = RotaryTable::from_frequencies(&spec.rotary_frequencies(), capacity.max(1));
        Ok(Self {
            table: DeviceTable::new(device, &table)?,
            attention: Attention::new(device, spec, options, capacity, pass)?,
            work: Work::new(device, spec, pass)?,
            model,
        })
    }

    /// Runs `ids` chunk by chunk; `take` sees the model's working memory after each, and how many rows it holds.
    fn run(&mut self, ids: &[u32], first: usize, mut take: impl FnMut(&mut Work<D>, usize) -> Result<()>) -> Result<()> {
        // Positions beyond may be left from what was forgotten.
        self.attention.cache.truncate(&self.model.device, first)?;
        let mut position = first;
        for chunk in ids.chunks(CHUNK) {
            self.model.forward(chunk, position, &self.table, &mut self.attention, &mut self.work)?;
            position += chunk.len();
            take(&mut self.work, chunk.len())?;
        }
        Ok(())
    }
}

impl<D: Device> Sequence for CudaSequence<'_, D> {
    fn hidden(&mut self, ids: &[u32], first: usize) -> Result<Vec<f32>> {
        let (model, dim) = (self.model, self.model.spec.dim);
        let mut hidden = Vec::with_capacity(ids.len() * dim);
        self.run(ids, first, |work, rows| {
            let before = hidden.len();
            hidden.resize(before + rows * dim, 0.0);
            model.device.read(&work.normalized, 0, &mut hidden[before..])
        })?;
        Ok(hidden)
    }

    fn logits_after(&mut self, ids: &[u32], first: usize) -> Result<Vec<f32>> {
        let (model, mut last) = (self.model, 0);
        self.run(ids, first, |_, rows| {
            last = rows;
            Ok(())
        })?;
        model.last_logits(last, &mut self.work)
    }

    /// What is beyond is overwritten by the next pass, which knows where it begins.
    fn truncate(&mut self, _positions: usize) {}

    fn counters(&self) -> Counters {
        self.attention.counters
    }
}
