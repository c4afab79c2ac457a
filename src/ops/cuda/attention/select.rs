//! Which pages a query reads. Tang et al. 2024 (Quest), arXiv:2406.10774. Kernels: `kernels/page_select.cu`.

use super::layout::{PAGE, Shape};
use crate::arguments;
use crate::error::Result;
use crate::ops::cuda::{Buffer, Device, fits};

/// Bytes of a page's boxes, which [`page_boxes`] makes.
pub fn box_bytes(shape: &Shape, boxes_per_page: usize) -> Result<usize> {
    Ok(16 + 4 * shape.width()? * boxes_per_page)
}

/// Makes boxes of full exact pages, one around the keys of each of `boxes_per_page` runs of tokens (a divisor of 64): job i reads exact
/// slot `sources[i]` and writes boxes `targets[i]`.
#[expect(clippy::too_many_arguments, reason = "one per buffer")]
pub fn page_boxes<D: Device>(
    device: &D,
    shape: &Shape,
    boxes_per_page: usize,
    exact_pages: &Buffer<D, u8>,
    boxes: &Buffer<D, u8>,
    sources: &Buffer<D, u32>,
    targets: &Buffer<D, u32>,
    jobs: usize,
) -> Result<()> {
    assert!(boxes_per_page > 0 && PAGE.is_multiple_of(boxes_per_page), "boxes cut a page into equal runs");
    let [width, per_page] = [fits(shape.width()?, "head_dim")?, fits(boxes_per_page, "boxes")?];
    let args = arguments![exact_pages, boxes, sources, targets, width, per_page];
    device.launch("kv_page_box", [fits(jobs, "pages")?, 1, 1], [256, 1, 1], 0, args)
}

/// Rows (tokens) on one page, and the full pages before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    pub rows: usize,
    pub count: usize,
    /// Pages that tables have room for.
    pub stride: usize,
}

impl Pages {
    /// Words of a mask with a bit for every page.
    pub fn words(&self) -> usize {
        self.stride.div_ceil(32)
    }

    fn arguments(&self) -> Result<[u32; 2]> {
        Ok([fits(self.count, "pages")?, fits(self.stride, "pages")?])
    }

    /// A thread per page, in whole warps.
    fn block(&self, most: usize) -> [u32; 3] {
        [self.count.next_multiple_of(32).clamp(32, most) as u32, 1, 1]
    }

    /// A warp per page, four to a block.
    fn warps(&self, shape: &Shape) -> Result<[u32; 3]> {
        Ok([fits(self.count, "pages")?.div_ceil(4), fits(shape.kv_heads, "kv_heads")?, fits(self.rows, "tokens")?])
    }

    fn grid(&self, first: usize) -> Result<[u32; 3]> {
        Ok([fits(first, "heads")?, fits(self.rows, "tokens")?, 1])
    }
}

fn widths(shape: &Shape) -> Result<[u32; 3]> {
    Ok([fits(shape.group, "group")?, fits(shape.head_dim, "head_dim")?, fits(shape.width()?, "head_dim")?])
}

/// Boxes that hold the keys of pages.
pub enum Boxes<'a, D: Device> {
    /// Near pages of [`super::Near::Int8Int4`]: one box each, from the steps of their channels.
    Coded(&'a Buffer<D, u8>),
    /// What [`page_boxes`] made.
    Stored { boxes: &'a Buffer<D, u8>, per_page: usize },
}

/// What [`page_bounds`] reads.
pub struct BoundsInputs<'a, D: Device> {
    /// `[.., heads, head_dim]`, after RoPE.
    pub queries: &'a Buffer<D, f32>,
    /// The row of `queries` to begin with.
    pub first_row: usize,
    pub boxes: Boxes<'a, D>,
    /// `[kv_heads, stride]` slots of pages 0, 1, ... among the boxes.
    pub table: &'a Buffer<D, u32>,
}

