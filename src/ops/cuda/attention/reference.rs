//! The kernels' work written plainly: the codecs from their formulas, attention in f64.

use half::f16;

use super::layout::{Near, PAGE, Shape};

/// Keys and values of one head as attention sees them, `[tokens, head_dim]` each.
#[derive(Clone, Default)]
pub(super) struct Head {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
}

/// What a near page decodes to, and what its metadata should be.
pub(super) struct Coded {
    pub(super) head: Head,
    pub(super) key_radius: f64,
    pub(super) value_error: f64,
    pub(super) value_norms: Vec<f64>,
    pub(super) value_mean_square: f64,
    key_mean_square: f64,
    /// Steps of the key channels; none for formats without.
    key_scales: Vec<f32>,
}

impl Coded {
    /// Variance of q . (k_t - khat_t) / sqrt(d): uniform over the steps, or the mean square without a direction.
    pub(super) fn score_variance(&self, query: &[f32]) -> f64 {
        let width = query.len() as f64;
        let squares = query.iter().map(|q| f64::from(*q).powi(2));
        if self.key_scales.is_empty() {
            return squares.sum::<f64>() * self.key_mean_square / (width * width);
        }
        squares.zip(&self.key_scales).map(|(q, scale)| q * f64::from(*scale).powi(2)).sum::<f64>() / (12.0 * width)
    }
}

/// The smallest half not below `x >= 0`.
pub(super) fn half_up(x: f64) -> f16 {
    let nearest = f16::from_f64(x);
    if nearest.to_f64() < x { f16::from_bits(nearest.to_bits() + 1) } else { nearest }
}

/// Rounds a group to `levels + 1` evenly spaced levels, each `fma(scale, code, least)`, and returns the scale.
fn affine(group: &mut [f32], levels: f32) -> f32 {
    let (low, high) = group.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| (low.min(*x), high.max(*x)));
    let scale = half_up(f64::from((high - low) / levels)).to_f32();
    for x in group {
        let code = if scale > 0.0 { ((*x - low) / scale).round_ties_even().clamp(0.0, levels) } else { 0.0 };
        *x = scale.mul_add(code, low);
    }
    scale
}

/// The e4m3 number nearest to `x`, ties to even.
fn e4m3(x: f32) -> f32 {
    let magnitude = x.abs().min(448.0);
    let exponent = if magnitude < 0.015625 { -6 } else { magnitude.log2().floor() as i32 };
    let step = (exponent as f32 - 3.0).exp2();
    ((magnitude / step).round_ties_even() * step).copysign(x)
}

fn fp8(page: &mut [f32]) {
    let largest = page.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let scale = half_up(f64::from(largest / 448.0)).to_f32();
    page.iter_mut().for_each(|x| *x = if scale > 0.0 { scale * e4m3(*x / scale) } else { 0.0 });
}

/// Encodes and decodes a full page of one head.
pub(super) fn coded(near: Near, shape: &Shape, exact: &Head) -> Coded {
    let width = shape.head_dim;
    let (mut head, mut key_scales) = (exact.clone(), vec![]);
    match near {
        Near::F16 => {}
        Near::Fp8 => {
            fp8(&mut head.keys);
            fp8(&mut head.values);
        }
        Near::Int8Int4 => {
            for channel in 0..width {
                let mut column: Vec<f32> = head.keys.iter().skip(channel).step_by(width).copied().collect();
                key_scales.push(affine(&mut column, 255.0));
                head.keys.iter_mut().skip(channel).step_by(width).zip(column).for_each(|(key, x)| *key = x);
            }
            for group in head.values.chunks_exact_mut(width).flat_map(|row| row.chunks_mut(32)) {
                affine(group, 15.0);
            }
        }
    }
    let distance = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
    let errors =
        |a: &[f32], b: &[f32]| -> Vec<f64> { a.chunks_exact(width).zip(b.chunks_exact(width)).map(|(a, b)| distance(a, b)).collect() };
    let largest = |a: &[f32], b: &[f32]| errors(a, b).into_iter().fold(0.0, f64::max);
    let mean_square = |a: &[f32], b: &[f32]| errors(a, b).iter().map(|error| error * error).sum::<f64>() / PAGE as f64;
    Coded {
        value_mean_square: mean_square(&head.values, &exact.values),
        key_mean_square: mean_square(&head.keys, &exact.keys),
        key_scales,
        key_radius: largest(&head.keys, &exact.keys),
        value_error: largest(&head.values, &exact.values),
        value_norms: head.values.chunks_exact(width).map(|row| distance(row, &vec![0.0; width])).collect(),
        head,
    }
}

