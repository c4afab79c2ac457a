//! Lion. Chen et al. 2023, arXiv:2302.06675.
//! w <- (1 - lr*wd) w - lr * sign(b1 m + (1-b1) g);  m <- b2 m + (1-b2) g   (m after its use, m_0 = 0)
//! Every weight moves by exactly lr, so the rate is 3 to 10 times below AdamW's. Four bytes of state per value.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::rule::{NotFinite, Rule, StepInfo};
use super::{CHUNK, elements};

/// `[optim.lion]`. The paper's defaults; its language experiments also use 0.95 and 0.98.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lion {
    /// Weight of the momentum in the direction.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99 }
    }
}

impl Rule for Lion {
    fn state_segments(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        vec![("momentum", elements(shape))]
    }

    fn step(&self, at: &StepInfo, _: &[usize], parameter: &mut [f32], gradient: &[f32], state: &mut [f32]) -> Result<(), NotFinite> {
        self.sign_step(at, at.learning_rate, parameter, gradient, state);
        Ok(())
    }
}

impl Lion {
    /// The step at a rate of the caller's choice.
    pub(super) fn sign_step(&self, at: &StepInfo, rate: f64, parameter: &mut [f32], gradient: &[f32], momentum: &mut [f32]) {
        let (keep, rate) = (at.keep(rate), rate as f32);
        let (old1, new1) = (self.beta1 as f32, (1.0 - self.beta1) as f32);
        let (old2, new2) = (self.beta2 as f32, (1.0 - self.beta2) as f32);
        let chunks = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).zip(momentum.par_chunks_mut(CHUNK));
        chunks.for_each(|((parameter, gradient), momentum)| {
            for ((w, &g), m) in parameter.iter_mut().zip(gradient).zip(momentum) {
                *w = keep * *w - rate * sign(old1 * *m + new1 * g);
                *m = old2 * *m + new2 * g;
            }
        });
    }
}

/// The sign with sign(0) = 0, which `f32::signum` has as 1.
fn sign(x: f32) -> f32 {
    f32::from(i8::from(x > 0.0) - i8::from(x < 0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::{at, random};

    fn run(rule: &Lion, steps: u64, scale: f32) -> Vec<f32> {
        let (mut parameter, mut state) = (random(1, 64), vec![0.0; 64]);
        for step in 0..steps {
            let gradient: Vec<f32> = random(10 + step, 64).iter().map(|g| scale * g).collect();
            rule.step(&at(step, 1e-3), &[64], &mut parameter, &gradient, &mut state).unwrap();
        }
        parameter
    }

    #[test]
    fn every_weight_moves_by_the_learning_rate() {
        for (before, after) in random(1, 64).iter().zip(run(&Lion::default(), 1, 1.0)) {
            assert!(((after - before).abs() - 1e-3).abs() < 1e-7);
        }
    }

    #[test]
    fn the_size_of_the_gradient_does_not_matter() {
        assert_eq!(run(&Lion::default(), 5, 1.0), run(&Lion::default(), 5, 1024.0));
    }

    #[test]
    fn zero_has_no_sign() {
        let (mut parameter, mut state) = (vec![1.0; 4], vec![0.0; 4]);
        Lion::default().step(&at(0, 0.5), &[4], &mut parameter, &[0.0, -0.0, 1.0, -1.0], &mut state).unwrap();
        assert_eq!(parameter, [1.0, 1.0, 0.5, 1.5]);
    }

    #[test]
    fn equal_betas_are_signum() {
        let rule = Lion { beta1: 0.9, beta2: 0.9 };
        let (mut parameter, mut momentum) = (random(1, 64), vec![0.0f32; 64]);
        for step in 0..5 {
            for ((w, m), g) in parameter.iter_mut().zip(&mut momentum).zip(random(10 + step, 64)) {
                *m = 0.9 * *m + (1.0f64 - 0.9) as f32 * g;
                *w -= 1e-3 * m.signum();
            }
        }
        assert_eq!(parameter, run(&rule, 5, 1.0));
    }
}
