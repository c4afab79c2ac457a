//! Every page.

use super::{GroupQuery, PageTable, Policy};
use crate::ops::cpu::attention::TileSet;

/// Reads everything.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Dense;

impl Policy for Dense {
    fn is_dense_in(&self, _: usize) -> bool {
        true
    }

    fn pages(&self, _: &GroupQuery<'_>, table: &dyn PageTable) -> TileSet {
        TileSet::below(table.num_pages())
    }
}
