//! Attention of one query token over page lists, with how far the answer can be from the one of exact pages.
//! Kernels: `kernels/attention_decode.cuh` (parts of the context), `kernels/attention_merge.cu` (their merge, and the bound's proof).

use super::layout::{Near, PAGE, Shape};
use crate::arguments;
use crate::error::Result;
use crate::ops::cuda::{Buffer, Device, fits};

/// Floats of a part before its output.
const PARTIAL_HEAD: usize = 8;
/// Floats of a [`Summary`].
const SUMMARY: usize = 8;
/// Floats of a [`PageFacts`].
const PAGE_FACTS: usize = 4;
const WARPS: usize = 4;
/// Query heads one block takes.
const QUERIES: usize = 8;
/// Parts the merge kernel has room for.
const MAX_SPLITS: usize = 1024;

/// What decode reads.
pub struct DecodeInputs<'a, D: Device> {
    /// `[heads, head_dim]`, after RoPE.
    pub queries: &'a Buffer<D, f32>,
    pub exact_pages: &'a Buffer<D, u8>,
    /// Not read with [`Near::F16`]; any buffer will do.
    pub near_pages: &'a Buffer<D, u8>,
    /// `[kv_heads, list_stride]` entries; pages in any order, but the page of the query's own token last. Near pages are full.
    pub lists: &'a Buffer<D, u32>,
    pub list_stride: usize,
    /// `[kv_heads]` entries of each list.
    pub list_lengths: &'a Buffer<D, u32>,
    /// Tokens in the last page of every list, 1 to 64.
    pub last_tokens: usize,
}

/// What decode writes, sized for one layer and used again by the next.
pub struct DecodeBuffers<D: Device> {
    /// `[heads, head_dim]`; 0 for an empty list.
    pub output: Buffer<D, f32>,
    /// `[heads, 8]`, see [`Summary`].
    pub summaries: Buffer<D, f32>,
    /// `[heads, list_stride, 4]`, see [`PageFacts`].
    pub page_facts: Buffer<D, f32>,
    partials: Buffer<D, f32>,
    splits: usize,
    list_stride: usize,
}

impl<D: Device> DecodeBuffers<D> {
    /// For lists of up to `list_stride` pages, cut into `splits` parts (at most 1024).
    pub fn new(device: &D, shape: &Shape, list_stride: usize, splits: usize) -> Result<Self> {
        let (heads, splits) = (shape.heads(), splits.clamp(1, MAX_SPLITS));
        Ok(Self {
            output: device.alloc(heads * shape.head_dim)?,
            summaries: device.alloc(heads * SUMMARY)?,
            page_facts: device.alloc(heads * list_stride * PAGE_FACTS)?,
            partials: device.alloc(heads * splits * (PARTIAL_HEAD + shape.width()?))?,
            splits,
            list_stride,
        })
    }
}

/// Parts to cut lists of `pages` pages into on a device with `processors` multiprocessors: two or more blocks for each, but no part
/// shorter than four pages, which is one for every warp.
pub fn num_splits(shape: &Shape, pages: usize, processors: usize) -> usize {
    let blocks = shape.kv_heads * shape.group.div_ceil(QUERIES);
    (3 * processors).div_ceil(blocks).min(pages.div_ceil(WARPS)).clamp(1, MAX_SPLITS)
}

/// The answer of one query head beside its output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// ln sum_t e^{s_t}; negative infinity for an empty list.
    pub lse: f32,
    /// At least norm(output - output with every page exact), rounding of this kernel included; 0 when every page is exact. Not a number
    /// where a page held what is not finite: accept only what compares as small enough.
    pub bound: f32,
    /// norm(output)
    pub norm: f32,
    /// At most (exact mass) / (mass used) of the list: sum_b rho_b e^{-Delta_b}.
    pub mass_low: f32,
    /// Spread of the values about the output: sqrt(sum_t u_t norm(vhat_t - output)^2).
    pub spread: f32,
    /// Share of `bound` (before division by `mass_low`) that the values' errors have, against the keys': any common unit.
    pub value_term: f32,
    pub key_term: f32,
}

