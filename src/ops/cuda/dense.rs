//! Products with dense weights on a device. y = x W^T
//! x: `[rows, inputs]` f32   W: `[outputs, inputs]` f16   y: `[rows, outputs]` f32
//! One row multiplies f32 activations; many rows round each row of x once to f16 under its own power of two, for the tensor cores. Sums are
//! f32 in both. CUDA: kernels/dense.cu.

use super::check::{Agreement, noise};
use super::device::defect;
use super::stacked::Stacked;
use super::{Buffer, Device, fits};
use crate::arguments;
use crate::error::Result;
use half::f16;
use std::ops::Range;

const ROW_WARPS: u32 = 4;
/// Outputs of one warp of the product with one row.
const ROW_OUTPUTS: u32 = 4;
/// Rows, and outputs, of one block of the product with many.
const TILE: u32 = 128;
const BLOCK: u32 = 256;
/// Rows of W and of rounded activations are filled up with zeros to a multiple of it.
const DEPTH: usize = 32;

/// A matrix in half precision.
pub struct HalfMatrix<D: Device> {
    /// `[outputs, stride]`
    values: Buffer<D, f16>,
    outputs: usize,
    inputs: usize,
    stride: usize,
}

impl<D: Device> HalfMatrix<D> {
    /// Copies `[outputs, inputs]` values, row-major.
    ///
    /// # Errors
    /// When there is no room for them, or their number is another.
    pub fn new(device: &D, outputs: usize, inputs: usize, values: &[f16]) -> Result<Self> {
        if inputs == 0 || outputs.checked_mul(inputs) != Some(values.len()) {
            return Err(defect(format!("{} values of a {outputs} x {inputs} matrix", values.len())));
        }
        let stride = inputs.next_multiple_of(DEPTH);
        fits(stride, "inputs")?;
        fits(outputs, "outputs")?;
        let values = if stride == inputs {
            device.upload(values)?
        } else {
            let mut filled = vec![f16::ZERO; outputs * stride];
            filled
                .chunks_exact_mut(stride)
                .zip(values.chunks_exact(inputs))
                .for_each(|(row, values)| row[..inputs].copy_from_slice(values));
            device.upload(&filled)?
        };
        Ok(Self { values, outputs, inputs, stride })
    }

    /// Rows of W.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of W.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn values(&self) -> &Buffer<D, f16> {
        &self.values
    }

    /// y = x W^T for the first row of `x`, the outputs in order dealt to one, two or three buffers, each as many as stand beside it.
    ///
    /// # Errors
    /// When a buffer is too small, the counts do not make up the outputs, or the launch fails.
    pub fn multiply_row(&self, device: &D, x: &Buffer<D, f32>, y: &[(usize, &Buffer<D, f32>)]) -> Result<()> {
        if x.len() < self.inputs {
            return Err(defect(format!("a row of {} for a product with {} x {} weights", x.len(), self.outputs, self.inputs)));
        }
        let y = Stacked::new(y, self.outputs)?;
        let (outputs, inputs, stride) = (fits(self.outputs, "outputs")?, fits(self.inputs, "inputs")?, fits(self.stride, "inputs")?);
        let grid = [outputs.div_ceil(ROW_WARPS * ROW_OUTPUTS), 1, 1];
        let args = arguments![&self.values, x, y.first, y.second, y.third, y.first_end, y.second_end, outputs, inputs, stride];
        device.launch("dense_row_f16", grid, [32 * ROW_WARPS, 1, 1], 0, args)
    }

    /// y = x W^T for `rows` rows and the outputs in `range`; `y` becomes `[rows, range]`.
    ///
    /// # Errors
    /// When a buffer is too small, the rounded rows are of another width, or the launch fails.
    pub fn multiply_rows(&self, device: &D, x: &HalfRows<D>, rows: usize, range: Range<usize>, y: &Buffer<D, f32>) -> Result<()> {
        if x.width != self.inputs || x.rows < rows || range.end > self.outputs || y.len() < rows * range.len() {
            return Err(defect(format!("{rows} rows of a product with {} x {} weights", self.outputs, self.inputs)));
        }
        let (rows, outputs, stride) = (fits(rows, "rows")?, fits(range.len(), "outputs")?, fits(self.stride, "inputs")?);
        let grid = [outputs.div_ceil(TILE), rows.div_ceil(TILE), 1];
        let weights = self.values.at(range.start * self.stride);
        device.launch("dense_rows_f16", grid, [BLOCK, 1, 1], 0, arguments![weights, &x.halves, &x.scales, y, rows, outputs, stride])
    }
}

/// Activations rounded to half precision for products with many rows.
pub struct HalfRows<D: Device> {
    halves: Buffer<D, f16>,
    scales: Buffer<D, f32>,
    rows: usize,
    width: usize,
}

impl<D: Device> HalfRows<D> {
    /// Room for `rows` rows of up to `width`.
    ///
    /// # Errors
    /// When there is none.
    pub fn new(device: &D, rows: usize, width: usize) -> Result<Self> {
        Ok(Self { halves: device.alloc(rows * width.next_multiple_of(DEPTH))?, scales: device.alloc(rows)?, rows: 0, width: 0 })
    }

