//! Rotary position embedding, half-split form. Su et al. 2021, arXiv:2104.09864.
//! (a, b) = (x\[i], x[i + hd/2]) -> (a cos - b sin, b cos + a sin) at angle position * theta^(-2i/hd);  the gradient turns back.
//! x: [rows, heads * hd]   positions: \[rows]
//! Angles in f64, cosines and sines in f32.

pub use super::cpu::rope::RotaryTable;
use super::host::{from_vec, host};
use crate::tape::{Tape, Var};
use candle_core::{Result, Tensor};
use std::sync::Arc;

/// Rotates every head of `x` by its row's position. `table` must cover the positions.
pub fn rope<'a>(tape: &Tape<'a>, x: &Var, positions: &Arc<Vec<u32>>, table: &Arc<RotaryTable>) -> Result<Var> {
    let fused = tape.fuses(x.tensor());
    let y = rotate(fused, x.tensor(), positions, table, false)?;
    let (target, positions, table) = (x.target(), positions.clone(), table.clone());
    let [y] = tape.record(&[x], [y], move |flow, [d_y]| {
        let Some(d_y) = d_y else { return Ok(()) };
        flow.add(target, rotate(fused, &d_y, &positions, &table, true)?)
    });
    Ok(y)
}

fn rotate(fused: bool, x: &Tensor, positions: &[u32], table: &RotaryTable, backward: bool) -> Result<Tensor> {
    if !fused {
        return rotate_reference(x, positions, table, backward);
    }
    let mut data = host(x)?.to_vec();
    if backward {
        table.rotate_back(&mut data, positions)
    } else {
        table.rotate(&mut data, positions)
    }
    from_vec(data, x.shape())
}

fn rotate_reference(x: &Tensor, positions: &[u32], table: &RotaryTable, backward: bool) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let head_dim = table.head_dim();
    let half = head_dim / 2;
    let gather = |values: fn(&RotaryTable, usize) -> &[f32]| {
        let all: Vec<f32> = positions.iter().flat_map(|&p| values(table, p as usize).to_vec()).collect();
        Tensor::from_vec(all, (rows, 1, half), x.device())?.to_dtype(x.dtype())
    };
    let (cos, sin) = (gather(RotaryTable::cosines)?, gather(RotaryTable::sines)?);
    let sin = if backward { sin.neg()? } else { sin };
    let heads = x.reshape((rows, width / head_dim, head_dim))?;
    let (a, b) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)?.reshape((rows, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{check_fused, check_reference, gaussian};

    #[test]
    fn gradients() {
        let positions = Arc::new(vec![0, 3, 1, 6, 2]);
        let table = Arc::new(RotaryTable::new(6, 100.0, 7));
        let inputs = [gaussian("x", &[5, 18])];
        check_reference(|tape, v| rope(tape, &v[0], &positions, &table), &inputs);
        check_fused(|tape, v| rope(tape, &v[0], &positions, &table), &inputs, 2e-6);
    }
}
