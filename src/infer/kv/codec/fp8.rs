//! Keys and values as 8-bit floats, E4M3 (4 bits of exponent, 3 of mantissa, no infinity): Micikevicius et al. 2022, arXiv:2209.05433.
//! xhat = scale * e4m3(code), scale = f16 rounded up of max|x| / 448 over the page and head, one for keys and one for values.

use super::affine::{ROUNDER, smaller};
use super::certificate::{self, Certificate, SUM_SLACK};
use super::{Codec, finite, half, transposed};
use crate::multiversion;
use crate::ops::cpu::attention::{TILE, padded};
use crate::ops::cpu::reduce::{self, LANES, Lanes, join};
use crate::ops::cpu::scratch::Scratch;
use ::half::f16;
use std::ops::Range;

/// The largest E4M3 number.
const LARGEST: f32 = 448.0;
/// The smallest one with a full mantissa: 2^-6; below it steps are 2^-9.
const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
/// What is added to an E4M3 exponent to make it that of an f32: 127 - 7, above 3 bits of mantissa.
const EXPONENT_SHIFT: u32 = 120 << 3;

/// Where the parts of a page lie, in bytes; the certificate ends the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fp8Layout {
    /// `[head_dim, 64]`
    pub key_codes: Range<usize>,
    /// `[64, head_dim]`
    pub value_codes: Range<usize>,
    /// f16 `[head_dim]`: max_t |k - khat| of a channel, rounded up
    pub key_errors: Range<usize>,
    /// f16 `[2]`: of keys and of values
    pub scales: Range<usize>,
}

/// The codec `fp8`.
#[derive(Clone, Debug)]
pub struct Fp8 {
    head_dim: usize,
    layout: Fp8Layout,
}

impl Fp8 {
    /// For heads of `head_dim` channels.
    pub fn new(head_dim: usize) -> Self {
        let mut end = 0;
        let mut part = |bytes: usize| {
            end += bytes;
            end - bytes..end
        };
        let codes = TILE * head_dim;
        Self {
            head_dim,
            layout: Fp8Layout { key_codes: part(codes), value_codes: part(codes), key_errors: part(2 * head_dim), scales: part(4) },
        }
    }

    /// Where the parts of a page lie.
    pub fn layout(&self) -> &Fp8Layout {
        &self.layout
    }

    fn scale(&self, page: &[u8], side: usize) -> f32 {
        half::read(&page[self.layout.scales.clone()], side)
    }

    /// Stores numbers as codes and returns their scale.
    fn encode_side(&self, x: &[f32], side: usize, codes: Range<usize>, page: &mut [u8]) {
        let largest = absmax(x);
        let scale = half::half_up(f64::from(largest / LARGEST));
        half::write(&mut page[self.layout.scales.clone()], side, scale);
        if largest > 0.0 {
            encode_all(x, scale.to_f32(), &mut page[codes]);
        }
    }

    /// Worst error of each key channel of `keys` (`[head_dim, 64]`).
    fn store_key_errors(&self, keys: &[f32], page: &mut [u8]) {
        let mut tile = Scratch::take(keys.len());
        self.decode_keys(page, &mut tile);
        for (channel, (keys, stored)) in keys.chunks_exact(TILE).zip(tile.chunks_exact(TILE)).enumerate() {
            let worst = keys.iter().zip(stored).map(|(x, y)| (f64::from(*x) - f64::from(*y)).abs()).fold(0.0, f64::max);
            half::write(&mut page[self.layout.key_errors.clone()], channel, half::half_up(worst));
        }
    }
}

impl Codec for Fp8 {
    fn name(&self) -> &'static str {
        "fp8"
    }

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn page_bytes(&self) -> usize {
        (self.layout.scales.end + certificate::BYTES).next_multiple_of(16)
    }

    fn encode(&self, keys: &[f16], values: &[f16], page: &mut [u8]) {
        page.fill(0);
        let channels = transposed(&finite(keys), self.head_dim);
        self.encode_side(&channels, 0, self.layout.key_codes.clone(), page);
        self.encode_side(&finite(values), 1, self.layout.value_codes.clone(), page);
        self.store_key_errors(&channels, page);
        certificate::seal(self, keys, values, page);
    }

    fn decode_keys(&self, page: &[u8], tile: &mut [f32]) {
        decode_codes(&page[self.layout.key_codes.clone()], self.scale(page, 0), tile);
    }

    fn decode_values(&self, page: &[u8], tile: &mut [f32]) {
        decode_rows(self.head_dim, &page[self.layout.value_codes.clone()], self.scale(page, 1), tile);
    }

    fn score_error(&self, page: &[u8], query: &[f32]) -> f32 {
        let (interval, _) = weighted_errors(query, &page[self.layout.key_errors.clone()]);
        Certificate::read(page).score_error(query, interval / (query.len() as f32).sqrt() * SUM_SLACK)
    }

    /// The mean squared error is divided among channels as the squares of their worst errors are.
    fn mean_squares(&self, page: &[u8], query: &[f32]) -> (f32, f32) {
        let certificate = Certificate::read(page);
        let (_, [weighted, whole]) = weighted_errors(query, &page[self.layout.key_errors.clone()]);
        let share = if whole > 0.0 { weighted / whole } else { 0.0 };
        let variance = share * certificate.key_mean_square / query.len() as f32;
        (if certificate.key_mean_square.is_finite() { variance } else { f32::INFINITY }, certificate.value_mean_square)
    }
}

