//! Attention of one query token over page lists, with how far the answer can be from the one of exact pages.
//! Kernels: `kernels/attention_decode.cuh` (parts of the context), `kernels/attention_merge.cu` (their merge, and the bound's proof).

use super::layout::{Near, PAGE, Shape};
use crate::arguments;
use crate::error::Result;
use crate::ops::cuda::{Buffer, Device, fits};

/// Floats of a part before its output.
const PARTIAL_HEAD: usize = 8;
/// Floats of a [`Summary`].
const SUMMARY: usize = 12;
/// Floats of a [`PageFacts`].
const PAGE_FACTS: usize = 8;
const WARPS: usize = 4;
/// Query heads one block takes.
const QUERIES: usize = 8;
/// Parts the merge kernel has room for.
const MAX_SPLITS: usize = 1024;

/// What decode reads.
pub struct DecodeInputs<'a, D: Device> {
    /// `[heads, head_dim]`, after RoPE.
    pub queries: &'a Buffer<D, f32>,
    pub exact_pages: &'a Buffer<D, u8>,
    /// Not read with [`Near::F16`]; any buffer will do.
    pub near_pages: &'a Buffer<D, u8>,
    /// `[kv_heads, list_stride]` entries; pages in any order, but the page of the query's own token last. Near pages are full.
    pub lists: &'a Buffer<D, u32>,
    pub list_stride: usize,
    /// `[kv_heads]` entries of each list.
    pub list_lengths: &'a Buffer<D, u32>,
    /// Tokens in the last page of every list, 1 to 64.
    pub last_tokens: usize,
}

/// What decode writes, sized for one layer and used again by the next.
pub struct DecodeBuffers<D: Device> {
    /// `[heads, head_dim]`; 0 for an empty list.
    pub output: Buffer<D, f32>,
    /// `[heads, 12]`, see [`Summary`].
    pub summaries: Buffer<D, f32>,
    /// `[heads, list_stride, 8]`, see [`PageFacts`]; none where nobody recovers.
    pub page_facts: Option<Buffer<D, f32>>,
    partials: Buffer<D, f32>,
    splits: usize,
    list_stride: usize,
}

impl<D: Device> DecodeBuffers<D> {
    /// For lists of up to `list_stride` pages, cut into `splits` parts (at most 1024); `keeps_facts` of every page or not.
    pub fn new(device: &D, shape: &Shape, list_stride: usize, splits: usize, keeps_facts: bool) -> Result<Self> {
        let (heads, splits) = (shape.heads(), splits.clamp(1, MAX_SPLITS));
        Ok(Self {
            output: device.alloc(heads * shape.head_dim)?,
            summaries: device.alloc(heads * SUMMARY)?,
            page_facts: keeps_facts.then(|| device.alloc(heads * list_stride * PAGE_FACTS)).transpose()?,
            partials: device.alloc(heads * splits * (PARTIAL_HEAD + shape.width()?))?,
            splits,
            list_stride,
        })
    }
}

/// Parts to cut lists of `pages` pages into: as many blocks as the device runs side by side and not one more, which would begin when the
/// others are done; but no part shorter than four pages, which is one for every warp.
///
/// # Errors
/// When the kernel cannot be loaded.
pub fn num_splits<D: Device>(device: &D, shape: &Shape, near: Near, pages: usize) -> Result<usize> {
    let (width, blocks) = (shape.width()?, shape.kv_heads * shape.group.div_ceil(QUERIES));
    let resident =
        device.resident_blocks(&kernel(near, width), fits(32 * WARPS, "threads")?, fits(shared_bytes(width), "shared memory")?)?;
    Ok((resident as usize / blocks).min(pages.div_ceil(WARPS)).clamp(1, MAX_SPLITS))
}

fn kernel(near: Near, width: usize) -> String {
    format!("decode_attention_{}_{width}", near.name())
}

