//! Keys and values in half precision, in the tiles that attention reads; a tile is widened when it is asked for.

use super::{Store, key_tiles_len, place};
use crate::ops::cpu::attention::{KeyValueTiles, TILE, key_tile_len, padded, value_tile_len};
use half::f16;
use half::slice::HalfFloatSliceExt;

pub(super) struct HalfKeyValues {
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
    /// `[tile, kv_head, head_dim, 64]`
    keys: Vec<f16>,
    /// `[tile, kv_head, 64, padded head_dim]`
    values: Vec<f16>,
}

impl HalfKeyValues {
    pub(super) fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { kv_heads, head_dim, positions: 0, keys: vec![], values: vec![] }
    }
}

impl Store for HalfKeyValues {
    fn append(&mut self, keys: &[f32], values: &[f32]) {
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

    fn truncate(&mut self, positions: usize) {
        self.positions = self.positions.min(positions);
    }
}

/// The nearest half that is finite: an overflow to infinity would spoil every later token. NaN stays.
fn finite(value: f32) -> f16 {
    f16::from_f32(value.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

impl KeyValueTiles for HalfKeyValues {
    fn keys<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        let length = key_tile_len(self.head_dim);
        widen(&self.keys[(tile * self.kv_heads + kv_head) * length..][..length], scratch)
    }

    fn values<'a>(&'a self, kv_head: usize, tile: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        let length = value_tile_len(self.head_dim);
        widen(&self.values[(tile * self.kv_heads + kv_head) * length..][..length], scratch)
    }
}

fn widen<'a>(tile: &[f16], scratch: &'a mut [f32]) -> &'a [f32] {
    tile.convert_to_f32_slice(&mut scratch[..tile.len()]);
    &scratch[..tile.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::kv::Format;
    use crate::ops::rng::Stream;

    #[test]
    fn halves_attend_as_floats_that_are_halves() {
        let (heads, kv_heads, head_dim, tokens) = (4, 2, 24, 150);
        let mut stream = Stream::new(3, "cache");
        let mut halves = |count: usize| -> Vec<f32> { (0..count).map(|_| f16::from_f64(stream.normal()).to_f32()).collect() };
        let (keys, values) = (halves(tokens * kv_heads * head_dim), halves(tokens * kv_heads * head_dim));
        let q = halves(3 * heads * head_dim);
        let [mut exact, mut rounded] = Format::ALL.map(|format| format.store(kv_heads, head_dim));
        let attend = |store: &mut dyn Store| {
            store.append(&keys, &values);
            store.truncate(tokens - 5);
            store.append(&keys[(tokens - 5) * kv_heads * head_dim..], &values[(tokens - 5) * kv_heads * head_dim..]);
            let mut out = vec![0.0; q.len()];
            store.attend(heads, kv_heads, head_dim, &q, tokens - 3, &mut out);
            out
        };
        assert_eq!(attend(&mut *exact), attend(&mut *rounded));
    }

    #[test]
    fn overflow_stays_finite() {
        assert_eq!(finite(1e9), f16::MAX);
        assert_eq!(finite(f32::NEG_INFINITY), f16::MIN);
        assert!(finite(f32::NAN).is_nan());
    }
}
