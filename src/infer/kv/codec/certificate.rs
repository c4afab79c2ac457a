//! What a page says about its own error, measured by decoding it when it is made. Calver 2026, arXiv:2605.20868, with a ball about the
//! decoded keys beside (or instead of) the interval per channel.
//!
//! The last [`BYTES`] bytes of every page, little-endian: four f32 in the order of [`Certificate`]'s fields, then f16 `[64]`:
//! norm(vhat_t) of each token, rounded up.

use super::half::{float_up, half_up, widen, write};
use super::{Codec, column_squares, finite, transpose, transposed};
use crate::multiversion;
use crate::ops::cpu::attention::{TILE, key_tile_len, padded, value_tile_len};
use crate::ops::cpu::reduce;
use crate::ops::cpu::scratch::Scratch;
use half::f16;

/// Bytes of a certificate.
pub const BYTES: usize = NORMS + 2 * TILE;
/// Where the norms start.
const NORMS: usize = 16;

/// Exceeds the relative rounding of a sum in 16 lanes over the channels of a head, with a few products and a root around it.
pub(super) const SUM_SLACK: f32 = 1.0 + 1.0 / 65536.0;

/// Errors of one page.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Certificate {
    /// At least max_t norm(k_t - khat_t).
    pub key_radius: f32,
    /// At least max_t norm(v_t - vhat_t).
    pub value_error: f32,
    /// Mean over tokens of norm(k_t - khat_t)^2.
    pub key_mean_square: f32,
    /// Mean over tokens of norm(v_t - vhat_t)^2.
    pub value_mean_square: f32,
}

impl Certificate {
    /// The certificate of `page`.
    pub fn read(page: &[u8]) -> Self {
        let bytes = &page[page.len() - BYTES..];
        let field = |index: usize| f32::from_le_bytes(std::array::from_fn(|byte| bytes[4 * index + byte]));
        Self { key_radius: field(0), value_error: field(1), key_mean_square: field(2), value_mean_square: field(3) }
    }

    /// The smaller of two bounds of max_t |q . (k_t - khat_t)| / sqrt(d): norm(q) key_radius / sqrt(d), which turning the query does not
    /// change, and `interval`, a bound from ranges of channels where the codec has one (infinity where not).
    pub fn score_error(&self, query: &[f32], interval: f32) -> f32 {
        self.score_error_of(sum_of_squares(query), query.len(), interval)
    }

    /// The same from the sum of the query's squares and its width.
    pub(super) fn score_error_of(&self, square: f32, width: usize, interval: f32) -> f32 {
        // Only the radius knows of numbers that were not finite, for which no range holds.
        if !self.key_radius.is_finite() {
            return f32::INFINITY;
        }
        // What products of tiny numbers lose below the smallest normal one is less than that.
        let rms = (square / width as f32 + f32::MIN_POSITIVE).sqrt();
        (rms * self.key_radius * SUM_SLACK).min(interval + f32::MIN_POSITIVE)
    }

    /// Variance of q . (k_t - khat_t) / sqrt(d) when the error has no preferred direction: norm(q)^2 E norm(k - khat)^2 / d^2.
    pub fn score_variance(&self, query: &[f32]) -> f32 {
        if !self.key_mean_square.is_finite() {
            return f32::INFINITY;
        }
        let width = query.len() as f32;
        sum_of_squares(query) * self.key_mean_square / (width * width)
    }
}

multiversion! {
    pub(super) fn sum_of_squares(query: &[f32]) -> f32 {
        reduce::sum_of_squares(query)
    }
}

/// norm(vhat_t) of each token, rounded up.
pub(super) fn read_value_norms(page: &[u8], norms: &mut [f32]) {
    widen_norms(&page[page.len() - BYTES + NORMS..], norms);
}

multiversion! {
    fn widen_norms(bytes: &[u8], norms: &mut [f32]) {
        norms.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(norm, bytes)| {
            let bits = u16::from_le_bytes(*bytes);
            let wide = widen(bits);
            *norm = if bits < f16::INFINITY.to_bits() { wide } else { f32::INFINITY };
        });
    }
}

/// Decodes `page` and writes its certificate against the originals, both `[64, head_dim]`.
pub(super) fn seal(codec: &dyn Codec, keys: &[f16], values: &[f16], page: &mut [u8]) {
    let head_dim = codec.head_dim();
    let [mut stored_keys, mut stored_values] = [(); 2].map(|()| Scratch::take(key_tile_len(head_dim)));
    let mut value_tile = Scratch::take(value_tile_len(head_dim));
    codec.decode_keys(page, &mut stored_keys);
    codec.decode_values(page, &mut value_tile);
    transpose(&value_tile, head_dim, padded(head_dim), &mut stored_values);
    let norms = column_squares(&stored_values);
    let [keys, values] = [squares(keys, head_dim, &stored_keys), squares(values, head_dim, &stored_values)];
    let start = page.len() - BYTES;
    let certificate = &mut page[start..];
    for (index, field) in [radius(&keys), radius(&values), mean(&keys), mean(&values)].into_iter().enumerate() {
        certificate[4 * index..4 * index + 4].copy_from_slice(&field.to_le_bytes());
    }
    norms.iter().enumerate().for_each(|(token, square)| write(&mut certificate[NORMS..], token, half_up(raised(square.sqrt()))));
}

/// Squared distance of each token's vector from the stored one (`[head_dim, 64]`); infinite on a page that is not finite.
fn squares(originals: &[f16], head_dim: usize, stored: &[f32]) -> [f64; TILE] {
    if !originals.iter().fold(true, |all, x| all & x.is_finite()) {
        return [f64::INFINITY; TILE];
    }
    column_distances(&transposed(&finite(originals), head_dim), stored)
}

multiversion! {
    /// Squared distances of the columns of `x` and `y`, both `[rows, 64]`.
    fn column_distances(x: &[f32], y: &[f32]) -> [f64; TILE] {
        let mut sums = [0.0; TILE];
        for (x, y) in x.as_chunks::<TILE>().0.iter().zip(y.as_chunks::<TILE>().0) {
            for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
                let difference = f64::from(*x) - f64::from(*y);
                *sum = difference.mul_add(difference, *sum);
            }
        }
        sums
    }
}

fn radius(squares: &[f64]) -> f32 {
    float_up(raised(squares.iter().copied().fold(0.0, f64::max).sqrt()))
}

fn mean(squares: &[f64]) -> f32 {
    (squares.iter().sum::<f64>() / squares.len() as f64) as f32
}

/// Above what rounding in f64 could have taken off a root of a sum over channels.
fn raised(x: f64) -> f64 {
    x * (1.0 + 1e-12)
}
