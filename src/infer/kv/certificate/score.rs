//! Errors and bounds of a logit q.k / sqrt(d).

/// A1: every key channel was rounded to the nearest of levels `steps[c]` apart: sum_c |q_c| step_c / (2 sqrt d).
pub fn interval_score_error(query: &[f64], steps: &[f64]) -> f64 {
    query.iter().zip(steps).map(|(q, step)| q.abs() * step).sum::<f64>() / (2.0 * root(query))
}

/// A2: no key of the page moved further than `radius`: norm(q) radius / sqrt d, by Cauchy and Schwarz.
pub fn radius_score_error(query: &[f64], radius: f64) -> f64 {
    norm(query) * radius / root(query)
}

/// A3: the same over equal groups of channels, each with its own radius: sum_g norm(q_g) radius_g / sqrt d. For a single token at most A2;
/// with the largest radius per page and group the order can turn, so the smaller of the two counts. Groups that rotate together (the
/// pairs of a rotary embedding) keep their norms.
pub fn grouped_score_error(query: &[f64], radii: &[f64]) -> f64 {
    let groups = query.chunks_exact(query.len() / radii.len());
    groups.zip(radii).map(|(group, radius)| norm(group) * radius).sum::<f64>() / root(query)
}

/// A5: relative error of a sum of `terms` products in f32, whatever their order, fused or not: n u / (1 - n u) with u = 2^-24, times the
/// sum of the products' magnitudes (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1).
pub fn gamma(terms: usize) -> f64 {
    let n = terms as f64 * UNIT;
    n / (1.0 - n)
}

/// Unit roundoff of f32.
const UNIT: f64 = 1.0 / 16_777_216.0;

/// A5: how far a logit computed in f32 can be from the exact one for keys no longer than `key_norm`, the scaling of the query included.
pub fn rounding(query_norm: f64, key_norm: f64, head_dim: usize) -> f64 {
    // Three roundings beside the sum: of 1 / sqrt(d), of its square root, of the scaled query.
    gamma(head_dim + 3) * query_norm * key_norm / (head_dim as f64).sqrt()
}

/// The largest logit of a key in the box `low..high`: sum_c max(q_c low_c, q_c high_c) / sqrt d. Tang et al. 2024, arXiv:2406.10774.
pub fn box_score(query: &[f64], low: &[f64], high: &[f64]) -> f64 {
    let corner = query.iter().zip(low).zip(high).map(|((q, low), high)| (q * low).max(q * high));
    corner.sum::<f64>() / root(query)
}

/// The largest logit of a key in the ball about `centre`: (q.c + norm(q) r) / sqrt d.
pub fn ball_score(query: &[f64], centre: &[f64], radius: f64) -> f64 {
    let product: f64 = query.iter().zip(centre).map(|(q, c)| q * c).sum();
    (product + norm(query) * radius) / root(query)
}

fn root(query: &[f64]) -> f64 {
    (query.len() as f64).sqrt()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}
