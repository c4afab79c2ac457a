//! Figures of one row of logits. With e_v = exp(z_v - max z), S = sum e:
//! L = max z + ln S;  nll of t = L - z_t;  KL(p || q) = sum_v p_v (z_v - z'_v) + L' - L, p = softmax(z), q = softmax(z').
//! z, z': [vocab]
//! f32 exponentials, partial sums of 1024 elements in 16 f32 lanes, the rest in f64. KL in this form does not cancel large logarithms.

use crate::multiversion;
use crate::ops::cpu::math::exp;
use crate::ops::cpu::reduce::{self, LANES, Lanes};

/// Elements whose sum stays in f32.
const PART: usize = 1024;

/// log sum exp of a row.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let top = largest(logits);
    f64::from(top) + sum_exp(logits, top).ln()
}

/// KL divergence of the distribution of `logits` from that of `other`, in nats; both with their log sum exp.
pub(super) fn divergence(logits: &[f32], log_sum: f64, other: &[f32], other_log_sum: f64) -> f64 {
    let [sum, weighted] = weighted_difference(logits, largest(logits), other);
    (weighted / sum + (other_log_sum - log_sum)).max(0.0)
}

multiversion! {
    fn largest(logits: &[f32]) -> f32 {
        reduce::max(logits)
    }
}

multiversion! {
    fn sum_exp(logits: &[f32], top: f32) -> f64 {
        let mut total = 0.0;
        for part in logits.chunks(PART) {
            let mut lanes = [0.0; LANES];
            for chunk in part.chunks(LANES) {
                let z: Lanes = if chunk.len() == LANES { std::array::from_fn(|i| chunk[i]) } else { reduce::padded(chunk, f32::NEG_INFINITY) };
                lanes = std::array::from_fn(|i| lanes[i] + exp(z[i] - top));
            }
            total += f64::from(reduce::join(lanes, |a, b| a + b));
        }
        total
    }
}

multiversion! {
    /// [sum e_v, sum e_v (z_v - z'_v)].
    fn weighted_difference(logits: &[f32], top: f32, other: &[f32]) -> [f64; 2] {
        let mut totals = [0.0; 2];
        for (part, other) in logits.chunks(PART).zip(other.chunks(PART)) {
            let (mut sums, mut weighted) = ([0.0; LANES], [0.0; LANES]);
            for (chunk, other) in part.chunks(LANES).zip(other.chunks(LANES)) {
                // Padding has weight exp(-inf) = 0 and difference 0.
                let z: Lanes = if chunk.len() == LANES { std::array::from_fn(|i| chunk[i]) } else { reduce::padded(chunk, 0.0) };
                let z_other: Lanes = if chunk.len() == LANES { std::array::from_fn(|i| other[i]) } else { reduce::padded(other, 0.0) };
                let e: Lanes = std::array::from_fn(|i| if i < chunk.len() { exp(z[i] - top) } else { 0.0 });
                sums = std::array::from_fn(|i| sums[i] + e[i]);
                weighted = std::array::from_fn(|i| e[i].mul_add(z[i] - z_other[i], weighted[i]));
            }
            totals[0] += f64::from(reduce::join(sums, |a, b| a + b));
            totals[1] += f64::from(reduce::join(weighted, |a, b| a + b));
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;

    fn row(seed: u64, len: usize, scale: f64) -> Vec<f32> {
        let mut stream = Stream::new(seed, "row");
        (0..len).map(|_| (scale * stream.normal()) as f32).collect()
    }

    fn exact_log_sum(z: &[f32]) -> f64 {
        z.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln()
    }

    #[test]
    fn figures_match_their_definitions() {
        for len in [1, 15, 16, 17, 300, 5000] {
            let z = row(1, len, 3.0);
            assert!((log_sum_exp(&z) - exact_log_sum(&z)).abs() < 1e-6, "{len}");
            for step in [1e-3, 1.0] {
                let other: Vec<f32> = z.iter().zip(row(2, len, step)).map(|(z, step)| z + step).collect();
                let [l, m] = [exact_log_sum(&z), exact_log_sum(&other)];
                let term = |(z, o): (&f32, &f32)| (f64::from(*z) - l).exp() * ((f64::from(*z) - l) - (f64::from(*o) - m));
                let exact: f64 = z.iter().zip(&other).map(term).sum();
                let ours = divergence(&z, log_sum_exp(&z), &other, log_sum_exp(&other));
                assert!((ours - exact).abs() < 3e-7 + 1e-5 * exact, "{len} {step}: {ours} {exact}");
            }
        }
        let z = row(3, 1000, 5.0);
        assert_eq!(divergence(&z, log_sum_exp(&z), &z, log_sum_exp(&z)), 0.0);
    }
}
