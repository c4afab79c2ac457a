//! Gated activations on a device; `ops::cpu::gated` is their reference.
//! y = f(gate) * up,  f = SiLU, or max(x, 0)^2
//! gate, up, y: flat f32
//! The same polynomial as on the CPU, so the same bits. CUDA: kernels/gated.cu, four elements per thread.

use super::check::{Agreement, noise};
use super::device::defect;
use super::{Buffer, Device, fits};
use crate::arguments;
use crate::error::Result;
use crate::ops::cpu::gated::{Activation, gated_forward};

const BLOCK: u32 = 256;

/// y = activation(gate) * up over the first `count` elements.
///
/// # Errors
/// When a buffer is too small, or the launch fails.
pub fn gate<D: Device>(
    device: &D,
    activation: Activation,
    gate: &Buffer<D, f32>,
    up: &Buffer<D, f32>,
    y: &Buffer<D, f32>,
    count: usize,
) -> Result<()> {
    if [gate, up, y].iter().any(|buffer| buffer.len() < count) {
        return Err(defect(format!("buffers of {count} gated elements")));
    }
    let kernel = match activation {
        Activation::Silu => "silu_gate_f32",
        Activation::SquaredRelu => "squared_relu_gate_f32",
    };
    let count = fits(count, "elements")?;
    device.launch(kernel, [count.div_ceil(4 * BLOCK), 1, 1], [BLOCK, 1, 1], 0, arguments![gate, up, y, count])
}

/// Both kernels against the CPU.
///
/// # Errors
/// When a launch fails.
pub fn agreements<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let kernels = [("silu_gate_f32", Activation::Silu), ("squared_relu_gate_f32", Activation::SquaredRelu)];
    let check = |(kernel, activation)| {
        let mut agreement = Agreement::new(kernel, 0.0);
        for count in [1, 3, 4, 1023, 4100] {
            let (mut gates, up) = (noise("gate", count), noise("up", count));
            let edges = [100.0, -100.0, 88.4, -87.4, 0.0, -0.0];
            gates.iter_mut().zip(edges).for_each(|(gate, edge)| *gate = edge);
            let (x, other, y) = (device.upload(&gates)?, device.upload(&up)?, device.alloc(count)?);
            gate(device, activation, &x, &other, &y, count)?;
            let mut expected = vec![0.0; count];
            gated_forward(activation, &gates, &up, &mut expected);
            agreement.add(&device.download(&y)?, &expected);
        }
        Ok(agreement)
    };
    kernels.into_iter().map(check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::Emulated;
    use crate::ops::cuda::check::assert_sound;

    #[test]
    fn has_the_bits_of_the_cpu() {
        let Some(device) = Emulated::new() else { return };
        assert_sound(&agreements(&device).unwrap());
        let x = device.zeros::<f32>(4).unwrap();
        assert!(gate(&device, Activation::Silu, &x, &x, &x, 5).is_err());
    }
}
