//! The pages that most likely hold the most weight. As in InfLLM-V2 (arXiv:2509.24663) the first page and the latest ones are always read,
//! the rest are ranked by their share of a softmax over pages, and the heads of a group add up their shares. The softmax is over estimates
//! of the largest score instead of pooled keys. Where a text has many more pages than are read, only those are estimated that come first by
//! the bounds of whole pages.

use super::{GroupQuery, PageTable, Policy, take_largest};
use crate::error::Error;
use crate::multiversion;
use crate::ops::cpu::attention::TileSet;
use crate::ops::cpu::math::exp;
use crate::ops::cpu::reduce;
use std::fmt;
use std::str::FromStr;

/// Pages that a share of them is at least: 512 tokens. Below that nothing is gained by reading less.
const FEWEST: usize = 8;

/// Pages that are estimated for each that is read.
const CANDIDATES: usize = 4;

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// This share of the pages before the query's own, rounded up, and no fewer than 8.
    Share(f64),
    /// So many pages, however long the text.
    Pages(usize),
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Share(share) => share.fmt(f),
            Self::Pages(pages) => pages.fmt(f),
        }
    }
}

impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let pages = || text.parse().ok().filter(|pages| *pages > 0).map(Self::Pages);
        let share = || text.parse().ok().filter(|share| *share > 0.0 && *share < 1.0).map(Self::Share);
        pages().or_else(share).ok_or_else(|| {
            Error::input("attention", format!("top-k={text} is neither a share below 1 nor a number of pages"))
                .fix("such as top-k=0.25 or top-k=32")
        })
    }
}

/// Reads the most promising pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopK {
    /// How much, the pages that are always read included.
    pub budget: Budget,
    /// Pages at the start that are always read.
    pub first: usize,
    /// Pages just before the query's own that are always read.
    pub local: usize,
}

impl Default for TopK {
    fn default() -> Self {
        // One initial and two local blocks of 64 as in NSA, arXiv:2502.11089; the query's own page is the second local one.
        Self { budget: Budget::Share(0.25), first: 1, local: 1 }
    }
}

impl Policy for TopK {
    fn needs_bounds(&self) -> bool {
        true
    }

    fn needs_estimates(&self) -> bool {
        true
    }

    fn pages(&self, query: &GroupQuery<'_>, table: &dyn PageTable) -> TileSet {
        let pages = table.num_pages();
        let budget = match self.budget {
            Budget::Share(share) => ((share * pages as f64).ceil() as usize).max(FEWEST),
            Budget::Pages(pages) => pages,
        };
        if budget >= pages {
            return TileSet::below(pages);
        }
        let mut chosen: TileSet = (0..self.first.min(pages)).chain(pages.saturating_sub(self.local)..pages).collect();
        if budget > chosen.len() {
            let candidates = candidates(query, table, CANDIDATES * budget);
            let estimates = shares(query, &candidates, |page, estimates| table.score_estimates(page, query, estimates));
            let mut scores = vec![f64::NEG_INFINITY; pages];
            candidates.iter().zip(estimates).for_each(|(page, share)| scores[page] = share);
            take_largest(&scores, budget - chosen.len(), &mut chosen);
        }
        chosen
    }
}

/// The `most` pages that come first by their bounds.
fn candidates(query: &GroupQuery<'_>, table: &dyn PageTable, most: usize) -> TileSet {
    let all = TileSet::below(table.num_pages());
    if all.len() <= most {
        return all;
    }
    let mut chosen = TileSet::default();
    take_largest(&shares(query, &all, |page, bounds| table.score_bounds(page, query, bounds)), most, &mut chosen);
    chosen
}

/// The share that each of `pages` has of a softmax over what `score` says of them, added up over the heads.
fn shares(query: &GroupQuery<'_>, pages: &TileSet, mut score: impl FnMut(usize, &mut [f32])) -> Vec<f64> {
    let heads = query.heads().len();
    let mut scores = vec![0.0; heads * pages.len()];
    pages.iter().zip(scores.chunks_exact_mut(heads)).for_each(|(page, scores)| score(page, scores));
    let (mut shares, mut weights) = (vec![0.0; pages.len()], vec![0.0; pages.len()]);
    for head in 0..heads {
        weights.iter_mut().zip(scores.iter().skip(head).step_by(heads)).for_each(|(weight, score)| *weight = *score);
        add_shares(&mut weights, &mut shares);
    }
    shares
}

multiversion! {
    /// Adds the softmax of `scores`, which are overwritten.
    fn add_shares(scores: &mut [f32], shares: &mut [f64]) {
        let largest = reduce::max(scores);
        scores.iter_mut().for_each(|score| *score = exp(*score - largest));
        let factor = 1.0 / f64::from(reduce::sum(scores));
        shares.iter_mut().zip(scores).for_each(|(share, weight)| *share += f64::from(*weight) * factor);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bounds;
    use super::*;

    fn chosen(policy: TopK, bounds: &[[f32; 2]]) -> Vec<usize> {
        let query = GroupQuery { queries: &[0.0; 2], head_dim: 1 };
        policy.pages(&query, &Bounds(bounds.iter().map(|bounds| bounds.to_vec()).collect())).iter().collect()
    }

    #[test]
    fn first_and_local_pages_are_always_in() {
        let policy = TopK { budget: Budget::Pages(1), first: 1, local: 2 };
        assert_eq!(chosen(policy, &[[0.0; 2], [9.0; 2], [9.0; 2], [0.0; 2], [0.0; 2]]), [0, 3, 4]);
        assert_eq!(chosen(policy, &[]), [0; 0]);
        assert_eq!(chosen(policy, &[[0.0; 2]]), [0]);
    }

    #[test]
    fn shares_are_compared_across_heads() {
        let policy = TopK { budget: Budget::Pages(1), first: 0, local: 0 };
        // The first head is sure of page 2; the second spreads over the others, though its scores are larger.
        assert_eq!(chosen(policy, &[[0.0, 50.0], [0.0, 50.0], [20.0, 49.0]]), [2]);
    }

    #[test]
    fn shares_have_a_least() {
        let share = TopK { budget: Budget::Share(0.25), first: 1, local: 1 };
        let bounds: Vec<[f32; 2]> = (0..40).map(|page| [page as f32 % 7.0; 2]).collect();
        assert_eq!(chosen(share, &bounds), [0, 5, 6, 12, 13, 19, 20, 27, 34, 39]);
        assert_eq!(chosen(share, &bounds[..8]).len(), 8);
        assert_eq!(chosen(share, &bounds[..9]), [0, 1, 2, 3, 4, 5, 6, 8]);
        assert_eq!(chosen(TopK { budget: Budget::Pages(12), ..share }, &bounds[..12]).len(), 12);
    }

    #[test]
    fn only_promising_pages_are_estimated() {
        /// Bounds that rank page p above page p + 1, and estimates that say the opposite.
        struct Opposite;

        impl PageTable for Opposite {
            fn num_pages(&self) -> usize {
                100
            }

            fn score_bounds(&self, page: usize, _: &GroupQuery<'_>, bounds: &mut [f32]) {
                bounds.fill(-(page as f32));
            }

            fn score_estimates(&self, page: usize, _: &GroupQuery<'_>, estimates: &mut [f32]) {
                estimates.fill(page as f32);
            }
        }

        let query = GroupQuery { queries: &[0.0; 2], head_dim: 1 };
        let policy = TopK { budget: Budget::Pages(5), first: 1, local: 1 };
        assert_eq!(policy.pages(&query, &Opposite).iter().collect::<Vec<_>>(), [0, 17, 18, 19, 99]);
    }
}
