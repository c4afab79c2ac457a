//! Head and cross-entropy in chunks of rows, with z-loss (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
//! z_r = x_r W^T, L_r = log sum_v exp(z_rv);  loss = scale * sum_r weight_r (L_r - z_r,target + zeta L_r^2)
//! dz_rv = scale weight_r (softmax(z_r)_v (1 + 2 zeta L_r) - [v = target]);  dx = dz W,  dW = dz^T x
//! x: [rows, d]   W: [vocab, d]   targets, weights: [rows]   weight 0 ignores a row
//! f32, sums of losses in f64. The logits of one chunk are all that is ever in memory; gradients are made in the same pass.

use super::cpu::cross_entropy::{self as kernel, cross_entropy, cross_entropy_loss};
use super::cpu::gemm::{Matrix, gemm};
use super::host::{buffer, from_vec, host, is_host};
use crate::tape::{Tape, Var};
use candle_core::{D, DType, Result, Tensor};

/// Rows whose logits are formed at a time.
const CHUNK: usize = 256;

/// What each row should predict.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'t> {
    pub ids: &'t [u32],
    /// Share of each row in the loss; 0 ignores it.
    pub weights: &'t [f32],
    /// Factor of the weighted sum: one over the tokens of the whole optimizer step.
    pub scale: f32,
    /// Coefficient zeta of the z-loss.
    pub z_loss: f32,
}

/// Loss of a batch.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The scalar to start the backward pass from (its gradient is made for a seed of 1).
    pub root: Var,
    /// Sum over rows of weight times negative log-likelihood, in nats, unscaled and without z-loss.
    pub weighted_nll: f64,
    /// Negative log-likelihood of every row, in nats (0 for ignored rows).
    pub nll: Vec<f32>,
}

/// Cross-entropy of `x W^T` against `targets`.
pub fn linear_cross_entropy<'a>(tape: &Tape<'a>, x: &Var, weight: &Var, targets: Targets<'_>) -> Result<Loss> {
    let scale = targets.scale;
    let train = tape.records(&[x, weight]);
    let pass = if tape.fuses(x.tensor()) { fused(x.tensor(), weight, targets, train)? } else { reference(x.tensor(), weight, targets, train)? };
    let weighted_nll = pass.nll.iter().zip(targets.weights).map(|(&nll, &w)| f64::from(nll) * f64::from(w)).sum::<f64>();
    let value = Tensor::new((weighted_nll * f64::from(scale)) as f32, x.tensor().device())?;
    let gradients = pass.gradients;
    let targets = [x.target(), weight.target()];
    let [root] = tape.record(&[x, weight], [value], move |flow, _| {
        let Some((d_x, d_weight)) = gradients else { return Ok(()) };
        flow.add(targets[1], d_weight)?;
        flow.add(targets[0], d_x)
    });
    Ok(Loss { root, weighted_nll, nll: pass.nll })
}

struct Pass {
    nll: Vec<f32>,
    gradients: Option<(Tensor, Tensor)>,
}

fn fused(x: &Tensor, weight: &Var, targets: Targets<'_>, train: bool) -> Result<Pass> {
    let ((rows, width), (vocab, _)) = (x.dims2()?, weight.tensor().dims2()?);
    let (x_data, w_data) = (host(x)?, host(weight.tensor())?);
    let matrix = Matrix::row_major(&w_data, vocab, width);
    let (mut nll, mut log_sum_exp) = (buffer(rows), buffer(CHUNK));
    let mut logits = buffer(CHUNK.min(rows) * vocab);
    let (mut d_x, mut d_weight) = if train { (buffer(rows * width), buffer(vocab * width)) } else { (vec![], vec![]) };
    for first in (0..rows).step_by(CHUNK) {
        let count = CHUNK.min(rows - first);
        let span = first..first + count;
        let chunk = Matrix::row_major(&x_data[first * width..][..count * width], count, width);
        let logits = &mut logits[..count * vocab];
        gemm(chunk, &matrix.transposed(), logits, vocab, false);
        let aims = kernel::Targets { tokens: &targets.ids[span.clone()], weights: &targets.weights[span.clone()] };
        if !train {
            cross_entropy_loss(logits, aims, targets.z_loss, &mut nll[span], &mut log_sum_exp[..count]);
            continue;
        }
        cross_entropy(logits, aims, targets.scale, targets.z_loss, &mut nll[span], &mut log_sum_exp[..count]);
        let d_logits = Matrix::row_major(logits, count, vocab);
        gemm(d_logits, &matrix, &mut d_x[first * width..][..count * width], width, false);
        gemm(d_logits.transposed(), &chunk, &mut d_weight, width, first > 0);
    }
    let gradients = if train { Some((from_vec(d_x, (rows, width))?, from_vec(d_weight, (vocab, width))?)) } else { None };
    Ok(Pass { nll, gradients })
}

fn reference(x: &Tensor, weight: &Var, targets: Targets<'_>, train: bool) -> Result<Pass> {
    let (rows, matrix, device) = (x.dim(0)?, weight.tensor(), x.device());
    let (mut nll, mut d_x, mut d_weight) = (Vec::with_capacity(rows), vec![], None::<Tensor>);
    for first in (0..rows).step_by(CHUNK) {
        let count = CHUNK.min(rows - first);
        let ids = Tensor::from_slice(&targets.ids[first..first + count], (count, 1), device)?;
        let weights = Tensor::from_slice(&targets.weights[first..first + count], (count, 1), device)?;
        let chunk = x.narrow(0, first, count)?;
        let logits = chunk.matmul(&matrix.t()?)?;
        let top = logits.max_keepdim(D::Minus1)?;
        let exponentials = logits.broadcast_sub(&top)?.exp()?;
        let total = exponentials.sum_keepdim(D::Minus1)?;
        let log_sum_exp = (total.log()? + top)?;
        let row_nll = (&log_sum_exp - logits.gather(&ids, 1)?)?;
        let counted = weights.ne(0.0)?.to_dtype(DType::F32)?;
        nll.extend((row_nll * counted)?.flatten_all()?.to_vec1::<f32>()?);
        if train {
            let factor = (weights * f64::from(targets.scale))?;
            let spread = (&log_sum_exp * (2.0 * f64::from(targets.z_loss)))? + 1.0;
            let softmax = exponentials.broadcast_div(&total)?.broadcast_mul(&(spread? * &factor)?)?;
            let d_logits = softmax.scatter_add(&ids, &factor.neg()?, 1)?;
            d_x.push(d_logits.matmul(matrix)?);
            let part = d_logits.t()?.matmul(&chunk)?;
            d_weight = Some(match d_weight {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
    }
    let gradients = match d_weight {
        Some(d_weight) => Some((Tensor::cat(&d_x, 0)?, d_weight)),
        None => None,
    };
    Ok(Pass { nll, gradients })
}

/// Logits of a few rows, `[rows, vocab]`; for callers that need the whole distribution.
pub fn logits(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !is_host(x) {
        return x.matmul(&weight.t()?);
    }
    let ((rows, width), (vocab, _)) = (x.dims2()?, weight.dims2()?);
    let (x, weight) = (host(x)?, host(weight)?);
    let mut values = buffer(rows * vocab);
    gemm(Matrix::row_major(&x, rows, width), &Matrix::row_major(&weight, vocab, width).transposed(), &mut values, vocab, false);
    from_vec(values, (rows, vocab))
}
