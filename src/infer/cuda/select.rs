//! What tokens read under a sparse policy. Its kernels rank the pages and choose; the host only says how many, which a policy decides from the
//! length of the text alone. Nothing that depends on a page comes to the host.

use super::cache::Cache;
use crate::error::Result;
use crate::infer::attention::{Attention, GroupQuery, PageTable};
use crate::infer::cache::Options;
use crate::ops::cpu::attention::{RUN, TileSet};
use crate::ops::cuda::attention::{self as kernels, Bounds, BoundsInputs, Choices, Lists, Masks, PAGE, Pages, Ranking, Selection, Shape};
use crate::ops::cuda::{Buffer, Device};

/// Boxes around a page's keys for ranking and bounds. Where it is 1, formats whose coded pages have a box of their own store none.
pub(super) fn boxes_per_page(attention: Attention) -> usize {
    if attention.policy().needs_estimates() { PAGE / RUN } else { 1 }
}

/// Rows of a prompt that are chosen for together: those on one page.
const ROWS: usize = PAGE;

/// The choice of pages and what it rests on, for one layer at a time.
pub(super) struct Selector<D: Device> {
    shape: Shape,
    attention: Attention,
    /// Pages of the cache.
    stride: usize,
    /// Absent where neither the policy nor a certificate asks for them.
    bounds: Option<Bounds<D>>,
    /// Absent where the policy does not ask for them, `[rows, heads, pages]`.
    estimates: Option<Buffer<D, f32>>,
    ranks: Option<Buffer<D, u32>>,
    /// `[rows of a pass, kv_heads, words]`
    chosen: Buffer<D, u32>,
    /// `[kv_heads, tiles of a pass, words]`
    masks: Buffer<D, u32>,
    /// Lists of one token, `[kv_heads, pages]`, and their lengths.
    pub(super) lists: Buffer<D, u32>,
    pub(super) lengths: Buffer<D, u32>,
    /// What was last asked for: pages before a query's own, and what is read of them.
    known: Option<(usize, Option<Selection>)>,
}

impl<D: Device> Selector<D> {
    /// For a cache of `stride` pages and passes of up to `rows` tokens.
    pub(super) fn new(device: &D, shape: Shape, options: &Options, stride: usize, rows: usize) -> Result<Self> {
        let policy = options.attention.policy();
        let is_sparse = options.attention != Attention::Dense;
        let (rows, lines) = if is_sparse { (rows, rows.min(ROWS)) } else { (0, 0) };
        let (words, tiles) = (stride.div_ceil(32), rows.div_ceil(PAGE) + 1);
        let has_ranks = is_sparse && policy.needs_bounds();
        let has_estimates = is_sparse && policy.needs_estimates();
        let has_bounds = (has_ranks && !has_estimates) || (is_sparse && options.certifies());
        Ok(Self {
            shape,
            attention: options.attention,
            stride,
            bounds: has_bounds.then(|| Bounds::new(device, &shape, lines, stride)).transpose()?,
            estimates: has_estimates.then(|| device.alloc(lines * shape.heads() * stride)).transpose()?,
            ranks: has_ranks.then(|| device.alloc(lines * shape.kv_heads * stride)).transpose()?,
            chosen: device.alloc(rows * shape.kv_heads * words)?,
            masks: device.alloc(shape.kv_heads * tiles * words)?,
            lists: device.zeros(shape.kv_heads * stride)?,
            lengths: device.zeros(shape.kv_heads)?,
            known: None,
        })
    }

    /// What a query in `layer` reads of the `own` pages before its own; all of them when absent.
    pub(super) fn selection(&mut self, layer: usize, own: usize) -> Option<Selection> {
        if self.attention.policy().is_dense_in(layer) {
            return None;
        }
        if let Some((known, selection)) = self.known
            && known == own
        {
            return selection;
        }
        let selection = selection(&self.attention, own);
        self.known = Some((own, selection));
        selection
    }

    fn pages(&self, rows: usize, own: usize) -> Pages {
        Pages { rows, count: own, stride: self.stride }
    }

    /// Bounds and ranks of the pages before `own` for `pages.rows` rows of `queries` from the given one on.
    fn rank(&self, device: &D, cache: &Cache<D>, layer: usize, (queries, first_row): (&Buffer<D, f32>, usize), pages: Pages) -> Result<()> {
        let (boxes, table) = cache.boxes(layer);
        let inputs = BoundsInputs { queries, first_row, boxes, table };
        if let Some(bounds) = &self.bounds {
            kernels::page_bounds(device, &self.shape, pages, &inputs, bounds)?;
        }
        let Some(ranks) = &self.ranks else { return Ok(()) };
        if let Some(estimates) = &self.estimates {
            kernels::page_estimates(device, &self.shape, pages, &inputs, estimates)?;
            return kernels::rank_pages(device, &self.shape, pages, Ranking::Share, estimates, ranks);
        }
        let bounds = self.bounds.as_ref().expect("what is ranked without estimates is ranked by bounds");
        kernels::rank_pages(device, &self.shape, pages, Ranking::Largest, &bounds.scores, ranks)
    }

    /// Makes the lists of one token on page `own`.
    pub(super) fn choose(
        &self,
        device: &D,
        cache: &Cache<D>,
        layer: usize,
        query: &Buffer<D, f32>,
        own: usize,
        selection: Selection,
    ) -> Result<()> {
        let pages = self.pages(1, own);
        self.rank(device, cache, layer, (query, 0), pages)?;
        let (entries, slots) = cache.tables(layer);
        let lists = Lists { entries, slots, lists: &self.lists, lengths: &self.lengths };
        let choices = Choices { chosen: &self.chosen, first_row: 0, lists: Some(lists) };
        kernels::select_pages(device, &self.shape, pages, selection, self.ranks.as_ref(), &choices)
    }

