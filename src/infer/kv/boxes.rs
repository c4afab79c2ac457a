//! Boxes around keys, and what they say of the products of a query with the keys inside.

use crate::multiversion;
use crate::ops::cpu::reduce::{self, LANES};
use half::f16;

/// How many deviations above its middle a box is taken to reach. A deviation is that of a product if the key lies at a corner at random:
/// half the box's diagonal, weighted by the query. Chosen by what was found with it (docs/decisions.md).
const DEVIATIONS: f32 = 2.0;

/// Adds the least and the largest of each channel of `keys` (`[tokens, head_dim]`): `[2, head_dim]`. What is not a number stays.
pub(super) fn push_box(keys: &[f16], head_dim: usize, boxes: &mut Vec<f16>) {
    let mut channel = |pick: fn(f16, f16) -> f16| {
        let picked = |channel: usize| keys.iter().skip(channel).step_by(head_dim).copied().reduce(pick).unwrap_or_default();
        boxes.extend((0..head_dim).map(picked));
    };
    channel(|a, b| if b < a || b.is_nan() { b } else { a });
    channel(|a, b| if b > a || b.is_nan() { b } else { a });
}

multiversion! {
    /// Largest product of each query with a vector from the box `low..high`, times `scale`.
    pub(super) fn largest_products(queries: &[f32], low: &[f32], high: &[f32], scale: f32, bounds: &mut [f32]) {
        for (query, bound) in queries.chunks_exact(low.len()).zip(bounds) {
            let mut lanes = [0.0f32; LANES];
            let (queries, rest) = query.as_chunks::<LANES>();
            let ((lows, low_rest), (highs, high_rest)) = (low.as_chunks::<LANES>(), high.as_chunks::<LANES>());
            for ((query, low), high) in queries.iter().zip(lows).zip(highs) {
                for lane in 0..LANES {
                    lanes[lane] += reduce::larger(query[lane] * low[lane], query[lane] * high[lane]);
                }
            }
            let rest = rest.iter().zip(low_rest).zip(high_rest);
            rest.zip(&mut lanes).for_each(|(((query, low), high), lane)| *lane += reduce::larger(query * low, query * high));
            *bound = reduce::join(lanes, |a, b| a + b) * scale;
        }
    }
}

multiversion! {
    /// Raises `estimates` to how large a product of each query with a vector from the box is likely to be, times `scale`. `middle` and
    /// `half`: the box as its middle and half its width per channel.
    pub(super) fn raise_estimates(queries: &[f32], middle: &[f32], half: &[f32], scale: f32, estimates: &mut [f32]) {
        for (query, estimate) in queries.chunks_exact(middle.len()).zip(estimates) {
            let (mut products, mut squares) = ([0.0f32; LANES], [0.0f32; LANES]);
            let (queries, rest) = query.as_chunks::<LANES>();
            let ((middles, middle_rest), (halves, half_rest)) = (middle.as_chunks::<LANES>(), half.as_chunks::<LANES>());
            for ((query, middle), half) in queries.iter().zip(middles).zip(halves) {
                for lane in 0..LANES {
                    let width = query[lane] * half[lane];
                    products[lane] = query[lane].mul_add(middle[lane], products[lane]);
                    squares[lane] = width.mul_add(width, squares[lane]);
                }
            }
            let rest = rest.iter().zip(middle_rest).zip(half_rest).enumerate();
            rest.for_each(|(lane, ((query, middle), half))| {
                products[lane] = query.mul_add(*middle, products[lane]);
                squares[lane] = (query * half).mul_add(query * half, squares[lane]);
            });
            let [product, square] = [products, squares].map(|lanes| reduce::join(lanes, |a, b| a + b));
            let likely = (product + DEVIATIONS * square.sqrt()) * scale;
            // What is not a number stays.
            *estimate = if likely <= *estimate { *estimate } else { likely };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_holds_its_keys() {
        let keys = [1.0, -2.0, 3.0, 0.5, -1.0, 7.0].map(f16::from_f32);
        let mut boxes = vec![];
        push_box(&keys, 2, &mut boxes);
        assert_eq!(boxes, [-1.0, -2.0, 3.0, 7.0].map(f16::from_f32));
        push_box(&[f16::NAN, f16::ONE], 1, &mut boxes);
        assert!(boxes[4].is_nan() && boxes[5].is_nan());
    }

    #[test]
    fn estimates_lie_between_the_middle_and_the_bound() {
        let (query, low, high) = ([1.0, -2.0, 0.5], [0.0, -1.0, 2.0], [2.0, 3.0, 4.0]);
        let (middle, half) = ([1.0, 1.0, 3.0], [1.0, 2.0, 1.0]);
        let (mut bound, mut estimate) = ([0.0], [f32::NEG_INFINITY]);
        largest_products(&query, &low, &high, 0.5, &mut bound);
        assert_eq!(bound, [0.5 * (2.0 + 2.0 + 2.0)]);
        raise_estimates(&query, &middle, &half, 0.5, &mut estimate);
        let deviation = (1.0f32 + 16.0 + 0.25).sqrt();
        assert!((estimate[0] - 0.5 * (1.0 - 2.0 + 1.5 + 2.0 * deviation)).abs() < 1e-6);
        raise_estimates(&query, &[0.0; 3], &[0.0; 3], 0.5, &mut estimate);
        assert!(estimate[0] > 1.0, "a lower one raises nothing");
        raise_estimates(&query, &[f32::NAN; 3], &half, 0.5, &mut estimate);
        raise_estimates(&query, &middle, &half, 0.5, &mut estimate);
        assert!(estimate[0] > 1.0 || estimate[0].is_nan());
    }
}
