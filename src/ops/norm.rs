//! Root-mean-square normalization with an optional residual add. Zhang & Sennrich 2019, arXiv:1910.07467; one scalar gain: SSNorm, arXiv:2506.19697.
//! s = x + residual;  y = g * n, n = r * s, r = 1/sqrt(mean(s^2) + eps);  ds = r * (g*dy - n * mean(g*dy*n)) + ds_out,  dg = sum_rows(dy*n)
//! x, residual, s, y: [rows, groups * d]   g: \[d] or \[1]   each of the `groups` spans of a row is normalized by itself (heads of q and k)
//! f32; row sums in 16 lanes with a fixed tree.

use super::cpu::norm::{rms_norm_backward, rms_norm_forward};
use super::host::{self, buffer, from_vec, host};
use crate::tape::{Tape, Var};
use candle_core::{D, Result, Tensor};

/// `y = norm(x)`, normalizing spans of `width` elements.
pub fn norm<'a>(tape: &Tape<'a>, x: &Var, gain: &Var, width: usize, epsilon: f64) -> Result<Var> {
    let (rows, total) = x.tensor().dims2()?;
    let fused = tape.fuses(x.tensor());
    let (y, saved) = if fused {
        forward(x.tensor(), gain.tensor(), width, epsilon)?
    } else {
        forward_reference(x.tensor(), gain.tensor(), width, epsilon)?
    };
    let (x_kept, gain_kept) = (x.clone(), gain.clone());
    let [y] = tape.record(&[x, gain], [y.reshape((rows, total))?], move |flow, [d_y]| {
        let Some(d_y) = d_y else { return Ok(()) };
        let (d_x, d_gain) = backward(fused, &d_y, None, x_kept.tensor(), &saved, gain_kept.tensor(), width)?;
        flow.add(&gain_kept, d_gain)?;
        flow.add(&x_kept, d_x.reshape((rows, total))?)
    });
    Ok(y)
}

/// `(s, y)` with `s = x + residual` and `y = norm(s)` over whole rows.
pub fn add_norm<'a>(tape: &Tape<'a>, x: &Var, residual: &Var, gain: &Var, epsilon: f64) -> Result<(Var, Var)> {
    let (rows, width) = x.tensor().dims2()?;
    let fused = tape.fuses(x.tensor());
    let (sum, y, saved) = if fused {
        forward_sum(x.tensor(), residual.tensor(), gain.tensor(), epsilon)?
    } else {
        let sum = (x.tensor() + residual.tensor())?;
        let (y, saved) = forward_reference(&sum, gain.tensor(), width, epsilon)?;
        (sum, y, saved)
    };
    let (kept, targets, gain_kept) = (sum.clone(), [x.target(), residual.target()], gain.clone());
    let [sum, y] = tape.record(&[x, residual, gain], [sum, y], move |flow, [d_sum, d_y]| {
        let Some(d_y) = d_y else {
            let through = d_sum.expect("a step runs only with a gradient");
            return targets.iter().try_for_each(|&target| flow.add_shared(target, &through));
        };
        let (d_x, d_gain) = backward(fused, &d_y, d_sum.as_ref(), &kept, &saved, gain_kept.tensor(), width)?;
        flow.add(&gain_kept, d_gain)?;
        let d_x = d_x.reshape((rows, width))?;
        targets.iter().try_for_each(|&target| flow.add_shared(target, &d_x))
    });
    Ok((sum, y))
}

/// `(s, y, r)`.
fn forward_sum(x: &Tensor, residual: &Tensor, gain: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor, Tensor)> {
    let (rows, width) = x.dims2()?;
    let (mut sum, mut y, mut scale) = (buffer(rows * width), buffer(rows * width), buffer(rows));
    let residual = host(residual)?;
    rms_norm_forward(width, epsilon as f32, &host(x)?, Some((&residual, &mut sum)), &host(gain)?, &mut y, &mut scale);
    Ok((from_vec(sum, (rows, width))?, from_vec(y, (rows, width))?, from_vec(scale, (rows, 1))?))
}

