//! Keys in 8 bits per channel, values in 4 bits per group. Calver 2026, arXiv:2605.20868, with f16 metadata and pages of 64 tokens.
//! khat = scale_c * code + zero_c over the 64 tokens of channel c;   vhat = scale_tg * code + zero_tg over 32 channels of one token
//! Both are one fused multiply-add in f32. Zeros are the exact least number, scales are f16 rounded up (see `affine`).
//!
//! Scores with a page are integer dot products, see [`query`].

use super::affine::Affine;
#[cfg(target_arch = "x86_64")]
mod fused;
mod query;

use super::certificate::{self, Certificate, SUM_SLACK};
use super::{Codec, Probe, finite, half, transposed};
use crate::multiversion;
use crate::ops::cpu::attention::{ScoreError, TILE, padded};
use crate::ops::cpu::reduce::{LANES, Lanes, join, larger};
use crate::ops::cpu::scratch::Scratch;
use ::half::f16;
use std::ops::Range;

/// Channels of a value that share a scale; the last group of a row may be shorter.
const GROUP: usize = 32;
const KEY_LEVELS: f32 = 255.0;
const VALUE_LEVELS: f32 = 15.0;

/// Where the parts of a page lie, in bytes; the certificate follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// u8 `[head_dim, 64]`
    pub key_codes: Range<usize>,
    /// `[64, head_dim / 2]`: a group of w channels takes w / 2 bytes, channel i in the low half of byte i, channel w/2 + i in the high.
    pub value_codes: Range<usize>,
    /// f16 `[head_dim]`
    pub key_scales: Range<usize>,
    /// f16 `[head_dim]`
    pub key_zeros: Range<usize>,
    /// f16 `[64, groups]`
    pub value_scales: Range<usize>,
    /// f16 `[64, groups]`
    pub value_zeros: Range<usize>,
}

impl Layout {
    fn new(head_dim: usize) -> Self {
        let mut end = 0;
        let mut part = |bytes: usize| {
            end += bytes;
            end - bytes..end
        };
        let metadata = 2 * TILE * head_dim.div_ceil(GROUP);
        Self {
            key_codes: part(TILE * head_dim),
            value_codes: part(TILE * head_dim / 2),
            key_scales: part(2 * head_dim),
            key_zeros: part(2 * head_dim),
            value_scales: part(metadata),
            value_zeros: part(metadata),
        }
    }
}

/// The codec `int8-int4`.
#[derive(Clone, Debug)]
pub struct Int8Int4 {
    head_dim: usize,
    layout: Layout,
}

impl Int8Int4 {
    /// For heads of `head_dim` channels, which is even.
    pub fn new(head_dim: usize) -> Self {
        Self { head_dim, layout: Layout::new(head_dim) }
    }

    /// Where the parts of a page lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    fn encode_key_channel(&self, channel: usize, keys: &[f32], page: &mut [u8]) {
        let affine = Affine::fit(keys, KEY_LEVELS);
        half::write(&mut page[self.layout.key_scales.clone()], channel, affine.scale);
        half::write(&mut page[self.layout.key_zeros.clone()], channel, affine.zero);
        affine.codes(keys, KEY_LEVELS, &mut page[self.layout.key_codes.clone()][channel * TILE..][..TILE]);
    }

    fn encode_value_row(&self, token: usize, row: &[f32], page: &mut [u8]) {
        let groups = self.head_dim.div_ceil(GROUP);
        for (index, group) in row.chunks(GROUP).enumerate() {
            let affine = Affine::fit(group, VALUE_LEVELS);
            half::write(&mut page[self.layout.value_scales.clone()], token * groups + index, affine.scale);
            half::write(&mut page[self.layout.value_zeros.clone()], token * groups + index, affine.zero);
            let mut codes = [0; GROUP];
            affine.codes(group, VALUE_LEVELS, &mut codes);
            let (low, high) = codes[..group.len()].split_at(group.len() / 2);
            let bytes = page[self.layout.value_codes.clone()][(token * self.head_dim + index * GROUP) / 2..].iter_mut();
            bytes.zip(low.iter().zip(high)).for_each(|(byte, (low, high))| *byte = low | high << 4);
        }
    }
}

