//! Ternary linear layers: the one rule that training and packing share. Ma et al. 2024 (BitNet b1.58), arXiv:2402.17764.
//! W ~ alpha T, alpha = f16(max(mean|W|, 1e-5)), T = clamp(round(W / alpha), -1, 1);  x ~ (gamma / 127) q, gamma = max(max|x|, 1e-5),
//! q = clamp(round(x 127 / gamma), -128, 127), one gamma per token;  y = (q . T) ((gamma / 127) alpha). Rounding is ties-to-even.
//! x: [m, k]   W, T: [n, k]   y: [m, n]
//! The dot product is exact in i32, so y has the same bits on every instruction set, batch size and number of threads.

mod microkernel;
mod packed;

pub use packed::PackedTernary;

use super::gemm::pack::pack_words;
use super::isa::isa;
use super::scratch::Scratch;
use crate::multiversion;
use half::f16;
use microkernel::{Kernel, Panel, ROWS, Strip, TILES};
use packed::{SIDE, TILE_BYTES};
use rayon::prelude::*;

/// Smallest scale of weights and of activations: keeps the division finite for tensors of zeros.
pub const SMALLEST_SCALE: f32 = 1e-5;

/// Largest magnitude of an activation code.
const CODE_LIMIT: f32 = 127.0;

/// Adding this (1.5 * 2^23) to a small float rounds it to an integer, ties to even, and leaves that integer in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// Elements summed by one task; fixed, so that the mean does not depend on the number of threads.
const SUM_CHUNK: usize = 1 << 16;

/// The scale of a tensor of weights: its mean magnitude, at least [`SMALLEST_SCALE`], rounded to f16 as the packed file stores it; NaN
/// where a weight is.
pub fn weight_scale(weights: &[f32]) -> f16 {
    let sums: Vec<f64> = weights.par_chunks(SUM_CHUNK).map(magnitude_sum).collect();
    let mean = sums.iter().sum::<f64>() / weights.len().max(1) as f64;
    f16::from_f32(at_least_smallest(mean as f32))
}

/// Unlike `f32::max` this keeps a NaN, which then shows in every product.
#[inline(always)]
fn at_least_smallest(scale: f32) -> f32 {
    if scale < SMALLEST_SCALE { SMALLEST_SCALE } else { scale }
}

multiversion! {
    fn magnitude_sum(values: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        let (chunks, rest) = values.as_chunks::<16>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(value.abs());
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(value.abs());
        }
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }
}

/// clamp(round_ties_even(weight / scale), -1, 1): since a half rounds to zero, the comparisons are strict.
#[inline(always)]
pub fn ternary_code(weight: f32, scale: f32) -> i8 {
    let ratio = weight / scale;
    i8::from(ratio > 0.5) - i8::from(ratio < -0.5)
}

/// Quantizes each row of `width` activations to 8-bit codes with its own scale gamma. A row that holds a NaN or an infinity gets a
/// gamma that is not finite, so that its products are NaN too and the trouble stays visible.
///
/// # Panics
/// When `codes` is not as long as `x`, or `gammas` is not one per row.
pub fn quantize_activations(x: &[f32], width: usize, codes: &mut [i8], gammas: &mut [f32]) {
    assert!(x.len() == codes.len() && x.len() == gammas.len() * width, "one code per activation and one scale per row");
    if x.is_empty() {
        return gammas.fill(SMALLEST_SCALE);
    }
    let rows = (TASK_ELEMENTS / width).max(1);
    let chunks = (x.par_chunks(rows * width), codes.par_chunks_mut(rows * width), gammas.par_chunks_mut(rows));
    chunks.into_par_iter().for_each(|(x, codes, gammas)| {
        for ((x, codes), gamma) in x.chunks(width).zip(codes.chunks_mut(width)).zip(gammas) {
            *gamma = quantize_row(x, codes);
        }
    });
}

/// Activations that one task quantizes: enough to outweigh handing the task over, so one token's row stays on its thread.
const TASK_ELEMENTS: usize = 1 << 14;

