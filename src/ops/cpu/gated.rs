//! Gated activations. SwiGLU: Shazeer 2020, arXiv:2002.05202; squared ReLU: So et al. 2021, arXiv:2109.08668.
//! y = f(gate) * up;  d_gate = f'(gate) * up * dy,  d_up = f(gate) * dy;  f = SiLU, or max(x, 0)^2
//! gate, up, y: flat, any shape
//! Reads, computes and writes f32.

use super::elementwise::BLOCK;
use super::math::{silu, silu_and_derivative};
use crate::multiversion;
use rayon::prelude::*;

/// What the gate goes through before it multiplies the other branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x): SwiGLU.
    Silu,
    /// max(x, 0)^2: ReLU^2-GLU.
    SquaredRelu,
}

#[inline(always)]
fn squared_relu_and_derivative(x: f32) -> (f32, f32) {
    let positive = if x > 0.0 { x } else { 0.0 * x };
    (positive * positive, positive + positive)
}

multiversion! {
    fn forward_block(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
        let elements = y.iter_mut().zip(gate).zip(up);
        match activation {
            Activation::Silu => elements.for_each(|((y, gate), up)| *y = silu(*gate) * up),
            Activation::SquaredRelu => elements.for_each(|((y, gate), up)| *y = squared_relu_and_derivative(*gate).0 * up),
        }
    }
}

#[inline(always)]
fn backward_elements(f: impl Fn(f32) -> (f32, f32), gate: &[f32], up: &[f32], dy: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
    for ((((gate, up), dy), d_gate), d_up) in gate.iter().zip(up).zip(dy).zip(d_gate).zip(d_up) {
        let (value, derivative) = f(*gate);
        *d_gate = derivative * up * dy;
        *d_up = value * dy;
    }
}

multiversion! {
    fn backward_block(activation: Activation, gate: &[f32], up: &[f32], dy: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        match activation {
            Activation::Silu => backward_elements(silu_and_derivative, gate, up, dy, d_gate, d_up),
            Activation::SquaredRelu => backward_elements(squared_relu_and_derivative, gate, up, dy, d_gate, d_up),
        }
    }
}

/// y = activation(gate) * up; overwrites `y`. All slices have equal lengths.
pub fn gated_forward(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len());
    if y.len() <= BLOCK {
        return forward_block(activation, gate, up, y);
    }
    let blocks = y.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK));
    blocks.for_each(|((y, gate), up)| forward_block(activation, gate, up, y));
}

/// Gradients with respect to both branches; overwrites `d_gate` and `d_up`. All slices have equal lengths.
pub fn gated_backward(activation: Activation, gate: &[f32], up: &[f32], dy: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
    assert!([gate.len(), up.len(), d_gate.len(), d_up.len()] == [dy.len(); 4]);
    if dy.len() <= BLOCK {
        return backward_block(activation, gate, up, dy, d_gate, d_up);
    }
    let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(dy.par_chunks(BLOCK));
    let blocks = inputs.zip(d_gate.par_chunks_mut(BLOCK)).zip(d_up.par_chunks_mut(BLOCK));
    blocks.for_each(|((((gate, up), dy), d_gate), d_up)| backward_block(activation, gate, up, dy, d_gate, d_up));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_same_bits_everywhere, finite_differences, relative_error, uniform, weigh, widen};

    fn reference(activation: Activation, gate: &[f64], up: &[f64]) -> Vec<f64> {
        let f = |x: f64| match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::SquaredRelu => x.max(0.0).powi(2),
        };
        gate.iter().zip(up).map(|(gate, up)| f(*gate) * up).collect()
    }

    fn wide(seed: u64, len: usize) -> Vec<f32> {
        uniform(seed, len).iter().map(|x| 6.0 * x).collect()
    }

    #[test]
    fn forward_and_backward_match_the_reference() {
        for activation in [Activation::Silu, Activation::SquaredRelu] {
            let (gate, up, dy) = (wide(1, 333), wide(2, 333), uniform(3, 333));
            let (gate64, up64, dy64) = (widen(&gate), widen(&up), widen(&dy));
            let mut y = vec![9.0; 333];
            gated_forward(activation, &gate, &up, &mut y);
            assert!(relative_error(&y, &reference(activation, &gate64, &up64)) < 1e-6);
            let (mut d_gate, mut d_up) = (vec![9.0; 333], vec![9.0; 333]);
            gated_backward(activation, &gate, &up, &dy, &mut d_gate, &mut d_up);
            let by_gate = finite_differences(&gate64, |gate| weigh(&reference(activation, gate, &up64), &dy64));
            let by_up = finite_differences(&up64, |up| weigh(&reference(activation, &gate64, up), &dy64));
            assert!(relative_error(&d_gate, &by_gate) < 1e-5 && relative_error(&d_up, &by_up) < 1e-5);
        }
    }

    #[test]
    fn not_a_number_is_not_hidden() {
        for activation in [Activation::Silu, Activation::SquaredRelu] {
            let mut y = [0.0];
            gated_forward(activation, &[f32::NAN], &[1.0], &mut y);
            assert!(y[0].is_nan());
        }
    }

    #[test]
    fn same_bits_everywhere() {
        let len = 2 * BLOCK + 19;
        let (gate, up, dy) = (wide(4, len), wide(5, len), uniform(6, len));
        for activation in [Activation::Silu, Activation::SquaredRelu] {
            assert_same_bits_everywhere(|| {
                let (mut y, mut d_gate, mut d_up) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
                gated_forward(activation, &gate, &up, &mut y);
                gated_backward(activation, &gate, &up, &dy, &mut d_gate, &mut d_up);
                [y, d_gate, d_up].concat()
            });
        }
    }
}
