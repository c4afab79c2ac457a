//! Root-mean-square normalization with the residual add before it. Zhang & Sennrich 2019, arXiv:1910.07467.
//! s = x + residual,  n = r * s,  y = g * n,  r = 1/sqrt(mean(s^2) + eps)
//! ds = incoming + r * (g*dy - n * mean(g*dy*n)),  dg = sum_rows(dy*n)   (for a scalar gain summed over the width too)
//! x, s, y: `[rows, d]`   g: `[d]` or `[1]`   r: `[rows]`   d width: the model's, or a head's for QK-norm (rows = tokens * heads)
//! Reads, accumulates and writes f32.

use super::reduce;
use crate::multiversion;
use rayon::prelude::*;

/// Rows whose share of the gain's gradient is summed before the shares are added up in order, so that the sum does not depend
/// on the number of threads.
pub const ROW_BLOCK: usize = 64;

/// y = g * n and rstd = r; overwrites both. With `residual` = (residual, sum) it first writes sum = x + residual, [rows, width],
/// and normalizes that; without it x itself is normalized and takes the place of the sum in [`rms_norm_backward`].
/// `gain` has `width` elements or one; `rstd` has one per row.
pub fn rms_norm_forward(
    width: usize,
    epsilon: f32,
    x: &[f32],
    residual: Option<(&[f32], &mut [f32])>,
    gain: &[f32],
    y: &mut [f32],
    rstd: &mut [f32],
) {
    let rows = rstd.len();
    assert!(width > 0 && x.len() == rows * width && y.len() == x.len() && (gain.len() == width || gain.len() == 1));
    let block = ROW_BLOCK * width;
    let Some((residual, sum)) = residual else {
        let run = |((x, y), rstd): ((&[f32], &mut [f32]), &mut [f32])| normalize_rows(width, epsilon, x, gain, y, rstd);
        if rows <= ROW_BLOCK {
            return run(((x, y), rstd));
        }
        return x.par_chunks(block).zip(y.par_chunks_mut(block)).zip(rstd.par_chunks_mut(ROW_BLOCK)).for_each(run);
    };
    assert!(residual.len() == x.len() && sum.len() == x.len());
    if rows <= ROW_BLOCK {
        return add_and_normalize_rows(width, epsilon, x, residual, sum, gain, y, rstd);
    }
    let inputs = x.par_chunks(block).zip(residual.par_chunks(block));
    let blocks = inputs.zip(sum.par_chunks_mut(block)).zip(y.par_chunks_mut(block)).zip(rstd.par_chunks_mut(ROW_BLOCK));
    blocks.for_each(|((((x, residual), sum), y), rstd)| add_and_normalize_rows(width, epsilon, x, residual, sum, gain, y, rstd));
}

/// Gradients given `sum` (what was normalized) and `rstd` from the forward pass. Overwrites `dx`, the gradient of the sum and so of x and
/// of the residual alike, adding to it `incoming`, the gradient that reaches the sum by the residual stream. Accumulates into `d_gain`
/// (as long as `gain`).
#[allow(clippy::too_many_arguments)]
pub fn rms_norm_backward(
    width: usize,
    dy: &[f32],
    incoming: Option<&[f32]>,
    sum: &[f32],
    rstd: &[f32],
    gain: &[f32],
    dx: &mut [f32],
    d_gain: &mut [f32],
) {
    let rows = rstd.len();
    assert!(
        width > 0 && [dy.len(), sum.len(), dx.len()] == [rows * width; 3] && incoming.is_none_or(|incoming| incoming.len() == dy.len())
    );
    assert!((gain.len() == width || gain.len() == 1) && d_gain.len() == gain.len());
    let block = ROW_BLOCK * width;
    let mut shares = vec![0.0; rows.div_ceil(ROW_BLOCK) * gain.len()];
    let run = |(index, (dx, share)): (usize, (&mut [f32], &mut [f32]))| {
        let rows = index * ROW_BLOCK..(index * ROW_BLOCK + ROW_BLOCK).min(rows);
        let elements = rows.start * width..rows.end * width;
        let incoming = incoming.map_or(&[][..], |incoming| &incoming[elements.clone()]);
        backward_rows(width, &dy[elements.clone()], incoming, &sum[elements], &rstd[rows], gain, dx, share);
    };
    if rows <= ROW_BLOCK {
        dx.chunks_mut(block).zip(shares.chunks_mut(gain.len())).enumerate().for_each(run);
    } else {
        dx.par_chunks_mut(block).zip(shares.par_chunks_mut(gain.len())).enumerate().for_each(run);
    }
    for share in shares.chunks(gain.len()) {
        d_gain.iter_mut().zip(share).for_each(|(total, share)| *total += share);
    }
}

