//! Affine rounding to evenly spaced levels between the least and the greatest of a group:
//! x^ = scale * code + zero, code = clamp(round_ties_even((x - zero) / scale), 0, levels)
//! zero <= min x, scale >= (max x - zero) / levels, both f16: nothing is clipped, and |x - x^| <= scale / 2 up to f32 rounding.

use super::half::{half_down, half_up};
use crate::multiversion;
use crate::ops::cpu::reduce::{LANES, Lanes, join, larger, padded};
use half::f16;

/// Zero and scale of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Affine {
    pub(super) zero: f16,
    pub(super) scale: f16,
}

impl Affine {
    /// For a group of finite numbers whose magnitude a half can hold; a group of equal halves has scale 0.
    pub(super) fn fit(group: &[f32], levels: f32) -> Self {
        let (low, high) = range(group);
        Self::spanning(low, high, levels)
    }

    /// For a group from `low` to `high`.
    pub(super) fn spanning(low: f32, high: f32, levels: f32) -> Self {
        let zero = half_down(f64::from(low));
        Self { zero, scale: half_up(f64::from((high - zero.to_f32()) / levels)) }
    }

    /// Codes of `x`, as many as there is room for.
    pub(super) fn codes(self, x: &[f32], levels: f32, codes: &mut [u8]) {
        encode(x, self.zero.to_f32(), self.scale.to_f32(), levels, codes);
    }
}

/// Adding it to a number from 0 to 255 rounds that to an integer, ties to even, and leaves the integer in the low bits of the sum.
pub(super) const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23

/// The code of `x`. Clamping to whole numbers before rounding to them is the same as after.
#[inline(always)]
pub(super) fn code(x: f32, zero: f32, scale: f32, levels: f32) -> u8 {
    let steps = if scale > 0.0 { (x - zero) / scale } else { 0.0 };
    (larger(smaller(steps, levels), 0.0) + ROUNDER).to_bits() as u8
}

multiversion! {
    fn encode(x: &[f32], zero: f32, scale: f32, levels: f32, codes: &mut [u8]) {
        codes.iter_mut().zip(x).for_each(|(out, x)| *out = code(*x, zero, scale, levels));
    }
}

multiversion! {
    /// The least and the greatest of `x`, which is not empty.
    fn range(x: &[f32]) -> (f32, f32) {
        let (mut low, mut high): (Lanes, Lanes) = ([x[0]; LANES], [x[0]; LANES]);
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks.iter().chain([&padded(tail, x[0])]) {
            low = std::array::from_fn(|lane| smaller(chunk[lane], low[lane]));
            high = std::array::from_fn(|lane| larger(chunk[lane], high[lane]));
        }
        (join(low, smaller), join(high, larger))
    }
}

/// The smaller number.
#[inline(always)]
pub(super) fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;
    use proptest::prelude::*;

    fn decoded(group: &[f32], levels: f32) -> (Affine, Vec<f32>) {
        let affine = Affine::fit(group, levels);
        let mut codes = vec![0; group.len()];
        affine.codes(group, levels, &mut codes);
        let (zero, scale) = (affine.zero.to_f32(), affine.scale.to_f32());
        (affine, codes.into_iter().map(|code| scale.mul_add(f32::from(code), zero)).collect())
    }

    proptest! {
        #[test]
        fn half_a_step_bounds_the_error(bits in proptest::collection::vec(any::<u16>(), 1..40), levels in prop_oneof![Just(3.0f32), Just(15.0), Just(255.0)]) {
            let group: Vec<f32> = bits.into_iter().map(f16::from_bits).filter(|x| x.is_finite()).map(f16::to_f32).chain([1.0]).collect();
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
