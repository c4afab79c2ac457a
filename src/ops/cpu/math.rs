//! Transcendental functions that vectorize inside loops and give the same bits on every instruction set.
//!
//! Everything is `#[inline(always)]`, without branches on data, with every rounding written out (`f32::mul_add`), so that a
//! loop over a slice inside a [`multiversion!`](crate::multiversion) function becomes straight vector code.

/// Above this [`exp`] saturates: 127.5 ln 2, where the exponent of the result would leave its field.
pub const EXP_LARGEST: f32 = 88.376_26;
/// Below this [`exp`] is exactly 0: -126 ln 2, the logarithm of the smallest normal number.
pub const EXP_SMALLEST: f32 = -87.336_54;

/// Adding it rounds to an integer (ties to even) and leaves that integer in the low bits of the sum.
const ROUNDER: f32 = 12_582_912.0; // 1.5 * 2^23
/// ln 2 in two parts, the first with few enough bits that its product with an exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// (e^r - 1 - r) / r^2 on |r| <= ln 2 / 2, highest power first. Cephes mathematical library (S. Moshier), `expf.c`.
const EXP_POLYNOMIAL: [f32; 6] = [1.987_569_2e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// e^x within 2 units in the last place; 0 below [`EXP_SMALLEST`] (so `exp(-inf)` is 0), saturated above [`EXP_LARGEST`],
/// NaN for NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Comparisons in this form are false for NaN, which passes through.
    let bounded = if x > EXP_LARGEST { EXP_LARGEST } else { x };
    let bounded = if x < EXP_SMALLEST { EXP_SMALLEST } else { bounded };
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, ROUNDER);
    let exponent = shifted - ROUNDER;
    let r = exponent.mul_add(-LN_2_LOW, exponent.mul_add(-LN_2_HIGH, bounded));
    let mut q = EXP_POLYNOMIAL[0];
    q = q.mul_add(r, EXP_POLYNOMIAL[1]);
    q = q.mul_add(r, EXP_POLYNOMIAL[2]);
    q = q.mul_add(r, EXP_POLYNOMIAL[3]);
    q = q.mul_add(r, EXP_POLYNOMIAL[4]);
    q = q.mul_add(r, EXP_POLYNOMIAL[5]);
    let mantissa = q.mul_add(r * r, r) + 1.0;
    // The low bits of `shifted` hold the integer; moving them up discards the constant's own bits.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    let value = mantissa * power;
    if x < EXP_SMALLEST { 0.0 } else { value }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x * sigmoid(x) (SiLU, also called swish).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// SiLU and its derivative s (1 + x (1 - s)), s = sigmoid(x).
#[inline(always)]
pub fn silu_and_derivative(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    let y = x * s;
    (y, y.mul_add(1.0 - s, s))
}

/// Natural logarithm, correctly rounded but for rare ties: computed in f64 with basic arithmetic only, so the same bits on
/// every machine, which the system's `logf` does not promise. For single values (a row's log-sum-exp), not for vector loops.
/// -inf for 0, NaN for negative numbers.
pub fn ln(x: f32) -> f32 {
    if x == 0.0 {
        return f32::NEG_INFINITY;
    }
    if x.is_nan() || x < 0.0 || x == f32::INFINITY {
        return if x > 0.0 { x } else { f32::NAN };
    }
    // Every positive f32 is a normal f64: x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)).
    let bits = f64::from(x).to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | 1.0f64.to_bits());
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172: the first term left out is below 1e-14.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let series = (0..9).rev().fold(0.0, |sum, k| sum * square + 1.0 / f64::from(2 * k + 1));
    (exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::multiversion;
    use crate::ops::cpu::isa::testing::on_every_isa;

    multiversion! {
        fn map_exp(x: &[f32], y: &mut [f32]) {
            for (y, x) in y.iter_mut().zip(x) {
                *y = exp(*x) + silu(*x);
            }
        }
    }

    fn ulps(value: f32, exact: f64) -> f64 {
        let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
        (f64::from(value) - exact).abs() / unit
    }

    #[test]
    fn exp_is_within_two_units() {
        let worst = (-873_000..883_700).map(|i| i as f32 * 1e-4).map(|x| ulps(exp(x), f64::from(x).exp())).fold(0.0, f64::max);
        assert!(worst <= 2.0, "{worst}");
        let near_zero = (-2000..2000).map(|i| i as f32 * 1e-7).map(|x| ulps(exp(x), f64::from(x).exp())).fold(0.0, f64::max);
        assert!(near_zero <= 1.0, "{near_zero}");
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-90.0), 0.0);
        assert_eq!(exp(f32::INFINITY), exp(EXP_LARGEST));
        assert!(exp(EXP_LARGEST).is_finite() && exp(EXP_SMALLEST) >= f32::MIN_POSITIVE);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn ln_is_rounded_correctly() {
        let inputs = (1..20_000u32).map(|i| f32::from_bits(i.wrapping_mul(104_729) % f32::INFINITY.to_bits())).chain([
            f32::MIN_POSITIVE,
            1e-45,
            1.0,
        ]);
        for x in inputs.filter(|x| *x > 0.0) {
            let exact = f64::from(x).ln();
            assert!(ulps(ln(x).abs(), exact.abs()) <= 0.500_001, "{x}: {} {exact}", ln(x));
        }
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(f32::INFINITY), f32::INFINITY);
        assert!(ln(-1.0).is_nan() && ln(f32::NAN).is_nan());
    }

    #[test]
    fn silu_derivative_matches_a_difference() {
        for i in -400..400 {
            let x = f64::from(i) * 0.05;
            let exact = |x: f64| x / (1.0 + (-x).exp());
            let slope = (exact(x + 1e-5) - exact(x - 1e-5)) / 2e-5;
            let (value, derivative) = silu_and_derivative(x as f32);
            assert!((f64::from(value) - exact(x)).abs() < 2e-6 * (1.0 + x.abs()));
            assert!((f64::from(derivative) - slope).abs() < 2e-6, "{x}");
        }
    }

    #[test]
    fn same_bits_on_every_instruction_set() {
        let x: Vec<f32> = (0..20_011).map(|i| (i as f32 - 10_000.0) * 0.0093).chain([f32::NEG_INFINITY, -0.0]).collect();
        let results = on_every_isa(|| {
            let mut y = vec![0.0; x.len()];
            map_exp(&x, &mut y);
            y.iter().map(|y| y.to_bits()).collect::<Vec<_>>()
        });
        assert!(results.iter().all(|(_, bits)| *bits == results[0].1));
    }
}
