//! Sums whose value depends on the data alone, never on the number of threads.
//! Chunks of fixed length are summed in f64 on fixed lanes, and the chunks' sums are added in order.

use rayon::prelude::*;

use super::CHUNK;

const LANES: usize = 8;

/// Sum of squares in f64. It is finite exactly when every value is: squares of f32 values cannot overflow f64.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    let partial: Vec<f64> = values.par_chunks(CHUNK).map(chunk_sum).collect();
    partial.iter().sum()
}

/// Sum of squared differences of two slices of one length, in f64.
pub(super) fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    let chunks = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    let partial: Vec<f64> = chunks.map(|(a, b)| difference_sum(a, b)).collect();
    partial.iter().sum()
}

fn chunk_sum(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for chunk in values.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    lanes.iter().sum()
}

fn difference_sum(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (lane, (&a, &b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            let difference = f64::from(a) - f64::from(b);
            *lane += difference * difference;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::random;

    #[test]
    fn equals_the_plain_sum_at_ragged_lengths() {
        for length in [0, 1, 7, 8, 9, CHUNK - 1, CHUNK + 3, 3 * CHUNK] {
            let values = random(length as u64, length);
            let plain: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
            assert!((sum_of_squares(&values) - plain).abs() <= 1e-12 * plain, "{length}");
            let doubled: Vec<f32> = values.iter().map(|x| 2.0 * x).collect();
            assert_eq!(squared_distance(&doubled, &values), sum_of_squares(&values), "{length}");
        }
    }

    #[test]
    fn the_largest_values_do_not_overflow_and_one_bad_value_shows() {
        let mut values = vec![f32::MAX; 2 * CHUNK];
        assert!(sum_of_squares(&values).is_finite());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[CHUNK + 5] = bad;
            assert!(!sum_of_squares(&values).is_finite());
        }
    }
}
