//! The bounds of one line: from what it drew from each page and what the page says of its own error to the certificate of its output.

use super::certificate::{
    PagePart, PageSquares, Unread, expected_square, gamma, least_mass, rounding, share_of_keys, share_of_values, total_error, unread_error,
};
use super::pages::{PageError, View};
use super::recovery::Part;
use crate::infer::attention::{GroupQuery, PageTable};
use crate::ops::cpu::attention::{Line, Share, Shares, TILE};

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
    /// What promoting would take away.
    pub(super) items: Vec<Item>,
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

    /// `error` relative to the output's norm.
    pub(super) fn relative(&self, error: f64) -> f64 {
        if error == 0.0 { 0.0 } else { error / self.norm }
    }
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// One page that was read.
struct Read {
    page: usize,
    part: PagePart,
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
    read.iter_mut().for_each(|read| read.part.dispersion += dispersion_rounding(read, norm, slack));
    let parts: Vec<PagePart> = read.iter().map(|read| read.part).collect();
    let (least, quantized) = (least_mass(&parts), inflation * total_error(&parts));
    unread.iter_mut().for_each(|(_, page)| page.radius += norm + quantized);
    let pages: Vec<Unread> = unread.iter().map(|(_, page)| *page).collect();
    let read_mass = f64::from(shares.sum) * least / inflation;
    let unread_bound = unread_error(read_mass, &pages);
    let rounding = output_rounding(view.own, &read, &unread, least, read_mass, norm);
    let squares: Vec<PageSquares> = read.iter().map(|read| read.squares).collect();
    Assessment {
        norm,
        bound: quantized + unread_bound + rounding,
        unread: unread_bound,
        rounding,
        meter: expected_square(&squares).sqrt(),
        items: items(&read, &unread, least, unread_bound),
    }
}

fn read_pages(view: &View<'_>, kv_head: usize, line: &Line<'_>, shares: &Shares, norm: f64, query_norm: f64) -> Vec<Read> {
    let mut reached = 0.0;
    let mut page = |share: &Share| {
        let unit = f64::from(share.maximum - shares.maximum).exp() / f64::from(shares.sum);
        let (mass, energy) = (unit * f64::from(share.mass), unit * f64::from(share.energy));
        let before = std::mem::replace(&mut reached, unit * f64::from(share.reached));
        let dispersion = (energy - 2.0 * (reached - before) + mass * norm * norm).max(0.0);
        let (exact_keys, exact_values) = (view.has_exact_keys(share.tile), view.has_exact_values(share.tile));
        let error = if exact_keys && exact_values { PageError::default() } else { view.pages.page_error(kv_head, share.tile, line.query) };
        let score_error = if exact_keys { 0.0 } else { score_error(&error, query_norm, line.query.len()) };
        let squares = unit * unit * f64::from(share.squares);
        Read {
            page: share.tile,
            part: PagePart {
                mass,
                score_error,
                value_error: if exact_values { 0.0 } else { f64::from(error.value) },
                dispersion,
                radius: 0.0,
            },
            squares: PageSquares {
                score_variance: if exact_keys { 0.0 } else { f64::from(error.score_variance) },
                value_square: if exact_values { 0.0 } else { f64::from(error.value_square) },
                squares,
                // As if weights and distances were independent within a page.
                dispersion: if mass > 0.0 { squares / mass * dispersion } else { 0.0 },
            },
            drawn: (mass * energy).sqrt(),
        }
    };
    shares.tiles.iter().map(&mut page).collect()
}

/// Delta: what the codec states, and the rounding of both logits.
fn score_error(error: &PageError, query_norm: f64, head_dim: usize) -> f64 {
    f64::from(error.score) + 2.0 * rounding(query_norm, f64::from(error.key_norm), head_dim)
}

/// Pages before the line's own that it did not read; the radius is still that about 0.
fn unread_pages(view: &View<'_>, kv_head: usize, line: &Line<'_>, shares: &Shares, query_norm: f64) -> Vec<(usize, Unread)> {
    let Some(tiles) = line.tiles else { return vec![] };
    let head_dim = line.query.len();
    let table = view.pages.before(view.own, kv_head);
    let query = GroupQuery { queries: line.query, head_dim };
    let unread = |page: usize| {
        let mut bound = [0.0];
        table.score_bounds(page, &query, &mut bound);
        let error = view.pages.page_error(kv_head, page, line.query);
        // A corner of the box is at most sqrt(d) times as long as its longest key.
        let corner = f64::from(error.key_norm) * (head_dim as f64).sqrt();
        let score =
            f64::from(bound[0]) + rounding(query_norm, corner, head_dim) + 2.0 * rounding(query_norm, f64::from(error.key_norm), head_dim);
        // Beyond e^600 nothing is gained by telling pages apart.
        let mass = TILE as f64 * (score - f64::from(shares.maximum)).min(600.0).exp();
        (page, Unread { mass, radius: f64::from(error.original_norm) })
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
/// summed so far, of the sum of weights in 16 lanes, and of the division.
fn output_rounding(own: usize, read: &[Read], unread: &[(usize, Unread)], least: f64, read_mass: f64, norm: f64) -> f64 {
    let unit = 2f64.powi(-24);
    let mut terms = vec![(0.0, 0.0); own + 1];
    for Read { page, part, drawn, .. } in read {
        // The original output gives a token at most e^Delta / W_lo times the weight.
        terms[*page] = (*drawn, part.score_error.exp() / least * (drawn + part.mass * part.value_error));
    }
    for (page, unread) in unread {
        terms[*page] = (0.0, (unread.mass / read_mass).min(1.0) * unread.radius);
    }
    let (mut ours, mut theirs, mut chain) = (0.0, 0.0, 0.0);
    for (our, their) in terms {
        (ours, theirs) = (ours + our, theirs + their);
        chain += TILE as f64 * (ours + theirs);
    }
    let sums = gamma((own + 1) * TILE / 16 + 16 + own);
    unit * chain + weight_rounding(own + 1) * (ours + theirs + 2.0 * norm) + 2.0 * sums * (norm + theirs)
}

fn items(read: &[Read], unread: &[(usize, Unread)], least: f64, unread_bound: f64) -> Vec<Item> {
    let mut items = vec![];
    for Read { page, part, squares, .. } in read {
        let keys = (share_of_keys(part, least), squares.score_variance * squares.dispersion);
        let values = (share_of_values(part, least), squares.value_square * squares.squares);
        for (kind, (linear, square)) in [(Part::Keys, keys), (Part::Values, values)] {
            if linear > 0.0 || square > 0.0 {
                items.push(Item { page: *page, part: kind, linear, square });
            }
        }
    }
    // Shares of the bound by what each page could bring in.
    let whole: f64 = unread.iter().map(|(_, page)| page.mass * page.radius).sum();
    items.extend(unread.iter().map(|(page, unread)| Item {
        page: *page,
        part: Part::Both,
        linear: if whole > 0.0 { unread_bound * unread.mass * unread.radius / whole } else { 0.0 },
        square: 0.0,
    }));
    items
}
