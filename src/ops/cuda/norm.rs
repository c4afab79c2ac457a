//! Root-mean-square normalization with the residual add before it, on a device; `ops::cpu::norm` is its reference.
//! s = x + residual,  y = g * s / sqrt(mean(s^2) + eps)
//! x, s, y: `[rows, width]` f32   g: `[width]` or `[1]`
//! Sums of squares in f32, in another order than the CPU's. CUDA: kernels/norm.cu, one block per row.

use super::check::{Agreement, noise};
use super::device::defect;
use super::{Buffer, Device, fits};
use crate::arguments;
use crate::error::Result;
use crate::ops::cpu::norm::rms_norm_forward;

const BLOCK: u32 = 256;

/// y = norm(stream) for `rows` rows; with `addend`, first stream += addend.
///
/// # Errors
/// When a buffer is too small, or the launch fails.
#[allow(clippy::too_many_arguments)]
pub fn rms_norm<D: Device>(
    device: &D,
    stream: &Buffer<D, f32>,
    addend: Option<&Buffer<D, f32>>,
    gain: &Buffer<D, f32>,
    y: &Buffer<D, f32>,
    rows: usize,
    width: usize,
    epsilon: f32,
) -> Result<()> {
    let needed = rows * width;
    if [Some(stream), addend, Some(y)].into_iter().flatten().any(|buffer| buffer.len() < needed) || ![1, width].contains(&gain.len()) {
        return Err(defect(format!("buffers of a norm of {rows} rows of {width}")));
    }
    let (grid, block) = ([fits(rows, "rows")?, 1, 1], [BLOCK, 1, 1]);
    let (gains, width) = (fits(gain.len(), "width")?, fits(width, "width")?);
    match addend {
        None => device.launch("rms_norm_f32", grid, block, 0, arguments![stream, gain, y, width, gains, epsilon]),
        Some(addend) => device.launch("add_rms_norm_f32", grid, block, 0, arguments![stream, addend, gain, y, width, gains, epsilon]),
    }
}

/// Both kernels against the CPU.
///
/// # Errors
/// When a launch fails.
pub fn agreements<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let (mut plain, mut added) = (Agreement::new("rms_norm_f32", 1e-6), Agreement::new("add_rms_norm_f32", 1e-6));
    for (rows, width, gains) in [(1, 1, 1), (3, 64, 64), (2, 37, 37), (2, 37, 1), (5, 1028, 1), (1, 2051, 2051)] {
        let (x, residual, gain) = (noise("x", rows * width), noise("residual", rows * width), noise("gain", gains));
        let (mut sum, mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; rows]);
        let (stream, addend, device_gain) = (device.upload(&residual)?, device.upload(&x)?, device.upload(&gain)?);
        let out = device.alloc(x.len())?;
        rms_norm(device, &stream, None, &device_gain, &out, rows, width, 1e-5)?;
        rms_norm_forward(width, 1e-5, &residual, None, &gain, &mut y, &mut rstd);
        plain.add(&device.download(&out)?, &y);
        rms_norm(device, &stream, Some(&addend), &device_gain, &out, rows, width, 1e-5)?;
        rms_norm_forward(width, 1e-5, &x, Some((&residual, &mut sum)), &gain, &mut y, &mut rstd);
        added.add(&device.download(&out)?, &y);
        added.add(&device.download(&stream)?, &sum);
    }
    Ok(vec![plain, added])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::Emulated;
    use crate::ops::cuda::check::assert_sound;

    #[test]
    fn follows_the_cpu() {
        let Some(device) = Emulated::new() else { return };
        assert_sound(&agreements(&device).unwrap());
    }

    #[test]
    fn sizes_are_checked() {
        let Some(device) = Emulated::new() else { return };
        let (x, gain) = (device.zeros::<f32>(7).unwrap(), device.zeros::<f32>(4).unwrap());
        assert!(rms_norm(&device, &x, None, &gain, &x, 2, 4, 1e-5).is_err());
        assert!(rms_norm(&device, &x, None, &gain, &x, 1, 7, 1e-5).is_err());
    }
}
