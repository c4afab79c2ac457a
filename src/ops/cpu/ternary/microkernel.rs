//! The innermost ternary product: up to [`ROWS`] tokens times [`TILES`] tiles of 16 outputs, over the whole of k.
//!
//! Stored weights are codes plus one (0, 1, 2), unsigned as the byte dot products want them; the surplus, the sum of the row's
//! activation codes, is subtracted at the end. Sums are exact in i32 up to k = 2^23.

use super::packed::{SIDE, TILE_BYTES};
use crate::ops::cpu::isa::Isa;

/// Tokens of a full strip.
pub(super) const ROWS: usize = 12;

/// Tiles multiplied by one call.
pub(super) const TILES: usize = 4;

/// Activations of up to [`ROWS`] tokens.
pub(super) struct Strip {
    /// Word `step * rows + row` holds codes `4 * step..4 * step + 4` of a token.
    pub(super) words: *const u32,
    /// Sum of each token's codes.
    pub(super) sums: *const i32,
    /// What each token's dot products are multiplied by.
    pub(super) scales: *const f32,
}

/// Weights and result of up to [`TILES`] tiles of outputs.
pub(super) struct Panel {
    /// Tiles of 16 outputs after one another, each `depth` tiles of 64 bytes along the inputs.
    pub(super) tiles: *const u8,
    /// Tiles along the inputs.
    pub(super) depth: usize,
    /// Outputs, 1 to `TILES * SIDE`.
    pub(super) columns: usize,
    /// First element of the result; its rows are `out_stride` apart.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

impl Panel {
    /// Outputs of tile `tile` that exist.
    fn width(&self, tile: usize) -> usize {
        SIDE.min(self.columns - tile * SIDE)
    }

