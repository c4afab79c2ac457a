//! Accepts outputs by their bounds, and where those fall short reads originals, the pages with the largest share of the bound first,
//! until they hold. The last resort is attention over exact pages altogether. The same ladder as on the CPU (`infer::kv`), with whole
//! pages promoted and the bound of the decode kernel.

use super::attend::Attention;
use super::cache::Cache;
use crate::error::Result;
use crate::infer::kv::certificate::{Unread, unread_error};
use crate::ops::cpu::attention::TileSet;
use crate::ops::cuda::Device;
use crate::ops::cuda::attention::{PAGE, PageFacts, Summary};

/// Times that pages are promoted before a head is computed from exact pages.
const ROUNDS: usize = 2;
/// Part of the allowed error that promoting aims at.
const AIM: f64 = 0.95;
/// Part of all pages beyond which reading all originals is simpler.
const MOST: f64 = 0.5;
/// Covers the f32 rounding of a log-sum-exp, as a factor on masses, and of an output beside its exact counterpart, relative to norms.
const ROUNDING: f64 = 1e-4;

/// What one token reads in one layer.
#[derive(Default)]
pub(super) struct Reading {
    pub(super) layer: usize,
    /// The token's page, which is read exact.
    pub(super) own: usize,
    /// Tokens of that page up to this one.
    pub(super) last_tokens: usize,
    /// At least the largest score of a head with a key of a page, `[heads, pages of the cache]`; empty where nobody asks.
    pub(super) score_bounds: Vec<f32>,
    /// At least the largest norm of a value of a page, `[kv_heads, pages of the cache]`.
    pub(super) value_norms: Vec<f32>,
    /// The pages before its own, per key-value head; every one when absent.
    pub(super) pages: Option<Vec<TileSet>>,
}

impl Reading {
    /// The pages before its own that a key-value head reads, ascending.
    fn pages(&self, kv_head: usize) -> Vec<usize> {
        self.pages.as_ref().map_or_else(|| (0..self.own).collect(), |pages| pages[kv_head].iter().collect())
    }

    /// Lists of entries per key-value head.
    pub(super) fn entries<D: Device>(&self, cache: &Cache<D>) -> Vec<Vec<u32>> {
        let entries = |head: usize| {
            let before = self.pages(head).into_iter().map(|page| cache.entry(self.layer, head, page));
            before.chain([cache.own_entry(self.layer, head, self.own)]).collect()
        };
        (0..cache.shape.kv_heads).map(entries).collect()
    }
}

/// One head's output and how far it may be off.
#[derive(Clone, Copy, Debug, Default)]
struct Assessment {
    norm: f64,
    bound: f64,
}

impl Assessment {
    fn relative(&self, error: f64) -> f64 {
        if error == 0.0 { 0.0 } else { error / self.norm }
    }
}

/// The lists of one token while pages are promoted.
struct Lists {
    /// Pages that each key-value head reads before its own, in the order of `entries`.
    pages: Vec<Vec<usize>>,
    entries: Vec<Vec<u32>>,
    promoted: Vec<TileSet>,
}

/// Certifies the output in the decode buffers; returns what takes its place where some heads had to be recomputed.
pub(super) fn certify<D: Device>(attention: &mut Attention<D>, device: &D, reading: &Reading) -> Result<Option<Vec<f32>>> {
    let heads = attention.cache.shape.heads();
    let mut lists = Lists {
        pages: (0..attention.cache.shape.kv_heads).map(|head| reading.pages(head)).collect(),
        entries: reading.entries(&attention.cache),
        promoted: vec![TileSet::default(); attention.cache.shape.kv_heads],
    };
    let mut finals = assess(attention, device, reading, &lists)?;
    let tolerance = attention.options.tolerance();
    let accepts = |found: &Assessment| tolerance == f64::INFINITY || found.bound <= tolerance * found.norm;
    let short: Vec<usize> = (0..heads).filter(|&head| !accepts(&finals[head])).collect();
    attention.counters.hard += (heads - short.len()) as u64;
    let mut output = None;
    if !short.is_empty() {
        output = Some(recover(attention, device, reading, &mut lists, short, &mut finals, accepts)?);
    }
    for found in &finals {
        let bound = found.relative(found.bound);
        attention.counters.bound_sum += bound;
        attention.counters.bound_max = attention.counters.bound_max.max(bound);
    }
    if attention.options.check {
        let checked = match output {
            Some(output) => output,
            None => device.download(&attention.buffers.output)?,
        };
        compare(attention, device, reading, &finals, &checked)?;
        output = Some(checked);
    }
    Ok(output)
}

