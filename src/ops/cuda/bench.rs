//! How fast the kernels are beside what the device's memory can do. Times are of many launches by the host's clock, the device's queue
//! drained before and after; bytes are those a kernel must move at least.

use super::attention::{
    BoundsInputs, Boxes, Choices, DecodeBuffers, DecodeInputs, EXACT, Lists, Near, PAGE, Pages, PrefillInputs, Ranking, Rows, Selection,
    Shape, append, box_bytes, decode, encode, exact_page_bytes, num_splits, page_estimates, prefill, rank_pages, select_pages,
};
use super::check::noise;
use super::dense::{HalfMatrix, HalfRows};
use super::norm::rms_norm;
use super::ternary::{CodeRows, TernaryMatrix};
use super::{Buffer, Device};
use crate::error::Result;
use crate::ops::cpu::attention::RUN;
use crate::ops::cpu::ternary::PackedTernary;
use half::f16;
use serde::Serialize;
use std::time::Instant;

/// What to time.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Bytes of the copy that everything is compared with.
    pub copy_bytes: usize,
    pub outputs: usize,
    pub inputs: usize,
    /// Rows of products with many.
    pub rows: usize,
    /// Heads of the attention.
    pub shape: Shape,
    /// Tokens of its caches.
    pub contexts: Vec<usize>,
    /// Bytes of caches to read before one is read again: more than the device keeps in its own caches, as in a model of many layers.
    pub cold_bytes: usize,
    /// Seconds to spend on each figure, at least.
    pub seconds: f64,
}

impl Sizes {
    /// A layer of an 8B model (Llama-3.1-8B: 32 query heads on 8 key-value heads of 128), contexts of 8K to 128K.
    pub fn full() -> Self {
        Self {
            copy_bytes: 2 << 30,
            outputs: 14336,
            inputs: 4096,
            rows: 4096,
            shape: Shape { kv_heads: 8, group: 4, head_dim: 128 },
            contexts: vec![8192, 32768, 65536, 131_072],
            cold_bytes: 512 << 20,
            seconds: 0.3,
        }
    }
}

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measurement {
    pub kernel: String,
    pub shape: String,
    /// Tokens of the cache, for one token's attention over all of it.
    pub context: Option<usize>,
    pub microseconds: f64,
    /// Bytes that had to be moved, per second.
    pub gbytes_per_second: f64,
    /// Multiplications and additions per second.
    pub tflops: f64,
    /// Part of the bandwidth of a device copy.
    pub of_copy: f64,
}

/// All figures, the copy first, given to `take` as they come.
///
/// # Errors
/// When the device fails or has no room.
pub fn measure<D: Device>(device: &D, sizes: &Sizes, take: impl FnMut(Measurement)) -> Result<()> {
    let mut bench = Bench { device, sizes, copy: f64::INFINITY, take };
    bench.copy()?;
    for &context in &sizes.contexts {
        bench.attention(context)?;
    }
    bench.prompt()?;
    bench.products()?;
    bench.norm()
}

struct Bench<'a, D: Device, T> {
    device: &'a D,
    sizes: &'a Sizes,
    /// Bytes per second of a copy, read and written.
    copy: f64,
    take: T,
}

