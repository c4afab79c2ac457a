//! TurboQuant: a random rotation, then the best scalar quantizer for a coordinate of a random direction. Zandieh et al. 2025,
//! arXiv:2504.19874, without its second stage (the sketch of the residual) and with its scale chosen so that none is needed:
//! y = R x;  c_i = the level nearest to y_i sqrt(w) / norm(y);  gamma = norm(x)^2 / <y, c>;  xhat = gamma R^T c
//! <x, xhat> = norm(x)^2 exactly, and over random rotations xhat has mean x (Vargaftik et al. 2021, arXiv:2105.08339). One f16 per vector.
//!
//! Fractional rates follow the paper's split into two instances with rotations of their own: the quarter of the channels with the largest
//! energy takes one bit more. Codes then take b + 1/4 bits, and at width 128 the two scales of a vector bring that to the b + 1/2 of the
//! name. How the paper chooses its channels is not spelled out; here each page chooses its own and keeps them as a bit mask.
//!
//! Rotations are sign flips and Hadamard blocks (see [`Rotation`]), the same for all keys and values, not Haar: the stated distortion is
//! exact for directions without a preferred axis and close to it for others.

use super::bits::{pack, packed_len, unpack};
use super::certificate;
use super::codebook::Codebook;
use super::rotation::Rotation;
use super::{Codec, column_squares, finite, half, store_values, sum_of_squares, transposed};
use crate::multiversion;
use crate::ops::cpu::attention::TILE;
use crate::ops::cpu::scratch::Scratch;
use ::half::f16;
use std::ops::Range;
use std::sync::Arc;

/// Name, bits of a code, and whether a quarter of the channels takes one more.
const RATES: [(&str, usize, bool); 5] = [
    ("turboquant-2", 2, false),
    ("turboquant-2.5", 2, true),
    ("turboquant-3", 3, false),
    ("turboquant-3.5", 3, true),
    ("turboquant-4", 4, false),
];

/// One instance of the quantizer over some of the channels. Ranges are bytes of a side: the keys' half of a page or the values'.
#[derive(Clone, Debug)]
pub struct Part {
    /// Of the part's channels, in ascending order.
    pub rotation: Rotation,
    /// For the part's width.
    pub codebook: Arc<Codebook>,
    /// `[width, 8 * bits]`: see `bits`.
    pub codes: Range<usize>,
    /// f16 `[64]`: gamma of each token.
    pub scales: Range<usize>,
}

/// The codecs `turboquant-*`. A page holds the keys' side, the values' side, and the certificate.
#[derive(Clone, Debug)]
pub struct TurboQuant {
    name: &'static str,
    head_dim: usize,
    /// One part with all channels, or the rest and then the quarter with the most energy.
    parts: Vec<Part>,
    /// In a split side, one bit per channel: set for the quarter.
    mask: Range<usize>,
    side_bytes: usize,
}

impl TurboQuant {
    /// The codec called `name`, if it is one of these, for heads of `head_dim` channels (at least 8).
    pub fn by_name(name: &str, head_dim: usize) -> Option<Self> {
        let (name, bits, split) = RATES.into_iter().find(|rate| rate.0 == name)?;
        let quarter = head_dim / 4;
        let shares = if split { vec![(head_dim - quarter, bits), (quarter, bits + 1)] } else { vec![(head_dim, bits)] };
        let mut end = 0;
        let mut range = |bytes: usize| {
            end += bytes;
            end - bytes..end
        };
        let codes: Vec<Range<usize>> = shares.iter().map(|(width, bits)| range(width * packed_len(*bits))).collect();
        let part = |(index, ((width, bits), codes)): (usize, ((usize, usize), Range<usize>))| Part {
            rotation: Rotation::random(width, index as u64),
            codebook: Codebook::new(width, bits),
            codes,
            scales: range(2 * TILE),
        };
        let parts = shares.into_iter().zip(codes).enumerate().map(part).collect();
        let mask = range(if split { head_dim.div_ceil(8).next_multiple_of(16) } else { 0 });
        Some(Self { name, head_dim, parts, mask, side_bytes: end })
    }

    /// The instances that make up a side.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// Bytes of the page that hold the keys' side and the values'.
    pub fn sides(&self) -> [Range<usize>; 2] {
        [0..self.side_bytes, self.side_bytes..2 * self.side_bytes]
    }

    /// Bytes of a side with one bit per channel: set for the quarter with one bit more. Empty for whole rates.
    pub fn mask(&self) -> Range<usize> {
        self.mask.clone()
    }

