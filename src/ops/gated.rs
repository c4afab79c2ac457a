//! Gated activations. SwiGLU: Shazeer 2020, arXiv:2002.05202; squared ReLU: So et al. 2021, arXiv:2109.08668.
//! y = a(gate) * up, a = silu or relu^2;  dgate = dy * up * a'(gate),  dup = dy * a(gate)
//! gate, up, y: [rows, f]
//! f32.

use super::cpu::gated::{Activation as Gate, gated_backward, gated_forward};
use super::host::{buffer, from_vec, host};
use crate::tape::{Tape, Var};
use candle_core::{Result, Tensor};

pub use super::cpu::gated::Activation as GateFunction;

/// `a(gate) * up`.
pub fn gated<'a>(tape: &Tape<'a>, function: Gate, gate: &Var, up: &Var) -> Result<Var> {
    let fused = tape.fuses(gate.tensor());
    let y = if fused { forward(function, gate.tensor(), up.tensor())? } else { (activate(function, gate.tensor())?.0 * up.tensor())? };
    let inputs = [gate, up];
    let (gate, up) = (gate.clone(), up.clone());
    let [y] = tape.record(&inputs, [y], move |flow, [d_y]| {
        let Some(d_y) = d_y else { return Ok(()) };
        let (d_gate, d_up) =
            if fused { backward(function, gate.tensor(), up.tensor(), &d_y)? } else { backward_reference(function, gate.tensor(), up.tensor(), &d_y)? };
        flow.add(&gate, d_gate)?;
        flow.add(&up, d_up)
    });
    Ok(y)
}

fn forward(function: Gate, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let mut y = buffer(gate.elem_count());
    gated_forward(function, &host(gate)?, &host(up)?, &mut y);
    from_vec(y, gate.shape())
}

fn backward(function: Gate, gate: &Tensor, up: &Tensor, d_y: &Tensor) -> Result<(Tensor, Tensor)> {
    let (mut d_gate, mut d_up) = (buffer(gate.elem_count()), buffer(gate.elem_count()));
    gated_backward(function, &host(gate)?, &host(up)?, &host(d_y)?, &mut d_gate, &mut d_up);
    Ok((from_vec(d_gate, gate.shape())?, from_vec(d_up, gate.shape())?))
}

/// `(a, a')`.
fn activate(function: Gate, x: &Tensor) -> Result<(Tensor, Tensor)> {
    match function {
        Gate::Silu => {
            let sigmoid = (x.neg()?.exp()? + 1.0)?.recip()?;
            let value = (x * &sigmoid)?;
            // s + x s (1 - s)
            let slope = (&sigmoid + (&value - (&value * &sigmoid)?)?)?;
            Ok((value, slope))
        }
        Gate::SquaredRelu => {
            let positive = x.relu()?;
            Ok((positive.sqr()?, (positive * 2.0)?))
        }
    }
}

fn backward_reference(function: Gate, gate: &Tensor, up: &Tensor, d_y: &Tensor) -> Result<(Tensor, Tensor)> {
    let (value, slope) = activate(function, gate)?;
    Ok((((d_y * up)? * slope)?, (d_y * value)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, gaussian};

    #[test]
    fn gradients() {
        let inputs = [gaussian("g", &[5, 7]), gaussian("u", &[5, 7])];
        for function in [Gate::Silu, Gate::SquaredRelu] {
            check(|tape, v| gated(tape, function, &v[0], &v[1]), &inputs);
        }
    }
}
