//! Reductions over a row in 16 fixed lanes: element i goes to lane i mod 16, lanes are joined by a fixed binary tree.
//!
//! So a sum has one order, whatever the instruction set and however wide its vectors are. All functions are
//! `#[inline(always)]`, for use inside [`multiversion!`](crate::multiversion) functions.

/// Number of lanes: one AVX-512 register of f32.
pub const LANES: usize = 16;
/// One partial result per lane.
pub type Lanes = [f32; LANES];

/// Joins lanes in a binary tree: lane i with lane i + 8, then + 4, + 2, + 1.
#[inline(always)]
pub fn join(lanes: Lanes, operation: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| operation(lanes[i], lanes[i + 8]));
    let four: [f32; 4] = std::array::from_fn(|i| operation(eight[i], eight[i + 4]));
    let two = [operation(four[0], four[2]), operation(four[1], four[3])];
    operation(two[0], two[1])
}

/// The larger number; `b` when either is NaN. Signed zeros compare equal and give `b`.
#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The last, incomplete chunk of a row, filled up with `filler` so that it is folded like any other: indexing the lanes
/// by a variable would force them out of registers.
#[inline(always)]
pub fn padded(tail: &[f32], filler: f32) -> Lanes {
    let mut lanes = [filler; LANES];
    lanes[..tail.len()].copy_from_slice(tail);
    lanes
}

/// Folds `x` into `lanes`; `filler` must leave a lane as it is.
#[inline(always)]
fn fold(mut lanes: Lanes, x: &[f32], filler: f32, operation: impl Fn(f32, f32) -> f32) -> Lanes {
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        lanes = std::array::from_fn(|i| operation(lanes[i], chunk[i]));
    }
    if !tail.is_empty() {
        let chunk = padded(tail, filler);
        lanes = std::array::from_fn(|i| operation(lanes[i], chunk[i]));
    }
    lanes
}

/// Folds the pairs of `x` and `y` (equal lengths) into lanes that start at 0; pairs of zeros must leave a lane as it is.
#[inline(always)]
fn fold_pairs(x: &[f32], y: &[f32], operation: impl Fn(f32, f32, f32) -> f32) -> Lanes {
    assert_eq!(x.len(), y.len());
    let (x_chunks, x_tail) = x.as_chunks::<LANES>();
    let (y_chunks, y_tail) = y.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        lanes = std::array::from_fn(|i| operation(lanes[i], x[i], y[i]));
    }
    if !x_tail.is_empty() {
        let (x, y) = (padded(x_tail, 0.0), padded(y_tail, 0.0));
        lanes = std::array::from_fn(|i| operation(lanes[i], x[i], y[i]));
    }
    lanes
}

/// Sum of the elements; 0 for none.
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    join(add_to([0.0; LANES], x), |a, b| a + b)
}

/// Lanes of a sum continued over `x`, whose first element belongs to lane 0: for rows that are produced piece by piece.
#[inline(always)]
pub fn add_to(lanes: Lanes, x: &[f32]) -> Lanes {
    fold(lanes, x, 0.0, |lane, x| lane + x)
}

/// Sum of x_i y_i, each lane one chain of fused multiply-adds.
#[inline(always)]
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    join(fold_pairs(x, y, |lane, x, y| x.mul_add(y, lane)), |a, b| a + b)
}

/// Sum of (w_i x_i) y_i.
#[inline(always)]
pub fn weighted_dot(w: &[f32], x: &[f32], y: &[f32]) -> f32 {
    assert!(w.len() == x.len() && x.len() == y.len());
    let ((w_chunks, w_tail), (x_chunks, x_tail), (y_chunks, y_tail)) = (w.as_chunks(), x.as_chunks(), y.as_chunks());
    let add = |lanes: Lanes, w: &Lanes, x: &Lanes, y: &Lanes| std::array::from_fn(|i| (w[i] * x[i]).mul_add(y[i], lanes[i]));
    let mut lanes = [0.0; LANES];
    for ((w, x), y) in w_chunks.iter().zip(x_chunks).zip(y_chunks) {
        lanes = add(lanes, w, x, y);
    }
    if !w_tail.is_empty() {
        lanes = add(lanes, &padded(w_tail, 0.0), &padded(x_tail, 0.0), &padded(y_tail, 0.0));
    }
    join(lanes, |a, b| a + b)
}

/// Sum of x_i^2.
#[inline(always)]
pub fn sum_of_squares(x: &[f32]) -> f32 {
    join(fold([0.0; LANES], x, 0.0, |lane, x| x.mul_add(x, lane)), |a, b| a + b)
}

/// Largest element; -inf for none. NaN may be lost: what follows a maximum (`x - max`) shows it again.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    join(fold([f32::NEG_INFINITY; LANES], x, f32::NEG_INFINITY, |lane, x| larger(x, lane)), larger)
}

/// Largest magnitude; 0 for none. NaN elements are passed over.
#[inline(always)]
pub fn absmax(x: &[f32]) -> f32 {
    join(fold([0.0; LANES], x, 0.0, |lane, x| larger(x.abs(), lane)), larger)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::multiversion;
    use crate::ops::cpu::isa::testing::on_every_isa;
    use crate::ops::cpu::testing::uniform;

    multiversion! {
        fn all(x: &[f32], y: &[f32]) -> [f32; 6] {
            [sum(x), dot(x, y), weighted_dot(x, y, x), sum_of_squares(x), max(x), absmax(x)]
        }
    }

    /// The definition, lane by lane.
    fn in_lanes(terms: impl Iterator<Item = f32>) -> f32 {
        let mut lanes = [0.0; LANES];
        terms.enumerate().for_each(|(i, term)| lanes[i % LANES] += term);
        for half in [8, 4, 2, 1] {
            (0..half).for_each(|i| lanes[i] += lanes[i + half]);
        }
        lanes[0]
    }

    #[test]
    fn values_and_order() {
        for len in [0, 1, 7, 15, 16, 17, 64, 100, 385] {
            let (x, y) = (uniform(1, len), uniform(2, len));
            assert_eq!(sum(&x).to_bits(), in_lanes(x.iter().copied()).to_bits());
            let exact: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            assert!((f64::from(dot(&x, &y)) - exact).abs() < 1e-5);
            let weighted: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y) * f64::from(*x)).sum();
            assert!((f64::from(weighted_dot(&x, &y, &x)) - weighted).abs() < 1e-5);
            assert_eq!(dot(&x, &x).to_bits(), sum_of_squares(&x).to_bits());
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(absmax(&x), x.iter().fold(0.0, |a, x| x.abs().max(a)));
        }
    }

    #[test]
    fn same_bits_on_every_instruction_set() {
        for len in [1, 16, 33, 1000] {
            let (x, y) = (uniform(3, len), uniform(4, len));
            let results = on_every_isa(|| all(&x, &y).map(f32::to_bits));
            assert!(results.iter().all(|(_, bits)| *bits == results[0].1));
        }
    }
}