    /// Channels of each part.
    fn channels(&self, mask: &[u8]) -> Vec<Vec<usize>> {
        let chosen = |channel: &usize| mask.get(channel / 8).is_some_and(|byte| byte >> (channel % 8) & 1 == 1);
        let (quarter, rest) = (0..self.head_dim).partition(chosen);
        if self.parts.len() == 1 { vec![rest] } else { vec![rest, quarter] }
    }

    /// `x`: `[head_dim, 64]`.
    fn encode_side(&self, x: &[f32], side: &mut [u8]) {
        if self.parts.len() > 1 {
            choose_quarter(x, &mut side[self.mask.clone()]);
        }
        for (part, channels) in self.parts.iter().zip(self.channels(&side[self.mask.clone()])) {
            let mut y = Scratch::take(channels.len() * TILE);
            let rows = y.chunks_exact_mut(TILE);
            rows.zip(channels).for_each(|(row, channel)| row.copy_from_slice(&x[channel * TILE..][..TILE]));
            part.rotation.forward(&mut y, TILE);
            let bytes = packed_len(part.codebook.bits());
            let scales = quantize(&y, &part.codebook, |channel, codes| {
                pack(codes, part.codebook.bits(), &mut side[part.codes.clone()][channel * bytes..][..bytes]);
            });
            scales.iter().enumerate().for_each(|(token, scale)| half::write(&mut side[part.scales.clone()], token, *scale));
        }
    }

    /// Overwrites `tile`, `[head_dim, 64]`.
    fn decode_side(&self, side: &[u8], tile: &mut [f32]) {
        if let [part] = &self.parts[..] {
            return decode_part(part, side, tile);
        }
        for (part, channels) in self.parts.iter().zip(self.channels(&side[self.mask.clone()])) {
            let mut rows = Scratch::take(part.rotation.width() * TILE);
            decode_part(part, side, &mut rows);
            let rows = rows.chunks_exact(TILE);
            channels.into_iter().zip(rows).for_each(|(channel, row)| tile[channel * TILE..][..TILE].copy_from_slice(row));
        }
    }
}

impl Codec for TurboQuant {
    fn name(&self) -> &'static str {
        self.name
    }

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn page_bytes(&self) -> usize {
        (2 * self.side_bytes + certificate::BYTES).next_multiple_of(16)
    }

    fn encode(&self, keys: &[f16], values: &[f16], page: &mut [u8]) {
        page.fill(0);
        for (x, side) in [keys, values].into_iter().zip(self.sides()) {
            self.encode_side(&transposed(&finite(x), self.head_dim), &mut page[side]);
        }
        certificate::seal(self, keys, values, page);
    }

    fn decode_keys(&self, page: &[u8], tile: &mut [f32]) {
        let [keys, _] = self.sides();
        self.decode_side(&page[keys], tile);
    }

    fn decode_values(&self, page: &[u8], tile: &mut [f32]) {
        let [_, values] = self.sides();
        let mut channels = Scratch::take(self.head_dim * TILE);
        self.decode_side(&page[values], &mut channels);
        store_values(&channels, self.head_dim, tile);
    }
}

/// Sets the bits of the quarter of the channels of `x` with the largest energy over the page; the first of equals.
fn choose_quarter(x: &[f32], mask: &mut [u8]) {
    let mut order: Vec<(usize, f64)> = x.chunks_exact(TILE).map(sum_of_squares).enumerate().collect();
    order.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    order.iter().take(order.len() / 4).for_each(|(channel, _)| mask[channel / 8] |= 1 << (channel % 8));
}

/// Hands the codes of each channel of `y` (`[width, 64]`, rotated) to `store` and returns gamma of each token.
fn quantize(y: &[f32], codebook: &Codebook, mut store: impl FnMut(usize, &[u8; TILE])) -> [f16; TILE] {
    let squares = column_squares(y);
    let width = (y.len() / TILE) as f64;
    let inverses = squares.map(|square| if square > 0.0 { (width / square).sqrt() as f32 } else { 0.0 });
    let mut products = [0f64; TILE];
    for (channel, row) in y.as_chunks::<TILE>().0.iter().enumerate() {
        store(channel, &quantize_row(row, &inverses, codebook, &mut products));
    }
    std::array::from_fn(|token| match squares[token] {
        0.0 => f16::ZERO,
        // Terms of the product are not negative, and their sum is above a third of norm * sqrt(width).
        square => f16::from_f64((square / products[token]).min(f16::MAX.to_f64())),
    })
}

