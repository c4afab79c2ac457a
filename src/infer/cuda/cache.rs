//! Keys and values of one sequence on a device: a pool of exact pages, a pool of coded ones, and the originals of coded pages in the host's
//! memory.
//!
//! Page p is coded when the first token of page p + 1 arrives. A query at position t sees the pages before t / 64 as they are coded and
//! its own page exact, however the text is cut into calls.

use super::select::boxes_per_page;
use crate::error::{Error, Result};
use crate::infer::attention::Attention;
use crate::infer::cache::Options;
use crate::infer::kv::Format;
use crate::model::Spec;
use crate::ops::cuda::attention::{
    self as kernels, Boxes, EXACT, Masks, Near, PAGE, PrefillInputs, Rows, Shape, box_bytes, exact_page_bytes,
};
use crate::ops::cuda::{Buffer, Device, Place, fits};

/// One layer's part in the pools.
struct Layer<D: Device> {
    /// Exact slot of every page, `[kv_heads, pages]`.
    slots: Buffer<D, u32>,
    /// Its entry once a token follows it.
    entries: Buffer<D, u32>,
    /// Its place among coded pages and boxes.
    places: Buffer<D, u32>,
    /// What dense attention reads, `[kv_heads, pages]`, for queries on page `listed`.
    list: Buffer<D, u32>,
    lengths: Buffer<D, u32>,
    listed: Option<usize>,
    positions: usize,
    /// Pages that a token follows.
    full: usize,
}

/// The cache of all layers.
pub(super) struct Cache<D: Device> {
    pub(super) shape: Shape,
    pub(super) near: Near,
    /// Pages that the capacity takes.
    pub(super) pages: usize,
    /// Exact pages that a head of a layer has: all of them, or those of one pass.
    ring: usize,
    /// Boxes around keys, `[layer, kv_head, page]`; none where nobody asks or coded pages have them.
    boxes: Option<Buffer<D, u8>>,
    /// Boxes of each page.
    per_page: usize,
    layers: Vec<Layer<D>>,
    pub(super) exact: Buffer<D, u8>,
    pub(super) coded: Buffer<D, u8>,
    /// Originals, `[layer, kv_head, page]`; none where every page is exact.
    far: Option<Buffer<D, u8>>,
    page_bytes: usize,
}

/// How the kernels store `format`.
pub(super) fn near(format: Format) -> Result<Near> {
    match format {
        Format::F16 => Ok(Near::F16),
        Format::Coded("fp8") => Ok(Near::Fp8),
        Format::Coded("int8-int4") => Ok(Near::Int8Int4),
        other => Err(Error::input("kv", format!("the CUDA kernels have no cache format {other}"))
            .fix("choose f16, fp8 or int8-int4, or run with --device cpu")),
    }
}

impl<D: Device> Cache<D> {
    /// For `capacity` tokens, of which at most `pass` come in one pass.
    ///
    /// # Errors
    /// When the format is one the kernels do not have, or there is no room.
    pub(super) fn new(device: &D, spec: &Spec, options: &Options, capacity: usize, pass: usize) -> Result<Self> {
        let near = near(options.format)?;
        let shape = Shape { kv_heads: spec.kv_heads, group: spec.heads / spec.kv_heads, head_dim: spec.head_dim };
        let pages = capacity.div_ceil(PAGE).max(1);
        let is_coded = near != Near::F16;
        // A pass may begin and end within a page; the page before it stays exact until the pass begins.
        let ring = if is_coded { pages.min(pass.div_ceil(PAGE) + 2) } else { pages };
        let heads = spec.layers * spec.kv_heads;
        let scratch = if is_coded && options.certifies() { spec.kv_heads * pages } else { 0 };
        let page_bytes = exact_page_bytes(shape.width()?);
        fits(heads * pages + scratch, "pages of the cache")?;
        let (attention, policy) = (options.attention, options.attention.policy());
        let is_bounded = attention != Attention::Dense && (policy.needs_bounds() || options.certifies());
        let per_page = boxes_per_page(attention);
        let stores_boxes = is_bounded && (near != Near::Int8Int4 || per_page > 1);
        let mut cache = Self {
            shape,
            near,
            pages,
            ring,
            boxes: stores_boxes.then(|| device.alloc(heads * pages * box_bytes(&shape, per_page)?)).transpose()?,
            per_page,
            layers: vec![],
            exact: device.alloc((heads * ring + scratch) * page_bytes)?,
            coded: device.alloc(if is_coded { heads * pages * near.page_bytes(&shape)? } else { 0 })?,
            far: is_coded.then(|| device.alloc_in(heads * pages * page_bytes, Place::Host)).transpose()?,
            page_bytes,
        };
        for layer in 0..spec.layers {
            let table = |entry: &dyn Fn(usize, usize) -> u32| {
                let all = (0..spec.kv_heads).flat_map(|head| (0..pages).map(move |page| (head, page)));
                all.map(|(head, page)| entry(head, page)).collect::<Vec<_>>()
            };
            let made = Layer {
                slots: device.upload(&table(&|head, page| cache.exact_slot(layer, head, page) as u32))?,
                entries: device.upload(&table(&|head, page| cache.entry(layer, head, page)))?,
                places: device.upload(&table(&|head, page| cache.place(layer, head, page) as u32))?,
                list: device.zeros(spec.kv_heads * pages)?,
                lengths: device.zeros(spec.kv_heads)?,
                listed: None,
                positions: 0,
                full: 0,
            };
            cache.layers.push(made);
        }
        Ok(cache)
    }

