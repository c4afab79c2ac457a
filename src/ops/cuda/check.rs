//! A kernel beside its CPU reference: what tests assert and what `osprey doctor` repeats on a GPU.

use super::Device;
use crate::error::Result;
use crate::ops::rng::Stream;
use serde::Serialize;

/// How far a kernel was from its reference over all cases tried.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Agreement {
    pub kernel: &'static str,
    pub cases: usize,
    /// Largest norm(kernel - reference) / norm(reference); infinite when not a number.
    pub error: f64,
    /// What rounding explains; 0 where the bits must be equal.
    pub tolerance: f64,
}

impl Agreement {
    /// No case yet.
    pub fn new(kernel: &'static str, tolerance: f64) -> Self {
        Self { kernel, cases: 0, error: 0.0, tolerance }
    }

    /// Takes in one more case.
    pub fn add(&mut self, found: &[f32], reference: &[f32]) {
        self.cases += 1;
        self.error = self.error.max(distance(found, reference));
    }

    /// Whether the kernel may be used.
    pub fn is_sound(&self) -> bool {
        self.cases > 0 && self.error <= self.tolerance
    }
}

/// norm(found - reference) / norm(reference): 0 for equal bits, infinite where a number is missing or is none.
pub fn distance(found: &[f32], reference: &[f32]) -> f64 {
    if found.len() == reference.len() && found.iter().zip(reference).all(|(a, b)| a.to_bits() == b.to_bits()) {
        return 0.0;
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = square(&mut found.iter().zip(reference).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let ratio = (difference / square(&mut reference.iter().map(|b| f64::from(*b)))).sqrt();
    // Zeros of different sign differ in bits only.
    if found.len() != reference.len() || ratio.is_nan() { f64::INFINITY } else { ratio.max(f64::MIN_POSITIVE) }
}

/// Normal numbers, the same for the same name.
pub fn noise(name: &str, count: usize) -> Vec<f32> {
    let mut stream = Stream::new(17, name);
    (0..count).map(|_| stream.normal() as f32).collect()
}

/// Every kernel of the model's blocks but attention against its reference.
///
/// # Errors
/// When a kernel cannot be launched.
pub fn model_kernels<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let mut all = vec![];
    all.extend(super::norm::agreements(device)?);
    all.extend(super::rope::agreements(device)?);
    all.extend(super::gated::agreements(device)?);
    all.extend(super::embedding::agreements(device)?);
    all.extend(super::dense::agreements(device)?);
    all.extend(super::ternary::agreements(device)?);
    Ok(all)
}

/// Asserts in tests that all of `agreements` are sound.
#[cfg(test)]
#[track_caller]
pub(crate) fn assert_sound(agreements: &[Agreement]) {
    assert!(!agreements.is_empty());
    for agreement in agreements {
        assert!(agreement.is_sound(), "{agreement:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance(&[1.0, f32::NAN], &[1.0, f32::NAN]), 0.0);
        assert_eq!(distance(&[1.0, f32::NAN], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(distance(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert!((distance(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert!(distance(&[0.0], &[-0.0]) > 0.0);
    }

    #[test]
    fn nothing_tried_is_not_sound() {
        assert!(!Agreement::new("none", 1.0).is_sound());
    }
}
