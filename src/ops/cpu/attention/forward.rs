//! The forward pass over one block of lines: a line is one query of one head, with the range of keys it sees.
//!
//! Lines are independent of each other down to the bits: what a line gets is the same whichever lines share its block, because every
//! score and every output is its own chain of multiply-adds, and keys that only other lines see enter with weight exactly 0.

use super::product::{Product, Target};
use super::tiles::{KeyValueTiles, TILE, Visit, key_tile_len, padded, value_tile_len};
use crate::multiversion;
use crate::ops::cpu::math::{exp, ln};
use crate::ops::cpu::reduce::{self, LANES, Lanes};
use crate::ops::cpu::scratch::Scratch;
use std::ops::Range;

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

/// Tiles of a segment: the online softmax starts afresh at multiples of it, and what the segments give is joined in ascending order. So
/// threads can share one query of a long sequence, and how many there are does not show in the bits.
pub const SEGMENT: usize = 64;

/// Its tiles.
pub(super) fn segment(index: usize) -> Range<usize> {
    index * SEGMENT..(index + 1) * SEGMENT
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
    /// What lines have drawn from the segments before the current one.
    before: Option<Drawn>,
}

/// What lines have drawn from some tiles.
#[derive(Clone)]
pub(super) struct Drawn {
    maxima: Vec<f32>,
    sums: Vec<Lanes>,
    /// [lines, padded head_dim]
    outputs: Vec<f32>,
}

impl Drawn {
    /// Adds what the same lines drew from later tiles. A line that read nothing there stays as it is, and one that has read nothing so far
    /// takes it over.
    fn join(&mut self, later: &Drawn, width: usize) {
        const NOTHING: Lanes = [0.0; LANES];
        for (line, sums) in later.sums.iter().enumerate().filter(|(_, sums)| **sums != NOTHING) {
            let (maximum, mine, outputs) = (&mut self.maxima[line], &mut self.sums[line], &mut self.outputs[line * width..][..width]);
            let later_outputs = &later.outputs[line * width..][..width];
            if *mine == NOTHING {
                (*maximum, *mine) = (later.maxima[line], *sums);
                outputs.copy_from_slice(later_outputs);
            } else {
                join_line(maximum, mine, outputs, later.maxima[line], sums, later_outputs);
            }
        }
    }
}

impl Block {
    pub(super) fn new(head_dim: usize) -> Block {
        let (queries, outputs) = (Scratch::take(BLOCK * head_dim), Scratch::take(BLOCK * padded(head_dim)));
        Block {
            head_dim,
            spans: Vec::with_capacity(BLOCK),
            queries,
            outputs,
            maxima: [0.0; BLOCK],
            sums: [[0.0; LANES]; BLOCK],
            before: None,
        }
    }

    /// Starts over without lines.
    pub(super) fn clear(&mut self) {
        self.spans.clear();
        self.before = None;
    }

    /// Adds a line. Lines come in ascending order of position.
    pub(super) fn push(&mut self, query: &[f32], scale: f32, start: usize, position: usize) {
        debug_assert!(start <= position && self.spans.len() < BLOCK && query.len() == self.head_dim);
        let (index, width) = (self.spans.len(), padded(self.head_dim));
        self.maxima[index] = f32::NEG_INFINITY;
        self.sums[index] = [0.0; LANES];
        self.outputs[index * width..][..width].fill(0.0);
        let line = &mut self.queries[index * self.head_dim..][..self.head_dim];
        line.iter_mut().zip(query).for_each(|(line, query)| *line = query * scale);
        self.spans.push((start, position));
    }

    /// Attends to every tile that some line sees.
    pub(super) fn attend(&mut self, tiles: &(impl KeyValueTiles + ?Sized), kv_head: usize) {
        self.attend_chosen(tiles, kv_head, 0..usize::MAX, |_, _| true, &mut Unwatched);
        self.close();
    }

    /// Attends to the tiles of `within` that a line sees and `reads(line, tile)` lets it read; `witness` is shown every step. To be followed by
    /// [`close`](Self::close), or [`into_drawn`](Self::into_drawn) where all tiles are of one segment.
    pub(super) fn attend_chosen(
        &mut self,
        tiles: &(impl KeyValueTiles + ?Sized),
        kv_head: usize,
        within: Range<usize>,
        reads: impl Fn(usize, usize) -> bool,
        witness: &mut impl Witness,
    ) {
        let Some((_, last)) = self.spans.last() else { return };
        let first = self.spans.iter().map(|(start, _)| *start).min().unwrap_or(0);
        let (mut key_scratch, mut value_scratch) =
            (Scratch::take(key_tile_len(self.head_dim)), Scratch::take(value_tile_len(self.head_dim)));
        let mut scores = Scratch::take(GROUP * TILE);
        let range = within.start.max(first / TILE)..within.end.min(last / TILE + 1);
        let lines = self.spans.len();
        let mut chosen = range.filter(|tile| (0..lines).any(|line| reads(line, *tile))).peekable();
        let mut segment = None;
        while let Some(tile) = chosen.next() {
            if segment.replace(tile / SEGMENT).is_some_and(|before| before != tile / SEGMENT) {
                self.fold();
            }
            let seen = |block: &Self, line: usize| {
                let mut seen = [Seen::default(); GROUP];
                for ((line, seen), (start, position)) in (line..).zip(&mut seen).zip(&block.spans[line..]) {
                    *seen = if reads(line, tile) { Seen::of(tile, *start, *position) } else { Seen::default() };
                }
                seen
            };
            if self.spans.len() <= GROUP {
                let (seen, visit) = (seen(self, 0), Visit { kv_head, tile, next: chosen.peek().copied(), rows: self.spans.len() });
                self.attend_few(tiles, visit, &seen, &mut scores, &mut key_scratch, &mut value_scratch);
                witness.read(self, tile, 0, &seen, &scores);
                continue;
            }
            let values = tiles.values(kv_head, tile, &mut value_scratch);
            let own_scores = tiles.scores_itself(kv_head, tile);
            let keys = if own_scores { None } else { Some(tiles.keys(kv_head, tile, &mut key_scratch)) };
            for line in (0..self.spans.len()).step_by(GROUP) {
                let seen = seen(self, line);
                if own_scores {
                    let rows = GROUP.min(self.spans.len() - line);
                    let queries = &self.queries[line * self.head_dim..][..rows * self.head_dim];
                    let visit = Visit { kv_head, tile, next: None, rows };
                    tiles.score(visit, queries, &mut scores[..rows * TILE], &mut []);
                }
                self.attend_group(line, &seen, keys, values, &mut scores);
                witness.read(self, tile, line, &seen, &scores);
            }
        }
    }

