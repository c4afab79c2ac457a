//! Norm over heads (QK-norm) and rotary position embedding of q and k in one launch, on a device; references: `ops::cpu::norm`, `ops::cpu::rope`.
//! (x_i, x_{i+h/2}) -> (x_i cos a - x_{i+h/2} sin a, x_{i+h/2} cos a + x_i sin a), a = position * theta^(-2i/h)
//! q: `[rows, heads * h]` f32   k: `[rows, kv_heads * h]` f32   h head width (even, at most 256)
//! The table is the CPU's; without a norm the result has the CPU's bits. CUDA: kernels/rope.cu, one warp per head of a row.

use super::check::{Agreement, noise};
use super::device::defect;
use super::{Buffer, Device, fits};
use crate::arguments;
use crate::error::Result;
use crate::ops::cpu::norm::rms_norm_forward;
use crate::ops::cpu::rope::RotaryTable;

const WARPS: u32 = 4;

/// Widest head that the kernel holds in registers.
pub const WIDEST_HEAD: usize = 256;

/// Sines and cosines on a device.
pub struct DeviceTable<D: Device> {
    cosines: Buffer<D, f32>,
    sines: Buffer<D, f32>,
    head_dim: usize,
    positions: usize,
}

impl<D: Device> DeviceTable<D> {
    /// Copies a table.
    ///
    /// # Errors
    /// When there is no room for it, or its heads are wider than [`WIDEST_HEAD`].
    pub fn new(device: &D, table: &RotaryTable) -> Result<Self> {
        if table.head_dim() > WIDEST_HEAD {
            return Err(defect(format!("heads of {} are wider than {WIDEST_HEAD}", table.head_dim())));
        }
        let positions = table.num_positions();
        let all =
            |row: fn(&RotaryTable, usize) -> &[f32]| (0..positions).flat_map(|position| row(table, position)).copied().collect::<Vec<_>>();
        let (cosines, sines) = (device.upload(&all(RotaryTable::cosines))?, device.upload(&all(RotaryTable::sines))?);
        Ok(Self { cosines, sines, head_dim: table.head_dim(), positions })
    }

    /// Rotates `rows` rows of q and k in place, the first at `first_position`; with `gains` of q and of k, after a norm over each head.
    ///
    /// # Errors
    /// When the buffers or the table are too small, or the launch fails.
    #[allow(clippy::too_many_arguments)]
    pub fn rotate(
        &self,
        device: &D,
        [q, k]: [&Buffer<D, f32>; 2],
        gains: Option<&[Buffer<D, f32>; 2]>,
        epsilon: f32,
        rows: usize,
        [heads, kv_heads]: [usize; 2],
        first_position: usize,
    ) -> Result<()> {
        let width = self.head_dim;
        if q.len() < rows * heads * width || k.len() < rows * kv_heads * width || first_position + rows > self.positions {
            return Err(defect(format!("{rows} rows from position {first_position} on do not fit their buffers or the rotary table")));
        }
        let warps = fits(rows * (heads + kv_heads), "heads")?;
        let (grid, block) = ([warps.div_ceil(WARPS), 1, 1], [32 * WARPS, 1, 1]);
        let (rows, first) = (fits(rows, "rows")?, fits(first_position, "context")?);
        let (heads, kv_heads, width) = (fits(heads, "heads")?, fits(kv_heads, "heads")?, fits(width, "heads")?);
        let (cosines, sines) = (&self.cosines, &self.sines);
        match gains {
            None => device.launch("rope_f32", grid, block, 0, arguments![q, k, cosines, sines, rows, heads, kv_heads, width, first]),
            Some([q_gain, k_gain]) => device.launch(
                "head_norm_rope_f32",
                grid,
                block,
                0,
                arguments![q, k, q_gain, k_gain, cosines, sines, rows, heads, kv_heads, width, first, epsilon],
            ),
        }
    }
}

/// Both kernels against the CPU.
///
/// # Errors
/// When a launch fails.
pub fn agreements<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let (mut plain, mut normed) = (Agreement::new("rope_f32", 0.0), Agreement::new("head_norm_rope_f32", 1e-6));
    for (rows, heads, kv_heads, head_dim, first) in
        [(1, 1, 1, 2, 0), (3, 4, 2, 16, 5), (2, 3, 1, 80, 100), (1, 8, 2, 128, 7), (2, 2, 2, 256, 1)]
    {
        let table = RotaryTable::new(head_dim, 10_000.0, first + rows);
        let positions: Vec<u32> = (first..first + rows).map(|position| position as u32).collect();
        let x = [noise("q", rows * heads * head_dim), noise("k", rows * kv_heads * head_dim)];
        let gains = [noise("q gain", head_dim), noise("k gain", head_dim)];
        let on_device = DeviceTable::new(device, &table)?;
        let device_gains = [device.upload(&gains[0])?, device.upload(&gains[1])?];
        for (agreement, with_norm) in [(&mut plain, false), (&mut normed, true)] {
            let [q, k] = [device.upload(&x[0])?, device.upload(&x[1])?];
            on_device.rotate(device, [&q, &k], with_norm.then_some(&device_gains), 1e-5, rows, [heads, kv_heads], first)?;
            for ((x, gain), found) in x.iter().zip(&gains).zip([q, k]) {
                let mut y = x.clone();
                if with_norm {
                    rms_norm_forward(head_dim, 1e-5, x, None, gain, &mut y, &mut vec![0.0; x.len() / head_dim]);
                }
                table.rotate(&mut y, &positions);
                agreement.add(&device.download(&found)?, &y);
            }
        }
    }
    Ok(vec![plain, normed])
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
        assert!(DeviceTable::new(&device, &RotaryTable::new(258, 10_000.0, 2)).is_err());
        let table = DeviceTable::new(&device, &RotaryTable::new(8, 10_000.0, 2)).unwrap();
        let x = device.zeros::<f32>(16).unwrap();
        assert!(table.rotate(&device, [&x, &x], None, 0.0, 2, [1, 1], 0).is_ok());
        assert!(table.rotate(&device, [&x, &x], None, 0.0, 2, [1, 1], 1).is_err());
        assert!(table.rotate(&device, [&x, &x], None, 0.0, 2, [2, 1], 0).is_err());
    }
}
