//! Initial values by role; each parameter has its own random stream, so adding one changes no other.
//!
//! | role | distribution |
//! | --- | --- |
//! | gains | 1 |
//! | embedding | normal, deviation 0.02 (1 over the square root of the width under EmbProj-free ternary stays 0.02 as well: norms follow) |
//! | head | normal, deviation 0.02 |
//! | EmbProj | random orthogonal (OSP, arXiv 2506.19697) |
//! | q, k, v, gate, up | normal, deviation 1 / sqrt(3 in) (the deviation of PyTorch's uniform default) |
//! | o, down | the same divided by sqrt(2 layers), so that the residual stream starts at unit growth (GPT-2) |

use super::{Parameters, Role, Spec};
use crate::error::Result;
use crate::ops::rng::Stream;
use candle_core::{Device, Tensor};

/// Draws every parameter of `spec`.
pub fn initialize(spec: &Spec, seed: u64, device: &Device) -> Result<Parameters> {
    let parameters = Parameters::zeros(spec, device)?;
    for parameter in parameters.list() {
        let mut stream = Stream::new(seed, &parameter.name);
        let len = parameter.len();
        let values: Vec<f32> = match parameter.role {
            Role::Gain => vec![1.0; len],
            Role::Embedding | Role::Head => normal(&mut stream, len, 0.02),
            Role::Hidden if is_projection(&parameter.name) => orthogonal(&mut stream, spec.dim),
            Role::Hidden | Role::Adapter => normal(&mut stream, len, deviation(spec, &parameter.name, parameter.shape[1])),
        };
        let values = Tensor::from_vec(values, parameter.shape.clone(), &Device::Cpu)?.to_device(device)?;
        parameter.value().slice_set(&values, 0, 0)?;
    }
    Ok(parameters)
}

fn is_projection(name: &str) -> bool {
    name.ends_with("_projection.weight")
}

fn deviation(spec: &Spec, name: &str, fan_in: usize) -> f64 {
    let base = 1.0 / (3.0 * fan_in as f64).sqrt();
    let into_stream = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
    if into_stream { base / (2.0 * spec.layers as f64).sqrt() } else { base }
}

fn normal(stream: &mut Stream, len: usize, deviation: f64) -> Vec<f32> {
    (0..len).map(|_| (stream.normal() * deviation) as f32).collect()
}

/// Haar-distributed orthogonal matrix: Gram-Schmidt (applied twice for accuracy) on Gaussian rows.
fn orthogonal(stream: &mut Stream, width: usize) -> Vec<f32> {
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(width);
    for _ in 0..width {
        let mut row: Vec<f64> = (0..width).map(|_| stream.normal()).collect();
        for _ in 0..2 {
            for earlier in &rows {
                let projection: f64 = row.iter().zip(earlier).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(earlier).for_each(|(a, b)| *a -= projection * b);
            }
        }
        let norm = row.iter().map(|a| a * a).sum::<f64>().sqrt();
        row.iter_mut().for_each(|a| *a /= norm);
        rows.push(row);
    }
    rows.into_iter().flatten().map(|a| a as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projections_are_orthogonal() {
        let width = 48;
        let q = orthogonal(&mut Stream::new(3, "q"), width);
        for i in 0..width {
            for j in 0..width {
                let dot: f32 = (0..width).map(|k| q[i * width + k] * q[j * width + k]).sum();
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((dot - expected).abs() < 1e-5, "rows {i} and {j}: {dot}");
            }
        }
    }
}
