//! Ternary linear maps that share one input, BitNet b1.58. Ma et al. 2024, arXiv:2402.17764.
//! y_i = Q8(x) Q2(W_i)^T;  Q2(W) = alpha round(W / alpha) clipped to {-1, 0, 1} alpha, alpha = f16(mean|W|);  Q8(x) = round(127 x / gamma)
//! gamma / 127 per row, gamma = max|x|;  straight-through: dx = sum_i dy_i Q2(W_i),  dW_i = dy_i^T Q8(x).
//! x: [rows, in]   W_i: [out_i, in] f32 master   y_i: [rows, out_i]
//! Products of codes are exact integers; the fused path is the engine's own kernel over the same packed bits.

use super::cpu::ternary::{PackedTernary, quantize_activations, ternary_matmul};
use super::host::{buffer, from_vec, host};
use super::linear::{input_gradient, weight_gradient};
use crate::tape::{Tape, Var};
use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

/// Ternary products of `x` with several weights.
pub fn ternary_linears<'a, const N: usize>(tape: &Tape<'a>, x: &Var, weights: [&Var; N]) -> Result<[Var; N]> {
    if tape.fuses(x.tensor()) { fused(tape, x, weights) } else { reference(tape, x, weights) }
}

/// One ternary product.
pub fn ternary_linear<'a>(tape: &Tape<'a>, x: &Var, weight: &Var) -> Result<Var> {
    let [y] = ternary_linears(tape, x, [weight])?;
    Ok(y)
}

fn fused<'a, const N: usize>(tape: &Tape<'a>, x: &Var, weights: [&Var; N]) -> Result<[Var; N]> {
    let (rows, width) = x.tensor().dims2()?;
    let (mut codes, mut gammas) = (vec![0i8; rows * width], buffer(rows));
    quantize_activations(&host(x.tensor())?, width, &mut codes, &mut gammas);
    let mut packed = Vec::with_capacity(N);
    let mut outputs = Vec::with_capacity(N);
    for weight in weights {
        let out = weight.tensor().dim(0)?;
        let matrix = PackedTernary::from_weights(&host(weight.tensor())?, out, width);
        let mut y = buffer(rows * out);
        ternary_matmul(&codes, &gammas, &matrix, &mut y);
        outputs.push(from_vec(y, (rows, out))?);
        packed.push(matrix);
    }
    let outputs: [Tensor; N] = outputs.try_into().expect("one output per weight");
    let mut inputs = vec![x];
    inputs.extend(weights);
    let (target, weights) = (x.target(), weights.map(|w| w.target()));
    Ok(tape.record(&inputs, outputs, move |flow, gradients| {
        let gradients = gradients.each_ref().map(Option::as_ref);
        if target.needs_gradient() {
            let dense = packed.iter().map(unpack).collect::<Result<Vec<_>>>()?;
            flow.add(target, input_gradient(&gradients, &dense.iter().collect::<Vec<_>>())?)?;
        }
        let rounded = from_vec(dequantize(&codes, &gammas, width), (rows, width))?;
        for (weight, gradient) in weights.into_iter().zip(gradients) {
            let Some(gradient) = gradient.filter(|_| weight.needs_gradient()) else { continue };
            weight_gradient(flow, weight, gradient, &rounded)?;
        }
        Ok(())
    }))
}

/// The activations that the codes stand for.
fn dequantize(codes: &[i8], gammas: &[f32], width: usize) -> Vec<f32> {
    let mut x = buffer(codes.len());
    x.par_chunks_mut(width).zip(codes.par_chunks(width)).zip(gammas).for_each(|((x, codes), gamma)| {
        let step = gamma / 127.0;
        x.iter_mut().zip(codes).for_each(|(x, &code)| *x = f32::from(code) * step);
    });
    x
}

fn unpack(matrix: &PackedTernary) -> Result<Tensor> {
    let mut dense = buffer(matrix.rows() * matrix.columns());
    matrix.dequantize_into(&mut dense);
    from_vec(dense, (matrix.rows(), matrix.columns()))
}

fn reference<'a, const N: usize>(tape: &Tape<'a>, x: &Var, weights: [&Var; N]) -> Result<[Var; N]> {
    let (codes, step) = activation_codes(x.tensor())?;
    let quantized = weights.iter().map(|w| weight_codes(w.tensor())).collect::<Result<Vec<_>>>()?;
    let mut outputs = Vec::with_capacity(N);
    for (weight, alpha) in &quantized {
        outputs.push(codes.matmul(&weight.t()?)?.broadcast_mul(&step.broadcast_mul(alpha)?)?);
    }
    let outputs: [Tensor; N] = outputs.try_into().expect("one output per weight");
    let mut inputs = vec![x];
    inputs.extend(weights);
    let (target, weights) = (x.target(), weights.map(|w| w.target()));
    Ok(tape.record(&inputs, outputs, move |flow, gradients| {
        let rounded = codes.broadcast_mul(&step)?;
        for ((weight, gradient), (matrix, alpha)) in weights.into_iter().zip(gradients).zip(&quantized) {
            let Some(gradient) = gradient else { continue };
            flow.add(target, gradient.matmul(&matrix.broadcast_mul(alpha)?)?)?;
            flow.add(weight, gradient.t()?.matmul(&rounded)?)?;
        }
        Ok(())
    }))
}