impl<D: Device, T: FnMut(Measurement)> Bench<'_, D, T> {
    /// Seconds of one call of `work`.
    fn time(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        self.device.synchronize()?;
        let mut calls = 1;
        loop {
            let start = Instant::now();
            (0..calls).try_for_each(|_| work())?;
            self.device.synchronize()?;
            let seconds = start.elapsed().as_secs_f64();
            if seconds >= self.sizes.seconds {
                return Ok(seconds / f64::from(calls));
            }
            calls *= 2;
        }
    }

    fn note(&mut self, kernel: &str, shape: String, seconds: f64, bytes: usize, flops: usize) {
        self.note_measurement(kernel, shape, None, seconds, bytes, flops);
    }

    fn note_context(&mut self, kernel: String, context: usize, seconds: f64, bytes: usize, flops: usize) {
        self.note_measurement(&kernel, format!("{context} tokens"), Some(context), seconds, bytes, flops);
    }

    fn note_measurement(&mut self, kernel: &str, shape: String, context: Option<usize>, seconds: f64, bytes: usize, flops: usize) {
        let rate = bytes as f64 / seconds;
        (self.take)(Measurement {
            kernel: kernel.to_owned(),
            shape,
            context,
            microseconds: seconds * 1e6,
            gbytes_per_second: rate / 1e9,
            tflops: flops as f64 / seconds / 1e12,
            of_copy: rate / self.copy,
        });
    }

    fn copy(&mut self) -> Result<()> {
        let bytes = self.sizes.copy_bytes;
        let (from, to) = (self.device.zeros::<u8>(bytes)?, self.device.zeros::<u8>(bytes)?);
        let seconds = self.time(|| self.device.copy(&from, 0, &to, 0, bytes))?;
        self.copy = 2.0 * bytes as f64 / seconds;
        self.note("device copy", format!("{:.0} MB", bytes as f64 / 1e6), seconds, 2 * bytes, 0);
        Ok(())
    }

    fn products(&mut self) -> Result<()> {
        let (device, Sizes { outputs, inputs, rows, .. }) = (self.device, self.sizes.clone());
        let weights = noise("weights", outputs * inputs);
        let halves: Vec<f16> = weights.iter().map(|x| f16::from_f32(*x)).collect();
        let dense = HalfMatrix::new(device, outputs, inputs, &halves)?;
        let ternary = TernaryMatrix::new(device, &[&PackedTernary::from_weights(&weights, outputs, inputs)])?;
        let (x, y) = (device.upload(&noise("x", rows * inputs))?, device.alloc(rows * outputs)?);
        let (mut rounded, mut codes) = (HalfRows::new(device, rows, inputs)?, CodeRows::new(device, rows, inputs)?);
        rounded.round(device, &x, rows, inputs)?;
        codes.quantize(device, &x, rows, inputs)?;
        let shape = |rows: usize| format!("{rows} x {inputs} x {outputs}");
        let flops = 2 * outputs * inputs;

        let seconds = self.time(|| dense.multiply_row(device, &x, &[(outputs, &y)]))?;
        self.note("dense_row_f16", shape(1), seconds, 2 * outputs * inputs, flops);
        let seconds = self.time(|| ternary.multiply_row(device, &codes, &[(outputs, &y)]))?;
        self.note("ternary_row_i8", shape(1), seconds, outputs * inputs / 4, flops);
        let moved = rows * (inputs + outputs * 4);
        let seconds = self.time(|| dense.multiply_rows(device, &rounded, rows, 0..outputs, &y))?;
        self.note("dense_rows_f16", shape(rows), seconds, moved + rows * inputs + 2 * outputs * inputs, rows * flops);
        let seconds = self.time(|| ternary.multiply_rows(device, &codes, rows, 0..outputs, &y))?;
        self.note("ternary_rows_i8", shape(rows), seconds, moved + outputs * inputs / 4, rows * flops);
        let seconds = self.time(|| codes.quantize(device, &x, rows, inputs))?;
        self.note("quantize_rows_i8", format!("{rows} x {inputs}"), seconds, 5 * rows * inputs, 0);
        Ok(())
    }

    fn norm(&mut self) -> Result<()> {
        let (device, Sizes { inputs, rows, .. }) = (self.device, self.sizes.clone());
        let [x, addend, y] = [device.zeros(rows * inputs)?, device.zeros(rows * inputs)?, device.alloc(rows * inputs)?];
        let gain = device.upload(&noise("gain", inputs))?;
        let seconds = self.time(|| rms_norm(device, &x, Some(&addend), &gain, &y, rows, inputs, 1e-5))?;
        self.note("add_rms_norm_f32", format!("{rows} x {inputs}"), seconds, 16 * rows * inputs, 0);
        Ok(())
    }

    /// One token against caches of `context` tokens in every format, without and with its certificate, and over a quarter of the pages.
    /// The bound is computed in the same pass; to act on it is to keep what recovery asks for and to bring the summaries to the host.
    fn attention(&mut self, context: usize) -> Result<()> {
        let (device, shape, pages) = (self.device, self.sizes.shape, context / PAGE);
        let queries = device.upload(&noise("queries", shape.heads() * shape.head_dim))?;
        let exact = self.exact_pages(pages)?;
        for near in Near::ALL {
            let caches = Caches::new(device, self.sizes, near, &exact, pages)?;
            let (bytes, flops) = (caches.bytes(&shape), 4 * context * shape.heads() * shape.head_dim);
            let (plain, certified) = (caches.buffers(device, &shape, false)?, caches.buffers(device, &shape, true)?);
            let mut turn = 0;
            let seconds = self.time(|| caches.decode(device, &shape, &queries, &mut turn, None, &plain))?;
            self.note_context(format!("decode_attention {}", near.name()), context, seconds, bytes, flops);
            if near == Near::F16 {
                continue;
            }
            let seconds = self.time(|| {
                caches.decode(device, &shape, &queries, &mut turn, None, &certified)?;
                device.download(&certified.summaries).map(drop)
            })?;
            self.note_context(format!("decode_attention {}, certified", near.name()), context, seconds, bytes, flops);
            if near == Near::Int8Int4 {
                let quarter = Quarter::new(device, &shape, pages)?;
                let seconds = self.time(|| {
                    quarter.choose(device, &shape, &caches, &queries, turn)?;
                    caches.decode(device, &shape, &queries, &mut turn, Some(&quarter), &plain)
                })?;
                // The steps of the keys of every page, and a quarter of the pages.
                let moved = bytes / 4 + shape.kv_heads * pages * 4 * shape.head_dim;
                self.note_context(format!("decode_attention {}, top-k=0.25", near.name()), context, seconds, moved, flops / 4);
            }
        }
        Ok(())
    }

    /// Pages `0..pages` of every key-value head in slots of the same order, full of noise.
    fn exact_pages(&self, pages: usize) -> Result<Buffer<D, u8>> {
        let (device, shape) = (self.device, self.sizes.shape);
        let exact = device.zeros(shape.kv_heads * pages * exact_page_bytes(shape.width()?))?;
        let slots = device.upload(&(0..(shape.kv_heads * pages) as u32).collect::<Vec<_>>())?;
        let count = PAGE * pages.min(64);
        let width = shape.kv_heads * shape.head_dim;
        let (keys, values) = (device.upload(&noise("keys", count * width))?, device.upload(&noise("values", count * width))?);
        for first_position in (0..pages * PAGE).step_by(count) {
            let rows = Rows { keys: &keys, values: &values, count: count.min(pages * PAGE - first_position), first_position };
            append(device, &shape, &rows, &exact, &slots, pages, 0)?;
        }
        Ok(exact)
    }

    /// A prompt over its own keys, exact.
    fn prompt(&mut self) -> Result<()> {
        let (device, Sizes { shape, rows, .. }) = (self.device, self.sizes.clone());
        let pages = rows.div_ceil(PAGE);
        let exact = self.exact_pages(pages)?;
        let slots: Vec<u32> = (0..(shape.kv_heads * pages) as u32).collect();
        let table = device.upload(&slots.iter().map(|slot| EXACT | slot).collect::<Vec<_>>())?;
        let queries = device.upload(&noise("queries", rows * shape.heads() * shape.head_dim))?;
        let out = device.alloc(queries.len())?;
        let inputs = PrefillInputs {
            queries: &queries,
            rows,
            first_position: 0,
            exact_pages: &exact,
            near_pages: &exact,
            table: &table,
            table_stride: pages,
            own: &device.upload(&slots)?,
            own_stride: pages,
            masks: None,
        };
        let seconds = self.time(|| prefill(device, &shape, Near::F16, &inputs, &out))?;
        let bytes = 8 * queries.len() + shape.kv_heads * pages * exact_page_bytes(shape.width()?);
        // Half of the square is masked.
        self.note("prefill_attention F16", format!("{rows} tokens"), seconds, bytes, 2 * rows * rows * shape.heads() * shape.head_dim);
        Ok(())
    }
}