    /// # Safety
    /// The panel has a tile `tile`.
    #[inline(always)]
    unsafe fn tile(&self, tile: usize) -> *const u8 {
        // SAFETY: the caller's word.
        unsafe { self.tiles.add(tile * self.depth * TILE_BYTES) }
    }
}

/// Multiplies a strip with a panel.
///
/// # Safety
/// The strip holds `4 * depth` words, a sum and a scale for each of the kernel's rows; the panel holds `columns.div_ceil(16)` tiles;
/// the result may be written at `row * out_stride + column` for those rows and columns; the CPU has the kernel's instruction set.
pub(super) type Kernel = unsafe fn(&Strip, &Panel);

/// Kernels for 1 to [`ROWS`] rows, at the number of rows less one.
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

unsafe fn portable<const R: usize>(strip: &Strip, panel: &Panel) {
    for tile in 0..panel.columns.div_ceil(SIDE) {
        let mut sums = [[0i32; SIDE]; R];
        for step in 0..panel.depth {
            // SAFETY: the caller's bounds; `tile` and `step` lie within the panel.
            let bytes = unsafe { &*panel.tile(tile).add(step * TILE_BYTES).cast::<[u8; TILE_BYTES]>() };
            for quarter in 0..4 {
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: as above, for the strip.
                    let codes = unsafe { *strip.words.add((4 * step + quarter) * R + row) }.to_ne_bytes().map(|code| i32::from(code as i8));
                    for (sum, stored) in sums.iter_mut().zip(bytes.as_chunks::<4>().0) {
                        *sum += (0..4).map(|j| i32::from(stored[j] >> (2 * quarter) & 3) * codes[j]).sum::<i32>();
                    }
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (column, sum) in sums.iter().enumerate().take(panel.width(tile)) {
                // SAFETY: the caller's bounds.
                unsafe {
                    let dot = sum - *strip.sums.add(row);
                    *panel.out.add(row * panel.out_stride + tile * SIDE + column) = dot as f32 * *strip.scales.add(row);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Panel, ROWS, SIDE, Strip, TILE_BYTES};
    use std::arch::x86_64::*;

    pub(super) static AVX512: [Kernel; ROWS] = for_each_row_count!(avx512);
    pub(super) static AVX2: [Kernel; ROWS] = for_each_row_count!(avx2);

    /// Few rows take four tiles at a time, for enough independent sums; many rows take two, which fills 24 registers at 12 rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn avx512<const R: usize>(strip: &Strip, panel: &Panel) {
        let tiles = panel.columns.div_ceil(SIDE);
        let mut tile = 0;
        // SAFETY: the caller's bounds; every part lies within the panel.
        unsafe {
            while tile < tiles {
                tile += match tiles - tile {
                    4.. if R <= 6 => avx512_part::<R, 4>(strip, panel, tile),
                    2.. => avx512_part::<R, 2>(strip, panel, tile),
                    _ => avx512_part::<R, 1>(strip, panel, tile),
                };
            }
        }
    }

    /// `T` tiles from `first`; returns `T`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn avx512_part<const R: usize, const T: usize>(strip: &Strip, panel: &Panel, first: usize) -> usize {
        let mask = _mm512_set1_epi8(3);
        let mut sums = [[_mm512_setzero_si512(); T]; R];
        // SAFETY: the caller's bounds; the masked lanes of the result are not written.
        unsafe {
            let mut words = strip.words.cast::<i32>();
            for step in 0..panel.depth {
                let mut stored = [_mm512_setzero_si512(); T];
                for (tile, stored) in stored.iter_mut().enumerate() {
                    *stored = _mm512_loadu_si512(panel.tile(first + tile).add(step * TILE_BYTES).cast());
                }
                for _ in 0..4 {
                    let weights = stored.map(|stored| _mm512_and_si512(stored, mask));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let codes = _mm512_set1_epi32(*words.add(row));
                        for (sum, weights) in sums.iter_mut().zip(weights) {
                            *sum = _mm512_dpbusd_epi32(*sum, weights, codes);
                        }
                    }
                    words = words.add(R);
                    stored = stored.map(|stored| _mm512_srli_epi16::<2>(stored));
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                let surplus = _mm512_set1_epi32(*strip.sums.add(row));
                let scale = _mm512_set1_ps(*strip.scales.add(row));
                for (tile, sum) in sums.iter().enumerate() {
                    let dots = _mm512_cvtepi32_ps(_mm512_sub_epi32(*sum, surplus));
                    let out = panel.out.add(row * panel.out_stride + (first + tile) * SIDE);
                    let width = u32::MAX >> (32 - panel.width(first + tile));
                    _mm512_mask_storeu_ps(out, width as __mmask16, _mm512_mul_ps(dots, scale));
                }
            }
        }
        T
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const R: usize>(strip: &Strip, panel: &Panel) {
        for half in 0..panel.columns.div_ceil(SIDE / 2) {
            for first in (0..R).step_by(AVX2_ROWS) {
                // SAFETY: the caller's bounds; the part lies within the panel and the strip.
                unsafe {
                    match R - first {
                        1 => avx2_part::<1, R>(strip, panel, half, first),
                        2 => avx2_part::<2, R>(strip, panel, half, first),
                        3 => avx2_part::<3, R>(strip, panel, half, first),
                        _ => avx2_part::<AVX2_ROWS, R>(strip, panel, half, first),
                    }
                }
            }
        }
    }

    /// Rows whose sums stay in registers beside four blocks of weights.
    const AVX2_ROWS: usize = 4;

    /// Eight outputs (half a tile) of `P` rows from `first`. A byte product pair is at most 2 * 2 * 128 = 512 and four of them are
    /// added in 16 bits before widening, so nothing saturates.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_part<const P: usize, const R: usize>(strip: &Strip, panel: &Panel, half: usize, first: usize) {
        let (mask, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
        let mut sums = [_mm256_setzero_si256(); P];
        // SAFETY: the caller's bounds; only columns that exist are written.
        unsafe {
            let tiles = panel.tile(half / 2).add(half % 2 * (TILE_BYTES / 2));
            for step in 0..panel.depth {
                let stored = _mm256_loadu_si256(tiles.add(step * TILE_BYTES).cast());
                let weights = [
                    _mm256_and_si256(stored, mask),
                    _mm256_and_si256(_mm256_srli_epi16::<2>(stored), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(stored), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<6>(stored), mask),
                ];
                let words = strip.words.cast::<i32>().add(4 * step * R + first);
                for (row, sum) in sums.iter_mut().enumerate() {
                    let mut pairs = _mm256_setzero_si256();
                    for (quarter, weights) in weights.iter().enumerate() {
                        let codes = _mm256_set1_epi32(*words.add(quarter * R + row));
                        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(*weights, codes));
                    }
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                }
            }
            let column = half * (SIDE / 2);
            let width = (SIDE / 2).min(panel.columns - column);
            for (row, sum) in sums.iter().enumerate() {
                let dots = _mm256_cvtepi32_ps(_mm256_sub_epi32(*sum, _mm256_set1_epi32(*strip.sums.add(first + row))));
                let mut values = [0.0f32; SIDE / 2];
                _mm256_storeu_ps(values.as_mut_ptr(), _mm256_mul_ps(dots, _mm256_set1_ps(*strip.scales.add(first + row))));
                let out = panel.out.add((first + row) * panel.out_stride + column);
                std::ptr::copy_nonoverlapping(values.as_ptr(), out, width);
            }
        }
    }
}
