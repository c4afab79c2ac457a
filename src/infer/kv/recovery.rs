//! Accepts outputs by their certificates, and where those fall short reads originals, the pages with the largest share of the bound
//! first, until they hold. The last resort is attention over the originals altogether.

use super::assess::{Assessment, assess};
use super::pages::{Pages, Promoted, View, Watch};
use crate::error::Result;
use crate::infer::cache::{Certificate, Counters, Options};
use crate::ops::cpu::attention::{Line, Shares, TileSet, attend_lines};

/// Times that pages are promoted before a head is computed densely.
const ROUNDS: usize = 2;
/// Part of the allowed error that promoting aims at: the bound that is computed afterwards differs a little from the one foreseen.
const AIM: f64 = 0.95;
/// Part of all originals beyond which reading them all is simpler: by then the saving is gone.
const MOST: f64 = 0.5;
/// The meter is accepted when this many times it is within epsilon.
const METERS: f64 = 2.0;

/// The heads of one token that share a key-value head.
pub(super) struct Group<'a> {
    pub(super) pages: &'a Pages,
    pub(super) options: &'a Options,
    pub(super) kv_head: usize,
    /// The token's page.
    pub(super) own: usize,
    pub(super) scale: f32,
    /// One per head, all with the same tiles.
    pub(super) lines: &'a [Line<'a>],
}

/// Which originals of a page would be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Keys,
    Values,
    /// Of a page that was not read at all.
    Both,
}

impl Part {
    const ALL: [Self; 3] = [Self::Keys, Self::Values, Self::Both];
}

/// A line whose certificate falls short.
struct Short {
    line: usize,
    assessment: Assessment,
}

impl Group<'_> {
    fn head_dim(&self) -> usize {
        self.pages.head_dim()
    }

    fn accepts(&self, assessment: &Assessment) -> Option<Certificate> {
        let allowed = self.options.tolerance() * assessment.norm;
        if self.options.tolerance() == f64::INFINITY || assessment.bound <= allowed {
            return Some(Certificate::Hard);
        }
        let metered = self.options.certificate == Certificate::Metered && self.metered(assessment) <= allowed;
        metered.then_some(Certificate::Metered)
    }

    fn metered(&self, assessment: &Assessment) -> f64 {
        METERS * assessment.meter + assessment.unread
    }
}

/// Certifies the outputs of a group's heads, `[heads, head_dim]`, and replaces those that are not within epsilon.
pub(super) fn certify(group: &Group<'_>, shares: &[Shares], out: &mut [f32], counters: &mut Counters) -> Result<()> {
    let head_dim = group.head_dim();
    let view = View { pages: group.pages, own: group.own, promoted: None };
    let mut finals: Vec<Assessment> = vec![];
    let mut short = vec![];
    for (index, (line, shares)) in group.lines.iter().zip(shares).enumerate() {
        let assessment = assess(&view, group.kv_head, line, shares, &out[index * head_dim..][..head_dim]);
        match group.accepts(&assessment) {
            Some(Certificate::Hard) => counters.hard += 1,
            Some(Certificate::Metered) => counters.metered += 1,
            None => short.push(Short { line: index, assessment: assessment.clone() }),
        }
        finals.push(assessment);
    }
    if !short.is_empty() {
        recover(group, short, &mut finals, out, counters)?;
    }
    for assessment in &finals {
        let (bound, meter) = (assessment.relative(assessment.bound), assessment.relative(assessment.meter));
        counters.bound_sum += bound;
        counters.bound_max = counters.bound_max.max(bound);
        counters.meter_sum += meter;
    }
    if group.options.check {
        compare(group, &finals, out, counters);
    }
    Ok(())
}

