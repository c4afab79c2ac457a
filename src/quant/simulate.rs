//! Round-to-nearest W4A4 and W4A4KV4, simulated, with the protocol of Outlier-Safe Pre-Training (arXiv 2506.19697, `ptq.py`):
//! weights symmetric per output channel with a clip search; activations asymmetric per token, the output projection's input per head;
//! keys (after RoPE and a Hadamard on q and k) and values asymmetric per head; embedding and head stay as they are.

use crate::error::Result;
use crate::model::{Observer, Parameters, Role, Site, Spec};
use crate::ops::host::{self, from_vec};
use candle_core::Tensor;
use rayon::prelude::*;

/// Which activations are rounded to 4 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Weights and inputs of the linear maps.
    W4A4,
    /// And the key-value cache.
    W4A4Kv4,
}

const LEVELS: f32 = 15.0;

/// A copy of `parameters` with every block matrix rounded to 4 bits.
pub fn round_weights(parameters: &Parameters) -> Result<Parameters> {
    let copy = parameters.duplicate()?;
    for parameter in copy.list() {
        // EmbProj folds into embedding and head, which stay in 16 bits.
        let folded = parameter.name.ends_with("_projection.weight");
        if parameter.role == Role::Hidden && !folded {
            let width = parameter.shape[1];
            host::write(parameter.value(), |values| values.par_chunks_mut(width).for_each(round_channel))?;
        }
    }
    Ok(copy)
}

/// Symmetric, scale max|w| / 7 shrunk by the factor of 1 - i/100, i = 0..79, with the least sum of |error|^2.4.
fn round_channel(row: &mut [f32]) {
    let largest = row.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    if largest == 0.0 {
        return;
    }
    let mut best = (f32::INFINITY, 1.0);
    for i in 0..80 {
        let scale = largest * (1.0 - i as f32 / 100.0) / 7.0;
        let error: f32 = row.iter().map(|&w| (symmetric(w, scale) - w).abs().powf(2.4)).sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    row.iter_mut().for_each(|w| *w = symmetric(*w, best.1));
}

fn symmetric(w: f32, scale: f32) -> f32 {
    (w / scale).round_ties_even().clamp(-8.0, 7.0) * scale
}

/// Asymmetric over the whole span, whose range always includes zero.
fn round_span(span: &mut [f32]) {
    let low = span.iter().fold(0.0f32, |m, &x| m.min(x));
    let high = span.iter().fold(0.0f32, |m, &x| m.max(x));
    let scale = (high - low) / LEVELS;
    if scale == 0.0 {
        return;
    }
    let zero = (-low / scale).round_ties_even();
    span.iter_mut().for_each(|x| *x = (((*x / scale).round_ties_even() + zero).clamp(0.0, LEVELS) - zero) * scale);
}

/// Orthonormal Walsh-Hadamard transform; widths that are no power of two are left alone.
fn hadamard(span: &mut [f32]) {
    let width = span.len();
    if !width.is_power_of_two() {
        return;
    }
    let mut half = 1;
    while half < width {
        for start in (0..width).step_by(2 * half) {
            for i in start..start + half {
                let (a, b) = (span[i], span[i + half]);
                (span[i], span[i + half]) = (a + b, a - b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (width as f32).sqrt();
    span.iter_mut().for_each(|x| *x *= scale);
}

/// Rounds activations on their way through a forward pass.
#[derive(Clone, Debug)]
pub struct RoundActivations {
    scheme: Scheme,
    head_dim: usize,
}

impl RoundActivations {
    /// For a model of shape `spec`.
    pub fn new(spec: &Spec, scheme: Scheme) -> Self {
        Self { scheme, head_dim: spec.head_dim }
    }
}

impl Observer for RoundActivations {
    fn observe(&self, site: Site, value: &Tensor) -> Result<Option<Tensor>> {
        let cache = self.scheme == Scheme::W4A4Kv4;
        let (span, change): (usize, fn(&mut [f32])) = match site {
            Site::AttentionInput { .. } | Site::MlpInput { .. } | Site::DownInput { .. } => (value.dim(1)?, round_span),
            Site::OutputInput { .. } => (self.head_dim, round_span),
            Site::Query { .. } if cache => (self.head_dim, hadamard),
            Site::Key { .. } if cache => (self.head_dim, |span| {
                hadamard(span);
                round_span(span);
            }),
            Site::Value { .. } if cache => (self.head_dim, round_span),
            _ => return Ok(None),
        };
        let mut data = host::host(value)?.to_vec();
        data.par_chunks_mut(span).for_each(change);
        Ok(Some(from_vec(data, value.shape())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;

    fn gaussian(n: usize) -> Vec<f32> {
        let mut stream = Stream::new(1, "simulate");
        (0..n).map(|_| stream.normal() as f32).collect()
    }

    #[test]
    fn rounding_keeps_sixteen_levels_and_stays_within_half_a_step() {
        let original = gaussian(256);
        let mut rounded = original.clone();
        round_span(&mut rounded);
        let (low, high) = original.iter().fold((0.0f32, 0.0f32), |(l, h), &x| (l.min(x), h.max(x)));
        let step = (high - low) / 15.0;
        assert!(original.iter().zip(&rounded).all(|(a, b)| (a - b).abs() <= step * 1.01));
        let mut levels = rounded.clone();
        levels.sort_by(f32::total_cmp);
        levels.dedup();
        assert!(levels.len() <= 16 && levels.len() > 8, "{}", levels.len());
        let mut constant = vec![0.0; 8];
        round_span(&mut constant);
        assert_eq!(constant, vec![0.0; 8]);
    }

    #[test]
    fn the_clip_search_beats_the_full_range() {
        let error = |rounded: &[f32], row: &[f32]| row.iter().zip(rounded).map(|(a, b)| (a - b).abs().powf(2.4)).sum::<f32>();
        let row = gaussian(512);
        let scale = row.iter().fold(0.0f32, |m, w| m.max(w.abs())) / 7.0;
        let full: Vec<f32> = row.iter().map(|&w| symmetric(w, scale)).collect();
        let mut searched = row.clone();
        round_channel(&mut searched);
        assert!(error(&searched, &row) < error(&full, &row));
    }

    #[test]
    fn hadamard_is_its_own_inverse_and_spreads_a_spike() {
        let original = gaussian(64);
        let mut twice = original.clone();
        hadamard(&mut twice);
        hadamard(&mut twice);
        assert!(original.iter().zip(&twice).all(|(a, b)| (a - b).abs() < 1e-5));
        let mut spike = vec![0.0; 64];
        spike[3] = 1.0;
        hadamard(&mut spike);
        assert!(spike.iter().all(|x| (x.abs() - 0.125).abs() < 1e-6));
    }
}
