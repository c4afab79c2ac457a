//! OScaR: two bits, with keys rotated and divided by their norms before they share ranges. 2026, arXiv:2605.19660.
//! keys:   h_t = R k_t, n_t = norm(h_t);  khat_t = R^T n_t (scale_cg code + zero_cg)    over 32 tokens g of a channel c
//! values: h_t = R v_t;                   vhat_t = R^T (scale_tg code + zero_tg)        over 32 channels g of a token t
//! R: the Walsh-Hadamard transform (for widths that are no power of two, with a random rotation of its blocks). A token whose norm is far
//! from the others' would stretch the ranges that they share; without rotation first, normalizing would turn small tokens into outliers.

use super::affine::{Affine, code, smaller};
use super::bits::{pack, packed_len, unpack};
use super::certificate;
use super::rotation::Rotation;
use super::{Codec, column_squares, finite, half, store_values, transposed};
use crate::multiversion;
use crate::ops::cpu::attention::TILE;
use crate::ops::cpu::reduce::larger;
use crate::ops::cpu::scratch::Scratch;
use ::half::f16;
use std::ops::Range;

/// Tokens of a key channel, or channels of a value, that share a scale; the last group of channels may be shorter.
const GROUP: usize = 32;
const BITS: usize = 2;
const LEVELS: f32 = 3.0;
/// Groups of tokens in a page.
const SPANS: usize = TILE / GROUP;

/// The codec `oscar-2`. Ranges are bytes of a page; the certificate follows.
#[derive(Clone, Debug)]
pub struct Oscar {
    head_dim: usize,
    rotation: Rotation,
    /// False leaves all norms at 1.
    normalize: bool,
    /// `[head_dim, 16]`: see `bits`
    key_codes: Range<usize>,
    /// `[head_dim, 16]`
    value_codes: Range<usize>,
    /// f16 `[head_dim, 2]`
    key_scales: Range<usize>,
    /// f16 `[head_dim, 2]`
    key_zeros: Range<usize>,
    /// f16 `[64]`
    key_norms: Range<usize>,
    /// f16 `[groups, 64]`
    value_scales: Range<usize>,
    /// f16 `[groups, 64]`
    value_zeros: Range<usize>,
}

impl Oscar {
    /// For heads of `head_dim` channels.
    pub fn new(head_dim: usize) -> Self {
        let mut end = 0;
        let mut range = |bytes: usize| {
            end += bytes;
            end - bytes..end
        };
        let (codes, spans, groups) = (head_dim * packed_len(BITS), 2 * head_dim * SPANS, 2 * TILE * head_dim.div_ceil(GROUP));
        Self {
            head_dim,
            rotation: Rotation::hadamard(head_dim),
            normalize: true,
            key_codes: range(codes),
            value_codes: range(codes),
            key_scales: range(spans),
            key_zeros: range(spans),
            key_norms: range(2 * TILE),
            value_scales: range(groups),
            value_zeros: range(groups),
        }
    }

    /// The rotation of keys and values.
    pub fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    /// Norm of each column of `x`, as it is stored.
    fn norms(&self, x: &[f32]) -> [f16; TILE] {
        column_squares(x).map(|square| if self.normalize { f16::from_f64(square.sqrt().min(f16::MAX.to_f64())) } else { f16::ONE })
    }

    fn encode_keys(&self, mut x: Scratch, page: &mut [u8]) {
        self.rotation.forward(&mut x, TILE);
        let norms = self.norms(&x);
        norms.iter().enumerate().for_each(|(token, norm)| half::write(&mut page[self.key_norms.clone()], token, *norm));
        let wide = norms.map(f16::to_f32);
        for (channel, row) in x.as_chunks::<TILE>().0.iter().enumerate() {
            let unit: [f32; TILE] = std::array::from_fn(|t| if wide[t] > 0.0 { row[t] / wide[t] } else { 0.0 });
            let mut codes = [0; TILE];
            for (span, (unit, codes)) in unit.chunks(GROUP).zip(codes.chunks_mut(GROUP)).enumerate() {
                let affine = Affine::fit(unit, LEVELS);
                half::write(&mut page[self.key_scales.clone()], channel * SPANS + span, affine.scale);
                half::write(&mut page[self.key_zeros.clone()], channel * SPANS + span, affine.zero);
                affine.codes(unit, LEVELS, codes);
            }
            store_codes(&codes, channel, &mut page[self.key_codes.clone()]);
        }
    }