/// Promotes pages until every line's certificate holds, or gives up on those where it does not.
fn recover(group: &Group<'_>, mut short: Vec<Short>, finals: &mut [Assessment], out: &mut [f32], counters: &mut Counters) -> Result<()> {
    let head_dim = group.head_dim();
    let mut promoted = Promoted::default();
    for _ in 0..ROUNDS {
        let Some(more) = plan(group, &short, &promoted) else { break };
        verify(group, &more, &promoted)?;
        promoted = more;
        let tiles = group.lines.first().and_then(|line| line.tiles).map(|tiles| tiles.iter().chain(promoted.keys.iter()).collect());
        let view = View { pages: group.pages, own: group.own, promoted: Some(&promoted) };
        let lines: Vec<Line<'_>> = short.iter().map(|short| Line { tiles: tiles.as_ref(), ..group.lines[short.line] }).collect();
        let mut again = vec![0.0; lines.len() * head_dim];
        let shares =
            attend_lines(head_dim, group.scale, &lines, &view, group.kv_head, Some(&Watch::new(&view, group.kv_head, &lines)), &mut again);
        let mut still = vec![];
        for (((short, line), shares), again) in short.iter().zip(&lines).zip(&shares).zip(again.chunks_exact(head_dim)) {
            let assessment = assess(&view, group.kv_head, line, shares, again);
            if group.accepts(&assessment).is_some() {
                counters.recovered += 1;
                out[short.line * head_dim..][..head_dim].copy_from_slice(again);
                finals[short.line] = assessment;
            } else {
                still.push(Short { line: short.line, assessment });
            }
        }
        short = still;
        if short.is_empty() {
            break;
        }
    }
    if !short.is_empty() {
        let every = Promoted { keys: TileSet::below(group.own), values: TileSet::below(group.own) };
        verify(group, &every, &promoted)?;
        // Lines share the reading.
        let lines: Vec<Line<'_>> = short.iter().map(|short| Line { tiles: None, ..group.lines[short.line] }).collect();
        let mut exact = vec![0.0; lines.len() * head_dim];
        attend_lines(head_dim, group.scale, &lines, group.pages.originals(), group.kv_head, None, &mut exact);
        for (Short { line, .. }, exact) in short.iter().zip(exact.chunks_exact(head_dim)) {
            out[line * head_dim..][..head_dim].copy_from_slice(exact);
            finals[*line] = Assessment::exact(exact);
        }
        counters.dense += short.len() as u64;
        promoted = every;
    }
    counters.bytes_moved += ((promoted.keys.len() + promoted.values.len()) * group.pages.half_page_bytes()) as u64;
    counters.pages_promoted +=
        (0..group.own).filter(|page| promoted.keys.contains(*page) || promoted.values.contains(*page)).count() as u64;
    Ok(())
}

/// The shortest list of originals that should bring every line's certificate within epsilon, `promoted` included; none when it is not
/// worth its bytes or nothing would help.
fn plan(group: &Group<'_>, short: &[Short], promoted: &Promoted) -> Option<Promoted> {
    let mut needs = short.iter().map(|short| Need::new(group, &short.assessment)).collect::<Option<Vec<Need>>>()?;
    // What each choice gains, in units of the allowed errors and per half page: by page and part.
    let mut gains = vec![0.0; group.own * Part::ALL.len()];
    for need in &needs {
        gains.iter_mut().zip(&need.amounts).for_each(|(gain, amount)| *gain += need.gain(*amount));
    }
    gains.iter_mut().skip(Part::Both as usize).step_by(Part::ALL.len()).for_each(|gain| *gain /= 2.0);
    let mut order: Vec<usize> = (0..gains.len()).filter(|choice| gains[*choice] > 0.0).collect();
    let by_gain = |a: &usize, b: &usize| gains[*b].total_cmp(&gains[*a]).then(a.cmp(b));
    // Most often nothing that is worth its bytes would do: then there is no need to put everything in order.
    let most = (2.0 * MOST * group.own as f64) as usize;
    if most < order.len() {
        order.select_nth_unstable_by(most, by_gain);
        let mut best = needs.clone();
        best.iter_mut().for_each(|need| order[..most].iter().for_each(|choice| need.take(*choice)));
        // Sums in another order differ in their last bits.
        if !best.iter().all(|need| need.is_met_within(1.0 + 1e-9)) {
            return None;
        }
    }
    order.sort_by(by_gain);
    let mut more = promoted.clone();
    for choice in order {
        if needs.iter().all(Need::is_met) {
            break;
        }
        let (page, part) = (choice / Part::ALL.len(), Part::ALL[choice % Part::ALL.len()]);
        if part != Part::Values {
            more.keys.insert(page);
        }
        if part != Part::Keys {
            more.values.insert(page);
        }
        needs.iter_mut().for_each(|need| need.take(choice));
    }
    let too_many = (more.keys.len() + more.values.len()) as f64 > 2.0 * MOST * group.own as f64;
    if too_many { None } else { Some(more) }
}

