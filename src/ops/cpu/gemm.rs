//! Single-precision matrix product C (+)= A B, blocked and packed after Goto & van de Geijn 2008, "Anatomy of high-performance
//! matrix multiplication", doi:10.1145/1356052.1356053.
//!
//! A: [m, k]   B: [k, n]   C: [m, n] row-major. Reads and accumulates f32.
//!
//! Every element of C is one chain of fused multiply-adds in ascending k, starting at zero or at what C holds; a later block of k
//! continues from the stored partial sum. The bits therefore depend neither on the tiling nor on the number of threads, the number of
//! rows computed together, or the instruction set: a token decoded alone gets the result it had in its batch.

mod microkernel;
pub(super) mod pack;

use super::isa::isa;
use super::scratch::Scratch;
use microkernel::{Kernel, ROWS, Tile};
use pack::pack_strip;
use rayon::prelude::*;

/// Columns of B that are packed side by side.
pub const PANEL: usize = 32;

/// Steps of k per block: a panel of B (48 KiB) stays near the core while a block of rows passes over it.
const BLOCK_STEPS: usize = 384;

/// Up to this many rows A is packed once and shared, and threads take columns; above, B is shared and threads take rows.
const SHARED_ROWS: usize = 384;

/// Strips of A that one task packs when A is shared: enough that a single token's product starts no task for it.
const SHARED_STRIPS: usize = 4;

/// Products below this many multiply-adds take less time than waking a thread.
const SERIAL_PRODUCT: usize = 1 << 19;

/// Columns of B packed at a time when it is shared: at most 3 MiB.
const SHARED_COLUMNS: usize = 2048;

/// A strided view of a matrix: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// The elements, from the first of the view to at least the last.
    pub data: &'a [f32],
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// Elements between neighbours in a column.
    pub row_stride: usize,
    /// Elements between neighbours in a row.
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A dense row-major matrix.
    ///
    /// # Panics
    /// When `data` is shorter than `rows * columns`.
    pub fn row_major(data: &'a [f32], rows: usize, columns: usize) -> Matrix<'a> {
        Matrix::with_row_stride(data, rows, columns, columns)
    }

    /// A row-major matrix whose rows are `row_stride` apart, such as one head's slice of wider rows.
    ///
    /// # Panics
    /// When `data` ends before the last element.
    pub fn with_row_stride(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Matrix<'a> {
        let matrix = Matrix { data, rows, columns, row_stride, column_stride: 1 };
        assert!(matrix.fits(), "{rows} x {columns} with rows {row_stride} apart needs more than {} elements", data.len());
        matrix
    }

    /// The same elements with rows and columns exchanged; nothing moves.
    pub fn transposed(self) -> Matrix<'a> {
        Matrix { rows: self.columns, columns: self.rows, row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    /// Whether every element lies within `data`.
    fn fits(&self) -> bool {
        let last = |count: usize, stride: usize| count.checked_sub(1).map(|last| last.checked_mul(stride));
        match (last(self.rows, self.row_stride), last(self.columns, self.column_stride)) {
            (Some(rows), Some(columns)) => rows.zip(columns).and_then(|(r, c)| r.checked_add(c)).is_some_and(|last| last < self.data.len()),
            _ => true,
        }
    }

    /// The part of `rows` x `columns` elements that starts at (`row`, `column`).
    fn part(&self, row: usize, rows: usize, column: usize, columns: usize) -> Matrix<'a> {
        debug_assert!(row + rows <= self.rows && column + columns <= self.columns);
        let start = (row * self.row_stride + column * self.column_stride).min(self.data.len());
        Matrix { data: &self.data[start..], rows, columns, ..*self }
    }

    #[cfg(test)]
    fn at(&self, row: usize, column: usize) -> f32 {
        self.data[row * self.row_stride + column * self.column_stride]
    }
}

/// A right-hand operand that hands itself out in packed panels, so that quantized weights can be expanded on the way.
pub trait Panels: Sync {
    /// Rows of the operand: the k of the product.
    fn rows(&self) -> usize;

    /// Columns of the operand: the n of the product.
    fn columns(&self) -> usize;

    /// Writes rows `first_row..first_row + rows` of the [`PANEL`] columns from `column` (a multiple of [`PANEL`]) to `out`, one
    /// row's columns side by side, with zeros for columns past the end. `out` holds `rows * PANEL` floats.
    fn pack(&self, column: usize, first_row: usize, rows: usize, out: &mut [f32]);
}

impl Panels for Matrix<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn pack(&self, column: usize, first_row: usize, rows: usize, out: &mut [f32]) {
        let columns = PANEL.min(self.columns - column);
        pack_strip(self.part(first_row, rows, column, columns).transposed(), PANEL, out);
    }
}

