//! Attention of a pass over the cache of one layer. Where every page is read and nothing is certified, many tokens go through the tiles of the
//! prefill kernel; else one by one through the decode kernel, with which pages each reads and what happens where its bound falls short.

use super::cache::Cache;
use super::recovery::{Reading, certify};
use crate::error::{Error, Result};
use crate::infer::attention::{GroupQuery, PageTable};
use crate::infer::cache::{Certificate, Counters, Options};
use crate::model::Spec;
use crate::ops::cpu::attention::TileSet;
use crate::ops::cuda::attention::{DecodeBuffers, DecodeInputs, PAGE, decode, num_splits};
use crate::ops::cuda::{Buffer, Device};

/// The cache of a sequence and what attention over it needs.
pub(super) struct Attention<D: Device> {
    pub(super) cache: Cache<D>,
    pub(super) options: Options,
    pub(super) buffers: DecodeBuffers<D>,
    /// One token's queries.
    query: Buffer<D, f32>,
    /// Lists other than the dense ones, `[kv_heads, pages]`, and their lengths.
    lists: Buffer<D, u32>,
    lengths: Buffer<D, u32>,
    pub(super) counters: Counters,
}

impl<D: Device> Attention<D> {
    /// For `capacity` tokens, of which at most `pass` come in one pass.
    ///
    /// # Errors
    /// When the options ask for what the kernels do not have, or there is no room.
    pub(super) fn new(device: &D, spec: &Spec, options: &Options, capacity: usize, pass: usize) -> Result<Self> {
        options.check()?;
        if options.certificate == Certificate::Metered && options.certifies() {
            return Err(Error::input("certificate", "the CUDA kernels bound errors and have no meter")
                .fix("choose the hard certificate, or run with --device cpu"));
        }
        let cache = Cache::new(device, spec, options, capacity, pass)?;
        let (shape, pages) = (cache.shape, cache.pages);
        let splits = num_splits(&shape, pages, device.multiprocessors() as usize);
        Ok(Self {
            buffers: DecodeBuffers::new(device, &shape, pages, splits)?,
            query: device.alloc(shape.heads() * shape.head_dim)?,
            lists: device.zeros(shape.kv_heads * pages)?,
            lengths: device.zeros(shape.kv_heads)?,
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
        if rows > 1 && !self.options.certifies() && self.options.attention.policy().is_dense_in(layer) {
            self.count_dense(rows, first)?;
            return self.cache.prefill(device, layer, q, rows, first, out);
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
        let reading = self.choose(device, layer, position)?;
        self.count(&reading)?;
        if reading.pages.is_none() {
            self.cache.list_everything(device, layer, reading.own)?;
            self.decode(device, self.cache.listed(layer), reading.last_tokens)?;
        } else {
            self.decode_lists(device, &reading.entries(&self.cache), reading.last_tokens)?;
        }
        if self.options.certifies() { certify(self, device, &reading) } else { Ok(None) }
    }

    /// What the token at `position` reads.
    fn choose(&self, device: &D, layer: usize, position: usize) -> Result<Reading> {
        let (shape, own, policy) = (&self.cache.shape, position / PAGE, self.options.attention.policy());
        let mut reading = Reading { layer, own, last_tokens: position % PAGE + 1, ..Reading::default() };
        if policy.is_dense_in(layer) {
            return Ok(reading);
        }
        (reading.score_bounds, reading.value_norms) = self.cache.bounds(device, layer, own, &self.query)?;
        let queries = device.download(&self.query)?;
        let of_head = |(head, queries): (usize, &[f32])| {
            let table = Table { bounds: &reading.score_bounds, stride: self.cache.pages, own, first_head: head * shape.group };
            policy.pages(&GroupQuery { queries, head_dim: shape.head_dim }, &table)
        };
        let pages: Vec<TileSet> = queries.chunks_exact(shape.group * shape.head_dim).enumerate().map(of_head).collect();
        reading.pages = Some(pages);
        Ok(reading)
    }

    fn count(&mut self, reading: &Reading) -> Result<()> {
        let heads = self.cache.shape.kv_heads;
        let before: usize = reading.pages.as_ref().map_or(heads * reading.own, |pages| pages.iter().map(TileSet::len).sum());
        let own_bytes = 4 * self.cache.shape.head_dim * reading.last_tokens;
        self.counters.pages_read += (before + heads) as u64;
        self.counters.pages_seen += (heads * (reading.own + 1)) as u64;
        self.counters.bytes_read += (before * self.cache.near_bytes()? + heads * own_bytes) as u64;
        Ok(())
    }

    fn count_dense(&mut self, rows: usize, first: usize) -> Result<()> {
        (first..first + rows)
            .try_for_each(|position| self.count(&Reading { own: position / PAGE, last_tokens: position % PAGE + 1, ..Reading::default() }))
    }

    /// Runs the decode kernel for `self.query` over one list of entries per key-value head.
    pub(super) fn decode_lists(&self, device: &D, entries: &[Vec<u32>], last_tokens: usize) -> Result<()> {
        let pages = self.cache.pages;
        let mut flat = vec![0; entries.len() * pages];
        flat.chunks_exact_mut(pages).zip(entries).for_each(|(row, entries)| row[..entries.len()].copy_from_slice(entries));
        let lengths: Vec<u32> = entries.iter().map(|entries| entries.len() as u32).collect();
        device.write(&self.lists, 0, &flat)?;
        device.write(&self.lengths, 0, &lengths)?;
        self.decode(device, (&self.lists, &self.lengths), last_tokens)
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

/// The pages of one key-value head before a query's own, as policies see them.
struct Table<'a> {
    /// `[heads, stride]`
    bounds: &'a [f32],
    stride: usize,
    own: usize,
    first_head: usize,
}

impl PageTable for Table<'_> {
    fn num_pages(&self) -> usize {
        self.own
    }

    fn score_bounds(&self, page: usize, _: &GroupQuery<'_>, bounds: &mut [f32]) {
        let heads = self.bounds.chunks_exact(self.stride).skip(self.first_head);
        bounds.iter_mut().zip(heads).for_each(|(bound, pages)| *bound = pages[page]);
    }
}
