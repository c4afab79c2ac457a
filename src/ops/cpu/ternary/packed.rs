//! Ternary weights at two bits each, in the order the matrix product reads them.

use super::{ternary_code, weight_scale};
use crate::multiversion;
use crate::ops::cpu::gemm::{PANEL, Panels};
use half::f16;
use rayon::prelude::*;

/// Outputs, and inputs, of one tile.
pub(super) const SIDE: usize = 16;

/// 16 x 16 codes of two bits.
pub(super) const TILE_BYTES: usize = SIDE * SIDE / 4;

/// Four zero weights: a code is stored plus one.
const ZEROS: u8 = 0b01_01_01_01;

/// A matrix [rows = outputs, columns = inputs] of codes -1, 0, 1 under one scale.
///
/// Codes plus one are stored in tiles of 16 outputs x 16 inputs, the tiles of 16 outputs one after another along the inputs. Byte
/// `4 * output + j` of a tile holds inputs j, 4 + j, 8 + j, 12 + j from its lowest bits up, so that a 64-byte load, shifted by 0, 2, 4
/// and 6 bits and masked, gives four blocks of 16 outputs x 4 successive inputs. Both sides are padded with weight zero.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedTernary {
    rows: usize,
    columns: usize,
    tiles: Vec<u8>,
    scale: f16,
}

impl PackedTernary {
    /// Quantizes row-major weights [rows, columns] under their own [`weight_scale`].
    ///
    /// # Panics
    /// When `weights` does not hold `rows * columns` values.
    pub fn from_weights(weights: &[f32], rows: usize, columns: usize) -> PackedTernary {
        let scale = weight_scale(weights);
        let divisor = scale.to_f32();
        PackedTernary::build(weights, rows, columns, scale, |weights, codes| quantize_codes(weights, divisor, codes))
    }

    /// Packs codes that are already -1, 0 or 1, row-major [rows, columns].
    ///
    /// # Panics
    /// When `codes` does not hold `rows * columns` values, or one of them is not a ternary code.
    pub fn from_codes(codes: &[i8], rows: usize, columns: usize, scale: f16) -> PackedTernary {
        assert!(codes.iter().all(|code| (-1..=1).contains(code)), "ternary codes are -1, 0 or 1");
        PackedTernary::build(codes, rows, columns, scale, |codes, stored| {
            for (stored, code) in stored.iter_mut().zip(codes) {
                *stored = (code + 1) as u8;
            }
        })
    }

    /// Packs 16 outputs per task; `store` turns one row's values into codes plus one.
    fn build<T: Sync>(values: &[T], rows: usize, columns: usize, scale: f16, store: impl Fn(&[T], &mut [u8]) + Sync) -> PackedTernary {
        assert_eq!(Some(values.len()), rows.checked_mul(columns), "weights of a {rows} x {columns} matrix");
        let tiles_per_row = columns.div_ceil(SIDE);
        let mut tiles = vec![ZEROS; rows.div_ceil(SIDE) * tiles_per_row * TILE_BYTES];
        if !values.is_empty() {
            let groups = tiles.par_chunks_mut(tiles_per_row * TILE_BYTES).zip(values.par_chunks(SIDE * columns));
            groups.for_each_init(
                || vec![1; tiles_per_row * SIDE],
                |stored, (tiles, values)| {
                    for (output, row) in values.chunks(columns).enumerate() {
                        store(row, stored);
                        pack_row(stored, output, tiles);
                    }
                },
            );
        }
        PackedTernary { rows, columns, tiles, scale }
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// What a code of one stands for.
    pub fn scale(&self) -> f16 {
        self.scale
    }

    /// Bytes of packed codes, padding included.
    pub fn bytes(&self) -> usize {
        self.tiles.len()
    }

    /// The code of one weight.
    ///
    /// # Panics
    /// When the place lies outside the matrix.
    pub fn code(&self, row: usize, column: usize) -> i8 {
        assert!(row < self.rows && column < self.columns, "({row}, {column}) of a {} x {} matrix", self.rows, self.columns);
        let word = self.word(row, column / SIDE);
        (word >> shift(column % SIDE) & 3) as i8 - 1
    }

    /// The codes of one output, 16 inputs to a word: byte j holds those of inputs j, 4 + j, 8 + j and 12 + j, each plus one, from its
    /// lowest bits up. Inputs beyond the last have weight zero.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_words(&self, row: usize) -> impl Iterator<Item = u32> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        (0..self.tiles_per_row()).map(move |tile| self.word(row, tile))
    }

