//! The pages that could hold the most weight. As in InfLLM-V2 (arXiv:2509.24663) the first page and the latest ones are always read, the
//! rest are ranked by their share of a softmax over pages, and the heads of a group add up their shares. The softmax is over the upper
//! bounds of the scores instead of pooled keys, so what is left out is exactly what the bound on unread weight charges least for.

use super::{GroupQuery, PageTable, Policy, take_largest};
use crate::error::Error;
use crate::multiversion;
use crate::ops::cpu::attention::TileSet;
use crate::ops::cpu::math::exp;
use crate::ops::cpu::reduce;
use std::fmt;
use std::str::FromStr;

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// This share of the pages before the query's own, rounded up.
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

    fn pages(&self, query: &GroupQuery<'_>, table: &dyn PageTable) -> TileSet {
        let pages = table.num_pages();
        let budget = match self.budget {
            Budget::Share(share) => (share * pages as f64).ceil() as usize,
            Budget::Pages(pages) => pages,
        };
        let mut chosen: TileSet = (0..self.first.min(pages)).chain(pages.saturating_sub(self.local)..pages).collect();
        if budget >= pages {
            return TileSet::below(pages);
        }
        if budget > chosen.len() {
            take_largest(&shares(query, table), budget - chosen.len(), &mut chosen);
        }
        chosen
    }
}

/// Every page's share of each head's softmax over the pages' bounds, added up over the heads.
fn shares(query: &GroupQuery<'_>, table: &dyn PageTable) -> Vec<f64> {
    let (heads, pages) = (query.heads().len(), table.num_pages());
    let mut bounds = vec![0.0; heads * pages];
    bounds.chunks_exact_mut(heads).enumerate().for_each(|(page, bounds)| table.score_bounds(page, query, bounds));
    let (mut shares, mut weights) = (vec![0.0; pages], vec![0.0; pages]);
    for head in 0..heads {
        weights.iter_mut().zip(bounds.iter().skip(head).step_by(heads)).for_each(|(weight, bound)| *weight = *bound);
        add_shares(&mut weights, &mut shares);
    }
    shares
}

multiversion! {
    /// Adds the softmax of `bounds`, which are overwritten.
    fn add_shares(bounds: &mut [f32], shares: &mut [f64]) {
        let largest = reduce::max(bounds);
        bounds.iter_mut().for_each(|bound| *bound = exp(*bound - largest));
        let factor = 1.0 / f64::from(reduce::sum(bounds));
        shares.iter_mut().zip(bounds).for_each(|(share, weight)| *share += f64::from(*weight) * factor);
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
        let share = TopK { budget: Budget::Share(0.25), first: 1, local: 1 };
        let bounds: Vec<[f32; 2]> = (0..12).map(|page| [page as f32 % 7.0; 2]).collect();
        assert_eq!(chosen(share, &bounds), [0, 6, 11]);
        assert_eq!(chosen(TopK { budget: Budget::Pages(12), ..share }, &bounds).len(), 12);
    }
}
