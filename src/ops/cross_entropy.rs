//! Head and cross-entropy in chunks of rows, with z-loss (Chowdhery et al. 2022, arXiv:2204.02311, section 5).
//! z_r = x_r W^T, L_r = log sum_v exp(z_rv);  loss = scale * sum_r weight_r (L_r - z_r,target + zeta L_r^2)
//! dz_rv = scale weight_r (softmax(z_r)_v (1 + 2 zeta L_r) - [v = target]);  dx = dz W,  dW = dz^T x
//! x: [rows, d]   W: [vocab, d]   targets, weights: \[rows]   weight 0 ignores a row
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
    let pass =
        if tape.fuses(x.tensor()) { fused(x.tensor(), weight, targets, train)? } else { reference(x.tensor(), weight, targets, train)? };
    let weighted_nll = pass.nll.iter().zip(targets.weights).map(|(&nll, &w)| f64::from(nll) * f64::from(w)).sum::<f64>();
    let value = Tensor::new((weighted_nll * f64::from(scale)) as f32, x.tensor().device())?;
    let gradients = pass.gradients;
    let targets = [x.target(), weight.target()];
    let [root] = tape.record(&[x, weight], [value], move |flow, _| {
        let Some((d_x, d_weight)) = gradients else { return Ok(()) };
        if let Some(d_weight) = d_weight {
            flow.add(targets[1], d_weight)?;
        }
        flow.add(targets[0], d_x)
    });
    Ok(Loss { root, weighted_nll, nll: pass.nll })
}

struct Pass {
    nll: Vec<f32>,
    /// Of x, and of W where it is trained.
    gradients: Option<(Tensor, Option<Tensor>)>,
}

/// Rows that count nothing cost nothing: under a loss on answers only, prompts have no logits.
fn fused(x: &Tensor, weight: &Var, targets: Targets<'_>, train: bool) -> Result<Pass> {
    let counted: Vec<usize> = (0..targets.weights.len()).filter(|&row| targets.weights[row] != 0.0).collect();
    if counted.len() == targets.weights.len() {
        return every_row(x, weight, targets, train);
    }
    let (rows, width) = x.dims2()?;
    let (ids, weights): (Vec<u32>, Vec<f32>) = counted.iter().map(|&row| (targets.ids[row], targets.weights[row])).unzip();
    let data = host(x)?;
    let mut chosen = Vec::with_capacity(counted.len() * width);
    counted.iter().for_each(|&row| chosen.extend_from_slice(&data[row * width..][..width]));
    let chosen = from_vec(chosen, (counted.len(), width))?;
    let pass = every_row(&chosen, weight, Targets { ids: &ids, weights: &weights, ..targets }, train)?;
    let mut nll = buffer(rows);
    counted.iter().zip(&pass.nll).for_each(|(&row, &value)| nll[row] = value);
    let Some((d_chosen, d_weight)) = pass.gradients else { return Ok(Pass { nll, gradients: None }) };
    let mut d_x = buffer(rows * width);
    let d_chosen = host(&d_chosen)?;
    counted.iter().zip(d_chosen.chunks_exact(width)).for_each(|(&row, from)| d_x[row * width..][..width].copy_from_slice(from));
    Ok(Pass { nll, gradients: Some((from_vec(d_x, (rows, width))?, d_weight)) })
}

fn every_row(x: &Tensor, weight: &Var, targets: Targets<'_>, train: bool) -> Result<Pass> {
    let ((rows, width), (vocab, _)) = (x.dims2()?, weight.tensor().dims2()?);
    let (x_data, w_data) = (host(x)?, host(weight.tensor())?);
    let matrix = Matrix::row_major(&w_data, vocab, width);
    let (mut nll, mut log_sum_exp) = (buffer(rows), buffer(CHUNK));
    let mut logits = buffer(CHUNK.min(rows) * vocab);
    let train_weight = train && weight.needs_gradient();
    let mut d_x = if train { buffer(rows * width) } else { vec![] };
    let mut d_weight = if train_weight { buffer(vocab * width) } else { vec![] };
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
        if train_weight {
            gemm(d_logits.transposed(), &chunk, &mut d_weight, width, first > 0);
        }
    }
    let d_weight = if train_weight { Some(from_vec(d_weight, (vocab, width))?) } else { None };
    let gradients = if train { Some((from_vec(d_x, (rows, width))?, d_weight)) } else { None };
    Ok(Pass { nll, gradients })
}

