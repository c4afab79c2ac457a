//! BF16: the upper half of an f32, rounded to nearest, ties to even. 16 bits per weight; relative error at most 2^-8.

use super::{Format, Layout};

/// bfloat16.
pub struct Bf16;

impl Format for Bf16 {
    fn layout(&self) -> Layout {
        Layout { id: 30, name: "bf16", block: 1, block_bytes: 2 }
    }

    fn encode_block(&self, weights: &[f32], bytes: &mut [u8]) {
        bytes.copy_from_slice(&half::bf16::from_f32(weights[0]).to_le_bytes());
    }

    fn decode_block(&self, bytes: &[u8], weights: &mut [f32]) {
        weights[0] = half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    }
}
