//! Token embedding: y_r = E\[id_r];  dE\[id] = sum over rows r with id_r = id of dy_r.
//! ids: \[rows]   E: [vocab, d]   y: [rows, d]
//! f32 throughout. The fused path adds rows in order, so equal ids accumulate in one fixed order.

use super::host::{self, buffer, from_vec, host};
use crate::tape::{Tape, Var};
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// Looks up the rows of `table` (`[vocab, d]`) named by `ids`. Every id must be below `vocab`.
pub fn embedding<'a>(tape: &Tape<'a>, ids: &Arc<Vec<u32>>, table: &Var) -> Result<Var> {
    let (vocab, width) = table.tensor().dims2()?;
    let fused = tape.fuses(table.tensor());
    let output = if fused { gather(ids, table.tensor(), width)? } else { gather_reference(ids, table.tensor())? };
    let (ids, kept) = (ids.clone(), table.clone());
    let [output] = tape.record(&[table], [output], move |flow, [gradient]| {
        let Some(gradient) = gradient else { return Ok(()) };
        if fused {
            let gradient = host(&gradient)?;
            let done = flow.write_parameter(&kept, |elements, accumulate| scatter(&ids, &gradient, width, elements, accumulate))?;
            if done {
                return Ok(());
            }
            let mut dense = buffer(vocab * width);
            scatter(&ids, &gradient, width, &mut dense, true);
            return flow.add(&kept, from_vec(dense, (vocab, width))?);
        }
        let index = Tensor::from_slice(&ids, ids.len(), gradient.device())?;
        flow.add(&kept, kept.tensor().zeros_like()?.index_add(&index, &gradient, 0)?)
    });
    Ok(output)
}

fn gather(ids: &[u32], table: &Tensor, width: usize) -> Result<Tensor> {
    let source = host(table)?;
    let mut output = buffer(ids.len() * width);
    for (row, &id) in output.chunks_exact_mut(width).zip(ids) {
        row.copy_from_slice(&source[id as usize * width..][..width]);
    }
    host::from_vec(output, (ids.len(), width))
}

fn gather_reference(ids: &[u32], table: &Tensor) -> Result<Tensor> {
    table.index_select(&Tensor::from_slice(ids, ids.len(), table.device())?, 0)
}

fn scatter(ids: &[u32], gradient: &[f32], width: usize, elements: &mut [f32], accumulate: bool) {
    if !accumulate {
        elements.fill(0.0);
    }
    for (row, &id) in gradient.chunks_exact(width).zip(ids) {
        for (sum, value) in elements[id as usize * width..][..width].iter_mut().zip(row) {
            *sum += value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check, gaussian};

    #[test]
    fn gradients_of_repeated_and_absent_tokens() {
        let ids = Arc::new(vec![2, 0, 2, 4, 2]);
        check(|tape, v| embedding(tape, &ids, &v[0]), &[gaussian("e", &[6, 3])]);
    }
}
