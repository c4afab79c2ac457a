//! Attention of a pass over the cache of one layer. Without a certificate many tokens go through the tiles of the prefill kernel, each row
//! over the pages that its policy chooses; else one by one through the decode kernel, with what happens where its bound falls short.

use super::cache::Cache;
use super::recovery::{Reading, certify};
use super::select::Selector;
use crate::error::Result;
use crate::infer::cache::{Counters, Options};
use crate::model::Spec;
use crate::ops::cuda::attention::{DecodeBuffers, DecodeInputs, PAGE, decode, num_splits};
use crate::ops::cuda::{Buffer, Device};

/// The cache of a sequence and what attention over it needs.
pub(super) struct Attention<D: Device> {
    pub(super) cache: Cache<D>,
    pub(super) options: Options,
    pub(super) buffers: DecodeBuffers<D>,
    /// One token's queries.
    query: Buffer<D, f32>,
    pub(super) selector: Selector<D>,
    pub(super) counters: Counters,
}

impl<D: Device> Attention<D> {
    /// For `capacity` tokens, of which at most `pass` come in one pass.
    ///
    /// # Errors
    /// When the options ask for what the kernels do not have, or there is no room.
    pub(super) fn new(device: &D, spec: &Spec, options: &Options, capacity: usize, pass: usize) -> Result<Self> {
        options.check()?;
        let cache = Cache::new(device, spec, options, capacity, pass)?;
        let (shape, pages) = (cache.shape, cache.pages);
        let splits = num_splits(device, &shape, cache.near, pages)?;
        Ok(Self {
            buffers: DecodeBuffers::new(device, &shape, pages, splits, options.certifies())?,
            query: device.alloc(shape.heads() * shape.head_dim)?,
            selector: Selector::new(device, shape, options, pages, pass)?,
            counters: Counters::default(),
            options: *options,
            cache,
        })
    }

    /// Appends rows of keys and values to a layer.
    pub(super) fn append(&mut self, device: &D, layer: usize, rows: [&Buffer<D, f32>; 2], count: usize, first: usize) -> Result<()> {
        self.cache.append(device, layer, rows, count, first)
    }

    /// Attention of `rows` queries that have been appended, the first at position `first`; `[rows, heads * head_dim]` into `out`.
    pub(super) fn attend(
        &mut self,
        device: &D,
        layer: usize,
        q: &Buffer<D, f32>,
        rows: usize,
        first: usize,
        out: &Buffer<D, f32>,
    ) -> Result<()> {
        let width = self.cache.shape.heads() * self.cache.shape.head_dim;
        if rows > 1 && !self.options.certifies() {
            for position in first..first + rows {
                let reading = self.reading(layer, position);
                self.count(&reading)?;
            }
            let is_dense = self.options.attention.policy().is_dense_in(layer);
            let masks = (!is_dense).then(|| self.selector.choose_rows(device, &self.cache, layer, q, rows, first)).transpose()?;
            return self.cache.prefill(device, layer, q, rows, first, masks, out);
        }
        for row in 0..rows {
            device.copy(q, row * width, &self.query, 0, width)?;
            match self.attend_token(device, layer, first + row)? {
                None => device.copy(&self.buffers.output, 0, out, row * width, width)?,
                Some(recovered) => device.write(out, row * width, &recovered)?,
            }
        }
        Ok(())
    }

    /// Leaves the output for `self.query` in the decode buffers, or returns what takes its place.
    fn attend_token(&mut self, device: &D, layer: usize, position: usize) -> Result<Option<Vec<f32>>> {
        let reading = self.reading(layer, position);
        self.count(&reading)?;
        if let Some(selection) = reading.selection {
            self.selector.choose(device, &self.cache, layer, &self.query, reading.own, selection)?;
            self.decode(device, (&self.selector.lists, &self.selector.lengths), reading.last_tokens)?;
        } else {
            self.cache.list_everything(device, layer, reading.own)?;
            self.decode(device, self.cache.listed(layer), reading.last_tokens)?;
        }
        if !self.options.certifies() {
            return Ok(None);
        }
        if reading.selection.is_some() {
            self.selector.bound_unread(device, reading.own, &self.buffers.summaries)?;
        }
        certify(self, device, &reading)
    }

    /// What the token at `position` reads.
    fn reading(&mut self, layer: usize, position: usize) -> Reading {
        let own = position / PAGE;
        Reading { layer, own, last_tokens: position % PAGE + 1, selection: self.selector.selection(layer, own) }
    }

    fn count(&mut self, reading: &Reading) -> Result<()> {
        let heads = self.cache.shape.kv_heads;
        let before = heads * reading.selection.map_or(reading.own, |selection| selection.budget);
        let own_bytes = 4 * self.cache.shape.head_dim * reading.last_tokens;
        self.counters.pages_read += (before + heads) as u64;
        self.counters.pages_seen += (heads * (reading.own + 1)) as u64;
        self.counters.bytes_read += (before * self.cache.near_bytes()? + heads * own_bytes) as u64;
        Ok(())
    }

    /// Runs the decode kernel for `self.query` over one list of entries per key-value head.
    pub(super) fn decode_lists(&self, device: &D, entries: &[Vec<u32>], last_tokens: usize) -> Result<()> {
        let pages = self.cache.pages;
        let mut flat = vec![0; entries.len() * pages];
        flat.chunks_exact_mut(pages).zip(entries).for_each(|(row, entries)| row[..entries.len()].copy_from_slice(entries));
        let lengths: Vec<u32> = entries.iter().map(|entries| entries.len() as u32).collect();
        device.write(&self.selector.lists, 0, &flat)?;
        device.write(&self.selector.lengths, 0, &lengths)?;
        self.decode(device, (&self.selector.lists, &self.selector.lengths), last_tokens)
    }

    fn decode(&self, device: &D, (lists, list_lengths): (&Buffer<D, u32>, &Buffer<D, u32>), last_tokens: usize) -> Result<()> {
        let inputs = DecodeInputs {
            queries: &self.query,
            exact_pages: &self.cache.exact,
            near_pages: &self.cache.coded,
            lists,
            list_stride: self.cache.pages,
            list_lengths,
            last_tokens,
        };
        decode(device, &self.cache.shape, self.cache.near, &inputs, &self.buffers)
    }
}
