//! Causal grouped-query attention in tiles. Dao 2023, arXiv:2307.08691.
//! o_i = sum_j p_ij v_j, p_ij = exp(scale q_i.k_j - L_i), L_i = log sum_j exp(scale q_i.k_j) over document_start_i <= j <= i
//! ds_ij = p_ij (do_i.v_j - do_i.o_i);  dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i
//! q, o: [batch * tokens, heads * hd]   k, v: [batch * tokens, kv_heads * hd]   L: [batch, heads, tokens]
//! f32; the fused path never forms a tokens x tokens matrix, the reference does.

use super::cpu::attention::{attention_backward, attention_forward};
use super::host::{buffer, from_vec, host};
use crate::tape::{Tape, Var};
use candle_core::{D, Result, Tensor};
use std::sync::Arc;

pub use super::cpu::attention::AttentionShape;

/// Attends each token to its own document up to itself. `document_starts` holds, for every row of q, the in-row index of the first token
/// of its document; without it every row of the batch is one document.
pub fn attention<'a>(
    tape: &Tape<'a>,
    shape: AttentionShape,
    [q, k, v]: [&Var; 3],
    document_starts: Option<Arc<Vec<u32>>>,
) -> Result<Var> {
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    if tape.fuses(q.tensor()) { fused(tape, shape, scale, [q, k, v], document_starts) } else { reference(tape, shape, scale, [q, k, v], document_starts) }
}

fn fused<'a>(
    tape: &Tape<'a>,
    shape: AttentionShape,
    scale: f32,
    inputs: [&Var; 3],
    starts: Option<Arc<Vec<u32>>>,
) -> Result<Var> {
    let [q, k, v] = inputs.map(Var::tensor);
    let (mut o, mut log_sum_exp) = (buffer(q.elem_count()), buffer(shape.batch * shape.heads * shape.tokens));
    let view = starts.as_ref().map(|s| s.as_slice());
    attention_forward(shape, scale, &host(q)?, &host(k)?, &host(v)?, view, &mut o, &mut log_sum_exp);
    let o = from_vec(o, q.shape())?;
    let (kept, saved) = (o.clone(), inputs.map(Clone::clone));
    let [o] = tape.record(&inputs, [o], move |flow, [d_o]| {
        let Some(d_o) = d_o else { return Ok(()) };
        let [q, k, v] = saved.each_ref().map(Var::tensor);
        let (mut d_q, mut d_k, mut d_v) = (buffer(q.elem_count()), buffer(k.elem_count()), buffer(v.elem_count()));
        let view = starts.as_ref().map(|s| s.as_slice());
        let (q_data, k_data, v_data, o_data, d_o) = (host(q)?, host(k)?, host(v)?, host(&kept)?, host(&d_o)?);
        attention_backward(
            shape, scale, &q_data, &k_data, &v_data, &o_data, &log_sum_exp, view, &d_o, &mut d_q, &mut d_k, &mut d_v,
        );
        flow.add(&saved[0], from_vec(d_q, q.shape())?)?;
        flow.add(&saved[1], from_vec(d_k, k.shape())?)?;
        flow.add(&saved[2], from_vec(d_v, v.shape())?)
    });
    Ok(o)
}

