//! NF4 with double quantization, the frozen base of QLoRA. Dettmers et al. 2023, arXiv:2305.14314; layout and code tables of bitsandbytes.
//! w = code\[c\] * absmax of its block of 64 along the flattened matrix;  absmax = mean + dynamic8\[b\] * largest of 256 of them
//! 4 + 8/64 + 32/(64 * 256) = 4.127 bits per weight. A training format: never written to files.

use crate::ops::frozen::StoredMatrix;
use rayon::prelude::*;
use std::sync::LazyLock;

/// Quantiles of a standard normal, scaled to [-1, 1], with an exact zero.
const CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Weights per scale.
const BLOCK: usize = 64;
/// Scales per scale of scales.
const NESTED: usize = 256;

/// 8-bit floats with a dynamic exponent (Dettmers 2015, arXiv:1511.04561): zero, one, and per decade from 1e-6 to 1 twice as many values.
static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut values = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let count = 1usize << decade;
        let scale = 10f64.powi(decade - 6);
        for i in 0..count {
            let step = 0.9 / count as f64;
            let middle = 0.1 + step * (i as f64 + 0.5);
            values.extend([(scale * middle) as f32, (-scale * middle) as f32]);
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("2 + 2 * 127 values")
});

/// One matrix `[rows, columns]`.
pub struct Nf4Matrix {
    rows: usize,
    columns: usize,
    /// Two codes per byte, the first in the high half.
    codes: Vec<u8>,
    /// Per block of [`BLOCK`] weights.
    scales: Vec<u8>,
    /// Per [`NESTED`] blocks.
    nested: Vec<f32>,
    mean: f32,
}

impl Nf4Matrix {
    /// Rounds row-major weights.
    ///
    /// # Panics
    /// When `weights` does not hold `rows * columns` values.
    pub fn new(weights: &[f32], rows: usize, columns: usize) -> Self {
        assert_eq!(Some(weights.len()), rows.checked_mul(columns), "weights of a {rows} x {columns} matrix");
        let absmax: Vec<f32> = weights.par_chunks(BLOCK).map(super::absmax).collect();
        let mut codes = vec![0u8; weights.len().div_ceil(2)];
        codes.par_chunks_mut(BLOCK / 2).zip(weights.par_chunks(BLOCK)).zip(&absmax).for_each(|((codes, weights), &scale)| {
            let inverse = super::inverse(scale);
            for (i, &weight) in weights.iter().enumerate() {
                codes[i / 2] |= nearest(&CODES, weight * inverse) << (4 * (1 - i % 2));
            }
        });
        let mean = (absmax.iter().map(|&scale| f64::from(scale)).sum::<f64>() / absmax.len().max(1) as f64) as f32;
        let centred: Vec<f32> = absmax.iter().map(|scale| scale - mean).collect();
        let nested: Vec<f32> = centred.chunks(NESTED).map(super::absmax).collect();
        let scales = centred.iter().enumerate().map(|(i, value)| nearest(&*DYNAMIC, value * super::inverse(nested[i / NESTED]))).collect();
        Self { rows, columns, codes, scales, nested, mean }
    }

    fn scale(&self, block: usize) -> f32 {
        DYNAMIC[usize::from(self.scales[block])] * self.nested[block / NESTED] + self.mean
    }
}

/// Index of the value of `table`, which ascends, nearest to `x`; the lower one of two equally near.
fn nearest(table: &[f32], x: f32) -> u8 {
    let above = table.partition_point(|&value| value < x).min(table.len() - 1);
    let below = above.saturating_sub(1);
    let chosen = if x - table[below] <= table[above] - x { below } else { above };
    chosen as u8
}

impl StoredMatrix for Nf4Matrix {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn bytes(&self) -> usize {
        self.codes.len() + self.scales.len() + 4 * self.nested.len()
    }

    fn expand(&self, first: usize, values: &mut [f32]) {
        let start = first * self.columns;
        let mut at = 0;
        while at < values.len() {
            let position = start + at;
            let scale = self.scale(position / BLOCK);
            let end = (at + BLOCK - position % BLOCK).min(values.len());
            for (value, position) in values[at..end].iter_mut().zip(position..) {
                let code = self.codes[position / 2] >> (4 * (1 - position % 2)) & 15;
                *value = CODES[usize::from(code)] * scale;
            }
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;

    fn normal(count: usize) -> Vec<f32> {
        let mut stream = Stream::new(4, "nf4");
        (0..count).map(|_| 0.02 * stream.normal() as f32).collect()
    }

    /// `create_dynamic_map(signed=True)` of bitsandbytes: its length, ends and a few of its values.
    #[test]
    fn the_table_of_scales_is_that_of_bitsandbytes() {
        let map = *DYNAMIC;
        assert_eq!((map[0], map[255]), (-0.992_968_75, 1.0));
        assert!(map.windows(2).all(|pair| pair[0] < pair[1]) && map.contains(&0.0));
        assert!(map.iter().any(|&value| (value - 5.5e-7).abs() < 1e-12) && map.contains(&0.992_968_75));
    }

    #[test]
    fn rows_are_expanded_wherever_blocks_end() {
        let (rows, columns) = (37, 45);
        let weights = normal(rows * columns);
        let matrix = Nf4Matrix::new(&weights, rows, columns);
        let mut whole = vec![0.0; rows * columns];
        matrix.expand(0, &mut whole);
        for first in 0..rows {
            let mut row = vec![0.0; columns];
            matrix.expand(first, &mut row);
            assert_eq!(row, whole[first * columns..][..columns]);
        }
        let difference: f32 = whole.iter().zip(&weights).map(|(a, b)| (a - b).powi(2)).sum();
        let size: f32 = weights.iter().map(|b| b * b).sum();
        let error = (difference / size).sqrt();
        assert!((0.05..0.12).contains(&error), "{error}");
    }

    #[test]
    fn a_weight_costs_4_127_bits() {
        let matrix = Nf4Matrix::new(&normal(512 * 512), 512, 512);
        let bits = matrix.bytes() as f64 * 8.0 / (512.0 * 512.0);
        assert!((bits - 4.127).abs() < 1e-3, "{bits}");
    }

    #[test]
    fn values_of_the_grid_are_kept_and_zeros_stay_zeros() {
        let weights: Vec<f32> = CODES.iter().cycle().take(128).copied().collect();
        let mut back = vec![1.0; 128];
        Nf4Matrix::new(&weights, 2, 64).expand(0, &mut back);
        assert_eq!(back, weights);
        Nf4Matrix::new(&[0.0; 128], 2, 64).expand(0, &mut back);
        assert_eq!(back, [0.0; 128]);
    }
}
