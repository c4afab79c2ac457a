//! A cache on the emulated device for tests: tokens appended and encoded by the kernels, pages in shuffled slots among poisoned ones.

use half::f16;

use super::reference::{Head, coded};
use super::*;
use crate::ops::cuda::{Buffer, Device, Emulated};
use crate::ops::rng::Stream;

/// Numbers that tests draw.
pub(super) struct Draw(Stream);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Self(Stream::new(seed, "cuda attention"))
    }

    pub(super) fn normal(&mut self) -> f32 {
        self.0.normal() as f32
    }

    pub(super) fn below(&mut self, count: usize) -> usize {
        ((self.0.normal().abs() * 7919.0) as usize) % count.max(1)
    }

    pub(super) fn shuffled(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        (1..count).rev().for_each(|at| order.swap(at, self.below(at + 1)));
        order
    }
}

/// Tokens of all key-value heads, `[tokens, kv_heads * head_dim]`, already halves.
pub(super) struct Tokens {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
}

impl Tokens {
    /// Keys with uneven channels and offsets, values of uneven tokens.
    pub(super) fn draw(draw: &mut Draw, shape: &Shape, count: usize) -> Self {
        let width = shape.kv_heads * shape.head_dim;
        let scales: Vec<f32> = (0..width).map(|_| (0.5 * draw.normal()).exp()).collect();
        let offsets: Vec<f32> = (0..width).map(|_| draw.normal()).collect();
        let half = |x: f32| f16::from_f32(x).to_f32();
        let keys = (0..count * width).map(|i| half(draw.normal() * scales[i % width] + offsets[i % width])).collect();
        let sizes: Vec<f32> = (0..count).map(|_| (0.5 * draw.normal()).exp()).collect();
        let values = (0..count * width).map(|i| half(draw.normal() * sizes[i / width])).collect();
        Self { keys, values }
    }

    /// Tokens `from..to` of one head.
    pub(super) fn head(&self, shape: &Shape, kv_head: usize, from: usize, to: usize) -> Head {
        let pick = |data: &[f32]| {
            let rows = data.chunks_exact(shape.kv_heads * shape.head_dim).skip(from).take(to - from);
            rows.flat_map(|row| row[kv_head * shape.head_dim..][..shape.head_dim].to_vec()).collect()
        };
        Head { keys: pick(&self.keys), values: pick(&self.values) }
    }
}

/// Pages of one layer on the device.
pub(super) struct Cache {
    pub(super) shape: Shape,
    pub(super) near: Near,
    pub(super) tokens: Tokens,
    pub(super) count: usize,
    pub(super) exact: Buffer<Emulated, u8>,
    pub(super) near_pages: Buffer<Emulated, u8>,
    /// `[kv_heads][pages]`
    pub(super) exact_slots: Vec<Vec<u32>>,
    pub(super) near_slots: Vec<Vec<u32>>,
}

impl Cache {
    /// Appends `tokens` in two calls and encodes every full page.
    pub(super) fn new(device: &Emulated, draw: &mut Draw, shape: Shape, near: Near, tokens: Tokens) -> Self {
        let width = shape.kv_heads * shape.head_dim;
        let count = tokens.keys.len() / width;
        let pages = count.div_ceil(PAGE);
        let mut slots = || -> Vec<Vec<u32>> {
            let order = draw.shuffled(shape.kv_heads * pages + 3);
            order
                .iter()
                .take(shape.kv_heads * pages)
                .map(|slot| *slot as u32)
                .collect::<Vec<_>>()
                .chunks(pages.max(1))
                .map(<[u32]>::to_vec)
                .collect()
        };
        let (exact_slots, near_slots) = (slots(), slots());
        let num_slots = shape.kv_heads * pages + 3;
        let exact = device.alloc(num_slots * exact_page_bytes(shape.width().unwrap())).unwrap();
        let near_pages = device.alloc(num_slots * near.page_bytes(&shape).unwrap()).unwrap();
        let table = device.upload(&exact_slots.concat()).unwrap();
        let cut = count / 3;
        for (from, to) in [(0, cut), (cut, count)] {
            let keys = device.upload(&tokens.keys[from * width..to * width]).unwrap();
            let values = device.upload(&tokens.values[from * width..to * width]).unwrap();
            let rows = Rows { keys: &keys, values: &values, count: to - from, first_position: from };
            append(device, &shape, &rows, &exact, &table, pages, 0).unwrap();
        }
        let jobs: Vec<(u32, u32)> = (0..shape.kv_heads * (count / PAGE))
            .map(|job| (job / (count / PAGE), job % (count / PAGE)))
            .map(|(head, page)| (exact_slots[head][page], near_slots[head][page]))
            .collect();
        let sources = device.upload(&jobs.iter().map(|job| job.0).collect::<Vec<_>>()).unwrap();
        let targets = device.upload(&jobs.iter().map(|job| job.1).collect::<Vec<_>>()).unwrap();
        encode(device, &shape, near, &exact, &near_pages, &sources, &targets, jobs.len()).unwrap();
        Self { shape, near, tokens, count, exact, near_pages, exact_slots, near_slots }
    }

    pub(super) fn pages(&self) -> usize {
        self.count.div_ceil(PAGE)
    }

    /// The entry of `page` for `kv_head`; the page under way is always exact.
    pub(super) fn entry(&self, kv_head: usize, page: usize, exact: bool) -> u32 {
        let full = page < self.count / PAGE;
        if exact || !full || self.near == Near::F16 { self.exact_slots[kv_head][page] | EXACT } else { self.near_slots[kv_head][page] }
    }

    /// What attention over `pages` (with flag: exact) should see of `kv_head`, and the same with every page exact.
    pub(super) fn seen(&self, kv_head: usize, pages: &[(usize, bool)]) -> (Head, Head) {
        let (mut seen, mut exact) = (Head::default(), Head::default());
        for &(page, is_exact) in pages {
            let head = self.tokens.head(&self.shape, kv_head, page * PAGE, (page * PAGE + PAGE).min(self.count));
            let near = !is_exact && page < self.count / PAGE && self.near != Near::F16;
            let part = if near { coded(self.near, &self.shape, &head).head } else { head.clone() };
            seen.keys.extend(part.keys);
            seen.values.extend(part.values);
            exact.keys.extend(head.keys);
            exact.values.extend(head.values);
        }
        (seen, exact)
    }
}

pub(super) fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// norm(a - b)
pub(super) fn distance(a: &[f32], b: &[f64]) -> f64 {
    norm(&a.iter().zip(b).map(|(a, b)| f64::from(*a) - b).collect::<Vec<_>>())
}
