//! One layer's page table: halves of every token far, full pages in coded form near, and what is known of each page without reading it.
//!
//! Page p is coded when the first token of page p + 1 arrives. A query at position t sees the pages before t / 64 as they are coded and
//! its own page as halves, however the text is cut into calls.

use super::codec::Codec;
use super::far::FarTier;
use crate::error::{Error, Result};
use crate::infer::attention::{GroupQuery, PageTable};
use crate::multiversion;
use crate::ops::cpu::attention::{KeyValueTiles, TILE, TileSet};
use crate::ops::cpu::reduce::{self, LANES};
use crate::ops::cpu::scratch::Scratch;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// What is kept per page and head beside its numbers.
#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    /// Of the halves; checked when they are promoted.
    checksum: u64,
    /// Largest norm of a key, original or decoded, rounded up.
    key_norm: f32,
    /// Largest norm of an original value, rounded up.
    value_norm: f32,
}

/// What a table keeps beside the pages themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Norms, for certificates.
    pub(super) norms: bool,
    /// Boxes around the keys, for policies that rank pages and certificates of pages left out.
    pub(super) boxes: bool,
}

/// A factor above 1 that covers the rounding of a norm.
const UP: f32 = 1.0 + 1.0 / 65536.0;

/// One layer's pages.
pub(super) struct Pages {
    kv_heads: usize,
    head_dim: usize,
    codec: Option<Box<dyn Codec>>,
    kept: Kept,
    far: FarTier,
    /// `[page, kv_head, page_bytes]`
    near: Vec<u8>,
    /// Of full pages that are followed by a token, `[page, kv_head]`.
    facts: Vec<Facts>,
    /// Least and largest key per channel, `[page, kv_head, 2, head_dim]`; empty when the codec knows them.
    boxes: Vec<f16>,
    /// Squared norms of the original values, rounded up, `[page, kv_head, 64]`.
    squared_norms: Vec<f32>,
    full: usize,
}

