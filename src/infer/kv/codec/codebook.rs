//! The best scalar quantizer for one coordinate of a random direction in d dimensions. Lloyd 1982, doi:10.1109/TIT.1982.1056489; for
//! vectors, Zandieh et al. 2025, arXiv:2504.19874.
//! f(x) = Gamma(d/2) / (sqrt(pi) Gamma((d-1)/2)) (1 - x^2)^((d-3)/2) on [-1, 1];  with x = sin a, f dx is cos^(d-2) a da up to a constant
//! level = E[x | cell], cells meet at midpoints;  distortion of a unit vector D = d E(x - level)^2 = 1 - d E level^2
//! Levels are kept times sqrt(d), so that they tend to those of a standard normal. All in f64; stored f32.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Most bits of a code.
pub const MOST_BITS: usize = 4;
/// Most levels on the positive side.
const MOST_LEVELS: usize = 1 << (MOST_BITS - 1);

/// Levels for one width and number of bits. Code i stands for the i-th smallest of the 2^bits levels.
#[derive(Clone, Debug)]
pub struct Codebook {
    bits: usize,
    /// The positive levels, ascending, times sqrt(d); the others are their negatives. What is past 2^(bits - 1) is unused.
    levels: [f32; MOST_LEVELS],
    /// Midpoints of neighbouring positive levels; infinite where there are none.
    thresholds: [f32; MOST_LEVELS - 1],
    distortion: f64,
}

impl Codebook {
    /// For directions in `width` (at least 2) dimensions and 1 to 4 bits. Made once per process.
    pub fn new(width: usize, bits: usize) -> Arc<Self> {
        static MADE: Mutex<BTreeMap<(usize, usize), Arc<Codebook>>> = Mutex::new(BTreeMap::new());
        assert!(width >= 2 && (1..=MOST_BITS).contains(&bits), "no codebook of {bits} bits in {width} dimensions");
        let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(made.entry((width, bits)).or_insert_with(|| Arc::new(Self::solve(width, bits))))
    }