    /// Chooses for `rows` tokens of a prompt, the first at position `first`.
    pub(super) fn choose_rows(
        &self,
        device: &D,
        cache: &Cache<D>,
        layer: usize,
        queries: &Buffer<D, f32>,
        rows: usize,
        first: usize,
    ) -> Result<Masks<'_, D>> {
        let mut row = 0;
        while row < rows {
            let own = (first + row) / PAGE;
            let count = (rows - row).min((own + 1) * PAGE - first - row);
            let (pages, choices) = (self.pages(count, own), Choices { chosen: &self.chosen, first_row: row, lists: None });
            if let Some(selection) = selection(&self.attention, own) {
                self.rank(device, cache, layer, (queries, row), pages)?;
                kernels::select_pages(device, &self.shape, pages, selection, self.ranks.as_ref(), &choices)?;
            } else {
                let all = Selection { budget: own, sinks: own, window: 0 };
                kernels::select_pages(device, &self.shape, pages, all, None, &choices)?;
            }
            row += count;
        }
        let words = self.pages(rows, 0).words();
        kernels::unite_rows(device, &self.shape, &self.chosen, &self.masks, rows, first, words)?;
        Ok(Masks { of_tiles: &self.masks, of_rows: Some(&self.chosen), words })
    }

    /// Adds the bound of what the token on page `own` did not read to `summaries`.
    pub(super) fn bound_unread(&self, device: &D, own: usize, summaries: &Buffer<D, f32>) -> Result<()> {
        let Some(bounds) = &self.bounds else { return Ok(()) };
        kernels::unread_bound(device, &self.shape, self.pages(1, own), bounds, &self.chosen, summaries)
    }

    /// The pages before `own` that each key-value head reads.
    pub(super) fn chosen(&self, device: &D, own: usize) -> Result<Vec<TileSet>> {
        let words = self.pages(1, own).words();
        let mut mask = vec![0; self.shape.kv_heads * words];
        device.read(&self.chosen, 0, &mut mask)?;
        Ok(mask.chunks_exact(words).map(|mask| (0..own).filter(|page| mask[page / 32] >> (page % 32) & 1 == 1).collect()).collect())
    }

    /// Says that each key-value head reads other pages than those chosen.
    pub(super) fn set_chosen(&self, device: &D, pages: &[Vec<usize>]) -> Result<()> {
        let words = self.pages(1, 0).words();
        let mut mask = vec![0; self.shape.kv_heads * words];
        for (mask, pages) in mask.chunks_exact_mut(words).zip(pages) {
            pages.iter().for_each(|page| mask[page / 32] |= 1u32 << (page % 32));
        }
        device.write(&self.chosen, 0, &mask)
    }

    /// What bounds the pages of one token: `[heads, pages]` scores and `[kv_heads, pages]` norms of values.
    pub(super) fn bounds(&self, device: &D) -> Result<(Vec<f32>, Vec<f32>)> {
        let Some(bounds) = &self.bounds else { return Ok((vec![], vec![])) };
        let mut scores = vec![0.0; self.shape.heads() * self.stride];
        device.read(&bounds.scores, 0, &mut scores)?;
        Ok((scores, device.download(&bounds.value_norms)?))
    }
}

/// How many pages of `own` a policy reads and which of them always; all when absent.
fn selection(attention: &Attention, own: usize) -> Option<Selection> {
    let query = GroupQuery { queries: &[0.0], head_dim: 1 };
    let budget = attention.policy().pages(&query, &Alike(own)).len();
    let (sinks, window) = match attention {
        Attention::Dense => (own, 0),
        Attention::Quest(_) => (0, 0),
        Attention::Window(window) => (window.sinks, window.tokens.div_ceil(PAGE)),
        Attention::TopK(top_k) => (top_k.first, top_k.local),
    };
    (budget < own).then_some(Selection { budget, sinks, window })
}

/// Pages between which no bound tells.
struct Alike(usize);

impl PageTable for Alike {
    fn num_pages(&self) -> usize {
        self.0
    }

    fn score_bounds(&self, _: usize, _: &GroupQuery<'_>, bounds: &mut [f32]) {
        bounds.fill(0.0);
    }

    fn score_estimates(&self, _: usize, _: &GroupQuery<'_>, estimates: &mut [f32]) {
        estimates.fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_the_policies() {
        let of = |policy: &str, own| selection(&policy.parse().unwrap(), own);
        assert_eq!(of("dense", 100), None);
        assert_eq!(of("window=128", 4), Some(Selection { budget: 3, sinks: 1, window: 2 }));
        assert_eq!(of("window=128", 3), None);
        assert_eq!(of("quest=5", 5), None);
        assert_eq!(of("quest=5", 6), Some(Selection { budget: 5, sinks: 0, window: 0 }));
        assert_eq!(of("top-k=40", 100), Some(Selection { budget: 40, sinks: 1, window: 1 }));
        assert_eq!(of("top-k=0.5", 100), Some(Selection { budget: 50, sinks: 1, window: 1 }));
        assert_eq!(of("top-k=0.5", 9), Some(Selection { budget: 8, sinks: 1, window: 1 }));
    }
}