/// As many caches of one length and format as the device does not keep in its own caches, read in turn. The last page of each is exact.
struct Caches<'a, D: Device> {
    near: Near,
    pages: usize,
    page_bytes: usize,
    exact: &'a Buffer<D, u8>,
    /// Exact or coded pages, cache by cache.
    stored: Buffer<D, u8>,
    /// Lists of all pages, and tables of their places, cache by cache.
    lists: Vec<Buffer<D, u32>>,
    lengths: Buffer<D, u32>,
}

impl<'a, D: Device> Caches<'a, D> {
    fn new(device: &D, sizes: &Sizes, near: Near, exact: &'a Buffer<D, u8>, pages: usize) -> Result<Self> {
        let shape = sizes.shape;
        let page_bytes = near.page_bytes(&shape)?;
        let slots: Vec<u32> = (0..(shape.kv_heads * pages) as u32).collect();
        let bytes = slots.len() * page_bytes;
        let count = sizes.cold_bytes.div_ceil(bytes).clamp(1, 64);
        let stored = device.zeros(count * bytes)?;
        if near == Near::F16 {
            device.copy(exact, 0, &stored, 0, bytes)?;
        } else {
            let jobs = device.upload(&slots)?;
            encode(device, &shape, near, exact, &stored, &jobs, &jobs, slots.len())?;
        }
        (1..count).try_for_each(|other| device.copy(&stored, 0, &stored, other * bytes, bytes))?;
        let entry = |cache: usize, slot: u32| {
            let (place, is_last) = (slot + (cache * slots.len()) as u32, slot as usize % pages == pages - 1);
            if near == Near::F16 {
                EXACT | place
            } else if is_last {
                EXACT | slot
            } else {
                place
            }
        };
        let list = |cache| device.upload(&slots.iter().map(|slot| entry(cache, *slot)).collect::<Vec<_>>());
        let lists = (0..count).map(list).collect::<Result<_>>()?;
        let lengths = device.upload(&vec![pages as u32; shape.kv_heads])?;
        Ok(Self { near, pages, page_bytes, exact, stored, lists, lengths })
    }