    /// Rounds `rows` rows of `x`, `[rows, width]`.
    ///
    /// # Errors
    /// When there is too little room, or the launch fails.
    pub fn round(&mut self, device: &D, x: &Buffer<D, f32>, rows: usize, width: usize) -> Result<()> {
        let stride = width.next_multiple_of(DEPTH);
        if x.len() < rows * width || self.halves.len() < rows * stride || self.scales.len() < rows {
            return Err(defect(format!("no room for {rows} rounded rows of {width}")));
        }
        (self.rows, self.width) = (rows, width);
        let (grid, width, stride) = ([fits(rows, "rows")?, 1, 1], fits(width, "width")?, fits(stride, "width")?);
        device.launch("half_rows_f32", grid, [BLOCK, 1, 1], 0, arguments![x, &self.halves, &self.scales, width, stride])
    }
}

/// The kernels against products in f64.
///
/// # Errors
/// When a launch fails.
pub fn agreements<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let mut one = Agreement::new("dense_row_f16", 1e-6);
    // Half precision has eleven bits; the errors of a sum's terms average out.
    let mut many = Agreement::new("dense_rows_f16", 1e-3);
    for (rows, outputs, inputs) in [(1, 1, 1), (3, 5, 33), (2, 130, 64), (130, 33, 40), (1, 17, 1031)] {
        let values: Vec<f16> = noise("weights", outputs * inputs).into_iter().map(f16::from_f32).collect();
        let mut x = noise("x", rows * inputs);
        // Sizes that half precision does not reach.
        x.chunks_mut(inputs).step_by(3).for_each(|row| row.iter_mut().for_each(|x| *x *= 1e9));
        let expected = product(&x, &values, outputs, inputs);
        let (matrix, device_x) = (HalfMatrix::new(device, outputs, inputs, &values)?, device.upload(&x)?);
        let y = device.alloc(rows * outputs)?;
        let cuts = [outputs / 4, outputs / 3, outputs - outputs / 4 - outputs / 3];
        let parts = [device.alloc(cuts[0])?, device.alloc(cuts[1])?, device.alloc(cuts[2])?];
        matrix.multiply_row(device, &device_x, &[(cuts[0], &parts[0]), (cuts[1], &parts[1]), (cuts[2], &parts[2])])?;
        let found = parts.iter().map(|part| device.download(part)).collect::<Result<Vec<_>>>()?;
        one.add(&found.concat(), &expected[..outputs]);
        let mut rounded = HalfRows::new(device, rows, inputs)?;
        rounded.round(device, &device_x, rows, inputs)?;
        let first = outputs / 3;
        matrix.multiply_rows(device, &rounded, rows, first..outputs, &y)?;
        let found = device.download(&y)?;
        for (found, expected) in found.chunks(outputs - first).zip(expected.chunks(outputs)) {
            many.add(found, &expected[first..]);
        }
    }
    Ok(vec![one, many])
}

fn product(x: &[f32], weights: &[f16], outputs: usize, inputs: usize) -> Vec<f32> {
    let dot = |x: &[f32], row: &[f16]| x.iter().zip(row).map(|(x, w)| f64::from(*x) * w.to_f64()).sum::<f64>() as f32;
    x.chunks(inputs).flat_map(|x| (0..outputs).map(move |o| dot(x, &weights[o * inputs..][..inputs]))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::Emulated;
    use crate::ops::cuda::check::assert_sound;

    #[test]
    fn products_are_near_exact_ones() {
        let Some(device) = Emulated::new() else { return };
        assert_sound(&agreements(&device).unwrap());
    }

    #[test]
    fn broken_activations_stay_visible() {
        let Some(device) = Emulated::new() else { return };
        let matrix = HalfMatrix::new(&device, 2, 20, &[f16::ONE; 40]).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = noise("x", 40);
            x[3] = bad;
            let x = device.upload(&x).unwrap();
            let mut rounded = HalfRows::new(&device, 2, 20).unwrap();
            rounded.round(&device, &x, 2, 20).unwrap();
            let y = device.alloc(4).unwrap();
            matrix.multiply_rows(&device, &rounded, 2, 0..2, &y).unwrap();
            let y = device.download(&y).unwrap();
            assert!(!y[0].is_finite() && !y[1].is_finite() && y[2].is_finite(), "{bad}: {y:?}");
        }
    }

    #[test]
    fn sizes_are_checked() {
        let Some(device) = Emulated::new() else { return };
        assert!(HalfMatrix::new(&device, 2, 3, &[f16::ONE; 5]).is_err());
        let matrix = HalfMatrix::new(&device, 2, 3, &[f16::ONE; 6]).unwrap();
        let (x, y) = (device.zeros::<f32>(6).unwrap(), device.zeros::<f32>(3).unwrap());
        assert!(matrix.multiply_row(&device, &y, &[(2, &x)]).is_ok());
        assert!(matrix.multiply_row(&device, &y, &[(1, &x)]).is_err());
        assert!(matrix.multiply_row(&device, &y, &[(1, &x), (1, &device.zeros::<f32>(0).unwrap())]).is_err());
        let mut rounded = HalfRows::new(&device, 2, 3).unwrap();
        assert!(rounded.round(&device, &x, 3, 2).is_err());
        rounded.round(&device, &x, 2, 3).unwrap();
        assert!(matrix.multiply_rows(&device, &rounded, 2, 0..2, &y).is_err());
        assert!(matrix.multiply_rows(&device, &rounded, 2, 1..2, &y).is_ok());
        assert!(matrix.multiply_rows(&device, &rounded, 1, 1..3, &y).is_err());
        rounded.round(&device, &x, 3, 2).unwrap_err();
    }
}