/// Output and log-sum-exp of one query over the tokens of `head` that `visible` lets through, in f64.
pub(super) fn attend(query: &[f32], head: &Head, visible: impl Fn(usize) -> bool) -> (Vec<f64>, f64) {
    let width = query.len();
    let score = |key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / (width as f64).sqrt();
    let rows = || head.keys.chunks_exact(width).zip(head.values.chunks_exact(width)).enumerate().filter(|(token, _)| visible(*token));
    let scores: Vec<f64> = rows().map(|(_, (key, _))| score(key)).collect();
    let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mass: f64 = scores.iter().map(|score| (score - maximum).exp()).sum();
    let mut output = vec![0.0; width];
    for (score, (_, (_, value))) in scores.iter().zip(rows()) {
        let weight = (score - maximum).exp() / mass;
        output.iter_mut().zip(value).for_each(|(out, value)| *out += weight * f64::from(*value));
    }
    (output, if scores.is_empty() { f64::NEG_INFINITY } else { maximum + mass.ln() })
}

/// Parts of a near page by name, in elements: the formulas of `kernels/page.cuh` written once more.
pub(super) fn decode_near(near: Near, shape: &Shape, page: &[u8]) -> (Head, [f32; 4], Vec<f32>) {
    let width = shape.width().unwrap();
    let half = |at: usize| f16::from_le_bytes([page[at], page[at + 1]]).to_f32();
    let float = |at: usize| f32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    let byte_key =
        |token: usize, c: usize| (((token / 32 * (width / 16) + c / 16) * 8 + token % 8) * 4 + c % 16 / 4) * 16 + token / 8 % 4 * 4 + c % 4;
    let byte_value = |token: usize, c: usize| {
        let lane = c % 8 * 4 + token % 8 / 2;
        ((token / 32 * (width / 16) + c / 16) * 32 + lane) * 16 + token / 8 % 4 * 4 + c / 8 % 2 * 2 + token % 2
    };
    let e4m3 = |code: u8| {
        let magnitude = match (code >> 3 & 15, code & 7) {
            (0, mantissa) => f32::from(mantissa) / 512.0,
            (exponent, mantissa) => (1.0 + f32::from(mantissa) / 8.0) * (f32::from(exponent) - 7.0).exp2(),
        };
        if code & 128 != 0 { -magnitude } else { magnitude }
    };
    let norms_at = if near == Near::Fp8 { 32 } else { 16 };
    let codes_at = norms_at + 2 * PAGE;
    let key = |token: usize, c: usize| match near {
        Near::Fp8 => float(8) * e4m3(page[codes_at + byte_key(token, c)]),
        _ => half(codes_at + 2 * c).mul_add(f32::from(page[codes_at + 4 * width + byte_key(token, c)]), half(codes_at + 2 * width + 2 * c)),
    };
    let values_at = codes_at + if near == Near::Fp8 { 64 * width } else { 68 * width };
    let value = |token: usize, c: usize| {
        if near == Near::Fp8 {
            return float(16) * e4m3(page[values_at + byte_value(token, c)]);
        }
        let word = (c / 16 * 32 + c % 8 * 4 + token % 8 / 2) * 4 + token / 16;
        let nibble = c / 8 % 2 + token / 8 % 2 * 2 + token % 2 * 4;
        let code = page[values_at + word * 4 + nibble / 2] >> (4 * (nibble % 2)) & 15;
        let scale_at = values_at + 32 * width + 2 * (c / 32 * 2 * PAGE + token % 8 / 2 * 16 + token / 8 * 2 + token % 2);
        half(scale_at).mul_add(f32::from(code), half(scale_at + 2 * PAGE))
    };
    let all = || (0..PAGE).flat_map(|token| (0..shape.head_dim).map(move |channel| (token, channel)));
    let head = Head { keys: all().map(|(t, c)| key(t, c)).collect(), values: all().map(|(t, c)| value(t, c)).collect() };
    let norms = (0..PAGE).map(|token| half(norms_at + 2 * token)).collect();
    (head, [float(0), float(4), float(8), float(12)], norms)
}