multiversion! {
    /// Writes the codes of one token and returns its gamma.
    fn quantize_row(x: &[f32], codes: &mut [i8]) -> f32 {
        // As unsigned integers, magnitudes order as floats do, with infinity and NaN above them all.
        let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.abs().to_bits()));
        let gamma = at_least_smallest(f32::from_bits(largest));
        let factor = CODE_LIMIT / gamma;
        for (code, x) in codes.iter_mut().zip(x) {
            let bounded = (x * factor).clamp(-CODE_LIMIT - 1.0, CODE_LIMIT);
            *code = (bounded + ROUNDER).to_bits() as i8;
        }
        gamma
    }
}

multiversion! {
    fn code_sum(codes: &[i8]) -> i32 {
        codes.iter().map(|code| i32::from(*code)).sum()
    }
}

/// Rows from which threads take blocks of rows; below, they take columns, and read every weight once between them.
const ROW_TASKS_FROM: usize = 8 * ROWS;

/// Products below this many multiply-adds take less time than waking a thread.
const SERIAL_PRODUCT: usize = 1 << 20;

/// `out[m][n] = (codes[m] . weights[n]) * ((gammas[m] / 127) * alpha)`, the dot product over k in exact integers.
///
/// # Panics
/// When the lengths of `codes` or `out` disagree with the shapes.
pub fn ternary_matmul(codes: &[i8], gammas: &[f32], weights: &PackedTernary, out: &mut [f32]) {
    let rows = gammas.len();
    assert_eq!(codes.len(), rows * weights.columns(), "codes of the ternary product");
    assert_eq!(out.len(), rows * weights.rows(), "result of the ternary product");
    if out.is_empty() {
        return;
    }
    let product = Product { codes, gammas, weights, out: out.as_mut_ptr(), kernels: microkernel::kernels(isa()) };
    if rows.saturating_mul(weights.rows()).saturating_mul(weights.columns()) <= SERIAL_PRODUCT {
        product.rows_at(0, rows);
    } else if rows >= ROW_TASKS_FROM {
        let block = (rows / 16).next_multiple_of(ROWS).min(8 * ROWS);
        (0..rows.div_ceil(block)).into_par_iter().for_each(|task| product.rows_at(task * block, block.min(rows - task * block)));
    } else {
        let strips = product.pack(0, rows);
        (0..product.panels()).into_par_iter().for_each(|panel| product.panel(&strips, 0, panel));
    }
}

/// Checked operands. `out` is a pointer because threads write interleaved columns of it.
struct Product<'a> {
    codes: &'a [i8],
    gammas: &'a [f32],
    weights: &'a PackedTernary,
    out: *mut f32,
    kernels: &'static [Kernel; ROWS],
}

// SAFETY: `out` is written only by `panel`, and `ternary_matmul` gives every task its own rows or columns.
unsafe impl Sync for Product<'_> {}

/// Activations of some rows as the microkernel reads them, in strips of [`ROWS`] rows.
struct Strips {
    words: Scratch,
    sums: Vec<i32>,
    scales: Vec<f32>,
}

