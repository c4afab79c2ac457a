//! Causal grouped-query attention in tiles. Dao et al. 2022, arXiv:2205.14135; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
//! s_ij = scale * q_i . k_j,  p_ij = exp(s_ij - lse_i),  out_i = sum_j p_ij v_j   for document_start_i <= j <= i
//! ds_ij = p_ij (do_i . v_j - out_i . do_i),  dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i
//! q, out: [batch * tokens, heads * head_dim]   k, v: [batch * tokens, kv_heads * head_dim]   lse: [batch, heads, tokens]
//! Reads, accumulates and writes f32; the online softmax runs over tiles of 64 keys at multiples of 64 from the start of the row, and
//! starts afresh every [`SEGMENT`] tiles, whose results are joined in ascending order. So a query decoded alone from a cache, by however
//! many threads, gets the bits it had in training. Never a tokens x tokens matrix.

mod backward;
#[cfg(target_arch = "x86_64")]
pub(crate) mod chain;
mod forward;
mod halves;
mod lines;
mod product;
mod tiles;

use super::scratch::Scratch;
use backward::{KeySide, QuerySide, backward_head};
pub use forward::SEGMENT;
use forward::{BLOCK, Block, GROUP, Unwatched, segment};
pub use halves::{mix_halves, score_halves};
pub use lines::{Line, Observer, ScoreError, Share, Shares, TileSet, attend_lines};
use rayon::prelude::*;
use std::borrow::Cow;
use std::marker::PhantomData;
use tiles::{HeadRows, write_scaled};
pub use tiles::{
    KeyValueTiles, RUN, TILE, TiledKeyValues, Visit, key_tile_len, mix_decoded, padded, score_decoded, store_key, store_value,
    value_tile_len,
};

/// Sizes of one attention over a batch of rows of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub batch: usize,
    /// Tokens per row of the batch.
    pub tokens: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl AttentionShape {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn num_queries(&self) -> usize {
        self.batch * self.tokens * self.heads * self.head_dim
    }

    fn num_keys(&self) -> usize {
        self.batch * self.tokens * self.kv_heads * self.head_dim
    }

    fn check(&self, q: &[f32], k: &[f32], v: &[f32], document_starts: Option<&[u32]>) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_dim > 0,
            "{self:?} has no whole groups of heads"
        );
        assert!([q.len(), k.len(), v.len()] == [self.num_queries(), self.num_keys(), self.num_keys()], "q, k, v do not have {self:?}");
        if let Some(starts) = document_starts {
            assert_eq!(starts.len(), self.batch * self.tokens, "one document start per token");
            let rows = || starts.chunks(self.tokens.max(1));
            assert!(rows().all(|row| row.iter().enumerate().all(|(i, start)| *start as usize <= i)), "documents start after their tokens");
            assert!(rows().all(|row| row.is_sorted()), "document starts descend");
        }
    }

    /// Rows of one head in a row of the batch.
    fn head_rows<'a>(&self, data: &'a [f32], num_heads: usize, batch: usize, head: usize) -> HeadRows<'a> {
        let width = num_heads * self.head_dim;
        let row = self.tokens * width;
        HeadRows { data: &data[batch * row..(batch + 1) * row], width, first: head * self.head_dim, head_dim: self.head_dim }
    }

    /// First visible position of every token of a row of the batch.
    fn starts<'a>(&self, document_starts: Option<&'a [u32]>, batch: usize) -> Cow<'a, [u32]> {
        match document_starts {
            Some(starts) => Cow::Borrowed(&starts[batch * self.tokens..(batch + 1) * self.tokens]),
            None => Cow::Owned(vec![0; self.tokens]),
        }
    }

    /// Runs `task(batch, kv_head)` for all of them on all threads.
    fn for_each_kv_head(&self, task: impl Fn(usize, usize) + Sync + Send) {
        (0..self.batch * self.kv_heads)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|index| task(index / self.kv_heads, index % self.kv_heads));
    }
}

/// A matrix whose rows several tasks write in parts that do not overlap.
struct SharedRows<'a> {
    data: *mut f32,
    length: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is `part`, whose callers keep their parts disjoint.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), length: data.len(), owner: PhantomData }
    }

    /// # Safety
    /// No two live parts overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, start: usize, length: usize) -> &mut [f32] {
        assert!(start <= self.length && length <= self.length - start, "part outside the matrix");
        // SAFETY: within the slice given to `new`, which stays borrowed; disjoint from other parts by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), length) }
    }
}

/// The packed keys and values of one key-value head in training.
struct Packed {
    head_dim: usize,
    keys: Scratch,
    values: Scratch,
}

