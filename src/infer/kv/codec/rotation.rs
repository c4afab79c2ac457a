//! Orthogonal maps of a head's channels that spread every vector over all of them, in O(d log d).
//! R = (M (x) H_B / sqrt B) S, width = m B, m odd: S random signs (or none), H_B the Walsh-Hadamard matrix of B = 2^k, M an m x m matrix
//! drawn from the Haar measure (the QR factors of a Gaussian matrix; 1 when m is). B = 1 is a Haar rotation of all channels.
//! Randomized Hadamard transforms: Ailon & Chazelle 2006, doi:10.1145/1132516.1132597.

use crate::multiversion;
use crate::ops::cpu::scratch::Scratch;
use crate::ops::rng::Stream;

/// A fixed rotation.
#[derive(Clone, Debug)]
pub struct Rotation {
    block: usize,
    /// `[width]`: signs over sqrt(block)
    scales: Vec<f32>,
    /// `[m, m]`; empty when m is 1
    mix: Vec<f32>,
}

impl Rotation {
    /// Random signs, then Hadamard blocks as wide as `width` allows; a function of `width` and `seed`.
    pub fn random(width: usize, seed: u64) -> Self {
        let mut signs = Stream::new(seed, "rotation signs");
        Self::new(width, hadamard_width(width), seed, || if signs.bits() & 1 == 0 { 1.0 } else { -1.0 })
    }

    /// The same without signs: for a width that is a power of two, the Walsh-Hadamard transform itself.
    pub fn hadamard(width: usize) -> Self {
        Self::new(width, hadamard_width(width), 0, || 1.0)
    }

    /// Drawn from the Haar measure of all rotations, at O(d^2) per vector.
    pub fn haar(width: usize, seed: u64) -> Self {
        Self::new(width, 1, seed, || 1.0)
    }

    fn new(width: usize, block: usize, seed: u64, mut sign: impl FnMut() -> f32) -> Self {
        let scale = (1.0 / (block as f64).sqrt()) as f32;
        let scales = (0..width).map(|_| scale * sign()).collect();
        let mix = if width == block { vec![] } else { haar_matrix(width / block, seed) };
        Self { block, scales, mix }
    }

    /// Number of channels.
    pub fn width(&self) -> usize {
        self.scales.len()
    }

    /// Rotates the columns of `x`, `[width, lanes]`.
    pub fn forward(&self, x: &mut [f32], lanes: usize) {
        scale_rows(x, lanes, &self.scales);
        hadamard_blocks(x, lanes, self.block);
        self.mix(x, lanes, |size, to, from| to * size + from);
    }

    /// Undoes [`Rotation::forward`].
    pub fn backward(&self, x: &mut [f32], lanes: usize) {
        self.mix(x, lanes, |size, to, from| from * size + to);
        hadamard_blocks(x, lanes, self.block);
        scale_rows(x, lanes, &self.scales);
    }

    /// x = M x across blocks, the place of an element of M given by `index(m, row, column)`.
    fn mix(&self, x: &mut [f32], lanes: usize, index: impl Fn(usize, usize, usize) -> usize) {
        if self.mix.is_empty() {
            return;
        }
        let (size, length) = (self.width() / self.block, self.block * lanes);
        let mut source = Scratch::take(x.len());
        source.copy_from_slice(x);
        x.fill(0.0);
        for (to, out) in x.chunks_exact_mut(length).enumerate() {
            for (from, x) in source.chunks_exact(length).enumerate() {
                add_scaled(out, self.mix[index(size, to, from)], x);
            }
        }
    }
}

/// The largest power of two that divides `width`.
fn hadamard_width(width: usize) -> usize {
    1 << width.trailing_zeros()
}

multiversion! {
    fn scale_rows(x: &mut [f32], lanes: usize, scales: &[f32]) {
        for (row, scale) in x.chunks_exact_mut(lanes).zip(scales) {
            row.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

multiversion! {
    fn add_scaled(y: &mut [f32], alpha: f32, x: &[f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = alpha.mul_add(*x, *y));
    }
}

multiversion! {
    /// Unnormalized Walsh-Hadamard transforms of each `block` rows of `x`, `[rows, lanes]`.
    fn hadamard_blocks(x: &mut [f32], lanes: usize, block: usize) {
        let mut half = 1;
        while half < block {
            for pair in x.chunks_exact_mut(2 * half * lanes) {
                let (first, second) = pair.split_at_mut(half * lanes);
                for (first, second) in first.iter_mut().zip(second) {
                    (*first, *second) = (*first + *second, *first - *second);
                }
            }
            half *= 2;
        }
    }
}

/// An orthogonal matrix from the Haar measure: the Q of a Gaussian matrix whose R has a positive diagonal (Mezzadri 2007,
/// arXiv:math-ph/0609050), by Gram and Schmidt, each row twice so that it stays orthogonal.
fn haar_matrix(size: usize, seed: u64) -> Vec<f32> {
    let mut stream = Stream::new(seed, "rotation mix");
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(size);
    while rows.len() < size {
        let mut row: Vec<f64> = (0..size).map(|_| stream.normal()).collect();
        for _ in 0..2 {
            for done in &rows {
                let share: f64 = done.iter().zip(&row).map(|(x, y)| x * y).sum();
                row.iter_mut().zip(done).for_each(|(x, done)| *x -= share * done);
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm > 1e-9 {
            rows.push(row.into_iter().map(|x| x / norm).collect());
        }
    }
    rows.into_iter().flatten().map(|x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(width: usize) -> Vec<f32> {
        (0..width * width).map(|i| f32::from(u8::from(i / width == i % width))).collect()
    }

    #[test]
    fn rotations_are_orthogonal() {
        for width in [2, 3, 6, 8, 20, 45, 64, 96, 128] {
            for rotation in [Rotation::random(width, 7), Rotation::hadamard(width), Rotation::haar(width, 7)] {
                let mut matrix = identity(width);
                rotation.forward(&mut matrix, width);
                for (i, row) in matrix.chunks(width).enumerate() {
                    for (j, other) in matrix.chunks(width).enumerate() {
                        let product: f64 = row.iter().zip(other).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                        assert!((product - f64::from(u8::from(i == j))).abs() < 1e-5, "width {width}, rows {i} and {j}: {product}");
                    }
                }
                rotation.backward(&mut matrix, width);
                let off = matrix.iter().zip(identity(width)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(off < 1e-5, "width {width}: back is off by {off}");
            }
        }
    }

    #[test]
    fn transforming_twice_multiplies_by_the_width() {
        let mut x: Vec<f32> = (0..64).map(|i| ((i * 37) % 19) as f32).collect();
        let before = x.clone();
        hadamard_blocks(&mut x, 1, 64);
        assert_eq!(x[0], before.iter().sum::<f32>());
        hadamard_blocks(&mut x, 1, 64);
        assert!(x.iter().zip(&before).all(|(x, before)| *x == 64.0 * before));
    }

    #[test]
    fn rotations_repeat_and_differ_by_seed() {
        let rotated = |rotation: &Rotation| {
            let mut x: Vec<f32> = (0..24).map(|i| i as f32).collect();
            rotation.forward(&mut x, 1);
            x
        };
        assert_eq!(rotated(&Rotation::random(24, 1)), rotated(&Rotation::random(24, 1)));
        assert_ne!(rotated(&Rotation::random(24, 1)), rotated(&Rotation::random(24, 2)));
    }
}