    /// Writes scale * code, row-major.
    ///
    /// # Panics
    /// When `out` does not hold `rows * columns` values.
    pub fn dequantize_into(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.rows * self.columns, "dequantized weights");
        if out.is_empty() {
            return;
        }
        let scale = self.scale.to_f32();
        out.par_chunks_mut(self.columns).with_min_len(SIDE).enumerate().for_each(|(row, out)| {
            let (tiles, output) = (self.tiles_of(row), row % SIDE);
            expand_row(tiles, output, scale, out);
        });
    }

    /// Share of the weights that are zero; 0 for an empty matrix.
    pub fn zero_fraction(&self) -> f64 {
        let zeros = |chunk: &[u8; 8]| {
            let bits = u64::from_le_bytes(*chunk);
            u64::from((bits & !(bits >> 1) & 0x5555_5555_5555_5555).count_ones())
        };
        let stored: u64 = self.tiles.as_chunks().0.iter().map(zeros).sum();
        let weights = self.rows * self.columns;
        (stored as usize - (self.tiles.len() * 4 - weights)) as f64 / weights.max(1) as f64
    }

    pub(super) fn tiles(&self) -> &[u8] {
        &self.tiles
    }

    /// Tiles along the inputs.
    pub(super) fn tiles_per_row(&self) -> usize {
        self.columns.div_ceil(SIDE)
    }

    /// The tiles of the 16 outputs that `row` belongs to.
    fn tiles_of(&self, row: usize) -> &[u8] {
        let length = self.tiles_per_row() * TILE_BYTES;
        &self.tiles[row / SIDE * length..][..length]
    }

    /// The codes of one output's 16 inputs from `16 * tile`.
    fn word(&self, row: usize, tile: usize) -> u32 {
        tile_word(self.tiles_of(row), row % SIDE, tile)
    }
}

/// The matrix as right operand [outputs, inputs] of a dense product: what the gradient of a ternary layer's input multiplies by.
impl Panels for PackedTernary {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn pack(&self, column: usize, first_row: usize, rows: usize, out: &mut [f32]) {
        assert!(first_row + rows <= self.rows && column.is_multiple_of(PANEL) && column < self.columns, "panel outside the matrix");
        let scale = self.scale.to_f32();
        let first = column / SIDE;
        let last = (first + PANEL / SIDE).min(self.tiles_per_row());
        for (row, out) in (first_row..first_row + rows).zip(out.chunks_exact_mut(PANEL)) {
            let tiles = &self.tiles_of(row)[first * TILE_BYTES..last * TILE_BYTES];
            let (existing, padding) = out.split_at_mut((last - first) * SIDE);
            expand_row(tiles, row % SIDE, scale, existing);
            padding.fill(0.0);
        }
    }
}

/// Place of input `lane` of a tile in its output's word.
#[inline(always)]
const fn shift(lane: usize) -> u32 {
    (lane % 4 * 8 + lane / 4 * 2) as u32
}

const SHIFTS: [u32; SIDE] = {
    let mut shifts = [0; SIDE];
    let mut lane = 0;
    while lane < SIDE {
        shifts[lane] = shift(lane);
        lane += 1;
    }
    shifts
};

#[inline(always)]
fn tile_word(tiles: &[u8], output: usize, tile: usize) -> u32 {
    let place = tile * TILE_BYTES + output * 4;
    u32::from_le_bytes([tiles[place], tiles[place + 1], tiles[place + 2], tiles[place + 3]])
}

multiversion! {
    /// Codes plus one of a row of weights.
    fn quantize_codes(weights: &[f32], scale: f32, stored: &mut [u8]) {
        for (stored, weight) in stored.iter_mut().zip(weights) {
            *stored = (ternary_code(*weight, scale) + 1) as u8;
        }
    }
}

