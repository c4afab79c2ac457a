//! Keys and values in half precision, in the tiles that attention reads; a tile is widened when it is asked for. The whole of the `f16`
//! format, and the originals behind coded pages.

use super::{key_tiles_len, place};
use crate::ops::cpu::attention::{
    KeyValueTiles, TILE, Visit, key_tile_len, mix_decoded, mix_halves, padded, score_decoded, score_halves, value_tile_len,
};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;
use xxhash_rust::xxh3::Xxh3;

/// Halves of one layer.
pub(super) struct FarTier {
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
    /// `[tile, kv_head, head_dim, 64]`
    keys: Vec<f16>,
    /// `[tile, kv_head, 64, padded head_dim]`
    values: Vec<f16>,
}

impl FarTier {
    pub(super) fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { kv_heads, head_dim, positions: 0, keys: vec![], values: vec![] }
    }

    /// Positions stored.
    pub(super) fn positions(&self) -> usize {
        self.positions
    }

    /// Appends rows of keys and values, each `[rows, kv_heads * head_dim]`.
    pub(super) fn append(&mut self, keys: &[f32], values: &[f32]) {
        let (head_dim, width) = (self.head_dim, self.kv_heads * self.head_dim);
        for (keys, values) in keys.chunks_exact(width).zip(values.chunks_exact(width)) {
            let (tile, slot) = place(self.positions);
            self.keys.resize((tile + 1) * key_tiles_len(self.kv_heads, head_dim), f16::ZERO);
            self.values.resize((tile + 1) * self.kv_heads * value_tile_len(head_dim), f16::ZERO);
            for (head, (key, value)) in keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim)).enumerate() {
                let index = tile * self.kv_heads + head;
                let lines = self.keys[index * key_tile_len(head_dim)..].chunks_exact_mut(TILE);
                lines.zip(key).for_each(|(line, key)| line[slot] = finite(*key));
                let row = &mut self.values[index * value_tile_len(head_dim) + slot * padded(head_dim)..];
                row.iter_mut().zip(value).for_each(|(stored, value)| *stored = finite(*value));
            }
            self.positions += 1;
        }
    }

    /// Forgets the positions from `positions` on.
    pub(super) fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
    }

    fn key_tile(&self, kv_head: usize, tile: usize) -> &[f16] {
        let length = key_tile_len(self.head_dim);
        &self.keys[(tile * self.kv_heads + kv_head) * length..][..length]
    }

    fn value_tile(&self, kv_head: usize, tile: usize) -> &[f16] {
        let length = value_tile_len(self.head_dim);
        &self.values[(tile * self.kv_heads + kv_head) * length..][..length]
    }

    /// Keys and values of a page, `[64, head_dim]` each, in token order.
    pub(super) fn rows(&self, kv_head: usize, page: usize) -> [Vec<f16>; 2] {
        let (keys, values) = (self.key_tile(kv_head, page), self.value_tile(kv_head, page));
        let key = |token: usize| keys.iter().skip(token).step_by(TILE);
        let value = |token: usize| &values[token * padded(self.head_dim)..][..self.head_dim];
        [(0..TILE).flat_map(key).copied().collect(), (0..TILE).flat_map(value).copied().collect()]
    }

    /// A checksum of a page's halves.
    pub(super) fn checksum(&self, kv_head: usize, page: usize) -> u64 {
        let mut hash = Xxh3::new();
        [self.key_tile(kv_head, page), self.value_tile(kv_head, page)].iter().for_each(|tile| hash.update(bytes_of(tile)));
        hash.digest()
    }
}

/// The bytes of halves as they lie in memory.
fn bytes_of(halves: &[f16]) -> &[u8] {
    // SAFETY: the same memory; every half is two initialized bytes.
    unsafe { std::slice::from_raw_parts(halves.as_ptr().cast(), size_of_val(halves)) }
}

/// The nearest half that is finite: an overflow to infinity would spoil every later token. NaN stays.
fn finite(value: f32) -> f16 {
    f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

impl KeyValueTiles for FarTier {
    fn keys<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        widen(self.key_tile(kv_head, tile), scratch)
    }

    fn values<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        widen(self.value_tile(kv_head, tile), scratch)
    }

    fn score(&self, visit: Visit, queries: &[f32], scores: &mut [f32], scratch: &mut [f32]) {
        let (keys, values) = (self.key_tile(visit.kv_head, visit.tile), self.value_tile(visit.kv_head, visit.tile));
        if !score_halves(keys, queries, scores, values) {
            score_decoded(self, visit, queries, scores, scratch);
        }
    }

    fn mix(&self, visit: Visit, weights: &[f32], tokens: Range<usize>, outputs: &mut [f32], scratch: &mut [f32]) {
        let ahead = visit.next.map_or(&[][..], |next| self.key_tile(visit.kv_head, next));
        if !mix_halves(self.value_tile(visit.kv_head, visit.tile), weights, tokens.clone(), outputs, ahead) {
            mix_decoded(self, visit, weights, tokens, outputs, scratch);
        }
    }
}

fn widen<'a>(tile: &[f16], scratch: &'a mut [f32]) -> &'a [f32] {
    tile.convert_to_f32_slice(&mut scratch[..tile.len()]);
    &scratch[..tile.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::attention::{TiledKeyValues, attend_cached};
    use crate::ops::rng::Stream;

    #[test]
    fn halves_attend_as_floats_that_are_halves() {
        let (heads, kv_heads, head_dim, tokens) = (4, 2, 24, 150);
        let width = kv_heads * head_dim;
        let mut stream = Stream::new(3, "cache");
        let mut halves = |count: usize| -> Vec<f32> { (0..count).map(|_| f16::from_f64(stream.normal()).to_f32()).collect() };
        let (keys, values) = (halves(tokens * width), halves(tokens * width));
        let q = halves(3 * heads * head_dim);
        let (mut exact, mut rounded) = (TiledKeyValues::new(kv_heads, head_dim), FarTier::new(kv_heads, head_dim));
        exact.append(&keys, &values);
        rounded.append(&keys, &values);
        rounded.truncate(tokens - 5);
        rounded.append(&keys[(tokens - 5) * width..], &values[(tokens - 5) * width..]);
        let [mut out, mut expected] = [vec![0.0; q.len()], vec![1.0; q.len()]];
        attend_cached(heads, kv_heads, head_dim, 0.2, &q, tokens - 3, &exact, &mut expected);
        attend_cached(heads, kv_heads, head_dim, 0.2, &q, tokens - 3, &rounded, &mut out);
        assert_eq!(out, expected);
        let [page_keys, page_values] = rounded.rows(1, 1);
        assert_eq!(page_keys[3 * head_dim + 5].to_f32(), keys[(TILE + 3) * width + head_dim + 5]);
        assert_eq!(page_values[63 * head_dim + 23].to_f32(), values[(TILE + 63) * width + head_dim + 23]);
    }

    #[test]
    fn checksums_see_every_half() {
        let mut far = FarTier::new(2, 8);
        far.append(&[0.5; 64 * 16], &[0.25; 64 * 16]);
        let before = far.checksum(1, 0);
        let last = far.values.len() - 1;
        far.values[last] = f16::from_f32(0.250_1);
        assert_ne!(far.checksum(1, 0), before);
        assert_eq!(far.checksum(0, 0), before);
    }

    #[test]
    fn overflow_stays_finite() {
        assert_eq!(finite(1e9), f16::MAX);
        assert_eq!(finite(f32::NEG_INFINITY), f16::MIN);
        assert!(finite(f32::NAN).is_nan());
    }
}
