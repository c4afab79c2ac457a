//! Newton-Schulz orthogonalization: every singular value of a matrix is driven towards one, its singular vectors are kept.
//! Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Bernstein & Newhouse 2024, arXiv:2409.20325.
//! x <- x / max(|x|_F, 1e-7);  repeat: A = x x^T,  x <- (a I + b A + c A A) x;   x: [short, long], tall matrices transposed
//! Everything in f32. Both products of a matrix with its own transpose are symmetric, so only the blocks on and below the
//! diagonal are computed: T (3 n^2 m + n^3) operations instead of T (4 n^2 m + 2 n^3) for n = short, m = long, T steps.

use super::coefficients::Coefficients;
use super::reduce::sum_of_squares;
use super::rule::NotFinite;
use crate::ops::cpu::gemm::{Matrix, gemm};

/// Lower bound of the norm that is divided by, as in `torch.optim.Muon`: a zero matrix stays zero.
const SMALLEST_NORM: f64 = 1e-7;

/// Rows of a symmetric product computed at a time. Smaller saves more of the upper half; larger suits the matrix product.
const BLOCK: usize = 128;

/// Orthogonalizes `matrix` (row-major `[rows, cols]`) in place.
///
/// # Errors
/// [`NotFinite`] if a value is infinite or not a number; the matrix is as it was.
pub fn orthogonalize(set: Coefficients, rows: usize, cols: usize, matrix: &mut [f32]) -> Result<(), NotFinite> {
    debug_assert_eq!(matrix.len(), rows * cols);
    let squares = sum_of_squares(matrix);
    if !squares.is_finite() {
        return Err(NotFinite);
    }
    // In f64: the reciprocal of a large norm would lose bits as an f32 below the normal range.
    let scale = 1.0 / (squares.sqrt().max(SMALLEST_NORM) * set.safety());
    let scaled = matrix.iter().map(|&x| (f64::from(x) * scale) as f32);
    if rows <= cols {
        let x = iterate(set, rows, cols, scaled.collect());
        matrix.copy_from_slice(&x);
    } else {
        let scaled: Vec<f32> = scaled.collect();
        let mut wide = vec![0.0; matrix.len()];
        transpose(rows, cols, &scaled, &mut wide);
        let x = iterate(set, cols, rows, wide);
        transpose(cols, rows, &x, matrix);
    }
    Ok(())
}

/// Floating-point operations that one `[rows, cols]` takes, a multiplication and an addition counted as two.
pub fn operations(set: Coefficients, rows: usize, cols: usize) -> f64 {
    let (short, long) = (rows.min(cols) as f64, rows.max(cols) as f64);
    set.steps().len() as f64 * (3.0 * short * short * long + short.powi(3))
}

/// The iteration on `x: [short, long]`, whose singular values are at most one.
fn iterate(set: Coefficients, short: usize, long: usize, mut x: Vec<f32>) -> Vec<f32> {
    let mut gram = vec![0.0; short * short];
    let mut square = vec![0.0; short * short];
    let mut next = vec![0.0; x.len()];
    for &[a, b, c] in set.steps() {
        let (a, b, c) = (a as f32, b as f32, c as f32);
        symmetric_product(short, long, &x, &mut gram);
        symmetric_product(short, short, &gram, &mut square);
        for (gram, &square) in gram.iter_mut().zip(&square) {
            *gram = b * *gram + c * square;
        }
        gram.iter_mut().step_by(short + 1).for_each(|diagonal| *diagonal += a);
        gemm(Matrix::row_major(&gram, short, short), &Matrix::row_major(&x, short, long), &mut next, long, false);
        std::mem::swap(&mut x, &mut next);
    }
    x
}

/// out = x x^T for `x: [n, k]`, `out: [n, n]`.
fn symmetric_product(n: usize, k: usize, x: &[f32], out: &mut [f32]) {
    for start in (0..n).step_by(BLOCK) {
        let end = (start + BLOCK).min(n);
        let below = Matrix::row_major(&x[..end * k], end, k).transposed();
        gemm(Matrix::row_major(&x[start * k..end * k], end - start, k), &below, &mut out[start * n..], n, false);
    }
    // The blocks above the diagonal mirror those below, which hold the same sums in the same order.
    for row in 0..n {
        for column in (row / BLOCK + 1) * BLOCK..n {
            out[row * n + column] = out[column * n + row];
        }
    }
}

