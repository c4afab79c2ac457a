//! Products of a few rows with tiles in half precision. Without the instructions for it they say so, and the tile has to be written out.

use super::TILE;
#[cfg(target_arch = "x86_64")]
use super::chain::Rows;
#[cfg(target_arch = "x86_64")]
use crate::ops::cpu::isa::{Isa, isa};
use half::f16;
use std::ops::Range;

/// Scores of `queries`, `[rows, head_dim]`, with 64 keys, `[head_dim, 64]`; overwrites `scores`, `[rows, 64]`. Meanwhile asks the memory for
/// `ahead`. False when nothing was done.
///
/// # Panics
/// When lengths disagree.
pub fn score_halves(keys: &[f16], queries: &[f32], scores: &mut [f32], ahead: &[f16]) -> bool {
    let (head_dim, rows) = (keys.len() / TILE, scores.len() / TILE);
    assert!(keys.len() == head_dim * TILE && scores.len() == rows * TILE && queries.len() == rows * head_dim, "rows of one width");
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        let rows = Rows { count: rows, a: queries.as_ptr(), a_stride: head_dim, c: scores.as_mut_ptr(), c_stride: TILE, accumulate: false };
        // SAFETY: the CPU has AVX-512, and the assertion bounds all operands.
        unsafe { x86::score(rows, keys, bytes_of(ahead)) };
        return true;
    }
    let _ = ahead;
    false
}

/// Adds the values of `tokens`, `[64, width]`, times `weights`, `[rows, 64]`, to `outputs`, `[rows, width]`; width is a multiple of 16.
/// Meanwhile asks the memory for `ahead`. False when nothing was done.
///
/// # Panics
/// When lengths disagree.
pub fn mix_halves(values: &[f16], weights: &[f32], tokens: Range<usize>, outputs: &mut [f32], ahead: &[f16]) -> bool {
    let (width, rows) = (values.len() / TILE, weights.len() / TILE);
    assert!(values.len() == width * TILE && weights.len() == rows * TILE && outputs.len() == rows * width, "rows of one width");
    assert!(tokens.end <= TILE && width.is_multiple_of(16), "whole vectors of a tile");
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        let rows = Rows { count: rows, a: weights.as_ptr(), a_stride: TILE, c: outputs.as_mut_ptr(), c_stride: width, accumulate: true };
        // SAFETY: the CPU has AVX-512, and the assertions bound all operands.
        unsafe { x86::mix(rows, tokens, values, bytes_of(ahead)) };
        return true;
    }
    let _ = (tokens, ahead);
    false
}

/// Halves as they lie in memory.
#[cfg(target_arch = "x86_64")]
fn bytes_of(halves: &[f16]) -> &[u8] {
    // SAFETY: the same memory; every half is two initialized bytes.
    unsafe { std::slice::from_raw_parts(halves.as_ptr().cast(), size_of_val(halves)) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::TILE;
    use super::super::chain::{Rows, ahead_in_part, multiply};
    use half::f16;
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Scores of 64 keys: C = A K, `keys` `[head_dim, 64]`.
    ///
    /// # Safety
    /// The CPU has AVX-512 F; A has `head_dim` steps, C 64 columns.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn score(rows: Rows, keys: &[f16], ahead: &[u8]) {
        // SAFETY: a step reads 64 halves of a channel that is there.
        unsafe { multiply::<4>(rows, 0..keys.len() / TILE, ahead, |step| load(keys.as_ptr().add(step * TILE))) }
    }

    /// C += A V over the tokens in `tokens`, `values` `[64, width]`.
    ///
    /// # Safety
    /// The CPU has AVX-512 F; A has 64 steps, C `width` columns, a multiple of 16; `tokens` end at most at 64.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn mix(rows: Rows, tokens: Range<usize>, values: &[f16], ahead: &[u8]) {
        let width = values.len() / TILE;
        let mut column = 0;
        while column < width {
            // SAFETY: the columns of each part end at or before the width.
            unsafe {
                let part = Rows { c: rows.c.add(column), ..rows };
                let from = |token: usize| values.as_ptr().add(token * width + column);
                column += match width - column {
                    64.. => {
                        multiply::<4>(part, tokens.clone(), ahead_in_part(ahead, column / 64), |token| load(from(token)));
                        64
                    }
                    32.. => {
                        multiply::<2>(part, tokens.clone(), &[], |token| load(from(token)));
                        32
                    }
                    _ => {
                        multiply::<1>(part, tokens.clone(), &[], |token| load(from(token)));
                        16
                    }
                };
            }
        }
    }

    /// # Safety
    /// The CPU has AVX-512 F, and `V` times 16 halves can be read.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load<const V: usize>(from: *const f16) -> [__m512; V] {
        let mut vectors = [_mm512_setzero_ps(); V];
        for (v, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: as the caller promises.
            *vector = _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.add(16 * v).cast()) });
        }
        vectors
    }
}
