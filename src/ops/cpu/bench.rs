//! Times the matrix products, for `osprey bench kernels`. Figures are of the best repetition: what the machine does undisturbed.

use super::gemm::{Matrix, Panels, gemm};
use super::ternary::{PackedTernary, quantize_activations, ternary_matmul};
use crate::multiversion;
use rayon::prelude::*;
use serde::Serialize;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Sizes of one linear layer: x [m, k] times W [n, k] transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Tokens.
    pub m: usize,
    /// Inputs.
    pub k: usize,
    /// Outputs.
    pub n: usize,
}

/// One kernel timed at one shape.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// The kernel.
    pub name: &'static str,
    /// Where it was timed.
    pub shape: Shape,
    /// Best time of one call.
    pub seconds: f64,
    /// Two operations per multiply-add.
    pub gflops: f64,
    /// Operands read and results written, each counted once.
    pub gbytes_per_second: f64,
}

/// Repeats `call` for `budget`, at least three times after a warm-up, and returns the seconds of the fastest.
pub fn best_time(budget: Duration, mut call: impl FnMut()) -> f64 {
    call();
    let (start, mut best, mut calls) = (Instant::now(), f64::INFINITY, 0);
    while calls < 3 || start.elapsed() < budget {
        let begin = Instant::now();
        call();
        best = best.min(begin.elapsed().as_secs_f64());
        calls += 1;
    }
    best
}

/// The three dense products of a linear layer in training: y = x W^T, dx = dy W, dW += dy^T x; each timed for `budget`.
pub fn dense(shape: Shape, budget: Duration) -> Vec<Measurement> {
    let Shape { m, k, n } = shape;
    let (x, w, dy) = (pattern(m * k), pattern(n * k), pattern(m * n));
    let [x, w, dy] = [Matrix::row_major(&x, m, k), Matrix::row_major(&w, n, k), Matrix::row_major(&dy, m, n)];
    let time = |name, left: Matrix, right: Matrix, accumulate| {
        let mut out = vec![0.0; left.rows * right.columns];
        let bytes = size_of::<f32>() * (left.rows * left.columns + right.rows * right.columns + out.len());
        let seconds = best_time(budget, || gemm(left, &right as &dyn Panels, black_box(&mut out), right.columns, accumulate));
        measurement(name, shape, seconds, bytes)
    };
    vec![
        time("dense y = x W'", x, w.transposed(), false),
        time("dense dx = dy W", dy, w, false),
        time("dense dW += dy' x", dy.transposed(), x, true),
    ]
}

/// The parts of a ternary layer's forward: packing the weights, quantizing the activations, the product; each timed for `budget`.
/// Packing and quantizing count two operations per element.
pub fn ternary(shape: Shape, budget: Duration) -> Vec<Measurement> {
    let Shape { m, k, n } = shape;
    let (x, w) = (pattern(m * k), pattern(n * k));
    let (mut codes, mut gammas, mut out) = (vec![0; m * k], vec![0.0; m], vec![0.0; m * n]);
    let packed = PackedTernary::from_weights(&w, n, k);
    let packing = best_time(budget, || {
        black_box(PackedTernary::from_weights(black_box(&w), n, k));
    });
    let quantizing = best_time(budget, || quantize_activations(black_box(&x), k, &mut codes, &mut gammas));
    let product = best_time(budget, || ternary_matmul(&codes, &gammas, black_box(&packed), &mut out));
    let elementwise = |name, count: usize, seconds, bytes: usize| {
        let gflops = 2e-9 * count as f64 / seconds;
        Measurement { gflops, ..measurement(name, shape, seconds, bytes) }
    };
    vec![
        elementwise("ternary pack W", n * k, packing, 4 * n * k + packed.bytes()),
        elementwise("ternary quantize x", m * k, quantizing, 5 * m * k + 4 * m),
        measurement("ternary y = x T'", shape, product, m * k + packed.bytes() + 4 * m * n),
    ]
}

/// The middle one of `times`; zero where there are none.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Bytes per second at which all threads together read memory when they do nothing else: the best pass over `bytes` within `budget`.
pub fn read_bandwidth(bytes: usize, budget: Duration) -> f64 {
    let words: Vec<u32> = (0..bytes as u32 / 4).collect();
    let share = words.len().div_ceil(rayon::current_num_threads());
    let seconds = best_time(budget, || {
        black_box(words.par_chunks(share).map(sum_of_words).reduce(|| 0, u32::wrapping_add));
    });
    size_of_val(&words[..]) as f64 / seconds
}

multiversion! {
    /// In enough lanes that only the loads take time.
    fn sum_of_words(words: &[u32]) -> u32 {
        let mut lanes = [0u32; 128];
        for chunk in words.as_chunks::<128>().0 {
            for (lane, word) in lanes.iter_mut().zip(chunk) {
                *lane = lane.wrapping_add(*word);
            }
        }
        lanes.iter().fold(0, |sum, lane| sum.wrapping_add(*lane))
    }
}

fn measurement(name: &'static str, shape: Shape, seconds: f64, bytes: usize) -> Measurement {
    let operations = 2.0 * shape.m as f64 * shape.k as f64 * shape.n as f64;
    Measurement { name, shape, seconds, gflops: operations / seconds / 1e9, gbytes_per_second: bytes as f64 / seconds / 1e9 }
}

/// Ordinary values without denormals; which ones does not matter to the time.
fn pattern(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_take_time() {
        let bandwidth = read_bandwidth(1 << 16, Duration::from_millis(1));
        assert!(bandwidth > 1e6 && bandwidth.is_finite(), "{bandwidth}");
        let words: Vec<u32> = (1..=256).collect();
        assert_eq!(sum_of_words(&words), 256 * 257 / 2);
    }

    #[test]
    fn figures_follow_from_the_time() {
        let shape = Shape { m: 20, k: 40, n: 30 };
        let budget = Duration::from_millis(1);
        let measured = [dense(shape, budget), ternary(shape, budget)].concat();
        assert_eq!(measured.len(), 6);
        for m in measured {
            assert!(m.seconds > 0.0 && m.gbytes_per_second > 0.0, "{m:?}");
            let elements = match m.name {
                "ternary pack W" => 30 * 40,
                "ternary quantize x" => 20 * 40,
                _ => 20 * 40 * 30,
            };
            assert!((m.gflops * m.seconds * 1e9 / f64::from(2 * elements) - 1.0).abs() < 1e-9, "{m:?}");
        }
    }
}
