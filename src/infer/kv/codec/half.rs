//! Half-precision numbers inside pages: rounding towards one side, and reading and writing little-endian bytes.

use crate::ops::cpu::reduce::{LANES, Lanes, padded};
use half::f16;

/// The smallest half that is at least `x`; infinite above the largest. `x` is not NaN.
pub(super) fn half_up(x: f64) -> f16 {
    let near = f16::from_f64(x);
    if near.to_f64() >= x { near } else { next_up(near) }
}

/// The largest half that is at most `x`.
pub(super) fn half_down(x: f64) -> f16 {
    -half_up(-x)
}

/// The half after `x`, which is not NaN and not infinity.
fn next_up(x: f16) -> f16 {
    let bits = x.to_bits();
    f16::from_bits(match bits {
        0x8000 => 0x0001,
        _ if x.is_sign_negative() => bits - 1,
        _ => bits + 1,
    })
}

/// The smallest f32 that is at least `x`, which is not NaN.
pub(super) fn float_up(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) >= x { near } else { near.next_up() }
}

/// Half bits as f32, for loops over many: exact for every finite half, and without a branch.
#[inline(always)]
pub(super) fn widen(bits: u16) -> f32 {
    const EXPONENT_DIFFERENCE: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits(u32::from(bits & 0x7FFF) << 13) * EXPONENT_DIFFERENCE;
    f32::from_bits(magnitude.to_bits() | (u32::from(bits & 0x8000) << 16))
}

/// The finite half at `index` of an array of halves.
#[inline(always)]
pub(super) fn read(bytes: &[u8], index: usize) -> f32 {
    widen(u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]))
}

/// Finite halves from number 16 `chunk` on, as many as there are, then zeros.
#[inline(always)]
pub(super) fn read_lanes(bytes: &[u8], chunk: usize) -> Lanes {
    const BYTES: usize = 2 * LANES;
    let rest = &bytes[chunk * BYTES..];
    let mut line = [0; BYTES];
    match rest.first_chunk::<BYTES>() {
        Some(whole) => line = *whole,
        None => line[..rest.len()].copy_from_slice(rest),
    }
    std::array::from_fn(|lane| widen(u16::from_le_bytes([line[2 * lane], line[2 * lane + 1]])))
}

/// Numbers of `x` from 16 `chunk` on, as many as there are, then zeros.
#[inline(always)]
pub(super) fn lanes(x: &[f32], chunk: usize) -> Lanes {
    let rest = &x[chunk * LANES..];
    match rest.first_chunk::<LANES>() {
        Some(whole) => *whole,
        None => padded(rest, 0.0),
    }
}

/// Writes `x` at `index` of an array of halves.
pub(super) fn write(bytes: &mut [u8], index: usize, x: f16) {
    bytes[2 * index..2 * index + 2].copy_from_slice(&x.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_up_and_down_brackets() {
        for x in [0.0, -0.0, 1e-9, -1e-9, 1.0, 1.0001, -1.0001, 65504.0, 3.3e-5, -7.7e4] {
            let (low, high) = (half_down(x), half_up(x));
            assert!(low.to_f64() <= x && x <= high.to_f64(), "{x}: {low} {high}");
            assert!(low == high || next_up(low) == high, "{x}: {low} {high}");
        }
        assert_eq!(half_up(65504.1), f16::INFINITY);
        assert!(f64::from(float_up(0.1)) >= 0.1 && float_up(0.25) == 0.25);
    }

    #[test]
    fn widening_is_exact() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            if half.is_finite() {
                assert_eq!(widen(bits).to_bits(), half.to_f32().to_bits(), "{half}");
            }
        }
    }
}
