//! A kernel beside its CPU reference: what tests assert and what `osprey doctor` repeats on a GPU.

use super::attention::{
    DecodeBuffers, DecodeInputs, EXACT, Near, PAGE, PrefillInputs, Rows, Shape, Summary, append, decode, encode, exact_page_bytes, prefill,
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

/// Every kernel of the model's blocks but attention against its reference.
///
/// # Errors
/// When a kernel cannot be launched.
pub fn model_kernels<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let mut all = vec![];
    all.extend(super::norm::agreements(device)?);
    all.extend(super::rope::agreements(device)?);
    all.extend(super::gated::agreements(device)?);
    all.extend(super::embedding::agreements(device)?);
    all.extend(super::dense::agreements(device)?);
    all.extend(super::ternary::agreements(device)?);
    Ok(all)
}

/// The attention kernels against attention in f64 over the halves that were stored: the exact cache and prompts within rounding, coded
/// caches within the bound that the kernel states (`error` is then the largest part of it that was used).
///
/// # Errors
/// When a kernel cannot be launched.
pub fn attention_kernels<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let mut all = vec![
        Agreement::new("decode_attention_f16", 1e-4),
        Agreement::new("decode_attention_fp8", 1.0),
        Agreement::new("decode_attention_int8_int4", 1.0),
        Agreement::new("prefill_attention_f16", 5e-3),
    ];
    for (kv_heads, group, head_dim, tokens) in [(1, 2, 16, 70), (2, 4, 64, 200), (1, 3, 80, 64)] {
        let case = Case::new(device, Shape { kv_heads, group, head_dim }, tokens)?;
        for (agreement, near) in all.iter_mut().zip(Near::ALL) {
            case.decode(device, near, agreement)?;
        }
        case.prefill(device, &mut all[3])?;
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

    /// The last token against the whole cache.
    fn decode(&self, device: &D, near: Near, agreement: &mut Agreement) -> Result<()> {
        let (shape, full) = (&self.shape, (self.tokens - 1) / PAGE);
        let slots = device.upload(&self.slots)?;
        let coded = device.zeros(if near == Near::F16 { 0 } else { self.slots.len() * near.page_bytes(shape)? })?;
        let jobs: Vec<u32> = self.slots.iter().copied().filter(|slot| (*slot as usize % self.pages) < full).collect();
        let jobs_on_device = device.upload(&jobs)?;
        encode(device, shape, near, &self.exact, &coded, &jobs_on_device, &jobs_on_device, jobs.len())?;
        let entry = |slot: &u32| if near == Near::F16 || *slot as usize % self.pages == full { EXACT | slot } else { *slot };
        device.write(&slots, 0, &self.slots.iter().map(entry).collect::<Vec<_>>())?;
        let queries = noise("queries", shape.heads() * shape.head_dim);
        let inputs = DecodeInputs {
            queries: &device.upload(&queries)?,
            exact_pages: &self.exact,
            near_pages: &coded,
            lists: &slots,
            list_stride: self.pages,
            list_lengths: &device.upload(&vec![self.pages as u32; shape.kv_heads])?,
            last_tokens: (self.tokens - 1) % PAGE + 1,
        };
        let buffers = DecodeBuffers::new(device, shape, self.pages, 2)?;
        decode(device, shape, near, &inputs, &buffers)?;
        let (found, summaries) = (device.download(&buffers.output)?, device.download(&buffers.summaries)?);
        for (head, query) in queries.chunks_exact(shape.head_dim).enumerate() {
            let (found, expected) = (&found[head * shape.head_dim..][..shape.head_dim], self.reference(query, head, self.tokens));
            let summary = Summary::of(&summaries, head);
            agreement.cases += 1;
            let error = distance(found, &expected);
            let allowed = f64::from(summary.bound / summary.norm);
            // Without coded pages there is no bound to use up.
            let is_exact = near == Near::F16 || full == 0;
            let used = if is_exact { error * agreement.tolerance / 1e-4 } else { error / allowed };
            agreement.error = agreement.error.max(if used.is_nan() { f64::INFINITY } else { used });
        }
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
        for row in (0..self.tokens).step_by(23) {
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
        let found = attention_kernels(&device.in_order(Order::Random)).unwrap();
        assert_sound(&found);
        // Some of the bound is used: it is one of these errors.
        assert!(found[1..3].iter().all(|agreement| agreement.error > 1e-3), "{found:?}");
    }

    #[test]
    fn nothing_tried_is_not_sound() {
        assert!(!Agreement::new("none", 1.0).is_sound());
    }
}