impl Pages {
    pub(super) fn new(codec: Option<Box<dyn Codec>>, kept: Kept, kv_heads: usize, head_dim: usize) -> Self {
        let mut corner = [vec![0.0; head_dim], vec![0.0; head_dim]];
        let [low, high] = &mut corner;
        let knows_boxes = codec.as_ref().is_some_and(|codec| codec.key_box(&vec![0; codec.page_bytes()], low, high));
        Self {
            kv_heads,
            head_dim,
            codec,
            kept: Kept { boxes: kept.boxes && !knows_boxes, ..kept },
            far: FarTier::new(kv_heads, head_dim),
            near: vec![],
            facts: vec![],
            boxes: vec![],
            squared_norms: vec![],
            full: 0,
        }
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Whether pages are stored in a form that differs from their originals.
    pub(super) fn is_coded(&self) -> bool {
        self.codec.is_some()
    }

    /// Bytes of one page of one head as attention reads it.
    pub(super) fn page_bytes(&self) -> usize {
        self.codec.as_ref().map_or(2 * self.half_page_bytes(), |codec| codec.page_bytes())
    }

    /// Bytes of the original keys, or of the original values, of one page of one head.
    pub(super) fn half_page_bytes(&self) -> usize {
        TILE * self.head_dim * 2
    }

    pub(super) fn append(&mut self, keys: &[f32], values: &[f32]) {
        self.far.append(keys, values);
        if self.kept.norms {
            self.keep_norms(values);
        }
        // A page is finished by the token after it.
        while (self.full + 1) * TILE < self.far.positions() {
            for kv_head in 0..self.kv_heads {
                self.finish_page(kv_head);
            }
            self.full += 1;
        }
    }

    fn keep_norms(&mut self, values: &[f32]) {
        let rows = values.len() / (self.kv_heads * self.head_dim);
        let first = self.far.positions() - rows;
        self.squared_norms.resize(self.far.positions().div_ceil(TILE) * self.kv_heads * TILE, 0.0);
        for (row, values) in values.chunks_exact(self.kv_heads * self.head_dim).enumerate() {
            for (kv_head, value) in values.chunks_exact(self.head_dim).enumerate() {
                let (page, slot) = ((first + row) / TILE, (first + row) % TILE);
                // Rounding to half precision moves a number by less than one part in 2048, or by half of its smallest step.
                let norm = value.iter().map(|x| x * x).sum::<f32>().sqrt() * (1.0 + 1.0 / 1024.0) + 3e-8 * (self.head_dim as f32).sqrt();
                self.squared_norms[(page * self.kv_heads + kv_head) * TILE + slot] = (norm * norm * UP).min(f32::MAX);
            }
        }
    }

    /// Codes the first page that is not, and notes what is worth knowing of it.
    fn finish_page(&mut self, kv_head: usize) {
        let [keys, values] = self.far.rows(kv_head, self.full);
        let mut facts =
            Facts { checksum: 0, key_norm: largest_norm(&keys, self.head_dim), value_norm: largest_norm(&values, self.head_dim) };
        if let Some(codec) = &self.codec {
            facts.checksum = self.far.checksum(kv_head, self.full);
            let start = self.near.len();
            self.near.resize(start + codec.page_bytes(), 0);
            codec.encode(&keys, &values, &mut self.near[start..]);
            if self.kept.norms {
                let mut tile = vec![0.0; self.head_dim * TILE];
                codec.decode_keys(&self.near[start..], &mut tile);
                facts.key_norm = facts.key_norm.max(largest_column_norm(&tile));
            }
        }
        if self.kept.boxes {
            let mut channel = |pick: fn(f16, f16) -> f16| {
                let least = |channel: usize| keys.iter().skip(channel).step_by(self.head_dim).copied().reduce(pick).unwrap_or_default();
                self.boxes.extend((0..self.head_dim).map(least));
            };
            channel(|a, b| if b < a || b.is_nan() { b } else { a });
            channel(|a, b| if b > a || b.is_nan() { b } else { a });
        }
        self.facts.push(facts);
    }

    pub(super) fn truncate(&mut self, positions: usize) {
        self.far.truncate(positions);
        let full = positions.saturating_sub(1) / TILE;
        if full < self.full {
            self.full = full;
            let pages = full * self.kv_heads;
            self.facts.truncate(pages);
            if let Some(codec) = &self.codec {
                self.near.truncate(pages * codec.page_bytes());
            }
            self.boxes.truncate(pages * 2 * self.head_dim);
        }
    }

    fn near_page<'a>(&'a self, codec: &dyn Codec, kv_head: usize, page: usize) -> &'a [u8] {
        &self.near[(page * self.kv_heads + kv_head) * codec.page_bytes()..][..codec.page_bytes()]
    }

    fn fact(&self, kv_head: usize, page: usize) -> &Facts {
        &self.facts[page * self.kv_heads + kv_head]
    }

    /// Checks the originals of a page before they are used.
    pub(super) fn verify(&self, kv_head: usize, page: usize) -> Result<()> {
        if self.is_coded() && self.far.checksum(kv_head, page) != self.fact(kv_head, page).checksum {
            let cause = format!("the originals of page {page} of key-value head {kv_head} have changed in memory");
            return Err(Error::input("kv", cause).fix("test this machine's memory"));
        }
        Ok(())
    }

    /// What is known of a page that was or was not read in coded form, for one query.
    pub(super) fn page_error(&self, kv_head: usize, page: usize, query: &[f32]) -> PageError {
        let Facts { key_norm, value_norm, .. } = *self.fact(kv_head, page);
        let known = PageError { key_norm, original_norm: value_norm, ..PageError::default() };
        let Some(codec) = &self.codec else { return known };
        let bytes = self.near_page(&**codec, kv_head, page);
        let (score_variance, value_square) = codec.mean_squares(bytes, query);
        PageError { score: codec.score_error(bytes, query), value: codec.value_error(bytes), score_variance, value_square, ..known }
    }

    /// The pages before `own` of one head.
    pub(super) fn before(&self, own: usize, kv_head: usize) -> Before<'_> {
        Before { pages: self, kv_head, num_pages: own }
    }

    /// All pages as halves.
    pub(super) fn originals(&self) -> &FarTier {
        &self.far
    }

    /// Squared norms of a page's values, those of originals when `exact`.
    pub(super) fn squared_norms(&self, kv_head: usize, page: usize, exact: bool, norms: &mut [f32; TILE]) {
        match &self.codec {
            Some(codec) if !exact => {
                codec.value_norms(self.near_page(&**codec, kv_head, page), norms);
                norms.iter_mut().for_each(|norm| *norm = *norm * *norm * UP);
            }
            _ => norms.copy_from_slice(&self.squared_norms[(page * self.kv_heads + kv_head) * TILE..][..TILE]),
        }
    }
}

#[cfg(test)]
impl Pages {
    /// Changes what is remembered of every page's originals.
    pub(super) fn damage_originals(&mut self) {
        self.facts.iter_mut().for_each(|facts| facts.checksum ^= 1);
    }
}

/// Errors and sizes of one page towards one query.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PageError {
    /// At least the largest score error, rounding excluded.
    pub(super) score: f32,
    /// At least the largest norm of a value's error.
    pub(super) value: f32,
    /// Variance of the score error.
    pub(super) score_variance: f32,
    /// Mean squared norm of the value error.
    pub(super) value_square: f32,
    /// At least the norm of any key, original or decoded.
    pub(super) key_norm: f32,
    /// At least the norm of any original value.
    pub(super) original_norm: f32,
}