/// C = A B, or C += A B with `accumulate`, on all threads of the current rayon pool. Rows of C are `c_stride` apart.
///
/// # Panics
/// When the shapes disagree or `c` is too short.
pub fn gemm(a: Matrix<'_>, b: &dyn Panels, c: &mut [f32], c_stride: usize, accumulate: bool) {
    let Some(product) = Product::new(a, b, c, c_stride, accumulate) else { return };
    if a.rows.saturating_mul(a.columns).saturating_mul(product.columns) <= SERIAL_PRODUCT {
        product.alone();
    } else if a.rows <= SHARED_ROWS {
        product.share_rows();
    } else {
        product.share_columns();
    }
}

/// [`gemm`] on the calling thread alone, with the same bits: for tiles inside tasks that are already parallel.
///
/// # Panics
/// When the shapes disagree or `c` is too short.
pub fn gemm_serial(a: Matrix<'_>, b: &dyn Panels, c: &mut [f32], c_stride: usize, accumulate: bool) {
    let Some(product) = Product::new(a, b, c, c_stride, accumulate) else { return };
    product.alone();
}

/// A contiguous range, in a form that is `Copy`.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    length: usize,
}

/// Cuts `0..total` into the fewest spans of at most `limit`, nearly equal, each but the last a multiple of `unit`.
fn blocks(total: usize, limit: usize, unit: usize) -> impl Iterator<Item = Span> + Clone {
    let length = total.div_ceil(total.div_ceil(limit).max(1)).next_multiple_of(unit).max(1);
    (0..total).step_by(length).map(move |start| Span { start, length: length.min(total - start) })
}

/// The checked operands of one product. `c` is a pointer because threads write interleaved columns of it.
struct Product<'a> {
    a: Matrix<'a>,
    b: &'a dyn Panels,
    c: *mut f32,
    c_stride: usize,
    columns: usize,
    accumulate: bool,
    kernels: &'static [Kernel; ROWS],
}

// SAFETY: `c` is only written through `multiply`, and the drivers below give every thread its own rows or columns.
unsafe impl Sync for Product<'_> {}

impl<'a> Product<'a> {
    /// Checks the operands; `None` when nothing is left to compute.
    fn new(a: Matrix<'a>, b: &'a dyn Panels, c: &'a mut [f32], c_stride: usize, accumulate: bool) -> Option<Self> {
        let columns = b.columns();
        assert!(a.fits(), "the left operand ends before its last element");
        assert_eq!(a.columns, b.rows(), "inner dimensions of the product");
        let result = Matrix { data: c, rows: a.rows, columns, row_stride: c_stride, column_stride: 1 };
        assert!(result.fits() && (c_stride >= columns || a.rows <= 1), "the result's rows overlap or end early");
        if a.rows == 0 || columns == 0 {
            return None;
        }
        if a.columns == 0 {
            if !accumulate {
                c.chunks_mut(c_stride.max(1)).take(a.rows).for_each(|row| row[..columns].fill(0.0));
            }
            return None;
        }
        Some(Product { a, b, c: c.as_mut_ptr(), c_stride, columns, accumulate, kernels: microkernel::kernels(isa()) })
    }

    /// One thread: each block of rows is packed once, each panel once per block of rows.
    fn alone(&self) {
        let depth = self.a.columns.min(BLOCK_STEPS);
        let mut rows = Scratch::take(self.a.rows.min(SHARED_ROWS) * depth);
        let mut panel = Scratch::take(PANEL * depth);
        for steps in blocks(self.a.columns, BLOCK_STEPS, 1) {
            for block in blocks(self.a.rows, SHARED_ROWS, ROWS) {
                self.pack_rows(block, steps, &mut rows);
                for column in (0..self.columns).step_by(PANEL) {
                    self.b.pack(column, steps.start, steps.length, &mut panel[..PANEL * steps.length]);
                    self.multiply(block, &rows, column, &panel, steps);
                }
            }
        }
    }

    /// Few rows: A is packed once per block of k, threads take panels of columns and pack them for themselves.
    fn share_rows(&self) {
        let steps_total = self.a.columns;
        let mut rows = Scratch::take(self.a.rows * steps_total.min(BLOCK_STEPS));
        let block = Span { start: 0, length: self.a.rows };
        for steps in blocks(steps_total, BLOCK_STEPS, 1) {
            rows.par_chunks_mut(SHARED_STRIPS * ROWS * steps.length).enumerate().for_each(|(chunk, out)| {
                let start = (chunk * SHARED_STRIPS * ROWS).min(self.a.rows);
                self.pack_rows(Span { start, length: (self.a.rows - start).min(SHARED_STRIPS * ROWS) }, steps, out);
            });
            let rows = &rows[..];
            (0..self.columns.div_ceil(PANEL)).into_par_iter().for_each(|panel| {
                let column = panel * PANEL;
                let mut packed = Scratch::take(PANEL * steps.length);
                self.b.pack(column, steps.start, steps.length, &mut packed);
                self.multiply(block, rows, column, &packed, steps);
            });
        }
    }

