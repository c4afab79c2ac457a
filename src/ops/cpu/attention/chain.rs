//! Products of a few rows with a tile that is stored in another form than floats: what is stored becomes floats in registers, on its way
//! into the multiply-adds. For a lone token, where writing a tile out as floats costs more than the product itself.
//!
//! Every element of the result is the same chain as in [`product`](super::product), so the bits are the same.

use std::arch::x86_64::*;
use std::ops::Range;

/// Floats of a vector.
const WIDTH: usize = 16;
/// Rows that share one pass: 16 accumulators with 4 vectors each, and the tile's vectors beside them.
const ROWS: usize = 4;
/// Bytes that come from memory together.
const LINE: usize = 64;

/// Rows of A and C of a product C (+)= A B with `V` vectors of columns.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) count: usize,
    /// Element (row, step) at `row * a_stride + step`.
    pub(crate) a: *const f32,
    pub(crate) a_stride: usize,
    /// Row `row` at `row * c_stride`.
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    /// Continue from what C holds instead of starting at zero.
    pub(crate) accumulate: bool,
}

/// What the pass over the `part`-th 64 columns asks the memory for: half of `ahead` each in the first two, so that no pass waits for all.
pub(crate) fn ahead_in_part(ahead: &[u8], part: usize) -> &[u8] {
    let (first, second) = ahead.split_at(ahead.len().min(ahead.len().div_ceil(2).next_multiple_of(LINE)));
    match part {
        0 => first,
        1 => second,
        _ => &[],
    }
}

/// C (+)= A B over `steps`, where `load(step)` gives row `step` of B. Meanwhile asks the memory for `ahead`.
///
/// # Safety
/// The CPU has AVX-512 F. A may be read at every row and step, C read and written for `V` vectors at every row, and `load` may be called
/// with every step.
#[inline(always)]
pub(crate) unsafe fn multiply<const V: usize>(rows: Rows, steps: Range<usize>, ahead: &[u8], load: impl Fn(usize) -> [__m512; V]) {
    let mut row = 0;
    let mut ahead = ahead;
    while row < rows.count {
        let Rows { a, a_stride, c, c_stride, .. } = rows;
        // SAFETY: `row` and as many rows as are chosen are below the count.
        unsafe {
            let rest = Rows { a: a.add(row * a_stride), c: c.add(row * c_stride), ..rows };
            row += match rows.count - row {
                ROWS.. => pass::<ROWS, V>(rest, steps.clone(), ahead, &load),
                3 => pass::<3, V>(rest, steps.clone(), ahead, &load),
                2 => pass::<2, V>(rest, steps.clone(), ahead, &load),
                _ => pass::<1, V>(rest, steps.clone(), ahead, &load),
            };
        }
        ahead = &[];
    }
}

/// `R` rows; returns `R`.
///
/// # Safety
/// As for [`multiply`], with at least `R` rows.
#[inline(always)]
unsafe fn pass<const R: usize, const V: usize>(
    rows: Rows,
    steps: Range<usize>,
    ahead: &[u8],
    load: &impl Fn(usize) -> [__m512; V],
) -> usize {
    let Rows { a, a_stride, c, c_stride, accumulate, .. } = rows;
    // Lines to ask for in every step.
    let lines = ahead.len().div_ceil(LINE).div_ceil(steps.len().max(1));
    let mut line = ahead.as_ptr();
    // SAFETY: the caller's bounds; asking for memory ahead of need never faults.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        if accumulate {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(r * c_stride + v * WIDTH));
                }
            }
        }
        for step in steps {
            for _ in 0..lines {
                _mm_prefetch::<_MM_HINT_T0>(line.cast());
                line = line.wrapping_add(LINE);
            }
            let vectors = load(step);
            for (r, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.add(r * a_stride + step));
                for (sum, vector) in sums.iter_mut().zip(vectors) {
                    *sum = _mm512_fmadd_ps(value, vector, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(c.add(r * c_stride + v * WIDTH), *sum);
            }
        }
    }
    R
}
