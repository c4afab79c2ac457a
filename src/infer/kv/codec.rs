//! How a full page of one key-value head is stored near: one codec per file, each lossy in its own way and each saying by how much.
//!
//! A page is 64 tokens ([`TILE`]). Whatever the codec, the last [`certificate::BYTES`] bytes of a page hold its [`Certificate`]:
//! errors measured when the page was made, by decoding it, and rounded up. That is why a codec needs no proof to be trusted.

mod affine;
pub mod bench;
mod bits;
pub mod certificate;
mod codebook;
mod fp8;
mod half;
mod int8_int4;
mod oscar;
mod rotation;
#[cfg(test)]
mod tests;
mod turboquant;

pub use certificate::Certificate;
pub use codebook::Codebook;
pub use fp8::{Fp8, Fp8Layout};
pub use int8_int4::{Int8Int4, Layout};
pub use oscar::Oscar;
pub use rotation::Rotation;
pub use turboquant::{Part, TurboQuant};

use crate::error::{Error, Result};
use crate::multiversion;
use crate::ops::cpu::attention::{ScoreError, TILE, padded};
use crate::ops::cpu::reduce::{LANES, Lanes};
use crate::ops::cpu::scratch::Scratch;
use ::half::f16;
use std::ops::Range;

/// A way to store a page. All methods take pages of [`Codec::page_bytes`] bytes made by [`Codec::encode`] of the same codec.
///
/// A page that held a number that is not finite decodes to finite ones, and its error bounds are infinite: no certificate accepts it.
pub trait Codec: Send + Sync {
    /// As `--kv` spells it.
    fn name(&self) -> &'static str;

    /// Width of a key and of a value.
    fn head_dim(&self) -> usize;

    /// Bytes of one encoded page of one head, certificate included; a multiple of 16.
    fn page_bytes(&self) -> usize;

    /// Stores `keys` (after RoPE) and `values`, both `[64, head_dim]` in token order. Writes all of `page`.
    fn encode(&self, keys: &[f16], values: &[f16], page: &mut [u8]);

    /// The keys as attention reads them, `[head_dim, 64]`, in the basis they were given in.
    fn decode_keys(&self, page: &[u8], tile: &mut [f32]);

    /// The values as attention reads them, `[64, padded(head_dim)]`; what pads a row is 0.
    fn decode_values(&self, page: &[u8], tile: &mut [f32]);

    /// Whether scores always come from [`score`](Self::score), in an arithmetic of the codec's own whose error
    /// [`score_errors`](Self::score_errors) include. Otherwise they are products with [`decode_keys`](Self::decode_keys)' tile.
    fn scores_itself(&self) -> bool {
        false
    }

    /// Scores of a few queries, `[rows, head_dim]`, scaled, with the page's keys; overwrites `scores`, `[rows, 64]`. False where the
    /// codec leaves that to a product; then nothing is done.
    fn score(&self, page: &[u8], queries: &[f32], scores: &mut [f32]) -> bool {
        let _ = (page, queries, scores);
        false
    }

    /// Adds the values of `tokens`, times `weights`, `[rows, 64]`, to `outputs`, `[rows, padded(head_dim)]`: the bits of a product with
    /// [`decode_values`](Self::decode_values)' tile, without writing one out. False where the codec or the processor cannot; then nothing
    /// is done. Meanwhile it may ask the memory for what `score` reads of the page `next`.
    fn mix(&self, page: &[u8], weights: &[f32], tokens: Range<usize>, outputs: &mut [f32], next: Option<&[u8]>) -> bool {
        let _ = (page, weights, tokens, outputs, next);
        false
    }

    /// [`score_error`](Self::score_error) with what [`score`](Self::score)'s own arithmetic adds, and the variance of
    /// [`mean_squares`](Self::mean_squares), for some queries.
    fn score_errors(&self, page: &[u8], queries: &[Probe<'_>], errors: &mut [ScoreError]) {
        for (error, Probe { query, .. }) in errors.iter_mut().zip(queries) {
            *error = ScoreError { most: self.score_error(page, query), variance: self.mean_squares(page, query).0 };
        }
    }

    /// At least max_t |q . (k_t - khat_t)| / sqrt(head_dim) over the page; the rounding of a score's own sum is not included.
    fn score_error(&self, page: &[u8], query: &[f32]) -> f32 {
        Certificate::read(page).score_error(query, f32::INFINITY)
    }

    /// At least max_t norm(v_t - vhat_t).
    fn value_error(&self, page: &[u8]) -> f32 {
        Certificate::read(page).value_error
    }

    /// At least norm(vhat_t) of each token, rounded up to f16, `[64]`. Infinite where f16 cannot hold it.
    fn value_norms(&self, page: &[u8], norms: &mut [f32]) {
        certificate::read_value_norms(page, norms);
    }

    /// Per channel, bounds of the original keys of the page (`low <= k_t <= high`, `[head_dim]` each). False where the codec keeps none;
    /// then nothing is written.
    fn key_box(&self, _page: &[u8], _low: &mut [f32], _high: &mut [f32]) -> bool {
        false
    }

    /// Expected squares, for an estimate of the error that is not a bound: the variance of a score's error over the page's tokens, and
    /// the mean of norm(v_t - vhat_t)^2.
    fn mean_squares(&self, page: &[u8], query: &[f32]) -> (f32, f32) {
        let certificate = Certificate::read(page);
        (certificate.score_variance(query), certificate.value_mean_square)
    }
}

/// A query on its way through many pages.
#[derive(Clone, Copy, Debug)]
pub struct Probe<'a> {
    pub query: &'a [f32],
    /// Sum of its squares.
    square: f32,
}

