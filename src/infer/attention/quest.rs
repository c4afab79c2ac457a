//! The pages whose keys could match best. Tang et al. 2024, arXiv:2406.10774: a page's score is the upper bound
//! sum_c max(q_c low_c, q_c high_c) over the box that holds its keys; the first two layers are dense. The paper chooses per query
//! head; here the heads of a group share the pages, by the largest bound among them, so that each head's best page is a candidate.

use super::{GroupQuery, PageTable, Policy, take_largest};
use crate::ops::cpu::attention::TileSet;

/// Reads a fixed number of pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quest {
    /// Pages before the query's own.
    pub pages: usize,
    /// Layers at the bottom that read every page.
    pub dense_layers: usize,
}

impl Default for Quest {
    fn default() -> Self {
        // 2048 tokens, the paper's middle budget.
        Self { pages: 32, dense_layers: 2 }
    }
}

impl Policy for Quest {
    fn is_dense_in(&self, layer: usize) -> bool {
        layer < self.dense_layers
    }

    fn needs_bounds(&self) -> bool {
        true
    }

    fn pages(&self, query: &GroupQuery<'_>, table: &dyn PageTable) -> TileSet {
        if table.num_pages() <= self.pages {
            return TileSet::below(table.num_pages());
        }
        let mut bounds = vec![0.0; query.heads().len()];
        let mut score = |page: usize| {
            table.score_bounds(page, query, &mut bounds);
            bounds.iter().fold(f64::NEG_INFINITY, |most, bound| most.max(f64::from(*bound)))
        };
        let scores: Vec<f64> = (0..table.num_pages()).map(&mut score).collect();
        let mut chosen = TileSet::default();
        take_largest(&scores, self.pages, &mut chosen);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bounds;
    use super::*;

    #[test]
    fn every_heads_best_page_is_a_candidate() {
        let query = GroupQuery { queries: &[0.0; 2], head_dim: 1 };
        let table = Bounds(vec![vec![0.0, 0.0], vec![-9.0, 4.0], vec![3.0, -9.0], vec![1.0, 1.0]]);
        let quest = |pages| Quest { pages, dense_layers: 2 }.pages(&query, &table).iter().collect::<Vec<_>>();
        assert_eq!(quest(2), [1, 2]);
        assert_eq!(quest(3), [1, 2, 3]);
        assert_eq!(quest(4), [0, 1, 2, 3]);
        assert!(Quest::default().is_dense_in(1) && !Quest::default().is_dense_in(2));
    }
}