/// Bounds of all heads' outputs in the decode buffers.
fn assess<D: Device>(attention: &Attention<D>, device: &D, reading: &Reading, lists: &Lists) -> Result<Vec<Assessment>> {
    let (cache, summaries) = (&attention.cache, device.download(&attention.buffers.summaries)?);
    let assess = |head: usize| {
        let summary = Summary::of(&summaries, head);
        let kv_head = head / cache.shape.group;
        let unread = unread(cache, reading, lists, head, &summary);
        let mut bound = f64::from(summary.bound);
        if !unread.is_empty() {
            let radius = unread.iter().map(|(_, unread)| unread.radius).fold(0.0, f64::max);
            let unread: Vec<Unread> = unread.into_iter().map(|(_, unread)| unread).collect();
            bound += unread_error(f64::from(summary.mass_low) * (1.0 - ROUNDING), &unread) + ROUNDING * radius;
        }
        // Every page exact: what dense attention over exact pages computes, bit for bit.
        let is_exact = lists.promoted[kv_head].len() == reading.own || (lists.pages[kv_head].len() == reading.own && !cache.is_coded());
        Assessment { norm: f64::from(summary.norm), bound: if is_exact { 0.0 } else { bound } }
    };
    Ok((0..cache.shape.heads()).map(assess).collect())
}

/// The pages that a head does not read, and what they could weigh beside what was read.
fn unread<D: Device>(cache: &Cache<D>, reading: &Reading, lists: &Lists, head: usize, summary: &Summary) -> Vec<(usize, Unread)> {
    let kv_head = head / cache.shape.group;
    if lists.pages[kv_head].len() == reading.own {
        return vec![];
    }
    let read: TileSet = lists.pages[kv_head].iter().copied().collect();
    let of_page = |page: usize| {
        let (score, norm) = (reading.score_bounds[head * cache.pages + page], reading.value_norms[kv_head * cache.pages + page]);
        let mass = PAGE as f64 * (f64::from(score) - f64::from(summary.lse)).exp() * (1.0 + ROUNDING);
        (page, Unread { mass, radius: f64::from(norm) + f64::from(summary.norm) + f64::from(summary.bound) })
    };
    (0..reading.own).filter(|page| !read.contains(*page)).map(of_page).collect()
}

/// Promotes pages until the bounds of the heads in `short` hold, or reads everything; the outputs of all heads.
fn recover<D: Device>(
    attention: &mut Attention<D>,
    device: &D,
    reading: &Reading,
    lists: &mut Lists,
    mut short: Vec<usize>,
    finals: &mut [Assessment],
    accepts: impl Fn(&Assessment) -> bool,
) -> Result<Vec<f32>> {
    let (group, width) = (attention.cache.shape.group, attention.cache.shape.head_dim);
    let mut output = device.download(&attention.buffers.output)?;
    for round in 0..=ROUNDS {
        let is_last = round == ROUNDS;
        let plans = plan(attention, device, reading, lists, &short, finals)?;
        let mut every = TileSet::default();
        for (kv_head, pages) in plans {
            let pages = pages.filter(|_| !is_last).unwrap_or_else(|| {
                every.insert(kv_head);
                (0..reading.own).collect()
            });
            promote(attention, device, reading, lists, kv_head, &pages)?;
        }
        attention.decode_lists(device, &lists.entries, reading.last_tokens)?;
        let (found, again) = (assess(attention, device, reading, lists)?, device.download(&attention.buffers.output)?);
        short.retain(|&head| {
            let is_dense = every.contains(head / group);
            if !is_dense && !accepts(&found[head]) {
                return true;
            }
            *(if is_dense { &mut attention.counters.dense } else { &mut attention.counters.recovered }) += 1;
            output[head * width..][..width].copy_from_slice(&again[head * width..][..width]);
            finals[head] = found[head];
            false
        });
        if short.is_empty() {
            break;
        }
    }
    let promoted: usize = lists.promoted.iter().map(TileSet::len).sum();
    attention.counters.pages_promoted += promoted as u64;
    attention.counters.bytes_moved += (promoted * attention.cache.original_bytes()) as u64;
    Ok(output)
}

/// Replaces or adds the entries of pages by those of their originals.
fn promote<D: Device>(
    attention: &Attention<D>,
    device: &D,
    reading: &Reading,
    lists: &mut Lists,
    kv_head: usize,
    pages: &[usize],
) -> Result<()> {
    for &page in pages {
        if !lists.promoted[kv_head].insert(page) {
            continue;
        }
        let entry = attention.cache.promote(device, reading.layer, kv_head, page)?;
        // In the order of pages, so that every page promoted is dense attention over exact pages, bit for bit.
        match lists.pages[kv_head].binary_search(&page) {
            Ok(at) => lists.entries[kv_head][at] = entry,
            Err(at) => {
                lists.pages[kv_head].insert(at, page);
                lists.entries[kv_head].insert(at, entry);
            }
        }
    }
    Ok(())
}