impl<'a> Probe<'a> {
    /// For the pages of one head.
    pub fn new(query: &'a [f32]) -> Self {
        Self { query, square: certificate::sum_of_squares(query) }
    }
}

/// Names of all codecs, as `--kv` spells them.
pub const NAMES: [&str; 8] =
    ["fp8", "int8-int4", "turboquant-2", "turboquant-2.5", "turboquant-3", "turboquant-3.5", "turboquant-4", "oscar-2"];

/// The widest head that codecs take: far beyond any model, so that tables made for a width stay small.
const WIDEST: usize = 1024;

/// The codec called `name` for heads of `head_dim` channels (even, from 8 to 1024).
pub fn codec(name: &str, head_dim: usize) -> Result<Box<dyn Codec>> {
    if !head_dim.is_multiple_of(2) || !(8..=WIDEST).contains(&head_dim) {
        let cause = format!("cache format {name} stores heads of an even width from 8 to {WIDEST}; this model's are {head_dim} wide");
        return Err(Error::input("kv", cause).fix("choose f32 or f16"));
    }
    Ok(match name {
        "fp8" => Box::new(Fp8::new(head_dim)),
        "int8-int4" => Box::new(Int8Int4::new(head_dim)),
        "oscar-2" => Box::new(Oscar::new(head_dim)),
        _ => Box::new(TurboQuant::by_name(name, head_dim).ok_or_else(|| {
            let advice = format!("choose one of {}", NAMES.join(", "));
            Error::input("kv", format!("there is no quantized cache format {name:?}")).fix(advice)
        })?),
    })
}

/// What `encode` starts from: f32 copies, with the largest half for what is not finite, so that codes are always defined.
fn finite(x: &[f16]) -> Scratch {
    let mut wide = Scratch::take(x.len());
    widen_finite(x, &mut wide);
    wide
}

multiversion! {
    fn widen_finite(x: &[f16], wide: &mut [f32]) {
        let largest = f16::MAX.to_f32_const();
        // Infinity and NaN widen to numbers from 65536 on.
        wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = half::widen(x.to_bits()).clamp(-largest, largest));
    }
}

/// `[64, width]` as `[width, 64]`.
fn transposed(rows: &[f32], width: usize) -> Scratch {
    let mut out = Scratch::take(rows.len());
    transpose(rows, width, width, &mut out);
    out
}

multiversion! {
    /// `from`: 64 rows of `width` floats, `stride` apart; `to`: `[width, 64]`.
    fn transpose(from: &[f32], width: usize, stride: usize, to: &mut [f32]) {
        let whole = width / LANES * LANES;
        for token in (0..TILE).step_by(LANES) {
            for channel in (0..whole).step_by(LANES) {
                let mut square = [[0.0; LANES]; LANES];
                for (row, line) in square.iter_mut().enumerate() {
                    line.copy_from_slice(&from[(token + row) * stride + channel..][..LANES]);
                }
                for column in 0..LANES {
                    let line: Lanes = std::array::from_fn(|row| square[row][column]);
                    to[(channel + column) * TILE + token..][..LANES].copy_from_slice(&line);
                }
            }
            for channel in whole..width {
                let line: Lanes = std::array::from_fn(|row| from[(token + row) * stride + channel]);
                to[channel * TILE + token..][..LANES].copy_from_slice(&line);
            }
        }
    }
}

multiversion! {
    /// Sum of squares of each column of `x`, `[rows, 64]`.
    fn column_squares(x: &[f32]) -> [f64; TILE] {
        let mut sums = [0.0; TILE];
        for row in x.as_chunks::<TILE>().0 {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum = f64::from(*x).mul_add(f64::from(*x), *sum);
            }
        }
        sums
    }
}

multiversion! {
    /// Sum of squares, in eight lanes.
    fn sum_of_squares(x: &[f32]) -> f64 {
        let mut lanes = [0f64; 8];
        let (chunks, tail) = x.as_chunks::<8>();
        for chunk in chunks {
            lanes = std::array::from_fn(|lane| f64::from(chunk[lane]).mul_add(f64::from(chunk[lane]), lanes[lane]));
        }
        lanes.into_iter().chain(tail.iter().map(|x| f64::from(*x).powi(2))).sum()
    }
}

multiversion! {
    /// Channels `[head_dim, 64]` as a value tile, `[64, padded(head_dim)]`, by squares that stay in the nearest cache.
    fn store_values(channels: &[f32], head_dim: usize, tile: &mut [f32]) {
        const SIDE: usize = 16;
        let width = padded(head_dim);
        for (first, rows) in channels.chunks(SIDE * TILE).enumerate() {
            for token in (0..TILE).step_by(SIDE) {
                let mut square = [[0.0; SIDE]; SIDE];
                for (line, row) in square.iter_mut().zip(rows.as_chunks::<TILE>().0) {
                    line.copy_from_slice(&row[token..token + SIDE]);
                }
                for within in 0..SIDE {
                    let line: [f32; SIDE] = std::array::from_fn(|row| square[row][within]);
                    tile[(token + within) * width + first * SIDE..][..SIDE].copy_from_slice(&line);
                }
            }
        }
    }
}