    fn solve(width: usize, bits: usize) -> Self {
        let mut levels = first_guess(width, 1 << (bits - 1));
        // The fixed point is approached geometrically; the limit is far beyond what 16 levels need.
        for _ in 0..200_000 {
            let improved = centroids(width, &levels);
            let moved = improved.iter().zip(&levels).map(|(new, old)| (new - old).abs()).fold(0.0, f64::max);
            levels = improved;
            if moved < 1e-13 / (width as f64).sqrt() {
                break;
            }
        }
        let masses = masses(width, &edges(&levels));
        let square = masses.iter().zip(&levels).map(|(mass, level)| mass * level * level).sum::<f64>() / masses.iter().sum::<f64>();
        let mut stored = [0.0; MOST_LEVELS];
        stored.iter_mut().zip(&levels).for_each(|(stored, level)| *stored = (level * (width as f64).sqrt()) as f32);
        let mut thresholds = [f32::INFINITY; MOST_LEVELS - 1];
        thresholds.iter_mut().zip(stored[..levels.len()].windows(2)).for_each(|(threshold, pair)| *threshold = (pair[0] + pair[1]) * 0.5);
        Self { bits, levels: stored, thresholds, distortion: 1.0 - width as f64 * square }
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// The positive levels, ascending, times sqrt(d).
    pub fn positive_levels(&self) -> &[f32] {
        &self.levels[..1 << (self.bits - 1)]
    }

    /// All slots of the positive levels: unused ones are 0.
    pub(super) fn table(&self) -> &[f32; MOST_LEVELS] {
        &self.levels
    }

    /// Mean squared error of a random unit vector whose coordinates take their levels.
    pub fn distortion(&self) -> f64 {
        self.distortion
    }

    /// The code of `x`, a coordinate times sqrt(d).
    #[inline(always)]
    pub fn code(&self, x: f32) -> u8 {
        // Counting all thresholds beats searching them, in vectors.
        let beyond = self.thresholds.iter().fold(0, |count, threshold| count + i32::from(x.abs() > *threshold));
        let half = 1 << (self.bits - 1);
        (if x < 0.0 { half - 1 - beyond } else { half + beyond }) as u8
    }

    /// What `code` stands for, times sqrt(d).
    #[inline(always)]
    pub fn level(&self, code: u8) -> f32 {
        let (half, code) = (1 << (self.bits - 1), usize::from(code));
        if code < half { -self.levels[half - 1 - code] } else { self.levels[code - half] }
    }
}

/// Evenly spaced levels over the bulk of the density.
fn first_guess(width: usize, count: usize) -> Vec<f64> {
    let reach = (3.0 / (width as f64).sqrt()).min(1.0);
    (0..count).map(|index| reach * (index as f64 + 0.5) / count as f64).collect()
}

/// Where the cells of positive levels start and end: one more than there are levels.
fn edges(levels: &[f64]) -> Vec<f64> {
    let midpoints = levels.windows(2).map(|pair| (pair[0] + pair[1]) * 0.5);
    std::iter::once(0.0).chain(midpoints).chain([1.0]).collect()
}

/// The share of the positive half's mass in each cell, not divided by the whole.
fn masses(width: usize, edges: &[f64]) -> Vec<f64> {
    let integrals: Vec<f64> = edges.iter().map(|edge| cosine_integral(width, *edge)).collect();
    integrals.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// E[x | cell] for each cell: the integral of x f has a closed form.
fn centroids(width: usize, levels: &[f64]) -> Vec<f64> {
    let edges = edges(levels);
    let power = |x: f64| (1.0 - x * x).max(0.0).powf((width as f64 - 1.0) / 2.0);
    let moments = edges.windows(2).map(|pair| (power(pair[0]) - power(pair[1])) / (width as f64 - 1.0));
    moments.zip(masses(width, &edges)).map(|(moment, mass)| moment / mass).collect()
}

/// The integral of cos^(width - 2) from 0 to asin(x), by the reduction from n to n - 2.
fn cosine_integral(width: usize, x: f64) -> f64 {
    let cosine = (1.0 - x * x).max(0.0).sqrt();
    let (mut n, mut integral, mut power) = if width.is_multiple_of(2) { (0, x.asin(), cosine) } else { (1, x, cosine * cosine) };
    while n < width - 2 {
        n += 2;
        integral = (power * x + (n as f64 - 1.0) * integral) / n as f64;
        power *= cosine * cosine;
    }
    integral
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::rng::Stream;

    /// Positive levels times sqrt(d), and distortion, to the digits given.
    fn check(width: usize, levels: &[f32], distortion: f64) {
        let bits = levels.len().ilog2() as usize + 1;
        let codebook = Codebook::new(width, bits);
        for (level, expected) in codebook.positive_levels().iter().zip(levels) {
            assert!((level - expected).abs() < 1.1e-5, "width {width}, {bits} bits: {level}, not {expected}");
        }
        assert!((codebook.distortion() - distortion).abs() < 1e-5, "width {width}, {bits} bits: {}", codebook.distortion());
    }

    #[test]
    fn levels_for_real_widths() {
        check(128, &[0.79944], 0.36089);
        check(128, &[0.45245, 1.50519], 0.11600);
        check(128, &[0.24442, 0.75333, 1.33660, 2.13147], 0.033966);
        check(128, &[0.12787, 0.38638, 0.65362, 0.93710, 1.24777, 1.60434, 2.04593, 2.68886], 0.009315);
        check(64, &[0.80101], 0.35839);
        check(64, &[0.45212, 1.49997], 0.11453);
        check(64, &[0.24375, 0.75066, 1.32934, 2.11131], 0.033391);
        check(64, &[0.12735, 0.38472, 0.65049, 0.93189, 1.23940, 1.59085, 2.02331, 2.64637], 0.009132);
        check(256, &[0.12813, 0.38721, 0.65519, 0.93971, 1.25199, 1.61117, 2.05741, 2.71057], 0.009408);
    }

    /// The error at width d is that of the normal limit plus a / d + O(1 / d^2); two widths remove a.
    #[test]
    fn wide_heads_tend_to_the_normal_quantizer() {
        for (bits, limit, outermost) in [(1, 0.36338, 0.79788), (2, 0.117482, 1.51042), (3, 0.034548, 2.15195), (4, 0.009501, 2.73259)] {
            let [near, far] = [256, 512].map(|width| Codebook::solve(width, bits));
            assert!((2.0 * far.distortion - near.distortion - limit).abs() < 1e-5, "{bits} bits");
            let level = |codebook: &Codebook| f64::from(*codebook.positive_levels().last().unwrap());
            assert!((2.0 * level(&far) - level(&near) - outermost).abs() < 1e-3, "{bits} bits");
        }
    }

    #[test]
    fn levels_are_centroids_of_their_cells_and_sorted() {
        for width in [2, 3, 6, 8, 20, 60, 128] {
            for bits in 1..=MOST_BITS {
                let codebook = Codebook::new(width, bits);
                let levels: Vec<f64> = codebook.positive_levels().iter().map(|x| f64::from(*x) / (width as f64).sqrt()).collect();
                assert!(levels[0] > 0.0 && levels.is_sorted_by(|a, b| a < b) && levels[levels.len() - 1] < 1.0);
                for (level, centroid) in levels.iter().zip(centroids(width, &levels)) {
                    assert!((level - centroid).abs() < 1e-6, "width {width}, {bits} bits: {level} {centroid}");
                }
                for code in 0..1 << bits {
                    assert_eq!(codebook.level(code), -codebook.level((1 << bits) - 1 - code));
                    assert_eq!(codebook.code(codebook.level(code)), code);
                }
            }
        }
    }

    /// The centroid's integrals against sums over a fine grid of the density.
    #[test]
    fn closed_forms_integrate_the_density() {
        for width in [3, 4, 7, 64] {
            let (low, high, steps) = (0.05, 0.3, 20_000);
            let density = |x: f64| (1.0 - x * x).powf((width as f64 - 3.0) / 2.0);
            let step = (high - low) / f64::from(steps);
            let mass = masses(width, &[low, high])[0];
            let sum = |f: &dyn Fn(f64) -> f64| (0..steps).map(|i| f(low + (f64::from(i) + 0.5) * step) * step).sum::<f64>();
            assert!((sum(&density) / mass - 1.0).abs() < 1e-7, "width {width}");
            let first = sum(&|x| x * density(x)) / sum(&density);
            let power = |x: f64| (1.0 - x * x).powf((width as f64 - 1.0) / 2.0);
            let closed = (power(low) - power(high)) / ((width as f64 - 1.0) * mass);
            assert!((first / closed - 1.0).abs() < 1e-7, "width {width}");
        }
    }

    #[test]
    fn random_directions_have_the_stated_distortion() {
        for width in [8, 64, 128] {
            for bits in 1..=MOST_BITS {
                let codebook = Codebook::new(width, bits);
                let mut stream = Stream::new(bits as u64, "codebook directions");
                let error = |_| {
                    let x: Vec<f64> = (0..width).map(|_| stream.normal()).collect();
                    let rms = (x.iter().map(|x| x * x).sum::<f64>() / width as f64).sqrt();
                    let unit = x.iter().map(|x| x / rms);
                    unit.map(|x| (x - f64::from(codebook.level(codebook.code(x as f32)))).powi(2)).sum::<f64>() / width as f64
                };
                let measured = (0..10_000).map(error).sum::<f64>() / 1e4;
                let ratio = measured / codebook.distortion();
                assert!((ratio - 1.0).abs() < 0.02, "width {width}, {bits} bits: {measured}, ratio {ratio}");
            }
        }
    }
}
