//! What all rules that step along an orthogonalized matrix share: the polynomial, the length of the step, the logical blocks.

use serde::{Deserialize, Serialize};

use super::coefficients::Coefficients;
use super::elements;
use super::orthogonalize::{operations, orthogonalize};
use super::rule::NotFinite;

/// `[optim.spectral]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Spectral {
    /// The Newton-Schulz polynomial.
    pub coefficients: Coefficients,
    /// How the learning rate depends on the matrix's shape.
    pub scale: Scale,
    /// Treat the heads of the query, key and value projections as matrices of their own.
    pub split_heads: bool,
}

/// The factor on an orthogonalized `[rows, cols]` block, from the block's own shape and not the tensor's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// `0.2 sqrt(max(rows, cols))`: entries move as far as AdamW's, whose rate and decay can be kept. Liu et al. 2025,
    /// arXiv:2502.16982.
    #[default]
    MatchRms,
    /// `sqrt(max(1, rows / cols))`. Jordan et al. 2024.
    Original,
    /// `sqrt(rows / cols)`: unit change of the output's root mean square. Bernstein 2025, "Deriving Muon".
    UnitRms,
}

impl Scale {
    /// The factor for a block `[rows, cols]`.
    pub fn factor(self, rows: usize, cols: usize) -> f64 {
        let (rows, cols) = (rows as f64, cols as f64);
        match self {
            Self::MatchRms => 0.2 * rows.max(cols).sqrt(),
            Self::Original => (rows / cols).max(1.0).sqrt(),
            Self::UnitRms => (rows / cols).sqrt(),
        }
    }
}

impl Spectral {
    /// Orthogonalizes each matrix of `shape` (see [`Rule`](super::Rule)) in place.
    pub(super) fn orthogonalize(&self, shape: &[usize], direction: &mut [f32]) -> Result<(), NotFinite> {
        let (rows, cols) = matrix(shape);
        direction.chunks_exact_mut(rows * cols).try_for_each(|block| orthogonalize(self.coefficients, rows, cols, block))
    }

    /// Floating-point operations of [`Self::orthogonalize`].
    pub(super) fn operations(&self, shape: &[usize]) -> f64 {
        let (rows, cols) = matrix(shape);
        (elements(shape) / (rows * cols)) as f64 * operations(self.coefficients, rows, cols)
    }

    /// The factor on the learning rate for one matrix of `shape`.
    pub(super) fn factor(&self, shape: &[usize]) -> f64 {
        let (rows, cols) = matrix(shape);
        self.scale.factor(rows, cols)
    }
}

/// Rows and columns of the matrices of a logical shape; a vector is one row.
pub(super) fn matrix(shape: &[usize]) -> (usize, usize) {
    match shape {
        [.., rows, cols] => (*rows, *cols),
        [cols] => (1, *cols),
        [] => (1, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::testing::random;

    #[test]
    fn factors() {
        assert!((Scale::MatchRms.factor(384, 1024) - 6.4).abs() < 1e-12);
        assert_eq!(Scale::Original.factor(400, 100), 2.0);
        assert_eq!(Scale::Original.factor(100, 400), 1.0);
        assert_eq!(Scale::UnitRms.factor(100, 400), 0.5);
    }

    #[test]
    fn blocks_are_orthogonalized_one_by_one_and_scaled_by_their_own_shape() {
        let spectral = Spectral::default();
        let fused = random(8, 3 * 8 * 20);
        let mut together = fused.clone();
        spectral.orthogonalize(&[3, 8, 20], &mut together).unwrap();
        for (together, alone) in together.chunks(8 * 20).zip(fused.chunks(8 * 20)) {
            let mut alone = alone.to_vec();
            spectral.orthogonalize(&[8, 20], &mut alone).unwrap();
            assert_eq!(together, alone);
        }
        assert_eq!(spectral.factor(&[3, 8, 20]), spectral.factor(&[8, 20]));
    }
}
