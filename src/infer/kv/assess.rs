//! The bounds of one line: from what it drew from each page and what the page says of its own error to the certificate of its output.

use super::certificate::{
    PagePart, PageSquares, Totals, Unread, expected_square, gamma, rounding, share_of_keys, share_of_values, unread_error,
};
use super::pages::View;
use super::recovery::Part;
use crate::infer::attention::{GroupQuery, PageTable};
use crate::ops::cpu::attention::{Line, SEGMENT, Share, Shares, TILE};

/// The certificate of one output. Everything is absolute, in units of the output.
#[derive(Clone, Debug, Default)]
pub(super) struct Assessment {
    /// Norm of the output.
    pub(super) norm: f64,
    /// The error is at most this.
    pub(super) bound: f64,
    /// Part of the bound that is due to pages that were not read.
    pub(super) unread: f64,
    /// Part of the bound that is due to f32.
    pub(super) rounding: f64,
    /// Root of the expected square of the error that read pages cause.
    pub(super) meter: f64,
    /// Pages that were read.
    read: Vec<Read>,
    /// Pages that were not, with radii about the true output.
    left: Vec<(usize, Unread)>,
    /// W_lo.
    least: f64,
}

/// What reading some originals would take away.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) page: usize,
    pub(super) part: Part,
    /// Of the bound.
    linear: f64,
    /// Of the square of the meter.
    square: f64,
}

impl Item {
    /// Of what adds up and of the squares, as the meter or the bound counts them.
    pub(super) fn amounts(&self, metered: bool) -> (f64, f64) {
        if metered && self.part != Part::Both { (0.0, self.square) } else { (self.linear, 0.0) }
    }
}

impl Assessment {
    /// Of an output computed from the originals.
    pub(super) fn exact(out: &[f32]) -> Self {
        Self { norm: norm(out), ..Self::default() }
    }

    /// What promoting would take away.
    pub(super) fn items(&self) -> Vec<Item> {
        let Self { read, left, least, unread: unread_bound, .. } = self;
        let mut items = vec![];
        for Read { page, part, squares, .. } in read {
            let keys = (share_of_keys(part, *least), squares.score_variance * squares.dispersion);
            let values = (share_of_values(part, *least), squares.value_square * squares.squares);
            for (kind, (linear, square)) in [(Part::Keys, keys), (Part::Values, values)] {
                if linear > 0.0 || square > 0.0 {
                    items.push(Item { page: *page, part: kind, linear, square });
                }
            }
        }
        // Shares of the bound by what each page could bring in.
        let whole: f64 = left.iter().map(|(_, page)| page.mass * page.radius).sum();
        items.extend(left.iter().map(|(page, unread)| Item {
            page: *page,
            part: Part::Both,
            linear: if whole > 0.0 { unread_bound * unread.mass * unread.radius / whole } else { 0.0 },
            square: 0.0,
        }));
        items
    }

