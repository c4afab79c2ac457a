//! Softmax cross-entropy over a chunk of logits, with the gradient written over them. z-loss: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
//! lse = ln sum_v exp(l_v),  nll = lse - l_target,  loss = scale * sum_rows weight * (nll + z * lse^2)
//! dl_v = scale * weight * ((1 + 2 z lse) * exp(l_v - lse) - (v = target ? 1 : 0))
//! logits: `[rows, vocabulary]`   targets, weights, nll, lse: `[rows]`
//! Reads and writes f32; a row's exponentials are summed in 16 f32 lanes, rows are summed in f64 in order.

use super::math::{exp, ln};
use super::reduce::{self, LANES};
use crate::multiversion;
use rayon::prelude::*;

/// Sums over rows, not yet multiplied by the scale.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// Sum of weight * nll.
    pub nll: f64,
    /// Sum of weight * z * lse^2.
    pub z_loss: f64,
    /// Sum of weights.
    pub weight: f64,
}

impl std::ops::AddAssign for LossSums {
    fn add_assign(&mut self, other: Self) {
        self.nll += other.nll;
        self.z_loss += other.z_loss;
        self.weight += other.weight;
    }
}

/// What each row is compared with, and how much it counts.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// The token each row should predict, below the vocabulary's size where the weight is not 0.
    pub tokens: &'a [u32],
    /// 0 for rows that do not count, whose target is never looked at.
    pub weights: &'a [f32],
}

/// Negative log-likelihoods and log-sum-exps of each row (overwritten; 0 for rows of weight 0), and overwrites `logits` with the
/// gradient of the loss with respect to them. `z` is the factor of the z-loss, 0 for none.
///
/// # Panics
/// When lengths disagree, or a row that counts has a target outside the vocabulary.
pub fn cross_entropy(logits: &mut [f32], targets: Targets<'_>, scale: f32, z: f32, nll: &mut [f32], lse: &mut [f32]) -> LossSums {
    let vocabulary = check(logits.len(), targets, nll, lse);
    let rows = logits.par_chunks_mut(vocabulary).zip(nll.par_iter_mut().zip(lse.par_iter_mut())).enumerate();
    rows.for_each(|(row, (logits, (nll, lse)))| {
        let (target, weight) = (targets.tokens[row] as usize, targets.weights[row]);
        if weight == 0.0 {
            (*nll, *lse) = (0.0, 0.0);
            logits.fill(0.0);
        } else {
            (*nll, *lse) = differentiate_row(logits, target, scale * weight, z);
        }
    });
    sums(targets.weights, nll, lse, z)
}

/// [`cross_entropy`] without the gradient, for evaluation.
pub fn cross_entropy_loss(logits: &[f32], targets: Targets<'_>, z: f32, nll: &mut [f32], lse: &mut [f32]) -> LossSums {
    let vocabulary = check(logits.len(), targets, nll, lse);
    let rows = logits.par_chunks(vocabulary).zip(nll.par_iter_mut().zip(lse.par_iter_mut())).enumerate();
    rows.for_each(|(row, (logits, (nll, lse)))| {
        let counts = targets.weights[row] != 0.0;
        (*nll, *lse) = if counts { measure_row(logits, targets.tokens[row] as usize) } else { (0.0, 0.0) };
    });
    sums(targets.weights, nll, lse, z)
}

/// Checks lengths and returns the vocabulary's size (1 when there are no rows).
fn check(num_logits: usize, targets: Targets<'_>, nll: &[f32], lse: &[f32]) -> usize {
    let rows = targets.tokens.len();
    assert!([targets.weights.len(), nll.len(), lse.len()] == [rows; 3], "one target, weight, nll and lse per row");
    let vocabulary = num_logits.checked_div(rows).unwrap_or(0);
    assert!(num_logits == rows * vocabulary && (rows == 0 || vocabulary > 0), "{num_logits} logits are not {rows} rows");
    vocabulary.max(1)
}

fn sums(weights: &[f32], nll: &[f32], lse: &[f32], z: f32) -> LossSums {
    let mut total = LossSums::default();
    for ((weight, nll), lse) in weights.iter().zip(nll).zip(lse) {
        let [weight, nll, lse] = [*weight, *nll, *lse].map(f64::from);
        total += LossSums { nll: weight * nll, z_loss: weight * f64::from(z) * lse * lse, weight };
    }
    total
}

/// Logits whose exponentials are computed and then summed while they are in the first-level cache; whole chunks of lanes.
const PIECE: usize = 64 * LANES;

multiversion! {
    /// (nll, lse) of one row.
    fn measure_row(logits: &[f32], target: usize) -> (f32, f32) {
        let max = reduce::max(logits);
        let (mut lanes, mut exponentials) = ([0.0; LANES], [0.0; PIECE]);
        for piece in logits.chunks(PIECE) {
            let exponentials = &mut exponentials[..piece.len()];
            exponentials.iter_mut().zip(piece).for_each(|(exponential, logit)| *exponential = exp(logit - max));
            lanes = reduce::add_to(lanes, exponentials);
        }
        let log_sum = ln(reduce::join(lanes, |a, b| a + b));
        (log_sum + (max - logits[target]), max + log_sum)
    }
}