/// The answer of one query head beside its output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// ln sum_t e^{s_t}; negative infinity for an empty list.
    pub lse: f32,
    /// At least norm(output - output with every page of the list exact), rounding of this kernel included; 0 when every page is exact. Not a number
    /// where a page held what is not finite: accept only what compares as small enough.
    pub bound: f32,
    /// norm(output)
    pub norm: f32,
    /// At most (exact mass) / (mass used) of the list: sum_b rho_b e^{-Delta_b}.
    pub mass_low: f32,
    /// Spread of the values about the output: sqrt(sum_t u_t norm(vhat_t - output)^2).
    pub spread: f32,
    /// Share of `bound` (before division by `mass_low`) that the values' errors have, against the keys': any common unit.
    pub value_term: f32,
    pub key_term: f32,
    /// To be added to `bound` when pages were skipped; 0 until [`super::unread_bound`] has run.
    pub unread: f32,
    /// Expected norm(output - output with every page of the list exact), errors taken as independent: an estimate, not a bound.
    pub meter: f32,
}

impl Summary {
    /// Head `head` of downloaded summaries.
    pub fn of(summaries: &[f32], head: usize) -> Self {
        let [lse, bound, norm, mass_low, spread, value_term, key_term, unread, meter, ..] = summaries.as_chunks::<SUMMARY>().0[head];
        Self { lse, bound, norm, mass_low, spread, value_term, key_term, unread, meter }
    }
}

/// What one page did for one query head: what recovery ranks by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageFacts {
    /// ln sum over the page's tokens of e^{s_t}; less the head's `lse` it is ln rho_b.
    pub log_mass: f32,
    /// At least the error of the page's scores; 0 for an exact page.
    pub score_error: f32,
    /// Mean of norm(vhat_t)^2 under the page's own weights.
    pub mean_square: f32,
    /// At least max_t norm(v_t - vhat_t); 0 for an exact page.
    pub value_error: f32,
    /// sum_t p_t^2 / (sum_t p_t)^2 over the page's weights; 0 for an exact page, as what follows.
    pub concentration: f32,
    /// Variance of a score's error.
    pub score_variance: f32,
    /// Mean of norm(v_t - vhat_t)^2.
    pub value_mean_square: f32,
}

impl PageFacts {
    /// Page `entry` of query head `head` in downloaded facts.
    pub fn of(facts: &[f32], list_stride: usize, head: usize, entry: usize) -> Self {
        let [log_mass, score_error, mean_square, value_error, concentration, score_variance, value_mean_square, _] =
            facts.as_chunks::<PAGE_FACTS>().0[head * list_stride + entry];
        Self { log_mass, score_error, mean_square, value_error, concentration, score_variance, value_mean_square }
    }

    /// The page's part of the error; over all pages these sum to a bound of their own, up to the rounding in `summary.bound`:
    /// (rho e^Delta eta + (e^Delta - 1) sqrt(rho S)) / W_low with sqrt(S) <= sqrt(rho) (sqrt(mean square) + norm(output)).
    pub fn share(&self, summary: &Summary) -> f32 {
        let rho = (self.log_mass - summary.lse).exp();
        let spread = self.mean_square.sqrt() + summary.norm;
        rho * (self.score_error.exp() * self.value_error + self.score_error.exp_m1() * spread) / summary.mass_low
    }

    /// The page's part of the meter's square that its keys and its values have. Those of keys are in proportion only: the page does not know
    /// its values' distances from the output.
    pub fn squares(&self, summary: &Summary) -> [f32; 2] {
        let squares = (2.0 * (self.log_mass - summary.lse)).exp() * self.concentration;
        [squares * self.score_variance * (self.mean_square + summary.norm * summary.norm), squares * self.value_mean_square]
    }
}