multiversion! {
    /// Codes of a channel; adds its share to each token's <y, c>.
    fn quantize_row(row: &[f32; TILE], inverses: &[f32; TILE], codebook: &Codebook, products: &mut [f64; TILE]) -> [u8; TILE] {
        let (mut codes, mut levels) = ([0; TILE], [0f32; TILE]);
        for token in 0..TILE {
            codes[token] = codebook.code(row[token] * inverses[token]);
        }
        for token in 0..TILE {
            levels[token] = codebook.level(codes[token]);
        }
        for token in 0..TILE {
            products[token] += f64::from(row[token]) * f64::from(levels[token]);
        }
        codes
    }
}

/// Overwrites `tile`, `[width, 64]`.
fn decode_part(part: &Part, side: &[u8], tile: &mut [f32]) {
    let mut scales = [0.0; TILE];
    scales.iter_mut().enumerate().for_each(|(token, scale)| *scale = half::read(&side[part.scales.clone()], token));
    let (codes, levels) = (&side[part.codes.clone()], part.codebook.table());
    match part.codebook.bits() {
        1 => look_up::<1>(codes, levels, &scales, tile),
        2 => look_up::<2>(codes, levels, &scales, tile),
        3 => look_up::<3>(codes, levels, &scales, tile),
        _ => look_up::<4>(codes, levels, &scales, tile),
    }
    part.rotation.backward(tile, TILE);
}

multiversion! {
    fn look_up<const BITS: usize>(codes: &[u8], levels: &[f32; 8], scales: &[f32; TILE], tile: &mut [f32]) {
        for (codes, out) in codes.chunks_exact(packed_len(BITS)).zip(tile.as_chunks_mut::<TILE>().0) {
            let codes = unpack::<BITS>(codes);
            for ((out, code), scale) in out.iter_mut().zip(codes).zip(scales) {
                *out = scale * level::<BITS>(i32::from(code), levels);
            }
        }
    }
}