multiversion! {
    /// (nll, lse) of one row, whose logits become their gradient for a row factor `factor` = scale * weight.
    fn differentiate_row(logits: &mut [f32], target: usize, factor: f32, z: f32) -> (f32, f32) {
        let max = reduce::max(logits);
        let gap = max - logits[target];
        let mut lanes = [0.0; LANES];
        for piece in logits.chunks_mut(PIECE) {
            piece.iter_mut().for_each(|logit| *logit = exp(*logit - max));
            lanes = reduce::add_to(lanes, piece);
        }
        let sum = reduce::join(lanes, |a, b| a + b);
        let log_sum = ln(sum);
        let lse = max + log_sum;
        let slope = factor * (2.0 * z).mul_add(lse, 1.0) / sum;
        logits.iter_mut().for_each(|logit| *logit *= slope);
        logits[target] -= factor;
        (log_sum + gap, lse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_same_bits_everywhere, finite_differences, relative_error, uniform, widen};

    const Z: f32 = 0.1;
    const SCALE: f32 = 0.25;

    fn reference(logits: &[f64], vocabulary: usize, targets: Targets<'_>) -> f64 {
        let row = |(row, logits): (usize, &[f64])| {
            let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            let nll = lse - logits[targets.tokens[row] as usize % vocabulary];
            f64::from(SCALE) * f64::from(targets.weights[row]) * (nll + f64::from(Z) * lse * lse)
        };
        logits.chunks(vocabulary).enumerate().map(row).sum()
    }

    fn wide(seed: u64, len: usize) -> Vec<f32> {
        uniform(seed, len).iter().map(|x| 5.0 * x).collect()
    }

    #[test]
    fn loss_and_gradient_match_the_reference() {
        for vocabulary in [1, 15, 16, 33, 101, 1025] {
            let tokens = [0, 7, u32::MAX, 100].map(|t: u32| if t == u32::MAX { t } else { t % vocabulary as u32 });
            let targets = Targets { tokens: &tokens, weights: &[1.0, 0.5, 0.0, 2.0] };
            let logits = wide(1, 4 * vocabulary);
            let exact = |logits: &[f64]| reference(logits, vocabulary, targets);
            let mut gradient = logits.clone();
            let (mut nll, mut lse) = ([9.0; 4], [9.0; 4]);
            let total = cross_entropy(&mut gradient, targets, SCALE, Z, &mut nll, &mut lse);
            let loss = f64::from(SCALE) * (total.nll + total.z_loss);
            assert!((loss - exact(&widen(&logits))).abs() < 1e-5 * loss.abs().max(1.0));
            assert!(relative_error(&gradient, &finite_differences(&widen(&logits), exact)) < 1e-5, "{vocabulary}");
            assert_eq!((total.weight, nll[2], lse[2]), (3.5, 0.0, 0.0));
            assert!(gradient[2 * vocabulary..3 * vocabulary].iter().all(|g| *g == 0.0));
            let (mut nll_only, mut lse_only) = ([9.0; 4], [9.0; 4]);
            let measured = cross_entropy_loss(&logits, targets, Z, &mut nll_only, &mut lse_only);
            assert_eq!((measured, nll_only, lse_only), (total, nll, lse));
        }
    }

    #[test]
    fn large_logits_neither_overflow_nor_hide_faults() {
        let targets = Targets { tokens: &[1], weights: &[1.0] };
        let (mut nll, mut lse) = ([0.0], [0.0]);
        cross_entropy(&mut [1e4, -1e4, 0.0], targets, 1.0, 0.0, &mut nll, &mut lse);
        assert_eq!((nll, lse), ([2e4], [1e4]));
        for fault in [f32::NAN, f32::INFINITY] {
            let total = cross_entropy(&mut [0.0, 1.0, fault], targets, 1.0, 0.0, &mut nll, &mut lse);
            assert!(!total.nll.is_finite());
        }
    }

    #[test]
    fn no_rows_are_no_work() {
        let targets = Targets { tokens: &[], weights: &[] };
        assert_eq!(cross_entropy(&mut [], targets, 1.0, 0.0, &mut [], &mut []), LossSums::default());
    }

    #[test]
    fn same_bits_everywhere() {
        let (rows, vocabulary) = (9, 1003);
        let logits = wide(2, rows * vocabulary);
        let tokens: Vec<u32> = (0..rows as u32).map(|row| row * 100).collect();
        let weights = uniform(3, rows);
        assert_same_bits_everywhere(|| {
            let (mut gradient, mut nll, mut lse) = (logits.clone(), vec![0.0; rows], vec![0.0; rows]);
            let total = cross_entropy(&mut gradient, Targets { tokens: &tokens, weights: &weights }, SCALE, Z, &mut nll, &mut lse);
            gradient.extend([total.nll as f32, total.z_loss as f32]);
            [gradient, nll, lse].concat()
        });
    }
}
