//! Which pages a query reads. Tang et al. 2024 (Quest), arXiv:2406.10774. Kernels: `kernels/page_select.cu`.

use super::layout::{Near, Shape};
use crate::arguments;
use crate::error::Result;
use crate::ops::cuda::{Buffer, Device, fits};

/// Bytes of a page's box, which [`page_boxes`] makes for formats whose near pages have none.
pub fn box_bytes(shape: &Shape) -> Result<usize> {
    Ok(16 + 4 * shape.width()?)
}

/// Makes boxes of full exact pages: job i reads exact slot `sources[i]` and writes box `targets[i]`.
pub fn page_boxes<D: Device>(
    device: &D,
    shape: &Shape,
    exact_pages: &Buffer<D, u8>,
    boxes: &Buffer<D, u8>,
    sources: &Buffer<D, u32>,
    targets: &Buffer<D, u32>,
    jobs: usize,
) -> Result<()> {
    let args = arguments![exact_pages, boxes, sources, targets, fits(shape.width()?, "head_dim")?];
    device.launch("kv_page_box", [fits(jobs, "pages")?, 1, 1], [256, 1, 1], 0, args)
}

/// What [`page_bounds`] reads.
pub struct BoundsInputs<'a, D: Device> {
    /// `[heads, head_dim]`, after RoPE.
    pub queries: &'a Buffer<D, f32>,
    /// The near pages of [`Near::Int8Int4`]; boxes for the other formats.
    pub boxes: &'a Buffer<D, u8>,
    /// `[kv_heads, stride]` slots of the boxes (near slots, or slots of boxes) of pages 0, 1, ...
    pub table: &'a Buffer<D, u32>,
    pub stride: usize,
    /// Full pages before the page under way.
    pub pages: usize,
}

/// Writes `bounds` (`[heads, stride]`, at least the largest score of each page) and `value_norms` (`[kv_heads, stride]`, at least the
/// largest norm of its values).
pub fn page_bounds<D: Device>(
    device: &D,
    shape: &Shape,
    near: Near,
    inputs: &BoundsInputs<'_, D>,
    bounds: &Buffer<D, f32>,
    value_norms: &Buffer<D, f32>,
) -> Result<()> {
    let kernel = if near == Near::Int8Int4 { "page_bounds_int8_int4" } else { "page_bounds_box" };
    let (pages, stride) = (fits(inputs.pages, "pages")?, fits(inputs.stride, "pages")?);
    let (group, head_dim) = (fits(shape.group, "group")?, fits(shape.head_dim, "head_dim")?);
    let width = fits(shape.width()?, "head_dim")?;
    let args = arguments![inputs.queries, inputs.boxes, inputs.table, bounds, value_norms, pages, stride, group, head_dim, width];
    device.launch(kernel, [pages.div_ceil(4), fits(shape.kv_heads, "kv_heads")?, 1], [128, 1, 1], 0, args)
}

/// How many pages a query reads beside the page under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// In all, sinks and window included; never fewer than those.
    pub budget: usize,
    /// First pages, always read.
    pub sinks: usize,
    /// Last full pages, always read.
    pub window: usize,
}

/// Writes lists for [`super::decode`]: chosen pages in their order, then the page under way.
///
/// `bounds`: as [`page_bounds`] wrote them; those of chosen pages become -infinity. `entries`: `[kv_heads, stride]`, the entry of every
/// page and, at index `pages`, of the page under way. `lists`: `[kv_heads, list_stride]`, with room for `pages + 1`.
#[expect(clippy::too_many_arguments, reason = "one per buffer")]
pub fn select_pages<D: Device>(
    device: &D,
    shape: &Shape,
    selection: Selection,
    bounds: &Buffer<D, f32>,
    entries: &Buffer<D, u32>,
    (pages, stride): (usize, usize),
    lists: &Buffer<D, u32>,
    list_stride: usize,
    list_lengths: &Buffer<D, u32>,
) -> Result<()> {
    assert!(pages < stride.max(1), "no place for the page under way");
    let [pages, stride, list_stride] = [fits(pages, "pages")?, fits(stride, "pages")?, fits(list_stride, "pages")?];
    let [budget, sinks, window] = [selection.budget, selection.sinks, selection.window].map(|count| count.min(1 << 30) as u32);
    let group = fits(shape.group, "group")?;
    let args = arguments![bounds, entries, lists, list_lengths, pages, stride, list_stride, group, budget, sinks, window];
    device.launch("select_pages", [fits(shape.kv_heads, "kv_heads")?, 1, 1], [256, 1, 1], 0, args)
}

