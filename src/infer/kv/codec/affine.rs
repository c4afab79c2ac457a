//! Affine rounding to evenly spaced levels between the least and the greatest of a group:
//! x^ = scale * code + zero, code = clamp(round_ties_even((x - zero) / scale), 0, levels)
//! zero <= min x, scale >= (max x - zero) / levels, both f16: nothing is clipped, and |x - x^| <= scale / 2 up to f32 rounding.

use super::half::{half_down, half_up};
use half::f16;

/// Zero and scale of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Affine {
    pub(super) zero: f16,
    pub(super) scale: f16,
}

impl Affine {
    /// For finite numbers whose magnitude a half can hold; an empty group and a group of equal halves have scale 0.
    pub(super) fn fit(group: impl Iterator<Item = f32>, levels: f32) -> Self {
        let (low, high) = group.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        if low > high {
            return Self { zero: f16::ZERO, scale: f16::ZERO };
        }
        let zero = half_down(f64::from(low));
        Self { zero, scale: half_up(f64::from((high - zero.to_f32()) / levels)) }
    }

    pub(super) fn code(self, x: f32, levels: f32) -> u8 {
        if self.scale == f16::ZERO {
            return 0;
        }
        ((x - self.zero.to_f32()) / self.scale.to_f32()).round_ties_even().clamp(0.0, levels) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;
    use proptest::prelude::*;

    fn decoded(group: &[f32], levels: f32) -> (Affine, Vec<f32>) {
        let affine = Affine::fit(group.iter().copied(), levels);
        let (zero, scale) = (affine.zero.to_f32(), affine.scale.to_f32());
        (affine, group.iter().map(|x| scale.mul_add(f32::from(affine.code(*x, levels)), zero)).collect())
    }

    proptest! {
        #[test]
        fn half_a_step_bounds_the_error(bits in proptest::collection::vec(any::<u16>(), 1..40), levels in prop_oneof![Just(3.0f32), Just(15.0), Just(255.0)]) {
            let group: Vec<f32> = bits.into_iter().map(f16::from_bits).filter(|x| x.is_finite()).map(f16::to_f32).collect();
            let (affine, back) = decoded(&group, levels);
            for (x, back) in group.iter().zip(back) {
                let slack = f64::from(back.abs()) * 2f64.powi(-24);
                let bound = affine.scale.to_f64() / 2.0 * (1.0 + 2f64.powi(-10)) + slack;
                prop_assert!((f64::from(*x) - f64::from(back)).abs() <= bound, "{x} {back} {affine:?}");
            }
        }
    }

    #[test]
    fn constants_and_subnormals() {
        let (affine, back) = decoded(&[0.1f32, 0.1].map(|x| f16::from_f32(x).to_f32()), 255.0);
        assert_eq!((affine.scale, back[0]), (f16::ZERO, f16::from_f32(0.1).to_f32()));
        let smallest = f16::from_bits(1).to_f32();
        assert_eq!(decoded(&[0.0, smallest, 3.0 * smallest], 255.0).1, [0.0, smallest, 3.0 * smallest]);
        assert_eq!(decoded(&[-65504.0, 65504.0], 15.0).1[0], -65504.0);
    }

    #[test]
    fn numbers_between_halves_are_not_clipped() {
        let mut stream = Stream::new(1, "affine");
        let group: Vec<f32> = (0..32).map(|_| stream.normal() as f32).collect();
        let (affine, _) = decoded(&group, 3.0);
        let top = affine.zero.to_f32() + 3.0 * affine.scale.to_f32();
        assert!(group.iter().all(|x| (affine.zero.to_f32()..=top).contains(x)));
    }
}
