//! Distance-Aware Muon: the length of a spectral step follows how far the matrix has travelled, instead of a tuned rate.
//! Demidovich et al. 2026, arXiv:2605.18999.
//!
//! What is theirs and what is ours: the paper's abstract says that a trust-region radius is driven by the distance from the start;
//! its algorithm was not available to us. Everything below that is more specific is a reconstruction in the manner of DoG (Ivgi et
//! al. 2023, arXiv:2302.12022): the distance measured in the Frobenius norm over the root of the rank, the running maximum, the start
//! value, and 1/sqrt(t), which is DoG's 1/sqrt(sum |g|^2) for steps that all have unit norm. Results are not the paper's.
//!
//! d = |W - W_0|_F / sqrt(n), n = min(rows, cols);  r <- max(r, d), r_0 = initial (1 + |W_0|_F / sqrt(n))
//! step = schedule * min(coefficient * r / sqrt(t + 1), max_step);  W <- (1 - step/scale * wd) W - step * NS(u)
//! r and step are in units of the spectral norm, so step/scale(rows, cols) is what Muon would call its learning rate: decay keeps
//! Muon's meaning. `optim.learning_rate` plays no part; the schedule's shape does. Eight bytes of state per value.

use serde::{Deserialize, Serialize};

use super::elements;
use super::momentum::{Momentum, Tensors};
use super::reduce::{squared_distance, sum_of_squares};
use super::rule::{NotFinite, Rule, StepInfo};
use super::spectral::{Spectral, matrix};

/// `[optim.distance_aware_muon]`; its momentum is `[optim.muon]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistanceAwareMuonConfig {
    /// First radius, as a fraction of one plus the size of the initial matrix.
    pub initial: f64,
    /// Factor on the radius.
    pub coefficient: f64,
    /// Longest step, in the spectral norm.
    pub max_step: f64,
}

impl Default for DistanceAwareMuonConfig {
    fn default() -> Self {
        Self { initial: 1e-3, coefficient: 1.0, max_step: 0.05 }
    }
}

/// The rule for hidden matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DistanceAwareMuon {
    pub config: DistanceAwareMuonConfig,
    pub momentum: Momentum,
    pub spectral: Spectral,
}

impl Rule for DistanceAwareMuon {
    fn state_segments(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        let (rows, cols) = matrix(shape);
        let (all, blocks) = (elements(shape), elements(shape) / (rows * cols));
        // The count is exact up to 2^24 steps and then stays, which a square root in a denominator does not notice.
        vec![("momentum", all), ("start", all), ("radius", blocks), ("steps", 1)]
    }

    fn step(&self, at: &StepInfo, shape: &[usize], parameter: &mut [f32], gradient: &[f32], state: &mut [f32]) -> Result<(), NotFinite> {
        let (rows, cols) = matrix(shape);
        let (buffer, rest) = state.split_at_mut(parameter.len());
        let (start, rest) = rest.split_at_mut(parameter.len());
        let [radii @ .., steps] = rest else { unreachable!("the state ends with the number of steps") };

        let mut direction = self.momentum.direction(at.step, gradient, buffer);
        self.spectral.orthogonalize(shape, &mut direction)?;
        if *steps == 0.0 {
            start.copy_from_slice(parameter);
        }
        for (index, radius) in radii.iter_mut().enumerate() {
            let block = index * rows * cols..(index + 1) * rows * cols;
            let tensors = Tensors {
                parameter: &mut parameter[block.clone()],
                gradient: &gradient[block.clone()],
                buffer: &mut buffer[block.clone()],
            };
            let root_rank = (rows.min(cols) as f64).sqrt();
            *radius = self.grown(*radius, *steps, root_rank, tensors.parameter, &start[block.clone()]);
            let step = at.schedule * self.length(*radius, *steps);
            let keep = at.keep(step / self.spectral.factor(shape));
            self.momentum.apply(at, keep, step as f32, &direction[block], tensors);
        }
        *steps += 1.0;
        Ok(())
    }

    fn operations(&self, shape: &[usize]) -> f64 {
        self.spectral.operations(shape)
    }
}

impl DistanceAwareMuon {
    /// The radius with the way to `parameter` taken into account.
    fn grown(&self, radius: f32, steps: f32, root_rank: f64, parameter: &[f32], start: &[f32]) -> f32 {
        if steps == 0.0 {
            return (self.config.initial * (1.0 + sum_of_squares(start).sqrt() / root_rank)) as f32;
        }
        radius.max((squared_distance(parameter, start).sqrt() / root_rank) as f32)
    }

