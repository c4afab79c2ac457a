//! NorMuon: Muon whose output rows share one size. Li et al. 2025, arXiv:2510.05491.
//! O = NS(Nesterov momentum of g);  v_i <- b2 v_i + (1-b2) mean_j O_ij^2;  N_ij = O_ij / (sqrt(v_i) + 1e-8)
//! w <- (1 - lr*wd) w - lr * scale(rows, cols) * N * |O|_F / |N|_F
//! v has one value per output row and matrix, starts at zero and needs no correction: the last factor cancels it.

use serde::{Deserialize, Serialize};

use super::elements;
use super::momentum::{Momentum, Tensors};
use super::reduce::sum_of_squares;
use super::rule::{NotFinite, Rule, StepInfo};
use super::spectral::{Spectral, matrix};

/// Keeps rows that never moved from being divided by zero.
const EPS: f64 = 1e-8;

/// `[optim.nor_muon]`; its momentum is `[optim.muon]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NorMuonConfig {
    /// Decay of the rows' second moments.
    pub beta2: f64,
}

impl Default for NorMuonConfig {
    fn default() -> Self {
        Self { beta2: 0.95 }
    }
}

/// The rule for hidden matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NorMuon {
    pub config: NorMuonConfig,
    pub momentum: Momentum,
    pub spectral: Spectral,
}

impl Rule for NorMuon {
    fn state_segments(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        let (_, cols) = matrix(shape);
        vec![("momentum", elements(shape)), ("row_second_moment", elements(shape) / cols)]
    }

    fn step(&self, at: &StepInfo, shape: &[usize], parameter: &mut [f32], gradient: &[f32], state: &mut [f32]) -> Result<(), NotFinite> {
        let (rows, cols) = matrix(shape);
        let (buffer, moments) = state.split_at_mut(parameter.len());
        let mut direction = self.momentum.direction(at.step, gradient, buffer);
        self.spectral.orthogonalize(shape, &mut direction)?;
        for (block, moments) in direction.chunks_exact_mut(rows * cols).zip(moments.chunks_exact_mut(rows)) {
            self.normalize_rows(cols, block, moments);
        }
        let rate = (at.learning_rate * self.spectral.factor(shape)) as f32;
        self.momentum.apply(at, at.keep(at.learning_rate), rate, &direction, Tensors { parameter, gradient, buffer });
        Ok(())
    }

    fn operations(&self, shape: &[usize]) -> f64 {
        self.spectral.operations(shape)
    }
}

impl NorMuon {
    fn normalize_rows(&self, cols: usize, block: &mut [f32], moments: &mut [f32]) {
        let before = sum_of_squares(block).sqrt();
        for (row, moment) in block.chunks_exact_mut(cols).zip(moments) {
            let mean = sum_of_squares(row) / cols as f64;
            *moment = (self.config.beta2 * f64::from(*moment) + (1.0 - self.config.beta2) * mean) as f32;
            scale(row, 1.0 / (f64::from(*moment).sqrt() + EPS));
        }
        scale(block, before / sum_of_squares(block).sqrt().max(EPS));
    }
}

fn scale(values: &mut [f32], factor: f64) {
    let factor = factor as f32;
    values.iter_mut().for_each(|x| *x *= factor);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::{norm, random, relative_error};

    #[test]
    fn the_norm_is_kept() {
        let (mut block, mut moments) = (random(1, 12 * 20), random(2, 12).iter().map(|x| x * x).collect::<Vec<_>>());
        let before = norm(&block);
        NorMuon::default().normalize_rows(20, &mut block, &mut moments);
        assert!((norm(&block) / before - 1.0).abs() < 1e-6);
    }

    #[test]
    fn rows_come_out_equal_at_first_and_equal_rows_are_left_alone() {
        let (mut block, mut moments) = (random(1, 12 * 20), vec![0.0; 12]);
        NorMuon::default().normalize_rows(20, &mut block, &mut moments);
        let sizes: Vec<f64> = block.chunks(20).map(norm).collect();
        assert!(sizes.iter().all(|size| (size / sizes[0] - 1.0).abs() < 1e-6));

        let equal = block.clone();
        NorMuon::default().normalize_rows(20, &mut block, &mut [0.0; 12]);
        assert!(relative_error(&block, &equal) < 1e-6);
    }

    #[test]
    fn a_row_of_zeros_stays() {
        let (mut block, mut moments) = (random(1, 40), vec![0.0; 2]);
        block[..20].fill(0.0);
        NorMuon::default().normalize_rows(20, &mut block, &mut moments);
        assert!(block[..20].iter().all(|&x| x == 0.0) && block.iter().all(|x| x.is_finite()));
        let mut zero = vec![0.0; 40];
        NorMuon::default().normalize_rows(20, &mut zero, &mut [0.0; 2]);
        assert_eq!(zero, [0.0; 40]);
    }

    #[test]
    fn one_value_per_row_of_every_block() {
        let segments = NorMuon::default().state_segments(&[3, 4, 10]);
        assert_eq!(segments, [("momentum", 120), ("row_second_moment", 12)]);
    }
}