#[inline(always)]
fn normalize_row(epsilon: f32, x: &[f32], gain: &[f32], y: &mut [f32]) -> f32 {
    let rstd = 1.0 / (reduce::sum_of_squares(x) / x.len() as f32 + epsilon).sqrt();
    match gain {
        [gain] => y.iter_mut().zip(x).for_each(|(y, x)| *y = x * rstd * gain),
        _ => y.iter_mut().zip(x).zip(gain).for_each(|((y, x), gain)| *y = x * rstd * gain),
    }
    rstd
}

multiversion! {
    fn normalize_rows(width: usize, epsilon: f32, x: &[f32], gain: &[f32], y: &mut [f32], rstd: &mut [f32]) {
        for ((x, y), rstd) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(rstd) {
            *rstd = normalize_row(epsilon, x, gain, y);
        }
    }
}

multiversion! {
    fn add_and_normalize_rows(
        width: usize, epsilon: f32, x: &[f32], residual: &[f32], sum: &mut [f32], gain: &[f32], y: &mut [f32], rstd: &mut [f32],
    ) {
        let inputs = x.chunks_exact(width).zip(residual.chunks_exact(width));
        for ((((x, residual), sum), y), rstd) in inputs.zip(sum.chunks_exact_mut(width)).zip(y.chunks_exact_mut(width)).zip(rstd) {
            sum.iter_mut().zip(x).zip(residual).for_each(|((sum, x), residual)| *sum = x + residual);
            *rstd = normalize_row(epsilon, sum, gain, y);
        }
    }
}

