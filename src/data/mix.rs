//! Weighted mixing: which source a training row comes from, and the how-manieth row of that source it is, as a pure function of
//! (seed, row).
//!
//! Rows are dealt in blocks of 1024. Within the first b blocks source i has exactly round(1024 b W_i) - round(1024 b W_(i-1)) rows,
//! where W are the cumulative weights, so shares are exact to a row over any stretch of blocks; inside a block the order is shuffled.

use super::random::Random;
use crate::error::{Error, Result};

const BLOCK: u64 = 1024;

/// The deal.
#[derive(Debug, Clone)]
pub struct Mixture {
    seed: u64,
    /// Cumulative shares; the last is 1.
    cumulative: Vec<f64>,
    /// The block in use: for each of its rows the source and the rows of that source before it in the block.
    block: Option<(u64, Vec<(u32, u32)>)>,
}

impl Mixture {
    /// Shares proportional to `weights`, which are above 0.
    pub fn new(seed: u64, weights: &[f64]) -> Result<Self> {
        let total: f64 = weights.iter().sum();
        if let Some(at) = weights.iter().position(|weight| weight / total * (BLOCK as f64) < 1.0) {
            return Err(Error::input("data.sources", format!("source {at} has less than 1/{BLOCK} of the weight"))
                .fix("give it more weight or leave it out"));
        }
        let mut sum = 0.0;
        let mut cumulative: Vec<f64> = weights
            .iter()
            .map(|weight| {
                sum += weight;
                sum / total
            })
            .collect();
        if let Some(last) = cumulative.last_mut() {
            *last = 1.0;
        }
        Ok(Self { seed, cumulative, block: None })
    }

    /// (source, how many earlier rows came from it) of row `row`.
    pub fn locate(&mut self, row: u64) -> (usize, u64) {
        if self.cumulative.len() == 1 {
            return (0, row);
        }
        let block = row / BLOCK;
        if self.block.as_ref().is_none_or(|(dealt, _)| *dealt != block) {
            self.block = Some((block, self.deal(block)));
        }
        let (_, rows) = self.block.as_ref().expect("dealt above");
        let (source, before) = rows[(row % BLOCK) as usize];
        (source as usize, self.rows_before(source as usize, block) + u64::from(before))
    }

    /// Rows of `source` in the first `blocks` blocks.
    fn rows_before(&self, source: usize, blocks: u64) -> u64 {
        let boundary = |share: f64| (blocks as f64 * BLOCK as f64 * share).round() as u64;
        boundary(self.cumulative[source]) - if source == 0 { 0 } else { boundary(self.cumulative[source - 1]) }
    }

    fn deal(&self, block: u64) -> Vec<(u32, u32)> {
        let rows = |source| self.rows_before(source, block + 1) - self.rows_before(source, block);
        let mut order: Vec<u32> = (0..self.cumulative.len()).flat_map(|source| (0..rows(source)).map(move |_| source as u32)).collect();
        Random::new(self.seed, "mixture", block).shuffle(&mut order);
        let mut counts = vec![0; self.cumulative.len()];
        let count = |source: u32| {
            counts[source as usize] += 1;
            (source, counts[source as usize] - 1)
        };
        order.into_iter().map(count).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_exact_and_rows_of_a_source_come_in_order() {
        let weights = [5.0, 0.3, 2.0 / 3.0, 1.1];
        let mut mixture = Mixture::new(9, &weights).unwrap();
        let mut next = [0u64; 4];
        let rows = 50 * BLOCK;
        for row in 0..rows {
            let (source, index) = mixture.locate(row);
            assert_eq!(index, next[source]);
            next[source] += 1;
        }
        for (count, weight) in next.iter().zip(weights) {
            assert!((*count as f64 - rows as f64 * weight / weights.iter().sum::<f64>()).abs() <= 1.0);
        }
    }

    #[test]
    fn any_row_can_be_located_first() {
        let mut forward = Mixture::new(1, &[1.0, 3.0]).unwrap();
        let all: Vec<_> = (0..5000).map(|row| forward.locate(row)).collect();
        let mut backward = Mixture::new(1, &[1.0, 3.0]).unwrap();
        assert!((0..5000).rev().all(|row| backward.locate(row) == all[row as usize]));
        let mut other = Mixture::new(2, &[1.0, 3.0]).unwrap();
        assert!((0..5000).any(|row| other.locate(row) != all[row as usize]));
    }

    #[test]
    fn tiny_weights_are_refused() {
        assert!(Mixture::new(0, &[1.0, 0.0001]).unwrap_err().to_string().contains("source 1"));
    }
}
