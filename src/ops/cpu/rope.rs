//! Rotary position embedding. Su et al. 2021, arXiv:2104.09864; the half-split pairing of GPT-NeoX and Hugging Face Llama.
//! (x_i, x_{i+h/2}) -> (x_i cos a - x_{i+h/2} sin a, x_{i+h/2} cos a + x_i sin a), a = position * theta^(-2i/h);  backward: angle -a
//! x: `[rows, heads * h]`   positions: `[rows]`   h head width (even)
//! Angles, sines and cosines in f64, rounded to f32 once; rotates f32.

use crate::multiversion;
use rayon::prelude::*;

/// Rows per task.
const ROW_BLOCK: usize = 64;

/// Sines and cosines for positions 0, 1, ...
#[derive(Clone, Debug)]
pub struct RotaryTable {
    head_dim: usize,
    /// [positions, head_dim / 2]
    cosines: Vec<f32>,
    /// [positions, head_dim / 2]
    sines: Vec<f32>,
}

impl RotaryTable {
    /// Table for `num_positions` positions with base `theta` (10000 in the paper). `head_dim` must be even and not 0.
    pub fn new(head_dim: usize, theta: f64, num_positions: usize) -> Self {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "head width {head_dim} is not a positive even number");
        let frequencies: Vec<f64> = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        Self::from_frequencies(&frequencies, num_positions)
    }

    /// Table from one angular frequency (radians per position) per pair, for models that scale them.
    pub fn from_frequencies(frequencies: &[f64], num_positions: usize) -> Self {
        let angles = || (0..num_positions).flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency));
        let cosines = angles().map(|angle| angle.cos() as f32).collect();
        let sines = angles().map(|angle| angle.sin() as f32).collect();
        Self { head_dim: 2 * frequencies.len(), cosines, sines }
    }

    /// Width of the heads it turns.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Cosines of the angles at `position`, [head_dim / 2].
    pub fn cosines(&self, position: usize) -> &[f32] {
        &self.cosines[position * self.head_dim / 2..][..self.head_dim / 2]
    }

    /// Sines of the angles at `position`, [head_dim / 2].
    pub fn sines(&self, position: usize) -> &[f32] {
        &self.sines[position * self.head_dim / 2..][..self.head_dim / 2]
    }

    /// Number of positions the table covers.
    pub fn num_positions(&self) -> usize {
        self.cosines.len() / (self.head_dim / 2)
    }

    /// Rotates every head of every row of `x` ([rows, heads * head_dim]) in place by its row's position.
    /// Every position must be below [`Self::num_positions`].
    pub fn rotate(&self, x: &mut [f32], positions: &[u32]) {
        self.turn(x, positions, 1.0);
    }

    /// Backward of [`Self::rotate`]: turns the gradient in place by the opposite angle.
    pub fn rotate_back(&self, dx: &mut [f32], positions: &[u32]) {
        self.turn(dx, positions, -1.0);
    }

    fn turn(&self, x: &mut [f32], positions: &[u32], direction: f32) {
        if positions.is_empty() {
            return assert!(x.is_empty(), "rows without positions");
        }
        let width = x.len() / positions.len();
        assert!(x.len() == width * positions.len() && width.is_multiple_of(self.head_dim), "rows do not consist of heads");
        if width == 0 {
            return;
        }
        if positions.len() <= ROW_BLOCK {
            return turn_rows(self, x, width, positions, direction);
        }
        let blocks = x.par_chunks_mut(ROW_BLOCK * width).zip(positions.par_chunks(ROW_BLOCK));
        blocks.for_each(|(x, positions)| turn_rows(self, x, width, positions, direction));
    }
}

multiversion! {
    fn turn_rows(table: &RotaryTable, x: &mut [f32], width: usize, positions: &[u32], direction: f32) {
        let half = table.head_dim / 2;
        for (row, position) in x.chunks_exact_mut(width).zip(positions) {
            let start = *position as usize * half;
            let (cosines, sines) = (&table.cosines[start..start + half], &table.sines[start..start + half]);
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                    let sine = direction * sine;
                    (*a, *b) = (a.mul_add(*cosine, -(*b * sine)), b.mul_add(*cosine, *a * sine));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_same_bits_everywhere, finite_differences, relative_error, uniform, weigh, widen};

    fn reference(x: &[f64], heads: usize, head_dim: usize, positions: &[u32]) -> Vec<f64> {
        let half = head_dim / 2;
        let mut y = x.to_vec();
        for (row, position) in positions.iter().enumerate() {
            for (head, i) in (0..heads).flat_map(|head| (0..half).map(move |i| (head, i))) {
                let angle = f64::from(*position) * 10_000f64.powf(-2.0 * i as f64 / head_dim as f64);
                let at = (row * heads + head) * head_dim + i;
                y[at] = x[at] * angle.cos() - x[at + half] * angle.sin();
                y[at + half] = x[at + half] * angle.cos() + x[at] * angle.sin();
            }
        }
        y
    }

    #[test]
    fn forward_and_backward_match_the_reference() {
        for (heads, head_dim) in [(1, 2), (2, 8), (3, 14), (2, 64)] {
            let positions = [0, 1, 7, 100, 99];
            let table = RotaryTable::new(head_dim, 10_000.0, 101);
            assert_eq!(table.num_positions(), 101);
            let x = uniform(1, positions.len() * heads * head_dim);
            let dy = uniform(2, x.len());
            let mut y = x.clone();
            table.rotate(&mut y, &positions);
            assert!(relative_error(&y, &reference(&widen(&x), heads, head_dim, &positions)) < 1e-6);
            let mut dx = dy.clone();
            table.rotate_back(&mut dx, &positions);
            let slope = finite_differences(&widen(&x), |x| weigh(&reference(x, heads, head_dim, &positions), &widen(&dy)));
            assert!(relative_error(&dx, &slope) < 1e-5);
            table.rotate_back(&mut y, &positions);
            assert!(relative_error(&y, &widen(&x)) < 1e-6, "there and back");
        }
    }

    #[test]
    fn same_bits_everywhere() {
        let table = RotaryTable::new(36, 10_000.0, 150);
        let positions: Vec<u32> = (0..150).rev().collect();
        assert_same_bits_everywhere(|| {
            let mut x = uniform(3, 150 * 36 * 3);
            table.rotate(&mut x, &positions);
            x
        });
    }
}
