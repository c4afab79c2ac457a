//! The innermost product: one tile of C, at most [`ROWS`] x [`PANEL`], over one block of k.
//!
//! Each element of the tile owns one accumulator and takes its terms in ascending k with one fused multiply-add each, so every
//! version below gives the same bits. Throughput comes from the independent elements: 12 x 32 fills 24 of the 32 AVX-512 registers.

use super::PANEL;
use crate::ops::cpu::isa::Isa;

/// Rows of a full tile.
pub(super) const ROWS: usize = 12;

/// Operands of one tile: C[rows, columns] (+)= A[rows, steps] * B[steps, columns].
pub(super) struct Tile {
    /// Steps of k in this block.
    pub(super) steps: usize,
    /// Packed: `steps` groups of `rows` values.
    pub(super) a: *const f32,
    /// Packed: `steps` groups of [`PANEL`] values.
    pub(super) b: *const f32,
    /// First element of the tile in the row-major result, whose rows are `c_stride` apart.
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Columns of the tile that exist, 1 to [`PANEL`].
    pub(super) columns: usize,
    /// Continue from what C holds instead of starting at zero.
    pub(super) accumulate: bool,
}

/// Computes one tile.
///
/// # Safety
/// `a` holds `steps * rows` values and `b` `steps * PANEL`; `c` may be read and written at `row * c_stride + column` for every row
/// below the kernel's and column below `columns`; the CPU has the instruction set the kernel was selected for.
pub(super) type Kernel = unsafe fn(&Tile);

/// Kernels for tiles of 1 to [`ROWS`] rows, at the number of rows less one.
pub(super) fn kernels(isa: Isa) -> &'static [Kernel; ROWS] {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => &x86::AVX512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &x86::AVX2,
        _ => &PORTABLE,
    }
}

macro_rules! for_each_row_count {
    ($kernel:ident) => {
        [
            $kernel::<1>,
            $kernel::<2>,
            $kernel::<3>,
            $kernel::<4>,
            $kernel::<5>,
            $kernel::<6>,
            $kernel::<7>,
            $kernel::<8>,
            $kernel::<9>,
            $kernel::<10>,
            $kernel::<11>,
            $kernel::<12>,
        ]
    };
}

static PORTABLE: [Kernel; ROWS] = for_each_row_count!(portable);

/// Columns the portable kernel keeps in registers at a time.
const PORTABLE_COLUMNS: usize = 8;

unsafe fn portable<const R: usize>(tile: &Tile) {
    for first in (0..tile.columns).step_by(PORTABLE_COLUMNS) {
        let columns = PORTABLE_COLUMNS.min(tile.columns - first);
        for row in 0..R {
            // SAFETY: the caller's bounds; `first + PORTABLE_COLUMNS <= PANEL`, and only `columns` elements of C are touched.
            unsafe {
                let c = std::slice::from_raw_parts_mut(tile.c.add(row * tile.c_stride + first), columns);
                let mut sums = [0.0f32; PORTABLE_COLUMNS];
                if tile.accumulate {
                    sums[..columns].copy_from_slice(c);
                }
                for step in 0..tile.steps {
                    let a = *tile.a.add(step * R + row);
                    let b = &*tile.b.add(step * PANEL + first).cast::<[f32; PORTABLE_COLUMNS]>();
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = a.mul_add(*b, *sum);
                    }
                }
                c.copy_from_slice(&sums[..columns]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, PANEL, ROWS, Tile};
    use std::arch::x86_64::*;

    pub(super) static AVX512: [Kernel; ROWS] = for_each_row_count!(avx512);
    pub(super) static AVX2: [Kernel; ROWS] = for_each_row_count!(avx2);

    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const R: usize>(tile: &Tile) {
        let valid = u32::MAX >> (PANEL - tile.columns);
        let (low, high) = (valid as __mmask16, (valid >> 16) as __mmask16);
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        // SAFETY: the caller's bounds; masked lanes of C are neither read nor written.
        unsafe {
            if tile.accumulate {
                for (row, sums) in sums.iter_mut().enumerate() {
                    let c = tile.c.add(row * tile.c_stride);
                    *sums = [_mm512_maskz_loadu_ps(low, c), _mm512_maskz_loadu_ps(high, c.wrapping_add(16))];
                }
            }
            let (mut a, mut b) = (tile.a, tile.b);
            for _ in 0..tile.steps {
                let columns = [_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16))];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm512_set1_ps(*a.add(row));
                    *sums = [_mm512_fmadd_ps(value, columns[0], sums[0]), _mm512_fmadd_ps(value, columns[1], sums[1])];
                }
                a = a.add(R);
                b = b.add(PANEL);
            }
            for (row, sums) in sums.iter().enumerate() {
                let c = tile.c.add(row * tile.c_stride);
                _mm512_mask_storeu_ps(c, low, sums[0]);
                _mm512_mask_storeu_ps(c.wrapping_add(16), high, sums[1]);
            }
        }
    }

    /// Rows and columns that fit AVX2's 16 registers: 12 accumulators, two of B, one broadcast.
    const AVX2_ROWS: usize = 6;
    const AVX2_COLUMNS: usize = 16;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const R: usize>(tile: &Tile) {
        for first_column in (0..tile.columns).step_by(AVX2_COLUMNS) {
            for first_row in (0..R).step_by(AVX2_ROWS) {
                // SAFETY: the caller's bounds hold for every part of the tile.
                unsafe {
                    match AVX2_ROWS.min(R - first_row) {
                        1 => avx2_part::<1, R>(tile, first_row, first_column),
                        2 => avx2_part::<2, R>(tile, first_row, first_column),
                        3 => avx2_part::<3, R>(tile, first_row, first_column),
                        4 => avx2_part::<4, R>(tile, first_row, first_column),
                        5 => avx2_part::<5, R>(tile, first_row, first_column),
                        _ => avx2_part::<6, R>(tile, first_row, first_column),
                    }
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_part<const P: usize, const R: usize>(tile: &Tile, first_row: usize, first_column: usize) {
        let columns = AVX2_COLUMNS.min(tile.columns - first_column) as i32;
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let masks = [_mm256_cmpgt_epi32(_mm256_set1_epi32(columns), lanes), _mm256_cmpgt_epi32(_mm256_set1_epi32(columns - 8), lanes)];
        let mut sums = [[_mm256_setzero_ps(); 2]; P];
        // SAFETY: the caller's bounds; masked lanes of C are neither read nor written.
        unsafe {
            let place = |row: usize| tile.c.add((first_row + row) * tile.c_stride + first_column);
            if tile.accumulate {
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = [_mm256_maskload_ps(place(row), masks[0]), _mm256_maskload_ps(place(row).wrapping_add(8), masks[1])];
                }
            }
            let (mut a, mut b) = (tile.a.add(first_row), tile.b.add(first_column));
            for _ in 0..tile.steps {
                let columns = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm256_broadcast_ss(&*a.add(row));
                    *sums = [_mm256_fmadd_ps(value, columns[0], sums[0]), _mm256_fmadd_ps(value, columns[1], sums[1])];
                }
                a = a.wrapping_add(R);
                b = b.wrapping_add(PANEL);
            }
            for (row, sums) in sums.iter().enumerate() {
                _mm256_maskstore_ps(place(row), masks[0], sums[0]);
                _mm256_maskstore_ps(place(row).wrapping_add(8), masks[1], sums[1]);
            }
        }
    }
}