/// A chain of selections: in vectors, cheaper than gathering from a table.
#[inline(always)]
fn level<const BITS: usize>(code: i32, levels: &[f32; 8]) -> f32 {
    let half = 1 << (BITS - 1);
    let index = if code >= half { code - half } else { half - 1 - code };
    let mut level = levels[0];
    for (place, candidate) in levels.iter().enumerate().take(half as usize).skip(1) {
        level = if index >= place as i32 { *candidate } else { level };
    }
    if code >= half { level } else { -level }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::attention::key_tile_len;
    use crate::ops::rng::Stream;

    fn normal(width: usize, seed: u64) -> Vec<f16> {
        let mut stream = Stream::new(seed, "turboquant");
        (0..TILE * width).map(|_| f16::from_f64(stream.normal())).collect()
    }

    fn decoded_keys(codec: &TurboQuant, keys: &[f16]) -> Vec<f32> {
        let mut page = vec![0; codec.page_bytes()];
        codec.encode(keys, keys, &mut page);
        let mut tile = vec![0.0; key_tile_len(codec.head_dim)];
        codec.decode_keys(&page, &mut tile);
        tile
    }

    fn product(one: impl Iterator<Item = f64>, other: impl Iterator<Item = f64>) -> f64 {
        one.zip(other).map(|(x, y)| x * y).sum()
    }

    #[test]
    fn every_vector_keeps_its_product_with_itself() {
        for name in ["turboquant-2", "turboquant-3", "turboquant-4"] {
            for width in [8, 24, 64, 128] {
                let codec = TurboQuant::by_name(name, width).unwrap();
                let keys = normal(width, 1);
                let tile = decoded_keys(&codec, &keys);
                for (token, key) in keys.chunks(width).enumerate() {
                    let original = || key.iter().map(|x| x.to_f64());
                    let stored = (0..width).map(|channel| f64::from(tile[channel * TILE + token]));
                    let ratio = product(original(), stored) / product(original(), original());
                    assert!((ratio - 1.0).abs() < 6e-4, "{name}, width {width}: {ratio}");
                }
            }
        }
    }

    /// gamma makes the error orthogonal to the vector: D / (1 - D) of its square in wide heads, a little less in narrow ones.
    #[test]
    fn squared_error_is_that_of_the_codebook() {
        for (name, bits) in [("turboquant-2", 2), ("turboquant-3", 3), ("turboquant-4", 4)] {
            for width in [64, 80, 128] {
                let codec = TurboQuant::by_name(name, width).unwrap();
                let (mut error, mut square) = (0.0, 0.0);
                for seed in 0..40 {
                    let keys = normal(width, seed);
                    let tile = decoded_keys(&codec, &keys);
                    for (i, x) in keys.iter().enumerate() {
                        error += (x.to_f64() - f64::from(tile[i % width * TILE + i / width])).powi(2);
                        square += x.to_f64().powi(2);
                    }
                }
                let distortion = Codebook::new(width, bits).distortion();
                let ratio = error / square / (distortion / (1.0 - distortion));
                assert!((0.95..1.005).contains(&ratio), "{name}, width {width}: {ratio}");
            }
        }
    }

    #[test]
    fn doubling_a_page_doubles_what_is_stored() {
        for (name, ..) in RATES {
            let codec = TurboQuant::by_name(name, 24).unwrap();
            let keys = normal(24, 3);
            let twice: Vec<f16> = keys.iter().map(|x| *x * f16::from_f32(2.0)).collect();
            let (one, two) = (decoded_keys(&codec, &keys), decoded_keys(&codec, &twice));
            assert!(one.iter().zip(two).all(|(one, two)| 2.0 * one == two), "{name}");
        }
    }

    /// <y, xhat> over rotations has mean <y, x>: within four standard errors, for Haar rotations (where it is exact).
    #[test]
    fn products_are_unbiased_over_rotations() {
        let (width, trials) = (16, 3000);
        let mut stream = Stream::new(5, "turboquant pair");
        let x: Vec<f64> = (0..width).map(|_| stream.normal()).collect();
        let y: Vec<f64> = x.iter().map(|x| 0.6 * x + 0.8 * stream.normal()).collect();
        let truth = product(x.iter().copied(), y.iter().copied());
        for bits in 1..=4 {
            let codebook = Codebook::new(width, bits);
            let estimates: Vec<f64> = (0..trials)
                .map(|seed| {
                    let rotation = Rotation::haar(width, seed);
                    // All 64 tokens of the tile hold the same vector.
                    let mut tile: Vec<f32> = x.iter().flat_map(|x| [*x as f32; TILE]).collect();
                    rotation.forward(&mut tile, TILE);
                    let mut levels = vec![0.0; width];
                    let scales = quantize(&tile, &codebook, |channel, codes| levels[channel] = codebook.level(codes[0]));
                    rotation.backward(&mut levels, 1);
                    scales[0].to_f64() * product(levels.iter().map(|x| f64::from(*x)), y.iter().copied())
                })
                .collect();
            let mean = estimates.iter().sum::<f64>() / trials as f64;
            let variance = estimates.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / trials as f64;
            let deviations = (mean - truth).abs() / (variance / trials as f64).sqrt();
            assert!(deviations < 4.0, "{bits} bits: {mean}, not {truth}: {deviations} standard errors");
        }
    }

    #[test]
    fn split_pages_give_bits_to_the_channels_with_energy() {
        let width = 64;
        let mut stream = Stream::new(6, "turboquant channels");
        let strong = |channel: usize| channel % 16 == 5;
        let key = |i: usize, x: f64| f16::from_f64(if strong(i % width) { 8.0 * x } else { x });
        let keys: Vec<f16> = (0..TILE * width).map(|i| key(i, stream.normal())).collect();
        let codec = TurboQuant::by_name("turboquant-2.5", width).unwrap();
        let mut page = vec![0; codec.page_bytes()];
        codec.encode(&keys, &keys, &mut page);
        let channels = codec.channels(&page[codec.mask()]);
        assert_eq!((channels[0].len(), channels[1].len()), (48, 16));
        assert!((0..width).filter(|channel| strong(*channel)).all(|channel| channels[1].contains(&channel)));
        let error = |name| {
            let codec = TurboQuant::by_name(name, width).unwrap();
            let tile = decoded_keys(&codec, &keys);
            keys.iter().enumerate().map(|(i, x)| (x.to_f64() - f64::from(tile[i % width * TILE + i / width])).powi(2)).sum::<f64>()
        };
        assert!(error("turboquant-2.5") < 0.6 * error("turboquant-2"));
        assert!(error("turboquant-3.5") < 0.6 * error("turboquant-3"));
    }

    #[test]
    fn rates_at_width_128() {
        let bits = |name| (TurboQuant::by_name(name, 128).unwrap().side_bytes * 8) as f64 / (TILE * 128) as f64;
        // A sixteen-bit scale per vector is 1/8 bit per channel; a split has two, and a mask of 16 bytes.
        assert_eq!([bits("turboquant-2"), bits("turboquant-3"), bits("turboquant-4")], [2.125, 3.125, 4.125]);
        assert_eq!([bits("turboquant-2.5"), bits("turboquant-3.5")], [2.5 + 1.0 / 64.0, 3.5 + 1.0 / 64.0]);
        assert!(TurboQuant::by_name("turboquant-5", 128).is_none());
    }
}
