//! Dense weights as an engine reads them: y = x W^T with W in the bits of its file, expanded to f32 on the way into the product.
//! y[o] = sum_i x[i] W[o, i], one chain of fused multiply-adds per element in ascending i (the contract of `ops::cpu::gemm`).
//! W: [out, in], stored by panels of 32 outputs, within a panel by input: 32 neighbouring outputs of one input lie side by side.
//! f32, f16, bf16, and blocks of codes with f16 scales (q8_0, q4_0, ternary with scales that differ); other formats are widened to f32,
//! value by value, when they are loaded. A product with one row of x reads the panels from start to end once, at the speed of memory; larger ones expand a panel at a time.

mod expand;
mod repack;

use crate::error::Result;
use crate::ops::cpu::gemm::{Matrix, PANEL, Panels, gemm};
use crate::quant::Format;
use rayon::prelude::*;

/// Panels one task multiplies at a time: enough independent chains to hide the latency of the multiply-add.
const PANELS_TOGETHER: usize = 4;

/// Below this many weights a product with one row is not worth sharing among threads.
const WORTH_SHARING: usize = 1 << 16;

/// How the weights of one input, for the 32 outputs of a panel, are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    F32,
    F16,
    Bf16,
    /// value = scale * code.
    Int8,
    /// value = scale * (code - 8); output j in the low nibble of byte j, output j + 16 in the high one.
    Int4,
}

impl Code {
    const fn step_bytes(self) -> usize {
        match self {
            Code::F32 => 4 * PANEL,
            Code::F16 | Code::Bf16 => 2 * PANEL,
            Code::Int8 => PANEL,
            Code::Int4 => PANEL / 2,
        }
    }

    const fn has_scales(self) -> bool {
        matches!(self, Code::Int8 | Code::Int4)
    }
}

/// Bytes of the scales that precede a block of inputs: one f16 per output of the panel.
const SCALE_BYTES: usize = 2 * PANEL;

/// A cache line; panels start on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// One matrix, `[out, in]`.
pub struct DenseMatrix {
    outputs: usize,
    inputs: usize,
    code: Code,
    /// Inputs that share a scale; all of them where there are no scales.
    block: usize,
    lines: Vec<Line>,
}

impl DenseMatrix {
    /// Rearranges `[outputs, inputs]` weights, row-major in `bytes` as `format` stores them, without changing a value.
    ///
    /// # Errors
    /// When the sizes do not belong together.
    pub fn new(outputs: usize, inputs: usize, format: &dyn Format, bytes: &[u8]) -> Result<Self> {
        repack::repack(outputs, inputs, format, bytes)
    }

    /// Number of rows of W.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of columns of W.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// y = x W^T for rows of x (`[rows, inputs]`) into rows of `y` (`[rows, outputs]`).
    ///
    /// # Panics
    /// When the lengths disagree.
    pub fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let rows = x.len() / self.inputs;
        assert!(x.len() == rows * self.inputs && y.len() == rows * self.outputs, "lengths of a product with {rows} rows");
        match rows {
            0 => {}
            1 => self.multiply_row(x, y),
            _ => gemm(Matrix::row_major(x, rows, self.inputs), self, y, self.outputs, false),
        }
    }

    fn multiply_row(&self, x: &[f32], y: &mut [f32]) {
        let width = PANELS_TOGETHER * PANEL;
        if self.outputs * self.inputs < WORTH_SHARING {
            y.chunks_mut(width).enumerate().for_each(|(group, y)| self.multiply_panels(group * PANELS_TOGETHER, x, y));
        } else {
            y.par_chunks_mut(width).enumerate().for_each(|(group, y)| self.multiply_panels(group * PANELS_TOGETHER, x, y));
        }
    }

    /// The outputs of up to [`PANELS_TOGETHER`] panels from `first` on.
    fn multiply_panels(&self, first: usize, x: &[f32], y: &mut [f32]) {
        let mut sums = [[0.0; PANEL]; PANELS_TOGETHER];
        match y.len().div_ceil(PANEL) {
            PANELS_TOGETHER => expand::multiply::<PANELS_TOGETHER>(&self.view(first, PANELS_TOGETHER), x, &mut sums),
            count => {
                for (panel, sums) in sums[..count].iter_mut().enumerate() {
                    expand::multiply::<1>(&self.view(first + panel, 1), x, std::slice::from_mut(sums));
                }
            }
        }
        y.copy_from_slice(&sums.as_flattened()[..y.len()]);
    }

    /// Bytes of one panel, a whole number of lines.
    fn panel_bytes(&self) -> usize {
        panel_bytes(self.code, self.block, self.inputs)
    }

    fn view(&self, first: usize, panels: usize) -> View<'_> {
        let stride = self.panel_bytes();
        View {
            code: self.code,
            block: self.block,
            inputs: self.inputs,
            stride,
            bytes: &bytes_of(&self.lines)[first * stride..][..panels * stride],
        }
    }
}

impl Panels for DenseMatrix {
    fn rows(&self) -> usize {
        self.inputs
    }

    fn columns(&self) -> usize {
        self.outputs
    }

    fn pack(&self, column: usize, first_row: usize, rows: usize, out: &mut [f32]) {
        let (out, _) = out[..rows * PANEL].as_chunks_mut::<PANEL>();
        expand::expand(&self.view(column / PANEL, 1), first_row, out);
    }
}

/// Some neighbouring panels.
pub(super) struct View<'a> {
    code: Code,
    block: usize,
    inputs: usize,
    /// Bytes from panel to panel.
    stride: usize,
    bytes: &'a [u8],
}

/// Steps of one block of inputs: `[first, end)`, with the place of the first step's codes and of the block's scales in a panel.
struct Run {
    first: usize,
    end: usize,
    codes: usize,
    scales: usize,
}

impl View<'_> {
    /// Cuts inputs `first..end` at the ends of blocks.
    fn runs(&self, first: usize, end: usize) -> impl Iterator<Item = Run> {
        let (block, step, scale) = (self.block, self.code.step_bytes(), if self.code.has_scales() { SCALE_BYTES } else { 0 });
        (first / block..end.div_ceil(block)).map(move |group| {
            let start = group * (scale + block * step);
            let inner = first.max(group * block);
            Run { first: inner, end: end.min((group + 1) * block), scales: start, codes: start + scale + (inner - group * block) * step }
        })
    }
}

fn panel_bytes(code: Code, block: usize, inputs: usize) -> usize {
    let scales = if code.has_scales() { inputs / block * SCALE_BYTES } else { 0 };
    (scales + inputs * code.step_bytes()).next_multiple_of(size_of::<Line>())
}

fn bytes_of(lines: &[Line]) -> &[u8] {
    // SAFETY: `Line` is `repr(C)` around bytes, without padding, so the lines are that many initialized bytes back to back.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}

fn bytes_of_mut(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: as in `bytes_of`; any byte is a valid part of a `Line`, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
}

#[cfg(test)]
mod tests;
