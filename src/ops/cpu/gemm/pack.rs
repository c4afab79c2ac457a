//! Reorders strided operands into the strips the microkernel reads: the lanes of one step of k side by side.

use super::Matrix;
use crate::ops::cpu::isa::{Isa, isa};

/// Writes `out[step * width + lane] = source[lane, step]` for `source` = `lanes` x `steps`, and zeros in lanes from `source.rows` to
/// `width`. `out` holds `source.columns * width` floats.
pub(super) fn pack_strip(source: Matrix<'_>, width: usize, out: &mut [f32]) {
    assert!(source.fits() && source.rows <= width && out.len() >= source.columns * width, "strip outside its operands");
    match (source.row_stride, source.column_stride) {
        (1, _) => copy_steps(source, width, out),
        #[cfg(target_arch = "x86_64")]
        (_, 1) if isa() == Isa::Avx512 => {
            let words = Words { data: source.data.as_ptr().cast(), lanes: source.rows, lane_stride: source.row_stride * size_of::<f32>() };
            // SAFETY: the CPU has AVX-512, and the assertion above bounds every access.
            unsafe { avx512::transpose(words, source.columns, width, out.as_mut_ptr().cast()) }
        }
        _ => gather(source, width, out),
    }
}

/// Writes `out[step * lanes + lane]` = the four bytes from `4 * step` of row `lane`, rows being `row_length` bytes long, for every step
/// that lies wholly within a row.
pub(in crate::ops::cpu) fn pack_words(rows: &[u8], row_length: usize, out: &mut [u32]) {
    let (lanes, steps) = (rows.len() / row_length, row_length / 4);
    assert!(out.len() >= lanes * steps, "the packed words need room");
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        let words = Words { data: rows.as_ptr(), lanes, lane_stride: row_length };
        // SAFETY: the CPU has AVX-512; each row holds `steps` words, and `out` was checked above.
        return unsafe { avx512::transpose(words, steps, lanes, out.as_mut_ptr()) };
    }
    for (lane, row) in rows.chunks_exact(row_length).enumerate() {
        for (step, word) in row.as_chunks().0.iter().enumerate() {
            out[step * lanes + lane] = u32::from_ne_bytes(*word);
        }
    }
}

/// Rows of 32-bit words, `lane_stride` bytes apart and aligned to nothing.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Words {
    data: *const u8,
    lanes: usize,
    lane_stride: usize,
}

/// Lanes are contiguous in memory: every step is one copy.
fn copy_steps(source: Matrix<'_>, width: usize, out: &mut [f32]) {
    for (step, group) in out.chunks_exact_mut(width).take(source.columns).enumerate() {
        let start = step * source.column_stride;
        let (copied, padding) = group.split_at_mut(source.rows);
        copied.copy_from_slice(&source.data[start..start + source.rows]);
        padding.fill(0.0);
    }
}