impl Summary {
    /// Head `head` of downloaded summaries.
    pub fn of(summaries: &[f32], head: usize) -> Self {
        let [lse, bound, norm, mass_low, spread, value_term, key_term, _] = summaries.as_chunks::<SUMMARY>().0[head];
        Self { lse, bound, norm, mass_low, spread, value_term, key_term }
    }
}

/// What one page did for one query head: what recovery ranks by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageFacts {
    /// ln sum over the page's tokens of e^{s_t}; less the head's `lse` it is ln rho_b.
    pub log_mass: f32,
    /// At least the error of the page's scores; 0 for an exact page.
    pub score_error: f32,
    /// Mean of norm(vhat_t)^2 under the page's own weights.
    pub mean_square: f32,
    /// At least max_t norm(v_t - vhat_t); 0 for an exact page.
    pub value_error: f32,
}

impl PageFacts {
    /// Page `entry` of query head `head` in downloaded facts.
    pub fn of(facts: &[f32], list_stride: usize, head: usize, entry: usize) -> Self {
        let [log_mass, score_error, mean_square, value_error] = facts.as_chunks::<PAGE_FACTS>().0[head * list_stride + entry];
        Self { log_mass, score_error, mean_square, value_error }
    }

    /// At least the page's part of `summary.bound`:
    /// (rho e^Delta eta + (e^Delta - 1) sqrt(rho S)) / W_low with sqrt(S) <= sqrt(rho) (sqrt(mean square) + norm(output)).
    pub fn share(&self, summary: &Summary) -> f32 {
        let rho = (self.log_mass - summary.lse).exp();
        let spread = self.mean_square.sqrt() + summary.norm;
        rho * (self.score_error.exp() * self.value_error + self.score_error.exp_m1() * spread) / summary.mass_low
    }
}

/// Runs decode attention for all heads of a layer.
pub fn decode<D: Device>(device: &D, shape: &Shape, near: Near, inputs: &DecodeInputs<'_, D>, buffers: &DecodeBuffers<D>) -> Result<()> {
    assert_eq!(inputs.list_stride, buffers.list_stride, "buffers were sized for other lists");
    assert!(inputs.last_tokens <= PAGE, "a page has {PAGE} tokens");
    let width = shape.width()?;
    let (splits, kv_heads, group) = (fits(buffers.splits, "splits")?, fits(shape.kv_heads, "kv_heads")?, fits(shape.group, "group")?);
    let (stride, head_dim) = (fits(inputs.list_stride, "pages")?, fits(shape.head_dim, "head_dim")?);
    let last_tokens = fits(inputs.last_tokens, "tokens")?;
    let kernel = format!("decode_attention_{}_{width}", near.name());
    let args = arguments![
        inputs.queries,
        inputs.exact_pages,
        inputs.near_pages,
        inputs.lists,
        inputs.list_lengths,
        &buffers.partials,
        &buffers.page_facts,
        last_tokens,
        stride,
        group,
        head_dim
    ];
    let grid = [splits, kv_heads, group.div_ceil(fits(QUERIES, "queries")?)];
    device.launch(&kernel, grid, [32 * fits(WARPS, "warps")?, 1, 1], fits(shared_bytes(width), "shared memory")?, args)?;
    let args = arguments![&buffers.partials, &buffers.output, &buffers.summaries, splits, head_dim, fits(width, "head_dim")?];
    device.launch("attention_merge", [kv_heads * group, 1, 1], [128, 1, 1], 0, args)
}

/// Shared memory of a decode block: the queries in two forms, and per warp a piece of keys and one of values.
fn shared_bytes(width: usize) -> usize {
    64 * width + 128 + WARPS * (144 + 68 * width + 64 * width)
}