/// What pages can hold at most.
pub struct Bounds<D: Device> {
    /// At least a head's largest score with a key of a page, `[rows, heads, stride]`.
    pub scores: Buffer<D, f32>,
    /// At least the largest norm of a value of a page, `[kv_heads, stride]`.
    pub value_norms: Buffer<D, f32>,
}

impl<D: Device> Bounds<D> {
    /// Room for up to `rows` rows.
    pub fn new(device: &D, shape: &Shape, rows: usize, stride: usize) -> Result<Self> {
        Ok(Self { scores: device.alloc(rows * shape.heads() * stride)?, value_norms: device.alloc(shape.kv_heads * stride)? })
    }
}

/// Bounds the pages of `pages`.
pub fn page_bounds<D: Device>(device: &D, shape: &Shape, pages: Pages, inputs: &BoundsInputs<'_, D>, bounds: &Bounds<D>) -> Result<()> {
    let (kernel, boxes, per_page) = match inputs.boxes {
        Boxes::Coded(pages) => ("page_bounds_int8_int4", pages, 1),
        Boxes::Stored { boxes, per_page } => ("page_bounds_box", boxes, fits(per_page, "boxes")?),
    };
    let [count, stride] = pages.arguments()?;
    let [group, head_dim, width] = widths(shape)?;
    let queries = inputs.queries.at(inputs.first_row * shape.heads() * shape.head_dim);
    let (scores, norms) = (&bounds.scores, &bounds.value_norms);
    let args = arguments![queries, boxes, inputs.table, scores, norms, count, stride, group, head_dim, width, per_page];
    device.launch(kernel, pages.warps(shape)?, [128, 1, 1], 0, args)
}

/// Estimates each head's largest score with a key of a page from its stored boxes: `estimates`, `[rows, heads, stride]`.
pub fn page_estimates<D: Device>(
    device: &D,
    shape: &Shape,
    pages: Pages,
    inputs: &BoundsInputs<'_, D>,
    estimates: &Buffer<D, f32>,
) -> Result<()> {
    let Boxes::Stored { boxes, per_page } = inputs.boxes else { panic!("coded pages have one box, which tells too little") };
    let [count, stride] = pages.arguments()?;
    let [group, head_dim, width] = widths(shape)?;
    let queries = inputs.queries.at(inputs.first_row * shape.heads() * shape.head_dim);
    let args = arguments![queries, boxes, inputs.table, estimates, count, stride, group, head_dim, width, fits(per_page, "boxes")?];
    device.launch("page_estimates", pages.warps(shape)?, [128, 1, 1], 0, args)
}

/// What pages are ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranking {
    /// The largest score of a head of the group.
    Largest,
    /// Shares of each head's softmax over the scores of all pages, added up over the heads of the group.
    Share,
}

/// Writes `ranks` (`[rows, kv_heads, stride]`): larger is read first. `scores`: `[rows, heads, stride]`.
pub fn rank_pages<D: Device>(
    device: &D,
    shape: &Shape,
    pages: Pages,
    ranking: Ranking,
    scores: &Buffer<D, f32>,
    ranks: &Buffer<D, u32>,
) -> Result<()> {
    let [count, stride] = pages.arguments()?;
    let args = arguments![scores, ranks, count, stride, fits(shape.group, "group")?, u32::from(ranking == Ranking::Share)];
    device.launch("rank_pages", pages.grid(shape.kv_heads)?, pages.block(1024), 0, args)
}

/// How many pages a row reads beside its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// In all, sinks and window included; never fewer than those.
    pub budget: usize,
    /// First pages, always read.
    pub sinks: usize,
    /// Last full pages, always read.
    pub window: usize,
}

/// Where [`select_pages`] puts what it chose.
pub struct Choices<'a, D: Device> {
    /// `[.., kv_heads, words]`: bit p of a row's words says that it reads page p.
    pub chosen: &'a Buffer<D, u32>,
    /// The row of `chosen` to begin with.
    pub first_row: usize,
    pub lists: Option<Lists<'a, D>>,
}

