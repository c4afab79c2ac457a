//! Storage formats for weights: how a row of f32 becomes bytes and back. Layouts are those of ggml (`ggml-common.h`), so that
//! other engines read what is written here. A format knows rows, not tensors; containers are `export`'s.

mod bf16;
mod f16;
mod f32;
pub mod nf4;
mod q4_0;
mod q4_k;
mod q6_k;
mod q8_0;
pub mod simulate;
mod ternary;
mod tq1_0;
mod tq2_0;

pub use bf16::Bf16;
pub use f16::F16;
pub use f32::F32;
pub use q4_0::Q4_0;
pub use q4_k::Q4K;
pub use q6_k::Q6K;
pub use q8_0::Q8_0;
pub use ternary::{TernaryFormat, ternary_by_id};
pub use tq1_0::Tq1_0;
pub use tq2_0::Tq2_0;

use crate::error::{Error, Result};

/// What a container needs to know about a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// ggml's type id, as GGUF stores it.
    pub id: u32,
    /// Lower-case name, as `osprey export --format gguf-NAME` spells it.
    pub name: &'static str,
    /// Weights per block; a row holds a whole number of blocks.
    pub block: usize,
    /// Bytes per block.
    pub block_bytes: usize,
}

impl Layout {
    /// Whether a row of `width` weights can be stored.
    pub fn holds(&self, width: usize) -> bool {
        width.is_multiple_of(self.block)
    }

    /// Bytes of a row of `width` weights; `None` when the width is no whole number of blocks or the size overflows.
    pub fn row_bytes(&self, width: usize) -> Option<usize> {
        self.holds(width).then(|| (width / self.block).checked_mul(self.block_bytes)).flatten()
    }

    /// Storage cost per weight.
    pub fn bits_per_weight(&self) -> f64 {
        self.block_bytes as f64 * 8.0 / self.block as f64
    }
}

/// One storage format. A new one is a file with this trait and an entry in [`ALL`]; the conformance tests below find it there.
pub trait Format: Sync {
    /// Identity and block size.
    fn layout(&self) -> Layout;

    /// Encodes `layout().block` weights into `layout().block_bytes` bytes.
    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]);

    /// Decodes `layout().block_bytes` bytes into `layout().block` weights.
    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]);

    /// Appends the encoded row to `out`.
    ///
    /// # Errors
    /// When the row is no whole number of blocks.
    fn encode_row(&self, row: &[f32], out: &mut Vec<u8>) -> Result<()> {
        let Layout { name, block, block_bytes, .. } = self.layout();
        let start = out.len();
        let bytes = self.layout().row_bytes(row.len()).ok_or_else(|| uneven(name, row.len(), block))?;
        out.resize(start + bytes, 0);
        for (weights, bytes) in row.chunks_exact(block).zip(out[start..].chunks_exact_mut(block_bytes)) {
            self.encode_block(weights, bytes);
        }
        Ok(())
    }

    /// Decodes one or more rows; `weights` says how many elements are expected.
    ///
    /// # Errors
    /// When the two lengths do not belong together.
    fn decode_row(&self, bytes: &[u8], weights: &mut [f32]) -> Result<()> {
        let Layout { name, block, block_bytes, .. } = self.layout();
        let expected = self.layout().row_bytes(weights.len()).ok_or_else(|| uneven(name, weights.len(), block))?;
        if bytes.len() != expected {
            return Err(Error::input(name, format!("{} weights take {expected} bytes, got {}", weights.len(), bytes.len())));
        }
        for (bytes, weights) in bytes.chunks_exact(block_bytes).zip(weights.chunks_exact_mut(block)) {
            self.decode_block(bytes, weights);
        }
        Ok(())
    }
}

/// Every format, by ascending type id.
pub static ALL: &[&dyn Format] = &[&F32, &F16, &Q4_0, &Q8_0, &Q4K, &Q6K, &Bf16, &Tq1_0, &Tq2_0];

/// The format with ggml type `id`, if this crate has it.
pub fn by_id(id: u32) -> Option<&'static dyn Format> {
    ALL.iter().copied().find(|format| format.layout().id == id)
}

/// The format called `name`, if this crate has it.
pub fn by_name(name: &str) -> Option<&'static dyn Format> {
    ALL.iter().copied().find(|format| format.layout().name == name)
}

fn uneven(name: &str, width: usize, block: usize) -> Error {
    Error::input(name, format!("a row of {width} weights is no whole number of blocks of {block}"))
        .fix(format!("choose widths that are multiples of {block}"))
}

/// Reads the f16 at the start of `bytes` (little-endian).
fn read_f16(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Writes `value`, rounded to the nearest f16 (ties to even), to the start of `bytes`.
fn write_f16(value: f32, bytes: &mut [u8]) {
    bytes[..2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
}

/// The largest magnitude of `weights`; 0 for none.
fn absmax(weights: &[f32]) -> f32 {
    weights.iter().fold(0.0, |largest, weight| largest.max(weight.abs()))
}

/// 1 / d, or 0 for the scale of an all-zero block.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests;
