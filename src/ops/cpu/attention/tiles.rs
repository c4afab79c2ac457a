//! Keys and values in tiles of 64 positions: the layout that attention reads, in training and from a cache.
//!
//! A key tile is transposed, [head_dim, 64], so that scores of 64 keys come side by side; a value tile is [64, padded head_dim].

use super::product::{Product, Target};
use crate::multiversion;
use crate::ops::cpu::reduce::LANES;
use std::ops::Range;

/// Positions per tile. Tiles start at multiples of it, counted from the start of the sequence.
pub const TILE: usize = 64;

/// Consecutive keys in the boxes from which the scores of a tile are estimated: a box around more unlike keys says little about any.
pub const RUN: usize = 8;

/// `head_dim` rounded up to whole vectors: the width of a value's row in a tile.
pub const fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES)
}

/// Floats in a key tile of one key-value head.
pub const fn key_tile_len(head_dim: usize) -> usize {
    head_dim * TILE
}

/// Floats in a value tile of one key-value head.
pub const fn value_tile_len(head_dim: usize) -> usize {
    TILE * padded(head_dim)
}

/// Where attention finds the keys and values of a sequence. A source that stores them in another form decodes into `scratch`,
/// which has the length of the tile asked for.
///
/// Positions past the last one stored may hold anything finite: what a query may not see contributes exactly 0.
pub trait KeyValueTiles: Sync {
    /// Keys of one tile, [head_dim, 64]: dimension i of the key at position `64 * tile + j` is element `64 * i + j`.
    fn keys<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32];

    /// Values of one tile, [64, padded head_dim]; what pads a row is finite and unused.
    fn values<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32];

    /// Whether scores with a tile always come from [`score`](Self::score), because the source has an arithmetic of its own for them.
    fn scores_itself(&self, kv_head: usize, tile: usize) -> bool {
        let _ = (kv_head, tile);
        false
    }

    /// Scores of a few queries, [rows, head_dim], with the 64 keys of a tile; overwrites `scores`, [rows, 64]. Unless the source
    /// [scores itself](Self::scores_itself), bit for bit what multiplying with [`keys`](Self::keys) gives: it only may skip writing them out.
    fn score(&self, visit: Visit, queries: &[f32], scores: &mut [f32], scratch: &mut [f32]) {
        score_decoded(self, visit, queries, scores, scratch);
    }

    /// Adds the values of `tokens` of a tile, times `weights`, [rows, 64], to `outputs`, [rows, padded head_dim]. Bit for bit what
    /// multiplying with [`values`](Self::values) gives.
    fn mix(&self, visit: Visit, weights: &[f32], tokens: Range<usize>, outputs: &mut [f32], scratch: &mut [f32]) {
        mix_decoded(self, visit, weights, tokens, outputs, scratch);
    }
}

/// A tile that a few lines read, on their way through a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Visit {
    pub kv_head: usize,
    pub tile: usize,
    /// The tile that they read next: its memory can be asked for.
    pub next: Option<usize>,
    /// Number of lines.
    pub rows: usize,
}

/// [`KeyValueTiles::score`] by way of floats.
pub fn score_decoded(tiles: &(impl KeyValueTiles + ?Sized), visit: Visit, queries: &[f32], scores: &mut [f32], scratch: &mut [f32]) {
    let head_dim = queries.len() / visit.rows;
    let product = Product {
        rows: visit.rows,
        steps: head_dim,
        columns: TILE,
        a: queries,
        a_row_stride: head_dim,
        a_step_stride: 1,
        b: tiles.keys(visit.kv_head, visit.tile, scratch),
        b_stride: TILE,
    };
    product.run(Target { c: scores, stride: TILE, accumulate: false });
}

/// [`KeyValueTiles::mix`] by way of floats.
pub fn mix_decoded(
    tiles: &(impl KeyValueTiles + ?Sized),
    visit: Visit,
    weights: &[f32],
    tokens: Range<usize>,
    outputs: &mut [f32],
    scratch: &mut [f32],
) {
    let width = outputs.len() / visit.rows;
    let product = Product {
        rows: visit.rows,
        steps: tokens.len(),
        columns: width,
        a: &weights[tokens.start..],
        a_row_stride: TILE,
        a_step_stride: 1,
        b: &tiles.values(visit.kv_head, visit.tile, scratch)[tokens.start * width..],
        b_stride: width,
    };
    product.run(Target { c: outputs, stride: width, accumulate: true });
}

/// Writes one key into its place in a key tile. `slot` is its position modulo [`TILE`].
pub fn store_key(tile: &mut [f32], slot: usize, key: &[f32]) {
    assert!(slot < TILE && tile.len() >= key.len() * TILE, "key outside its tile");
    tile.chunks_exact_mut(TILE).zip(key).for_each(|(dimension, key)| dimension[slot] = *key);
}

/// Writes one value into its place in a value tile. `slot` is its position modulo [`TILE`].
pub fn store_value(tile: &mut [f32], slot: usize, value: &[f32]) {
    let start = slot * padded(value.len());
    tile[start..start + value.len()].copy_from_slice(value);
}

/// Keys and values of one sequence in f32, grown tile by tile.
#[derive(Clone, Debug)]
pub struct TiledKeyValues {
    kv_heads: usize,
    head_dim: usize,
    num_positions: usize,
    /// [tile, kv_head, head_dim, 64]
    keys: Vec<f32>,
    /// [tile, kv_head, 64, padded head_dim]
    values: Vec<f32>,
}