/// Any strides, in blocks of steps so that the strip stays in the first-level cache.
fn gather(source: Matrix<'_>, width: usize, out: &mut [f32]) {
    const STEPS: usize = 16;
    for first in (0..source.columns).step_by(STEPS) {
        let block = first..(first + STEPS).min(source.columns);
        for lane in 0..width {
            for step in block.clone() {
                let place = lane * source.row_stride + step * source.column_stride;
                out[step * width + lane] = if lane < source.rows { source.data[place] } else { 0.0 };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::Words;
    use std::arch::x86_64::*;

    const SIDE: usize = 16;

    fn mask(count: usize) -> __mmask16 {
        if count >= SIDE { !0 } else { (1 << count) - 1 }
    }

    /// Transposes squares of 16 lanes x 16 steps in registers; lanes from `source.lanes` to `width` become zero.
    ///
    /// # Safety
    /// Every lane of `source` holds `steps` words, and `out` holds `steps * width`.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn transpose(source: Words, steps: usize, width: usize, out: *mut u32) {
        for first in (0..steps).step_by(SIDE) {
            let count = SIDE.min(steps - first);
            for lane in (0..width).step_by(SIDE) {
                let mut square = [_mm512_setzero_ps(); SIDE];
                for (row, value) in square.iter_mut().enumerate().take(source.lanes.saturating_sub(lane)) {
                    // SAFETY: lane + row < source.lanes, and the mask keeps the load within `count` words of that lane.
                    *value = unsafe {
                        let start = source.data.add((lane + row) * source.lane_stride).cast::<f32>().wrapping_add(first);
                        _mm512_maskz_loadu_ps(mask(count), start)
                    };
                }
                let square = transpose_square(square);
                for (step, value) in square.iter().enumerate().take(count) {
                    // SAFETY: first + step < steps, and the mask keeps the store within `width` lanes of that step.
                    unsafe { _mm512_mask_storeu_ps(out.add((first + step) * width + lane).cast(), mask(width - lane), *value) };
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transpose_square(rows: [__m512; SIDE]) -> [__m512; SIDE] {
        let zero = _mm512_setzero_ps();
        // Within each 128-bit quarter: 4x4 transposes of four rows at a time.
        let mut quads = [zero; SIDE];
        for group in 0..4 {
            let [a, b, c, d] = [rows[4 * group], rows[4 * group + 1], rows[4 * group + 2], rows[4 * group + 3]];
            let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            quads[4 * group] = _mm512_shuffle_ps::<0x44>(ab_low, cd_low);
            quads[4 * group + 1] = _mm512_shuffle_ps::<0xee>(ab_low, cd_low);
            quads[4 * group + 2] = _mm512_shuffle_ps::<0x44>(ab_high, cd_high);
            quads[4 * group + 3] = _mm512_shuffle_ps::<0xee>(ab_high, cd_high);
        }
        // Then the 4x4 arrangement of quarters is itself transposed.
        let mut columns = [zero; SIDE];
        for within in 0..4 {
            let [a, b, c, d] = [quads[within], quads[4 + within], quads[8 + within], quads[12 + within]];
            let (ab_low, ab_high) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
            let (cd_low, cd_high) = (_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
            columns[within] = _mm512_shuffle_f32x4::<0x88>(ab_low, cd_low);
            columns[4 + within] = _mm512_shuffle_f32x4::<0xdd>(ab_low, cd_low);
            columns[8 + within] = _mm512_shuffle_f32x4::<0x88>(ab_high, cd_high);
            columns[12 + within] = _mm512_shuffle_f32x4::<0xdd>(ab_high, cd_high);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::isa::testing::on_every_isa;

    #[test]
    fn strips_hold_every_element_and_zero_padding() {
        for (lanes, steps, width) in [(1, 1, 1), (12, 17, 12), (5, 33, 5), (32, 48, 32), (19, 40, 32), (3, 16, 32)] {
            let data: Vec<f32> = (0..lanes * steps).map(|i| i as f32 + 1.0).collect();
            let plain = Matrix::row_major(&data, lanes, steps);
            let turned = Matrix::row_major(&data, steps, lanes).transposed();
            for source in [plain, turned] {
                for (isa, packed) in on_every_isa(|| {
                    let mut out = vec![f32::NAN; steps * width];
                    pack_strip(source, width, &mut out);
                    out
                }) {
                    for step in 0..steps {
                        for lane in 0..width {
                            let expected = if lane < lanes { source.at(lane, step) } else { 0.0 };
                            assert_eq!(packed[step * width + lane], expected, "{isa} lane {lane} step {step}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn words_of_rows_come_side_by_side() {
        for (lanes, row_length) in [(1, 4), (12, 67), (7, 128), (3, 3)] {
            let rows: Vec<u8> = (0..lanes * row_length).map(|i| (i * 7 % 251) as u8).collect();
            for (isa, packed) in on_every_isa(|| {
                let mut out = vec![0; lanes * (row_length / 4)];
                pack_words(&rows, row_length, &mut out);
                out
            }) {
                for (lane, row) in rows.chunks(row_length).enumerate() {
                    for (step, word) in row.as_chunks().0.iter().enumerate() {
                        assert_eq!(packed[step * lanes + lane], u32::from_ne_bytes(*word), "{isa} lane {lane} step {step}");
                    }
                }
            }
        }
    }
}