/// Bounds what skipping pages did to each head's output: [`super::Summary::unread`] in `summaries`, after [`select_pages`] and
/// [`super::decode`] over its lists.
pub fn unread_bound<D: Device>(
    device: &D,
    shape: &Shape,
    bounds: &Buffer<D, f32>,
    value_norms: &Buffer<D, f32>,
    (pages, stride): (usize, usize),
    summaries: &Buffer<D, f32>,
) -> Result<()> {
    let args = arguments![bounds, value_norms, summaries, fits(pages, "pages")?, fits(stride, "pages")?, fits(shape.group, "group")?];
    device.launch("unread_bound", [fits(shape.heads(), "heads")?, 1, 1], [128, 1, 1], 0, args)
}

#[cfg(test)]
mod tests {
    use super::super::reference::attend;
    use super::super::testing::{Cache, Draw, Tokens, distance};
    use super::super::{DecodeBuffers, DecodeInputs, PAGE, Summary, decode};
    use super::*;
    use crate::ops::cuda::Emulated;

    /// The rule, written plainly.
    fn chosen(bounds: &[Vec<f32>], pages: usize, selection: Selection) -> Vec<usize> {
        let score = |page: usize| bounds.iter().map(|head| head[page]).fold(f32::NEG_INFINITY, f32::max);
        let forced = |page: &usize| *page < selection.sinks || page + selection.window >= pages;
        let mut free: Vec<usize> = (0..pages).filter(|page| !forced(page)).collect();
        free.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
        let always: Vec<usize> = (0..pages).filter(forced).collect();
        free.truncate(selection.budget.saturating_sub(always.len()));
        let mut all = [always, free].concat();
        all.sort_unstable();
        all
    }

    #[test]
    fn selection_follows_the_rule() {
        let Some(device) = Emulated::new() else { return };
        let mut draw = Draw::new(21);
        for (pages, budget, sinks, window) in
            [(0, 4, 1, 1), (1, 0, 0, 0), (5, 9, 1, 1), (40, 10, 1, 2), (300, 75, 1, 2), (600, 0, 1, 1), (257, 257, 0, 0), (70, 20, 3, 30)]
        {
            let shape = Shape { kv_heads: 2, group: 3, head_dim: 16 };
            let stride = pages + 2;
            // Few distinct values, so that ties decide.
            let bounds: Vec<f32> = (0..6 * stride).map(|_| (draw.normal() * 2.0).round() - 1.0).collect();
            let entries: Vec<u32> = (0..2 * stride).map(|_| draw.below(1 << 20) as u32).collect();
            let device_bounds = device.upload(&bounds).unwrap();
            let (lists, lengths) = (device.zeros(2 * stride).unwrap(), device.zeros(2).unwrap());
            let selection = Selection { budget, sinks, window };
            let table = device.upload(&entries).unwrap();
            select_pages(&device, &shape, selection, &device_bounds, &table, (pages, stride), &lists, stride, &lengths).unwrap();
            let (lists, lengths, after) =
                (device.download(&lists).unwrap(), device.download(&lengths).unwrap(), device.download(&device_bounds).unwrap());
            for head in 0..2 {
                let rows: Vec<Vec<f32>> = bounds[head * 3 * stride..][..3 * stride].chunks(stride).map(<[f32]>::to_vec).collect();
                let pages_chosen = chosen(&rows, pages, selection);
                let mut expected: Vec<u32> = pages_chosen.iter().map(|page| entries[head * stride + page]).collect();
                expected.push(entries[head * stride + pages]);
                assert_eq!(lists[head * stride..][..lengths[head] as usize], expected, "{pages} {selection:?}");
                for page in 0..pages {
                    let skipped = !pages_chosen.contains(&page);
                    assert_eq!(after[head * 3 * stride + page] == rows[0][page], skipped);
                }
            }
        }
    }