/// Lists for [`super::decode`]: chosen pages in their order, then the row's own.
pub struct Lists<'a, D: Device> {
    /// `[kv_heads, stride]` entries of full pages.
    pub entries: &'a Buffer<D, u32>,
    /// `[kv_heads, stride]` exact slots, of which that of the row's own page is read.
    pub slots: &'a Buffer<D, u32>,
    /// `[rows, kv_heads, stride]`
    pub lists: &'a Buffer<D, u32>,
    /// `[rows, kv_heads]`
    pub lengths: &'a Buffer<D, u32>,
}

/// Chooses pages. Without `ranks` only sinks and window are read.
pub fn select_pages<D: Device>(
    device: &D,
    shape: &Shape,
    pages: Pages,
    selection: Selection,
    ranks: Option<&Buffer<D, u32>>,
    choices: &Choices<'_, D>,
) -> Result<()> {
    assert!(pages.count < pages.stride.max(1), "no place for the row's own page");
    let [count, stride] = pages.arguments()?;
    let [budget, sinks, window] = [selection.budget, selection.sinks, selection.window].map(|count| count.min(1 << 30) as u32);
    let lists = choices.lists.as_ref();
    let args = arguments![
        ranks,
        lists.map(|lists| lists.entries),
        lists.map(|lists| lists.slots),
        lists.map(|lists| lists.lists),
        lists.map(|lists| lists.lengths),
        choices.chosen.at(choices.first_row * shape.kv_heads * pages.words()),
        count,
        stride,
        stride,
        fits(pages.words(), "pages")?,
        budget,
        sinks,
        window
    ];
    device.launch("select_pages", pages.grid(shape.kv_heads)?, [256, 1, 1], 0, args)
}

/// Makes `masks` (`[kv_heads, tiles, words]`) for [`super::prefill`] of what `rows` rows from `first_position` on have `chosen`
/// (`[rows, kv_heads, words]`).
pub fn unite_rows<D: Device>(
    device: &D,
    shape: &Shape,
    chosen: &Buffer<D, u32>,
    masks: &Buffer<D, u32>,
    rows: usize,
    first_position: usize,
    words: usize,
) -> Result<()> {
    let tiles = if rows == 0 { 0 } else { (first_position % PAGE + rows).div_ceil(PAGE) };
    let args = arguments![chosen, masks, fits(rows, "tokens")?, fits(first_position, "position")?, fits(words, "pages")?];
    device.launch("unite_rows", [fits(tiles, "tokens")?, fits(shape.kv_heads, "kv_heads")?, 1], [64, 1, 1], 0, args)
}

/// Bounds what skipping pages did to each head's output of one row: [`super::Summary::unread`] in `summaries`, after [`super::decode`] over
/// what was `chosen` (`[kv_heads, words]`).
pub fn unread_bound<D: Device>(
    device: &D,
    shape: &Shape,
    pages: Pages,
    bounds: &Bounds<D>,
    chosen: &Buffer<D, u32>,
    summaries: &Buffer<D, f32>,
) -> Result<()> {
    let ([count, stride], words) = (pages.arguments()?, fits(pages.words(), "pages")?);
    let args = arguments![&bounds.scores, &bounds.value_norms, chosen, summaries, count, stride, words, fits(shape.group, "group")?];
    device.launch("unread_bound", [fits(shape.heads(), "heads")?, 1, 1], pages.block(512), 0, args)
}

#[cfg(test)]
mod tests {
    use super::super::reference::attend;
    use super::super::testing::{Cache, Draw, Tokens, distance};
    use super::super::{DecodeBuffers, DecodeInputs, EXACT, Near, Summary, decode};
    use super::*;
    use crate::ops::cuda::Emulated;

    /// The rule, written plainly.
    fn chosen(scores: &[f64], selection: Selection) -> Vec<usize> {
        let forced = |page: &usize| *page < selection.sinks || page + selection.window >= scores.len();
        let mut free: Vec<usize> = (0..scores.len()).filter(|page| !forced(page)).collect();
        free.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        let always: Vec<usize> = (0..scores.len()).filter(forced).collect();
        free.truncate(selection.budget.saturating_sub(always.len()));
        let mut all = [always, free].concat();
        all.sort_unstable();
        all
    }