fn reference(x: &Tensor, weight: &Var, targets: Targets<'_>, train: bool) -> Result<Pass> {
    let (rows, matrix, device) = (x.dim(0)?, weight.tensor(), x.device());
    let (mut nll, mut d_x, mut d_weight) = (Vec::with_capacity(rows), vec![], None::<Tensor>);
    let train_weight = train && weight.needs_gradient();
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
            if !train_weight {
                continue;
            }
            let part = d_logits.t()?.matmul(&chunk)?;
            d_weight = Some(match d_weight {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
    }
    let gradients = if d_x.is_empty() { None } else { Some((Tensor::cat(&d_x, 0)?, d_weight)) };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{distance, gaussian};
    use crate::tape::Gradients;

    const ROWS: usize = 9;
    const VOCAB: usize = 11;
    const WIDTH: usize = 5;
    const SCALE: f32 = 0.125;

    struct Sink([Tensor; 2]);

    impl Gradients for Sink {
        fn slot(&mut self, index: usize) -> (Tensor, bool) {
            (self.0[index].clone(), false)
        }

        fn finished(&mut self, _: usize) -> Result<()> {
            Ok(())
        }
    }

    fn targets() -> (Vec<u32>, Vec<f32>) {
        ((0..ROWS as u32).map(|i| (i * 5) % 11).collect(), (0..ROWS).map(|i| [1.0, 0.0, 0.5][i % 3]).collect())
    }

    /// The formula of the header, term by term.
    fn objective(x: &[f64], weight: &[f64], z_loss: f64) -> f64 {
        let (ids, weights) = targets();
        let row = |r: usize| {
            let logits: Vec<f64> = (0..VOCAB).map(|v| (0..WIDTH).map(|k| x[r * WIDTH + k] * weight[v * WIDTH + k]).sum()).collect();
            let normalizer = logits.iter().map(|z: &f64| z.exp()).sum::<f64>().ln();
            f64::from(weights[r]) * (normalizer - logits[ids[r] as usize] + z_loss * normalizer * normalizer)
        };
        f64::from(SCALE) * (0..ROWS).map(row).sum::<f64>()
    }

    fn slopes(values: [&[f64]; 2], which: usize, z_loss: f64) -> Vec<f64> {
        let at = |element: usize, delta: f64| {
            let mut moved = [values[0].to_vec(), values[1].to_vec()];
            moved[which][element] += delta;
            objective(&moved[0], &moved[1], z_loss)
        };
        (0..values[which].len()).map(|i| (at(i, 1e-5) - at(i, -1e-5)) / 2e-5).collect()
    }

    #[test]
    fn loss_and_gradients_of_both_paths_match_central_differences() {
        let (x, weight) = (gaussian("x", &[ROWS, WIDTH]), gaussian("w", &[VOCAB, WIDTH]));
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (x_values, w_values) = (wide(&x), wide(&weight));
        let (ids, weights) = targets();
        for (tape, z_loss) in [(Tape::new(), 0.01f32), (Tape::new().reference(), 0.01), (Tape::new(), 0.0)] {
            let narrow = [x.to_dtype(DType::F32).unwrap(), weight.to_dtype(DType::F32).unwrap()];
            let leaves = [Var::parameter(0, narrow[0].clone()), Var::parameter(1, narrow[1].clone())];
            let aims = Targets { ids: &ids, weights: &weights, scale: SCALE, z_loss };
            let loss = linear_cross_entropy(&tape, &leaves[0], &leaves[1], aims).unwrap();
            let mut sink = Sink(narrow.map(|t| t.zeros_like().unwrap()));
            let expected = objective(&x_values, &w_values, 0.0);
            assert!((loss.weighted_nll * f64::from(SCALE) - expected).abs() < 1e-6 * expected.abs());
            tape.backward(&loss.root, Tensor::new(1.0f32, &candle_core::Device::Cpu).unwrap(), &mut sink).unwrap();
            for (which, found) in sink.0.iter().enumerate() {
                let error = distance(&wide(found), &slopes([&x_values, &w_values], which, f64::from(z_loss)));
                assert!(error < 2e-6, "gradient {which}: {error:.1e}");
            }
        }
    }

    #[test]
    fn evaluation_gives_the_same_losses_as_training() {
        let x = gaussian("x", &[ROWS, WIDTH]).to_dtype(DType::F32).unwrap();
        let weight = Var::parameter(0, gaussian("w", &[VOCAB, WIDTH]).to_dtype(DType::F32).unwrap());
        let (ids, weights) = targets();
        let aims = Targets { ids: &ids, weights: &weights, scale: SCALE, z_loss: 0.0 };
        let losses = |tape: Tape<'_>| linear_cross_entropy(&tape, &Var::constant(x.clone()), &weight, aims).unwrap().nll;
        assert_eq!(losses(Tape::new()), losses(Tape::evaluate()));
    }
}
