//! Ternary matrices on their way out: the codes and the scale that training's forward pass used, by the rule it used.

use half::f16;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::ops::cpu::ternary::{ternary_code, weight_scale};

/// What the f32 values of a ternary matrix are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TernaryWeights {
    /// Trained master weights, to be rounded by the absmean rule.
    #[default]
    Master,
    /// Scale times code already, as decoded from an artifact. The absmean of such a matrix is smaller than its scale, so the rule must not be
    /// applied again.
    Deployed,
}

/// The codes and the scale of one matrix.
///
/// # Errors
/// When values said to be deployed are not a scale times codes.
pub fn codes(name: &str, weights: &[f32], kind: TernaryWeights) -> Result<(Vec<i8>, f16)> {
    let scale = match kind {
        TernaryWeights::Master => weight_scale(weights),
        TernaryWeights::Deployed => f16::from_f32(weights.iter().fold(0.0, |most: f32, weight| most.max(weight.abs()))),
    };
    let alpha = scale.to_f32();
    let code = |weight: f32| if alpha == 0.0 { 0 } else { ternary_code(weight, alpha) };
    let codes: Vec<i8> = weights.par_iter().map(|&weight| code(weight)).collect();
    if kind == TernaryWeights::Deployed && codes.iter().zip(weights).any(|(&code, &weight)| f32::from(code) * alpha != weight) {
        return Err(Error::input(name, "is not one scale times codes in -1, 0, 1").fix("export from the checkpoint instead"));
    }
    Ok((codes, scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing::values;

    /// Worked example: alpha = 0.8333, the halves of which decide the codes.
    #[test]
    fn absmean_rule_on_a_known_matrix() {
        let weights = [0.8, -0.5, 1.2, -1.5, 0.4, -0.9, 1.3, -0.7, 0.2];
        let (codes, scale) = codes("w", &weights, TernaryWeights::Master).unwrap();
        assert_eq!(codes, [1, -1, 1, -1, 0, -1, 1, -1, 0]);
        assert_eq!(scale, f16::from_f32(0.833_333_3));
    }

    #[test]
    fn deployed_values_keep_their_scale() {
        let (first, scale) = codes("w", &values(512, 1), TernaryWeights::Master).unwrap();
        let deployed: Vec<f32> = first.iter().map(|&code| f32::from(code) * scale.to_f32()).collect();
        assert_eq!(codes("w", &deployed, TernaryWeights::Deployed).unwrap(), (first, scale));
        assert_ne!(codes("w", &deployed, TernaryWeights::Master).unwrap().1, scale);
        assert!(codes("w", &values(512, 1), TernaryWeights::Deployed).is_err());
        assert_eq!(codes("w", &[0.0; 4], TernaryWeights::Deployed).unwrap().0, [0; 4]);
    }
}
