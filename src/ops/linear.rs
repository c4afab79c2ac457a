//! Dense linear maps that share one input: y_i = x W_i^T;  dx = sum_i dy_i W_i,  dW_i = dy_i^T x.
//! x: [rows, in]   W_i: [out_i, in]   y_i: [rows, out_i]
//! f32. Fused path: one chain of fused multiply-adds per element in ascending `in`, gradients of weights straight into their buffers.

use super::cpu::gemm::{Matrix, gemm};
use super::host::{buffer, from_vec, host};
use crate::tape::{Flow, Tape, Target, Var};
use candle_core::{Result, Tensor};

/// `x W^T`.
pub fn linear<'a>(tape: &Tape<'a>, x: &Var, weight: &Var) -> Result<Var> {
    let [y] = linears(tape, x, [weight])?;
    Ok(y)
}

/// `x W_i^T` for several weights; the gradient of `x` is accumulated without temporaries.
pub fn linears<'a, const N: usize>(tape: &Tape<'a>, x: &Var, weights: [&Var; N]) -> Result<[Var; N]> {
    let fused = tape.fuses(x.tensor());
    let mut outputs = Vec::with_capacity(N);
    for weight in weights {
        outputs.push(if fused { product(x.tensor(), weight.tensor())? } else { x.tensor().matmul(&weight.tensor().t()?)? });
    }
    let outputs: [Tensor; N] = outputs.try_into().expect("one output per weight");
    let mut inputs = vec![x];
    inputs.extend(weights);
    let (x, weights) = (x.clone(), weights.map(Clone::clone));
    Ok(tape.record(&inputs, outputs, move |flow, gradients| {
        let matrices = weights.each_ref().map(Var::tensor);
        let gradients = gradients.each_ref().map(Option::as_ref);
        if x.needs_gradient() {
            let d_x = if fused { input_gradient(&gradients, &matrices)? } else { input_gradient_reference(&gradients, &matrices)? };
            flow.add(&x, d_x)?;
        }
        for (weight, gradient) in weights.iter().zip(gradients) {
            let Some(gradient) = gradient.filter(|_| weight.needs_gradient()) else { continue };
            if fused { weight_gradient(flow, weight.target(), gradient, x.tensor())? } else { flow.add(weight, gradient.t()?.matmul(x.tensor())?)? }
        }
        Ok(())
    }))
}

fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((rows, width), (out, _)) = (x.dims2()?, weight.dims2()?);
    let (x, weight) = (host(x)?, host(weight)?);
    let mut y = buffer(rows * out);
    gemm(Matrix::row_major(&x, rows, width), &Matrix::row_major(&weight, out, width).transposed(), &mut y, out, false);
    from_vec(y, (rows, out))
}

/// sum_i dy_i W_i over the outputs that have a gradient; at least one has.
pub(super) fn input_gradient(gradients: &[Option<&Tensor>], weights: &[&Tensor]) -> Result<Tensor> {
    let width = weights[0].dim(1)?;
    let rows = gradients.iter().flatten().next().expect("a step runs only with a gradient").dim(0)?;
    let mut d_x = buffer(rows * width);
    let mut accumulate = false;
    for (gradient, weight) in gradients.iter().zip(weights) {
        let Some(gradient) = gradient else { continue };
        let out = weight.dim(0)?;
        let (gradient, weight) = (host(gradient)?, host(weight)?);
        gemm(Matrix::row_major(&gradient, rows, out), &Matrix::row_major(&weight, out, width), &mut d_x, width, accumulate);
        accumulate = true;
    }
    from_vec(d_x, (rows, width))
}

fn input_gradient_reference(gradients: &[Option<&Tensor>], weights: &[&Tensor]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (gradient, weight) in gradients.iter().zip(weights) {
        let Some(gradient) = gradient else { continue };
        let part = gradient.matmul(weight)?;
        sum = Some(match sum {
            None => part,
            Some(sum) => (sum + part)?,
        });
    }
    Ok(sum.expect("a step runs only with a gradient"))
}

/// dW = dy^T x, into the parameter's buffer when there is one.
pub(super) fn weight_gradient(flow: &mut Flow<'_>, weight: Target, gradient: &Tensor, x: &Tensor) -> Result<()> {
    let ((rows, out), (_, width)) = (gradient.dims2()?, x.dims2()?);
    let (gradient, x) = (host(gradient)?, host(x)?);
    let fill = |elements: &mut [f32], accumulate: bool| {
        let transposed = Matrix::row_major(&gradient, rows, out).transposed();
        gemm(transposed, &Matrix::row_major(&x, rows, width), elements, width, accumulate);
    };
    if flow.write_parameter(weight, fill)? {
        return Ok(());
    }
    let mut dense = buffer(out * width);
    fill(&mut dense, false);
    flow.add(weight, from_vec(dense, (out, width))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gated::{GateFunction, gated};
    use crate::ops::testing::{check, gaussian};

    #[test]
    fn gradients_of_maps_that_share_their_input() {
        let inputs = [gaussian("x", &[7, 5]), gaussian("a", &[6, 5]), gaussian("b", &[6, 5])];
        check(
            |tape, v| {
                let [a, b] = linears(tape, &v[0], [&v[1], &v[2]])?;
                gated(tape, GateFunction::Silu, &a, &b)
            },
            &inputs,
        );
        // Only the second output is used, so the first has no gradient.
        check(|tape, v| Ok(linears(tape, &v[0], [&v[1], &v[1]])?[1].clone()), &inputs[..2]);
    }
}