/// For every key-value head with heads in `short`, the pages whose originals should bring their bounds within reach; none when reading
/// all is simpler.
fn plan<D: Device>(
    attention: &Attention<D>,
    device: &D,
    reading: &Reading,
    lists: &Lists,
    short: &[usize],
    finals: &[Assessment],
) -> Result<Vec<(usize, Option<Vec<usize>>)>> {
    let (cache, tolerance) = (&attention.cache, attention.options.tolerance());
    let (summaries, facts) = (device.download(&attention.buffers.summaries)?, device.download(&attention.buffers.page_facts)?);
    let mut plans = vec![];
    for kv_head in 0..cache.shape.kv_heads {
        let heads: Vec<usize> = short.iter().copied().filter(|head| head / cache.shape.group == kv_head).collect();
        if heads.is_empty() {
            continue;
        }
        let needs: Vec<Need> = heads
            .iter()
            .map(|&head| {
                let summary = Summary::of(&summaries, head);
                let share = |(at, page): (usize, &usize)| (*page, f64::from(PageFacts::of(&facts, cache.pages, head, at).share(&summary)));
                let mut gains: Vec<(usize, f64)> = lists.pages[kv_head]
                    .iter()
                    .enumerate()
                    .map(share)
                    .filter(|(page, _)| !lists.promoted[kv_head].contains(*page))
                    .collect();
                let missed = unread(cache, reading, lists, head, &summary);
                let all = f64::from(summary.mass_low) + missed.iter().map(|(_, unread)| unread.mass).sum::<f64>();
                gains.extend(missed.iter().map(|(page, unread)| (*page, unread.mass * unread.radius / all)));
                Need { aim: AIM * tolerance * finals[head].norm, rest: finals[head].bound, gains }
            })
            .collect();
        plans.push((kv_head, cheapest(needs, reading.own, lists.promoted[kv_head].len())));
    }
    Ok(plans)
}

/// What one head still has to lose, and what each page would take.
struct Need {
    aim: f64,
    rest: f64,
    gains: Vec<(usize, f64)>,
}

/// The pages with the largest shares until every head's rest is within its aim.
fn cheapest(mut needs: Vec<Need>, own: usize, promoted: usize) -> Option<Vec<usize>> {
    if needs.iter().any(|need| !(need.aim > 0.0 && need.rest.is_finite())) {
        return None;
    }
    let mut order: Vec<(f64, usize)> = vec![];
    for need in &needs {
        for (page, gain) in &need.gains {
            match order.iter_mut().find(|(_, known)| known == page) {
                Some((sum, _)) => *sum += gain / need.aim,
                None => order.push((gain / need.aim, *page)),
            }
        }
    }
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut pages = vec![];
    for (_, page) in order {
        if needs.iter().all(|need| need.rest <= need.aim) {
            break;
        }
        pages.push(page);
        for need in &mut needs {
            need.rest -= need.gains.iter().find(|(known, _)| *known == page).map_or(0.0, |(_, gain)| *gain);
        }
    }
    let is_worth_it = (promoted + pages.len()) as f64 <= MOST * own as f64;
    is_worth_it.then_some(pages)
}

/// Counts true errors against exact pages.
fn compare<D: Device>(attention: &mut Attention<D>, device: &D, reading: &Reading, finals: &[Assessment], output: &[f32]) -> Result<()> {
    let mut lists = Lists {
        pages: vec![vec![]; attention.cache.shape.kv_heads],
        entries: (0..attention.cache.shape.kv_heads)
            .map(|head| vec![attention.cache.own_entry(reading.layer, head, reading.own)])
            .collect(),
        promoted: vec![TileSet::default(); attention.cache.shape.kv_heads],
    };
    for kv_head in 0..attention.cache.shape.kv_heads {
        promote(attention, device, reading, &mut lists, kv_head, &(0..reading.own).collect::<Vec<_>>())?;
    }
    attention.decode_lists(device, &lists.entries, reading.last_tokens)?;
    let reference = device.download(&attention.buffers.output)?;
    let width = attention.cache.shape.head_dim;
    for ((found, output), reference) in finals.iter().zip(output.chunks_exact(width)).zip(reference.chunks_exact(width)) {
        let error = output.iter().zip(reference).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
        attention.counters.checked += 1;
        attention.counters.violations += u64::from(error > found.bound);
        attention.counters.compare_bound(found.bound, error);
        attention.counters.error_sum += found.relative(error);
        attention.counters.error_max = attention.counters.error_max.max(found.relative(error));
    }
    Ok(())
}