impl TiledKeyValues {
    /// An empty store.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { kv_heads, head_dim, num_positions: 0, keys: Vec::new(), values: Vec::new() }
    }

    /// Number of positions stored.
    pub fn num_positions(&self) -> usize {
        self.num_positions
    }

    /// Appends rows of keys and values, each [rows, kv_heads * head_dim].
    pub fn append(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.kv_heads * self.head_dim;
        assert!(keys.len() == values.len() && keys.len().is_multiple_of(width), "keys and values are not rows of {width}");
        for (keys, values) in keys.chunks_exact(width).zip(values.chunks_exact(width)) {
            let (tile, slot) = (self.num_positions / TILE, self.num_positions % TILE);
            self.keys.resize((tile + 1) * self.kv_heads * key_tile_len(self.head_dim), 0.0);
            self.values.resize((tile + 1) * self.kv_heads * value_tile_len(self.head_dim), 0.0);
            for (head, (key, value)) in keys.chunks_exact(self.head_dim).zip(values.chunks_exact(self.head_dim)).enumerate() {
                let index = tile * self.kv_heads + head;
                store_key(&mut self.keys[index * key_tile_len(self.head_dim)..], slot, key);
                store_value(&mut self.values[index * value_tile_len(self.head_dim)..], slot, value);
            }
            self.num_positions += 1;
        }
    }

    /// Forgets the positions from `num_positions` on.
    pub fn truncate(&mut self, num_positions: usize) {
        self.num_positions = self.num_positions.min(num_positions);
    }
}

impl KeyValueTiles for TiledKeyValues {
    fn keys<'a>(&'a self, kv_head: usize, tile: usize, _scratch: &'a mut [f32]) -> &'a [f32] {
        let length = key_tile_len(self.head_dim);
        &self.keys[(tile * self.kv_heads + kv_head) * length..][..length]
    }

    fn values<'a>(&'a self, kv_head: usize, tile: usize, _scratch: &'a mut [f32]) -> &'a [f32] {
        let length = value_tile_len(self.head_dim);
        &self.values[(tile * self.kv_heads + kv_head) * length..][..length]
    }
}

/// One head's rows of a [rows, width] matrix.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<'a> {
    pub(super) data: &'a [f32],
    /// Row stride.
    pub(super) width: usize,
    /// First column of the head.
    pub(super) first: usize,
    pub(super) head_dim: usize,
}

impl<'a> HeadRows<'a> {
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.width + self.first..][..self.head_dim]
    }

    /// Copies `rows` rows, times `factor`, to rows of the padded width, zeros in the padding.
    pub(super) fn pack_scaled(&self, rows: usize, factor: f32, out: &mut [f32]) {
        copy_scaled(*self, rows, factor, out);
    }

    /// Writes `rows` rows as transposed tiles, [tile, head_dim, 64], zeros past the last row.
    pub(super) fn pack_transposed(&self, rows: usize, out: &mut [f32]) {
        for (tile, out) in out.chunks_exact_mut(key_tile_len(self.head_dim)).take(rows.div_ceil(TILE)).enumerate() {
            let present = TILE.min(rows - tile * TILE);
            transpose_tile(*self, tile * TILE, present, out);
        }
    }
}

multiversion! {
    fn copy_scaled(source: HeadRows<'_>, rows: usize, factor: f32, out: &mut [f32]) {
        for (row, out) in out.chunks_exact_mut(padded(source.head_dim)).take(rows).enumerate() {
            let (used, padding) = out.split_at_mut(source.head_dim);
            used.iter_mut().zip(source.row(row)).for_each(|(out, x)| *out = x * factor);
            padding.fill(0.0);
        }
    }
}

multiversion! {
    /// Writes `present` rows from `first` as the columns of a [head_dim, 64] tile.
    fn transpose_tile(source: HeadRows<'_>, first: usize, present: usize, out: &mut [f32]) {
        /// Dimensions and slots per pass, moved through a square that stays in registers or the nearest cache.
        const SIDE: usize = 16;
        let whole = source.head_dim / SIDE * SIDE;
        for slot in (0..present).step_by(SIDE) {
            let slots = SIDE.min(present - slot);
            for dimension in (0..whole).step_by(SIDE) {
                let mut square = [[0.0; SIDE]; SIDE];
                for (row, line) in square.iter_mut().enumerate().take(slots) {
                    line.copy_from_slice(&source.row(first + slot + row)[dimension..dimension + SIDE]);
                }
                for (column, out) in out[dimension * TILE..].chunks_exact_mut(TILE).take(SIDE).enumerate() {
                    let line: [f32; SIDE] = std::array::from_fn(|row| square[row][column]);
                    out[slot..slot + SIDE].copy_from_slice(&line);
                }
            }
            for row in slot..slot + slots {
                let rest = out.chunks_exact_mut(TILE).zip(source.row(first + row)).skip(whole);
                rest.for_each(|(dimension, x)| dimension[row] = *x);
            }
        }
        out.chunks_exact_mut(TILE).for_each(|dimension| dimension[present..].fill(0.0));
    }
}

multiversion! {
    /// The reverse of [`HeadRows::pack_scaled`] for one row: `out = source * factor`.
    pub(super) fn write_scaled(source: &[f32], factor: f32, out: &mut [f32]) {
        out.iter_mut().zip(source).for_each(|(out, x)| *out = x * factor);
    }
}