/// Q8(x): what ternary maps make of their input.
pub(super) fn rounded_activations(x: &Tensor) -> Result<Tensor> {
    let (codes, step) = activation_codes(x)?;
    codes.broadcast_mul(&step)
}

/// Ternary products on the way from a model trained in floats: with `blend` lambda, x and W_i are replaced by x + lambda (Q8(x) - x) and
/// W_i + lambda (Q2(W_i) - W_i), straight through in the backward pass. At 1 it is [`ternary_linears`] itself.
/// Warm-up of quantization: Mekkouri et al. 2024, "Fine-tuning LLMs to 1.58bit".
pub fn blended_linears<'a, const N: usize>(tape: &Tape<'a>, x: &Var, weights: [&Var; N], blend: f32) -> Result<[Var; N]> {
    if blend >= 1.0 {
        return ternary_linears(tape, x, weights);
    }
    let mix = |plain: &Tensor, rounded: Tensor| plain + ((rounded - plain)? * f64::from(blend))?;
    let mixed_x = mix(x.tensor(), rounded_activations(x.tensor())?)?;
    let mixed = weights.iter().map(|weight| {
        let (codes, alpha) = weight_codes(weight.tensor())?;
        mix(weight.tensor(), codes.broadcast_mul(&alpha)?)
    });
    let mixed = mixed.collect::<Result<Vec<Tensor>>>()?;
    let outputs = mixed.iter().map(|weight| mixed_x.matmul(&weight.t()?)).collect::<Result<Vec<_>>>()?;
    let outputs: [Tensor; N] = outputs.try_into().expect("one output per weight");
    let mut inputs = vec![x];
    inputs.extend(weights);
    let (target, weights) = (x.target(), weights.map(|weight| weight.target()));
    Ok(tape.record(&inputs, outputs, move |flow, gradients| {
        for ((weight, gradient), matrix) in weights.into_iter().zip(gradients).zip(&mixed) {
            let Some(gradient) = gradient else { continue };
            flow.add(target, gradient.matmul(matrix)?)?;
            flow.add(weight, gradient.t()?.matmul(&mixed_x)?)?;
        }
        Ok(())
    }))
}

/// Rounds half to even: adding and removing 1.5 times two to the number of fraction bits leaves no bits below the point.
fn round_half_even(x: &Tensor) -> Result<Tensor> {
    let shift = if x.dtype() == DType::F64 { 6_755_399_441_055_744.0 } else { 12_582_912.0 };
    (x + shift)? - shift
}

/// Integer codes in -128..=127 (as floats) and the step `gamma / 127` per row, `[rows, 1]`.
fn activation_codes(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let gamma = x.abs()?.max_keepdim(1)?.maximum(1e-5)?;
    let inverse = (gamma.ones_like()? * 127.0)?.div(&gamma)?;
    let codes = round_half_even(&x.broadcast_mul(&inverse)?)?.clamp(-128.0, 127.0)?;
    Ok((codes, (gamma / 127.0)?))
}

/// Codes in {-1, 0, 1} (as floats) and alpha, `[1, 1]`.
fn weight_codes(weight: &Tensor) -> Result<(Tensor, Tensor)> {
    let mean = weight.to_dtype(DType::F64)?.abs()?.mean_all()?.to_dtype(DType::F32)?;
    let alpha = mean.maximum(1e-5)?.to_dtype(DType::F16)?.to_dtype(weight.dtype())?.reshape((1, 1))?;
    let codes = round_half_even(&weight.broadcast_div(&alpha)?)?.clamp(-1.0, 1.0)?;
    Ok((codes, alpha))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_fused, gaussian};

    /// At 0 the maps are dense, and everything is differentiable; close to 1 they are near the ternary ones.
    #[test]
    fn the_blend_leads_from_dense_to_ternary() {
        let inputs = [gaussian("x", &[7, 40]), gaussian("a", &[20, 40])];
        crate::ops::testing::check(|tape, v| Ok(blended_linears(tape, &v[0], [&v[1]], 0.0)?[0].clone()), &inputs);
        let leaves = inputs.map(|tensor| Var::constant(tensor.to_dtype(DType::F32).unwrap()));
        let at = |blend: f32| {
            let [y] = blended_linears(&Tape::evaluate(), &leaves[0], [&leaves[1]], blend).unwrap();
            y.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect::<Vec<_>>()
        };
        assert!(crate::ops::testing::distance(&at(1.0 - 1e-6), &at(1.0)) < 1e-5);
        assert!(crate::ops::testing::distance(&at(0.5), &at(1.0)) > 1e-2);
    }

    /// The straight-through gradient is not the derivative of the rounded function, so the two paths are checked against each other, and
    /// the reference's definition is what the header says.
    #[test]
    fn both_paths_agree() {
        let inputs = [gaussian("x", &[7, 40]), gaussian("a", &[20, 40])];
        check_fused(|tape, v| ternary_linear(tape, &v[0], &v[1]), &inputs, 1e-6);
    }
}