    /// Many rows: B is packed once per block of k and columns, threads take blocks of rows and pack them for themselves.
    fn share_columns(&self) {
        let depth = self.a.columns.min(BLOCK_STEPS);
        let mut panels = Scratch::take(self.columns.min(SHARED_COLUMNS).next_multiple_of(PANEL) * depth);
        let tasks: Vec<Span> = blocks(self.a.rows, (self.a.rows / 16).clamp(4 * ROWS, 16 * ROWS), ROWS).collect();
        for columns in blocks(self.columns, SHARED_COLUMNS, PANEL) {
            for steps in blocks(self.a.columns, BLOCK_STEPS, 1) {
                let panel_length = PANEL * steps.length;
                panels[..columns.length.div_ceil(PANEL) * panel_length]
                    .par_chunks_mut(panel_length)
                    .enumerate()
                    .for_each(|(panel, out)| self.b.pack(columns.start + panel * PANEL, steps.start, steps.length, out));
                let panels = &panels[..];
                tasks.par_iter().with_max_len(1).for_each(|block| {
                    let mut rows = Scratch::take(block.length * steps.length);
                    self.pack_rows(*block, steps, &mut rows);
                    for (panel, column) in (columns.start..columns.start + columns.length).step_by(PANEL).enumerate() {
                        self.multiply(*block, &rows, column, &panels[panel * panel_length..], steps);
                    }
                });
            }
        }
    }

    /// Packs a block of A as strips of [`ROWS`] rows, the last one as narrow as what is left.
    fn pack_rows(&self, block: Span, steps: Span, out: &mut [f32]) {
        let mut rest = out;
        for first in (0..block.length).step_by(ROWS) {
            let rows = ROWS.min(block.length - first);
            let (strip, after) = rest.split_at_mut(rows * steps.length);
            pack_strip(self.a.part(block.start + first, rows, steps.start, steps.length), rows, strip);
            rest = after;
        }
    }

