//! Accepts outputs by their bounds, and where those fall short reads originals, the pages with the largest share of the bound first,
//! until they hold. The last resort is attention over exact pages altogether. The same ladder as on the CPU (`infer::kv`), with whole
//! pages promoted and the bound of the decode kernel.

use super::attend::Attention;
use super::cache::Cache;
use crate::error::Result;
use crate::infer::cache::Certificate;
use crate::ops::cpu::attention::TileSet;
use crate::ops::cuda::Device;
use crate::ops::cuda::attention::{PAGE, PageFacts, Selection, Summary};

/// Times that pages are promoted before a head is computed from exact pages.
const ROUNDS: usize = 2;
/// Part of the allowed error that promoting aims at.
const AIM: f64 = 0.95;
/// Part of all pages beyond which reading all originals is simpler.
const MOST: f64 = 0.5;
/// The meter is accepted when this many times it is within epsilon.
const METERS: f64 = 2.0;

/// What one token reads in one layer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Reading {
    pub(super) layer: usize,
    /// The token's page, which is read exact.
    pub(super) own: usize,
    /// Tokens of that page up to this one.
    pub(super) last_tokens: usize,
    /// What is read of the pages before its own; every one when absent.
    pub(super) selection: Option<Selection>,
}

/// One head's output and how far it may be off.
#[derive(Clone, Copy, Debug, Default)]
struct Assessment {
    norm: f64,
    bound: f64,
    /// Part of the bound that is due to pages that were not read.
    unread: f64,
    /// Root of the expected square of the error that read pages cause.
    meter: f64,
}

impl Assessment {
    fn relative(&self, error: f64) -> f64 {
        if error == 0.0 { 0.0 } else { error / self.norm }
    }

    fn metered(&self) -> f64 {
        METERS * self.meter + self.unread
    }
}

/// What has to hold for an output to be accepted.
#[derive(Clone, Copy)]
struct Terms {
    tolerance: f64,
    certificate: Certificate,
}

impl Terms {
    fn accept(&self, found: &Assessment) -> Option<Certificate> {
        let allowed = self.tolerance * found.norm;
        if self.tolerance == f64::INFINITY || found.bound <= allowed {
            return Some(Certificate::Hard);
        }
        let is_metered = self.certificate == Certificate::Metered && found.metered() <= allowed;
        is_metered.then_some(Certificate::Metered)
    }
}

/// The lists of one token while pages are promoted.
struct Lists {
    /// Pages that each key-value head reads before its own, in the order of `entries`.
    pages: Vec<Vec<usize>>,
    entries: Vec<Vec<u32>>,
    promoted: Vec<TileSet>,
}

impl Lists {
    /// As the token's output was computed.
    fn read<D: Device>(attention: &Attention<D>, device: &D, reading: &Reading) -> Result<Self> {
        let heads = attention.cache.shape.kv_heads;
        let pages = match reading.selection {
            None => vec![(0..reading.own).collect(); heads],
            Some(_) => attention.selector.chosen(device, reading.own)?.iter().map(|pages| pages.iter().collect()).collect(),
        };
        Ok(Self::of(&attention.cache, reading, pages))
    }

    fn of<D: Device>(cache: &Cache<D>, reading: &Reading, pages: Vec<Vec<usize>>) -> Self {
        let entries = |(head, pages): (usize, &Vec<usize>)| {
            let before = pages.iter().map(|page| cache.entry(reading.layer, head, *page));
            before.chain([cache.own_entry(reading.layer, head, reading.own)]).collect()
        };
        Self { entries: pages.iter().enumerate().map(entries).collect(), promoted: vec![TileSet::default(); pages.len()], pages }
    }
}

