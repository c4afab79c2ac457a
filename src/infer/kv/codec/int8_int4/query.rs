//! Scores of queries with the codes of a page, in integers.
//!
//! q . khat_t = sum_c (q_c scale_c) code_ct + sum_c q_c zero_c,   q_c scale_c = step (n_c + e_c),   step = max_c |q_c scale_c| / 32767
//!
//! n_c is a 16-bit integer and |e_c| <= 1/2, so a score costs one integer dot product, which has no order and no rounding, and the channels'
//! scales cost nothing per token. What e_c adds to a score is charged to it by [`error`].

use super::{Layout, widen_all};
use crate::multiversion;
use crate::ops::cpu::attention::TILE;
#[cfg(target_arch = "x86_64")]
use crate::ops::cpu::isa::{Isa, isa};
use crate::ops::cpu::reduce;
use crate::ops::cpu::scratch::Scratch;

/// The widest head whose sums of 255 * 32767 per channel fit 31 bits.
pub(super) const WIDEST: usize = 256;

/// The largest integer of a query.
const LEVELS: f32 = 32767.0;

/// Below this, products of queries and scales count as 0: their steps would not be normal numbers.
const SMALLEST: f32 = 1e-30;

/// At least how far a score, times the root of the width, is from sum_c q_c khat_tc: `magnitude` is sum_c |q_c| (255 scale_c + |zero_c|),
/// `largest` is max_c |q_c| scale_c, both unscaled.
pub(super) fn error(width: usize, magnitude: f32, largest: f32) -> f32 {
    // Half a unit, and what rounding the quotient to f32 before adds.
    const HALF: f32 = 0.51;
    // Scaling the query, its products with scales, the step, turning the sum into a float, the last multiply-add, khat's own rounding and
    // the sum over zeros in 16 lanes of at most 16: fewer than 32 roundings of at most that size.
    const ROUNDINGS: f32 = 16.0 * f32::EPSILON;
    (HALF * 255.0 / LEVELS * width as f32).mul_add(largest, ROUNDINGS * magnitude) + 255.0 * SMALLEST * width as f32
}

/// Scores of `queries`, `[rows, head_dim]`, with a page's keys; overwrites `scores`, `[rows, 64]`.
pub(super) fn score(layout: &Layout, head_dim: usize, page: &[u8], queries: &[f32], scores: &mut [f32]) {
    let count = scores.len() / TILE;
    assert!(queries.len() == count * head_dim && scores.len() == count * TILE && head_dim <= WIDEST, "rows of one width");
    let mut metadata = Scratch::take(2 * head_dim);
    widen_all(&page[layout.key_scales.start..layout.key_zeros.end], &mut metadata);
    let (scales, zeros) = metadata.split_at(head_dim);
    let (mut products, mut integers) = (Scratch::take(head_dim), Scratch::take(count * head_dim / 2));
    let integers = integers.shorts();
    let codes = &page[layout.key_codes.clone()];
    for (index, queries) in queries.chunks(ROWS * head_dim).enumerate() {
        let mut lines = [Line::default(); ROWS];
        let integers = &mut integers[index * ROWS * head_dim..][..queries.len()];
        for ((query, integers), line) in queries.chunks_exact(head_dim).zip(integers.chunks_exact_mut(head_dim)).zip(&mut lines) {
            *line = quantize(query, scales, zeros, &mut products, integers);
        }
        let lines = &lines[..queries.len() / head_dim];
        let scores = &mut scores[index * ROWS * TILE..][..lines.len() * TILE];
        // The values are read next.
        let ahead = if index == 0 { &page[layout.value_codes.start..] } else { &[] };
        multiply(codes, integers, lines, scores, ahead);
    }
}

/// Queries that share a pass over the codes.
pub(super) const ROWS: usize = 4;

/// What turns a query's integer sums into scores.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Line {
    pub(super) step: f32,
    /// sum_c q_c zero_c
    pub(super) base: f32,
}

multiversion! {
    fn quantize(query: &[f32], scales: &[f32], zeros: &[f32], products: &mut [f32], integers: &mut [i16]) -> Line {
        /// Adding it rounds to an integer, which its low bits then hold.
        const ROUNDER: f32 = 12_582_912.0;
        for ((product, query), scale) in products.iter_mut().zip(query).zip(scales) {
            *product = query * scale;
        }
        let largest = reduce::absmax(products);
        let (step, inverse) = if largest > SMALLEST { (largest / LEVELS, LEVELS / largest) } else { (0.0, 0.0) };
        for (integer, product) in integers.iter_mut().zip(products.iter()) {
            *integer = product.mul_add(inverse, ROUNDER).to_bits() as i16;
        }
        Line { step, base: reduce::dot(query, zeros) }
    }
}