    fn bytes(&self, shape: &Shape) -> usize {
        shape.kv_heads * self.pages * self.page_bytes
    }

    fn buffers(&self, device: &D, shape: &Shape, keeps_facts: bool) -> Result<DecodeBuffers<D>> {
        let splits = num_splits(device, shape, self.near, self.pages)?;
        DecodeBuffers::new(device, shape, self.pages, splits, keeps_facts)
    }

    /// The next cache's turn, over all its pages or those of a quarter.
    fn decode(
        &self,
        device: &D,
        shape: &Shape,
        queries: &Buffer<D, f32>,
        turn: &mut usize,
        quarter: Option<&Quarter<D>>,
        buffers: &DecodeBuffers<D>,
    ) -> Result<()> {
        let every = (&self.lists[*turn % self.lists.len()], &self.lengths);
        let (lists, list_lengths) = quarter.map_or(every, |quarter| (&quarter.lists, &quarter.lengths));
        *turn += 1;
        let exact_pages = if self.near == Near::F16 { &self.stored } else { self.exact };
        let inputs = DecodeInputs {
            queries,
            exact_pages,
            near_pages: &self.stored,
            lists,
            list_stride: self.pages,
            list_lengths,
            last_tokens: PAGE,
        };
        decode(device, shape, self.near, &inputs, buffers)
    }
}

/// Boxes of a page that estimates come from.
const BOXES: usize = PAGE / RUN;

/// The choice of a quarter of the pages by estimates.
struct Quarter<D: Device> {
    pages: Pages,
    boxes: Buffer<D, u8>,
    estimates: Buffer<D, f32>,
    ranks: Buffer<D, u32>,
    chosen: Buffer<D, u32>,
    slots: Buffer<D, u32>,
    lists: Buffer<D, u32>,
    lengths: Buffer<D, u32>,
}

impl<D: Device> Quarter<D> {
    fn new(device: &D, shape: &Shape, stride: usize) -> Result<Self> {
        let pages = Pages { rows: 1, count: stride - 1, stride };
        let places = shape.kv_heads * stride;
        Ok(Self {
            pages,
            boxes: device.zeros(places * box_bytes(shape, BOXES)?)?,
            estimates: device.alloc(shape.heads() * stride)?,
            ranks: device.alloc(places)?,
            chosen: device.alloc(shape.kv_heads * pages.words())?,
            slots: device.upload(&(0..places as u32).collect::<Vec<_>>())?,
            lists: device.zeros(places)?,
            lengths: device.zeros(shape.kv_heads)?,
        })
    }

    fn choose(&self, device: &D, shape: &Shape, caches: &Caches<'_, D>, queries: &Buffer<D, f32>, turn: usize) -> Result<()> {
        let entries = &caches.lists[turn % caches.lists.len()];
        let boxes = Boxes::Stored { boxes: &self.boxes, per_page: BOXES };
        let inputs = BoundsInputs { queries, first_row: 0, boxes, table: &self.slots };
        page_estimates(device, shape, self.pages, &inputs, &self.estimates)?;
        rank_pages(device, shape, self.pages, Ranking::Share, &self.estimates, &self.ranks)?;
        let lists = Lists { entries, slots: &self.slots, lists: &self.lists, lengths: &self.lengths };
        let choices = Choices { chosen: &self.chosen, first_row: 0, lists: Some(lists) };
        let selection = Selection { budget: self.pages.stride.div_ceil(4), sinks: 1, window: 1 };
        select_pages(device, shape, self.pages, selection, Some(&self.ranks), &choices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::{Emulated, Order};

    #[test]
    fn every_figure_is_measured() {
        let Some(device) = Emulated::new() else { return };
        let shape = Shape { kv_heads: 1, group: 2, head_dim: 16 };
        let sizes =
            Sizes { copy_bytes: 1 << 16, outputs: 8, inputs: 64, rows: 64, shape, contexts: vec![128], cold_bytes: 40_000, seconds: 0.0 };
        let mut found = vec![];
        measure(&device.in_order(Order::Forward), &sizes, |one| found.push(one)).unwrap();
        assert_eq!(found.len(), 1 + 5 + 1 + 6 + 1);
        assert_eq!(found.iter().filter(|one| one.context == Some(128)).count(), 6);
        assert!((found[0].of_copy - 1.0).abs() < 1e-9);
        assert!(found.iter().all(|one| one.microseconds > 0.0 && one.gbytes_per_second > 0.0), "{found:?}");
    }
}
