//! LionMuon: alternating spectral and sign descent. Bolatov et al. 2026, arXiv:2605.19811, Algorithm 1.
//! u = b1 m + (1-b1) g
//! step mod period = 0:  w <- (1 - lr*wd) w - lr * scale(rows, cols) * NS(u)
//! otherwise:            w <- (1 - r*lr*wd) w - r*lr * sign(u)
//! m <- b2 m + (1-b2) g after either. One buffer; the orthogonalization is paid for every `period` steps only.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::lion::Lion;
use super::rule::{NotFinite, Rule, StepInfo};
use super::spectral::Spectral;
use super::{CHUNK, elements};

/// `[optim.lion_muon]`. The paper's settings for its language models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LionMuonConfig {
    /// Weight of the momentum in the direction.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Every so many steps, from step 0 on, one is spectral; 0 for never.
    pub period: u64,
    /// The sign steps' learning rate as a fraction of the spectral steps'.
    pub sign_ratio: f64,
}

impl Default for LionMuonConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, period: 2, sign_ratio: 0.05 }
    }
}

/// The rule for hidden matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LionMuon {
    pub config: LionMuonConfig,
    pub spectral: Spectral,
}

impl Rule for LionMuon {
    fn state_segments(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        vec![("momentum", elements(shape))]
    }

    fn step(&self, at: &StepInfo, shape: &[usize], parameter: &mut [f32], gradient: &[f32], state: &mut [f32]) -> Result<(), NotFinite> {
        if self.is_spectral(at.step) {
            return self.spectral_step(at, shape, parameter, gradient, state);
        }
        let lion = Lion { beta1: self.config.beta1, beta2: self.config.beta2 };
        lion.sign_step(at, at.learning_rate * self.config.sign_ratio, parameter, gradient, state);
        Ok(())
    }

    fn operations(&self, shape: &[usize]) -> f64 {
        match self.config.period {
            0 => 0.0,
            period => self.spectral.operations(shape) / period as f64,
        }
    }
}

impl LionMuon {
    /// Decided by the step's number in the whole run, so that a resumed run keeps the rhythm.
    fn is_spectral(&self, step: u64) -> bool {
        self.config.period != 0 && step.is_multiple_of(self.config.period)
    }

    fn spectral_step(
        &self,
        at: &StepInfo,
        shape: &[usize],
        parameter: &mut [f32],
        gradient: &[f32],
        momentum: &mut [f32],
    ) -> Result<(), NotFinite> {
        let mut direction = mix(self.config.beta1, momentum, gradient);
        self.spectral.orthogonalize(shape, &mut direction)?;
        let (keep, rate) = (at.keep(at.learning_rate), (at.learning_rate * self.spectral.factor(shape)) as f32);
        let (old, new) = (self.config.beta2 as f32, (1.0 - self.config.beta2) as f32);
        let chunks = parameter.par_chunks_mut(CHUNK).zip(direction.par_chunks(CHUNK));
        let inputs = momentum.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        chunks.zip(inputs).for_each(|((parameter, direction), (momentum, gradient))| {
            for ((w, &o), (m, &g)) in parameter.iter_mut().zip(direction).zip(momentum.iter_mut().zip(gradient)) {
                *w = keep * *w - rate * o;
                *m = old * *m + new * g;
            }
        });
        Ok(())
    }
}

/// beta m + (1 - beta) g in new memory.
fn mix(beta: f64, momentum: &[f32], gradient: &[f32]) -> Vec<f32> {
    let (old, new) = (beta as f32, (1.0 - beta) as f32);
    let mut mixed = vec![0.0; gradient.len()];
    let chunks = mixed.par_chunks_mut(CHUNK).zip(momentum.par_chunks(CHUNK)).zip(gradient.par_chunks(CHUNK));
    chunks.for_each(|((mixed, momentum), gradient)| {
        for ((u, &m), &g) in mixed.iter_mut().zip(momentum).zip(gradient) {
            *u = old * m + new * g;
        }
    });
    mixed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::muon::Muon;
    use crate::optim::testing::{at, random, relative_error};

    const SHAPE: [usize; 2] = [12, 20];

    fn with_period(period: u64) -> LionMuon {
        LionMuon { config: LionMuonConfig { period, ..LionMuonConfig::default() }, ..LionMuon::default() }
    }

    /// Weights and momentum after 7 steps with decay and a moving rate.
    fn run(rule: &dyn Rule) -> (Vec<f32>, Vec<f32>) {
        let (mut parameter, mut state) = (random(1, elements(&SHAPE)), vec![0.0; elements(&SHAPE)]);
        for step in 0..7 {
            let at = StepInfo { weight_decay: 0.1, ..at(step, 1e-2 / (step + 1) as f64) };
            rule.step(&at, &SHAPE, &mut parameter, &random(20 + step, elements(&SHAPE)), &mut state).unwrap();
        }
        (parameter, state)
    }

    #[test]
    fn never_spectral_is_lion() {
        let mut rule = with_period(0);
        rule.config.sign_ratio = 1.0;
        assert_eq!(run(&rule), run(&Lion::default()));
    }

    #[test]
    fn always_spectral_with_matched_betas_is_muon() {
        let mut rule = with_period(1);
        (rule.config.beta1, rule.config.beta2) = (0.95 * 0.95, 0.95);
        let (found, expected) = (run(&rule), run(&Muon::default()));
        assert!(relative_error(&found.0, &expected.0) < 1e-6 && relative_error(&found.1, &expected.1) < 1e-6);
    }

    #[test]
    fn the_momentum_does_not_depend_on_the_period() {
        assert_eq!(run(&with_period(1)).1, run(&with_period(3)).1);
        assert_eq!(run(&with_period(1)).1, run(&with_period(0)).1);
    }

    #[test]
    fn sign_steps_move_by_their_own_rate() {
        let (rule, start) = (with_period(5), random(1, elements(&SHAPE)));
        assert_eq!((0..11).filter(|&step| rule.is_spectral(step)).collect::<Vec<_>>(), [0, 5, 10]);
        let (mut parameter, mut state) = (start.clone(), vec![0.0; start.len()]);
        rule.step(&at(1, 0.1), &SHAPE, &mut parameter, &random(2, start.len()), &mut state).unwrap();
        assert!(parameter.iter().zip(&start).all(|(after, before)| ((after - before).abs() - 0.005).abs() < 1e-6));
    }

    #[test]
    fn decay_uses_the_rate_of_the_branch() {
        for (step, rate) in [(0, 0.1), (1, 0.005)] {
            let (mut parameter, mut state) = (vec![1.0; elements(&SHAPE)], vec![0.0; elements(&SHAPE)]);
            let at = StepInfo { weight_decay: 0.5, ..at(step, 0.1) };
            with_period(2).step(&at, &SHAPE, &mut parameter, &[0.0; 240], &mut state).unwrap();
            assert!(parameter.iter().all(|&w| w == (1.0 - rate * 0.5) as f32), "step {step}: {}", parameter[0]);
        }
    }
}
