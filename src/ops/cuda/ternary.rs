//! Products of 8-bit activations with ternary weights on a device; `ops::cpu::ternary` has the rule and is the reference.
//! x ~ (gamma / 127) q per row;  y = (q . T) ((gamma / 127) alpha)
//! x: `[rows, inputs]` f32   T: `[outputs, inputs]` codes of two bits   y: `[rows, outputs]` f32
//! Integer dot products: the CPU's bits. CUDA: kernels/ternary.cu.

use super::check::{Agreement, noise};
use super::device::defect;
use super::stacked::Stacked;
use super::{Buffer, Device, fits};
use crate::arguments;
use crate::error::Result;
use crate::ops::cpu::ternary::{PackedTernary, quantize_activations, ternary_matmul};
use std::ops::Range;

const ROW_WARPS: u32 = 4;
/// Outputs of one warp of the product with one row.
const ROW_OUTPUTS: u32 = 4;
/// Rows, and outputs, of one block of the product with many.
const TILE: u32 = 128;
const BLOCK: u32 = 256;
/// Inputs whose codes fill one 16-byte piece of a row.
const PIECE: usize = 64;
const PIECE_BYTES: usize = 16;

/// Ternary matrices over the same inputs, one below the other, each under its own scale.
pub struct TernaryMatrix<D: Device> {
    /// `[outputs, pieces, 16]`
    codes: Buffer<D, u8>,
    /// `[outputs]`
    alphas: Buffer<D, f32>,
    outputs: usize,
    inputs: usize,
    pieces: usize,
}

impl<D: Device> TernaryMatrix<D> {
    /// Copies `parts`, at least one.
    ///
    /// # Errors
    /// When there is no room for them, or they differ in their inputs.
    pub fn new(device: &D, parts: &[&PackedTernary]) -> Result<Self> {
        let inputs = parts.first().map_or(0, |part| part.columns());
        if inputs == 0 || parts.iter().any(|part| part.columns() != inputs) {
            return Err(defect("ternary matrices without inputs, or with different ones"));
        }
        let (pieces, outputs) = (inputs.div_ceil(PIECE), parts.iter().map(|part| part.rows()).sum());
        fits(pieces, "inputs")?;
        fits(outputs, "outputs")?;
        // Codes beyond the last input meet activations of zero.
        let mut codes = vec![0u8; outputs * pieces * PIECE_BYTES];
        let rows = parts.iter().flat_map(|part| (0..part.rows()).map(move |row| (part, row)));
        for ((part, row), out) in rows.zip(codes.chunks_exact_mut(pieces * PIECE_BYTES)) {
            out.chunks_exact_mut(4).zip(part.row_words(row)).for_each(|(out, word)| out.copy_from_slice(&word.to_le_bytes()));
        }
        let alphas: Vec<f32> = parts.iter().flat_map(|part| std::iter::repeat_n(part.scale().to_f32(), part.rows())).collect();
        Ok(Self { codes: device.upload(&codes)?, alphas: device.upload(&alphas)?, outputs, inputs, pieces })
    }

    /// Rows of all matrices.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of each.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// y for the first row of `x`, the outputs in order dealt to one, two or three buffers, each as many as stand beside it.
    ///
    /// # Errors
    /// When a buffer is too small, the codes are of another width, or the launch fails.
    pub fn multiply_row(&self, device: &D, x: &CodeRows<D>, y: &[(usize, &Buffer<D, f32>)]) -> Result<()> {
        self.check(x, 1)?;
        let y = Stacked::new(y, self.outputs)?;
        let (outputs, pieces) = (fits(self.outputs, "outputs")?, fits(self.pieces, "inputs")?);
        let grid = [outputs.div_ceil(ROW_WARPS * ROW_OUTPUTS), 1, 1];
        let args = arguments![
            &self.codes,
            &self.alphas,
            &x.codes,
            &x.gammas,
            &x.sums,
            y.first,
            y.second,
            y.third,
            y.first_end,
            y.second_end,
            outputs,
            pieces
        ];
        device.launch("ternary_row_i8", grid, [32 * ROW_WARPS, 1, 1], 0, args)
    }

