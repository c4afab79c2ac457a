//! A kernel beside its CPU reference: what tests assert and what `osprey doctor` repeats on a GPU.

use super::attention::{
    Bounds, BoundsInputs, Boxes, Choices, DecodeBuffers, DecodeInputs, EXACT, Lists, Masks, Near, PAGE, Pages, PrefillInputs, Ranking,
    Rows, Selection, Shape, Summary, append, box_bytes, decode, encode, exact_page_bytes, num_splits, page_bounds, page_boxes, prefill,
    rank_pages, select_pages, unite_rows, unread_bound,
};
use super::{Buffer, Device};
use crate::error::Result;
use crate::ops::rng::Stream;
use half::f16;
use serde::Serialize;

/// How far a kernel was from its reference over all cases tried.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Agreement {
    pub kernel: &'static str,
    pub cases: usize,
    /// Largest norm(kernel - reference) / norm(reference); infinite when not a number.
    pub error: f64,
    /// What rounding explains; 0 where the bits must be equal.
    pub tolerance: f64,
}

impl Agreement {
    /// No case yet.
    pub fn new(kernel: &'static str, tolerance: f64) -> Self {
        Self { kernel, cases: 0, error: 0.0, tolerance }
    }

    /// Takes in one more case.
    pub fn add(&mut self, found: &[f32], reference: &[f32]) {
        self.cases += 1;
        self.error = self.error.max(distance(found, reference));
    }

    /// Puts together what two stretches of work found of the same kernel.
    pub fn merge(&mut self, other: &Self) {
        self.cases += other.cases;
        self.error = self.error.max(other.error);
    }

    /// Whether the kernel may be used.
    pub fn is_sound(&self) -> bool {
        self.cases > 0 && self.error <= self.tolerance
    }
}

