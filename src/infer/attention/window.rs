//! The first pages and the last ones. Xiao et al. 2023, arXiv:2309.17453: the first tokens gather weight as a sink and have to stay;
//! unlike there, positions are those of the text.

use super::{GroupQuery, PageTable, Policy};
use crate::ops::cpu::attention::{TILE, TileSet};

/// Reads the first pages and those that hold the last tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// At least so many of the last tokens, rounded up to whole pages, before the query's page.
    pub tokens: usize,
    /// Pages at the start.
    pub sinks: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self { tokens: 1024, sinks: 1 }
    }
}

impl Policy for Window {
    fn pages(&self, _: &GroupQuery<'_>, table: &dyn PageTable) -> TileSet {
        let pages = table.num_pages();
        let first = pages.saturating_sub(self.tokens.div_ceil(TILE));
        (0..self.sinks.min(pages)).chain(first..pages).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Bounds;
    use super::*;

    #[test]
    fn sinks_and_the_last_pages() {
        let window = Window { tokens: 100, sinks: 1 };
        let pages = |count| {
            let query = GroupQuery { queries: &[0.0], head_dim: 1 };
            window.pages(&query, &Bounds(vec![vec![0.0]; count])).iter().collect::<Vec<_>>()
        };
        assert_eq!(pages(0), [0; 0]);
        assert_eq!(pages(2), [0, 1]);
        assert_eq!(pages(9), [0, 7, 8]);
    }
}