impl Codec for Int8Int4 {
    fn name(&self) -> &'static str {
        "int8-int4"
    }

    fn head_dim(&self) -> usize {
        self.head_dim
    }

    fn page_bytes(&self) -> usize {
        (self.layout.value_zeros.end + certificate::BYTES).next_multiple_of(16)
    }

    fn encode(&self, keys: &[f16], values: &[f16], page: &mut [u8]) {
        page.fill(0);
        for (channel, keys) in transposed(&finite(keys), self.head_dim).chunks_exact(TILE).enumerate() {
            self.encode_key_channel(channel, keys, page);
        }
        for (token, row) in finite(values).chunks_exact(self.head_dim).enumerate() {
            self.encode_value_row(token, row, page);
        }
        certificate::seal(self, keys, values, page);
    }

    fn decode_keys(&self, page: &[u8], tile: &mut [f32]) {
        let Layout { key_codes, key_scales, key_zeros, .. } = self.layout.clone();
        decode_key_codes(&page[key_codes], &page[key_scales], &page[key_zeros], tile);
    }

    fn decode_values(&self, page: &[u8], tile: &mut [f32]) {
        let Layout { value_codes, value_scales, value_zeros, .. } = self.layout.clone();
        decode_value_codes(self.head_dim, &page[value_codes], &page[value_scales], &page[value_zeros], tile);
    }

    fn scores_itself(&self) -> bool {
        self.head_dim <= query::WIDEST
    }

    fn score(&self, page: &[u8], queries: &[f32], scores: &mut [f32]) -> bool {
        if self.scores_itself() {
            query::score(&self.layout, self.head_dim, page, queries, scores);
        }
        self.scores_itself()
    }

    #[cfg(target_arch = "x86_64")]
    fn mix(&self, page: &[u8], weights: &[f32], tokens: Range<usize>, outputs: &mut [f32], next: Option<&[u8]>) -> bool {
        fused::mix_page(&self.layout, self.head_dim, page, weights, tokens, outputs, next)
    }

    fn score_errors(&self, page: &[u8], queries: &[Probe<'_>], errors: &mut [ScoreError]) {
        let (certificate, width) = (Certificate::read(page), self.head_dim);
        let mut sums = [[0.0; 4]; 8];
        for (queries, errors) in queries.chunks(sums.len()).zip(errors.chunks_mut(sums.len())) {
            interval_sums(queries, &page[self.layout.key_scales.clone()], &page[self.layout.key_zeros.clone()], &mut sums);
            for ((error, probe), [interval, square, magnitude, largest]) in errors.iter_mut().zip(queries).zip(sums) {
                let root = (width as f32).sqrt();
                let interval = interval / root * SUM_SLACK;
                let arithmetic = if self.scores_itself() { query::error(width, magnitude, largest) / root * SUM_SLACK } else { 0.0 };
                let variance = if certificate.key_mean_square.is_finite() { square / (12.0 * width as f32) } else { f32::INFINITY };
                *error = ScoreError { most: certificate.score_error_of(probe.square, width, interval) + arithmetic, variance };
            }
        }
    }

    fn score_error(&self, page: &[u8], query: &[f32]) -> f32 {
        let Layout { key_scales, key_zeros, .. } = self.layout.clone();
        let interval = interval_error(query, &page[key_scales], &page[key_zeros]) / (query.len() as f32).sqrt() * SUM_SLACK;
        Certificate::read(page).score_error(query, interval)
    }

    fn key_box(&self, page: &[u8], low: &mut [f32], high: &mut [f32]) -> bool {
        if Certificate::read(page).key_radius == f32::INFINITY {
            low.fill(f32::NEG_INFINITY);
            high.fill(f32::INFINITY);
            return true;
        }
        let (scales, zeros) = (&page[self.layout.key_scales.clone()], &page[self.layout.key_zeros.clone()]);
        for (channel, (low, high)) in low.iter_mut().zip(high).enumerate() {
            let (zero, range) = (f64::from(half::read(zeros, channel)), f64::from(KEY_LEVELS * half::read(scales, channel)));
            *low = zero as f32;
            // The scale came from a range rounded to f32.
            *high = half::float_up(zero + range * (1.0 + 1e-6));
        }
        true
    }

    /// Errors of a channel are uniform over a step: q_c^2 scale_c^2 / 12 each.
    fn mean_squares(&self, page: &[u8], query: &[f32]) -> (f32, f32) {
        let certificate = Certificate::read(page);
        let uniform = interval_variance(query, &page[self.layout.key_scales.clone()]) / (12.0 * query.len() as f32);
        let variance = if certificate.key_mean_square.is_finite() { uniform } else { f32::INFINITY };
        (variance, certificate.value_mean_square)
    }
}