multiversion! {
    fn backward_rows(
        width: usize, dy: &[f32], incoming: &[f32], sum: &[f32], rstd: &[f32], gain: &[f32], dx: &mut [f32], d_gain: &mut [f32],
    ) {
        for (row, rstd) in rstd.iter().enumerate() {
            let elements = row * width..(row + 1) * width;
            let (dy, sum, dx) = (&dy[elements.clone()], &sum[elements.clone()], &mut dx[elements.clone()]);
            // n * mean(g*dy*n) = sum * projection.
            let project = |dot: f32| dot * rstd / width as f32 * rstd;
            match (gain, &mut *d_gain) {
                ([gain], [d_gain]) => {
                    let dot = reduce::dot(dy, sum);
                    let projection = project(gain * dot);
                    dx.iter_mut().zip(dy).zip(sum).for_each(|((dx, dy), sum)| *dx = (gain * dy - sum * projection) * rstd);
                    *d_gain = dot.mul_add(*rstd, *d_gain);
                }
                (gain, d_gain) => {
                    let projection = project(reduce::weighted_dot(gain, dy, sum));
                    let outputs = dx.iter_mut().zip(d_gain);
                    for ((((dx, d_gain), dy), sum), gain) in outputs.zip(dy).zip(sum).zip(gain) {
                        *dx = (gain * dy - sum * projection) * rstd;
                        *d_gain = (sum * rstd).mul_add(*dy, *d_gain);
                    }
                }
            }
            if !incoming.is_empty() {
                dx.iter_mut().zip(&incoming[elements]).for_each(|(dx, incoming)| *dx += incoming);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::testing::{assert_same_bits_everywhere, finite_differences, relative_error, uniform, weigh, widen};

    const EPSILON: f32 = 1e-5;

    fn reference(width: usize, sum: &[f64], gain: &[f64]) -> Vec<f64> {
        let normalize = |row: &[f64]| {
            let scale = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + f64::from(EPSILON)).sqrt();
            let gains = gain.iter().cycle();
            row.iter().zip(gains).map(|(x, gain)| x * scale * gain).collect::<Vec<_>>()
        };
        sum.chunks(width).flat_map(normalize).collect()
    }

    fn check(rows: usize, width: usize, gains: usize) {
        let (x, residual, dy) = (uniform(1, rows * width), uniform(2, rows * width), uniform(3, rows * width));
        let (gain, incoming) = (uniform(4, gains), uniform(5, rows * width));
        let (mut sum, mut y, mut rstd) = (vec![9.0; x.len()], vec![9.0; x.len()], vec![9.0; rows]);
        rms_norm_forward(width, EPSILON, &x, Some((&residual, &mut sum)), &gain, &mut y, &mut rstd);
        assert!(sum.iter().zip(x.iter().zip(&residual)).all(|(sum, (x, residual))| *sum == x + residual));
        let (sum64, gain64, dy64) = (widen(&sum), widen(&gain), widen(&dy));
        assert!(relative_error(&y, &reference(width, &sum64, &gain64)) < 1e-6);
        let mut plain = vec![9.0; x.len()];
        rms_norm_forward(width, EPSILON, &sum, None, &gain, &mut plain, &mut rstd);
        assert_eq!(plain, y);

        let (mut dx, mut d_gain) = (vec![9.0; x.len()], vec![0.5; gains]);
        rms_norm_backward(width, &dy, Some(&incoming), &sum, &rstd, &gain, &mut dx, &mut d_gain);
        let by_sum = finite_differences(&sum64, |sum| weigh(&reference(width, sum, &gain64), &dy64) + weigh(sum, &widen(&incoming)));
        let by_gain = finite_differences(&gain64, |gain| weigh(&reference(width, &sum64, gain), &dy64));
        assert!(relative_error(&dx, &by_sum) < 1e-5, "{rows} {width} {gains}");
        let gained: Vec<f32> = d_gain.iter().map(|g| g - 0.5).collect();
        assert!(relative_error(&gained, &by_gain) < 1e-4, "{rows} {width} {gains}");
        let mut bare = vec![9.0; x.len()];
        rms_norm_backward(width, &dy, None, &sum, &rstd, &gain, &mut bare, &mut d_gain);
        assert!(bare.iter().zip(&incoming).zip(&dx).all(|((bare, incoming), dx)| bare + incoming == *dx));
    }

    #[test]
    fn forward_and_backward_match_the_reference() {
        for (rows, width) in [(3, 1), (3, 8), (2, 16), (5, 37), (3, 64), (67, 6)] {
            check(rows, width, width);
            check(rows, width, 1);
        }
    }

    #[test]
    fn same_bits_everywhere() {
        for (width, gains) in [(37, 37), (48, 48), (40, 1)] {
            let rows = 3 * ROW_BLOCK + 5;
            let (x, dy, gain) = (uniform(6, rows * width), uniform(7, rows * width), uniform(8, gains));
            assert_same_bits_everywhere(|| {
                let (mut sum, mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; rows]);
                rms_norm_forward(width, EPSILON, &x, Some((&dy, &mut sum)), &gain, &mut y, &mut rstd);
                let (mut dx, mut d_gain) = (vec![0.0; x.len()], vec![0.0; gains]);
                rms_norm_backward(width, &dy, Some(&x), &sum, &rstd, &gain, &mut dx, &mut d_gain);
                [sum, y, rstd, dx, d_gain].concat()
            });
        }
    }

    #[test]
    fn no_rows_are_no_work() {
        rms_norm_forward(4, EPSILON, &[], None, &[1.0], &mut [], &mut []);
        rms_norm_backward(4, &[], None, &[], &[], &[1.0], &mut [], &mut [0.0]);
    }
}