    /// `error` relative to the output's norm.
    pub(super) fn relative(&self, error: f64) -> f64 {
        if error == 0.0 { 0.0 } else { error / self.norm }
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// One page that was read.
#[derive(Clone, Copy, Debug)]
struct Read {
    page: usize,
    part: PagePart,
    /// e^Delta - 1.
    swing: f64,
    squares: PageSquares,
    /// At least the sum of weight times norm of the value as read.
    drawn: f64,
}

/// Certifies one line's output.
pub(super) fn assess(view: &View<'_>, kv_head: usize, line: &Line<'_>, shares: &Shares, out: &[f32]) -> Assessment {
    let (norm, query_norm) = (norm(out), norm(line.query));
    let mut read = read_pages(view, kv_head, line, shares, norm, query_norm);
    let mut unread = unread_pages(view, kv_head, line, shares, query_norm);
    let is_exact = |read: &Read| view.has_exact_keys(read.page) && view.has_exact_values(read.page);
    if unread.is_empty() && read.iter().all(is_exact) {
        // The same numbers in the same order as over the originals.
        return Assessment { norm, ..Assessment::default() };
    }
    // What was drawn from each page was itself summed in f32.
    let slack = weight_rounding(view.own + 1);
    let inflation = 1.0 + 4.0 * slack;
    let mut totals = Totals::default();
    for read in &mut read {
        read.part.dispersion += dispersion_rounding(read, norm, slack);
        totals.add(&read.part, read.swing);
    }
    let (least, quantized) = (totals.least_mass(), inflation * totals.error());
    unread.iter_mut().for_each(|(_, page)| page.radius += norm + quantized);
    let pages: Vec<Unread> = unread.iter().map(|(_, page)| *page).collect();
    let read_mass = f64::from(shares.sum) * least / inflation;
    let unread_bound = unread_error(read_mass, &pages);
    let rounding = output_rounding(view.own, &read, &unread, least, read_mass, norm);
    let meter = expected_square(read.iter().map(|read| &read.squares)).sqrt();
    Assessment { norm, bound: quantized + unread_bound + rounding, unread: unread_bound, rounding, meter, read, left: unread, least }
}

fn read_pages(view: &View<'_>, kv_head: usize, line: &Line<'_>, shares: &Shares, norm: f64, query_norm: f64) -> Vec<Read> {
    let (mut reached, mut segment) = (0.0, usize::MAX);
    // Maxima change rarely from page to page, and with them the unit of what was drawn.
    let (mut maximum, mut unit) = (f32::NAN, 0.0);
    let logit_rounding = score_rounding(query_norm, line.query.len());
    let mut page = |share: &Share| {
        if share.maximum != maximum {
            (maximum, unit) = (share.maximum, f64::from(share.maximum - shares.maximum).exp() / f64::from(shares.sum));
        }
        if std::mem::replace(&mut segment, share.tile / SEGMENT) != share.tile / SEGMENT {
            reached = 0.0;
        }
        let (mass, energy) = (unit * f64::from(share.mass), unit * f64::from(share.energy));
        let before = std::mem::replace(&mut reached, unit * f64::from(share.reached));
        let dispersion = (energy - 2.0 * (reached - before) + mass * norm * norm).max(0.0);
        let squares = unit * unit * f64::from(share.squares);
        let mut read = Read {
            page: share.tile,
            part: PagePart { mass, score_error: 0.0, value_error: 0.0, dispersion, radius: 0.0 },
            swing: 0.0,
            squares: PageSquares {
                score_variance: 0.0,
                value_square: 0.0,
                squares,
                // As if weights and distances were independent within a page.
                dispersion: if mass > 0.0 { squares / mass * dispersion } else { 0.0 },
            },
            drawn: (mass * energy).sqrt(),
        };
        if !view.has_exact_keys(share.tile) {
            let fact = view.pages.fact(kv_head, share.tile);
            read.part.score_error = f64::from(share.error.most) + logit_rounding * f64::from(fact.key_norm);
            read.swing = read.part.swing();
            read.squares.score_variance = f64::from(share.error.variance);
        }
        if !view.has_exact_values(share.tile) {
            let fact = view.pages.fact(kv_head, share.tile);
            read.part.value_error = f64::from(fact.value_error);
            read.squares.value_square = f64::from(fact.value_square);
        }
        read
    };
    shares.tiles.iter().map(&mut page).collect()
}

/// What the rounding of both logits adds to Delta, per norm of a key.
fn score_rounding(query_norm: f64, head_dim: usize) -> f64 {
    2.0 * rounding(query_norm, 1.0, head_dim)
}

/// Pages before the line's own that it did not read; the radius is still that about 0.
fn unread_pages(view: &View<'_>, kv_head: usize, line: &Line<'_>, shares: &Shares, query_norm: f64) -> Vec<(usize, Unread)> {
    let Some(tiles) = line.tiles else { return vec![] };
    let head_dim = line.query.len();
    let table = view.pages.before(view.own, kv_head);
    let query = GroupQuery { queries: line.query, head_dim };
    let logit_rounding = score_rounding(query_norm, head_dim);
    let unread = |page: usize| {
        let mut bound = [0.0];
        table.score_bounds(page, &query, &mut bound);
        let fact = view.pages.fact(kv_head, page);
        let key_norm = f64::from(fact.key_norm);
        // A corner of the box is at most sqrt(d) times as long as its longest key.
        let corner = 0.5 * logit_rounding * key_norm * (head_dim as f64).sqrt();
        let score = f64::from(bound[0]) + corner + logit_rounding * key_norm;
        // Beyond e^600 nothing is gained by telling pages apart.
        let mass = TILE as f64 * (score - f64::from(shares.maximum)).min(600.0).exp();
        (page, Unread { mass, radius: f64::from(fact.value_norm) })
    };
    (0..view.own).filter(|page| !tiles.contains(*page)).map(unread).collect()
}

/// Relative error of a softmax weight computed in f32 over `pages` tiles: the exponent's rounding for arguments down to -87 (2^-24 of
/// them, twice), the exponential itself (2 units), and per tile one rescaling, whose factor is an exponential too.
fn weight_rounding(pages: usize) -> f64 {
    2f64.powi(-16) + pages as f64 * 2f64.powi(-21)
}

/// What rounding can hide of a page's dispersion: its energy and the products with the output were summed in f32.
fn dispersion_rounding(read: &Read, norm: f64, slack: f64) -> f64 {
    let energy = if read.part.mass > 0.0 { read.drawn * read.drawn / read.part.mass } else { 0.0 };
    slack * (energy + read.part.mass * norm * norm) + 2f64.powi(-17) * norm * (norm + read.drawn)
}

/// Rounding of both outputs' sums in f32: of the weights, of the chain of multiply-adds over all values, each of which rounds what has been
/// summed so far, of the sum of weights in 16 lanes, and of the division. What segments add: the chains start afresh at each and are
/// joined by two products and a sum, for which every page pays four roundings more than its tokens; 64 pages make a segment.
fn output_rounding(own: usize, read: &[Read], unread: &[(usize, Unread)], least: f64, read_mass: f64, norm: f64) -> f64 {
    let unit = 2f64.powi(-24);
    let (mut read, mut unread) = (read.iter().peekable(), unread.iter().peekable());
    let (mut ours, mut theirs, mut chain) = (0.0, 0.0, 0.0);
    for page in 0..=own {
        if let Some(Read { part, swing, drawn, .. }) = read.next_if(|read| read.page == page) {
            // The original output gives a token at most e^Delta / W_lo times the weight.
            ours += drawn;
            theirs += (1.0 + swing) / least * (drawn + part.mass * part.value_error);
        } else if let Some((_, left)) = unread.next_if(|(unread, _)| *unread == page) {
            theirs += (left.mass / read_mass).min(1.0) * left.radius;
        }
        chain += (TILE + 4) as f64 * (ours + theirs);
    }
    let sums = gamma((own + 1) * TILE / 16 + 16 + 2 * own);
    unit * chain + weight_rounding(own + 1 + own / SEGMENT) * (ours + theirs + 2.0 * norm) + 2.0 * sums * (norm + theirs)
}
