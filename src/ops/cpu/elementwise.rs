//! Passes over flat slices: memory-bound, split into fixed blocks over the threads.

use crate::multiversion;
use rayon::prelude::*;

/// Elements per task: long enough to hide the cost of handing out work, short enough to stay in the second-level cache.
pub const BLOCK: usize = 1 << 15;

multiversion! {
    fn add_block(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

multiversion! {
    fn add_scaled_block(y: &mut [f32], alpha: f32, x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = alpha.mul_add(*x, *y);
        }
    }
}

multiversion! {
    fn scale_block(y: &mut [f32], alpha: f32) {
        for y in y {
            *y *= alpha;
        }
    }
}

/// y += x.
pub fn add_assign(y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len());
    if y.len() <= BLOCK {
        return add_block(y, x);
    }
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| add_block(y, x));
}

/// y += alpha * x, one rounding per element.
pub fn add_scaled(y: &mut [f32], alpha: f32, x: &[f32]) {
    assert_eq!(y.len(), x.len());
    if y.len() <= BLOCK {
        return add_scaled_block(y, alpha, x);
    }
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| add_scaled_block(y, alpha, x));
}

/// y *= alpha.
pub fn scale(y: &mut [f32], alpha: f32) {
    if y.len() <= BLOCK {
        return scale_block(y, alpha);
    }
    y.par_chunks_mut(BLOCK).for_each(|y| scale_block(y, alpha));
}

/// y = value everywhere.
pub fn fill(y: &mut [f32], value: f32) {
    if y.len() <= BLOCK {
        return y.fill(value);
    }
    y.par_chunks_mut(BLOCK).for_each(|y| y.fill(value));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_same_bits_everywhere, uniform};

    #[test]
    fn one_block_and_many() {
        for len in [0, 5, BLOCK, 2 * BLOCK + 3] {
            let (x, start) = (uniform(1, len), uniform(2, len));
            let mut y = start.clone();
            add_assign(&mut y, &x);
            add_scaled(&mut y, 0.3, &x);
            scale(&mut y, -2.0);
            let expected = start.iter().zip(&x).map(|(y, x)| 0.3f32.mul_add(*x, y + x) * -2.0);
            assert!(y.iter().copied().eq(expected));
            fill(&mut y, 1.5);
            assert!(y.iter().all(|y| *y == 1.5));
        }
    }

    #[test]
    fn same_bits_everywhere() {
        let x = uniform(3, 2 * BLOCK + 77);
        assert_same_bits_everywhere(|| {
            let mut y = uniform(4, x.len());
            add_scaled(&mut y, 1.1, &x);
            y
        });
    }
}