/// What one line still has to lose.
#[derive(Clone)]
struct Need {
    aim: f64,
    /// Error that adds up.
    linear: f64,
    /// Squared error, of which the meter is the root.
    square: f64,
    /// What every choice takes from both, by page and part.
    amounts: Vec<(f64, f64)>,
}

impl Need {
    /// None when promoting cannot help.
    fn new(group: &Group<'_>, assessment: &Assessment) -> Option<Self> {
        let allowed = group.options.tolerance() * assessment.norm;
        let metered = group.options.certificate == Certificate::Metered;
        // Rounding cannot be promoted away; the meter does not count it.
        let aim = AIM * if metered { allowed } else { allowed - assessment.rounding };
        if aim.is_nan() || aim <= 0.0 || !assessment.bound.is_finite() {
            return None;
        }
        let mut need = Self { aim, linear: 0.0, square: 0.0, amounts: vec![(0.0, 0.0); group.own * Part::ALL.len()] };
        for item in &assessment.items() {
            let (linear, square) = item.amounts(metered);
            need.amounts[item.page * Part::ALL.len() + item.part as usize] = (linear, square);
            (need.linear, need.square) = (need.linear + linear, need.square + square);
        }
        Some(need)
    }

    /// Share of what has to go that a choice takes away, squares by their share of the meter.
    fn gain(&self, (linear, square): (f64, f64)) -> f64 {
        let metered = if self.square > 0.0 { METERS * square / self.square.sqrt() } else { 0.0 };
        (linear + metered) / self.aim
    }

    fn take(&mut self, choice: usize) {
        let (linear, square) = self.amounts[choice];
        (self.linear, self.square) = (self.linear - linear, self.square - square);
    }

    fn is_met(&self) -> bool {
        self.is_met_within(1.0)
    }

    fn is_met_within(&self, factor: f64) -> bool {
        self.linear + METERS * self.square.max(0.0).sqrt() <= self.aim * factor
    }
}

/// Checks originals that have not been promoted before.
fn verify(group: &Group<'_>, more: &Promoted, before: &Promoted) -> Result<()> {
    let known = |page: &usize| before.keys.contains(*page) || before.values.contains(*page);
    let pages: TileSet = more.keys.iter().chain(more.values.iter()).filter(|page| !known(page)).collect();
    pages.iter().try_for_each(|page| group.pages.verify(group.kv_head, page))
}

/// Counts true errors against the originals.
fn compare(group: &Group<'_>, finals: &[Assessment], out: &[f32], counters: &mut Counters) {
    let head_dim = group.head_dim();
    let lines: Vec<Line<'_>> = group.lines.iter().map(|line| Line { tiles: None, ..*line }).collect();
    let mut reference = vec![0.0; out.len()];
    attend_lines(head_dim, group.scale, &lines, group.pages.originals(), group.kv_head, None, &mut reference);
    for ((assessment, out), reference) in finals.iter().zip(out.chunks_exact(head_dim)).zip(reference.chunks_exact(head_dim)) {
        let square: f64 = out.iter().zip(reference).map(|(out, reference)| (f64::from(*out) - f64::from(*reference)).powi(2)).sum();
        let error = square.sqrt();
        counters.checked += 1;
        counters.violations += u64::from(error > assessment.bound);
        counters.meter_exceeded += u64::from(error > group.metered(assessment));
        counters.error_sum += assessment.relative(error);
        counters.error_max = counters.error_max.max(assessment.relative(error));
        counters.compare_bound(assessment.bound, error);
    }
}
