//! The forward pass over one block of lines: a line is one query of one head, with the range of keys it sees.
//!
//! Lines are independent of each other down to the bits: what a line gets is the same whichever lines share its block, because every
//! score and every output is its own chain of multiply-adds, and keys that only other lines see enter with weight exactly 0.

use super::product::{Product, Target};
use super::tiles::{KeyValueTiles, TILE, key_tile_len, padded, value_tile_len};
use crate::multiversion;
use crate::ops::cpu::math::{exp, ln};
use crate::ops::cpu::reduce::{self, LANES, Lanes};
use crate::ops::cpu::scratch::Scratch;

/// Lines per block: what shares one pass over the tiles.
pub(super) const BLOCK: usize = 64;
/// Lines whose scores are computed, turned into weights and used up together.
pub(super) const GROUP: usize = 8;

/// The half-open range of slots of a tile that a query sees.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    pub(super) first: usize,
    pub(super) end: usize,
}

impl Seen {
    /// What a query at `position` whose document starts at `start` sees of `tile`.
    pub(super) fn of(tile: usize, start: usize, position: usize) -> Seen {
        let base = tile * TILE;
        let end = (position + 1).clamp(base, base + TILE) - base;
        Seen { first: start.clamp(base, base + TILE).min(base + end) - base, end }
    }

    pub(super) fn is_empty(self) -> bool {
        self.first >= self.end
    }

    /// The smallest range that covers all of `seen`.
    pub(super) fn hull(seen: &[Seen]) -> Seen {
        let ranges = || seen.iter().filter(|range| !range.is_empty());
        let end = ranges().map(|range| range.end).max().unwrap_or(0);
        Seen { first: ranges().map(|range| range.first).min().unwrap_or(end), end }
    }

    /// The range widened to whole vectors: (first, length).
    pub(super) fn lanes(self) -> (usize, usize) {
        let first = self.first / LANES * LANES;
        (first, self.end.next_multiple_of(LANES) - first)
    }
}

/// Is shown what lines draw from each tile.
pub(super) trait Witness {
    /// Lines from `first_line` on have read `tile`: line `first_line + i` saw the slots `seen[i]`, with the weights exp(score - maximum)
    /// in `weights[64 * i..]`. Of a row of weights only the lanes around what its group saw mean anything: they are 0 where the line
    /// itself saw nothing.
    fn read(&mut self, block: &Block, tile: usize, first_line: usize, seen: &[Seen; GROUP], weights: &[f32]);
}

/// Nobody watches.
pub(super) struct Unwatched;

impl Witness for Unwatched {
    #[inline(always)]
    fn read(&mut self, _: &Block, _: usize, _: usize, _: &[Seen; GROUP], _: &[f32]) {}
}

/// A block of lines on its way through the tiles.
pub(super) struct Block {
    head_dim: usize,
    /// What each line sees: (start of its document, its position).
    spans: Vec<(usize, usize)>,
    /// [BLOCK, head_dim], scaled.
    queries: Scratch,
    /// [BLOCK, padded head_dim], not yet divided by the sums.
    outputs: Scratch,
    maxima: [f32; BLOCK],
    sums: [Lanes; BLOCK],
}

impl Block {
    pub(super) fn new(head_dim: usize) -> Block {
        let (queries, outputs) = (Scratch::take(BLOCK * head_dim), Scratch::take(BLOCK * padded(head_dim)));
        Block { head_dim, spans: Vec::with_capacity(BLOCK), queries, outputs, maxima: [0.0; BLOCK], sums: [[0.0; LANES]; BLOCK] }
    }

    /// Starts over without lines.
    pub(super) fn clear(&mut self) {
        self.spans.clear();
        self.outputs.fill(0.0);
        self.maxima.fill(f32::NEG_INFINITY);
        self.sums.fill([0.0; LANES]);
    }

    /// Adds a line. Lines come in ascending order of position.
    pub(super) fn push(&mut self, query: &[f32], scale: f32, start: usize, position: usize) {
        debug_assert!(start <= position && self.spans.len() < BLOCK && query.len() == self.head_dim);
        let line = &mut self.queries[self.spans.len() * self.head_dim..][..self.head_dim];
        line.iter_mut().zip(query).for_each(|(line, query)| *line = query * scale);
        self.spans.push((start, position));
    }

    /// Attends to every tile that some line sees.
    pub(super) fn attend(&mut self, tiles: &(impl KeyValueTiles + ?Sized), kv_head: usize) {
        self.attend_chosen(tiles, kv_head, |_, _| true, &mut Unwatched);
    }

