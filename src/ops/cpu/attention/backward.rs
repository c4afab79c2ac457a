//! The backward pass of one key-value head of one sequence: weights are recomputed tile by tile from the log-sum-exps.
//!
//! Order of every sum: a key's gradient runs over the heads of its group in ascending order and within each over the queries in
//! ascending order; a query's runs over the keys in ascending order.

use super::forward::{BLOCK, GROUP, Seen, hide};
use super::product::{Product, Target};
use super::tiles::{HeadRows, TILE, key_tile_len, padded};
use crate::multiversion;
use crate::ops::cpu::math::exp;
use crate::ops::cpu::reduce;
use crate::ops::cpu::scratch::Scratch;

/// Keys and values of one head, packed both ways, and the gradients gathered for them.
pub(super) struct KeySide {
    head_dim: usize,
    tokens: usize,
    /// [tile, head_dim, 64]
    keys_transposed: Scratch,
    /// [tokens, padded head_dim]
    keys: Scratch,
    /// [tile, head_dim, 64]
    values_transposed: Scratch,
    /// [tokens rounded up to tiles, padded head_dim]
    pub(super) d_keys: Scratch,
    pub(super) d_values: Scratch,
}

impl KeySide {
    pub(super) fn new(tokens: usize, keys: HeadRows<'_>, values: HeadRows<'_>) -> KeySide {
        let head_dim = keys.head_dim;
        let tiles = tokens.div_ceil(TILE);
        let (transposed, plain) = (tiles * key_tile_len(head_dim), tiles * TILE * padded(head_dim));
        let mut side = KeySide {
            head_dim,
            tokens,
            keys_transposed: Scratch::take(transposed),
            keys: Scratch::take(plain),
            values_transposed: Scratch::take(transposed),
            d_keys: Scratch::take(plain),
            d_values: Scratch::take(plain),
        };
        keys.pack_transposed(tokens, &mut side.keys_transposed);
        keys.pack_scaled(tokens, 1.0, &mut side.keys);
        values.pack_transposed(tokens, &mut side.values_transposed);
        side.d_keys.fill(0.0);
        side.d_values.fill(0.0);
        side
    }
}

/// One query head: what the forward pass saved, and the gradient that arrives.
pub(super) struct QuerySide<'a> {
    pub(super) queries: HeadRows<'a>,
    pub(super) outputs: HeadRows<'a>,
    pub(super) d_outputs: HeadRows<'a>,
    /// One per token.
    pub(super) log_sum_exp: &'a [f32],
    pub(super) scale: f32,
}

/// Working memory for one query head.
struct Work {
    /// [tokens, padded head_dim], scaled.
    queries: Scratch,
    d_outputs: Scratch,
    /// One per token: sum_d out * d_out, which is also sum_j weight_j * d_weight_j.
    deltas: Scratch,
    /// [BLOCK, TILE] each.
    weights: Scratch,
    d_scores: Scratch,
}

/// Adds this query head's share to the gradients of keys and values and overwrites `d_queries` ([tokens, padded head_dim], not yet
/// multiplied by the scale). `starts` holds each token's first visible position.
pub(super) fn backward_head(side: &mut KeySide, head: &QuerySide<'_>, starts: &[u32], d_queries: &mut [f32]) {
    let (tokens, width) = (side.tokens, padded(side.head_dim));
    let mut work = Work {
        queries: Scratch::take(tokens * width),
        d_outputs: Scratch::take(tokens * width),
        deltas: Scratch::take(tokens),
        weights: Scratch::take(BLOCK * TILE),
        d_scores: Scratch::take(BLOCK * TILE),
    };
    head.queries.pack_scaled(tokens, head.scale, &mut work.queries);
    head.d_outputs.pack_scaled(tokens, 1.0, &mut work.d_outputs);
    dots(tokens, head.outputs, head.d_outputs, &mut work.deltas);
    d_queries.fill(0.0);
    for tile in 0..tokens.div_ceil(TILE) {
        for block in tile..tokens.div_ceil(BLOCK) {
            // Starts ascend, so the first row of a block sees furthest back.
            if starts[block * BLOCK] as usize >= (tile + 1) * TILE {
                break;
            }
            backward_tile(side, &mut work, head.log_sum_exp, starts, tile, block, d_queries);
        }
    }
}

fn dots(tokens: usize, x: HeadRows<'_>, y: HeadRows<'_>, out: &mut [f32]) {
    multiversion! {
        fn dot(x: &[f32], y: &[f32]) -> f32 {
            reduce::dot(x, y)
        }
    }
    (0..tokens).for_each(|row| out[row] = dot(x.row(row), y.row(row)));
}