    fn encode_values(&self, mut x: Scratch, page: &mut [u8]) {
        self.rotation.forward(&mut x, TILE);
        // A turned value can leave the range of halves by a factor of sqrt(head_dim).
        x.iter_mut().for_each(|x| *x = x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
        for (group, rows) in x.chunks(GROUP * TILE).enumerate() {
            let (low, high) = column_ranges(rows);
            let affine: [Affine; TILE] = std::array::from_fn(|token| Affine::spanning(low[token], high[token], LEVELS));
            for (token, affine) in affine.iter().enumerate() {
                half::write(&mut page[self.value_scales.clone()], group * TILE + token, affine.scale);
                half::write(&mut page[self.value_zeros.clone()], group * TILE + token, affine.zero);
            }
            let (zeros, scales) = (affine.map(|affine| affine.zero.to_f32()), affine.map(|affine| affine.scale.to_f32()));
            for (index, row) in rows.as_chunks::<TILE>().0.iter().enumerate() {
                store_codes(&column_codes(row, &zeros, &scales), group * GROUP + index, &mut page[self.value_codes.clone()]);
            }
        }
    }
}

multiversion! {
    /// The least and the greatest of each column of `rows`, `[channels, 64]`.
    fn column_ranges(rows: &[f32]) -> ([f32; TILE], [f32; TILE]) {
        let (mut low, mut high) = ([f32::INFINITY; TILE], [f32::NEG_INFINITY; TILE]);
        for row in rows.as_chunks::<TILE>().0 {
            for token in 0..TILE {
                low[token] = smaller(row[token], low[token]);
                high[token] = larger(row[token], high[token]);
            }
        }
        (low, high)
    }
}

multiversion! {
    fn column_codes(row: &[f32; TILE], zeros: &[f32; TILE], scales: &[f32; TILE]) -> [u8; TILE] {
        let mut codes = [0; TILE];
        for token in 0..TILE {
            codes[token] = code(row[token], zeros[token], scales[token], LEVELS);
        }
        codes
    }
}

fn store_codes(codes: &[u8; TILE], channel: usize, bytes: &mut [u8]) {
    pack(codes, BITS, &mut bytes[channel * packed_len(BITS)..][..packed_len(BITS)]);
}

impl Codec for Oscar {
    fn name(&self) -> &'static str {
        "oscar-2"
    }

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn page_bytes(&self) -> usize {
        (self.value_zeros.end + certificate::BYTES).next_multiple_of(16)
    }

    fn encode(&self, keys: &[f16], values: &[f16], page: &mut [u8]) {
        page.fill(0);
        self.encode_keys(transposed(&finite(keys), self.head_dim), page);
        self.encode_values(transposed(&finite(values), self.head_dim), page);
        certificate::seal(self, keys, values, page);
    }

    fn decode_keys(&self, page: &[u8], tile: &mut [f32]) {
        let part = |range: &Range<usize>| &page[range.clone()];
        decode_key_codes(part(&self.key_codes), part(&self.key_scales), part(&self.key_zeros), part(&self.key_norms), tile);
        self.rotation.backward(tile, TILE);
    }

    fn decode_values(&self, page: &[u8], tile: &mut [f32]) {
        let part = |range: &Range<usize>| &page[range.clone()];
        let mut channels = Scratch::take(self.head_dim * TILE);
        decode_value_codes(part(&self.value_codes), part(&self.value_scales), part(&self.value_zeros), &mut channels);
        self.rotation.backward(&mut channels, TILE);
        store_values(&channels, self.head_dim, tile);
    }
}

