//! One layer's page table: halves of every token far, full pages in coded form near, and what is known of each page without reading it.
//!
//! Page p is coded when the first token of page p + 1 arrives. A query at position t sees the pages before t / 64 as they are coded and
//! its own page as halves, however the text is cut into calls.

use super::boxes::{largest_products, push_box, raise_estimates};
use super::codec::{Certificate, Codec, Probe};
use super::far::FarTier;
use crate::error::{Error, Result};
use crate::infer::attention::{GroupQuery, PageTable};
use crate::multiversion;
use crate::ops::cpu::attention::{KeyValueTiles, Line, Observer, RUN, ScoreError, TILE, TileSet, Visit, mix_decoded, score_decoded};
use crate::ops::cpu::prefetch::prefetch;
use crate::ops::cpu::scratch::Scratch;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// What is kept per page and head beside its numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Facts {
    /// Of the halves; checked when they are promoted.
    checksum: u64,
    /// Largest norm of a key, original or decoded, rounded up.
    pub(super) key_norm: f32,
    /// Largest norm of an original value, rounded up.
    pub(super) value_norm: f32,
    /// At least the largest norm of a value's error.
    pub(super) value_error: f32,
    /// Mean squared norm of the value error.
    pub(super) value_square: f32,
}

/// What a table keeps beside the pages themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Norms, for certificates.
    pub(super) norms: bool,
    /// Boxes around the keys, for policies that rank pages and certificates of pages left out.
    pub(super) boxes: bool,
    /// Boxes around runs of keys, for policies that estimate.
    pub(super) runs: bool,
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
    /// At most the least and at least the largest key per channel, `[page, kv_head, 2, head_dim]`: apart from the pages, because policies
    /// read the boxes of all of them.
    boxes: Vec<f16>,
    /// The same of the originals in runs, `[page, kv_head, 64 / RUN, 2, head_dim]`.
    runs: Vec<f16>,
    /// Squared norms of the original values, rounded up, `[page, kv_head, 64]`.
    squared_norms: Vec<f32>,
    full: usize,
}

impl Pages {
    pub(super) fn new(codec: Option<Box<dyn Codec>>, kept: Kept, kv_heads: usize, head_dim: usize) -> Self {
        Self {
            kv_heads,
            head_dim,
            codec,
            kept,
            far: FarTier::new(kv_heads, head_dim),
            near: vec![],
            facts: vec![],
            boxes: vec![],
            runs: vec![],
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
            Facts { key_norm: largest_norm(&keys, self.head_dim), value_norm: largest_norm(&values, self.head_dim), ..Facts::default() };
        if let Some(codec) = &self.codec {
            facts.checksum = self.far.checksum(kv_head, self.full);
            let start = self.near.len();
            self.near.resize(start + codec.page_bytes(), 0);
            codec.encode(&keys, &values, &mut self.near[start..]);
            facts.value_error = codec.value_error(&self.near[start..]);
            facts.value_square = Certificate::read(&self.near[start..]).value_mean_square;
            if self.kept.norms {
                let mut tile = vec![0.0; self.head_dim * TILE];
                codec.decode_keys(&self.near[start..], &mut tile);
                facts.key_norm = facts.key_norm.max(largest_column_norm(&tile));
            }
        }
        if self.kept.boxes {
            self.keep_box(kv_head, &keys);
        }
        if self.kept.runs {
            keys.chunks_exact(RUN * self.head_dim).for_each(|run| push_box(run, self.head_dim, &mut self.runs));
        }
        self.facts.push(facts);
    }

    /// The codec's own box where it has one, as on devices, that of the originals otherwise.
    fn keep_box(&mut self, kv_head: usize, keys: &[f16]) {
        let head_dim = self.head_dim;
        let mut corners = Scratch::take(2 * head_dim);
        let (low, high) = corners.split_at_mut(head_dim);
        if let Some(codec) = &self.codec
            && codec.key_box(self.near_page(&**codec, kv_head, self.full), low, high)
        {
            self.boxes.extend(low.iter().map(|low| -half_up(-low)));
            self.boxes.extend(high.iter().map(|high| half_up(*high)));
            return;
        }
        push_box(keys, head_dim, &mut self.boxes);
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
            self.runs.truncate(pages * self.page_runs());
        }
    }

