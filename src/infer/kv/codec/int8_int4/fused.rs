//! Products of a few rows with a page's codes. Keys stay integers; values become floats in registers, by the same fused multiply-adds as in
//! decoding the page and multiplying then, so with the same bits.

use super::query::{Line, ROWS};
use super::{GROUP, Layout, widen_all};
use crate::ops::cpu::attention::chain::{Rows, ahead_in_part, multiply};
use crate::ops::cpu::attention::{TILE, padded};
use crate::ops::cpu::isa::{Isa, isa};
use crate::ops::cpu::prefetch::prefetch;
use crate::ops::cpu::scratch::Scratch;
use std::arch::x86_64::*;
use std::ops::Range;

/// [`Codec::mix`](super::Codec::mix), where the processor can and values have whole groups.
pub(super) fn mix_page(
    layout: &Layout,
    head_dim: usize,
    page: &[u8],
    weights: &[f32],
    tokens: Range<usize>,
    outputs: &mut [f32],
    next: Option<&[u8]>,
) -> bool {
    let count = weights.len() / TILE;
    assert!(weights.len() == count * TILE && outputs.len() == count * padded(head_dim), "rows of one width");
    if isa() != Isa::Avx512 || !head_dim.is_multiple_of(GROUP) {
        return false;
    }
    let mut metadata = Scratch::take(2 * TILE * (head_dim / GROUP));
    widen_all(&page[layout.value_scales.start..layout.value_zeros.end], &mut metadata);
    let (scales, zeros) = metadata.split_at(metadata.len() / 2);
    if let Some(next) = next {
        prefetch(&next[layout.key_scales.start..layout.key_zeros.end]);
    }
    let ahead = next.map_or(&[][..], |next| &next[layout.key_codes.clone()]);
    let rows = Rows { count, a: weights.as_ptr(), a_stride: TILE, c: outputs.as_mut_ptr(), c_stride: head_dim, accumulate: true };
    // SAFETY: the CPU has AVX-512; weights have 64 steps and outputs `head_dim` columns in each of `count` rows.
    unsafe { mix(rows, tokens, &page[layout.value_codes.clone()], scales, zeros, ahead) };
    true
}

/// Scores of 64 keys: `codes` u8 `[channels, 64]`, an even number of channels; `integers` `[lines, channels]`; `scores` `[lines, 64]`.
///
/// # Safety
/// The CPU has AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn score(codes: &[u8], integers: &[i16], lines: &[Line], scores: &mut [f32], ahead: &[u8]) {
    let channels = codes.len() / TILE;
    assert!(codes.len() == channels * TILE && channels.is_multiple_of(2), "pairs of channels");
    assert!(integers.len() == lines.len() * channels && scores.len() == lines.len() * TILE, "rows of one width");
    // SAFETY: the assertions are what the functions below ask for, with as many lines as they are made for.
    unsafe {
        match lines.len() {
            ROWS => score_rows::<ROWS>(codes, integers, lines, scores, ahead),
            3 => score_rows::<3>(codes, integers, lines, scores, ahead),
            2 => score_rows::<2>(codes, integers, lines, scores, ahead),
            1 => score_rows::<1>(codes, integers, lines, scores, ahead),
            count => assert_eq!(count, 0, "at most {ROWS} lines share a pass"),
        }
    }
}