    /// What a group's pages are worth.
    fn worth(ranking: Ranking, bounds: &[&[f32]]) -> Vec<f64> {
        let of_head = |head: &[f32]| -> Vec<f64> {
            let largest = head.iter().fold(f32::NEG_INFINITY, |most, bound| most.max(*bound));
            let sum: f64 = head.iter().map(|bound| f64::from(bound - largest).exp()).sum();
            head.iter().map(|bound| f64::from(bound - largest).exp() / sum).collect()
        };
        let heads: Vec<Vec<f64>> = match ranking {
            Ranking::Largest => bounds.iter().map(|head| head.iter().map(|bound| f64::from(*bound)).collect()).collect(),
            Ranking::Share => bounds.iter().map(|head| of_head(head)).collect(),
        };
        let add = |a: f64, b: f64| if ranking == Ranking::Largest { a.max(b) } else { a + b };
        let first = if ranking == Ranking::Largest { f64::NEG_INFINITY } else { 0.0 };
        (0..bounds[0].len()).map(|page| heads.iter().map(|head| head[page]).fold(first, add)).collect()
    }

    const CASES: [(usize, Selection); 8] = [
        (0, Selection { budget: 4, sinks: 1, window: 1 }),
        (1, Selection { budget: 0, sinks: 0, window: 0 }),
        (5, Selection { budget: 9, sinks: 1, window: 1 }),
        (40, Selection { budget: 10, sinks: 1, window: 2 }),
        (300, Selection { budget: 75, sinks: 1, window: 2 }),
        (600, Selection { budget: 0, sinks: 1, window: 1 }),
        (257, Selection { budget: 257, sinks: 0, window: 0 }),
        (70, Selection { budget: 20, sinks: 3, window: 30 }),
    ];

    #[test]
    fn selection_follows_the_rule() {
        let Some(device) = Emulated::new() else { return };
        let (mut draw, shape) = (Draw::new(21), Shape { kv_heads: 2, group: 3, head_dim: 16 });
        for (index, (count, selection)) in CASES.into_iter().enumerate() {
            let (rows, ranking) = (1 + index % 3, if index % 2 == 0 { Ranking::Largest } else { Ranking::Share });
            let pages = Pages { rows, count, stride: count + 2 };
            let lines = rows * shape.kv_heads;
            // Few distinct values, so that ties decide; alike in all heads where sums of shares would round.
            let mut scores: Vec<f32> = (0..3 * lines * pages.stride).map(|_| (draw.normal() * 2.0).round() - 1.0).collect();
            if ranking == Ranking::Share {
                scores.chunks_mut(3 * pages.stride).for_each(|group| {
                    let (first, rest) = group.split_at_mut(pages.stride);
                    rest.chunks_mut(pages.stride).for_each(|head| head.copy_from_slice(first));
                });
            }
            let device_scores = device.upload(&scores).unwrap();
            let mut table = || (0..2 * pages.stride).map(|_| draw.below(1 << 20) as u32).collect::<Vec<u32>>();
            let (entries, slots) = (table(), table());
            let ranks = device.alloc(lines * pages.stride).unwrap();
            rank_pages(&device, &shape, pages, ranking, &device_scores, &ranks).unwrap();
            let (lists, lengths) = (device.zeros(lines * pages.stride).unwrap(), device.zeros(lines).unwrap());
            let mask = device.zeros((lines + 2) * pages.words()).unwrap();
            let (device_entries, device_slots) = (device.upload(&entries).unwrap(), device.upload(&slots).unwrap());
            let lists_of = Lists { entries: &device_entries, slots: &device_slots, lists: &lists, lengths: &lengths };
            let choices = Choices { chosen: &mask, first_row: 1, lists: Some(lists_of) };
            select_pages(&device, &shape, pages, selection, Some(&ranks), &choices).unwrap();
            let (lists, lengths, mask) =
                (device.download(&lists).unwrap(), device.download(&lengths).unwrap(), device.download(&mask).unwrap());
            for line in 0..lines {
                let heads: Vec<&[f32]> = scores.chunks(pages.stride).skip(3 * line).take(3).map(|head| &head[..count]).collect();
                let expected = chosen(&worth(ranking, &heads), selection);
                let own = line % 2 * pages.stride;
                let mut entries: Vec<u32> = expected.iter().map(|page| entries[own + page]).collect();
                entries.push(EXACT | slots[own + count]);
                assert_eq!(lists[line * pages.stride..][..lengths[line] as usize], entries, "{count} {selection:?}");
                let words = &mask[(line + 2) * pages.words()..];
                assert!((0..count).all(|page| (words[page / 32] >> (page % 32) & 1 == 1) == expected.contains(&page)));
            }
        }
    }