/// Runs decode attention for all heads of a layer.
pub fn decode<D: Device>(device: &D, shape: &Shape, near: Near, inputs: &DecodeInputs<'_, D>, buffers: &DecodeBuffers<D>) -> Result<()> {
    assert_eq!(inputs.list_stride, buffers.list_stride, "buffers were sized for other lists");
    assert!(inputs.last_tokens <= PAGE, "a page has {PAGE} tokens");
    let width = shape.width()?;
    let (splits, kv_heads, group) = (fits(buffers.splits, "splits")?, fits(shape.kv_heads, "kv_heads")?, fits(shape.group, "group")?);
    let (stride, head_dim) = (fits(inputs.list_stride, "pages")?, fits(shape.head_dim, "head_dim")?);
    let last_tokens = fits(inputs.last_tokens, "tokens")?;
    let kernel = kernel(near, width);
    let args = arguments![
        inputs.queries,
        inputs.exact_pages,
        inputs.near_pages,
        inputs.lists,
        inputs.list_lengths,
        &buffers.partials,
        buffers.page_facts.as_ref(),
        last_tokens,
        stride,
        group,
        head_dim
    ];
    let grid = [splits, kv_heads, group.div_ceil(fits(QUERIES, "queries")?)];
    device.launch(&kernel, grid, [32 * fits(WARPS, "warps")?, 1, 1], fits(shared_bytes(width), "shared memory")?, args)?;
    let args = arguments![&buffers.partials, &buffers.output, &buffers.summaries, splits, head_dim, fits(width, "head_dim")?];
    device.launch("attention_merge", [kv_heads * group, 1, 1], [128, 1, 1], 0, args)
}

/// Shared memory of a decode block: the queries in two forms, and per warp a piece of keys and one of values.
fn shared_bytes(width: usize) -> usize {
    64 * width + 128 + WARPS * (144 + 68 * width + 64 * width)
}

#[cfg(test)]
mod tests {
    use super::super::EXACT;
    use super::super::reference::{attend, coded};
    use super::super::testing::{Cache, Draw, Tokens, distance, norm};
    use super::*;
    use crate::ops::cuda::Emulated;

    /// Everything one decode gave, on the host.
    struct Answer {
        output: Vec<f32>,
        summaries: Vec<f32>,
        facts: Vec<f32>,
    }

    /// Decodes `queries` over `pages` (with flag: exact), the last of which is the page under way.
    fn answer(device: &Emulated, cache: &Cache, queries: &[f32], pages: &[(usize, bool)], splits: usize) -> Answer {
        let (shape, stride) = (&cache.shape, pages.len() + 2);
        let mut lists = vec![EXACT | 0xffff; shape.kv_heads * stride];
        for (kv_head, list) in lists.chunks_mut(stride).enumerate() {
            list.iter_mut().zip(pages).for_each(|(entry, (page, exact))| *entry = cache.entry(kv_head, *page, *exact));
        }
        let last_tokens = pages.last().map_or(0, |(page, _)| (cache.count - page * PAGE).min(PAGE));
        let inputs = DecodeInputs {
            queries: &device.upload(queries).unwrap(),
            exact_pages: &cache.exact,
            near_pages: &cache.near_pages,
            lists: &device.upload(&lists).unwrap(),
            list_stride: stride,
            list_lengths: &device.upload(&vec![pages.len() as u32; shape.kv_heads]).unwrap(),
            last_tokens,
        };
        let buffers = DecodeBuffers::new(device, shape, stride, splits, true).unwrap();
        decode(device, shape, cache.near, &inputs, &buffers).unwrap();
        let [output, summaries, facts] =
            [&buffers.output, &buffers.summaries, buffers.page_facts.as_ref().unwrap()].map(|buffer| device.download(buffer).unwrap());
        Answer { output, summaries, facts }
    }