/// Certifies the output in the decode buffers; returns what takes its place where some heads had to be recomputed.
pub(super) fn certify<D: Device>(attention: &mut Attention<D>, device: &D, reading: &Reading) -> Result<Option<Vec<f32>>> {
    let heads = attention.cache.shape.heads();
    let is_exact = reading.selection.is_none() && (!attention.cache.is_coded() || reading.own == 0);
    let mut finals = assess(attention, device, |_| is_exact)?;
    let terms = Terms { tolerance: attention.options.tolerance(), certificate: attention.options.certificate };
    let mut short = vec![];
    for (head, found) in finals.iter().enumerate().take(heads) {
        match terms.accept(found) {
            Some(Certificate::Hard) => attention.counters.hard += 1,
            Some(Certificate::Metered) => attention.counters.metered += 1,
            None => short.push(head),
        }
    }
    let mut output = None;
    if !short.is_empty() {
        output = Some(recover(attention, device, reading, short, &mut finals, terms)?);
    }
    for found in &finals {
        let (bound, meter) = (found.relative(found.bound), found.relative(found.meter));
        attention.counters.bound_sum += bound;
        attention.counters.bound_max = attention.counters.bound_max.max(bound);
        attention.counters.meter_sum += meter;
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

/// What the decode buffers say of all heads' outputs. Of key-value heads that read every page exact: what dense attention over exact pages
/// computes, bit for bit.
fn assess<D: Device>(attention: &Attention<D>, device: &D, is_exact: impl Fn(usize) -> bool) -> Result<Vec<Assessment>> {
    let (shape, summaries) = (&attention.cache.shape, device.download(&attention.buffers.summaries)?);
    let assess = |head: usize| {
        let Summary { norm, bound, unread, meter, .. } = Summary::of(&summaries, head);
        let [norm, bound, unread, meter] = [norm, bound, unread, meter].map(f64::from);
        if is_exact(head / shape.group) {
            return Assessment { norm, ..Assessment::default() };
        }
        Assessment { norm, bound: bound + unread, unread, meter }
    };
    Ok((0..shape.heads()).map(assess).collect())
}

/// Promotes pages until the bounds of the heads in `short` hold, or reads everything; the outputs of all heads.
fn recover<D: Device>(
    attention: &mut Attention<D>,
    device: &D,
    reading: &Reading,
    mut short: Vec<usize>,
    finals: &mut [Assessment],
    terms: Terms,
) -> Result<Vec<f32>> {
    let (group, width) = (attention.cache.shape.group, attention.cache.shape.head_dim);
    let mut output = device.download(&attention.buffers.output)?;
    let mut lists = Lists::read(attention, device, reading)?;
    let limits = if reading.selection.is_some() { attention.selector.bounds(device)? } else { (vec![], vec![]) };
    for round in 0..=ROUNDS {
        let is_last = round == ROUNDS;
        let plans = plan(attention, device, reading, &lists, &limits, &short, terms)?;
        let mut every = TileSet::default();
        for (kv_head, pages) in plans {
            let pages = pages.filter(|_| !is_last).unwrap_or_else(|| {
                every.insert(kv_head);
                (0..reading.own).collect()
            });
            promote(attention, device, reading, &mut lists, kv_head, &pages)?;
        }
        attention.decode_lists(device, &lists.entries, reading.last_tokens)?;
        if reading.selection.is_some() {
            attention.selector.set_chosen(device, &lists.pages)?;
            attention.selector.bound_unread(device, reading.own, &attention.buffers.summaries)?;
        }
        let is_exact = |kv_head: usize| {
            let all = lists.pages[kv_head].len() == reading.own;
            all && (!attention.cache.is_coded() || lists.promoted[kv_head].len() == reading.own)
        };
        let (found, again) = (assess(attention, device, is_exact)?, device.download(&attention.buffers.output)?);
        short.retain(|&head| {
            let is_dense = every.contains(head / group);
            if !is_dense && terms.accept(&found[head]).is_none() {
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

/// For every key-value head with heads in `short`, the pages whose originals should bring their certificates within reach; none when
/// reading all is simpler. `limits`: score bounds and norms of values of all pages, where some are not read.
fn plan<D: Device>(
    attention: &Attention<D>,
    device: &D,
    reading: &Reading,
    lists: &Lists,
    limits: &(Vec<f32>, Vec<f32>),
    short: &[usize],
    terms: Terms,
) -> Result<Vec<(usize, Option<Vec<usize>>)>> {
    let cache = &attention.cache;
    let facts = attention.buffers.page_facts.as_ref().map(|facts| device.download(facts)).transpose()?.unwrap_or_default();
    let summaries = device.download(&attention.buffers.summaries)?;
    let mut plans = vec![];
    for kv_head in 0..cache.shape.kv_heads {
        let heads = short.iter().copied().filter(|head| head / cache.shape.group == kv_head);
        let needs: Vec<Need> = heads
            .map(|head| {
                let summary = Summary::of(&summaries, head);
                let of_page = |(at, page): (usize, &usize)| (*page, PageFacts::of(&facts, cache.pages, head, at));
                let read: Vec<(usize, PageFacts)> = lists.pages[kv_head].iter().enumerate().map(of_page).collect();
                let is_left = |page: &usize| !lists.promoted[kv_head].contains(*page);
                let read: Vec<(usize, PageFacts)> = read.into_iter().filter(|(page, _)| is_left(page)).collect();
                let mut need = Need::new(terms, &summary, &read);
                let line = (&limits.0[..], head * cache.pages, &limits.1[..], kv_head * cache.pages);
                need.add_unread(&summary, unread(line, reading.own, &lists.pages[kv_head], &summary));
                need
            })
            .collect();
        if !needs.is_empty() {
            plans.push((kv_head, cheapest(needs, reading.own, lists.promoted[kv_head].len())));
        }
    }
    Ok(plans)
}

/// The pages before `own` that are not `read`, with what they could weigh at most beside what was read, and how far their values can be
/// from the output. `bounds`: scores and norms of values, and where the head's begin.
fn unread(
    (scores, score, norms, norm): (&[f32], usize, &[f32], usize),
    own: usize,
    read: &[usize],
    summary: &Summary,
) -> Vec<(usize, [f64; 2])> {
    let of_page = |page: usize| {
        // Beyond e^600 nothing is gained by telling pages apart.
        let mass = PAGE as f64 * (f64::from(scores[score + page]) - f64::from(summary.lse)).min(600.0).exp();
        (page, [mass, f64::from(norms[norm + page]) + f64::from(summary.norm) + f64::from(summary.bound)])
    };
    (0..own).filter(|page| read.binary_search(page).is_err()).map(of_page).collect()
}

/// What one head still has to lose, and what each page would take: of what adds up, and of squares of which the meter is the root.
struct Need {
    aim: f64,
    linear: f64,
    square: f64,
    gains: Vec<(usize, [f64; 2])>,
}

impl Need {
    /// By the pages that were read from their codes.
    fn new(terms: Terms, summary: &Summary, read: &[(usize, PageFacts)]) -> Self {
        let aim = AIM * terms.tolerance * f64::from(summary.norm);
        if terms.certificate == Certificate::Hard {
            let gains = read.iter().map(|(page, facts)| (*page, [f64::from(facts.share(summary)), 0.0])).collect();
            return Self { aim, linear: f64::from(summary.bound), square: 0.0, gains };
        }
        let squares = || read.iter().map(|(page, facts)| (*page, facts.squares(summary).map(f64::from)));
        let square = f64::from(summary.meter).powi(2);
        // What pages say of their keys is right in proportion: it makes up what their values leave.
        let [keys, values] = squares().fold([0.0, 0.0], |sum, (_, [keys, values])| [sum[0] + keys, sum[1] + values]);
        let scale = if keys > 0.0 { (square - values).max(0.0) / keys } else { 0.0 };
        let gains = squares().map(|(page, [keys, values])| (page, [0.0, keys * scale + values])).collect();
        Self { aim, linear: 0.0, square, gains }
    }

    /// Shares of the bound for pages left out, by what each could bring in.
    fn add_unread(&mut self, summary: &Summary, unread: Vec<(usize, [f64; 2])>) {
        let bound = f64::from(summary.unread);
        let whole: f64 = unread.iter().map(|(_, [mass, radius])| mass * radius).sum();
        self.linear += bound;
        let share = |[mass, radius]: [f64; 2]| if whole > 0.0 { bound * (mass * radius / whole) } else { 0.0 };
        self.gains.extend(unread.into_iter().map(|(page, item)| (page, [share(item), 0.0])));
    }

    fn rest(&self) -> f64 {
        self.linear + METERS * self.square.max(0.0).sqrt()
    }

    /// Share of what has to go that a page takes away, squares by their share of the meter.
    fn gain(&self, [linear, square]: [f64; 2]) -> f64 {
        let metered = if self.square > 0.0 { METERS * square / self.square.sqrt() } else { 0.0 };
        (linear + metered) / self.aim
    }
}

/// The pages with the largest shares until every head's rest is within its aim.
fn cheapest(mut needs: Vec<Need>, own: usize, promoted: usize) -> Option<Vec<usize>> {
    if needs.iter().any(|need| !(need.aim > 0.0 && need.rest().is_finite())) {
        return None;
    }
    let mut gains = vec![0.0; own];
    for need in &needs {
        need.gains.iter().for_each(|(page, gain)| gains[*page] += need.gain(*gain));
    }
    let mut order: Vec<usize> = (0..own).filter(|page| gains[*page] > 0.0).collect();
    order.sort_by(|a, b| gains[*b].total_cmp(&gains[*a]).then(a.cmp(b)));
    let mut pages = vec![];
    for page in order {
        if needs.iter().all(|need| need.rest() <= need.aim) {
            break;
        }
        pages.push(page);
        for need in &mut needs {
            let [linear, square] = need.gains.iter().find(|(known, _)| *known == page).map_or([0.0; 2], |(_, gain)| *gain);
            (need.linear, need.square) = (need.linear - linear, need.square - square);
        }
    }
    let is_worth_it = (promoted + pages.len()) as f64 <= MOST * own as f64;
    is_worth_it.then_some(pages)
}

/// Counts true errors against exact pages.
fn compare<D: Device>(attention: &mut Attention<D>, device: &D, reading: &Reading, finals: &[Assessment], output: &[f32]) -> Result<()> {
    let mut lists = Lists::of(&attention.cache, reading, vec![vec![]; attention.cache.shape.kv_heads]);
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
        attention.counters.meter_exceeded += u64::from(error > found.metered());
        attention.counters.compare_bound(found.bound, error);
        attention.counters.error_sum += found.relative(error);
        attention.counters.error_max = attention.counters.error_max.max(found.relative(error));
    }
    Ok(())
}