    #[test]
    fn tiles_read_what_their_rows_read() {
        let Some(device) = Emulated::new() else { return };
        let (mut draw, shape) = (Draw::new(23), Shape { kv_heads: 2, group: 1, head_dim: 16 });
        let (first, rows, words) = (40 * PAGE + 50, 100, 3);
        let chosen: Vec<u32> = (0..rows * 2 * words).map(|_| 1 << draw.below(32)).collect();
        let masks = device.zeros(2 * 3 * words).unwrap();
        unite_rows(&device, &shape, &device.upload(&chosen).unwrap(), &masks, rows, first, words).unwrap();
        let masks = device.download(&masks).unwrap();
        for (head, (tile, rows)) in (0..2).flat_map(|head| [0..14, 14..78, 78..100].into_iter().enumerate().map(move |tile| (head, tile))) {
            // Pages 0 to 39, 40 and 41 are before: two words.
            let united = |word: usize| rows.clone().fold(0, |all, row| all | chosen[(row * 2 + head) * words + word]);
            assert_eq!(masks[(head * 3 + tile) * words..][..words], [united(0), united(1), 0]);
        }
    }

    #[test]
    fn scores_values_and_what_is_skipped_are_bounded() {
        let Some(device) = Emulated::new() else { return };
        let mut draw = Draw::new(22);
        let cases =
            [(Near::Int8Int4, 64, 4, None), (Near::Fp8, 40, 2, Some(1)), (Near::F16, 128, 1, Some(4)), (Near::Int8Int4, 80, 3, Some(8))];
        for (near, head_dim, group, per_page) in cases {
            let shape = Shape { kv_heads: 2, group, head_dim };
            let tokens = Tokens::draw(&mut draw, &shape, 700);
            let cache = Cache::new(&device, &mut draw, shape, near, tokens);
            let queries: Vec<f32> = (0..2 * shape.heads() * head_dim).map(|_| draw.normal() * 1.5).collect();
            let device_queries = device.upload(&queries).unwrap();
            let queries = &queries[shape.heads() * head_dim..];
            let pages = Pages { rows: 1, count: cache.pages() - 1, stride: cache.pages() + 1 };
            let table = |entry: &dyn Fn(usize, usize) -> u32| {
                let cells = (0..2).flat_map(|head| (0..pages.stride).map(move |page| (head, page)));
                let all: Vec<u32> = cells.map(|(head, page)| if page <= pages.count { entry(head, page) } else { 0 }).collect();
                device.upload(&all).unwrap()
            };
            let is_stored = per_page.is_some();
            let places = table(&|head, page| if is_stored { (head * pages.stride + page) as u32 } else { cache.near_slots[head][page] });
            let per_page = per_page.unwrap_or(1);
            let stored = device.alloc(2 * pages.stride * box_bytes(&shape, per_page).unwrap()).unwrap();
            for head in (0..2).filter(|_| is_stored) {
                let sources = device.upload(&cache.exact_slots[head][..pages.count]).unwrap();
                let targets: Vec<u32> = (0..pages.count).map(|page| (head * pages.stride + page) as u32).collect();
                let targets = device.upload(&targets).unwrap();
                page_boxes(&device, &shape, per_page, &cache.exact, &stored, &sources, &targets, pages.count).unwrap();
            }
            let boxes = if is_stored { Boxes::Stored { boxes: &stored, per_page } } else { Boxes::Coded(&cache.near_pages) };
            let bounds = Bounds::new(&device, &shape, 1, pages.stride).unwrap();
            let inputs = BoundsInputs { queries: &device_queries, first_row: 1, boxes, table: &places };
            page_bounds(&device, &shape, pages, &inputs, &bounds).unwrap();
            let (scores, norms) = (device.download(&bounds.scores).unwrap(), device.download(&bounds.value_norms).unwrap());
            check_bounds(&cache, queries, &scores, &norms, pages.stride);

            let ranks = device.alloc(2 * pages.stride).unwrap();
            rank_pages(&device, &shape, pages, Ranking::Share, &bounds.scores, &ranks).unwrap();
            let (lists, lengths) = (device.zeros(2 * pages.stride).unwrap(), device.zeros(2).unwrap());
            let mask = device.zeros(2 * pages.words()).unwrap();
            let (entries, slots) =
                (table(&|head, page| cache.entry(head, page, page == pages.count)), table(&|head, page| cache.exact_slots[head][page]));
            let lists_of = Lists { entries: &entries, slots: &slots, lists: &lists, lengths: &lengths };
            let choices = Choices { chosen: &mask, first_row: 0, lists: Some(lists_of) };
            let selection = Selection { budget: 5, sinks: 1, window: 1 };
            select_pages(&device, &shape, pages, selection, Some(&ranks), &choices).unwrap();
            let own_queries = device.upload(queries).unwrap();
            let inputs = DecodeInputs {
                queries: &own_queries,
                exact_pages: &cache.exact,
                near_pages: &cache.near_pages,
                lists: &lists,
                list_stride: pages.stride,
                list_lengths: &lengths,
                last_tokens: cache.count - pages.count * PAGE,
            };
            let buffers = DecodeBuffers::new(&device, &shape, pages.stride, 2, false).unwrap();
            decode(&device, &shape, near, &inputs, &buffers).unwrap();
            unread_bound(&device, &shape, pages, &bounds, &mask, &buffers.summaries).unwrap();
            let (output, summaries) = (device.download(&buffers.output).unwrap(), device.download(&buffers.summaries).unwrap());
            assert_eq!(device.download(&lengths).unwrap(), [6, 6]);
            let mask = device.download(&mask).unwrap();
            for head in 0..shape.heads() {
                let all: Vec<(usize, bool)> = (0..=pages.count).map(|page| (page, true)).collect();
                let (truth, _) = attend(&queries[head * head_dim..][..head_dim], &cache.seen(head / group, &all).1, |_| true);
                let (error, summary) = (distance(&output[head * head_dim..][..head_dim], &truth), Summary::of(&summaries, head));
                assert!(summary.unread > 0.0 && error <= f64::from(summary.bound + summary.unread), "{near:?} {error} {summary:?}");
                // The largest value there is, found by sorting.
                let is_read = |page: usize| mask[head / group * pages.words() + page / 32] >> (page % 32) & 1 == 1;
                let unread = |page: usize| {
                    let mass = PAGE as f64 * f64::from(scores[head * pages.stride + page] - summary.lse).exp();
                    (f64::from(norms[head / group * pages.stride + page] + summary.norm + summary.bound), mass)
                };
                let mut skipped: Vec<(f64, f64)> = (0..pages.count).filter(|page| !is_read(*page)).map(unread).collect();
                skipped.sort_by(|a, b| b.0.total_cmp(&a.0));
                let (mut weight, mut moment, mut least) = (f64::from(summary.mass_low), 0.0, 0.0);
                for (radius, mass) in &skipped {
                    (weight, moment) = (weight + mass, moment + mass * radius);
                    least = f64::max(least, moment / weight);
                }
                let (found, radius) = (f64::from(summary.unread), skipped[0].0);
                assert!(found >= least && found <= least * 1.001 + 2e-4 * radius, "{found} {least} {radius}");
            }
        }
    }

