//! A low-rank map added to another map's output. LoRA: Hu et al. 2021, arXiv:2106.09685.
//! z = y + s (x A^T) B^T;  dy = dz,  du = s dz B,  dA = du^T x,  dB = dz^T (s x A^T),  dx = du A
//! x: [rows, in]   A: [rank, in]   B: [out, rank]   y, z: [rows, out]
//! f32. Fused path: z takes over the storage of y and continues its chains; the engine adds in the same order.

use super::cpu::gemm::{Matrix, gemm};
use super::host::{self, buffer, from_vec, host};
use super::linear::weight_gradient;
use crate::tape::{Tape, Var};
use candle_core::{Result, Tensor};

/// Adds `scale * (x A^T) B^T` to `y`, a value that nothing else reads.
pub fn add_low_rank<'a>(tape: &Tape<'a>, x: &Var, y: Var, [a, b]: [&Var; 2], scale: f32) -> Result<Var> {
    let fused = tape.fuses(x.tensor());
    let inner = if fused { project(x.tensor(), a.tensor(), scale)? } else { (x.tensor().matmul(&a.tensor().t()?)? * f64::from(scale))? };
    let z = if fused { add_in_place(&inner, b.tensor(), y.tensor())? } else { (y.tensor() + inner.matmul(&b.tensor().t()?)?)? };
    let inputs = [x, &y, a, b];
    let (kept_x, kept_a, kept_b, y_target) = (x.clone(), a.clone(), b.clone(), y.target());
    let [z] = tape.record(&inputs, [z], move |flow, [d_z]| {
        let Some(d_z) = d_z else { return Ok(()) };
        flow.add_shared(y_target, &d_z)?;
        let d_inner =
            if fused { transpose_product(&d_z, kept_b.tensor(), scale)? } else { (d_z.matmul(kept_b.tensor())? * f64::from(scale))? };
        if fused {
            weight_gradient(flow, kept_a.target(), &d_inner, kept_x.tensor())?;
            weight_gradient(flow, kept_b.target(), &d_z, &inner)?;
        } else {
            flow.add(&kept_a, d_inner.t()?.matmul(kept_x.tensor())?)?;
            flow.add(&kept_b, d_z.t()?.matmul(&inner)?)?;
        }
        if !kept_x.needs_gradient() {
            return Ok(());
        }
        let d_x = if fused { transpose_product(&d_inner, kept_a.tensor(), 1.0)? } else { d_inner.matmul(kept_a.tensor())? };
        flow.add(&kept_x, d_x)
    });
    Ok(z)
}

/// The same on slices, as an engine applies it: y += scale (x A^T) B^T. x: [rows, in], a: [rank, in], b: [out, rank], y: [rows, out].
///
/// # Panics
/// When the lengths disagree.
pub fn low_rank_forward(x: &[f32], a: &[f32], b: &[f32], rank: usize, scale: f32, y: &mut [f32]) {
    let (width, out) = (a.len() / rank, b.len() / rank);
    let rows = x.len() / width;
    let mut inner = buffer(rows * rank);
    gemm(Matrix::row_major(x, rows, width), &Matrix::row_major(a, rank, width).transposed(), &mut inner, rank, false);
    inner.iter_mut().for_each(|value| *value *= scale);
    gemm(Matrix::row_major(&inner, rows, rank), &Matrix::row_major(b, out, rank).transposed(), y, out, true);
}

fn project(x: &Tensor, a: &Tensor, scale: f32) -> Result<Tensor> {
    let ((rows, width), (rank, _)) = (x.dims2()?, a.dims2()?);
    let mut inner = buffer(rows * rank);
    gemm(Matrix::row_major(&host(x)?, rows, width), &Matrix::row_major(&host(a)?, rank, width).transposed(), &mut inner, rank, false);
    inner.iter_mut().for_each(|value| *value *= scale);
    from_vec(inner, (rows, rank))
}

fn add_in_place(inner: &Tensor, b: &Tensor, y: &Tensor) -> Result<Tensor> {
    let ((rows, rank), (out, _)) = (inner.dims2()?, b.dims2()?);
    let (inner, b) = (host(inner)?, host(b)?);
    host::write(y, |y| gemm(Matrix::row_major(&inner, rows, rank), &Matrix::row_major(&b, out, rank).transposed(), y, out, true))?;
    Ok(y.clone())
}

/// scale * g W.
fn transpose_product(gradient: &Tensor, weight: &Tensor, scale: f32) -> Result<Tensor> {
    let ((rows, out), (_, width)) = (gradient.dims2()?, weight.dims2()?);
    let mut product = buffer(rows * width);
    gemm(Matrix::row_major(&host(gradient)?, rows, out), &Matrix::row_major(&host(weight)?, out, width), &mut product, width, false);
    if scale != 1.0 {
        product.iter_mut().for_each(|value| *value *= scale);
    }
    from_vec(product, (rows, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::linear::linear;
    use crate::ops::testing::{check, gaussian};
    use candle_core::DType;

    #[test]
    fn gradients() {
        let inputs = [gaussian("x", &[7, 5]), gaussian("w", &[6, 5]), gaussian("a", &[2, 5]), gaussian("b", &[6, 2])];
        check(
            |tape, v| {
                let y = linear(tape, &v[0], &v[1])?;
                add_low_rank(tape, &v[0], y, [&v[2], &v[3]], 0.5)
            },
            &inputs,
        );
    }

    #[test]
    fn the_engine_adds_the_same_bits() {
        let [x, y, a, b] = [("x", [9, 70]), ("y", [9, 33]), ("a", [4, 70]), ("b", [33, 4])]
            .map(|(name, shape)| gaussian(name, &shape).to_dtype(DType::F32).unwrap());
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let mut engine = values(&y);
        low_rank_forward(&values(&x), &values(&a), &values(&b), 4, 1.7, &mut engine);
        let leaves = [x, y, a, b].map(Var::constant);
        let z = add_low_rank(&Tape::evaluate(), &leaves[0], leaves[1].clone(), [&leaves[2], &leaves[3]], 1.7).unwrap();
        assert_eq!(engine, values(z.tensor()));
    }
}