    /// One tile for lines so few that the tile's source may multiply without writing it out.
    fn attend_few(
        &mut self,
        tiles: &(impl KeyValueTiles + ?Sized),
        visit: Visit,
        seen: &[Seen; GROUP],
        scores: &mut [f32],
        key_scratch: &mut [f32],
        value_scratch: &mut [f32],
    ) {
        let (rows, width) = (visit.rows, padded(self.head_dim));
        let hull = Seen::hull(&seen[..rows]);
        if hull.is_empty() {
            return;
        }
        tiles.score(visit, &self.queries[..rows * self.head_dim], &mut scores[..rows * TILE], key_scratch);
        let outputs = &mut self.outputs[..rows * width];
        soften(width, hull, &seen[..rows], scores, &mut self.maxima[..rows], &mut self.sums[..rows], outputs);
        tiles.mix(visit, &scores[..rows * TILE], hull.first..hull.end, outputs, value_scratch);
    }

    /// Ends a segment: what the lines have drawn since the last one joins what they drew before, and they start afresh.
    fn fold(&mut self) {
        let current = self.take();
        self.join(&current);
    }

    /// What the lines have drawn in the current segment, which then starts afresh.
    fn take(&mut self) -> Drawn {
        let rows = self.spans.len();
        let drawn = Drawn {
            maxima: self.maxima[..rows].to_vec(),
            sums: self.sums[..rows].to_vec(),
            outputs: self.outputs[..rows * padded(self.head_dim)].to_vec(),
        };
        self.maxima[..rows].fill(f32::NEG_INFINITY);
        self.sums[..rows].fill([0.0; LANES]);
        self.outputs[..rows * padded(self.head_dim)].fill(0.0);
        drawn
    }

    /// Adds a later segment to those before.
    pub(super) fn join(&mut self, segment: &Drawn) {
        match &mut self.before {
            Some(before) => before.join(segment, padded(self.head_dim)),
            before => *before = Some(segment.clone()),
        }
    }

    /// Ends the last segment; [`finish`](Self::finish) and what follows it speak of all of them.
    pub(super) fn close(&mut self) {
        if self.before.is_some() {
            self.fold();
        }
        if let Some(Drawn { maxima, sums, outputs }) = self.before.take() {
            self.maxima[..maxima.len()].copy_from_slice(&maxima);
            self.sums[..sums.len()].copy_from_slice(&sums);
            self.outputs[..outputs.len()].copy_from_slice(&outputs);
        }
    }

    /// What the lines have drawn from one segment, for [`join`](Self::join) of another block of the same lines.
    pub(super) fn into_drawn(mut self) -> Drawn {
        debug_assert!(self.before.is_none(), "a block that saw one segment");
        self.take()
    }

    /// One tile for a group of lines; without `keys`, `scores` are there already.
    fn attend_group(&mut self, first_line: usize, seen: &[Seen; GROUP], keys: Option<&[f32]>, values: &[f32], scores: &mut [f32]) {
        let (head_dim, width) = (self.head_dim, padded(self.head_dim));
        let lines = first_line..self.spans.len().min(first_line + GROUP);
        let rows = lines.len();
        let hull = Seen::hull(&seen[..rows]);
        if hull.is_empty() {
            return;
        }
        let (first, columns) = hull.lanes();
        if let Some(keys) = keys {
            let product = Product {
                rows,
                steps: head_dim,
                columns,
                a: &self.queries[first_line * head_dim..],
                a_row_stride: head_dim,
                a_step_stride: 1,
                b: &keys[first..],
                b_stride: TILE,
            };
            product.run(Target { c: &mut scores[first..], stride: TILE, accumulate: false });
        }
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

multiversion! {
    /// Joins what a line drew from two runs of tiles.
    fn join_line(maximum: &mut f32, sums: &mut Lanes, outputs: &mut [f32], later: f32, later_sums: &Lanes, later_outputs: &[f32]) {
        let larger = reduce::larger(later, *maximum);
        let (mine, theirs) = (exp(*maximum - larger), exp(later - larger));
        *maximum = larger;
        sums.iter_mut().zip(later_sums).for_each(|(sum, later)| *sum = later.mul_add(theirs, *sum * mine));
        outputs.iter_mut().zip(later_outputs).for_each(|(output, later)| *output = later.mul_add(theirs, *output * mine));
    }
}

/// Overwrites the slots outside `seen`.
#[inline(always)]
pub(super) fn hide(seen: Seen, scores: &mut [f32], value: f32) {
    scores[..seen.first].fill(value);
    scores[seen.end..].fill(value);
}