impl Packed {
    fn new(tokens: usize, keys: HeadRows<'_>, values: HeadRows<'_>) -> Packed {
        let (head_dim, num_tiles) = (keys.head_dim, tokens.div_ceil(TILE));
        let (mut key_tiles, mut value_tiles) =
            (Scratch::take(num_tiles * key_tile_len(head_dim)), Scratch::take(num_tiles * value_tile_len(head_dim)));
        keys.pack_transposed(tokens, &mut key_tiles);
        values.pack_scaled(tokens, 1.0, &mut value_tiles);
        Packed { head_dim, keys: key_tiles, values: value_tiles }
    }
}

impl KeyValueTiles for Packed {
    fn keys<'a>(&'a self, _kv_head: usize, tile: usize, _scratch: &'a mut [f32]) -> &'a [f32] {
        &self.keys[tile * key_tile_len(self.head_dim)..][..key_tile_len(self.head_dim)]
    }

    fn values<'a>(&'a self, _kv_head: usize, tile: usize, _scratch: &'a mut [f32]) -> &'a [f32] {
        &self.values[tile * value_tile_len(self.head_dim)..][..value_tile_len(self.head_dim)]
    }
}

/// Attention of every token over the tokens of its document up to itself. Overwrites `out` and `log_sum_exp`.
///
/// `document_starts` ([batch * tokens]) holds the in-row index of the first token of each token's document; without it every row is one
/// document. Tiles that lie outside the document or after the query are skipped.
///
/// # Panics
/// When lengths disagree with `shape`, or document starts descend within a row or lie after their token.
#[allow(clippy::too_many_arguments)]
pub fn attention_forward(
    shape: AttentionShape,
    scale: f32,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    document_starts: Option<&[u32]>,
    out: &mut [f32],
    log_sum_exp: &mut [f32],
) {
    shape.check(q, k, v, document_starts);
    let AttentionShape { batch, tokens, heads, kv_heads, head_dim } = shape;
    assert!(out.len() == q.len() && log_sum_exp.len() == batch * heads * tokens);
    let (out, log_sum_exp) = (SharedRows::new(out), SharedRows::new(log_sum_exp));
    shape.for_each_kv_head(|batch, kv_head| {
        let packed = Packed::new(tokens, shape.head_rows(k, kv_heads, batch, kv_head), shape.head_rows(v, kv_heads, batch, kv_head));
        let starts = shape.starts(document_starts, batch);
        let mut block = Block::new(head_dim);
        for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
            let queries = shape.head_rows(q, heads, batch, head);
            // SAFETY: one task per (batch, head).
            let log_sum_exp = unsafe { log_sum_exp.part((batch * heads + head) * tokens, tokens) };
            for first in (0..tokens).step_by(BLOCK) {
                let rows = first..tokens.min(first + BLOCK);
                block.clear();
                rows.clone().for_each(|row| block.push(queries.row(row), scale, starts[row] as usize, row));
                block.attend(&packed, kv_head);
                for (line, row) in rows.enumerate() {
                    // SAFETY: one task per (batch, head), one part per row.
                    let out = unsafe { out.part(((batch * tokens + row) * heads + head) * head_dim, head_dim) };
                    log_sum_exp[row] = block.finish(line, out);
                }
            }
        }
    });
}