/// to = from^T for `from: [rows, cols]`, in tiles that stay in the nearest cache.
fn transpose(rows: usize, cols: usize, from: &[f32], to: &mut [f32]) {
    const TILE: usize = 32;
    for row_tile in (0..rows).step_by(TILE) {
        for column_tile in (0..cols).step_by(TILE) {
            for row in row_tile..(row_tile + TILE).min(rows) {
                for column in column_tile..(column_tile + TILE).min(cols) {
                    to[column * rows + row] = from[row * cols + column];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::{norm, random, relative_error};

    /// `count` orthonormal vectors of `width`, by Gram-Schmidt twice over in f64.
    fn orthonormal(seed: u64, count: usize, width: usize) -> Vec<Vec<f64>> {
        let mut basis: Vec<Vec<f64>> = Vec::new();
        for row in random(seed, count * width).chunks(width) {
            let mut vector: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            for other in basis.iter().chain(&basis) {
                let dot: f64 = vector.iter().zip(other).map(|(a, b)| a * b).sum();
                vector.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
            let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
            basis.push(vector.iter().map(|x| x / length).collect());
        }
        basis
    }

    /// sum_i values_i u_i v_i^T, `[rows, cols]`.
    fn with_singular_values(values: &[f64], rows: usize, cols: usize) -> Vec<f32> {
        let (left, right) = (orthonormal(5, values.len(), rows), orthonormal(6, values.len(), cols));
        let entry = |i: usize| -> f64 { values.iter().zip(left.iter().zip(&right)).map(|(s, (u, v))| s * u[i / cols] * v[i % cols]).sum() };
        (0..rows * cols).map(|i| entry(i) as f32).collect()
    }

    #[test]
    fn operations_are_those_of_the_products() {
        // x x^T and A A by halves, and A x: n^2 m + n^3 + 2 n^2 m.
        assert_eq!(operations(Coefficients::Jordan, 2, 3), 5.0 * (4.0 * 3.0 + 8.0 + 2.0 * 4.0 * 3.0));
        assert_eq!(operations(Coefficients::Jordan, 3, 2), operations(Coefficients::Jordan, 2, 3));
    }

    fn orthogonalized(set: Coefficients, rows: usize, cols: usize, mut matrix: Vec<f32>) -> Vec<f32> {
        orthogonalize(set, rows, cols, &mut matrix).unwrap();
        matrix
    }

    #[test]
    fn singular_values_follow_the_polynomial() {
        let values = [3.0, 1.0, 0.5, 0.2, 0.1, 0.03];
        let total = values.iter().map(|s| s * s).sum::<f64>().sqrt();
        for set in Coefficients::ALL {
            let images = values.map(|s| set.image(s / total));
            for (rows, cols) in [(6, 6), (20, 8), (8, 20), (200, 150)] {
                let found = orthogonalized(set, rows, cols, with_singular_values(&values, rows, cols));
                let error = relative_error(&found, &with_singular_values(&images, rows, cols));
                // Rounding in the directions without a singular value is raised by the slope at zero.
                let slope = set.image(1e-9) / 1e-9;
                assert!(error < 1e-5 + 2e-7 * slope, "{set:?} {rows}x{cols}: {error}");
            }
        }
    }

    #[test]
    fn a_rank_one_matrix_keeps_its_direction() {
        for set in Coefficients::ALL {
            let matrix = with_singular_values(&[7.0], 12, 9);
            let found = orthogonalized(set, 12, 9, matrix.clone());
            let along: f64 = matrix.iter().zip(&found).map(|(a, b)| f64::from(a * b)).sum::<f64>() / 7.0;
            // Some of the polynomials are steep at one: the last bit of the norm shows.
            assert!((along - set.image(1.0)).abs() < 0.02 && along > 0.6, "{set:?}: {along}");
        }
    }

    #[test]
    fn scale_sign_and_transposition() {
        let (rows, cols) = (24, 40);
        let matrix = random(1, rows * cols);
        let found = orthogonalized(Coefficients::Jordan, rows, cols, matrix.clone());
        for factor in [1e-3f32, 1e30, -1.0] {
            let scaled = matrix.iter().map(|x| factor * x).collect();
            let back: Vec<f32> = orthogonalized(Coefficients::Jordan, rows, cols, scaled).iter().map(|x| factor.signum() * x).collect();
            assert!(relative_error(&back, &found) < 1e-5, "{factor}");
        }
        let (mut turned, mut back) = (vec![0.0; matrix.len()], vec![0.0; matrix.len()]);
        transpose(rows, cols, &matrix, &mut turned);
        transpose(cols, rows, &orthogonalized(Coefficients::Jordan, cols, rows, turned), &mut back);
        assert_eq!(back, found);
    }

    /// match-rms counts on entries of root mean square near 1/sqrt(max(rows, cols)).
    #[test]
    fn a_random_matrix_becomes_nearly_orthogonal() {
        for (set, low, high) in [(Coefficients::Jordan, 0.83, 0.95), (Coefficients::PolarExpress, 0.95, 1.05)] {
            let found = orthogonalized(set, 64, 256, random(2, 64 * 256));
            let size = norm(&found) / 64f64.sqrt();
            assert!((low..high).contains(&size), "{set:?}: {size}");
        }
    }

    #[test]
    fn zero_stays_zero_and_bad_values_are_refused() {
        let mut zero = vec![0.0; 12];
        orthogonalize(Coefficients::Jordan, 3, 4, &mut zero).unwrap();
        assert_eq!(zero, [0.0; 12]);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut matrix = vec![1.0; 12];
            matrix[7] = bad;
            assert_eq!(orthogonalize(Coefficients::Jordan, 3, 4, &mut matrix), Err(NotFinite));
            assert_eq!(matrix.iter().filter(|&&x| x == 1.0).count(), 11);
        }
    }

    #[test]
    fn the_symmetric_product_is_the_whole_product() {
        for (n, k) in [(1, 5), (BLOCK, 3), (BLOCK + 1, 7), (2 * BLOCK + 44, 20)] {
            let x = random(9, n * k);
            let (mut symmetric, mut whole) = (vec![f32::NAN; n * n], vec![0.0; n * n]);
            symmetric_product(n, k, &x, &mut symmetric);
            let view = Matrix::row_major(&x, n, k);
            gemm(view, &view.transposed(), &mut whole, n, false);
            assert_eq!(symmetric, whole, "{n} {k}");
        }
    }

    #[test]
    fn every_size_down_to_one() {
        for (rows, cols) in [(1, 1), (1, 7), (7, 1), (2, 3)] {
            let found = orthogonalized(Coefficients::Exact, rows, cols, random(3, rows * cols));
            assert!((norm(&found) - (rows.min(cols) as f64).sqrt()).abs() < 1e-3, "{rows}x{cols}");
        }
    }
}