/// Queries of one block against the keys of one tile.
fn backward_tile(side: &mut KeySide, work: &mut Work, lse: &[f32], starts: &[u32], tile: usize, block: usize, d_queries: &mut [f32]) {
    let (head_dim, width) = (side.head_dim, padded(side.head_dim));
    let rows = block * BLOCK..side.tokens.min((block + 1) * BLOCK);
    let mut seen = [Seen::default(); BLOCK];
    seen.iter_mut().zip(rows.clone()).for_each(|(seen, row)| *seen = Seen::of(tile, starts[row] as usize, row));
    let seen = &seen[..rows.len()];
    let keys_transposed = &side.keys_transposed[tile * key_tile_len(head_dim)..];
    let values_transposed = &side.values_transposed[tile * key_tile_len(head_dim)..];
    let keys = &side.keys[tile * TILE * width..];
    for first in (0..seen.len()).step_by(GROUP) {
        let seen = &seen[first..seen.len().min(first + GROUP)];
        let (weights, d_scores) = (&mut work.weights[first * TILE..], &mut work.d_scores[first * TILE..]);
        let hull = Seen::hull(seen);
        if hull.is_empty() {
            weights[..seen.len() * TILE].fill(0.0);
            d_scores[..seen.len() * TILE].fill(0.0);
            continue;
        }
        let row = rows.start + first;
        let (lane, columns) = hull.lanes();
        let against = |a, b, c| {
            let product =
                Product { rows: seen.len(), steps: head_dim, columns, a, a_row_stride: width, a_step_stride: 1, b, b_stride: TILE };
            product.run(Target { c, stride: TILE, accumulate: false });
        };
        against(&work.queries[row * width..], &keys_transposed[lane..], &mut weights[lane..]);
        against(&work.d_outputs[row * width..], &values_transposed[lane..], &mut d_scores[lane..]);
        let lines = row..row + seen.len();
        differentiate_lines(hull, seen, &lse[lines.clone()], &work.deltas[lines], weights, d_scores);
        let product = Product {
            rows: seen.len(),
            steps: hull.end - hull.first,
            columns: width,
            a: &d_scores[hull.first..],
            a_row_stride: TILE,
            a_step_stride: 1,
            b: &keys[hull.first * width..],
            b_stride: width,
        };
        product.run(Target { c: &mut d_queries[row * width..], stride: width, accumulate: true });
    }
    let gather = |a, b, gradient| gather_keys(seen, width, a, b, gradient);
    gather(&work.weights, &work.d_outputs[rows.start * width..], &mut side.d_values[tile * TILE * width..]);
    gather(&work.d_scores, &work.queries[rows.start * width..], &mut side.d_keys[tile * TILE * width..]);
}

multiversion! {
    /// Scores become weights exp(score - lse), gradients of weights become gradients of scores weight * (d_weight - delta); both are 0
    /// where a line sees nothing.
    fn differentiate_lines(hull: Seen, seen: &[Seen], lse: &[f32], deltas: &[f32], weights: &mut [f32], d_scores: &mut [f32]) {
        let (first, columns) = hull.lanes();
        let lines = weights.chunks_exact_mut(TILE).zip(d_scores.chunks_exact_mut(TILE));
        for (((seen, lse), delta), (weights, d_scores)) in seen.iter().zip(lse).zip(deltas).zip(lines) {
            let used = first..first + columns;
            for (d_score, weight) in d_scores[used.clone()].iter_mut().zip(&mut weights[used]) {
                *weight = exp(*weight - lse);
                *d_score = *weight * (*d_score - delta);
            }
            hide(*seen, weights, 0.0);
            hide(*seen, d_scores, 0.0);
        }
    }
}

/// `gradient[key] += sum_queries a[query, key] * b[query]`, in groups of keys, over the queries that see some key of the group.
fn gather_keys(seen: &[Seen], width: usize, a: &[f32], b: &[f32], gradient: &mut [f32]) {
    for key in (0..TILE).step_by(GROUP) {
        let sees = |seen: &Seen| !seen.is_empty() && seen.first < key + GROUP && seen.end > key;
        let (Some(first), Some(last)) = (seen.iter().position(sees), seen.iter().rposition(sees)) else { continue };
        let product = Product {
            rows: GROUP,
            steps: last + 1 - first,
            columns: width,
            a: &a[first * TILE + key..],
            a_row_stride: 1,
            a_step_stride: TILE,
            b: &b[first * width..],
            b_stride: width,
        };
        product.run(Target { c: &mut gradient[key * width..], stride: width, accumulate: true });
    }
}