    /// y for `rows` rows and the outputs in `range`; `y` becomes `[rows, range]`.
    ///
    /// # Errors
    /// As [`TernaryMatrix::multiply_row`].
    pub fn multiply_rows(&self, device: &D, x: &CodeRows<D>, rows: usize, range: Range<usize>, y: &Buffer<D, f32>) -> Result<()> {
        self.check(x, rows)?;
        if range.end > self.outputs || y.len() < rows * range.len() {
            return Err(defect(format!("{rows} rows of outputs {range:?} of {}", self.outputs)));
        }
        let (rows, outputs, pieces) = (fits(rows, "rows")?, fits(range.len(), "outputs")?, fits(self.pieces, "inputs")?);
        let grid = [outputs.div_ceil(TILE), rows.div_ceil(TILE), 1];
        let (codes, alphas) = (self.codes.at(range.start * self.pieces * PIECE_BYTES), self.alphas.at(range.start));
        let args = arguments![codes, alphas, &x.codes, &x.gammas, &x.sums, y, rows, outputs, pieces];
        device.launch("ternary_rows_i8", grid, [BLOCK, 1, 1], 0, args)
    }

    fn check(&self, x: &CodeRows<D>, rows: usize) -> Result<()> {
        if x.width != self.inputs || x.rows < rows {
            return Err(defect(format!("{rows} rows of a product with {} x {} ternary weights", self.outputs, self.inputs)));
        }
        Ok(())
    }
}

/// Activations as 8-bit codes.
pub struct CodeRows<D: Device> {
    /// `[rows, pieces, 64]`
    codes: Buffer<D, i8>,
    gammas: Buffer<D, f32>,
    /// Sums of a row's codes: weights are stored plus one.
    sums: Buffer<D, i32>,
    rows: usize,
    width: usize,
}

impl<D: Device> CodeRows<D> {
    /// Room for `rows` rows of up to `width`.
    ///
    /// # Errors
    /// When there is none.
    pub fn new(device: &D, rows: usize, width: usize) -> Result<Self> {
        let codes = device.alloc(rows * width.next_multiple_of(PIECE))?;
        Ok(Self { codes, gammas: device.alloc(rows)?, sums: device.alloc(rows)?, rows: 0, width: 0 })
    }

    /// Quantizes `rows` rows of `x`, `[rows, width]`.
    ///
    /// # Errors
    /// When there is too little room, or the launch fails.
    pub fn quantize(&mut self, device: &D, x: &Buffer<D, f32>, rows: usize, width: usize) -> Result<()> {
        let pieces = width.div_ceil(PIECE);
        if x.len() < rows * width || self.codes.len() < rows * pieces * PIECE || self.gammas.len() < rows {
            return Err(defect(format!("no room for {rows} rows of {width} codes")));
        }
        (self.rows, self.width) = (rows, width);
        let (grid, width, pieces) = ([fits(rows, "rows")?, 1, 1], fits(width, "width")?, fits(pieces, "width")?);
        let args = arguments![x, &self.codes, &self.gammas, &self.sums, width, pieces];
        device.launch("quantize_rows_i8", grid, [BLOCK, 1, 1], 0, args)
    }
}