    /// One panel of columns for a block of rows, over one block of k.
    fn multiply(&self, block: Span, rows: &[f32], column: usize, panel: &[f32], steps: Span) {
        assert!(rows.len() >= block.length * steps.length && panel.len() >= PANEL * steps.length, "packed operands are whole");
        for first in (0..block.length).step_by(ROWS) {
            let height = ROWS.min(block.length - first);
            // SAFETY: the packed operands hold the strip and the panel (asserted above), and `new` checked that row
            // `block.start + first + height - 1` and the columns below `self.columns` lie within C. No other thread has this tile.
            unsafe {
                let tile = Tile {
                    steps: steps.length,
                    a: rows.as_ptr().add(first * steps.length),
                    b: panel.as_ptr(),
                    c: self.c.add((block.start + first) * self.c_stride + column),
                    c_stride: self.c_stride,
                    columns: PANEL.min(self.columns - column),
                    accumulate: self.accumulate || steps.start > 0,
                };
                (self.kernels[height - 1])(&tile);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::isa::testing::on_every_isa;

    /// Values whose products round, so that another order of summation would show.
    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(next).collect()
    }

    /// The contract itself: one chain per element.
    fn chains(a: Matrix<'_>, b: Matrix<'_>, c: &[f32], c_stride: usize) -> Vec<f32> {
        let mut out = c.to_vec();
        for i in 0..a.rows {
            for j in 0..b.columns {
                let start = out[i * c_stride + j];
                out[i * c_stride + j] = (0..a.columns).fold(start, |sum, k| a.at(i, k).mul_add(b.at(k, j), sum));
            }
        }
        out
    }

    const SHAPES: [(usize, usize, usize); 10] = [
        (1, 1, 1),
        (1, 40, 33),
        (3, 5, 7),
        (12, 16, 32),
        (13, 400, 31),
        (25, 64, 100),
        (64, 1, 64),
        (48, 769, 65),
        (390, 30, 40),
        (401, 390, 17),
    ];

    #[test]
    fn every_element_is_one_chain_on_every_isa() {
        for (m, k, n) in SHAPES {
            let (left, right) = (values(m * k, 1), values(k * n, 2));
            let c_stride = n + 3;
            let start = values(m * c_stride, 3);
            let lefts = [Matrix::row_major(&left, m, k), Matrix::row_major(&left, k, m).transposed()];
            let rights = [Matrix::row_major(&right, k, n), Matrix::row_major(&right, n, k).transposed()];
            for (a, b) in lefts.into_iter().zip(rights).chain([(lefts[0], rights[1])]) {
                let expected = chains(a, b, &start, c_stride);
                for (isa, (parallel, serial)) in on_every_isa(|| {
                    let (mut parallel, mut serial) = (start.clone(), start.clone());
                    gemm(a, &b, &mut parallel, c_stride, true);
                    gemm_serial(a, &b, &mut serial, c_stride, true);
                    (parallel, serial)
                }) {
                    assert!(parallel == expected, "{isa} {m} {k} {n}");
                    assert!(serial == expected, "{isa} serial {m} {k} {n}");
                }
            }
        }
    }

    #[test]
    fn overwrites_with_the_product() {
        for (m, k, n) in SHAPES {
            let (left, right) = (values(m * k, 4), values(k * n, 5));
            let (a, b) = (Matrix::row_major(&left, m, k), Matrix::row_major(&right, k, n));
            let mut c = vec![f32::NAN; m * n];
            gemm(a, &b, &mut c, n, false);
            for i in 0..m {
                for j in 0..n {
                    let exact: f64 = (0..k).map(|k| f64::from(a.at(i, k)) * f64::from(b.at(k, j))).sum();
                    let scale: f64 = (0..k).map(|k| f64::from(a.at(i, k)).abs() * f64::from(b.at(k, j)).abs()).sum();
                    let error = (f64::from(c[i * n + j]) - exact).abs();
                    assert!(error <= 1e-6 * scale.max(1e-6), "{m} {k} {n} at ({i}, {j}): {error}");
                }
            }
        }
    }

    #[test]
    fn rows_alone_equal_rows_in_a_batch() {
        let (m, k, n) = (417, 500, 70);
        let (left, right) = (values(m * k, 6), values(k * n, 7));
        let b = Matrix::row_major(&right, n, k).transposed();
        let mut batch = vec![0.0; m * n];
        gemm(Matrix::row_major(&left, m, k), &b, &mut batch, n, false);
        for (row, batched) in left.chunks(k).zip(batch.chunks(n)) {
            let mut alone = vec![0.0; n];
            gemm(Matrix::row_major(row, 1, k), &b, &mut alone, n, false);
            assert!(alone == batched);
        }
    }

    #[test]
    fn threads_do_not_show() {
        for (m, k, n) in [(500, 800, 130), (20, 800, 130), (1, 800, 1300)] {
            let (left, right) = (values(m * k, 8), values(k * n, 9));
            let mut results = (1..=3).map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool starts");
                let mut c = vec![0.0; m * n];
                pool.install(|| gemm(Matrix::row_major(&left, m, k), &Matrix::row_major(&right, k, n), &mut c, n, false));
                c
            });
            let single = results.next();
            assert!(results.all(|c| Some(c) == single));
        }
    }

    #[test]
    fn accumulating_continues_the_chain() {
        let (m, k, n, cut) = (30, 700, 50, 300);
        let (left, right) = (values(m * k, 10), values(k * n, 11));
        let (a, b) = (Matrix::row_major(&left, m, k), Matrix::row_major(&right, k, n));
        let (mut whole, mut halves) = (vec![0.0; m * n], vec![0.0; m * n]);
        gemm(a, &b, &mut whole, n, false);
        gemm(a.part(0, m, 0, cut), &b.part(0, cut, 0, n), &mut halves, n, false);
        gemm(a.part(0, m, cut, k - cut), &b.part(cut, k - cut, 0, n), &mut halves, n, true);
        assert!(whole == halves);
    }

    #[test]
    fn empty_products() {
        let mut c = vec![7.0; 6];
        gemm(Matrix::row_major(&[], 2, 0), &Matrix::row_major(&[], 0, 3), &mut c, 3, true);
        assert_eq!(c, [7.0; 6]);
        gemm(Matrix::row_major(&[], 2, 0), &Matrix::row_major(&[], 0, 2), &mut c, 3, false);
        assert_eq!(c, [0.0, 0.0, 7.0, 0.0, 0.0, 7.0]);
        gemm(Matrix::row_major(&[], 0, 4), &Matrix::row_major(&[0.0; 12], 4, 3), &mut c, 3, false);
    }

    #[test]
    #[should_panic(expected = "inner dimensions")]
    fn disagreeing_shapes_are_refused() {
        gemm(Matrix::row_major(&[0.0; 6], 2, 3), &Matrix::row_major(&[0.0; 8], 2, 4), &mut [0.0; 8], 4, false);
    }
}
