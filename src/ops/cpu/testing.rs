//! What kernel tests share: repeatable inputs, f64 finite differences, and runs on every instruction set and thread count.

use super::isa::testing::on_every_isa;

/// `len` numbers in [-1, 1), a pure function of `seed` (SplitMix64, Steele, Lea and Flood 2014).
pub(crate) fn uniform(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0xd134_2543_de82_ef95);
    let next = |_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}

pub(crate) fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Largest difference over the largest reference magnitude.
pub(crate) fn relative_error(values: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(values.len(), reference.len());
    assert!(values.iter().all(|x| x.is_finite()), "not finite");
    let difference = values.iter().zip(reference).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    difference / reference.iter().map(|b| b.abs()).fold(1e-30, f64::max)
}

/// Gradient of `f` at `x` by central differences.
pub(crate) fn finite_differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let (mut x, count) = (x.to_vec(), x.len());
    let slope = |i: usize| {
        let center = x[i];
        x[i] = center + step;
        let above = f(&x);
        x[i] = center - step;
        let below = f(&x);
        x[i] = center;
        (above - below) / (2.0 * step)
    };
    (0..count).map(slope).collect()
}

/// Sum of a_i b_i: turns an output into a loss whose gradient with respect to the output is `b`.
pub(crate) fn weigh(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Asserts that `run` gives the same bits on every instruction set and with 1, 2 and 3 threads.
pub(crate) fn assert_same_bits_everywhere(run: impl Fn() -> Vec<f32> + Sync) {
    let bits = || run().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let expected = bits();
    for (isa, seen) in on_every_isa(bits) {
        assert!(seen == expected, "{isa} differs");
    }
    for threads in 1..=3 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
        assert!(pool.install(bits) == expected, "{threads} threads differ");
    }
}