    fn near_page<'a>(&'a self, codec: &dyn Codec, kv_head: usize, page: usize) -> &'a [u8] {
        &self.near[(page * self.kv_heads + kv_head) * codec.page_bytes()..][..codec.page_bytes()]
    }

    /// What is known of a full page.
    pub(super) fn fact(&self, kv_head: usize, page: usize) -> &Facts {
        &self.facts[page * self.kv_heads + kv_head]
    }

    fn stored_box(&self, kv_head: usize, page: usize) -> &[f16] {
        &self.boxes[(page * self.kv_heads + kv_head) * 2 * self.head_dim..][..2 * self.head_dim]
    }

    /// Halves of the boxes of one page's runs.
    fn page_runs(&self) -> usize {
        TILE / RUN * 2 * self.head_dim
    }

    /// Checks the originals of a page before they are used.
    pub(super) fn verify(&self, kv_head: usize, page: usize) -> Result<()> {
        if self.is_coded() && self.far.checksum(kv_head, page) != self.fact(kv_head, page).checksum {
            let cause = format!("the originals of page {page} of key-value head {kv_head} have changed in memory");
            return Err(Error::input("kv", cause).fix("test this machine's memory"));
        }
        Ok(())
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
                square_up(norms);
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

    fn scores_itself(&self, _: usize, tile: usize) -> bool {
        self.coded(tile, |promoted| &promoted.keys).is_some_and(Codec::scores_itself)
    }

    fn score(&self, visit: Visit, queries: &[f32], scores: &mut [f32], scratch: &mut [f32]) {
        let Some(codec) = self.coded(visit.tile, |promoted| &promoted.keys) else {
            return self.pages.far.score(visit, queries, scores, scratch);
        };
        if !codec.score(self.pages.near_page(codec, visit.kv_head, visit.tile), queries, scores) {
            score_decoded(self, visit, queries, scores, scratch);
        }
    }

    fn mix(&self, visit: Visit, weights: &[f32], tokens: Range<usize>, outputs: &mut [f32], scratch: &mut [f32]) {
        let Some(codec) = self.coded(visit.tile, |promoted| &promoted.values) else {
            return self.pages.far.mix(visit, weights, tokens, outputs, scratch);
        };
        let next = visit.next.filter(|next| *next < self.own).map(|next| self.pages.near_page(codec, visit.kv_head, next));
        if !codec.mix(self.pages.near_page(codec, visit.kv_head, visit.tile), weights, tokens.clone(), outputs, next) {
            mix_decoded(self, visit, weights, tokens, outputs, scratch);
        }
    }
}

/// Tells lines that read pages what certificates need to know of them.
pub(super) struct Watch<'a> {
    view: &'a View<'a>,
    kv_head: usize,
    probes: Vec<Probe<'a>>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(view: &'a View<'a>, kv_head: usize, lines: &[Line<'a>]) -> Self {
        Self { view, kv_head, probes: lines.iter().map(|line| Probe::new(line.query)).collect() }
    }
}

impl Observer for Watch<'_> {
    fn squared_norms(&self, tile: usize, norms: &mut [f32; TILE]) {
        self.view.pages.squared_norms(self.kv_head, tile, self.view.has_exact_values(tile), norms);
    }

    fn score_errors(&self, tile: usize, lines: Range<usize>, errors: &mut [ScoreError]) {
        if let Some(codec) = self.view.coded(tile, |promoted| &promoted.keys) {
            codec.score_errors(self.view.pages.near_page(codec, self.kv_head, tile), &self.probes[lines], errors);
        }
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
        /// Pages ahead whose boxes are asked for.
        const AHEAD: usize = 6;
        let head_dim = self.pages.head_dim;
        let mut corners = Scratch::take(2 * head_dim);
        if page + AHEAD < self.num_pages {
            prefetch(self.pages.stored_box(self.kv_head, page + AHEAD));
        }
        self.pages.stored_box(self.kv_head, page).convert_to_f32_slice(&mut corners);
        let (low, high) = corners.split_at(head_dim);
        largest_products(query.queries, low, high, 1.0 / (head_dim as f32).sqrt(), bounds);
    }

    fn score_estimates(&self, page: usize, query: &GroupQuery<'_>, estimates: &mut [f32]) {
        let (head_dim, width) = (self.pages.head_dim, self.pages.page_runs());
        let mut corners = Scratch::take(2 * head_dim);
        estimates.fill(f32::NEG_INFINITY);
        for run in self.pages.runs[(page * self.pages.kv_heads + self.kv_head) * width..][..width].chunks_exact(2 * head_dim) {
            run.convert_to_f32_slice(&mut corners);
            let (low, high) = corners.split_at_mut(head_dim);
            low.iter_mut().zip(high.iter_mut()).for_each(|(low, high)| (*low, *high) = ((*low + *high) * 0.5, (*high - *low) * 0.5));
            raise_estimates(query.queries, low, high, 1.0 / (head_dim as f32).sqrt(), estimates);
        }
    }
}

multiversion! {
    /// Squares of norms, rounded up.
    fn square_up(norms: &mut [f32; TILE]) {
        norms.iter_mut().for_each(|norm| *norm = *norm * *norm * UP);
    }
}

/// The least half that is at least `x`, the largest for numbers beyond: keys are halves, so none is larger. Infinity stays.
fn half_up(x: f32) -> f16 {
    let near = f16::from_f32(x);
    match near.to_f32() {
        wide if wide < x => f16::from_f32(wide + (wide.abs() / 1024.0).max(6e-8)),
        f32::INFINITY if x.is_finite() => f16::MAX,
        _ => near,
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
