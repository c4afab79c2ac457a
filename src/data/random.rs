//! Counter-based random numbers: the value at (seed, stream, index, n) depends on nothing else, so any part of the data can be
//! made again without replaying what came before it. The mixing function is the finalizer of SplitMix64 (Steele, Lea & Flood 2014).

use xxhash_rust::xxh3::xxh3_64;

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// One stream of random numbers.
#[derive(Debug, Clone)]
pub struct Random {
    key: u64,
    counter: u64,
}

impl Random {
    /// The stream called `stream` of `seed`, its `index`th copy.
    pub fn new(seed: u64, stream: &str, index: u64) -> Self {
        let named = mix(seed.wrapping_add(GOLDEN) ^ xxh3_64(stream.as_bytes()));
        Self { key: mix(named.wrapping_add(mix(index.wrapping_add(1).wrapping_mul(GOLDEN)))), counter: 0 }
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.counter += 1;
        mix(self.key.wrapping_add(self.counter.wrapping_mul(GOLDEN)))
    }

    /// Uniform in `0..bound` (`bound` > 0); the bias of the multiply-and-shift is below `bound / 2^64`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// One of `choices`, which is not empty.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }

    /// Fisher-Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    /// `count` different items of `from`, in random order (all of them where `from` is shorter).
    pub fn sample<T: Clone>(&mut self, from: &[T], count: usize) -> Vec<T> {
        let mut items = from.to_vec();
        let count = count.min(items.len());
        for slot in 0..count {
            let other = slot + self.below((items.len() - slot) as u64) as usize;
            items.swap(slot, other);
        }
        items.truncate(count);
        items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_reproducible_and_different() {
        let draw = |seed, stream: &str, index| {
            let mut random = Random::new(seed, stream, index);
            [random.bits(), random.bits(), random.bits()]
        };
        assert_eq!(draw(1, "a", 2), draw(1, "a", 2));
        let all = [draw(1, "a", 2), draw(2, "a", 2), draw(1, "b", 2), draw(1, "a", 3)];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| other != one));
        }
    }

    #[test]
    fn below_is_even() {
        let mut random = Random::new(7, "even", 0);
        let mut counts = [0u32; 10];
        (0..100_000).for_each(|_| counts[random.below(10) as usize] += 1);
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
    }

    #[test]
    fn shuffles_are_permutations() {
        let mut items: Vec<u32> = (0..1000).collect();
        Random::new(3, "shuffle", 0).shuffle(&mut items);
        assert_ne!(items[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        items.sort_unstable();
        assert!(items.iter().enumerate().all(|(at, &item)| at as u32 == item));
        let sample = Random::new(3, "sample", 0).sample(&items, 5);
        assert_eq!(sample.len(), 5);
        assert!(sample.iter().enumerate().all(|(at, item)| !sample[at + 1..].contains(item)));
    }
}
