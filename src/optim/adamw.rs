//! AdamW. Loshchilov & Hutter 2019, arXiv:1711.05101, with the arithmetic of `torch.optim.AdamW`.
//! w <- (1 - lr*wd) w;  m <- m + (1-b1)(g - m);  v <- b2 v + (1-b2) g^2;
//! w <- w - lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps),  t = step + 1
//! One pass over memory: reads w, m, v, g, writes w, m, v. Eight bytes of state per value.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::rule::{NotFinite, Rule, StepInfo};
use super::{CHUNK, elements};

/// `[optim.adamw]`. The defaults of language-model pretraining (beta2 0.95, not torch's 0.999).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Adamw {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

impl Default for Adamw {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8 }
    }
}

impl Rule for Adamw {
    fn state_segments(&self, shape: &[usize]) -> Vec<(&'static str, usize)> {
        vec![("first_moment", elements(shape)), ("second_moment", elements(shape))]
    }

    fn step(&self, at: &StepInfo, _: &[usize], parameter: &mut [f32], gradient: &[f32], state: &mut [f32]) -> Result<(), NotFinite> {
        let (first, second) = state.split_at_mut(parameter.len());
        let scalars = Scalars::new(self, at);
        let chunks = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
        let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
        chunks.zip(moments).for_each(|((w, g), (m, v))| scalars.update(w, g, m, v));
        Ok(())
    }
}

/// The step's constants, rounded to f32 once.
struct Scalars {
    keep: f32,
    first_weight: f32,
    second_decay: f32,
    second_weight: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
}

impl Scalars {
    fn new(config: &Adamw, at: &StepInfo) -> Self {
        let count = i32::try_from(at.step + 1).unwrap_or(i32::MAX);
        Self {
            keep: at.keep(at.learning_rate),
            first_weight: (1.0 - config.beta1) as f32,
            second_decay: config.beta2 as f32,
            second_weight: (1.0 - config.beta2) as f32,
            step_size: (at.learning_rate / (1.0 - config.beta1.powi(count))) as f32,
            root_correction: (1.0 - config.beta2.powi(count)).sqrt() as f32,
            eps: config.eps as f32,
        }
    }

    /// No fused multiply-adds: plain operations vectorize, and give the same bits, on every machine.
    fn update(&self, parameter: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let moments = first.iter_mut().zip(second);
        for ((w, &g), (m, v)) in parameter.iter_mut().zip(gradient).zip(moments) {
            *m += self.first_weight * (g - *m);
            *v = self.second_decay * *v + self.second_weight * g * g;
            *w = self.keep * *w - self.step_size * *m / (v.sqrt() / self.root_correction + self.eps);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::{at, random};

    #[test]
    fn the_first_step_moves_every_weight_by_the_learning_rate() {
        let gradient = random(3, 50);
        let (mut parameter, mut state) = (vec![0.0; 50], vec![0.0; 100]);
        Adamw::default().step(&at(0, 1e-3), &[50], &mut parameter, &gradient, &mut state).unwrap();
        for (w, g) in parameter.iter().zip(&gradient) {
            assert!((w + 1e-3 * g.signum()).abs() < 1e-8, "{w} for gradient {g}");
        }
    }

    #[test]
    fn without_gradient_only_decay_acts() {
        let start = random(4, 50);
        let (mut parameter, mut state) = (start.clone(), vec![0.0; 100]);
        let at = StepInfo { weight_decay: 0.1, ..at(0, 1e-2) };
        Adamw::default().step(&at, &[50], &mut parameter, &[0.0; 50], &mut state).unwrap();
        let expected: Vec<f32> = start.iter().map(|w| (1.0f64 - 1e-3) as f32 * w).collect();
        assert_eq!(parameter, expected);
    }
}
