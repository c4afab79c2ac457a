//! Counter-based random numbers: every value is a pure function of (seed, stream name, counter), so that nothing has to be saved and the
//! order of generation does not matter. SplitMix64 finalizer: Steele, Lea & Flood 2014, doi:10.1145/2714064.2660195.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A named stream of random numbers.
#[derive(Clone, Debug)]
pub struct Stream {
    key: u64,
    counter: u64,
}

impl Stream {
    /// The stream `name` of `seed`.
    pub fn new(seed: u64, name: &str) -> Self {
        Self { key: xxh3_64_with_seed(name.as_bytes(), seed), counter: 0 }
    }

    /// The stream with its counter at `index`, for random access.
    #[must_use]
    pub fn at(mut self, index: u64) -> Self {
        self.counter = index;
        self
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        let mut z = self.key.wrapping_add(self.counter.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        self.counter = self.counter.wrapping_add(1);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1) with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform integer below `bound`, which must be positive (multiply-shift; bias below 2^-32 for bounds below 2^32).
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::Stream;

    #[test]
    fn streams_differ_by_name_and_seed_and_repeat() {
        let first = |seed, name| Stream::new(seed, name).bits();
        assert_eq!(first(1, "a"), first(1, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
        assert_ne!(first(1, "a"), first(2, "a"));
        let mut walked = Stream::new(1, "a");
        walked.bits();
        assert_eq!(walked.bits(), Stream::new(1, "a").at(1).bits());
    }

    #[test]
    fn moments_of_normal_and_uniform() {
        let mut stream = Stream::new(7, "moments");
        let n = 200_000;
        let (mut mean, mut square, mut uniform) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            let x = stream.normal();
            mean += x;
            square += x * x;
            uniform += stream.uniform();
        }
        let n = f64::from(n);
        assert!((mean / n).abs() < 0.01, "{}", mean / n);
        assert!((square / n - 1.0).abs() < 0.02, "{}", square / n);
        assert!((uniform / n - 0.5).abs() < 0.005, "{}", uniform / n);
    }
}