    /// Compares with attention over what the pages decode to, and with attention over exact pages.
    fn check(cache: &Cache, queries: &[f32], pages: &[(usize, bool)], splits: usize, answer: &Answer) {
        let (shape, width) = (&cache.shape, cache.shape.head_dim);
        for head in 0..shape.heads() {
            let (seen, exact) = cache.seen(head / shape.group, pages);
            let query = &queries[head * width..][..width];
            let output = &answer.output[head * width..][..width];
            let summary = Summary::of(&answer.summaries, head);
            let context = format!("{shape:?} {:?} {} tokens, head {head}: {summary:?}", cache.near, cache.count);
            let (expected, lse) = attend(query, &seen, |_| true);
            if pages.is_empty() {
                assert!(output.iter().all(|x| *x == 0.0) && summary.lse == f32::NEG_INFINITY && summary.bound == 0.0, "{context}");
                continue;
            }
            assert!((f64::from(summary.lse) - lse).abs() <= 1e-4, "{context}: lse {lse}");
            let (truth, _) = attend(query, &exact, |_| true);
            // Decoded INT4 values pass through halves.
            let tolerance = if cache.near == Near::Int8Int4 { 5e-4 } else { 1e-5 } * (norm(&expected) + f64::from(summary.spread));
            let error = distance(output, &expected);
            assert!(error <= tolerance, "{context}: off by {error} of {}", norm(&expected));
            assert!((f64::from(summary.norm) - norm(&expected)).abs() <= tolerance, "{context}");
            let all_exact = cache.near == Near::F16 || pages.iter().all(|(page, exact)| *exact || *page >= cache.count / PAGE);
            let (error, bound) = (distance(output, &truth), f64::from(summary.bound));
            if all_exact {
                assert_eq!((bound, summary.mass_low), (0.0, 1.0), "{context}");
            } else {
                assert!(error <= bound, "{context}: error {error}");
            }
            check_facts(cache, query, pages, answer, head, lse, error);
            check_meter(cache, query, pages, splits, answer, head, lse);
        }
    }