/// `(y, r)`.
fn forward(x: &Tensor, gain: &Tensor, width: usize, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let spans = x.elem_count() / width;
    let (mut y, mut scale) = (buffer(x.elem_count()), buffer(spans));
    rms_norm_forward(width, epsilon as f32, &host(x)?, None, &host(gain)?, &mut y, &mut scale);
    Ok((from_vec(y, x.shape())?, from_vec(scale, (spans, 1))?))
}

fn forward_reference(x: &Tensor, gain: &Tensor, width: usize, epsilon: f64) -> Result<(Tensor, Tensor)> {
    let spans = x.reshape(((), width))?;
    let scale = (spans.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.powf(-0.5)?;
    let y = spans.broadcast_mul(&scale)?.broadcast_mul(gain)?;
    Ok((y.reshape(x.shape())?, scale))
}

/// `(dx, dgain)`; `incoming` is a gradient that reached the normalized value by another way.
fn backward(
    fused: bool,
    d_y: &Tensor,
    incoming: Option<&Tensor>,
    x: &Tensor,
    scale: &Tensor,
    gain: &Tensor,
    width: usize,
) -> Result<(Tensor, Tensor)> {
    if !fused {
        return backward_reference(d_y, incoming, x, scale, gain, width);
    }
    let (mut d_x, mut d_gain) = (buffer(x.elem_count()), buffer(gain.elem_count()));
    let incoming = incoming.map(host::host).transpose()?;
    let (d_y, x, scale, gain_data) = (host(d_y)?, host(x)?, host(scale)?, host(gain)?);
    rms_norm_backward(width, &d_y, incoming.as_deref(), &x, &scale, &gain_data, &mut d_x, &mut d_gain);
    Ok((from_vec(d_x, (x.len() / width, width))?, from_vec(d_gain, gain.shape())?))
}

fn backward_reference(
    d_y: &Tensor,
    incoming: Option<&Tensor>,
    x: &Tensor,
    scale: &Tensor,
    gain: &Tensor,
    width: usize,
) -> Result<(Tensor, Tensor)> {
    let d_y = d_y.reshape(((), width))?;
    let normalized = x.reshape(((), width))?.broadcast_mul(scale)?;
    let weighted = d_y.broadcast_mul(gain)?;
    let projection = (&weighted * &normalized)?.mean_keepdim(D::Minus1)?;
    let d_x = (weighted - normalized.broadcast_mul(&projection)?)?.broadcast_mul(scale)?;
    let d_x = match incoming {
        Some(incoming) => (d_x + incoming.reshape(((), width))?)?,
        None => d_x,
    };
    let d_gain = (d_y * normalized)?.sum(0)?;
    let d_gain = if gain.elem_count() == 1 { d_gain.sum_all()?.reshape(1)? } else { d_gain };
    Ok((d_x, d_gain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, gaussian};

    #[test]
    fn gradients_with_vector_and_scalar_gains_and_groups() {
        for gain in [6, 1] {
            let inputs = [gaussian("x", &[5, 18]), gaussian("g", &[gain])];
            check(|tape, v| norm(tape, &v[0], &v[1], 6, 1e-5), &inputs);
        }
    }

    #[test]
    fn gradients_of_both_results_of_the_residual_form() {
        let inputs = [gaussian("x", &[5, 18]), gaussian("r", &[5, 18]), gaussian("g", &[18])];
        check(|tape, v| Ok(add_norm(tape, &v[0], &v[1], &v[2], 1e-5)?.1), &inputs);
        check(
            |tape, v| {
                let (sum, y) = add_norm(tape, &v[0], &v[1], &v[2], 1e-5)?;
                Ok(add_norm(tape, &y, &sum, &v[2], 1e-5)?.1)
            },
            &inputs,
        );
    }
}