/// norm(found - reference) / norm(reference): 0 for equal bits, infinite where a number is missing or is none.
pub fn distance(found: &[f32], reference: &[f32]) -> f64 {
    if found.len() == reference.len() && found.iter().zip(reference).all(|(a, b)| a.to_bits() == b.to_bits()) {
        return 0.0;
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = square(&mut found.iter().zip(reference).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let ratio = (difference / square(&mut reference.iter().map(|b| f64::from(*b)))).sqrt();
    // Zeros of different sign differ in bits only.
    if found.len() != reference.len() || ratio.is_nan() { f64::INFINITY } else { ratio.max(f64::MIN_POSITIVE) }
}

/// Normal numbers, the same for the same name.
pub fn noise(name: &str, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(17, name);
    (0..count).map(|_| stream.normal() as f32).collect()
}

/// A check of some kernels: what they are about, and how far each is off.
pub type Check<D> = (&'static str, fn(&D) -> Result<Vec<Agreement>>);

/// Every kernel of the model's blocks but attention against its reference.
pub fn model_kernels<D: Device>() -> [Check<D>; 6] {
    [
        ("norms", super::norm::agreements),
        ("rotary embeddings", super::rope::agreements),
        ("gates", super::gated::agreements),
        ("embeddings", super::embedding::agreements),
        ("dense products", super::dense::agreements),
        ("ternary products", super::ternary::agreements),
    ]
}

/// Heads and tokens of a cache that attention is checked over.
pub type AttentionCase = (Shape, usize);

/// Small caches.
pub const SMALL: [AttentionCase; 3] = [
    (Shape { kv_heads: 1, group: 2, head_dim: 16 }, 70),
    (Shape { kv_heads: 2, group: 4, head_dim: 64 }, 200),
    (Shape { kv_heads: 1, group: 3, head_dim: 80 }, 64),
];

/// Every width there are kernels for, and lists in many parts.
pub const LARGE: [AttentionCase; 6] = [
    (Shape { kv_heads: 8, group: 4, head_dim: 128 }, 8150),
    (Shape { kv_heads: 2, group: 1, head_dim: 256 }, 3000),
    (Shape { kv_heads: 2, group: 12, head_dim: 96 }, 1000),
    (Shape { kv_heads: 1, group: 9, head_dim: 80 }, 321),
    (Shape { kv_heads: 3, group: 2, head_dim: 64 }, 2048),
    (Shape { kv_heads: 2, group: 3, head_dim: 32 }, 129),
];

/// The attention kernels against attention in f64 over the halves that were stored: the exact cache and prompts within rounding, coded
/// caches and chosen pages within the bound that the kernels state (`error` is then the largest part of it that was used); prompts over
/// coded caches beside their last token decoded.
///
/// # Errors
/// When a kernel cannot be launched.
pub fn attention_kernels<D: Device>(device: &D, cases: &[AttentionCase]) -> Result<Vec<Agreement>> {
    let mut all = vec![
        Agreement::new("decode_attention_f16", 1e-4),
        Agreement::new("decode_attention_fp8", 1.0),
        Agreement::new("decode_attention_int8_int4", 1.0),
        Agreement::new("prefill_attention_f16", 5e-3),
        Agreement::new("prefill_attention_fp8", 5e-3),
        Agreement::new("prefill_attention_int8_int4", 5e-3),
        Agreement::new("select_pages", 1.0),
    ];
    for &(shape, tokens) in cases {
        let case = Case::new(device, shape, tokens)?;
        for (at, near) in Near::ALL.into_iter().enumerate() {
            let coded = case.encode(device, near)?;
            let (queries, decoded) = case.decode(device, near, &coded, &mut all[at])?;
            case.prefill_last(device, near, &coded, (&queries, &decoded), None, &mut all[3 + at])?;
        }
        case.prefill(device, &mut all[3])?;
        case.select(device, &mut all[6])?;
    }
    Ok(all)
}

/// A cache full of noise, pages in the order of their slots.
struct Case<D: Device> {
    shape: Shape,
    tokens: usize,
    /// `[tokens, kv_heads * head_dim]`, halves.
    keys: Vec<f32>,
    values: Vec<f32>,
    exact: Buffer<D, u8>,
    slots: Vec<u32>,
    pages: usize,
}

impl<D: Device> Case<D> {
    fn new(device: &D, shape: Shape, tokens: usize) -> Result<Self> {
        let (pages, count) = (tokens.div_ceil(PAGE), tokens * shape.kv_heads * shape.head_dim);
        let halves = |name| noise(name, count).into_iter().map(|x| f16::from_f32(x).to_f32()).collect::<Vec<_>>();
        let (keys, values) = (halves("keys"), halves("values"));
        let exact = device.zeros(shape.kv_heads * pages * exact_page_bytes(shape.width()?))?;
        let slots: Vec<u32> = (0..(shape.kv_heads * pages) as u32).collect();
        let rows = Rows { keys: &device.upload(&keys)?, values: &device.upload(&values)?, count: tokens, first_position: 0 };
        append(device, &shape, &rows, &exact, &device.upload(&slots)?, pages, 0)?;
        Ok(Self { shape, tokens, keys, values, exact, slots, pages })
    }

    /// Attention of head `head` over the first `visible` tokens.
    fn reference(&self, query: &[f32], head: usize, visible: usize) -> Vec<f32> {
        let width = self.shape.head_dim;
        let row = |data: &'_ [f32], token: usize| {
            let start = (token * self.shape.kv_heads + head / self.shape.group) * width;
            data[start..start + width].iter().map(|x| f64::from(*x)).collect::<Vec<_>>()
        };
        let score = |token| row(&self.keys, token).iter().zip(query).map(|(k, q)| k * f64::from(*q)).sum::<f64>() / (width as f64).sqrt();
        let scores: Vec<f64> = (0..visible).map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mass: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        let mut out = vec![0.0; width];
        for (token, score) in scores.iter().enumerate() {
            let weight = (score - top).exp() / mass;
            out.iter_mut().zip(row(&self.values, token)).for_each(|(out, value)| *out += weight * value);
        }
        out.into_iter().map(|x| x as f32).collect()
    }

    /// Full pages before the last token's.
    fn full(&self) -> usize {
        (self.tokens - 1) / PAGE
    }

    /// Coded pages in the slots of the exact ones.
    fn encode(&self, device: &D, near: Near) -> Result<Buffer<D, u8>> {
        let coded = device.zeros(if near == Near::F16 { 0 } else { self.slots.len() * near.page_bytes(&self.shape)? })?;
        let jobs: Vec<u32> = self.slots.iter().copied().filter(|slot| (*slot as usize % self.pages) < self.full()).collect();
        let jobs_on_device = device.upload(&jobs)?;
        encode(device, &self.shape, near, &self.exact, &coded, &jobs_on_device, &jobs_on_device, jobs.len())?;
        Ok(coded)
    }

    /// Entries of all pages: only the last token's is exact.
    fn entries(&self, near: Near) -> Vec<u32> {
        let is_exact = |slot: &u32| near == Near::F16 || *slot as usize % self.pages == self.full();
        self.slots.iter().map(|slot| if is_exact(slot) { EXACT | slot } else { *slot }).collect()
    }

    fn inputs<'a>(
        &'a self,
        queries: &'a Buffer<D, f32>,
        coded: &'a Buffer<D, u8>,
        lists: &'a Buffer<D, u32>,
        list_lengths: &'a Buffer<D, u32>,
    ) -> DecodeInputs<'a, D> {
        DecodeInputs {
            queries,
            exact_pages: &self.exact,
            near_pages: coded,
            lists,
            list_stride: self.pages,
            list_lengths,
            last_tokens: (self.tokens - 1) % PAGE + 1,
        }
    }

    fn buffers(&self, device: &D, near: Near) -> Result<DecodeBuffers<D>> {
        let splits = num_splits(device, &self.shape, near, self.pages)?.max(2);
        DecodeBuffers::new(device, &self.shape, self.pages, splits, true)
    }

    /// The last token against the whole cache: its queries and outputs.
    fn decode(&self, device: &D, near: Near, coded: &Buffer<D, u8>, agreement: &mut Agreement) -> Result<(Vec<f32>, Vec<f32>)> {
        let (shape, queries) = (&self.shape, noise("queries", self.shape.heads() * self.shape.head_dim));
        let (lists, lengths) = (device.upload(&self.entries(near))?, device.upload(&vec![self.pages as u32; shape.kv_heads])?);
        let (on_device, buffers) = (device.upload(&queries)?, self.buffers(device, near)?);
        decode(device, shape, near, &self.inputs(&on_device, coded, &lists, &lengths), &buffers)?;
        let (found, summaries) = (device.download(&buffers.output)?, device.download(&buffers.summaries)?);
        for (head, query) in queries.chunks_exact(shape.head_dim).enumerate() {
            let (found, expected) = (&found[head * shape.head_dim..][..shape.head_dim], self.reference(query, head, self.tokens));
            let summary = Summary::of(&summaries, head);
            agreement.cases += 1;
            let error = distance(found, &expected);
            let allowed = f64::from(summary.bound / summary.norm);
            // Without coded pages there is no bound to use up.
            let is_exact = near == Near::F16 || self.full() == 0;
            let used = if is_exact { error * agreement.tolerance / 1e-4 } else { error / allowed };
            agreement.error = agreement.error.max(if used.is_nan() { f64::INFINITY } else { used });
        }
        Ok((queries, found))
    }

    /// The last token over half of the pages, chosen by shares of finer boxes: as the host would choose, within its bound, and the same
    /// as a prompt whose row reads those pages.
    fn select(&self, device: &D, agreement: &mut Agreement) -> Result<()> {
        const BOXES: usize = 4;
        let (shape, near) = (&self.shape, Near::Fp8);
        let pages = Pages { rows: 1, count: self.full(), stride: self.pages };
        let coded = self.encode(device, near)?;
        let slots = device.upload(&self.slots)?;
        let boxes = device.zeros(self.slots.len() * box_bytes(shape, BOXES)?)?;
        page_boxes(device, shape, BOXES, &self.exact, &boxes, &slots, &slots, self.slots.len())?;
        let queries = noise("chosen", shape.heads() * shape.head_dim);
        let on_device = device.upload(&queries)?;
        let bounds = Bounds::new(device, shape, 1, self.pages)?;
        let inputs =
            BoundsInputs { queries: &on_device, first_row: 0, boxes: Boxes::Stored { boxes: &boxes, per_page: BOXES }, table: &slots };
        page_bounds(device, shape, pages, &inputs, &bounds)?;
        let ranks = device.zeros(self.slots.len())?;
        rank_pages(device, shape, pages, Ranking::Largest, &bounds.scores, &ranks)?;
        let selection = Selection { budget: pages.count.div_ceil(2), sinks: 1, window: 1 };
        let entries = device.upload(&self.entries(near))?;
        let (lists, lengths) = (device.zeros(self.slots.len())?, device.zeros(shape.kv_heads)?);
        let chosen = device.zeros(shape.kv_heads * pages.words())?;
        let into = Lists { entries: &entries, slots: &slots, lists: &lists, lengths: &lengths };
        select_pages(device, shape, pages, selection, Some(&ranks), &Choices { chosen: &chosen, first_row: 0, lists: Some(into) })?;
        let buffers = self.buffers(device, near)?;
        decode(device, shape, near, &self.inputs(&on_device, &coded, &lists, &lengths), &buffers)?;
        unread_bound(device, shape, pages, &bounds, &chosen, &buffers.summaries)?;
        let (found, summaries) = (device.download(&buffers.output)?, device.download(&buffers.summaries)?);
        for (head, query) in queries.chunks_exact(shape.head_dim).enumerate() {
            let expected = self.reference(query, head, self.tokens);
            let summary = Summary::of(&summaries, head);
            let norm = expected.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let error = distance(&found[head * shape.head_dim..][..shape.head_dim], &expected) * norm;
            let allowed = f64::from(summary.bound + summary.unread);
            let used = if pages.count == 0 { error / (1e-4 * norm) } else { error / allowed };
            agreement.cases += 1;
            agreement.error = agreement.error.max(if used.is_nan() { f64::INFINITY } else { used });
        }
        if !self.is_chosen(device, pages, selection, &bounds, &chosen)? {
            agreement.error = f64::INFINITY;
        }
        let mut masked = Agreement::new("masked", 5e-3);
        let masks = device.zeros(chosen.len())?;
        unite_rows(device, shape, &chosen, &masks, 1, self.tokens - 1, pages.words())?;
        let masks = Masks { of_tiles: &masks, of_rows: Some(&chosen), words: pages.words() };
        self.prefill_last(device, near, &coded, (&queries, &found), Some(masks), &mut masked)?;
        if !masked.is_sound() {
            agreement.error = f64::INFINITY;
        }
        Ok(())
    }

    /// Whether the pages with the largest bounds are `chosen`.
    fn is_chosen(&self, device: &D, pages: Pages, selection: Selection, bounds: &Bounds<D>, chosen: &Buffer<D, u32>) -> Result<bool> {
        let (scores, chosen) = (device.download(&bounds.scores)?, device.download(chosen)?);
        let forced = |page: &usize| *page < selection.sinks || page + selection.window >= pages.count;
        Ok((0..self.shape.kv_heads).all(|kv_head| {
            let heads = scores.chunks_exact(pages.stride).skip(kv_head * self.shape.group).take(self.shape.group);
            let heads: Vec<&[f32]> = heads.collect();
            let most = |page: usize| heads.iter().map(|head| head[page]).fold(f32::NEG_INFINITY, f32::max);
            let mut order: Vec<usize> = (0..pages.count).collect();
            order.sort_by(|a, b| forced(b).cmp(&forced(a)).then(most(*b).total_cmp(&most(*a))).then(a.cmp(b)));
            let always = order.iter().filter(|page| forced(page)).count();
            let expected = &order[..selection.budget.max(always)];
            let words = &chosen[kv_head * pages.words()..];
            (0..pages.count).all(|page| (words[page / 32] >> (page % 32) & 1 == 1) == expected.contains(&page))
        }))
    }

    /// The last token as a prompt of its own, beside what decoding it gave.
    fn prefill_last(
        &self,
        device: &D,
        near: Near,
        coded: &Buffer<D, u8>,
        (queries, decoded): (&[f32], &[f32]),
        masks: Option<Masks<'_, D>>,
        agreement: &mut Agreement,
    ) -> Result<()> {
        let own: Vec<u32> = (0..self.shape.kv_heads).map(|head| self.slots[head * self.pages + self.full()]).collect();
        let inputs = PrefillInputs {
            queries: &device.upload(queries)?,
            rows: 1,
            first_position: self.tokens - 1,
            exact_pages: &self.exact,
            near_pages: coded,
            table: &device.upload(&self.entries(near))?,
            table_stride: self.pages,
            own: &device.upload(&own)?,
            own_stride: 1,
            masks,
        };
        let out = device.alloc(decoded.len())?;
        prefill(device, &self.shape, near, &inputs, &out)?;
        agreement.add(&device.download(&out)?, decoded);
        Ok(())
    }

    /// Every token against those before it.
    fn prefill(&self, device: &D, agreement: &mut Agreement) -> Result<()> {
        let shape = &self.shape;
        let width = shape.heads() * shape.head_dim;
        let queries = noise("prompt", self.tokens * width);
        let inputs = PrefillInputs {
            queries: &device.upload(&queries)?,
            rows: self.tokens,
            first_position: 0,
            exact_pages: &self.exact,
            near_pages: &self.exact,
            table: &device.upload(&self.slots.iter().map(|slot| EXACT | slot).collect::<Vec<_>>())?,
            table_stride: self.pages,
            own: &device.upload(&self.slots)?,
            own_stride: self.pages,
            masks: None,
        };
        let out = device.alloc(queries.len())?;
        prefill(device, shape, Near::F16, &inputs, &out)?;
        let found = device.download(&out)?;
        for row in (0..self.tokens).step_by(23.max(self.tokens / 16)) {
            let heads = queries[row * width..][..width].chunks_exact(shape.head_dim).enumerate();
            let expected: Vec<f32> = heads.flat_map(|(head, query)| self.reference(query, head, row + 1)).collect();
            agreement.add(&found[row * width..][..width], &expected);
        }
        Ok(())
    }
}

/// Asserts in tests that all of `agreements` are sound.
#[cfg(test)]
#[track_caller]
pub(crate) fn assert_sound(agreements: &[Agreement]) {
    assert!(!agreements.is_empty());
    for agreement in agreements {
        assert!(agreement.is_sound(), "{agreement:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::{Emulated, Order};

    #[test]
    fn distances() {
        assert_eq!(distance(&[1.0, f32::NAN], &[1.0, f32::NAN]), 0.0);
        assert_eq!(distance(&[1.0, f32::NAN], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(distance(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert!((distance(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert!(distance(&[0.0], &[-0.0]) > 0.0);
    }

    #[test]
    fn attention_is_within_its_bounds() {
        let Some(device) = Emulated::new() else { return };
        let found = attention_kernels(&device.in_order(Order::Random), &SMALL).unwrap();
        assert_sound(&found);
        // Some of the bound is used: it is one of these errors.
        assert!(found[1..3].iter().all(|agreement| agreement.error > 1e-3), "{found:?}");
    }

    #[test]
    fn nothing_tried_is_not_sound() {
        assert!(!Agreement::new("none", 1.0).is_sound());
    }
}