impl Product<'_> {
    /// Groups of [`TILES`] tiles that are multiplied together.
    fn panels(&self) -> usize {
        self.weights.rows().div_ceil(TILES * SIDE)
    }

    /// Words of four codes per row, padding included.
    fn depth(&self) -> usize {
        self.weights.tiles_per_row() * SIDE / 4
    }

    fn rows_at(&self, first: usize, count: usize) {
        let strips = self.pack(first, count);
        (0..self.panels()).for_each(|panel| self.panel(&strips, first, panel));
    }

    fn pack(&self, first: usize, count: usize) -> Strips {
        let (width, depth) = (self.weights.columns(), self.depth());
        let codes = &self.codes[first * width..(first + count) * width];
        let mut words = Scratch::take(count * depth);
        for (rows, strip) in codes.chunks(ROWS * width).zip(words.words().chunks_mut(ROWS * depth)) {
            // SAFETY: i8 and u8 have the same layout.
            let bytes = unsafe { std::slice::from_raw_parts(rows.as_ptr().cast::<u8>(), rows.len()) };
            pack_words(bytes, width, strip);
            let (whole, height) = (width / 4, rows.len() / width);
            strip[whole * height..].fill(0);
            for (row, tail) in bytes.chunks(width).map(|row| row.as_chunks::<4>().1).enumerate().filter(|(_, tail)| !tail.is_empty()) {
                let mut word = [0; 4];
                word[..tail.len()].copy_from_slice(tail);
                strip[whole * height + row] = u32::from_ne_bytes(word);
            }
        }
        let alpha = self.weights.scale().to_f32();
        let scales = self.gammas[first..first + count].iter().map(|gamma| (gamma / CODE_LIMIT) * alpha).collect();
        Strips { words, sums: codes.chunks(width).map(code_sum).collect(), scales }
    }

    /// [`TILES`] tiles of outputs for packed rows whose first is `first` in the result.
    fn panel(&self, strips: &Strips, first: usize, panel: usize) {
        let (column, depth) = (panel * TILES * SIDE, self.depth());
        let tiles = &self.weights.tiles()[panel * TILES * self.weights.tiles_per_row() * TILE_BYTES..];
        let columns = (TILES * SIDE).min(self.weights.rows() - column);
        for start in (0..strips.sums.len()).step_by(ROWS) {
            let rows = ROWS.min(strips.sums.len() - start);
            let strip = Strip {
                words: strips.words[start * depth..(start + rows) * depth].as_ptr().cast(),
                sums: strips.sums[start..start + rows].as_ptr(),
                scales: strips.scales[start..start + rows].as_ptr(),
            };
            // SAFETY: the strip's slices are checked above; `tiles` holds every tile of the panel's `columns` outputs; the result
            // holds rows up to `first + start + rows` of `weights.rows()` columns, and no other task has these.
            unsafe {
                let out = self.out.add((first + start) * self.weights.rows() + column);
                let panel = Panel { tiles: tiles.as_ptr(), depth: depth / 4, columns, out, out_stride: self.weights.rows() };
                (self.kernels[rows - 1])(&strip, &panel);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::isa::testing::on_every_isa;

    fn noise(count: usize, seed: u32) -> impl Iterator<Item = u32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(99);
        (0..count).map(move |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 9
        })
    }

    fn floats(count: usize, seed: u32) -> Vec<f32> {
        noise(count, seed).map(|bits| bits as f32 / 4_194_304.0 - 1.0).collect()
    }

    fn naive(codes: &[i8], gammas: &[f32], weights: &PackedTernary) -> Vec<f32> {
        let width = weights.columns();
        let mut out = Vec::new();
        for (row, gamma) in codes.chunks(width).zip(gammas) {
            for output in 0..weights.rows() {
                let dot: i64 = row.iter().enumerate().map(|(k, code)| i64::from(*code) * i64::from(weights.code(output, k))).sum();
                out.push(dot as i32 as f32 * ((gamma / 127.0) * weights.scale().to_f32()));
            }
        }
        out
    }

    fn assert_exact(codes: &[i8], rows: usize, weights: &PackedTernary) {
        let gammas = floats(rows, 5);
        let expected = naive(codes, &gammas, weights);
        for (isa, out) in on_every_isa(|| {
            let mut out = vec![f32::NAN; expected.len()];
            ternary_matmul(codes, &gammas, weights, &mut out);
            out
        }) {
            assert!(out == expected, "{isa}: {rows} rows, {} x {}", weights.rows(), weights.columns());
        }
    }

    #[test]
    fn products_are_exact_on_every_isa() {
        for (m, n, k) in [
            (1, 1, 1),
            (1, 16, 16),
            (2, 17, 15),
            (3, 70, 33),
            (12, 64, 64),
            (13, 100, 130),
            (27, 31, 7),
            (100, 90, 47),
            (100, 300, 47),
            (1, 1300, 900),
            (30, 500, 90),
        ] {
            let codes: Vec<i8> = noise(m * k, 1).map(|bits| bits as u8 as i8).collect();
            let ternary: Vec<i8> = noise(n * k, 2).map(|bits| (bits % 3) as i8 - 1).collect();
            assert_exact(&codes, m, &PackedTernary::from_codes(&ternary, n, k, f16::from_f32(0.37)));
        }
    }

    #[test]
    fn extremes_do_not_overflow() {
        let (m, n, k) = (5, 40, 5000);
        for code in [-128, -127, 127] {
            for weight in [-1, 0, 1] {
                assert_exact(&vec![code; m * k], m, &PackedTernary::from_codes(&vec![weight; n * k], n, k, f16::ONE));
            }
        }
    }

    #[test]
    fn rows_alone_equal_rows_in_a_batch() {
        let (m, n, k) = (130, 70, 200); // above the serial limit as a batch, below it alone
        let x = floats(m * k, 3);
        let weights = PackedTernary::from_weights(&floats(n * k, 4), n, k);
        let run = |x: &[f32]| {
            let (mut codes, mut gammas) = (vec![0; x.len()], vec![0.0; x.len() / k]);
            quantize_activations(x, k, &mut codes, &mut gammas);
            let mut out = vec![0.0; gammas.len() * n];
            ternary_matmul(&codes, &gammas, &weights, &mut out);
            out
        };
        let batch = run(&x);
        let alone: Vec<f32> = x.chunks(k).flat_map(run).collect();
        assert!(batch == alone);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a small pool starts");
        assert!(batch == pool.install(|| run(&x)));
    }

    #[test]
    fn activations_follow_the_rule() {
        let (rows, width) = (7, 45);
        let mut x = floats(rows * width, 6);
        x[width..2 * width].fill(0.0);
        x[2 * width..3 * width].iter_mut().for_each(|x| *x *= 1e-7);
        // With gamma 127 the factor is 1: halves show how ties round.
        x[3 * width..3 * width + 6].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, 3.5, -126.5]);
        for (isa, (codes, gammas)) in on_every_isa(|| {
            let (mut codes, mut gammas) = (vec![0; x.len()], vec![0.0; rows]);
            quantize_activations(&x, width, &mut codes, &mut gammas);
            (codes, gammas)
        }) {
            for ((x, codes), gamma) in x.chunks(width).zip(codes.chunks(width)).zip(gammas) {
                assert_eq!(gamma, x.iter().fold(1e-5, |m: f32, x| m.max(x.abs())), "{isa}");
                for (x, code) in x.iter().zip(codes) {
                    assert_eq!(*code, (x * (127.0 / gamma)).round_ties_even().clamp(-128.0, 127.0) as i8, "{isa} {x}");
                }
            }
        }
    }

    #[test]
    fn broken_activations_stay_visible() {
        let weights = PackedTernary::from_codes(&[1; 40], 2, 20, f16::ONE);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = floats(40, 7);
            x[3] = bad;
            let (mut codes, mut gammas, mut out) = (vec![0; 40], vec![0.0; 2], vec![0.0; 4]);
            quantize_activations(&x, 20, &mut codes, &mut gammas);
            ternary_matmul(&codes, &gammas, &weights, &mut out);
            assert!(!out[0].is_finite() && !out[1].is_finite() && out[2].is_finite(), "{bad}: {out:?}");
        }
    }

    #[test]
    fn weight_scale_is_the_mean_magnitude() {
        let weights = floats(3 * SUM_CHUNK + 37, 8);
        let mean = weights.iter().map(|w| f64::from(w.abs())).sum::<f64>() / weights.len() as f64;
        for (_, scale) in on_every_isa(|| weight_scale(&weights)) {
            assert_eq!(scale, f16::from_f32(mean as f32));
        }
        assert_eq!(weight_scale(&[0.0; 10]), f16::from_f32(1e-5));
        assert_eq!(weight_scale(&[]), f16::from_f32(1e-5));
        assert!(weight_scale(&[1.0, f32::NAN]).is_nan());
    }

    #[test]
    fn codes_round_ties_to_even() {
        for weight in floats(1000, 9) {
            assert_eq!(ternary_code(weight, 0.6), (weight / 0.6).round_ties_even().clamp(-1.0, 1.0) as i8);
        }
        let codes = [0.25, -0.25, 0.250_001, -0.250_001, 9.0, -9.0, 0.0].map(|weight| ternary_code(weight, 0.5));
        assert_eq!(codes, [0, 0, 1, -1, 1, -1, 0]);
    }
}
