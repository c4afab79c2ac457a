//! From the rows of a file to panels: the same values in another order.

use super::{Code, DenseMatrix, Line, SCALE_BYTES, bytes_of_mut, panel_bytes};
use crate::error::{Error, Result};
use crate::ops::cpu::gemm::PANEL;
use crate::quant::{Format, Layout, ternary_by_id};
use rayon::prelude::*;

/// The rows that become one panel.
struct Rows<'a> {
    format: &'a dyn Format,
    layout: Layout,
    inputs: usize,
    rows: Vec<&'a [u8]>,
}

pub(super) fn repack(outputs: usize, inputs: usize, format: &dyn Format, bytes: &[u8]) -> Result<DenseMatrix> {
    let layout = format.layout();
    let row_bytes = layout.row_bytes(inputs).filter(|bytes| *bytes > 0);
    let Some(row_bytes) = row_bytes.filter(|&row| outputs > 0 && row.checked_mul(outputs) == Some(bytes.len())) else {
        return Err(Error::input(layout.name, format!("{} bytes do not hold {outputs} rows of {inputs} weights", bytes.len())));
    };
    let (code, block) = match layout.name {
        "f32" => (Code::F32, inputs),
        "f16" => (Code::F16, inputs),
        "bf16" => (Code::Bf16, inputs),
        "q4_0" => (Code::Int4, layout.block),
        "q8_0" | "tq1_0" | "tq2_0" => (Code::Int8, layout.block),
        // No panel form of its own: the same values in f32.
        _ => (Code::F32, inputs),
    };
    let stride = panel_bytes(code, block, inputs);
    let mut lines = zeroed(outputs.div_ceil(PANEL) * stride / size_of::<Line>());
    bytes_of_mut(&mut lines).par_chunks_mut(stride).enumerate().try_for_each(|(panel, out)| {
        let first = panel * PANEL;
        let rows = &bytes[first * row_bytes..outputs.min(first + PANEL) * row_bytes];
        let rows = Rows { format, layout, inputs, rows: rows.chunks_exact(row_bytes).collect() };
        rows.write(code, out)
    })?;
    Ok(DenseMatrix { outputs, inputs, code, block, lines })
}

/// Zeroed memory, on huge pages where the system grants them: a token streams through all of it, and prefetching stops at page ends.
fn zeroed(count: usize) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::with_capacity(count);
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = (lines.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (lines.as_ptr() as usize + count * size_of::<Line>()) / PAGE * PAGE;
        if end > start {
            // SAFETY: the range lies within the vector's own allocation; the advice changes no contents, and refusal is harmless.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    lines.resize(count, Line([0; 64]));
    lines
}

impl Rows<'_> {
    fn write(&self, code: Code, out: &mut [u8]) -> Result<()> {
        match (code, self.layout.name) {
            (Code::F32, "f32") => self.plain::<4>(out),
            (Code::F32, _) => return self.decoded(out),
            (Code::F16 | Code::Bf16, _) => self.plain::<2>(out),
            (Code::Int4, _) => self.q4_0(out),
            (Code::Int8, "q8_0") => self.q8_0(out),
            (Code::Int8, _) => return self.ternary(out),
        }
        Ok(())
    }

    fn plain<const BYTES: usize>(&self, out: &mut [u8]) {
        for (lane, row) in self.rows.iter().enumerate() {
            for (value, step) in row.chunks_exact(BYTES).zip(out.chunks_exact_mut(PANEL * BYTES)) {
                step[lane * BYTES..][..BYTES].copy_from_slice(value);
            }
        }
    }

    fn decoded(&self, out: &mut [u8]) -> Result<()> {
        let mut values = vec![0.0; self.inputs];
        for (lane, row) in self.rows.iter().enumerate() {
            self.format.decode_row(row, &mut values)?;
            for (value, step) in values.iter().zip(out.chunks_exact_mut(PANEL * 4)) {
                step[lane * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
        Ok(())
    }

    /// Calls `write(lane, block of the row, scales and codes of the panel's block)`.
    fn blocks(&self, out: &mut [u8], step_bytes: usize, mut write: impl FnMut(usize, &[u8], &mut [u8])) {
        let panel_block = SCALE_BYTES + self.layout.block * step_bytes;
        for (lane, row) in self.rows.iter().enumerate() {
            for (source, target) in row.chunks_exact(self.layout.block_bytes).zip(out.chunks_exact_mut(panel_block)) {
                write(lane, source, target);
            }
        }
    }

    fn q8_0(&self, out: &mut [u8]) {
        self.blocks(out, PANEL, |lane, source, target| {
            target[2 * lane..][..2].copy_from_slice(&source[..2]);
            for (step, code) in source[2..].iter().enumerate() {
                target[SCALE_BYTES + step * PANEL + lane] = *code;
            }
        });
    }

    fn q4_0(&self, out: &mut [u8]) {
        const STEP: usize = PANEL / 2;
        self.blocks(out, STEP, |lane, source, target| {
            target[2 * lane..][..2].copy_from_slice(&source[..2]);
            let shift = 4 * (lane / STEP);
            for (j, pair) in source[2..].iter().enumerate() {
                target[SCALE_BYTES + j * STEP + lane % STEP] |= (pair & 15) << shift;
                target[SCALE_BYTES + (j + 16) * STEP + lane % STEP] |= (pair >> 4) << shift;
            }
        });
    }

    fn ternary(&self, out: &mut [u8]) -> Result<()> {
        let format = ternary_by_id(self.layout.id).expect("codes of eight bits come from q8_0 and ternary formats");
        let mut codes = vec![0i8; self.inputs];
        let block = self.layout.block;
        for (lane, row) in self.rows.iter().enumerate() {
            let scales = format.decode_codes(row, &mut codes)?;
            let targets = out.chunks_exact_mut(SCALE_BYTES + block * PANEL);
            for ((target, codes), scale) in targets.zip(codes.chunks_exact(block)).zip(scales) {
                target[2 * lane..][..2].copy_from_slice(&scale.to_le_bytes());
                for (step, code) in codes.iter().enumerate() {
                    target[SCALE_BYTES + step * PANEL + lane] = code.cast_unsigned();
                }
            }
        }
        Ok(())
    }
}