/// The nearest E4M3 number (ties to even), the largest beyond it. `x` is finite.
#[inline(always)]
fn encode(x: f32) -> u8 {
    let magnitude = x.abs();
    // Eight steps make the smallest normal number, whose code is also 8.
    let fine = (smaller(magnitude, SMALLEST_NORMAL) * 512.0 + ROUNDER).to_bits() & 0xFF;
    let bits = magnitude.to_bits();
    let coarse = ((bits + 0x7_FFFF + (bits >> 20 & 1)) >> 20).wrapping_sub(EXPONENT_SHIFT).min(0x7E);
    let code = if magnitude < SMALLEST_NORMAL { fine } else { coarse };
    (x.to_bits() >> 24 & 0x80 | code) as u8
}

multiversion! {
    fn absmax(x: &[f32]) -> f32 {
        reduce::absmax(x)
    }
}

multiversion! {
    fn encode_all(x: &[f32], scale: f32, codes: &mut [u8]) {
        codes.iter_mut().zip(x).for_each(|(code, x)| *code = encode(x / scale));
    }
}

/// The number of a code. Exponent 0 is twice what its bits say, less the hidden one: no denormal f32 is made on the way.
#[inline(always)]
fn decode(code: u8) -> f32 {
    let magnitude = f32::from_bits((u32::from(code & 0x7F) + EXPONENT_SHIFT) << 20);
    let magnitude = if code & 0x78 == 0 { magnitude.mul_add(2.0, -SMALLEST_NORMAL) } else { magnitude };
    f32::from_bits(magnitude.to_bits() | u32::from(code & 0x80) << 24)
}

multiversion! {
    fn decode_codes(codes: &[u8], scale: f32, out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = decode(*code) * scale);
    }
}

multiversion! {
    fn decode_rows(head_dim: usize, codes: &[u8], scale: f32, tile: &mut [f32]) {
        for (codes, row) in codes.chunks_exact(head_dim).zip(tile.chunks_exact_mut(padded(head_dim))) {
            let (row, rest) = row.split_at_mut(head_dim);
            row.iter_mut().zip(codes).for_each(|(out, code)| *out = decode(*code) * scale);
            rest.fill(0.0);
        }
    }
}

multiversion! {
    /// sum_c |q_c| e_c, and sums of q_c^2 e_c^2 and of e_c^2.
    fn weighted_errors(query: &[f32], errors: &[u8]) -> (f32, [f32; 2]) {
        let (mut sums, mut weighted, mut squares): (Lanes, Lanes, Lanes) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for chunk in 0..query.len().div_ceil(LANES) {
            let query = half::lanes(query, chunk);
            let errors = half::read_lanes(errors, chunk);
            for lane in 0..LANES {
                let product = query[lane] * errors[lane];
                sums[lane] += product.abs();
                weighted[lane] = product.mul_add(product, weighted[lane]);
                squares[lane] = errors[lane].mul_add(errors[lane], squares[lane]);
            }
        }
        (join(sums, |x, y| x + y), [weighted, squares].map(|lanes| join(lanes, |x, y| x + y)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;

    /// From the format's definition.
    fn number(code: u8) -> f64 {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
        let magnitude = if exponent == 0 { mantissa * 2f64.powi(-6) } else { (1.0 + mantissa) * 2f64.powi(exponent - 7) };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }

    #[test]
    fn every_code_survives_a_round_trip() {
        for code in (0..=u8::MAX).filter(|code| code & 0x7F != 0x7F) {
            assert_eq!(f64::from(decode(code)), number(code), "{code:#x}");
            assert_eq!(encode(decode(code)), code, "{code:#x}");
        }
        assert_eq!((decode(0x7E), decode(0x01), decode(0x08)), (448.0, 1.0 / 512.0, SMALLEST_NORMAL));
    }

    #[test]
    fn codes_are_nearest_with_ties_to_even() {
        let mut stream = Stream::new(4, "fp8");
        for _ in 0..20_000 {
            let x = (stream.normal() * 2f64.powi(stream.below(20) as i32 - 11)) as f32;
            let x = x.clamp(-LARGEST, LARGEST);
            let best = (0..0x7F).map(|code| (number(code) - f64::from(x).abs()).abs()).fold(f64::INFINITY, f64::min);
            assert_eq!((f64::from(decode(encode(x))) - f64::from(x)).abs(), best, "{x}");
        }
        assert_eq!(decode(encode(1.0 + 1.0 / 16.0)), 1.0);
        assert_eq!(decode(encode(1.0 + 3.0 / 16.0)), 1.25);
        assert_eq!(decode(encode(460.0)), LARGEST);
        assert_eq!(decode(encode(2.5 / 512.0)), 2.0 / 512.0);
    }

    #[test]
    fn errors_are_a_sixteenth_at_most() {
        let codec = Fp8::new(64);
        let mut stream = Stream::new(6, "fp8 page");
        let keys: Vec<f16> = (0..TILE * 64).map(|_| f16::from_f64(stream.normal())).collect();
        let mut page = vec![0; codec.page_bytes()];
        codec.encode(&keys, &keys, &mut page);
        let mut tile = vec![0.0; TILE * 64];
        codec.decode_keys(&page, &mut tile);
        let step = codec.scale(&page, 0) / 512.0;
        for (i, x) in keys.iter().enumerate() {
            let error = (tile[i % 64 * TILE + i / 64] - x.to_f32()).abs();
            assert!(error <= (x.to_f32().abs() / 16.0).max(step / 2.0) * 1.001, "{x}");
        }
    }
}