/// Places one output's codes (a multiple of 16 of them, each plus one) in the tiles of its group.
fn pack_row(stored: &[u8], output: usize, tiles: &mut [u8]) {
    for (inputs, tile) in stored.as_chunks::<SIDE>().0.iter().zip(tiles.chunks_exact_mut(TILE_BYTES)) {
        let quad = |place: usize| u32::from_le_bytes([inputs[place], inputs[place + 1], inputs[place + 2], inputs[place + 3]]);
        let word = quad(0) | quad(4) << 2 | quad(8) << 4 | quad(12) << 6;
        tile[output * 4..output * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
}

multiversion! {
    /// scale * code for one output of a group of tiles, as many inputs as `out` holds.
    fn expand_row(tiles: &[u8], output: usize, scale: f32, out: &mut [f32]) {
        for (tile, out) in out.chunks_mut(SIDE).enumerate() {
            let word = tile_word(tiles, output, tile);
            let values = SHIFTS.map(|shift| ((word >> shift & 3) as i32 - 1) as f32 * scale);
            out.copy_from_slice(&values[..out.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::cpu::gemm::{Matrix, gemm};
    use crate::ops::cpu::isa::testing::on_every_isa;

    fn codes(count: usize) -> Vec<i8> {
        (0..count).map(|i| ((i * i * 31 + i * 7) % 11 % 3) as i8 - 1).collect()
    }

    #[test]
    fn codes_come_back() {
        for (rows, columns) in [(1, 1), (16, 16), (17, 33), (40, 100), (3, 0), (0, 3)] {
            let codes = codes(rows * columns);
            let packed = PackedTernary::from_codes(&codes, rows, columns, f16::from_f32(0.25));
            let mut dense = vec![f32::NAN; codes.len()];
            packed.dequantize_into(&mut dense);
            for (place, code) in codes.iter().enumerate() {
                assert_eq!(packed.code(place / columns, place % columns), *code);
                assert_eq!(dense[place], f32::from(*code) * 0.25);
                let word = packed.row_words(place / columns).nth(place % columns / 16).unwrap();
                assert_eq!((word >> shift(place % columns % 16) & 3) as i8 - 1, *code);
            }
            let zeros = codes.iter().filter(|code| **code == 0).count();
            assert_eq!(packed.zero_fraction(), zeros as f64 / codes.len().max(1) as f64);
            assert_eq!(packed.bytes(), rows.div_ceil(16) * columns.div_ceil(16) * 64);
        }
    }

    #[test]
    fn weights_follow_the_rule_on_every_isa() {
        let (rows, columns) = (37, 83);
        let weights: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 0.7).sin() * 0.1).collect();
        for (isa, packed) in on_every_isa(|| PackedTernary::from_weights(&weights, rows, columns)) {
            let scale = weight_scale(&weights);
            assert_eq!(packed.scale(), scale);
            for (place, weight) in weights.iter().enumerate() {
                let code = (weight / scale.to_f32()).round_ties_even().clamp(-1.0, 1.0);
                assert_eq!(f32::from(packed.code(place / columns, place % columns)), code, "{isa} at {place}");
            }
        }
    }

    #[test]
    fn multiplies_as_its_dense_form() {
        let (m, k, n) = (70, 45, 83);
        let packed = PackedTernary::from_codes(&codes(k * n), k, n, f16::from_f32(0.3));
        let mut dense = vec![0.0; k * n];
        packed.dequantize_into(&mut dense);
        let left: Vec<f32> = (0..m * k).map(|i| (i as f32).cos()).collect();
        let (mut from_packed, mut from_dense) = (vec![0.0; m * n], vec![0.0; m * n]);
        gemm(Matrix::row_major(&left, m, k), &packed, &mut from_packed, n, false);
        gemm(Matrix::row_major(&left, m, k), &Matrix::row_major(&dense, k, n), &mut from_dense, n, false);
        assert!(from_packed == from_dense);
    }

    #[test]
    #[should_panic(expected = "ternary codes are")]
    fn other_codes_are_refused() {
        PackedTernary::from_codes(&[2], 1, 1, f16::ONE);
    }
}