fn reference<'a>(
    tape: &Tape<'a>,
    shape: AttentionShape,
    scale: f32,
    inputs: [&Var; 3],
    starts: Option<Arc<Vec<u32>>>,
) -> Result<Var> {
    let [q, k, v] = inputs.map(Var::tensor);
    let (qh, kh, vh) = (split(q, shape, shape.heads)?, split_shared(k, shape)?, split_shared(v, shape)?);
    let scores = (qh.matmul(&kh.transpose(2, 3)?)? * f64::from(scale))?.broadcast_add(&mask(shape, starts.as_deref(), q)?)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let o = join(&weights.matmul(&vh)?)?;
    let (kept, saved) = (o.clone(), inputs.map(Clone::clone));
    let [o] = tape.record(&inputs, [o], move |flow, [d_o]| {
        let Some(d_o) = d_o else { return Ok(()) };
        let d_oh = split(&d_o, shape, shape.heads)?;
        let d_vh = weights.transpose(2, 3)?.contiguous()?.matmul(&d_oh)?;
        let inner = (&d_oh * split(&kept, shape, shape.heads)?)?.sum_keepdim(D::Minus1)?;
        let d_scores = (d_oh.matmul(&vh.transpose(2, 3)?)?.broadcast_sub(&inner)? * &weights)?;
        let d_scores = (d_scores * f64::from(scale))?;
        flow.add(&saved[0], join(&d_scores.matmul(&kh)?)?)?;
        flow.add(&saved[1], join_shared(&d_scores.transpose(2, 3)?.contiguous()?.matmul(&qh)?, shape)?)?;
        flow.add(&saved[2], join_shared(&d_vh, shape)?)
    });
    Ok(o)
}

/// `[batch * tokens, heads * hd]` -> `[batch, heads, tokens, hd]`.
fn split(x: &Tensor, shape: AttentionShape, heads: usize) -> Result<Tensor> {
    x.reshape((shape.batch, shape.tokens, heads, shape.head_dim))?.transpose(1, 2)?.contiguous()
}

/// The same for keys and values, each head repeated for the queries that share it.
fn split_shared(x: &Tensor, shape: AttentionShape) -> Result<Tensor> {
    let group = shape.heads / shape.kv_heads;
    let heads = split(x, shape, shape.kv_heads)?.unsqueeze(2)?;
    heads.broadcast_as((shape.batch, shape.kv_heads, group, shape.tokens, shape.head_dim))?.reshape((
        shape.batch,
        shape.heads,
        shape.tokens,
        shape.head_dim,
    ))
}

fn join(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, tokens, head_dim) = x.dims4()?;
    x.transpose(1, 2)?.reshape((batch * tokens, heads * head_dim))
}

fn join_shared(x: &Tensor, shape: AttentionShape) -> Result<Tensor> {
    let group = shape.heads / shape.kv_heads;
    join(&x.reshape((shape.batch, shape.kv_heads, group, shape.tokens, shape.head_dim))?.sum(2)?)
}

/// 0 where token i of a row may see token j, -inf elsewhere: `[batch, 1, tokens, tokens]`.
fn mask(shape: AttentionShape, starts: Option<&Vec<u32>>, like: &Tensor) -> Result<Tensor> {
    let mut values = Vec::with_capacity(shape.batch * shape.tokens * shape.tokens);
    for row in 0..shape.batch * shape.tokens {
        let (i, start) = (row % shape.tokens, starts.map_or(0, |s| s[row] as usize));
        values.extend((0..shape.tokens).map(|j| if start <= j && j <= i { 0.0f32 } else { f32::NEG_INFINITY }));
    }
    Tensor::from_vec(values, (shape.batch, 1, shape.tokens, shape.tokens), like.device())?.to_dtype(like.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_fused, check_reference, gaussian};

    fn run(tokens: usize, starts: Option<Vec<u32>>) {
        let shape = AttentionShape { batch: 2, tokens, heads: 4, kv_heads: 2, head_dim: 6 };
        let inputs = [gaussian("q", &[2 * tokens, 24]), gaussian("k", &[2 * tokens, 12]), gaussian("v", &[2 * tokens, 12])];
        let starts = starts.map(Arc::new);
        let operation = |tape: &Tape<'_>, v: &[Var]| attention(tape, shape, [&v[0], &v[1], &v[2]], starts.clone());
        if tokens < 20 {
            check_reference(operation, &inputs);
        }
        check_fused(operation, &inputs, 5e-6);
    }

    #[test]
    fn gradients_over_one_document_and_over_packed_ones() {
        run(5, None);
        run(6, Some(vec![0, 0, 2, 2, 2, 5, 0, 1, 1, 1, 1, 1]));
    }

    #[test]
    fn several_tiles() {
        run(150, None);
        let starts = (0..300).map(|row| ((row % 150) / 70 * 70) as u32).collect();
        run(150, Some(starts));
    }
}