multiversion! {
    fn decode_key_codes(codes: &[u8], scales: &[u8], zeros: &[u8], norms: &[u8], tile: &mut [f32]) {
        let norms: [f32; TILE] = std::array::from_fn(|token| half::read(norms, token));
        for (channel, (codes, out)) in codes.chunks_exact(packed_len(BITS)).zip(tile.as_chunks_mut::<TILE>().0).enumerate() {
            let codes = unpack::<BITS>(codes);
            for span in 0..SPANS {
                let (scale, zero) = (half::read(scales, channel * SPANS + span), half::read(zeros, channel * SPANS + span));
                for token in span * GROUP..(span + 1) * GROUP {
                    out[token] = scale.mul_add(f32::from(codes[token]), zero) * norms[token];
                }
            }
        }
    }
}

multiversion! {
    fn decode_value_codes(codes: &[u8], scales: &[u8], zeros: &[u8], channels: &mut [f32]) {
        for (group, (codes, rows)) in codes.chunks(GROUP * packed_len(BITS)).zip(channels.chunks_mut(GROUP * TILE)).enumerate() {
            let group_scales: [f32; TILE] = std::array::from_fn(|token| half::read(scales, group * TILE + token));
            let group_zeros: [f32; TILE] = std::array::from_fn(|token| half::read(zeros, group * TILE + token));
            for (codes, out) in codes.chunks_exact(packed_len(BITS)).zip(rows.as_chunks_mut::<TILE>().0) {
                let codes = unpack::<BITS>(codes);
                for token in 0..TILE {
                    out[token] = group_scales[token].mul_add(f32::from(codes[token]), group_zeros[token]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::attention::key_tile_len;
    use crate::ops::rng::Stream;

    /// Sum of squared key errors over the tokens of ordinary size.
    fn error(normalize: bool, keys: &[f16], width: usize, ordinary: impl Fn(usize) -> bool) -> f64 {
        let codec = Oscar { normalize, ..Oscar::new(width) };
        let mut page = vec![0; codec.page_bytes()];
        codec.encode(keys, keys, &mut page);
        let mut tile = vec![0.0; key_tile_len(width)];
        codec.decode_keys(&page, &mut tile);
        let square = |i: usize| (keys[i].to_f64() - f64::from(tile[i % width * TILE + i / width])).powi(2);
        (0..keys.len()).filter(|i| ordinary(i / width)).map(square).sum()
    }

    fn page(width: usize, norm: impl Fn(usize) -> f64) -> Vec<f16> {
        let mut stream = Stream::new(9, "oscar");
        let mut unit = |token: usize| {
            let x: Vec<f64> = (0..width).map(|_| stream.normal()).collect();
            let factor = norm(token) / x.iter().map(|x| x * x).sum::<f64>().sqrt();
            x.into_iter().map(move |x| f16::from_f64(x * factor)).collect::<Vec<_>>()
        };
        (0..TILE).flat_map(&mut unit).collect()
    }

    /// A large token among others no longer stretches their range.
    #[test]
    fn normalizing_spares_the_others_from_one_large_token() {
        for width in [64, 80, 128] {
            let keys = page(width, |token| if token == 7 { 1000.0 } else { 10.0 });
            let beside = |token: usize| token != 7 && token < GROUP;
            assert!(error(true, &keys, width, beside) < 0.1 * error(false, &keys, width, beside), "width {width}");
        }
    }

    /// A small token, as the first of a text often is, gets steps of its own size, and the group as a whole loses less.
    #[test]
    fn normalizing_resolves_one_small_token() {
        for width in [64, 80, 128] {
            let keys = page(width, |token| if token == 7 { 0.1 } else { 10.0 });
            assert!(error(true, &keys, width, |token| token == 7) < 1e-3 * error(false, &keys, width, |token| token == 7), "width {width}");
            let group = |token: usize| token < GROUP;
            assert!(error(true, &keys, width, group) <= error(false, &keys, width, group), "width {width}");
        }
    }

    #[test]
    fn normalizing_changes_little_where_norms_are_equal() {
        let keys = page(128, |_| 10.0);
        let ratio = error(true, &keys, 128, |_| true) / error(false, &keys, 128, |_| true);
        assert!((ratio - 1.0).abs() < 0.05, "{ratio}");
    }

    #[test]
    fn bytes_per_token_at_width_128() {
        let codec = Oscar::new(128);
        assert_eq!(codec.value_zeros.end, 98 * TILE);
        assert_eq!(codec.page_bytes(), 98 * TILE + certificate::BYTES);
    }
}
