//! Small products C (+)= A B between tiles that are already near the core: the inner loops of attention.
//!
//! Every element of C is one chain of fused multiply-adds in ascending step, starting at zero or at what C holds, so the bits depend
//! neither on the instruction set nor on which rows are computed together.

use crate::ops::cpu::isa::{Isa, isa};
use crate::ops::cpu::reduce::LANES;

/// C[rows, columns] (+)= A[rows, steps] B[steps, columns]; `columns` is a multiple of [`LANES`].
pub(super) struct Product<'a> {
    pub(super) rows: usize,
    pub(super) steps: usize,
    pub(super) columns: usize,
    /// Element (row, step) at `row * a_row_stride + step * a_step_stride`.
    pub(super) a: &'a [f32],
    pub(super) a_row_stride: usize,
    pub(super) a_step_stride: usize,
    /// Element (step, column) at `step * b_stride + column`.
    pub(super) b: &'a [f32],
    pub(super) b_stride: usize,
}

/// C of a product: element (row, column) at `row * stride + column`.
pub(super) struct Target<'a> {
    pub(super) c: &'a mut [f32],
    pub(super) stride: usize,
    /// Continue from what C holds instead of starting at zero.
    pub(super) accumulate: bool,
}

impl Product<'_> {
    /// Computes the product on the current instruction set.
    pub(super) fn run(&self, target: Target<'_>) {
        let Product { rows, steps, columns, .. } = *self;
        if rows == 0 || columns == 0 {
            return;
        }
        assert!(columns.is_multiple_of(LANES) && target.c.len() >= (rows - 1) * target.stride + columns, "result outside its slice");
        if steps > 0 {
            assert!(self.a.len() > (rows - 1) * self.a_row_stride + (steps - 1) * self.a_step_stride, "left operand outside its slice");
            assert!(self.b.len() >= (steps - 1) * self.b_stride + columns, "right operand outside its slice");
        }
        match isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has AVX-512, and the assertions above bound every access.
            Isa::Avx512 => unsafe { x86::run_avx512(self, target) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has AVX2 and FMA, and the assertions above bound every access.
            Isa::Avx2 => unsafe { x86::run_avx2(self, target) },
            _ => self.run_portable(target),
        }
    }

    fn run_portable(&self, target: Target<'_>) {
        for row in 0..self.rows {
            for column in (0..self.columns).step_by(LANES) {
                let c = &mut target.c[row * target.stride + column..][..LANES];
                let mut sums = [0.0f32; LANES];
                if target.accumulate {
                    sums.copy_from_slice(c);
                }
                for step in 0..self.steps {
                    let a = self.a[row * self.a_row_stride + step * self.a_step_stride];
                    let b = &self.b[step * self.b_stride + column..][..LANES];
                    sums.iter_mut().zip(b).for_each(|(sum, b)| *sum = a.mul_add(*b, *sum));
                }
                c.copy_from_slice(&sums);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Product, Target};
    use std::arch::x86_64::*;

    macro_rules! tile_kernel {
        ($name:ident, $features:literal, $width:literal, $zero:ident, $load:ident, $store:ident, $splat:ident, $fused:ident) => {
            /// One tile of `R` rows and `V` vectors at (`row`, `column`), all of whose accumulators live in registers.
            ///
            /// # Safety
            /// The tile lies within the operands.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn $name<const R: usize, const V: usize>(product: &Product<'_>, target: &mut Target<'_>, row: usize, column: usize) {
                let mut sums = [[$zero(); V]; R];
                // SAFETY: the caller's bounds; pointers that run past the last step are not read.
                unsafe {
                    let c = target.c.as_mut_ptr().add(row * target.stride + column);
                    if target.accumulate {
                        for r in 0..R {
                            for v in 0..V {
                                sums[r][v] = $load(c.add(r * target.stride + v * $width));
                            }
                        }
                    }
                    let mut a = product.a.as_ptr().wrapping_add(row * product.a_row_stride);
                    let mut b = product.b.as_ptr().wrapping_add(column);
                    for _ in 0..product.steps {
                        let mut lanes = [$zero(); V];
                        for v in 0..V {
                            lanes[v] = $load(b.add(v * $width));
                        }
                        for r in 0..R {
                            let value = $splat(*a.add(r * product.a_row_stride));
                            for v in 0..V {
                                sums[r][v] = $fused(value, lanes[v], sums[r][v]);
                            }
                        }
                        a = a.wrapping_add(product.a_step_stride);
                        b = b.wrapping_add(product.b_stride);
                    }
                    for r in 0..R {
                        for v in 0..V {
                            $store(c.add(r * target.stride + v * $width), sums[r][v]);
                        }
                    }
                }
            }
        };
    }

    tile_kernel!(tile_avx512, "avx512f", 16, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps);
    tile_kernel!(tile_avx2, "avx2,fma", 8, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps);

    /// # Safety
    /// The CPU has AVX-512 and the operands hold what the product and its target describe.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn run_avx512(product: &Product<'_>, mut target: Target<'_>) {
        let mut column = 0;
        while column < product.columns {
            // SAFETY: rows and columns of every tile end at or before the product's.
            unsafe {
                // 16 accumulators: twice what hides the latency of two multiply-adds per cycle, with registers to spare.
                column += match (product.columns - column) / LANES {
                    4.. => strip_avx512::<4, 4>(product, &mut target, column),
                    2 | 3 => strip_avx512::<8, 2>(product, &mut target, column),
                    _ => strip_avx512::<8, 1>(product, &mut target, column),
                };
            }
        }
    }

    /// All rows of `V` vectors from `column`, `R` at a time; returns the number of columns.
    ///
    /// # Safety
    /// As for [`run_avx512`], with `V` vectors left from `column`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn strip_avx512<const R: usize, const V: usize>(product: &Product<'_>, target: &mut Target<'_>, column: usize) -> usize {
        let mut row = 0;
        while row < product.rows {
            // SAFETY: a tile is chosen only when its rows are left.
            row += unsafe {
                match product.rows - row {
                    left if left >= R => {
                        tile_avx512::<R, V>(product, target, row, column);
                        R
                    }
                    left if left >= 4 => {
                        tile_avx512::<4, V>(product, target, row, column);
                        4
                    }
                    left if left >= 2 => {
                        tile_avx512::<2, V>(product, target, row, column);
                        2
                    }
                    _ => {
                        tile_avx512::<1, V>(product, target, row, column);
                        1
                    }
                }
            };
        }
        V * LANES
    }

    /// # Safety
    /// The CPU has AVX2 and FMA and the operands hold what the product and its target describe.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn run_avx2(product: &Product<'_>, mut target: Target<'_>) {
        for column in (0..product.columns).step_by(LANES) {
            let mut row = 0;
            // SAFETY: a tile is chosen only when its rows are left; 4 x 2 accumulators and 3 operands fit the 16 registers.
            unsafe {
                while row + 4 <= product.rows {
                    tile_avx2::<4, 2>(product, &mut target, row, column);
                    row += 4;
                }
                while row < product.rows {
                    tile_avx2::<1, 2>(product, &mut target, row, column);
                    row += 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::isa::testing::on_every_isa;
    use crate::ops::cpu::testing::uniform;

    #[test]
    fn every_element_is_one_chain_on_every_isa() {
        for (rows, steps, columns) in [(1, 0, 16), (1, 7, 64), (3, 64, 48), (8, 5, 32), (13, 64, 112), (64, 64, 64)] {
            for (a_row_stride, a_step_stride) in [(steps + 2, 1), (1, rows + 3)] {
                let a = uniform(1, (rows + 3) * (steps + 2) + 64);
                let (b_stride, stride) = (columns + 5, columns + 1);
                let (b, start) = (uniform(2, (steps + 1) * b_stride), uniform(3, rows * stride));
                let product = Product { rows, steps, columns, a: &a, a_row_stride, a_step_stride, b: &b, b_stride };
                for accumulate in [false, true] {
                    for (isa, c) in on_every_isa(|| {
                        let mut c = start.clone();
                        product.run(Target { c: &mut c, stride, accumulate });
                        c
                    }) {
                        for (place, c) in c.iter().enumerate() {
                            let (row, column) = (place / stride, place % stride);
                            let chain = (0..steps).fold(if accumulate { start[place] } else { 0.0 }, |sum, step| {
                                a[row * a_row_stride + step * a_step_stride].mul_add(b[step * b_stride + column % columns], sum)
                            });
                            let expected = if column < columns { chain } else { start[place] };
                            assert_eq!(c.to_bits(), expected.to_bits(), "{isa} {rows} {steps} {columns} at {row}, {column}");
                        }
                    }
                }
            }
        }
    }
}