    /// Length of a step before the schedule.
    fn length(&self, radius: f32, steps: f32) -> f64 {
        let length = self.config.coefficient * f64::from(radius) / (f64::from(steps) + 1.0).sqrt();
        length.min(self.config.max_step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::coefficients::Coefficients;
    use crate::optim::muon::Muon;
    use crate::optim::testing::{at, norm, random, relative_error};

    const SHAPE: [usize; 2] = [16, 16];
    const COUNT: usize = 256;

    fn radius(state: &[f32]) -> f32 {
        state[2 * COUNT]
    }

    #[test]
    fn the_radius_starts_small_never_shrinks_and_bounds_the_step() {
        let rule = DistanceAwareMuon::default();
        let (mut parameter, mut state) = (random(1, COUNT), vec![0.0; 2 * COUNT + 2]);
        let first = (1e-3 * (1.0 + norm(&parameter) / 4.0)) as f32;
        let mut last = 0.0;
        for step in 0..60 {
            // The second half leads back to the start.
            let sign = if step < 30 { 1.0 } else { -1.0 };
            let gradient: Vec<f32> = random(2, COUNT).iter().map(|g| sign * g).collect();
            let before = parameter.clone();
            rule.step(&at(step, 1.0), &SHAPE, &mut parameter, &gradient, &mut state).unwrap();
            assert!(step != 0 || radius(&state) == first);
            assert!(radius(&state) >= last);
            last = radius(&state);
            let moved: Vec<f32> = parameter.iter().zip(&before).map(|(a, b)| a - b).collect();
            assert!(norm(&moved) / 4.0 <= 1.21 * rule.config.max_step);
        }
        assert!(last > 5.0 * first && state[2 * COUNT + 1] == 60.0);
    }

    #[test]
    fn a_frozen_radius_is_muon_with_a_root_schedule() {
        let mut rule = DistanceAwareMuon::default();
        (rule.config.initial, rule.config.max_step) = (1e3, f64::MAX);
        rule.config.coefficient = 1e-5;
        let start = random(1, COUNT);
        let length = 1e-2 * (1.0 + norm(&start) / 4.0);
        let (mut aware, mut aware_state) = (start.clone(), vec![0.0; 2 * COUNT + 2]);
        let (mut plain, mut plain_state) = (start, vec![0.0; COUNT]);
        let muon = Muon::default();
        for step in 0..10 {
            let rate = length / (step as f64 + 1.0).sqrt() / muon.spectral.factor(&SHAPE);
            let at = StepInfo { weight_decay: 0.1, ..at(step, rate) };
            let gradient = random(50 + step, COUNT);
            rule.step(&at, &SHAPE, &mut aware, &gradient, &mut aware_state).unwrap();
            muon.step(&at, &SHAPE, &mut plain, &gradient, &mut plain_state).unwrap();
        }
        assert!(relative_error(&aware, &plain) < 1e-6);
    }

    #[test]
    fn every_head_has_its_own_radius() {
        let rule = DistanceAwareMuon::default();
        let (mut parameter, mut state) = (random(1, COUNT), vec![0.0; 2 * COUNT + 5]);
        for step in 0..3 {
            rule.step(&at(step, 1.0), &[4, 4, 16], &mut parameter, &random(9 + step, COUNT), &mut state).unwrap();
        }
        let radii = &state[2 * COUNT..2 * COUNT + 4];
        assert!(radii.iter().all(|r| *r > 0.0) && radii[0] != radii[1]);
    }

    /// Loss and final radius over the true distance, on sum_ij h_i (W - W*)_ij^2 / 2 with noisy gradients.
    fn quadratic(initial: f64) -> (f64, f64) {
        let momentum = Momentum { momentum: 0.9, ..Momentum::default() };
        let spectral = Spectral { coefficients: Coefficients::Exact, ..Spectral::default() };
        let mut rule = DistanceAwareMuon { momentum, spectral, ..DistanceAwareMuon::default() };
        (rule.config.initial, rule.config.max_step) = (initial, f64::MAX);
        let target: Vec<f32> = random(3, COUNT).iter().map(|x| 0.3 * x).collect();
        let curvature = |i: usize| 10f32.powf(-2.0 * (i / 16) as f32 / 15.0);
        let (mut parameter, mut state) = (vec![0.0; COUNT], vec![0.0; 2 * COUNT + 2]);
        for step in 0..1000u64 {
            let noise = random(1000 + step, COUNT);
            let gradient: Vec<f32> = (0..COUNT).map(|i| curvature(i) * (parameter[i] - target[i]) + 0.1 * noise[i]).collect();
            let at = StepInfo { schedule: 1.0 - step as f64 / 1000.0, ..at(step, 1.0) };
            rule.step(&at, &SHAPE, &mut parameter, &gradient, &mut state).unwrap();
        }
        let loss = (0..COUNT).map(|i| f64::from(curvature(i) * (parameter[i] - target[i]).powi(2) / 2.0)).sum();
        (loss, f64::from(radius(&state)) / (norm(&target) / 4.0))
    }

    #[test]
    fn the_first_radius_matters_little() {
        let runs = [1e-6, 1e-4, 1e-2].map(quadratic);
        for (loss, distance) in runs {
            assert!((0.5..2.0).contains(&(loss / runs[1].0)) && (0.9..2.0).contains(&distance), "{runs:?}");
        }
    }
}