    pub(super) fn is_coded(&self) -> bool {
        self.far.is_some()
    }

    fn exact_slot(&self, layer: usize, head: usize, page: usize) -> usize {
        (layer * self.shape.kv_heads + head) * self.ring + page % self.ring
    }

    /// Place of a page among the coded ones, and among the originals.
    fn place(&self, layer: usize, head: usize, page: usize) -> usize {
        (layer * self.shape.kv_heads + head) * self.pages + page
    }

    /// The entry of a page before the query's own.
    pub(super) fn entry(&self, layer: usize, head: usize, page: usize) -> u32 {
        if self.is_coded() { self.place(layer, head, page) as u32 } else { self.own_entry(layer, head, page) }
    }

    /// The entry of the query's own page.
    pub(super) fn own_entry(&self, layer: usize, head: usize, page: usize) -> u32 {
        EXACT | self.exact_slot(layer, head, page) as u32
    }

    /// Brings the originals of a page to the device, for this layer's next launch.
    pub(super) fn promote(&self, device: &D, layer: usize, head: usize, page: usize) -> Result<u32> {
        let Some(far) = &self.far else { return Ok(self.own_entry(layer, head, page)) };
        let slot = self.layers.len() * self.shape.kv_heads * self.ring + head * self.pages + page;
        device.copy(far, self.place(layer, head, page) * self.page_bytes, &self.exact, slot * self.page_bytes, self.page_bytes)?;
        Ok(EXACT | slot as u32)
    }

    /// Bytes of one page before the query's own as attention reads it.
    pub(super) fn near_bytes(&self) -> Result<usize> {
        if self.is_coded() { self.near.page_bytes(&self.shape) } else { Ok(self.original_bytes()) }
    }

    /// Bytes of the numbers of one exact page.
    pub(super) fn original_bytes(&self) -> usize {
        4 * PAGE * self.shape.head_dim
    }

    /// Appends rows of keys (after RoPE) and values at positions from `first` on, and codes the pages that they finish.
    pub(super) fn append(
        &mut self,
        device: &D,
        index: usize,
        [keys, values]: [&Buffer<D, f32>; 2],
        rows: usize,
        first: usize,
    ) -> Result<()> {
        let layer = &self.layers[index];
        let rows_of = Rows { keys, values, count: rows, first_position: first };
        kernels::append(device, &self.shape, &rows_of, &self.exact, &layer.slots, self.pages, 0)?;
        self.layers[index].positions = first + rows;
        let (before, full) = (layer_full(first), layer_full(first + rows));
        debug_assert_eq!(self.layers[index].full, before);
        self.finish(device, index, before, full)
    }

    /// Codes pages `before..full` of all heads, and puts boxes around their keys.
    fn finish(&mut self, device: &D, index: usize, before: usize, full: usize) -> Result<()> {
        let all: Vec<(usize, usize)> = (before..full).flat_map(|page| (0..self.shape.kv_heads).map(move |head| (head, page))).collect();
        if all.is_empty() {
            return Ok(());
        }
        if self.far.is_none() && self.boxes.is_none() {
            self.layers[index].full = full;
            return Ok(());
        }
        let sources: Vec<u32> = all.iter().map(|&(head, page)| self.exact_slot(index, head, page) as u32).collect();
        let targets: Vec<u32> = all.iter().map(|&(head, page)| self.place(index, head, page) as u32).collect();
        let (from, to) = (device.upload(&sources)?, device.upload(&targets)?);
        if let Some(boxes) = &self.boxes {
            kernels::page_boxes(device, &self.shape, self.per_page, &self.exact, boxes, &from, &to, all.len())?;
        }
        if let Some(far) = &self.far {
            kernels::encode(device, &self.shape, self.near, &self.exact, &self.coded, &from, &to, all.len())?;
            for (source, target) in sources.iter().zip(&targets) {
                let bytes = self.page_bytes;
                device.copy(&self.exact, *source as usize * bytes, far, *target as usize * bytes, bytes)?;
            }
        }
        self.layers[index].full = full;
        Ok(())
    }