    fn check_facts(cache: &Cache, query: &[f32], pages: &[(usize, bool)], answer: &Answer, head: usize, lse: f64, error: f64) {
        let summary = Summary::of(&answer.summaries, head);
        let (mut shares, mut low, mut value_term, mut key_squares) = (0.0, 0.0, 0.0, 0.0);
        for (entry, page) in pages.iter().enumerate() {
            let facts = PageFacts::of(&answer.facts, pages.len() + 2, head, entry);
            let (seen, exact) = cache.seen(head / cache.shape.group, &[*page]);
            let (_, mass) = attend(query, &seen, |_| true);
            assert!((f64::from(facts.log_mass) - mass).abs() <= 1e-4, "{facts:?} {mass}");
            let scores = |keys: &[f32]| -> Vec<f64> {
                let score = |key: &[f32]| query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
                keys.chunks_exact(query.len()).map(|key| score(key) / (query.len() as f64).sqrt()).collect()
            };
            let worst = scores(&seen.keys).iter().zip(scores(&exact.keys)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(worst <= f64::from(facts.score_error), "{worst} {facts:?}");
            let near = cache.near != Near::F16 && !page.1 && page.0 < cache.count / PAGE;
            assert!(near || (facts.score_error, facts.value_error) == (0.0, 0.0));
            shares += f64::from(facts.share(&summary));
            let (rho, delta) = ((mass - lse).exp(), f64::from(facts.score_error));
            low += rho * (-delta).exp();
            value_term += rho * delta.exp() * f64::from(facts.value_error);
            key_squares += rho * delta.exp_m1().powi(2);
        }
        let rounding = 1e-3 * f64::from(summary.norm + summary.spread) * f64::from(summary.mass_low).recip();
        assert!(error <= shares + rounding, "{shares} {summary:?}");
        // The bound of the whole list taken as one part; more parts only lower it.
        let whole = (value_term + key_squares.sqrt() * f64::from(summary.spread)) / low;
        assert!(f64::from(summary.bound) <= 1.01 * whole + rounding, "{whole} {summary:?}");
    }

    /// The meter's formula in f64, part by part of the list.
    fn check_meter(cache: &Cache, query: &[f32], pages: &[(usize, bool)], splits: usize, answer: &Answer, head: usize, lse: f64) {
        let (width, summary) = (query.len(), Summary::of(&answer.summaries, head));
        let output = &answer.output[head * width..][..width];
        let (mut square, mut slack, mut by_page) = (0.0, 0.0, [0.0, 0.0]);
        for (part, list) in pages.chunks(pages.len().div_ceil(splits)).enumerate() {
            let [mut mass, mut dispersion, mut largest, mut of_keys, mut of_values] = [0.0; 5];
            for (index, page) in list.iter().enumerate() {
                let (seen, exact) = cache.seen(head / cache.shape.group, &[*page]);
                let is_near = cache.near != Near::F16 && !page.1 && page.0 < cache.count / PAGE;
                let errors = is_near
                    .then(|| coded(cache.near, &cache.shape, &exact))
                    .map(|coded| (coded.score_variance(query), coded.value_mean_square));
                let (variance, value_square) = errors.unwrap_or_default();
                for (key, value) in seen.keys.chunks_exact(width).zip(seen.values.chunks_exact(width)) {
                    let score = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / (width as f64).sqrt();
                    let weight = (score - lse).exp();
                    let between = value.iter().zip(output).map(|(v, o)| (f64::from(*v) - f64::from(*o)).powi(2)).sum::<f64>();
                    (mass, dispersion) = (mass + weight, dispersion + weight * between);
                    largest += weight * value.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
                    (of_keys, of_values) = (of_keys + weight * weight * variance, of_values + weight * weight * value_square);
                }
                let at = part * pages.len().div_ceil(splits) + index;
                let squares = PageFacts::of(&answer.facts, pages.len() + 2, head, at).squares(&summary);
                by_page = [by_page[0] + f64::from(squares[0]), by_page[1] + f64::from(squares[1])];
            }
            let spread = of_keys / mass;
            (square, slack) =
                (square + of_values + spread * dispersion, slack + spread * (largest + mass * f64::from(summary.norm).powi(2)));
            by_page[1] -= of_values;
        }
        let meter = f64::from(summary.meter);
        // Stored norms are rounded up by as much as 2^-9, which weighs more where values cancel.
        assert!((meter * meter - square).abs() <= 4e-3 * (square + slack), "{} {summary:?}", square.sqrt());
        assert!(by_page[1].abs() <= 1e-3 * square && (by_page[0] > 0.0) == (slack > 0.0), "{by_page:?} {square} {slack}");
    }

    #[test]
    fn the_meter_is_calibrated() {
        let Some(device) = Emulated::new() else { return };
        let device = device.in_order(crate::ops::cuda::Order::Forward);
        let (mut draw, shape) = (Draw::new(14), Shape { kv_heads: 1, group: 8, head_dim: 64 });
        let mut ratios: Vec<f64> = vec![];
        for _ in 0..30 {
            let tokens = Tokens::draw(&mut draw, &shape, 400);
            let cache = Cache::new(&device, &mut draw, shape, Near::Int8Int4, tokens);
            let queries: Vec<f32> = (0..512).map(|at| draw.normal() * (0.2 + 0.2 * (at / 64) as f32)).collect();
            let pages = listed(&mut draw, &cache, 100);
            let answer = answer(&device, &cache, &queries, &pages, 2);
            for head in 0..8 {
                let (truth, _) = attend(&queries[head * 64..][..64], &cache.seen(0, &pages).1, |_| true);
                ratios.push(distance(&answer.output[head * 64..][..64], &truth) / f64::from(Summary::of(&answer.summaries, head).meter));
            }
        }
        ratios.sort_by(f64::total_cmp);
        let (median, most) = (ratios[ratios.len() / 2], ratios[ratios.len() - 1]);
        assert!((0.8..=1.2).contains(&median) && most < 2.0, "median {median}, most {most}");
    }

    fn queries(draw: &mut Draw, shape: &Shape) -> Vec<f32> {
        (0..shape.heads() * shape.head_dim).map(|at| draw.normal() * [0.3, 1.0, 3.0][at / shape.head_dim % 3]).collect()
    }

    /// All pages in a random order with some exact, the page under way last.
    fn listed(draw: &mut Draw, cache: &Cache, every: usize) -> Vec<(usize, bool)> {
        let before = cache.pages().saturating_sub(1);
        let mut pages: Vec<(usize, bool)> = draw.shuffled(before).into_iter().map(|page| (page, page % every == 1)).collect();
        pages.extend((cache.pages() > 0).then_some((before, true)));
        pages
    }

    fn run(near: Near, cases: &[(usize, usize, usize, usize)]) {
        let Some(device) = Emulated::new() else { return };
        let mut draw = Draw::new(11);
        for &(group, head_dim, count, splits) in cases {
            let shape = Shape { kv_heads: 1 + count % 2, group, head_dim };
            let tokens = Tokens::draw(&mut draw, &shape, count);
            let cache = Cache::new(&device, &mut draw, shape, near, tokens);
            let queries = queries(&mut draw, &shape);
            let pages = listed(&mut draw, &cache, 3);
            check(&cache, &queries, &pages, splits, &answer(&device, &cache, &queries, &pages, splits));
        }
    }

    const LENGTHS: [(usize, usize, usize, usize); 16] = [
        (1, 64, 0, 1),
        (4, 128, 1, 1),
        (2, 64, 15, 2),
        (8, 80, 16, 1),
        (1, 96, 17, 1),
        (4, 64, 63, 1),
        (16, 128, 64, 1),
        (2, 128, 65, 2),
        (4, 80, 255, 1),
        (8, 96, 256, 3),
        (1, 256, 257, 1),
        (16, 64, 257, 2),
        (3, 24, 200, 1),
        (5, 120, 330, 2),
        (4, 128, 700, 4),
        (2, 16, 1000, 64),
    ];

    #[test]
    fn exact_pages_over_ragged_shapes() {
        run(Near::F16, &LENGTHS);
    }

    #[test]
    fn fp8_pages_over_ragged_shapes() {
        run(Near::Fp8, &LENGTHS);
    }

    #[test]
    fn int8_int4_pages_over_ragged_shapes() {
        run(Near::Int8Int4, &LENGTHS);
    }

    #[test]
    fn splits_agree() {
        let Some(device) = Emulated::new() else { return };
        let (mut draw, shape) = (Draw::new(12), Shape { kv_heads: 1, group: 4, head_dim: 64 });
        let tokens = Tokens::draw(&mut draw, &shape, 900);
        let cache = Cache::new(&device, &mut draw, shape, Near::Int8Int4, tokens);
        let (queries, pages) = (queries(&mut draw, &shape), listed(&mut draw, &cache, 4));
        let whole = answer(&device, &cache, &queries, &pages, 1);
        for splits in [2, 3, 7, 32] {
            let parts = answer(&device, &cache, &queries, &pages, splits);
            let close = |a: &[f32], b: &[f32], tolerance: f32| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= tolerance * (1.0 + a.abs()));
            assert!(close(&whole.output, &parts.output, 2e-6), "{splits}");
            for head in 0..4 {
                let (one, many) = (Summary::of(&whole.summaries, head), Summary::of(&parts.summaries, head));
                assert!(close(&[one.lse, one.norm, one.mass_low], &[many.lse, many.norm, many.mass_low], 1e-5), "{one:?} {many:?}");
                // More parts, a finer Cauchy-Schwarz.
                assert!(many.bound <= one.bound * (1.0 + 1e-4), "{one:?} {many:?}");
            }
        }
    }

