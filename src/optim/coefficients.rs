//! Polynomials whose repeated application drives singular values towards one.
//! One step is x <- a x + b x^3 + c x^5 on every singular value; the sets below differ in how far up they pull small values and
//! how close to one they end. The ranges in the tests are those of the composed polynomial on `[lower, 1]`.

use serde::{Deserialize, Serialize};

/// A named set of coefficients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Coefficients {
    /// Five equal steps with the steepest slope at zero; ends between 0.68 and 1.21. Jordan et al. 2024, "Muon".
    #[default]
    Jordan,
    /// Five fitted steps, between 0.85 and 1.15, close to one for all but the smallest values; the "quintic" set of NVIDIA's
    /// Emerging-Optimizers.
    Quintic,
    /// Polar Express, five steps with 2% safety. Amsel et al. 2025, arXiv:2505.16932.
    PolarExpress,
    /// Chebyshev-type iteration, five steps. Grishina et al. 2025, arXiv:2506.10935.
    Cans,
    /// Jordan's step eight times, then two that converge to one exactly.
    Polished,
    /// Twelve quadratically convergent steps: the exact polar factor for practical purposes, at more than twice the cost.
    Exact,
}

const JORDAN: [f64; 3] = [3.4445, -4.7750, 2.0315];
const CONVERGENT: [f64; 3] = [2.0, -1.5, 0.5];

const QUINTIC: [[f64; 3]; 5] =
    [[4.0848, -6.8946, 2.9270], [3.9505, -6.3029, 2.6377], [3.7418, -5.5913, 2.3037], [2.8769, -3.1427, 1.2046], [2.8366, -3.0525, 1.2012]];

const POLAR_EXPRESS: [[f64; 3]; 5] = [
    [8.156554524902461, -22.48329292557795, 15.878769915207462],
    [4.042929935166739, -2.808917465908714, 0.5000178451051316],
    [3.8916678022926607, -2.772484153217685, 0.5060648178503393],
    [3.285753657755655, -2.3681294933425376, 0.46449024233003106],
    [2.3465413258596377, -1.7097828382687081, 0.42323551169305323],
];

const CANS: [[f64; 3]; 5] = [
    [8.4703, -25.1081, 18.6293],
    [4.1828, -3.1087, 0.5806],
    [3.9619, -2.9541, 0.5630],
    [3.2866, -2.4647, 0.5074],
    [2.2737, -1.6447, 0.4162],
];

const POLISHED: [[f64; 3]; 10] = [JORDAN, JORDAN, JORDAN, JORDAN, JORDAN, JORDAN, JORDAN, JORDAN, CONVERGENT, CONVERGENT];

impl Coefficients {
    pub const ALL: [Self; 6] = [Self::Jordan, Self::Quintic, Self::PolarExpress, Self::Cans, Self::Polished, Self::Exact];

    /// `[a, b, c]` of every step, in order.
    pub fn steps(self) -> &'static [[f64; 3]] {
        match self {
            Self::Jordan => &[JORDAN; 5],
            Self::Quintic => &QUINTIC,
            Self::PolarExpress => &POLAR_EXPRESS,
            Self::Cans => &CANS,
            Self::Polished => &POLISHED,
            Self::Exact => &[CONVERGENT; 12],
        }
    }

    /// The input is divided by its Frobenius norm times this: Polar Express leaves room above the largest singular value.
    pub fn safety(self) -> f64 {
        match self {
            Self::PolarExpress => 1.02,
            _ => 1.0,
        }
    }

    /// What becomes of a singular value that is `fraction` of the matrix's Frobenius norm.
    pub fn image(self, fraction: f64) -> f64 {
        let step = |x: f64, [a, b, c]: &[f64; 3]| a * x + b * x.powi(3) + c * x.powi(5);
        self.steps().iter().fold(fraction / self.safety(), step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Smallest and largest image of `[lower, 1]`, on a logarithmic grid.
    fn range(set: Coefficients, lower: f64) -> (f64, f64) {
        let images = (0..=200_000).map(|i| set.image(lower.powf(1.0 - f64::from(i) / 200_000.0)));
        images.fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(x), high.max(x)))
    }

    #[test]
    fn ranges_are_the_published_ones() {
        let expected = [
            (Coefficients::Jordan, 2e-3, 0.6818, 1.2024),
            (Coefficients::Quintic, 2e-3, 0.8525, 1.1450),
            (Coefficients::Quintic, 1e-2, 0.9778, 1.0318),
            (Coefficients::PolarExpress, 2e-3, 0.8589, 1.1411),
            (Coefficients::Cans, 1e-3, 0.8844, 1.1198),
            (Coefficients::Polished, 1e-3, 1.0, 1.0005),
            (Coefficients::Exact, 1e-3, 1.0, 1.0),
        ];
        for (set, lower, low, high) in expected {
            let (found_low, found_high) = range(set, lower);
            assert!((found_low - low).abs() < 2e-4 && (found_high - high).abs() < 2e-4, "{set:?}: {found_low} {found_high}");
        }
    }

    /// A set fitted to another normalization can send a rank-one gradient, whose one singular value is the whole norm, backwards.
    #[test]
    fn no_set_reverses_a_rank_one_matrix() {
        for set in Coefficients::ALL {
            let images = (1..=1000).map(|i| set.image(f64::from(i) / 1000.0));
            assert!(images.fold(f64::MAX, f64::min) > 0.4, "{set:?}");
        }
        assert!((Coefficients::Jordan.image(1.0) - 0.696).abs() < 1e-3);
    }
}
