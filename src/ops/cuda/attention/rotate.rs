//! Rotations of rows by random signs and the Walsh-Hadamard transform. Kernel: `kernels/rotate.cu`.

use crate::arguments;
use crate::error::{Error, Result};
use crate::ops::cuda::{Buffer, Device, fits};

/// Widest row.
const WIDEST: usize = 1024;

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// x := H (scales * x)
    Forward,
    /// x := scales * (H x), which undoes the forward one.
    Backward,
}

/// Rotates `rows` rows of `from` into `to`, `[rows, width]`. `scales`: `[width]`, signs over sqrt(width); its length is the width.
///
/// # Errors
/// When the width is no power of two up to 1024.
pub fn rotate<D: Device>(
    device: &D,
    turn: Turn,
    from: &Buffer<D, f32>,
    to: &Buffer<D, f32>,
    scales: &Buffer<D, f32>,
    rows: usize,
) -> Result<()> {
    let width = scales.len();
    if !width.is_power_of_two() || width > WIDEST {
        let cause = format!("the CUDA rotation takes heads of a power of two of channels up to {WIDEST}; these have {width}");
        return Err(Error::input("kv", cause).fix("choose f16, fp8 or int8-int4"));
    }
    let kernel = if turn == Turn::Forward { "rotate_forward_f32" } else { "rotate_backward_f32" };
    let threads = fits((width / 2).next_multiple_of(32).clamp(32, 128), "head_dim")?;
    let args = arguments![from, to, scales, fits(width, "head_dim")?];
    device.launch(kernel, [fits(rows, "rows")?, 1, 1], [threads, 1, 1], 0, args)
}

#[cfg(test)]
mod tests {
    use super::super::testing::Draw;
    use super::*;
    use crate::ops::cuda::Emulated;

    /// The transform by its definition: element (i, j) is (-1)^(bits that i and j share).
    fn expected(row: &[f32], scales: &[f32]) -> Vec<f64> {
        let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        let products: Vec<f64> = row.iter().zip(scales).map(|(x, s)| f64::from(*x) * f64::from(*s)).collect();
        (0..row.len()).map(|i| products.iter().enumerate().map(|(j, x)| sign(i, j) * x).sum()).collect()
    }

    #[test]
    fn rows_turn_and_turn_back() {
        let Some(device) = Emulated::new() else { return };
        let mut draw = Draw::new(41);
        for width in [1usize, 2, 16, 64, 128, 256] {
            let scale = 1.0 / (width as f32).sqrt();
            let scales: Vec<f32> = (0..width).map(|_| scale.copysign(draw.normal())).collect();
            let rows: Vec<f32> = (0..3 * width).map(|_| draw.normal()).collect();
            let (device_scales, from) = (device.upload(&scales).unwrap(), device.upload(&rows).unwrap());
            let (turned, back) = (device.alloc(rows.len()).unwrap(), device.alloc(rows.len()).unwrap());
            rotate(&device, Turn::Forward, &from, &turned, &device_scales, 3).unwrap();
            rotate(&device, Turn::Backward, &turned, &back, &device_scales, 3).unwrap();
            let (turned, back) = (device.download(&turned).unwrap(), device.download(&back).unwrap());
            for (row, turned) in rows.chunks(width).zip(turned.chunks(width)) {
                assert!(turned.iter().zip(expected(row, &scales)).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-5));
            }
            assert!(rows.iter().zip(&back).all(|(x, y)| (x - y).abs() < 1e-5));
        }
        let odd = device.alloc::<f32>(80).unwrap();
        assert!(rotate(&device, Turn::Forward, &odd, &odd, &odd, 1).is_err());
    }
}