    #[test]
    fn estimates_are_the_middle_and_two_deviations() {
        let Some(device) = Emulated::new() else { return };
        let mut draw = Draw::new(24);
        let shape = Shape { kv_heads: 2, group: 2, head_dim: 40 };
        let tokens = Tokens::draw(&mut draw, &shape, 400);
        let cache = Cache::new(&device, &mut draw, shape, Near::F16, tokens);
        let queries: Vec<f32> = (0..4 * 40).map(|_| draw.normal()).collect();
        let (count, stride, per_page) = (cache.pages() - 1, cache.pages() + 2, 4);
        let stored = device.alloc(2 * stride * box_bytes(&shape, per_page).unwrap()).unwrap();
        for head in 0..2 {
            let sources = device.upload(&cache.exact_slots[head][..count]).unwrap();
            let targets: Vec<u32> = (0..count).map(|page| (head * stride + page) as u32).collect();
            let targets = device.upload(&targets).unwrap();
            page_boxes(&device, &shape, per_page, &cache.exact, &stored, &sources, &targets, count).unwrap();
        }
        let (queries_there, table) =
            (device.upload(&queries).unwrap(), device.upload(&(0..2 * stride as u32).collect::<Vec<_>>()).unwrap());
        let boxes = Boxes::Stored { boxes: &stored, per_page };
        let inputs = BoundsInputs { queries: &queries_there, first_row: 0, boxes, table: &table };
        let estimates = device.alloc(4 * stride).unwrap();
        page_estimates(&device, &shape, Pages { rows: 1, count, stride }, &inputs, &estimates).unwrap();
        let estimates = device.download(&estimates).unwrap();
        for (head, page) in (0..4).flat_map(|head| (0..count).map(move |page| (head, page))) {
            let (_, exact) = cache.seen(head / 2, &[(page, true)]);
            let likely = |run: &[f32]| {
                let (mut product, mut square) = (0.0, 0.0);
                for (channel, query) in queries[head * 40..][..40].iter().enumerate() {
                    let keys = || run.iter().skip(channel).step_by(40);
                    let (low, high) = (keys().copied().fold(f32::MAX, f32::min), keys().copied().fold(f32::MIN, f32::max));
                    product += query * (low + high) / 2.0;
                    square += (query * (high - low) / 2.0).powi(2);
                }
                (product + 2.0 * square.sqrt()) / 40.0f32.sqrt()
            };
            let expected = exact.keys.chunks_exact(PAGE / per_page * 40).map(likely).fold(f32::MIN, f32::max);
            assert!((estimates[head * stride + page] - expected).abs() < 1e-4, "{head} {page}");
        }
    }

    fn check_bounds(cache: &Cache, queries: &[f32], bounds: &[f32], norms: &[f32], stride: usize) {
        let width = cache.shape.head_dim;
        for head in 0..cache.shape.heads() {
            let kv_head = head / cache.shape.group;
            for page in 0..cache.pages() - 1 {
                let (_, exact) = cache.seen(kv_head, &[(page, true)]);
                let query = &queries[head * width..][..width];
                let score =
                    |key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / (width as f64).sqrt();
                let most = exact.keys.chunks_exact(width).map(score).fold(f64::NEG_INFINITY, f64::max);
                assert!(most <= f64::from(bounds[head * stride + page]));
                let square = |value: &[f32]| value.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                let norm = exact.values.chunks_exact(width).map(square).fold(0.0, f64::max).sqrt();
                let stated = f64::from(norms[kv_head * stride + page]);
                assert!(norm <= stated && stated <= 1.5 * norm + 0.1, "{norm} {stated}");
            }
        }
    }
}