/// Gradients of [`attention_forward`] given its outputs; overwrites `d_q`, `d_k` and `d_v`.
///
/// # Panics
/// As [`attention_forward`].
#[allow(clippy::too_many_arguments)]
pub fn attention_backward(
    shape: AttentionShape,
    scale: f32,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    log_sum_exp: &[f32],
    document_starts: Option<&[u32]>,
    d_out: &[f32],
    d_q: &mut [f32],
    d_k: &mut [f32],
    d_v: &mut [f32],
) {
    shape.check(q, k, v, document_starts);
    let AttentionShape { batch, tokens, heads, kv_heads, head_dim } = shape;
    assert!([out.len(), d_out.len(), d_q.len()] == [q.len(); 3] && [d_k.len(), d_v.len()] == [k.len(); 2]);
    assert_eq!(log_sum_exp.len(), batch * heads * tokens);
    let (d_q, d_k, d_v) = (SharedRows::new(d_q), SharedRows::new(d_k), SharedRows::new(d_v));
    shape.for_each_kv_head(|batch, kv_head| {
        let mut side = KeySide::new(tokens, shape.head_rows(k, kv_heads, batch, kv_head), shape.head_rows(v, kv_heads, batch, kv_head));
        let starts = shape.starts(document_starts, batch);
        let mut d_queries = Scratch::take(tokens * padded(head_dim));
        let write = |target: &SharedRows<'_>, num_heads: usize, head: usize, source: &[f32], factor: f32| {
            for (row, source) in source.chunks_exact(padded(head_dim)).take(tokens).enumerate() {
                // SAFETY: one task per (batch, kv_head) and so per head of its group, one part per row.
                let target = unsafe { target.part(((batch * tokens + row) * num_heads + head) * head_dim, head_dim) };
                write_scaled(source, factor, target);
            }
        };
        for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
            let side_of_queries = QuerySide {
                queries: shape.head_rows(q, heads, batch, head),
                outputs: shape.head_rows(out, heads, batch, head),
                d_outputs: shape.head_rows(d_out, heads, batch, head),
                log_sum_exp: &log_sum_exp[(batch * heads + head) * tokens..][..tokens],
                scale,
            };
            backward_head(&mut side, &side_of_queries, &starts, &mut d_queries);
            write(&d_q, heads, head, &d_queries, scale);
        }
        write(&d_k, kv_heads, kv_head, &side.d_keys, 1.0);
        write(&d_v, kv_heads, kv_head, &side.d_values, 1.0);
    });
}

/// Multiply-adds below which handing work to other threads costs more than it saves.
const SERIAL_WORK: usize = 1 << 18;

/// Attention of `rows` consecutive queries of one sequence, the first at `first_position`, over everything cached up to each of them
/// (their own keys and values included). Overwrites `out`. q, out: [rows, heads * head_dim].
///
/// Bit-equal to [`attention_forward`] over the whole sequence as one document, however the queries are split into calls.
///
/// # Panics
/// When lengths disagree.
#[allow(clippy::too_many_arguments)]
pub fn attend_cached(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f32,
    q: &[f32],
    first_position: usize,
    cache: &(impl KeyValueTiles + ?Sized),
    out: &mut [f32],
) {
    assert!(kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_dim > 0, "{heads} heads are not whole groups of {kv_heads}");
    assert!(q.len() == out.len() && q.len().is_multiple_of(heads * head_dim), "queries are not rows of {heads} heads");
    let (group, rows) = (heads / kv_heads, q.len() / (heads * head_dim));
    // Queries of all heads of a group share each pass over the keys, so a lone query still fills several rows of a product.
    let blocks = (rows * group).div_ceil(BLOCK);
    let alone = q.len() * (first_position + rows) < SERIAL_WORK;
    let place = |kv_head: usize, line: usize| (line / group * heads + kv_head * group + line % group) * head_dim;
    let segments = (first_position + rows).div_ceil(SEGMENT * TILE);
    if !alone && rows * group <= GROUP && segments > 1 {
        let lines = |kv_head: usize| {
            let mut block = Block::new(head_dim);
            block.clear();
            (0..rows * group).for_each(|line| block.push(&q[place(kv_head, line)..][..head_dim], scale, 0, first_position + line / group));
            block
        };
        let part = |index: usize| {
            let mut block = lines(index / segments);
            block.attend_chosen(cache, index / segments, segment(index % segments), |_, _| true, &mut Unwatched);
            block.into_drawn()
        };
        let parts: Vec<_> = (0..kv_heads * segments).into_par_iter().with_max_len(1).map(part).collect();
        for (kv_head, parts) in parts.chunks(segments).enumerate() {
            let mut block = lines(kv_head);
            parts.iter().for_each(|part| block.join(part));
            block.close();
            (0..rows * group).for_each(|line| {
                block.finish(line, &mut out[place(kv_head, line)..][..head_dim]);
            });
        }
        return;
    }
    let out = SharedRows::new(out);
    let task = |index: usize| {
        let (kv_head, first_line) = (index / blocks, index % blocks * BLOCK);
        let lines = first_line..(rows * group).min(first_line + BLOCK);
        let mut block = Block::new(head_dim);
        block.clear();
        lines.clone().for_each(|line| block.push(&q[place(kv_head, line)..][..head_dim], scale, 0, first_position + line / group));
        block.attend(cache, kv_head);
        for (index, line) in lines.enumerate() {
            // SAFETY: every line belongs to one task and has its own place.
            block.finish(index, unsafe { out.part(place(kv_head, line), head_dim) });
        }
    };
    if alone {
        (0..kv_heads * blocks).for_each(task);
    } else {
        (0..kv_heads * blocks).into_par_iter().with_max_len(1).for_each(task);
    }
}

#[cfg(test)]
mod tests;