    /// Attends to the tiles that a line sees and `reads(line, tile)` lets it read; `witness` is shown every step.
    pub(super) fn attend_chosen(
        &mut self,
        tiles: &(impl KeyValueTiles + ?Sized),
        kv_head: usize,
        reads: impl Fn(usize, usize) -> bool,
        witness: &mut impl Witness,
    ) {
        let Some((_, last)) = self.spans.last() else { return };
        let first = self.spans.iter().map(|(start, _)| *start).min().unwrap_or(0);
        let (mut key_scratch, mut value_scratch) =
            (Scratch::take(key_tile_len(self.head_dim)), Scratch::take(value_tile_len(self.head_dim)));
        let mut scores = Scratch::take(GROUP * TILE);
        for tile in first / TILE..=last / TILE {
            if !(0..self.spans.len()).any(|line| reads(line, tile)) {
                continue;
            }
            let keys = tiles.keys(kv_head, tile, &mut key_scratch);
            let values = tiles.values(kv_head, tile, &mut value_scratch);
            for line in (0..self.spans.len()).step_by(GROUP) {
                let mut seen = [Seen::default(); GROUP];
                for ((line, seen), (start, position)) in (line..).zip(&mut seen).zip(&self.spans[line..]) {
                    *seen = if reads(line, tile) { Seen::of(tile, *start, *position) } else { Seen::default() };
                }
                self.attend_group(line, &seen, keys, values, &mut scores);
                witness.read(self, tile, line, &seen, &scores);
            }
        }
    }

    fn attend_group(&mut self, first_line: usize, seen: &[Seen; GROUP], keys: &[f32], values: &[f32], scores: &mut [f32]) {
        let (head_dim, width) = (self.head_dim, padded(self.head_dim));
        let lines = first_line..self.spans.len().min(first_line + GROUP);
        let rows = lines.len();
        let hull = Seen::hull(&seen[..rows]);
        if hull.is_empty() {
            return;
        }
        let (first, columns) = hull.lanes();
        let queries = &self.queries[first_line * head_dim..];
        let product = Product {
            rows,
            steps: head_dim,
            columns,
            a: queries,
            a_row_stride: head_dim,
            a_step_stride: 1,
            b: &keys[first..],
            b_stride: TILE,
        };
        product.run(Target { c: &mut scores[first..], stride: TILE, accumulate: false });
        let outputs = &mut self.outputs[first_line * width..];
        soften(width, hull, &seen[..rows], scores, &mut self.maxima[lines.clone()], &mut self.sums[lines], outputs);
        let product = Product {
            rows,
            steps: hull.end - hull.first,
            columns: width,
            a: &scores[hull.first..],
            a_row_stride: TILE,
            a_step_stride: 1,
            b: &values[hull.first * width..],
            b_stride: width,
        };
        product.run(Target { c: outputs, stride: width, accumulate: true });
    }

    /// Number of lines.
    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    /// The largest score a line has met.
    pub(super) fn maximum(&self, line: usize) -> f32 {
        self.maxima[line]
    }

    /// A line's output so far, `[padded head_dim]`: sum of exp(score - maximum) value.
    pub(super) fn unfinished(&self, line: usize) -> &[f32] {
        &self.outputs[line * padded(self.head_dim)..][..padded(self.head_dim)]
    }

    /// Sum of a line's weights exp(score - maximum) so far.
    pub(super) fn sum(&self, line: usize) -> f32 {
        reduce::join(self.sums[line], |a, b| a + b)
    }

    /// Writes a line's output and returns its log-sum-exp.
    pub(super) fn finish(&self, line: usize, out: &mut [f32]) -> f32 {
        let sum = self.sum(line);
        let factor = 1.0 / sum;
        let outputs = &self.outputs[line * padded(self.head_dim)..];
        // Adding zero turns -0, which terms of weight 0 may or may not have cleared already, into 0.
        out.iter_mut().zip(outputs).for_each(|(out, x)| *out = x * factor + 0.0);
        self.maxima[line] + ln(sum)
    }
}

multiversion! {
    /// One step of the online softmax for a group of lines: scores become weights exp(score - max), the running maxima and sums are
    /// brought up to date, and the outputs so far are rescaled to the new maxima (Milakov & Gimelshein 2018, arXiv:1805.02867).
    /// Only the slots of `hull`, widened to whole vectors, are touched; there a line's weights are 0 where it sees nothing, and a line
    /// that sees nothing at all stays as it is.
    fn soften(width: usize, hull: Seen, seen: &[Seen], scores: &mut [f32], maxima: &mut [f32], sums: &mut [Lanes], outputs: &mut [f32]) {
        let (first, columns) = hull.lanes();
        let lines = seen.iter().zip(scores.chunks_exact_mut(TILE)).zip(maxima.iter_mut().zip(sums)).zip(outputs.chunks_exact_mut(width));
        for (((seen, scores), (maximum, sums)), outputs) in lines {
            let scores = &mut scores[first..first + columns];
            if seen.is_empty() {
                scores.fill(0.0);
                continue;
            }
            hide(Seen { first: seen.first - first, end: seen.end - first }, scores, f32::NEG_INFINITY);
            let larger = reduce::larger(reduce::max(scores), *maximum);
            let correction = exp(*maximum - larger);
            *maximum = larger;
            scores.iter_mut().for_each(|score| *score = exp(*score - larger));
            let rescaled = sums.map(|sum| sum * correction);
            *sums = reduce::add_to(rescaled, scores);
            if correction != 1.0 {
                outputs.iter_mut().for_each(|output| *output *= correction);
            }
        }
    }
}

/// Overwrites the slots outside `seen`.
#[inline(always)]
pub(super) fn hide(seen: Seen, scores: &mut [f32], value: f32) {
    scores[..seen.first].fill(value);
    scores[seen.end..].fill(value);
}