/// # Safety
/// As for [`score`], which has checked the lengths for `R` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn score_rows<const R: usize>(codes: &[u8], integers: &[i16], lines: &[Line], scores: &mut [f32], ahead: &[u8]) {
    let channels = codes.len() / TILE;
    let steps = channels / 2;
    let mut ahead = ahead.chunks(64 * ahead.len().div_ceil(64).div_ceil(steps).max(1));
    let zero = _mm512_setzero_si512();
    let mut sums = [[zero; 4]; R];
    for step in 0..steps {
        prefetch(ahead.next().unwrap_or_default());
        // SAFETY: two rows of 64 codes, and two integers of each line, at a pair of channels that is there.
        let (codes, pairs): (_, [_; R]) = unsafe {
            let codes = codes.as_ptr().add(2 * step * TILE);
            let pair = |line: usize| integers.as_ptr().add(line * channels + 2 * step).cast::<i32>().read_unaligned();
            ([_mm512_loadu_si512(codes.cast()), _mm512_loadu_si512(codes.add(TILE).cast())], std::array::from_fn(pair))
        };
        // Within each 128-bit lane L, vector v gets the pairs of tokens 16 L + 4 v to 16 L + 4 v + 3.
        let (low, high) = (_mm512_unpacklo_epi8(codes[0], codes[1]), _mm512_unpackhi_epi8(codes[0], codes[1]));
        let wide = [
            _mm512_unpacklo_epi8(low, zero),
            _mm512_unpackhi_epi8(low, zero),
            _mm512_unpacklo_epi8(high, zero),
            _mm512_unpackhi_epi8(high, zero),
        ];
        for (sums, pair) in sums.iter_mut().zip(pairs) {
            let pair = _mm512_set1_epi32(pair);
            for (sum, wide) in sums.iter_mut().zip(wide) {
                *sum = _mm512_dpwssd_epi32(*sum, wide, pair);
            }
        }
    }
    for ((sums, line), scores) in sums.into_iter().zip(lines).zip(scores.chunks_exact_mut(TILE)) {
        for (sum, scores) in in_order(sums).into_iter().zip(scores.chunks_exact_mut(16)) {
            let score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(line.step), _mm512_set1_ps(line.base));
            // SAFETY: 16 scores.
            unsafe { _mm512_storeu_ps(scores.as_mut_ptr(), score) };
        }
    }
}

/// Lane L of vector v becomes lane v of vector L.
#[inline]
#[target_feature(enable = "avx512f")]
fn in_order([a, b, c, d]: [__m512i; 4]) -> [__m512i; 4] {
    let (first, second) = (_mm512_shuffle_i32x4::<0x44>(a, b), _mm512_shuffle_i32x4::<0xEE>(a, b));
    let (third, fourth) = (_mm512_shuffle_i32x4::<0x44>(c, d), _mm512_shuffle_i32x4::<0xEE>(c, d));
    [
        _mm512_shuffle_i32x4::<0x88>(first, third),
        _mm512_shuffle_i32x4::<0xDD>(first, third),
        _mm512_shuffle_i32x4::<0x88>(second, fourth),
        _mm512_shuffle_i32x4::<0xDD>(second, fourth),
    ]
}

/// C += A V over the tokens in `tokens`: `codes` `[64, channels / 2]`, groups of 16 bytes whose low halves are the first 16 channels and
/// whose high halves are the next; a scale and a zero per token and group, `[64, channels / 32]`.
///
/// # Safety
/// The CPU has AVX-512 F; A has 64 steps, C as many columns as there are channels, a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn mix(rows: Rows, tokens: Range<usize>, codes: &[u8], scales: &[f32], zeros: &[f32], ahead: &[u8]) {
    let groups = scales.len() / TILE;
    assert!(tokens.end <= TILE && scales.len() == groups * TILE && zeros.len() == scales.len(), "a scale per token and group");
    assert!(codes.len() == groups * TILE * (GROUP / 2), "half a byte per token and channel");
    let mut group = 0;
    // SAFETY: tokens and groups are within what the assertions above found.
    unsafe {
        // What 16 codes stand for is one multiply-add; each byte then picks two of them.
        let decode = |token: usize, group: usize| {
            let place = token * groups + group;
            let (scale, zero) = (_mm512_set1_ps(*scales.get_unchecked(place)), _mm512_set1_ps(*zeros.get_unchecked(place)));
            let count = _mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.);
            let table = _mm512_fmadd_ps(scale, count, zero);
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().add(place * (GROUP / 2)).cast()));
            [_mm512_permutexvar_ps(bytes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table)]
        };
        while group + 2 <= groups {
            let part = Rows { c: rows.c.add(group * GROUP), ..rows };
            multiply::<4>(part, tokens.clone(), ahead_in_part(ahead, group / 2), |token| {
                let ([a, b], [c, d]) = (decode(token, group), decode(token, group + 1));
                [a, b, c, d]
            });
            group += 2;
        }
        if group < groups {
            let part = Rows { c: rows.c.add(group * GROUP), ..rows };
            multiply::<2>(part, tokens, &[], |token| decode(token, group));
        }
    }
}
