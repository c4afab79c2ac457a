//! Rotary frequencies of a model, stretched where its context was lengthened after training.
//! theta_i = base^(-2i/h), i < h / 2, radians per position;  Llama 3 (Dubey et al. 2024, arXiv:2407.21783; the constants are each model's):
//! a wave longer than original / low is slowed by `factor`, one shorter than original / high stays, and between the two the share
//! s = (original / wave - low) / (high - low) of the frequency stays: theta (1 - s) / factor + theta s.

use super::Spec;
use serde::{Deserialize, Serialize};

/// How a model stretches its rotary frequencies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RopeScaling {
    /// By wavelength; `original_context` in tokens.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_context: usize },
    /// One divisor per frequency, as GGUF files store them.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// What each of the `frequencies` is divided by.
    pub fn divisors(&self, frequencies: &[f64]) -> Vec<f64> {
        match self {
            Self::Divisors(divisors) => divisors.iter().map(|&divisor| f64::from(divisor)).collect(),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let divisor = |frequency: &f64| {
                    let turns = *original_context as f64 * frequency / (2.0 * std::f64::consts::PI);
                    let stays = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    1.0 / ((1.0 - stays) / factor + stays)
                };
                frequencies.iter().map(divisor).collect()
            }
        }
    }

    /// Why these numbers are none a model can have, if so, for heads of `head_dim`.
    pub fn fault(&self, head_dim: usize) -> Option<String> {
        match self {
            Self::Divisors(divisors) if divisors.len() != head_dim / 2 => {
                Some(format!("has {} rotary divisors where heads of {head_dim} need {}", divisors.len(), head_dim / 2))
            }
            Self::Divisors(divisors) => {
                let bad = divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0))?;
                Some(format!("has the rotary divisor {bad}"))
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let sound = factor.is_finite() && *factor >= 1.0 && *low_freq_factor > 0.0 && *original_context > 0;
                let ordered = high_freq_factor.is_finite() && high_freq_factor > low_freq_factor;
                (!(sound && ordered)).then(|| format!("has impossible rotary scaling: {self:?}"))
            }
        }
    }
}

impl Spec {
    /// Radians per position of each pair of a head, `[head_dim / 2]`.
    pub fn rotary_frequencies(&self) -> Vec<f64> {
        let plain: Vec<f64> = (0..self.head_dim / 2).map(|i| self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64)).collect();
        match &self.rope_scaling {
            None => plain,
            Some(scaling) => plain.iter().zip(scaling.divisors(&plain)).map(|(frequency, divisor)| frequency / divisor).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.1's numbers; the reference values are `_compute_llama3_parameters` of transformers 5 in float32.
    #[test]
    fn long_waves_slow_down_and_short_ones_stay() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
        let plain: Vec<f64> = (0..64).map(|i| 500_000f64.powf(-2.0 * f64::from(i) / 128.0)).collect();
        let divisors = scaling.divisors(&plain);
        assert!(divisors[..29].iter().all(|&divisor| divisor == 1.0));
        assert!(divisors[35..].iter().all(|&divisor| (divisor - 8.0).abs() < 1e-12));
        assert!(divisors[28..36].windows(2).all(|pair| pair[0] <= pair[1]));
        let turns = 8192.0 * plain[31] / (2.0 * std::f64::consts::PI);
        let stays = (turns - 1.0) / 3.0;
        assert!((plain[31] / divisors[31] - plain[31] * ((1.0 - stays) / 8.0 + stays)).abs() < 1e-15);
        assert_eq!(scaling.fault(128), None);
    }

    #[test]
    fn impossible_numbers_are_named() {
        let llama3 =
            |factor, low_freq_factor| RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor: 4.0, original_context: 8192 };
        assert!(llama3(0.5, 1.0).fault(8).is_some() && llama3(8.0, 4.0).fault(8).is_some() && llama3(f64::NAN, 1.0).fault(8).is_some());
        assert!(RopeScaling::Divisors(vec![1.0; 3]).fault(8).unwrap().contains("need 4"));
        assert!(RopeScaling::Divisors(vec![1.0, 0.0]).fault(4).is_some());
    }
}
