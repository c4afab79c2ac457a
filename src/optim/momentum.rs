//! The momentum in front of an orthogonalization: an exponential average with Nesterov's look-ahead, as `torch.optim.Muon`
//! forms it with `lerp`.
//! m' = m + (1-mu)(g - m);  u = m' - (m' - g)(1-mu) with Nesterov, else m'
//! Muon as first published sums (m' = mu m + g); the two differ by the factor 1-mu, which the orthogonalization removes.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::CHUNK;
use super::rule::StepInfo;

/// `[optim.muon]`: the momentum of `muon`, `nor-muon` and `distance-aware-muon`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Momentum {
    /// Decay of the average.
    pub momentum: f64,
    /// Look ahead by one step of momentum.
    pub nesterov: bool,
    /// Steps over which the momentum rises linearly to its value; 0 for none.
    pub warmup_steps: u64,
    /// Where it rises from.
    pub warmup_from: f64,
}

impl Default for Momentum {
    fn default() -> Self {
        Self { momentum: 0.95, nesterov: true, warmup_steps: 0, warmup_from: 0.85 }
    }
}

impl Momentum {
    /// The decay at `step`.
    pub fn at(&self, step: u64) -> f64 {
        if step >= self.warmup_steps {
            return self.momentum;
        }
        self.warmup_from + (self.momentum - self.warmup_from) * (step as f64 / self.warmup_steps as f64)
    }

    /// The direction u, in new memory: `buffer` is read only, so whoever orthogonalizes u cannot harm it.
    pub(super) fn direction(&self, step: u64, gradient: &[f32], buffer: &[f32]) -> Vec<f32> {
        let weight = (1.0 - self.at(step)) as f32;
        let ahead = if self.nesterov { weight } else { 0.0 };
        let mut direction = vec![0.0; gradient.len()];
        let chunks = direction.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK)).zip(buffer.par_chunks(CHUNK));
        chunks.for_each(|((direction, gradient), buffer)| {
            for ((u, &g), &m) in direction.iter_mut().zip(gradient).zip(buffer) {
                let moved = average(m, g, weight);
                *u = moved - (moved - g) * ahead;
            }
        });
        direction
    }

    /// Ends the step: `parameter <- keep * parameter - rate * direction`, and the gradient enters the buffer.
    pub(super) fn apply(&self, at: &StepInfo, keep: f32, rate: f32, direction: &[f32], step: Tensors<'_>) {
        let weight = (1.0 - self.at(at.step)) as f32;
        let chunks = step.parameter.par_chunks_mut(CHUNK).zip(direction.par_chunks(CHUNK));
        let inputs = step.buffer.par_chunks_mut(CHUNK).zip(step.gradient.par_chunks(CHUNK));
        chunks.zip(inputs).for_each(|((parameter, direction), (buffer, gradient))| {
            for ((w, &o), (m, &g)) in parameter.iter_mut().zip(direction).zip(buffer.iter_mut().zip(gradient)) {
                *w = keep * *w - rate * o;
                *m = average(*m, g, weight);
            }
        });
    }
}

/// The slices of one step of one parameter, all of one length.
pub(super) struct Tensors<'a> {
    pub parameter: &'a mut [f32],
    pub gradient: &'a [f32],
    pub buffer: &'a mut [f32],
}

fn average(old: f32, new: f32, weight: f32) -> f32 {
    old + weight * (new - old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn momentum_rises_and_stays() {
        let momentum = Momentum { warmup_steps: 300, ..Momentum::default() };
        assert_eq!(momentum.at(0), 0.85);
        assert!((momentum.at(150) - 0.9).abs() < 1e-12);
        assert_eq!((momentum.at(300), momentum.at(10_000)), (0.95, 0.95));
        assert_eq!(Momentum::default().at(0), 0.95);
    }

    #[test]
    fn the_average_is_the_sum_times_one_minus_momentum() {
        let rule = Momentum { nesterov: false, ..Momentum::default() };
        let (mut buffer, mut sum) = ([0.0], 0.0f64);
        for step in 0..50u64 {
            let gradient = [(step as f32).sin()];
            buffer[0] = rule.direction(step, &gradient, &buffer)[0];
            sum = 0.95 * sum + f64::from(gradient[0]);
        }
        assert!((f64::from(buffer[0]) - 0.05 * sum).abs() < 1e-6);
    }

    #[test]
    fn nesterov_mixes_by_the_square_of_the_momentum() {
        let (gradient, buffer) = ([3.0], [-2.0]);
        let direction = Momentum::default().direction(0, &gradient, &buffer);
        let mu_squared = 0.95f32 * 0.95;
        assert!((direction[0] - (mu_squared * buffer[0] + (1.0 - mu_squared) * gradient[0])).abs() < 1e-6);
    }
}