multiversion! {
    /// Halves of a page as floats.
    fn widen_all(bytes: &[u8], wide: &mut [f32]) {
        wide.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(wide, bytes)| *wide = half::widen(u16::from_le_bytes(*bytes)));
    }
}

multiversion! {
    fn decode_key_codes(codes: &[u8], scales: &[u8], zeros: &[u8], tile: &mut [f32]) {
        for (channel, (codes, out)) in codes.as_chunks::<TILE>().0.iter().zip(tile.as_chunks_mut::<TILE>().0).enumerate() {
            let (scale, zero) = (half::read(scales, channel), half::read(zeros, channel));
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = scale.mul_add(f32::from(*code), zero));
        }
    }
}

multiversion! {
    fn decode_value_codes(head_dim: usize, codes: &[u8], scales: &[u8], zeros: &[u8], tile: &mut [f32]) {
        let groups = head_dim.div_ceil(GROUP);
        let mut metadata = Scratch::take(scales.len());
        for (wide, bytes) in metadata.iter_mut().zip(scales.as_chunks::<2>().0.iter().chain(zeros.as_chunks::<2>().0)) {
            *wide = half::widen(u16::from_le_bytes(*bytes));
        }
        let (scales, zeros) = metadata.split_at(scales.len() / 2);
        for (token, (codes, row)) in codes.chunks_exact(head_dim / 2).zip(tile.chunks_exact_mut(padded(head_dim))).enumerate() {
            let (row, rest) = row.split_at_mut(head_dim);
            rest.fill(0.0);
            let (scales, zeros) = (&scales[token * groups..][..groups], &zeros[token * groups..][..groups]);
            let (whole, rest) = row.as_chunks_mut::<GROUP>();
            let (whole_codes, rest_codes) = codes.as_chunks::<{ GROUP / 2 }>();
            for (index, (codes, out)) in whole_codes.iter().zip(whole).enumerate() {
                decode_group(codes, scales[index], zeros[index], out);
            }
            if !rest.is_empty() {
                decode_group(rest_codes, scales[groups - 1], zeros[groups - 1], rest);
            }
        }
    }
}

/// The low halves of `codes`, then the high ones.
#[inline(always)]
fn decode_group(codes: &[u8], scale: f32, zero: f32, out: &mut [f32]) {
    let (first, second) = out.split_at_mut(codes.len());
    first.iter_mut().zip(codes).for_each(|(out, code)| *out = scale.mul_add(f32::from(code & 15), zero));
    second.iter_mut().zip(codes).for_each(|(out, code)| *out = scale.mul_add(f32::from(code >> 4), zero));
}