    #[test]
    fn scores_values_and_what_is_skipped_are_bounded() {
        let Some(device) = Emulated::new() else { return };
        let mut draw = Draw::new(22);
        for (near, head_dim, group) in [(Near::Int8Int4, 64, 4), (Near::Fp8, 40, 2), (Near::F16, 128, 1)] {
            let shape = Shape { kv_heads: 2, group, head_dim };
            let tokens = Tokens::draw(&mut draw, &shape, 700);
            let cache = Cache::new(&device, &mut draw, shape, near, tokens);
            let queries: Vec<f32> = (0..shape.heads() * head_dim).map(|_| draw.normal() * 1.5).collect();
            let device_queries = device.upload(&queries).unwrap();
            let (pages, stride) = (cache.pages() - 1, cache.pages() + 1);
            let table = |entry: &dyn Fn(usize, usize) -> u32| {
                let rows = (0..2).flat_map(|head| (0..stride).map(move |page| (head, page)));
                let all: Vec<u32> = rows.map(|(head, page)| if page <= pages { entry(head, page) } else { 0 }).collect();
                device.upload(&all).unwrap()
            };
            let slots =
                table(&|head, page| if near == Near::Int8Int4 { cache.near_slots[head][page] } else { (head * stride + page) as u32 });
            let boxes = device.alloc(2 * stride * box_bytes(&shape).unwrap()).unwrap();
            if near != Near::Int8Int4 {
                for head in 0..2 {
                    let sources = device.upload(&cache.exact_slots[head][..pages]).unwrap();
                    let targets: Vec<u32> = (0..pages).map(|page| (head * stride + page) as u32).collect();
                    page_boxes(&device, &shape, &cache.exact, &boxes, &sources, &device.upload(&targets).unwrap(), pages).unwrap();
                }
            }
            let (bounds, norms) = (device.zeros(shape.heads() * stride).unwrap(), device.zeros(2 * stride).unwrap());
            let boxes = if near == Near::Int8Int4 { &cache.near_pages } else { &boxes };
            let inputs = BoundsInputs { queries: &device_queries, boxes, table: &slots, stride, pages };
            page_bounds(&device, &shape, near, &inputs, &bounds, &norms).unwrap();
            check_bounds(&cache, &queries, &device.download(&bounds).unwrap(), &device.download(&norms).unwrap(), stride);

            let entries = table(&|head, page| cache.entry(head, page, page == pages));
            let (lists, lengths) = (device.zeros(2 * stride).unwrap(), device.zeros(2).unwrap());
            let selection = Selection { budget: 5, sinks: 1, window: 1 };
            select_pages(&device, &shape, selection, &bounds, &entries, (pages, stride), &lists, stride, &lengths).unwrap();
            let inputs = DecodeInputs {
                queries: &device_queries,
                exact_pages: &cache.exact,
                near_pages: &cache.near_pages,
                lists: &lists,
                list_stride: stride,
                list_lengths: &lengths,
                last_tokens: cache.count - pages * PAGE,
            };
            let buffers = DecodeBuffers::new(&device, &shape, stride, 2).unwrap();
            decode(&device, &shape, near, &inputs, &buffers).unwrap();
            unread_bound(&device, &shape, &bounds, &norms, (pages, stride), &buffers.summaries).unwrap();
            let (output, summaries) = (device.download(&buffers.output).unwrap(), device.download(&buffers.summaries).unwrap());
            assert_eq!(device.download(&lengths).unwrap(), [6, 6]);
            for head in 0..shape.heads() {
                let all: Vec<(usize, bool)> = (0..=pages).map(|page| (page, true)).collect();
                let (truth, _) = attend(&queries[head * head_dim..][..head_dim], &cache.seen(head / group, &all).1, |_| true);
                let (error, summary) = (distance(&output[head * head_dim..][..head_dim], &truth), Summary::of(&summaries, head));
                assert!(summary.unread > 0.0 && error <= f64::from(summary.bound + summary.unread), "{near:?} {error} {summary:?}");
            }
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