/// The kernels against the CPU: equal bits.
///
/// # Errors
/// When a launch fails.
pub fn agreements<D: Device>(device: &D) -> Result<Vec<Agreement>> {
    let names = ["quantize_rows_i8", "ternary_row_i8", "ternary_rows_i8"];
    let mut all = names.map(|name| Agreement::new(name, 0.0));
    for (rows, outputs, inputs) in [(1, [1, 1], 1), (3, [5, 2], 33), (2, [130, 7], 200), (130, [30, 3], 65), (1, [17, 4], 2200)] {
        let mut x = noise("x", rows * inputs);
        // A row of zeros meets the smallest scale.
        x[(rows - 1) / 2 * inputs..][..inputs].iter_mut().for_each(|x| *x *= if rows > 1 { 0.0 } else { 1.0 });
        let (mut codes, mut gammas) = (vec![0; x.len()], vec![0.0; rows]);
        quantize_activations(&x, inputs, &mut codes, &mut gammas);
        let parts = outputs.map(|outputs| PackedTernary::from_weights(&noise("weights", outputs * inputs), outputs, inputs));

        let mut quantized = CodeRows::new(device, rows, inputs)?;
        quantized.quantize(device, &device.upload(&x)?, rows, inputs)?;
        let found = device.download(&quantized.codes)?;
        let rows_of = |codes: &[i8], stride: usize| {
            codes.chunks(stride).flat_map(|row| row[..inputs].iter().map(|&code| f32::from(code))).collect::<Vec<_>>()
        };
        all[0].add(&rows_of(&found, inputs.next_multiple_of(PIECE)), &rows_of(&codes, inputs));
        all[0].add(&device.download(&quantized.gammas)?, &gammas);

        let matrix = TernaryMatrix::new(device, &[&parts[0], &parts[1]])?;
        let [first, second] = parts.each_ref().map(|part| {
            let mut y = vec![0.0; rows * part.rows()];
            ternary_matmul(&codes, &gammas, part, &mut y);
            y
        });
        let y = device.alloc(rows * matrix.outputs())?;
        let single = [device.alloc(outputs[0])?, device.alloc(outputs[1])?];
        matrix.multiply_row(device, &quantized, &[(outputs[0], &single[0]), (outputs[1], &single[1])])?;
        all[1].add(
            &[device.download(&single[0])?, device.download(&single[1])?].concat(),
            &[&first[..outputs[0]], &second[..outputs[1]]].concat(),
        );
        for (range, expected) in [(0..outputs[0], first), (outputs[0]..matrix.outputs(), second)] {
            matrix.multiply_rows(device, &quantized, rows, range, &y)?;
            all[2].add(&device.download(&y)?[..expected.len()], &expected);
        }
    }
    Ok(all.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cuda::Emulated;
    use crate::ops::cuda::check::assert_sound;
    use half::f16;

    #[test]
    fn integers_are_those_of_the_cpu() {
        let Some(device) = Emulated::new() else { return };
        assert_sound(&agreements(&device).unwrap());
    }

    #[test]
    fn extremes_do_not_overflow() {
        let Some(device) = Emulated::new() else { return };
        let inputs = 5000;
        for (code, sign) in [(1i8, 1.0f32), (-1, 1.0), (-1, -1.0), (0, 1.0)] {
            let matrix = TernaryMatrix::new(&device, &[&PackedTernary::from_codes(&vec![code; inputs], 1, inputs, f16::ONE)]).unwrap();
            let mut codes = CodeRows::new(&device, 1, inputs).unwrap();
            codes.quantize(&device, &device.upload(&vec![sign; inputs]).unwrap(), 1, inputs).unwrap();
            let y = device.alloc(1).unwrap();
            let expected = 127.0 * inputs as f32 * f32::from(code) * sign * (1.0 / 127.0);
            matrix.multiply_row(&device, &codes, &[(1, &y)]).unwrap();
            assert_eq!(device.download(&y).unwrap(), [expected]);
            matrix.multiply_rows(&device, &codes, 1, 0..1, &y).unwrap();
            assert_eq!(device.download(&y).unwrap(), [expected]);
        }
    }

    #[test]
    fn broken_activations_stay_visible() {
        let Some(device) = Emulated::new() else { return };
        let matrix = TernaryMatrix::new(&device, &[&PackedTernary::from_codes(&[1; 40], 2, 20, f16::ONE)]).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = noise("x", 40);
            x[3] = bad;
            let mut codes = CodeRows::new(&device, 2, 20).unwrap();
            codes.quantize(&device, &device.upload(&x).unwrap(), 2, 20).unwrap();
            let y = device.alloc(4).unwrap();
            matrix.multiply_rows(&device, &codes, 2, 0..2, &y).unwrap();
            let y = device.download(&y).unwrap();
            assert!(!y[0].is_finite() && !y[1].is_finite() && y[2].is_finite(), "{bad}: {y:?}");
        }
    }
}