multiversion! {
    /// sum_c |q_c| max_t |k_tc - khat_tc|: half a step, and the roundings of the quotient (a code's share) and of the result.
    fn interval_error(query: &[f32], scales: &[u8], zeros: &[u8]) -> f32 {
        const HALF_STEP: f32 = 0.5 + 1e-4;
        let mut sums: Lanes = [0.0; LANES];
        for chunk in 0..query.len().div_ceil(LANES) {
            let query = half::lanes(query, chunk);
            let (scales, zeros) = (half::read_lanes(scales, chunk), half::read_lanes(zeros, chunk));
            for lane in 0..LANES {
                let rounding = KEY_LEVELS.mul_add(scales[lane], zeros[lane].abs()) * f32::EPSILON;
                sums[lane] = query[lane].abs().mul_add(HALF_STEP.mul_add(scales[lane], rounding), sums[lane]);
            }
        }
        join(sums, |x, y| x + y)
    }
}

multiversion! {
    /// Of several queries, what only the page decides computed once: [`interval_error`], [`interval_variance`],
    /// sum_c |q_c| (255 scale_c + |zero_c|), and max_c |q_c| scale_c.
    fn interval_sums(queries: &[Probe<'_>], scales: &[u8], zeros: &[u8], sums: &mut [[f32; 4]; 8]) {
        const HALF_STEP: f32 = 0.5 + 1e-4;
        let chunks = scales.len().div_ceil(2 * LANES);
        let mut steps = Scratch::take(3 * chunks * LANES);
        for (chunk, steps) in steps.as_chunks_mut::<{ 3 * LANES }>().0.iter_mut().enumerate() {
            let (scales, zeros) = (half::read_lanes(scales, chunk), half::read_lanes(zeros, chunk));
            let (widths, rest) = steps.split_at_mut(LANES);
            let (scale, magnitudes) = rest.split_at_mut(LANES);
            for lane in 0..LANES {
                scale[lane] = scales[lane];
                magnitudes[lane] = KEY_LEVELS.mul_add(scales[lane], zeros[lane].abs());
                widths[lane] = HALF_STEP.mul_add(scales[lane], magnitudes[lane] * f32::EPSILON);
            }
        }
        for (probe, sums) in queries.iter().zip(sums) {
            let (mut errors, mut variances): (Lanes, Lanes) = ([0.0; LANES], [0.0; LANES]);
            let (mut magnitudes, mut largest): (Lanes, Lanes) = ([0.0; LANES], [0.0; LANES]);
            for (chunk, steps) in steps.as_chunks::<{ 3 * LANES }>().0.iter().enumerate() {
                let query = half::lanes(probe.query, chunk);
                for lane in 0..LANES {
                    let (size, step) = (query[lane].abs(), query[lane].abs() * steps[LANES + lane]);
                    errors[lane] = size.mul_add(steps[lane], errors[lane]);
                    variances[lane] = step.mul_add(step, variances[lane]);
                    magnitudes[lane] = size.mul_add(steps[2 * LANES + lane], magnitudes[lane]);
                    largest[lane] = larger(step, largest[lane]);
                }
            }
            *sums = [join(errors, |x, y| x + y), join(variances, |x, y| x + y), join(magnitudes, |x, y| x + y), join(largest, larger)];
        }
    }
}

multiversion! {
    /// sum_c q_c^2 scale_c^2
    fn interval_variance(query: &[f32], scales: &[u8]) -> f32 {
        let mut sums: Lanes = [0.0; LANES];
        for chunk in 0..query.len().div_ceil(LANES) {
            let query = half::lanes(query, chunk);
            let scales = half::read_lanes(scales, chunk);
            for lane in 0..LANES {
                let step = query[lane] * scales[lane];
                sums[lane] = step.mul_add(step, sums[lane]);
            }
        }
        join(sums, |x, y| x + y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::attention::{key_tile_len, value_tile_len};

    /// Token t, channel c holds t + 100 c for keys and 15 steps of one half for values.
    #[test]
    fn layout_is_pinned() {
        let codec = Int8Int4::new(40);
        let keys: Vec<f16> = (0..TILE * 40).map(|i| f16::from_f32((i / 40 + 100 * (i % 40)) as f32)).collect();
        let values: Vec<f16> = (0..TILE * 40).map(|i| f16::from_f32((i % 40 % 16) as f32 * 0.5)).collect();
        let mut page = vec![0xAA; codec.page_bytes()];
        codec.encode(&keys, &values, &mut page);
        let layout = codec.layout();
        assert_eq!(layout.value_zeros.end + certificate::BYTES, page.len());
        assert_eq!(half::read(&page[layout.key_zeros.clone()], 3), 300.0);
        let codes = &page[layout.key_codes.clone()][3 * TILE..4 * TILE];
        assert!(codes[0] == 0 && codes[63] >= 254 && codes.is_sorted(), "{codes:?}");
        // Channels 0..32 form a group: i beside i + 16, both i / 2. Channels 32..40 hold 0 to 3.5 in a group of their own.
        let row = &page[layout.value_codes.clone()][20..40];
        assert_eq!(row[..16], std::array::from_fn::<u8, 16, _>(|i| (i * 17) as u8));
        // 0..8 over 15 levels: the scale is a little above 7/15, so codes are 0, 2, 4, 6 and 9, 11, 13, 15.
        assert_eq!(row[16..], [0x90, 0xB2, 0xD4, 0xF6]);
    }

    #[test]
    fn bytes_per_token_at_width_128() {
        let bytes = Int8Int4::new(128).page_bytes() as f64 / TILE as f64;
        assert_eq!(bytes, 218.25);
    }

    #[test]
    fn several_queries_at_once_get_the_same_bounds() {
        let codec = Int8Int4::new(40);
        let mut stream = crate::ops::rng::Stream::new(6, "int8-int4");
        let mut normal = |count: usize| -> Vec<f16> { (0..count).map(|_| f16::from_f64(stream.normal())).collect() };
        let (keys, values) = (normal(TILE * 40), normal(TILE * 40));
        let queries: Vec<f32> = normal(11 * 40).iter().map(|x| x.to_f32()).collect();
        let mut page = vec![0; codec.page_bytes()];
        codec.encode(&keys, &values, &mut page);
        let probes: Vec<Probe<'_>> = queries.chunks(40).map(Probe::new).collect();
        let mut errors = vec![ScoreError::default(); probes.len()];
        codec.score_errors(&page, &probes, &mut errors);
        for (error, query) in errors.iter().zip(queries.chunks(40)) {
            let most = codec.score_error(&page, query);
            assert!(error.most > most && error.most < 1.3 * most, "{error:?} {most}");
            assert!((error.variance / codec.mean_squares(&page, query).0 - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn codes_survive_a_round_trip() {
        let codec = Int8Int4::new(72);
        let mut stream = crate::ops::rng::Stream::new(5, "int8-int4");
        let mut halves = || -> Vec<f16> { (0..TILE * 72).map(|_| f16::from_f64(stream.normal())).collect() };
        let (keys, values) = (halves(), halves());
        let mut page = vec![0; codec.page_bytes()];
        codec.encode(&keys, &values, &mut page);
        let (mut key_tile, mut value_tile) = (vec![0.0; key_tile_len(72)], vec![f32::NAN; value_tile_len(72)]);
        codec.decode_keys(&page, &mut key_tile);
        codec.decode_values(&page, &mut value_tile);
        for channel in 0..72 {
            let zero = half::read(&page[codec.layout.key_zeros.clone()], channel);
            let scale = half::read(&page[codec.layout.key_scales.clone()], channel);
            for token in channel * TILE..(channel + 1) * TILE {
                assert_eq!(super::super::affine::code(key_tile[token], zero, scale, KEY_LEVELS), page[token]);
            }
        }
        assert!(value_tile.chunks(padded(72)).all(|row| row[72..].iter().all(|x| *x == 0.0)));
    }
}