/// `scores = step * (integers . codes) + base` per line; meanwhile asks the memory for `ahead`.
fn multiply(codes: &[u8], integers: &[i16], lines: &[Line], scores: &mut [f32], ahead: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: the CPU has AVX-512 with VNNI.
        unsafe { super::fused::score(codes, integers, lines, scores, ahead) };
        return;
    }
    let _ = ahead;
    let width = codes.len() / TILE;
    for ((integers, line), scores) in integers.chunks_exact(width).zip(lines).zip(scores.chunks_exact_mut(TILE)) {
        sum_products(codes, integers, line.step, line.base, scores);
    }
}

multiversion! {
    fn sum_products(codes: &[u8], integers: &[i16], step: f32, base: f32, scores: &mut [f32]) {
        let mut sums = [0i32; TILE];
        for (codes, integer) in codes.as_chunks::<TILE>().0.iter().zip(integers) {
            sums.iter_mut().zip(codes).for_each(|(sum, code)| *sum += i32::from(*integer) * i32::from(*code));
        }
        scores.iter_mut().zip(sums).for_each(|(score, sum)| *score = (sum as f32).mul_add(step, base));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Int8Int4;
    use super::*;
    use crate::infer::kv::codec::{Codec, Probe};
    use crate::ops::cpu::attention::ScoreError;
    use crate::ops::cpu::isa::testing::on_every_isa;
    use crate::ops::rng::Stream;
    use half::f16;

    /// Keys with a mean and a spread of their own in each channel, one of them far wider than the others.
    fn page(codec: &Int8Int4, stream: &mut Stream) -> Vec<u8> {
        let width = codec.head_dim();
        let channels: Vec<(f64, f64)> =
            (0..width).map(|channel| (4.0 * stream.normal(), stream.normal().exp() * if channel == 3 { 30.0 } else { 1.0 })).collect();
        let keys: Vec<f16> =
            (0..TILE * width).map(|i| channels[i % width].1 * stream.normal() + channels[i % width].0).map(f16::from_f64).collect();
        let mut page = vec![0; codec.page_bytes()];
        codec.encode(&keys, &keys, &mut page);
        page
    }

    #[test]
    fn scores_are_within_their_error_and_the_same_everywhere() {
        for width in [8, 40, 64, 128, 256] {
            let (codec, mut stream) = (Int8Int4::new(width), Stream::new(3, "integer scores"));
            let page = page(&codec, &mut stream);
            let rows = 7;
            let queries: Vec<f32> = (0..rows * width).map(|i| (stream.normal() * if i < width { 1e-20 } else { 2.0 }) as f32).collect();
            let all = on_every_isa(|| {
                let mut scores = vec![f32::NAN; rows * TILE];
                assert!(codec.score(&page, &queries, &mut scores));
                scores
            });
            assert!(all.iter().all(|(_, scores)| scores == &all[0].1));
            let mut keys = vec![0.0; width * TILE];
            codec.decode_keys(&page, &mut keys);
            for (query, scores) in queries.chunks(width).zip(all[0].1.chunks(TILE)) {
                let [mut magnitude, mut largest] = [0.0f32; 2];
                for (channel, query) in query.iter().enumerate() {
                    let [scale, zero] = [&codec.layout.key_scales, &codec.layout.key_zeros]
                        .map(|part| super::super::half::read(&page[part.clone()], channel));
                    magnitude += query.abs() * (255.0 * scale + zero.abs());
                    largest = largest.max(query.abs() * scale);
                }
                let allowed = f64::from(error(width, magnitude, largest));
                for (token, score) in scores.iter().enumerate() {
                    let exact: f64 = query.iter().enumerate().map(|(c, q)| f64::from(*q) * f64::from(keys[c * TILE + token])).sum();
                    assert!((f64::from(*score) - exact).abs() <= allowed, "{width}: {score} {exact} {allowed}");
                }
                let mut errors = [ScoreError::default()];
                codec.score_errors(&page, &[Probe::new(query)], &mut errors);
                let root = (width as f32).sqrt();
                assert!(errors[0].most >= codec.score_error(&page, query) + 0.999 * allowed as f32 / root);
            }
        }
    }

    #[test]
    fn one_query_scores_as_among_others() {
        let (codec, mut stream) = (Int8Int4::new(64), Stream::new(4, "integer scores"));
        let page = page(&codec, &mut stream);
        let queries: Vec<f32> = (0..8 * 64).map(|_| stream.normal() as f32).collect();
        let mut together = vec![0.0; 8 * TILE];
        codec.score(&page, &queries, &mut together);
        for (query, scores) in queries.chunks(64).zip(together.chunks(TILE)) {
            let mut alone = vec![0.0; TILE];
            codec.score(&page, query, &mut alone);
            assert_eq!(alone, scores);
        }
    }
}
