//! Muon. Jordan et al. 2024; step length and decay of Liu et al. 2025, arXiv:2502.16982; arithmetic of `torch.optim.Muon`.
//! u = Nesterov momentum of g;  w <- (1 - lr*wd) w - lr * scale(rows, cols) * NS(u)   (decay with the unscaled lr)
//! Four bytes of state per value.

use super::elements;
use super::momentum::{Momentum, Tensors};
use super::rule::{NotFinite, Rule, StepInfo};
use super::spectral::Spectral;

/// The rule for hidden matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Muon {
    pub momentum: Momentum,
    pub spectral: Spectral,
}

impl Rule for Muon {
    fn state_segments(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        vec![("momentum", elements(shape))]
    }

    fn step(&self, at: &StepInfo, shape: &[usize], parameter: &mut [f32], gradient: &[f32], state: &mut [f32]) -> Result<(), NotFinite> {
        let mut direction = self.momentum.direction(at.step, gradient, state);
        self.spectral.orthogonalize(shape, &mut direction)?;
        let rate = (at.learning_rate * self.spectral.factor(shape)) as f32;
        self.momentum.apply(at, at.keep(at.learning_rate), rate, &direction, Tensors { parameter, gradient, buffer: state });
        Ok(())
    }

    fn operations(&self, shape: &[usize]) -> f64 {
        self.spectral.operations(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::{at, norm, random};

    #[test]
    fn every_shape_moves_by_the_same_root_mean_square() {
        for shape in [[48, 48], [96, 32], [32, 96]] {
            for scale in [1.0, 1e-4] {
                let gradient: Vec<f32> = random(1, elements(&shape)).iter().map(|g| scale * g).collect();
                let (mut parameter, mut state) = (vec![0.0; gradient.len()], vec![0.0; gradient.len()]);
                Muon::default().step(&at(0, 1.0), &shape, &mut parameter, &gradient, &mut state).unwrap();
                let moved = norm(&parameter) / (gradient.len() as f64).sqrt();
                assert!((0.8..1.0).contains(&(moved / 0.2)), "{shape:?} {scale}: {moved}");
            }
        }
    }

    #[test]
    fn decay_uses_the_unscaled_rate() {
        let start = random(2, 64 * 32);
        let (mut parameter, mut state) = (start.clone(), vec![0.0; start.len()]);
        let at = StepInfo { weight_decay: 0.1, ..at(0, 1e-2) };
        Muon::default().step(&at, &[64, 32], &mut parameter, &vec![0.0; start.len()], &mut state).unwrap();
        let expected: Vec<f32> = start.iter().map(|w| (1.0f64 - 1e-3) as f32 * w).collect();
        assert_eq!(parameter, expected);
    }

    #[test]
    fn a_bad_gradient_changes_nothing() {
        let (mut parameter, mut state) = (random(3, 12), random(4, 12));
        let before = (parameter.clone(), state.clone());
        let mut gradient = vec![1.0; 12];
        gradient[3] = f32::NAN;
        let result = Muon::default().step(&at(0, 1.0), &[3, 4], &mut parameter, &gradient, &mut state);
        assert_eq!((result, parameter, state), (Err(NotFinite), before.0, before.1));
    }

    #[test]
    fn the_buffer_holds_momentum_and_not_its_orthogonalization() {
        let momentum = Momentum { nesterov: false, ..Momentum::default() };
        let rule = Muon { momentum, ..Muon::default() };
        let gradient = random(5, 12);
        let (mut parameter, mut state) = (vec![0.0; 12], vec![0.0; 12]);
        rule.step(&at(0, 1.0), &[3, 4], &mut parameter, &gradient, &mut state).unwrap();
        let expected: Vec<f32> = gradient.iter().map(|g| (1.0f64 - 0.95) as f32 * g).collect();
        assert_eq!(state, expected);
    }
}