    /// What holds the keys of a layer's pages, and where each is in it.
    pub(super) fn boxes(&self, index: usize) -> (Boxes<'_, D>, &Buffer<D, u32>) {
        let stored = self.boxes.as_ref().map(|boxes| Boxes::Stored { boxes, per_page: self.per_page });
        (stored.unwrap_or(Boxes::Coded(&self.coded)), &self.layers[index].places)
    }

    /// Entries of a layer's pages once a token follows them, and their exact slots.
    pub(super) fn tables(&self, index: usize) -> (&Buffer<D, u32>, &Buffer<D, u32>) {
        (&self.layers[index].entries, &self.layers[index].slots)
    }

    /// Attention of `rows` tokens over the pages that `masks` let through, in tiles.
    #[expect(clippy::too_many_arguments, reason = "what a prompt is")]
    pub(super) fn prefill(
        &self,
        device: &D,
        index: usize,
        queries: &Buffer<D, f32>,
        rows: usize,
        first: usize,
        masks: Option<Masks<'_, D>>,
        out: &Buffer<D, f32>,
    ) -> Result<()> {
        let own: Vec<usize> = (first / PAGE..(first + rows).div_ceil(PAGE)).collect();
        let slots = (0..self.shape.kv_heads).flat_map(|head| own.iter().map(move |&page| (head, page)));
        let slots: Vec<u32> = slots.map(|(head, page)| self.exact_slot(index, head, page) as u32).collect();
        let inputs = PrefillInputs {
            queries,
            rows,
            first_position: first,
            exact_pages: &self.exact,
            near_pages: &self.coded,
            table: &self.layers[index].entries,
            table_stride: self.pages,
            own: &device.upload(&slots)?,
            own_stride: own.len(),
            masks,
        };
        kernels::prefill(device, &self.shape, self.near, &inputs, out)
    }

    /// Makes the lists of a layer those of dense attention of a query on page `own`.
    pub(super) fn list_everything(&mut self, device: &D, index: usize, own: usize) -> Result<()> {
        if self.layers[index].listed != Some(own) {
            let mut entries = vec![0; self.shape.kv_heads * self.pages];
            for (head, entries) in entries.chunks_exact_mut(self.pages).enumerate() {
                entries[..own].iter_mut().enumerate().for_each(|(page, entry)| *entry = self.entry(index, head, page));
                entries[own] = self.own_entry(index, head, own);
            }
            let layer = &mut self.layers[index];
            device.write(&layer.list, 0, &entries)?;
            device.write(&layer.lengths, 0, &vec![own as u32 + 1; self.shape.kv_heads])?;
            layer.listed = Some(own);
        }
        Ok(())
    }

    /// The lists that were made last, `[kv_heads, pages]`, and their lengths.
    pub(super) fn listed(&self, index: usize) -> (&Buffer<D, u32>, &Buffer<D, u32>) {
        (&self.layers[index].list, &self.layers[index].lengths)
    }

    /// Forgets the positions from `positions` on. The page that is under way then becomes exact again.
    pub(super) fn truncate(&mut self, device: &D, positions: usize) -> Result<()> {
        let full = layer_full(positions);
        for index in 0..self.layers.len() {
            if positions >= self.layers[index].positions {
                continue;
            }
            if let Some(far) = &self.far
                && full < self.layers[index].full
                && positions > 0
            {
                for head in 0..self.shape.kv_heads {
                    let (from, to) = (self.place(index, head, full), self.exact_slot(index, head, full));
                    device.copy(far, from * self.page_bytes, &self.exact, to * self.page_bytes, self.page_bytes)?;
                }
            }
            let layer = &mut self.layers[index];
            (layer.positions, layer.listed) = (positions, None);
            layer.full = layer.full.min(full);
        }
        Ok(())
    }
}

/// Full pages that a token follows, among `positions` tokens.
fn layer_full(positions: usize) -> usize {
    positions.saturating_sub(1) / PAGE
}