/// Pages as queries of one page see them: coded, except their own and those of which originals have been promoted.
pub(super) struct View<'a> {
    pub(super) pages: &'a Pages,
    /// The queries' own page.
    pub(super) own: usize,
    pub(super) promoted: Option<&'a Promoted>,
}

/// Pages of which originals are read.
#[derive(Clone, Debug, Default)]
pub(super) struct Promoted {
    pub(super) keys: TileSet,
    pub(super) values: TileSet,
}

impl View<'_> {
    fn coded(&self, tile: usize, exact: impl Fn(&Promoted) -> &TileSet) -> Option<&dyn Codec> {
        let promoted = tile >= self.own || self.promoted.is_some_and(|promoted| exact(promoted).contains(tile));
        if promoted { None } else { self.pages.codec.as_deref() }
    }

    /// Whether a page's values are the originals.
    pub(super) fn has_exact_values(&self, tile: usize) -> bool {
        self.coded(tile, |promoted| &promoted.values).is_none()
    }

    /// Whether a page's keys are the originals.
    pub(super) fn has_exact_keys(&self, tile: usize) -> bool {
        self.coded(tile, |promoted| &promoted.keys).is_none()
    }
}

impl KeyValueTiles for View<'_> {
    fn keys<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        let Some(codec) = self.coded(tile, |promoted| &promoted.keys) else { return self.pages.far.keys(kv_head, tile, scratch) };
        codec.decode_keys(self.pages.near_page(codec, kv_head, tile), scratch);
        scratch
    }

    fn values<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        let Some(codec) = self.coded(tile, |promoted| &promoted.values) else { return self.pages.far.values(kv_head, tile, scratch) };
        codec.decode_values(self.pages.near_page(codec, kv_head, tile), scratch);
        scratch
    }
}

/// The pages before a query's own.
pub(super) struct Before<'a> {
    pages: &'a Pages,
    kv_head: usize,
    num_pages: usize,
}

impl PageTable for Before<'_> {
    fn num_pages(&self) -> usize {
        self.num_pages
    }

    fn score_bounds(&self, page: usize, query: &GroupQuery<'_>, bounds: &mut [f32]) {
        let head_dim = self.pages.head_dim;
        let mut corners = Scratch::take(2 * head_dim);
        let (low, high) = corners.split_at_mut(head_dim);
        match &self.pages.codec {
            Some(codec) if !self.pages.kept.boxes => {
                codec.key_box(self.pages.near_page(&**codec, self.kv_head, page), low, high);
            }
            _ => {
                let stored = &self.pages.boxes[(page * self.pages.kv_heads + self.kv_head) * 2 * head_dim..][..2 * head_dim];
                stored[..head_dim].convert_to_f32_slice(low);
                stored[head_dim..].convert_to_f32_slice(high);
            }
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        bounds.iter_mut().zip(query.heads()).for_each(|(bound, query)| *bound = largest_product(query, low, high) * scale);
    }
}

multiversion! {
    /// Largest product of a vector with one from the box `low..high`.
    fn largest_product(query: &[f32], low: &[f32], high: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (queries, rest) = query.as_chunks::<LANES>();
        let ((lows, low_rest), (highs, high_rest)) = (low.as_chunks::<LANES>(), high.as_chunks::<LANES>());
        for ((query, low), high) in queries.iter().zip(lows).zip(highs) {
            for lane in 0..LANES {
                lanes[lane] += (query[lane] * low[lane]).max(query[lane] * high[lane]);
            }
        }
        let rest = rest.iter().zip(low_rest).zip(high_rest);
        rest.zip(&mut lanes).for_each(|(((query, low), high), lane)| *lane += (query * low).max(query * high));
        reduce::join(lanes, |a, b| a + b)
    }
}

/// Largest norm of a row, rounded up.
fn largest_norm(rows: &[f16], width: usize) -> f32 {
    let square = |row: &[f16]| row.iter().map(|x| x.to_f32() * x.to_f32()).sum::<f32>();
    up_root(rows.chunks_exact(width).map(square))
}

/// Largest norm of a column of a key tile, rounded up.
fn largest_column_norm(tile: &[f32]) -> f32 {
    let mut squares = [0.0f32; TILE];
    for line in tile.chunks_exact(TILE) {
        squares.iter_mut().zip(line).for_each(|(square, x)| *square = x.mul_add(*x, *square));
    }
    up_root(squares.into_iter())
}

/// The root of the largest; not finite when one is not.
fn up_root(squares: impl Iterator<Item = f32>) -> f32 {
    squares.fold(0.0f32, |most, square| if square > most || square.is_nan() { square } else { most }).sqrt() * UP * UP
}