    #[test]
    fn queries_along_the_worst_channel_stay_bounded() {
        let Some(device) = Emulated::new() else { return };
        let device = device.in_order(crate::ops::cuda::Order::Forward);
        let (mut draw, shape) = (Draw::new(13), Shape { kv_heads: 1, group: 8, head_dim: 32 });
        for near in [Near::Fp8, Near::Int8Int4] {
            for trial in 0..12 {
                let mut tokens = Tokens::draw(&mut draw, &shape, 320);
                tokens.keys.iter_mut().skip(trial).step_by(32).for_each(|key| *key *= 32.0);
                let cache = Cache::new(&device, &mut draw, shape, near, tokens);
                let queries: Vec<f32> =
                    (0..256).map(|at| if at % 32 == trial { draw.normal() * (at / 32) as f32 } else { draw.normal() * 1e-3 }).collect();
                let pages = listed(&mut draw, &cache, 7);
                let answer = answer(&device, &cache, &queries, &pages, 2);
                for head in 0..8 {
                    let (_, exact) = cache.seen(0, &pages);
                    let (truth, _) = attend(&queries[head * 32..][..32], &exact, |_| true);
                    let error = distance(&answer.output[head * 32..][..32], &truth);
                    let summary = Summary::of(&answer.summaries, head);
                    assert!(error <= f64::from(summary.bound), "{near:?} {error} {summary:?}");
                }
            }
        }
    }
}
